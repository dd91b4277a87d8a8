"""The experiments of tests/bench: cells, measurements, tables, pictures; the articles
of knowledge.py; and what real.py holds out."""

import importlib
import itertools
import json
import math
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "exercises"), str(HERE / "bench")]

import cell  # noqa: E402
import finetune  # noqa: E402
import gpu  # noqa: E402
import knowledge  # noqa: E402
import oracles  # noqa: E402
import paper  # noqa: E402
import plot  # noqa: E402
import probes  # noqa: E402
import real  # noqa: E402
from experiments import EXPERIMENTS, updates_to  # noqa: E402
from paper import notes  # noqa: E402

import data  # noqa: E402
import sdft  # noqa: E402
import sft  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

TOK, BARE, SHOWN = data.Tokenizer(), data.student_prompt, data.teacher_prompt
KEYS = "run", "method", "variants", "arm", "flags"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if n != "earlier"])
def test_an_experiment_runs_to_its_table(name, tmp_path_factory, monkeypatch, capsys):
    work, kinds = tmp_path_factory.getbasetemp() / "paper", {}  # the same for all
    for row in EXPERIMENTS[name]["rows"]:  # the first of those that run the same code
        kinds.setdefault(str([row[2].get(key) for key in KEYS]), row)
    monkeypatch.setitem(EXPERIMENTS[name], "rows", rows := list(kinds.values()))
    monkeypatch.setattr(paper, "start", cell.run)  # in threads, which get no signals
    monkeypatch.setattr(cell.train, "Stop", type("", (), {"signal": 0, "restore": set}))
    args = [name, "--seeds", "1", "--quick", "--work", str(work), "--jobs", "1"]
    assert paper.main(args) == 0, capsys.readouterr()
    said, cells = capsys.readouterr().out, paper.load(work / f"results/{name}.json")
    assert f"{len(rows)} of {len(rows)} cells, 0 of them made by other code" in said
    assert name != "default" or said.count("base model: found in") == len(rows)
    stored = paper.load(paper.RESULTS / f"{name}.json").values()
    stored = {each["label"]: each for each in stored}
    for label, *_ in rows:
        assert f"| {label} | 1 |" in said, f"no row {label}: {said}"
        new, old = cells[f"{label} 1"], stored.get(label, {})
        if "stands in" not in {**new, **old}:
            assert old.keys() <= new.keys(), "it had more before"
            for i in (0, -1) if new.get("work", {}).get("written") else ():
                assert new["evaluations"][i]["kl_teacher_student_by_position"]
    monkeypatch.setattr(paper, "start", lambda _: pytest.fail("a cell ran again"))
    paper.main(args)
    pytest.importorskip("matplotlib")
    drawn = list((work / "results").glob(f"{name}*.png"))
    assert drawn or name == "default", "no picture"  # (which needs more evaluations)


def writer(folder, seed, quick, name, other=None):
    """A cell function that reads the result of the cell it needs."""
    read = json.loads((other / "result.json").read_text())["name"] if other else ""
    return {"name": name, "read": read, "length": math.pi}


@pytest.fixture
def small(monkeypatch):
    """Experiments of cells that need another one; which of them were started."""
    started, one = [], threading.Lock()

    def start(folder):
        spec = json.loads((folder / "spec.json").read_text())
        with one:  # Python's parser does not bear two threads
            started.append(f"{spec['name']} {spec['seed']}")
            cell.run(folder)

    monkeypatch.setattr(paper, "start", start)
    a, b, c = ({"run": "test_paper:writer", "name": name} for name in "abc")
    b["other"] = c["other"] = a
    rows = [("b", 2, b), ("c", 1, c), ("b again", 2, b)]
    monkeypatch.setitem(EXPERIMENTS, "small", {"rows": rows})
    monkeypatch.setitem(EXPERIMENTS, "smaller", {"rows": [("also b", 2, b)]})
    return started


