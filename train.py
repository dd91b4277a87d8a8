"""The command line: base model, teacher gate, fine-tuning, evaluation, results.

    python train.py                         # = --method sdft, everything by default
    python train.py --method both           # SFT, then SDFT, from one base
    python train.py --quick                 # half a minute: does it run here?
    python train.py --method sft --lr 3e-4  # every number of the trainers is a flag
    python train.py --resume                # go on after Ctrl-C or a crash
    python train.py --sample "garden cork: candle spoon tower"
    python train.py --show                  # the tables of finished runs in --out again
    torchrun --standalone --nproc_per_node=2 train.py    # data parallel, CPU or GPU
    python train.py --init FOLDER --data demos.jsonl     # a real model, your own data

It writes <out>/<method>/metrics.jsonl and results.json; the base model stays in
<out>/base for the next run. Exit codes: 0 done, 2 bad input, 3 a loss or gradient that
is not finite, 130 or 143 stopped by Ctrl-C or SIGTERM with everything saved.
"""

import argparse
import ast
import copy
import difflib
import errno
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

try:  # locks of files: Linux and macOS
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

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
LOCKS = []  # files that are locked; main lets go of them, whatever ended it
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets

# The base model: larger steps than in fine-tuning, each example seen once.
BASE = sft.Config(
    steps=700, batch_size=64, micro_batches=2, lr=2e-3, warmup_steps=100, beta2=0.95,
    weight_decay=0.1, dropout=0.2, log_every=200, save_every=250,
)  # fmt: skip
MODEL_FLAGS = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner")
# Work of an update, and of an evaluation, in updates of the base: for the time left.
WORK = {"base": 1.0, "sft": 1.7, "sdft": 2.2, "evaluation": 20.0}
GATE_LOSS = 0.02  # what a teacher's accuracy may fall before there is a warning
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
    **dict.fromkeys(("batch_size", "micro_batches", *MODEL_FLAGS), (1, 10**6)),
    **dict.fromkeys(("lr", "weight_decay"), (0, 1e3)),
    "beta2": (0, 0.999999), "grad_clip": (1e-9, 1e9), "dropout": (0, 0.9),
    "max_new_tokens": (1, 10**5), "seed": (0, 2**62), "ema_rate": (0, 1),
    "temperature": (1e-3, 1e3), "skip_first_tokens": (0, 10**5),
    "gate_margin": (-1, 1), "threads": (0, 1024),
}  # fmt: skip
CHOICES = {"kl": model.KLS, "teacher": ("ema", "frozen", "live")}


# ---- The whole run, from top to bottom ---------------------------------------------


class UserError(ValueError):
    """Something that the user can mend: printed as an error and a hint, exit code 2."""

    def __init__(self, message, hint=""):  # a default: unpickling gives message only
        super().__init__(message)
        self.hint = hint


