"""The paper's experiments in the tiny world: many runs of train.py, a table, pictures.

    python tests/bench/paper.py default                 # run what is missing; draw
    python tests/bench/paper.py default --seeds 0 1     # other seeds
    python tests/bench/paper.py default --draw          # only draw

A cell is one run of train.py: flags and a seed. Finished cells are not run again (those
that other code made are counted below the table); each runs on one core (or one GPU),
as many at a time as there are. Results and pictures stand beside each other in
tests/bench/results/. Needs matplotlib for the pictures.

`default` is both methods as they are. `forgetting` has all rates, distances and
teachers; its results are of the earlier base (1,700 updates, commit e476572).
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import queue
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"

# ---- The table of experiments ------------------------------------------------------
#
# name -> seeds, and rows of (label, how many of the seeds, flags of train.py), the most
# important ones first.

SFT, SDFT = "--method sft", "--method sdft"
EXPERIMENTS = {
    "default": {
        "seeds": tuple(range(200, 206)),  # no setting was chosen on these
        "rows": [
            ("sdft", 6, SDFT),
            ("sft", 6, SFT),
            ("sft curve", 3, f"{SFT} --eval-every 100"),
            ("sdft curve", 3, f"{SDFT} --eval-every 40"),
        ],
    },
    "forgetting": {
        "seeds": (70, 71, 72, 73, 74),  # no setting was chosen on these
        "rows": [
            ("sdft 9e-5", 5, f"{SDFT} --lr 9e-5 --eval-every 40"),
            ("sft 6e-4", 5, f"{SFT} --lr 6e-4 --eval-every 100"),
            ("sft 2.5e-4", 5, f"{SFT} --lr 2.5e-4"),
            ("sft 1.5e-3", 5, f"{SFT} --lr 1.5e-3"),
            ("sdft 2.4e-4", 5, f"{SDFT} --lr 2.4e-4"),
            ("sdft 3e-5", 5, f"{SDFT} --lr 3e-5"),
            ("sft 1e-4", 5, f"{SFT} --lr 1e-4"),
            ("sft 4e-5", 5, f"{SFT} --lr 4e-5"),
            ("sdft 6e-4", 5, f"{SDFT} --lr 6e-4"),
            ("sft own", 3, f"{SFT} --lr 1e-4 --distance own"),
            ("sdft own", 3, f"{SDFT} --distance own"),
            ("sft known", 3, f"{SFT} --lr 1e-4 --distance known"),
            ("sdft known", 3, f"{SDFT} --distance known"),
            ("sdft reverse", 2, f"{SDFT} --kl reverse"),
            ("sdft frozen", 2, f"{SDFT} --teacher frozen"),
            ("sdft live", 2, f"{SDFT} --teacher live"),
        ],
    },
}  # fmt: skip
COLORS = {"sft": "tab:orange", "sdft": "tab:blue"}
# the rows whose evaluations are drawn, stage by stage
CURVES = {
    "default": ("sft curve", "sdft curve"),
    "forgetting": ("sft 6e-4", "sft 1e-4", "sdft 9e-5"),
}
# the distance "terms" beside own and known: SFT at its lowest rate that learns
TERMS = {"sft": "sft 1e-4", "sdft": "sdft 9e-5"}


# ---- Running -----------------------------------------------------------------------


def code_key():
    """What makes a result: the five modules, without their comments."""
    names = ("model", "data", "sft", "sdft", "train")
    trees = [ast.parse((ROOT / f"{name}.py").read_text()) for name in names]
    text = "".join(ast.dump(tree) for tree in trees)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_cell(work, seed, label, flags, devices):
    """One run of train.py in a folder of its own, with the base of its seed."""
    folder = work / f"seed{seed}" / label.replace(" ", "_")
    base = work / f"seed{seed}" / "base"
    folder.mkdir(parents=True, exist_ok=True)
    base.mkdir(exist_ok=True)
    if not (folder / "base").exists():
        (folder / "base").symlink_to(base.resolve())
    command = [sys.executable, str(ROOT / "train.py"), *flags.split()]
    command += ["--seed", str(seed), "--out", str(folder), "--threads", "1"]
    method = flags.split()[1]
    if (folder / method / "checkpoint.pt").exists():
        command.append("--resume")
    device, code = devices.get(), code_key()
    env = dict(os.environ)
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = str(device)
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    finally:
        devices.put(device)
    if done.returncode:
        raise RuntimeError(f"{label}, seed {seed}: {done.stderr.strip()[-400:]}")
    lines = (folder / method / "metrics.jsonl").read_text().splitlines()
    results = json.loads((folder / method / "results.json").read_text())
    results["evaluations"] = [
        {key: row[key] for key in ("step", "new", "prior")}
        for row in map(json.loads, lines)
        if "new" in row
    ]
    about = {"label": label, "flags": flags, "seed": seed, "code": code}
    return {**about, **results}


def run_missing(name, seeds, work, jobs):
    """Run the cells that have no result yet; returns all, {"label seed": result}."""
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text())["cells"] if path.exists() else {}
    cells = {
        f"{label} {seed}": (seed, label, flags)
        for label, n, flags in EXPERIMENTS[name]["rows"]
        for seed in seeds[:n]
    }
    todo = {
        key: cell
        for key, cell in cells.items()
        if known.get(key, {}).get("flags") != cell[2]
    }
    gpus = torch.cuda.device_count()
    devices = queue.Queue()
    for i in range(jobs or gpus or os.cpu_count()):
        devices.put(i % gpus if gpus else None)
    # a seed's base is made once, by its first cell; the others of the seed wait for it
    makers = {cell[0]: key for key, cell in reversed(todo.items())}
    made = {seed: threading.Event() for seed in makers}

    def run(key):
        seed = todo[key][0]
        if key != makers[seed]:
            made[seed].wait()
        try:
            return run_cell(work, *todo[key], devices)
        finally:
            made[seed].set()

    bar = tqdm(total=len(todo), desc=name, smoothing=0)
    with ThreadPoolExecutor(devices.qsize()) as pool:
        running = {pool.submit(run, key): key for key in todo}
        for job in as_completed(running):
            try:
                known[running[job]] = job.result()
            except RuntimeError as error:  # the others go on; a next start tries again
                tqdm.write(str(error))
            save(path, name, known)
            bar.update()
    return known


def save(path, name, cells):
    RESULTS.mkdir(exist_ok=True)
    content = {
        "command": f"python tests/bench/paper.py {name}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one for each run",
        "torch": torch.__version__,
        "cells": cells,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


# ---- What a row says ---------------------------------------------------------------


def summary(cell):
    """The numbers of a run that the tables and pictures use."""
    stages, base = cell["stages"], cell["base"]
    final = stages[-1]
    own = [stage["new"][stage["skill"]] for stage in stages]
    prior = mean(final["prior"].values())
    return {
        "after own stage": mean(own),
        "worst own stage": min(own),
        "new": mean(final["new"].values()),
        "worst skill": min(final["new"].values()),
        "prior": prior,
        "prior / base": prior / mean(base["prior"].values()),
        "KL(student || base)": final["kl_student_base"],
    }


def spread(values):
    """mean (lowest to highest)"""
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def complete_rows(name, cells, seeds):
    """label -> the runs of its seeds, in the order of the table; no row with a gap."""
    keys = {
        label: [f"{label} {seed}" for seed in seeds[:n]]
        for label, n, _ in EXPERIMENTS[name]["rows"]
    }
    return {
        label: [cells[key] for key in row]
        for label, row in keys.items()
        if all(key in cells for key in row)
    }


def at_rates(rows, method):
    """The rows of a method that are named by a learning rate, as (label, runs)."""
    return [(x, y) for x, y in rows.items() if re.match(rf"{method} \d", x)]


def print_table(rows):
    if not rows:
        return print("no row is complete yet")
    first = next(iter(rows.values()))[0]
    print("| run | seeds | " + " | ".join(first) + " |")
    print("|---|" + "---|" * (len(first) + 1))
    for label, runs in rows.items():
        cells = [spread([run[key] for run in runs]) for key in first]
        print(f"| {label} | {len(runs)} | " + " | ".join(cells) + " |")


def print_benchmarks(rows):
    """The prior skills one by one after the last stage, means over seeds; and the mean
    of all at each evaluation on the way."""
    for label, runs in rows.items():
        final = [run["stages"][-1]["prior"] for run in runs]
        columns = [f"{b} {mean(row[b] for row in final):.2f}" for b in final[0]]
        curves = zip(*[run["evaluations"] for run in runs], strict=True)
        curve = [mean(mean(row["prior"].values()) for row in at) for at in curves]
        print(f"{label}: {', '.join(columns)}; on the way:",
              " ".join(f"{y:.2f}" for y in curve))  # fmt: skip


def print_gaps(rows):
    """How far SFT at the default distance stays below SDFT, seed by seed."""
    best = rows.get(TERMS["sdft"], [])
    for label, runs in at_rates(rows, "sft") if best else []:
        pairs = list(zip(best, runs, strict=False))
        gaps = {k: spread([a[k] - b[k] for a, b in pairs]) for k in ("new", "prior")}
        print(f"{TERMS['sdft']} minus {label}:", gaps)


# ---- Pictures ----------------------------------------------------------------------


def draw_curves(plt, name, runs_of):
    """New skills up, prior kept: mean and range over seeds, for the three stages."""
    curves = CURVES[name]
    size = 4 * len(curves), 3.6
    figure, axes = plt.subplots(1, len(curves), figsize=size, sharey=True)
    for axis, curve in zip(axes, curves, strict=True):
        runs = runs_of[curve]
        steps = [row["step"] for row in runs[0]["evaluations"]]
        x = [step / runs[0]["config"]["steps"] for step in steps]
        lines = [(f"skill {s}", "new", s) for s in ("A", "B", "C")]
        lines.append(("prior", "", ""))
        for label, group, skill in lines:
            ys = [
                [row[group][skill] if group else mean(row["prior"].values())
                 for row in run["evaluations"]]
                for run in runs
            ]  # fmt: skip
            columns = list(zip(*ys, strict=True))
            style = {"color": "black", "lw": 2.5} if label == "prior" else {}
            (line,) = axis.plot(x, [mean(c) for c in columns], label=label, **style)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(x, low, high, alpha=0.15, color=line.get_color())
        for stage in (1, 2):
            axis.axvline(stage, color="gray", lw=0.8, ls=":")
        method, rate = curve.split()
        rate = "" if rate == "curve" else f", {rate}"
        axis.set_title(f"{method.upper()}{rate}")
        axis.set_xlabel("stages (one for each skill)")
        axis.set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("accuracy on held-out queries")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(RESULTS / f"{name}_curves.png", dpi=130, bbox_inches="tight")


def draw_tradeoff(plt, name, rows):
    """Prior against new, one point for each rate, the frontier of each method."""
    figure, axis = plt.subplots(figsize=(8, 4.2))
    for method, color in COLORS.items():
        points, markers = [], iter("os^vDP*X")
        for label, runs in at_rates(rows, method):
            x = [run["new"] for run in runs]
            y = [run["prior / base"] for run in runs]
            points.append((mean(x), mean(y)))
            dx = [[mean(x) - min(x)], [max(x) - mean(x)]]
            dy = [[mean(y) - min(y)], [max(y) - mean(y)]]
            axis.errorbar(
                *points[-1], dy, dx, next(markers), color=color, alpha=0.7,
                label=label.replace(method, method.upper()),
            )  # fmt: skip

        def beaten(p, points=points):
            return any(q[0] > p[0] and q[1] > p[1] for q in points)

        best = [point for point in points if not beaten(point)]
        axis.plot(*zip(*sorted(best), strict=True), color=color)
    axis.set(xlabel="new: mean of the three skills after A, B, C",
             ylabel="prior, as a share of the base's")  # fmt: skip
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(RESULTS / f"{name}_tradeoff.png", dpi=130, bbox_inches="tight")


def draw_distance(plt, name, rows):
    """What each method keeps against the distance of the demonstrations."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    distances = ("own", "known", "terms")
    for axis, key in zip(axes, ("new", "prior / base"), strict=True):
        for i, (method, color) in enumerate(COLORS.items()):
            labels = [f"{method} {d}" for d in distances[:2]] + [TERMS[method]]
            runs = [[run[key] for run in rows[label]] for label in labels]
            y = [mean(r) for r in runs]
            low = [mean(r) - min(r) for r in runs]
            high = [max(r) - mean(r) for r in runs]
            x = [j + 0.06 * (i - 0.5) for j in range(3)]
            label = method.upper()
            axis.errorbar(x, y, [low, high], fmt="o-", color=color, label=label)
        axis.set_xticks(range(3), ["own style", "known style", "own terms"])
        axis.set_title(key)
        axis.set_xlabel("distance of the demonstrations")
    axes[0].set_ylabel("after A, B, C")
    axes[0].legend()
    figure.savefig(RESULTS / f"{name}_distance.png", dpi=130, bbox_inches="tight")


