"""The experiments of tests/bench: cells, measurements, tables, pictures."""

import copy
import importlib.util
import itertools
import json
import math
import sys
import threading
from pathlib import Path
from statistics import mean

import pytest
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
for path in (ROOT / "tests" / "exercises", ROOT / "tests" / "bench"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

import cell  # noqa: E402
import check_device  # noqa: E402
import experiments  # noqa: E402
import notes  # noqa: E402
import oracles  # noqa: E402
import paper  # noqa: E402
import plot  # noqa: E402
import probes  # noqa: E402
from experiments import EXPERIMENTS  # noqa: E402

import data  # noqa: E402
import sdft  # noqa: E402
import sft  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

NEW = [name for name in EXPERIMENTS if name not in ("default", "earlier")]
TOK = data.Tokenizer()


# ---- Whole experiments -------------------------------------------------------------


def kind(spec):
    """Cells of one kind run the same code."""
    arm = spec.get("arm", "").split(" ")[0]
    return json.dumps([arm, *(spec.get(key) for key in ("run", "method", "variants"))])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells without a process for each, whose start takes longer than they do."""
    monkeypatch.setattr(paper, "start", lambda folder, device: cell.run(folder))


@pytest.mark.parametrize("name", NEW)
def test_an_experiment_runs_to_its_table_and_its_picture(
    name, work, in_this_process, monkeypatch, capsys
):
    """The first row of each kind; cells of other experiments are not run again."""
    rows = {}
    for label, _, spec in EXPERIMENTS[name]["rows"]:
        rows.setdefault(kind(spec), (label, 1, spec))
    rows = list(rows.values())
    if name == "size":  # one base of another size
        rows += [row for row in EXPERIMENTS[name]["rows"] if row[0].endswith("small")]
    monkeypatch.setitem(EXPERIMENTS[name], "rows", rows)
    args = [name, "--seeds", "1", "--quick", "--work", str(work), "--jobs", "1"]
    paper.main(args)
    said = capsys.readouterr().out
    for label, *_ in rows:
        assert f"| {label} | 1 |" in said, f"no row {label}: {said}"
    assert f"{len(rows)} of {len(rows)} cells, 0 of them made by other code" in said
    results = json.loads((work / "results" / f"{name}.json").read_text())
    assert len(results["cells"]) == len(rows)
    if importlib.util.find_spec("matplotlib"):
        assert list((work / "results").glob(f"{name}*.png")), "no picture"
    # what is finished is not run again
    monkeypatch.setattr(paper, "start", lambda *_: pytest.fail("a cell ran again"))
    paper.main(args)


# ---- Cells -------------------------------------------------------------------------


def writer(folder, seed, quick, name, other=None):
    """A cell function that leaves a file, and reads that of the cell it needs."""
    (folder / "left.txt").write_text(name)
    read = (other / "left.txt").read_text() if other else ""
    return {"name": name, "read": read, "length": math.pi}


@pytest.fixture
def small(monkeypatch):
    """An experiment of three cells a seed: b and c need a; and who was started."""
    started, one = [], threading.Lock()

    def start(folder, device):
        spec = json.loads((folder / "spec.json").read_text())
        with one:  # Python's parser does not bear two threads
            started.append(f"{spec['name']} {spec['seed']}")
            cell.run(folder)

    monkeypatch.setattr(paper, "start", start)
    a = {"run": "test_paper:writer", "name": "a"}
    rows = [
        ("b", 2, {"run": "test_paper:writer", "name": "b", "other": a}),
        ("c", 1, {"run": "test_paper:writer", "name": "c", "other": a}),
        ("b again", 2, {"run": "test_paper:writer", "name": "b", "other": a}),
    ]
    monkeypatch.setitem(EXPERIMENTS, "small", {"rows": rows, "seeds": (7, 8)})
    return started


def run_small(folder, seeds=(7, 8)):
    specs = paper.specs_of("small", seeds, quick=False)
    return paper.run_missing("small", specs, folder / "results", folder, jobs=2)


def test_a_cell_runs_after_those_it_needs_and_equal_ones_run_once(small, tmp_path):
    cells = run_small(tmp_path)
    assert sorted(small) == ["a 7", "a 8", "b 7", "b 8", "c 7"], small
    assert small.index("a 7") < min(small.index("b 7"), small.index("c 7"))
    assert list(cells) == ["b 7", "b 8", "c 7", "b again 7", "b again 8"]
    assert cells["b 7"]["read"] == cells["c 7"]["read"] == "a"
    assert cells["b 7"]["length"] == 3.14159, "not rounded to six digits"
    assert cells["b again 8"]["name"] == "b" and cells["b again 8"]["seed"] == 8


def test_quick_takes_the_first_of_rows_that_differ_only_in_numbers(monkeypatch):
    base = {"run": "finetune:base"}
    tuned = {"run": "finetune:run", "base": base, "method": "sft"}
    rows = [
        ("a", 1, {**tuned, "lr": 1.0}), ("b", 1, {**tuned, "lr": 2.0}),
        ("c", 1, {**tuned, "lr": 1.0, "steps": 9}), ("d", 1, {**tuned, "method": "x"}),
        ("e", 1, {**tuned, "lr": 1.0, "base": {**base, "flags": "--n-embd 96"}}),
    ]  # fmt: skip
    monkeypatch.setitem(EXPERIMENTS, "few", {"rows": rows})
    assert list(paper.specs_of("few", [7], True)) == ["a 7", "c 7", "d 7", "e 7"]
    assert len(paper.specs_of("few", [7], False)) == len(rows)


def test_cells_start_in_the_order_of_the_table(small, tmp_path):
    """A stopped experiment has its first rows, not all rows of its first seed."""
    specs = paper.specs_of("small", (7, 8), quick=False)
    paper.run_missing("small", specs, tmp_path / "results", tmp_path, jobs=1)
    assert small == ["a 7", "b 7", "a 8", "b 8", "c 7"], small


def test_a_finished_cell_is_not_run_again_wherever_its_result_stands(small, tmp_path):
    run_small(tmp_path, seeds=(7,))
    small.clear()
    for path in tmp_path.glob("seed7/cells/*"):  # the results alone are kept
        path.rename(tmp_path / f"gone-{path.name}")
    run_small(tmp_path)
    assert sorted(small) == ["a 8", "b 8"], small


@pytest.fixture
def smaller(small, monkeypatch):
    """An experiment with a row that small has, too; it returns how to run it."""
    rows = [("also b", 2, EXPERIMENTS["small"]["rows"][0][2])]
    monkeypatch.setitem(EXPERIMENTS, "smaller", {"rows": rows, "seeds": (7, 8)})

    def run(where, work):
        specs = paper.specs_of("smaller", (7, 8), quick=False)
        cells = paper.run_missing("smaller", specs, where, work, 1)
        assert [cell["name"] for cell in cells.values()] == ["b", "b"]
        return paper.load(where / "smaller.json").values()

    return run


def test_a_cell_of_two_experiments_runs_once_and_stands_in_one_file(
    small, smaller, tmp_path
):
    run_small(tmp_path)
    small.clear()
    for work in (tmp_path, tmp_path / "gone"):  # at last: from the files alone
        cells = smaller(tmp_path / "results", work)
        assert {cell["stands in"] for cell in cells} == {"small"} and not small


def test_a_cell_of_another_experiment_whose_base_is_gone_runs_again(
    small, smaller, tmp_path
):
    """On another machine the same seed has another base; both files keep their own."""
    run_small(tmp_path)
    before = paper.load(tmp_path / "results" / "small.json")
    small.clear()
    cells = smaller(tmp_path / "results", tmp_path / "new")
    assert sorted(small) == ["a 7", "a 8", "b 7", "b 8"], small
    assert paper.load(tmp_path / "results" / "small.json") == before
    # a run has its own seconds; here they stand for all that another base changes
    assert not any("stands in" in each for each in cells)


def test_an_experiment_that_reads_another_one_runs_nothing_of_it(
    small, smaller, tmp_path
):
    run_small(tmp_path)
    small.clear()
    EXPERIMENTS["smaller"]["reads"] = "small"
    smaller(tmp_path / "results", tmp_path / "new")
    assert not small, small


def test_rows_of_several_bases_are_named():
    base = {"run": "finetune:base", "seed": 7}
    tuned = {"run": "finetune:run", "base": base, "lr": 1.0}
    cells = {
        f"{name} {seed}": {"label": name, "seed": seed, "spec": spec, "base digest": it}
        for name, seed, spec, it in (
            ("base", 7, base, "ab"), ("one", 7, tuned, "ab"),
            ("two", 7, tuned, "cd"), ("one", 8, tuned, "ef"),
        )
    }  # fmt: skip
    assert paper.bases_of(cells) == [
        "seed 7, rows of several bases: ab: base, one; cd: two"
    ]


def test_a_cell_that_fails_stops_only_those_that_need_it(
    small, tmp_path, monkeypatch, capsys
):
    start = paper.start

    def breaks(folder, device):
        if json.loads((folder / "spec.json").read_text())["seed"] == 7:
            raise RuntimeError("it broke")
        start(folder, device)

    monkeypatch.setattr(paper, "start", breaks)
    cells = run_small(tmp_path)
    assert list(cells) == ["b 8", "b again 8"] and "it broke" in capsys.readouterr().out
    monkeypatch.setattr(paper, "start", start)
    assert len(run_small(tmp_path)) == 5, "it cannot be mended"


def test_a_result_is_there_whole_or_not_at_all(small, tmp_path, monkeypatch):
    def breaks(*args):
        raise OSError("disk full")

    monkeypatch.setattr(cell.train, "write_text", breaks)
    with pytest.raises(OSError):
        run_small(tmp_path)
    assert not list(tmp_path.glob("*/cells/*/result.json"))


def test_every_experiment_says_what_would_refute_it():
    for name, experiment in EXPERIMENTS.items():
        assert experiment["claim"] and experiment["fails if"], name
        labels = [label for label, *_ in experiment["rows"]]
        assert len(set(labels)) == len(labels), f"{name}: a label twice"
        for label, n, spec in experiment["rows"]:
            assert 1 <= n <= len(experiment["seeds"]), (name, label)
            module, function = spec["run"].split(":")
            assert callable(getattr(importlib.import_module(module), function))


def test_a_run_of_train_py_is_a_cell_too(work, monkeypatch, capsys):
    rows = EXPERIMENTS["default"]["rows"][:1]
    monkeypatch.setitem(EXPERIMENTS["default"], "rows", rows)
    args = ["default", "--seeds", "1", "--quick", "--work", str(work), "--jobs", "1"]
    assert paper.main(args) == 0, capsys.readouterr()
    cells = paper.load(work / "results" / "default.json")
    assert list(cells) == ["sdft 1"] and cells["sdft 1"]["stages"]
    bases = list(work.glob("seed1/base/*/base.pt"))
    assert len(bases) == len(list(work.glob("seed1/base/*"))), "a base of its own"


def test_a_cell_waits_for_the_other_process_that_runs_it(small, tmp_path):
    spec = {"run": "test_paper:writer", "name": "a", "seed": 7, "quick": True}
    folder = cell.folder_of(tmp_path, spec)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    other = cell.wait_for(folder)
    cell_thread = threading.Thread(target=cell.run, args=[folder])
    cell_thread.start()
    cell_thread.join(0.3)
    assert cell_thread.is_alive() and not (folder / "result.json").exists()
    other.close()
    cell_thread.join(20)
    assert json.loads((folder / "result.json").read_text())["name"] == "a"
    assert not cell.train.LOCKS


def test_a_base_counts_in_the_skills_that_its_experiment_trains():
    new = {skill: {"accuracy": x} for skill, x in zip("ABC", (0.3, 0, 0), strict=True)}
    base = {"label": "base", "spec": {"run": "finetune:base"}, "new": new, "base": ""}
    cells = {"base 200": base}
    for name, right in (("skills", 0.3), ("forgetting", 0.1)):
        rows = paper.complete_rows(name, cells, [200])
        assert paper.READ["new"](rows["base"][0]) == pytest.approx(right), name


@pytest.mark.parametrize("visible", ["2,3", None])
def test_cells_are_spread_over_the_gpus_that_are_visible(visible, monkeypatch):
    monkeypatch.setattr(paper.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    first, second = (visible or "0,1").split(",")
    assert paper.places(None) == [first, second]
    assert paper.places(3) == [first, second, first]


def test_a_picture_of_results_is_of_all_seeds(tmp_path, monkeypatch):
    """A part of the seeds is drawn, too, but not over the picture of all."""
    pytest.importorskip("matplotlib")
    import pictures

    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda *args: drawn.append(args[2]))
    for seeds in ([], ["--seeds", "204", "204"]):
        paper.main(["passk", "--draw", "--work", str(tmp_path), *seeds])
    assert drawn == [paper.RESULTS, tmp_path / "results"]


@pytest.mark.parametrize("args", ["skill", "skills --jobs 0", "skills --seeds x"])
def test_bad_input_is_an_error_with_a_hint(args, capsys):
    assert paper.guarded(paper.main, args.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "hint: " in said and len(said) < 500


def test_a_damaged_file_is_named(tmp_path, capsys):
    path = tmp_path / "results" / "skills.json"
    path.parent.mkdir()
    path.write_text("{")
    args = ["skills", "--draw", "--seeds", "1", "--work", str(tmp_path)]
    assert paper.guarded(paper.main, args) == 2
    assert f"error: {path}" in capsys.readouterr().err


# ---- Measurements ------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_choices_with_a_right_sample():
    n = 6
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([1] * right + [0] * (n - right), k))
        share = mean(float(any(choice)) for choice in choices)
        assert abs(probes.pass_at_k(right, n, k) - share) < 1e-12, (right, k)


@pytest.fixture(scope="module")
def models():
    """Two small models in float64 and questions to them."""
    sizes = {"vocab_size": TOK.vocab_size, "end": TOK.end, "block_size": 128}
    pair = [oracles.make_model(seed, n_tokens=TOK.n_tokens, **sizes) for seed in (1, 2)]
    queries = data.make_tasks(data.World(1), 8, 1)["new"]["A"].examples[:3]
    return *[model.eval() for model in pair], queries


def test_mass_is_the_probability_of_the_bases_own_greedy_response(models):
    base, student, queries = models
    total = 0.0
    for example in queries:
        context = data.student_prompt(example, TOK)
        response = oracles.sample(base, context, [0.0] * 5, TOK.end, temperature=0)
        total += math.exp(sum(oracles.log_likelihoods(student, context, response))) / 3
    measured = probes.mass(student, base, queries, TOK, 5)
    assert abs(measured - total) < 1e-10 and total > 0
    assert probes.mass(base, base, queries, TOK, 5) > total


def test_a_distance_is_along_what_its_first_model_samples_in_its_own_context(models):
    p, q, queries = models
    u = data.get_uniform(queries, 5, 3, "distance", "cpu").tolist()
    total = 0.0
    for example, numbers in zip(queries, u, strict=True):
        shown = data.teacher_prompt(example, TOK)
        bare = data.student_prompt(example, TOK)
        response = oracles.sample(p, shown, numbers, TOK.end)
        # KL(p || q): p in the teacher's place of KL(teacher || student)
        values = oracles.divergences(q, bare, p, shown, response, "forward")
        total += mean(values) / 3
    seen = data.teacher_prompt, data.student_prompt
    assert abs(probes.distance(p, q, queries, seen, TOK, 5, 3) - total) < 1e-9


def products(config, tokens, columns, heads):
    """FLOP of a forward pass: 2 for each weight and token, and attention; heads: rows
    that the head is used on. Attention is counted in full, with the part behind a
    token that its mask hides."""
    C, inner = config.n_embd, config.n_inner
    D = C // config.n_head
    weights = C * D * (config.n_head + 2 * config.n_kv_head) + C * C + 3 * C * inner
    attention = 4 * columns * C
    each = config.n_layer * (2 * weights + attention)
    return tokens * each + 2 * heads * config.vocab_rows * C


def test_the_counted_work_of_sft_is_that_of_a_formula():
    config = GPTConfig(
        vocab_size=TOK.vocab_size, n_tokens=TOK.n_tokens, n_layer=2, n_head=2,
        n_kv_head=1, n_embd=16, n_inner=24,
    )  # fmt: skip
    config.vocab_rows = TOK.n_tokens
    student = GPT(config, data.make_rng(0, "weights"))
    demos = data.make_demos(data.World(1), "A", 64, 1)
    cfg = sft.Config(batch_size=8, dropout=0.0)
    work = probes.work_of_update(sft, student, demos, TOK, cfg, timed=1)
    batch = data.get_batch(demos, 8, cfg.seed, 1)  # the second update is counted
    places = [
        len(data.student_prompt(e, TOK)) + len(data.demo_response(e, TOK)) - 1
        for e in batch
    ]
    rows = sum(len(data.demo_response(e, TOK)) for e in batch)
    tokens = 8 * max(places)
    assert work["computed"] == tokens
    # forward once, backward twice; attention's backward pass is 2.5 times its forward
    forward = products(config, tokens, 0, rows)
    attention = products(config, tokens, max(places), rows) - forward
    assert work["flops"] == 3 * forward + 3.5 * attention


def test_sdft_computes_rollout_and_teacher_beyond_what_sft_does():
    config = GPTConfig(
        vocab_size=TOK.vocab_size, n_tokens=TOK.n_tokens, n_layer=2, n_head=2,
        n_kv_head=2, n_embd=16, n_inner=24,
    )  # fmt: skip
    student = GPT(config, data.make_rng(0, "weights"))
    demos = data.make_demos(data.World(1), "A", 64, 1)
    cfg = sdft.Config(batch_size=8, dropout=0.0, max_new_tokens=6)
    work = probes.work_of_update(sdft, student, demos, TOK, cfg, timed=1)
    batch = data.get_batch(demos, 8, cfg.seed, 1)
    bare = [len(data.student_prompt(e, TOK)) for e in batch]
    shown = [len(data.teacher_prompt(e, TOK)) for e in batch]
    twin = GPT(config, data.make_rng(0, "weights"))
    response, mask = probes.respond(
        twin, batch, data.student_prompt, TOK, 6, cfg.seed, 1
    )
    lengths = mask.sum(1).tolist()
    rollout = 8 * max(bare) + sum(length - 1 for length in lengths)
    scored = sum(
        8 * (max(n + r for n, r in zip(prompts, lengths, strict=True)) - 1)
        for prompts in (bare, shown)
    )
    # the student has made one update before this one, at the lowest rate
    assert work["computed"] == rollout + scored
    assert work["loss"] > 0 and work["core_seconds"] > 0


def test_updates_to_a_goal_are_read_between_two_evaluations():
    rows = [{"step": 10 * i, "new": {"A": y}} for i, y in enumerate((0.2, 0.6, 1.0))]
    cell = {"evaluations": rows}
    assert experiments.updates_to(cell, 0.8) == pytest.approx(15)
    assert experiments.updates_to(cell, 0.2) == 0
    assert experiments.updates_to({"evaluations": rows[:2]}, 0.9) == math.inf
    dip = [{**row, "new": {"A": y}} for row, y in zip(rows, (1, 0.5, 1), strict=True)]
    assert experiments.updates_to({"evaluations": dip}, 0.9) == 0


# ---- Notes -------------------------------------------------------------------------


def test_what_there_is_to_learn_is_told_token_by_token():
    early = {"kl_teacher_student_by_position": [1.5, 0.25, 0, 0, 0, 0, 0.125, 3.0]}
    late = {"kl_teacher_student_by_position": [9.0]}
    run = {"seed": 7, "evaluations": [early, late]}
    (line,) = notes.by_place({"sdft 9e-5": [run], "imitate 9e-5": [run]})
    assert line.startswith("seed 7: KL(teacher || student)")
    assert ": 1.50 0.25 0.00 0.00 0.00 0.00; the highest behind: 3.00" in line
    short = {"seed": 8, "evaluations": [late]}
    assert notes.by_place({"sdft 9e-5": [short]})[0].endswith("behind: 0.00")
    assert notes.by_place({"imitate 9e-5": [run]}) == []


def test_a_first_sign_lies_outside_of_the_usual_twice_in_a_row():
    usual = {step: (1.0, 2.0) for step in range(0, 60, 10)}
    calm = {0: 1.5, 10: 2.9, 20: 0.1, 30: 1.0, 40: 2.0, 50: 1.5}  # a width beside it
    assert notes.first_sign(calm, usual) is None
    once = {**calm, 20: 9.0}
    assert notes.first_sign(once, usual) is None
    assert notes.first_sign({**once, 30: -4.0, 40: 9.0}, usual) == 20


def test_the_rank_correlation_is_that_of_ranks():
    ranks = notes.ranks([0.3, 0.1, 0.3, 9.0])
    assert ranks == [1.5, 0, 1.5, 3]
    assert notes.correlation(ranks, [2 * r + 1 for r in ranks]) == pytest.approx(1)
    assert notes.correlation([0, 1, 2], [2, 1, 0]) == pytest.approx(-1)
    assert math.isnan(notes.correlation([1, 1, 1], [0, 1, 2]))


# ---- One run, one device -----------------------------------------------------------


def test_a_run_is_drawn_and_a_picture_of_somebody_else_is_kept(tmp_path):
    pytest.importorskip("matplotlib")
    update = {"step": 0, "skill": "A", "seconds": 0.1}
    rows = [
        {**update, "step": i, "new": {"A": i / 2}, "prior": {"knowledge": 1.0}}
        for i in range(3)
    ]
    for method in ("sft", "sdft"):
        (tmp_path / method).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in [update, *rows])
        (tmp_path / method / "metrics.jsonl").write_text(lines)
    (tmp_path / "plot.png").write_bytes(b"my holidays")
    for _ in range(2):
        assert plot.plot(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.png.previous1").read_bytes() == b"my holidays"
    assert len(list(tmp_path.glob("*.png*"))) == 2


def test_a_picture_needs_matplotlib_and_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    if importlib.util.find_spec("matplotlib"):
        assert plot.main() == 2 and f"no run in {tmp_path}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main() == 2 and "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("masked", [True, False])
def test_a_device_with_a_wrong_kernel_is_seen(masked, monkeypatch):
    """Attention with a mask, as on a cache; or causal attention, as everywhere else."""
    gpt, right = check_device.make_model(), F.scaled_dot_product_attention
    twin = copy.deepcopy(gpt)
    assert check_device.compare(gpt, twin) == (0, True)
    hidden = twin.hidden

    def wrong(q, k, v, attn_mask=None, is_causal=False):
        if masked:
            return right(q, k, v, is_causal=is_causal)
        return right(q, k, v, attn_mask)

    def on_device(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", wrong)
            return hidden(*args, **kwargs)

    monkeypatch.setattr(twin, "hidden", on_device)
    difference, same = check_device.compare(gpt, twin)
    assert not same and (difference == 0) == masked
