"""The verbs that look into an index, and how the command ends."""
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from pipeline.index.sample_index import SampleIndex
from tests.helpers.indexes import COMMAND, built, devkit, jpeg, train_tar, val_tar
from tests.helpers.tars import member, save
from tools.build_index import main


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    train_tar(folder / "t.tar", {"n02": {"g\x1b[2J.JPEG": jpeg(1, mode="L")}})
    val_tar(folder / "v.tar")
    assert main(["build", "ilsvrc2012", "--train", str(folder / "t.tar"), "--val", str(folder / "v.tar"), "--devkit",
                 str(devkit(folder / "kit")), "--out", str(folder / "index")]) == 0
    return folder / "index"


def test_ls(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = SampleIndex.load(small)
    assert main(["ls", str(small), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == list(range(26))
    for line in lines:
        data = Path(line["archive"]).read_bytes()[line["offset"]:line["offset"] + line["size"]]
        assert zlib.crc32(data) == line["crc32"] and Image.open(io.BytesIO(data)).size == (line["width"], line["height"])
        assert line["member"] == index.name(line["id"]) and index.classes[line["label"]].wnid == line["wnid"]
    assert main(["ls", str(small), "--class", "n01", "--split", "val"]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [["21", "val", "n01"], ["25", "val", "n01"]]
    assert main(["ls", str(small), "--odd"]) == 0
    said = capsys.readouterr().out
    assert "grey" in said and said.count("\n") == 1 and "\x1b" not in said  # a name cannot drive the terminal
    for arguments, message in [(["--class", "n99"], "class (=n99) is not in the index"),
                               (["--split", "test"], "split (=test) is not in the index")]:
        assert main(["ls", str(small), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_class_names_cannot_drive_the_terminal(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    save(tmp_path / "c.tar", member(b"cl\x1b[2Jear/1.jpg", jpeg(1)) + member(b"\xff/1.jpg", jpeg(2)) + bytes(1024))
    built(tmp_path, "classes", tmp_path / "c.tar")
    for words in (["ls"], ["ls", "--json"], ["info"], ["info", "--json"], ["verify"]):
        capsysbinary.readouterr()
        assert main([words[0], str(tmp_path / "index"), *words[1:]]) == 0
        written = capsysbinary.readouterr()
        assert written.err == b"" and b"\x1b" not in written.out
        assert words[0] != "ls" or written.out.count(b"\n") == 2


def test_info(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(small), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["samples"] == 26 and about["classes"][0] == {"wnid": "n01", "words": "words of n01"}
    assert [split["count"] for split in about["splits"]] == [21, 5] and about["formats"] == {"jpeg": 26}
    assert main(["info", str(small)]) == 0
    assert "samples   26" in capsys.readouterr().out
    assert main(["info", str(small.parent)]) == 2
    assert "has no index.json; make one with `alexnet index build`" in capsys.readouterr().err


def test_cat_and_pipes(small: Path) -> None:
    index = SampleIndex.load(small)
    cat = subprocess.run([*COMMAND, "cat", small, "3"], capture_output=True, cwd="/")
    assert (cat.returncode, cat.stdout, cat.stderr) == (0, index.read(3), b"")
    cat = subprocess.run([*COMMAND, "cat", small, "99"], capture_output=True)
    assert cat.returncode == 2 and cat.stderr.startswith(b"error: id (=99) is not in the index")
    head = subprocess.run(f"'{COMMAND[0]}' '{COMMAND[1]}' ls '{small}' --json | head -n 1; exit ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", capture_output=True)
    assert head.returncode == 0 and head.stderr == b"" and json.loads(head.stdout)["id"] == 0


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert said.returncode == 0 and "build webdataset" in said.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # CPU time: other work does not count
    loaded = "import sys; sys.argv = ['x']; import tools.build_index; print([m for m in ('numpy', 'torch', 'nvidia', 'scipy') " \
             "if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "[]\n"


def slowed(tmp_path: Path, jobs: str) -> "subprocess.Popen[str]":
    """A build that stands still in the scan, in a process group of its own."""
    train_tar(tmp_path / "t.tar")
    slow = ("import sys, time, pipeline.index.builder as i, tools.build_index as b\n"
            "i.PARALLEL_BYTES = 1\n"
            "advance = lambda self, images, bytes: (print('scanning', flush=True), time.sleep(20))\n"
            "b.ProgressBar.advance = advance\n"
            "if __name__ == '__main__': sys.exit(b.main(sys.argv[1:]))\n")
    script = save(tmp_path / "slow.py", slow.encode())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.Popen([sys.executable, script, "build", "ilsvrc2012", "--train", tmp_path / "t.tar", "--out",
                            tmp_path / "index", "--jobs", jobs], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True, env=environment)
    assert run.stdout is not None and run.stdout.readline() == "scanning\n"
    return run


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, jobs: str) -> None:
    """A build slowed down in the scan is interrupted there, as from a terminal: the whole process group gets SIGINT."""
    run = slowed(tmp_path, jobs)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=20)
    assert run.returncode == 130 and error.splitlines()[-1] == "interrupted; nothing was written"
    assert sorted(os.listdir(tmp_path)) == ["slow.py", "t.tar"]


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    run = slowed(tmp_path, "2")
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):  # no process of its group is left
        for _ in range(100):
            os.killpg(run.pid, 0)
            time.sleep(0.1)
    run.communicate()
