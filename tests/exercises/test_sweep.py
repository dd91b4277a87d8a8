"""e16's script: a table is checked before anybody reads it."""

import pytest
import sweep
import test_e16_learning_rates as e16
import torch
from variants import KitError, Modules


def table():
    return e16.sweep(torch.Generator().manual_seed(0))


def distinct(runs):
    return [{**run, "kl": 0.1 + i / 100} for i, run in enumerate(runs)]


def test_a_whole_table_has_no_problem():
    assert sweep.problems(distinct(table())) == []


def test_each_problem_is_named():
    def first(**changes):
        runs = distinct(table())
        runs[0] = {**runs[0], **changes}
        return " | ".join(sweep.problems(runs))

    runs = distinct(table())
    assert "2 seeds, not 3" in " | ".join(sweep.problems(runs[1:]))
    assert "no share" in first(new=1.2)
    assert "no share" in first(prior=float("nan"))
    assert "KL(student || base) is -0.5" in first(kl=-0.5)
    assert "different learning rates" in first(lr=0.5)
    assert "is no method" in first(method="grpo")
    assert "same results" in " | ".join(sweep.problems([*runs, runs[0]]))
    few = [run for run in runs if run["lr"] < 1e-3]
    assert "2 learning rates, not 3" in " | ".join(sweep.problems(few))


def test_the_check_reads_the_file_and_shows_the_means(tmp_path, capsys):
    text = ",".join(sweep.FIELDS) + "\n"
    for run in distinct(table()):
        text += ",".join(str(run[key]) for key in sweep.FIELDS) + "\n"
    (tmp_path / "table.csv").write_text(text, encoding="utf-8")
    assert sweep.main(["--check", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and "to" in lines[1]
    (tmp_path / "table.csv").write_text(text.replace("sft,", "sft,x", 1),
                                        encoding="utf-8")  # fmt: skip
    try:
        sweep.main(["--check", "--out", str(tmp_path)])
    except KitError as error:
        assert "table.csv:" in str(error)
    else:
        raise AssertionError("a word for a number is not refused")


@pytest.mark.slow
def test_a_run_gives_a_line_of_the_table(tiny_job, tmp_path):
    m = Modules()
    made = sweep.setting(m, tiny_job[2:])
    runs = [
        sweep.one_run(m, made, method, 1e-3, 1, 2, ["A"], tmp_path)
        for method in sweep.METHODS
    ]
    assert all(tuple(run) == sweep.FIELDS for run in runs), runs
    assert sweep.problems(runs, 1, 1) == [], runs
