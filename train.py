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
import ast
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
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

try:  # locks of files: Linux and macOS
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Threads that wait for each other soon sleep, so a busy machine costs little; the
# default is to spin for long. GNU's OpenMP (Linux) reads it when torch is loaded.
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
SHARD_TORCH = (2, 13)  # the oldest torch for --shard: in 2.9.1 the tests of it fail
LOCKS = []  # files that are locked; main closes them when it ends

# The base model: larger steps than in fine-tuning, each example seen once.
BASE = sft.Config(
    steps=700, batch_size=64, micro_batches=2, lr=2e-3, warmup_steps=100, beta2=0.95,
    weight_decay=0.1, dropout=0.2, log_every=200, save_every=250,
)  # fmt: skip
GATE_LOSS = 0.02  # what a teacher's accuracy may fall before there is a warning
# Defaults of flags that are in no Config, and what --quick has in their place
USUAL = {
    "demos": 2048, "eval_size": 400, "gate_margin": 0.2, "base_steps": BASE.steps,
    "seed": 0, "n_layer": GPTConfig.n_layer, "n_embd": GPTConfig.n_embd,
}  # fmt: skip
QUICK = {"base_steps": 30, "steps": 4, "eval_size": 32, "gate_margin": -1.0}
# Defaults of a real model (--init), for both methods: the paper's ranges (table 3) and
# its code's clipping. A file with fewer rows than a batch is a batch.
REAL = {
    "steps": 100, "batch_size": 32, "lr": 2e-5, "warmup_steps": 10, "grad_clip": 1.0,
    "dropout": 0.0, "max_new_tokens": 128,
}  # fmt: skip

# Lowest and highest value of a flag, both allowed.
RANGES = {
    **dict.fromkeys(("steps", "log_every", "save_every", "base_steps"), (1, 10**7)),
    **dict.fromkeys(("warmup_steps", "eval_every"), (0, 10**7)),
    **dict.fromkeys(("demos", "eval_size"), (8, 10**7)),
    **dict.fromkeys(("batch_size", "micro_batches"), (1, 10**6)),
    "n_layer": (1, 1000), "n_embd": (16, 10**5), "lr": (0, 1e3), "dropout": (0, 0.9),
    "max_new_tokens": (1, 10**5), "seed": (0, 2**62), "ema_rate": (0, 1),
    "temperature": (1e-3, 1e3), "skip_first_tokens": (0, 10**5),
    "gate_margin": (-1, 1), "threads": (0, 1024),
}  # fmt: skip
CHOICES = {"kl": model.KLS}
HIDDEN = ("beta2", "weight_decay", "grad_clip")  # fields of a Config that are no flags


# ---- The whole run, from top to bottom -----------------------------------------------


class UserError(ValueError):
    """An error that the user can fix: printed as an error and a hint, exit code 2."""

    def __init__(self, message, hint=""):  # a default: unpickling gives message only
        super().__init__(message)
        self.hint = hint


def whole_run(args, stop):
    """Check everything, then base model, gate, and one method after the other."""
    if args.show is not None:
        return show(args.show or [args.out])
    world_size = start_processes(args)
    device = choose_device(args.device)
    dtype = choose_dtype(device, args.init)
    threads = (0 if args.init else 2) if args.threads is None else args.threads
    if threads:
        torch.set_num_threads(threads)
    name = str(dtype).removeprefix("torch.")
    say(f"device {device}, activations {name}, seed {args.seed}, processes "
        f"{world_size}, threads {torch.get_num_threads()}, torch {torch.__version__}, "
        f"CPU {torch.backends.cpu.get_cpu_capability()}")
    if args.init:
        args.init = first_does(hinted, "model", find_model, args.init)
    if args.sample is not None:
        return show_sample(args, device, dtype)
    check_shard(args, device, world_size)

    # what there is to learn, and what there is to forget
    if args.init:
        tok, config, stages, tasks = read_own(args, device, world_size)
        world, base_cfg = None, None
        if args.check_data:
            return None
    else:
        tok, world = data.Tokenizer(), data.World(args.seed)
        stages = {
            skill: data.make_demos(world, skill, args.demos, args.seed, args.distance)
            for skill in data.SKILLS
        }
        tasks = data.make_tasks(world, args.eval_size, args.seed, args.distance)
        config, base_cfg = base_settings(args, world_size)
        n_examples = base_cfg.batch_size * base_cfg.steps
        check_batches("base model", base_cfg, world_size, n_examples)
    configs = {method: config_of(method, args) for method in methods_of(args)}

    # fail now rather than after minutes of training
    for method, cfg in configs.items():
        check_batches(method, cfg, world_size, min(map(len, stages.values())))
        for name, stage in stages.items() if world else ():  # (read_rows has done it)
            sizes = tok, cfg.max_new_tokens, config.block_size
            hinted("fit", data.check_lengths, name, stage, *sizes)
    first_does(lock, Path(args.out))
    path = Path(args.init or find_base(args, config, base_cfg, world, tok, dtype))
    made = "is used" if path.exists() else f"will be made, {base_cfg.steps} updates"
    say(f"plan: base model: {path} {made}")
    resumed, about = {}, {"tokenizer": tok.digest, "template": tok.template}
    for method, cfg in configs.items():
        settings = settings_of(cfg, config, (stages, tasks)) | about
        resumed[method] = first_does(plan_method, args, method, settings, path)
    if args.quick:
        say("--quick: far too short for the base to read a demonstration; the gate is "
            "not enforced, and no effect will show")

    # the base model, and what a demonstration adds to it
    if args.init:
        base = hinted("model", model.from_pretrained, args.init, tok.n_tokens)
        say(f"base model: {base.num_params():,} parameters, from {path}")
    else:
        base = GPT(config, data.make_rng(args.seed, "weights"))
    base.dtype, base.checkpointing = dtype, bool(args.checkpointing)
    base = model.shard(base, device) if args.shard else base.to(device)
    made_of = config, base_cfg, base, world, tok
    seconds = 0.0 if args.init else get_base(path, *made_of, stop)
    gate = check_gate(args, base, tasks, tok, configs)

    final = {}
    for method, cfg in configs.items():
        where = path.absolute() if args.init else os.path.relpath(path, args.out)
        note = {"base": str(where), "gate": gate, "init": bool(args.init)}
        note |= {"skills": list(stages), "base_seconds": seconds}
        folder = first_does(open_folder, args, method, resumed[method])
        run = Run(folder, resumed[method], stop, note, about)
        # (the last one may change the base itself: a copy of a real one is large)
        student = base if method == list(configs)[-1] else copy.deepcopy(base)
        final[method] = fine_tune(method, run, cfg, student, stages, tasks, tok)[-1]
    if len(final) > 1:
        say(f"\nafter all skills:\n{table(list(final.values()), list(final))}")
    for method in final:
        say(f"files: {Path(args.out) / method}/results.json and metrics.jsonl")


