"""The set-up says what is true: pins, README's map, settings."""
import configparser
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import pipeline

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "model", "train", "tools")


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", requirement)[0]).lower()


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def pins() -> dict[str, str]:
    found = {}
    for line in lines((ROOT / "constraints.txt").read_text(encoding="utf-8")):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), f"{line} is no plain name==version"
        name, version = line.split("==")
        assert name not in found, f"{name} is pinned twice"
        found[name] = version
    return found


def test_constraints_pin_every_requirement(setup: configparser.ConfigParser) -> None:
    wanted = lines(setup["options"]["install_requires"])
    for extra in setup["options.extras_require"].values():
        wanted += lines(extra)
    assert {name_of(line) for line in wanted} <= pins().keys()


def test_minimum_versions_are_below_the_pins(setup: configparser.ConfigParser) -> None:
    for line in lines(setup["options"]["install_requires"]):
        if ">=" in line:
            name, least = line.split(">=")
            assert [int(part) for part in pins()[name_of(name)].split(".")] >= [int(part) for part in least.split(".")]


def test_core_requirements_are_the_agreed_ones(setup: configparser.ConfigParser) -> None:
    assert {name_of(line) for line in lines(setup["options"]["install_requires"])} == {
        "nvidia-dali-cuda120", "torch", "numpy", "pyyaml", "rich", "docstring-parser", "scipy", "jinja2",
        "simplejpeg", "xxhash", "zlib-ng"}


def test_packages_and_recipes_are_installed(setup: configparser.ConfigParser) -> None:
    assert setup["options"]["packages"] == "find:"
    assert lines(setup["options.packages.find"]["include"]) == [f"{package}*" for package in PACKAGES]
    assert lines(setup["options.package_data"]["train"]) == ["recipes/*.yaml", "recipes/studies/*.yaml", "*/*.jinja"]
    assert lines(setup["options.package_data"]["tools"]) == ["*/*.jinja"]
    assert lines(setup["options.package_data"]["*"]) == ["py.typed"]
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)
    lacking = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")
               if not (path.parent / "__init__.py").exists()}
    assert not lacking, f"{lacking} would not be installed: no __init__.py"


def test_the_metadata_say_whose_it_is_and_where_it_comes_from(setup: configparser.ConfigParser) -> None:
    metadata = setup["metadata"]
    assert metadata["author"] and metadata["url"] and "Typing :: Typed" in lines(metadata["classifiers"])
    assert lines(setup["options.entry_points"]["console_scripts"]) == ["alexnet = tools.alexnet:script"]


def test_pyproject_holds_the_build_system_only() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")).keys() == {"build-system"}


def test_warnings_are_errors(setup: configparser.ConfigParser) -> None:
    assert lines(setup["tool:pytest"]["filterwarnings"])[0] == "error"
    with pytest.raises(UserWarning):
        import warnings
        warnings.warn("a test that warns fails", UserWarning)


def test_the_page_of_recipes_names_every_recipe_and_study() -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    names = [path.relative_to(ROOT / "train" / "recipes").as_posix() for path in (ROOT / "train" / "recipes").rglob("*.yaml")]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_no_host_and_no_path_of_a_machine_in_the_set_up() -> None:
    host_or_path = re.compile(r"https?://|file://|--index-url|--extra-index|--find-links|/home/|/root/|/opt/")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = re.sub(r"^url = .*$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)  # of the metadata
        assert not host_or_path.search(text), name


def test_make_knows_its_targets_and_says_what_an_install_needs() -> None:
    for target in ("demo", "test", "lint", "bench", "clean"):
        result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    result = subprocess.run(["make", "install", "VENV=/nonexistent/venv", "PYTHON="], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 2
    assert "no Python 3.11 or 3.12 with venv found; install one, or say PYTHON=/path/to/python" in result.stderr


def test_dir_of_the_library_lists_its_public_names() -> None:
    assert set(pipeline.__all__) <= set(dir(pipeline))
