"""Begin an exercise, read its sheet, get a hint, see where you stand.

    python tests/exercises/make.py --list             # all exercises
    python tests/exercises/make.py --list mine        # done, failing, not begun
    python tests/exercises/make.py --watch mine       # the same again on every save
    python tests/exercises/make.py e05                # the sheet
    python tests/exercises/make.py e05 --to mine      # its file, one function emptied
    python tests/exercises/make.py e05 e08 --to mine  # several in one folder
    python tests/exercises/make.py e05 --hint 1       # direction; 2: plan; 3: almost it
"""

import ast
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import kit
from variants import FILES, KitError, Parser, guarded, source

STAND = {"missing": "not begun", "stub": "begun", "project": "untouched"}


def stand(work, ex):
    """In a line where a student stands with an exercise, and what the first failing
    test says."""
    try:
        state = work.state(ex)
    except KitError as error:
        return "failing", f"{error}"
    if state != "written":
        return STAND[state], ""
    with closing(work.modules(ex)) as modules:
        found = [error for _, error in kit.results(ex, modules)]
    wrong = [error for error in found if error is not None]
    if not wrong:
        return "done", ""
    return f"failing: {len(wrong)} of {len(found)} tests", kit.explain(wrong[0], ex)


def show_list(folder):
    work, exs = kit.Work.of_folder(folder) if folder else None, kit.exercises().values()
    for ex in exs:
        more = " (when you are done)" if ex.extra else ""
        where = f"  {stand(work, ex)[0]}" if work else more
        print(f"{ex.id}  {'*' * ex.difficulty:5s} {ex.minutes:3d} min  "
              f"{ex.points:2d} points  {ex.title}{where}", flush=True)
    print(f"{len(exs)} exercises, {sum(ex.minutes for ex in exs) / 60:.0f} hours in "
          "all; the order is a path, see README.md")


def watch(folder):
    """Grade what has changed, on every save, until Ctrl-C."""
    before, said = {}, {}
    print(f"watching {folder}; Ctrl-C ends it", flush=True)
    while True:
        work, told = kit.Work.of_folder(folder), set()
        for ex in kit.exercises().values():
            files = [work.files.get(file) for file in ex.files]
            if files == before.get(ex.id):
                continue
            before[ex.id], now = files, stand(work, ex)
            new = now != said.get(ex.id) and now not in told
            if new and now[0] not in ("not begun", "untouched"):
                print(f"{ex.id}: {': '.join(filter(None, now))}", flush=True)
            said[ex.id] = now
            if now[0] == "failing":  # an error of a file is said once
                told.add(now)
        time.sleep(0.5)


def show_sheet(ex):
    print(f"{ex.id}: {ex.title}\n\nGoal: {ex.goal}\nPaper: {ex.paper}")
    print(f"Write: {', '.join(ex.functions)}")
    print(f"Difficulty {ex.difficulty} of 5, about {ex.minutes} minutes, {ex.points} "
          f"points; runs {ex.run_time}.\n\n{ex.sheet.strip()}")


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
        used = {n.id for n in ast.walk(kit.find(own, part)) if isinstance(n, ast.Name)}
        parts += sorted(used & made - set(parts))
    lacks = [n for n in reversed(parts) if kit.find(ast.parse(text), n) is None]
    return "\n\n".join(kit.function_source(source(file), n) for n in lacks)


def begin(exs, folder, force):
    """Write the files of these exercises, their functions emptied. Nothing is written
    if that would lose a function of the student's."""
    texts, emptied, before = {}, [], {}
    there = kit.files_of(folder) if folder.is_dir() else {}
    for ex, file, name in [(x, *pair) for x in exs for pair in x.pairs]:
        path, outer = there.get(file, folder / file), name.split(".")[0]
        if path.resolve() == FILES[file] / file:
            raise KitError(f"{path} is the project's own", "--to mine, say")
        if path not in texts:
            texts[path] = kit.read_text(path) if file in there else bare_file(file, exs)
            before[path] = kit.Work({file: (str(path), texts[path])})
        state, text = before[path].state_of(file, name), texts[path]
        if state == "stub" and not force:
            continue
        if state == "written" and not force:
            why = f"{path} holds a {name} of yours; nothing was written"
            raise KitError(why, "--force begins it again")
        if state == "missing" and kit.find(before[path].trees[file], outer):
            raise KitError(f"{path} has no {name}", "delete the file, begin again")
        if kit.find(kit.parse(text), outer) is None:
            text = f"{text.rstrip()}\n\n\n{with_helpers(text, file, outer)}"
        stub = kit.stub_of(source(file), name, f"{ex.id}: {name} is yours to write")
        texts[path] = kit.replace_function(text, name, stub)
        emptied.append(f"{path}: {name}")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    for ex in exs:
        show_sheet(ex)
    ids = " or ".join(dict.fromkeys(ex.id for ex in exs))
    ids = f'"{ids}"' if " " in ids else ids
    print("", *emptied or [f"nothing to do: {folder} has these stubs already"],
          f"grade it: pytest tests/exercises -k {ids} --impl {folder}", sep="\n")


def main(argv):
    parser = Parser("tests/exercises/make.py", __doc__)
    parser.add_argument("ids", nargs="*", help="exercises: e01, e02, ...")
    parser.add_argument("--list", nargs="?", const="", metavar="FOLDER", help="all of "
                        "them; where you stand in a folder")
    parser.add_argument("--watch", metavar="FOLDER", help="grade it on every save")
    parser.add_argument("--to", metavar="FOLDER", help="write the file to fill in here")
    parser.add_argument("--force", action="store_true", help="begin again")
    parser.add_argument("--hint", type=int, choices=(1, 2, 3))
    args = parser.parse_args(argv)
    exs = [kit.exercise(name) for name in args.ids]
    if args.watch:
        with suppress(KeyboardInterrupt):
            watch(args.watch)
    elif args.list is not None or not exs:
        show_list(args.list)
    elif args.hint:
        for ex in exs:
            print(ex.hints[args.hint - 1].strip("\n"))
    elif args.to:
        begin(exs, Path(args.to), args.force)
    else:
        for ex in exs:
            show_sheet(ex)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
