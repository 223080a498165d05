"""Weights of Caffe's networks: against a plain torch version of Caffe, in every layout; files that are programs; mistakes."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from model.alexnet import AlexNet, canonical_shapes
from model.config import ModelConfig
from model.towers import Tower
from pipeline.stats import Stats
from tests.networks import small, with_layers
from train import caffe, weights
from train.build import classes_sha256
from train.caffe_file import read_npy
from train.caffe_layout import canonical, layers_of
from train.recipe import load

ROOT = Path(__file__).resolve().parent.parent
PX = 99  # leaves maps of 2×2 before fc6, so that their order matters
Blobs = dict[str, tuple[np.ndarray, np.ndarray]]


def recipe(folder: Path, network: str) -> Path:
    """Caffe's recipe with small layers and squares."""
    path = folder / f"{network}.yaml"
    path.write_text(f"""\
extends: {ROOT}/train/recipes/bvlc_{network}.yaml
data: {{square_px: 112, crop_px: {PX}}}
model:
  input_px: {PX}
  classes: 7
  layers:
    conv1: {{kernels: 8}}
    conv2: {{kernels: 12}}
    conv3: {{kernels: 16}}
    conv4: {{kernels: 12}}
    conv5: {{kernels: 8}}
    fc6: {{neurons: 24}}
    fc7: {{neurons: 20}}
""", encoding="utf-8")
    return path


def blobs(config: ModelConfig, seed: int = 0) -> Blobs:
    """Weights as Caffe has them: kernels (out, in, rows, columns), products (out, in); so large that LRN divides visibly."""
    random = np.random.default_rng(seed)
    shapes = canonical_shapes(config)
    return {name: (random.normal(0, 0.1, shapes[f"{name}.weight"]).astype(np.float32),
                   random.normal(0, 0.5, shapes[f"{name}.bias"]).astype(np.float32)) for name in config.layers}


def caffe_logits(found: Blobs, bgr: torch.Tensor, pooled: bool) -> torch.Tensor:
    """Caffe's network as its prototxt says, in its own layout: (B, 3, H, W) BGR, mean subtracted → (B, K).

    `group: 2` in conv2, conv4, conv5; LRN with k 1 and alpha 1e-4 / 5 across all channels; conv, ReLU, then norm and pool
    (bvlc_alexnet), or pool and norm (bvlc_reference_caffenet).
    """
    of = {name: (torch.from_numpy(weight), torch.from_numpy(bias)) for name, (weight, bias) in found.items()}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return functional.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=1.0)  # torch divides alpha by 5, as Caffe

    def pool(x: torch.Tensor) -> torch.Tensor:
        return functional.max_pool2d(x, 3, 2, ceil_mode=True)

    x = functional.relu(functional.conv2d(bgr, *of["conv1"], stride=4))
    x = norm(pool(x)) if pooled else pool(norm(x))
    x = functional.relu(functional.conv2d(x, *of["conv2"], padding=2, groups=2))
    x = norm(pool(x)) if pooled else pool(norm(x))
    x = functional.relu(functional.conv2d(x, *of["conv3"], padding=1))
    x = functional.relu(functional.conv2d(x, *of["conv4"], padding=1, groups=2))
    x = pool(functional.relu(functional.conv2d(x, *of["conv5"], padding=1, groups=2)))
    x = functional.relu(functional.linear(x.flatten(1), *of["fc6"]))
    x = functional.relu(functional.linear(x, *of["fc7"]))
    return functional.linear(x, *of["fc8"])


def as_tensorflow(found: Blobs, side: int) -> Blobs:
    """As caffe-tensorflow writes them: (rows, columns, in, out), (in, out), and fc6 sees rows, columns, maps."""
    made = {}
    for name, (weight, bias) in found.items():
        if name == "fc6":
            weight = weight.reshape(len(weight), -1, side, side).transpose(2, 3, 1, 0).reshape(-1, len(weight))
        else:
            weight = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        made[name] = (weight, bias)
    return made


