import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.packed_set import tiny_s3, write_packed
from tests.helpers.small_set import encode, picture

from pipeline.index.sample_index import SampleIndex
from pipeline.reading.quarantine import SampleError
from pipeline.sampling.sampler import Ids, Passage
from pipeline.reading.shard_source import Lane, Window, runs

HEAD = encode(picture(0, 24, 24))  # a whole JPEG; whatever follows it is no matter
BLOBS = [HEAD + np.random.default_rng(i).bytes(700 + 350 * (i % 5)) for i in range(40)]


@pytest.fixture
def index(tmp_path: Path) -> SampleIndex:
    return write_packed(tmp_path, BLOBS, 11)


def in_order(index: SampleIndex, first: int = 0) -> Ids:
    rows = index.samples
    return np.lexsort((rows["offset"], rows["archive"]))[first:].astype(np.int64)


def passage(index: SampleIndex, epoch: int, first: int = 0, per_window: int = 6) -> Passage:
    ids = in_order(index, first)
    windows = (np.arange(len(ids), dtype=np.int64) + first) // per_window
    return Passage(epoch, ids, windows, {int(w): 10 * epoch + int(w) for w in np.unique(windows)})


def lane(index: SampleIndex, first: int = 0, where: Callable[[int], str] | None = None, crc: bool = True) -> Lane:
    def passages() -> Iterator[Passage]:
        yield passage(index, 0, first)
        epoch = 1
        while True:
            yield passage(index, epoch)
            epoch += 1

    return Lane(index, passages(), where or (lambda position: str(index.archive_path(position))), crc=crc)


def test_runs_cover_the_samples_and_stay_within_shards_windows_and_their_length(index: SampleIndex) -> None:
    ids = in_order(index)
    rows, windows = index.samples[ids], np.arange(40, dtype=np.int64) // 6
    for run_bytes in (1, 3000, 5000, 1 << 20):
        found = runs(rows, windows, run_bytes)
        assert np.array_equal(found.archives[found.of], rows["archive"])
        assert np.array_equal(found.windows[found.of], windows)
        assert np.array_equal(found.starts[found.of] + found.at, rows["offset"].astype(np.int64))
        assert (found.at >= 512).all() and (found.at + rows["size"] <= found.sizes[found.of]).all()
        assert (found.starts % 512 == 0).all()  # DALI refuses others
        counts = np.bincount(found.of)
        largest = int(rows["size"].max()) + 2 * 512 + 1024
        assert ((found.sizes <= run_bytes + largest) | (counts == 1)).all()
    assert len(runs(rows, windows, 1).starts) == 40 and len(found.starts) == len(np.unique(windows * 100 + rows["archive"]))


def test_windows_hold_the_files_bytes_epoch_after_epoch(index: SampleIndex) -> None:
    reading = lane(index)
    held: list[tuple[Window, int]] = []
    for epoch in range(3):
        for number in range(7):
            window = reading.window((epoch, number), 10 * epoch + number)
            assert reading.window((epoch, number), 0) is window
            held.append((window, epoch))
            assert len(reading._held) == 1
    reading.close()
    for window, _ in held:  # views outlive the reader
        for id in window.ids.tolist():
            view = window.read(id)
            assert view.tobytes() == BLOBS[id] == index.read(id)
    assert sorted(id for window, epoch in held if epoch == 1 for id in window.ids.tolist()) == list(range(40))


def test_windows_in_use_are_kept_and_a_resume_begins_in_the_middle(index: SampleIndex) -> None:
    reading = lane(index)
    early = reading.window((0, 1), 0)
    assert reading.window((1, 2), 1) is not early
    assert (0, 0) not in reading._held and (0, 1) in reading._held  # a batch not consumed yet may still need it
    assert reading.window((0, 1), 1) is early
    reading.close()
    late = lane(index, first=12)
    assert list(late.window((0, 2), 2).ids) == list(in_order(index)[12:18])
    late.close()


