"""The command line: base model, teacher gate, fine-tuning, evaluation, results.

    python train.py                         # = --method sdft, everything by default
    python train.py --method both           # SFT, then SDFT, from one base
    python train.py --quick                 # half a minute: does it run here?
    python train.py --method sft --lr 3e-4  # the trainers' numbers are flags
    python train.py --resume                # go on after Ctrl-C or a crash
    python train.py --sample "garden cork: candle spoon tower"
    python train.py --show                  # the tables of finished runs again
    torchrun --standalone --nproc_per_node=2 train.py    # data parallel, CPU or GPU
    python train.py --init MODEL --data demos.jsonl      # a real model, your own data

It writes <out>/<method>/metrics.jsonl and results.json; the base model stays in
<out>/base for the next run. Exit codes: 0 done, 2 bad input, 3 a loss or gradient that
is not finite, 130 or 143 stopped by Ctrl-C or SIGTERM with everything saved.
"""

import argparse
import contextlib
import copy
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

try:  # locks of files: Linux and macOS
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Threads that wait for each other soon sleep, and do not spin for long, which is better
# on a busy machine. GNU's OpenMP (Linux) reads it when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model
import sdft
import sft
from model import GPT, GPTConfig

METHODS = {"sft": sft, "sdft": sdft}
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets
LOCKS = []  # files that are locked; main closes them when it ends

# The base model: larger steps than in fine-tuning, each example seen once.
BASE = sft.Config(
    steps=700, batch_size=64, micro_batches=4, lr=3e-3, warmup_steps=100, beta2=0.95,
    weight_decay=0.1, dropout=0.2, save_every=250,
)  # fmt: skip
GATE_LOSS = 0.02  # if the teacher's accuracy falls by more, there is a warning
QUICK = {"base_steps": 30, "steps": 4, "eval_size": 32, "gate_margin": -1.0}
# Defaults of a real model (--init), for both methods: the paper's ranges (table 3) and
# its code's clipping. A file with fewer rows than a batch is a batch.
REAL = {
    "steps": 100, "batch_size": 32, "lr": 2e-5, "warmup_steps": 10, "grad_clip": 1.0,
    "dropout": 0.0, "max_new_tokens": 128,
}  # fmt: skip


# ---- The whole run, from top to bottom -----------------------------------------------


class UserError(ValueError):
    """An error that the user can fix: printed as an error and a hint, exit code 2."""

    def __init__(self, message, hint=""):  # a default: unpickling gives message only
        super().__init__(message)
        self.hint = hint


def whole_run(args, stop):
    """Read and check everything before training: errors cost seconds, not minutes."""
    if args.show is not None:
        return show(args.show or [args.out])
    device = start_processes(args)
    if args.sample is not None:
        return show_sample(args, device)

    # what to learn, what may be forgotten, and the model before any training
    found = read_own(args, device) if args.init else make_world(args)
    tok, stages, tasks, base, path, made_of = found
    if args.check_data:
        return None
    n_rows = min(map(len, stages.values()))
    configs = {method: config_of(method, args, n_rows) for method in methods_of(args)}
    for method, cfg in configs.items():
        check_batches(method, cfg, n_rows)

    # resume a run, or start a new one? What is in the way is found now
    first_does(lock, Path(args.out))
    resumed, about = {}, {"tokenizer": tok.digest, "template": tok.template}
    for method, cfg in configs.items():
        settings = settings_of(cfg, base.config, (stages, tasks)) | about
        resumed[method] = first_does(check_folder, args, method, settings)

    base.checkpointing = args.checkpointing
    base = model.shard(base, device) if args.shard else base.to(device)
    seconds = get_base(path, base, *made_of, tok, stop) if made_of else 0.0
    gate = check_gate(args, base, tasks, tok, configs)
    start = path.absolute() if args.init else os.path.relpath(path, args.out)
    note = {"base": str(start), "base_seconds": seconds, "gate": gate}
    note["init"] = bool(args.init)
    final = {}
    for method, cfg in configs.items():
        folder = Path(args.out) / method
        if not resumed[method]:
            first_does(make_room, folder)
        run = Run(folder, resumed[method], stop, note, about)
        # the last method trains the base itself: a copy of a real model is large
        student = base if method == list(configs)[-1] else copy.deepcopy(base)
        final[method] = fine_tune(method, run, cfg, student, stages, tasks, tok)
    if len(final) > 1:
        say(f"\nafter all skills:\n{table(list(final.values()), list(final))}")


def make_world(args):
    """The tiny world: tokenizer, stages, tasks, a GPT with initial weights, the path of
    the base model and what it is made of."""
    tok, world = data.Tokenizer(), data.World(args.seed)
    stages = {
        skill: data.make_demos(world, skill, args.demos, args.seed, args.distance)
        for skill in data.SKILLS
    }
    tasks = data.make_tasks(world, args.eval_size, args.seed, args.distance)
    config, cfg = base_settings(args)
    check_batches("base model", cfg, cfg.batch_size)
    n = config_of("sdft", args).max_new_tokens
    for name, stage in stages.items():
        data.check_lengths(name, stage, tok, n, config.block_size)
    base = GPT(config, data.make_rng(args.seed, "weights"))
    path = find_base(args, config, cfg, world, tok)
    return tok, stages, tasks, base, path, (cfg, world)


# ---- The base model and its gate -----------------------------------------------------


