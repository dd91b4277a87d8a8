"""sdft.ipynb: it is its source, its outputs are those of this code, and it runs."""

import ast
import json
import os
import re
import subprocess
import sys

import build_notebook
import pytest

import data

BUILD = "python tests/exercises/build_notebook.py"
MAY_IMPORT = {"torch", "numpy", "tiktoken", "tqdm", "pytest", "matplotlib", "IPython"}
MAY_IMPORT |= {name.removesuffix(".py") for name in build_notebook.FILES}


@pytest.fixture(scope="module")
def saved():
    return json.loads(build_notebook.NOTEBOOK.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def code(saved):
    """The code cells."""
    return [cell for cell in saved["cells"] if cell["cell_type"] == "code"]


def printed(cells):
    """What code cells print, as one text."""
    outputs = [each for cell in cells for each in cell["outputs"]]
    texts = [each["text"] for each in outputs if each["output_type"] == "stream"]
    return "".join(line for text in texts for line in text)


def digest_now(code):
    return build_notebook.digest(["".join(cell["source"]) for cell in code])


def test_the_notebook_is_its_source(saved):
    cells = [(c["cell_type"], "".join(c["source"])) for c in saved["cells"]]
    assert cells == build_notebook.cells(), f"run `{BUILD}`"


def test_its_outputs_are_those_of_this_code(code, saved):
    assert saved["metadata"]["outputs_show"] == digest_now(code), (
        "the outputs are older than the code that they show, or missing: "
        f"run `{BUILD} --run`"
    )
    pictures = [each for cell in code for each in cell["outputs"] if "data" in each]
    assert len(printed(code)) > 3000 and len(pictures) >= 5


def test_it_is_small(code, saved):
    lines = [line for cell in code for line in cell["source"]]
    assert len(saved["cells"]) <= 25 and len(lines) <= 300
    assert build_notebook.NOTEBOOK.stat().st_size < 400_000


def test_it_is_a_notebook_that_jupyter_reads(saved):
    """The rules of nbformat 4.5 that this one could break."""
    assert (saved["nbformat"], saved["nbformat_minor"]) == (4, 5)
    assert saved.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in saved["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", each) for each in ids)
    for cell in saved["cells"]:
        more = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | more
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        for each in cell.get("outputs", []):
            stream = {"output_type", "name", "text"}
            image = {"output_type", "data", "metadata"}
            assert each.keys() in (stream, image)


def test_it_imports_nothing_that_the_project_does_not_need(code):
    for cell in code:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            names = [each.name for each in getattr(node, "names", [])
                     if isinstance(node, ast.Import)]  # fmt: skip
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                first = name.split(".")[0]
                assert first in MAY_IMPORT | sys.stdlib_module_names, name


def test_a_comment_does_not_make_the_outputs_old_and_a_number_does():
    text = 'def f(x):\n    """Doc."""\n    return f"{x} {{}}"  # why\n'
    same = 'def f( x ):\n\n    """Other."""\n    # more\n    return f"{x} {{}}"\n'
    assert build_notebook.code_of(text) == build_notebook.code_of(same)
    for old, new in (("f(x)", "f(x=1)"), ("{x} ", "{x}! ")):
        other = text.replace(old, new)
        assert build_notebook.code_of(text) != build_notebook.code_of(other)


# ---- What the text says of the outputs -----------------------------------------------


@pytest.fixture(scope="module")
def text(code, saved):
    """What all cells print."""
    if saved["metadata"]["outputs_show"] != digest_now(code):
        pytest.skip("the outputs are not those of this code")  # another test says so
    return printed(code)


@pytest.fixture(scope="module")
def reports(text):
    """Each call of `report` as a dict: run -> numbers, by the title of the column."""
    titles = ("updates", "first", "last", "new", "prior", "gate")
    found = []
    for line in text.splitlines():
        if "first loss" in line:
            found.append({})
        elif found and (match := re.match(r"(\S+(?: \S+)*)  +(\d+ .*)", line)):
            numbers = match[2].replace("no teacher", "nan").split()
            if len(numbers) == len(titles):
                pairs = zip(titles, map(float, numbers), strict=True)
                found[-1][match[1]] = dict(pairs)
    return found


def test_both_learn_and_only_sft_forgets(reports):
    sft, sdft = reports[0]["SFT"], reports[0]["SDFT"]
    assert min(sft["new"], sdft["new"]) >= 0.95
    assert sdft["prior"] >= 0.95 and sft["prior"] <= 0.75


def test_without_the_average_hardly_anything_is_left(reports):
    average, none = reports[1]["average"], reports[1]["no average"]
    assert min(average["new"], average["prior"]) >= 0.9
    assert max(none["new"], none["prior"], none["gate"]) <= 0.3
    assert none["last"] < none["first"] / 4


def test_the_other_direction_learns_and_its_loss_begins_higher(reports):
    forward, reverse = reports[2]["SDFT"], reports[2]["kl reverse"]
    assert min(reverse["new"], reverse["prior"]) >= 0.95
    assert reverse["first"] > 1.5 * forward["first"]


def test_without_a_demonstration_there_is_nothing_to_learn(text, reports):
    (table,) = re.findall(r"(?m)^after   new.*\nbase +(\S+)", text)
    other = reports[3]["no demonstration"]
    assert other["first"] < 0.02 and abs(other["new"] - float(table)) <= 0.15
    assert other["prior"] >= 0.95


def test_the_step_by_hand_shows_what_the_text_says(text):
    column = re.findall(r"(?m)^    \S+ +(-?[\d.]+)   student ", text)
    first, *rest = map(float, column)
    assert first > 0.5 and max(rest) < 0.1 * first  # one token, the operation
    (line,) = re.findall(r"SFT: -log p.*\n +(.*)", text)
    words, numbers = line.split()[::2], map(float, line.split()[1::2])
    pulls = sorted(zip(numbers, words, strict=True))
    assert pulls[-2][0] > max(1, 10 * pulls[-3][0])  # two tokens
    (term,) = {pulls[-1][1], pulls[-2][1]} - {"well"}
    assert term in [term for term, _ in data.OPERATIONS.values()]
    before, after = re.findall(r"response: ([\d.]+) before the step, ([\d.]+)", text)[0]
    assert float(after) < float(before)
    bare, shown = re.findall(r"([\d.]+) without a demonstration, ([\d.]+)", text)[0]
    assert float(bare) <= 0.5 and float(shown) >= 0.9


# ---- It runs -------------------------------------------------------------------------


@pytest.mark.slow  # with --all: ten seconds
def test_it_runs_from_top_to_bottom(tmp_path):
    """In a process of its own, with a tiny model and two updates for each curve."""
    path = tmp_path / "quick.ipynb"
    command = [sys.executable, build_notebook.__file__, "--run", "--to", str(path)]
    env = {**os.environ, "SDFT_QUICK": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made["metadata"]["outputs_show"] == "a quick run"
    text = printed([cell for cell in made["cells"] if cell["cell_type"] == "code"])
    for words in ("teacher_prompt, 20 tokens", "teacher gate", "after the average",
                  "KL(student || base)", "no demonstration"):  # fmt: skip
        assert words in text
