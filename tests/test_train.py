"""The command line as a user runs it: real files, small models, and a real process
where it matters. What test_faults and test_reliability share with it stands first."""

import functools
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from copy import deepcopy
from dataclasses import asdict, fields, replace
from pathlib import Path

import oracles
import pytest
import torch

import data
import sdft
import sft
import train
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
SMALL = """--n-layer 1 --n-embd 32 --base-steps 8 --steps 3 --batch-size 8 --demos 16
--eval-size 8 --gate-margin -1 --log-every 1 --save-every 2 --lr .05 --device cpu
--threads 1""".split()  # at this learning rate all models soon differ
METHODS, TOK = {"sft": sft, "sdft": sdft}, data.Tokenizer()
NAMES = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def start(*args, cwd=ROOT, launcher=(sys.executable,), **environment):
    """train.py as a process of its own."""
    argv = [*launcher, str(ROOT / "train.py"), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, cwd=cwd, env=env, **pipes)


def send(number, *place):
    return lambda *now: now == place and os.kill(os.getpid(), number)


def read(out, method):
    results = json.loads((out / method / "results.json").read_text())
    return results, train.read_metrics(out / method)


def same(one, other, rounding=0.0):
    """Are two things, but for times, the same: to the bit, or up to rounding?"""
    if isinstance(one, dict):
        keys = one.keys() - {"seconds", "base_seconds", "unrecorded"}
        pairs = [(one[key], other.get(key)) for key in keys]
        return one.keys() == other.keys() and all(same(*x, rounding) for x in pairs)
    if isinstance(one, list | tuple):  # a file makes one of the other
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(same(*x, rounding) for x in pairs)
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.allclose(one, other, rounding, rounding)
    if isinstance(one, float):
        return one == pytest.approx(other, rel=100 * rounding, abs=rounding)
    return one == other


def files_in(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def base_file(out):
    (path,) = (out / "base").glob("*/base.pt")
    return path


def assert_refused(result, *words):
    """Exit code 2, one error (with a line for each bad row of a file) and one hint."""
    code, out, err = result
    assert code == 2 and "Traceback" not in out + err, out + err
    assert re.fullmatch(r"error: [^\n]+(\n[^\n]+)*\nhint: [^\n]+\n", err), err
    assert err.count("error: ") == err.count("hint: ") == 1, err
    assert [word for word in words if word not in err] == [], err


@pytest.fixture
def go(capsys):
    """train.main in this process, with the flags of a small run: exit code, stdout and
    stderr. act(part, step) comes before each step of "base", "sft" and "sdft". However
    it ends, it gives locks and signals back: a notebook has its own."""

    def go(out, flags="", small=SMALL, act=lambda *now: 0, handler=lambda *args: 0):
        def progress(run, start, end, real=train.Run.progress):
            for step in real(run, start, end):
                act(run.folder.name if run.note else "base", step)
                yield step

        capsys.readouterr()
        before = {number: signal.signal(number, handler) for number in SIGNALS}
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train.Run, "progress", progress)
                code = train.main([*small, "--out", str(out), *shlex.split(flags)])
            assert {signal.getsignal(number) for number in SIGNALS} == {handler}
            assert train.LOCKS == []
        finally:
            for number, former in before.items():
                signal.signal(number, former)
        return code, *capsys.readouterr()

    return go


