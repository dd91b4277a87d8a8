"""The exercises themselves: stubs, references, mutants, messages, sheets."""

import ast
import functools
from contextlib import closing

import kit
import make
import pytest
from variants import FILES, HERE, Modules, change, source

IDS = list(kit.exercises())
each = pytest.mark.parametrize("name", IDS)


def changed(kind):
    """(exercise, name, changes, ...) of all mutants or all other right solutions."""
    exs = kit.exercises().values()
    found = [(ex, *case) for ex in exs for case in getattr(ex, kind)]
    ids = [f"{case[0].id}: {case[1]}" for case in found]
    return pytest.mark.parametrize("case", found, ids=ids)


@functools.cache
def reference():
    return Modules()


def work_of(ex, changes):
    """A mutant or a right solution as a student's work. changes: see kit.Exercise."""
    if isinstance(changes, str):
        changes = {ex.files[0]: changes}
    if isinstance(changes, dict):
        return kit.Work({f: (f"<{f} of {ex.id}>", text) for f, text in changes.items()})
    texts = {file: source(file) for file in ex.files}
    for old, new in changes:
        places = [
            (file, name) for file in ex.files for name in ex.names_in(file)
            if old in kit.function_source(texts[file], name)
        ]  # fmt: skip
        if len(places) != 1:
            where = ", ".join(ex.functions)
            raise ValueError(f"{ex.id}: in {len(places)} of {where}, not one:\n{old}")
        ((file, name),) = places
        part = kit.function_source(texts[file], name)
        new = change(part, old, new, f"{ex.id}: {name}")
        texts[file] = kit.replace_function(texts[file], name, new)
    return kit.Work({f: (f"<{f} of {ex.id}>", text) for f, text in texts.items()})


def messages(ex, modules, seed=0):
    """What the failing tests of a grader say, one after the other."""
    for _, error in kit.results(ex, modules, seed):
        if error is not None:
            yield " ".join(kit.explain(error, ex).split())


@each
@pytest.mark.slow
def test_the_reference_passes_at_other_seeds_too(name, seed):
    """Two for each run; --seed N tries others here and below."""
    ex = kit.exercise(name)
    for other in (seed + 1, seed + 2):
        assert not list(messages(ex, reference(), other)), f"--seed {other}"


@each
@pytest.mark.slow
def test_a_stub_fails_with_not_implemented_error_and_nothing_else(name, tmp_path):
    ex = kit.exercise(name)
    assert make.main([name, "--to", str(tmp_path)]) == 0, "make.py refuses"
    work = kit.Work.of_folder(tmp_path)
    assert work.state(ex) == "stub", "make.py leaves no stub"
    with closing(work.modules(ex)) as modules:
        for test, error in kit.results(ex, modules):
            what = f"{test} ends with {error!r}"
            assert isinstance(error, NotImplementedError), what
            assert str(error).startswith(f"{name}: "), what


@each
@pytest.mark.slow
def test_a_stub_has_signature_and_docstring_and_hands_out_nothing_else(name, tmp_path):
    ex = kit.exercise(name)
    make.main([name, "--to", str(tmp_path)])
    for file in ex.files:
        own = make.bare_file(file, [ex])
        text = (tmp_path / file).read_text(encoding="utf-8")
        tree, before = ast.parse(text), kit.parse(source(file))
        for function in ex.names_in(file):
            node, old = kit.find(tree, function), kit.find(before, function)
            assert ast.get_docstring(node) == ast.get_docstring(old), "docstring"
            assert ast.dump(node.args) == ast.dump(old.args), "signature"
        missing = set(own.splitlines()) - set(text.splitlines())
        assert not missing, f"lines above the function are gone: {missing}"
        made = {n for node in tree.body for n in kit.bound_names(node)
                if isinstance(node, ast.FunctionDef)}  # fmt: skip
        asked = {n for x in kit.exercises().values() for n in x.names_in(file)}
        others = made & asked - set(ex.names_in(file))
        assert not others, f"it hands out what others ask for: {others}"


@changed("mutants")
@pytest.mark.slow
def test_a_wrong_solution_is_rejected_with_the_message_that_names_it(case):
    ex, name, changes, expected = case
    found = []
    with closing(work_of(ex, changes).modules(ex)) as modules:
        for text in messages(ex, modules):
            if expected in text:
                return
            found.append(text)
    assert found, f"{ex.id}: {name} passes"
    raise AssertionError(f"{expected!r} is not in {found}")


@changed("rights")
@pytest.mark.slow
def test_another_right_solution_passes(case, seed):
    ex, name, text = case
    with closing(work_of(ex, text).modules(ex)) as modules:
        found = list(messages(ex, modules, seed))
    assert not found, f"{ex.id}: {name}, --seed {seed}: {found}"


@each
def test_an_exercise_has_all_its_parts(name):
    ex = kit.exercise(name)
    assert ex.id == name, "another id than its file"
    assert len(ex.hints) == 3 and all(h.strip() for h in ex.hints), "three hints"
    assert len(ex.rights) >= 2 or not ex.mutants, "two other right solutions"
    assert 1 <= ex.difficulty <= 5, "difficulty from 1 to 5"
    assert "look at" in ex.sheet, "the sheet says what to look at when it runs"
    names = [case[0] for case in ex.mutants]
    assert len(set(names)) == len(names), "two mutants have one name"
    for text in (ex.sheet, *ex.hints):
        long = [line for line in text.splitlines() if len(line) > 88]
        assert not long, f"lines of more than 88 characters: {long}"


@each
def test_its_functions_are_where_it_says(name):
    """Moved or renamed, an exercise fails here at once."""
    for function in kit.exercise(name).functions:
        file, dotted = function.split()
        assert file in FILES, f"{file} is none of the project's"
        assert kit.find(kit.parse(source(file)), dotted), f"{file} has no {dotted}"


@pytest.mark.parametrize("path", sorted(HERE.glob("test_e*.py")), ids=lambda p: p.stem)
def test_no_assert_is_without_a_message(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert) and not n.msg]
    assert not bare, f"{path.name}: lines {bare}"
    tests = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    asked = {a.arg for n in tests if n.name.startswith("test_") for a in n.args.args}
    assert asked <= {"impl", "rng", "seed", "tmp_path"}, f"unknown fixtures in {asked}"
