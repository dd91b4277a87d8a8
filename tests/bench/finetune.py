"""Cells of the experiments that fine-tune a base model of train.py: see cell.py.

    base      makes a seed's base model, with the project's own code, and measures it
    run       fine-tunes it, by sft.py, sdft.py or a variant of them, and measures
    train_py  one whole run of train.py
"""

import argparse
import copy
import json
import os
import time
from dataclasses import asdict, replace

import probes
import torch
from variants import Modules, changes_of

import train

# of every cell with --quick: it shows that all runs, and no effect
QUICK = {"steps": 2, "batch_size": 8, "log_every": 1, "max_new_tokens": 4}
QUICK_BASE = ["--quick", "--base-steps", "2"]
WATCHED = {"new": 100, "prior": 40}  # queries of an evaluation on the way


def make_tasks(m, world, seed, skills, distance, quick, size=200):
    """What to evaluate: the skills that are trained, and the prior benchmarks."""
    tasks = m.data.make_tasks(world, 8 if quick else size, seed, distance)
    tasks["new"] = {skill: tasks["new"][skill] for skill in skills}
    return tasks


def first_of(tasks, sizes):
    """The same benchmarks with fewer examples."""
    return {
        group: {
            name: replace(benchmark, examples=benchmark.examples[: sizes[group]])
            for name, benchmark in benchmarks.items()
        }
        for group, benchmarks in tasks.items()
    }


def describe(model):
    """The machine of a result, without which its seconds say nothing."""
    machine = train.machine_of(model)
    return {key: machine[key] for key in ("device", "dtype", "torch", "capability")}


def digest(gpt):
    """Which base a result started from: the same seed has another one on a processor
    that rounds otherwise, and PyTorch's name for what it can do does not tell."""
    return train.digest_of(gpt)[:8]


def base(seed, folder, quick, flags="", variants=""):
    """The base model of a seed, found or made in <work>/seed<N>/base, and measured.
    flags: of train.py, for another size or another length; variants: of its corpus."""
    m, work = Modules(changes_of(variants) if variants else []), folder.parents[1]
    argv = [*flags.split(), "--seed", str(seed), "--out", str(work), "--threads", "1"]
    args = m.train.parse_args(argv + QUICK_BASE * quick)
    world, tok = m.data.World(seed), m.data.Tokenizer()
    config, cfg = m.train.base_settings(args, 1)
    model = m.model.GPT(config, m.data.make_rng(seed, "weights"))
    model.to(train.choose_device("auto"))
    path = m.train.find_base(args, config, cfg, world, tok, model.dtype)
    stop = argparse.Namespace(signal=0)
    seconds = m.train.get_base(path, config, cfg, model, world, tok, stop)
    model.eval()
    tasks = make_tasks(m, world, seed, "ABC", "terms", quick)
    n = QUICK["max_new_tokens"] if quick else 16
    result = probes.measure(model, model, model, tasks, tok, n, seed, quick)
    result["seconds"] = {"train": seconds}
    result["machine"] = describe(model)
    result["parameters"] = model.num_params()
    result["base"] = os.path.relpath(path, folder)
    result["base digest"] = digest(model)
    return result


def load_base(folder, gpt, gpt_config):
    """The base model of a base cell, as a GPT of a variant's model.py."""
    path = folder / json.loads((folder / "result.json").read_text())["base"]
    content = train.read_checkpoint(path)
    config = {k: v for k, v in content["base"].items() if k not in ("seed", "key")}
    model = gpt(gpt_config(**config))
    model.load_state_dict(content["model"])
    return model.to(train.choose_device("auto")).eval()


