"""The experiments of tests/bench: cells, measurements, tables, pictures."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
for path in (ROOT / "tests" / "exercises", ROOT / "tests" / "bench"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

import cell  # noqa: E402
import experiments  # noqa: E402
import paper  # noqa: E402
import probes  # noqa: E402
from variants import Modules  # noqa: E402

import data  # noqa: E402

NEW = [name for name in paper.EXPERIMENTS if name != "default"]


def kind(spec):
    """Cells of one kind run the same code."""
    names = ("run", "method", "variants", "skills", "kl", "teacher", "base")
    return json.dumps([spec.get(name) for name in names])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells without a process for each, whose start takes longer than they do."""
    monkeypatch.setattr(paper, "start", lambda folder, device: cell.run(folder))


@pytest.mark.parametrize("name", NEW)
def test_an_experiment_runs_to_its_table_and_its_picture(
    name, work, in_this_process, monkeypatch, capsys
):
    """The first row of each kind; cells of other experiments are not run again."""
    experiment, rows = paper.EXPERIMENTS[name], {}
    for label, _, spec in experiment["rows"]:
        rows.setdefault(kind(spec), (label, 1, spec))
    rows = list(rows.values())
    monkeypatch.setitem(experiment, "rows", rows)
    args = [name, "--seeds", "1", "--quick", "--work", str(work), "--jobs", "1"]
    paper.main(args)
    said = capsys.readouterr().out
    for label, *_ in rows:
        assert f"| {label} | 1 |" in said, f"no row {label}: {said}"
    assert f"{len(rows)} of {len(rows)} cells, 0 of them made by other code" in said
    results = json.loads((work / "results" / f"{name}.json").read_text())
    assert len(results["cells"]) == len(rows)
    if importlib.util.find_spec("matplotlib"):
        assert (work / "results" / f"{name}.png").stat().st_size > 5000
    # what is finished is not run again
    monkeypatch.setattr(paper, "start", lambda *_: pytest.fail("a cell ran again"))
    paper.main(args)