def base_settings(args):
    """GPTConfig and sft.Config of the base model."""
    tok, usual, n_head = data.Tokenizer(), GPTConfig(), args.n_embd // 16
    if args.n_embd % 16:  # the size of a head
        raise UserError(f"--n-embd {args.n_embd} is not a multiple of 16", "192, say")
    config = GPTConfig(
        vocab_size=tok.vocab_size, n_tokens=tok.n_tokens, n_layer=args.n_layer,
        n_head=n_head, n_kv_head=n_head, n_embd=args.n_embd,
        n_inner=args.n_embd * usual.n_inner // usual.n_embd,
    )  # fmt: skip
    cfg = replace(
        BASE, seed=args.seed, steps=args.base_steps,
        warmup_steps=min(BASE.warmup_steps, args.base_steps // 4),
        micro_batches=max(1, BASE.micro_batches // world_size()),  # shared out
        log_every=max(1, args.base_steps // 10),
    )  # fmt: skip
    return config, cfg


def find_base(args, config, cfg, world, tok):
    """The path of the base model, made or not. The name of its folder depends on all
    that decides its weights: configurations, a sample of its corpus, the code; not on
    how processes share micro-batches, or on what is recorded."""
    parts = cfg.micro_batches * world_size()  # each has its own noise of dropout
    cfg = replace(cfg, micro_batches=parts, log_every=1, eval_every=0, save_every=1)
    sample = data.make_base_corpus(world, tok, 2000, cfg.seed)
    batch = data.get_batch(sample, len(sample), cfg.seed, 0)  # also their order
    prompts = [data.student_prompt(example, tok) for example in batch]
    learnt = [each.tolist() for each in sft.get_responses(batch, tok, "cpu")]
    code = inspect.getsource(model), inspect.getsource(sft)
    key = digest(repr((asdict(config), asdict(cfg), prompts, learnt, code)))
    return Path(args.out) / "base" / key / "base.pt"


def get_base(path, student, cfg, world, tok, stop):
    """Load the base model into the student; make it first if need be. Returns the
    seconds that making it took, now or earlier."""
    if not first_does(path.exists):
        first_does(lock, path.parent)
    if first_does(path.exists):  # perhaps made by another run since we looked
        content = read_checkpoint(path)
        student.load_state_dict(content["model"])
        say(f"base model: found in {path.parent}")
        return content["seconds"]
    say(f"base model: {student.num_params():,} parameters, {cfg.steps} updates of "
        f"{cfg.batch_size}; kept in {path.parent} for the next run")
    corpus = data.make_base_corpus(world, tok, cfg.batch_size * cfg.steps, cfg.seed)
    run = Run(path.parent, resume=True, stop=stop)
    sft.train(student, {"base": corpus}, {}, tok, cfg, run)
    seconds = time.perf_counter() - run.clock  # since the last record
    seconds += sum(record["seconds"] for record in read_metrics(path.parent))
    content = {"model": student.state_dict(), "config": asdict(student.config)}
    first_does(write_checkpoint, path, {**content, "seconds": seconds})
    return seconds


def check_gate(args, base, tasks, tok, configs):
    """Does a demonstration help the base on the new skills? If not, SDFT's teacher
    would know no more than its student: stop here. None where nothing is graded."""
    graded = {name: task for name, task in tasks["new"].items() if task.grade}
    if not graded:
        say("teacher gate: not measured, nothing new is graded (--grade)")
        return None
    cfg = next(iter(configs.values()))
    temperature = configs["sdft"].temperature if "sdft" in configs else 1.0
    n = cfg.max_new_tokens
    gate = data.teacher_gate(base, graded, tok, n, temperature, cfg.seed)
    say(f"teacher gate: base model on the new skills: accuracy {gate['student']:.2f} "
        f"without a demonstration, {gate['teacher']:.2f} with one\n"
        f"  queries right only with it: {gate['only_teacher']}, only without: "
        f"{gate['only_student']}; sampled with it, at temperature {temperature:g}: "
        f"{gate['sampled']:.2f}")
    if gate["sampled"] < gate["teacher"] / 2:
        say("warning: the teacher seldom says what it knows; a lower --temperature, .5 "
            "or .3, makes it surer")
    if gate["teacher"] - gate["student"] < args.gate_margin:
        error = (f"a demonstration does not help enough: {gate['teacher']:.2f} - "
                 f"{gate['student']:.2f} < --gate-margin {args.gate_margin}")
        if "sdft" in configs:
            raise UserError(
                f"{error}: nothing to distil",
                "another --template; demonstrations in plain sentences, with reasons; "
                "a larger model, or more --base-steps; --gate-margin -1 goes on",
            )
        say(f"warning: {error}: SDFT would have nothing to distil")
    return gate


# ---- One method ----------------------------------------------------------------------


def check_folder(args, method, settings):
    """Does the method resume a run? Raises UserError if that run has other settings, or
    is not finished and not to be resumed. Changes nothing."""
    folder = Path(args.out) / method
    saved, written = folder / "checkpoint.pt", folder / "model"
    if args.resume and saved.exists():
        if os.path.lexists(written) and not written.is_dir():
            raise UserError(f"{written} is not a folder", "move it away")
        content = read_run(saved)
        read_metrics(folder)  # is it whole? (Run.load does all this again, later)
        then = {key: content["settings"].get(key) for key in settings}
        check_settings(folder, then, settings)
        say(f"plan: {method}: {folder} goes on after update {content['step']}")
        return True
    if saved.exists() and not (folder / "results.json").exists():
        raise UserError(
            f"{folder} holds a run that was not finished",
            "go on with --resume, choose another --out, or delete the folder",
        )
    new = "nothing to resume, a new run" if args.resume else "a new run"
    say(f"plan: {method}: {new} in {folder}")
    return False


def files_in(folder):
    """The names in a folder that a run would write to, no matter who wrote them."""
    names = ("checkpoint.pt", "metrics.jsonl", "results.json", "model")
    return [name for name in names if os.path.lexists(folder / name)]


def make_room(folder):
    """Make a folder for a new run. An old run in it is moved aside, never lost."""
    if files_in(folder):
        kept = free_name(folder)
        say(f"the old run in {folder} is kept, in {kept}")
        os.replace(folder, kept)
    folder.mkdir(parents=True, exist_ok=True)


def free_name(path):
    """<path>.previous1, .previous2, ...: the first that is not there."""
    names = (f"{path.name}.previous{n}" for n in itertools.count(1))
    return next(p for p in map(path.with_name, names) if not os.path.lexists(p))


def fine_tune(method, run, cfg, student, stages, tasks, tok):
    """Run one method on all skills; the student, which has the base's weights, is
    trained in place. Returns its last evaluation."""
    say(f"\n{method}: {', '.join(f'{k} {v}' for k, v in asdict(cfg).items())}")
    evaluations = METHODS[method].train(student, stages, tasks, tok, cfg, run)
    if run.note["init"]:
        first_does(write_model, run)
        say(f"model: {run.folder / 'model'}, a folder that transformers loads")
    seconds = first_does(write_results, run, method, cfg, evaluations, student)
    say(f"\n{method}, {seconds:.0f} s:\n{table(stage_ends(evaluations))}\n"
        f"files: results.json and metrics.jsonl in {run.folder}")
    return evaluations[-1]


def write_results(run, method, cfg, evaluations, student):
    """Write results.json. Returns the seconds of fine-tuning, including those before a
    resume."""
    seconds = sum(record["seconds"] for record in read_metrics(run.folder))
    results = {
        "method": method,
        "seed": cfg.seed,
        "config": asdict(cfg),
        "machine": machine_of(student),
        "seconds": {"base": run.note["base_seconds"], "fine_tune": seconds},
        "teacher_gate": run.note["gate"],
        "evaluations": stage_ends(evaluations),
    }
    write_text(run.folder / "results.json", json.dumps(results, indent=1))
    return seconds


def stage_ends(evaluations):
    """The base, and the end of each stage."""
    return [row for row in evaluations if row["stage_end"] or not row["step"]]


# ---- What a trainer gets: records, checkpoints, a bar, the wish to stop --------------


class Run:
    """What a trainer needs of the machine: metrics.jsonl and checkpoint.pt in a folder,
    a progress bar, and the wish to stop. `Run("some/folder")` is enough.

    resume: go on from the checkpoint, if there is one. stop: an object whose `signal`
    is 0 until the run should stop after its step. note: plain values, kept in the
    checkpoint. about: further plain values that a resume must find again.
    """

    def __init__(self, folder, resume=False, stop=None, note=None, about=None):
        self.folder, self.resume, self.stop = Path(folder), resume, stop
        self.note, self.about = note or {}, about or {}
        self.checkpoint = self.folder / "checkpoint.pt"
        self.metrics = self.folder / "metrics.jsonl"
        self.settings, self.machine, self.evaluations = {}, {}, []
        self.clock = time.perf_counter()  # when the last record was made
        self.span = 0, 1, self.clock  # first and last step, and the begin: see progress

    def load(self, models, optimizer, cfg, examples):
        """Put a saved run into models and optimizer. Returns the step where it goes on;
        0 if nothing was saved.

        Raises: ValueError if the folder holds a run and resume is false, or one with
        other settings, examples or first weights.
        """
        student = models["student"]
        self.settings = settings_of(cfg, student.config, examples) | self.about
        self.settings["first weights"] = digest_of(student)
        self.machine = machine_of(student) | {"micro_batches": cfg.micro_batches}
        start, spent = 0, 0.0
        if not self.resume and first_does(files_in, self.folder):
            raise UserError(f"{self.folder} holds a run", "resume it, or move it")
        if first_does(self.checkpoint.exists):
            weights = {}  # filled in the first process alone
            saved = first_does(self.read, weights)
            check_settings(self.folder, saved["settings"], self.settings)
            if other := differences(saved["machine"], self.machine):
                say(f"resumed, but not to the bit (saved -> now): {other}")
            load_weights(weights, models, optimizer)
            start, spent = saved["step"], saved["unrecorded"]
            self.evaluations = saved["evaluations"]
        first_does(self.cut_metrics, start)
        self.clock = time.perf_counter() - spent
        return start

    def read(self, weights):
        """The checkpoint; its weights go into the dict, and are not sent to others."""
        saved = read_run(self.checkpoint, mmap=False)
        weights |= {key: saved.pop(key) for key in ("models", "optimizer")}
        return saved

    def cut_metrics(self, start):
        """Keep the lines before `start`: a resumed run makes those after it again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.folder) if row["step"] < start]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def progress(self, start, end):
        """The steps from start to end - 1; on a terminal, a bar with the time left."""
        self.span = start, end, time.perf_counter()
        return tqdm(
            range(start, end), self.folder.name if self.note else "base model",
            initial=start, total=end, disable=None if is_first() else True,
            dynamic_ncols=True, leave=False,
        )  # fmt: skip

    def all_reduce(self, student, sums):
        """Sum gradients and records over all processes, in place; no change if one."""
        if dist.is_initialized():
            for p in student.parameters():
                if not hasattr(p, "full_tensor"):  # (a shard's is summed by now)
                    dist.all_reduce(p.grad)
            values = torch.stack([sums[key] for key in sorted(sums)])
            dist.all_reduce(values)
            sums.update(zip(sorted(sums), values, strict=True))

    def log(self, record):
        """A line of metrics.jsonl, and the same on the screen; evaluations are kept."""
        before, self.clock = self.clock, time.perf_counter()
        record["seconds"] = round(self.clock - before, 3)  # since the last record
        first_does(self.append, json.dumps(record) + "\n")
        if is_first():
            start, end, begun = self.span
            left = (self.clock - begun) / (record["step"] + 1 - start)
            left = f"  {left * (end - record['step']):.0f} s left"
            say(describe(record, self.evaluations, self.note.get("gate"), left))
        if "new" in record:
            self.evaluations.append(record)

    def append(self, line):
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(line)

    def save(self, step, models, optimizer):
        """All that a resume needs; everything random is derived from (seed, step)."""
        content = {
            "step": step,
            "settings": self.settings,
            "machine": self.machine,
            "config": asdict(models["student"].config),
            "evaluations": self.evaluations,
            "note": self.note,
            "unrecorded": time.perf_counter() - self.clock,  # since the last record
            **whole_state(models, optimizer),
        }
        first_does(write_checkpoint, self.checkpoint, content)

    def stop_wanted(self):
        """1. if this process was asked to stop, else 0."""
        return float(bool(self.stop and self.stop.signal))


def read_metrics(folder):
    """The records of a folder, without a last line that a kill has cut in half."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
        if not all({"skill", "step", "seconds"} <= row.keys() for row in rows):
            raise ValueError
        return rows
    except (ValueError, AttributeError):
        message = f"{path}: not every line is a record"
        raise UserError(message, "repair it, or choose another --out") from None


def settings_of(cfg, config, examples):
    """All that decides a run except its first weights, as plain values: a resume must
    have the same. (Other micro-batches change the noise of dropout, no more.)"""
    settings = {**asdict(cfg), **asdict(config), "examples": digest(repr(examples))}
    return {key: value for key, value in settings.items() if key != "micro_batches"}


def check_settings(folder, saved, now):
    if other := differences(saved, now):
        raise UserError(
            f"{folder} holds another run (saved -> now): {other}",
            "give the flags that it was started with, or choose another --out",
        )


def machine_of(student):
    """What rounding depends on: with the same values a resume is exact to the bit."""
    first = next(student.parameters())
    device, name = first.device.type, torch.backends.cpu.get_cpu_capability()
    return {
        "device": device + ", in shards" * hasattr(first, "full_tensor"),
        "dtype": str(student.dtype),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a str subclass, which a load would refuse
        "capability": torch.cuda.get_device_name() if device == "cuda" else name,
    }


def differences(saved, now):
    """The entries in which two dicts differ, as "key: saved -> now", with commas."""
    keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    return ", ".join(f"{key}: {saved.get(key)} -> {now.get(key)}" for key in keys)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@torch.no_grad()
def digest_of(student):
    """A digest of all weights."""
    weights = hashlib.sha256()
    for p in student.parameters():
        weights.update(model.whole(p).cpu().numpy().tobytes())
    return weights.hexdigest()[:12]


class Stop:
    """The first Ctrl-C or SIGTERM asks to stop after the step, a second at once. So do
    the signals of schedulers and closed terminals, unless the parent ignores them."""

    def __init__(self):
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
        kinds = [getattr(signal, name) for name in names if hasattr(signal, name)]
        kinds = [kind for kind in kinds if signal.getsignal(kind) != signal.SIG_IGN]
        self.before = {kind: signal.signal(kind, self.ask) for kind in kinds}
        self.signal = 0

    def ask(self, signum, _):
        self.signal = signum
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if is_first():  # (print could be in the middle of a line, and stderr be gone)
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; once more stops at once\n")

    def restore(self):
        """Give a notebook its own handlers back."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


# ---- Flags ---------------------------------------------------------------------------
#
# Each field of these classes and of sdft.Config is a flag; the comment beside it is its
# --help.


@dataclass
class RunFlags:
    method: str = "sdft"  # sft, sdft, or both from the same base
    out: str = "out"  # folder for all files
    quick: bool = False  # half a minute, to see that it runs; it shows no effect
    resume: bool = False  # go on with the run in --out
    sample: str = None  # a prompt; no training: what the models respond to it
    demo: str = None  # with --sample: what the teacher, shown this, would change (a
    # prompt of the tiny world's skills needs none)
    show: list = None  # no training: tables of finished runs, in --out or these folders
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    threads: int = None  # CPU threads, 0: all cores (default: 2; with --init, all)
    eval_size: int = 400  # held-out queries for each accuracy, drawn from users' files
    gate_margin: float = 0.2  # what a demonstration must add to the base's accuracy
    checkpointing: bool = False  # less memory: activations are computed twice


@dataclass
class OwnFlags:
    init: str = None  # instead of the tiny world's base model: a Hugging Face model of
    # Llama's shape (SmolLM2, Qwen2.5, Qwen3, Llama 3), a folder or a name on the Hub
    data: list = None  # files of JSON lines: each is a skill, learnt in turn
    eval: list = None  # held-out rows: a file for each of --data, or one for all
    # (without it, those of --data)
    prior: list = None  # files of what may be forgotten
    grade: str = "contains"  # what makes a response right, in rows that do not say
    template: str = None  # a file: the teacher's prompt, with {prompt} and
    # {demonstration} in it; without it, the paper's
    check_data: bool = False  # no training: read everything, show both contexts
    shard: bool = False  # with torchrun: each process holds a part of every tensor, for
    # what outgrows one GPU (torch's FSDP2)


@dataclass
class WorldFlags:
    demos: int = 2048  # demonstrations for each skill
    base_steps: int = BASE.steps  # updates that make the base model
    n_layer: int = GPTConfig.n_layer  # blocks of the model
    n_embd: int = GPTConfig.n_embd  # its channels, in heads of 16
    distance: str = "terms"  # how far demonstrations are from the model's responses:
    # own, worded alike; known, in a style that it knows; terms, with words that it
    # never writes


# fields of a Config that are not flags
HIDDEN = ("warmup_steps", "beta2", "weight_decay", "grad_clip")
CHOICES = {
    "method": ("sft", "sdft", "both"), "grade": (*data.GRADES, "none"),
    "distance": data.DISTANCES, "kl": model.KLS,
}  # fmt: skip
# Lowest and highest value of a number, both allowed; of the others 1 to 10^7
RANGES = {
    "eval_every": (0, 10**7), "skip_first_tokens": (0, 10**7), "demos": (8, 10**7),
    "n_embd": (16, 10**5), "lr": (0, 1e3), "dropout": (0, 0.9), "ema_rate": (0, 1),
    "temperature": (1e-3, 1e3), "gate_margin": (-1, 1), "threads": (0, 1024),
    "seed": (0, 2**62),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message, f"python {self.prog} --help lists every flag")


def make_parser():
    parser = Parser(
        prog="train.py", allow_abbrev=False,
        description="SDFT and SFT on three skills in a row, from a base made here.",
    )  # fmt: skip
    for title, config in (
        ("run", RunFlags), ("a real model and your own data", OwnFlags),
        ("tiny world and its base model", WorldFlags), ("training", sdft.Config),
    ):  # fmt: skip
        group, source = parser.add_argument_group(title), inspect.getsource(config)
        # a line "name: type = default  # text", perhaps with lines "# text" below it
        texts = re.findall(r"^    (\w+): .*?  # (.*(?:\n    # .*)*)$", source, re.M)
        texts = {name: text.replace("\n    #", "") for name, text in texts}
        for field in fields(config):
            name, default, other = field.name, field.default, field.default
            if config is sdft.Config:
                other = getattr(sft.Config, name, default)
            shown = default if other == default else f"{default}, sft: {other}"
            text = texts[name].replace("%", "%%")
            text += "" if shown is None or shown is False else f" (default: {shown})"
            if config is sdft.Config and name != "seed":
                default = None  # see config_of
            if field.type is bool:
                how = {"action": "store_true"}
            elif field.type is list:
                how = {"nargs": "*", "action": "extend"}
            else:
                how = {"type": field.type, "choices": CHOICES.get(name)}
            if name not in HIDDEN:
                flag = "--" + name.replace("_", "-")
                group.add_argument(flag, default=default, help=text, **how)
    return parser


def parse_args(argv):
    """The flags as a namespace. Those not given have their default, except the fields
    of a Config, which are None: see config_of."""
    parser = make_parser()
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (1, 10**7))
        flag = "--" + name.replace("_", "-")
        if type(value) in (int, float) and not low <= value <= high:  # nan, too
            raise UserError(f"{flag} {value}: it should be {low} to {high}")
        unused = WorldFlags if args.init else OwnFlags
        if hasattr(unused, name) and value != parser.get_default(name):
            where = "the tiny world" if args.init else "--init MODEL, a real model"
            raise UserError(f"{flag} has no effect here", f"it goes with {where}")
    modes = ("sample", "show", "check_data", "resume")
    given = [name for name in modes if getattr(args, name) not in (None, False)]
    if len(given) > 1:
        flags = " and --".join(given).replace("_", "-")
        raise UserError(f"--{flags} exclude each other", "leave all but one out")
    if args.init and not args.data and args.sample is None:
        raise UserError("--init needs --data", "a file of JSON lines; or --sample")
    if args.demo is not None and args.sample is None:
        raise UserError("--demo has no effect here", "it goes with --sample PROMPT")
    cfg = config_of("sdft", args)
    if args.method != "sft" and cfg.skip_first_tokens >= cfg.max_new_tokens:
        raise UserError("--skip-first-tokens leaves nothing of a response in the loss",
                        "skip fewer, or raise --max-new-tokens")  # fmt: skip
    return args


def methods_of(args):
    return list(METHODS) if args.method == "both" else [args.method]


def config_of(method, args, n_rows=10**9):
    """The Config of a method: its own defaults, under those of a real model, under the
    flags. n_rows: of the smallest file, a limit for the batches of --init."""
    config, processes = METHODS[method].Config, world_size()
    given = {f.name: getattr(args, f.name, None) for f in fields(config)}
    values = {name: value for name, value in given.items() if value is not None}
    if args.init:
        n_rows = max(n_rows - n_rows % processes, processes)
        usual = {**REAL, "batch_size": min(REAL["batch_size"], n_rows)}
        values = {**usual, **values}
        share = max(1, values["batch_size"] // processes)
        rows = max(n for n in range(1, 9) if share % n == 0)  # of a micro-batch
        values.setdefault("micro_batches", share // rows)
    return config(**values)


def check_batches(name, cfg, n_examples):
    parts = world_size() * cfg.micro_batches
    if cfg.batch_size % parts or cfg.batch_size > n_examples:
        raise UserError(
            f"{name}: a batch of {cfg.batch_size} from {n_examples} examples, for "
            f"{world_size()} processes x {cfg.micro_batches} micro-batches of one size",
            f"a --batch-size that is a multiple of {parts}, and no more than there are",
        )


# ---- A real model, and users' own data ---------------------------------------------


def load_own(name, device, bytes_per_weight=8):
    """A Hugging Face model, a folder or a name on the Hub, whose files are downloaded
    if they are not in the cache: its folder, tokenizer and GPT. Any error of
    transformers, whose readers raise many kinds, becomes a UserError."""
    try:
        from huggingface_hub import snapshot_download
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading; a download shows its own
        kinds = ["*.json", "*.safetensors", "*.jinja", "*.model"]
        local = Path(name).is_dir()
        folder = name if local else snapshot_download(name, allow_patterns=kinds)
        with torch.device("meta"):  # takes no memory
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            shell = AutoModelForCausalLM.from_config(config)
        need = shell.num_parameters() * bytes_per_weight / 1e9
        if need > (free := free_memory(device)):
            raise MemoryError(f"it needs {need:.3g} GB, {free:.3g} GB are free")
        tok = data.ChatTokenizer(folder)
        gpt = model.from_pretrained(folder, tok.n_tokens)
    except ImportError as error:
        raise UserError(f"--init: {error}", "pip install transformers") from error
    except Exception as error:
        raise UserError(
            f"{name}: {' '.join(str(error).split())[:500]}",
            "--init takes an instruct model of Llama's shape (SmolLM2, Qwen2.5, Qwen3, "
            "Llama 3) that fits into memory, as a folder or as its name on the Hub",
        ) from error
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        gpt.dtype = torch.bfloat16  # of activations; the tiny world's stay float32
    return folder, tok, gpt


def free_memory(device):
    """GB that are free for each process; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    free, info = math.inf, Path("/proc/meminfo")
    text = info.read_text() if device.type == "cpu" and info.exists() else ""
    if found := re.search(r"MemAvailable:\s+(\d+)", text):
        free = int(found[1]) / 1e6
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container, or the word "max"
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) / 1e9)
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def read_own(args, device):
    """All that a user brings, as make_world has it."""
    evals, prior = args.eval or args.data, args.prior or []
    with_demos = dict.fromkeys([*args.data, *evals])
    for path in (args.init, args.template or "", *with_demos, *prior):
        for method in methods_of(args):  # its folder may be moved, see make_room
            folder = Path(args.out) / method
            if folder.resolve() in Path(os.path.realpath(path)).parents:
                raise UserError(f"{path} is in {folder}, where this run writes",
                                "choose another --out")  # fmt: skip
    # weights, gradients, AdamW's two and the base; then come the teacher (4 more) and
    # the activations
    share = world_size() if args.shard else 1
    source, tok, base = load_own(args.init, device, 20 / share)
    say(f"model: {source}, {base.num_params():,} parameters")
    if args.template:
        tok.template = read_template(args.template)
    if not tok.sanitizes:
        say("warning: a marker in your texts, such as <|im_end|>, acts as one in this "
            "version of transformers: pip install -U transformers")
    if len(evals) not in (1, len(args.data)):
        raise UserError(f"{len(args.data)} files in --data, {len(evals)} in --eval",
                        "one for each, or one for all")  # fmt: skip
    rows = {
        path: read_rows(args, path, path in with_demos, tok, base.config.block_size)
        for path in {**with_demos, **dict.fromkeys(prior)}
    }
    stages = {Path(path).stem: rows[path] for path in args.data}
    size = args.eval_size, args.seed
    old = {Path(path).stem: data.make_benchmark(rows[path], *size) for path in prior}
    if len({*stages, *old}) < len(args.data) + len(prior):
        raise UserError("two files of one name in --data and --prior",
                        "a skill has the name of its file: rename one")  # fmt: skip
    new = {}
    evals = evals * len(stages) if len(evals) == 1 else evals
    for (name, stage), path in zip(stages.items(), evals, strict=True):
        new[name] = data.make_benchmark(rows[path], *size)
        trained = {(e.earlier, e.prompt) for e in stage}
        both = [e.id for e in rows[path] if (e.earlier, e.prompt) in trained]
        if both and args.eval:
            say(f"warning: {name}: held-out prompts are also in --data: {both[:20]}")
        for part in (data.student_prompt, data.teacher_prompt, data.demo_response):
            ids = part(stage[0], tok)  # literally what the models will read
            say(f"--- {name}, line {stage[0].id}: {part.__name__}, {len(ids)} tokens\n"
                f"{tok.decode([*ids, tok.end])}")
    if not args.eval:
        say("no --eval: the new skills are measured on the rows that are trained on")
    return tok, stages, {"new": new, "prior": old}, base, Path(source), None


def read_template(path):
    """The teacher's prompt as a user wants it."""
    text = Path(path).read_text("utf-8-sig", errors="replace")
    if "\ufffd" in text:
        raise UserError(f"{path}: not UTF-8")
    for place in ("{prompt}", "{demonstration}"):
        if place not in text:
            raise UserError(f"{path}: no {place} in it")
    return text


def read_rows(args, path, needs_demo, tok, block_size):
    """The rows of a file, which must fit into block_size tokens; prints what a user
    should know of them."""
    n = config_of("sdft", args).max_new_tokens
    examples, remarks = data.read_examples(path, needs_demo, args.grade)
    data.check_lengths(path, examples, tok, n, block_size)
    if len(examples) > args.eval_size:
        remarks.append(f"an evaluation takes {args.eval_size} of them (--eval-size)")
    cut = sum(len(data.demo_response(e, tok)) > n for e in examples if e.demo)
    if cut:
        remarks.append(f"{cut} demonstrations are longer than --max-new-tokens {n}, "
                       "where the model's own responses are cut")  # fmt: skip
    grade = data.make_benchmark(examples).grade
    wrong = [e.id for e in examples if grade and e.demo and not grade(e, e.demo)]
    if wrong:
        remarks.append(f"{len(wrong)} demonstrations are wrong by their own answer, "
                       f"lines {wrong[:20]}")  # fmt: skip
    say("\n".join(f"{path}: {remark}" for remark in remarks))
    return examples


# ---- Device and processes ------------------------------------------------------------


def start_processes(args):
    """The torch.device of this process, which joins the others if torchrun started
    several: each has its own GPU."""
    several = [name for name in TORCHRUN if name in os.environ]
    hint = "torchrun --standalone --nproc_per_node=2 train.py"
    if "RANK" in several and len(several) < len(TORCHRUN):
        raise UserError(f"one of several processes, but only {several} are set", hint)
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if len(several) == len(TORCHRUN):
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend)
    threads = (0 if args.init else 2) if args.threads is None else args.threads
    if threads:
        torch.set_num_threads(threads)
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    if args.shard and (world_size() == 1 or device.type == "mps" or old):
        message = "--shard needs several processes, on a CPU or on CUDA, and torch 2.13"
        raise UserError(message, f"{hint} ... --shard")
    say(f"device {device}, seed {args.seed}, processes {world_size()}, "
        f"threads {torch.get_num_threads()}, torch {torch.__version__}, "
        f"CPU {torch.backends.cpu.get_cpu_capability()}")
    return device