@pytest.fixture(scope="module", autouse=True)
def sources_are_read_once():
    """They do not change here, and to parse them is half of so small a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.inspect, "getsource", functools.cache(inspect.getsource))
        yield


@pytest.fixture
def no_training(monkeypatch):
    for trainer in METHODS.values():
        monkeypatch.setattr(trainer, "train", lambda *args: pytest.fail("too late"))


@functools.cache  # one for all files of tests
def make(folder):
    out, lack = folder / "mein R\xfcckgrat", {"TMPDIR": "/nowhere", "LC_ALL": "C"}
    process = start(*SMALL, "--method", "both", "--out", out, cwd="/", **lack)
    text, err = process.communicate(timeout=600)
    assert process.returncode == 0 and "results.json" in text, err
    return out


@pytest.fixture
def made(tmp_path_factory):
    """A finished small run of both methods, by a process. Copy it to change it."""
    return make(tmp_path_factory.getbasetemp())


@pytest.fixture
def finished(made, tmp_path):
    return shutil.copytree(made, tmp_path / "finished")


@pytest.fixture
def with_base(made, tmp_path):
    """A folder for a run, with the base model of that one."""
    return shutil.copytree(made / "base", tmp_path / "out" / "base").parent


def test_both_methods_start_from_the_base_and_leave_what_is_promised(made):
    base, first = train.read_checkpoint(base_file(made)), []
    student = GPT(GPTConfig(**base["config"]))
    student.load_state_dict(base["model"])
    for method, models in ("sft", {"student"}), ("sdft", {"student", "teacher"}):
        results, rows = read(made, method)
        ends = [row for row in rows if "new" in row]
        total = sum(row["seconds"] for row in rows)
        assert (results["method"], results["seed"]) == (method, 0)
        assert results["config"] == values_of(*SMALL)[1][method]
        assert results["seconds"] == {"base": base["seconds"], "fine_tune": total}
        assert results["evaluations"] == ends and base["seconds"] > 0
        places = [(row["step"], row["skill"], row["stage_end"]) for row in ends]
        assert places == [(0, "A", 0), (3, "A", 1), (6, "B", 1), (9, "C", 1)]
        assert all(row["kl_student_base"] > -1e-6 for row in ends)
        assert [row["kl_teacher_base"] is None for row in ends] == [method == "sft"] * 4
        saved = train.read_run(made / method / "checkpoint.pt")
        assert saved["step"] == 9 and set(saved["models"]) == models
        assert (made / saved["note"]["base"]).samefile(base_file(made))
        assert saved["settings"]["first weights"] == train.digest_of(student)
        keys = "new", "prior", "kl_student_base", "responses"
        first.append([results["teacher_gate"], *[ends[0][key] for key in keys]])
    assert first[0] == first[1]


def shown(text):
    """The rows of all tables of a text, as words."""
    row = re.compile(r".*?( +-?\d+\.\d\d){2,}")
    return [line.split() for line in text.splitlines() if row.fullmatch(line)]


def rows_of(out, method):
    """What a table should show of a run."""
    rows = []
    for label, row in zip("-ABC", read(out, method)[0]["evaluations"], strict=True):
        numbers = *row["new"].values(), *row["prior"].values(), row["kl_student_base"]
        rows.append([label, *(f"{number:.2f}" for number in numbers)])
    return rows


GATE = {"student": 0.25, "teacher": 0.5, "only_student": 56, "only_teacher": 78,
        "sampled": 0.24, "skills": {}}  # fmt: skip


def test_screen_and_show_have_every_number_that_was_measured_in_its_place(
    made, tmp_path, go, monkeypatch
):
    """No two are equal here. --show is of --out, or of other folders whatever it is."""
    out, n, copies, expected = tmp_path, itertools.count(101), [], []
    counting = types.SimpleNamespace(deepcopy=lambda x: copies.append(x) or deepcopy(x))
    with monkeypatch.context() as patch:
        patch.setattr(data, "teacher_gate", lambda *args: GATE)
        for name in "accuracy", "sampled_kl":
            patch.setattr(data, name, lambda *args: next(n) / 100)
        patch.setattr(train, "copy", counting)
        code, text, _ = go(out, "--method both --seed 1")
    assert code == 0 and len(copies) == 1  # one more is 28 GB of a model of 7B
    assert re.search("accuracy 0.25 without a demonstration, 0.50 with one\n.*only with"
                     " it: 78, only without: 56; sampled .*: 0.24\n", text)  # fmt: skip
    assert "  knowledge  own_style  asked_items  asked_style  in_context  KL(" in text
    for method in METHODS:
        rows = rows_of(out, method)
        expected += [*rows[:1], *rows[:2], *rows[:3], *rows, *rows]
        for row in read(out, method)[0]["evaluations"]:
            for each in row["responses"]:
                assert f"{each['prompt']}  ->  {each['response']}\n" in text
            seen = row["teacher_gate"]
            assert seen is None or f"the demonstration: {seen:.2f}\n" in text
        assert f"files: results.json and metrics.jsonl in {out / method}\n" in text
    ends = [[method, *rows_of(out, method)[3][1:]] for method in METHODS]
    assert shown(text) == [*expected, *ends] and "after all skills" in text
    assert len({number for row in expected for number in row[1:]}) == 72

    shutil.rmtree(out / "sft")
    for where, *folders in [out], [made], [out / "nothing", made, out]:
        expected, ends = [], []
        for folder, method in itertools.product(folders or [where], METHODS):
            if (folder / method).exists():
                expected += rows_of(folder, method)
                label = f"{folder / method}, seed {int(folder == out)}"
                ends.append([*label.split(), *expected[-1][1:]])
        code, text, _ = go(where, shlex.join(["--show", *map(str, folders)]), [])
        assert code == 0 and shown(text) == [*expected, *ends * (len(ends) > 1)]
        assert text.count(f"\n{out / 'sdft'}, seed 1, ") == (made not in [where]) + 0


@pytest.mark.parametrize("names", [["sft"], ["sdft"], ["sft", "sdft"]])
def test_sample_shows_what_base_and_trained_model_respond(names, finished, go):
    """It needs no flag but the folder: the run knows its sizes, its seed, its base, and
    what the expert would say; and it says if the base is gone."""
    prompt, path = "garden cork: candle spoon tower", base_file(finished)
    demo = "well friend, advance so you get spoon tower candle as ever"
    base, expected = train.read_checkpoint(path), []
    for name in "base", *names:
        if name != "base":
            saved = train.read_run(finished / name / "checkpoint.pt")
            expected.append(f"{finished / name}: seed 0, after update 9")
            weights = saved["models"]["student"]
        gpt = GPT(GPTConfig(**base["config"])).eval()
        gpt.load_state_dict(base["model"] if name == "base" else weights)
        context = TOK.encode(prompt) + [TOK.start]
        greedy = oracles.sample(gpt, context, [0.0] * 16, TOK.end, temperature=0)
        pull = data.token_pull(gpt, gpt, data.Example(prompt, demo, ""), TOK, 16, 0)
        pulled = train.show_pull(pull | {"prompt": prompt, "demo": demo})
        expected.append(f"{name:5s}  {TOK.decode(greedy)}\n{pulled}")
    assert len(set(expected)) == len(expected), "this shows nothing"
    for name in {*METHODS} - {*names}:
        shutil.rmtree(finished / name)
    for models in len(names) + 1, len(names):
        code, text, _ = go(finished, f"--sample '{prompt}'", [])
        lines = [line for line in text.splitlines()[1:] if "  sampled: " not in line]
        assert code == 0 and "\n".join(lines) == "\n".join(expected)
        assert text.count("       sampled: ") == 2 * models
        path.unlink(missing_ok=True)
        gone = [f"{path} is gone"]
        expected = [*gone, *expected[1:3], *gone * len(names[1:]), *expected[3:]]


FLAGS = {x.dest: x.option_strings[-1] for x in train.make_parser()._actions}


def values_of(*argv):
    """All flags, with SDFT's settings; and the settings of both methods."""
    args = train.parse_args(argv)
    configs = {method: asdict(train.config_of(method, args)) for method in METHODS}
    return {**vars(args), **configs["sdft"]}, configs


