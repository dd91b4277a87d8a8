"""The README and the notebook say what the files and the results say."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from statistics import mean

import pytest

import data
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCH = ROOT / "tests" / "bench"
NOTEBOOK = (BENCH / "README.md").read_text(encoding="utf-8")
FILES = ("model", "sft", "sdft", "data", "train")
TOK = data.Tokenizer()


def rows_of(text):
    """The rows of all tables of a text, as lists of cells without stars."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[c.replace("*", "").strip() for c in line.split("|")] for line in lines]


def prose(text):
    """The lines that are neither of a table nor of a block of code, nor a picture."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    return [line for line in text.splitlines() if not line.startswith(("|", "!["))]


# ---- Lengths -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_the_line_count_of_a_file_is_right(name):
    (said,) = re.findall(rf"`{name}\.py` \((\d+)(?: lines)?\)", README)
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert int(said) == len(source.splitlines())


def test_the_readme_is_short_and_its_lines_are_wrapped():
    assert len(README.split()) <= 1400
    for text in (README, NOTEBOOK):
        long = [line for line in prose(text) if len(line) > 100 and "](" not in line]
        assert long == []


def test_a_row_of_a_table_has_as_many_cells_as_its_rule():
    """Otherwise GitHub shows raw text: "||" in a cell, say, makes two cells of it."""
    found = 0
    for path in (ROOT / "README.md", *(ROOT / "tests").glob("*/*.md")):
        text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
        for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
            head, rule, *rows = table.splitlines()
            assert re.fullmatch(r"\|(-+\|)+", rule), (path.name, rule)
            for row in (head, *rows):
                assert row.count("|") == rule.count("|"), (path.name, row)
            found += 1
    assert found > 30


def test_what_the_readme_calls_by_name_exists():
    sources = {name: (ROOT / f"{name}.py").read_text() for name in FILES}
    everything = "\n".join(sources.values())
    for text in (README, everything):  # all of it is on the path
        assert "reading may stop" not in text and "as far as" not in text
    for name in re.findall(r"\(`(\w+)`\)", README):
        assert f"def {name}(" in everything, name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


# ---- Commands and contexts ---------------------------------------------------------


def commands(text):
    """The arguments of each `python train.py` in blocks of code and in `code`."""
    found = re.findall(r"(?:python|nproc_per_node=2) train\.py([^`\n#|]*)", text)
    return [shlex.split(each) for each in found]


def test_every_command_of_the_readme_is_one_that_train_py_takes():
    assert len(commands(README)) >= 8
    for argv in commands(README + (BENCH / "own.md").read_text(encoding="utf-8")):
        if argv != ["--help"]:
            train.parse_args(argv)


def test_the_method_of_the_readme_is_that_of_the_exercise():
    """sdft_step of tests/exercises/extra.py, without its docstring."""
    source = (ROOT / "tests" / "exercises" / "extra.py").read_text(encoding="utf-8")
    step = source[source.index("def sdft_step(") :].split("\n\n\n")[0]
    step = re.sub(r'\n    """.*?"""', "", step, flags=re.DOTALL)
    assert f"```python\n{step}\n```" in README and step.count("\n") <= 24


def shown(ids):
    names = {TOK.start: "<start>", TOK.end: "<end>"}
    return " ".join(names.get(i) or TOK.decode([i]) for i in ids)


def test_the_contexts_of_the_readme_are_those_of_the_world_of_seed_0():
    demos = data.make_demos(data.World(0), "C", 12, seed=0)
    (example,) = [e for e in demos if e.prompt == "garden cork: paper door pepper"]
    block = " ".join(README.split())
    right = TOK.encode(example.answer) + [TOK.end]
    for name, ids in (
        ("student_prompt", data.student_prompt(example, TOK)),
        ("teacher_prompt", data.teacher_prompt(example, TOK)),
        ("demo_response", data.demo_response(example, TOK)),
        ("right response", right),
    ):
        assert f"{name} {shown(ids)} {len(ids)} tokens" in block


# ---- Results -----------------------------------------------------------------------


def number(x):
    """1.00, .99: as the tables write an accuracy."""
    return f"{x:.2f}".replace("0.", ".", 1) if x < 0.995 else "1.00"


def spread(values, decimals=number):
    low, high = decimals(min(values)), decimals(max(values))
    return f"{decimals(mean(values))} ({low} to {high})"


def runs(name, label):
    cells = json.loads((BENCH / "results" / f"{name}.json").read_text())["cells"]
    return [cell for cell in cells.values() if cell["label"] == label]


def columns(cells):
    """The columns of the README's table, of the runs of one row."""
    last = [cell["stages"][-1] for cell in cells]
    new = [list(stage["new"].values()) for stage in last]
    pairs = [(s["prior"].values(), c["base"]["prior"].values())
             for s, c in zip(last, cells, strict=True)]  # fmt: skip
    lost = sum(skill < 0.95 for skills in new for skill in skills)
    return [
        spread([mean(skills) for skills in new]),
        f"{lost} of {3 * len(new)}",
        spread([mean(kept) / mean(had) for kept, had in pairs]),
        f"{mean(stage['kl_student_base'] for stage in last):.2f}",
    ]


@pytest.mark.parametrize("label, title", [
    ("sdft", "SDFT (`python train.py`)"),
    ("sft", "SFT (`python train.py --method sft`)"),
])  # fmt: skip
def test_every_cell_of_the_result_table_is_that_of_the_results(label, title):
    cells = runs("default", label)
    assert len(cells) >= 5
    (row,) = [row for row in rows_of(README) if row[0] == title]
    assert row[1:] == [str(len(cells)), *columns(cells)]


