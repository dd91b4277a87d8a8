"""The README and the notebook say what the files and the results say."""

import functools
import re
import shlex
import sys
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "tests" / "bench"
sys.path.insert(0, str(BENCH))

import paper  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = (BENCH / "README.md").read_text(encoding="utf-8")
FILES = ("model", "sft", "sdft", "data", "train")
TOK = data.Tokenizer()


def rows_of(text):
    """The rows of all tables of a text, as lists of cells without stars."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[c.replace("*", "").strip() for c in line.split("|")] for line in lines]


def commands(text):
    """The arguments of each `python train.py` in blocks of code and in `code`."""
    found = re.findall(r"(?:python|nproc_per_node=2) train\.py([^`\n#|]*)", text)
    return [shlex.split(each) for each in found]


def test_line_counts_are_right_and_the_readme_is_short_and_wrapped():
    for name in FILES:
        (said,) = re.findall(rf"`{name}\.py` \((\d+)(?: lines)?\)", README)
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert int(said) == len(source.splitlines()), name
    assert len(README.split()) <= 1400
    for text in (README, NOTEBOOK):
        for line in re.sub(r"(?ms)^```.*?^```", "", text).splitlines():
            assert len(line) <= 100 or line.startswith("|") or "](" in line, line


def test_a_row_of_a_table_has_as_many_cells_as_its_rule():
    """Otherwise GitHub shows raw text: "||" in a cell, say, makes two cells of it."""
    found = 0
    for path in (ROOT / "README.md", *(ROOT / "tests").glob("*/*.md")):
        text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
        for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
            rows = table.splitlines()
            assert re.fullmatch(r"\|(-+\|)+", rows[1]), (path.name, rows[1])
            assert len({row.count("|") for row in rows}) == 1, (path.name, table)
            found += 1
    assert found > 30


def test_names_links_and_commands_of_the_readme_exist():
    sources = {name: (ROOT / f"{name}.py").read_text() for name in FILES}
    everything = "\n".join(sources.values())
    for name in re.findall(r"\(`(\w+)`\)", README):
        assert f"def {name}(" in everything, name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    assert len(commands(README)) >= 8
    for argv in commands(README + (BENCH / "own.md").read_text(encoding="utf-8")):
        if argv != ["--help"]:
            train.parse_args(argv)


def test_the_readme_s_method_is_the_exercise_s_and_its_contexts_the_world_s():
    """sdft_step of tests/exercises/extra.py, without its docstring; of seed 0."""
    source = (ROOT / "tests" / "exercises" / "extra.py").read_text(encoding="utf-8")
    step = source[source.index("def sdft_step(") :].split("\n\n\n")[0]
    step = re.sub(r'\n    """.*?"""', "", step, flags=re.DOTALL)
    assert f"```python\n{step}\n```" in README and step.count("\n") <= 24
    demos = data.make_demos(data.World(0), "C", 12, seed=0)
    (example,) = [e for e in demos if e.prompt == "garden cork: paper door pepper"]
    names, block = {TOK.start: "<start>", TOK.end: "<end>"}, " ".join(README.split())
    parts = {"right response": TOK.encode(example.answer) + [TOK.end]}
    for name in "student_prompt", "teacher_prompt", "demo_response":
        parts[name] = getattr(data, name)(example, TOK)
    for name, ids in parts.items():
        words = " ".join(names.get(i) or TOK.decode([i]) for i in ids)
        assert f"{name} {words} {len(ids)} tokens" in block


def results_of(name):
    """{label: runs} of an experiment, of the rows of which all seeds were run."""
    seeds = paper.EXPERIMENTS[name]["seeds"]
    specs = paper.specs_of(name, seeds, False)
    cells = paper.finished(name, specs, BENCH / "results", ROOT / "no such folder")
    return paper.complete_rows(name, cells, seeds)


@pytest.mark.parametrize("label, title", [
    ("sdft", "SDFT (`python train.py`)"),
    ("sft", "SFT (`python train.py --method sft`)"),
])  # fmt: skip
def test_every_cell_of_the_result_table_is_that_of_the_results(label, title):
    cells = results_of("default")[label]
    last = [list(cell["stages"][-1]["new"].values()) for cell in cells]
    lost = sum(skill < 0.95 for skills in last for skill in skills)
    new, prior, kl = (
        paper.spread([paper.summary(cell)[key] for cell in cells])
        for key in ("new", "prior / base", "KL(student || base)")
    )
    new, prior = (re.sub(r"\b0\.", ".", x) for x in (new, prior))  # 1.00, .99
    right = [new, f"{lost} of {3 * len(cells)}", prior, kl.split()[0]]
    (row,) = [row for row in rows_of(README) if row[0] == title]
    assert len(cells) >= 5 and row[1:] == [str(len(cells)), *right]


@pytest.mark.parametrize("name", ["default", "earlier"])
def test_every_row_of_the_notebook_is_that_of_the_results(name):
    complete = results_of(name)
    assert len(complete) == len(paper.EXPERIMENTS[name]["rows"])
    rows = [row for row in rows_of(NOTEBOOK) if len(row) == 9]
    rows = {row[0].removesuffix(" (default)"): row[1:] for row in rows}
    for label, runs in complete.items():
        if label.endswith("curve"):  # the same runs, with evaluations on the way
            continue
        summaries = [paper.summary(run) for run in runs]
        said = [paper.spread([s[key] for s in summaries]) for key in summaries[0]]
        assert rows[label] == [str(len(runs)), *said], label


def test_the_paper_in_miniature_has_the_means_of_the_results():
    known, main = functools.cache(results_of), ("sdft 9e-5", "sft 6e-4")

    def each(name, label, title):
        return mean(map(paper.READ[title], known(name)[label]))

    def both(name, labels, *titles):
        rows = [[each(name, label, title) for title in titles] for label in labels]
        rows = ["/".join(f"{x:.2f}".removeprefix("0") for x in row) for row in rows]
        return "; ".join(rows)

    flops = [mean(run["work"]["flops"] / run["config"]["steps"]
                  for run in known("cost")[label]) for label in main]  # fmt: skip
    slow = [each("estimators", x, "updates to .9") for x in ("reverse", "sampled")]
    bases = "large, 300", "large, 400", "large"
    gains = [each("size", f"sdft {base}", "new") - each("size", f"sft {base}", "new")
             for base in bases]  # fmt: skip
    gains = [f"{x:.2f}".replace("-", "−").replace("0.", ".") for x in gains]
    gate = both("size", [f"sdft {base}" for base in bases], "gate at the start")
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
        f"{'; '.join(gains)} (gate {gate})",
        both("teacher", ("ema .001", "frozen", "live"), "new"),
        both("answers-only", ("sdft 9e-5, answers", "sft 6e-4, answers"),
             "new", "thinks"),
        "; ".join(f"{updates:.0f}" for updates in slow) + " updates to .9",
        both("knowledge", ("sdft answer + text 1e-4", "sft 3e-4"), "strict", "OOD"),
    ]  # fmt: skip


def test_the_tables_of_the_experiments_are_those_of_the_results():
    """As `paper.py NAME --draw` prints them, and what would count as not reproducing,
    as it was written before."""
    names, shown = set(paper.EXPERIMENTS) - {"default", "earlier"}, set()
    for name in names:
        experiment, rows = paper.EXPERIMENTS[name], results_of(name)
        if not rows:
            continue
        heading = re.search(rf"^#+ .*\(`{name}`", NOTEBOOK, re.M)
        assert heading, f"{name}: the notebook has no section"
        section = NOTEBOOK[heading.start() :]
        section = section[: section.index("\n##")]
        said = " ".join(f"*Fails if* {experiment['fails if']}".split())
        assert said in " ".join(section.split()), f"{name}: not there: {said}"
        table = paper.table(rows, experiment["columns"])
        assert f"\n{table}\n\n" in section, f"{name}: other rows than the results"
        shown.add(name)
    files = {path.stem for path in (BENCH / "results").glob("*.json")}
    assert shown >= names & files and shown, "results that no table shows"