def choose_device(name):
    """The torch.device of this process. Raises UserError, in all processes alike."""
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    n_gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            index = device.index if device.index is not None else needed - 1
            assert index < n_gpus, f"{n_gpus} GPUs for {needed} processes"
            local = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local if device.index is None else index)
        assert device.type in ("cpu", "cuda", "mps"), "not supported"
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        what = str(error).splitlines()[0]
        hint = "fewer processes, or --device cpu"
        raise UserError(f"--device {name}: {what}", hint) from None
    return device


def world_size():
    return data.rank_and_world_size()[1]


def is_first():
    """Is this the process that writes and prints? (torchrun may start several.)"""
    several = all(name in os.environ for name in TORCHRUN)
    return not several or os.environ["RANK"] == "0"


def first_does(action, *args):
    """Run an action in the first process, and give its result or its exception to all:
    so an error is printed once, and no process waits for one that is gone."""
    both = [None, None]  # result, exception
    if is_first():
        try:
            both[0] = action(*args)
        except (OSError, ValueError) as error:
            both[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(both)
    if both[1] is not None:
        raise both[1]
    return both[0]


def say(text):
    if is_first():
        tqdm.write(text)
        sys.stdout.flush()


# ---- Weights of one process, of several, and of shards -------------------------------


def state_options():
    """torch's functions for states, and their options: all of a tensor, whoever holds
    which part of it, on the CPU of the first process. (It takes a second to import.)"""
    from torch.distributed.checkpoint import state_dict

    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return state_dict, options


def whole_state(models, optimizer):
    """The weights of all models and AdamW's state, by the names of parameters."""
    torch_state, options = state_options()
    weights = {
        name: torch_state.get_model_state_dict(gpt, options=options)
        for name, gpt in models.items()
    }
    adamw = torch_state.get_optimizer_state_dict(
        models["student"], optimizer, options=options
    )
    return {"models": weights, "optimizer": adamw}


def load_weights(saved, models, optimizer):
    """Put whole_state, which only the first process has, into models and optimizer:
    each process gets its part, whatever their number was before."""
    torch_state, options = state_options()
    options = replace(options, broadcast_from_rank0=dist.is_initialized())
    for name, gpt in models.items():
        weights = saved["models"][name] if saved else {}
        torch_state.set_model_state_dict(gpt, weights, options=options)
    torch_state.set_optimizer_state_dict(
        models["student"], optimizer, saved.get("optimizer", {}), options=options
    )


# ---- Files ---------------------------------------------------------------------------


def write_file(path, write):
    """There is the old file or the new one, whole, and never half of one: write(file)
    fills a temporary file, which then takes the name. Raises OSError with the path."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, for a full disk
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        raise OSError(f"{path} not written: {cause or error}") from None


def write_text(path, text):
    write_file(path, lambda file: file.write(text.encode()))


def write_checkpoint(path, content):
    """A dict of tensors and plain values as a file of torch, streamed to the disk."""
    write_file(path, lambda file: torch.save(content, file))


def write_model(run):
    """The student of the last checkpoint, which is whole even if the run is in shards,
    as a folder for transformers."""
    saved, folder = read_run(run.checkpoint), run.folder / "model"
    with torch.device("meta"):  # its tensors are replaced, and take no memory
        gpt = GPT(GPTConfig(**saved["config"]))
    gpt.load_state_dict(saved["models"]["student"], assign=True)
    try:
        folder.mkdir(exist_ok=True)  # transformers would only log that it is a file
        model.save_pretrained(gpt, run.note["base"], folder)
    except Exception as error:  # safetensors has its own kind for a full disk
        raise OSError(f"{folder} not written: {error}") from error


def read_checkpoint(path, needed=("model",), mmap=False):
    """The dict of write_checkpoint, its tensors on the CPU (mmap: read when they are
    used). Raises UserError if the file is cut, damaged, or lacks one of the keys that
    are needed; nothing in it is ever executed."""
    if not path.is_file():
        raise UserError(f"{path}: no such file", "is the path right?")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load checks no sum
            # a flipped bit here would make a folder of a tensor, which is read as noise
            damaged = damaged or any(entry.external_attr for entry in file.infolist())
        if damaged:
            raise ValueError("it is damaged")
        content = torch.load(path, "cpu", weights_only=True, mmap=mmap)
        if missing := [key for key in needed if key not in content]:
            raise ValueError(f"it has no {', '.join(missing)}: of another version?")
        return content
    except Exception as error:  # the readers of zip and pickle raise many kinds
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        hint = "delete it and run again, or choose another --out"
        raise UserError(f"{path} cannot be read: {what}", hint) from None


def read_run(path, mmap=True):
    """What Run.save wrote. (AdamW would keep a mapped file as its state, so a run that
    goes on reads it whole.)"""
    needed = ("step", "settings", "machine", "config", "models", "note")
    return read_checkpoint(path, needed, mmap)


def lock(folder):
    """Refuse a folder that another run is using. The system lets go of the lock when
    its process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a")  # nothing is written, should it be a user's file
    LOCKS.append(file)
    try:
        if fcntl is None:
            raise OSError("no locks on this system")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"{folder} is in use by another run"
        raise UserError(message, "wait for it, or choose another --out") from None
    except OSError as error:  # Windows, and some network disks
        say(f"{folder}: no locks here ({error}): do not start two runs in it")


# ---- Tables and samples --------------------------------------------------------------


def table(rows, labels=None):
    """Evaluations as a table, one line each, with a column for each accuracy. Labels
    stand in front; without them, the skill that was trained last."""
    names = dict.fromkeys((g, n) for g in ("new", "prior") for r in rows for n in r[g])
    graded = {name for _, name in names}  # of the others there is a loss, at most
    names |= {("nll", n): 0 for r in rows for n in r.get("nll", ()) if n not in graded}
    titles = [name if group == "prior" else f"{group} {name}" for group, name in names]
    if labels is None:
        labels = [  # the base, a skill that was just learnt, or an update on the way
            row["skill"] if row["stage_end"] else str(row["step"] or "-")
            for row in rows
        ]
    width = max(7, *map(len, labels))
    lines = [f"{'after':{width}s} {'  '.join(titles)}  KL(student || base)"]
    for label, row in zip(labels, rows, strict=True):
        cells = [
            f"{row.get(group, {}).get(name, math.nan):{len(title)}.2f}"
            for (group, name), title in zip(names, titles, strict=True)
        ]
        lines.append(
            f"{label:{width}s} {'  '.join(cells)}  {row['kl_student_base']:.2f}"
        )
    return "\n".join(lines)


def describe(record, earlier=(), gate=None, left=""):
    """A record of metrics.jsonl as lines for the screen, with the time that is left."""
    if "new" in record:
        return describe_evaluation(record, earlier, gate)
    numbers = [f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float)]
    begin = f"step {record['step']:4d} {record['skill']}"
    lines = ["  ".join([begin, *numbers]) + left]
    if record["eos_rate"] == 0:
        lines.append(f"warning: EOS rate 0 %, mean length {record['response_length']}: "
                     "no response came to its end; try a higher --max-new-tokens")
    elif round(record["response_length"], 3) == 1:
        lines.append("warning: every response is empty: it ends at once")
    if record["grad_norm"] == 0:
        lines.append("warning: the gradient is 0, nothing is learnt: no token carries "
                     "loss, or teacher and student agree")
    return "\n".join(lines)


