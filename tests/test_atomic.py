"""A file appears whole; what dead writers left goes, what live ones write stays."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.files import is_temporary, remove_dead, replacing

ROOT = Path(__file__).resolve().parents[1]


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"one")
        assert not path.exists() and [is_temporary(found) for found in tmp_path.iterdir()] == [True]
    assert path.read_bytes() == b"one"
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"two")
        raise KeyError
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]
    with replacing(path) as file:
        file.write(b"three")
    with replacing(path, keep=True) as file:
        file.write(b"four")
    assert path.read_bytes() == b"three" and os.listdir(tmp_path) == ["file"]
    with replacing(tmp_path / "new", keep=True) as file:
        file.write(b"five")
    assert (tmp_path / "new").read_bytes() == b"five" and len(os.listdir(tmp_path)) == 2


def test_only_the_temporaries_of_the_dead_are_removed(tmp_path: Path) -> None:
    code = ("import os, sys; from pathlib import Path; from pipeline.files import replacing\n"
            "with replacing(Path(sys.argv[1])) as file:\n"
            "    file.write(b'half'); file.flush(); print('ready', flush=True); sys.stdin.read()\n")
    dead, live = (subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True) for name in ("dead", "live"))
    for process in (dead, live):
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    dead.kill()
    dead.communicate()
    (tmp_path / "other").write_text("not ours")
    assert [path.name.split(".")[1] for path in remove_dead(tmp_path)] == ["dead"]
    assert remove_dead(tmp_path) == []
    live.communicate("")
    assert sorted(os.listdir(tmp_path)) == ["live", "other"] and (tmp_path / "live").read_bytes() == b"half"