# ---- The base model ------------------------------------------------------------------


def base_settings(args, world_size):
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
        micro_batches=max(1, BASE.micro_batches // world_size),  # shared out
    )  # fmt: skip
    return config, cfg


def find_base(args, config, cfg, world, tok, dtype):
    """Where the base model is, or will be when it is made."""
    # the key does not depend on the number of processes, or on what is recorded
    cfg = replace(cfg, micro_batches=1, log_every=1, eval_every=0, save_every=1)
    key = base_key(config, cfg, world, tok, dtype)
    return Path(args.out) / "base" / key / "base.pt"


def get_base(path, config, cfg, student, world, tok, stop):
    """Put the base model into the student, from its file or by making it. Returns the
    seconds that it took, now or earlier."""
    about = {**asdict(config), "seed": cfg.seed, "key": path.parent.name}
    if not first_does(path.exists):
        first_does(lock, path.parent)
    if first_does(path.exists):  # perhaps made by another run since we looked
        content = read_checkpoint(path)
        if "base" not in content:
            raise UserError(f"{path} is not a base model", "delete it")
        if other := differences(content["base"], about):
            raise UserError(f"{path} is another base (its own -> asked for): {other}",
                            "delete it")  # fmt: skip
        student.load_state_dict(content["model"])
        say(f"base model: found in {path.parent}")
        if other := differences(content["machine"], machine_of(student)):
            say(f"  made on another machine (then -> now): {other}")
        return content["seconds"]
    say(f"base model: {student.num_params():,} parameters, {cfg.steps} updates of "
        f"{cfg.batch_size}; kept in {path.parent} for the next run")
    corpus = data.make_base_corpus(world, tok, cfg.batch_size * cfg.steps, cfg.seed)
    run = Run(path.parent, resume=True, stop=stop)
    train_in(run, sft, student, {"base": corpus}, {}, tok, cfg)
    seconds = time.perf_counter() - run.clock  # since the last record
    seconds += sum(record["seconds"] for record in read_metrics(path.parent))
    first_does(write_checkpoint, path, {
        "base": about, "seconds": seconds, "machine": machine_of(student),
        "model": student.state_dict(),
    })  # fmt: skip
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


def open_folder(args, method, resume):
    """The folder of one method's files. What a run left in it is kept under another
    name; nothing is lost."""
    folder = Path(args.out) / method
    if files_in(folder) and not resume:
        os.replace(folder, free_name(folder))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fine_tune(method, run, cfg, student, stages, tasks, tok):
    """Run one method on all skills; the student, which has the base's weights, is
    trained in place. Returns its evaluations: of the base, and at the end of each
    stage."""
    trainer = METHODS[method]
    say(f"\n{method}: " + ", ".join(
        f"{key} {value}" + ("" if value == getattr(trainer.Config, key) else " (set)")
        for key, value in asdict(cfg).items()
    ))
    evaluations = train_in(run, trainer, student, stages, tasks, tok, cfg)
    if run.note["init"]:
        path = run.folder / "model"
        first_does(write_model, whole_gpt(student), run.note["base"], path)
        say(f"model: {path}, a folder that transformers loads")
    seconds = first_does(write_results, run, method, cfg, evaluations, student)
    rows = stage_ends(evaluations)
    say(f"\n{method}, {seconds:.0f} s:\n{table(rows)}")
    return rows


def train_in(run, trainer, *args):
    """trainer.train, with the last good checkpoint named if it breaks off."""
    try:
        return trainer.train(*args, run)
    except FloatingPointError as error:
        saved = run.checkpoint if run.checkpoint.exists() else "none yet"
        raise FloatingPointError(f"{error}; last good checkpoint: {saved}") from None


def write_results(run, method, cfg, evaluations, student):
    """results.json from what is recorded; returns the seconds of fine-tuning, those
    before a resume included."""
    spent = {}
    for record in read_metrics(run.folder):
        spent[record["skill"]] = spent.get(record["skill"], 0) + record["seconds"]
    keys = ("skill", "new", "prior", "kl_student_base", "kl_teacher_base")
    keys += ("nll", "kl_student_base_prior") if run.note["init"] else ()
    ends = [row for row in evaluations if row["stage_end"]]
    results = {
        "method": method,
        "seed": cfg.seed,
        "config": asdict(cfg),
        "machine": machine_of(student),
        "seconds": {
            "base": run.note["base_seconds"], "fine_tune": sum(spent.values())
        },
        "teacher_gate": run.note["gate"],
        "base": {key: evaluations[0][key] for key in ("new", "prior")},
        "stages": [
            {key: row[key] for key in keys} | {"seconds": spent.get(row["skill"], 0)}
            for row in ends
        ],
    }
    write_text(run.folder / "results.json", json.dumps(results, indent=1))
    return sum(spent.values())


