"""The modules import each other in one direction, those inside functions counted: whoever reads one never has to read in a circle."""

import ast
from graphlib import TopologicalSorter

import pytest

from meidnet_core.results import ROOT

MODULES = {p.stem: p for p in (ROOT / "meidnet_core").glob("*.py") if p.stem != "__init__"}


def imported(path):
    """Names of the package's modules that a file imports, anywhere in it."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level == 1]
    return {name for n in nodes for name in ([n.module] if n.module else [a.name for a in n.names])} & set(MODULES)


def test_no_import_runs_in_a_circle():
    order = list(TopologicalSorter({name: imported(path) for name, path in MODULES.items()}).static_order())
    assert set(order) == set(MODULES) and order.index("model") < order.index("train")


def test_a_circle_would_be_found(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from . import model\n    from .train import Run\n")
    assert imported(tmp_path / "a.py") == {"model", "train"}
    with pytest.raises(ValueError, match="cycle"):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
