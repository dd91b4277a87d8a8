"""pytest tests/exercises -k e05 --impl mine: grade a folder, the project by default.
(tests/conftest.py adds --impl and --seed: start pytest in the project's folder.)"""

import re
from pathlib import Path

import kit
import pytest
from variants import HERE, KitError, Modules

IDS = pytest.StashKey()  # of the exercises whose graders run
NOTES = pytest.StashKey()  # what grade.py would tell the teacher
EMPTY = pytest.StashKey()  # of those that are not written, and one test has said it


def exercise_of(module):
    """The exercise that a test file grades, by the file's name; None for other files"""
    name = re.fullmatch(r"test_(e\d\d)_\w+", module.__name__)
    return kit.exercises().get(name[1]) if name else None


def pytest_terminal_summary(terminalreporter, config):
    """Who forgets --impl grades the project, and everything passes."""
    asked = config.option.keyword or any(
        Path(str(arg).split("::")[0]).resolve().is_relative_to(HERE)
        for arg in config.invocation_params.args if not str(arg).startswith("-")
    )  # fmt: skip
    if asked and config.stash.get(IDS, None) and not config.getoption("--impl", None):
        terminalreporter.write_line(
            "graded the project's own functions; --impl mine grades yours"
        )
    for note in config.stash.get(NOTES, ()):
        terminalreporter.write_line(note)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    """With --impl, only the exercises that the folder holds are graded."""
    folder = config.getoption("--impl", None)
    found = [exercise_of(item.module) for item in items]
    found = list(dict.fromkeys(ex.id for ex in found if ex is not None))
    config.stash[IDS] = found
    if folder is None:
        return
    try:
        all_of_them = len(found) == len(kit.exercises())
        work = kit.Work.of_folder(folder, "e05" if all_of_them else " ".join(found))
    except KitError as error:
        raise pytest.UsageError(f"{error}\nhint: {error.hint}") from None
    graded, left_out, asked, notes = [], [], {}, {}
    for item in items:
        ex = exercise_of(item.module)
        if ex is not None and ex.id not in asked:
            try:
                asked[ex.id] = work.state(ex)
            except KitError as error:
                asked[ex.id] = "no Python"
                notes[ex.id] = f"{error}\nhint: {error.hint}"
            if asked[ex.id] == "missing":
                notes[ex.id] = f"{ex.id}: {work.instead(ex)}"
            elif asked[ex.id] == "project":
                notes[ex.id] = f"{ex.id}: the project's own text, not touched"
            elif asked[ex.id] == "written" and work.fingerprint(ex) == "project":
                notes[ex.id] = f"{ex.id}: grade.py will say: the project's own solution"
        begun = ex is not None and asked[ex.id] in ("stub", "written")
        (graded if begun else left_out).append(item)
    if asked and not graded:
        said = "\n".join(dict.fromkeys(notes.values()))
        hint = f"hint: python tests/exercises/make.py {' '.join(asked)} --to {folder}"
        raise pytest.UsageError(
            f"nothing to grade in {folder}:\n{said}"
            + f"\n{hint}" * ("hint" not in said)
        )
    told = [note for name, note in notes.items() if asked[name] != "missing"]
    config.stash[NOTES] = list(dict.fromkeys(told))
    config.hook.pytest_deselected(items=left_out)
    items[:] = graded


@pytest.fixture
def impl(request):
    """The modules under test: model, data, sft, sdft, train, extra as attributes."""
    folder = request.config.getoption("--impl", None)
    if folder is None:
        return project()
    ex = exercise_of(request.module)
    work = kit.Work.of_folder(folder)
    if {"stub", "missing"}.issuperset(work.states(ex)):  # one test says so
        if ex.id in request.config.stash.setdefault(EMPTY, set()):
            pytest.skip("not written yet")
        request.config.stash[EMPTY].add(ex.id)
    return work.modules(ex)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("job")


@pytest.fixture
def tiny_job(workplace, monkeypatch, as_in_a_process_of_its_own):
    """In a folder where one tiny base model serves all jobs: the flags of one."""
    monkeypatch.chdir(workplace)
    return (
        "--method both --threads 1 --n-layer 1 --n-embd 16 --base-steps 4 --steps 2 "
        "--batch-size 8 --demos 64 --eval-size 8 --max-new-tokens 4 --gate-margin -1"
    ).split()


loaded = []


def project():
    loaded[:] = loaded or [Modules()]
    return loaded[0]


@pytest.fixture
def seed(request):
    return int(request.config.getoption("--seed", 0) or 0)


@pytest.fixture
def rng(request, seed):
    return project().data.make_rng(seed, request.function.__name__)


@pytest.fixture(autouse=True)
def default_dtype(request):
    with kit.default_dtype(request.module):
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failing grader says which mistake it is, and where to get a hint; no more."""
    report = (yield).get_result()
    ex = exercise_of(item.module)
    if ex is not None and report.failed and not item.config.option.fulltrace:
        report.longrepr = f"{kit.explain(call.excinfo.value, ex)}\n{ex.hint_line}"
