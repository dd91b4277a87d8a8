"""Train the tiny world with your functions in it, beside the project's own run.

    python tests/exercises/run.py mine                   # SFT and SDFT
    python tests/exercises/run.py mine --method sft      # any flag of train.py
    python tests/exercises/run.py mine --quick           # does it run? shows no effect
    python tests/exercises/run.py mine --variant dft     # and a variant below yours

Every exercise that is written in the folder takes part; a stub leaves the project's own
function in its place. Files go to out-exercises/; the project's run there is made once
for the same flags, and the base model once for all.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from kit import Work, exercises
from variants import (
    KitError,
    Modules,
    Parser,
    change,
    changes_of,
    guarded,
    source,
    train_with,
)

OUT = Path("out-exercises")


def take_part(work):
    """The exercises of a folder that are written, and the changes that put functions to
    work that the training job does not call by itself. Where two want one place, the
    later exercise has it."""
    written = [ex for ex in exercises().values() if work.state(ex) == "written"]
    if not written:
        raise KitError(
            "no exercise is written in this folder",
            "python tests/exercises/make.py e05 --to mine begins one",
        )
    wired, texts = [], {}
    for ex in reversed(written):
        new = dict(texts)
        try:
            for file, old, text in ex.wire:
                new[file] = change(new.get(file, source(file)), old, text, file)
        except ValueError:
            print(f"{ex.id}: not in the job, a later exercise of yours has its place")
            continue
        texts, wired = new, [*wired, *ex.wire]
        idle = ex.files == ["extra.py"] and not ex.wire
        note = " (the job does not use it)" if idle else ""
        print(f"{ex.id}: your {', '.join(ex.functions)}{note}")
    return written, wired


def is_done(folder, argv):
    """Has train.py been run to its end in this folder with these flags?"""
    train = Modules().train
    args = train.parse_args(argv)
    for method in train.methods_of(args):
        path = folder / method / "results.json"
        if not path.exists():
            return False
        saved = json.loads(path.read_text(encoding="utf-8"))["config"]
        if saved != asdict(train.config_of(method, args)):
            return False
    return True


def main(argv):
    parser = Parser(
        prog="tests/exercises/run.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", help="your exercises: mine")
    parser.add_argument("--variant", default="", metavar="NAME")
    args, flags = parser.parse_known_args(argv)
    if not any(flag.split("=")[0] == "--method" for flag in flags):
        flags += ["--method", "both"]
    work = Work.of_folder(args.folder)
    written, wired = take_part(work)
    modules = work.modules(written, [*changes_of(args.variant or []), *wired])
    try:
        if not is_done(OUT / "project", flags):
            print("\nthe project's own run:", flush=True)
            here = [sys.executable, str(Path(__file__).with_name("variants.py"))]
            own = [*here, "--run", *flags, "--out", str(OUT / "project")]
            if code := subprocess.call(own):
                return code
    except ValueError as error:
        raise KitError(error, getattr(error, "hint", "train.py --help")) from None
    print("\nyours:", flush=True)
    name = Path(args.folder).resolve().name
    if code := train_with(modules, [*flags, "--out", str(OUT / name)], str(OUT)):
        return code
    print("\nside by side:")
    return Modules().train.main(["--show", str(OUT / "project"), str(OUT / name)])


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
