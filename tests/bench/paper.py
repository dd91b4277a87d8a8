"""The paper's experiments in the tiny world: many runs, a table, pictures.

    python tests/bench/paper.py                       # the list: claim, cells, minutes
    python tests/bench/paper.py skills                # run what is missing; draw
    python tests/bench/paper.py skills --draw         # only table and picture
    python tests/bench/paper.py skills --seeds 0 1    # other seeds, kept apart
    python tests/bench/paper.py skills --seeds 0 --quick    # two minutes: does it run?

With --quick a cell has two updates, and of rows that differ only in numbers the first
is run. What an experiment says, and what would refute it, is in experiments.py. A cell
is one run in a process of its own (cell.py), as many at a time as there are cores.
Finished ones are not run again (those that other code made are counted below the
table); a stopped one goes on. Experiments share base models and equal cells through
--work: keep that folder, since another machine may make another base of the same seed.
Results of an experiment's own seeds go to tests/bench/results/, all others to --work.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, RESULTS = HERE.parents[1], HERE / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "exercises"), str(HERE)]

import notes  # noqa: E402
from cell import code_key, folder_of, is_spec, needs  # noqa: E402
from experiments import EXPERIMENTS, READ, estimate, summary  # noqa: E402, F401
from notes import spread  # noqa: E402
from tqdm import tqdm  # noqa: E402
from variants import KitError, Parser, guarded  # noqa: E402

import train  # noqa: E402


def fill(spec, seed, quick):
    """The spec of a row for one seed; those that it needs are of the same seed."""
    inner = {k: fill(v, seed, quick) if is_spec(v) else v for k, v in spec.items()}
    return {**inner, "seed": seed, "quick": quick}


def specs_of(name, seeds, quick):
    """{"label seed": spec} of an experiment, the most important ones first. quick: of
    rows that differ only in numbers, the first."""
    specs, kinds = {}, set()
    for label, n, spec in EXPERIMENTS[name]["rows"]:
        kind = re.sub(r": [\d.e-]+", ":", as_key(spec))
        if not (quick and kind in kinds):
            specs |= {f"{label} {seed}": fill(spec, seed, quick) for seed in seeds[:n]}
        kinds.add(kind)
    return specs


def as_key(spec):
    return json.dumps(spec, sort_keys=True)


def read_json(path):
    """The content of a JSON file. Raises KitError where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise KitError(f"{path} cannot be read ({error})", "restore it, or delete it: "
                       "what is missing is run again") from None  # fmt: skip


def load(path):
    """The cells of a file of results, if it is there."""
    return read_json(path)["cells"] if path.exists() else {}


def stored(name, where):
    """{spec: cell} of an experiment's JSON file, with those that it only names; and
    {(label and seed, flags): cell} of the runs of train.py that have no spec."""
    cells = load(where / f"{name}.json")
    known, others = {}, {}  # of this file, and of those that it names
    for key, cell in cells.items():
        spec = as_key(cell["spec"]) if "spec" in cell else (key, cell["flags"])
        if place := cell.get("stands in"):
            others[place] = others.get(place) or stored(place, where)
            cell = others[place].get(spec)
        known[spec] = cell
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


def start(folder):
    """Run the cell of a folder in a process of its own. Raises RuntimeError."""
    command = [sys.executable, str(HERE / "cell.py"), str(folder)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:])


def missing(specs, known, work):
    """The cells to run, each behind those that it needs and that are not in work."""
    todo = {}

    def add(spec):
        for other in needs(spec):
            if not (folder_of(work, other) / "result.json").exists():
                add(other)
        todo.setdefault(as_key(spec), spec)

    for key, spec in specs.items():
        if key not in known:
            add(spec)
    return todo


def run_missing(name, specs, where, work, jobs):
    """Run the cells that have no result yet. Returns all, {"label seed": result}."""
    known = finished(name, specs, where, work)
    todo = missing(specs, known, work)
    labels = {as_key(spec): key for key, spec in specs.items()}
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
    running = {}

    def job(spec):
        for other in needs(spec):  # it was submitted before this one, if at all
            if (first := running.get(as_key(other))) and first.exception():
                raise RuntimeError("a cell that it needs has failed")
        folder = folder_of(work, spec)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.json").write_text(json.dumps(spec))
        start(folder)

    bar = tqdm(
        total=sum(map(estimate, todo.values())), desc=name, smoothing=0, disable=None,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
    )  # fmt: skip
    # no more at a time than there are cores: the rows are in the order of importance
    with bar, ThreadPoolExecutor(jobs or len(cores(0))) as pool:
        try:
            for key, spec in todo.items():
                running[key] = pool.submit(job, spec)
            keys = {each: key for key, each in running.items()}
            for done in as_completed(keys):
                spec, error = todo[keys[done]], done.exception()
                if isinstance(error, RuntimeError | OSError):  # the others go on
                    tqdm.write(f"{labels.get(keys[done], spec)}: {error}")
                elif error:
                    raise error
                bar.update(estimate(spec))
                known = finished(name, specs, where, work)
                save(where, name, known)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    save(where, name, known)
    return known


