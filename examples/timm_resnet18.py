"""timm's ResNet-18, loss, optimizer and schedule on the loader's images (preset imagenet); each epoch validated where it can be.

    pip install timm
    python examples/timm_resnet18.py --index INDEX [--steps 100] [--batch-size 64] [--device cuda]

timm's own train.py builds its loaders itself; its parts take any.
"""
import argparse
import itertools
import time

import timm
import timm.loss
import timm.optim
import timm.scheduler
import torch

from pipeline import SampleIndex, make_eval_loader, make_train_loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    index = SampleIndex.load(args.index)
    network = timm.create_model("resnet18", num_classes=len(index.classes)).to(args.device)
    optimizer = timm.optim.create_optimizer_v2(network, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=args.steps, t_in_epochs=False)
    criterion = timm.loss.LabelSmoothingCrossEntropy(0.1)
    with make_train_loader(index, batch_size=args.batch_size, data="imagenet", device=args.device) as train:
        start, step = time.perf_counter(), 0
        while step < args.steps:
            for images, labels in itertools.islice(train, args.steps - step):  # an epoch, or what is left to do
                loss = criterion(network(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                schedule.step_update(step)
        value, seconds = loss.item(), time.perf_counter() - start
        print(f"{step} steps of {args.batch_size} on {args.device}: {step * args.batch_size / seconds:,.1f} img/s, data wait "
              f"{train.monitor.waits.seconds / seconds:.1%}, last loss {value:.3f}")
    if "val" in index.split_names:
        network.eval()
        with make_eval_loader(index, batch_size=args.batch_size, data="imagenet", device=args.device) as val, torch.no_grad():
            right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in val)
        print(f"validation: {right} of {len(index.ids('val'))} right")


if __name__ == "__main__":
    main()
