import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.digests import digest, take
from tests.helpers.loaders import eval_loader, train_loader
from tests.helpers.resident_loader import SMALL, filled, loader, yuv_decoded
from tests.helpers.small_set import photographs, write_set

from pipeline.resident import yuv420 as yuv
from pipeline.decoding.normalize import Finish, Normalizer
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.resident.store import Layout, Store
from pipeline.reading.quarantine import Quarantine
from pipeline.compute_stats import compute
from pipeline.stats import Stats
from pipeline.resident.ram_store import RamStore

COUNT = 48
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_set(tmp_path_factory.mktemp("photos"), photographs(COUNT))


@pytest.fixture(scope="module")
def stats(photos: SampleIndex) -> Stats:
    return compute(photos, "train", 76)


@pytest.fixture(scope="module")
def expected(photos: SampleIndex, stats: Stats, tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    """Three epochs of one process."""
    with loader(photos, stats, tmp_path_factory.mktemp("expected")) as train:
        return take(train, 18)


def squares_of(index: SampleIndex) -> dict[int, torch.Tensor]:
    with eval_loader("archives", index, "train", SMALL, 16, None) as test:
        return {int(id): pixels.permute(2, 0, 1).contiguous() for batch in test
                for id, pixels in zip(batch.ids, batch.images, strict=True)}


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
def test_crops_are_those_of_the_decoded_square(photos: SampleIndex, stats: Stats, tmp_path: Path, kind: str, mean: str) -> None:
    data = DataConfig(**{**SMALL.__dict__, "mean": mean})
    squares = squares_of(photos)
    if kind == "yuv420":
        squares = {id: yuv_decoded(yuv.encode(square), 76) for id, square in squares.items()}
    with loader(photos, stats, tmp_path, kind, data=data) as train:
        subtracted = None if mean == "channel" else stats.mean_image_chw
        normalizer = Normalizer(67, Finish(subtracted, mean == "image_center"), threads=1)
        for batch in take(train, 14):  # while filling and after it
            chosen = train.planner.augmentation(batch.ids, batch.epochs)
            crops = [squares[int(id)][:, top:top + 67, left:left + 67]
                     for id, top, left in zip(batch.ids, chosen.top, chosen.left, strict=True)]
            assert torch.equal(batch.images, normalizer.begin(crops, chosen)()), batch.step
            assert batch.labels.tolist() == (batch.ids % 5).tolist()
        assert filled(train) == (COUNT, COUNT)


def test_pixels_are_tier_archives_but_for_single_grey_levels(photos: SampleIndex, stats: Stats, expected: list[Batch]) -> None:
    with train_loader("archives", photos, "train", SMALL, 8, 7, stats) as train:
        archives = take(train, 18)
    off, values = 0, 0
    for ours, theirs in zip(expected, archives, strict=True):
        assert np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.epochs, theirs.epochs)
        assert torch.equal(ours.labels, theirs.labels) and ours.step == theirs.step
        difference = (ours.images - theirs.images).abs()
        assert difference.max() < 1.001
        off, values = off + int((difference > 0.001).sum()), values + difference.numel()
    assert off <= 5e-6 * values  # measured on photographs of 256 px: 0.5 in a million


def test_resume_at_any_step_with_or_without_what_was_filled(photos: SampleIndex, stats: Stats, expected: list[Batch],
                                                            tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    for done in (0, 1, 3, 5, 6, 7, 11, 13):
        for folder in (tmp_path / str(done), kept):
            with loader(photos, stats, folder) as train:
                train.load_state_dict(json.loads(json.dumps({**train.state_dict(), "step": done})))
                assert digest(take(train, 4)) == digest(expected[done:done + 4])
                state = train.state_dict()
                assert state["step"] == done + 4
                train.close()  # whoever closes it goes on where he was
                train.load_state_dict(state)
                assert digest(take(train, 1)) == digest(expected[done + 4:done + 5])
    with loader(photos, stats, kept) as train:
        assert filled(train) == (COUNT, COUNT)


def test_after_the_fill_nothing_is_read(stats: Stats, expected: list[Batch], tmp_path: Path) -> None:
    index = write_set(tmp_path, photographs(COUNT))
    with loader(index, stats, tmp_path / "store") as train:
        train.fill()
        assert filled(train) == (COUNT, COUNT) and train.step == 0
    (tmp_path / "images.tar").unlink()
    with loader(SampleIndex.load(tmp_path / "index"), stats, tmp_path / "store") as train:
        assert digest(take(train, 18)) == digest(expected)
        assert "decode" not in train.monitor.spans and train.monitor.spans["normalize"] >= 18
        train.close()
        assert train.chain.store.sealed and train.note == ""  # type: ignore[attr-defined]


def test_a_damaged_row_is_named_decoded_again_and_changes_no_batch(
        photos: SampleIndex, stats: Stats, expected: list[Batch], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with loader(photos, stats, tmp_path) as train:
        train.fill()
        path = train.chain.store.path  # type: ignore[attr-defined]
    whole = bytearray(path.read_bytes())
    for row in (5, 40):
        whole[-(COUNT - row) * 3 * 76 * 76] ^= 1
    path.write_bytes(whole)
    with loader(photos, stats, tmp_path) as train:
        assert digest(take(train, 18)) == digest(expected) and filled(train) == (COUNT, COUNT)
    said = [message for message in caplog.messages if "damaged" in message]
    assert sorted(said) == sorted(f"resident store: 1 damaged rows (wrong checksum; {photos.safe_name(row)}) are decoded again"
                                  for row in (5, 40)) or said == [
        f"resident store: 2 damaged rows (wrong checksum; {photos.safe_name(5)}, {photos.safe_name(40)}) are decoded again"]


def joined(parts: list[Batch]) -> Batch:
    return Batch(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]),
                 np.concatenate([part.ids for part in parts]), np.concatenate([part.epochs for part in parts]), parts[0].step)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_share_a_file_give_the_stream_of_one(photos: SampleIndex, stats: Stats, expected: list[Batch], tmp_path: Path,
                                                        world: int) -> None:
    ranks = [loader(photos, stats, tmp_path, shard=(rank, world)) for rank in range(world)]
    rows = [take(train, 9) if rank else take(train, 4) + take(train, 5) for rank, train in enumerate(ranks)]
    assert digest([joined(list(parts)) for parts in zip(*rows, strict=True)]) == digest(expected[:9])
    assert all(filled(train) == (COUNT, COUNT) for train in ranks)
    for train in ranks:
        train.close()


