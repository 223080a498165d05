"""A ResNet-18 trained by Lightning on the loader's images (preset imagenet).

    pip install lightning timm
    python examples/lightning_resnet18.py --index INDEX [--steps 100] [--batch-size 64]

`fit` takes any iterable. Lightning must not replace the sampler: the loader shares the batches among the processes itself. The
loaders are made in the hooks that Lightning calls in each process, after it has started them; there the shard is known.
"""
import argparse
import time

import lightning
import timm
import torch

from pipeline import SampleIndex, TrainLoader, make_train_loader


class Images(lightning.LightningDataModule):
    def __init__(self, index: SampleIndex, batch_size: int) -> None:
        super().__init__()
        self.index, self.batch_size = index, batch_size

    def train_dataloader(self) -> TrainLoader:
        return make_train_loader(self.index, batch_size=self.batch_size, data="imagenet",
                                 device=self.trainer.strategy.root_device)


class ResNet(lightning.LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = timm.create_model("resnet18", num_classes=classes)

    def training_step(self, pair: tuple[torch.Tensor, torch.Tensor], number: int) -> torch.Tensor:
        images, labels = pair
        return torch.nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    index = SampleIndex.load(args.index)
    trainer = lightning.Trainer(max_steps=args.steps, use_distributed_sampler=False, logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False)
    start = time.perf_counter()
    trainer.fit(ResNet(len(index.classes)), datamodule=Images(index, args.batch_size))
    seconds, loader = time.perf_counter() - start, trainer.train_dataloader
    print(f"{trainer.global_step} steps of {args.batch_size}: {trainer.global_step * args.batch_size / seconds:,.1f} img/s, "
          f"data wait {loader.monitor.waits.seconds / seconds:.1%}")
    loader.close()


if __name__ == "__main__":
    main()
