"""The command line as a user runs it: real files, small models, and real processes
where it matters."""

import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

import data
import sdft
import sft
import train
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
SMALL = shlex.split(
    "--n-layer 1 --n-embd 32 --base-steps 4 --steps 3 --batch-size 8 --demos 16 "
    "--eval-size 8 --gate-margin -1 --log-every 1 --device cpu --threads 1"
)
METHODS = {"sft": sft, "sdft": sdft}


# ---- What the tests of train.py share ------------------------------------------------


def start(*args, cwd=ROOT, launcher=(sys.executable,), **environment):
    """train.py as a process of its own."""
    argv = [*launcher, str(ROOT / "train.py"), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, cwd=cwd, env=env, **pipes)


def stop_at(step, number, argv):
    """A run in this process that gets a signal in a step of fine-tuning; exit code."""
    real = data.get_batch

    def get_batch(examples, batch_size, seed, now):
        if now == step:
            os.kill(os.getpid(), number)
        return real(examples, batch_size, seed, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "get_batch", get_batch)
        return train.main(argv)


def read(out, method):
    results = json.loads((out / method / "results.json").read_text())
    lines = (out / method / "metrics.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def without_times(x):
    if isinstance(x, dict):
        times = ("seconds", "base_seconds", "unrecorded")
        return {k: without_times(v) for k, v in x.items() if k not in times}
    return [without_times(v) for v in x] if isinstance(x, list) else x


def files_in(folder):
    """Every file below, with its bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def base_file(out):
    (path,) = (out / "base").glob("*/base.pt")
    return path


def assert_refused(result, *words):
    """Exit code 2, one error that names it and, at the end, one hint. (An error with
    several rows of a file has a line for each.)"""
    code, out, err = result
    assert code == 2 and "Traceback" not in out + err, out + err
    assert re.fullmatch(r"error: [^\n]+(\n[^\n]+)*\nhint: [^\n]+\n", err), err
    assert err.count("error: ") == err.count("hint: ") == 1, err
    for word in words:
        assert word in err, err


@pytest.fixture
def go(capsys):
    """train.main in this process, with the flags of a small run: its exit code, what it
    printed, and its errors."""

    def go(out, flags="", small=SMALL):
        capsys.readouterr()
        code = train.main([*small, "--out", str(out), *shlex.split(flags)])
        return code, *capsys.readouterr()

    return go


pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


@pytest.fixture
def no_training(monkeypatch):
    """Whoever trains here has looked too late."""

    def trains(*args, **kwargs):
        raise AssertionError("something was trained before the flags were refused")

    for trainer in METHODS.values():
        monkeypatch.setattr(trainer, "train", trains)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a finished small run of both methods, and in "printed" what it
    printed. It was made without a folder for temporary files. Copy it before you change
    it."""
    out = tmp_path_factory.mktemp("made") / "mein R\xfcckgrat"
    lack = {"TMPDIR": "/nowhere", "LC_ALL": "C", "cwd": "/"}
    process = start(*SMALL, "--method", "both", "--out", out, **lack)
    text, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (out / "printed").write_text(text)
    return out


@pytest.fixture
def finished(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "finished")


@pytest.fixture
def with_base(made, tmp_path):
    """A folder for a run, with the base model of the finished one."""
    shutil.copytree(made / "base", tmp_path / "out" / "base")
    return tmp_path / "out"


def last_table(text):
    """The numbers of the last table on the screen: first word of a row -> floats."""
    lines = text.splitlines()
    begin = max(i for i, line in enumerate(lines) if line.startswith("after "))
    rows = {}
    for line in lines[begin + 1 :]:
        if not re.match(r"\S+ +(-?\d+\.\d\d +)+-?\d+\.\d\d$", line):
            break
        label, *numbers = line.split()
        rows[label] = list(map(float, numbers))
    return rows


def accuracies(row):
    return [*row["new"].values(), *row["prior"].values()]


def shown_numbers(row):
    """What a table shows of an evaluation, with the digits that it shows."""
    numbers = [*accuracies(row), row["kl_student_base"]]
    return [float(f"{number:.2f}") for number in numbers]


# ---- What a run leaves and prints ----------------------------------------------------


def test_both_methods_write_results_with_the_promised_keys(made):
    for method in METHODS:
        results, _ = read(made, method)
        assert results["method"] == method and results["seed"] == 0
        assert set(results["seconds"]) == {"base", "fine_tune"}
        gate = results["teacher_gate"]
        assert set(gate) == {"student", "teacher", "only_student", "only_teacher",
                             "sampled", "skills"}  # fmt: skip
        assert list(gate["skills"]) == ["A", "B", "C"]
        assert sum(gate["skills"].values()) / 3 == pytest.approx(gate["teacher"])
        assert [stage["skill"] for stage in results["stages"]] == ["A", "B", "C"]
        for row in (results["base"], *results["stages"]):
            assert set(row["new"]) == {"A", "B", "C"} and len(row["prior"]) >= 4
            assert all(0 <= accuracy <= 1 for accuracy in accuracies(row))
        for stage in results["stages"]:
            assert stage["kl_student_base"] > -1e-6 and stage["seconds"] > 0
            assert (stage["kl_teacher_base"] is None) == (method == "sft")


def test_both_methods_start_from_the_same_base_and_see_the_same_tasks(made):
    (one, _), (other, rows) = read(made, "sft"), read(made, "sdft")
    assert one["base"] == other["base"] and one["teacher_gate"] == other["teacher_gate"]
    same = {key: other["config"][key] for key in one["config"]}
    assert {key for key in same if same[key] != one["config"][key]} == {"lr"}
    assert one["config"]["steps"] == 3  # a flag; without one, each has its own
    assert (one["config"]["lr"], same["lr"]) == (sft.Config.lr, sdft.Config.lr)
    ends = [row for row in rows if row.get("stage_end")]
    assert all(row["kl_teacher_student_by_position"] for row in ends)


def test_the_screen_shows_gate_tables_responses_and_files(made):
    out, text, final = made, (made / "printed").read_text(), {}
    for method in METHODS:
        part = text.split(f"\n{method}: ")[1].split("\nafter all skills")[0]
        part = part.split("\nsdft: ")[0]  # what sft printed ends there
        results, rows = read(out, method)
        evaluations = [row for row in rows if "new" in row]
        assert len(evaluations) == 4
        assert last_table(part) == dict(
            zip("-ABC", map(shown_numbers, evaluations), strict=True)
        )
        for row in evaluations:
            for said in row["responses"]:
                assert f"{said['prompt']}  ->  {said['response']}\n" in part
        final[method] = shown_numbers(evaluations[-1])
        assert f"{out / method}/results.json" in text
    gate = results["teacher_gate"]
    assert f"accuracy {gate['student']:.2f} without a demonstration, " in text
    assert f"{gate['teacher']:.2f} with one" in text
    assert last_table(text) == final and "after all skills" in text


def test_the_base_is_found_again_and_a_finished_run_is_kept(made, with_base, go):
    before = shutil.copytree(made / "sft", with_base / "sft")
    code, text, _ = go(with_base, "--method sft")
    assert code == 0 and "base model: found" in text
    one, other = read(with_base, "sft"), read(made, "sft")
    assert without_times(list(one)) == without_times(list(other))
    assert f"a new run in {before}; checkpoint.pt, metrics.jsonl, results.json kept, " \
        f"in {before}.previous1" in text  # fmt: skip
    assert files_in(with_base / "sft.previous1") == files_in(made / "sft")


@pytest.fixture(scope="module")
def seed_1(tmp_path_factory):
    """A folder with a run of another seed."""
    out = tmp_path_factory.mktemp("seed1") / "out"
    assert train.main([*SMALL, "--seed=1", "--method=sft", "--out", str(out)]) == 0
    return out


def test_another_seed_gives_another_base_and_other_skills(made, seed_1):
    one, other = (read(out, "sft")[1][0] for out in (made, seed_1))
    assert one["responses"][0]["prompt"] != other["responses"][0]["prompt"]
    assert base_file(seed_1).parent.name != base_file(made).parent.name


def test_the_last_method_trains_the_base_itself_and_not_a_copy(
    with_base, go, monkeypatch
):
    """A copy that nobody reads again is 28 GB of a model of 7B."""

    def alive():
        gc.collect()
        return {id(x) for x in gc.get_objects() if type(x) is GPT}

    before, models = alive(), {}
    for method, trainer in METHODS.items():

        def counted(*args, method=method, real=trainer.train):
            models[method] = len(alive() - before)
            return real(*args)

        monkeypatch.setattr(trainer, "train", counted)
    assert go(with_base, "--method both")[0] == 0
    assert models == {"sft": 2, "sdft": 1}


# ---- No training: --sample and --show ------------------------------------------------

PROMPT = "garden cork: candle spoon tower"


def greedy_by_hand(weights, config, tok, n=16):
    """The most likely token, one after the other, each time from the whole text."""
    gpt, ids = GPT(GPTConfig(**config)), tok.encode(PROMPT) + [tok.start]
    gpt.load_state_dict(weights)
    response = []
    with torch.no_grad():
        while len(response) < n and response[-1:] != [tok.end]:
            logits = gpt.eval()(torch.tensor([ids + response]))[0, -1]
            response.append(int(logits[: tok.n_tokens].argmax()))
    return tok.decode(response)


@pytest.mark.parametrize("methods", [["sft"], ["sdft"], ["sft", "sdft"]])
def test_sample_shows_what_base_and_trained_model_respond(methods, made, go):
    """It needs no flag but the folder: the run knows its sizes, its seed, its base."""
    method = methods[0] if len(methods) == 1 else "both"
    code, text, _ = go(made, f"--sample '{PROMPT}' --method {method}", [])
    assert code == 0
    weights = {"base": train.read_checkpoint(base_file(made))["model"]}
    for name in methods:
        saved = train.read_checkpoint(made / name / "checkpoint.pt")
        weights[name] = saved["models"]["student"]
        assert f"{made / name}: seed 0, after update 9 of 9" in text
    lines = [line for line in text.splitlines() if "seed" not in line]
    assert len(lines) == 3 * len(weights)
    for i, (name, each) in enumerate(weights.items()):
        shown = greedy_by_hand(each, saved["config"], data.Tokenizer())
        assert lines[3 * i] == f"{name:5s}  {shown}"
        assert all("sampled: " in line for line in lines[3 * i + 1 : 3 * i + 3])


@pytest.mark.parametrize("flags", ["--sample x", "--show"])
def test_a_typo_in_out_leaves_no_folder(flags, go, tmp_path):
    assert_refused(go(tmp_path / "typo", flags, []), "typo")
    assert list(tmp_path.iterdir()) == []


def test_sample_without_a_base_shows_the_model_and_says_so(made, go, tmp_path):
    shutil.copytree(made / "sdft", tmp_path / "sdft")
    code, text, _ = go(tmp_path, "--sample x", [])
    assert code == 0 and "not shown" in text and "is gone" in text
    assert any(line.startswith("sdft  ") for line in text.splitlines())


def test_show_prints_the_tables_of_finished_runs_and_their_ends_as_one(
    made, seed_1, go
):
    """Of one folder, and of several, whatever --out is."""
    both = [(made, method, 0) for method in METHODS]
    one = [(seed_1, "sft", 1)]
    for out, folders, runs in (
        (made, [], both), (seed_1, [], one), (made, [seed_1, made], one + both)
    ):  # fmt: skip
        code, text, _ = go(out, shlex.join(["--show", *map(str, folders)]), [])
        parts = text.split("\nafter ")[1:]
        assert code == 0 and len(parts) == len(runs) + (len(runs) > 1)
        for (out, method, seed), part in zip(runs, parts, strict=False):
            rows = [row for row in read(out, method)[1] if "new" in row]
            expected = dict(zip("-ABC", map(shown_numbers, rows), strict=True))
            assert last_table(f"after {part}") == expected
            label = f"{out / method}, seed {seed}"
            assert f"\n{label}, " in text
            if len(runs) > 1:
                (end,) = re.findall(rf"(?m)^{label} (.*)", parts[-1])
                assert list(map(float, end.split())) == shown_numbers(rows[-1])
    empty = made / "base"
    assert_refused(go(empty, "--show", []), f"no finished run in {empty}")


# ---- The teacher gate ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "sdft", "both"])
def test_a_demonstration_that_does_not_help_stops_sdft_and_warns_sft(
    method, with_base, go
):
    """SFT needs no teacher: there it is a warning, and the run goes on to its end."""
    result = code, text, err = go(with_base, f"--gate-margin .9 --method {method}")
    message = "a demonstration does not help enough: "
    assert re.search(message + r"[01]\.\d\d - [01]\.\d\d < --gate-margin 0\.9",
                     text + err)  # fmt: skip
    if method == "sft":
        assert code == 0 and f"warning: {message}" in text and not err, err
        assert len(read(with_base, "sft")[0]["stages"]) == 3
    else:
        assert_refused(result, message, "nothing to distil", "--gate-margin -1 goes on")
        assert {path.name for path in with_base.iterdir()} == {"base", "lock"}


@pytest.mark.parametrize(("skills", "earlier", "now", "then"), [
    ({"A": 0.9, "B": 0.51}, [], 0.5, None),  # a skill is compared with itself
    ({"A": 0.4, "B": 0.53}, [], 0.5, "0.53"),
    ({"A": 0.4}, [], 0.0, None),  # it was not graded
    (None, [], 0.5, None),
    ({"A": 0.9, "B": 0.2}, [("A", 0.9), ("B", 0.6)], 0.5, "0.60"),
    ({"A": 0.9, "B": 0.2}, [("A", 0.9), ("B", None)], 0.5, None),
    ({"A": 0.9, "B": 0.9}, [], None, None),  # SFT
    (None, [("B", 0.6), ("B", 0.4)], 0.5, "0.60"),
])  # fmt: skip
def test_a_teacher_that_has_fallen_is_told_by_skill(skills, earlier, now, then):
    row = {"step": 3, "skill": "B", "stage_end": True, "new": {"A": 0.5, "B": 0.5},
           "prior": {}, "responses": [], "kl_student_base": 0.0}  # fmt: skip
    before = [{**row, "skill": s, "teacher_gate": x} for s, x in earlier]
    gate = {"teacher": 0.99, "skills": skills} if skills else None
    text = train.describe({**row, "teacher_gate": now}, before, gate)
    warnings = re.findall(r"warning: on B the teacher has fallen from (\S+):", text)
    assert warnings == ([then] if then else [])
    assert ("the teacher, shown the demonstration" in text) == (now is not None)


# ---- Flags ---------------------------------------------------------------------------


def test_there_are_at_most_40_flags_and_each_is_explained():
    """--help is one of them."""
    actions = train.make_parser()._actions
    assert len(actions) <= 40
    assert all(action.help for action in actions)


def values_of(argv):
    """What a run takes from flags: {"sft.lr": 6e-4, ..., "eval_size": 400, ...}."""
    args = train.parse_args(["--method", "both", *argv])
    values = {name: getattr(args, name) for name in train.USUAL}
    for method in METHODS:
        for name, value in asdict(train.config_of(method, args)).items():
            values[f"{method}.{name}"] = value
    return values


def test_a_given_value_counts_with_quick_even_where_it_is_the_default():
    usual, quick = values_of([]), values_of(["--quick"])
    changed = {key for key in usual if quick[key] != usual[key]}
    assert changed == {*train.QUICK, "sft.steps", "sdft.steps"} - {"steps"}
    for key in changed:
        name = key.split(".")[-1]
        assert quick[key] == train.QUICK[name]
        flag = f"--{name.replace('_', '-')}={usual[key]}"
        for argv in ([flag, "--quick"], ["--quick", flag]):
            same = [each for each in usual if each.split(".")[-1] == name]
            now = {**quick, **dict.fromkeys(same, usual[key])}
            assert values_of(argv) == now


OTHER_VALUES = {"kl": "jsd", "skip_first_tokens": 3, "eval_every": 5}


def test_every_flag_of_a_setting_reaches_the_settings():
    """And no setting has none, but for three. What a setting then changes is in
    test_reliability."""
    assert train.HIDDEN == ("beta2", "weight_decay", "grad_clip")
    for method, trainer in METHODS.items():
        usual = asdict(trainer.Config())
        for name in usual.keys() - set(train.HIDDEN):
            value = OTHER_VALUES.get(name) or train.RANGES[name][0]
            if value == usual[name]:
                value = train.RANGES[name][1]
            assert value != usual[name]
            argv = ["--method", method, f"--{name.replace('_', '-')}={value}"]
            now = asdict(train.config_of(method, train.parse_args(argv)))
            assert now == {**usual, name: value}, name


def test_every_flag_of_the_model_reaches_the_base():
    """--n-embd sets all that goes with it: heads of 16 channels, the MLP's width."""
    usual, _ = train.base_settings(train.parse_args([]), 1)
    assert usual == GPTConfig(n_tokens=data.Tokenizer().n_tokens)
    now, _ = train.base_settings(train.parse_args(["--n-layer=7"]), 1)
    assert now == replace(usual, n_layer=7)
    now, _ = train.base_settings(train.parse_args(["--n-embd=48"]), 1)
    wide = {"n_embd": 48, "n_inner": 256, "head_dim": 16}
    assert now == replace(usual, n_head=3, n_kv_head=3, **wide)
    cfg = train.base_settings(train.parse_args(["--base-steps=8", "--seed=4"]), 1)[1]
    assert cfg == replace(train.BASE, steps=8, warmup_steps=2, seed=4)


def test_every_other_flag_is_read():
    """Those that are no setting of a trainer or a model, one by one."""
    read_ones = set(re.findall(r"\bargs\.(\w+)", (ROOT / "train.py").read_text()))
    settings = {f.name for trainer in METHODS.values() for f in fields(trainer.Config)}
    others = {action.dest for action in train.make_parser()._actions} - settings
    assert {"out", "show", "distance", "threads", "n_embd"} < others
    assert others - read_ones == {"help"}


def test_help_lists_every_setting_with_its_default():
    text = " ".join(train.make_parser().format_help().split())
    for name, value in vars(sdft.Config()).items():
        flag, other = "--" + name.replace("_", "-"), getattr(sft.Config, name, value)
        shown = f"{value}, sft: {other}" if other != value else value
        found = re.search(rf"{flag} .*?{re.escape(f'(default: {shown})')}", text)
        assert bool(found) == (name not in train.HIDDEN), flag


@pytest.mark.parametrize("name", train.RANGES)
def test_a_value_within_its_range_is_taken_and_one_outside_is_refused(name):
    low, high = train.RANGES[name]
    flag, parse = "--" + name.replace("_", "-"), train.make_parser().parse_args
    whole = isinstance(getattr(parse([f"{flag}={low}"]), name), int)
    for value in (low, high):
        assert getattr(parse([f"{flag}={value}"]), name) == value
    beyond = low - (1 if whole else 1e-4), high + (1 if whole else 1e-4 * high)
    for value in (*beyond, "nan", "inf", "-inf", "one", "", *["2.5"] * whole):
        with pytest.raises(train.UserError, match=flag):
            parse([f"{flag}={value}"])


def test_a_batch_that_cannot_be_shared_out_names_what_can_be_changed():
    for name, batch, n, parts in ("base model", 64, 5, 1), ("sft", 64, 2, 3):
        cfg = sft.Config(batch_size=batch, micro_batches=parts)
        with pytest.raises(train.UserError, match=f"^{name}: .*equal parts") as caught:
            train.check_batches(name, cfg, n, 999)
        for word in (f"multiple of {n * parts}", "another number of processes"):
            assert word in caught.value.hint


# ---- Bad input -----------------------------------------------------------------------

BAD = {
    "--steps 0": "--steps",
    "--batch-size 0": "--batch-size",
    "--ema-rate 1.5": "--ema-rate",
    "--temperature 0": "--temperature",
    "--dropout 1": "--dropout",
    "--lr nan": "--lr",
    "--seed one": "--seed",
    "--sdft.lr": "--sdft.lr",
    "--kl both": "--kl",
    "--method grpo": "--method",
    "--max 7": "--max",
    "typed": "typed",
    "--device cuda:99": "CUDA devices found",
    "--device abacus": "--device abacus",
    "--device meta": "meta",
    "--n-embd 30": "--n-embd 30 is not a multiple of 16",
    "--batch-size 64 --micro-batches 3 --demos 64": "multiple of 3",
    "--method both --batch-size 17": "batch size 17 > 16 examples",
    "--max-new-tokens 400": "> 128 tokens",
    "--max-new-tokens 8 --skip-first-tokens 8": "leaves nothing",
    "--sample x --method sft": "no run of sft",
    "--show": "no finished run",
    "--shard": "--shard needs --init",
    "--out /proc/not-writable": "/proc/not-writable",
    **{f"{flag} 1": f"unrecognized arguments: {flag}" for flag in (
        "--beta2", "--weight-decay", "--grad-clip", "--sft.lr", "--sdft.kl", "--base",
        "--teacher", "--compare", "--n-head", "--n-kv-head", "--n-inner", "--dtype",
        "--debug", "--plot", "--stpes",
    )},
}  # fmt: skip


def bad_argv(flags, out):
    """A small run with these flags."""
    return [*SMALL, "--out", str(out), *shlex.split(flags)]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_an_error_and_a_hint_before_anything_is_made(
    flags, tmp_path, capsys, no_training
):
    code = train.main(bad_argv(flags, tmp_path / "out"))
    assert_refused((code, *capsys.readouterr()), BAD[flags])
    assert not (tmp_path / "out").exists()


# ---- Signals, and the end of a run ---------------------------------------------------


@pytest.mark.parametrize("code", [0, 2, 3, 143])
def test_signals_have_their_former_handlers_when_main_has_ended(
    code, with_base, monkeypatch
):
    """A notebook has its own. The run is done, refused, not finite, or stopped."""

    def not_finite(*args):
        raise FloatingPointError("step 0: loss nan")

    def own(*args):
        pass

    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, own) for number in numbers]
    if code == 3:
        monkeypatch.setattr(sft, "check_finite", not_finite)
    argv = [*SMALL, "--method", "sft", "--out", str(with_base)]
    argv += ["--steps", "x"] * (code == 2)
    try:
        step = 1 if code == 143 else None
        assert stop_at(step, signal.SIGTERM, argv) == code
        assert [signal.getsignal(number) for number in numbers] == [own, own]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ---- Training ------------------------------------------------------------------------