def stage_ends(evaluations):
    """The base, and the end of each stage."""
    return [row for row in evaluations if row["stage_end"] or not row["step"]]


# ---- What a trainer gets: records, checkpoints, a bar, the wish to stop --------------


class Run:
    """What a trainer needs of the machine: metrics.jsonl and checkpoint.pt in a folder,
    a bar, and whether somebody wants it to stop. `Run("some/folder")` is enough.

    resume: go on from the checkpoint, if there is one. stop: an object whose `signal`
    is 0 until the run should stop after its step. note: plain values, kept in the
    checkpoint. about: further plain values that a resume must find again.
    """

    def __init__(self, folder, resume=False, stop=None, note=None, about=None):
        self.folder, self.resume, self.stop = Path(folder), resume, stop
        self.note, self.about = note or {}, about or {}
        self.checkpoint = self.folder / "checkpoint.pt"
        self.metrics = self.folder / "metrics.jsonl"
        self.settings, self.evaluations = {}, []
        self.clock = time.perf_counter()  # when the last record was made

    def load(self, models, optimizer, cfg, examples):
        """Put a saved run into models and optimizer. Returns the step where it goes on
        and its evaluations; 0 and [] if nothing was saved.

        Raises: ValueError if the folder holds a run and resume is false, or one with
        other settings, examples or first weights.
        """
        student = models["student"]
        self.settings = settings_of(cfg, student.config, examples) | self.about
        self.settings["first weights"] = digest_of(student)
        start, spent = 0, 0.0
        if not self.resume and first_does(files_in, self.folder):
            raise UserError(
                f"{self.folder} holds a run", "resume it, or take another folder"
            )
        if first_does(self.checkpoint.exists):
            weights = {}  # filled in the first process alone
            saved = first_does(self.read, weights)
            check_settings(self.folder, saved["settings"], self.settings)
            if other := differences(saved["machine"], machine_of(student)):
                say(f"resumed, but not to the bit (saved -> now): {other}")
            load_weights(weights, models, optimizer)
            start, spent = saved["step"], saved["unrecorded"]
            self.evaluations = list(saved["evaluations"])
        first_does(self.cut_metrics, start)
        self.clock = time.perf_counter() - spent
        return start, list(self.evaluations)

    def read(self, weights):
        """The checkpoint; its weights go into the dict, and so to no other process."""
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
        """A line of metrics.jsonl, and the same on the screen."""
        before, self.clock = self.clock, time.perf_counter()
        record["seconds"] = round(self.clock - before, 3)  # since the last record
        first_does(append_line, self.metrics, json.dumps(record))
        if is_first():
            say(describe(record, self.evaluations, self.note.get("gate")))
        if "new" in record:
            self.evaluations.append(record)

    def save(self, step, models, optimizer, evaluations):
        """All that a resume needs; everything random is derived from (seed, step)."""
        content = {
            "step": step,
            "settings": self.settings,
            "machine": machine_of(models["student"]),
            "config": asdict(models["student"].config),
            "evaluations": evaluations,
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
        rows = [dict(json.loads(line)) for line in text.split("\n")[:-1]]
        for row in rows:
            row["skill"], int(row["step"]), float(row["seconds"])  # or it raises
        return rows
    except (ValueError, TypeError, KeyError, OverflowError):
        message = f"{path}: not every line is a record"
        raise UserError(message, "repair it, or choose another --out") from None


def settings_of(cfg, config, examples):
    """All that decides a run but its first weights, as plain values: a resume must find
    the same."""
    return {**asdict(cfg), **asdict(config), "examples": digest(repr(examples))}


@torch.no_grad()
def digest_of(student):
    weights = hashlib.sha256()
    for p in student.parameters():
        weights.update(model.whole(p).cpu().numpy().tobytes())
    return weights.hexdigest()[:12]


def check_settings(folder, saved, now):
    if other := differences(saved, now):
        raise UserError(
            f"{folder} holds another run (saved -> now): {other}",
            "give the flags that it was started with, or choose another --out",
        )


def machine_of(student):
    """What rounding depends on: with the same values a resume is exact to the bit."""
    first = next(student.parameters())
    device = first.device.type
    return {
        "device": device,
        "dtype": str(student.dtype),
        **({"shards": True} if hasattr(first, "full_tensor") else {}),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a str subclass, which a load would refuse
        "capability": torch.backends.cpu.get_cpu_capability() if device == "cpu"
        else torch.cuda.get_device_name() if device == "cuda" else device,
    }  # fmt: skip


def differences(saved, now):
    """The entries in which two dicts differ, as "key: saved -> now", with commas."""
    keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    return ", ".join(f"{key}: {saved.get(key)} -> {now.get(key)}" for key in keys)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Stop:
    """The first Ctrl-C or SIGTERM asks to stop after the step, a second at once."""

    def __init__(self):
        self.signal = 0
        self.before = {
            signum: signal.signal(signum, self.ask)
            for signum in (signal.SIGINT, signal.SIGTERM)
        }

    def ask(self, signum, _):
        self.signal = signum
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if is_first():  # (print could be in the middle of a line, and stderr be gone)
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; once more stops at once\n")

    def agreed(self):
        """The signal that stopped the run, the same number in every process."""
        found = [self.signal]
        if dist.is_initialized():
            found = [0] * dist.get_world_size()
            dist.all_gather_object(found, self.signal)
        return max(found)

    def restore(self):
        """Give a notebook its own handlers back."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


# ---- Flags ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message, f"python {self.prog} --help lists every flag")


def number(name, kind):
    """A type for argparse: int or float within RANGES[name]."""
    low, high = RANGES[name]

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also false for nan
            what = "a whole number" if kind is int else "a number"
            message = f"{text!r} is not {what} from {low} to {high}"
            raise argparse.ArgumentTypeError(message)
        return value

    return parse


def field_help(config):
    """name -> the comment beside a field of a dataclass, which is its --help. It may go
    on in the lines below."""
    source = inspect.getsource(config)
    found = re.findall(r"^    (\w+): .*?  # (.*(?:\n    # .*)*)$", source, re.MULTILINE)
    return {name: text.replace("\n    #", "") for name, text in found}


def add_flags(group, config, names, other=None):
    """A --flag for each named field of a dataclass, None if it is not given. other: a
    dataclass whose default --help also shows, where it differs."""
    texts, kinds = field_help(config), {f.name: type(f.default) for f in fields(config)}
    for name in names:
        shown = default = getattr(config, name)
        if other and getattr(other, name) != default:
            shown = f"{default}, sft: {getattr(other, name)}"
        kind = {"type": number(name, kinds[name])} if name in RANGES else {}
        kind |= {"choices": CHOICES[name]} if name in CHOICES else {"metavar": "N"}
        text = f"{texts[name]} (default: {shown})".replace("%", "%%")
        group.add_argument("--" + name.replace("_", "-"), help=text, **kind)


def make_parser():
    parser = Parser(
        prog="train.py",
        description="SDFT and SFT on three skills in a row, from a base made here.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=96),
    )
    add = parser.add_argument_group("run").add_argument
    add("--method", choices=("sdft", "sft", "both"), default="sdft",
        help="both: from the same base, on the same demonstrations (default: sdft)")
    add("--out", default="out", help="folder for all files (default: out)")
    add("--quick", action="store_true",
        help="half a minute, to see that it runs; far too short to show the effect")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--sample", metavar="PROMPT",
        help="no training: what the base and --method respond to it")
    add("--show", nargs="*", metavar="OUT", help="no training: the tables of finished "
        "runs in --out, or in these folders and beside each other")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    add("--threads", type=number("threads", int), metavar="N",
        help="on a CPU; more than 2 hardly help the tiny world (0: all cores; default: "
        "2, with --init all)")
    add("--checkpointing", action="store_true",
        help="less memory: activations are computed again in the backward pass")
    add("--shard", action="store_true",
        help="with torchrun and --init: each process holds a part of every tensor, for "
        "what outgrows one GPU (torch's FSDP2)")
    add = parser.add_argument_group("a real model and your own data").add_argument
    add("--init", metavar="MODEL", help="in place of the tiny world's base model: a "
        "Hugging Face model of Llama's shape (SmolLM2, Qwen2.5, Qwen3, Llama 3), as a "
        "folder or as its name on the Hub")
    add("--data", nargs="+", action="extend", metavar="FILE",
        help="JSON lines: each file is a skill, learnt one after the other")
    add("--eval", nargs="+", action="extend", metavar="FILE", help="held-out rows: a "
        "file for each of --data, or one for all (without it, those of --data)")
    add("--prior", nargs="+", action="extend", metavar="FILE",
        help="what may be forgotten")
    add("--grade", choices=(*data.GRADES, "none"), help="what makes a response right, "
        "in rows that do not name their grade (default: contains)")
    add("--template", metavar="FILE", help="the teacher's prompt, with {prompt} and "
        "{demonstration} in it (default: the paper's)")
    add("--check-data", action="store_true",
        help="no training: read everything, show both contexts of the first rows")
    add = parser.add_argument_group("world and base model").add_argument
    for name, text in (
        ("demos", "demonstrations for each skill"),
        ("eval_size", "held-out queries for each accuracy"),
        ("gate_margin", "what a demonstration must add to the base's accuracy"),
        ("base_steps", "updates that make the base model"),
    ):
        add("--" + name.replace("_", "-"), type=number(name, type(USUAL[name])),
            metavar="N", help=f"{text} (default: {USUAL[name]})")
    add_flags(parser.add_argument_group("model"), GPTConfig, ("n_layer", "n_embd"))
    add("--distance", choices=data.DISTANCES, default="terms",
        help="how far demonstrations are from the model's own responses: own, worded "
        "alike; known, in a style that it knows; terms, with words it never writes "
        "(default: terms)")
    shared = [f.name for f in fields(sft.Config) if f.name not in HIDDEN]
    own = [f.name for f in fields(sdft.Config) if f.name not in (*shared, *HIDDEN)]
    add_flags(parser.add_argument_group("training"), sdft.Config, shared, sft.Config)
    add_flags(parser.add_argument_group("self-distillation"), sdft.Config, own)
    return parser


def parse_args(argv):
    """The flags as a namespace; what was not given has its default, but for the fields
    of a Config, which are None: see config_of."""
    args = make_parser().parse_args(argv)
    for name, value in {**USUAL, **(QUICK if args.quick else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.defaults = dict(REAL) if args.init else {}
    own = ("data", "eval", "prior", "grade", "template", "shard", "check_data")
    if not args.init:
        for name in own:
            if getattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} needs --init", "--init MODEL, a real model")
    elif not args.data and args.sample is None:
        raise UserError("--init needs --data", "a file of JSON lines; or --sample")
    cfg = config_of("sdft", args)
    if "sdft" in methods_of(args) and cfg.skip_first_tokens >= cfg.max_new_tokens:
        raise UserError(
            f"--skip-first-tokens {cfg.skip_first_tokens} leaves nothing of a response "
            f"of at most {cfg.max_new_tokens} tokens in the loss",
            "skip fewer, or raise --max-new-tokens",
        )
    return args


def methods_of(args):
    return list(METHODS) if args.method == "both" else [args.method]


def config_of(method, args):
    """The Config of a method: a flag before the default of a real model (args.defaults)
    before the method's own."""
    config, values = METHODS[method].Config, {}
    for name in (field.name for field in fields(config)):
        value = getattr(args, name, None)
        value = args.defaults.get(name) if value is None else value
        if value is not None:
            values[name] = value
    cfg = config(**values)
    if args.init and args.micro_batches is None:  # of 8 rows at most
        share = max(1, cfg.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
        cfg.micro_batches = next(
            n for n in range(1, share + 1) if share % n == 0 and share // n <= 8
        )
    return cfg


# ---- Before a run: can it be done, and what will it replace? -------------------------


def check_batches(name, cfg, world_size, n_examples):
    parts = world_size * cfg.micro_batches
    if cfg.batch_size % parts:
        raise UserError(
            f"{name}: a batch of {cfg.batch_size} cannot be cut into equal parts for "
            f"{world_size} processes x {cfg.micro_batches} micro-batches",
            f"a --batch-size that is a multiple of {parts}, or another number of "
            "processes",
        )
    if cfg.batch_size > n_examples:
        raise UserError(
            f"{name}: batch size {cfg.batch_size} > {n_examples} examples",
            "a smaller --batch-size, or more --demos (rows of --data)",
        )


def plan_method(args, method, settings, path):
    """Say what becomes of the folder of a method, and check what can be checked of a
    run that is to go on. Changes nothing. Returns whether it is resumed."""
    folder = Path(args.out) / method
    saved = folder / "checkpoint.pt"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "choose another --out")
    if args.resume and saved.exists():
        content = read_run(saved)
        read_metrics(folder)
        then = {key: content["settings"].get(key) for key in settings}
        check_settings(folder, then, settings)
        own = Path(args.out) / content["note"].get("base", path)
        if not path.exists() and own.absolute() != path.absolute():
            raise UserError(
                f"{folder} started from {own}, and these flags make another base model",
                "give the flags that it was started with, or choose another --out",
            )
        say(f"plan: {method}: {folder} goes on after update {content['step']}")
        return True
    if saved.exists() and not (folder / "results.json").exists():
        raise UserError(
            f"{folder} holds a run that was not finished",
            "go on with --resume, choose another --out, or delete the folder",
        )
    new = "nothing to resume, a new run" if args.resume else "a new run"
    found = files_in(folder)
    kept = f"; {', '.join(found)} kept, in {free_name(folder)}" if found else ""
    say(f"plan: {method}: {new} in {folder}{kept}")
    return False


def files_in(folder):
    """The names in a folder that a run would write to, no matter who wrote them."""
    names = ("checkpoint.pt", "metrics.jsonl", "results.json", "model")
    return [name for name in names if os.path.lexists(folder / name)]


def free_name(folder):
    """<folder>.previous1, .previous2, ...: the first that is not there."""
    names = (f"{folder.name}.previous{n}" for n in itertools.count(1))
    paths = map(folder.with_name, names)
    return next(path for path in paths if not os.path.lexists(path))


# ---- A real model, and users' own data ---------------------------------------------

HINTS = {
    "model": "--init takes an instruct model of Llama's shape (SmolLM2, Qwen2.5, "
    "Qwen3, Llama 3), as a folder or as its name on the Hub",
    "rows": 'see "Your own model and data" in the README',
    "fit": "change these rows, or give a smaller --max-new-tokens",
}


def hinted(hint, action, *args):
    """action(*args); its error as a UserError with that hint. (A model's files can lead
    to any kind of error in transformers.)"""
    try:
        return action(*args)
    except ImportError as error:
        raise UserError(f"--init: {error}", "pip install transformers") from error
    except Exception as error:
        text = str(error)
        if hint == "model":
            text = f"{args[0]}: {' '.join(text.split())[:500]}"
        raise UserError(text, HINTS[hint]) from error


def find_model(name):
    """The folder of a model: `name` itself or, for a name on the Hub, that of its files
    in the cache, into which they are downloaded if they are not there."""
    from huggingface_hub import snapshot_download
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading; a download shows its own
    if Path(name).is_dir():
        return name
    kinds = ["*.json", "*.safetensors", "*.jinja", "*.model"]
    return snapshot_download(name, allow_patterns=kinds)


def read_own(args, device, world_size):
    """All that a user brings: tokenizer, GPTConfig, and stages and tasks as the tiny
    world has them. What depends on the number of rows goes into args.defaults."""
    evals, prior = args.eval or args.data, args.prior or []
    for path in (args.init, args.template or "", *args.data, *evals, *prior):
        for method in methods_of(args):  # its folder may be moved, see open_folder
            folder = Path(args.out) / method
            if folder.resolve() in Path(path).resolve().parents:
                raise UserError(f"{path} is in {folder}, where this run writes",
                                "choose another --out")  # fmt: skip
    tok = hinted("model", data.ChatTokenizer, args.init)
    shell = hinted("model", model.from_pretrained, args.init, tok.n_tokens, False)
    free, shards = free_memory(device), world_size if args.shard else 1
    need = 20e-9 * shell.num_params() / shards  # weights, gradients, AdamW's two, base
    say(f"plan: {need:.3g} GB for weights, gradients, AdamW and the base, and SDFT's "
        f"teacher and the activations; {free or math.nan:.1f} GB are free")
    if free is not None and need > free:
        raise UserError(f"{args.init} needs {need:.3g} GB, {free:.3g} GB are free",
                        "a smaller model, or --shard on several GPUs")  # fmt: skip
    if args.template:
        tok.template = Path(args.template).read_text(encoding="utf-8-sig")
        for place in ("{prompt}", "{demonstration}"):
            if place not in tok.template:
                raise UserError(f"{args.template}: no {place} in it", HINTS["rows"])
    if not tok.sanitizes:
        say("warning: a marker in your texts, such as <|im_end|>, acts as one in this "
            "version of transformers: pip install -U transformers")
    if len(evals) not in (1, len(args.data)):
        raise UserError(f"{len(args.data)} files in --data, {len(evals)} in --eval",
                        "one for each, or one for all")  # fmt: skip
    with_demos = dict.fromkeys([*args.data, *evals])
    rows = {
        path: read_rows(args, path, path in with_demos, tok, shell.config.block_size)
        for path in {**with_demos, **dict.fromkeys(prior)}
    }
    stages = {Path(path).stem: rows[path] for path in args.data}
    old = {Path(path).stem: data.make_benchmark(rows[path]) for path in prior}
    if len({*stages, *old}) < len(args.data) + len(prior):
        raise UserError("two files of one name in --data and --prior",
                        "a skill has the name of its file: rename one")  # fmt: skip
    evals = evals * len(stages) if len(evals) == 1 else evals
    new = {
        name: data.make_benchmark(rows[path])
        for name, path in zip(stages, evals, strict=True)
    }
    if not args.eval:
        say("no --eval: the new skills are measured on the rows that are trained on")
    for name, stage in stages.items():
        trained = {(e.earlier, e.prompt) for e in stage}
        held_out = new[name].examples if args.eval else []
        both = [str(e.id) for e in held_out if (e.earlier, e.prompt) in trained]
        if both:
            say(f"warning: {name}: the held-out prompts of lines "
                f"{', '.join(both[:20])} are also in --data")
        show_contexts(name, stage[0], tok)
    batch = min(REAL["batch_size"], *map(len, stages.values()))
    args.defaults["batch_size"] = max(1, batch - batch % world_size)
    return tok, shell.config, stages, {"new": new, "prior": old}


def read_rows(args, path, needs_demo, tok, block_size):
    """The rows of a file, which must fit into block_size tokens; prints what a user
    should know of them."""
    n = max(config_of(method, args).max_new_tokens for method in methods_of(args))
    examples, remarks = hinted("rows", data.read_examples, path, needs_demo, args.grade)
    hinted("fit", data.check_lengths, path, examples, tok, n, block_size)
    cut = sum(len(data.demo_response(e, tok)) > n for e in examples if e.demo)
    if cut:
        remarks.append(f"{cut} demonstrations are longer than --max-new-tokens {n}, "
                       "where the model's own responses are cut")  # fmt: skip
    grade = data.make_benchmark(examples).grade
    wrong = [str(e.id) for e in examples if grade and e.demo and not grade(e, e.demo)]
    if wrong:
        remarks.append(f"{len(wrong)} demonstrations are wrong by their own answer, "
                       f"lines {', '.join(wrong[:20])}")  # fmt: skip
    for remark in remarks:
        say(f"{path}: {remark}")
    return examples


def show_contexts(name, example, tok):
    """Both contexts of an example, literally: what the models will read."""
    for part in (data.student_prompt, data.teacher_prompt, data.demo_response):
        ids = part(example, tok)
        say(f"--- {name}, line {example.id}: {part.__name__}, {len(ids)} tokens\n"
            f"{tok.decode([*ids, tok.end])}")


def free_memory(device):
    """GB that are free on the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text())
    return int(found[1]) * 1024 / 1e9 if found else None


# ---- Device and processes ------------------------------------------------------------


def choose_device(name):
    """The torch.device of this process."""
    local, n_cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local}"  # each process has its own
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device", "try cpu or cuda") from None
    hint = "fewer processes, or --device cpu"
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the same in all processes
    if device.type == "cuda" and max(needed, device.index + 1) > n_cuda:
        raise UserError(f"--device {name}: {n_cuda} CUDA devices found", hint)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here", hint)
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: not supported", hint)
    return device


def choose_dtype(device, init):
    """That of activations: bfloat16 for a real model, where the GPU has it. Weights are
    float32 always, and so is the tiny world, which was measured in nothing else."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast and init else torch.float32


def start_processes(args):
    """Join the process group if torchrun started us; how many processes are there?"""
    missing = [name for name in TORCHRUN if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return 1
    if missing:
        message = f"started as one of several processes, but {missing} not set"
        raise UserError(message, "torchrun --standalone --nproc_per_node=2 train.py")
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return dist.get_world_size()


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


def check_shard(args, device, world_size):
    """Raise UserError where --shard cannot be."""
    if args.shard and world_size == 1:
        raise UserError(
            "--shard needs several processes, and this is one",
            "torchrun --standalone --nproc_per_node=2 train.py ... --shard",
        )
    if args.shard and tuple(map(int, torch.__version__.split(".")[:2])) < SHARD_TORCH:
        raise UserError("--shard: gradient norms are wrong in so old a torch",
                        "pip install -U 'torch>=2.13,<2.14'")  # fmt: skip
    if args.shard and device.type not in ("cpu", "cuda"):
        raise UserError(f"--shard: not on {device}", "--device cuda, or --device cpu")


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
    return {
        "models": {
            name: torch_state.get_model_state_dict(gpt, options=options)
            for name, gpt in models.items()
        },
        "optimizer": torch_state.get_optimizer_state_dict(
            models["student"], optimizer, options=options
        ),
    }


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


@torch.no_grad()
def whole_gpt(gpt):
    """A GPT in shards as a whole one, on the CPU of the first process."""
    if not hasattr(next(gpt.parameters()), "full_tensor"):
        return gpt
    torch_state, options = state_options()
    weights = torch_state.get_model_state_dict(gpt, options=options)
    with torch.device("meta"):  # its tensors are replaced, and take no memory
        twin = GPT(gpt.config)
    if is_first():
        twin.load_state_dict(weights, assign=True)
    return twin


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


def write_model(gpt, name, folder):
    try:
        model.save_pretrained(gpt, name, folder)
    except Exception as error:  # safetensors has its own kind for a full disk
        raise OSError(f"{folder} not written: {error}") from error


def append_line(path, line):
    """Add a line to a file. Raises OSError, with the path, when the disk is full."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(f"{path} not written: {error.strerror}") from None


def read_checkpoint(path, mmap=False):
    """The dict of write_checkpoint, its tensors on the CPU (mmap: read when they are
    used). Raises UserError if the file is cut, damaged or not a checkpoint; nothing in
    it is ever executed."""
    if not path.is_file():
        raise UserError(f"{path}: no such file", "is the path right?")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load checks no sum
            # a flipped bit here would make a folder of a tensor, which is read as noise
            damaged = damaged or any(entry.external_attr for entry in file.infolist())
        if not damaged:
            content = torch.load(path, "cpu", weights_only=True, mmap=mmap)
            if isinstance(content, dict):
                return content
        what = "it is damaged" if damaged else "it is not a dict"
    except Exception as error:  # the readers of zip and pickle raise many kinds
        what = f"{type(error).__name__}: {error}"
    hint = "delete it and run again, or choose another --out"
    raise UserError(f"{path} cannot be read: {what.splitlines()[0]}", hint)


def read_run(path, mmap=True):
    """What Run.save wrote. (AdamW would keep a mapped file as its state, so a run that
    goes on reads it whole.)"""
    content = read_checkpoint(path, mmap)
    needed = {"step", "settings", "machine", "config", "models", "note"}
    if missing := sorted(needed - content.keys()):
        raise UserError(
            f"{path} is not a run of this train.py: it has no {', '.join(missing)}",
            "it may be of another version, or a base model; choose another --out",
        )
    return content


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


def source_of(module):
    """The code of a module as text, without comments and docstrings."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def base_key(config, cfg, world, tok, dtype):
    """What decides the base model, as a name for its folder: configurations, a sample
    of its corpus, and the code that trains it. New words in a docstring, or another
    column of a table, keep it."""
    sample = data.make_base_corpus(world, tok, 2000, cfg.seed)
    batch = data.get_batch(sample, len(sample), cfg.seed, 0)  # also their order
    prompts = [data.student_prompt(example, tok) for example in batch]
    learnt = [each.tolist() for each in sft.get_responses(batch, tok, "cpu")]
    code = [source_of(module) for module in (model, sft)]
    made_of = asdict(config), asdict(cfg), prompts, learnt, str(dtype), code
    return digest(repr(made_of))


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


def describe(record, earlier=(), gate=None):
    """A record of metrics.jsonl as a line or more for the screen: an evaluation with
    the earlier ones, and a warning if the teacher has lost what it knew of a skill."""
    if "new" in record:
        lines = [table([*stage_ends(earlier), record])]
        for row in record["responses"]:
            lines.append(f"  {short(row['prompt'])}  ->  {short(row['response'])}")
        for name, kl in record.get("kl_student_base_prior", {}).items():
            lines.append(f"  KL(student || base) on {name}: {kl:.3f} nats per token")
        skill, now = record["skill"], record["teacher_gate"]
        if now is not None:
            lines.append(f"  the teacher, shown the demonstration: {now:.2f}")
            seen = [row["teacher_gate"] for row in earlier if row["skill"] == skill]
            then = max([now, *(x for x in seen if x is not None)])
            then = max(then, gate["skills"].get(skill, 0) if gate else 0)
            if now < then - GATE_LOSS:
                lines.append(
                    f"warning: on {skill} the teacher has fallen from {then:.2f}: it "
                    "follows its student astray; try a lower --ema-rate, or 0"
                )
        return "\n".join(lines)
    numbers = [f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float)]
    lines = [f"step {record['step']:4d} {record['skill']}  " + "  ".join(numbers)]
    if record["eos_rate"] == 0:
        lines.append(f"warning: EOS rate 0 %, mean length {record['response_length']}: "
                     "no response came to its end; try a higher --max-new-tokens")
    elif round(record["response_length"], 3) == 1:
        lines.append("warning: every response is empty, but for its end")
    if record["grad_norm"] == 0:
        lines.append("warning: the gradient is 0, nothing is learnt: no token carries "
                     "loss, or teacher and student agree")
    return "\n".join(lines)


def short(text):
    """A text as one line of the screen; metrics.jsonl has it whole."""
    line = " / ".join(text.split("\n"))
    return line if len(line) <= 200 else f"{line[:200]} ... ({len(text)} characters)"


def show(folders):
    """The tables of the finished runs in these folders and, of several runs, their last
    lines as one."""
    last = {}
    for folder in (Path(out) / method for out in folders for method in METHODS):
        try:
            text = (folder / "results.json").read_text(encoding="utf-8")
            results, rows = json.loads(text), read_metrics(folder)
            rows = stage_ends([row for row in rows if "new" in row])
            seconds, seed = results["seconds"]["fine_tune"], results["seed"]
            say(f"\n{folder}, seed {seed}, {seconds:.0f} s:\n{table(rows)}")
            last[f"{folder}, seed {seed}"] = rows[-1]
        except FileNotFoundError:
            continue
        except (KeyError, IndexError, TypeError, json.JSONDecodeError):
            raise UserError(
                f"results.json and metrics.jsonl in {folder} are not what a run writes",
                "leave the folder out, or run again",
            ) from None
    if not last:
        raise UserError(f"no finished run in {', '.join(folders)}", "another folder?")
    if len(last) > 1:
        say("\n" + table(list(last.values()), list(last)))


def show_sample(args, device, dtype):
    """What the base and the fine-tuned model respond to one prompt: greedily, and two
    samples. A saved run knows its own seed, sizes and base. --init alone shows the
    base."""
    methods = methods_of(args)
    paths = {method: Path(args.out) / method / "checkpoint.pt" for method in methods}
    if args.init and not any(path.exists() for path in paths.values()):
        tok, gpt = load_own(args.init, device, dtype)
        n = args.max_new_tokens or REAL["max_new_tokens"]
        return respond("base", gpt, n, args, tok)
    for method, path in paths.items():
        if not path.exists():
            raise UserError(
                f"no run of {method} in {args.out}",
                f"python train.py --method {method} --out {args.out} makes one",
            )
        saved = read_run(path)
        base = Path(args.init or Path(args.out) / saved["note"]["base"])
        if args.init and not saved["note"]["init"]:
            message = f"{path.parent} is a run of the tiny world"
            raise UserError(message, "leave --init out")
        if saved["note"]["init"]:
            written = path.parent / "model"  # it also has the shape and the tokenizer
            tok, gpt = load_own(base if base.exists() else written, device, dtype)
            if other := differences(saved["config"], asdict(gpt.config)):
                raise UserError(f"{path.parent} started from another model than {base} "
                                f"(saved -> there): {other}", "leave --init out")
        else:
            tok, gpt = data.Tokenizer(), GPT(GPTConfig(**saved["config"])).to(device)
            gpt.dtype = dtype
        steps = saved["settings"]["steps"] * len(saved["note"]["skills"])
        say(f"{path.parent}: seed {saved['settings']['seed']}, after update "
            f"{saved['step']} of {steps}")
        if not base.exists():
            say(f"base   not shown: {base} is gone")
        elif method == methods[0]:
            if not saved["note"]["init"]:
                gpt.load_state_dict(read_checkpoint(base)["model"])
            respond("base", gpt, saved["settings"]["max_new_tokens"], args, tok)
        gpt.load_state_dict(saved["models"]["student"])
        respond(method, gpt, saved["settings"]["max_new_tokens"], args, tok)
    return None


def load_own(name, device, dtype):
    """Tokenizer and GPT of a Hugging Face model."""
    name = hinted("model", find_model, name)
    tok = hinted("model", data.ChatTokenizer, name)
    gpt = hinted("model", model.from_pretrained, name, tok.n_tokens).to(device)
    gpt.dtype = dtype
    return tok, gpt


def respond(name, gpt, n, args, tok):
    """Show the greedy response to args.sample, and two samples, of at most n tokens."""
    ids = data.student_prompt(data.Example(args.sample, "", ""), tok)
    device = next(gpt.parameters()).device
    say(f"{name:5s}  {data.greedy_responses(gpt, [ids], tok, n)[0]}")
    prompts, lengths = data.pad_right([ids] * 2, tok.end, device)
    u = torch.rand(2, n, generator=data.make_rng(args.seed, "sample")).to(device)
    response, mask = model.generate(gpt, prompts, lengths, n, tok.end, u)
    for row, count in zip(response.tolist(), mask.sum(1).tolist(), strict=True):
        say(f"       sampled: {tok.decode(row[:count])}")


# ---- The program ---------------------------------------------------------------------


def command_line(argv):
    """How this program was started, as one would type it."""
    start = "python train.py"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        n = os.environ.get("LOCAL_WORLD_SIZE", "2")
        start = f"torchrun --standalone --nproc_per_node={n} train.py"
    return f"{start} {shlex.join(argv)}"


def main(argv):
    """Run, and turn what the user can fix into an error, a hint and an exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, or a program without a terminal
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # a terminal may lack a character
            stream.reconfigure(errors="replace")
    stop = Stop()

    def tell(text):
        if is_first():
            with contextlib.suppress(OSError):  # nobody reads it
                print(text, file=sys.stderr, flush=True)
        else:  # torchrun ends all when one ends: the first must have spoken before
            time.sleep(2)

    try:
        whole_run(parse_args(argv), stop)
    except BrokenPipeError:  # python train.py | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        tell("error: the program that reads this output has ended\n"
             "hint: --resume goes on from the last checkpoint")
        return 2
    except torch.OutOfMemoryError as error:  # of a GPU, perhaps not the first one's
        print(f"error: {str(error).splitlines()[0]}\n"
              "hint: more --micro-batches, --checkpointing, or --shard on several GPUs",
              file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        hint = getattr(error, "hint", "") or "is the path right, and is the disk full?"
        tell(f"error: {error}\nhint: {hint}")
        return 2
    except FloatingPointError as error:
        tell(f"error: {error}\nhint: try a lower --lr")
        return 3
    except KeyboardInterrupt:
        again = [arg for arg in argv if arg != "--resume"] + ["--resume"]
        tell(f"stopped; to go on: {command_line(again)}")
        return 128 + stop.agreed()
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