def whole_run(args, stop):
    """Check everything, then base model, gate, and one method after the other."""
    if args.show or args.compare:
        return show(args)
    world_size = start_processes(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, reason = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    name = str(dtype).removeprefix("torch.")
    say(f"device {device} ({reason}), activations {name}, seed {args.seed}, "
        f"processes {world_size}, threads {torch.get_num_threads()}, "
        f"torch {torch.__version__}, CPU {torch.backends.cpu.get_cpu_capability()}")
    if args.init:
        args.init = first_does(hinted, "model", find_model, args.init)
    if args.sample is not None:
        return show_sample(args, device, dtype)
    check_shard(args, device, world_size)

    # what there is to learn, and what there is to forget
    if args.init:
        tok, config, stages, tasks = read_own(args, device, world_size)
        if args.check_data:
            return None
        world, base_cfg = None, None
    else:
        tok, world = data.Tokenizer(), data.World(args.seed)
        stages = {
            skill: data.make_demos(world, skill, args.demos, args.seed, args.distance)
            for skill in data.SKILLS
        }
        tasks = data.make_tasks(world, args.eval_size, args.seed, args.distance)
        config, base_cfg = base_settings(args, world_size)
    configs = {method: config_of(method, args) for method in methods_of(args)}

    # whatever can go wrong goes wrong now, and not after minutes of work
    check_run(args, configs, config, base_cfg, stages, tasks, tok, world_size)
    held = []  # a lock lasts as long as its file is open
    first_does(lambda: held.append(lock(Path(args.out))))
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

    work = sum(
        len(stages) * cfg.steps * WORK[method] + (1 + len(stages)) * WORK["evaluation"]
        for method, cfg in configs.items()
    )
    work += 0 if path.exists() else base_cfg.steps * WORK["base"]
    bar = make_bar(work)

    # the base model, and what a demonstration adds to it
    if args.init:
        base = hinted("model", model.from_pretrained, args.init, tok.n_tokens)
        say(f"base model: {base.num_params():,} parameters, from {path}")
    else:
        base = GPT(config, data.make_rng(args.seed, "weights"))
    base.dtype, base.checkpointing = dtype, bool(args.checkpointing)
    if not args.shard:
        base = base.to(device)
    if device.type != "cpu":
        check_device(one_block(base, device) if args.shard else base)
    seconds = 0.0
    if not args.init:
        seconds = get_base(args, path, config, base_cfg, base, world, tok, stop, bar)
    if args.shard:
        model.shard(base, device)
    gate = check_gate(args, base, tasks, tok, configs)

    final = {}
    for method, cfg in configs.items():
        fixed = args.base or args.init
        where = path.absolute() if fixed else os.path.relpath(path, args.out)
        note = {"base": str(where), "gate": gate, "init": bool(args.init)}
        note["skills"] = list(stages)
        folder = first_does(open_folder, args, method, resumed[method])
        note["base_seconds"] = seconds
        run = Run(folder, resumed[method], stop, note, bar, WORK[method], about)
        # (the last one may change the base itself: a copy of a real one is large)
        student = base if method == list(configs)[-1] else copy.deepcopy(base)
        rows = fine_tune(method, run, cfg, student, stages, tasks, tok)
        final[method] = rows[-1]
    bar.close()
    if len(final) > 1:
        say(f"\nafter all skills:\n{table(list(final.values()), list(final))}")
    if args.plot and is_first() and importlib.util.find_spec("matplotlib"):
        plot(args.out, list(final))
    for method in final:
        say(f"files: {Path(args.out) / method}/results.json and metrics.jsonl")


# ---- The base model ----------------------------------------------------------------


def base_settings(args, world_size):
    """GPTConfig and sft.Config of the base model."""
    tok = data.Tokenizer()
    sizes = {n: getattr(args, n) for n in MODEL_FLAGS if getattr(args, n) is not None}
    config = GPTConfig(vocab_size=tok.vocab_size, n_tokens=tok.n_tokens, **sizes)
    cfg = replace(
        BASE, seed=args.seed, steps=args.base_steps,
        warmup_steps=min(BASE.warmup_steps, args.base_steps // 4),
        micro_batches=max(1, BASE.micro_batches // world_size),  # shared out
    )  # fmt: skip
    return config, cfg


def find_base(args, config, cfg, world, tok, dtype):
    """Where the base model is, or will be when it is made."""
    if args.base:
        return Path(args.base)
    # the key does not depend on the number of processes, or on what is recorded
    cfg = replace(cfg, micro_batches=1, log_every=1, eval_every=0, save_every=1)
    key = base_key(config, cfg, world, tok, dtype)
    return Path(args.out) / "base" / key / "base.pt"


def get_base(args, path, config, cfg, student, world, tok, stop, bar):
    """Put the base model into the student, from its file or by making it. Returns the
    seconds that it took to make, now or earlier."""
    held = []
    if not first_does(path.exists):
        first_does(lambda: held.append(lock(path.parent)))
    if not args.base:
        first_does(remove_temporary, path.parent)
    if first_does(path.exists):  # perhaps made by another run since we looked
        content = read_base(path, config, args.seed)
        if not args.base and content.get("key", path.parent.name) != path.parent.name:
            raise UserError(f"{path} is the base {content['key']}", "delete the copy")
        student.load_state_dict(content["model"])
        say(f"base model: found in {path.parent}")
        if other := differences(content["machine"], machine_of(student)):
            say(f"  made on another machine (then -> now): {other}")
        return content["seconds"]
    say(f"base model: {student.num_params():,} parameters, {cfg.steps} updates of "
        f"{cfg.batch_size}; kept in {path.parent} for the next run")
    corpus = data.make_base_corpus(world, tok, cfg.batch_size * cfg.steps, args.seed)
    run = Run(path.parent, resume=True, stop=stop, bar=bar)
    train_in(run, sft, student, {"base": corpus}, {}, tok, cfg)
    about = {**asdict(config), "seed": args.seed}
    first_does(write_checkpoint, path, {
        "base": about, "key": path.parent.name, "seconds": run.seconds(),
        "machine": machine_of(student),
        "model": student.state_dict(),
    })  # fmt: skip
    for file in held:
        file.close()
    return run.seconds()


def check_gate(args, base, tasks, tok, configs):
    """Does a demonstration help the base on the new skills? If not, stop here: SDFT's
    teacher would know no more than its student. None where nothing is graded."""
    cfg = next(iter(configs.values()))
    temperature = configs["sdft"].temperature if "sdft" in configs else 1.0
    graded = {name: task for name, task in tasks["new"].items() if task.grade}
    if not graded:
        say("teacher gate: not measured, nothing new is graded (--grade)")
        return None
    n = cfg.max_new_tokens
    gate = data.teacher_gate(base, graded, tok, n, temperature, cfg.seed)
    say(f"teacher gate: base model on the new skills: accuracy {gate['student']:.2f} "
        f"without a demonstration, {gate['teacher']:.2f} with one\n"
        f"  right only with it: {gate['only_teacher']} queries, only without it: "
        f"{gate['only_student']}; with it, sampled at temperature {temperature:g} as "
        f"in training: {gate['sampled']:.2f}")
    if gate["sampled"] < gate["teacher"] / 2:
        say("warning: the teacher seldom says what it knows; a lower --temperature, .5 "
            "or .3, makes it surer")
    hint = "train the base longer (--base-steps), or lower --gate-margin to see why"
    if args.init:
        hint = ("another --template; demonstrations in plain sentences, with their "
                "reasons; a larger model; or lower --gate-margin to see why")
    if gate["teacher"] - gate["student"] < args.gate_margin:
        raise UserError(
            f"a demonstration does not help enough: {gate['teacher']:.2f} - "
            f"{gate['student']:.2f} < --gate-margin {args.gate_margin}: nothing to "
            "distil", hint,
        )
    return gate


# ---- One method --------------------------------------------------------------------


def open_folder(args, method, resume):
    """The folder of one method's files. What a run left in it is kept under another
    name; nothing is lost."""
    folder = Path(args.out) / method
    if files_in(folder) and not resume:
        os.replace(folder, free_name(folder))
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    return folder


def fine_tune(method, run, cfg, student, stages, tasks, tok):
    """Run one method on the three skills; the student, which has the base's weights, is
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
        first_does(model.save_pretrained, whole_gpt(student), run.note["base"], path)
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
    keys += tuple(key for key in ("nll", "kl_student_base_prior") if run.note["init"])
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
            {key: row[key] for key in keys} | {"seconds": spent[row["skill"]]}
            for row in ends
        ],
    }
    text = json.dumps(results, indent=1)
    write_atomically(run.folder / "results.json", text.encode())
    return sum(spent.values())


def stage_ends(evaluations):
    """The base, and the end of each stage."""
    return [row for row in evaluations if row["stage_end"] or not row["step"]]


# ---- What a trainer gets: records, checkpoints, a bar, the wish to stop ------------


class Run:
    """What a trainer needs of the machine: metrics.jsonl and checkpoint.pt in a folder,
    a bar, and whether somebody wants it to stop. `Run("some/folder")` is enough.

    resume: go on from the checkpoint, if there is one. stop: an object whose `signal`
    is 0 until the run is to stop after its step. note: plain values, kept in the
    checkpoint. bar: that of the whole program, which a step moves on by `work`. about:
    further plain values that a resume must find again.
    """

    def __init__(
        self, folder, resume=False, stop=None, note=None, bar=None, work=1.0, about=None
    ):
        self.folder, self.resume, self.stop = Path(folder), resume, stop
        self.note, self.bar, self.work = note or {}, bar, work
        self.about = about or {}
        self.checkpoint = self.folder / "checkpoint.pt"
        self.metrics = self.folder / "metrics.jsonl"
        self.settings, self.evaluations = {}, []
        self.start = self.clock = time.perf_counter()
        self.earlier = 0.0  # seconds, before a resume

    def load(self, models, optimizer, cfg, examples):
        """Put a saved run into models and optimizer. Returns the step where it goes on
        and its evaluations; 0 and [] if nothing was saved.

        Raises: ValueError if the folder holds a run and resume is false, or one with
        other settings, examples or first weights.
        """
        student = models["student"]
        self.settings = settings_of(cfg, student.config, examples) | self.about
        self.settings["first weights"] = digest_of(student)
        start, evaluations, unrecorded = 0, [], 0.0
        if not self.resume and first_does(files_in, self.folder):
            raise UserError(
                f"{self.folder} holds a run", "resume it, or take another folder"
            )
        if self.checkpoint.exists():
            saved = read_run(self.checkpoint)
            check_settings(self.folder, saved["settings"], self.settings)
            other = differences(saved["machine"], machine_of(student))
            if other:
                say(f"resumed, but not to the bit (saved -> now): {other}")
            for name, weights in saved["models"].items():
                models[name].load_state_dict(cut_as(weights, models[name].state_dict()))
            optimizer.load_state_dict(cut_optimizer(saved["optimizer"], optimizer))
            start, evaluations = saved["step"], saved["evaluations"]
            self.earlier, unrecorded = saved["seconds"], saved.get("unrecorded", 0.0)
        first_does(self.cut_metrics, start)
        self.evaluations = list(evaluations)
        self.clock = time.perf_counter() - unrecorded
        return start, evaluations

    def cut_metrics(self, start):
        """Keep the lines before `start`: a resumed run makes those after it again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.folder) if row["step"] < start]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.metrics, text.encode())

    def progress(self, start, end):
        """The steps from start to end - 1, with a bar on a terminal."""
        own = self.bar or make_bar((end - 1) * self.work)
        own.set_description(self.folder.name if self.note else "base model")
        own.update(start * self.work)
        try:
            for step in range(start, end):
                yield step  # the trainer returns in the last one, which is no update
                own.update(self.work)
        finally:
            if own is not self.bar:
                own.close()

    def log(self, record):
        """A line of metrics.jsonl, and the same on the screen."""
        before, self.clock = self.clock, time.perf_counter()
        record["seconds"] = round(self.clock - before, 3)  # since the last record
        first_does(append_line, self.metrics, json.dumps(record))
        if is_first():
            say(describe(record, self.evaluations, self.note.get("gate")))
        if "new" in record:
            self.evaluations.append(record)
            if self.bar is not None:
                self.bar.update(WORK["evaluation"])
                means = (f"{g} {mean_of(record[g]):.2f}" for g in ("new", "prior"))
                self.bar.set_postfix_str(", ".join(means))

    def save(self, step, models, optimizer, evaluations):
        """All that a resume needs; everything random is derived from (seed, step)."""
        content = {
            "step": step,
            "settings": self.settings,
            "machine": machine_of(models["student"]),
            "config": asdict(models["student"].config),
            "models": {name: model.state_dict() for name, model in models.items()},
            "optimizer": optimizer.state_dict(),
            "evaluations": evaluations,
            "note": self.note,
            "seconds": self.seconds(),
            "unrecorded": time.perf_counter() - self.clock,  # since the last record
        }
        first_does(write_checkpoint, self.checkpoint, whole_state(content))

    def seconds(self):
        """What the run has taken so far, the parts before a resume included."""
        return self.earlier + time.perf_counter() - self.start

    def stop_wanted(self):
        """1. if this process was asked to stop, else 0."""
        return float(bool(self.stop and self.stop.signal))


