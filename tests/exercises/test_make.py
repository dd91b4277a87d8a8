"""make.py and pytest --impl, as a student meets them."""

import importlib
import subprocess
import sys

import kit
import make
import pytest
import torch
from variants import HERE, ROOT, guarded, source

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
    said = capsys.readouterr().err
    assert "extra.py:2:" in said, "where?"
    assert "hint: Python cannot read line 2, `def f(:`" in said, said


@pytest.mark.parametrize("argv", [["e99"], ["e04", "--hint", "4"], ["--unknown"]])
def test_bad_input_is_an_error_and_a_hint(argv, capsys):
    assert run(*argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["error", "hint"], said


@pytest.mark.parametrize("name", ["E05", "e5", "5", "e05"])
def test_an_id_may_be_short_and_in_capitals(name):
    assert kit.exercise(name).id == "e05"


def test_what_grades_several_exercises_is_one_command(tmp_path, capsys):
    assert run("E1", "e2", "--to", tmp_path) == 0
    assert '-k "e01 or e02" --impl' in capsys.readouterr().out


def test_the_readme_counts_the_exercises_that_there_are(capsys):
    words = {16: "Sixteen", 17: "Seventeen", 18: "Eighteen", 19: "Nineteen"}
    n, text = len(kit.exercises()), (HERE / "README.md").read_text(encoding="utf-8")
    assert run("--list") == 0
    assert f"\n{n} exercises, " in capsys.readouterr().out, n
    assert f"\n{words[n]} functions, " in text, f"README.md counts others than {n}"


def grade(*argv):
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, argv)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_stub_is_not_written_yet_and_says_it_once(tmp_path):
    run("e04", "--to", tmp_path)
    code, said = grade("tests/exercises", "-k", "e04", "--impl", tmp_path)
    report = said.partition("short test summary")[0]  # it repeats all where CI is set
    assert code == 1 and report.count("not written yet: e04") == 1, said
    assert "1 failed, 9 skipped" in said, said
    assert "the project's own functions" not in said, said


def test_a_folder_that_is_missing_and_impl_that_is_missing_are_named(tmp_path):
    folder = tmp_path / "nothing"
    code, said = grade("tests/exercises", "-k", "e04", "--impl", folder)
    assert code == 4 and f"make.py e04 --to {folder} makes it" in said, said
    code, said = grade("tests/exercises/test_e04_response_mask.py")
    assert code == 0 and "--impl mine grades yours" in said, said


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


def test_a_run_takes_what_is_written_and_leaves_stubs_to_the_project(tmp_path, capsys):
    make_run = importlib.import_module("run")
    run("e02", "e05", "--to", tmp_path)
    with pytest.raises(kit.KitError, match="no exercise is written"):
        make_run.take_part(kit.Work.of_folder(tmp_path))
    path = tmp_path / "sft.py"
    text = path.read_text(encoding="utf-8")
    stub = 'raise NotImplementedError("e05: compute_loss is yours to write")'
    assert stub in text, text
    path.write_text(text.replace(stub, 'return "mine"'), encoding="utf-8")
    work = kit.Work.of_folder(tmp_path)
    written, wired = make_run.take_part(work)
    modules = work.modules(written, wired)
    assert [ex.id for ex in written] == ["e05"], written
    assert modules.train.sft.compute_loss(*range(6)) == "mine", "it is not in place"
    token = modules.model.sample_token(torch.eye(2), None, 0)
    assert token.tolist() == [0, 1], "the stub of e02 is in place, not the project's"


def test_the_wires_of_all_exercises_fit_the_source():
    for ex in kit.exercises().values():
        modules = kit.work_of(ex, ex.rights[0][1]).modules(ex, ex.wire)
        assert modules.train.main, ex.id


@pytest.mark.parametrize("name", ["e01", "e04"])
def test_a_wired_function_is_the_one_that_the_job_calls(name):
    ex = kit.exercise(name)
    words = "def log_softmax(x):\n    return None" if name == "e01" else (
        "def response_mask(ids, lengths, end):\n    return (ids == ids) & (ids != end)")
    modules = kit.work_of(ex, words).modules(ex, ex.wire)
    gpt = kit.small_model(modules)
    if name == "e01":
        args = torch.rand(1, 16).double(), gpt.head(), torch.tensor([1])
        with pytest.raises(AttributeError):
            modules.model.chunked_nll(*args, torch.ones(1).double())
        return
    prompts, u = torch.tensor([[1, 2], [3, 4]]), torch.full((2, 4), 0.5)
    response, mask = modules.model.generate(gpt, prompts, torch.tensor([2, 2]), 4, 0, u)
    assert torch.equal(mask, response != 0), "the project's mask is in place"
