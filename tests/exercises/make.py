"""Begin an exercise, read its sheet, get a hint, see where you stand.

    python tests/exercises/make.py --list             # all exercises
    python tests/exercises/make.py --list mine        # done, failing, not begun
    python tests/exercises/make.py --watch mine       # the same again on every save
    python tests/exercises/make.py e05                # the sheet
    python tests/exercises/make.py e05 --to mine      # its file, one function emptied
    python tests/exercises/make.py e05 e08 --to mine  # several in one folder
    python tests/exercises/make.py e05 --hint 1       # direction; 2: plan; 3: almost it
"""

import argparse
import ast
import sys
import time
from contextlib import closing
from pathlib import Path

from kit import (
    Work,
    empty_function,
    exercise,
    exercises,
    explain,
    files_of,
    find,
    function_source,
    read_text,
    replace_function,
    results,
)
from variants import KitError, Parser, guarded, source


def stand(work, ex):
    """In a line where a student stands with an exercise, and what the first failing
    test says."""
    try:
        state = work.state(ex)
    except KitError as error:
        return "failing", f"{error}"
    if state != "written":
        return {"stub": "begun", "project": "untouched"}.get(state, "not begun"), ""
    with closing(work.modules(ex)) as modules:
        found = [error for _, error in results(ex, modules)]
    wrong = [error for error in found if error is not None]
    if not wrong:
        return "done", ""
    return f"failing: {len(wrong)} of {len(found)} tests", explain(wrong[0], ex)


def show_list(folder=""):
    work, minutes = Work.of_folder(folder) if folder else None, 0
    for ex in exercises().values():
        stars = "*" * ex.difficulty
        more = " (when you are done)" if ex.extra else ""
        where = f"  {stand(work, ex)[0]}" if folder else more
        print(f"{ex.id}  {stars:5s} {ex.minutes:3d} min  {ex.points:2d} points  "
              f"{ex.title}{where}", flush=True)
        minutes += ex.minutes
    print(f"{len(exercises())} exercises, {minutes / 60:.0f} hours in all; the order "
          "is a path, see README.md")


def watch(folder):
    """Grade what has changed, on every save, until Ctrl-C."""
    before, said = {}, {}
    print(f"watching {folder}; Ctrl-C ends it", flush=True)
    while True:
        times = {n: p.stat().st_mtime_ns for n, p in files_of(Path(folder)).items()}
        changed = {name for name in times if times[name] != before.get(name)}
        before, work = times, Work.of_folder(folder) if changed else None
        round_ = set()  # an error of a file is said once
        for ex in exercises().values() if changed else ():
            if changed.intersection(ex.files):
                now = stand(work, ex)
                new = now != said.get(ex.id) and now not in round_
                if new and now[0] not in ("not begun", "untouched"):
                    print(f"{ex.id}: {': '.join(filter(None, now))}", flush=True)
                said[ex.id] = now
                round_ |= {now} if now[0] == "failing" else set()
        time.sleep(0.5)


def show_sheet(ex):
    print(f"{ex.id}: {ex.title}\n")
    print(f"Goal: {ex.goal}")
    print(f"Paper: {ex.paper}")
    print(f"Write: {', '.join(ex.functions)}")
    print(f"Difficulty {ex.difficulty} of 5, about {ex.minutes} minutes, {ex.points} "
          f"points; runs {ex.run_time}.\n")
    print(ex.sheet.strip())


def bare_file(file, exs):
    """A new file: the imports of the project's, but for what is asked for."""
    title = f'"""Your part of {file}. All other names of {file} can be used in it."""'
    banned = {name.split(".")[-1] for ex in exs for name in ex.not_with}
    lines = [title, ""]
    for node in ast.parse(source(file)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [a for a in node.names if a.name not in banned]
            lines += [ast.unparse(node)] if node.names else []
    return "\n".join(lines) + "\n"


def with_helpers(text, file, name):
    """A function or class of the project, behind those helpers of extra.py that the
    text lacks."""
    own, parts = ast.parse(source(file)), [name]
    made = {n.name for n in own.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for part in parts if file == "extra.py" else ():
        used = {n.id for n in ast.walk(find(own, part)) if isinstance(n, ast.Name)}
        parts += sorted(used & made - set(parts))
    lacks = [n for n in reversed(parts) if find(ast.parse(text), n) is None]
    return "\n\n".join(function_source(source(file), n) for n in lacks)


def message_of(ex, name):
    return f"{ex.id}: {name} is yours to write"


def begin(exs, folder, force):
    """The files of these exercises with their functions emptied, {path: text}. Reads,
    writes nothing. Raises KitError if a function that was written would be lost."""
    texts, emptied, fresh = {}, [], set()
    there = files_of(folder) if folder.is_dir() else {}
    for ex in exs:
        for function in ex.functions:
            file, name = function.split()
            path = there.get(file, folder / file)
            if path not in texts:
                texts[path] = read_text(path) if file in there else bare_file(file, exs)
            text, own = texts[path], function_source(source(file), name)
            work = Work({file: (str(path), text)})
            state = work.state_of(file, name)
            outer = name.split(".")[0]
            if state == "missing" and find(work.trees[file], outer) is None:
                text = f"{text.rstrip()}\n\n\n{with_helpers(text, file, outer)}"
                fresh.add(outer)
            elif state == "missing":
                raise KitError(f"{path} has no {name}", "delete the file, begin again")
            elif state == "stub" and not force:
                continue
            elif force:
                text = replace_function(text, name, own)
            elif state == "written" and outer not in fresh:
                raise KitError(
                    f"{path} holds a {name} of yours; nothing was written",
                    "--force begins it again",
                )
            texts[path] = empty_function(text, name, message_of(ex, name))
            emptied.append(f"{path}: {name}")
    return texts, emptied


def main(argv):
    parser = Parser(
        prog="tests/exercises/make.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("ids", nargs="*", help="exercises: e01, e02, ...")
    parser.add_argument("--list", nargs="?", const="", metavar="FOLDER", help="all of "
                        "them; where you stand in a folder")
    parser.add_argument("--watch", metavar="FOLDER", help="grade it on every save")
    parser.add_argument("--to", metavar="FOLDER", help="write the file to fill in here")
    parser.add_argument("--force", action="store_true", help="begin again")
    parser.add_argument("--hint", type=int, choices=(1, 2, 3))
    args = parser.parse_args(argv)
    if args.watch:
        try:
            watch(args.watch)
        except KeyboardInterrupt:
            return 0
    if args.list is not None or not args.ids:
        show_list(args.list)
        return 0
    exs = [exercise(name) for name in args.ids]
    if args.hint:
        for ex in exs:
            print(ex.hints[args.hint - 1].strip("\n"))
        return 0
    if not args.to:
        for ex in exs:
            show_sheet(ex)
        return 0
    folder = Path(args.to)
    texts, emptied = begin(exs, folder, args.force)
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    for ex in exs:
        show_sheet(ex)
    print()
    print("\n".join(emptied) or f"nothing to do: {folder} has these stubs already")
    ids = " or ".join(dict.fromkeys(ex.id for ex in exs))
    ids = f'"{ids}"' if " " in ids else ids
    print(f"grade it: pytest tests/exercises -k {ids} --impl {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
