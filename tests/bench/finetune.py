"""Cells of the experiments that fine-tune a base model of train.py: see cell.py.

    base      makes a seed's base model, with the project's own code, and measures it
    run       fine-tunes it, by sft.py, sdft.py or a variant of them, and measures
    train_py  one whole run of train.py
"""

import copy
import json
import os
import time
from dataclasses import asdict, replace
from statistics import mean

import probes
import torch
from variants import Modules, changes_of

import data
import train

# of every cell with --quick: it shows that all runs, and no effect
QUICK = {"steps": 2, "batch_size": 8, "log_every": 1, "max_new_tokens": 4}
QUICK_BASE = ["--quick", "--base-steps", "2"]
WATCHED = {"new": 100, "prior": 40}  # queries of an evaluation on the way


def modules(variants):
    return Modules(changes_of(variants) if variants else [])


def make_tasks(m, world, seed, skills, distance, quick):
    """What to evaluate: the skills that are trained, and the prior benchmarks."""
    tasks = m.data.make_tasks(world, 8 if quick else 200, seed, distance)
    tasks["new"] = {skill: tasks["new"][skill] for skill in skills}
    return tasks


def pick(row, *keys):
    return {key: row[key] for key in keys if key in row}


def made_from(base):
    """The machine of a result, without which its seconds say nothing, and a digest of
    the base it started from: the same seed has another one on a processor that rounds
    otherwise, and PyTorch's name for what it can do does not tell."""
    of = pick(train.machine_of(base), "device", "dtype", "torch", "capability")
    return {"machine": of, "base digest": train.digest_of(base)[:8]}


def measure_words(student, base, teacher, tasks, tok, n, seed, quick):
    """Less than probes.measure: greedy accuracies, and "words", means over the new
    skills of the share of responses that are right to the word:

    own       in the model's own style
    asked     in the expert's style, asked for by name, with the model's own term
    terms     when that style is asked for: the expert's term is in it, right or wrong
    begun     as own, of the base, shown the demonstration and given its own opening
    repeats   of the base, shown the demonstration: it is repeated

    Of a base also "pull": where SDFT pulls at first, on one query."""
    def words(model, right, prompt):
        graded = [replace(b, grade=right) for b in tasks["new"].values()]
        return mean(data.accuracy(model, b, tok, n, prompt) for b in graded)

    def is_asked(example, text):
        _, own, *_ = example.answer.replace(":", "").split()
        opening, _, *rest = example.demo.split()
        return text.split() == [opening, own, *rest]

    def ask(example, tok):
        return tok.encode(example.prompt.replace(":", " expert:", 1)) + [tok.start]

    def begin(example, tok):
        return data.teacher_prompt(example, tok) + tok.encode(example.answer)[:1]

    result = probes.each_greedy(student, tasks, tok, n)
    terms = {term for term, _ in data.OPERATIONS.values()}
    own = words(student, lambda e, x: x == e.answer, data.student_prompt)
    asked = words(student, is_asked, ask)
    said = words(student, lambda _, x: not terms.isdisjoint(x.split()), ask)
    result["words"] = {"own": own, "asked": asked, "terms": said}
    if student is base:
        begun = words(base, lambda e, x: x == e.answer.split(" ", 1)[1], begin)
        repeats = words(base, lambda e, x: x == e.demo, data.teacher_prompt)
        result["words"] |= {"begun": begun, "repeats": repeats}
        first = next(iter(tasks["new"].values())).examples[0]
        pull = data.token_pull(base, base, first, tok, n, seed)
        result["pull"] = {"prompt": first.prompt, "demo": first.demo, **pull}
    return result


PROBES = {"all": probes.measure, "words": measure_words}


def base(seed, folder, quick, flags="", variants="", probe="all"):
    """The base model of a seed, found or made in <work>/seed<N>/base, and measured.
    flags: of train.py, for another size or another length; variants: of its corpus."""
    m, work = modules(variants), folder.parents[1]
    argv = [*flags.split(), "--seed", str(seed), "--out", str(work), "--threads", "1"]
    args = m.train.parse_args(argv + QUICK_BASE * quick)
    device = train.choose_device("auto")
    tok, _, _, model, path, (cfg, world) = m.train.make_world(args)
    seconds = m.train.get_base(path, model.to(device), cfg, world, tok, None)
    model.eval()
    tasks = make_tasks(m, world, seed, "ABC", "terms", quick)
    n = QUICK["max_new_tokens"] if quick else 16
    result = PROBES[probe](model, model, model, tasks, tok, n, seed, quick)
    result |= {"seconds": {"train": seconds}, "parameters": model.num_params()}
    return result | {"base": os.path.relpath(path, folder), **made_from(model)}


