"""Progress on stderr: something at once, within 80 columns, whatever is counted."""

import pytest

from pipeline import progress
from pipeline.progress import LINE_START, ProgressBar


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_line_fits_80_columns_and_the_first_comes_at_once(is_terminal: bool, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    with ProgressBar() as bar:
        bar.expect("listing ILSVRC2012_img_train.tar", 147_897_477_120)
        first = capsys.readouterr().err
        assert first.removeprefix(LINE_START).rstrip("\n") == "listing ILSVRC2012_img_train.tar: 0% of 147.9 GB"
        now += 11
        bar.advance(461_220, 53_243_091_763)
        line = capsys.readouterr().err
        assert line.removeprefix(LINE_START).rstrip("\n") == (
            "listing I...: 36% of 147.9 GB, 461,220 images, 41,929/s, 4.8 GB/s, 0:00:20 left")
        now += 20_000
        bar.advance(819_947, 53_243_091_763)
        slow = capsys.readouterr().err
        bar.expect("checking", 3_000_000)
        now += 1
        bar.advance(2, 3_100_000)  # of an estimate
    lines = (line + slow + capsys.readouterr().err).replace(LINE_START, "\n").splitlines()
    assert max(map(len, lines)) < 80 and any("left" in line for line in lines), lines
    assert lines[-1] == "checking: 100% of 3.0 MB, 2 images, 2/s, 1.0 s"
