"""Exported networks: every variant read back by this program, by onnxruntime and by the card's own code; cards that say what was
measured and nothing else; damage, mistakes and kills."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.alexnet import AlexNet, canonical_shapes, parameter_count
from model.config import Conv, ModelConfig, PoolConfig
from pipeline.config import LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.stats import Stats
from tests.conftest import TinySet
from tests.helpers.loaders import eval_loader
from tests.helpers.networks import small, tensors_of, with_layers
from tests.helpers.recipes import write_recipe
from train.checkpoint.checkpoint import DamagedCheckpoint
from train.export import folder as export_folder, safetensors_io as weights
from train.config import Config
from train.export.folder import About, card
from train.export.onnx import onnx_model
from train.recipe import load
from train.report.runs import Test as Result

ROOT = Path(__file__).resolve().parents[2]
PAPER = small()
assert PAPER.lrn is not None
VARIANTS: dict[str, ModelConfig] = {
    "paper": PAPER,
    "tanh": dataclasses.replace(PAPER, activation="tanh"),
    "lrn before": with_layers(PAPER, conv1={"lrn": "before"}),
    "lrn before, tanh": dataclasses.replace(with_layers(PAPER, conv2={"lrn": "before"}), activation="tanh"),
    "lrn of 3": dataclasses.replace(PAPER, lrn=dataclasses.replace(PAPER.lrn, n=3, beta=0.5, k=2.5)),
    "no lrn": dataclasses.replace(PAPER, lrn=None),
    "pooling 2/2": dataclasses.replace(PAPER, pool=PoolConfig(2, 2)),
    "one tower": dataclasses.replace(PAPER, towers=1),
    "apart": with_layers(PAPER, conv3={"sees": "own"}, fc6={"sees": "own"}, fc7={"sees": "own"}, fc8={"sees": "own"}),
    "meeting early": with_layers(PAPER, conv2={"sees": "both"}, conv4={"sees": "both"}),
    "conv6": with_layers(PAPER, conv6=Conv(12, px=3, pad=1, sees="both", std=0.1, bias=1), conv5={"pool": False}),
    "linear": with_layers(PAPER, fc7={"linear": True, "dropout": False}),
    "without conv4 and fc7": with_layers(PAPER, conv4=None, fc7=None),
}


def recipe(folder: Path, model: ModelConfig = PAPER) -> Config:
    """A recipe of a network."""
    return dataclasses.replace(load(write_recipe(folder)), model=model)


def statistics(px: int = 76) -> Stats:
    image = np.random.default_rng(5).uniform(90, 130, (px, px, 3)).astype(np.float32)
    return Stats(image, image.mean((0, 1)), np.zeros(3), np.eye(3), 1, {}, "", "train")


def network_of(model: ModelConfig, tensors: dict[str, torch.Tensor]) -> AlexNet:
    network = AlexNet(model, seed=0).eval()
    network.load_state_dict(tensors)
    return network


def logits(model: ModelConfig, tensors: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network_of(model, tensors)(images)


def onnx_logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def code_of(text: str) -> list[str]:
    """The card's blocks of Python: preparing an image, loading with this package, and with torch alone."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_agrees(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the folder gives, by three programs, against the network; and a file of another network would not."""
    model, out = VARIANTS[name], tmp_path / "out"
    tensors = tensors_of(model)
    found = export_folder.write_folder(out, recipe(tmp_path, model), network_of(model, tensors), statistics(), About("Drawn."),
                                       onnx=True)
    assert found.keys() == {"model.safetensors", "model.onnx"} and found["model.safetensors"] == 0
    images = 20 * torch.randn(2, 3, 67, 67, generator=torch.Generator().manual_seed(8))
    expected = logits(model, tensors, images)
    close = {"rtol": 1e-5, "atol": 1e-6 * float(expected.abs().max())}  # float32 sums in another order
    read = weights.from_pretrained(out)
    assert read.config == model and not read.training
    with torch.no_grad():
        assert torch.equal(read(images), expected)
    for batch in (images, images[:1]):
        assert torch.allclose(onnx_logits(out / "model.onnx", batch), expected[:len(batch)], **close)
    text = (out / "README.md").read_text(encoding="utf-8")
    assert f"{parameter_count(model):,} parameters" in text
    monkeypatch.chdir(out)
    names: dict[str, Any] = {"images": images}
    for code in code_of(text)[1:]:
        exec(code, names)  # noqa: S102 (the card's own code: this package's, and plain torch)
        assert torch.allclose(names.pop("logits"), expected, **close)
    others = [other for other in VARIANTS.values() if other != model and canonical_shapes(other) == canonical_shapes(model)]
    assert len(others) >= (1 if name not in ("apart", "meeting early", "conv6", "without conv4 and fc7", "one tower") else 0)
    for other in others:
        assert not torch.allclose(logits(other, tensors, images), expected, **close), "this test would not see the difference"


