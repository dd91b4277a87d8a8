"""Train the tiny world with your functions in it, beside the project's own run.

    python tests/exercises/run.py mine                   # SFT and SDFT
    python tests/exercises/run.py mine --only e11        # with this one of yours alone
    python tests/exercises/run.py mine --method sft      # any flag of train.py
    python tests/exercises/run.py mine --quick           # does it run? shows no effect
    python tests/exercises/run.py mine --variant dft     # and a variant below yours

Every exercise that is written in the folder takes part; a stub leaves the project's own
function in its place. Files go to out-exercises/, a folder for each set of flags; the
project's own run there is made once, and the base model once for all.
"""

import argparse
import hashlib
import shlex
import sys
from pathlib import Path

from kit import Work, exercise, exercises
from variants import (
    FILES,
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


def take_part(work, only=()):
    """The exercises of a folder that are written, and the changes that put functions to
    work that the training job does not call by itself. Where two want one place, the
    later exercise has it."""
    asked = [exercise(name) for name in only] or list(exercises().values())
    written = [ex for ex in asked if not (set(ex.files) & set(work.errors) and not only)
               and work.state(ex) == "written"]  # fmt: skip
    for error in {} if only else work.errors.values():
        print(f"left out: {error}")
    if not written:
        raise KitError(
            f"none of {' '.join(only)} is written" if only
            else "no exercise is written in this folder",
            "python tests/exercises/make.py e05 --to mine begins one",
        )  # fmt: skip
    wired, texts = [], {}
    for ex in reversed(written):
        new = dict(texts)
        try:
            for file, old, text in ex.wire:
                new[file] = change(new.get(file, source(file)), old, text, file)
        except ValueError:
            print(f"{ex.id}: not in the job, a later exercise of yours has its place; "
                  f"--only {ex.id} runs it")
            continue
        texts, wired = new, [*wired, *ex.wire]
        idle = ex.files == ["extra.py"] and not ex.wire
        note = " (the job does not use it)" if idle else ""
        print(f"{ex.id}: your {', '.join(ex.functions)}{note}")
    return written, wired


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:6]


def folder_of(flags):
    """Where runs with these flags and this source of the project are: only they are
    compared."""
    args = Modules().train.parse_args(flags)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume")}
    return OUT / digest(sorted(settings.items()), *map(source, FILES))


def is_done(folder, flags):
    train = Modules().train
    methods = train.methods_of(train.parse_args(flags))
    return all((folder / m / "results.json").exists() for m in methods)


def main(argv):
    parser = Parser(
        prog="tests/exercises/run.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", help="your exercises: mine")
    parser.add_argument("--variant", default="", metavar="NAME")
    parser.add_argument("--only", nargs="+", default=[], metavar="ID")
    args, flags = parser.parse_known_args(argv)
    if not any(flag.split("=")[0] == "--method" for flag in flags):
        flags += ["--method", "both"]
    work = Work.of_folder(args.folder)
    written, wired = take_part(work, args.only)
    modules = work.modules(written, [*changes_of(args.variant or []), *wired])
    again = [arg for arg in argv if arg != "--resume"] + ["--resume"]

    def train(m, more, out):
        """What it prints to go on is this script: train.py knows no code but its."""
        m.train.command_line = lambda _: f"python {parser.prog} {shlex.join(again)}"
        return train_with(m, [*flags, *more, "--out", str(out)], str(OUT))

    try:
        folder = folder_of(flags)
    except ValueError as error:
        raise KitError(error, getattr(error, "hint", "train.py --help")) from None
    # other code is another run: it does not go on where this one was stopped
    mark = digest(args.only, args.variant, work.files)
    own, mine = folder / "project", f"{Path(args.folder).resolve().name}-{mark}"
    if not is_done(own, flags):
        print("\nthe project's own run:", flush=True)
        if code := train(Modules(), ["--resume"] * ("--resume" not in flags), own):
            return code
    print("\nyours:", flush=True)
    if code := train(modules, [], folder / mine):
        return code
    print("\nside by side:")
    return Modules().train.main(["--show", str(own), str(folder / mine)])


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