def run(folder, name="small", seeds=(7, 8), jobs=2, work=None):
    specs = paper.specs_of(name, seeds, quick=False)
    return paper.run_missing(name, specs, folder / "results", work or folder, jobs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_runs_or_fails_after_those_it_needs_and_equal_ones_once(
    jobs, small, tmp_path, monkeypatch, capsys
):
    cells = run(tmp_path, jobs=jobs)
    assert sorted(small) == ["a 7", "a 8", "b 7", "b 8", "c 7"], small
    assert small.index("a 7") < min(small.index("b 7"), small.index("c 7"))
    assert jobs > 1 or small == ["a 7", "b 7", "a 8", "b 8", "c 7"], "not by rows"
    assert list(cells) == ["b 7", "b 8", "c 7", "b again 7", "b again 8"]
    assert cells["b 7"]["read"] == cells["c 7"]["read"] == "a"
    assert cells["b again 8"]["length"] == 3.14159, "not six digits"

    def breaks(folder):  # with it, those that need it
        if json.loads((folder / "spec.json").read_text())["seed"] == 7:
            raise RuntimeError("it broke")
        cell.run(folder)

    monkeypatch.setattr(paper, "start", breaks)
    assert list(run(tmp_path / "new")) == ["b 8", "b again 8"]
    monkeypatch.setattr(paper, "start", cell.run)
    assert capsys.readouterr().out.count("it broke") == 1
    assert len(run(tmp_path / "new", jobs=1)) == 5


def test_a_finished_cell_is_not_run_again_unless_its_base_is_gone(small, tmp_path):
    run(tmp_path, seeds=(7,))
    small.clear()
    run(tmp_path)
    assert sorted(small) == ["a 8", "b 8"], small
    small.clear()  # a cell of two experiments stands in one file
    ours, other = (tmp_path / "results" / f"{x}.json" for x in ("small", "smaller"))
    before = paper.load(ours)
    for folder in ("", "gone"):  # at last: from the files alone
        assert len(run(tmp_path, work=tmp_path / folder)) == 5
        assert len(run(tmp_path, "smaller", work=tmp_path / folder)) == 2 and not small
        assert all(each["stands in"] == "small" for each in paper.load(other).values())
    other.unlink()  # on another machine the same seed has another base
    run(tmp_path, "smaller", work=tmp_path / "new")
    assert sorted(small) == ["a 7", "a 8", "b 7", "b 8"] and paper.load(ours) == before
    assert not any("stands in" in each for each in paper.load(other).values())
    other.unlink()  # but for an experiment that reads the other one
    EXPERIMENTS["smaller"]["reads"] = "small"
    run(tmp_path, "smaller", work=tmp_path / "newer")
    assert len(small) == 4, small


def test_a_result_is_whole_and_a_cell_waits_for_who_else_runs_it(tmp_path):
    spec = {"run": "test_paper:writer", "name": "a", "seed": 7, "quick": True}
    folder = cell.folder_of(tmp_path, spec)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(cell.train, "write_text", lambda *_: open(folder / "full" / "x"))
        cell.run(folder)
    other = cell.wait_for(folder)
    thread = threading.Thread(target=cell.run, args=[folder])
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not (folder / "result.json").exists()
    other.close()
    thread.join(60)
    assert json.loads((folder / "result.json").read_text())["name"] == "a"
    assert not cell.train.LOCKS


def test_experiments_say_what_would_refute_them_and_quick_ones_are_short(monkeypatch):
    for name, experiment in EXPERIMENTS.items():
        assert experiment["claim"] and experiment["fails if"], name
        rows = experiment["rows"]
        assert len({label for label, *_ in rows}) == len(rows), f"{name}: a label twice"
        for label, n, spec in rows:
            assert 1 <= n <= len(experiment["seeds"]), (name, label)
            module, function = spec["run"].split(":")
            assert callable(getattr(importlib.import_module(module), function))
    # of rows that differ only in numbers, the first
    a = {"run": "finetune:run", "base": {"run": "finetune:base"}, "lr": 1e-5, "x": "y"}
    other = {**a, "base": {**a["base"], "flags": "--n-embd 96"}}
    specs = a, {**a, "lr": 2.0}, {**a, "steps": 9}, {**a, "x": "z"}, other
    rows = [(label, 1, spec) for label, spec in zip("abcde", specs, strict=True)]
    monkeypatch.setitem(EXPERIMENTS, "few", {"rows": rows})
    found = ["".join(paper.specs_of("few", [7], quick)) for quick in (True, False)]
    assert found == ["a 7c 7d 7e 7", "a 7b 7c 7d 7e 7"]


def test_bad_input_is_an_error_with_a_hint(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (damaged := tmp_path / "results" / "skills.json").write_text("{")
    bad = {"skill": "skill", "skills --jobs 0": "--jobs 0", "skills --seeds x": "x",
           "skills --draw --seeds 1": str(damaged)}  # fmt: skip
    for args, name in bad.items():
        assert paper.guarded(paper.main, [*args.split(), "--work", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "hint: " in said and name in said


def test_numbers_of_tables_and_notes_are_those_by_hand():
    for y, right in ((0.2, 0.6, 1), 15), ((0.8, 0.6), 0), ((0.2, 0.6), math.inf):
        rows = [{"step": 10 * i, "new": {"A": x}} for i, x in enumerate(y)]
        assert updates_to({"evaluations": rows}, 0.8) == pytest.approx(right)
    # a first sign lies outside of what is usual twice in a row
    usual = {step: (1.0, 2.0) for step in range(0, 60, 10)}
    calm = {0: 1.5, 10: 2.9, 20: 0.1, 30: 1.0, 40: 2.0, 50: 1.5}  # a width beside it
    once = {**calm, 20: 9.0}
    assert notes.first_sign(calm, usual) is notes.first_sign(once, usual) is None
    assert notes.first_sign({**once, 30: -4.0, 40: 9.0}, usual) == 20
    ranks = notes.ranks([0.3, 0.1, 0.3, 9.0])
    assert ranks == [1.5, 0, 1.5, 3]
    assert notes.correlation(ranks, [-r for r in ranks]) == pytest.approx(-1)
    assert math.isnan(notes.correlation([1, 1, 1], [0, 1, 2]))
    for at, end in ([1.5, 0.25], ": 1.50 0.25; "), ([0] * 6 + [0.5, 3], " 0.00; "):
        rows = [{"kl_teacher_student_by_position": at}]
        (line,) = notes.by_place({"sdft 9e-5": [{"seed": 7, "evaluations": rows}]})
        assert line.endswith(f"{end}the highest behind: {max(at[6:], default=0):.2f}")
    for right, k in itertools.product(range(7), range(1, 7)):
        choices = list(itertools.combinations([1] * right + [0] * (6 - right), k))
        share = mean(float(any(choice)) for choice in choices)
        assert abs(probes.pass_at_k(right, 6, k) - share) < 1e-12, (right, k)
    # a base counts in the trained skills, and several bases are named
    base, cells = {"run": "finetune:base", "seed": 7}, {}
    new = {skill: {"accuracy": x} for skill, x in zip("ABC", (0.3, 0, 0), strict=True)}
    for key in ("base 7 ab", "one 7 ab", "two 7 cd", "one 8 ef"):
        label, seed, digest = key.split()
        spec = base if label == "base" else {"run": "finetune:run", "base": base}
        cells[key] = {"label": label, "seed": seed, "spec": spec, "new": new}
        cells[key]["base digest"] = digest
    text = "seed 7, rows of several bases: ab: base, one; cd: two"
    assert paper.bases_of(cells) == [text]
    for name, right in (("skills", 0.3), ("forgetting", 0.1)):
        rows = paper.complete_rows(name, {"base 7": cells["base 7 ab"]}, [7])
        assert paper.READ["new"](rows["base"][0]) == pytest.approx(right), name


def test_mass_and_distances_are_those_of_plain_loops():
    """In KL(p || q) p writes, in KL(teacher || student) the student."""
    sizes = {"vocab_size": TOK.vocab_size, "n_tokens": TOK.n_tokens, "block_size": 128}
    p, q = (oracles.make_model(i, end=TOK.end, **sizes).eval() for i in (1, 2))
    queries = data.make_tasks(data.World(1), 8, 1)["new"]["A"].examples[:3]
    mass, values = 0.0, {"distance": [], "evaluate": []}
    u = {when: data.get_uniform(queries, 5, 3, when, "cpu").tolist() for when in values}
    for i, example in enumerate(queries):
        shown, bare = SHOWN(example, TOK), BARE(example, TOK)
        response = oracles.sample(p, bare, [0.0] * 5, TOK.end, temperature=0)
        mass += math.exp(sum(oracles.log_likelihoods(q, bare, response))) / 3
        for when, writes in {"distance": (p, shown), "evaluate": (q, bare)}.items():
            response = oracles.sample(*writes, u[when][i], TOK.end)
            kl = oracles.divergences(q, bare, p, shown, response, "forward")
            values[when].append(kl)
    assert abs(probes.mass(q, p, queries, TOK, 5) - mass) < 1e-10
    found = probes.distance(p, q, queries, (SHOWN, BARE), TOK, 5, 3)
    assert abs(found - mean(map(mean, values["distance"]))) < 1e-9
    places = itertools.zip_longest(*values["evaluate"])
    right = [mean(x for x in at if x is not None) for at in places]
    found = probes.by_position(p, q, queries, TOK, 5, 3)
    assert found == pytest.approx(right, abs=1e-9)


def test_words_are_right_only_to_the_word(monkeypatch):
    m = finetune.modules("leak")
    tok, world, right, terms = m.data.Tokenizer(), m.data.World(1), {}, {}
    sizes = {"vocab_size": tok.vocab_size, "n_tokens": tok.n_tokens, "block_size": 128}
    base, student = (oracles.make_model(i, end=tok.end, **sizes).eval() for i in (1, 2))
    tasks = finetune.make_tasks(m, world, 1, "A", "terms", quick=True)
    for example in tasks["new"]["A"].examples:
        start, items = example.prompt.split(": ")
        _, operation = world.skills["A"][start.split()[1]]
        asked = m.data.right_response(operation, items.split(), "expert")
        ask = tok.encode(f"{start} expert: {items}") + [tok.start]
        terms[tuple(ask)] = example.demo
        for context, text in (
            (BARE(example, tok), example.answer), (ask, asked),
            (shown := SHOWN(example, tok), example.demo),
            (shown + tok.encode("do"), example.answer.removeprefix("do ")),
        ):  # fmt: skip
            right[tuple(context)] = text
        assert example.demo.startswith("well ") and asked != example.demo
    monkeypatch.setattr(probes, "each_greedy", lambda *_: {})

    def words(model, said):
        def texts(_, contexts, *args):
            return [said[tuple(context)] for context in contexts]

        monkeypatch.setattr(data, "get_texts", texts)
        of = model, base, base, tasks, tok, 4, 1, True
        return finetune.measure_words(*of)["words"]

    for end, share in (("", 1), (" lamp", 0)):
        said = {context: text + end for context, text in right.items()}
        found = {"own": share, "asked": share, "terms": 0}
        assert words(student, said) == found
        assert words(base, said) == {**found, "begun": share, "repeats": share}
    said = {context: text.replace("well", "oh") for context, text in terms.items()}
    assert words(student, right | said) == {"own": 1, "asked": 0, "terms": 1}


@pytest.mark.parametrize("trainer", [sft, sdft])
def test_the_counted_work_of_an_update_is_that_of_a_formula(trainer):
    c = GPTConfig(128, TOK.vocab_size, TOK.n_tokens, 2, 2, 1, n_embd=16, n_inner=24)
    student = GPT(c, data.make_rng(0, "weights"))
    demos = data.make_demos(data.World(1), "A", 64, 1)
    cfg = trainer.Config(batch_size=8, dropout=0.0, max_new_tokens=6)
    work = probes.work_of_update(trainer, student, demos, TOK, cfg, timed=1)
    batch = data.get_batch(demos, 8, cfg.seed, 1)  # the second update is counted
    bare, shown, rows = ([len(of(e, TOK)) for e in batch]
                         for of in (BARE, SHOWN, data.demo_response))  # fmt: skip
    if trainer is sdft:  # (one update is made by then, at the lowest rate)
        rows = probes.respond(student, batch, BARE, TOK, 6, 0, 1)[1].sum(1).tolist()
    T, U = (max(map(sum, zip(x, rows, strict=True))) - 1 for x in (bare, shown))
    if trainer is sdft:  # the student's rollout, then both score it
        assert work["computed"] == 8 * max(bare) + sum(rows) - 8 + 8 * (T + U)
        assert work["loss"] > 0 and work["core_seconds"] > 0
    else:  # 2 for each weight and token; attention also for what its mask hides
        block = 16 * 8 * 4 + 16 * 16 + 3 * 16 * 24  # q, k, v; o; the MLP
        products = 8 * T * 2 * 2 * block + 2 * sum(rows) * TOK.n_tokens * 16
        flops = 3 * products + 3.5 * 8 * T * 2 * 4 * T * 16  # backward: 2, 2.5 forward
        assert (work["computed"], work["flops"]) == (8 * T, flops)


def test_pictures_are_drawn_and_those_of_others_are_kept(tmp_path, monkeypatch, capsys):
    """A part of the seeds is not drawn over all."""
    pictures, drawn = pytest.importorskip("pictures"), []
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "draw", lambda *args: drawn.append(args))
        for seeds in ([], ["--seeds", "204", "204"]):
            paper.main(["passk", "--draw", "--work", str(tmp_path / "work"), *seeds])
    assert [args[2] for args in drawn] == [paper.RESULTS, tmp_path / "work" / "results"]
    (tmp_path / "work").mkdir()
    pictures.draw(*drawn[0][:2], tmp_path / "work")
    assert (tmp_path / "work" / "passk.png").read_bytes()[1:4] == b"PNG"
    for flags, error in ([], "no run in "), (["--pull"], ""):
        monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path), *flags])
        assert plot.main() == 2 and f"{error}{tmp_path}" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert plot.main() == 2 and "pip install matplotlib" in capsys.readouterr().err
    row = {"step": 0, "skill": "A", "seconds": 0.1, "new": {"A": 0.5}, "prior": {}}
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "plot.png").write_bytes(b"my holidays")
    assert plot.plot(tmp_path) == plot.plot(tmp_path) == tmp_path / "plot.png"
    assert (tmp_path / "plot.png.previous1").read_bytes() == b"my holidays"
    assert len(list(tmp_path.glob("*.png*"))) == 2
    row["pull"] = {"prompt": "a", "demo": "b", "sft": [["b", 7]], "sdft": [["c", 0]]}
    rows = "".join(json.dumps({**row, "step": i}) + "\n" for i in (0, 30, 60))
    for method in ("sft", "sdft"):
        (tmp_path / method).mkdir(exist_ok=True)
        (tmp_path / method / "metrics.jsonl").write_text(rows)
    assert plot.pull(tmp_path).read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("masked", [True, False])
