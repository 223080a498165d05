"""examples/demo.ipynb runs from its first cell to its last, at toy size."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples/demo.ipynb"
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=240, resources={"metadata": {"path": sys.argv[2]}}).execute()
print("\\n".join(output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs))
"""


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))), reason="the extra dev has them")
def test_the_notebook_runs(tmp_path: Path) -> None:
    toy = {"DEMO_PER_CLASS": "8", "DEMO_EPOCHS": "2", "DEMO_FOLDER": "demo-notebook", "IPYTHONDIR": str(tmp_path),
           "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    done = subprocess.run([sys.executable, "-c", RUN, str(NOTEBOOK), str(tmp_path)], env={**os.environ, **toy},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "err@1" in done.stdout and "error:" not in done.stdout, done.stdout
    assert (tmp_path / "demo-notebook/report.html").stat().st_size > 10_000
    assert (tmp_path / "demo-notebook/runs/demo/config.yaml").exists()


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
