"""What must hold when things go wrong: real processes, real SIGKILL, full disks.

A kill comes at a step that a test names, or, with --all, at any moment: three in each
part of a run, or KILLS=n. Damaged files: see test_faults.
"""

import ast
import contextlib
import fcntl
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys

import pytest
import torch

from test_train import (  # isort: skip
    CHANGES, GATE, METHODS, ROOT, SIGNALS, SMALL, TOK, assert_refused, base_file,
    files_in, finished, go, made, make, same, send, sources_are_read_once, start,
    with_base,
)  # fmt: skip
from bench.reliability import (  # isort: skip
    FLAGS, assert_same, assert_stopped, at, begin, contents, finish, killed_and_resumed,
    moments_of_a_save, run_two,
)  # fmt: skip

import data
import train
from model import GPT, GPTConfig

__all__ = ["finished", "go", "made", "sources_are_read_once", "with_base"]  # fixtures


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that died in the base's sixth step, by the second of two
    signals to stop, went on, and was killed in a save of sdft; and how both ended."""
    out = tmp_path_factory.mktemp("killed") / "out"
    moments = at("base", 5, "SIGTERM", "SIGINT"), at("sdft", 4, "half")
    return out, [
        finish(begin(out, *["--resume"] * i, PYTHONHASHSEED=f"{i}7", **moment))
        for i, moment in enumerate(moments)
    ]


def test_a_killed_run_ends_as_an_uninterrupted_one(killed, made, tmp_path, go):
    """Also after an attempt on a full disk (no file may grow beyond 32 KiB), which is
    an error and loses nothing; of the save and of a line of metrics there is a half."""
    out, ((code, text, err), (again, more, _)) = tmp_path / "out", killed[1]
    assert (code, again) == (-signal.SIGINT, -signal.SIGKILL), err
    assert "once more stops at once" in err and "step    0 base" in text
    assert "step    0 base" not in more
    sdft = shutil.copytree(killed[0], out) / "sdft"
    half, saved = sdft / "checkpoint.pt.tmp", sdft / "checkpoint.pt"
    os.truncate(half, half.stat().st_size // 2)
    with open(sdft / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "ski')
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        result = go(out, "--resume --method sdft")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, f"error: {saved} not written: [Errno 27] File too large")
    assert saved.read_bytes() == before and not list(out.rglob("*.tmp"))
    code, text, err = go(out, "--resume --method both")
    assert code == 0 and f"plan: sdft: {sdft} goes on after update 4\n" in text, err
    assert f"plan: sft: {out / 'sft'} goes on after update 9\n" in text
    assert "step    4 B" in text and "step    3 B" not in text
    assert_same(out, made)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["base", *METHODS])
def test_a_run_may_be_killed_at_any_moment(part, made, tmp_path):
    for i in range(int(os.environ.get("KILLS", 3))):
        rng, in_save = random.Random(f"{part} {i}"), i % 3 == 2
        killed_and_resumed(part, tmp_path / f"{i}", made, rng, in_save)


@pytest.mark.parametrize("what", ["dies", *(
    pytest.param(what, marks=pytest.mark.slow) for what in ("fails", "is full"))])
def test_a_save_may_die_or_fail_at_any_moment(what, tmp_path, monkeypatch):
    """Before, in and after each call that touches the disk, those of torch as well. (A
    process that dies takes no page of the system's with it; syncs only cost.)"""
    monkeypatch.setattr(os, "fsync", lambda number: None)
    assert moments_of_a_save(tmp_path / "saves", what) > 50


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_same_end_by_the_command_that_it_prints(
    method, made, with_base, go
):
    """Stopped in the first and in the last step of a stage, in between, and in the last
    of all. A signal that the parent ignores, as nohup does, stays ignored."""
    out, argv = with_base, ["--method", method]
    for step, number in zip((0, 4, 5, 8), SIGNALS, strict=True):
        code, _, err = go(out, shlex.join(argv), act=send(number, method, step))
        argv = ["--method", method, "--resume"]
        words = shlex.split(err.removeprefix("stopped; to go on: "))
        assert words == ["python", "train.py", *SMALL, "--out", str(out), *argv]
        assert code == 128 + number and err.count("\n") == 1
        assert train.read_metrics(out / method)[-1]["step"] == step
        after = f"{method}: seed 0, after update {step + 1}\n"
        assert after in go(out, f"--sample x --method {method}", [])[1]
    assert go(out, shlex.join(argv))[0] == 0
    assert_same(out, made, method)

    def all_signals(part, step):
        for number in SIGNALS:
            os.kill(os.getpid(), number)

    again = f"--method {method} --steps 1"
    assert go(out, again, act=all_signals, handler=signal.SIG_IGN)[0] == 0


@pytest.mark.parametrize(("name", "code"), [("stdout", 2), ("stderr", 143)])
def test_a_run_ends_in_order_though_nobody_reads_it(
    name, code, with_base, go, monkeypatch
):
    """python train.py | head -1; and Ctrl-C ends `python train.py 2>&1 | tee log`, with
    tee. No traceback; what was done is saved."""
    (reader, writer), kept = os.pipe(), os.dup(2)
    os.close(reader)
    stream = open(writer, "w")
    monkeypatch.setattr(sys, name, stream)
    os.dup2(writer, 2)
    try:
        result = go(with_base, act=send(signal.SIGTERM, "sdft", 1))
    finally:
        os.dup2(kept, 2)
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    assert result[0] == code
    if name == "stdout":
        assert_refused(result, "the program that reads this output has ended")
    else:
        assert train.read_run(with_base / "sdft" / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_not_finite_is_not_made_and_ends_with_3(
    method, what, with_base, monkeypatch, go
):
    """The steps before it stay in weights and checkpoint."""
    real, seen = METHODS[method].compute_loss, []

    def broken(student, *args):
        loss, extra = real(student, *args)
        weights = [*student.parameters()]
        seen.append((weights, [p.detach().clone() for p in weights]))
        if len(seen) == 6:  # step 5
            zero = (weights[-1] - weights[-1]).sum()
            loss = loss + (math.inf if what == "loss" else 0 * zero.sqrt())
        return loss, extra

    monkeypatch.setattr(METHODS[method], "compute_loss", broken)
    code, _, err = go(with_base, f"--method {method}")
    numbers = {"loss": r"inf, .* norm \d.*", "gradient": r"\d.*, .* norm nan"}[what]
    assert code == 3 and re.fullmatch(
        rf"error: step 5: loss {numbers}; .*its examples: \[\d.*\]\n"
        r"hint: try a lower --lr; checkpoint.pt is still good\n", err)  # fmt: skip
    assert all(map(torch.equal, *seen[5])) and not all(map(torch.equal, *seen[4]))
    saved = train.read_run(with_base / method / "checkpoint.pt")
    weights = [w for m in saved["models"].values() for w in m.values()]
    assert saved["step"] == 4 and all(w.isfinite().all() for w in weights)
    assert train.read_metrics(with_base / method)[-1]["step"] == 4


def assert_same_training(one, two):
    """Of one process with two micro-batches, and of two processes."""
    for method in METHODS:
        parts = [contents(out, method) for out in (one, two)]
        for part, n in zip(parts, (1, 2), strict=True):
            assert part["machine"].pop("processes") == n and len(part["metrics"]) > 6
            assert part["machine"].pop("micro_batches") * n == 2
            for key in "machine", "config":  # which has micro_batches
                part.get("results", {}).pop(key, None)
        assert same(*parts), method


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run on two processes, from a base that one has made, that was
    stopped in sdft by SIGTERM, which the second of them got; and how they ended."""
    out = tmp_path_factory.mktemp("two") / "out"
    shutil.copytree(make(tmp_path_factory.getbasetemp()) / "base", out / "base")
    return out, run_two(out, **at("sdft", 4, "SIGTERM", ranks="1"))


def test_two_processes_that_are_stopped_equal_one_that_is_to_the_bit(two, tmp_path, go):
    """Sft to its end, and sdft up to the stop. One had the signal, both end with its
    number, and the first prints the command."""
    assert_stopped(two[1], 143, [*FLAGS, "--out", str(two[0]), "--resume"])
    act = send(signal.SIGTERM, "sdft", 4)
    assert go(tmp_path, "--method both --micro-batches 2", act=act)[0] == 143
    assert_same_training(tmp_path, two[0])


@pytest.mark.slow
def test_a_base_of_two_processes_is_that_of_one_but_for_rounding(made, tmp_path):
    """Four micro-batches of one process are two of each: another order of a sum."""
    run_two(tmp_path / "out", **at("sft", 0, "SIGTERM", ranks="1"))
    paths = [base_file(out) for out in (tmp_path / "out", made)]
    assert paths[0].parent.name == paths[1].parent.name
    two, one = (train.read_checkpoint(path)["model"] for path in paths)
    for name, weights in one.items():
        assert torch.allclose(two[name], weights, atol=1e-4), name


@pytest.mark.slow
def test_two_processes_go_on_by_the_command_that_they_print(two, tmp_path, go):
    """With another stop, of which both get the signal: the numbers are not added up."""
    out = shutil.copytree(two[0], tmp_path / "two")
    argv = [*FLAGS, "--out", str(out), "--resume"]
    moment = at("sdft", 6, "SIGINT", ranks="01")
    assert_stopped(run_two(out, "--resume", **moment), 130, argv)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    code, text, err = finish(start(*argv, launcher=[*torchrun, "--nproc_per_node=2"]))
    assert code == 0 and "processes 2" in text and "on after update 7" in text, err
    assert go(tmp_path / "one", "--method both --micro-batches 2")[0] == 0
    assert_same_training(tmp_path / "one", out)


@pytest.mark.slow
def test_an_error_of_several_processes_is_printed_once(killed, with_base, tmp_path):
    """Whichever of them has it: no traceback, and nobody waits for one that is gone."""
    unfinished, busy = tmp_path / "unfinished", tmp_path / "busy"
    shutil.copytree(killed[0], unfinished)
    busy.mkdir()
    with open(busy / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for message, args in {
            f"{busy} is in use": [busy], "was not finished": [unfinished],
            "2 processes x 1 micro-batches": [with_base, "--batch-size", 9],
            "checkpoint.pt not written": [with_base, "--method", "sft"],
        }.items():
            disk = {"FULL": "1"} if "written" in message else {}
            first, second = run_two(*args, **disk)
            assert_refused(first, message)
            out = re.sub(r"\[Gloo\].*\n", "", second[1])  # torch 2.9 says it is there
            assert (second[0], out, second[2]) == (2, "", ""), second
    assert "step    1 A" in first[1] and "step    2 A" not in first[1]


@pytest.mark.parametrize(("rank", "ended", "speaks"), [
    ("0", False, True), ("1", True, False), ("1", False, True),
])  # fmt: skip
def test_a_process_that_is_not_the_first_waits_before_it_tells_its_error(
    rank, ended, speaks, monkeypatch, capsys
):
    """torchrun ends all when one ends. The first, which tells the error, may still be
    loading when another knows it. Whom nobody ends has an error of its own."""
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if ended:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.time, "sleep", sleep)
    for name in train.TORCHRUN:
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("RANK", rank)
    assert train.main(["--stpes", "5"]) == 2
    assert ("--stpes" in capsys.readouterr().err) == speaks
    assert waited == ([] if rank == "0" else [5])


# a change that moves them says why in its commit
LOSSES = {"sft": [6.85321, 6.78183, 6.35396], "sdft": [1.05841, 0.98994, 1.0231]}


def trace(method, folder, **changes):
    """Some steps from weights so large that teacher and student differ: metrics, final
    weights, when it saved, and in how many parts it cut batches."""
    config = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=48)
    student = GPT(config, data.make_rng(0, "weights"))
    for p in student.parameters():
        p.data *= 12 if p.dim() == 2 else 1
    demos = data.make_demos(data.World(0), "A", 16, 0)
    queries = data.Benchmark(demos[:2], data.grade_items)
    tasks = {"new": {"A": queries}, "prior": {"knowledge": queries}}
    usual, calls = {"batch_size": 8, "log_every": 1, "lr": 1e-3}, []
    usual |= {"ema_rate": 0.01} if method == "sdft" else {}
    cfg = METHODS[method].Config(**{**usual, **changes})
    save, share = train.write_checkpoint, data.my_micro_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_checkpoint", lambda path, content: (
            calls.append(content["step"]), save(path, content)))  # fmt: skip
        patch.setattr(data, "my_micro_batches", lambda batch, n: (
            calls.append(f"{n} parts"), share(batch, n))[1])  # fmt: skip
        torch.set_num_threads(1)
        run = train.Run(folder)
        METHODS[method].train(student, {"A": demos}, tasks, TOK, cfg, run)
    left = contents(folder.parent, folder.name)
    return left["metrics"], left["models"], calls


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_the_stored_ones_and_every_setting_changes_something(
    method, tmp_path
):
    """Metrics, weights or files. What is recorded, or saved, changes no weights."""
    short = {"steps": 3, "warmup_steps": 1, "max_new_tokens": 6}
    usual = trace(method, tmp_path / "usual", **short)
    losses = [row["loss"] for row in usual[0] if "loss" in row]
    assert losses == pytest.approx(LOSSES[method], abs=1e-4)
    assert same(usual, trace(method, tmp_path / "again", **short))
    for name in vars(METHODS[method].Config()):
        now = trace(method, tmp_path / name, **{**short, name: CHANGES[name]})
        assert not same(usual, now), name
        assert "_every" not in name or same(usual[1], now[1]), name


MODULES = """argparse ast codecs collections contextlib copy dataclasses datetime
decimal fcntl functools hashlib inspect itertools json math os pathlib random re shlex
signal statistics sys time unicodedata zipfile tiktoken torch tqdm triton transformers
huggingface_hub data model sdft sft""".split()  # that may be imported
FORBIDDEN = re.compile(
    r"(?<![.\w])(?:eval|exec|compile|__import__)\(|torch\.load\((?![^)]*ly=True)|"
    r"weights_only=(?!True)|\.hub\b|get_encoding|encoding_for_model|"
    r"(?m:^(?:import|from) (?:transformers|huggingface_hub))"  # in functions of --init
)
TRAINER = "copy math dataclasses torch data model".split()  # what sft and sdft import
NAMES = "|".join([*data.make_tasks(data.World(0), 1, 0)["prior"], *data.DOMAINS])
FOREIGN = re.compile(  # to them: a file, the terminal, and the tiny world
    r"\w\.(?:jsonl?|pt|txt|csv|png)\b|\b(?:print|open)\(|\bdata\.[A-Z]{2}|"
    rf"[\"'](?:{NAMES})"
)


def faults(source, modules=MODULES):
    """What must not be in a source, as a list of texts."""
    found = FORBIDDEN.findall(source)
    found += FOREIGN.findall(source) if modules is TRAINER else []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in getattr(node, "names", ())
                 if isinstance(node, ast.Import)]  # fmt: skip
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += {name.split(".")[0] for name in names} - set(modules)
    return found


def test_the_sources_run_no_code_from_files_and_open_no_connection():
    """And a trainer knows neither the other one, nor what runs it, nor its world."""
    found = {path.stem: faults(path.read_text()) for path in ROOT.glob("*.py")}
    assert found == {name: [] for name in ("data", "model", "sdft", "sft", "train")}
    for line in """import pickle|from pickle import loads|import urllib.request as u|
    if 1: from socket import socket|x = eval('1')|exec(text)|torch.load(f)|torch.hub.x
    |torch.load(f, weights_only=False)|load(f, weights_only=x)|import transformers|
    tiktoken.get_encoding('gpt2')""".split("|"):
        assert faults(line.strip()) != [], line
    for method in METHODS:
        assert faults((ROOT / f"{method}.py").read_text(), TRAINER) == []
    for line in """import sft as x|from train import Run|import json|data.NOUNS|
    open(path)|# as in metrics.jsonl|tasks['in_context']|x = "garden" """.split("|"):
        assert len(faults(line.strip(), TRAINER)) == 1, line
    assert faults("model.eval()\ntorch.load(f, weights_only=True)") == []
    assert faults("def f():\n    import transformers") == []


@pytest.mark.parametrize("method", ["sft", "sdft", "both"])
def test_a_demonstration_that_does_not_help_stops_sdft_and_warns_sft(
    method, with_base, go, monkeypatch
):
    """SFT needs no teacher: there it is a warning, and the run goes on to its end."""
    gate, asked = dict(GATE), []
    monkeypatch.setattr(data, "teacher_gate", lambda *x: asked.append(x) or gate)
    message = "a demonstration does not help enough: 0.50 - 0.25 < --gate-margin 0.26"
    flags = f"--method {method} --temperature .6 --seed 0 --max-new-tokens 12"
    result = code, text, err = go(with_base, f"--gate-margin .26 {flags}")
    assert "warning: the teacher seldom says what it knows; a lower --temp" in text
    assert asked[0][3:] == (12, 1.0 if method == "sft" else 0.6, 0)
    if method == "sft":
        assert code == 0 and f"warning: {message}: " in text and not err
    else:
        hints = "another --template", "--gate-margin -1 goes"
        assert_refused(result, f"{message}: nothing to distil", *hints)
        assert not list(with_base.glob("s*/*"))
        gate["sampled"] = 0.25
        code, text, _ = go(with_base, "--gate-margin .25 --steps 1")
        assert code == 0 and "does not help" not in text and "seldom" not in text


def test_two_runs_at_once_do_not_disturb_each_other(made, tmp_path, go, monkeypatch):
    """While the first makes the base, a second one in its folder is refused, and so is
    one elsewhere that shares its folder of bases. A third one finds the base that they
    finish between its look and its lock. And none connects to anything."""
    out, other, seen = tmp_path / "out", tmp_path / "other", []
    other.mkdir()
    (other / "base").symlink_to(out / "base")
    for name in "socket.connect", "socket.connect_ex", "getaddrinfo":
        monkeypatch.setattr(f"socket.{name}", lambda *args: seen.append("a connection"))

    def second(*now):
        if now == ("base", 4):
            before = files_in(out)
            used = other / "base" / next((out / "base").iterdir()).name
            for folder, name in (out, out), (other, used):
                with monkeypatch.context() as patch:
                    patch.setattr(train, "LOCKS", [])
                    result = go(folder, "--method sft")
                assert_refused(result, f"error: {name} is in use by another run\n")
                assert files_in(out) == before
            seen.append("two runs")

    assert go(out, "--method sft", act=second)[0] == 0 and seen == ["two runs"]
    code, text, _ = go(other, "--method sft")
    assert code == 0 and "base model: found" in text and seen == ["two runs"]
    assert_same(out, made, "base", "sft")
    assert_same(other, made, "sft")
    third, real = tmp_path / "third", train.lock
    monkeypatch.setattr(train, "lock", lambda folder: real(folder) or (
        folder.parent.name == "base" and shutil.copy(base_file(made), folder)))
    code, text, _ = go(third, "--method sft")
    assert code == 0 and "base model: found" in text
    assert not (base_file(third).parent / "checkpoint.pt").exists()
    assert_same(third, made, "sft")
