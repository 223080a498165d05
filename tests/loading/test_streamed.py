import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.digests import digest
from tests.helpers.loaders import train_loader
from tests.helpers.packed_set import tiny_s3, write_packed
from tests.helpers.small_set import encode, picture

from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from pipeline.reading.quarantine import Quarantine
from pipeline.compute_stats import compute
from pipeline.stats import Stats
from pipeline.sampling.sampler import WindowSampler

DATA = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="channel")
COUNT, BATCH, WINDOW, LANES = 61, 8, 14, 4
GARBAGE = b"this is no picture " * 40


def blobs() -> list[bytes]:
    return [encode(picture(i, 76, 76)) for i in range(COUNT)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_packed(tmp_path_factory.mktemp("packed"), blobs(), 9)


@pytest.fixture(scope="module")
def stats(packed: SampleIndex) -> Stats:
    return compute(packed, "train", 76)


def loader(index: SampleIndex, stats: Stats, **options: object) -> TrainLoader:
    given = {"window": WINDOW, "lanes": LANES, **options}
    return train_loader("streamed", index, "train", DATA, BATCH, 7, stats, **given)  # type: ignore[arg-type]


def epochs_of(train: TrainLoader, count: int) -> list[Batch]:
    return [batch for _ in range(count) for batch in train]


def test_each_epoch_holds_every_sample_once_shuffled_within_windows(packed: SampleIndex) -> None:
    ids = packed.ids("train")
    for lanes in (1, 2, 4, 8):
        sampler = WindowSampler(packed, ids, BATCH, 7, window=WINDOW, lanes=lanes)
        assert sampler.lanes == min(lanes, COUNT // WINDOW)
        for epoch in range(5):
            plan = sampler.plan(epoch)
            assert sorted(plan.order) == sorted(plan.sequence) == list(ids)
            sizes = np.diff(plan.bounds)
            assert sizes.max() <= -(-WINDOW // sampler.lanes) and sizes.min() * 3 >= sizes.max()
            positions = np.argsort(plan.order)  # of every id
            for window, (low, high) in enumerate(zip(plan.bounds[:-1], plan.bounds[1:], strict=True)):
                inside = positions[plan.sequence[low:high]]
                rows = (epoch * COUNT + inside) % BATCH
                assert set(rows * sampler.lanes // BATCH) == {plan.lanes[window]}
                assert plan.last_steps[window] == (epoch * COUNT + inside.max()) // BATCH
                lanes_found, windows = sampler.locate(epoch, plan.sequence[low:high])
                assert set(lanes_found) == {plan.lanes[window]} and set(windows) == {window}
            # within a lane, windows follow one another, and a lane reads each of its shards in one go, forwards
            for lane in range(sampler.lanes):
                mine = np.flatnonzero(plan.lanes == lane)
                part = plan.sequence[plan.bounds[mine[0]]:plan.bounds[mine[-1] + 1]]
                ends = [positions[plan.sequence[plan.bounds[w]:plan.bounds[w + 1]]] for w in mine]
                assert all(a.max() < b.min() for a, b in zip(ends, ends[1:]))
                rows = packed.samples[part]
                for archive in np.unique(rows["archive"]):
                    places = np.flatnonzero(rows["archive"] == archive)
                    assert list(places) == list(range(places[0], places[-1] + 1))
                    assert (np.diff(rows["offset"][places].astype(np.int64)) > 0).all()
        orders = [tuple(sampler.order(epoch)) for epoch in range(3)]
        assert len(set(orders)) == 3
        assert tuple(WindowSampler(packed, ids, BATCH, 8, window=WINDOW, lanes=lanes).order(0)) not in orders
    narrow = WindowSampler(packed, ids, BATCH, 7, window=2, lanes=4)
    assert sorted(narrow.order(1)) == list(ids) and (np.diff(narrow.plan(1).bounds) == 1).all()
    whole = WindowSampler(packed, ids, BATCH, 7, window=COUNT, lanes=8)
    assert whole.lanes == 1 and len(whole.plan(0).lanes) == 1  # what fits in a window is truly permuted


def test_the_order_is_what_it_was(packed: SampleIndex) -> None:
    """The order is part of the format of a run: it must not change between versions."""
    order = WindowSampler(packed, packed.ids("train"), BATCH, 7, window=WINDOW, lanes=LANES).order(2)
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "958a4ce6491070e8"


def test_batches_are_those_of_the_packed_tier_in_another_order(packed: SampleIndex, stats: Stats) -> None:
    with train_loader("packed", packed, "train", DATA, BATCH, 7, stats) as other:
        expected = {(int(e), int(i)): (image, int(label)) for _ in range(3) for b in other
                    for e, i, image, label in zip(b.epochs, b.ids, b.images, b.labels, strict=True)}
    with loader(packed, stats) as train:
        found = 0
        for batch in epochs_of(train, 2):
            for e, i, image, label in zip(batch.epochs, batch.ids, batch.images, batch.labels, strict=True):
                pixels, known = expected[int(e), int(i)]
                assert torch.equal(pixels, image) and known == label
                found += 1
        assert found >= 2 * COUNT - BATCH


def test_the_stream_is_the_same_for_any_ranks_threads_and_lanes_read(packed: SampleIndex, stats: Stats) -> None:
    def stream(world: int, machine: LoaderConfig) -> str:
        loaders = [loader(packed, stats, shard=(rank, world), machine=machine) for rank in range(world)]
        rows = [epochs_of(train, 3) for train in loaders]
        for train in loaders:
            train.close()
        return digest([Batch(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]),
                             np.concatenate([part.ids for part in parts]), np.concatenate([part.epochs for part in parts]),
                             parts[0].step) for parts in zip(*rows, strict=True)])

    expected = stream(1, LoaderConfig(threads=1, prefetch=1, read_threads=0))
    for world, threads in ((1, 3), (2, 1), (4, 2), (8, 1)):
        assert stream(world, LoaderConfig(threads=threads, read_threads=threads)) == expected
    for world in (1, 2, 4):
        samplers = [loader(packed, stats, shard=(rank, world)).sampler for rank in range(world)]
        lanes = [sampler.own_lanes() for sampler in samplers]  # type: ignore[attr-defined]
        assert sorted(sum(lanes, [])) == list(range(4))  # no lane is read twice


def test_resume_at_every_step_continues_the_stream(packed: SampleIndex, stats: Stats) -> None:
    with loader(packed, stats) as train:
        states, batches = [], []
        for _ in range(2):
            for batch in train:
                batches.append(batch)
                states.append(json.loads(json.dumps(train.state_dict())))
    for done, state in enumerate(states, start=1):
        for rank in range(2):
            with loader(packed, stats, shard=(rank, 2)) as other:
                other.load_state_dict(state)
                for expected in batches[done:done + 3]:
                    try:
                        batch = next(other)
                    except StopIteration:
                        batch = next(iter(other))
                    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
                    assert batch.step == expected.step and np.array_equal(batch.ids, expected.ids[half])
                    assert torch.equal(batch.images, expected.images[half])
    with loader(packed, stats) as other:
        for key, value in (("window", 15), ("lanes", 2), ("seed", 8)):
            with pytest.raises(ValueError, match=rf"loader state {key} \(={value}\) must equal this loader's"):
                other.load_state_dict({**states[0], key: value})
        with train_loader("packed", packed, "train", DATA, BATCH, 7, stats) as plain, \
                pytest.raises(ValueError, match="must have lanes, window"):
            other.load_state_dict(plain.state_dict())


def test_unreadable_samples_are_replaced_from_their_window(packed: SampleIndex, stats: Stats, tmp_path: Path) -> None:
    """One does not decode, one has another CRC-32: the same stand-ins on any rank, and after a resume."""
    bad = blobs()
    bad[3], bad[7] = bad[3][:len(bad[3]) // 3], GARBAGE
    index = write_packed(tmp_path, bad, 9)
    with open(index.archive_path(int(index.samples[11]["archive"])), "r+b") as file:
        file.seek(int(index.samples[11]["offset"]) + 300)
        file.write(b"\xff\x00\xff")
    index = SampleIndex.load(index.path)
    note = tmp_path / "quarantine.jsonl"
    with loader(index, stats, quarantine=Quarantine(3, note)) as train:
        batches = epochs_of(train, 3)
        sampler = train.sampler
    lines = [json.loads(line) for line in note.read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    assert all(line["member"] == f"{line['id']:08d}.jpg" and line["archive"].startswith(str(tmp_path)) for line in lines)
    assert reasons.keys() == {3, 7, 11} and reasons[11] == "has another CRC-32 than the index"
    assert reasons[3].startswith("cannot be decoded") and reasons[7].startswith("cannot be decoded")
    with loader(packed, stats) as train:
        for batch, expected in zip(batches, epochs_of(train, 3), strict=True):
            good = ~np.isin(expected.ids, (3, 7, 11))
            assert torch.equal(batch.images[good], expected.images[good]) and not np.isin(batch.ids, (3, 7, 11)).any()
            for row in np.flatnonzero(~good):
                pair = np.array([expected.ids[row], batch.ids[row]])
                assert len(set(sampler.locate(int(batch.epochs[row]), pair)[1])) == 1
    first = len(batches) // 2
    for rank in range(4):
        with loader(index, stats, shard=(rank, 4), quarantine=Quarantine(3)) as train:
            train.load_state_dict({**train.state_dict(), "step": first})
            for expected in batches[first:first + 4]:
                assert np.array_equal(next(train).ids, expected.ids[2 * rank:2 * rank + 2])
    with loader(index, stats, quarantine=Quarantine(2)) as train:
        with pytest.raises(RuntimeError, match=r"quarantine \(=3 unreadable samples\) must not exceed its budget \(=2\)"):
            epochs_of(train, 2)
    with loader(write_packed(tmp_path / "all", [GARBAGE] * COUNT, 9), stats, quarantine=Quarantine(COUNT)) as train:
        with pytest.raises(RuntimeError, match=r"no readable stand-in after 100 attempts among \d samples; .*; or raise window"):
            next(train)


def test_missing_and_cut_shards_are_named_and_go_on_when_restored(stats: Stats, tmp_path: Path) -> None:
    index = write_packed(tmp_path, blobs(), 9)
    with loader(index, stats) as train:
        expected = digest(epochs_of(train, 1))
    shard = tmp_path / "train-00004.tar"
    content = shard.read_bytes()
    with loader(SampleIndex.load(index.path), stats) as train:
        shard.unlink()
        with pytest.raises(RuntimeError, match=r"train-00004.tar\) is not there"):
            epochs_of(train, 1)
        shard.write_bytes(content[:-512])
        with pytest.raises(RuntimeError, match=r"train-00004.tar\) has \d+ bytes, but had \d+ when it was indexed"):
            epochs_of(train, 1)
        shard.write_bytes(content)
        train.load_state_dict({**train.state_dict(), "step": 0})
        assert digest(epochs_of(train, 1)) == expected


def test_shards_come_from_an_object_store(packed: SampleIndex, stats: Stats, tmp_path: Path) -> None:
    store, folder = tiny_s3(), tmp_path / "gone"
    index = write_packed(folder, blobs(), 9)
    remote = store.root / "bucket" / "imagenet"
    remote.mkdir(parents=True)
    broken = index.samples[11]
    for shard in folder.glob("*.tar"):
        shard.rename(remote / shard.name)
    with loader(packed, stats) as train:
        expected = digest(epochs_of(train, 2))
    index = SampleIndex.load(index.path)
    with loader(index, stats, store="s3://bucket/imagenet/") as train:
        assert digest(epochs_of(train, 2)) == expected
    gets = [request for request in store.requests if request[0] == "GET" and request[1].startswith("/bucket/imagenet/")]
    asked = [int(last) - int(first) + 1 for _, _, span in gets for first, last in [span.removeprefix("bytes=").split("-")]]
    assert max(asked) > 2 * (int(index.samples["size"].max()) + 2048), "runs of samples are asked for, not samples"
    with open(remote / index.archives[int(broken["archive"])].path.name, "r+b") as file:
        file.seek(int(broken["offset"]) - 512 + 200)
        file.write(bytes(312))
    note = tmp_path / "quarantine.jsonl"
    with loader(index, stats, store="s3://bucket/imagenet", quarantine=Quarantine(1, note)) as train:
        assert 11 not in np.concatenate([batch.ids for batch in epochs_of(train, 1)])
    (line,) = [json.loads(line) for line in note.read_text().splitlines()]
    assert line["archive"].startswith("s3://bucket/imagenet/train-") and line["member"] == "00000011.jpg"
    assert line["reason"] == "does not lie where the index has it"


def test_wrong_use_is_explained(packed: SampleIndex, stats: Stats, tmp_path: Path) -> None:
    for name in ("window", "lanes"):
        with pytest.raises(ValueError, match=rf"{name} \(=0\) must be at least 1; raise it"):
            loader(packed, stats, **{name: 0})
    for store in ("s3:/bucket", "s3://", "/folder"):
        with pytest.raises(ValueError, match=rf"store \(={store}; of a recipe: machine.archives\) must be s3://bucket/prefix;"):
            loader(packed, stats, store=store)


def test_samples_without_cls_and_excluded_ones_do_not_disturb(packed: SampleIndex, stats: Stats, tmp_path: Path) -> None:
    with loader(packed, stats) as train:
        expected = digest(epochs_of(train, 1))
    with loader(write_packed(tmp_path / "bare", blobs(), 9, labelled=False), stats) as train:
        assert digest(epochs_of(train, 1)) == expected
    with loader(write_packed(tmp_path / "less", blobs(), 9, excluded=(0, 5, 60)), stats) as train:
        batches = epochs_of(train, 2)
    ids, epochs = np.concatenate([b.ids for b in batches]), np.concatenate([b.epochs for b in batches])
    assert sorted(ids[epochs == 0]) == sorted(set(range(COUNT)) - {0, 5, 60})
