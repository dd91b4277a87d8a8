"""The command line as a user runs it: real files, small models, and real processes
where it matters."""

import gc
import json
import math
import os
import re
import shlex
import shutil
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
    "--n-layer 1 --n-head 2 --n-kv-head 1 --n-embd 32 --n-inner 48 --base-steps 4 "
    "--steps 3 --batch-size 8 --demos 16 --eval-size 8 --gate-margin -1 --log-every 1 "
    "--device cpu --threads 1"
)
METHODS = {"sft": sft, "sdft": sdft}


def command(*args):
    return [sys.executable, str(ROOT / "train.py"), *map(str, args)]


def start(*args, cwd=ROOT, launcher=None, **environment):
    argv = [*launcher, *command(*args)[1:]] if launcher else command(*args)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, cwd=cwd, env=env, **pipes)


def run(*args, **kwargs):
    """As a process of its own: its exit code and what it printed."""
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def read(out, method):
    results = json.loads((out / method / "results.json").read_text())
    lines = (out / method / "metrics.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def without_times(x):
    if isinstance(x, dict):
        times = ("seconds", "base_seconds")
        return {k: without_times(v) for k, v in x.items() if k not in times}
    return [without_times(v) for v in x] if isinstance(x, list) else x


def files_in(folder):
    """Every file below, with its bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def last_table(text):
    """The numbers of the last table on the screen: first word of a row -> floats."""
    lines = text.splitlines()
    begin = max(i for i, line in enumerate(lines) if line.startswith("after "))
    rows = {}
    for line in lines[begin + 1 :]:
        words = line.split()
        if not re.match(r"(\S+(, seed \d+)?) +(-?\d+\.\d\d +)+-?\d+\.\d\d$", line):
            break
        rows[words[0]] = [float(word) for word in words[1:] if "." in word]
    return rows


def accuracies(row):
    return [*row["new"].values(), *row["prior"].values()]


def shown_numbers(row):
    """What a table shows of an evaluation, with the digits that it shows."""
    numbers = [*accuracies(row), row["kl_student_base"]]
    return [float(f"{number:.2f}") for number in numbers]


pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


@pytest.fixture
def call(capsys):
    """train.main in this process: its exit code and what it printed."""

    def call(*args):
        capsys.readouterr()
        code = train.main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with one finished small run of both methods, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    code, text, err = run(*SMALL, "--method", "both", "--out", out)
    assert code == 0, err
    return out, text


@pytest.fixture
def with_base(finished, tmp_path):
    """A folder for a run, with the base model of the finished one."""
    out = tmp_path / "out"
    out.mkdir()
    os.symlink(finished[0] / "base", out / "base")
    return out


def base_file(out):
    (path,) = (out / "base").glob("*/base.pt")
    return path


# ---- What a run leaves and prints --------------------------------------------------


def test_both_methods_write_results_with_the_promised_keys(finished):
    for method in METHODS:
        results, _ = read(finished[0], method)
        assert results["method"] == method and results["seed"] == 0
        assert set(results["seconds"]) == {"base", "fine_tune"}
        assert set(results["teacher_gate"]) == {
            "student", "teacher", "only_student", "only_teacher", "sampled"
        }  # fmt: skip
        assert [stage["skill"] for stage in results["stages"]] == ["A", "B", "C"]
        for row in (results["base"], *results["stages"]):
            assert set(row["new"]) == {"A", "B", "C"} and len(row["prior"]) >= 4
            assert all(0 <= accuracy <= 1 for accuracy in accuracies(row))
        for stage in results["stages"]:
            assert stage["kl_student_base"] > -1e-6 and stage["seconds"] > 0
            assert (stage["kl_teacher_base"] is None) == (method == "sft")


def test_both_methods_start_from_the_same_base_and_see_the_same_tasks(finished):
    (one, _), (other, _) = read(finished[0], "sft"), read(finished[0], "sdft")
    assert one["base"] == other["base"] and one["teacher_gate"] == other["teacher_gate"]
    shared = set(one["config"]) - {"lr"}  # each method has its own
    assert {key: other["config"][key] for key in shared} == {
        key: one["config"][key] for key in shared
    }


def test_sdft_records_what_sft_records_and_more(finished):
    (_, sft_rows), (_, sdft_rows) = read(finished[0], "sft"), read(finished[0], "sdft")
    steps = [row for row in sdft_rows if "loss" in row]
    assert len(steps) == 9 and all(math.isfinite(row["loss"]) for row in steps)
    extra = {"kl_student_teacher", "student_entropy", "teacher_entropy"}
    assert set(steps[0]) - set(sft_rows[1]) == extra
    assert set(sft_rows[1]) <= set(steps[0])
    ends = [row for row in sdft_rows if row.get("stage_end")]
    assert all(row["kl_teacher_student_by_position"] for row in ends)


def test_the_screen_shows_gate_tables_responses_and_files(finished):
    out, text = finished
    final = {}
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


def test_the_base_is_found_again_and_a_finished_run_is_kept(finished, with_base, call):
    before = shutil.copytree(finished[0] / "sft", with_base / "sft")
    code, text, _ = call(*SMALL, "--method", "sft", "--out", with_base)
    assert code == 0 and "base model: found" in text
    for one, other in zip(
        read(with_base, "sft"), read(finished[0], "sft"), strict=True
    ):
        assert without_times(one) == without_times(other)
    kept = f"a new run in {before}; the finished one there is kept, as "
    assert f"{kept}{before}.previous1" in text
    assert files_in(with_base / "sft.previous1") == files_in(finished[0] / "sft")


def test_another_seed_gives_another_base_and_other_skills(finished, call, tmp_path):
    code, text, _ = call(*SMALL, "--method", "sft", "--seed", 1, "--out", tmp_path)
    assert code == 0 and "base model: found" not in text
    one, other = read(finished[0], "sft")[1][0], read(tmp_path, "sft")[1][0]
    assert one["responses"][0]["prompt"] != other["responses"][0]["prompt"]
    assert base_file(tmp_path).parent.name != base_file(finished[0]).parent.name


# ---- A given base ------------------------------------------------------------------


def test_a_base_from_elsewhere_gives_the_same_run(finished, call, tmp_path):
    """In another folder and under another name; nothing is made beside it."""
    mine, out = tmp_path / "elsewhere" / "mine.pt", tmp_path / "out"
    mine.parent.mkdir()
    shutil.copy(base_file(finished[0]), mine)
    args = [*SMALL[:10], *SMALL[12:]]  # a base that is made takes no --base-steps
    assert "--base-steps" not in args and len(args) == len(SMALL) - 2
    code, text, err = call(*args, "--base", mine, "--method", "sft", "--out", out)
    assert code == 0, err
    assert [path.name for path in mine.parent.iterdir()] == ["mine.pt"]
    assert not (out / "base").exists()
    for one, other in zip(read(out, "sft"), read(finished[0], "sft"), strict=True):
        assert without_times(one) == without_times(other)
    # and it is found again from the checkpoint, which says where it was
    code, text, _ = call("--sample", "kitchen horn: apple", "--method", "sft",
                         "--out", out)  # fmt: skip
    assert code == 0 and "\nbase " in text


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BAD_BASES = {
    "of another seed": (lambda path, out: ["--seed", 1], "seed: 0 -> 1"),
    "of other sizes": (lambda path, out: ["--n-embd", 48], "n_embd: 32 -> 48"),
    "damaged": (lambda path, out: flip_a_bit(path) or [], "checksum differs"),
    "cut": (lambda path, out: os.truncate(path, 999) or [], "999 bytes, checksum"),
    "a text": (lambda path, out: path.write_text("mine") * 0 * [""], "4 bytes"),
    "a fine-tuned model": (
        lambda path, out: shutil.copy(out / "sft" / "checkpoint.pt", path) and [],
        "is no base model",
    ),
    "missing": (lambda path, out: path.unlink() or [], "no such file"),
    "a folder": (lambda path, out: path.unlink() or path.mkdir() or [], "no such file"),
}


@pytest.mark.parametrize("kind", BAD_BASES)
def test_a_given_base_that_does_not_fit_is_refused(kind, finished, call, tmp_path):
    path = Path(shutil.copy(base_file(finished[0]), tmp_path / "base.pt"))
    spoil, message = BAD_BASES[kind]
    args = [arg for arg in SMALL if arg not in ("--base-steps", "4")]
    args += ["--base", path, "--out", tmp_path / "out"]
    code, _, err = call(*args, *spoil(path, finished[0]))
    assert code == 2 and err.count("error: ") == err.count("hint: ") == 1
    assert f"error: {path}" in err and message in err
    assert not (tmp_path / "out").exists()


# ---- No training: --sample, --show, --compare --------------------------------------

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


def test_sample_shows_what_base_and_trained_model_respond(finished, call):
    tok, out = data.Tokenizer(), finished[0]
    code, text, _ = call("--sample", PROMPT, "--method", "both", "--out", out)
    assert code == 0
    weights = {"base": train.read_checkpoint(base_file(out))["model"]}
    for method in METHODS:
        saved = train.read_checkpoint(out / method / "checkpoint.pt")
        weights[method] = saved["models"]["student"]
    lines = text.splitlines()
    for name, each in weights.items():
        (i,) = (i for i, line in enumerate(lines) if line.split()[:1] == [name])
        shown = greedy_by_hand(each, saved["config"], tok)
        assert lines[i] == f"{name:5s}  {shown}"
        assert all("sampled: " in line for line in lines[i + 1 : i + 3])


@pytest.fixture(scope="module")
def two_seeds(finished, tmp_path_factory):
    """A folder whose run has seed 1, and other sizes than the default."""
    out = tmp_path_factory.mktemp("seed1") / "out"
    flags = "--seed", "1", "--method", "sft", "--sft.lr", "0.01"
    assert train.main([*SMALL, *flags, "--out", str(out)]) == 0
    return out


def test_sample_takes_the_run_of_its_seed_and_names_another(two_seeds, call):
    """Silently showing another model would be worse than showing none."""
    args = ["--sample", PROMPT, "--method", "sft", "--out", two_seeds]
    code, _, err = call(*args)
    assert code == 2 and "seed: 1 -> 0" in err
    hint = re.search(r"hint: (--seed 1) shows it", err)[1]
    code, text, err = call(*args, *hint.split())
    assert code == 0 and "sft: seed 1, after update 9 of 9" in text, err


@pytest.mark.parametrize(("flags", "message"), {
    "--n-embd 48": "n_embd: 32 -> 48",
    "--lr 0.5": "lr: 0.01 -> 0.5",
    "--sft.lr 0.5": "lr: 0.01 -> 0.5",
    "--steps 4 --n-layer 1": "steps: 3 -> 4",
    "--max-new-tokens 5": "max_new_tokens: 16 -> 5",
}.items())  # fmt: skip
def test_sample_refuses_flags_that_contradict_the_run(flags, message, two_seeds, call):
    args = ["--sample", PROMPT, "--method", "sft", "--seed", 1, "--out", two_seeds]
    code, text, err = call(*args, *flags.split())
    assert code == 2 and message in err and "sampled" not in text


def test_sample_accepts_the_flags_of_the_run(two_seeds, call):
    args = ["--sample", PROMPT, "--method", "sft", "--seed", 1, "--out", two_seeds]
    code, text, err = call(*SMALL, "--sft.lr", "0.01", *args)
    assert code == 0 and text.count("sampled: ") == 4, err


@pytest.mark.parametrize("flags", ["--sample x", "--show", "--compare typo"])
def test_a_typo_in_out_leaves_no_folder(flags, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*flags.split(), *["--out", "typo"] * ("typo" not in flags))
    assert code == 2 and "typo" in err and "hint: " in err
    assert list(tmp_path.iterdir()) == []


def test_sample_names_the_step_of_a_run_that_was_stopped(with_base, call, monkeypatch):
    real = train.Run.stop_wanted

    def stop_wanted(run_):
        run_.calls = getattr(run_, "calls", 0) + 1
        return 1.0 if run_.calls == 5 else real(run_)

    monkeypatch.setattr(train.Run, "stop_wanted", stop_wanted)
    code, _, err = call(*SMALL, "--out", with_base)
    assert code != 0 and "to go on" in err
    code, text, _ = call("--sample", PROMPT, "--out", with_base)
    assert code == 0 and "after update 5 of 9" in text


def test_sample_without_a_base_shows_the_model_and_says_so(finished, call, tmp_path):
    shutil.copytree(finished[0] / "sdft", tmp_path / "out" / "sdft")
    code, text, _ = call("--sample", PROMPT, "--out", tmp_path / "out")
    assert code == 0 and "not shown" in text and "is gone" in text
    assert any(line.startswith("sdft  ") for line in text.splitlines())


def test_the_last_method_trains_the_base_itself_and_not_a_copy(
    with_base, call, monkeypatch
):
    """A copy that nobody reads again is 28 GB of a model of 7B."""

    def alive():
        gc.collect()
        return {id(x) for x in gc.get_objects() if type(x) is GPT}

    before, models = alive(), {}
    for method in METHODS:
        real = train.METHODS[method].train

        def counted(*args, method=method, real=real):
            models[method] = len(alive() - before)
            return real(*args)

        monkeypatch.setattr(train.METHODS[method], "train", counted)
    code, _, err = call(*SMALL, "--method", "both", "--out", with_base)
    assert code == 0, err
    assert models == {"sft": 2, "sdft": 1}


def test_show_prints_the_tables_of_the_finished_runs_again(finished, call):
    out, before = finished
    code, text, _ = call("--show", "--out", out)
    assert code == 0
    sft_part, sdft_part = text.split("\nsdft, ")
    for method, part in ("sft", sft_part), ("sdft", sdft_part):
        rows = [row for row in read(out, method)[1] if "new" in row]
        expected = dict(zip("-ABC", map(shown_numbers, rows), strict=True))
        assert last_table(part) == expected
        assert f"{out / method}, seed 0" in part


def test_compare_shows_the_ends_of_several_runs_as_one_table(
    finished, two_seeds, call
):
    code, text, _ = call("--compare", two_seeds, finished[0])
    assert code == 0 and text.count("KL(student || base)") == 1
    for out, method, seed in (
        (two_seeds, "sft", 1), (finished[0], "sft", 0), (finished[0], "sdft", 0)
    ):  # fmt: skip
        rows = [row for row in read(out, method)[1] if "new" in row]
        line = next(s for s in text.splitlines() if s.startswith(f"{out / method},"))
        label, numbers = line.split(f", seed {seed} ")
        assert [float(x) for x in numbers.split()] == shown_numbers(rows[-1])
    code, _, err = call("--compare", finished[0], finished[0] / "base")
    assert code == 2 and f"no finished run in {finished[0] / 'base'}" in err


# ---- Flags -------------------------------------------------------------------------


def values_of(args):
    """What a run takes from flags: {"sft.lr": 6e-4, ..., "eval_size": 400, ...}."""
    values = {name: getattr(args, name) for name in train.QUICK if name != "steps"}
    for method in METHODS:
        for name, value in asdict(train.config_of(method, args)).items():
            values[f"{method}.{name}"] = value
    return values


def test_a_given_value_counts_with_quick_even_where_it_is_the_default():
    usual = values_of(train.parse_args(["--method", "both"]))
    quick = values_of(train.parse_args(["--method", "both", "--quick"]))
    changed = {key for key in usual if quick[key] != usual[key]}
    assert changed == {*train.QUICK, "sft.steps", "sdft.steps"} - {"steps"}
    for key in changed:
        name = key.split(".")[-1]
        assert quick[key] == train.QUICK[name]
        flag = f"--{key.replace('_', '-')}={usual[key]}"
        for argv in ([flag, "--quick"], ["--quick", flag]):
            values = values_of(train.parse_args(["--method", "both", *argv]))
            assert values == {**quick, key: usual[key]}
    for method in METHODS:  # not only by the flag's longer name
        steps = usual[f"{method}.steps"]
        argv = ["--method", method, "--quick", f"--steps={steps}"]
        assert train.config_of(method, train.parse_args(argv)).steps == steps


def test_a_flag_of_one_method_leaves_the_other_as_it_is(with_base, call):
    args = [*SMALL, "--method", "both", "--lr", "0.003", "--sdft.lr", "0.004"]
    code, text, err = call(*args, "--sft.steps", "2", "--out", with_base)
    assert code == 0, err
    given = {m: read(with_base, m)[0]["config"] for m in METHODS}
    assert (given["sft"]["lr"], given["sdft"]["lr"]) == (0.003, 0.004)
    assert (given["sft"]["steps"], given["sdft"]["steps"]) == (2, 3)
    assert [len(read(with_base, m)[1]) for m in METHODS] == [6 + 4, 9 + 4]


def test_a_method_has_its_own_defaults_unless_a_flag_is_given(finished):
    given = {m: read(finished[0], m)[0]["config"] for m in METHODS}
    assert given["sft"]["steps"] == given["sdft"]["steps"] == 3  # a flag
    assert given["sft"]["lr"] == sft.Config.lr != sdft.Config.lr == given["sdft"]["lr"]


NO_EFFECT = {  # flags -> the one that is named
    "--method sft --kl reverse": "--kl",
    "--method sft --teacher live": "--teacher",
    "--method sft --sdft.lr 1": "--sdft.lr",
    "--method sdft --sft.lr 1": "--sft.lr",
    "--method sft --sdft.kl jsd": "--sdft.kl",
    "--teacher frozen --ema-rate 0.5": "--ema-rate",
    "--method both --sdft.teacher live --sdft.ema-rate 0.5": "--ema-rate",
    "--base x.pt --base-steps 7": "--base-steps",
    "--show --lr 1": "--lr",
    "--show --seed 0": "--seed",
    "--show --resume": "--resume",
    "--show --quick": "--quick",
    "--compare a b --method sft": "--method",
    "--compare a --show": "--show",
    "--sample x --plot": "--plot",
    "--sample x --resume": "--resume",
    "--sample x --base y.pt": "--base",
    "--method sft --lr 1 --sft.lr 2": "--lr",
    "--method both --lr 1 --sft.lr 2 --sdft.lr 3": "--lr",
    "--method both --kl jsd --sdft.kl reverse": "--kl",
}


@pytest.mark.parametrize("flags", NO_EFFECT)
def test_a_flag_without_effect_is_refused(flags, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*flags.split())
    assert code == 2 and f"error: {NO_EFFECT[flags]} has no effect with" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [
    "--method both --kl reverse --sdft.lr 1 --lr 2", "--teacher ema --ema-rate 0.5",
    "--show --plot", "--sample x --steps 3", "--base x.pt --seed 3",
])  # fmt: skip
def test_flags_that_have_an_effect_are_accepted(flags):
    assert train.parse_args(flags.split()).given


OTHER_VALUES = {"kl": "jsd", "teacher": "live", "skip_first_tokens": 3, "eval_every": 5}


def test_every_flag_of_a_setting_reaches_the_settings():
    """By both of its names. What a setting then changes is in test_reliability."""
    for method, trainer in METHODS.items():
        usual = asdict(trainer.Config())
        for name in usual:
            value = OTHER_VALUES.get(name) or train.RANGES[name][0]
            if value == usual[name]:
                value = train.RANGES[name][1]
            assert value != usual[name]
            for flag in [name] + [f"{method}.{name}"] * (name != "seed"):
                argv = ["--method", method, f"--{flag.replace('_', '-')}={value}"]
                now = asdict(train.config_of(method, train.parse_args(argv)))
                assert now == {**usual, name: value}, flag


@pytest.mark.parametrize("name", train.MODEL_FLAGS)
def test_every_flag_of_the_model_reaches_the_base(name):
    usual, _ = train.base_settings(train.parse_args([]), 1)
    value = getattr(usual, name) * 2 if name != "n_kv_head" else 1
    flag = f"--{name.replace('_', '-')}={value}"
    now, _ = train.base_settings(train.parse_args([flag]), 1)
    assert now == replace(usual, head_dim=0, **{name: value})


def test_every_other_flag_is_read():
    """Those that are no setting of a trainer or a model, one by one."""
    source = (ROOT / "train.py").read_text()
    read_ones = set(re.findall(r"\bargs\.(\w+)", source))
    settings = {f.name for trainer in METHODS.values() for f in fields(trainer.Config)}
    others = {
        action.dest
        for action in train.make_parser()._actions
        if action.dest.partition(".")[2] not in settings
        and action.dest not in settings | set(train.MODEL_FLAGS)
    }
    assert {"out", "base", "show", "distance", "threads"} < others
    assert '"--debug" in argv' in source  # before there are args
    assert others - read_ones - {"help", "debug"} == set()


def test_help_lists_every_setting_with_its_default():
    text = " ".join(train.make_parser().format_help().split())
    for config in (sft.Config, sdft.Config):
        for name, value in vars(config()).items():
            shown = f"(default: {value})"
            other = getattr(sft.Config, name, getattr(sdft.Config, name))
            if other != getattr(sdft.Config, name):
                shown = f"(default: {getattr(sdft.Config, name)}, sft: {other})"
            flag = "--" + name.replace("_", "-")
            assert re.search(rf"{flag} .*?{re.escape(shown)}", text), flag


# ---- Bad input ---------------------------------------------------------------------

BAD = {
    "--lr nan": "--lr",
    "--lr -1": "--lr",
    "--temperature -1": "--temperature",
    "--steps 0": "--steps",
    "--steps 2.5": "--steps",
    "--batch-size 0": "--batch-size",
    "--ema-rate 1.5": "--ema-rate",
    "--seed one": "--seed",
    "--kl both": "--kl",
    "--teacher nobody": "--teacher",
    "--method grpo": "--method",
    "--sft.lr -1 --method both": "--sft.lr",
    "--sft.kl reverse": "--sft.kl",
    "--stpes 5": "did you mean --steps",
    "--max 7": "--max",
    "--device cuda:99": "CUDA devices found",
    "--device abacus": "--device abacus",
    "--n-embd 30 --n-head 4": "30",
    "--n-embd 12 --n-head 4 --n-kv-head 2": "even",
    "--n-head 4 --n-kv-head 3": "3",
    "--batch-size 64 --micro-batches 3": "multiple of 3",
    "--demos 16 --batch-size 64": "--demos",
    "--max-new-tokens 400": "more than 128 together",
    "--sample x --method sft": "no run of sft",
    "--show": "no finished run",
    "--base missing.pt": "missing.pt: no such file",
    "--out /proc/not-writable": "/proc/not-writable",
}


def bad_argv(flags, out):
    """A small run with these flags; without those that would themselves be refused."""
    small = SMALL
    if re.search("--n-|--show", flags):
        small = []
    if "--base " in flags:
        small = [arg for arg in SMALL if arg not in ("--base-steps", "4")]
    return [*small, "--out", str(out), *shlex.split(flags)]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_an_error_a_hint_and_exit_2(flags, with_base, call):
    code, text, err = call(*bad_argv(flags, with_base))
    lines = err.strip().splitlines()[-2:]
    assert code == 2 and "Traceback" not in text + err
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    assert BAD[flags] in err
    assert {path.name for path in with_base.iterdir()} <= {"base", "lock"}


def test_an_out_folder_that_is_a_file_is_refused(tmp_path, call):
    (tmp_path / "out").write_text("mine")
    code, _, err = call(*SMALL, "--out", tmp_path / "out")
    assert code == 2 and "error: " in err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_demonstration_that_does_not_help_stops_the_run(with_base, call):
    code, _, err = call(*SMALL, "--gate-margin", "0.9", "--out", with_base)
    assert code == 2 and "does not help enough" in err
    assert not (with_base / "sdft").exists()


def test_plot_without_matplotlib_says_so_before_the_run(monkeypatch, with_base, call):
    """And the run is not lost."""
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    code, text, _ = call(*SMALL, "--plot", "--method", "sft", "--out", with_base)
    assert code == 0 and text.index("pip install matplotlib") < text.index("step    0")
    assert (with_base / "sft" / "results.json").exists()


# ---- Training ----------------------------------------------------------------------


def small_run(method, folder, **changes):
    """Ten steps of a method from random weights; returns the student."""
    tok, world = data.Tokenizer(), data.World(0)
    torch.set_num_threads(1)
    config = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=48)
    student = GPT(config, data.make_rng(0, "weights"))
    with torch.no_grad():  # far from uniform, so that teacher and student differ
        for p in student.parameters():
            if p.dim() == 2:
                p *= 12
    settings = {"steps": 10, "batch_size": 8, "log_every": 1, "lr": 1e-3}
    settings |= {"warmup_steps": 3, "ema_rate": 0.01, **changes}
    names = {field.name for field in fields(METHODS[method].Config)}
    cfg = METHODS[method].Config(**{k: v for k, v in settings.items() if k in names})
    stages = {"A": data.make_demos(world, "A", 16, 0)}
    METHODS[method].train(student, stages, {}, tok, cfg, train.Run(folder))
    return student


LOSSES = {
    "sft": [7.06632, 6.99271, 6.61091, 6.65224, 6.49682, 6.27526, 6.05051, 5.9048,
            5.9749, 5.90992],
    "sdft": [1.02556, 0.94364, 1.12707, 1.01788, 1.04327, 1.02999, 1.06851, 0.90693,
             0.9264, 0.92122],
}


@pytest.mark.parametrize("method", METHODS)
def test_ten_losses_are_the_stored_ones(method, tmp_path):
    """A change that moves them says why in its commit."""
    small_run(method, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(LOSSES[method], abs=1e-4)


@pytest.mark.parametrize(("new_tokens", "sampled", "warning"), [
    (2, "none ends", "EOS rate 0 %, mean length 2.0: .*--max-new-tokens"),
    (16, "all end at once", "every response is empty"),
    (16, None, None),
])  # fmt: skip
def test_rollouts_that_never_end_or_are_empty_are_reported(
    new_tokens, sampled, warning, tmp_path, monkeypatch, capsys
):
    def generate(model, prompts, lengths, R, end, *args):
        if sampled == "none ends":
            return torch.ones(len(lengths), R, dtype=torch.int64), torch.ones(
                len(lengths), R, dtype=torch.bool
            )
        return torch.full((len(lengths), 1), end), torch.ones(
            len(lengths), 1, dtype=torch.bool
        )

    if sampled:
        monkeypatch.setattr(sdft, "generate", generate)
    small_run("sdft", tmp_path, max_new_tokens=new_tokens, micro_batches=2)
    text = capsys.readouterr().out
    assert len(re.findall(f"warning: {warning}", text)) == (10 if warning else 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_stops_before_the_step(method, tmp_path, monkeypatch):
    real = METHODS[method].compute_loss
    calls = []

    def broken(student, *args):
        calls.append({name: p.clone() for name, p in student.state_dict().items()})
        calls.append(student)
        loss, extra = real(student, *args)
        return (loss * math.nan if len(calls) == 6 else loss), extra

    monkeypatch.setattr(METHODS[method], "compute_loss", broken)
    with pytest.raises(FloatingPointError, match="step 2: loss nan.*was not made"):
        small_run(method, tmp_path)
    before, student = calls[4:]
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_program_with_3(monkeypatch, call):
    def run(args, stop):
        raise FloatingPointError("step 2: loss nan")

    monkeypatch.setattr(train, "whole_run", run)
    code, _, err = call()
    assert code == 3 and "error: step 2" in err


# ---- The README --------------------------------------------------------------------


def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if "train.py" in line]


def test_the_readme_shows_the_two_commands_of_a_newcomer():
    text = (ROOT / "README.md").read_text()
    two = "pip install -r requirements.txt\npython train.py --method sdft\n"
    assert f"```bash\n{two}```" in text
    assert len(readme_commands()) >= 4


@pytest.mark.parametrize("line", readme_commands())
def test_a_command_of_the_readme_is_accepted(line):
    argv = shlex.split(line)
    argv = argv[argv.index("train.py") + 1 :]
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            train.parse_args(argv)
    else:
        train.parse_args(argv)


def test_the_first_command_of_the_readme_runs(with_base, call):
    line = next(c for c in readme_commands() if "--method sdft" in c)
    words = shlex.split(line)
    assert words[:2] == ["python", "train.py"]
    code, text, err = call(*words[2:], *SMALL, "--out", with_base)
    assert code == 0 and (with_base / "sdft" / "results.json").exists(), err