def make_bar(total):
    """A bar with the time left; on a terminal, and for the first process, only."""
    return tqdm(
        total=total, disable=None if is_first() else True, dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
        "{postfix}",
    )  # fmt: skip


def mean_of(accuracies):
    return sum(accuracies.values()) / max(1, len(accuracies))


def read_metrics(folder):
    """The records of a folder, without a last line that a kill has cut in half."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        return [dict(json.loads(line)) for line in text.split("\n")[:-1]]
    except (ValueError, TypeError):
        message = f"{path}: not every line is a record"
        raise UserError(message, "mend it, or choose another --out") from None


def settings_of(cfg, config, examples):
    """All that decides a run but its first weights, as plain values: a resume must find
    the same."""
    examples = digest(as_text(examples))
    return {**asdict(cfg), **asdict(config), "examples": examples}


@torch.no_grad()
def digest_of(student):
    weights = hashlib.sha256()
    for p in student.parameters():
        weights.update(model.whole(p).cpu().numpy().tobytes())
    return weights.hexdigest()[:12]


def as_text(examples):
    """Stages and tasks as one text: the examples, and the names of graders."""
    if isinstance(examples, data.Benchmark):
        grade = getattr(examples.grade, "__name__", type(examples.grade).__name__)
        return f"{grade} {examples.examples}"
    if isinstance(examples, dict):
        return str([(name, as_text(value)) for name, value in examples.items()])
    if isinstance(examples, tuple):
        return str([as_text(value) for value in examples])
    return str(examples)


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
        **({"shards": True} if model.is_shard(first) else {}),
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
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.ask)

    def ask(self, signum, _):
        self.signal = signum
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if is_first():
            text = "\nstopping after this step; once more stops at once"
            print(text, file=sys.stderr)

    def agreed(self):
        """The signal that stopped the run, the same number in every process."""
        value = torch.tensor(self.signal)
        if dist.is_initialized():
            if dist.get_backend() == "nccl":
                value = value.cuda()
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)


# ---- Flags: here a first reading may stop ------------------------------------------


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
        if not low <= value <= high:  # false for nan, too
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


def add_flags(group, config, names, shown, prefix=""):
    """A --flag for each named field of a dataclass. Not given it is None, so that any
    value that is given counts. shown(name): what --help says of the default."""
    texts, kinds = field_help(config), {f.name: type(f.default) for f in fields(config)}
    for name in names:
        flag = "--" + prefix + name.replace("_", "-")
        text = f"{texts[name]} (default: {shown(name)})".replace("%", "%%")
        if name in CHOICES:
            kind = {"choices": CHOICES[name]}
        else:
            kind = {"type": number(name, kinds[name]), "metavar": "N"}
        text = argparse.SUPPRESS if prefix else text
        group.add_argument(flag, dest=prefix + name, help=text, **kind)


def make_parser():
    parser = Parser(
        prog="train.py",
        description="SDFT and SFT on three skills in a row, from a base made here.",
        epilog="A flag of the trainers applies to each method that runs. --sft.lr or "
        "--sdft.steps, and so for each of them, applies to that method only.",
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
    add("--plot", action="store_true", help="draw the accuracies (needs matplotlib)")
    add("--sample", metavar="PROMPT",
        help="no training: what the base and --method respond to it")
    add("--show", action="store_true", help="no training: the tables of --out again")
    add("--compare", nargs="+", metavar="OUT",
        help="no training: the finished runs of several --out folders as one table")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of activations; weights are float32; auto: bfloat16 where CUDA has it")
    add("--threads", type=number("threads", int), default=2, metavar="N",
        help="on a CPU; more hardly help so small a model (0: all cores; default: 2)")
    add("--checkpointing", action="store_true",
        help="less memory: activations are computed again in the backward pass")
    add("--shard", action="store_true",
        help="with torchrun and --init: each process holds a part of every tensor, for "
        "what outgrows one GPU (torch's FSDP2)")
    add("--debug", action="store_true", help="show the traceback of an error")
    add = parser.add_argument_group("a real model and your own data").add_argument
    add("--init", metavar="MODEL", help="in place of the tiny world's base model: a "
        "Hugging Face model of Llama's shape (SmolLM2, Qwen2.5, Qwen3, Llama 3), as a "
        "folder or as its name on the Hub")
    add("--data", nargs="+", metavar="FILE",
        help="JSON lines: each file is a skill, learnt one after the other")
    add("--eval", nargs="+", metavar="FILE", help="held-out rows: a file for each of "
        "--data, or one for all (without it, those of --data)")
    add("--prior", nargs="+", metavar="FILE", help="what may be forgotten")
    add("--grade", choices=(*data.GRADES, "none"), help="what makes a response right, "
        "in rows that do not name their grade (default: contains)")
    add("--template", metavar="FILE", help="the teacher's prompt, with {prompt} and "
        "{demonstration} in it (default: the paper's)")
    add("--check-data", action="store_true",
        help="no training: read everything, show both contexts of the first rows")
    add = parser.add_argument_group("world and base model").add_argument
    for flag, default, text in (
        ("--demos", 2048, "demonstrations for each skill"),
        ("--eval-size", 400, "held-out queries for each accuracy"),
        ("--gate-margin", 0.2, "what a demonstration must add to the base's accuracy"),
        ("--base-steps", BASE.steps, "updates that make the base model"),
    ):
        kind = number(flag[2:].replace("-", "_"), type(default))
        add(flag, type=kind, default=default, metavar="N",
            help=f"{text} (default: %(default)s)")
    add("--base", metavar="FILE", help="a base.pt that was made earlier, here or on "
        "another machine, in place of one of --out")
    add("--distance", choices=data.DISTANCES, default="terms",
        help="how far demonstrations are from the model's own responses: own, worded "
        "alike; known, in a style that it knows; terms, with words it never writes "
        "(default: terms)")

    def both(name):
        one, other = (getattr(m.Config, name) for m in (sdft, sft))
        return one if one == other else f"{one}, sft: {other}"

    add_flags(parser.add_argument_group("model"), GPTConfig, MODEL_FLAGS,
              lambda name: getattr(GPTConfig, name))  # fmt: skip
    shared = [field.name for field in fields(sft.Config)]
    add_flags(parser.add_argument_group("training"), sdft.Config, shared, both)
    group = parser.add_argument_group("self-distillation")
    add_flags(group, sdft.Config, only_sdft(), lambda name: getattr(sdft.Config, name))
    for method, trainer in METHODS.items():
        names = [field.name for field in fields(trainer.Config) if field.name != "seed"]
        add_flags(parser, trainer.Config, names, str, f"{method}.")
    return parser


def only_sdft():
    """Settings that SFT does not have."""
    shared = {field.name for field in fields(sft.Config)}
    return [f.name for f in fields(sdft.Config) if f.name not in shared]


def parse_args(argv):
    """The flags as a namespace; `given` names those that were typed."""
    parser = make_parser()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    # with an attribute there already, argparse sets no default: None is "not typed"
    blank = argparse.Namespace(**dict.fromkeys(names))
    args, unknown = parser.parse_known_args(argv, blank)
    if unknown:
        flags = list(parser._option_string_actions)
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.5)
        raise UserError(
            f"unknown argument {unknown[0]!r}",
            f"did you mean {near[0]}?" if near else "python train.py --help lists all",
        )
    args.given = {name for name in names if getattr(args, name) is not None}
    for name in set(names) - args.given:
        quick = args.quick and name in QUICK
        setattr(args, name, QUICK[name] if quick else parser.get_default(name))
    args.seed = args.seed or 0
    args.defaults = dict(REAL) if args.init else {}
    check_flags(args)
    return args


def methods_of(args):
    return list(METHODS) if args.method == "both" else [args.method]


def config_of(method, args):
    """The Config of a method: --sft.lr before --lr before the method's own default, or
    that of a real model."""
    config, values = METHODS[method].Config, {}
    for field in fields(config):
        if field.name in args.defaults:
            values[field.name] = args.defaults[field.name]
        for name in (field.name, f"{method}.{field.name}"):
            if getattr(args, name, None) is not None:
                values[field.name] = getattr(args, name)
    cfg = config(**values)
    if args.init and "micro_batches" not in values:  # of 8 rows at most
        share = max(1, cfg.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
        cfg.micro_batches = next(
            n for n in range(1, share + 1) if share % n == 0 and share // n <= 8
        )
    return cfg


def check_flags(args):
    """Refuse what would be accepted and have no effect."""

    def refuse(name, reason):
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} has no effect with {reason}", "leave one of them out")

    of_own = {"data", "eval", "prior", "grade", "template", "shard"}
    if args.init:
        world = {"quick", "demos", "eval_size", "base_steps", "base", "distance"}
        for name in sorted(args.given & {*world, *MODEL_FLAGS}):
            refuse(name, "--init")
        if not args.data and args.sample is None:
            raise UserError("--init needs --data", "a file of JSON lines; or --sample")
    elif wrong := sorted(args.given & {*of_own, "check_data"}):
        flag = "--" + wrong[0].replace("_", "-")
        raise UserError(f"{flag} needs --init", "--init FOLDER, a real model")
    # of --sample: it can be added to the flags of a run, which must not contradict it
    read = args.given - {"show", "compare", "resume", "plot", "base"}
    used = {"show": {"out", "plot"}, "compare": set(), "sample": read}
    for one in sorted(used.keys() & args.given):
        for name in sorted(args.given - used[one] - {one, "debug"}):
            refuse(name, f"--{one}")
    methods = methods_of(args)
    for name in sorted(args.given):
        method = name.partition(".")[0] if "." in name else "sdft"
        if ("." in name or name in only_sdft()) and method not in methods:
            refuse(name, f"--method {args.method}")
    for name in sorted(args.given):
        own = [f"{m}.{name}" for m in methods if hasattr(METHODS[m].Config, name)]
        if own and args.given.issuperset(own):
            refuse(name, " and ".join(f"--{each}" for each in own).replace("_", "-"))
    for method in methods:
        cfg = config_of(method, args)
        if cfg.eval_every >= cfg.steps:
            refuse("eval_every", f"{method}'s {cfg.steps} steps")
    if "base" in args.given and "base_steps" in args.given:
        refuse("base_steps", "--base")
    if "sdft" in methods:
        cfg = config_of("sdft", args)
        if cfg.teacher != "ema" and args.given & {"ema_rate", "sdft.ema_rate"}:
            refuse("ema_rate", f"--teacher {cfg.teacher}")
        if cfg.skip_first_tokens >= cfg.max_new_tokens:
            raise UserError(
                f"--skip-first-tokens {cfg.skip_first_tokens} leaves nothing of a "
                f"response of at most {cfg.max_new_tokens} tokens in the loss",
                "skip fewer, or raise --max-new-tokens",
            )


# ---- Before a run: can it be done, and what will it replace? -----------------------


def check_run(args, configs, config, base_cfg, stages, tasks, tok, world_size):
    """What would fail later: packages, files, batches, lengths."""
    if args.plot and not importlib.util.find_spec("matplotlib"):
        say("--plot: there is no matplotlib. The run goes on; pip install matplotlib, "
            "and afterwards --show --plot draws it")
    if args.base:
        read_base(Path(args.base), config, args.seed)
    for method, cfg in configs.items():
        hint = f"a --batch-size that is a multiple of {world_size * cfg.micro_batches}"
        n_examples = min(len(stage) for stage in stages.values())
        check_batches(method, cfg, world_size, n_examples, hint)
    if args.init:  # read_own has checked the lengths, line by line
        return
    hint = f"a number of processes that divides its {base_cfg.batch_size}: 2, 4, 8"
    n_examples = base_cfg.batch_size * base_cfg.steps
    check_batches("base model", base_cfg, world_size, n_examples, hint)
    examples = [e for stage in stages.values() for e in stage]
    examples += [
        e for group in tasks.values() for task in group.values() for e in task.examples
    ]
    longest = {
        name: max(len(tokens_of(e, tok)) for e in examples)
        for name, tokens_of in (
            ("demo", data.demo_response), ("prompt", data.teacher_prompt)
        )
    }  # fmt: skip
    for method, cfg in configs.items():
        response = max(cfg.max_new_tokens, longest["demo"])
        if longest["prompt"] + response > config.block_size:
            raise UserError(
                f"{method}: {longest['prompt']} tokens of prompt and demonstration and "
                f"{response} of a response are more than {config.block_size} together",
                "a smaller --max-new-tokens",
            )


def check_batches(name, cfg, world_size, n_examples, hint):
    parts = world_size * cfg.micro_batches
    if cfg.batch_size % parts:
        raise UserError(
            f"{name}: a batch of {cfg.batch_size} cannot be cut into equal parts for "
            f"{world_size} processes x {cfg.micro_batches} micro-batches", hint
        )  # fmt: skip
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
                f"give its own flags, or --base {shlex.quote(str(own))}",
            )
        say(f"plan: {method}: {folder} goes on after update {content['step']}")
        return True
    if not saved.exists():
        new = "nothing to resume, a new run" if args.resume else "a new run"
        found = files_in(folder)
        kept = f"; {', '.join(found)} kept, in {free_name(folder)}" if found else ""
        say(f"plan: {method}: {new} in {folder}{kept}")
        return False
    if not (folder / "results.json").exists():
        raise UserError(
            f"{folder} holds a run that was not finished",
            "go on with --resume, choose another --out, or delete the folder",
        )
    say(f"plan: {method}: a new run in {folder}; the finished one there is kept, as "
        f"{free_name(folder)}")
    return False


def files_in(folder):
    """The names there that a run would write to, whoever wrote them."""
    names = ("checkpoint.pt", "checkpoint.pt.previous", "metrics.jsonl", "results.json",
             "model")  # fmt: skip
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
    "fit": "shorten these rows, or give a smaller --max-new-tokens",
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
    evals, prior = args.eval or args.data, args.prior or []
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
    if (len(stages), len(old)) != (len(args.data), len(prior)):
        raise UserError("two files of one name", "a skill has the name of its file")
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
                f"{', '.join(both[:20])} are in --data, too")
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
    for remark in remarks:
        say(f"{path}: {remark}")
    return examples


def show_contexts(name, example, tok):
    """Both contexts of an example, literally: what the models will read."""
    for title, tokens_of in (
        ("student reads", data.student_prompt),
        ("teacher reads", data.teacher_prompt),
        ("demonstration", data.demo_response),
    ):
        ids = tokens_of(example, tok)
        say(f"--- {name}, line {example.id}: {title}, {len(ids)} tokens\n"
            f"{tok.decode([*ids, tok.end])}")
    say("---")


def free_memory(device):
    """GB that are free on the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 / 1e9 if found and device.type == "cpu" else None