def describe_evaluation(record, earlier, gate):
    """The table so far, two responses, and a warning if the teacher has lost what it
    knew of the skill at the gate or in an earlier evaluation."""
    lines = [table([*stage_ends(earlier), record])]
    for row in record["responses"]:
        lines.append(f"  {short(row['prompt'])}  ->  {short(row['response'])}")
    for name, kl in record.get("kl_student_base_prior", {}).items():
        lines.append(f"  KL(student || base) on {name}: {kl:.3f} nats per token")
    if "pull" in record and len(stage_ends(earlier)) < 2:  # before and after a stage
        lines.append(show_pull(record["pull"]))
    skill, now = record["skill"], record["teacher_gate"]
    if now is not None:
        lines.append(f"  the teacher, shown the demonstration: {now:.2f}")
        seen = [row["teacher_gate"] for row in earlier if row["skill"] == skill]
        then = max(gate["skills"].get(skill, 0) if gate else 0, *seen, now)
        if now < then - GATE_LOSS:
            lines.append(
                f"warning: on {skill} the teacher has fallen from {then:.2f}: it "
                "follows its student astray; try a lower --ema-rate, or 0"
            )
    return "\n".join(lines)


def show_pull(pull):
    """data.token_pull as lines of the screen."""
    lines = [f"  {short(pull['prompt'])}   the demonstration: {short(pull['demo'])}",
             "  SDFT: KL(teacher || student) at each token of the student's response"]
    for token, kl, *both in pull["sdft"][:16]:
        s, t = ("  ".join(f"{name} {p:.2f}" for name, p in each) for each in both)
        kl = max(kl, 0)  # rounding may leave -1e-8
        lines.append(f"    {token:10s}{kl:7.3f}   student  {s:36s}   teacher  {t}")
    tokens = "  ".join(f"{token} {nll:.2f}" for token, nll in pull["sft"][:32])
    lines += ["  SFT: -log p(token) of the demonstration", f"    {tokens}"]
    return "\n".join(lines)