def test_changed_bytes_and_samples_out_of_place_are_named(index: SampleIndex) -> None:
    first, second, third = in_order(index)[:3].tolist()
    path = index.archive_path(0)
    content = bytearray(path.read_bytes())
    content[int(index.samples[first]["offset"]) + len(HEAD) + 300] ^= 4
    at = int(index.samples[second]["offset"]) - 512
    content[at:at + 512] = bytes(512)
    path.write_bytes(content)
    for crc in (True, False):
        reading = lane(index, crc=crc)
        window = reading.window((0, 0), 0)
        if crc:
            with pytest.raises(SampleError, match=rf"sample {first} \(={first:08d}.jpg in .*\) has another CRC-32 than"):
                window.read(first)
        else:
            assert len(window.read(first)) == len(BLOBS[first])
        with pytest.raises(SampleError, match=rf"sample {second} .* does not lie where the index has it"):
            window.read(second)
        assert window.read(third).tobytes() == BLOBS[third]
        reading.close()


def test_an_index_without_crcs_is_not_checked(tmp_path: Path) -> None:
    index = write_packed(tmp_path, BLOBS, 11, crc32=False)
    reading = lane(index)
    window = reading.window((0, 0), 0)
    assert all(window.read(id).tobytes() == BLOBS[id] for id in window.ids.tolist())
    reading.close()


def test_a_shard_cut_while_it_is_read_is_named(index: SampleIndex) -> None:
    for size in (1024, 700, 0):
        path = index.archive_path(1)
        content = path.read_bytes()
        reading = lane(index)
        os.truncate(path, size)
        with pytest.raises(RuntimeError, match=r"shard .*train-00001.tar cannot be read \(it (ends early|is shorter than when it "
                                               r"was indexed)\); restore it, or the connection, and resume"):
            for number in range(7):
                reading.window((0, number), 0)
        with pytest.raises(RuntimeError, match="cannot be read"):  # whoever asks again is told again
            reading.window((0, 6), 0)
        reading.close()
        path.write_bytes(content)


def test_an_object_store_is_asked_for_runs_only(index: SampleIndex) -> None:
    store = tiny_s3()
    bucket = store.root / "photos" / "packed"
    bucket.mkdir(parents=True)
    for archive in index.archives:
        (bucket / archive.path.name).write_bytes(archive.path.read_bytes())
    reading = lane(index, first=12, where=lambda position: f"s3://photos/packed/{index.archives[position].path.name}")
    for number in range(2, 7):
        window = reading.window((0, number), 0)
        assert all(window.read(id).tobytes() == BLOBS[id] for id in window.ids.tolist())
    reading.close()
    found = runs(index.samples[in_order(index, 12)], passage(index, 0, 12).windows)
    wanted = [f"bytes={start}-{start + size - 1}" for start, size in zip(found.starts, found.sizes, strict=True)]
    asked = [request for request in store.requests if request[1].startswith("/photos/")]
    assert [span for verb, _, span in asked if verb == "GET"][:len(wanted)] == wanted
    assert [path[-6:] for verb, path, _ in asked if verb == "HEAD"][:3] == ["01.tar", "02.tar", "03.tar"]


def test_objects_missing_or_cut_are_named(index: SampleIndex) -> None:
    store = tiny_s3()
    bucket = store.root / "broken"
    bucket.mkdir(parents=True)
    for archive in index.archives:
        (bucket / archive.path.name).write_bytes(archive.path.read_bytes())

    def read_all() -> None:
        reading = lane(index, where=lambda position: f"s3://broken/{index.archives[position].path.name}")
        try:
            for number in range(7):
                reading.window((0, number), 0)
        finally:
            reading.close()

    read_all()
    path = bucket / index.archives[2].path.name
    content = path.read_bytes()
    for size in (len(content) // 2, 100):
        path.write_bytes(content[:size])
        with pytest.raises(RuntimeError, match=r"shard s3://broken/train-00002.tar cannot be read \(it "):
            read_all()
    path.unlink()
    with pytest.raises(RuntimeError, match=r"shard s3://broken/train-00002.tar cannot be read \(no such object, or no right"):
        read_all()