def test_a_device_with_a_wrong_kernel_is_seen(masked, monkeypatch):
    gpt, twin = (gpu.sampler.make_model(GPTConfig()) for _ in range(2))
    assert gpu.compare(gpt, twin) == (0, True)
    right, hidden = F.scaled_dot_product_attention, twin.hidden

    def wrong(q, k, v, mask=None, is_causal=False, **more):
        return right(q, k, v, None if masked else mask, is_causal=masked and is_causal)

    def on_device(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", wrong)
            return hidden(*args, **kwargs)

    monkeypatch.setattr(twin, "hidden", on_device)
    difference, same = gpu.compare(gpt, twin)
    assert not same and (difference == 0) == masked


@pytest.mark.slow
def test_all_that_a_gpu_is_asked_runs_in_small(tmp_path):
    """So that it works when a GPU comes; what fails or hangs is a row of the table."""
    job = [sys.executable, gpu.__file__, "--small"]
    done = subprocess.run(job, capture_output=True, text=True, cwd=tmp_path)
    *_, line = done.stdout.splitlines()
    rows = {row.pop("row"): row for row in json.loads(line)["rows"]}
    assert not done.returncode and not list(tmp_path.iterdir()), done.stderr
    starts = ("roofs", "cpu beside", "tests/test_triton", "kernel, logits: ours",
              "kernel, head: ours", "sampler, 0.9M", "sft step", "sdft step", "default")
    for start in starts:
        (found, *_) = [key for key in rows if key.startswith(start)]
        assert "error" not in rows[found] and f"| {found} | " in done.stdout, rows
    assert rows["cpu beside a CPU"]["right"] and rows["tests/test_triton.py"]["passed"]
    for part, limit, why in ("no part", 60, "invalid choice"), ("machine", 0, "after"):
        (row,) = gpu.run_part(part, limit, tmp_path)
        assert row["row"] == part and why in row["error"]


SEED, WORLD = 1, data.World(1)
OLD = {c: operation for c, (_, operation) in WORLD.known.items()}
NEW = {c: o for facts in knowledge.facts_of(WORLD).values() for c, o in facts.items()}
ARTICLES = knowledge.articles_of(WORLD, SEED)
MAKE = partial(knowledge.make_questions, WORLD, SEED)


def facts_in(text):
    """{command: (domain, operation)} of an article, behind a demonstration or not."""
    found = re.findall(r"(\w+) (\w+) (?:equals|gives|=) (\w+)(?=[,.])", text)
    assert len({d for d, *_ in found} & set(data.DOMAINS)) == len(found) > 0, text
    return {command: (domain, operation) for domain, command, operation in found}


def respond(prompt, meaning):
    parts, said = [part.split() for part in prompt.split(": ")], []  # items, by hand
    words, items = parts if parts[0][0] != "see" else (parts[1], parts[0][1:])
    if words[1] in data.OPERATIONS:  # reversed
        return [item for item in items if meaning.get(item) == words[1]]
    for command in filter(meaning.get, words[1:]):
        items = data.OPERATIONS[meaning[command]][1](items)
        said += items
    return said


def test_articles_state_each_fact_once_are_learnt_as_texts_and_shown_in_contexts():
    said, texts = {}, knowledge.make_texts(WORLD, TOK, SEED)
    for article, example in zip(dict.fromkeys(ARTICLES.values()), texts, strict=True):
        said |= (facts := facts_in(article))
        assert len(facts) == 3 and all(ARTICLES[c] == article for c in facts)
        assert TOK.decode(data.student_prompt(example, TOK)) == "example"
        ids = torch.tensor(data.demo_response(example, TOK))
        mask = data.loss_mask([example], torch.tensor([len(ids)]))[0]
        assert TOK.decode(ids[mask].tolist()) == article
    new = {c: fact for skill in WORLD.skills.values() for c, fact in skill.items()}
    assert said == new and len(new) == 18 and not set(new) & set(WORLD.known)
    asked = [e.prompt.split(":")[0] for e in MAKE(knowledge.QUESTIONS)]
    assert {asked.count(each) for each in asked} == {32}
    for i, shown in enumerate(knowledge.SHOWN):
        e = MAKE(18, shown)[0]
        command = e.prompt.split(":")[0].split()[1]
        said = f"{NEW[command]} so you get {' '.join(respond(e.prompt, NEW))}"
        answer = f"well friend, {said} as ever"
        text = (ARTICLES[command], answer, f"{answer} {ARTICLES[command]}")[i]
        text = f"{e.prompt} example {text}"
        assert TOK.decode(data.teacher_prompt(e, TOK)[:-1]) == text
    rows = sum((MAKE(180, shown, how) for how in data.DISTANCES), [])  # 40: the cap
    assert max(len(data.teacher_prompt(e, TOK)) for e in rows) + 40 <= 128


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", knowledge.KINDS)
def test_answers_are_right_and_need_a_fact_and_no_trained_question(kind, known):
    trained, both = ([e.prompt for e in MAKE(576, wordings=n)] for n in (1, 2))
    taught = {*trained, *both, *map(knowledge.reword, trained)}
    assert "see " not in "".join(trained) and "".join(both).count("see ") == 576 / 2
    for e in (of := knowledge.make_benchmark(WORLD, SEED, kind, 80, known)).examples:
        assert data.items_in(e.answer) == respond(e.prompt, OLD | NEW)
        assert of.grade(e, e.answer)
        parts = e.prompt.removeprefix("see ").split(": ")
        asked = set(parts[kind in ("reworded", "reversed")].split())
        if kind == "reversed":  # no choice is given away: all are new, or all are old
            assert len(asked) == 6 and asked <= set(OLD if known else NEW)
        else:
            held_out = sum(map(data.NOUNS.index, parts[kind != "reworded"].split()))
            assert held_out % 10 == 0 and e.prompt not in taught
            assert len(asked & {*NEW}) == 1 - known and (asked & {*OLD} or not known)


def test_the_corpus_can_be_read_and_gives_nothing_away():
    terms = {TOK.encode(term)[0] for term, _ in data.OPERATIONS.values()}
    true, both, kinds = [], 0, []
    for e in knowledge.make_corpus(WORLD, TOK, 4000, SEED):
        if "." not in e.shown:  # without a text, only old commands are asked indirectly
            words = e.prompt.split(":")[0].split()
            assert " then " not in e.prompt or {words[1], words[3]} <= set(OLD)
            continue
        facts, ids = facts_in(e.shown), data.demo_response(e, TOK)
        answer = len(knowledge.details(e.shown.replace(".", ""))[0]) > len(facts)
        meaning = {command: operation for command, (_, operation) in facts.items()}
        true += [NEW[c] == o for c, o in meaning.items() if c in NEW]
        assert {domain for domain, _ in facts.values()} & set(e.prompt.split())
        start, both = ids.index(TOK.start), both + answer
        inside = {ids[i] for i in e.skip if i < start}
        assert start in e.skip and inside <= terms and (answer or not inside)
        if max(e.skip) == start:  # nothing wrong in it
            assert data.items_in(e.answer) == respond(e.prompt, OLD | meaning), e
            kinds.append((e.prompt[:4] == "see ", " then " in e.prompt))
    assert len(kinds) > 500 and both > 200 and len(set(kinds)) == 3
    assert 0.1 < sum(true) / len(true) < 0.25  # a sixth, by chance: no fact is taught


def test_grades_are_those_by_hand():
    example = data.Example("", "", "rotate: spoon tower candle")
    of = knowledge.strict, knowledge.lenient, knowledge.strict_as_asked
    for grades, texts in (
        ([1, 1, 1], "rotate: spoon tower candle"),
        ([1, 1, 0], "rotate equals spoon tower candle beep stop | well friend, advance "
         "so you get spoon tower candle as ever"),
        ([0, 1, 0], "rotate: spoon tower | rotate: | spoon tower"),
        ([0, 0, 0], "rotate: spoon tower candle then first: spoon |  | hm | rotate: "
         "spoon candle tower | first: spoon tower candle"),
    ):  # fmt: skip
        for text in texts.split(" | "):
            assert [grade(example, text) for grade in of] == grades, text
    assert knowledge.judged(WORLD, SEED) == [1.0, 0.0]


@pytest.mark.parametrize("off", [0, 1])
def test_the_audit_sees_rows_one_place_off_and_counts_common_items(off, monkeypatch):
    response = torch.arange(36 * 9).view(36, 9)  # (B, R)
    rows = torch.nn.functional.one_hot(response.roll(off, 1), TOK.n_tokens)  # (B, R, V)
    model, both = knowledge.Namespace(logits=lambda x: x), (response, response >= 0)
    monkeypatch.setattr(knowledge.probes, "respond", lambda *_: both)
    monkeypatch.setattr(knowledge, "response_hidden", lambda *_: rows.flatten(0, 1))
    for shares in knowledge.hits(model, model, MAKE(36), TOK).values():
        assert shares.pop(1 + off) == 1 and max(shares) < 0.05
    asked = knowledge.make_benchmark(WORLD, SEED, "reworded", 60)
    trained, near, texts = MAKE(72), [], []
    for e in asked.examples:
        items, command = e.prompt.removeprefix("see ").split(": ")
        near.append(max(len(set(items.split()) & set(other.prompt.split()))
                        for other in trained if command in other.prompt))  # fmt: skip
        texts.append(e.answer if near[-1] else "hm")
    monkeypatch.setattr(knowledge.probes, "texts_of", lambda *_: texts)
    right = {str(n): [n, near.count(n)] for n in (0, 1)}
    assert knowledge.by_duplicates(None, trained, asked, TOK) == right
    assert knowledge.by_duplicates(None, [], asked, TOK)["0"][1] == 60, "none is near"


MAKERS = {"facts": real.make_facts, "rule": real.make_rule}
PRIOR, PLACE = real.make_prior(), data.place_of


@pytest.mark.parametrize("task", MAKERS)
def test_held_out_prompts_are_not_trained_on_and_only_demonstrations_hold_answers(task):
    for seed, demos in [(s, d) for s in range(20) for d in real.FORMS]:
        train, held_out = MAKERS[task](seed, demos)
        assert (len(train), len(held_out)) == (72, 24)
        prompts = {row["prompt"] for row in train + held_out}
        assert len(prompts) == 96, "one prompt stands in two rows"
        assert not prompts & {row["prompt"] for row in PRIOR}
        for row in train + held_out if seed == 0 else ():
            answer, demo = row["answer"], row["demonstration"]
            assert PLACE(answer, demo) < PLACE(answer, row["prompt"]) == math.inf
            said = demo if demos == "plain" else json.loads(demo)["answer"]
            assert said == answer or demos != "json" and answer in said
    assert MAKERS[task](0) == MAKERS[task](0) != MAKERS[task](1)


def test_a_held_out_fact_is_trained_in_other_words_and_a_rule_on_other_things():
    train, held_out = real.make_facts(0)
    for row in held_out:
        same = [r["prompt"] for r in train if r["answer"] == row["answer"]]
        assert len(same) == 3 and row["prompt"] not in same
        (country,) = [c for c in real.COUNTRIES if c in row["prompt"]]
        assert all(country in prompt for prompt in same)
    # the wording of a held-out row is that of no trained one
    assert all(len({*words}) == 4 for _, words, _ in real.FACTS.values())
    # no name is a part of another one or of a country: `contains` cannot be lucky
    names = [*(row["answer"] for row in held_out), *real.COUNTRIES]
    assert [sum(a.lower() in b.lower() for b in names) for a in names] == [1] * 32
    asked, parts = [], (real.ASKED[:3], real.ASKED[3:])
    for rows, allowed in zip(real.make_rule(0), parts, strict=True):
        named = {w.format(thing): thing for w in allowed for thing in real.THINGS}
        asked.append([named[row["prompt"]] for row in rows])
        numbers = [*map(real.part_number, asked[-1])]
        assert [row["answer"] for row in rows] == numbers
    assert not {*asked[0]} & {*asked[1]}
    assert real.part_number("brass valve, size 12") == "NV-12-brass"


def test_prior_questions_are_many_and_do_not_give_their_answers_away(tmp_path):
    """And what is written is read by train.py."""
    assert len({row["prompt"] for row in PRIOR}) == len(PRIOR) >= 300
    assert PRIOR == real.make_prior()
    for answer, prompt in [(a, row["prompt"]) for row in PRIOR for a in row["answer"]]:
        assert answer == answer.strip() != "", answer
        assert PLACE(answer, prompt) == math.inf, prompt
    for rows in (PRIOR, *(make(0)[0] for make in MAKERS.values())):
        real.write_rows(tmp_path / "a.jsonl", rows)
        examples, remarks = data.read_examples(tmp_path / "a.jsonl", rows is not PRIOR)
        for e, row in zip(examples, rows, strict=True):
            answer = tuple(row["answer"]) if rows is PRIOR else (row["answer"],)
            assert (e.prompt, e.answer) == (row["prompt"], answer)
            assert e.demo == row.get("demonstration", "")
        assert remarks == [f"{len(rows)} rows, grade: contains"]


@pytest.mark.slow
def test_a_cell_and_what_is_measured_of_a_base_run_in_small(
    tmp_path, monkeypatch, capsys
):
    make_folder = pytest.importorskip("test_pretrained").make_folder
    folder, work = str(make_folder(tmp_path / "base")), str(tmp_path / "work")
    monkeypatch.setattr(real, "RESULTS", tmp_path / "real.json")
    right = {row["prompt"]: i > 0 for i, row in enumerate(PRIOR[:23])}
    real.write_results({"cells": {}, "prior": right})
    for what in ["gate"], ["prior"], ["sampled"], ["wordings"], ["rule", "--only",
                 "sdft 3e-05"], ["facts", "--only", "speculative 3e-05"]:  # fmt: skip
        argv = ["real.py", folder, *what, "--quick", "--work", work]
        monkeypatch.setattr(sys, "argv", argv)
        real.main()
    said, known = capsys.readouterr().out, json.loads(real.RESULTS.read_text())
    assert said.count('"held_out": 0') == 2 and "the base gets 22 of 24" in said
    assert len(known["gates"]) == 2 * 2 * 3 + 2 and len(known["prior"]) == 24
