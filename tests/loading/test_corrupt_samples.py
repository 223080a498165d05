"""Corrupt samples in loaders that decode: replaced, named and bounded in training, refused or skipped in tests; odd files."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.loaders import eval_loader, train_loader
from tests.helpers.small_set import encode, photographs, picture, write_set

from pipeline.compute_stats import compute
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.loader import DecodingChain
from pipeline.reading.quarantine import Quarantine, SampleError
from pipeline.sampling.batch_plan import BatchPlan

SMALL = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="channel")


def broken_set(folder: Path, spoil: dict[int, bytes]) -> SampleIndex:
    blobs = photographs(20)
    for id, blob in spoil.items():
        blobs[id] = blob
    return write_set(folder, blobs, blobs[:4])


GARBAGE = encode(picture(0, 100, 100))[:1000]  # a header, and hardly anything after it


def test_undecodable_samples_are_replaced_named_and_bounded(tmp_path: Path) -> None:
    whole = photographs(20)[3]
    index = broken_set(tmp_path, {3: whole[:len(whole) // 3], 7: GARBAGE})
    healthy = write_set(tmp_path / "healthy", photographs(20))
    s = compute(healthy, "train", 76)
    note = tmp_path / "quarantine.jsonl"
    with train_loader("archives", index, "train", SMALL, 5, 7, s, quarantine=Quarantine(2, note)) as train:
        batches = list(train) + list(train)
    ids = np.concatenate([batch.ids for batch in batches])
    assert len(batches) == 8 and not {3, 7} & set(ids)
    lines = [json.loads(line) for line in note.read_text().splitlines()]
    assert {line["id"] for line in lines} == {3, 7} and len(lines) == 2
    assert all(line["member"] == f"train_{line['id']:04d}.JPEG" and line["reason"].startswith("cannot be decoded")
               and line["archive"] == str(tmp_path / "images.tar") for line in lines)
    # every other row is what a healthy set gives, and the stand-ins are the same on other ranks and after a resume
    with train_loader("archives", healthy, "train", SMALL, 5, 7, s) as train:
        for batch, expected in zip(batches, list(train) + list(train), strict=True):
            good = ~np.isin(expected.ids, (3, 7))
            assert np.array_equal(batch.ids[good], expected.ids[good])
            assert torch.equal(batch.images[good], expected.images[good])
    halves = []
    for rank in range(5):
        with train_loader("archives", index, "train", SMALL, 5, 7, s, shard=(rank, 5), quarantine=Quarantine(2)) as train:
            train.load_state_dict({**train.state_dict(), "step": 4})
            halves.append(np.concatenate([batch.ids for batch in train]))
    assert np.array_equal(np.stack(halves, axis=1).ravel(), ids[20:])
    with train_loader("archives", index, "train", SMALL, 5, 7, s, quarantine=Quarantine(1)) as train:
        with pytest.raises(RuntimeError, match=r"quarantine \(=2 unreadable samples\) must not exceed its budget \(=1\)"):
            list(train)


def test_an_undecodable_sample_is_decoded_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later its stand-in is taken at once, the same as if it had been decoded again."""
    index, s = broken_set(tmp_path, {7: GARBAGE}), compute(write_set(tmp_path / "healthy", photographs(20)), "train", 76)
    failed, recover = [], DecodingChain.recover

    def counted(chain: DecodingChain, plan: BatchPlan, row: int, reason: str) -> BatchPlan:
        failed.append(int(plan.ids[row]))
        return recover(chain, plan, row, reason)

    monkeypatch.setattr(DecodingChain, "recover", counted)
    with train_loader("archives", index, "train", SMALL, 5, 7, s, quarantine=Quarantine(1)) as train:
        epochs = [list(train) for _ in range(4)]
        assert failed == [7] and train.quarantine.count() == (1, 1) and train.quarantine.count() == (1, 0)
        assert f"sample 7 (={index.safe_name(7)}" in train.quarantine.take_notice() and not train.quarantine.take_notice()
    for number, epoch in enumerate(epochs):
        with train_loader("archives", index, "train", SMALL, 5, 7, s, quarantine=Quarantine(1)) as fresh:
            fresh.load_state_dict({**fresh.state_dict(), "step": 4 * number})
            for batch, expected in zip(epoch, list(fresh), strict=True):
                assert np.array_equal(batch.ids, expected.ids) and torch.equal(batch.images, expected.images)
    failed.clear()
    with eval_loader("archives", index, "train", SMALL, 1, s, skip_corrupt=True) as test:  # a batch of which nothing is left
        passes = [[int(id) for batch in test for id in batch.ids] for _ in range(2)]
    assert passes == [[id for id in range(20) if id != 7]] * 2 and failed == [7]


