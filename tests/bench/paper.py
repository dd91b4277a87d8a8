"""The paper's experiments in the tiny world: many runs, a table, pictures.

    python tests/bench/paper.py                       # the list: claim, cells, minutes
    python tests/bench/paper.py skills                # run what is missing; draw
    python tests/bench/paper.py skills --draw         # only table and picture
    python tests/bench/paper.py skills --seeds 0 1    # other seeds, kept apart
    python tests/bench/paper.py skills --seeds 0 --quick    # two minutes: does it run?

With --quick a cell has two updates, and of rows that differ only in numbers the first
is run.

What an experiment says, and what would refute it, stands in experiments.py. A cell is
one run in a process of its own (cell.py), on one core (or one GPU), as many at a time
as there are. Finished ones are not run again (those that other code made are counted
below the table); a stopped one goes on. Experiments share base models and equal cells
through --work: keep that folder, since another machine may make another base of the
same seed. Results and pictures of an experiment's own seeds stand beside each other in
tests/bench/results/, all others in --work. Needs matplotlib for pictures.
"""

import importlib.util
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "bench"
RESULTS = HERE / "results"
for path in (ROOT, ROOT / "tests" / "exercises", HERE):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

import notes  # noqa: E402
import torch  # noqa: E402
from cell import code_key, folder_of, is_spec, needs  # noqa: E402
from experiments import EXPERIMENTS, READ, estimate, summary  # noqa: E402
from notes import spread  # noqa: E402
from tqdm import tqdm  # noqa: E402
from variants import KitError, Parser, guarded  # noqa: E402

import train  # noqa: E402

# ---- Cells -------------------------------------------------------------------------


def fill(spec, seed, quick):
    """The spec of a row for one seed; those that it needs are of the same seed."""
    inner = {k: fill(v, seed, quick) if is_spec(v) else v for k, v in spec.items()}
    return {**inner, "seed": seed, "quick": quick}


def kind(spec):
    """A spec without its numbers."""
    return {
        k: kind(v) if isinstance(v, dict) else v if isinstance(v, str) else None
        for k, v in spec.items()
    }


def specs_of(name, seeds, quick):
    """{"label seed": spec} of an experiment, the most important ones first. quick: of
    rows that differ only in numbers, the first."""
    rows = EXPERIMENTS[name]["rows"]
    if quick:
        first = {}
        for row in rows:
            first.setdefault(as_key(kind(row[2])), row)
        rows = first.values()
    return {
        f"{label} {seed}": fill(spec, seed, quick)
        for label, n, spec in rows
        for seed in seeds[:n]
    }


def as_key(spec):
    return json.dumps(spec, sort_keys=True)


def read_json(path):
    """The content of a JSON file. Raises KitError where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        hint = "restore it, or delete it: what is missing is run again"
        raise KitError(f"{path} cannot be read ({error})", hint) from None


def load(path):
    """The cells of a file of results, if it is there."""
    return read_json(path)["cells"] if path.exists() else {}


def stored(name, where):
    """{spec: cell} of an experiment's JSON file, with those that it only names; and
    {(label and seed, flags): cell} of the runs of train.py that have no spec."""
    cells = load(where / f"{name}.json")
    places = {cell["stands in"] for cell in cells.values() if "stands in" in cell}
    others = {place: stored(place, where) for place in places}
    known = {}
    for key, cell in cells.items():
        spec = as_key(cell["spec"]) if "spec" in cell else (key, cell["flags"])
        place = others.get(cell.get("stands in"))
        known[spec] = cell if place is None else place.get(spec)
    return known


def finished(name, specs, where, work):
    """{"label seed": result} of the cells that need not be run: their results stand in
    the JSON file of the experiment, or of that which it reads, or in their own folders.
    Those in the files of others do not count: they may be of another base of the same
    seed, and rows are compared seed by seed."""
    reads = EXPERIMENTS[name].get("reads")
    known = {**(stored(reads, where) if reads else {}), **stored(name, where)}
    found = {}
    for key, spec in specs.items():
        path = folder_of(work, spec) / "result.json"
        cell = known.get(as_key(spec)) or known.get((key, spec.get("flags")))
        if cell is None and path.exists():
            cell = read_json(path)
        if cell is not None:
            label, _, seed = key.rpartition(" ")
            cell = {k: v for k, v in cell.items() if k not in ("label", "seed", "spec")}
            found[key] = {"label": label, "seed": int(seed), "spec": spec, **cell}
    return found


# ---- Running -----------------------------------------------------------------------


def places(jobs):
    """Where cells are run, one at each: a GPU, by CUDA's name, or None: a core."""
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = visible.split(",") if visible else [str(i) for i in range(count)]
    elif hasattr(os, "sched_getaffinity"):  # fewer than there are, in a container
        found = [None] * len(os.sched_getaffinity(0))
    else:
        found = [None] * os.cpu_count()
    return [found[i % len(found)] for i in range(jobs or len(found))]


