"""e16: three learning rates, three seeds, two methods, from one base model.

    python tests/exercises/sweep.py                    # all 18 runs; about 30 minutes
    python tests/exercises/sweep.py --lr 1e-4 1e-3     # other rates
    python tests/exercises/sweep.py --check            # is the table fit to be read?
    python tests/exercises/sweep.py --check --impl mine    # with your summarize

It writes one line for each run to out-sweep/table.csv and goes on where it was stopped.
World, base model and benchmarks are those of seed 0, made once; a seed decides the
demonstrations, their order, the responses and what drops out. Both methods make as many
updates.
"""

import csv
import math
import sys
from pathlib import Path

import kit
from variants import KitError, Modules, Parser, guarded

FIELDS = ("method", "lr", "seed", "new", "prior", "kl")
METHODS = ("sft", "sdft")
SKILLS, STEPS = ("A", "B"), 120  # updates for each skill


def read(path):
    """The runs of a table, as dicts. Raises KitError if it is not of our form."""
    if not path.is_file():
        raise KitError(f"{path}: no such file", "python tests/exercises/sweep.py")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = []
    for n, row in enumerate(rows, 2):
        try:
            if tuple(row) != FIELDS or None in row.values():
                raise ValueError(f"the columns are {', '.join(FIELDS)}")
            numbers = {key: float(row[key]) for key in FIELDS[1:]}
            runs.append({**row, **numbers, "seed": int(row["seed"])})
        except ValueError as error:
            raise KitError(f"{path}:{n}: {error}", "mend it") from None
    return runs


def problems(runs, n_rates=3, n_seeds=3):
    """What is wrong with form and ranges of a table, a list of texts."""
    seeds = {}  # (method, lr) -> those of its runs
    for run in runs:
        seeds.setdefault((run["method"], run["lr"]), []).append(run["seed"])
    found = [f"{method!r} is no method: {', '.join(METHODS)}"
             for method in sorted({m for m, _ in seeds} - set(METHODS))]  # fmt: skip
    rates = {m: {lr for method, lr in seeds if method == m} for m in METHODS}
    for m in METHODS:
        if len(rates[m]) < n_rates:
            found.append(f"{m}: {len(rates[m])} learning rates, not {n_rates}")
    if rates["sft"] != rates["sdft"]:
        found.append("the methods have different learning rates: nothing compares")
    for (m, lr), own in seeds.items():
        n = len(set(own))
        if n < len(own):
            found.append(f"{m}, {lr:g}: a seed comes twice")
        if n < n_seeds:
            found.append(f"{m}, {lr:g}: {n} seeds, not {n_seeds}")
    for run in runs:
        name = f"{run['method']}, {run['lr']:g}, seed {run['seed']}"
        found += [f"{name}: {key} is {run[key]}, no share of responses"
                  for key in ("new", "prior") if not 0 <= run[key] <= 1]  # fmt: skip
        if not 0 <= run["kl"] < math.inf:
            found.append(f"{name}: KL(student || base) is {run['kl']}")
        if not 0 < run["lr"] < 1:
            found.append(f"{name}: a learning rate of {run['lr']}")
    if len({(run["new"], run["prior"], run["kl"]) for run in runs}) < len(runs):
        found.append("two runs have the same results to the last digit: copied, or "
                     "the seed has no effect")
    return found


def show(runs, summarize):
    print(f"{'method':8s}{'lr':>8s}  {'new: mean (range)':20s}{'prior: mean (range)'}")
    for row in summarize(runs):
        cells = [f"{row[key][0]:.2f} ({row[key][1]:.2f} to {row[key][2]:.2f})"
                 for key in ("new", "prior")]  # fmt: skip
        print(f"{row['method']:8s}{row['lr']:8g}  {cells[0]:20s}{cells[1]}")


def setting(m, flags=()):
    """World, base model, benchmarks: of seed 0, the same for all runs."""
    args = m.train.parse_args(flags)
    tok, _, tasks, base, path, (cfg, world) = m.train.make_world(args)
    m.train.get_base(path, base, cfg, world, tok, None)
    return args, tok, world, base, tasks


def one_run(m, setting, method, lr, seed, steps, skills, folder):
    args, tok, world, base, tasks = setting
    trainer = m.train.METHODS[method]
    cfg = trainer.Config(seed=seed, lr=lr, steps=steps, log_every=50)
    stages = {skill: m.data.make_demos(world, skill, args.demos, seed, args.distance)
              for skill in skills}  # fmt: skip
    student = m.model.GPT(base.config)
    student.load_state_dict(base.state_dict())
    run = m.train.Run(folder / f"{method}-{lr:g}-{seed}", resume=True)
    last = trainer.train(student, stages, tasks, tok, cfg, run)[-1]
    new = sum(last["new"][skill] for skill in skills) / len(skills)
    prior = sum(last["prior"].values()) / len(last["prior"])
    return {
        "method": method, "lr": lr, "seed": seed, "new": round(new, 4),
        "prior": round(prior, 4), "kl": round(last["kl_student_base"], 6),
    }  # fmt: skip


def main(argv):
    parser = Parser("tests/exercises/sweep.py", __doc__)
    parser.add_argument("--check", action="store_true", help="read the table, no run")
    parser.add_argument("--impl", metavar="FOLDER", help="your exercises")
    parser.add_argument("--out", default="out-sweep", help="default: %(default)s")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    out, m = Path(args.out), Modules()
    path, summarize = out / "table.csv", m.extra.summarize
    if args.impl:
        work = kit.Work.of_folder(args.impl)
        summarize = work.modules(kit.exercise("e16")).extra.summarize
    if not args.check:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
        has = {(run["method"], run["lr"], run["seed"]) for run in read(path)}
        wanted = [(x, lr, seed) for seed in range(args.seeds) for lr in args.lr
                  for x in METHODS]  # fmt: skip
        made = setting(m) if set(wanted) - has else None
        for n, key in enumerate(wanted, 1):
            if key in has:
                continue
            print(f"\nrun {n} of {len(wanted)}: {key[0]}, {key[1]:g}, seed {key[2]}")
            run = one_run(m, made, *key, STEPS, SKILLS, out)
            with open(path, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(run)
    runs = read(path)
    if found := problems(runs, len(args.lr), args.seeds):
        text = "\n  ".join([f"{path}:", *found])
        raise KitError(text, "run what is missing; --lr and --seeds as it was made")
    show(runs, summarize)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