def short(text):
    """A text as one line of the screen; metrics.jsonl has it whole."""
    line = " / ".join(text.split("\n"))
    return line if len(line) <= 200 else f"{line[:200]} ... ({len(text)} characters)"


def show(folders):
    """The tables of the finished runs in these folders and, of several runs, their last
    lines as one."""
    last = {}
    for folder, method in itertools.product(folders, METHODS):
        path = Path(folder) / method / "results.json"
        if not path.exists():
            continue
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            rows, seconds = results["evaluations"], results["seconds"]["fine_tune"]
            title = f"{path.parent}, seed {results['seed']}"
            say(f"\n{title}, {seconds:.0f} s:\n{table(rows)}")
            last[title] = rows[-1]
        except (KeyError, IndexError, TypeError, ValueError):
            hint = "leave the folder out, or run again"
            raise UserError(f"{path} is not what a run writes", hint) from None
    if not last:
        raise UserError(f"no finished run in {', '.join(folders)}", "another folder?")
    if len(last) > 1:
        say("\n" + table(list(last.values()), list(last)))


def show_sample(args, device):
    """What the base and the models fine-tuned in --out respond to args.sample. A saved
    run knows its own seed, sizes and base. --init alone shows the base."""
    paths = [Path(args.out) / method / "checkpoint.pt" for method in METHODS]
    runs = {path.parent: read_run(path) for path in paths if path.exists()}
    if not runs and not args.init:
        raise UserError(f"no run in {args.out}", "train first, or choose another --out")
    n = args.max_new_tokens or REAL["max_new_tokens"]
    if not runs:
        _, tok, gpt = load_own(args.init, device)
        respond("base", gpt.to(device), n, args, tok, args.demo)
    for i, (folder, saved) in enumerate(runs.items()):
        base, tok, gpt = load_base_of(folder, saved, args, device)
        settings, gpt, demo = saved["settings"], gpt.to(device), args.demo
        if not demo and not saved["note"]["init"]:
            demo = data.demo_of(data.World(settings["seed"]), args.sample)
        n = args.max_new_tokens or settings["max_new_tokens"]
        if i == 0 and base:
            respond("base", gpt, n, args, tok, demo)
        say(f"{folder}: seed {settings['seed']}, after update {saved['step']}")
        gpt.load_state_dict(saved["models"]["student"])
        respond(folder.name, gpt, n, args, tok, demo)


