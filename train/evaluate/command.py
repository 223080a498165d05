"""The command `python -m train.evaluate`: find the networks, test those that are not tested yet, print the results.

N images, K classes.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from pipeline.index.ilsvrc import read_devkit
from pipeline.index.sample_index import SampleIndex
from train import build
from train.checkpoint.resolve import NETWORKS, Resolved, resolve, warn_on_stderr
from train.config import Config
from train.logs.console import Console
from train.evaluate import predictions
from train.evaluate.ensemble import check_compatible
from train.evaluate.predict import check_complete, predict
from train.evaluate.predictions import Evaluation, Key
from train.evaluate.results import print_results
from train.exit_codes import is_main_process
from train.parallel.topology import Topology, process_group

EVALUATIONS = "evaluations"  # of a run folder


@dataclass(frozen=True)
class Plan:
    """A test to be made: of a checkpoint or exported network, on the images of a split."""

    name: str  # its run's and its checkpoint's, for messages
    weights: Resolved
    config: Config
    split: str
    index: SampleIndex
    key: Key


def run(args: argparse.Namespace) -> None:
    """Test the networks, or find them tested; print the results. Raises ValueError, RuntimeError, OSError."""
    if bool(args.submission) != bool(args.devkit):
        raise ValueError(f"--submission (={args.submission}) and --devkit (={args.devkit}) go together: the devkit has the "
                         "classes' IDs; give both or neither")
    if args.submission:  # mistakes that should not wait for the end of the test
        if not args.submission.absolute().parent.is_dir():
            raise ValueError(f"submission (={args.submission}) cannot be written, its folder does not exist; give another "
                             "--submission")
        read_devkit(args.devkit)
    found = [resolve(path, args.which, kinds=(*NETWORKS, "evaluation"), name="RUN") for path in args.runs]
    members = [predictions.load(entry.path) if entry.kind == "evaluation" else _plan(entry, args) for entry in found]
    check_compatible(members)
    evaluations: list[Optional[Evaluation]] = [member if isinstance(member, Evaluation) else None for member in members]
    if plans := [member for member in members if isinstance(member, Plan)]:
        config = plans[0].config
        with process_group(towers=config.model.towers, parallel=config.parallel, device=config.machine.device,
                           timeout_s=config.machine.timeout_s, silence_s=config.machine.silence_s) as topology:
            evaluations = [_evaluation(member, args.out, topology) if isinstance(member, Plan) else member for member in members]
    if is_main_process():
        print_results([evaluation for evaluation in evaluations if evaluation is not None], args)


def _plan(weights: Resolved, args: argparse.Namespace) -> Plan:
    """The recipe of a checkpoint or exported network as the command line changes it, and the images to test on."""
    config = weights.inference_config(args.index, args.archives, args.device, args.batch)
    split = args.split or config.data.test_split
    index = build.index(config, *([] if args.submission else [split]))  # the other splits need not be there
    if args.submission:  # this one may lack labels
        if not len(index.ids(split)):
            raise ValueError(f"split (={split}) of {index.path} has no images; name another with --split")
        index.check_archives(split)
    weights.check_classes(index)
    return Plan(predictions.short_name(weights.path), weights, config, split, index, Key(
        weights.sha256, index.split_sha256(split), build.classes_sha256(index), len(index.ids(split)), config.model.classes,
        args.views or config.train.test_views, config.machine.precision))


def _evaluation(plan: Plan, save: Optional[Path], topology: Topology) -> Optional[Evaluation]:
    """The evaluation of one network, saved or made now; None in all processes but the main one, which alone reads and writes."""
    config, views = plan.config, plan.key.views
    build.configure_torch(config, topology)
    saved: Optional[Evaluation] = None
    if topology.is_main:  # in the run's folder, beside an exported network, or in `save`
        run = predictions.run_folder(plan.weights.path)
        name = f"{plan.weights.path.name}-{plan.split}-{views}view{'s' if views > 1 else ''}"
        path, saved = predictions.find(save / f"{run.name}-{name}" if save else run / EVALUATIONS / name, plan.key,
                                       warn_on_stderr)
    if topology.broadcast_object(saved is not None):
        return saved
    device = (torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda"
              else f"cpu {torch.backends.cpu.get_cpu_capability()}")
    about = {"checkpoint": str(plan.weights.path), "split": plan.split, "index": str(plan.index.path),
             "made": {"device": device, "torch": torch.__version__, "batch": config.machine.test_batch}}
    network = build.network(config, topology)
    plan.weights.load_weights(network, config, topology)
    tested: list[np.ndarray] = []
    with contextlib.closing(Console(topology.is_main, config.machine.log_s, sys.stderr)) as console, \
            contextlib.closing(build.eval_loader(config, topology, plan.index, plan.weights.stats(), plan.split)) as loader, \
            predictions.writing(path, plan.key, about) if topology.is_main else contextlib.nullcontext() as append:

        def take(images: np.ndarray, probabilities: np.ndarray) -> None:
            if append is not None:
                tested.append(images)
                append(images, probabilities)

        show = console.testing(f"testing {plan.weights.path.name}")
        predict(network, loader, views, build.autocast(config, topology), take,
                progress=lambda done: show(done, plan.key.images), topology=topology)
        if append is None:
            return None
        check_complete(tested, plan.index, plan.split)
    return replace(predictions.load(path), tested=plan.key.images)