def run(
    seed, folder, quick, base, method, variants="", skills="A", distance="terms",
    start=None, **settings,
):  # fmt: skip
    """Fine-tune the base on the skills, one after the other, and measure the end.

    Args:
        base: folder of a base cell. start: that of a run whose student is gone on from.
        method: "sft" or "sdft". variants: names of tests/exercises/variants.py.
        skills: some of "ABC". distance: of the demonstrations, see data.py.
        settings: of the method's Config; others are its defaults.
    Returns: probes.measure at the end, the records and evaluations on the way, seconds
        and work.
    """
    m = Modules(changes_of(variants) if variants else [])
    trainer, tok, world = getattr(m, method), m.data.Tokenizer(), m.data.World(seed)
    if quick:
        settings |= {**QUICK, "eval_every": QUICK["steps"]}
    cfg = trainer.Config(seed=seed, **settings)
    stages = {s: m.data.make_demos(world, s, 2048, seed, distance) for s in skills}
    tasks = make_tasks(m, world, seed, skills, distance, quick)
    model = load_base(base, m.model.GPT, m.model.GPTConfig)
    student, extra = copy.deepcopy(model), []
    if start is not None:
        extra = [torch.load(start / "student.pt", weights_only=True)]
    way = m.train.Run(folder / "run", resume=True)
    watched = first_of(tasks, WATCHED) if cfg.eval_every else {}
    trainer.train(student, stages, watched, tok, cfg, way, *extra)

    saved = train.read_run(way.checkpoint)["models"]
    teacher = None
    if "teacher" in saved:
        teacher = copy.deepcopy(model)
        teacher.load_state_dict(saved["teacher"])
    begin = time.perf_counter()
    n = cfg.max_new_tokens
    student.eval()
    result = probes.measure(student, model, teacher, tasks, tok, n, seed, quick)
    few = stages[skills[0]]
    timed = 0 if quick else 4
    work = probes.work_of_update(trainer, student, few, tok, cfg, *extra, timed=timed)
    updates, written = cfg.steps * len(stages), method == "sdft"
    rows = train.read_metrics(way.folder)
    result["work"] = {key: value * updates for key, value in work.items()}
    result["work"]["written"] = result["work"].pop("loss") if written else 0
    result["seconds"] = {
        "train": sum(row["seconds"] for row in rows),
        "measure": time.perf_counter() - begin,
    }
    result["machine"], result["config"] = describe(student), asdict(cfg)
    result["base digest"] = digest(model)
    keep = ("step", "skill", "new", "prior", "kl_student_base", "kl_teacher_base",
            "teacher_gate", "kl_teacher_student_by_position", "seconds")  # fmt: skip
    result["evaluations"] = [
        {key: row[key] for key in keep if key in row} for row in rows if "new" in row
    ]
    result["records"] = [row for row in rows if "new" not in row]
    torch.save(student.state_dict(), folder / "student.pt")
    way.checkpoint.unlink()  # 40 MB, of no more use
    return result


def train_py(seed, folder, quick, base, flags):
    """A run of train.py in FOLDER/out, with the seed's base model. Its results are
    train.py's own, and the evaluations on the way."""
    (folder / "out").mkdir(exist_ok=True)
    shared = folder / "out" / "base"
    shared.unlink(missing_ok=True)  # the whole of --work may have been moved
    shared.symlink_to((folder.parents[1] / "base").resolve())
    argv = [*flags.split(), "--seed", str(seed), "--threads", "1"]
    argv += ["--out", str(folder / "out")]
    if quick:
        few = [f"--{key.replace('_', '-')}={value}" for key, value in QUICK.items()]
        argv += [*QUICK_BASE, *few]
    out = folder / "out" / train.parse_args(argv).method
    if (out / "checkpoint.pt").exists():
        argv.append("--resume")
    if code := train.main(argv):
        raise RuntimeError(f"train.py ended with {code}")
    results = json.loads((out / "results.json").read_text())
    results["evaluations"] = [
        {key: row[key] for key in ("step", "new", "prior")}
        for row in train.read_metrics(out) if "new" in row
    ]  # fmt: skip
    return {"flags": flags, **results}