def load_base(folder, gpt, gpt_config):
    """The base model of a base cell, as a GPT of a variant's model.py."""
    path = folder / json.loads((folder / "result.json").read_text())["base"]
    content = train.read_checkpoint(path)
    model = gpt(gpt_config(**content["config"]))
    model.load_state_dict(content["model"])
    return model.to(train.choose_device("auto")).eval()


def run(
    seed, folder, quick, base, method, variants="", skills="A", distance="terms",
    start=None, probe="all", **settings,
):  # fmt: skip
    """Fine-tune the base on the skills, one after the other, and measure the end.

    Args:
        base: folder of a base cell. start: that of a run whose student is gone on from.
        method: "sft" or "sdft". variants: names of tests/exercises/variants.py.
        skills: some of "ABC". distance: see data.expert_demo. settings: of the Config.
        probe: what to measure at the end, one of PROBES.
    Returns: what was measured, records and evaluations on the way, work.
    """
    m = modules(variants)
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
    watched = {group: {k: replace(x, examples=x.examples[:n])
                       for k, x in tasks[group].items()}
               for group, n in WATCHED.items() if cfg.eval_every}  # fmt: skip
    trainer.train(student, stages, watched, tok, cfg, way, *extra)

    saved, teacher = train.read_run(way.checkpoint)["models"], None
    if "teacher" in saved:
        teacher = copy.deepcopy(model)
        teacher.load_state_dict(saved["teacher"])
    begin, n = time.perf_counter(), cfg.max_new_tokens
    student.eval()
    result = PROBES[probe](student, model, teacher, tasks, tok, n, seed, quick)
    few, timed = stages[skills[0]], 0 if quick else 4
    work = probes.work_of_update(trainer, student, few, tok, cfg, *extra, timed=timed)
    updates = cfg.steps * len(stages)
    work["written"] = work.pop("loss") if method == "sdft" else 0
    result["work"] = {key: value * updates for key, value in work.items()}
    rows = train.read_metrics(way.folder)
    keep = ("step", "skill", "new", "prior", "kl_student_base", "kl_teacher_base",
            "teacher_gate", "seconds")  # fmt: skip
    result["evaluations"] = on_way = [pick(row, *keep) for row in rows if "new" in row]
    if on_way and teacher is not None:
        first = copy.deepcopy(model)
        first.load_state_dict(extra[0] if extra else model.state_dict())
        for row, *both in ((on_way[0], model, first), (on_way[-1], teacher, student)):
            asked = watched["new"][row["skill"]].examples
            at = probes.by_position(*both, asked, tok, n, seed)
            row["kl_teacher_student_by_position"] = at
    result["records"] = [row for row in rows if "new" not in row]
    seconds, spent = sum(row["seconds"] for row in rows), time.perf_counter() - begin
    result["seconds"] = {"train": seconds, "measure": spent}
    result |= {"config": asdict(cfg), **made_from(model)}
    torch.save(student.state_dict(), folder / "student.pt")
    way.checkpoint.unlink()  # 40 MB, of no more use
    return result


def train_py(seed, folder, quick, base, flags):
    """A run of train.py in FOLDER/out, with the seed's base model. Its results are
    train.py's own, the base's and each stage's, and the evaluations on the way."""
    (folder / "out").mkdir(exist_ok=True)
    shared = folder / "out" / "base"
    shared.unlink(missing_ok=True)  # the whole of --work may have been moved
    shared.symlink_to((folder.parents[1] / "base").resolve())
    argv = [*flags.split(), "--seed", str(seed), "--threads", "1", "--resume"]
    argv += ["--out", str(folder / "out")]
    if quick:
        few = [f"--{key.replace('_', '-')}={value}" for key, value in QUICK.items()]
        argv += [*QUICK_BASE, *few]
    out = folder / "out" / train.parse_args(argv).method
    if code := train.main(argv):
        raise RuntimeError(f"train.py ended with {code}")
    results = json.loads((out / "results.json").read_text())
    before, *ends = results.pop("evaluations")
    keep = "skill", "new", "prior", "kl_student_base", "kl_teacher_base"
    rows = [row for row in train.read_metrics(out) if "new" in row]
    return {"flags": flags, **results, "base": pick(before, "new", "prior"),
            "stages": [pick(row, *keep) for row in ends],
            "evaluations": [pick(row, "step", "new", "prior") for row in rows]}