def small_run(method, folder, tasks=(), **changes):
    """Ten steps of a method from random weights."""
    config = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=48)
    torch.set_num_threads(1)
    student = GPT(config, data.make_rng(0, "weights"))
    with torch.no_grad():  # far from uniform, so that teacher and student differ
        for p in student.parameters():
            if p.dim() == 2:
                p *= 12
    settings = {"steps": 10, "batch_size": 8, "log_every": 1, "lr": 1e-3}
    settings |= {"warmup_steps": 3, "ema_rate": 0.01, **changes}
    names = {field.name for field in fields(METHODS[method].Config)}
    cfg = METHODS[method].Config(**{k: v for k, v in settings.items() if k in names})
    args = {"A": data.make_demos(data.World(0), "A", 16, 0)}, tasks, data.Tokenizer()
    METHODS[method].train(student, *args, cfg, train.Run(folder))


LOSSES = {
    "sft": [7.06632, 6.99271, 6.61091, 6.65224, 6.49682, 6.27526, 6.05051, 5.9048,
            5.9749, 5.90992],
    "sdft": [1.02556, 0.94364, 1.12707, 1.01788, 1.04327, 1.02999, 1.06851, 0.90693,
             0.9264, 0.92122],
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_ten_losses_are_the_stored_ones(method, tmp_path):
    """A change that moves them says why in its commit."""
    small_run(method, tmp_path)
    losses = [row["loss"] for row in train.read_metrics(tmp_path)]
    assert losses == pytest.approx(LOSSES[method], abs=1e-4)


NONE_ENDS = "EOS rate 0 %, mean length 2.0: .*--max-new-tokens"


@pytest.mark.parametrize(("length", "ends", "skip", "warning"), [
    (2, False, 0, NONE_ENDS), (1, True, 0, "every response is empty"),
    (2, True, 3, "the gradient is 0"), (3, True, 2, None),
])  # fmt: skip
def test_responses_from_which_little_is_learnt_are_reported(
    length, ends, skip, warning, tmp_path, monkeypatch, capsys
):
    """None comes to its end, each is empty, or none has a token in the loss."""

    def generate(model, prompts, lengths, R, end, *args):
        response = torch.full((len(lengths), length), 300)
        response[:, -1] = end if ends else 300
        return response, torch.ones_like(response, dtype=torch.bool)

    monkeypatch.setattr(sdft, "generate", generate)
    small_run("sdft", tmp_path, micro_batches=2, skip_first_tokens=skip)
    text = capsys.readouterr().out
    assert len(re.findall(f"warning: {warning}", text)) == (10 if warning else 0)
    assert text.count("warning: ") == (10 if warning else 0)


# ---- The README ----------------------------------------------------------------------


def test_the_two_commands_of_a_newcomer_are_in_the_readme_and_run(with_base, go):
    """All others are tried in test_readme."""
    two = "pip install -r requirements.txt\npython train.py --method sdft\n"
    assert f"```bash\n{two}```" in (ROOT / "README.md").read_text()
    code, _, err = go(with_base, "--method sdft")
    assert code == 0 and (with_base / "sdft" / "results.json").exists(), err
