"""The architecture holds: direction of imports, no circles, no private access across modules, sizes of files and folders."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "model", "train", "tools")
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
         for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
MOST_LINES, MOST_FILES = 350, 14
# Functions of libraries whose names begin with an underscore: documented ones, and torch's operators that have no other name.
PUBLIC = re.compile(r"os\._exit|torch\._foreach_\w+|torch\.ops\.aten\._\w+|.*\._(replace|asdict|fields)")

# What each part may import besides itself and the parts before it in its row.
LAYERS = [["pipeline.schema", "pipeline.io_errors", "pipeline.files", "pipeline.arrays", "pipeline.rng", "pipeline.config",
           "pipeline.process_pool", "pipeline.progress", "pipeline.monitor"], ["pipeline.index"],
          ["pipeline.sampling", "pipeline.decoding"], ["pipeline.stats"], ["pipeline.reading"], ["pipeline.loading"],
          ["pipeline.resident", "pipeline.packing", "pipeline.compute_stats"], ["pipeline.tiers"], ["pipeline"]]


def layer(module: str) -> int:
    """Position of a pipeline module in LAYERS."""
    part = ".".join(module.split(".")[:2])
    return next(number for number, names in enumerate(LAYERS) if part in names)


def imports(module: str) -> set[str]:
    """Modules of this repository that `module` imports anywhere, those for type checking alone included."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] in PACKAGES}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            assert node.level == 0, f"{module} imports relatively"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found.add(full if full in FILES else node.module)
    return found - {module}


GRAPH = {module: imports(module) for module in FILES}


def test_imports_follow_the_direction_of_the_data() -> None:
    allowed = {"pipeline": {"pipeline"}, "model": {"model"}, "train": {"train", "pipeline", "model"}, "tools": set(PACKAGES)}
    wrong = [f"{module} imports {other}" for module, others in GRAPH.items() for other in others
             if other.split(".")[0] not in allowed[module.split(".")[0]]]
    wrong += [f"{module} imports {other}" for module, others in GRAPH.items() for other in others
              if module.startswith("pipeline.") and other.startswith("pipeline") and layer(other) > layer(module)]
    assert not wrong, "\n".join(wrong)


def test_no_import_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module):], module])
        if module not in done:
            for other in sorted(GRAPH[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in FILES:
        visit(module, [])


@pytest.mark.parametrize("module", FILES)
def test_no_private_member_of_another_module(module: str) -> None:
    wrong = [f"{FILES[module].relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}" for node in ast.walk(TREES[module])
             if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
             and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
             and not PUBLIC.fullmatch(ast.unparse(node))]
    wrong += [f"{FILES[module].relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}" for node in ast.walk(TREES[module])
              if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES
              for name in node.names if name.name.startswith("_") and not name.name.startswith("__")]
    assert not wrong, "\n".join(wrong)


def test_files_and_folders_are_of_readable_size() -> None:
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: count for module, count in lines.items() if count > MOST_LINES} == {}
    folders = {path.parent for path in FILES.values()}
    assert {folder.relative_to(ROOT).as_posix(): count for folder in folders
            if (count := len(list(folder.glob("*.py")))) > MOST_FILES} == {}


def test_no_test_module_imports_another() -> None:
    wrong = [f"{path.relative_to(ROOT)}: {node.module}" for path in sorted((ROOT / "tests").rglob("*.py"))
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests.")
             and node.module.split(".")[-1].startswith("test_")]
    assert not wrong, "\n".join(wrong)