def start(folder, device):
    """Run the cell of a folder in a process of its own. Raises RuntimeError."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, str(HERE / "cell.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:])


def run_one(spec, work, devices):
    """A cell from its spec to its result, on the next free core or GPU."""
    folder = folder_of(work, spec)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    device = devices.get()
    try:
        start(folder, device)
    finally:
        devices.put(device)


def with_needs(specs, work):
    """The cells to run, each behind those that it needs and that are not in work."""
    todo = {}

    def add(spec):
        for other in needs(spec):
            if not (folder_of(work, other) / "result.json").exists():
                add(other)
        todo[as_key(spec)] = spec

    for spec in specs:
        add(spec)
    return todo


def run_missing(name, specs, where, work, jobs):
    """Run the cells that have no result yet. Returns all, {"label seed": result}."""
    known = finished(name, specs, where, work)
    todo = with_needs([s for key, s in specs.items() if key not in known], work)
    labels = {as_key(spec): key for key, spec in specs.items()}
    devices = queue.Queue()
    for place in places(jobs):
        devices.put(place)
    slots = devices.qsize()  # start no more: the rows are in the order of importance
    waiting, running, failed = dict(todo), {}, set()
    total = sum(map(estimate, todo.values()))
    bar = tqdm(
        total=total, desc=name, smoothing=0, disable=None,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
        "{postfix}",
    )  # fmt: skip
    pool = ThreadPoolExecutor(slots)
    try:
        while waiting or running:
            for key, spec in list(waiting.items()):
                others = {as_key(other) for other in needs(spec)}
                if others & failed:
                    failed.add(key)
                    del waiting[key]
                elif len(running) < slots and not others & (
                    waiting.keys() | set(running.values())
                ):
                    job = pool.submit(run_one, waiting.pop(key), work, devices)
                    running[job] = key
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for job in done:
                key = running.pop(job)
                try:
                    job.result()
                except (RuntimeError, OSError) as error:  # the others go on
                    failed.add(key)
                    tqdm.write(f"{labels.get(key, todo[key])}: {error}")
                bar.update(estimate(todo[key]))
                bar.set_postfix_str(f"{len(running) + len(waiting)} cells")
                known = finished(name, specs, where, work)
                save(where, name, known)
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        bar.close()
    save(where, name, known)
    return known


def save(where, name, cells):
    """<where>/<name>.json. A cell that stands in the file of an experiment above this
    one is only named. Cells that are not of this table any more are kept, too."""

    def result(cell):
        return {k: v for k, v in cell.items() if k not in ("label", "seed")}

    path, places = where / f"{name}.json", {}
    for other in list(EXPERIMENTS)[: list(EXPERIMENTS).index(name)]:
        for cell in load(where / f"{other}.json").values():
            if "spec" in cell and "stands in" not in cell:
                places.setdefault(as_key(result(cell)), other)
    short = {
        key: {**{k: cell[k] for k in ("label", "seed", "spec")}, "stands in": place}
        for key, cell in cells.items() if (place := places.get(as_key(result(cell))))
    }  # fmt: skip
    where.mkdir(parents=True, exist_ok=True)
    command = f"python tests/bench/paper.py {name}"
    content = {"command": command, "cells": {**load(path), **cells, **short}}
    train.write_text(path, json.dumps(content))


# ---- Tables ------------------------------------------------------------------------


def of_skills(cell, skills):
    """A base is measured on all skills: keep those that the experiment trains."""
    if cell["spec"]["run"] != "finetune:base":
        return cell
    return {**cell, "new": {skill: cell["new"][skill] for skill in skills}}


def complete_rows(name, cells, seeds):
    """label -> the runs of its seeds, in the order of the table; no row with a gap."""
    skills = max((spec.get("skills", "A") for *_, spec in EXPERIMENTS[name]["rows"]),
                 key=len)  # fmt: skip
    keys = {
        label: [f"{label} {seed}" for seed in seeds[:n]]
        for label, n, _ in EXPERIMENTS[name]["rows"]
    }
    return {
        label: [of_skills(cells[key], skills) for key in row]
        for label, row in keys.items()
        if all(key in cells for key in row)
    }


def read(cell, columns):
    """The numbers of a cell that the table shows; None where it has no such number."""
    if callable(columns):
        return columns(cell)
    return {title: READ[title](cell) for title in columns}


def table(rows, columns):
    """Complete rows as markdown, one line each."""
    lines, titles = [], None
    for label, runs in rows.items():
        numbers = [read(run, columns) for run in runs]
        if titles is None:
            titles = list(numbers[0])
            heads = [title.replace("||", "‖") for title in titles]  # || ends a cell
            lines += [f"| run | seeds | {' | '.join(heads)} |"]
            lines += ["|---|" + "---|" * (len(titles) + 1)]
        parts = [
            "" if any(row[title] is None for row in numbers)
            else spread([row[title] for row in numbers])
            for title in titles
        ]  # fmt: skip
        lines.append(f"| {label} | {len(runs)} | {' | '.join(parts)} |")
    return "\n".join(lines) or "no row is complete yet"


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


NOTES = {
    "skills": [notes.gaps], "forgetting": [notes.gaps], "size": [notes.gains],
    "teacher": [notes.first_signs], "knowledge": [notes.gates],
    "audit": [notes.suspects], "onpolicy": [notes.by_place],
}  # fmt: skip


def bases_of(cells):
    """Seeds whose rows started from several base models of the same settings, and which
    by their digests (None: made before digests were kept)."""
    found = {}
    for cell in cells.values():
        spec = cell["spec"].get("base", cell["spec"])
        rows = found.setdefault((cell["seed"], as_key(spec)), {})
        rows.setdefault(cell.get("base digest"), []).append(cell["label"])
    return [
        f"seed {seed}, rows of several bases: "
        + "; ".join(f"{digest}: {', '.join(rows)}" for digest, rows in of.items())
        for (seed, _), of in found.items() if len(of) > 1
    ]  # fmt: skip


# ---- The program -------------------------------------------------------------------


def minutes_of(name, where, work):
    """Cells of an experiment at its own seeds, those that are missing, and the
    core-minutes that these will take."""
    specs = specs_of(name, EXPERIMENTS[name]["seeds"], False)
    known = finished(name, specs, where, work)
    todo = with_needs([s for key, s in specs.items() if key not in known], work)
    return len(specs), len(todo), sum(map(estimate, todo.values())) / 60


def print_list(work):
    for name, experiment in EXPERIMENTS.items():
        cells, missing, minutes = minutes_of(name, RESULTS, work)
        print(f"{name}: {cells} cells, {missing} to run, about {minutes:.0f} "
              f"core-minutes\n  the paper: {experiment['claim']}\n"
              f"  fails if: {experiment['fails if']}")  # fmt: skip


def main(argv):
    parser = Parser(prog="tests/bench/paper.py", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=list(EXPERIMENTS), nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", help="others than its own")
    parser.add_argument("--quick", action="store_true", help="two minutes, no results")
    parser.add_argument("--work", help="folder for the runs (out-paper)")
    parser.add_argument("--jobs", type=int, help="runs at a time (cores or GPUs)")
    parser.add_argument("--draw", action="store_true", help="run nothing, only draw")
    args = parser.parse_args(argv)
    work = Path(args.work or ROOT / ("out-paper-quick" if args.quick else "out-paper"))
    if args.jobs is not None and args.jobs < 1:
        raise KitError(f"--jobs {args.jobs}", "at least one run at a time")
    if args.experiment is None:
        print_list(work)
        return 0
    name, experiment = args.experiment, EXPERIMENTS[args.experiment]
    seeds = list(dict.fromkeys(args.seeds or experiment["seeds"]))
    own = set(seeds) <= set(experiment["seeds"]) and not args.quick
    where = RESULTS if own else work / "results"
    specs = specs_of(name, seeds, args.quick)
    if args.draw:
        cells = finished(name, specs, where, work)
    else:
        cells = run_missing(name, specs, where, work, args.jobs)
    rows = complete_rows(name, cells, seeds)
    print(f"the paper: {experiment['claim']}\nfails if: {experiment['fails if']}\n")
    print(table(rows, experiment["columns"]))
    if experiment["columns"] is summary:
        print_benchmarks(rows)
    for function in NOTES.get(name, ()):
        print("\n".join(["", *function(rows)]))
    other = sum(
        cell.get("code") != code_key(cell["spec"].get("variants"))
        for cell in cells.values()
    )
    print(f"{len(cells)} of {len(specs)} cells, {other} of them made by other code "
          "than the present")  # fmt: skip
    for line in bases_of(cells):
        print(line)
    if importlib.util.find_spec("matplotlib"):
        import pictures

        # a part of the seeds is no picture of the experiment
        whole = seeds == list(experiment["seeds"])
        pictures.draw(name, rows, where if whole or not own else work / "results")
    else:
        print("no picture: pip install matplotlib")
    return 0 if args.draw or len(cells) == len(specs) else 1


if __name__ == "__main__":
    try:
        sys.exit(guarded(main, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