def test_classes_of_an_odd_number_stay_in_order(tmp_path: Path) -> None:
    """7 classes, fc8 apart: tower a has four of them. All rows of the weights are in the file."""
    model = with_layers(PAPER, fc8={"sees": "own"})
    tensors, images = tensors_of(model), torch.randn(2, 3, 67, 67)
    (tmp_path / "model.onnx").write_bytes(onnx_model(model, tensors))
    given = onnx_logits(tmp_path / "model.onnx", images)
    assert given.shape == (2, 7) and torch.allclose(given, logits(model, tensors, images), rtol=1e-5, atol=1e-5)


def test_the_checks_see_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight in bfloat16, an LRN of another alpha, a library that is not there: the export fails and leaves nothing."""
    config, tensors = recipe(tmp_path), tensors_of(PAPER)

    def tried() -> str:
        with pytest.raises(RuntimeError) as caught:
            export_folder.write_folder(tmp_path / "out", config, network_of(PAPER, tensors), statistics(), About("Drawn."),
                                       onnx=True)
        assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"], "nothing is left"
        return str(caught.value)

    real, packed = onnx_model, weights.pack
    assert PAPER.lrn is not None
    wrong = dataclasses.replace(PAPER, lrn=dataclasses.replace(PAPER.lrn, alpha=PAPER.lrn.alpha / 5))
    monkeypatch.setattr(export_folder, "onnx_model", lambda model, *rest, **named: real(wrong, *rest, **named))
    assert re.match(r"model.onnx \(=\S+\) differs from the network by more than \S+ \(largest value \S+\); nothing", tried())
    monkeypatch.setattr(export_folder, "onnx_model", real)
    rounded = {**tensors, "fc8.weight": tensors["fc8.weight"].bfloat16().float()}
    monkeypatch.setattr(weights, "pack", lambda config, given, hashes: packed(config, rounded, hashes))
    assert tried().startswith("model.safetensors (=")
    monkeypatch.setattr(weights, "pack", packed)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime (=not installed) is needed to check model.onnx; pip install onnxruntime, or this package" in tried()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "onnx (=not installed) is needed to write model.onnx" in tried()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "safetensors (=not installed) is needed to read and write model.safetensors" in tried()


def test_a_failed_write_leaves_nothing_and_nothing_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = recipe(tmp_path), tmp_path / "deep" / "out"
    arguments = (config, network_of(PAPER, tensors_of(PAPER)), statistics(), About("Drawn."))
    (out.parent / ".out.host.1.0123abcd.tmp").mkdir(parents=True)  # left by a process that was killed

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_manifest", full)
        with pytest.raises(OSError, match="No space left"):
            export_folder.write_folder(out, *arguments)
    assert list(out.parent.iterdir()) == []
    export_folder.write_folder(out, *arguments)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"--out \(=.*out\) exists already; give a folder that does not"):
        export_folder.write_folder(out, *arguments)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()} and list(out.parent.iterdir()) == [out]
    assert before.keys() == {"model.safetensors", "config.yaml", "stats.npz", "README.md", "manifest.json"}
    bad = {**tensors_of(PAPER), "conv1.bias": torch.full((8,), float("inf"))}
    with pytest.raises(ValueError, match=r"conv1.bias \(=NaN or infinite\) must be finite; the weights are damaged"):
        export_folder.write_folder(tmp_path / "bad", config, network_of(PAPER, bad), statistics(), About("Drawn."))


def test_damage_and_other_files_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    out, tensors = tmp_path / "out", tensors_of(PAPER)
    export_folder.write_folder(out, recipe(tmp_path), network_of(PAPER, tensors), statistics(), About("Drawn."))
    (out / "README.md").write_text("edited: the card is the reader's", encoding="utf-8")
    model, read = weights.load_safetensors(out)
    assert model == PAPER and read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert weights.read_weights(out).keys() == weights.read_weights(out / "model.safetensors").keys() == tensors.keys()
    for name in ("model.safetensors", "stats.npz", "config.yaml"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DamagedCheckpoint, match=rf"exported file \(=.*{name}\) has SHA-256 .*; export again"):
            weights.from_pretrained(out)
        (out / name).unlink()
        with pytest.raises(DamagedCheckpoint, match=rf"exported file \(=.*{name}\) is missing; export again"):
            weights.read_weights(out)
        (out / name).write_bytes(whole)
    (out / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DamagedCheckpoint, match=r"exported file \(=.*manifest.json\) cannot be read"):
        weights.from_pretrained(out)
    alone = tmp_path / "alone.safetensors"

    def saved(change: dict[str, Any], **metadata: str) -> None:
        kept = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(kept, alone, {**weights.read_metadata(out / "model.safetensors"), **metadata})

    for change, metadata, message in (
            ({}, {"alexnet_dali_format": "9"}, r"have format 9, not 1; give a file that train.export of this version wrote"),
            ({}, {"config": "{}"}, r"have a config that this version does not read \('model'\); use the version that wrote them"),
            ({"conv1.bias": None}, {}, r"conv1.bias \(=none in .*\) must be float32 \(8,\); give the weights of this network"),
            ({"conv1.bias": torch.zeros(9)}, {}, r"conv1.bias \(=float32 \(9,\) in .*\) must be float32 \(8,\)"),
            ({"conv1.bias": torch.zeros(8).half()}, {}, r"conv1.bias \(=float16 \(8,\) in .*\) must be float32 \(8,\)"),
            ({"fc9.bias": torch.zeros(8)}, {}, r"fc9.bias \(=float32 \(8,\) in .*\) must be absent")):
        saved(change, **metadata)
        with pytest.raises(ValueError, match=message):
            weights.load_safetensors(alone)
    old = json.loads(weights.read_metadata(out / "model.safetensors")["config"])
    old["model"]["lrn"]["across"] = False
    saved({}, config=json.dumps(old))
    assert weights.load_safetensors(alone)[0] == PAPER, "a file of version 0.1"
    save_file({"x": torch.zeros(1)}, alone)
    with pytest.raises(ValueError, match=r"have format none, not 1"):
        weights.load_safetensors(alone)
    assert weights.read_weights(alone).keys() == {"x"}, "anyone's"
    alone.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"are no safetensors file \(.*\); give one that train.export wrote"):
        weights.read_weights(alone)
    with pytest.raises(ValueError, match=r"weights \(=.*nowhere\) are not there; give a folder that train.export wrote"):
        weights.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
def test_the_cards_code_prepares_images_as_the_loader(tiny_set: TinySet, tmp_path: Path, mean: str,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    index = SampleIndex.load(tiny_set.index)
    stats = Stats.for_index(index, 76)
    stats.save(tmp_path / "stats.npz")
    config = load(write_recipe(tmp_path, tiny_set.index, mean=f"  mean: {mean}"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code_of(card("net", config, About("Drawn.")))[0], names)  # noqa: S102 (the card's own code)
    with eval_loader("archives", index, "val", config.data, 12, stats, machine=LoaderConfig(threads=1)) as loader:
        for batch in loader:
            view = next(iter(loader.crops(batch.images, 1)))
            for id, expected in zip(batch.ids, view):
                got = torch.from_numpy(names["prepare"](io.BytesIO(index.read(int(id)))))
                assert Image.open(io.BytesIO(index.read(int(id)))).size != (76, 76)
                difference = (got - expected).abs()
                assert float(difference.max()) < 2.01 and float(difference.mean()) < 0.1, "DALI's decoder, at most 2 grey levels"


def test_what_the_card_says() -> None:
    config = load(ROOT / "train" / "recipes" / "alexnet_ilsvrc2012.yaml")
    result = Result("val", 10, 50_000, 0.40664, 0.18208, None, "a saved evaluation")
    about = About("From nowhere.", hashes={"classes": "ab12"}, results=[result], versions={"exported with torch": "2.13.0"})
    text = card("net", config, about)
    for line in (
            "60,965,224 parameters, 1000 classes. From nowhere.", "RGB, 0–255", "- exported with torch 2.13.0",
            "| conv1 | 11×11, stride 4, pad 0, ReLU, LRN, max pooling 3×3, stride 2 | the image | 96×3×11×11 | 96×27×27 | 34",
            "| conv3 | 3×3, stride 1, pad 1, ReLU | both towers | 384×256×3×3 | 384×13×13 | 885,120 |",
            "| fc8 | linear | both towers | 1000×4096 | 1000 | 4,097,000 |",
            "b = a / (2 + 0.0001 Σ a²)^0.75 over 5 adjacent maps of one tower", "(256×256×3, `mean_image` of `stats.npz`)",
            "| val | 50,000 | 10 | 40.66% | 18.21% | a saved evaluation |", "- batch 128, up to 90 epochs, seed 2012",
            "times 0.1 when the validation error stops improving, at most 3 times",
            "PCA colour jitter (lighting) of deviation 0.1",
            "- classes: SHA-256 `ab12`", f"SHA-256 `{config.fingerprint()}`", "Not stated: whoever publishes these weights"):
        assert line in text, line
    assert "Nothing has been measured of these weights." in card("net", config, About("From nowhere."))
