"""What must hold when things go wrong: real processes, real SIGKILL, damaged files.

Short versions; the full figures come from tests/bench/reliability.py.
"""

import ast
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from test_train import METHODS, ROOT, SMALL, read, start, without_times

import data
import sdft
import sft
import train
from model import GPT, GPTConfig

FLAGS = [*SMALL, "--base-steps", "40", "--steps", "6", "--save-every", "2"]
FLAGS += ["--device", "cpu", "--method", "both"]
# The base model, too, is to be saved and shown often: no flag does that.
OFTEN = {"log_every": 1, "save_every": 3}
PATCH = f"vars(train.BASE).update({OFTEN})"
PYTHON = [sys.executable, "-c", f"import sys, train; {PATCH}; "
          "sys.exit(train.main(sys.argv[2:]))"]  # fmt: skip


def begin(out, *args, before=(), **kwargs):
    """Start train.py with FLAGS as a process of its own."""
    kwargs = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **kwargs}
    return start(*FLAGS, "--out", out, *args, launcher=[*before, *PYTHON], **kwargs)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(process, part, step):
    """Read its output up to a step of "base model", "sft" or "sdft"; the lines."""
    lines, begun = [], False
    for line in process.stdout:
        lines.append(line)
        begun = begun or line.startswith(f"{part}: ")
        if begun and line.startswith(f"step {step:4d} "):
            break
    return lines


def kill_at(process, part, step, delay=0.0, writing=None):
    """SIGKILL so many seconds after a step, and then only in a write of a checkpoint
    into the folder `writing`, if given. Returns the lines that it printed."""
    lines = wait_for(process, part, step)
    time.sleep(delay)
    while writing and process.poll() is None:
        if any(writing.rglob("checkpoint.pt.tmp.*")):
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before the kill"
    return lines


def first_step(lines, part):
    """The first step that a run made of "base model", "sft" or "sdft"."""
    place = next(i for i, line in enumerate(lines) if line.startswith(f"{part}: "))
    steps = [re.match(r"step +(\d+) .*loss", line) for line in lines[place:]]
    return next(int(match[1]) for match in steps if match)


def go_on(out, *args):
    """The same in this process: returns the exit code."""
    return train.main([*FLAGS, "--out", str(out), *map(str, args)])


def name_of(item):
    return repr(item[0])


def plain(x):
    if isinstance(x, torch.Tensor):
        return [str(x.dtype), x.tolist()]
    if isinstance(x, dict):
        return [(repr(k), plain(v)) for k, v in sorted(x.items(), key=name_of)]
    return [plain(v) for v in x] if isinstance(x, list | tuple) else x


def digest(x):
    """Two things with the same digest are the same to the bit, but for times."""
    return hashlib.sha256(repr(plain(without_times(x))).encode()).hexdigest()[:12]


def digests(folder):
    """A digest of each part of what a run of one method, or the base, has left."""
    parts = data.read_checkpoint(folder / "checkpoint.pt")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    parts["metrics"] = [json.loads(line) for line in lines]
    if (folder / "results.json").exists():
        parts["results"] = read(folder.parent, folder.name)[0]
    return {name: digest(part) for name, part in parts.items()}


def base_folder(out):
    return next((out / "base").iterdir())


