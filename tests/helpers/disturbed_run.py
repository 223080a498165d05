"""Runs of `train.main` in which something happens at a given batch: `python -m tests.helpers.disturbed_run signal|spoil
training|testing NUMBER ARGUMENTS…` disturbs the second of two processes."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from typing import Any

from model.alexnet import AlexNet
from train import build
from train.main import main


def signal_at(network: AlexNet, training: bool, number: int, which: int = signal.SIGTERM) -> None:
    """Send this process a signal when the network sees its batch of this number (from 0), of training or of tests."""
    count = itertools.count()

    def send(module: Any, inputs: Any) -> None:
        if module.training == training and next(count) == number:
            os.kill(os.getpid(), which)
    network.register_forward_pre_hook(send)


def fails_at(network: AlexNet, number: int) -> None:
    """An error of the machine when the network sees its training batch of this number, from 0."""
    count = itertools.count()

    def fail(module: Any, inputs: Any) -> None:
        if module.training and next(count) == number:
            raise OSError("the machine is broken on purpose")
    network.register_forward_pre_hook(fail)


def spoil_at(network: AlexNet, number: int) -> None:
    """Make a gradient NaN at the backward pass of this number."""
    count = itertools.count()
    network.conv5.weight.register_hook(lambda gradient: gradient * float("nan") if next(count) == number else gradient)


def disturb_second_process(what: str, training: bool, number: int) -> None:
    """Disturb the network of the second process when it is built."""
    build_network = build.network

    def network(config: Any, topology: Any) -> AlexNet:
        built = build_network(config, topology)
        if topology.tower_rank == 1 and what == "signal":
            signal_at(built, training, number)
        elif topology.tower_rank == 1:
            spoil_at(built, number)
        return built
    build.network = network


if __name__ == "__main__":
    disturb_second_process(sys.argv[1], sys.argv[2] == "training", int(sys.argv[3]))
    code = main(sys.argv[4:])
    print(f"left with {code}", flush=True)
    sys.exit(code)