def test_unreadable_samples_are_replaced_as_in_tier_archives(tmp_path: Path) -> None:
    blobs = photographs(20)
    s = compute(write_set(tmp_path / "healthy", blobs), "train", 76)
    index = write_set(tmp_path, [blob[:len(blob) // 3] if id in (3, 7) else blob for id, blob in enumerate(blobs)])
    with open(tmp_path / "images.tar", "r+b") as file:
        file.seek(int(index.samples[12]["offset"]) + 700)
        file.write(b"\xff\x00\xff")  # another CRC-32

    def named(path: Path) -> dict[int, str]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == len({line["id"] for line in lines})
        return {line["id"]: line["reason"] for line in lines}

    with train_loader("archives", index, "train", SMALL, 5, 7, s, quarantine=Quarantine(3, tmp_path / "theirs.jsonl")) as train:
        theirs = [batch.ids.tolist() for batch in take(train, 12)]
    for part in range(2):  # the second process finds the others filled, and tries the three again
        with loader(index, s, tmp_path / "store", batch=5, quarantine=Quarantine(3, tmp_path / f"ours{part}.jsonl")) as train:
            ours = take(train, 12)
            assert [batch.ids.tolist() for batch in ours] == theirs and filled(train) == (17, 20)
            assert named(tmp_path / f"ours{part}.jsonl") == named(tmp_path / "theirs.jsonl")
            train.close()
            assert train.chain.store.sealed  # type: ignore[attr-defined]
    with loader(index, s, tmp_path / "other", batch=5, memory="gpu", quarantine=Quarantine(3)) as train:
        assert digest(take(train, 12)) == digest(ours)
    with loader(index, s, tmp_path / "third", batch=5, quarantine=Quarantine(2)) as train:
        train.fill()
        with pytest.raises(RuntimeError, match=r"quarantine \(=3 unreadable samples\) must not exceed its budget \(=2\)"):
            take(train, 12)
    broken = write_set(tmp_path / "all", [b"this is no picture " * 40] * 20)
    with loader(broken, s, tmp_path / "fourth", batch=5, quarantine=Quarantine(20)) as train:
        with pytest.raises(RuntimeError, match="no readable stand-in after 100 attempts among 20 samples; the last one: sample"):
            next(iter(train))


def test_what_tier_resident_cannot_do_is_refused(photos: SampleIndex, stats: Stats, tmp_path: Path) -> None:
    full = DataConfig(**{**SMALL.__dict__, "region": "full", "mean": "channel"})
    with pytest.raises(ValueError, match=r"data.region \(=full\) must be square for tier resident"):
        loader(photos, stats, tmp_path, data=full)
    with pytest.raises(ValueError, match=r"data.resident \(=webp\) must be one of rgb, yuv420"):
        loader(photos, stats, tmp_path, "webp")
    with pytest.raises(RuntimeError, match=r"resident store: .*\(=/proc/none\) .*\(machine.resident_folder\)"):
        loader(photos, stats, Path("/proc/none"))


def test_the_store_lies_beside_the_index_unless_told_otherwise(stats: Stats, tmp_path: Path) -> None:
    index = write_set(tmp_path, photographs(COUNT))
    with train_loader("resident", index, "train", SMALL, 8, 7, stats):
        assert [path.name for path in sorted((tmp_path / "index" / "resident").iterdir())] == [
            f"train-76-rgb-cpu-{index.split_sha256('train')[:16]}.{end}" for end in ("lock", "squares")]
    assert SampleIndex.load(tmp_path / "index").ids("train").size == COUNT


@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
def test_what_goes_to_a_device_becomes_the_same_crops(photos: SampleIndex, stats: Stats, tmp_path: Path, kind: str) -> None:
    with loader(photos, stats, tmp_path, kind) as train:
        train.fill()
        found = train.chain.store  # type: ignore[attr-defined]
        assert isinstance(found, RamStore) and found.layout == Layout(kind, 76, 67)
        ids = photos.ids("train")[5:30]
        drawn = train.planner.augmentation(ids, np.zeros_like(ids))
        crops = Store.crops(found, [(ids, drawn.top, drawn.left)])
        assert isinstance(crops, torch.Tensor)
        assert all(torch.equal(*pair) for pair in zip(crops, found.crops([(ids, drawn.top, drawn.left)]), strict=True))
        for crop, place, top, left in zip(crops, ids, drawn.top, drawn.left, strict=True):
            assert torch.equal(crop, found.crop(int(place), int(top), int(left)))


@pytest.mark.parametrize("kind,memory", [("rgb", "ram"), ("yuv420", "gpu")])
def test_a_loader_whose_device_finishes_the_images_gives_the_same(photos: SampleIndex, tmp_path: Path, kind: str,
                                                                  memory: str) -> None:
    """As on a GPU, in Triton's interpreter."""
    data = DataConfig(**{**SMALL.__dict__, "square_px": 12, "crop_px": 9})
    small, found = compute(photos, "train", 12), []
    for kernels in ("auto", "triton"):
        with loader(photos, small, tmp_path, kind, data=data, batch=3, memory=memory, kernels=kernels) as train:
            found.append(take(train, 1))
    assert digest(found[0]) == digest(found[1])


def test_a_process_killed_while_filling_leaves_what_can_be_gone_on_with(photos: SampleIndex, stats: Stats, expected: list[Batch],
                                                                        tmp_path: Path) -> None:
    from pipeline.stats import stats_path

    stats.save(stats_path(photos.path, 76))
    squares = squares_of(photos)
    process = subprocess.Popen([sys.executable, "-m", "tests.helpers.resident_loader", str(photos.path), str(tmp_path)],
                               stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline() == b"row\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with loader(photos, stats, tmp_path) as train:
        there = filled(train)[0]
        assert 20 <= there < COUNT
        for place in np.flatnonzero(train.chain.store.have):  # a row that is marked is whole
            row = train.chain.store.pixels[place]  # type: ignore[attr-defined]
            assert torch.equal(torch.from_numpy(row), squares[int(place)].ravel())
        assert digest(take(train, 18)) == digest(expected)
        assert filled(train) == (COUNT, COUNT)


def rank_process(rank: int, folder: Path, index: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        photos = SampleIndex.load(index)
        s = Stats.for_index(photos, 76)
        found = {}
        with loader(photos, s, folder / "shared", shard=(rank, 2)) as train:  # one file, filled by two at a time
            found["ram"] = take(train, 12)
        for kind in ("rgb", "yuv420"):
            for name, shard in (("shard", (rank, 2)), ("replicate", (0, 1))):
                with loader(photos, s, folder, kind, memory="gpu", shard=shard, group=dist.new_group(),
                            quarantine=Quarantine(1)) as train:
                    early = take(train, 5)
                    train.close()  # in the middle of the fill, and batches of the others may be under way
                    found[f"{kind} {name}"] = early + take(train, 13)
                    assert filled(train) == (COUNT - 1, COUNT)
        with loader(photos, s, folder, memory="gpu", shard=(rank, 2), group=dist.new_group(), quarantine=Quarantine(1)) as train:
            train.fill()
            found["filled"] = take(train, 6)
        torch.save(found, folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_share_one_file_or_their_memories(stats: Stats, tmp_path: Path) -> None:
    from pipeline.stats import stats_path

    blobs = photographs(COUNT)
    index = write_set(tmp_path, [*blobs[:13], blobs[13][:len(blobs[13]) // 3], *blobs[14:]])
    s = compute(index, "train", 76, machine=LoaderConfig(quarantine_budget=0.1))
    s.save(stats_path(index.path, 76))
    torch.multiprocessing.spawn(rank_process, (tmp_path, index.path), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    for kind in ("rgb", "yuv420"):
        with loader(index, s, tmp_path / kind, kind, quarantine=Quarantine(1)) as train:
            alone = take(train, 18)
        assert digest([joined(list(parts)) for parts in zip(first[f"{kind} shard"], second[f"{kind} shard"])]) == digest(alone)
        assert digest(first[f"{kind} replicate"]) == digest(second[f"{kind} replicate"]) == digest(alone)
        if kind == "rgb":
            assert digest([joined(list(parts)) for parts in zip(first["ram"], second["ram"])]) == digest(alone[:12])
            assert digest([joined(list(parts)) for parts in zip(first["filled"], second["filled"])]) == digest(alone[:6])
