"""pyproject.toml, requirements.lock, environment.yml and the installed packages agree."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
PYPI_NAME = {"pytorch": "torch"}  # conda's name: name on PyPI


def read_lock(name):
    lines = (ROOT / name).read_text().split("\n")
    lines = [line for line in lines if line and not line.startswith("#")]
    unpinned = [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[^=\s]+", line)]
    assert not unpinned, f"{name} has lines that are no exact pins: {unpinned}"
    return dict(line.split("==") for line in lines)


def direct(extras=()):
    """Requirements that pyproject declares itself, by name."""
    lines = PYPROJECT["project"]["dependencies"] + [r for e in extras for r in EXTRAS[e]]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def conda_pins():
    """The pins of environment.yml by PyPI name, those of its pip section included."""
    listed = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
    pins = dict(line.split("=") for line in listed if "=" in line)
    pins = {PYPI_NAME.get(name, name): version for name, version in pins.items()}
    (pip,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    return pins | dict(line.split("==") for line in pip if not line.startswith("-r"))


def overrides():
    return dict(line.split("==") for line in PYPROJECT["tool"]["uv"]["override-dependencies"])


@pytest.mark.parametrize(
    "lock, extras",
    [("requirements.lock", ["dev"]), ("requirements-fairchem.lock", ["dev", "fairchem"])],
)
def test_lock_pins_what_pyproject_asks_for(lock, extras):
    pins = read_lock(lock)
    for name, requirement in direct(extras).items():
        assert name in pins, f"{name} is missing in {lock}"
        assert Version(pins[name]) in requirement.specifier, f"{requirement}: {pins[name]}"


def test_locks_carry_the_override():
    assert overrides() == {"e3nn": "0.5.1"}
    for lock in ("requirements.lock", "requirements-fairchem.lock"):
        assert read_lock(lock)["e3nn"] == "0.5.1"


def test_fairchem_lock_differs_only_where_fairchem_asks_for_it():
    core, full = read_lock("requirements.lock"), read_lock("requirements-fairchem.lock")
    assert not set(core) - set(full)
    assert {name for name in core if core[name] != full[name]} <= {"lmdb", "setuptools"}


def test_conda_lists_the_direct_dependencies_with_the_pins_of_the_lock():
    pins, lock = conda_pins(), read_lock("requirements.lock")
    assert pins.pop("python") == "3.11"
    assert set(pins) == set(direct(["dev"])) | set(overrides())
    assert pins == {name: lock[name] for name in pins}


def test_python_is_3_11_everywhere():
    assert PYPROJECT["project"]["requires-python"] == ">=3.11,<3.12"
    assert sys.version_info[:2] == (3, 11)


def test_makefile_installs_the_locked_torch():
    pinned = re.search(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert pinned[1] == read_lock("requirements.lock")["torch"]


def test_makefile_and_conda_build_the_gpaw_of_the_extra():
    wanted = PYPROJECT["project"]["optional-dependencies"]["dft"]
    assert re.search(r"^GPAW := (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split() == wanted
    version = dict(w.split("==") for w in wanted)["gpaw"]
    assert re.search(rf"^\s*- gpaw {re.escape(version.rsplit('.', 1)[0])}\.\*", (ROOT / "environment.yml").read_text(), re.M)


def test_installed_packages_are_the_locked_ones():
    installed = {canonicalize_name(d.name): d.version for d in metadata.distributions()}
    fairchem = "fairchem-core" in installed
    lock = read_lock("requirements-fairchem.lock" if fairchem else "requirements.lock")
    wrong = {
        name: (installed.get(name), wanted)
        for name, wanted in lock.items()
        if installed.get(name, "").split("+")[0] != wanted
    }
    assert not wrong, f"(installed, locked): {wrong}"


def test_table_of_contents_lists_every_notebook_once():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    files = [chapter["file"] for chapter in toc["chapters"]]
    listed = [file for file in files if file.startswith("notebooks/")]
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert [file.removeprefix("notebooks/") for file in listed] == notebooks
