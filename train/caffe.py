"""Take over weights of Caffe's AlexNet and CaffeNet: a .npy file becomes a folder as train.export writes it.

    python -m train.caffe bvlc_alexnet.npy --out FOLDER [--onnx]
    python -m train.caffe bvlc_reference_caffenet.npy --out FOLDER [--classes synset_words.txt] [--mean ilsvrc_2012_mean.npy]

The file is a dict of layers, {"conv1": [weights, biases], …} or {"conv1": {"weights": …, "biases": …}, …}, in the layout of Caffe
or of TensorFlow; nothing of it is run (train/caffe_file.py). The network is that of a recipe, by default bvlc_alexnet.yaml or
bvlc_caffenet.yaml of train/recipes, by the file's name. docs/weights.md says what is turned into what, and why.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed or the check did, 130 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

from train.ending import leave
from train.export import add_outputs, ended

if TYPE_CHECKING:  # --help needs none of it
    from pipeline.index import ClassInfo
    from pipeline.stats import Stats

RECIPES = Path(__file__).resolve().parent / "recipes"
BGR_MEAN = (104.00698793, 116.66876762, 122.67891434)  # of Caffe's ilsvrc_2012_mean.npy, over all of its pixels


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.caffe", description="Turn Caffe's AlexNet or CaffeNet, in a .npy file, into safetensors with a "
        "model card. Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed or the check did.")
    parser.add_argument("weights", type=Path, help="the .npy file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, not there yet")
    parser.add_argument("--recipe", type=Path, help="of the network (default: bvlc_alexnet or bvlc_caffenet, by the file's name)")
    parser.add_argument("--classes", type=Path, help="Caffe's synset_words.txt: a line `wnid words` for each class")
    parser.add_argument("--mean", type=Path, help="mean image, BGR, (3, square, square) in a .npy file (default: three numbers)")
    parser.add_argument("--channels", choices=("bgr", "rgb"), default="bgr", help="what conv1 of the file sees (default bgr)")
    parser.add_argument("--fc6", choices=("hwc", "chw"), help="order of the inputs of fc6 in the file (default: hwc beside "
                        "TensorFlow's kernels, chw beside Caffe's)")
    add_outputs(parser)
    return parser.parse_args(argv)


def recipe_for(path: Path) -> Path:
    """The recipe of a file's network, by its name: the two networks have the same shapes.

    Raises:
        ValueError: the name says neither.
    """
    name = path.name.lower()
    for word in ("caffenet", "alexnet"):
        if word in name:
            return RECIPES / f"bvlc_{word}.yaml"
    raise ValueError(f"--recipe (=none) must say which network {path.name} belongs to, as AlexNet's and CaffeNet's weights have "
                     "the same shapes; give train/recipes/bvlc_alexnet.yaml or bvlc_caffenet.yaml")


def read_classes(path: Optional[Path], count: int) -> list[ClassInfo]:
    """Classes of a file with a line `wnid words` for each, in Caffe's order and ours: sorted wnids; none without a file.

    Raises:
        ValueError: another number of them, or another order.
    """
    from pipeline.index import ClassInfo

    if path is None:
        return []
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"classes (={path}) are no text; give Caffe's synset_words.txt") from None
    classes = [ClassInfo(words[0], words[1].strip() if len(words) > 1 else "") for words in lines]
    wnids = [entry.wnid for entry in classes]
    if len(classes) != count or wnids != sorted(set(wnids)):
        what = f"{len(classes)} lines" if len(classes) != count else "wnids that are not sorted, or twice there"
        raise ValueError(f"classes (={path}) have {what}, but the network's outputs are {count} classes in the order of their "
                         "wnids; give Caffe's synset_words.txt")
    return classes


def statistics(path: Optional[Path], square_px: int) -> Stats:
    """What Caffe subtracts, as RGB: a mean image, or the three numbers for every pixel. Nothing is known of colour components.

    Raises:
        ValueError: the file is no array (3, square, square) of finite numbers.
    """
    import numpy as np

    from pipeline.stats import Stats

    if path is None:
        mean = np.broadcast_to(np.array(BGR_MEAN), (square_px, square_px, 3))
    else:
        try:
            found = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"mean (={path}) is no .npy file of numbers ({error}); give Caffe's ilsvrc_2012_mean.npy") from None
        if not isinstance(found, np.ndarray) or found.shape != (3, square_px, square_px) or found.dtype.kind != "f" \
                or not np.isfinite(found).all():
            raise ValueError(f"mean (={getattr(found, 'shape', 'none')} in {path}) must be finite numbers "
                             f"{(3, square_px, square_px)}, BGR; give Caffe's ilsvrc_2012_mean.npy")
        mean = found.transpose(1, 2, 0)
    image = np.ascontiguousarray(mean[..., ::-1], np.float32)
    return Stats(image, image.mean((0, 1), dtype=np.float64).astype(np.float32), np.zeros(3), np.eye(3), 0, {}, "", "")


def run(asked: argparse.Namespace) -> None:
    """Import what was asked for."""
    from dataclasses import replace

    from train.caffe_file import read_npy
    from train.caffe_layout import canonical, layers_of
    from train.export_card import About
    from train.export_facts import exported_with
    from train.export_folder import report, write_folder
    from train.recipe import load
    from train.weights import sha256

    recipe = asked.recipe or recipe_for(asked.weights)
    config = load(recipe)
    config = replace(config, data=replace(config.data, mean="image" if asked.mean else "channel"))
    tensors = canonical(layers_of(read_npy(asked.weights), config.model, str(asked.weights)), config.model, asked.fc6,
                        asked.channels == "bgr")
    classes = read_classes(asked.classes, config.model.classes)
    stats = statistics(asked.mean, config.data.square_px)
    source = sha256(asked.weights)
    facts = {"source_sha256": source}
    if classes:  # as train.build's
        facts["classes_sha256"] = hashlib.sha256("\n".join(entry.wnid for entry in classes).encode()).hexdigest()
    about = About(
        origin=f"The weights are those of `{asked.weights.name}`, in another layout: conv1 sees RGB, and fc6 map after map.",
        trained="By Caffe, not by this program. `config.yaml` is the recipe that comes closest to Caffe's own.",
        hashes={f"source ({asked.weights.name})": source}, classes=len(classes),
        order="that of Caffe: sorted wnids (its synset_words.txt), which is this program's too",
        prepared="Caffe squeezed each image into a square, whatever its shape, with OpenCV; so its own figures are of "
                 "slightly other pixels.",
        limits=["That the file is what its name says was not checked, and cannot be by its shapes: test the network before "
                "relying on it.",
                "`stats.npz` has no colour components: for lighting noise, compute those of the training images."],
        versions=exported_with(),
        licence="That of the file: the authors of bvlc_alexnet and bvlc_reference_caffenet state “unrestricted use”. Training "
                "images have terms of their own.")
    found = write_folder(asked.out, config, tensors, stats, about, classes=classes, facts=facts, onnx=asked.onnx,
                         softmax=asked.softmax, check=asked.check)
    print(report(asked.out, tensors, found, [f"network of {recipe.name}"]))


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    return ended(lambda: run(arguments(argv)))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
