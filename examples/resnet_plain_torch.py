"""A ResNet-18 in a plain torch loop: random_resized crops, ImageNet's mean and standard deviation (preset imagenet).

    python examples/resnet_plain_torch.py --index INDEX [--steps 100] [--batch-size 64] [--tier archives] [--device cuda]

INDEX: a folder that tools/build_index.py wrote. Prints images a second and the share of the time spent waiting for data. The
network is torchvision's or timm's where one of them is installed, else the one below. In processes of torchrun, each gets its
share of every batch: wrap the network in DistributedDataParallel.
"""
import argparse
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline import SampleIndex, TrainLoader, make_train_loader


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut (arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


def resnet18(classes: int) -> nn.Module:
    """A ResNet-18: an installed library's, or this file's."""
    try:
        from torchvision.models import resnet18 as of_torchvision
        return of_torchvision(num_classes=classes)
    except (ImportError, RuntimeError):  # not installed, or for another torch
        pass
    try:
        import timm
        return timm.create_model("resnet18", num_classes=classes)
    except (ImportError, RuntimeError):
        pass
    widths = [64, 64, 128, 256, 512]
    blocks = [Block(before if number == 0 else width, width, 2 if number == 0 and width > 64 else 1)
              for before, width in zip(widths, widths[1:]) for number in range(2)]
    return nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
                         nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def endless(loader: TrainLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tier", default="archives")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    index = SampleIndex.load(args.index)
    network = resnet18(len(index.classes)).to(args.device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    with make_train_loader(index, batch_size=args.batch_size, data="imagenet", tier=args.tier, device=args.device) as loader:
        start = waited = 0.0
        for step, (images, labels) in zip(range(args.steps + 1), endless(loader)):
            if step == 1:  # the first step starts threads and decoders
                start, waited = time.perf_counter(), loader.monitor.waits.seconds
            loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        value = loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        waited = loader.monitor.waits.seconds - waited
    print(f"{args.steps} steps of {args.batch_size} on {args.device}: {args.steps * args.batch_size / seconds:,.1f} img/s, "
          f"data wait {waited / seconds:.1%}, last loss {value:.3f}")


if __name__ == "__main__":
    main()