@pytest.fixture(scope="module")
def paper():
    """tests/bench/paper.py as a module."""
    spec = importlib.util.spec_from_file_location("paper", BENCH / "paper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["default", "earlier"])
def test_every_row_of_the_notebook_is_that_of_the_results(name, paper):
    seeds = paper.EXPERIMENTS[name]["seeds"]
    specs = paper.specs_of(name, seeds, False)
    cells = paper.finished(name, specs, BENCH / "results", ROOT / "no such folder")
    complete = paper.complete_rows(name, cells, seeds)
    assert len(complete) == len(paper.EXPERIMENTS[name]["rows"])
    rows = [row for row in rows_of(NOTEBOOK) if len(row) == 9]
    rows = {row[0].removesuffix(" (default)"): row[1:] for row in rows}
    for label, runs_of in complete.items():
        if label.endswith("curve"):  # the same runs, with evaluations on the way
            continue
        summaries = [paper.summary(run) for run in runs_of]
        said = [paper.spread([s[key] for s in summaries]) for key in summaries[0]]
        assert rows[label] == [str(len(runs_of)), *said], label


def test_the_paper_in_miniature_has_the_means_of_the_results(paper):
    """The notebook's table of experiments."""
    known, three = {}, ("answers-only", "estimators", "size")
    five = ("skills", "forgetting", "passk", "distance-kl", "cost", "onpolicy",
            "teacher", "knowledge")  # fmt: skip
    sizes = dict.fromkeys(five, 5) | dict.fromkeys(three, 3)
    for name, n in sizes.items():
        seeds = range(200, 200 + n)
        specs = paper.specs_of(name, seeds, False)
        cells = paper.finished(name, specs, BENCH / "results", ROOT / "no such folder")
        known[name] = paper.complete_rows(name, cells, seeds)
    main = ("sdft 9e-5", "sft 6e-4")

    def find(name, label, *titles):
        reads = [paper.READ[title] for title in titles]
        found = [mean(map(read, known[name][label])) for read in reads]
        return "/".join(f"{x:.2f}".removeprefix("0") for x in found)

    def both(name, labels, *titles):
        return "; ".join(find(name, label, *titles) for label in labels)

    flops = [mean(run["work"]["flops"] / run["config"]["steps"]
                  for run in known["cost"][label]) for label in main]  # fmt: skip
    slow = [mean(map(paper.READ["updates to .9"], known["estimators"][label]))
            for label in ("reverse", "sampled")]  # fmt: skip
    bases = "large, 300", "large, 400", "large"
    new = [[mean(map(paper.READ["new"], known["size"][f"{method} {base}"]))
            for base in bases] for method in ("sdft", "sft")]  # fmt: skip
    gains = [f"{x - y:.2f}".replace("-", "−").replace("0.", ".")
             for x, y in zip(*new, strict=True)]  # fmt: skip
    of_sdft = [f"sdft {base}" for base in bases]
    table = NOTEBOOK[NOTEBOOK.index("## The paper in miniature") + 1 :]
    rows = [row[3] for row in rows_of(table[: table.index("\n## ")])[2:]]
    assert rows == [
        both("skills", main, "new", "prior"),
        both("skills", ("reinvoke 6e-4", "dft 6e-4"), "new", "prior"),
        both("forgetting", main, "first skill"),
        both("passk", (*main, "base"), "pass@1"),
        both("distance-kl", main, "KL(student || base)"),
        f"{flops[0] / flops[1]:.2f}",
        both("onpolicy", ("sdft 9e-5", "offpolicy 9e-5", "imitate 9e-5"), "new"),
        "; ".join(gains)
        + f" (gate {both('size', of_sdft, 'gate at the start')})",
        both("teacher", ("ema .001", "frozen", "live"), "new"),
        both("answers-only", ("sdft 9e-5, answers", "sft 6e-4, answers"),
             "new", "thinks"),
        "; ".join(f"{updates:.0f}" for updates in slow) + " updates to .9",
        both("knowledge", ("sdft answer + text 1e-4", "sft 3e-4"), "strict", "OOD"),
    ]  # fmt: skip


def test_the_tables_of_the_experiments_are_those_of_the_results(paper):
    """As `paper.py NAME --draw` prints them: all rows of which all seeds were run; and
    what would count as not reproducing, as it was written before."""
    names, shown = set(paper.EXPERIMENTS) - {"default", "earlier"}, set()
    for name in names:
        experiment = paper.EXPERIMENTS[name]
        cells = paper.finished(
            name, paper.specs_of(name, experiment["seeds"], False),
            BENCH / "results", ROOT / "no such folder",
        )  # fmt: skip
        rows = paper.complete_rows(name, cells, experiment["seeds"])
        if not rows:
            continue
        heading = re.search(rf"^#+ .*\(`{name}`", NOTEBOOK, re.M)
        assert heading, f"{name}: the notebook has no section"
        section = NOTEBOOK[heading.start() :]
        section = section[: section.index("\n##")]
        said = " ".join(f"*Fails if* {experiment['fails if']}".split())
        assert said in " ".join(section.split()), f"{name}: not there: {said}"
        lines = paper.table(rows, experiment["columns"]).split("\n")
        assert lines[0] in section, f"{name}: no table with {lines[0]}"
        found = section[section.index(lines[0]) :].split("\n\n")[0]
        assert found.split("\n") == lines, f"{name}: other rows than the results"
        shown.add(name)
    files = {path.stem for path in (BENCH / "results").glob("*.json")}
    assert shown >= names & files and shown, "results that no table shows"
