"""One cell of an experiment, in a process of its own: python tests/bench/cell.py FOLDER

FOLDER/spec.json says what to run: {"run": "finetune:run", "seed": 200, "quick": false,
"lr": 6e-4} calls finetune.run(seed=200, folder=FOLDER, quick=False, lr=6e-4). A value
that is a spec itself is a cell that must be finished before: the function gets its
folder instead. What it returns, plain values, becomes FOLDER/result.json.
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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "exercises"), str(HERE)]

from variants import changed_texts, changes_of, source  # noqa: E402

import train  # noqa: E402


def is_spec(value):
    return isinstance(value, dict) and "run" in value


def needs(spec):
    """The cells that must be finished before this one."""
    return list(filter(is_spec, spec.values()))


def folder_of(work, spec):
    """Where a cell is run: equal specs have one folder, so they are run once."""
    name = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    return work / f"seed{spec['seed']}" / "cells" / name


@functools.cache
def code_key(variants=None):
    """The five modules that made a result, without comments, with their changes. This
    folder is not part of it: change a spec along with what it means."""
    texts = changed_texts(changes_of(variants)) if variants else {}
    names = "model.py", "data.py", "sft.py", "sdft.py", "train.py"
    trees = [ast.parse(texts.get(name) or source(name)) for name in names]
    return train.digest("".join(map(ast.dump, trees)))


def wait_for(folder):
    """The lock of a folder, when whoever else runs this cell has finished."""
    while True:
        try:
            train.lock(folder)
            return train.LOCKS.pop()  # train.main would let go of it at its end
        except train.UserError:
            train.LOCKS.pop().close()
            time.sleep(1)


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
            text = json.dumps({"code": code, **result})  # six digits: kept in git
            content = json.loads(text, parse_float=lambda x: float(f"{float(x):.6g}"))
            train.write_text(path, json.dumps(content))
        return json.loads(path.read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]).resolve())
