"""Bytes that two processes really send in a training step, counted by a hook on torch.distributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from model.alexnet import AlexNet
from model.config import ModelConfig
from model.tower_exchange import CROSSINGS
from model.towers import BOTH, Tower
from train.parallel.gradients import GradientReducer
from train.parallel.topology import Topology

IMAGES = 2  # of a pair in the step
Case = tuple[str, str, str]  # name of a network, scheme, precision
Sent = tuple[dict[tuple[str, str], int], int]  # bytes for an image of the pair by (layer, direction); bytes of gradients


def crossing(tag: int) -> tuple[str, str]:
    """(One of CROSSINGS, direction) of a message tag."""
    return CROSSINGS[tag // 2], "backward" if tag % 2 else "forward"


class Hook(TorchDispatchMode):
    """Counts the bytes of each message to the other tower, and of each all-reduce: a ring of n sends 2(n − 1)/n times them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.gradients = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        c10d = torch.ops.c10d
        if function is c10d.send.default:
            (tensor,), _, _, tag = args
            self.sent[crossing(tag)] += tensor.nbytes
        elif function is c10d.allreduce_.default:
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self.gradients += 2 * (ranks - 1) * sum(tensor.nbytes for tensor in args[0]) // ranks
        else:
            assert function.namespace != "c10d" or function is c10d.recv_.default, f"{function} is not counted"
        return function(*args, **(kwargs or {}))


def exchanged(networks: Mapping[str, ModelConfig], cases: Sequence[Case], folder: Path) -> list[dict[Case, Sent]]:
    """What each of two processes sends in a step of each case. `folder`: for their rendezvous and answers."""
    multiprocessing.spawn(_process, (networks, cases, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _process(rank: int, networks: Mapping[str, ModelConfig], cases: Sequence[Case], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save({case: _step(networks[case[0]], *case[1:], rank) for case in cases}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _step(config: ModelConfig, scheme: str, precision: str, rank: int) -> Sent:
    data = scheme == "data"
    mesh = init_device_mesh("cpu", (2, 1) if data else (1, 2), mesh_dim_names=("data", "tower"))
    ranks = (rank, 2, 0, 1) if data else (0, 1, rank, 2)
    topology = Topology(*ranks, rank, 2, torch.device("cpu"), mesh)
    network = AlexNet(config, seed=0, tower=BOTH if data else Tower(rank, 2, topology.group("tower")),
                      scheme="weird" if scheme == "weird" else "towers")
    gradients = GradientReducer(network, topology, overlap=True)
    images = torch.zeros(IMAGES if scheme == "towers" else IMAGES // 2, 3, config.input_px, config.input_px)
    with Hook() as hook:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images, step=0)
        gradients.begin(last=True)
        functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
        gradients.finish()
    assert not any(count % IMAGES for count in hook.sent.values())
    return {key: count // IMAGES for key, count in hook.sent.items()}, hook.gradients
