"""Golden digests: order, draws, batches of every tier, test crops, initial weights, losses and checkpoint weights must not change
by a bit.

golden/digests.json holds what they were; `python -m tests.test_golden` writes it anew. An entry that is a string is a SHA-256,
and must be the same everywhere. Others come from floating point, which another processor or version may round in another way: of
these the `numbers` must agree closely everywhere, and the `digest` where the `machine` is the one on record. Where the generated
pictures themselves are others (another version of their encoder), what is made of them is not compared.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# What is tested: all of it is imported here, to be changed in one place when modules move.
import train  # before torch: it says how idle threads wait
from model.alexnet import AlexNet
from model.config import LrnConfig
from model.dropout import dropout, dropout_words, keep_mask
from model.lrn import local_response_norm
from pipeline import rng as counter
from pipeline.config import DataConfig, LoaderConfig
from pipeline.decoding import geometry
from pipeline.index.header import content_sha256
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.reading.quarantine import Quarantine
from pipeline.sampling.augment import augment, lighting_shift, random_boxes
from pipeline.sampling.sampler import Sampler, WindowSampler
from pipeline.compute_stats import compute
from pipeline.stats import Stats, stats_path
from tools.build_index import main as build_index
from tools.compute_stats import main as compute_stats
from tools.demo.dataset import make as make_demo
from tools.pack_shards import main as pack_shards
from train.config import PATHS, SPEED, Config
from train.recipe import load as load_config
from train.recipe import parse as parse_recipe

import torch
from tests.helpers.loaders import eval_loader as loader_of_tests
from tests.helpers.loaders import train_loader as loader_of_training
from tests.helpers.networks import small as small_network
from tests.helpers.packed_set import write_packed
from tests.helpers.recipes import write_recipe
from tests.helpers.small_set import encode, photographs, picture, write_set
from tests.helpers.runs import PAIR, finish, here, lines, start, weights

RECIPES = Path(train.__file__).parent / "recipes"
FILE = Path(__file__).parent / "golden" / "digests.json"
SEED, BATCH = 7, 6
GARBAGE = b"this is no picture " * 40
MEANS = ("image", "image_center", "channel")
Entry = Any  # str, or {"digest": str, "numbers": list of floats}


def sha256(*parts: Any) -> str:
    """Of arrays, tensors, bytes and plain values, one after the other; of arrays with type and shape."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().numpy()
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype.str}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).tobytes())
        else:
            found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.hexdigest()


def floats(*arrays: Any) -> Entry:
    """Digest of the bits, and of each array numbers that rounding hardly moves: norm and largest magnitude."""
    plain = [np.asarray(array.detach() if isinstance(array, torch.Tensor) else array) for array in arrays]
    wide = [array.astype(np.float64) for array in plain]
    return {"digest": sha256(*plain),
            "numbers": [float(f"{number:.9g}") for array in wide
                        for number in (np.sqrt((array ** 2).sum()), np.abs(array).max())]}


def told(numbers: Iterable[float]) -> Entry:
    """Numbers that are few enough to be on record one by one."""
    values = [float(number) for number in numbers]
    return {"digest": sha256(np.array(values)), "numbers": values}