# ---- Device and processes ----------------------------------------------------------


def choose_device(name):
    """A torch.device and the reason for it."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local), "CUDA is available"
        return torch.device("cpu"), "no CUDA here"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device", "try cpu or cuda") from None
    n_cuda, hint = torch.cuda.device_count(), "try --device cpu, or leave it out"
    if device.type == "cuda" and not (device.index or 0) < n_cuda:
        raise UserError(f"--device {name}: {n_cuda} CUDA devices found", hint)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here", hint)
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: not supported", hint)
    return device, "asked for"


def choose_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def start_processes(args):
    """Join the process group if torchrun started us; how many processes are there?"""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 1
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        message = f"started as one of several processes, but {missing} not set"
        raise UserError(message, "torchrun --standalone --nproc_per_node=2 train.py")
    cuda = torch.cuda.is_available() and args.device in ("auto", "cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    return dist.get_world_size()


def is_first():
    """Is this the process that writes and prints? (torchrun may start several.)"""
    several = all(name in os.environ for name in TORCHRUN)
    return not several or os.environ["RANK"] == "0"


def first_does(action, *args):
    """Let the first process do something, whose result or error all of them get: so an
    error is printed once, and nobody waits for a process that is gone."""
    result, error = None, None
    if is_first():
        try:
            result = action(*args)
        except (OSError, ValueError) as caught:
            error = caught
    both = [result, error]
    if dist.is_initialized():
        dist.broadcast_object_list(both)
    if both[1] is not None:
        raise both[1]
    return both[0]


def say(text):
    if is_first():
        tqdm.write(text)
        sys.stdout.flush()


def check_device(student):
    """Does this device compute what a CPU computes? It takes a second, and there have
    been silently wrong kernels (MPS: attention with a mask). Compares log-probabilities
    of whole sequences and greedy tokens from a cache, neither dropout nor sampling.
    Warns; returns the largest difference of log-probabilities."""
    device = next(student.parameters()).device
    twin = copy.deepcopy(student).cpu()
    rng = data.make_rng(0, "check device")
    prompts = torch.randint(student.config.vocab_size, (4, 12), generator=rng)  # (B, P)
    lengths = torch.tensor([12, 7, 3, 1])  # (B,)
    logits, tokens = [], []
    for gpt in (twin, student):
        at = next(gpt.parameters()).device
        with torch.no_grad():
            logits.append(torch.log_softmax(gpt(prompts.to(at)), -1).cpu())
        inputs = gpt, prompts.to(at), lengths.to(at), 8, 0
        tokens.append(model.generate(*inputs, temperature=0)[0].cpu())
    difference = (logits[0] - logits[1]).abs().max().item()
    close = difference < (0.3 if student.dtype == torch.bfloat16 else 1e-2)
    same = tokens[0].shape == tokens[1].shape and torch.equal(*tokens)
    if not close or not (same or student.dtype == torch.bfloat16):
        say(f"warning: {device} differs from a CPU by {difference:.2g} in the "
            f"log-probabilities, greedy tokens {'equal' if same else 'differ'}: do not "
            "trust its results; --device cpu is safe")
    return difference


# ---- Shards ------------------------------------------------------------------------


def check_shard(args, device, world_size):
    """Raise UserError where --shard cannot be."""
    if not args.shard:
        return
    if world_size == 1:
        raise UserError(
            "--shard needs several processes, and this is one",
            "torchrun --standalone --nproc_per_node=2 train.py ... --shard",
        )
    if {"cpu": "gloo", "cuda": "nccl"}.get(device.type) != dist.get_backend():
        raise UserError(
            f"--shard: not on {device} over {dist.get_backend()}",
            "--device cuda, a GPU for each process, or --device cpu",
        )


def one_block(gpt, device):
    """For check_device: what is sharded fits on no device whole."""
    small = GPT(replace(gpt.config, n_layer=1)).to(device)
    small.dtype = gpt.dtype
    return small


def whole_state(state):
    """A state_dict, or any dict of plain values, with its shards gathered: on the CPU
    of the first process, None elsewhere. All processes call it."""
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    if model.is_shard(state):
        tensor = model.whole(state)
        return tensor.cpu() if is_first() else None
    return state


@torch.no_grad()
def whole_gpt(gpt):
    """A GPT in shards as a whole one, on the CPU of the first process."""
    if not model.is_shard(next(gpt.parameters())):
        return gpt
    weights = whole_state(gpt.state_dict())
    with torch.device("meta"):  # its tensors are replaced, and take no memory
        twin = GPT(gpt.config)
    if is_first():
        twin.load_state_dict(weights, assign=True)
    return twin


def cut_as(state, like):
    """The tensors of a whole state, cut where those of `like` are in shards."""
    return {
        key: model.cut(x, like[key]) if model.is_shard(like.get(key)) else x
        for key, x in state.items()
    }


def cut_optimizer(state, optimizer):
    """cut_as, for a state_dict of AdamW: its averages are cut as its parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        i: cut_as(entry, {"exp_avg": params[i], "exp_avg_sq": params[i]})
        for i, entry in state["state"].items()
    }
    return {**state, "state": entries}