def load_base_of(folder, saved, args, device):
    """The base of a saved run: is it there? its tokenizer, and a GPT with its weights,
    or with any weights if it is not there."""
    note = saved["note"]
    base = Path(args.init or Path(args.out) / note["base"])
    there = bool(args.init) or base.exists()  # (a name is not a path)
    if not there:
        say(f"{base} is gone")
    if not note["init"]:
        if args.init:
            raise UserError(f"{folder} is of the tiny world", "leave --init out")
        gpt = GPT(GPTConfig(**saved["config"]))
        if there:
            gpt.load_state_dict(read_checkpoint(base)["model"])
        return there, data.Tokenizer(), gpt
    # the run's own model has the shape and the tokenizer, too
    name = args.init or (base if there else folder / "model")
    _, tok, gpt = load_own(str(name), device)
    tok.template = saved["settings"]["template"]
    if other := differences(saved["config"], asdict(gpt.config)):
        message = f"{folder} is of another model (saved -> now): {other}"
        raise UserError(message, "leave --init out")
    return there, tok, gpt


def respond(name, gpt, n, args, tok, demo):
    """Show the greedy response to args.sample, and two samples, of at most n tokens;
    and, if there is a demonstration, what each method would pull on."""
    if args.template:
        tok.template = read_template(args.template)
    example = data.Example(args.sample, demo or "", "")
    contexts = [data.student_prompt(example, tok)] * 2
    say(f"{name:5s}  {data.get_texts(gpt, contexts[:1], tok, n)[0]}")
    u = torch.rand(2, n, generator=data.make_rng(args.seed, "sample"))
    for text in data.get_texts(gpt, contexts, tok, n, u.to(gpt.cos.device), 1):
        say(f"       sampled: {text}")
    if demo:
        pull = data.token_pull(gpt, gpt, example, tok, n, args.seed)
        say(show_pull(pull | {"prompt": args.sample, "demo": demo}))


