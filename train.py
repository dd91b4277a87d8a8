"""The command line: base model, teacher gate, fine-tuning, evaluation, results.

    python train.py                         # = --method sdft, everything by default
    python train.py --method both           # SFT and SDFT from one base, side by side
    python train.py --quick                 # half a minute: does it run here?
    python train.py --method sft --lr 3e-4  # every number of the trainers is a flag
    python train.py --resume                # go on after Ctrl-C or a crash
    python train.py --sample "garden cork: candle spoon tower"
    torchrun --standalone --nproc_per_node=2 train.py    # data parallel, CPU or GPU

It writes <out>/<method>/metrics.jsonl and results.json; the base model stays in
<out>/base for the next run. Exit codes: 0 done, 2 bad input, 3 a loss or gradient that
is not finite, 130 or 143 stopped by Ctrl-C or SIGTERM with everything saved.
"""

import argparse
import ast
import difflib
import fcntl
import hashlib
import importlib.util
import inspect
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

# Threads that wait for each other soon sleep, so a busy machine costs little; the
# default is to spin for long. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist

import data
import model
import sdft
import sft
from model import GPT, GPTConfig

METHODS = {"sft": sft, "sdft": sdft}

# The base model: larger steps than in fine-tuning, each example seen once.
BASE = sft.Config(
    steps=1700, batch_size=64, micro_batches=2, lr=2e-3, warmup_steps=100, beta2=0.95,
    weight_decay=0.1, dropout=0.2, log_every=200, save_every=250,
)  # fmt: skip
MODEL_FLAGS = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner")

# What a flag may be: lowest, highest, both allowed.
RANGES = {
    "steps": (1, 10**7), "batch_size": (1, 10**6), "micro_batches": (1, 10**6),
    "lr": (0, 1e3), "warmup_steps": (0, 10**7),
    "beta2": (0, 0.999999), "weight_decay": (0, 1e3), "grad_clip": (1e-9, 1e9),
    "dropout": (0, 0.9),
    "max_new_tokens": (1, 10**5), "log_every": (1, 10**7), "eval_every": (0, 10**7),
    "save_every": (1, 10**7), "seed": (0, 2**62), "ema_rate": (0, 1),
    "temperature": (1e-3, 1e3), "skip_first_tokens": (0, 10**5),
    "base_steps": (1, 10**7), "demos": (8, 10**7), "eval_size": (8, 10**7),
    "gate_margin": (-1, 1), "threads": (0, 1024),
    **{name: (1, 10**6) for name in MODEL_FLAGS},
}  # fmt: skip
CHOICES = {
    "kl": model.KLS,
    "teacher": ("ema", "frozen", "live"),
    "generate_from": ("student", "teacher"),
}


class UserError(ValueError):
    """Something that the user can mend: printed as an error and a hint, exit code 2."""

    def __init__(self, message, hint):
        super().__init__(message)
        self.hint = hint


# ---- Flags -------------------------------------------------------------------------


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


def add_flags(group, config, names, sft=None):
    """A --flag for each named field of a dataclass; the field's comment is its help.
    Where the Config of sft has another default, a flag that is not given is None."""
    source = inspect.getsource(config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    for field in fields(config):
        if field.name not in names:
            continue
        flag = "--" + field.name.replace("_", "-")
        default, shown = field.default, f"default: {field.default}"
        if sft and default != getattr(sft, field.name):
            default, shown = None, f"{shown}, sft: {getattr(sft, field.name)}"
        text = comments[field.name].replace("%", "%%") + f" ({shown})"
        if field.name in CHOICES:
            kind = {"choices": CHOICES[field.name]}
        else:
            kind = {"type": number(field.name, type(field.default)), "metavar": "N"}
        group.add_argument(flag, default=default, help=text, **kind)


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
    add("--plot", action="store_true", help="draw the accuracies (needs matplotlib)")
    add("--sample", metavar="PROMPT", help="no training: what base and --method answer")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of activations; weights are float32; auto: bfloat16 where CUDA has it")
    add("--threads", type=number("threads", int), default=2, metavar="N",
        help="on a CPU; more hardly help so small a model, and a fixed number rounds "
        "alike on any machine (0: all cores; default: 2)")
    add("--debug", action="store_true", help="show the traceback of an error")
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
    add("--distance", choices=data.DISTANCES, default="terms",
        help="of the expert from the model: his manner is its own; known to it; or his "
        "terms are foreign, too (default: terms)")
    add_flags(parser.add_argument_group("model"), GPTConfig, MODEL_FLAGS)
    shared = [field.name for field in fields(sft.Config)]
    group = parser.add_argument_group("training, both methods")
    add_flags(group, sdft.Config, shared, sft.Config)
    only = [field.name for field in fields(sdft.Config) if field.name not in shared]
    add_flags(parser.add_argument_group("self-distillation"), sdft.Config, only)
    return parser


def parse_args(argv):
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.5)
        raise UserError(
            f"unknown argument {unknown[0]!r}",
            f"did you mean {near[0]}?" if near else "python train.py --help lists all",
        )
    if args.quick:  # what was not asked for explicitly is made small
        quick = {"base_steps": 100, "steps": 8, "eval_size": 64, "gate_margin": -1.0}
        for name, value in quick.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    return args