def with_base(out, whole):
    """A new folder for a run, with the base model of another."""
    shutil.copytree(whole / "base", out / "base")
    return out


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch):
    """The base saved often; threads and signals as they were afterwards."""
    monkeypatch.setattr(train, "BASE", replace(train.BASE, **OFTEN))
    threads = torch.get_num_threads()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of both methods."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, _, err = finish(begin(out, PYTHONHASHSEED="1"))
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed while the base was made, then in sft, then
    in sdft, and resumed after the first two; and what the processes printed. Each has
    an order of sets and a working folder of its own."""
    out, rng = tmp_path_factory.mktemp("killed") / "out", random.Random(5)
    printed = []
    for part, steps in (("base model", 40), ("sft", 18), ("sdft", 18)):
        moment = part, rng.randrange(steps // 3, steps * 2 // 3), rng.uniform(0, 0.02)
        again = ["--resume"] * bool(printed)
        process = begin(out, *again, cwd=out.parent, PYTHONHASHSEED=f"{len(printed)}7")
        printed.append(kill_at(process, *moment))
    return out, printed


@pytest.fixture
def unfinished(killed, tmp_path):
    """A copy of that folder; sdft has a checkpoint wherever the kill struck."""
    out = shutil.copytree(killed[0], tmp_path / "unfinished")
    path = out / "sdft" / "checkpoint.pt"
    if not path.exists():
        shutil.copy(f"{path}.previous", path)
    return out


# ---- Kills -------------------------------------------------------------------------


def test_a_run_killed_three_times_ends_as_an_uninterrupted_one(killed, whole, tmp_path):
    """r1: base model, sft and sdft; tensors, metrics and results, to the bit."""
    out = shutil.copytree(killed[0], tmp_path / "out")
    saved = data.read_checkpoint(out / "sdft" / "checkpoint.pt")["step"]
    code, text, err = finish(begin(out, "--resume"))
    assert code == 0, err
    base, fine_tuned = killed[1][1:]
    assert first_step(killed[1][0], "base model") == 0
    assert first_step(base, "base model") > 0 and first_step(fine_tuned, "sft") > 0
    assert first_step(text.splitlines(), "sdft") == saved > 0
    assert digests(base_folder(out)) == digests(base_folder(whole))
    for method in METHODS:
        assert digests(out / method) == digests(whole / method)
    assert not list(out.rglob("*.tmp.*"))


def save_forever(path, step, weights):
    while True:
        step += 1
        data.write_checkpoint(path, {"step": step, "weights": weights})


def stop_in_a_write(process, path):
    """Stop a process that saves while it has a temporary file."""
    while True:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # it has stopped, not only been told to
        if path.with_name(f"{path.name}.tmp.{process.pid}").exists():
            return
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.001)


def kill_in_saves(path, kills, seed):
    """Kill a process that only saves, so many times: at any moment, and the last time
    in the middle of a write, wherever the others fell. Returns how often the file could
    not be read afterwards, how many temporary files were left, and the steps read."""
    rng, weights = random.Random(seed), data.make_rng(seed, "weights")
    weights = torch.randn(1 << 18, generator=weights)
    data.write_checkpoint(path, {"step": 0, "weights": weights})
    unreadable, steps = 0, [0]
    for i in range(kills):
        process = multiprocessing.get_context("fork").Process(
            target=save_forever, args=(path, steps[-1], weights)
        )
        process.start()
        time.sleep(rng.uniform(0.02, 0.08))
        if i == kills - 1:
            stop_in_a_write(process, path)
        process.kill()
        process.join()
        try:
            read = data.read_checkpoint(path)
        except (OSError, ValueError):
            unreadable += 1
        else:
            assert torch.equal(read["weights"], weights)
            steps.append(read["step"])
    return unreadable, len(list(path.parent.glob("*.tmp.*"))), steps


def test_a_kill_inside_a_save_leaves_a_checkpoint_that_loads(tmp_path):
    """r2. What was saved once is never lost: the steps do not go back."""
    unreadable, stale, steps = kill_in_saves(tmp_path / "checkpoint.pt", 10, seed=0)
    assert unreadable == 0
    assert len(steps) == 11 and steps == sorted(steps) and steps[-1] > 0
    assert stale > 0, "no kill came in the middle of a write"


def test_temporary_files_of_a_killed_process_are_gone_after_the_next_start(unfinished):
    """r4"""
    stale = [unfinished / "sdft" / "checkpoint.pt.tmp.12345",
             base_folder(unfinished) / "metrics.jsonl.tmp.6"]  # fmt: skip
    for path in stale:
        path.write_bytes(b"half of")
    assert go_on(unfinished, "--resume", "--method", "sdft") == 0
    assert not any(path.exists() for path in stale)


@pytest.mark.parametrize("method", METHODS)
def test_a_line_of_metrics_cut_in_half_does_not_stop_a_resume(
    method, whole, tmp_path, capsys
):
    """The last line is half there when a kill or a full disk comes in its write."""
    out = shutil.copytree(whole, tmp_path / "out")
    with open(out / method / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "ski')
    code = go_on(out, "--resume", "--method", method)
    assert code == 0, capsys.readouterr().err
    assert digests(out / method) == digests(whole / method)


@pytest.mark.parametrize("after", (False, True))
@pytest.mark.parametrize("call", ("link", "replace", "unlink"))
def test_a_kill_in_the_middle_of_a_save_loses_nothing(call, after, unfinished, capsys):
    """Before or after each change of a name: a resume goes on, and not from 0."""
    real = getattr(os, call)

    def die(source, *target):
        name = os.path.basename(target[0] if target else source)
        if not name.startswith("checkpoint") or ".tmp." in name:
            return real(source, *target)
        if after:
            real(source, *target)
        raise SystemExit

    args = unfinished, "--resume", "--method", "sdft"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, die)
        try:
            code = go_on(*args)
        except SystemExit:
            code = None
    assert code is None, "it saved nothing"
    capsys.readouterr()
    assert go_on(*args) == 0
    assert first_step(capsys.readouterr().out.splitlines(), "sdft") > 0


# ---- Damaged files and a full disk -------------------------------------------------


def damaged(good, flips, cuts, seed):
    """Bytes with one bit flipped, then bytes that end too early."""
    rng = random.Random(seed)
    for _ in range(flips):
        bad = bytearray(good)
        bad[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        yield bytes(bad)
    for _ in range(cuts):
        yield good[: rng.randrange(len(good))]


def count_refused(source, path, flips, cuts, seed):
    """How many damaged copies of a checkpoint are refused with path, size, reason."""
    refused = 0
    for bad in damaged(source.read_bytes(), flips, cuts, seed):
        path.write_bytes(bad)
        try:
            data.read_checkpoint(path)
        except ValueError as error:
            reason = f"{path}: {len(bad)} bytes, checksum differs"
            refused += str(error).startswith(reason)
    return refused


def test_flipped_bits_and_cut_files_are_refused(whole, tmp_path):
    """r3"""
    source, path = whole / "sdft" / "checkpoint.pt", tmp_path / "checkpoint.pt"
    assert count_refused(source, path, 20, 5, seed=0) == 25
    shutil.copy(source, path)
    assert data.read_checkpoint(path)["step"] == 18


def test_a_resume_from_a_damaged_file_is_refused_and_offers_the_one_before(
    unfinished, capsys
):
    path = unfinished / "sdft" / "checkpoint.pt"
    (bad,) = damaged(path.read_bytes(), 1, 0, seed=1)
    path.write_bytes(bad)
    assert go_on(unfinished, "--resume", "--method", "sdft") == 2
    err = capsys.readouterr().err
    assert f"error: {path}" in err and f"{path}.previous" in err
    os.replace(f"{path}.previous", path)
    assert go_on(unfinished, "--resume", "--method", "sdft") == 0


def test_a_full_disk_is_an_error_and_the_checkpoint_before_still_loads(unfinished):
    """r5: no file may grow beyond 32 KiB. Python itself ignores SIGXFSZ."""
    path = unfinished / "sdft" / "checkpoint.pt"
    before = path.read_bytes()
    limit = ["bash", "-c", 'ulimit -f 32; exec "$@"', "limit"]
    process = begin(unfinished, "--resume", "--method", "sdft", before=limit)
    code, text, err = finish(process)
    assert code == 2 and "Traceback" not in err and "saved" not in text + err
    size = re.search(rf"error: {re.escape(str(path))} not written: .* (\d+) bytes", err)
    assert size and int(size[1]) == pytest.approx(len(before), rel=0.1)
    assert path.read_bytes() == before and data.read_checkpoint(path)["step"] > 0
    assert not list(unfinished.rglob("*.tmp.*"))


@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk_is_told_with_the_path_when_metrics_are_written(method, tmp_path):
    log = METHODS[method].Log(tmp_path, 0)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="metrics.jsonl"):
        log.write({"step": 0, "skill": "A", "loss": 1.0})


# ---- Signals and numbers that are not finite ---------------------------------------


def test_ctrl_c_saves_the_last_step_and_the_command_it_prints_goes_on(whole, tmp_path):
    """r6"""
    out = with_base(tmp_path / "out", whole)
    process = begin(out, "--method", "sdft")
    wait_for(process, "sdft", 5)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    last = json.loads((out / "sdft" / "metrics.jsonl").read_text().splitlines()[-1])
    saved = data.read_checkpoint(out / "sdft" / "checkpoint.pt")
    assert saved["step"] == last["step"] + 1
    words = shlex.split(err.split("to go on: ")[1])
    assert words[:2] == ["python", "train.py"] and words[-1] == "--resume"
    assert train.main(words[2:]) == 0
    assert digests(out / "sdft") == digests(whole / "sdft")


def test_the_first_signal_asks_to_stop_and_the_second_stops_at_once(capsys):
    stop = train.Stop()
    assert stop.signal == 0
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGINT
    for number in (signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_a_weight_ends_with_3_and_a_checkpoint_that_is_sound(
    method, whole, tmp_path, monkeypatch, capsys
):
    """r9: the step, its examples and the last good checkpoint are named."""
    real, calls = METHODS[method].compute_loss, []

    def poisoned(student, *args):
        calls.append(student)
        if len(calls) == 6:  # step 5
            student.lm_head.weight.data[3, 4] = math.nan
        return real(student, *args)

    monkeypatch.setattr(METHODS[method], "compute_loss", poisoned)
    out = with_base(tmp_path / "out", whole)
    assert go_on(out, "--method", method) == 3
    err, path = capsys.readouterr().err, out / method / "checkpoint.pt"
    assert re.search(r"error: step 5: .*its examples: \[\d", err)
    assert f"last good checkpoint: {path}" in err and "lower --lr" in err
    saved = data.read_checkpoint(path)
    assert saved["step"] == 4
    weights = [w for m in saved["models"].values() for w in m.values()]
    assert all(w.isfinite().all() for w in weights)


# ---- The same numbers --------------------------------------------------------------


def test_two_processes_equal_two_micro_batches_to_the_bit(whole, tmp_path):
    """r7: from the same base, for both methods."""
    one, two = (with_base(tmp_path / name, whole) for name in ("one", "two"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node=2", "--no-python"]
    code, text, err = finish(begin(two, before=torchrun))
    assert code == 0, err
    assert "processes 2, threads 2" in text
    assert go_on(one, "--micro-batches", 2) == 0
    for method in METHODS:
        rows = [read(out, method)[1] for out in (one, two)]
        assert len([row for row in rows[0] if "loss" in row]) == 18
        assert digest(rows[0]) == digest(rows[1])
        saved = [data.read_checkpoint(o / method / "checkpoint.pt") for o in (one, two)]
        assert digest(saved[0]["models"]) == digest(saved[1]["models"])


def test_records_and_evaluations_do_not_change_the_weights(whole, tmp_path):
    """r8. The killed run has another PYTHONHASHSEED and another working folder than
    the whole one; here, the base made again, others are the intervals."""
    out = tmp_path / "out"
    assert go_on(out, "--log-every", 4, "--eval-every", 3) == 0
    for folder in (base_folder(whole).relative_to(whole), *METHODS):
        one, other = (digests(each / folder) for each in (whole, out))
        for key in ("step", "models", "optimizer"):
            assert one[key] == other[key], (folder, key)
        changed = folder in METHODS
        assert (one["metrics"] != other["metrics"]) == changed, folder


OTHER = {
    "--lr 0.01": f"lr: {sdft.Config.lr} -> 0.01",
    "--n-embd 48": "n_embd: 32 -> 48",
    "--distance own": "examples: ",
    "--seed 1": "seed: 0 -> 1",
    "--steps 7": "steps: 6 -> 7",
    "--eval-size 9": "(saved -> now): ",
}


@pytest.mark.parametrize("flags", OTHER)
def test_a_resume_with_other_settings_is_refused_by_name(flags, unfinished, capsys):
    """r11"""
    files = [unfinished / "sdft" / name for name in ("checkpoint.pt", "metrics.jsonl")]
    before = [path.read_bytes() for path in files]
    args = ["--resume", "--method", "sdft", *flags.split()]
    assert go_on(unfinished, *args) == 2
    err = capsys.readouterr().err
    assert "error: " in err and OTHER[flags] in err
    assert [path.read_bytes() for path in files] == before


def test_a_resume_of_another_method_s_file_is_refused_by_name(unfinished, capsys):
    shutil.copy(unfinished / "sft" / "checkpoint.pt", unfinished / "sdft")
    assert go_on(unfinished, "--resume", "--method", "sdft") == 2
    assert "kl: None -> forward" in capsys.readouterr().err


def test_a_resume_with_other_threads_says_so_and_goes_on(unfinished, capsys):
    """r12"""
    assert go_on(unfinished, "--resume", "--method", "sdft", "--threads", 1) == 0
    text = capsys.readouterr().out
    assert text.count("not to the bit (saved -> now): threads: 2 -> 1") == 1
    assert (unfinished / "sdft" / "results.json").exists()


# ---- No dead setting ---------------------------------------------------------------

TOK = data.Tokenizer()
CHANGES = {
    "seed": 1, "steps": 4, "batch_size": 16, "micro_batches": 2, "lr": 2e-3,
    "warmup_steps": 2, "beta2": 0.9, "weight_decay": 0.1, "grad_clip": 0.1,
    "dropout": 0.5, "max_new_tokens": 4, "log_every": 2, "eval_every": 2,
    "save_every": 2, "kl": "reverse", "teacher": "live", "ema_rate": 0.5,
    "temperature": 2.0, "skip_first_tokens": 1, "generate_from": "teacher",
}  # fmt: skip


def trace(method, out_dir, **changes):
    """Three steps; a digest of metrics and final weights, the steps that were saved,
    and in how many parts each batch was cut."""
    trainer, world = METHODS[method], data.World(0)
    config = GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_inner=16)
    student = GPT(config, data.make_rng(0, "weights"))
    with torch.no_grad():  # far from uniform, so that teacher and student differ
        for p in student.parameters():
            if p.dim() == 2:
                p *= 12
    settings = {"steps": 3, "batch_size": 8, "warmup_steps": 1, "lr": 1e-3,
                "log_every": 1, "max_new_tokens": 6, **changes}  # fmt: skip
    stages, saves, parts = {"A": data.make_demos(world, "A", 16, 0)}, [], []
    save, cut = data.write_checkpoint, data.my_parts

    def write_checkpoint(path, content):
        saves.append(content["step"])
        save(path, content)

    def my_parts(*args):
        parts.append(cut(*args))
        return parts[-1]

    out_dir.mkdir()
    queries = data.make_demos(world, "A", 2, 1)
    tasks = {"new": {"A": queries}, "prior": {"knowledge": queries}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "write_checkpoint", write_checkpoint)
        patch.setattr(data, "my_parts", my_parts)
        trainer.train(student, stages, tasks, TOK, trainer.Config(**settings), out_dir)
    all_parts = digests(out_dir)
    sizes = [len(part) for part in parts]
    return all_parts["metrics"], all_parts["models"], saves, sizes


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_changes_metrics_weights_or_files(method, tmp_path):
    """r14: 0 dead settings, no exceptions."""
    names = [field.name for field in fields(METHODS[method].Config)]
    usual = trace(method, tmp_path / "usual")
    assert usual == trace(method, tmp_path / "again")
    dead = [
        name for name in names
        if trace(method, tmp_path / name, **{name: CHANGES[name]}) == usual
    ]  # fmt: skip
    assert dead == []


def test_every_setting_has_a_changed_value():
    assert set(CHANGES) == {field.name for field in fields(sdft.Config)}
    assert {field.name for field in fields(sft.Config)} < set(CHANGES)


def test_every_setting_of_the_base_model_gives_it_another_name():
    config, cfg = GPTConfig(n_head=4, n_kv_head=1), train.BASE
    keys = [train.base_key(config, cfg)]
    for name in train.MODEL_FLAGS:
        changed = replace(config, **{name: getattr(config, name) * 2})
        keys.append(train.base_key(changed, cfg))
    for change in ({"seed": 1}, {"lr": 1.0}, {"steps": cfg.steps + 1}):
        keys.append(train.base_key(config, replace(cfg, **change)))
    assert train.base_key(config, cfg) == keys[0]
    assert len(set(keys)) == len(keys)


def test_every_flag_is_read():
    source = (ROOT / "train.py").read_text()
    used = set(re.findall(r"\bargs\.(\w+)", source)) | set(CHANGES)
    used |= set(train.MODEL_FLAGS) | {"help", "debug"}  # debug: before args exist
    unread = {action.dest for action in train.make_parser()._actions} - used
    assert unread == set()


# ---- No code from files, no network ------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "socket", "ssl", "urllib", "urllib3", "http", "requests", "httpx", "aiohttp",
    "ftplib", "smtplib", "telnetlib", "xmlrpc", "huggingface_hub", "datasets",
    "transformers", "wandb",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"hub", "get_encoding", "encoding_for_model"}  # of downloads


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def is_unsafe_load(node):
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "torch.load":
        return False
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    return given.get("weights_only") != "True"


def faults(source):
    """What must not be in a source, as a list of texts."""
    found = []
    for node in ast.walk(ast.parse(source)):
        found += [m for m in imported(node) if m.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in FORBIDDEN_CALLS else []
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            found += ["weights_only"] if ast.unparse(node.value) != "True" else []
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            found.append(node.attr)
        found += ["torch.load"] if is_unsafe_load(node) else []
    return found


@pytest.mark.parametrize("name", ["data", "model", "sdft", "sft", "train"])
def test_a_source_runs_no_code_from_files_and_opens_no_connection(name):
    """r10"""
    assert faults((ROOT / f"{name}.py").read_text()) == []


def test_no_top_level_source_is_left_out():
    names = {path.stem for path in ROOT.glob("*.py")}
    assert names == {"data", "model", "sdft", "sft", "train"}


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "import urllib.request as u",
    "def f():\n    from socket import socket", "x = eval('1')", "exec(text)",
    "torch.load(f)", "torch.load(f, weights_only=False)", "load(f, weights_only=x)",
    "torch.hub.load('a')", "tiktoken.get_encoding('gpt2')",
])  # fmt: skip
def test_the_scan_finds_what_it_looks_for(line):
    assert faults(line) != []


def test_the_scan_lets_pass_what_is_harmless():
    assert faults("model.eval()\ntorch.load(f, weights_only=True)") == []


def test_nothing_connects_to_anything(tmp_path, monkeypatch, capsys):
    """r15"""
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("there is no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", 9))
    calls.clear()
    code = go_on(tmp_path / "out", "--base-steps", 8, "--steps", 2)
    assert code == 0, capsys.readouterr().err
    assert calls == []


# ---- Two at once; what a user types ------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path, capsys):
    """r16: the first stands still in the middle of making the base."""
    out = tmp_path / "out"
    process = begin(out, "--method", "sft")
    try:
        wait_for(process, "base model", 10)
        process.send_signal(signal.SIGSTOP)
        before = sorted(path for path in out.rglob("*") if ".tmp." not in path.name)
        assert go_on(out, "--method", "sft") == 2
        err = capsys.readouterr().err
        assert f"error: {out} is in use by another run, process {process.pid}\n" in err
        assert "--out" in err.splitlines()[-1]
        after = sorted(path for path in out.rglob("*") if ".tmp." not in path.name)
        assert after == before
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert go_on(out, "--method", "sft") == 0
    assert (out / "sft" / "results.json").exists()


def test_sample_makes_no_base_in_a_folder_that_is_in_use(tmp_path, capsys):
    out = tmp_path / "out"
    file = train.lock(out)
    assert go_on(out, "--sample", "kitchen kettle: apple") == 2
    assert "error: " in capsys.readouterr().err
    assert not list(out.rglob("checkpoint.pt"))
    file.close()


@pytest.mark.parametrize("text", ["<|end|>", "kitchen kettle: <|answer|> apple"])
def test_special_tokens_cannot_be_injected_through_sample(
    text, whole, monkeypatch, capsys
):
    seen, real = [], data.answer

    def answer(model, contexts, *args):
        seen.extend(contexts)
        return real(model, contexts, *args)

    monkeypatch.setattr(data, "answer", answer)
    assert go_on(whole, "--sample", text) == 0
    assert len(seen) == 3  # base, sft, sdft
    for ids in seen:
        assert ids[-1] == TOK.answer and TOK.answer not in ids[:-1]
        assert TOK.end not in ids and TOK.decode(ids[:-1]) == text