# ---- Files -------------------------------------------------------------------------


def sync_folder(folder):
    """Put new names in a folder on the disk, where the system can do that: Windows
    opens no folders, and some network disks and shares do not sync them."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def keep_previous(path):
    """A second name, <name>.previous, for a file that is about to be replaced. At every
    moment there is one, from the end of the first call on."""
    previous = path.with_name(path.name + ".previous")
    spare = path.with_name(f"{path.name}.tmp.{os.getpid()}0")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except (OSError, AttributeError):  # exFAT, Android, Google Drive have no links
        shutil.copyfile(path, spare)
    os.replace(spare, previous)
    spare.unlink(missing_ok=True)  # to rename one of two names of a file does nothing


def write_atomically(path, content, keep=False):
    """Write beside the target, sync, rename: there is the old file or the new one.
    keep: the old one stays as <name>.previous. Raises OSError, with the path and the
    bytes that it takes, when the disk is full; the old file is as it was."""
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            keep_previous(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        for left in (temporary, path.with_name(f"{temporary.name}0")):
            left.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} not written: {error.strerror}; it takes {len(content)} bytes, the "
            f"disk has {free}"
        ) from None


def remove_temporary(folder):
    """Remove what write_atomically left in this folder when it was killed: its own
    names and nothing else. The caller holds the lock, so nobody is writing."""
    ours = r"(checkpoint\.pt|base\.pt|metrics\.jsonl|results\.json)\.tmp\.\d+"
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(ours, path.name) and path.is_file():
            path.unlink()


def append_line(path, line):
    """Add a line to a file. Raises OSError, with the path, when the disk is full."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(f"{path} not written: {error.strerror}") from None