# ---- Device and processes ----------------------------------------------------------


class Stop:
    """The first Ctrl-C or SIGTERM asks to stop after the step, a second at once."""

    def __init__(self):
        self.signal = 0
        for number_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_, self.ask)

    def ask(self, number_, _):
        self.signal = number_
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping after this step; once more stops at once", file=sys.stderr)


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
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        message = f"started as one of several processes, but {missing} not set"
        raise UserError(message, "torchrun --standalone --nproc_per_node=2 train.py")
    cuda = torch.cuda.is_available() and args.device in ("auto", "cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    return dist.get_world_size()


def check_batches(name, cfg, world, n_examples):
    parts = world * cfg.micro_batches
    if cfg.batch_size % parts:
        raise UserError(
            f"{name}: a batch of {cfg.batch_size} cannot be cut into equal parts for "
            f"{world} processes x {cfg.micro_batches} micro-batches",
            f"make the batch size a multiple of {parts}",
        )
    if cfg.batch_size > n_examples:
        raise UserError(
            f"{name}: batch size {cfg.batch_size} > {n_examples} examples",
            "a smaller --batch-size, or more --demos",
        )


# ---- The base model ----------------------------------------------------------------


def base_key(config, cfg):
    """What decides the base model, as a name: configurations, corpus and code."""
    sources = [inspect.getsource(module) for module in (data, model, sft)]
    code = [ast.dump(ast.parse(source)) for source in sources]  # comments do not count
    text = repr((asdict(config), asdict(cfg), torch.__version__, code))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def get_base(args, device, dtype, tok, stop, world):
    """The base model and the seconds that it took to make, now or earlier."""
    config = GPTConfig(
        vocab_size=tok.vocab_size, **{name: getattr(args, name) for name in MODEL_FLAGS}
    )
    cfg = replace(
        BASE, seed=args.seed, steps=args.base_steps,
        warmup_steps=min(BASE.warmup_steps, args.base_steps // 4),
        micro_batches=max(1, BASE.micro_batches // world),  # the same parts, shared out
    )  # fmt: skip
    n_examples = cfg.batch_size * cfg.steps
    check_batches("base model", cfg, world, n_examples)
    student = GPT(config, data.make_rng(args.seed, "weights")).to(device)
    student.dtype = dtype
    folder = Path(args.out) / "base" / base_key(config, replace(cfg, micro_batches=1))
    checkpoint, clock = folder / "checkpoint.pt", folder / "seconds.json"
    folder.mkdir(parents=True, exist_ok=True)
    if clock.exists():
        saved = data.read_checkpoint(checkpoint, device)
        student.load_state_dict(saved["models"]["student"])
        say(f"base model: found in {folder}")
        return student, json.loads(clock.read_text())["seconds"]
    if stop is None:
        raise UserError(f"no base model in {args.out}", "run without --sample first")
    say(f"base model: {student.num_params():,} parameters, {cfg.steps} updates of "
        f"{cfg.batch_size}; kept in {folder} for the next run")
    start = time.perf_counter()
    corpus = data.make_base_corpus(data.World(args.seed), tok, n_examples, args.seed)
    begun = checkpoint.exists()
    sft.train(student, {"base": corpus}, {}, tok, cfg, folder, begun, stop)
    seconds = time.perf_counter() - start
    if data.is_first():
        data.write_atomically(clock, json.dumps({"seconds": seconds}).encode())
    return student, seconds


def teacher_gate(base, tasks, tok, cfg, margin):
    """Does a demonstration help? Accuracies on held-out queries of the three skills,
    without one (the student's context) and with one (the teacher's)."""

    def mean(prompt):
        scores = [
            data.accuracy(base, skill, queries, tok, cfg.max_new_tokens, prompt)
            for skill, queries in tasks["new"].items()
        ]
        return sum(scores) / len(scores)

    gate = {"student": mean(data.student_prompt), "teacher": mean(data.teacher_prompt)}
    say(f"teacher gate: of queries of the new skills the base answers "
        f"{gate['student']:.2f} without a demonstration, {gate['teacher']:.2f} with")
    if gate["teacher"] - gate["student"] < margin:
        raise UserError(
            f"a demonstration does not help enough: {gate['teacher']:.2f} - "
            f"{gate['student']:.2f} < --gate-margin {margin}: nothing to distil",
            "train the base longer (--base-steps), or lower --gate-margin to see why",
        )
    return gate


# ---- One run -----------------------------------------------------------------------


def lock(folder):
    """Refuse a folder that another run is using. The operating system lets go of the
    lock when its process ends, however it ends: keep the returned file open."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        message = f"{folder} is in use by another run, process {file.read()}"
        raise UserError(message, "wait for it, or choose another --out") from None
    file.truncate(0)
    print(os.getpid(), end="", file=file, flush=True)
    for stale in folder.rglob("*.tmp.*"):  # of a process that was killed in a write
        stale.unlink()
    return file


def open_folder(args, method):
    """The folder of one method's files. Loses nothing that is there."""
    folder = Path(args.out) / method
    if data.is_first() and not args.resume and (folder / "checkpoint.pt").exists():
        if not (folder / "results.json").exists():
            raise UserError(
                f"{folder} holds a run that was not finished",
                "go on with --resume, choose another --out, or delete the folder",
            )
        old = folder.with_name(method + ".previous")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        say(f"the finished run in {folder} is now {old}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fine_tune(method, args, base, stages, tasks, tok, stop):
    """Run one method on the three skills; returns its Config and evaluations."""
    trainer, folder = METHODS[method], open_folder(args, method)
    given = {f.name: getattr(args, f.name) for f in fields(trainer.Config)}
    given = {name: value for name, value in given.items() if value is not None}
    cfg = trainer.Config(**given)
    resume = args.resume and (folder / "checkpoint.pt").exists()
    say(f"\n{method}: " + ", ".join(
        f"{key} {value}" + ("" if value == getattr(trainer.Config, key) else " (set)")
        for key, value in asdict(cfg).items()
    ))
    student = GPT(base.config).to(next(base.parameters()).device)
    student.load_state_dict(base.state_dict())
    student.dtype = base.dtype
    return cfg, trainer.train(student, stages, tasks, tok, cfg, folder, resume, stop)


def read_metrics(out, method):
    lines = (Path(out) / method / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_results(out, method, cfg, gate, evaluations, base_seconds):
    """results.json from what is recorded; returns the seconds of fine-tuning, those
    before a resume included."""
    spent = {}
    for record in read_metrics(out, method):
        spent[record["skill"]] = spent.get(record["skill"], 0) + record["seconds"]
    keys = ("skill", "new", "prior", "kl_student_base", "kl_teacher_base")
    results = {
        "method": method,
        "seed": cfg.seed,
        "config": asdict(cfg),
        "seconds": {"base": base_seconds, "fine_tune": sum(spent.values())},
        "teacher_gate": gate,
        "base": {key: evaluations[0][key] for key in ("new", "prior")},
        "stages": [
            {key: row[key] for key in keys} | {"seconds": spent[row["skill"]]}
            for row in evaluations
            if row["stage_end"]
        ],
    }
    if data.is_first():
        path = Path(out) / method / "results.json"
        data.write_atomically(path, json.dumps(results, indent=1).encode())
    return sum(spent.values())


def show_sample(args, device, dtype, tok):
    """What the base and the fine-tuned model answer to one prompt."""
    base, _ = get_base(args, device, dtype, tok, None, 1)
    methods = list(METHODS) if args.method == "both" else [args.method]
    for method in [None, *methods]:
        if method:
            path = Path(args.out) / method / "checkpoint.pt"
            if not path.exists():
                raise UserError(
                    f"no run of {method} in {args.out}",
                    f"python train.py --method {method} --out {args.out} makes one",
                )
            saved = data.read_checkpoint(path, device)
            base.load_state_dict(saved["models"]["student"])
        ids = [tok.encode(args.sample) + [tok.answer]]
        text = data.answer(base, ids, tok, args.max_new_tokens)[0]
        say(f"{method or 'base':5s} {text}")


def plot(out, methods):
    """<out>/plot.png: each accuracy over the updates, one panel per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (5 * len(methods), 3.5)
    figure, axes = plt.subplots(1, len(methods), figsize=size, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        rows = [row for row in read_metrics(out, method) if "new" in row]
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
    figure.savefig(Path(out) / "plot.png", dpi=120, bbox_inches="tight")
    say(f"picture: {Path(out) / 'plot.png'}")


def say(text):
    if data.is_first():
        print(text, flush=True)


def run(args):
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError(
            "--plot needs matplotlib",
            f"pip install matplotlib, or read {args.out}/<method>/metrics.jsonl",
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    world_size = start_processes(args)
    device, reason = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    say(f"device {device} ({reason}), activations {str(dtype)[6:]}, seed {args.seed}, "
        f"processes {world_size}, threads {torch.get_num_threads()}, "
        f"torch {torch.__version__}")
    tok = data.Tokenizer()
    if args.sample is not None:
        return show_sample(args, device, dtype, tok)
    if args.quick:
        say("--quick: far too short for the base to read a demonstration; the gate is "
            "not enforced, and no effect will show")
    methods = ["sft", "sdft"] if args.method == "both" else [args.method]
    check_batches("fine-tuning", args, world_size, args.demos)
    stop, _lock = Stop(), lock(Path(args.out)) if data.is_first() else None
    base, base_seconds = get_base(args, device, dtype, tok, stop, world_size)

    world = data.World(args.seed)
    tasks = data.make_tasks(world, args.eval_size, args.seed, args.distance)
    stages = {
        skill: data.make_demos(world, skill, args.demos, args.seed, args.distance)
        for skill in data.SKILLS
    }
    gate = teacher_gate(base, tasks, tok, args, args.gate_margin)
    final = {}
    for method in methods:
        cfg, evaluations = fine_tune(method, args, base, stages, tasks, tok, stop)
        seconds = write_results(
            args.out, method, cfg, gate, evaluations, base_seconds
        )
        rows = [row for row in evaluations if row["stage_end"] or not row["step"]]
        final[method] = rows[-1]
        say(f"\n{method}, {seconds:.0f} s:\n{data.table(rows)}")
    if len(methods) == 2:
        say(f"\nafter all skills, SFT above SDFT:\n{data.table([*final.values()])}")
    if args.plot and data.is_first():
        plot(args.out, methods)
    for method in methods:
        say(f"files: {Path(args.out) / method}/results.json and metrics.jsonl")


def main(argv):
    """Run, and turn what the user can mend into an error, a hint and an exit code."""
    try:
        args = parse_args(argv)
        run(args)
    except (UserError, OSError, ValueError) as error:
        if "--debug" in argv:
            raise
        hint = getattr(error, "hint", "--debug shows where this happened")
        print(f"error: {error}\nhint: {hint}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}\nhint: try a lower --lr", file=sys.stderr)
        return 3
    except KeyboardInterrupt as error:
        number_ = int(re.search(r"\d+", f"{error} 2")[0])
        command = shlex.join([arg for arg in argv if arg != "--resume"])
        print(f"stopped; to go on: python train.py {command} --resume", file=sys.stderr)
        return 128 + number_
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
