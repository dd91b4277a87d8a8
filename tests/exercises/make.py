"""Begin an exercise, read its sheet, get a hint.

    python tests/exercises/make.py --list
    python tests/exercises/make.py e05                # the sheet
    python tests/exercises/make.py e05 --to mine      # the file, one function emptied
    python tests/exercises/make.py e05 e08 --to mine  # several in one folder
    python tests/exercises/make.py e05 --hint 1       # direction; 2: plan; 3: almost it
"""

import argparse
import ast
import sys
from pathlib import Path

from kit import (
    Work,
    empty_function,
    exercise,
    exercises,
    find,
    first_line,
    function_source,
    is_stub,
    replace_function,
)
from variants import KitError, Parser, guarded, source


def show_list():
    minutes = 0
    for ex in exercises().values():
        stars = "*" * ex.difficulty
        more = " (when you are done)" if ex.extra else ""
        print(f"{ex.id}  {stars:5s} {ex.minutes:3d} min  {ex.points:2d} points  "
              f"{ex.title}{more}")
        minutes += ex.minutes
    print(f"{len(exercises())} exercises, {minutes / 60:.0f} hours in all; the order "
          "is a path, see README.md")


def show_sheet(ex):
    print(f"{ex.id}: {ex.title}\n")
    print(f"Goal: {ex.goal}")
    print(f"Paper: {ex.paper}")
    print(f"Write: {', '.join(ex.functions)}")
    print(f"Difficulty {ex.difficulty} of 5, about {ex.minutes} minutes, {ex.points} "
          f"points; runs {ex.run_time}.\n")
    print(ex.sheet.strip())


def definitions(text):
    """{name: source} of the functions and classes of a file."""
    lines, found = text.splitlines(True), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = "".join(lines[first_line(node) : node.end_lineno])
    return found


def bare_file(file):
    """The project's text of a file; of extra.py, which holds nothing but solutions,
    what stands above the first of them."""
    text = source(file)
    if file == "extra.py":
        for part in definitions(text).values():
            text = text.replace(part, "")
        text = text.strip("\n") + "\n"
    return text


def with_helpers(text, name):
    """A function of extra.py, behind those helpers of it that the text lacks."""
    own, parts = definitions(source("extra.py")), [name]
    for part in parts:
        used = {n.id for n in ast.walk(ast.parse(own[part])) if isinstance(n, ast.Name)}
        parts += [n for n in own if n in used and n not in parts]
    has = definitions(text)
    return "\n\n".join(own[n] for n in reversed(parts) if n not in has)


def message_of(ex, name):
    return f"{ex.id}: {name} is yours to write"


def begin(exs, folder, force):
    """The files of these exercises with their functions emptied, {path: text}. Reads,
    writes nothing. Raises KitError if a function that was written would be lost."""
    texts, emptied = {}, []
    for ex in exs:
        for function in ex.functions:
            file, name = function.split()
            path = folder / file
            if path not in texts:
                texts[path] = bare_file(file)
                if path.is_file():
                    Work.of_folder(folder)  # can it be read?
                    texts[path] = path.read_text(encoding="utf-8")
            text, own = texts[path], function_source(source(file), name)
            node = find(ast.parse(text), name)
            if node is None and "." not in name:
                text = f"{text.rstrip()}\n\n\n{with_helpers(text, name)}"
            elif node is None:
                raise KitError(f"{path} has no {name}", "delete the file, begin again")
            elif is_stub(node) and not force:
                continue
            elif force:
                text = replace_function(text, name, own)
            elif Work({file: (str(path), text)}).state_of(file, name) != "project":
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
    parser.add_argument("--list", action="store_true", help="all exercises")
    parser.add_argument("--to", metavar="FOLDER", help="write the file to fill in here")
    parser.add_argument("--force", action="store_true", help="begin again")
    parser.add_argument("--hint", type=int, choices=(1, 2, 3))
    args = parser.parse_args(argv)
    if args.list or not args.ids:
        show_list()
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
