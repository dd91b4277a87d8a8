"""Train the tiny world with your functions in it, beside the project's own run.

    python tests/exercises/run.py mine                   # SFT and SDFT
    python tests/exercises/run.py mine --only e11        # with this one of yours alone
    python tests/exercises/run.py mine --method sft      # any flag of train.py
    python tests/exercises/run.py mine --quick           # does it run? shows no effect

Every exercise that is written in the folder takes part; a stub leaves the project's own
function in its place. Files go to out-exercises/, a folder for each set of flags; the
project's own run there is made once, and the base model once for all.
"""

import shlex
import sys
from pathlib import Path

import kit
import variants
from variants import KitError, Modules, Parser, guarded


def take_part(work, only=()):
    """The exercises of a folder that are written, and the changes that put functions to
    work that the training job does not call by itself. Where two want one place, the
    later exercise has it."""
    exs = [kit.exercise(name) for name in only] or [
        ex for ex in kit.exercises().values() if not set(ex.files) & set(work.errors)
    ]
    written = [ex for ex in exs if work.state(ex) == "written"]
    for error in {} if only else work.errors.values():
        print(f"left out: {error}")
    if not written:
        what = f"none of {' '.join(only)}" if only else "no exercise"
        hint = "python tests/exercises/make.py e05 --to mine begins one"
        raise KitError(f"{what} is written in this folder", hint)
    wired = []
    for ex in reversed(written):
        try:
            variants.changed_texts([*wired, *ex.wire])
        except ValueError:
            print(f"{ex.id}: not in the job, a later exercise of yours has its place; "
                  f"--only {ex.id} runs it")
            continue
        wired += ex.wire
        idle = ex.files == ["extra.py"] and not ex.wire
        note = " (the job does not use it)" if idle else ""
        print(f"{ex.id}: your {', '.join(ex.functions)}{note}")
    return written, wired


def main(argv):
    parser = Parser("tests/exercises/run.py", __doc__)
    parser.add_argument("folder", help="your exercises: mine")
    parser.add_argument("--only", nargs="+", default=[], metavar="ID")
    args, flags = parser.parse_known_args(argv)
    if not any(flag.split("=")[0] == "--method" for flag in flags):
        flags += ["--method", "both"]
    work, project = kit.Work.of_folder(args.folder), Modules()
    written, wired = take_part(work, args.only)
    modules = work.modules(written, wired)
    again = shlex.join([arg for arg in argv if arg != "--resume"] + ["--resume"])

    def train(m, more, out):
        """What it prints to go on is this script: train.py knows no code but its."""
        m.train.command_line = lambda _: f"python {parser.prog} {again}"
        return variants.train_with(m, [*flags, *more, "--out", str(out)], None)

    try:
        settings = project.train.parse_args(flags)
    except ValueError as error:
        raise KitError(error, getattr(error, "hint", "train.py --help")) from None
    # runs are compared only if they have these flags and this source of the project
    same = {k: v for k, v in vars(settings).items() if k not in ("out", "resume")}
    sources = [variants.source(file) for file in variants.FILES]
    settings_key = project.train.digest(repr((sorted(same.items()), sources)))
    folder = Path("out-exercises") / settings_key
    # other code is another run: it does not go on where this one was stopped
    mark = project.train.digest(repr((args.only, work.files)))
    own, mine = folder / "project", f"{Path(args.folder).resolve().name}-{mark}"
    methods = project.train.methods_of(settings)
    if not all((own / method / "results.json").exists() for method in methods):
        print("\nthe project's own run:", flush=True)
        if code := train(project, ["--resume"] * ("--resume" not in flags), own):
            return code
    print("\nyours:", flush=True)
    if code := train(modules, [], folder / mine):
        return code
    print("\nside by side:")
    return project.train.main(["--show", str(own), str(folder / mine)])


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
