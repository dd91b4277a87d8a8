"""make.py and pytest --impl, as a student meets them."""

import subprocess
import sys

import kit
import make
import pytest
from variants import ROOT, guarded, source

BODY = '    raise NotImplementedError("e04: response_mask is yours to write")\n'


def run(*argv):
    return guarded(make.main, [str(arg) for arg in argv])


def write(path, text):
    path.write_text(path.read_text(encoding="utf-8").replace(BODY, text),
                    encoding="utf-8")  # fmt: skip


def test_extra_py_holds_what_was_asked_for_and_no_other_solution(tmp_path):
    assert run("e04", "--to", tmp_path) == 0
    text = (tmp_path / "extra.py").read_text(encoding="utf-8")
    assert BODY in text and text.count("\ndef ") == 1, text


def test_several_exercises_share_a_folder_and_what_is_written_stays(tmp_path):
    run("e04", "--to", tmp_path)
    write(tmp_path / "extra.py", "    return ids > lengths[:, None]  # mine\n")
    assert run("e01", "e02", "--to", tmp_path) == 0
    text = (tmp_path / "extra.py").read_text(encoding="utf-8")
    assert "# mine" in text and "e01: " in text, text
    assert "e02: " in (tmp_path / "model.py").read_text(encoding="utf-8"), "no e02"
    states = {name: kit.Work.of_folder(tmp_path).state(kit.exercise(name))
              for name in ("e01", "e02", "e03", "e04", "e05")}  # fmt: skip
    assert states == {"e01": "stub", "e02": "stub", "e03": "project", "e04": "written",
                      "e05": "missing"}, states  # fmt: skip


def test_nothing_is_overwritten_without_force(tmp_path, capsys):
    run("e04", "--to", tmp_path)
    write(tmp_path / "extra.py", "    return ids > lengths[:, None]\n")
    before = (tmp_path / "extra.py").read_text(encoding="utf-8")
    assert run("e04", "--to", tmp_path) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["error", "hint"], said
    assert "--force" in said[1], said
    assert (tmp_path / "extra.py").read_text(encoding="utf-8") == before, "it is gone"
    assert run("e04", "--to", tmp_path, "--force") == 0
    after = (tmp_path / "extra.py").read_text(encoding="utf-8")
    assert BODY in after, "it was not begun again"


def test_a_file_that_python_cannot_read_is_named_with_its_line(tmp_path, capsys):
    (tmp_path / "extra.py").write_text("import torch\ndef f(:\n", encoding="utf-8")
    assert run("e04", "--to", tmp_path) == 2
    assert "extra.py:2:" in capsys.readouterr().err, "where?"


@pytest.mark.parametrize("argv", [["e99"], ["e04", "--hint", "4"], ["--unknown"]])
def test_bad_input_is_an_error_and_a_hint(argv, capsys):
    assert run(*argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["error", "hint"], said


def test_list_sheet_and_hints_are_printed(capsys):
    assert run("--list") == 0 and run("e05") == 0 and run("e05", "--hint", 3) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in kit.exercises()), said
    assert "Goal: " in said and "Almost the code" in said, said


def test_a_stub_is_made_of_a_method_too_and_other_lines_stay():
    text = source("model.py")
    stub = kit.empty_function(text, "CausalSelfAttention.forward", "e03: x")
    assert stub.count("raise NotImplementedError") == 1, "no stub"
    gone = len(text.splitlines()) - len(stub.splitlines())
    body = kit.function_source(text, "CausalSelfAttention.forward")
    assert gone == len(body.splitlines()) - 2, "other lines are gone"


def test_pytest_grades_a_folder_and_says_which_mistake_it_is(tmp_path):
    run("e04", "--to", tmp_path)
    write(tmp_path / "extra.py", "    place = torch.arange(ids.size(1))\n"
          "    return place >= lengths[:, None]\n")  # fmt: skip
    argv = ["tests/exercises", "-k", "e04", "--impl", tmp_path]
    done = subprocess.run([sys.executable, "-m", "pytest", *map(str, argv)], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "\ntokens behind the end count in yours\n" in done.stdout, done.stdout
    assert "hint: python tests/exercises/make.py e04 --hint 1" in done.stdout
    assert "def test_" not in done.stdout, "a traceback of the grader"