def draw(name, runs, rows):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def have(*labels):
        return all(label in rows for label in labels)

    if have(*CURVES[name]):
        draw_curves(plt, name, runs)
    if name == "forgetting" and have(*CURVES[name]):
        draw_tradeoff(plt, name, rows)
    if have("sft own", "sft known", "sdft own", "sdft known", *TERMS.values()):
        draw_distance(plt, name, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--work", default=str(ROOT / "out-paper"), help="for the runs")
    parser.add_argument("--jobs", type=int, help="runs at a time (all cores or GPUs)")
    parser.add_argument("--draw", action="store_true", help="run nothing, only draw")
    args = parser.parse_args()
    seeds = args.seeds or EXPERIMENTS[args.experiment]["seeds"]
    path = RESULTS / f"{args.experiment}.json"
    if args.draw:
        cells = json.loads(path.read_text())["cells"]
    else:
        cells = run_missing(args.experiment, seeds, Path(args.work), args.jobs)
    runs = complete_rows(args.experiment, cells, seeds)
    rows = {label: [summary(run) for run in row] for label, row in runs.items()}
    print_table(rows)
    print_gaps(rows)
    print_benchmarks(runs)
    other = sum(cell.get("code") != code_key() for cell in cells.values())
    print(f"{len(cells)} cells, {other} of them made by other code than the present")
    draw(args.experiment, runs, rows)


if __name__ == "__main__":
    main()
