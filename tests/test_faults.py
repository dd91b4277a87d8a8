"""Faults that other projects had, and that this one must not have: each test is one of
their stories, or a neighbour of it. `kind` says of which nature it is; the table of
tests/bench/faults.py counts them by it.
"""

import ast
import errno
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import types
from argparse import Namespace
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import model
import sdft
import sft
import train
from model import GPT, GPTConfig, chunked_kl, chunked_nll

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split(
    "--quick --base-steps 2 --steps 2 --demos 64 --eval-size 8 --n-layer 1 --n-embd 32 "
    "--n-head 4 --n-kv-head 4 --n-inner 32 --threads 1 --device cpu --max-new-tokens 8"
)


def kind(name):
    """Of which nature a fault is."""

    def mark(test):
        test.kind = name
        return test

    return mark


# ---- What the tests share ----------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def sources_are_read_once():
    """They do not change here, and to parse them is half of so small a run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("source_of", "field_help"):
            patch.setattr(train, name, functools.cache(getattr(train, name)))
        yield


pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


@pytest.fixture
def go(capsys):
    """train.main with the small run's flags: exit code, what it printed, its errors."""

    def go(out, flags="", small=TINY):
        capsys.readouterr()
        code = train.main([*small, "--out", str(out), *shlex.split(flags)])
        return code, *capsys.readouterr()

    return go


@pytest.fixture
def no_training(monkeypatch):
    """Whoever trains here has looked too late."""

    def trains(*args, **kwargs):
        raise AssertionError("something was trained before the flags were refused")

    monkeypatch.setattr(sft, "train", trains)
    monkeypatch.setattr(sdft, "train", trains)