def write_checkpoint(path, content):
    """A dict of tensors and plain values -> SHA-256 and torch.save's bytes, in one
    file. The checkpoint before it is kept as <name>.previous."""
    buffer, n = io.BytesIO(), len(f"sdft {'0' * 64}\n")
    buffer.write(b" " * n)  # the head's place: a model may be too large for a copy
    torch.save(content, buffer)
    view = buffer.getbuffer()
    view[:n] = f"sdft {hashlib.sha256(view[n:]).hexdigest()}\n".encode()
    write_atomically(path, view, keep=True)


def read_checkpoint(path):
    """The dict of write_checkpoint, its tensors on the CPU. Raises ValueError if the
    file is not one, is cut, or differs from what was written; nothing in it is ever
    executed."""
    previous = path.with_name(path.name + ".previous")
    head, _, content = path.read_bytes().partition(b"\n")  # torch.load checks no sum
    if head != f"sdft {hashlib.sha256(content).hexdigest()}".encode():
        raise UserError(
            f"{path}: {path.stat().st_size} bytes, checksum differs, not loaded",
            f"the one before it is {previous}: rename it to go on from there"
            if previous.exists() else "delete it and run again",
        )  # fmt: skip
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own kinds: whatever it met, not ours
        raise UserError(
            f"{path} is not one of our checkpoints; not loaded "
            f"({type(error).__name__})", "it was not written by train.py"
        ) from None