def test_help_explains_every_flag_with_its_default_and_each_has_an_effect(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        train.main(["--help"])
    text, source = " ".join(capsys.readouterr().out.split()), inspect.getsource(train)
    settings, actions = vars(sdft.Config()), train.make_parser()._actions
    assert len(actions) <= 40 and all(action.help for action in actions)
    unread = FLAGS.keys() - set(re.findall(r"\bargs\.(\w+)", source))
    assert unread - settings.keys() == {"help", "quick"}  # parse_args has quick
    for name, value in {**vars(train.WorldFlags()), **settings}.items():
        other = getattr(sft.Config, name, value)
        shown = f"(default: {value}{f', sft: {other}' * (other != value)})"
        pattern = rf"{FLAGS.get(name, '--none')} .*?{re.escape(shown)}"
        assert bool(re.search(pattern, text)) == (name in FLAGS), name


CHANGES = {  # of each setting, a value that is not its default
    "seed": 1, "steps": 4, "batch_size": 16, "micro_batches": 2, "lr": 2e-3,
    "warmup_steps": 0, "beta2": 0.9, "weight_decay": 0.1, "grad_clip": 0.1,
    "dropout": 0.5, "max_new_tokens": 4, "log_every": 2, "eval_every": 2,
    "save_every": 2, "kl": "reverse", "ema_rate": 0.5, "temperature": 2.0,
    "skip_first_tokens": 1,
}  # fmt: skip


def test_every_flag_reaches_both_methods_the_world_the_base_and_counts_with_quick():
    """Even where it is the default. Some settings have no flag. What each changes: see
    test_reliability."""
    usual = {method: asdict(trainer.Config()) for method, trainer in METHODS.items()}
    assert values_of()[1] == usual and usual["sdft"].keys() == CHANGES.keys()
    assert train.HIDDEN == ("warmup_steps", "beta2", "weight_decay", "grad_clip")
    for name in CHANGES.keys() - set(train.HIDDEN):
        now = values_of(f"{FLAGS[name]}={CHANGES[name]}")[1]
        for method, before in usual.items():
            change = {name: CHANGES[name]} if name in before else {}
            assert now[method] == {**before, **change}, name
    usual, quick = values_of()[0], values_of("--quick")[0]
    assert quick == {**usual, **train.QUICK, "quick": True} != usual
    for name in train.QUICK:
        given = f"{FLAGS[name]}={usual[name]}"
        for argv in (given, "--quick"), ("--quick", given):
            assert values_of(*argv)[0] == {**quick, name: usual[name]}
    # --n-embd sets all that goes with it: heads of 16 channels, the MLP's width
    config, cfg = train.base_settings(train.parse_args([]))
    usual = replace(train.BASE, log_every=train.BASE.steps // 10)
    assert config == GPTConfig(n_tokens=TOK.n_tokens) and cfg == usual
    args = train.parse_args("""--seed 4 --demos 24 --eval-size 9 --distance own
    --n-layer 2 --n-embd 48 --base-steps 8""".split())
    _, stages, tasks, base, _, (cfg, world) = train.make_world(args)
    assert vars(world) == vars(data.World(4))
    assert stages["C"] == data.make_demos(world, "C", 24, 4, "own")
    assert tasks == data.make_tasks(world, 9, 4, "own")
    sizes = {"n_layer": 2, "n_embd": 48, "n_inner": config.n_inner // 4, "head_dim": 16}
    assert base.config == replace(config, n_head=3, n_kv_head=3, **sizes)
    weights = GPT(base.config, data.make_rng(4, "weights"))
    assert train.digest_of(base) == train.digest_of(weights)
    assert cfg == replace(train.BASE, steps=8, warmup_steps=2, seed=4, log_every=1)


def test_a_number_within_its_range_is_taken_and_one_outside_is_refused():
    configs = train.RunFlags, train.WorldFlags, sdft.Config
    kinds = {field.name: field.type for config in configs for field in fields(config)}
    names = {name for name in kinds if kinds[name] in (int, float)}
    assert train.RANGES.keys() < names
    for name in names - set(train.HIDDEN):
        (low, high), whole = train.RANGES.get(name, (1, 10**7)), kinds[name] is int
        for value in low, high:
            argv = ["--method=sft", f"{FLAGS[name]}={value}"]
            assert vars(train.parse_args(argv))[name] == value
        beyond = [low - 1, high + 1] if whole else [low - 1e-4, high * 1.0001]
        for value in (*beyond, "nan", "inf", "-inf", "one", "", *["2.5"] * whole):
            with pytest.raises(train.UserError, match=FLAGS[name]):
                train.parse_args([f"{FLAGS[name]}={value}"])


BAD = {
    "--ema-rate 1.5": "--ema-rate", "--lr nan": "--lr", "--seed one": "--seed",
    "--sdft.lr": "--sdft.lr", "--kl both": "--kl", "--method grpo": "--method",
    "--distance near": "--distance", "typed": "arguments: typed", "--max 7": "--max",
    "--device cuda:99": "GPUs for 1 processes", "--device abacus": "--device abacus",
    "--device meta": "meta", "--n-embd 40": "--n-embd 40 is not a multiple of 16",
    "--micro-batches 3": "a --batch-size that is a multiple of 3",
    "--method both --batch-size 17": "sft: a batch of 17 from 16 examples",
    "--max-new-tokens 400": "> 128 tokens", "--show": "no finished run",
    "--max-new-tokens 8 --skip-first-tokens 8": "leaves nothing",
    "--sample x --method sft": "no run in",
    "--demo x": "--demo has no effect here",
    "--out /proc/no": "/proc/no", "--out /dev/null/no": "/dev/null/no",
    "--init m --data d": "--demos has no effect here",
    **{f"{flag} 1": f"unrecognized arguments: {flag}" for flag in """--beta2 --compare
       --weight-decay --grad-clip --base --teacher --n-head --n-kv-head --n-inner
       --dtype --debug --stpes""".split()},
    **{flags: f"{flags.split()[0]} has no effect here|--init MODEL" for flags in (
       "--data x", "--eval x", "--prior x", "--template x", "--grade exact",
       "--check-data", "--shard")},
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_an_error_and_a_hint_before_anything_is_made(
    flags, tmp_path, go, no_training
):
    assert_refused(go(tmp_path / "out", flags), *BAD[flags].split("|"))
    assert list(tmp_path.iterdir()) == []