def assert_refused(result, *words):
    """Exit code 2, and at the end one error that names it and one hint."""
    code, out, err = result
    assert code == 2, out + err
    lines = err.strip().splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["error", "hint"], err
    assert err.count("error: ") == 1 and "Traceback" not in out + err
    for word in words:
        assert word in err, err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a finished run of both methods. Copy it before you change it."""
    out = tmp_path_factory.mktemp("made") / "out"
    often = shlex.split("--method both --log-every 1 --save-every 1")
    assert train.main([*TINY, "--out", str(out), *often]) == 0
    return out


@pytest.fixture
def finished(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "finished")


@pytest.fixture
def with_base(made, tmp_path):
    """A folder with the base model alone, for a run that is to be quick."""
    shutil.copytree(made / "base", tmp_path / "out" / "base")
    return tmp_path / "out"


def stop_at(step, number, argv):
    """A run that gets a signal in a step of fine-tuning; the exit code."""
    real = data.get_batch

    def get_batch(examples, batch_size, seed, now):
        if now == step:
            os.kill(os.getpid(), number)
        return real(examples, batch_size, seed, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "get_batch", get_batch)
        return train.main(argv)


OFTEN = shlex.split("--log-every 1 --save-every 3")


@pytest.fixture(scope="module")
def halted(made, tmp_path_factory):
    """A folder with a run of sdft that got SIGTERM in its fourth step of six."""
    out = tmp_path_factory.mktemp("halted") / "out"
    shutil.copytree(made / "base", out / "base")
    assert stop_at(3, signal.SIGTERM, [*TINY, "--out", str(out), *OFTEN]) == 143
    return out


@pytest.fixture
def stopped(halted, tmp_path):
    """A copy of it."""
    return shutil.copytree(halted, tmp_path / "stopped")


def rewrite(path, change):
    """Change what a checkpoint holds."""
    content = train.read_checkpoint(path)
    change(content)
    train.write_checkpoint(path, content)


def base_of(out):
    (path,) = (out / "base").glob("*/base.pt")
    return path


def texts_below(folder):
    return [p.read_bytes() for p in folder.rglob("*") if p.is_file()]


# ---- What deletes or overwrites ----------------------------------------------------

DELETES = "deletes or overwrites"
USERS = (
    "thesis.tmp.txt", "notes/data.tmp.csv", "notes/checkpoint.pt.tmp.12",
    "checkpoint.pt.tmp.txt", "checkpoint.pt.tmp.7", "checkpoint.pt", "metrics.jsonl",
    "results.json", "plot.png", "base.pt", "lock.txt", "x.tmp.d/inside",
    "base/mine.tmp.1", "base/results.json.tmp.3", "sft/my.tmp.1", "sft/notes.txt",
    "sft/checkpoint.pt.tmp.7b", "sft/xmetrics.jsonl.tmp.1", "sft/results.json.tmp.",
    "sft/checkpoint.pt.tmp.12/inside", "sft/below/checkpoint.pt.tmp.1",
    "sdft/checkpoint.pt.tmp.5", "sdft/results.json", "sft.previous1/results.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def visited(made, tmp_path_factory):
    """A folder with files of the user in which sft has run twice, as `--out .`"""
    out = tmp_path_factory.mktemp("visited") / "my folder"
    for name in USERS:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"mine: {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        shutil.copytree(made / "base", "base", dirs_exist_ok=True)
        for _ in range(2):
            assert train.main([*TINY, "--out", ".", "--method", "sft"]) == 0
    return out


@kind(DELETES)
@pytest.mark.parametrize("name", USERS)
def test_a_file_of_the_user_stays_as_it_was(name, visited):
    """In its place, or in the folder of the first run, which was kept whole."""
    mine, kept = f"mine: {name}".encode(), visited / name
    if not kept.exists():
        kept = visited / name.replace("sft/", "sft.previous2/")
    assert kept.read_bytes() == mine


@kind(DELETES)
def test_only_what_a_killed_run_left_is_removed(with_base, go):
    stale = base_of(with_base).parent / "base.pt.tmp.12"
    (with_base / "sft").mkdir()
    names = ("checkpoint.pt", "metrics.jsonl", "results.json")
    others = [with_base / "sft" / f"{name}.tmp.340" for name in names]
    for path in (stale, *others):
        path.write_bytes(b"half of")
    assert go(with_base, "--method sft")[0] == 0
    assert not any(path.exists() for path in (stale, *others))


@kind(DELETES)
@pytest.mark.parametrize(("outer", "inner"), [
    ("nest", "nest/out"), ("nest/sft", "nest"), ("nest/sdft", "nest"),
])  # fmt: skip
def test_a_run_in_a_folder_above_or_below_keeps_its_temporary_file(
    outer, inner, made, tmp_path, go
):
    shutil.copytree(made / "base", tmp_path / outer / "base")
    held = train.lock(tmp_path / inner)
    own = tmp_path / inner / ("sdft" if outer != "nest/sft" else "sft")
    own.mkdir(exist_ok=True)
    own = own / "checkpoint.pt.tmp.14063"
    own.write_bytes(b"half of")
    assert go(tmp_path / outer, "--method sft")[0] == 0
    held.close()
    assert own.exists()


@kind(DELETES)
def test_a_third_run_keeps_the_first(with_base, go):
    for i in range(3):
        assert go(with_base, "--method sft")[0] == 0
        (with_base / "sft" / "mark").write_text(f"run {i}")
    found = sorted(path.read_text() for path in with_base.glob("sft*/mark"))
    assert found == ["run 0", "run 1", "run 2"]


@kind(DELETES)
def test_the_plan_says_where_a_finished_run_goes(finished, go):
    (finished / "sft.previous1").mkdir()
    code, out, _ = go(finished, "--method sft")
    plan = out[: out.index("teacher gate")]
    assert code == 0 and f"is kept, as {finished / 'sft.previous2'}" in plan


@kind(DELETES)
@pytest.mark.parametrize("name", ["checkpoint.pt.previous", "metrics.jsonl"])
def test_what_a_run_without_a_checkpoint_left_is_kept(name, with_base, go):
    path = with_base / "sft" / name
    path.parent.mkdir()
    path.write_bytes(b'{"of an": "earlier run"}\n')
    assert go(with_base, "--method sft")[0] == 0
    assert b'{"of an": "earlier run"}\n' in texts_below(with_base)


@kind(DELETES)
@pytest.mark.parametrize("text", [b"my door key", b"\xff\xfe\x00", b"12 keys"])
def test_a_file_named_lock_that_is_not_ours_is_not_overwritten(
    text, tmp_path, go, no_training
):
    (tmp_path / "lock").write_bytes(text)
    assert_refused(go(tmp_path), str(tmp_path / "lock"))
    assert (tmp_path / "lock").read_bytes() == text


@kind(DELETES)
def test_a_run_of_one_method_leaves_the_other_methods_files(finished, go):
    before = texts_below(finished / "sdft")
    assert go(finished, "--method sft")[0] == 0
    assert texts_below(finished / "sdft") == before


@kind(DELETES)
@pytest.mark.parametrize("flags", ["--show", "--sample x", "--compare {0}"])
def test_what_only_reads_writes_nothing(flags, finished, go):
    before = sorted(finished.rglob("*")), texts_below(finished)
    small = [] if flags != "--sample x" else TINY
    argv = flags.format(shlex.quote(str(finished)))
    if "--compare" in flags:
        assert train.main(shlex.split(argv)) == 0
    else:
        assert go(finished, argv, small)[0] == 0
    assert (sorted(finished.rglob("*")), texts_below(finished)) == before


@pytest.fixture
def fake_pyplot(monkeypatch):
    """matplotlib as far as plot() uses it: files with the title that it was given."""

    class Anything:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    def savefig(path, metadata=None, **_):
        Path(path).write_bytes(b"\x89PNG " + str(metadata).encode())

    figure = types.SimpleNamespace(savefig=savefig)
    pyplot = types.ModuleType("matplotlib.pyplot")
    pyplot.subplots = lambda _, n, **kwargs: (figure, [[Anything()] * n])
    package = types.ModuleType("matplotlib")
    package.use, package.pyplot = lambda name: None, pyplot
    package.__spec__ = importlib.util.spec_from_loader("matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)


@kind(DELETES)
@pytest.mark.parametrize("mine", ["a picture", "a folder"])
def test_a_plot_png_of_the_user_is_kept_and_ours_is_drawn_anew(
    mine, finished, fake_pyplot
):
    path = finished / "plot.png"
    if mine == "a picture":
        path.write_bytes(b"my holidays")
    else:
        path.mkdir()
        (path / "inside").write_bytes(b"my holidays")
    for _ in range(2):
        train.plot(finished, ["sft"])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert b"my holidays" in texts_below(finished)
    assert len(list(finished.glob("plot.png*"))) == 2


@kind(DELETES)
def test_the_name_for_what_is_kept_is_free_and_no_link(tmp_path):
    (tmp_path / "sft.previous1").symlink_to("nowhere")
    (tmp_path / "sft.previous3").mkdir()
    assert train.free_name(tmp_path / "sft").name == "sft.previous2"


# ---- What is accepted and has no effect --------------------------------------------

NO_EFFECT = "accepted, without effect"
ONLY_SDFT = ("--kl reverse", "--teacher live", "--ema-rate .5", "--temperature 2",
             "--skip-first-tokens 3")  # fmt: skip
ANY = ("--steps 3", "--method sft", "--seed 1", "--quick", "--resume", "--base x.pt",
       "--device cpu", "--dtype float32", "--threads 2", "--demos 64", "--eval-size 9",
       "--gate-margin 0", "--base-steps 3", "--distance own", "--n-layer 2", "--lr 1",
       "--kl reverse", "--sft.lr 1", "--sdft.kl jsd")  # fmt: skip
WITHOUT_EFFECT = [
    *[("--method sft", flag) for flag in ONLY_SDFT],
    ("--method sft", "--sdft.lr 1"), ("--method sdft", "--sft.steps 3"),
    ("", "--sft.lr 1"), ("--teacher frozen", "--ema-rate .5"),
    ("--teacher live", "--ema-rate .01"), ("--sdft.teacher frozen", "--ema-rate .1"),
    ("--method both --teacher live", "--sdft.ema-rate .1"),
    ("--max-new-tokens 16", "--skip-first-tokens 16"),
    ("--max-new-tokens 8", "--sdft.skip-first-tokens 99999"),
    ("--sdft.max-new-tokens 3", "--skip-first-tokens 3"),
    ("--base x.pt", "--base-steps 700"), ("--steps 2", "--eval-every 2"),
    ("--quick", "--eval-every 50"), ("--sdft.lr 1", "--lr 1"),
    ("--method both --sft.lr 1 --sdft.lr 2", "--lr 1"),
    *[("--show", flag) for flag in (*ANY, "--sample x", "--compare a b")],
    *[("--compare a b", flag) for flag in (*ANY, "--sample x", "--plot", "--out o")],
    *[("--sample x", flag) for flag in ("--resume", "--plot", "--base x.pt")],
]  # fmt: skip


@kind(NO_EFFECT)
@pytest.mark.parametrize(("flags", "idle"), WITHOUT_EFFECT)
def test_a_flag_without_effect_is_refused_by_its_name(flags, idle, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    code = train.main(shlex.split(f"{flags} {idle}"))
    name = idle.split()[0].removeprefix("--").split(".")[-1]
    assert_refused((code, *capsys.readouterr()), name)


@kind(NO_EFFECT)
@pytest.mark.parametrize("flags", [
    "--method both --kl reverse", "--method sdft --sdft.lr 1", "--teacher ema "
    "--ema-rate .5", "--lr 1 --sft.lr 2 --method both", "--steps 3 --eval-every 2",
    "--sample x --steps 3", "--show --out x --plot", "--max-new-tokens 17 "
    "--skip-first-tokens 16", "--base x.pt --seed 1 --n-layer 2", "--show --debug",
])  # fmt: skip
def test_a_flag_with_an_effect_is_taken(flags):
    train.parse_args(shlex.split(flags))


@kind(NO_EFFECT)
@pytest.mark.parametrize(("flag", "value"), [
    ("--gate-margin", .2), ("--eval-size", 400), ("--base-steps", train.BASE.steps),
    ("--steps", sdft.Config.steps), ("--gate-margin", .21), ("--gate-margin", -1.),
    ("--eval-size", 64), ("--base-steps", 100), ("--steps", 8),
])  # fmt: skip
def test_quick_leaves_alone_what_was_given(flag, value):
    args = train.parse_args(["--quick", flag, str(value)])
    name = flag[2:].replace("-", "_")
    assert getattr(args, name) == value
    others = set(train.QUICK) - {name}
    assert {n: getattr(args, n) for n in others} == {n: train.QUICK[n] for n in others}


@kind(NO_EFFECT)
@pytest.mark.parametrize("get_lr", [sft.get_lr, sdft.get_lr])
@pytest.mark.parametrize("steps", [2, 5, 20, 30, 40, 41, 80])
def test_a_warm_up_as_long_as_the_run_still_peaks_and_decays(get_lr, steps):
    cfg = sdft.Config(steps=steps, warmup_steps=40, lr=1.0)
    rates = [get_lr(t, cfg) for t in range(steps)]
    peak = rates.index(max(rates))
    assert rates[peak] == 1 and rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    # the last before 0, in a cosine over the second half
    last = 0.5 + 0.5 * math.cos(math.pi * (1 - 1 / (steps - min(40, steps // 2))))
    assert rates[-1] == pytest.approx(last)


@kind(NO_EFFECT)
@pytest.mark.parametrize(("length", "skip", "warns"), [(2, 3, 9), (3, 2, 0)])
def test_a_batch_without_a_token_in_the_loss_is_reported(
    length, skip, warns, with_base, go, monkeypatch
):
    def generate(model, prompts, lengths, R, end, *args):
        response = torch.full((len(lengths), length), 300)
        response[:, -1] = end
        return response, torch.ones_like(response, dtype=torch.bool)

    monkeypatch.setattr(sdft, "generate", generate)
    flags = f"--skip-first-tokens {skip} --log-every 1 --steps 3"
    code, out, err = go(with_base, flags)
    assert code == 0 and out.count("warning: the gradient is 0") == warns, out


@kind(NO_EFFECT)
def test_the_flags_of_a_run_that_a_sample_does_not_read_are_named(finished, go):
    code, out, _ = go(finished, "--sample x")
    line = next(line for line in out.splitlines() if "without effect" in line)
    assert code == 0 and all(n in line for n in ("base_steps", "demos", "eval_size"))
    assert "lr" not in line and "steps, " not in line.replace("base_steps, ", "")


@kind(NO_EFFECT)
@pytest.mark.parametrize("p", [0.001, 0.0019, 1 / 256])
def test_a_small_dropout_is_not_rounded_to_none(p):
    x = torch.ones(100_000)
    dropped = (model.make_dropout(p, 0, "cpu")(x) == 0).float().mean().item()
    assert 0.5 / 256 < dropped < 2 / 256


# ---- Which model is it: keys and identities ----------------------------------------

KEYS = "which model, by which key"


def where(flags="", world_size=1):
    """Where the base of these flags is."""
    args = train.parse_args([*TINY, *shlex.split(flags)])
    world, tok = data.World(args.seed), data.Tokenizer()
    dtype = train.choose_dtype(args.dtype, torch.device("cpu"))
    config, cfg = train.base_settings(args, world_size)
    return train.find_base(args, config, cfg, world, tok, dtype)


@kind(KEYS)
@pytest.mark.parametrize("flags", [
    "--dtype bfloat16", "--seed 1", "--base-steps 3", "--n-layer 2", "--n-embd 64",
    "--n-kv-head 2", "--n-inner 64", "--n-head 2 --n-kv-head 2",
])  # fmt: skip
def test_another_base_has_another_key(flags):
    assert where(flags) != where()


@kind(KEYS)
@pytest.mark.parametrize("flags", [
    "--dtype float32", "--steps 3", "--lr 1", "--method both", "--demos 99", "--kl jsd",
    "--distance own", "--eval-size 9", "--threads 2", "--seed 0", "--dropout 0",
])  # fmt: skip
def test_flags_that_do_not_change_the_base_keep_its_key(flags):
    assert where(flags) == where()


@kind(KEYS)
def test_the_key_does_not_depend_on_the_number_of_processes():
    assert where(world_size=2) == where()


@kind(KEYS)
@pytest.mark.parametrize(("name", "other"), [
    ("get_batch", lambda examples, *args: examples),
    ("student_prompt", lambda example, tok: tok.encode(example.prompt)),
    ("make_base_corpus", lambda world, tok, size, seed: data.make_demos(
        world, "A", size, seed)),
])  # fmt: skip
def test_other_data_of_the_base_has_another_key(name, other, monkeypatch):
    before = where()
    monkeypatch.setattr(data, name, other)
    assert where() != before


CODE = '''
"""A module."""
import math
def f(x, *, y: int = 0, **kw):
    """A docstring."""  # a comment
    with open(f"{x!r} {math.pi:.2f}") as z, open("b"):
        return [w async for w in z if not w] or (lambda: x[1, 2:3])
class A:
    """Only this."""
'''


@kind(KEYS)
def test_the_key_of_code_is_the_same_in_each_python(monkeypatch):
    """A stored value; floor.py runs this in several versions. ast.dump differs: it
    shows fields that older versions do not have."""
    monkeypatch.setattr(train.inspect, "getsource", lambda text: text)
    assert train.digest(train.source_of(CODE)) == "f2c63d0dc181"
    other = CODE.replace("A docstring", "Another").replace("# a comment", "")
    other = other.replace("A module", "B").replace("x, *, y", "x,  *,\n    y")
    assert train.source_of(other) == train.source_of(CODE)
    assert train.source_of(CODE.replace("2:3", "2:4")) != train.source_of(CODE)


MACHINE = {"torch": "1.0", "capability": "Z80", "threads": 77, "device": "cuda",
           "processes": 8, "dtype": "torch.bfloat16"}  # fmt: skip


@kind(KEYS)
def test_the_base_of_another_dtype_is_not_taken_silently(with_base, go):
    code, out, _ = go(with_base, "--dtype bfloat16 --method sft")
    assert code == 0 and "base model: found" not in out
    assert len(list(with_base.glob("base/*/base.pt"))) == 2


@kind(KEYS)
def test_a_base_that_another_machine_made_is_used_with_a_line(with_base, go):
    rewrite(base_of(with_base), lambda content: content["machine"].update(MACHINE))
    code, out, _ = go(with_base, "--method sft")
    assert code == 0
    assert all(f"{key}: {value} -> " in out for key, value in MACHINE.items()), out


@kind(KEYS)
def test_a_base_in_the_folder_of_another_key_is_refused(with_base, go, no_training):
    shutil.move(base_of(with_base).parent, with_base / "base" / where("--dropout 0").
                parent.name)  # its own: this is where it is looked for
    path = base_of(with_base)
    assert train.read_checkpoint(path)["key"] == path.parent.name
    other = with_base / "base" / where("--base-steps 3").parent.name
    shutil.copytree(path.parent, other)
    assert_refused(go(with_base, "--base-steps 3"), str(other), path.parent.name)


@kind(KEYS)
@pytest.mark.parametrize(("flags", "word"), [
    ("--seed 1", "seed: 0 -> 1"), ("--n-layer 2", "n_layer: 1 -> 2"),
    ("--n-inner 64", "n_inner: 32 -> 64"),
])  # fmt: skip
def test_a_given_base_that_does_not_fit_is_refused(
    flags, word, made, tmp_path, go, no_training
):
    small = [flag for flag in TINY if flag not in ("--base-steps",)]
    small.remove("2")
    base = shlex.quote(str(base_of(made)))
    assert_refused(go(tmp_path / "out", f"--base {base} {flags}", small), word)
    assert not (tmp_path / "out").exists()


@kind(KEYS)
@pytest.mark.parametrize("what", ["a run", "cut", "text", "missing", "folder"])
def test_a_given_base_that_is_none_is_refused(what, made, tmp_path, go, no_training):
    path = tmp_path / "my base.pt"
    if what == "a run":
        shutil.copy(made / "sft" / "checkpoint.pt", path)
    elif what == "cut":
        path.write_bytes(base_of(made).read_bytes()[:-9])
    elif what == "text":
        path.write_text("hello")
    elif what == "folder":
        path.mkdir()
    small = [flag for flag in TINY if flag != "--base-steps"]
    small.remove("2")
    result = go(tmp_path / "out", f"--base {shlex.quote(str(path))}", small)
    assert_refused(result, str(path))


@kind(KEYS)
@pytest.mark.parametrize(("flags", "words"), [
    ("--seed 1", ["seed: 0 -> 1", "--seed 0"]), ("--n-layer 2", ["n_layer: 1 -> 2"]),
    ("--steps 3", ["steps: 2 -> 3"]), ("--sdft.lr .5", ["lr: "]),
    ("--kl reverse", ["kl: forward -> reverse"]), ("--n-kv-head 2", ["n_kv_head"]),
])  # fmt: skip
def test_a_sample_of_another_run_is_refused_and_names_both(flags, words, made, go):
    assert_refused(go(made, f"--sample x {flags}"), *words)


@kind(KEYS)
def test_a_sample_of_a_run_of_another_seed_is_not_shown_silently(finished, go):
    assert go(finished, "--seed 1")[0] == 0
    assert_refused(go(finished, "--sample x"), "seed: 1 -> 0", "--seed 1")
    code, out, _ = go(finished, "--sample x --seed 1")
    assert code == 0 and "seed 1" in out


@kind(KEYS)
@pytest.mark.parametrize("method", ["sft", "sdft", "both"])
def test_a_sample_needs_no_flags_but_the_folder(method, made, go):
    code, out, err = go(made, f"--sample 'garden cork: bell' --method {method}", [])
    lines = [line.split()[0] for line in out.splitlines() if "  " in line]
    names = {"both": ["sft", "sdft"]}.get(method, [method])
    assert code == 0 and [x for x in lines if x in train.METHODS] == names, err


@kind(KEYS)
def test_a_sample_of_a_stopped_run_says_its_step(stopped, go):
    code, out, _ = go(stopped, "--sample x", [])
    assert code == 0 and "after update 4 of 6" in out


@kind(KEYS)
def test_a_sample_is_of_the_weights_that_were_saved(finished, go):
    """The greedy response of weights that can only say one word."""
    def speak(content):
        weights = content["models"]["student"]
        weights["ln_f.weight"].zero_()  # all logits are 0: the first token wins

    rewrite(finished / "sdft" / "checkpoint.pt", speak)
    _, out, _ = go(finished, "--sample x", [])
    line = next(line for line in out.splitlines() if line.startswith("sdft"))
    assert line.removeprefix("sdft   ") == data.Tokenizer().decode([0] * 8)


@kind(KEYS)
@pytest.mark.parametrize("folder", ["typo", "base"])
def test_a_sample_of_nothing_makes_no_folder(folder, made, tmp_path, go):
    out = tmp_path / folder
    assert_refused(go(out, "--sample x", []), "no run of sdft")
    assert not out.exists()


@kind(KEYS)
def test_a_sample_after_an_upgrade_of_torch_needs_no_new_base(made, go, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    code, out, err = go(made, "--sample x")
    assert code == 0 and "base  " in out and "sdft  " in out, err


@kind(KEYS)
def test_a_sample_without_its_base_shows_the_fine_tuned_model_alone(finished, go):
    shutil.rmtree(finished / "base")
    code, out, _ = go(finished, "--sample x", [])
    assert code == 0 and "not shown" in out and "sdft  " in out
    assert not (finished / "base").exists()


@kind(KEYS)
def test_a_folder_can_be_moved(finished, tmp_path, go):
    moved = shutil.move(finished, tmp_path / "another place")
    code, out, _ = go(moved, "--sample x", [])
    assert code == 0 and "not shown" not in out
    assert go(moved, "--show", [])[0] == 0
    code, out, _ = go(moved, "--resume --method both --log-every 1 --save-every 1")
    assert code == 0 and "base model: found" in out


@kind(KEYS)
def test_a_device_with_a_number_reads_its_own_files_again(tmp_path, go):
    for flags in ("", "", "--sample x"):
        code, _, err = go(tmp_path / "out", f"--method sft --device cpu:0 {flags}")
        assert code == 0, err


@kind(KEYS)
@pytest.mark.parametrize("flags", ["--sample x", "--resume"])
@pytest.mark.parametrize("what", ["a base", "of an earlier version"])
def test_a_checkpoint_that_is_no_run_of_this_version_is_refused(
    what, flags, finished, go, no_training
):
    path = finished / "sdft" / "checkpoint.pt"
    if what == "a base":
        shutil.copy(base_of(finished), path)
    else:  # as it was before this version
        rewrite(path, lambda content: [content.pop(k) for k in ("note", "config")])
    assert_refused(go(finished, flags), str(path))


@kind(KEYS)
@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"seconds": 1}', "caf\xe9"])
def test_results_of_someone_else_are_refused_with_their_place(text, finished, go):
    (finished / "sft" / "results.json").write_text(text, encoding="utf-8")
    assert_refused(go(finished, "--show", []), str(finished / "sft"))


@kind(KEYS)
@pytest.mark.parametrize("text", ["", "[1]\n", "mine\n", '{"new": {}}\n'])
def test_metrics_of_someone_else_are_refused_with_their_place(text, finished, go):
    (finished / "sft" / "metrics.jsonl").write_text(text)
    assert_refused(go(finished, "--show", []), str(finished / "sft"))


@kind(KEYS)
def test_runs_with_other_benchmarks_are_compared_in_what_both_have(made, finished):
    path = finished / "sdft" / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"own_style"', '"own_format"'))
    rows = [train.read_metrics(folder / "sdft")[-1] for folder in (made, finished)]
    lines = train.table(rows, ["one", "two"]).splitlines()
    assert "own_style" in lines[0] and "own_format" in lines[0]
    assert [line.count("nan") for line in lines] == [0, 1, 1]


@kind(KEYS)
def test_a_grader_of_ones_own_needs_no_name_and_has_one_digest():
    class Grader:
        def __call__(self, example, text):
            return True

    tasks = [{"new": {"A": data.Benchmark([], Grader())}} for _ in range(2)]
    assert train.as_text(tasks[0]) == train.as_text(tasks[1])
    named = {"new": {"A": data.Benchmark([], data.grade_items)}}
    assert train.as_text(named) != train.as_text(tasks[0])


# ---- What is reported after a resume -----------------------------------------------

RESUME = "reported after a resume"


def without_times(x):
    if isinstance(x, dict):
        return {k: without_times(v) for k, v in x.items() if k != "seconds"}
    return [without_times(v) for v in x] if isinstance(x, list) else x


@kind(RESUME)
def test_a_resumed_run_reports_what_an_uninterrupted_one_does(stopped, with_base, go):
    code, out, _ = go(stopped, " ".join([*OFTEN, "--resume"]))
    assert code == 0 and "goes on after update 4" in out[: out.index("teacher gate")]
    assert go(with_base, " ".join(OFTEN))[0] == 0
    for name in ("results.json", "metrics.jsonl"):
        one, other = ((out / "sdft" / name).read_text() for out in (stopped, with_base))
        if name == "metrics.jsonl":
            one, other = (f"[{','.join(x.splitlines())}]" for x in (one, other))
        assert without_times(json.loads(one)) == without_times(json.loads(other))


@kind(RESUME)
def test_no_step_is_recorded_twice(stopped, go):
    before = train.read_metrics(stopped / "sdft")
    assert go(stopped, " ".join([*OFTEN, "--resume"]))[0] == 0
    rows = train.read_metrics(stopped / "sdft")
    places = [(row["step"], "loss" in row) for row in rows]
    assert len(set(places)) == len(places) and places == sorted(places)
    assert rows[: len(before)] == before


@kind(RESUME)
@pytest.mark.parametrize("recorded", [0, 1, 3])
def test_seconds_count_once_what_was_before_the_stop(recorded, tmp_path, monkeypatch):
    """A clock by hand: 5 s to a record, 7 s to the save, 100 s of a pause, 1 s."""
    now = [50.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    gpt = GPT(GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=8, n_inner=8))
    models, cfg = {"student": gpt}, sft.Config()
    record = {"skill": "A", "eos_rate": 1.0, "response_length": 5.0, "grad_norm": 1.0}
    optimizer = sft.make_optimizer(gpt, cfg)
    run = train.Run(tmp_path)
    run.load(models, optimizer, cfg, {})
    for step in range(recorded):
        now[0] += 5
        run.log({**record, "step": step})
    now[0] += 7
    run.save(recorded, models, optimizer, [])
    now[0] += 100
    run = train.Run(tmp_path, resume=True)
    assert run.load(models, optimizer, cfg, {})[0] == recorded
    now[0] += 1
    run.log({**record, "step": recorded})
    seconds = [row["seconds"] for row in train.read_metrics(tmp_path)]
    assert seconds == [5.0] * recorded + [8.0]
    assert run.seconds() == sum(seconds)


@kind(RESUME)
def test_a_base_that_was_stopped_goes_on_and_counts_its_seconds(tmp_path, go):
    argv = [*TINY, "--out", str(tmp_path), "--base-steps", "4", "--method", "sft"]
    assert stop_at(2, signal.SIGINT, argv) == 130
    (saved,) = tmp_path.glob("base/*/checkpoint.pt")
    spent = 1000.0
    rewrite(saved, lambda content: content.update(seconds=spent))
    code, out, err = go(tmp_path, "--base-steps 4 --method sft --resume")
    assert code == 0 and "nothing to resume" in out, err
    results = json.loads((tmp_path / "sft" / "results.json").read_text())
    assert spent < results["seconds"]["base"] < spent + 60


@kind(RESUME)
@pytest.mark.parametrize("flags", ["--resume", "--resume --method sft"])
def test_a_resume_of_nothing_says_so(flags, made, tmp_path, go):
    out = tmp_path / "out"
    shutil.copytree(made / "base", out / "base")
    if "sft" in flags:  # the other method has a run
        shutil.copytree(made / "sdft", out / "sdft")
    code, text, _ = go(out, flags)
    assert code == 0
    assert "nothing to resume" in text[: text.index("teacher gate")]


@kind(RESUME)
def test_a_resume_on_another_machine_says_that_it_is_not_exact(stopped, go):
    path = stopped / "sdft" / "checkpoint.pt"
    rewrite(path, lambda content: content["machine"].update(MACHINE))
    code, out, _ = go(stopped, " ".join([*OFTEN, "--resume"]))
    line = next(line for line in out.splitlines() if "not to the bit" in line)
    assert code == 0
    assert all(f"{key}: {value} -> " in line for key, value in MACHINE.items()), line


@kind(RESUME)
def test_the_stopped_run_prints_the_command_that_goes_on(tmp_path, made, capsys):
    out = tmp_path / "a place with spaces"
    shutil.copytree(made / "base", out / "base")
    argv = [*TINY, "--out", str(out), "--method", "sft"]
    assert stop_at(1, signal.SIGINT, argv) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    words = shlex.split(line.removeprefix("stopped; to go on: "))
    assert words == ["python", "train.py", *argv, "--resume"]


@kind(RESUME)
def test_a_finished_run_that_is_resumed_keeps_its_results(finished, go):
    flags = "--method sft --log-every 1 --save-every 1 --resume"
    before = json.loads((finished / "sft" / "results.json").read_text())
    assert go(finished, flags)[0] == 0
    after = json.loads((finished / "sft" / "results.json").read_text())
    assert without_times(after) == without_times(before)
    assert not list(finished.glob("sft.previous*"))


# ---- What is checked late ----------------------------------------------------------

LATE = "checked before the work"


@kind(LATE)
@pytest.mark.parametrize(("flags", "word"), [
    ("--max-new-tokens 200", "128"), ("--max-new-tokens 127", "128"),
    ("--demos 63", "--demos"), ("--batch-size 65", "65"),
    ("--method both --sft.batch-size 65", "sft"), ("--demos 8 --batch-size 9", "9"),
    ("--micro-batches 3", "multiple of 3"), ("--n-kv-head 3", "3"),
    ("--n-embd 36 --n-head 4", "even"), ("--device cuda:99", "cuda:99"),
    ("--device abacus", "abacus"), ("--device mps:7", "mps"), ("--device meta", "meta"),
    ("--lr nan", "--lr"), ("--seed -1", "--seed"), ("--steps 0", "--steps"),
    ("--sft.lr nan --method sft", "--sft.lr"), ("--base nothing.pt", "nothing.pt"),
    ("--sdft.lr", "--sdft.lr"), ("--compare", "--compare"), ("typed", "typed"),
])  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_made(
    flags, word, tmp_path, go, no_training
):
    small = [flag for flag in TINY if flag != "--base-steps"]
    small.remove("2")
    if "mps" in flags and torch.backends.mps.is_available():
        pytest.skip("there is one")
    assert_refused(go(tmp_path / "out", flags, small), word)
    assert not (tmp_path / "out").exists()


@kind(LATE)
@pytest.mark.parametrize("place", [
    "out", "out/sdft", "out/base", "out/below", "out/lock",
])  # fmt: skip
def test_a_file_in_the_place_of_a_folder_is_refused(place, tmp_path, go, no_training):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    out = tmp_path / "out"
    if place == "out/lock":  # and a folder in the place of a file
        path.mkdir()
    else:
        path.write_text("mine")
    out = path / "deeper" if place == "out/below" else out
    assert_refused(go(out), str(path))
    assert path.is_dir() or path.read_text() == "mine"


@kind(LATE)
def test_a_folder_that_cannot_be_made_is_refused(go, tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert_refused(go(tmp_path / "out"), str(tmp_path / "out"))


@kind(LATE)
@pytest.mark.parametrize("file", ["checkpoint.pt", "metrics.jsonl"])
def test_a_damaged_file_is_found_before_the_base_is_made(
    file, stopped, go, no_training
):
    path = stopped / "sdft" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2 - 3 : len(content) // 2] = b"???"
    path.write_bytes(content.replace(b'"step"', b'"step', 1))
    shutil.rmtree(stopped / "base")
    assert_refused(go(stopped, " ".join([*OFTEN, "--resume"])), str(path))
    assert not list(stopped.glob("base/*/*.pt"))


@kind(LATE)
@pytest.mark.parametrize("flags", [
    "--lr .5", "--steps 3", "--seed 1", "--n-layer 2", "--n-inner 64", "--demos 128",
    "--distance own", "--eval-size 16", "--base-steps 3", "--kl reverse",
    "--max-new-tokens 9", "--sdft.lr .5", "--dtype bfloat16", "--teacher frozen",
])  # fmt: skip
def test_a_resume_with_other_settings_is_refused_before_a_base_is_made(
    flags, stopped, go, no_training
):
    before = texts_below(stopped / "sdft")
    result = go(stopped, " ".join([*OFTEN, "--resume", flags]))
    assert_refused(result, str(stopped / "sdft"))
    assert texts_below(stopped / "sdft") == before


@kind(LATE)
def test_an_unfinished_run_is_not_begun_anew_without_a_word(stopped, go, no_training):
    assert_refused(go(stopped), "not finished", "--resume")


@kind(LATE)
def test_a_picture_without_matplotlib_is_mentioned_before_the_work(
    with_base, go, monkeypatch
):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None
                        if name == "matplotlib" else real(name))  # fmt: skip
    code, out, _ = go(with_base, "--method sft --plot")
    assert code == 0 and "matplotlib" in out[: out.index("teacher gate")]


# ---- What a platform, a disk or a terminal lacks -----------------------------------

PLATFORM = "platform, disk, terminal"


@kind(PLATFORM)
def test_a_system_without_fcntl_and_msvcrt_imports_and_says_so(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    spec = importlib.util.spec_from_file_location("train_without", train.__file__)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other.fcntl is None and other.msvcrt is None
    other.lock(tmp_path).close()
    assert "no locks on this system" in capsys.readouterr().out


class Msvcrt:
    """Locks of bytes as Windows has them: of one file, for one opening of it."""

    LK_NBLCK = 2

    def __init__(self):
        self.held = {}

    def locking(self, number, mode, n_bytes):
        assert mode == self.LK_NBLCK
        at = os.fstat(number).st_ino, os.lseek(number, 0, os.SEEK_CUR), n_bytes
        if self.held.setdefault(at, number) != number:
            raise PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture
def windows(monkeypatch):
    """What Python says on Windows, as far as train.py asks."""
    real, fake = os.open, Msvcrt()

    def open_(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(train, "fcntl", None)
    monkeypatch.setattr(train, "msvcrt", fake)
    monkeypatch.setattr(os, "open", open_)
    for name in ("fork", "getuid", "killpg", "O_DIRECTORY", "statvfs"):
        monkeypatch.delattr(os, name)
    for name in ("SIGKILL", "SIGSTOP", "SIGALRM", "SIGHUP"):
        monkeypatch.delattr(signal, name)
    return fake


@kind(PLATFORM)
def test_windows_locks_let_one_run_in(windows, tmp_path):
    file = train.lock(tmp_path)
    with pytest.raises(train.UserError, match=f"in use .* process {os.getpid()}$"):
        train.lock(tmp_path)
    assert len(windows.held) == 1
    file.close()


@kind(PLATFORM)
def test_a_whole_run_goes_through_on_windows(windows, tmp_path, go):
    code, out, err = go(tmp_path / "out", "--method sft")
    assert code == 0 and len(windows.held) == 2, err
    assert go(tmp_path / "out", "--method sft --resume")[0] == 0


@kind(PLATFORM)
def test_nothing_asks_for_the_name_of_the_system():
    """What is tried works on a system nobody has heard of; a look-up may not."""
    for module in (train, data, model, sft, sdft):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute):
                assert (getattr(node.value, "id", ""), node.attr) != ("os", "name")
                assert node.attr != "platform"


def failing(number, real=None, when=lambda *args: True):
    def call(*args, **kwargs):
        if when(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    return call


def is_folder(number):
    return os.path.isdir(f"/proc/self/fd/{number}") or (
        os.fstat(number).st_mode & 0o170000 == 0o040000
    )


def save_thrice(folder):
    """What a run does, with the disk alone: the checkpoint and the one before it."""
    path = folder / "checkpoint.pt"
    for step in range(3):
        train.write_checkpoint(path, {"step": step})
    assert train.read_checkpoint(path)["step"] == 2
    previous = path.with_name("checkpoint.pt.previous")
    assert train.read_checkpoint(previous)["step"] == 1
    assert {p.name for p in folder.iterdir()} == {path.name, previous.name}


@kind(PLATFORM)
@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "ENOSYS", "EBADF"])
def test_a_folder_that_cannot_be_synced_is_no_error(code, tmp_path, monkeypatch):
    fail = failing(getattr(errno, code), os.fsync, is_folder)
    monkeypatch.setattr(os, "fsync", fail)
    save_thrice(tmp_path)


@kind(PLATFORM)
@pytest.mark.parametrize("code", ["EACCES", "EISDIR", "EPERM"])
def test_a_folder_that_cannot_be_opened_is_no_error(code, tmp_path, monkeypatch):
    fail = failing(getattr(errno, code), os.open, lambda path, *_: os.path.isdir(path))
    monkeypatch.setattr(os, "open", fail)
    save_thrice(tmp_path)


@kind(PLATFORM)
@pytest.mark.parametrize("what", ["a file", "a folder"])
def test_a_disk_that_breaks_is_an_error(what, tmp_path, monkeypatch):
    """EIO is not a lack of the system: the data may be gone."""
    when = is_folder if what == "a folder" else lambda number: not is_folder(number)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, os.fsync, when))
    with pytest.raises(OSError, match="checkpoint.pt not written: Input/output error"):
        train.write_checkpoint(tmp_path / "checkpoint.pt", {"step": 0})
    assert not list(tmp_path.glob("*.tmp.*"))


LINKS = ["EPERM", "EOPNOTSUPP", "ENOSYS", "EXDEV", "EMLINK", "EACCES", "missing"]


@kind(PLATFORM)
@pytest.mark.parametrize("code", LINKS)
def test_a_disk_without_hard_links_keeps_the_one_before(code, tmp_path, monkeypatch):
    if code == "missing":
        monkeypatch.delattr(os, "link")
    else:
        monkeypatch.setattr(os, "link", failing(getattr(errno, code)))
    save_thrice(tmp_path)


@kind(PLATFORM)
def test_a_whole_run_goes_through_on_a_poor_disk(with_base, go, monkeypatch):
    """No links, no locks, no syncs of folders: exFAT, or a shared folder."""
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, os.fsync, is_folder))
    monkeypatch.setattr(train.fcntl, "flock", failing(errno.ENOLCK))
    code, out, err = go(with_base, "--save-every 1")
    assert code == 0 and "has no locks" in out, err
    assert train.read_checkpoint(with_base / "sdft" / "checkpoint.pt")["step"] == 6


@kind(PLATFORM)
@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_disk_without_locks_is_said_and_used(code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.fcntl, "flock", failing(getattr(errno, code)))
    train.lock(tmp_path).close()
    out = capsys.readouterr().out
    assert "has no locks" in out and os.strerror(getattr(errno, code)) in out


@kind(PLATFORM)
@pytest.mark.parametrize("code", ["EWOULDBLOCK", "EACCES"])
def test_a_lock_that_another_run_holds_is_an_error(code, tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("4711")
    monkeypatch.setattr(train.fcntl, "flock", failing(getattr(errno, code)))
    with pytest.raises(train.UserError, match="process 4711"):
        train.lock(tmp_path)


@kind(PLATFORM)
@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_call_leaves_a_checkpoint_and_the_one_before(
    links, tmp_path, monkeypatch
):
    """Before and after each change of a name or a file, one after the other."""
    if not links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    path = tmp_path / "checkpoint.pt"
    for step in range(2):
        train.write_checkpoint(path, {"step": step})
    previous = path.with_name("checkpoint.pt.previous")
    for moment in range(100):
        calls = []

        def deadly(real, after, calls=calls, moment=moment):
            def call(*args, **kwargs):
                calls.append(real)
                if len(calls) > moment and not after:
                    raise SystemExit
                result = real(*args, **kwargs)
                if len(calls) > moment:
                    raise SystemExit
                return result

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in ("link", "replace", "unlink", "fsync", "rename"):
                after = bool(moment % 2)
                patch.setattr(os, name, deadly(getattr(os, name), after))
            try:
                train.write_checkpoint(path, {"step": 2})
                survived = True
            except SystemExit:
                survived = False
        steps = [train.read_checkpoint(p)["step"] for p in (path, previous)]
        assert steps[0] in (1, 2) and steps[1] in (0, 1, 2) and steps[1] <= steps[0]
        if survived:
            break
        train.write_checkpoint(path, {"step": 1})
        train.write_checkpoint(path, {"step": 1})
        train.remove_temporary(tmp_path)
    assert survived and moment > 4


@kind(PLATFORM)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-16"])
def test_a_terminal_that_lacks_a_character_ends_nothing(encoding, made, tmp_path):
    """Random weights say bytes that are no text; the folder is named in Danish."""
    out = shutil.copytree(made, tmp_path / "a\xf8 \u6f22 b")
    screen, errors = BytesIO(), BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", TextIOWrapper(screen, encoding=encoding))
        patch.setattr(sys, "stderr", TextIOWrapper(errors, encoding=encoding))
        argv = ["--out", str(out), "--sample", "caf\xe9 \ufffd", "--method", "sft"]
        code = train.main(argv)
        bad = train.main(["--out", str(out), "--base", "\u6f22.pt"])
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        text, err = (b.getvalue().decode(encoding) for b in (screen, errors))
    assert code == 0 and "sampled: " in text, err
    assert bad == 2 and "hint" in err


@kind(PLATFORM)
def test_a_record_that_the_terminal_cannot_show_is_whole_in_its_file(
    with_base, monkeypatch
):
    real = data.greedy_responses
    monkeypatch.setattr(data, "greedy_responses", lambda *args: [
        text + " \ufffd \u6f22" for text in real(*args)])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="ascii"))
        assert train.main([*TINY, "--out", str(with_base), "--method", "sft"]) == 0
    (row, *_) = train.read_metrics(with_base / "sft")
    assert row["responses"][0]["response"].endswith(" \ufffd \u6f22")


def start(argv, **environment):
    """A process of its own, its errors and output apart."""
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "TMPDIR")}
    env = {**env, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv], env=env, cwd="/",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@kind(PLATFORM)
def test_a_reader_that_is_gone_gets_an_error_without_a_traceback(made):
    """python train.py --sample x | true"""
    process = start(["--out", str(made), "--sample", "x"])
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 2
    lines = err.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], err


@kind(PLATFORM)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_program_without_a_terminal_runs(name, made, monkeypatch, capsys):
    """Python gives None for what is closed: `>&-`, or pythonw on Windows."""
    monkeypatch.setattr(sys, name, None)
    assert train.main(["--out", str(made), "--show"]) == 0
    assert train.main(["--out", str(made), "--steps", "x"]) == 2


@kind(PLATFORM)
def test_no_home_no_folder_for_temporary_files_spaces_and_letters(tmp_path, made):
    out = tmp_path / "mein R\xfcckgrat \u6f22"
    shutil.copytree(made / "base", out / "base")
    argv = [*TINY, "--out", str(out), "--method", "sft"]
    process = start(argv, TMPDIR="/nowhere", PYTHONIOENCODING="ascii", LC_ALL="C")
    text, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert b"sft/results.json" in text and (out / "sft" / "results.json").exists()


def device_test(seed):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_inner=16))
    with torch.no_grad():
        for p in gpt.parameters():
            p *= 10
    return gpt


WRONG = {
    "attention": lambda logits: logits * 1.1,
    "nothing": lambda logits: logits,
    "rounding": lambda logits: logits + 1e-6,
    "not finite": lambda logits: logits * math.nan,
}


@kind(PLATFORM)
@pytest.mark.parametrize("what", WRONG)
def test_a_device_that_computes_something_else_gets_a_warning(
    what, monkeypatch, capsys
):
    """A wrong kernel that only the device has; its copy on the CPU is right."""
    gpt = device_test(0)
    real = gpt.logits
    gpt_class = type("OnDevice", (GPT,), {
        "logits": lambda self, hidden: WRONG[what](GPT.logits(self, hidden)),
    })  # fmt: skip
    twin = GPT(gpt.config)
    twin.load_state_dict(gpt.state_dict())
    gpt.__class__ = gpt_class
    monkeypatch.setattr(train.copy, "deepcopy", lambda student: twin)
    assert real is not None
    difference = train.check_device(gpt)
    out = capsys.readouterr().out
    if what in ("nothing", "rounding"):
        assert not out and difference < 1e-4
    else:
        assert "warning" in out and "--device cpu" in out


@kind(PLATFORM)
def test_a_device_whose_sampler_alone_is_wrong_gets_a_warning(monkeypatch, capsys):
    gpt = device_test(0)
    real, calls = model.generate, []

    def generate(*args, **kwargs):
        calls.append(args)
        response, mask = real(*args, **kwargs)
        return (response + (len(calls) == 2), mask)

    monkeypatch.setattr(model, "generate", generate)
    train.check_device(gpt)
    assert "greedy tokens differ" in capsys.readouterr().out


# ---- What reduces over processes ---------------------------------------------------

PROCESSES = "several processes"


class World:
    """torch.distributed as process `rank` of n sees it; all have the same values, or,
    in a broadcast, those of the first."""

    def __init__(self, n, first=None):
        self.n, self.first = n, first

    def all_reduce(self, value, op=torch.distributed.ReduceOp.SUM):
        if op == torch.distributed.ReduceOp.SUM:
            value *= self.n

    def broadcast_object_list(self, both):
        if self.first is not None:
            both[:] = self.first

    def install(self, monkeypatch):
        for name, value in (
            ("is_initialized", lambda: True), ("get_world_size", lambda: self.n),
            ("get_rank", lambda: 0), ("get_backend", lambda: "gloo"),
            ("all_reduce", self.all_reduce), ("destroy_process_group", lambda: None),
            ("broadcast_object_list", self.broadcast_object_list),
        ):  # fmt: skip
            monkeypatch.setattr(torch.distributed, name, value)


@kind(PROCESSES)
@pytest.mark.parametrize(("n", "number"), [(2, signal.SIGINT), (4, signal.SIGTERM)])
def test_the_exit_code_of_several_processes_is_that_of_one(
    n, number, with_base, monkeypatch
):
    World(n).install(monkeypatch)
    monkeypatch.setattr(train, "start_processes", lambda args: n)
    argv = [*TINY, "--out", str(with_base), "--method", "sft"]
    assert stop_at(1, number, argv) == 128 + number


@kind(PROCESSES)
def test_the_command_to_go_on_starts_as_many_processes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    line = train.command_line(["--out", "a b", "--resume"])
    assert line == (
        "torchrun --standalone --nproc_per_node=3 train.py --out 'a b' --resume"
    )


@kind(PROCESSES)
@pytest.mark.parametrize("n", [3, 5, 6, 7])
def test_a_base_that_cannot_be_shared_out_names_what_can_be_changed(
    n, tmp_path, go, monkeypatch, no_training
):
    """Its batch of 64 is no flag: the number of processes is what is left."""
    monkeypatch.setattr(train, "start_processes", lambda args: n)
    result = go(tmp_path / "out", f"--batch-size {8 * n} --demos {8 * n}")
    assert_refused(result, "base model", "hint: a number of processes")
    assert not (tmp_path / "out").exists()


@kind(PROCESSES)
@pytest.mark.parametrize("n", [2, 4])
def test_a_batch_that_cannot_be_shared_out_names_a_flag(
    n, tmp_path, go, monkeypatch, no_training
):
    monkeypatch.setattr(train, "start_processes", lambda args: n)
    result = go(tmp_path / "out", "--batch-size 63")
    assert_refused(result, "63", f"--batch-size that is a multiple of {n}")


@kind(PROCESSES)
@pytest.mark.parametrize("names", [
    {"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "2"},
])  # fmt: skip
def test_half_of_torchrun_s_variables_get_an_error_that_is_printed(
    names, tmp_path, go, monkeypatch
):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert_refused(go(tmp_path / "out"), "MASTER_ADDR", "torchrun")


def set_rank(monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    for name, value in ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1"):
        monkeypatch.setenv(name, value)


@kind(PROCESSES)
def test_an_error_of_the_first_reaches_the_others_who_say_nothing(
    made, monkeypatch, go, no_training
):
    set_rank(monkeypatch, 1)
    monkeypatch.setattr(train, "start_processes", lambda args: 2)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    World(2, first=[None, train.UserError("the first says", "so")]).install(monkeypatch)
    before = texts_below(made)
    code, out, err = go(made)
    assert (code, out, err) == (2, "", "") and texts_below(made) == before


@kind(PROCESSES)
def test_an_occupied_folder_is_told_once_by_two_real_processes(made):
    held = train.lock(made)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        start([*TINY, "--out", str(made)], RANK=str(rank), WORLD_SIZE="2",
              MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=str(rank))
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1].decode() for process in both]
    held.close()
    assert [process.returncode for process in both] == [2, 2], errors
    assert "is in use by another run" in errors[0] and "hint: " in errors[0]
    assert "Traceback" not in errors[0] + errors[1] and "error" not in errors[1]


# ---- Silent wrong values -----------------------------------------------------------

SILENT = "silent wrong values"


@kind(SILENT)
@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "results.json"])
def test_a_run_in_the_folder_of_another_is_refused_unless_resumed(name, made, tmp_path):
    shutil.copy(made / "sft" / name, tmp_path)
    gpt = device_test(0)
    before = texts_below(tmp_path)
    with pytest.raises(ValueError, match="holds a run"):
        train.Run(tmp_path).load({"student": gpt}, None, sft.Config(), {})
    assert texts_below(tmp_path) == before


@kind(SILENT)
@pytest.mark.parametrize("change", [
    {"cfg": sft.Config(lr=1.0)}, {"examples": {"A": [1]}}, {"weights": 1},
])  # fmt: skip
def test_a_run_with_other_settings_examples_or_weights_is_refused(change, tmp_path):
    def load(cfg=sft.Config(), examples=(), weights=0, resume=True):  # noqa: B008
        gpt = device_test(weights)
        optimizer = sft.make_optimizer(gpt, cfg)
        run = train.Run(tmp_path, resume=resume)
        run.load({"student": gpt}, optimizer, cfg, examples)
        return run, gpt, optimizer

    run, gpt, optimizer = load(resume=False)
    run.save(1, {"student": gpt}, optimizer, [])
    load()
    with pytest.raises(ValueError, match="holds another run"):
        load(**change)


@kind(SILENT)
@pytest.mark.parametrize("temperature", [0.7, 0.8, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_of_the_distribution_that_was_sampled(dtype, temperature):
    gpt = device_test(3)
    gpt.dtype = dtype
    tokens = torch.randint(512, (4, 9), generator=data.make_rng(0, "test"))
    with torch.no_grad():
        hidden = gpt.hidden(tokens)[:, -1]
        logits = gpt.logits(hidden)  # what the sampler divides
        p = torch.softmax(logits / temperature, -1)
        mine = model.make_logits(hidden, gpt.head(), temperature)
        assert torch.equal(torch.softmax(mine, -1), p)


@kind(SILENT)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
def test_strides_of_the_attention_kernel_do_not_matter(heads, monkeypatch):
    """Kernels differ by version and device in how their result lies in memory."""
    torch.manual_seed(0)
    n_head, n_kv_head = heads
    gpt = GPT(GPTConfig(n_layer=2, n_head=n_head, n_kv_head=n_kv_head,
                        n_embd=8 * n_head, n_inner=16))  # fmt: skip
    prompts = torch.randint(512, (3, 5), generator=data.make_rng(1, "test"))
    lengths = torch.tensor([5, 3, 1])
    right, _ = model.generate(gpt, prompts, lengths, 6, 0, temperature=0)
    real = F.scaled_dot_product_attention

    def strided(*args, **kwargs):  # (B, H, T, D) that lies as (B, T, H, D), D last
        y = real(*args, **kwargs)
        return y.transpose(1, 2).contiguous().transpose(1, 2)

    def turned(*args, **kwargs):  # D first
        return real(*args, **kwargs).transpose(1, 3).contiguous().transpose(1, 3)

    for kernel in (strided, turned):
        monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
        tokens, _ = model.generate(gpt, prompts, lengths, 6, 0, temperature=0)
        assert torch.equal(tokens, right)


class OnGPU(torch.Tensor):
    is_cuda = True


@kind(SILENT)
@pytest.mark.parametrize("shape", [(2, 72), (2, 56), (3, 64), (1, 64)])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_rows_of_two_lengths_never_reach_a_kernel(shape, on_gpu, monkeypatch):
    """A kernel for a GPU reads what is behind the end of a row, and says nothing."""
    def launched(*args):
        raise AssertionError("the kernel was launched")

    monkeypatch.setattr(model, "triton", True)
    monkeypatch.setattr(model, "kl_rows_triton", launched)
    monkeypatch.setattr(model, "kl_rows_torch", launched)
    s, t = torch.randn(2, 64), torch.randn(*shape)
    if on_gpu:
        s = s.as_subclass(OnGPU)
    with pytest.raises(ValueError, match=rf"logits \(2, 64\) and \({shape[0]}, "):
        model.fused_kl(s, t, torch.ones(2), "forward")


ZEROS = torch.zeros(2, 3, dtype=torch.int64)


HIDDEN, HEAD, ONES = torch.randn(3, 4), torch.randn(8, 4), torch.ones(3)

BAD_CALLS = {
    "one weight for all rows, KL": lambda: chunked_kl(
        HIDDEN, HIDDEN, HEAD, HEAD, torch.ones(1)),
    "more weights than rows, KL": lambda: chunked_kl(
        HIDDEN, HIDDEN, HEAD, HEAD, torch.ones(4)),
    "a mask as weights, KL": lambda: chunked_kl(HIDDEN, HIDDEN, HEAD, HEAD, ONES > 0),
    "another number of teacher rows": lambda: chunked_kl(
        HIDDEN, torch.randn(4, 4), HEAD, HEAD, ONES),
    "another vocabulary of the teacher": lambda: chunked_kl(
        HIDDEN, HIDDEN, HEAD, torch.randn(9, 4), ONES),
    "a divergence that is none": lambda: chunked_kl(
        HIDDEN, HIDDEN, HEAD, HEAD, ONES, "forwards"),
    "a single row that would be broadcast": lambda: model.kl_reference(
        torch.randn(3, 8), torch.randn(1, 8)),
    "one weight for all rows, likelihood": lambda: chunked_nll(
        HIDDEN, HEAD, ZEROS[0], torch.ones(1)),
    "a mask as weights, likelihood": lambda: chunked_nll(
        HIDDEN, HEAD, ZEROS[0], ONES > 0),
    "one token for all rows": lambda: chunked_nll(HIDDEN, HEAD, ZEROS[0, :1], ONES),
    "more tokens than rows": lambda: chunked_nll(HIDDEN, HEAD, ZEROS.view(-1), ONES),
    "an empty prompt, hidden": lambda: model.response_hidden(
        device_test(0), ZEROS, torch.tensor([3, 0]),
        torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)),
    "an empty prompt, sampler": lambda: model.generate(
        device_test(0), ZEROS, torch.tensor([3, 0]), 4, 0,
        temperature=0),
    "a prompt longer than its row": lambda: model.generate(
        device_test(0), ZEROS, torch.tensor([3, 4]), 4, 0,
        temperature=0),
    "numbers that are not below 1": lambda: model.generate(
        device_test(0), ZEROS, torch.tensor([3, 2]), 4, 0,
        torch.ones(2, 4)),
    "one number for all tokens": lambda: model.generate(
        device_test(0), ZEROS, torch.tensor([3, 2]), 4, 0,
        torch.rand(2, 1)),
    "a prompt and a response that do not fit": lambda: model.generate(
        device_test(0), ZEROS, torch.tensor([3, 2]), 126,
        0, temperature=0),
    "more tokens than rows of the embedding": lambda: GPTConfig(n_tokens=513),
    "a batch larger than its examples": lambda: data.get_batch(
        data.make_demos(data.World(0), "A", 8, 0), 9, 0, 0),
    "a batch that cannot be cut": lambda: data.my_micro_batches([1, 2, 3], 2),
    "examples with one id": lambda: data.get_uniform(
        [data.Example("a", "b", "c"), data.Example("d", "e", "f")], 4, 0, 0, "cpu"),
    "a distance that is none": lambda: data.make_demos(
        data.World(0), "A", 8, 0, "term"),
    "a skill that is none": lambda: data.make_demos(data.World(0), "D", 8, 0),
}  # fmt: skip


@kind(SILENT)
@pytest.mark.parametrize("what", BAD_CALLS)
def test_an_argument_that_would_be_silently_wrong_is_refused(what):
    with pytest.raises((ValueError, AssertionError, KeyError)) as caught:
        BAD_CALLS[what]()
    assert str(caught.value)


@kind(SILENT)
@pytest.mark.parametrize("method", ["sft", "sdft"])
@pytest.mark.parametrize(("change", "error"), [
    ({"batch_size": 32}, AssertionError), ({"batch_size": 8, "micro_batches": 3},
    AssertionError), ({"kl": "forwards"}, ValueError), ({"teacher": "eam"}, KeyError),
])  # fmt: skip
def test_a_trainer_refuses_what_its_config_cannot_mean(method, change, error, tmp_path):
    config = train.METHODS[method].Config
    if not all(hasattr(config, name) for name in change):
        pytest.skip("no setting of SFT")
    cfg = replace(config(), **{"steps": 1, "batch_size": 8, **change})
    stages = {"A": data.make_demos(data.World(0), "A", 16, 0)}
    with pytest.raises(error):
        train.METHODS[method].train(
            device_test(0), stages, {}, data.Tokenizer(), cfg, train.Run(tmp_path)
        )


@kind(SILENT)
def test_nothing_is_executed_that_a_checkpoint_holds(tmp_path):
    """A pickle can call anything. It is read by its checksum, and then not believed."""
    path = tmp_path / "checkpoint.pt"
    train.write_checkpoint(path, {"call": Namespace(a=1)})
    with pytest.raises(ValueError, match="not loaded"):
        train.read_checkpoint(path)


@kind(SILENT)
def test_paths_with_letters_are_in_messages_as_they_were_typed(tmp_path, go):
    out = tmp_path / "R\xfcckgrat \u6f22"
    result = go(out, "--show", [])
    assert_refused(result, str(out))
    assert re.search(r"no finished run", result[2])
