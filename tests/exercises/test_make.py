"""make.py and pytest --impl, as a student meets them."""

import functools
import importlib
import subprocess
import sys
from pathlib import Path

import kit
import make
import pytest
import torch
from test_meta import work_of
from variants import HERE, ROOT, changed_texts, guarded, train_with

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
    assert states == {"e01": "stub", "e02": "stub", "e03": "missing", "e04": "written",
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


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(("name", "folder"), [("e05", ROOT), ("e04", HERE)])
def test_functions_of_the_project_itself_are_never_emptied(
    name, folder, force, tmp_path, capsys, monkeypatch
):
    """By whatever path. (Where it writes, it writes nothing here.)"""
    monkeypatch.setattr(Path, "write_text", None)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for to in (".", folder, tmp_path / "link"):
        assert run(name, "--to", to, *force) == 2
        assert "is the project's own\nhint: --to mine" in capsys.readouterr().err


def test_a_plugin_of_pytest_may_have_a_seed_of_its_own(pytestconfig):
    ours = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    parser = pytest.Parser(_ispytest=True)
    parser.addoption("--seed")
    ours.pytest_addoption(parser)
    assert parser.parse(["--all", "--seed", "x"]).seed == "x"


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


@pytest.mark.slow
def test_a_stub_is_not_written_yet_and_says_it_once(tmp_path):
    run("e04", "--to", tmp_path)
    code, said = grade("tests/exercises", "-k", "e04", "--impl", tmp_path)
    report = said.partition("short test summary")[0]  # it repeats all where CI is set
    assert code == 1 and report.count("not written yet: e04") == 1, said
    assert "1 failed, 9 skipped" in said, said
    assert "the project's own functions" not in said, said


@pytest.mark.slow
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


@pytest.mark.slow
def test_pytest_grades_a_folder_and_says_which_mistake_it_is(tmp_path):
    run("e04", "--to", tmp_path)
    write(tmp_path / "extra.py", "    place = torch.arange(ids.size(1))\n"
          "    return place >= lengths[:, None]\n")  # fmt: skip
    code, said = grade("tests/exercises", "-k", "e04", "--impl", tmp_path)
    assert code == 1, said
    assert "\ntokens behind the end count in yours\n" in said, said
    assert "hint: python tests/exercises/make.py e04 --hint 1" in said, said
    assert "def test_" not in said, "a traceback of the grader"


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
        changed_texts(ex.wire)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [ex.id for ex in kit.exercises().values() if ex.wire or ex.id == "e05"]
)
def test_the_job_trains_with_the_function_of_an_exercise(name, tiny_job):
    ex, called = kit.exercise(name), []
    m = work_of(ex, ex.rights[0][1]).modules([ex], ex.wire)

    def watch(module, function):
        own = getattr(module, function)
        wrapped = functools.wraps(own)(lambda *a, **k: called.append(1) or own(*a, **k))
        setattr(module, function, wrapped)

    for function in ex.functions:
        file, function = function.split()
        watch(getattr(m, file.removesuffix(".py")), function)
    assert train_with(m, tiny_job, name) == 0, "it does not"
    assert called, "another function stands in its place"


@pytest.mark.slow
def test_a_run_stands_beside_the_projects_own(tiny_job, capsys):
    folder = Path("mine")
    folder.mkdir()
    (folder / "sft.py").write_text(kit.exercise("e05").rights[0][1], encoding="utf-8")
    make_run = importlib.import_module("run")
    for _ in range(2):  # the second time the project's own run is there
        code = make_run.main([str(folder), "--method", "sft", *tiny_job[2:]])
        said = capsys.readouterr().out
        assert code == 0 and "e05: your sft.py compute_loss" in said, said
        table = said.partition("side by side:")[2]
        assert "/project/sft" in table and "/mine-" in table, said