# ---- The program ---------------------------------------------------------------------


def command_line(argv):
    """How this program was started, as one would type it."""
    start = "python train.py"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        n = os.environ.get("LOCAL_WORLD_SIZE", "2")
        start = f"torchrun --standalone --nproc_per_node={n} train.py"
    return f"{start} {shlex.join(argv)}"


def tell(text, stop=None):
    """Print an error, in one process. torchrun ends all when one ends, so the others
    wait until the first has spoken. If nobody asks them to stop, the error is theirs
    alone, and they speak. stop: None if it must be known to all."""
    if not is_first():
        time.sleep(5 if stop else 2)
        if not stop or stop.signal:
            return
    with contextlib.suppress(OSError):  # nobody reads it
        print(text, file=sys.stderr, flush=True)


def main(argv):
    """Run, and turn what the user can fix into an error, a hint and an exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, or a program without a terminal
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # a terminal may lack a character
            stream.reconfigure(errors="replace")
    stop = Stop()
    try:
        whole_run(parse_args(argv), stop)
    except BrokenPipeError:  # python train.py | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        tell("error: the program that reads this output has ended\n"
             "hint: --resume goes on from the last checkpoint", stop)
        return 2
    except torch.OutOfMemoryError as error:
        hint = "more --micro-batches, --checkpointing, or --shard on several GPUs"
        tell(f"error: {str(error).splitlines()[0]}\nhint: {hint}", stop)
        return 2
    except (OSError, ValueError) as error:
        hint = getattr(error, "hint", "") or (
            "is the path right, and is the disk full?" if isinstance(error, OSError)
            else "see tests/bench/own.md"
        )  # fmt: skip
        tell(f"error: {error}\nhint: {hint}", stop)
        return 2
    except FloatingPointError as error:
        hint = "try a lower --lr; checkpoint.pt is still good"
        tell(f"error: {error}\nhint: {hint}", stop)
        return 3
    except KeyboardInterrupt:
        again = [arg for arg in argv if arg != "--resume"] + ["--resume"]
        tell(f"stopped; to go on: {command_line(again)}")
        return 128 + (stop.signal or signal.SIGTERM)  # 0: it came to another process
    finally:
        stop.restore()
        while LOCKS:
            LOCKS.pop().close()
        if dist.is_initialized():
            dist.destroy_process_group()
            # gloo's threads drop their last tensors, under Python's lock: give it to
            # them, or they may abort in an interpreter that is ending
            time.sleep(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
