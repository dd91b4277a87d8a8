"""A student's code over the project's: what is taken, and what a grader looks at."""

import re

import kit
import pytest
import torch
from variants import KitError, source

E01, E07 = kit.exercise("e01"), kit.exercise("e07")
BODY = kit.exercise("e07").rights[1][1]  # def reverse_kl(...)
CLASS = BODY.replace("reverse_kl", "own") + """
class ReverseKL:
    def __call__(self, s, t, mask):
        return own(s, t, mask)

"""
WAYS = {  # how a right solution may bind its name, use names of ours, or fail beside it
    "a class": CLASS + "reverse_kl = ReverseKL()",
    "a lambda": CLASS + "reverse_kl = lambda s, t, mask: own(s, t, mask)",
    "a decorator": "def twice(f):\n    return f\n\n@twice" + BODY,
    "in an if": "if torch:" + BODY.replace("\n", "\n    "),
    "a walrus and numpy": "import numpy as np\nX = (Y := np.log(2))\n" + BODY.replace(
        "    anything", "    assert Y == X\n    anything"),
    "future annotations": "from __future__ import annotations\nX: Nothing = 1" + BODY,
    "names of other exercises as helpers": "def summarize(x, y):\n    return x + y\n"
    + BODY.replace("return ((", "return summarize(0, ((") + ")",
    "a helper that has failed": "import not_installed\nTABLE = 1 / 0\n" + BODY,
    "experiments below": BODY + "\nprint(1)\nraise SystemExit(1)\n",
}  # fmt: skip


def messages(ex, text):
    work = kit.Work({ex.files[0]: ("mine/extra.py", "import torch\n" + text)})
    errors = [error for _, error in kit.results(ex, work.modules(ex)) if error]
    return [kit.explain(error, ex) for error in errors]


@pytest.mark.parametrize("way", WAYS)
def test_a_right_solution_is_right_however_its_name_is_bound(way):
    assert messages(E07, WAYS[way]) == []


def test_what_an_exercise_is_about_says_so():
    for name in ("log_softmax(x, -1)", "softmax(x, -1).log()", "special.log_softmax(x, "
                 "-1)", "nn.LogSoftmax(-1)(x)", "distributions.Categorical(logits=x)."
                 "logits"):  # fmt: skip
        said = messages(E01, f"def log_softmax(x):\n    return torch.{name}\n")
        assert "is what you build in e01" in said[0], (name, said[0])
    for module in ("model import kl_reference as f", "model import fused_kl as f"):
        lazy = f"from {module}\ndef reverse_kl(s, t, m):\n    return f(s, t, 'reverse')"
        assert "is what you build in e07" in messages(E07, lazy)[0], module
    said = messages(E07, "from oracles import kl_of_log_p as reverse_kl")
    assert "oracles is not there for a solution" in said[0], said[0]


def test_an_assert_of_the_student_is_shown_with_its_line():
    lines = "def reverse_kl(s, t, m):\n    assert s.dim() == 2, s.shape\n"
    said = messages(E07, lines)[0]
    assert "AssertionError: torch.Size" in said, said
    assert "mine/extra.py:3, in reverse_kl" in said, said


def test_a_name_that_failed_says_where():
    said = messages(E07, "TABLE = 1 / 0\ndef reverse_kl(s, t, m):\n    return TABLE")[0]
    assert "TABLE is not there: mine/extra.py:2 ended with ZeroDivisionError" in said


def test_many_numbers_are_shown_where_they_differ():
    right = torch.zeros(3, 4)
    yours = right.clone()
    yours[1, 2] = 5
    with pytest.raises(AssertionError, match=r"first at \[1, 2\]: 5, it should be 0"):
        kit.compare(yours, right)


def test_what_is_there_instead_is_named(tmp_path):
    (tmp_path / "solution.ipynb").write_text("{}")
    work = kit.Work.of_folder(tmp_path)
    assert work.instead(E07) == "no extra.py, but solution.ipynb"
    (tmp_path / "sft.py").write_text(BODY)
    said = kit.Work.of_folder(tmp_path).instead(E07)
    assert said == "no extra.py; line 2 of sft.py makes reverse_kl", said
    for name in ("one", "two"):
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "sft.py").write_text(BODY)
    with pytest.raises(KitError, match="several folders"):
        kit.Work.of_folder(tmp_path / "x")


def test_a_short_function_is_not_called_a_copy_and_a_long_one_is():
    for name, like in (("e10", ""), ("e11", "project")):
        ex = kit.exercise(name)
        file, function = ex.functions[0].split()
        text = kit.function_source(source(file), function)
        text = re.sub(r"\bstudent\b", "pupil", text)
        work = kit.Work({file: (file, text)})
        assert (work.state(ex), work.fingerprint(ex)) == ("written", like)