def save(path: Path, found: Any, protocol: int = 2) -> Path:
    """As np.save writes an object, in a protocol of choice (Python 2 wrote 0 to 2)."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(found, dtype=object), file, protocol=protocol)
    return path


def pixels() -> torch.Tensor:
    """(2, 3, PX, PX) RGB, mean subtracted: smooth enough and of unlike channels, so that their order is seen."""
    return 60 * torch.randn(2, 3, PX, PX, generator=torch.Generator().manual_seed(3)) + torch.tensor([9.0, 0, -30])[:, None, None]


FORMS: dict[str, Callable[[Blobs], dict[str, Any]]] = {
    "tensorflow": lambda found: {name: list(pair) for name, pair in as_tensorflow(found, 2).items()},
    "tensorflow dicts": lambda found: {name: {"weights": w, "biases": b} for name, (w, b) in as_tensorflow(found, 2).items()},
    "tensorflow fc6 as kernels": lambda found: {
        **{name: list(pair) for name, pair in as_tensorflow(found, 2).items()},
        "fc6": [found["fc6"][0].reshape(24, 8, 2, 2).transpose(2, 3, 1, 0), found["fc6"][1]]},
    "caffe": lambda found: {name: list(pair) for name, pair in found.items()},
    "caffe of 2014": lambda found: {name: [w if w.ndim == 4 else w[None, None], b[None, None, None]]
                                    for name, (w, b) in found.items()},
    "theano": lambda found: {name: [w if w.ndim == 4 else w.T, b] for name, (w, b) in found.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("network", ["alexnet", "caffenet"])
def test_every_layout_gives_caffes_logits(tmp_path: Path, network: str, form: str) -> None:
    config = load(recipe(tmp_path, network)).model
    found, rgb = blobs(config), pixels()
    file = save(tmp_path / "weights.npy", FORMS[form](found))
    tensors = canonical(layers_of(read_npy(file), config, str(file)), config)
    ours = AlexNet(config, seed=0).eval()
    ours.load_state_dict(tensors)
    with torch.no_grad():
        expected, got = caffe_logits(found, rgb.flip(1), pooled=network == "caffenet"), ours(rgb)
    scale = float(expected.std())
    assert float((got - expected).abs().max()) < 1e-5 * scale, "float32, in the same order of layers"
    assert float((expected[0] - expected[1]).abs().max()) > 0.1 * scale, "the images would not be told apart"


def test_each_thing_that_is_converted_matters(tmp_path: Path) -> None:
    """BGR, the order of fc6, windows across groups, the constants and the place of LRN: without it the logits are others."""
    config = load(recipe(tmp_path, "alexnet")).model
    found, rgb = blobs(config), pixels()
    layers = layers_of(FORMS["tensorflow"](found), config, "x")
    with torch.no_grad():
        expected = caffe_logits(found, rgb.flip(1), pooled=False)
        assert config.lrn is not None and config.lrn.across
        others: dict[str, tuple[ModelConfig, dict[str, torch.Tensor]]] = {
            "rgb": (config, canonical(layers, config, bgr=False)), "chw": (config, canonical(layers, config, "chw"))}
        made = canonical(layers, config)
        for name, change in (("apart", {"across": False}), ("alpha", {"alpha": 1e-4}), ("k", {"k": 2.0})):
            lrn = type(config.lrn)(**{**vars(config.lrn), **change})
            others[name] = ModelConfig(**{**vars(config), "lrn": lrn}), made
        others["caffenet"] = load(recipe(tmp_path, "caffenet")).model, made
        for name, (model, tensors) in others.items():
            network = AlexNet(model, seed=0).eval()
            network.load_state_dict(tensors)
            assert float((network(rgb) - expected).abs().max()) > 1e-3 * float(expected.std()), name


def test_lrn_across_towers_by_hand_and_where_it_cannot_be() -> None:
    """Maps 3 and 4 of conv1 are of different towers: across, each counts in the other's window."""
    import dataclasses

    config = small()
    assert config.lrn is not None
    across = dataclasses.replace(config, lrn=dataclasses.replace(config.lrn, across=True))
    x = torch.rand(1, 8, 3, 3)
    networks = [AlexNet(made, seed=1).eval() for made in (config, across)]
    apart, joined = (network._normalised("conv1", made.convs["conv1"], x.clone())
                     for network, made in zip(networks, (config, across)))
    square = x.double()[0, :, 0, 0] ** 2
    for channel in range(8):
        low, high = max(0, channel - 2), min(8, channel + 3)
        mine = (max(low, 4 * (channel // 4)), min(high, 4 * (channel // 4) + 4))
        for got, (first, last) in ((joined, (low, high)), (apart, mine)):
            expected = x[0, channel, 0, 0] / (1 + 0.05 * square[first:last].sum()) ** 0.75
            assert float(got[0, channel, 0, 0]) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match=r"model.lrn.across \(=true\) makes each tower need the other's maps for LRN; use "):
        AlexNet(across, seed=0, tower=Tower(0, 2))
    AlexNet(across, seed=0, tower=Tower(0, 2), scheme="weird")  # there each process has all maps


def test_lrn_after_the_pooling_has_its_gradient() -> None:
    """Against torch's LRN on pooled maps of one tower, forward and backward; without pooling it is refused."""
    import dataclasses

    config = dataclasses.replace(with_layers(small(), conv1={"lrn": "pooled"}, conv2={"lrn": "none"}), towers=1)
    network = AlexNet(config, seed=2).eval()
    images = torch.randn(2, 3, 67, 67)
    lrn = config.lrn
    assert lrn is not None
    x = functional.conv2d(images, network.conv1.weight, network.conv1.bias, 4)  # type: ignore[arg-type]
    x = functional.local_response_norm(functional.max_pool2d(functional.relu(x), 3, 2), 5, lrn.alpha * 5, lrn.beta, lrn.k)
    x = functional.max_pool2d(functional.relu(network.conv2(x)), 3, 2)
    x = functional.relu(network.conv4(functional.relu(network.conv3(x))))
    x = functional.max_pool2d(functional.relu(network.conv5(x)), 3, 2).flatten(1)
    expected = network.fc8(functional.relu(network.fc7(functional.relu(network.fc6(x)))))
    got = network(images)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    weight = network.get_parameter("conv1.weight")
    grads = [torch.autograd.grad((logits ** 2).sum(), weight)[0] for logits in (got, expected)]
    assert float(grads[1].abs().max()) > 0 and torch.allclose(*grads, rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))
    with pytest.raises(ValueError, match=r"model.layers.conv3.lrn \(=pooled\) needs pooling before it; set model.layers.conv3"):
        with_layers(small(), conv3={"lrn": "pooled"})


def test_the_recipes_are_caffes_networks() -> None:
    for network, place, bias in (("alexnet", "after", 0.1), ("caffenet", "pooled", 1.0)):
        config = load(ROOT / "train" / "recipes" / f"bvlc_{network}.yaml")
        layers, lrn = config.model.layers, config.model.lrn
        assert (layers["conv1"].lrn, layers["conv2"].lrn, layers["conv3"].lrn) == (place, place, "none")
        assert lrn is not None and (lrn.k, lrn.n, lrn.beta, lrn.across) == (1.0, 5, 0.75, True)
        assert lrn.alpha * 5 == pytest.approx(1e-4)
        assert [layers[name].bias for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")] == [
            0, bias, 0, bias, bias, bias, bias, 0]
        assert (config.train.batch, config.data.lighting, config.data.crop_px) == (256, 0, 227)
        ends = [round(step * 256 / 1_281_167) for step in (100_000, 200_000, 300_000, 400_000)]
        assert [milestone.epoch for milestone in config.schedule.milestones] == ends


def test_command_writes_a_folder_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "caffenet")
    config = load(path)
    found = blobs(config.model)
    file = save(tmp_path / "some.npy", FORMS["tensorflow"](found))
    wnids = [f"n{number:08d}" for number in range(7)]
    (tmp_path / "words.txt").write_text("".join(f"{wnid} thing {wnid}, and so on\n" for wnid in wnids), encoding="utf-8")
    mean = np.random.default_rng(1).uniform(90, 130, (3, 112, 112))
    np.save(tmp_path / "mean.npy", mean)
    out = tmp_path / "made" / "weights"
    code = caffe.main([str(file), "--out", str(out), "--recipe", str(path), "--classes", str(tmp_path / "words.txt"), "--mean",
                       str(tmp_path / "mean.npy"), "--onnx"])
    said = capsys.readouterr()
    assert code == 0 and said.err == "" and "network of caffenet.yaml" in said.out and "model.onnx" in said.out, said
    network, rgb = weights.from_pretrained(out), pixels()
    with torch.no_grad():
        expected = caffe_logits(found, rgb.flip(1), pooled=True)
        assert float((network(rgb) - expected).abs().max()) < 1e-5 * float(expected.std())
    stats = Stats.load(out / "stats.npz")
    assert np.allclose(stats.mean_image, mean[::-1].transpose(1, 2, 0), atol=1e-5), "RGB"
    assert load(out / "config.yaml").data.mean == "image"
    metadata = weights.read_metadata(out)
    index = SimpleNamespace(classes=[SimpleNamespace(wnid=wnid) for wnid in wnids])
    assert metadata["classes_sha256"] == classes_sha256(index)  # type: ignore[arg-type]
    assert metadata["source_sha256"] == weights.sha256(file)
    assert (out / "classes.txt").read_text(encoding="utf-8").splitlines()[1] == "n00000001 thing n00000001, and so on"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "By Caffe, not by this program" in card and "Nothing has been measured of these weights" in card
    assert "max pooling 3×3, stride 2, LRN" in card and "seed" not in card
    code = caffe.main([str(file), "--out", str(tmp_path / "plain"), "--recipe", str(path), "--no-check"])
    assert code == 0 and np.allclose(Stats.load(tmp_path / "plain" / "stats.npz").channel_mean, [122.67891, 116.66877, 104.00699])
    assert load(tmp_path / "plain" / "config.yaml").data.mean == "channel" and not (tmp_path / "plain" / "classes.txt").exists()
    assert "logits differ" not in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that ends with 2."""
    assert caffe.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "alexnet")
    config = load(path).model
    found = FORMS["tensorflow"](blobs(config))
    out, good = tmp_path / "out", save(tmp_path / "net.npy", found)

    def tried(change: dict[str, Any], *more: object) -> str:
        file = save(tmp_path / "changed.npy", {name: entry for name, entry in {**found, **change}.items() if entry is not None})
        return refused(capsys, file, "--out", out, "--recipe", path, *more)

    assert "--recipe (=none) must say which network net.npy belongs to" in refused(capsys, good, "--out", out)
    assert "layers (=conv1, conv2, conv3, conv4, conv5, fc6, fc7 in" in tried({"fc8": None})
    assert "fc8 (in " in tried({"fc8": found["fc8"][:1]}) and "fc7 (in" in tried({"fc7": "nothing"})
    assert "biases of fc7 (=(19,)) must be (20,)" in tried({"fc7": [found["fc7"][0], found["fc7"][1][1:]]})
    assert "conv2 (5, 5, 4, 11)" in tried({"conv2": [found["conv2"][0][..., 1:], found["conv2"][1]]})
    mixed = tried({"conv2": [found["conv2"][0].transpose(3, 2, 0, 1), found["conv2"][1]]})
    assert "conv1 (8, 3, 11, 11) (Caffe) or (11, 11, 3, 8) (TensorFlow)" in mixed and "all in one layout" in mixed
    broken = found["conv1"][0].copy()
    broken[0, 0, 0, 0] = np.nan
    assert "conv1.weight (=NaN or infinite) must be finite" in tried({"conv1": [broken, found["conv1"][1]]})
    assert "weights (=" in refused(capsys, save(tmp_path / "list.npy", [1.5, "no"]), "--out", out, "--recipe", path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "hold an array of numbers, not a dict" in refused(capsys, tmp_path / "array.npy", "--out", out, "--recipe", path)
    (tmp_path / "text.npy").write_text("no array")
    assert "are no .npy file" in refused(capsys, tmp_path / "text.npy", "--out", out, "--recipe", path)
    words = tmp_path / "words.txt"
    words.write_text("n2 b\nn1 a\n")
    assert "have 2 lines, but the network's outputs are 7" in tried({}, "--classes", words)
    words.write_text("".join(f"n{9 - number} x\n" for number in range(7)))
    assert "wnids that are not sorted" in tried({}, "--classes", words)
    np.save(tmp_path / "mean.npy", np.zeros((112, 112, 3)))
    assert "must be finite numbers (3, 112, 112), BGR" in tried({}, "--mean", tmp_path / "mean.npy")
    assert not out.exists() and not list(tmp_path.glob(".out*")), "nothing is left"
    out.mkdir()
    assert f"--out (={out}) exists already" in tried({})


def test_square_layers_are_not_guessed() -> None:
    """Where all fully connected layers are square, either layout would do."""
    config = with_layers(small(neurons=(8, 8), kernels=(8, 12, 16, 12, 8)), fc7=None)
    config = ModelConfig(**{**vars(config), "classes": 8})
    found = blobs(config)
    with pytest.raises(ValueError, match=r"weights \(=fc6 \(8, 8\), fc8 \(8, 8\)\) have the same shapes in either layout"):
        canonical(found, config)


class _Evil:
    def __init__(self, function: Any, *words: Any) -> None:
        self.call = function, words

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_programs_are_not_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    for evil in (_Evil(os.system, f"touch {trace}"), _Evil(exec, f"open({str(trace)!r}, 'w')"), _Evil(np.load, str(trace)),
                 _Evil(subprocess.check_output, ["touch", str(trace)]), _Evil(getattr, "x", "upper"), _Evil(np.zeros, 3)):
        for found in (evil, {"conv1": [evil, evil]}, {"conv1": np.array([evil, 1], dtype=object)}):
            file = save(tmp_path / "evil.npy", found, protocol)
            with pytest.raises(ValueError, match=r"are no dict of layers: .*, which is no array; nothing of the file was run"):
                read_npy(file)
    assert not trace.exists()
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.eye(3)[:2]), np.arange(3, dtype=">i4")]
    read = read_npy(save(tmp_path / "good.npy", {"conv1": arrays, "x": ("a", 1, 2.5, None)}, protocol))
    assert all(np.array_equal(got, put) for got, put in zip(read["conv1"], arrays)) and read["x"] == ["a", 1, 2.5, None]
    assert read["conv1"][0].dtype == np.float32


def test_hostile_shapes_and_endless_files_are_named(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    wide: list[Any] = ["x"]
    for _ in range(30):
        wide = [wide, wide]  # 2^30 values out of a few bytes
    for found in (endless, wide, np.array([1 + 2j]), np.array(["x"]), np.datetime64("2012-01-01"), {1, 2}):
        with pytest.raises(ValueError, match="are no dict of layers"):
            read_npy(save(tmp_path / "odd.npy", {"conv1": found}))
    far = save(tmp_path / "far.npy", {"conv1": "x"}).read_bytes()
    (tmp_path / "far.npy").write_bytes(far.replace(b"q\x01", b"r\x00\x00\x00\x70", 1))  # a table of 2^31 values
    with pytest.raises(ValueError, match="a place 1879048192 for one of its values"):
        read_npy(tmp_path / "far.npy")
    whole = save(tmp_path / "whole.npy", {"conv1": [np.ones((4, 4), np.float32)]}).read_bytes()
    accepted = 0
    for place in range(len(whole)):  # every byte, bits flipped: a dict of other values, or the one error
        (tmp_path / "bit.npy").write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1:])
        with contextlib.suppress(ValueError):
            read_npy(tmp_path / "bit.npy")
            accepted += 1
    assert accepted > 60, "the bytes of the numbers can be anything"
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError):
            read_npy(tmp_path / "cut.npy")


def test_help_answers_without_torch() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "train.caffe", "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "usage" in done.stdout and "train" in imported and not imported & {"torch", "numpy", "nvidia"}