def read_run(path):
    """The checkpoint of a method's run: what Run.save wrote."""
    content = read_checkpoint(path)
    needed = {"step", "settings", "machine", "config", "models", "note", "seconds"}
    if missing := sorted(needed - content.keys()):
        raise UserError(
            f"{path} is no run of this train.py: it has no {', '.join(missing)}",
            "it may be of another version, or a base model; choose another --out",
        )
    return content


def lock(folder):
    """Refuse a folder that another run is using. The operating system lets go of the
    lock when its process ends, however it ends: keep the returned file open."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    file = open(path, "a+", encoding="utf-8", errors="replace")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:  # locks bytes, and nobody reads this one
            file.seek(10**6)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            say(f"{folder}: no locks on this system; do not start two runs in it")
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            say(f"{path}: this disk has no locks ({error.strerror}); do not start two "
                "runs in it")
        else:
            file.seek(0)
            message = f"{folder} is in use by another run, process {file.read()}"
            raise UserError(message, "wait for it, or choose another --out") from None
    file.seek(0)
    if not re.fullmatch(r"\d*", file.read(100)):  # a lock of ours holds a process id
        raise UserError(f"{path} is a file of yours", "choose another --out")
    file.truncate(0)
    file.seek(0)
    print(os.getpid(), end="", file=file, flush=True)
    LOCKS.append(file)
    return file


def source_of(module):
    """The code of a module as text, without comments and docstrings: the same text in
    each version of Python (ast.dump's differ)."""

    def as_list(x):
        if isinstance(x, ast.AST):
            filled = [(n, y) for n, y in ast.iter_fields(x) if y not in ([], None)]
            return [type(x).__name__, *((n, as_list(y)) for n, y in filled)]
        return [as_list(y) for y in x] if isinstance(x, list) else x

    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            body[0] = ast.Pass()
    return repr(as_list(tree))


def base_key(config, cfg, world, tok, dtype):
    """What decides the base model, as a name for its folder: configurations, a sample
    of its corpus, and the code that trains it. New words in a docstring, or another
    column of a table, keep it."""
    sample = data.make_base_corpus(world, tok, 2000, cfg.seed)
    batch = data.get_batch(sample, len(sample), cfg.seed, 0)  # in their order, too
    prompts = [data.student_prompt(example, tok) for example in batch]
    learnt = [each.tolist() for each in sft.get_responses(batch, tok, "cpu")]
    code = [source_of(module) for module in (model, sft)]
    made_of = asdict(config), asdict(cfg), prompts, learnt, str(dtype), code
    return digest(repr(made_of))


def read_base(path, config, seed):
    """The content of a base.pt. Raises UserError if it is not one, or does not fit."""
    if not path.is_file():
        raise UserError(f"{path}: no such file", "a base.pt from <out>/base/...")
    content = read_checkpoint(path)
    if "base" not in content:
        raise UserError(f"{path} is no base model", "choose a base.pt")
    now = {**asdict(config), "seed": seed}
    if other := differences(content["base"], now):
        raise UserError(
            f"{path} does not fit (its own -> asked for): {other}",
            "give the flags that it was made with, or leave --base out",
        )
    return content


# ---- Tables, samples and pictures --------------------------------------------------


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
    the earlier ones, and a warning if the teacher has lost what it knew."""
    if "new" in record:
        lines = [table([*stage_ends(earlier), record])]
        for row in record["responses"]:
            lines.append(f"  {short(row['prompt'])}  ->  {short(row['response'])}")
        for name, kl in record.get("kl_student_base_prior", {}).items():
            lines.append(f"  KL(student || base) on {name}: {kl:.3f} nats per token")
        now = record["teacher_gate"]
        if now is not None:
            lines.append(f"  the teacher, shown the demonstration: {now:.2f}")
            seen = [row["teacher_gate"] for row in earlier]
            then = max([x for x in seen if x is not None], default=now)
            then = max(then, gate["teacher"] if gate else 0)
            if now < then - GATE_LOSS:
                lines.append(
                    f"warning: the teacher has fallen from {then:.2f}: it follows its "
                    "student astray; try a lower --ema-rate, or --teacher frozen"
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


def show(args):
    """The tables of the finished runs in --out, or the last lines of several as one."""
    folders = args.compare or [args.out]
    found = [
        (Path(out) / method, method)
        for out in folders
        for method in METHODS
        if (Path(out) / method / "results.json").exists()
    ]
    full = {folder.parent for folder, _ in found}
    if missing := [out for out in folders if Path(out) not in full]:
        raise UserError(f"no finished run in {', '.join(missing)}", "another folder?")
    last, labels = [], []
    for folder, method in found:
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            seconds = results["seconds"]["fine_tune"]
            name = f"{folder}, seed {results['seed']}"
            rows = stage_ends([row for row in read_metrics(folder) if "new" in row])
            rows[-1]["kl_student_base"]
        except (KeyError, IndexError, TypeError, json.JSONDecodeError):
            raise UserError(
                f"results.json and metrics.jsonl in {folder} are not what a run writes",
                "leave the folder out, or run again",
            ) from None
        if args.compare:
            last, labels = [*last, rows[-1]], [*labels, name]
        else:
            say(f"\n{method}, {seconds:.0f} s: {name}\n{table(rows)}")
    if args.compare:
        say(table(last, labels))
    if args.plot:
        if not importlib.util.find_spec("matplotlib"):
            raise UserError("--plot needs matplotlib", "pip install matplotlib")
        plot(args.out, [method for _, method in found])


def show_sample(args, device, dtype):
    """What the base and the fine-tuned model respond to one prompt: greedily, and two
    samples. A saved run knows its own seed, sizes and base; flags must not contradict
    it. --init alone shows the base."""
    methods, paths = methods_of(args), {}
    for method in methods:
        paths[method] = Path(args.out) / method / "checkpoint.pt"
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
        asked = {**vars(args), **asdict(config_of(method, args))}
        asked = {
            n: asked[n]
            for n in saved["settings"]
            if n == "seed" or args.given & {n, f"{method}.{n}"} - {"template"}
        }
        unused = {"base_steps", "demos", "eval_size", "gate_margin", "distance"}
        unused |= {"data", "eval", "prior", "grade", "template"}
        if unused := sorted(unused & args.given):
            say(f"without effect on --sample: {', '.join(unused)}")
        has = {name: saved["settings"][name] for name in asked}
        if other := differences(has, asked):
            flags = [f"--{k.replace('_', '-')} {v}" for k, v in has.items()]
            raise UserError(
                f"{path} holds another run (saved -> asked for): {other}",
                f"{' '.join(flags)} shows it",
            )
        base = Path(args.out) / (args.init or saved["note"]["base"])
        if saved["note"]["init"]:
            written = path.parent / "model"  # has the base's shape and tokenizer, too
            tok, gpt = load_own(base if base.exists() else written, device, dtype)
        else:
            tok, gpt = data.Tokenizer(), GPT(GPTConfig(**saved["config"])).to(device)
            gpt.dtype = dtype
        skills = saved["note"].get("skills", data.SKILLS)
        steps = saved["settings"]["steps"] * len(skills)
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


def plot(out, methods):
    """<out>/plot.png: each accuracy over the updates, one panel per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (5 * len(methods), 3.5)
    figure, axes = plt.subplots(1, len(methods), figsize=size, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        rows = [row for row in read_metrics(Path(out) / method) if "new" in row]
        x = [row["step"] for row in rows]
        for name in rows[0]["new"]:
            y = [row["new"][name] for row in rows]
            axis.plot(x, y, marker="o", label=f"skill {name}")
        for name in rows[0]["prior"]:
            y = [row["prior"][name] for row in rows]
            axis.plot(x, y, "--", label=name, alpha=0.7)
        axis.set(title=method.upper(), xlabel="updates", ylim=(-0.03, 1.03))
    axes[0][0].set_ylabel("accuracy, held-out queries")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    path, ours = Path(out) / "plot.png", {"Title": "SDFT, train.py"}
    if path.is_dir() or path.exists() and b"train.py" not in path.read_bytes()[:1000]:
        os.replace(path, free_name(path))
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata=ours)
    say(f"picture: {path}")


# ---- The program -------------------------------------------------------------------


def command_line(argv):
    """How this program was started, as one would type it."""
    start = "python train.py"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        n = os.environ.get("LOCAL_WORLD_SIZE", "2")
        start = f"torchrun --standalone --nproc_per_node={n} train.py"
    return f"{start} {shlex.join(argv)}"


def main(argv):
    """Run, and turn what the user can mend into an error, a hint and an exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, or a program without a terminal
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):  # a terminal may lack a character
            stream.reconfigure(errors="replace")
    stop = Stop()

    def tell(text):
        if is_first():
            print(text, file=sys.stderr, flush=True)
        else:  # torchrun ends all when one ends: the first must have spoken before
            time.sleep(2)

    try:
        whole_run(parse_args(argv), stop)
    except BrokenPipeError:  # python train.py | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        tell("error: nobody reads what this prints any more\n"
             "hint: --resume goes on from the last checkpoint")
        return 2
    except (UserError, OSError, ValueError) as error:
        if "--debug" in argv:
            raise
        hint = getattr(error, "hint", "--debug shows where this happened")
        tell(f"error: {error}\nhint: {hint}")
        return 2
    except FloatingPointError as error:
        tell(f"error: {error}\nhint: try a lower --lr")
        return 3
    except KeyboardInterrupt:
        signum = stop.agreed()
        again = [arg for arg in argv if arg != "--resume"] + ["--resume"]
        tell(f"stopped; to go on: {command_line(again)}")
        return 128 + signum
    finally:
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
