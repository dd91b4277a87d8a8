"""The five files stay small enough to be read: whoever adds must take away.

The limits are today's sizes. Lower one when something goes; a fault that loses or
misreads what is a user's may raise one, and the commit says so.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
from mutants import MUTANTS  # noqa: E402

LINES = {"model": 834, "sft": 201, "sdft": 240, "data": 1016, "train": 1283}
LONGEST = {"sft": 70, "sdft": 74}  # lines of a function, where not 60: the whole loop


def parse(name):
    """A file's text and its tree."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    return source, ast.parse(source)


@pytest.mark.parametrize("name", LINES)
def test_a_file_does_not_grow(name):
    source, tree = parse(name)
    assert len(source.splitlines()) <= LINES[name]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        assert function.end_lineno - function.lineno < LONGEST.get(name, 60), function


def places(name):
    """The lines of a file that hold code, a comment, a docstring: three sets."""
    source, tree = parse(name)
    code, comments, docs = set(), set(), set()
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.string.strip():
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - docs, comments, docs


def test_the_files_are_not_made_short_by_cutting_what_explains():
    found = zip(*map(places, LINES), strict=True)
    code, comments, docs = (sum(map(len, each)) for each in found)
    lines = sum(len(parse(name)[0].splitlines()) for name in LINES)
    assert comments / code >= 0.20 and docs / lines >= 0.15


@pytest.mark.parametrize("name", LINES)
def test_one_statement_stands_on_a_line(name):
    starts = [
        node.lineno for node in ast.walk(parse(name)[1]) if isinstance(node, ast.stmt)
    ]
    assert len(starts) == len(set(starts))


def test_every_mutant_still_applies():
    """tests/bench/mutants.py changes lines of the five files: each is there once."""
    for name, mutants in MUTANTS.items():
        for old, new in mutants:
            assert parse(name)[0].count(old) == 1 and old != new, (name, old)
            ast.parse(parse(name)[0].replace(old, new))
    assert sum(map(len, MUTANTS.values())) >= 60
