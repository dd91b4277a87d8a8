"""One cell of an experiment, in a process of its own: python tests/bench/cell.py FOLDER

FOLDER/spec.json says what to run, in plain values:

    {"run": "finetune:run", "seed": 200, "quick": false, "method": "sft", "lr": 6e-4}

calls finetune.run(seed=200, folder=FOLDER, quick=False, method="sft", lr=6e-4). A value
that is a spec itself is a cell that must be finished before: the function gets the path
of its folder instead. What the function returns, a dict of plain values, becomes
FOLDER/result.json: it is there whole or not at all. Started again after a stop, a cell
goes on.
"""

import ast
import functools
import hashlib
import importlib
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
for path in (ROOT, ROOT / "tests" / "exercises", ROOT / "tests" / "bench"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

from variants import changed_texts, changes_of, source  # noqa: E402

import train  # noqa: E402


def is_spec(value):
    return isinstance(value, dict) and "run" in value


def needs(spec):
    """The cells that must be finished before this one."""
    return [value for value in spec.values() if is_spec(value)]


def folder_of(work, spec):
    """Where a cell is run: equal specs have the same folder, so they are run once."""
    name = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    return work / f"seed{spec['seed']}" / "cells" / name


@functools.cache
def code_key(variants=None):
    """The five modules that made a result, without comments, with their changes. What
    stands in this folder is not part of it: change a spec along with what it means."""
    changed = changed_texts(changes_of(variants)) if variants else {}
    names = [f"{name}.py" for name in ("model", "data", "sft", "sdft", "train")]
    trees = [ast.parse(changed.get(name) or source(name)) for name in names]
    text = "".join(ast.dump(tree) for tree in trees)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def rounded(x):
    """Plain values with six digits: results are to be read, and kept in git."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def wait_for(folder):
    """The lock of a folder, when whoever else runs this cell has finished."""
    while True:
        try:
            train.lock(folder)
        except train.UserError:
            train.LOCKS.pop().close()
            time.sleep(1)
        else:
            return train.LOCKS.pop()  # train.main would let go of it at its end


def run(folder):
    """Run the cell of a folder, unless its result is there; returns the result."""
    path, work = folder / "result.json", folder.parents[2]
    spec = json.loads((folder / "spec.json").read_text())
    with wait_for(folder):  # a cell runs once, whoever else has asked for it
        if not path.exists():
            module, function = spec.pop("run").split(":")
            spec = {k: folder_of(work, v) if is_spec(v) else v for k, v in spec.items()}
            start, code = time.perf_counter(), code_key(spec.get("variants"))
            call = getattr(importlib.import_module(module), function)
            result = call(folder=folder, **spec)
            result.setdefault("seconds", {"whole": time.perf_counter() - start})
            train.write_text(path, json.dumps(rounded({"code": code, **result})))
        return json.loads(path.read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]).resolve())