class Made:
    """The generated sets, each made when it is first asked for, in `folder`."""
    machine = LoaderConfig(threads=2, quarantine_budget=0.2)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def blobs(self) -> tuple[list[bytes], list[bytes]]:
        """23 photographs of all shapes for training, of which one is cut and one no picture, and 7 for tests."""
        blobs = photographs(30)
        blobs[5], blobs[11] = blobs[5][:len(blobs[5]) // 3], GARBAGE
        return blobs[:23], blobs[23:]

    @functools.cached_property
    def squares(self) -> list[bytes]:
        """31 squares, two of them broken in the same ways."""
        blobs = [encode(picture(i, 76, 76)) for i in range(31)]
        blobs[3], blobs[7] = blobs[3][:len(blobs[3]) // 3], GARBAGE
        return blobs

    @functools.cached_property
    def photos(self) -> SampleIndex:
        return write_set(self.folder / "photos", *self.blobs)

    @functools.cached_property
    def stats(self) -> Stats:
        return compute(self.photos, "train", 76, machine=self.machine)

    @functools.cached_property
    def packed(self) -> SampleIndex:
        return write_packed(self.folder / "packed", self.squares, 9)

    @functools.cached_property
    def packed_stats(self) -> Stats:
        return compute(self.packed, "train", 76, machine=self.machine)

    @functools.cached_property
    def demo(self) -> Path:
        """Folder of archives of the form of ILSVRC2012: 6 classes, 12 pictures each, and odd files."""
        folder = self.folder / "demo"
        make_demo(folder, 0, 6, 12, 4, (80, 100))
        return folder

    @functools.cached_property
    def index(self) -> Path:
        """Of the archives, by the command, with statistics."""
        out, demo = self.folder / "index", self.demo
        archives = {path.name.split("_img_")[-1].split(".")[0]: path for path in demo.glob("*_img_*.tar")}
        (devkit,) = demo.glob("*devkit*")
        assert build_index(["build", "ilsvrc2012", "--train", str(archives["train"]), "--val", str(archives["val"]),
                            "--devkit", str(devkit), "--out", str(out), "--jobs", "1"]) == 0
        assert compute_stats([str(out), "--square-px", "76"]) == 0
        return out

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of the bytes that the generators made, before anything of this package has read them."""
        files = sorted(path for path in self.demo.rglob("*") if path.is_file())
        return {"photographs": sha256(*self.blobs[0], *self.blobs[1]), "squares": sha256(*self.squares),
                "demo": sha256(*(part for path in files for part in (path.name, path.read_bytes())))}

    def shards(self, region: str) -> Path:
        """The archives packed, by the command."""
        out = self.folder / f"shards-{region}"
        if not out.exists():
            assert pack_shards([str(self.index), str(out), "--region", region, "--square-px", "76", "--shard-images", "20",
                                "--budget", "0.05", "--jobs", "1"]) == 0
        return out

    @functools.cached_property
    def recipe(self) -> Path:
        path = write_recipe(self.folder, self.index)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("  mean: image\n", f"  mean: image\n  tier: archives\n  packed: {self.shards('square')}\n")
                        .replace("  epochs: 3\n", "  epochs: 2\n"), encoding="utf-8")
        return path


def fingerprint(config: Config) -> str:
    """`Config.fingerprint` as it was when model.lrn still had `across`."""
    values = config.as_dict()
    if values["model"]["lrn"] is not None:
        values["model"]["lrn"]["across"] = False
    for group in SPEED:
        del values[group]
    for group, name in PATHS:
        del values[group][name]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def pixels(mean: str = "image", region: str = "square", **changes: Any) -> DataConfig:
    values = {"region": region, "square_px": 76, "crop_px": 67, "mirror": True, "lighting": 0.1, "mean": mean}
    return DataConfig(**{**values, **changes})


def order(made: Made) -> Iterator[tuple[str, Entry]]:
    """Functions of the seed alone."""
    for purpose in counter.Purpose:
        yield f"bits/{purpose.name}", sha256(counter.bits(SEED, purpose, np.arange(50)[:, None], np.arange(100)))
    yield "uniform", sha256(counter.uniform(SEED, counter.Purpose.TOP, 3, np.arange(1000)))
    yield "normal", floats(counter.normal(SEED, counter.Purpose.LIGHTING, 3, np.arange(1000), 2))
    for count, batch, world in ((37, 8, 1), (37, 8, 4), (101, 10, 2), (1000, 128, 1)):
        ranks = [Sampler(np.arange(100, 100 + count), batch, SEED, (rank, world)) for rank in range(world)]
        yield f"sampler/{count}-by-{batch}-of-{world}", sha256(*(
            part for epoch in range(4) for sampler in ranks for step in sampler.steps(epoch) for part in sampler.take(step)))
        yield f"sampler/orders-of-{count}-by-{batch}-of-{world}", sha256(*(ranks[0].order(epoch) for epoch in range(4)))
        yield f"sampler/steps-of-{count}-by-{batch}-of-{world}", sha256([
            (steps.start, steps.stop) for steps in map(ranks[0].steps, range(9))])
    ids, epochs = np.tile(np.arange(500), 3), np.repeat(np.arange(3), 500)
    rooms = np.stack([np.arange(1500) % 30, np.arange(1500) % 77], axis=1)
    drawn = augment(SEED, epochs, ids, rooms, mirror=True, lighting=0.1)
    yield "draws/crops", sha256(drawn.top, drawn.left)
    yield "draws/mirror", sha256(drawn.mirror)
    yield "draws/alphas", floats(drawn.alphas)
    ended = augment(SEED, epochs, ids, rooms, mirror=False, lighting=0.1, lighting_epochs=2)
    yield "draws/alphas-of-2-epochs", floats(ended.alphas)
    boxes = random_boxes(SEED, epochs, ids, rooms + 40, (0.08, 1.0), (3 / 4, 4 / 3))
    yield "draws/boxes", sha256(*boxes)
    yield "draws/no-mirror", sha256(ended.top, ended.left, ended.mirror)
    vectors = np.linalg.qr(np.arange(9.0).reshape(3, 3) + 5 * np.eye(3))[0]
    yield "draws/lighting-shift", floats(lighting_shift(drawn.alphas, np.array([4000.0, 300.0, 20.0]), vectors))
    sizes = np.stack([60 + np.arange(400) * 7 % 641, 60 + np.arange(400) * 11 % 701], axis=1)
    resized = geometry.resized(sizes, 76)
    places = geometry.central(resized, 76)
    found = geometry.regions(sizes, resized, places + np.arange(400)[:, None] % 10, 67)
    yield "geometry", sha256(resized, places, found.anchor, found.shape, found.start, found.end)


def streamed_order(made: Made) -> Iterator[tuple[str, Entry]]:
    ids = made.packed.ids("train")
    for window, lanes in ((14, 1), (7, 4), (2, 8), (31, 2)):
        for world in (1, 2):
            ranks = [WindowSampler(made.packed, ids, 8, SEED, (rank, world), window=window, lanes=lanes)
                     for rank in range(world)]
            yield f"window-{window}-of-{lanes}-lanes-{world}", sha256(*(
                part for epoch in range(4) for sampler in ranks for step in sampler.steps(epoch) for part in sampler.take(step)))
        yield f"plans-{window}-of-{lanes}-lanes", sha256(*(
            np.asarray(part) for epoch in range(3) for plan in [ranks[0].plan(epoch)]
            for part in (plan.order, plan.sequence, plan.bounds, plan.lanes, plan.last_steps)))


def of_batches(name: str, batches: list[Batch]) -> Iterator[tuple[str, Entry]]:
    """What they are of, and their pixels."""
    yield f"{name}/samples", sha256(*(part for batch in batches for part in (batch.ids, batch.epochs, batch.labels, batch.step)))
    yield f"{name}/images", floats(*(batch.images for batch in batches))


def taken(tier: str, index: SampleIndex, data: DataConfig, stats: Stats, folder: Path, *, batch: int = BATCH, epochs: int = 3,
          memory: str = "ram", note: Path | None = None, **options: Any) -> tuple[list[Batch], dict[str, Any]]:
    """Batches of so many epochs, and the loader's state after them."""
    machine = LoaderConfig(threads=2, quarantine_budget=0.2, resident_folder=str(folder), resident_memory=memory)
    with loader_of_training(tier, index, "train", data, batch, SEED, stats, machine=machine,
                            quarantine=Quarantine(9, note) if note else None, **options) as loader:
        return [batch for _ in range(epochs) for batch in loader], loader.state_dict()


def archives(made: Made) -> Iterator[tuple[str, Entry]]:
    note = made.folder / "quarantine.jsonl"
    for region, mean in (*(("square", mean) for mean in MEANS), ("full", "channel"), ("full", "image_center")):
        note.unlink(missing_ok=True)
        batches, state = taken("archives", made.photos, pixels(mean, region), made.stats, made.folder, note=note)
        yield from of_batches(f"{region}-{mean}", batches)
    yield "state", sha256(sorted(state.items()))
    replaced = [json.loads(line) for line in note.read_text(encoding="utf-8").splitlines()]
    yield "stand-ins", sha256(sorted((line["id"], line["epoch"], line["step"], line["substitute"]) for line in replaced))
    plain = pixels("channel", mirror=False, lighting=0.0)
    yield from of_batches("plain", taken("archives", made.photos, plain, made.stats, made.folder, epochs=1)[0])
    some = pixels("image", lighting_epochs=1)
    yield from of_batches("lighting-for-1-epoch", taken("archives", made.photos, some, made.stats, made.folder, epochs=2)[0])
    for rank in range(2):
        batches, _ = taken("archives", made.photos, pixels(), made.stats, made.folder, epochs=2, shard=(rank, 2))
        yield from of_batches(f"rank-{rank}-of-2", batches)


def resident(made: Made) -> Iterator[tuple[str, Entry]]:
    for kind in ("rgb", "yuv420"):
        for mean in MEANS:
            folder = made.folder / f"resident-{mean}"
            batches, state = taken("resident", made.photos, pixels(mean), made.stats, folder, resident=kind)
            yield from of_batches(f"ram-{kind}-{mean}", batches)
        batches, _ = taken("resident", made.photos, pixels(), made.stats, folder, resident=kind, memory="gpu")
        yield from of_batches(f"shared-out-{kind}", batches)
    yield "state", sha256(sorted(state.items()))


def packed(made: Made) -> Iterator[tuple[str, Entry]]:
    for tier in ("packed", "streamed"):
        options: dict[str, Any] = {"window": 14, "lanes": 2} if tier == "streamed" else {}
        for mean in MEANS:
            batches, state = taken(tier, made.packed, pixels(mean), made.packed_stats, made.folder, batch=8, **options)
            yield from of_batches(f"{tier}-{mean}", batches)
        yield f"{tier}-state", sha256(sorted(state.items()))
        for rank in range(2):
            batches, _ = taken(tier, made.packed, pixels(), made.packed_stats, made.folder, batch=8, epochs=2, shard=(rank, 2),
                               **options)
            yield from of_batches(f"{tier}-rank-{rank}-of-2", batches)
    batches, _ = taken("resident", made.packed, pixels(), made.packed_stats, made.folder / "resident-packed", batch=8)
    yield from of_batches("resident", batches)


def shards(made: Made) -> Iterator[tuple[str, Entry]]:
    """Packing by the command, of squares and of whole images, and what is read of it."""
    stats = Stats.for_index(SampleIndex.load(made.index), 76)
    for region in ("square", "full"):
        folder = made.shards(region)
        for path in sorted(folder.glob("*.tar")):
            yield f"{region}/{path.name}", sha256(path.read_bytes())
        index = SampleIndex.load(folder)
        yield f"{region}/rows", sha256((folder / "samples.npy").read_bytes())
        yield f"{region}/header", content_sha256(json.loads((folder / "index.json").read_bytes()))
        yield f"{region}/train", index.split_sha256("train")
        ways: dict[str, dict[str, Any]] = {"packed": {}, "streamed": {"window": 16, "lanes": 2}}
        for tier, options in ways.items():
            for mean in ("channel", "image_center"):
                batches, _ = taken(tier, index, pixels(mean, region), stats, made.folder, batch=8, epochs=2, **options)
                yield from of_batches(f"{region}/{tier}-{mean}", batches)


def squares_and_views(made: Made) -> Iterator[tuple[str, Entry]]:
    """Squares and views of test images, of two passes."""
    for tier, kind in (("archives", "rgb"), ("resident", "rgb"), ("resident", "yuv420")):
        for mean in MEANS:
            for memory in ("ram", "gpu") if tier == "resident" else ("ram",):
                machine = LoaderConfig(threads=2, resident_folder=str(made.folder / f"tests-{mean}"), resident_memory=memory)
                with loader_of_tests(tier, made.photos, "val", pixels(mean), 3, made.stats, resident=kind,
                                     machine=machine) as loader:
                    batches = [batch for _ in range(2) for batch in loader]
                    name = f"{tier}-{kind}-{memory}-{mean}"
                    yield from of_batches(name, batches)
                    for count in (1, 10):
                        yield f"{name}/{count}-views", floats(*(view for batch in batches[:3]
                                                                for view in loader.crops(batch.images, count)))
    for rank in range(2):
        with loader_of_tests("archives", made.photos, "val", pixels(), 3, made.stats, machine=made.machine,
                             shard=(rank, 2)) as loader:
            yield from of_batches(f"rank-{rank}-of-2", list(loader))


def statistics(made: Made) -> Iterator[tuple[str, Entry]]:
    built = SampleIndex.load(made.index)
    for name, stats in (("photographs", made.stats), ("packed", made.packed_stats),
                        ("demo", Stats.load(stats_path(made.index, 76)))):
        yield f"{name}/mean-image", sha256(stats.mean_image)
        yield f"{name}/channel-mean", sha256(stats.channel_mean)
        yield f"{name}/components", floats(stats.eigenvalues, stats.eigenvectors)
        yield f"{name}/of", sha256(stats.count, sorted(stats.skipped.items()), stats.index, stats.split)
        yield f"{name}/all", floats(stats.mean_image, stats.channel_mean) | {"digest": stats.sha256}
    yield "index/rows", sha256((made.index / "samples.npy").read_bytes())
    yield "index/header", content_sha256(json.loads((made.index / "index.json").read_bytes()))
    yield "index/recorded", built.sha256
    for split in ("train", "val"):
        yield f"index/{split}", built.split_sha256(split)
    yield "index/names", sha256([built.name(id) for id in range(len(built))])
    yield "index/bytes", sha256(*(built.read(int(id)) for id in built.ids("train")))


def words(seed: int, step: int, layer: str) -> torch.Tensor:
    return torch.tensor(dropout_words(seed, step, layer), dtype=torch.int32)


def network(made: Made) -> Iterator[tuple[str, Entry]]:
    config = small_network()
    net = AlexNet(config, seed=3)
    for name, parameter in net.named_parameters():
        yield f"initial/{name}", floats(parameter)
    for layer in ("fc6", "fc7"):
        masks = [keep_mask(p, words(3, step, layer), rows=(5, 69), columns=(100, 356), device=torch.device("cpu"))
                 for p in (0.3, 0.5) for step in (0, 1, 10 ** 6)]
        yield f"masks/{layer}", sha256(*masks)
    x = torch.randn(16, 3, 67, 67, generator=torch.Generator().manual_seed(2))
    yield "random-input", floats(x)
    yield "dropout", sha256(dropout(torch.full((64, 256), 3.0), 0.25, words(1, 2, "fc6"), first_row=0, first_column=8))
    maps = torch.randn(4, 16, 7, 7, generator=torch.Generator().manual_seed(5)).requires_grad_()
    for groups, relu in ((1, False), (2, True)):
        maps.grad = None
        normalised = local_response_norm(maps, LrnConfig(k=1.0, n=5, alpha=0.3, beta=0.75), groups, relu)
        normalised.square().sum().backward()
        assert maps.grad is not None
        yield f"lrn/{groups}-groups", floats(normalised, maps.grad)
    with torch.no_grad():
        yield "logits/of-tests", floats(net.eval()(x))
    logits = net.train()(x, step=4)
    yield "logits/of-training", floats(logits)
    torch.nn.functional.cross_entropy(logits, torch.arange(16) % 7).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        yield f"gradient/{name}", floats(parameter.grad)


def of_run(name: str, run: Path) -> Iterator[tuple[str, Entry]]:
    """Losses, results, and every tensor of the last checkpoint: weights and their velocities."""
    found = list(lines(run))
    steps = [line for line in found if line["kind"] == "step"]
    yield f"{name}/steps", sha256([line["step"] for line in steps])
    yield f"{name}/losses", told(line["loss"] for line in steps)
    yield f"{name}/rates", told(line["lr"] for line in steps)
    for line in found:
        scores = line.get("validation") if line["kind"] == "epoch" else line if line["kind"] == "test" else None
        if scores:
            yield (f"{name}/{line['kind']}-{line.get('epoch', '')}",
                   told(scores[key] for key in ("loss", "top1_errors", "top5_errors")))
    for tensor, value in sorted(weights(run).items()):
        yield f"{name}/{tensor}", floats(value)
    yield f"{name}/fingerprint", fingerprint(load_config(run / "config.yaml"))


def runs(made: Made) -> Iterator[tuple[str, Entry]]:
    """Of train.main: six steps of the two towers in two processes, while in this one two epochs with their tests, and six steps
    of each tier and of each way to compute."""
    folder = made.folder / "runs"
    squares = f"--machine.resident_folder={made.folder / 'run-squares'}"
    ways = {"packed": ["--data.tier=packed"], "streamed": ["--data.tier=streamed", "--data.window=16", "--data.lanes=2"],
            "resident": ["--data.tier=resident", squares],
            "yuv420": ["--data.tier=resident", "--data.resident=yuv420", squares],
            "bf16": ["--machine.precision=bf16"], "channels-last": ["--machine.channels_last=true"],
            "one-tower": ["--model.towers=1"]}
    with start(PAIR, made.recipe, folder, "--machine.name=two-processes", "--machine.stop_after=6") as process:
        here(made.recipe, folder, "--machine.name=whole")
        yield from of_run("whole", folder / "whole")
        for name, options in ways.items():
            here(made.recipe, folder, f"--machine.name={name}", "--machine.stop_after=6", *options, code=75)
            yield from of_run(name, folder / name)
        finish(process, 1)  # the launcher's code for any that is not 0, here that of a run that was stopped
    yield from of_run("two-processes", folder / "two-processes")


def recipes(made: Made) -> Iterator[tuple[str, Entry]]:
    """Fingerprints of the recipes that are shipped."""
    for path in sorted(RECIPES.glob("*.yaml")):
        if path.stem == "small":
            continue  # it takes its classes from an index, so it has no fingerprint of its own
        yield path.stem, fingerprint(parse_recipe(["--config", str(path)]).config)


# Group → what makes its entries, and the generated pictures they are made of.
GROUPS: dict[str, tuple[Callable[[Made], Iterator[tuple[str, Entry]]], tuple[str, ...]]] = {
    "order": (order, ()), "network": (network, ()), "recipes": (recipes, ()), "streamed-order": (streamed_order, ("squares",)),
    "archives": (archives, ("photographs",)), "resident": (resident, ("photographs",)), "packed": (packed, ("squares",)),
    "shards": (shards, ("demo",)), "tests": (squares_and_views, ("photographs",)),
    "statistics": (statistics, ("photographs", "squares", "demo")), "runs": (runs, ("demo",))}


def this_machine() -> dict[str, str]:
    """What may change the last bits of floating point."""
    return {"platform": f"{platform.system()} {platform.machine()}", "torch": version("torch"), "numpy": version("numpy"),
            "cpu capability": torch.backends.cpu.get_cpu_capability()}


def entries(group: str, made: Made) -> dict[str, Entry]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: dict[str, Entry] = {}
        for key, entry in GROUPS[group][0](made):
            assert f"{group}/{key}" not in found, f"{group}/{key} comes twice"
            found[f"{group}/{key}"] = entry
        return found
    finally:
        torch.set_num_threads(threads)


RECORD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Entry]]:
    made = Made(tmp_path_factory.mktemp("golden"))

    @functools.cache
    def of(group: str) -> dict[str, Entry] | Exception:
        try:
            return entries(group, made)
        except Exception as error:  # each key of the group fails with it, and it is made once
            return error

    def asked(group: str) -> dict[str, Entry]:
        others = [name for name in GROUPS[group][1] if made.inputs[name] != RECORD["inputs"][name]]
        if others:
            pytest.skip(f"the generated pictures ({', '.join(others)}) are not those on record: another version of their encoder")
        result = of(group)
        if isinstance(result, Exception):
            raise result
        return result
    return asked