@pytest.mark.parametrize("garbage", [GARBAGE, None])
def test_sets_that_are_mostly_broken_end_or_are_given_up(tmp_path: Path, garbage: bytes | None) -> None:
    """Stand-ins that are broken themselves: no endless loop, and no broken sample comes through. None: bad CRC-32."""
    bad = set(range(20)) - {3, 8, 13}
    index = broken_set(tmp_path, {} if garbage is None else dict.fromkeys(bad, garbage))
    if garbage is None:
        with open(tmp_path / "images.tar", "r+b") as file:
            for id in bad:
                file.seek(int(index.samples[id]["offset"]) + 700)
                file.write(b"\xff\x00\xff")
    s = compute(write_set(tmp_path / "healthy", photographs(20)), "train", 76)
    with train_loader("archives", index, "train", SMALL, 5, 7, s, quarantine=Quarantine(20)) as train:
        for _ in range(6):
            assert set(np.concatenate([batch.ids for batch in train])) <= {3, 8, 13}
    index = broken_set(tmp_path / "all", dict.fromkeys(range(20), GARBAGE))
    with train_loader("archives", index, "train", SMALL, 5, 7, s, quarantine=Quarantine(20)) as train:
        with pytest.raises(RuntimeError, match="no readable stand-in after 100 attempts among 20 samples; the last one: sample"):
            next(iter(train))


def test_whoever_goes_on_after_an_error_starts_at_the_batch_that_failed(tmp_path: Path) -> None:
    index = broken_set(tmp_path, {7: GARBAGE})
    s = compute(write_set(tmp_path / "healthy", photographs(20)), "train", 76)
    quarantine = Quarantine(0)
    with train_loader("archives", index, "train", SMALL, 5, 7, s, quarantine=quarantine) as train:
        steps = []
        with pytest.raises(RuntimeError, match="must not exceed its budget"):
            for batch in train:
                steps.append(batch.step)
        failed = train.step
        assert steps == list(range(failed)) and 7 in train.sampler.take(failed)[0]
        quarantine.budget = 1
        assert next(iter(train)).step == failed == train.step - 1


def test_changed_bytes_are_found_by_their_crc(tmp_path: Path) -> None:
    index = write_set(tmp_path, photographs(20), photographs(4))
    s = compute(index, "train", 76)
    with open(tmp_path / "images.tar", "r+b") as file:
        for id in (5, 21):
            place = int(index.samples[id]["offset"]) + int(index.samples[id]["size"]) // 2
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
    quarantine = Quarantine(1)
    with train_loader("archives", index, "train", SMALL, 5, 7, s, quarantine=quarantine) as train:
        assert 5 not in np.concatenate([batch.ids for batch in train])
        assert quarantine.ids == {5}
    with eval_loader("archives", index, "val", SMALL, 3, s) as test:
        with pytest.raises(SampleError, match=r"sample 21 \(=val_0001.JPEG in .*\) has another CRC-32 than the index; run"):
            list(test)
    with eval_loader("archives", index, "val", SMALL, 3, s, skip_corrupt=True) as test:
        assert [list(batch.ids) for batch in test] == [[20, 22], [23]]
        assert test.skipped == {21: "has another CRC-32 than the index"}


def test_a_corrupt_test_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    index = broken_set(tmp_path, {2: GARBAGE})
    with eval_loader("archives", index, "val", SMALL, 2, None) as test:
        with pytest.raises(SampleError, match=r"sample 22 \(=val_0002.JPEG in .*\) cannot be decoded"):
            list(test)
    with eval_loader("archives", index, "val", SMALL, 1, None, skip_corrupt=True) as test:
        assert [batch.ids[0] for batch in test] == [20, 21, 23]


def test_odd_files_train(tmp_path: Path) -> None:
    plain = picture(1, 100, 120)
    odd = [encode(plain, "PNG"), encode(plain.convert("CMYK")), encode(plain.convert("L")), encode(plain, progressive=True),
           encode(picture(2, 8, 8).resize((1, 1))), encode(plain, "WEBP", lossless=True), encode(plain.convert("RGBA"), "PNG")]
    index = write_set(tmp_path, odd)
    s = compute(index, "train", 76, machine=LoaderConfig(quarantine_budget=0))
    assert s.count == len(odd)
    with train_loader("archives", index, "train", SMALL, 7, 7, s, quarantine=Quarantine(0)) as train:
        (batch,) = list(train)
    assert batch.images.shape == (7, 3, 67, 67) and torch.isfinite(batch.images).all()


def test_orientation_tags_do_not_turn_the_pixels(tmp_path: Path) -> None:
    image = picture(1, 90, 120)
    exif = image.getexif()
    exif[0x0112] = 6
    index = write_set(tmp_path, [encode(image, "JPEG", quality=95, exif=exif), encode(image, "JPEG", quality=95)])
    with eval_loader("archives", index, "train", SMALL, 2, None) as test:
        (batch,) = list(test)
    assert torch.equal(batch.images[0], batch.images[1])


def test_missing_or_shortened_archives_are_named(tmp_path: Path) -> None:
    index = write_set(tmp_path, photographs(5))
    s = compute(index, "train", 76)
    tar = tmp_path / "images.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:-512])
    with train_loader("archives", SampleIndex.load(index.path), "train", SMALL, 5, 7, s) as train:
        with pytest.raises(RuntimeError, match=r"images.tar.* bytes"):
            next(iter(train))
    tar.unlink()
    with train_loader("archives", SampleIndex.load(index.path), "train", SMALL, 5, 7, s) as train:
        with pytest.raises(RuntimeError, match="images.tar"):
            next(iter(train))