def save(where, name, cells):
    """<where>/<name>.json. A cell that stands in the file of an experiment above this
    one is only named. Cells that are not of this table any more are kept, too."""

    def result(cell):
        return as_key({k: v for k, v in cell.items() if k not in ("label", "seed")})

    path, places, names = where / f"{name}.json", {}, list(EXPERIMENTS)
    for other in names[: names.index(name)]:
        for cell in load(where / f"{other}.json").values():
            if "spec" in cell and "stands in" not in cell:
                places.setdefault(result(cell), other)
    short = {
        key: {**{k: cell[k] for k in ("label", "seed", "spec")}, "stands in": place}
        for key, cell in cells.items() if (place := places.get(result(cell)))
    }  # fmt: skip
    where.mkdir(parents=True, exist_ok=True)
    every = {**load(path), **cells, **short}
    content = {"command": f"python tests/bench/paper.py {name}", "cells": every}
    train.write_text(path, json.dumps(content))


# ---- Tables ------------------------------------------------------------------------


def complete_rows(name, cells, seeds):
    """label -> the runs of its seeds, in the order of the table; no row with a gap."""
    rows = EXPERIMENTS[name]["rows"]
    skills = max((spec.get("skills", "A") for *_, spec in rows), key=len)

    def of_skills(cell):  # a base is measured on all skills, also on untrained ones
        if cell["spec"]["run"] != "finetune:base":
            return cell
        return {**cell, "new": {skill: cell["new"][skill] for skill in skills}}

    keys = {label: [f"{label} {seed}" for seed in seeds[:n]] for label, n, _ in rows}
    return {label: [of_skills(cells[key]) for key in row]
            for label, row in keys.items() if cells.keys() >= {*row}}  # fmt: skip


def table(rows, columns):
    """Complete rows as markdown, one line each; columns: titles of READ, or a function
    that returns all numbers of a cell."""
    lines = []
    for label, runs in rows.items():
        numbers = [
            columns(run) if callable(columns) else {x: READ[x](run) for x in columns}
            for run in runs
        ]
        if not lines:
            heads = [title.replace("||", "‖") for title in numbers[0]]  # || ends a cell
            lines += [f"| run | seeds | {' | '.join(heads)} |"]
            lines += ["|---|" + "---|" * (len(heads) + 1)]
        values = zip(*(row.values() for row in numbers), strict=True)
        parts = ["" if None in each else spread(each) for each in values]
        lines.append(f"| {label} | {len(runs)} | {' | '.join(parts)} |")
    return "\n".join(lines) or "no row is complete yet"


NOTES = {
    "default": notes.benchmarks, "earlier": notes.benchmarks, "skills": notes.gaps,
    "forgetting": notes.gaps, "size": notes.gains, "teacher": notes.first_signs,
    "knowledge": notes.gates, "audit": notes.suspects, "onpolicy": notes.by_place,
}  # fmt: skip


def bases_of(cells):
    """Seeds whose rows started from several base models of the same settings, by their
    digests (None: made before digests were kept)."""
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


def print_list(work):
    """The experiments, with the cells at their own seeds that are missing."""
    for name, experiment in EXPERIMENTS.items():
        specs = specs_of(name, experiment["seeds"], False)
        known = finished(name, specs, RESULTS, work)
        todo = missing(specs, known, work)
        minutes = sum(map(estimate, todo.values())) / 60
        print(f"{name}: {len(specs)} cells, {len(todo)} to run, about {minutes:.0f} "
              f"core-minutes\n  the paper: {experiment['claim']}\n"
              f"  fails if: {experiment['fails if']}")  # fmt: skip


def main(argv):
    parser = Parser("tests/bench/paper.py", __doc__.splitlines()[0])
    parser.add_argument("experiment", choices=list(EXPERIMENTS), nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", help="others than its own")
    parser.add_argument("--quick", action="store_true", help="two minutes, no results")
    parser.add_argument("--work", help="folder for the runs (out-paper)")
    parser.add_argument("--jobs", type=int, help="runs at a time (cores)")
    parser.add_argument("--draw", action="store_true", help="run nothing, only draw")
    args = parser.parse_args(argv)
    work = Path(args.work or ROOT / ("out-paper-quick" if args.quick else "out-paper"))
    if args.experiment is None:
        return print_list(work)
    if args.jobs is not None and args.jobs < 1:
        raise KitError(f"--jobs {args.jobs}", "at least one run at a time")
    name, experiment = args.experiment, EXPERIMENTS[args.experiment]
    seeds = list(dict.fromkeys(args.seeds or experiment["seeds"]))
    own = set(seeds) <= set(experiment["seeds"]) and not args.quick
    where = RESULTS if own else work / "results"
    specs = specs_of(name, seeds, args.quick)
    of = name, specs, where, work
    cells = finished(*of) if args.draw else run_missing(*of, args.jobs)
    rows = complete_rows(name, cells, seeds)
    print(f"the paper: {experiment['claim']}\nfails if: {experiment['fails if']}\n")
    print(table(rows, experiment["columns"]))
    if name in NOTES:
        print("", *NOTES[name](rows), sep="\n")
    other = sum(cell.get("code") != code_key(cell["spec"].get("variants"))
                for cell in cells.values())  # fmt: skip
    print(f"{len(cells)} of {len(specs)} cells, {other} of them made by other code "
          "than the present", *bases_of(cells), sep="\n")  # fmt: skip
    try:
        import pictures
    except ImportError:
        print("no picture: pip install matplotlib")
    else:  # a part of the seeds is no picture of the experiment
        whole = seeds == list(experiment["seeds"])
        pictures.draw(name, rows, where if whole or not own else work / "results")
    return 0 if args.draw or len(cells) == len(specs) else 1


if __name__ == "__main__":
    try:
        sys.exit(guarded(main, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