@pytest.mark.parametrize("group", GROUPS)
def test_the_keys_are_those_on_record(found: Callable[[str], dict[str, Entry]], group: str) -> None:
    assert sorted(found(group)) == sorted(key for key in RECORD["entries"] if key.startswith(f"{group}/"))


@pytest.mark.parametrize("key", RECORD.get("entries", {}))
def test_it_is_what_it_was(found: Callable[[str], dict[str, Entry]], key: str) -> None:
    ours, expected = found(key.split("/")[0]).get(key), RECORD["entries"][key]
    if isinstance(expected, str):
        assert ours == expected
    else:
        # bf16 rounds to 2^-8; processors with AVX512_BF16 multiply in it, others emulate that: largest magnitudes move by 0.7%.
        assert ours is not None and ours["numbers"] == pytest.approx(expected["numbers"], rel=0.02 if "/bf16/" in key else 1e-5)
        if this_machine() == RECORD["machine"]:
            assert ours["digest"] == expected["digest"]


def write() -> None:
    """Write the record anew."""
    with tempfile.TemporaryDirectory() as folder:
        made = Made(Path(folder))
        record = {"machine": this_machine(), "inputs": made.inputs,
                  "entries": {key: entry for group in GROUPS for key, entry in entries(group, made).items()}}
    text = json.dumps({**record, "entries": {}}, indent=1)
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in record["entries"].items())
    FILE.write_text(text.replace('"entries": {}', f'"entries": {{\n{body}\n }}') + "\n", encoding="utf-8")
    print(f"{FILE}: {len(record['entries'])} entries")


if __name__ == "__main__":
    write()
