"""Grade a folder of submissions into one table, for teachers.

    python tests/exercises/grade.py submissions --to grades.csv
    python tests/exercises/grade.py submissions --to grades.csv --only e05 e07 --seed 31

Each folder in `submissions` is one student's, with the files that make.py wrote. The
table has a line for each: points in all, points for each exercise, and what the graders
said. An exercise gives its points for all of its tests, and a share for some of them.

What a submission can do. All of them are read before the first one runs. Of a file,
only the exercise's function is taken, with new helpers, imports and constants. It runs
in a process of its own for each exercise, with a time limit, in a fresh copy of project
and graders, where an audit hook forbids processes, sockets, tracing and files
elsewhere. Afterwards the process looks whether torch, builtins and the graders are what
they were, and whether a wrong solution is still rejected. No process of Python's own is
a prison: for strangers' code, run this in a container. A remark that begins with "!"
wants a teacher's eye.
"""

import argparse
import ast
import builtins
import csv
import functools
import importlib
import inspect
import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kit
from variants import FILES, HERE, ROOT, KitError, Modules, Parser, guarded, source

SECONDS = 60  # for one exercise of one submission
BYTES = 10**6  # of one file

# ---- In the process of one exercise of one submission ------------------------------

FORBIDDEN = (
    "ctypes.", "gc.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.putenv",
    "os.spawn", "os.startfile", "os.system", "pty.", "signal.", "socket.",
    "subprocess.", "sys.set", "urllib.", "_winapi.CreateProcess", "winreg.",
)  # fmt: skip
CHANGES = (
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.symlink", "os.truncate", "os.utime", "shutil.",
)  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install_hook(folder, hidden):
    """Forbid processes, sockets, writing outside of `folder` and any look into
    `hidden`, for the rest of this process. Returns the list of what was tried."""
    folder, hidden = os.path.realpath(folder), os.path.realpath(hidden)
    tried = []

    def inside(path, where):
        if isinstance(path, int):
            return False
        path = os.path.realpath(os.fsdecode(path))
        return path == where or path.startswith(where + os.sep)

    def hook(event, args):
        if event.startswith(FORBIDDEN):
            tried.append(event)
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, mode, flags = args
            if path is None or path == os.devnull:
                return
            if inside(path, hidden) and not inside(path, folder):
                tried.append(f"open {path}")
                raise PermissionError("other submissions are closed")
            writes = flags & WRITES if flags else set(mode or "r") & set("wax+")
            if writes and not inside(path, folder):
                tried.append(f"write {path}")
                raise PermissionError(f"writing to {path} is not allowed here")
        elif event.startswith(CHANGES):
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, str | bytes) and not inside(path, folder):
                    tried.append(f"{event} {path}")
                    raise PermissionError(f"{event} is not allowed here")
        elif event in ("os.listdir", "os.scandir"):
            path = args[0] if args and args[0] is not None else "."
            if inside(path, hidden) and not inside(path, folder):
                tried.append(f"{event} {path}")
                raise PermissionError("other submissions are closed")

    sys.addaudithook(hook)
    return tried


def watched(ex):
    """{name: object} of what a submission has no business to change."""
    import torch

    own = [kit, importlib.import_module("oracles")]
    own += [sys.modules["variants"], sys.modules[__name__]]
    own.append(sys.modules[next(iter(kit.graders(ex).values())).__module__])
    found = {}
    libraries = [
        builtins, torch, torch.nn, torch.nn.functional, torch.autograd, torch.linalg,
        torch.testing, math, functools, inspect, json, os, tempfile,
    ]  # fmt: skip
    for module in libraries + own:
        for name, value in list(vars(module).items()):
            if callable(value) or module in own[:1] + own[2:]:
                found[f"{module.__name__}.{name}"] = value
            if module in own and isinstance(value, types.FunctionType):
                for part in ("__code__", "__defaults__", "__kwdefaults__"):
                    found[f"{module.__name__}.{name}.{part}"] = getattr(value, part)
    for cls in (torch.Tensor, torch.nn.Module, torch.nn.Parameter, torch.Generator):
        for name, value in vars(cls).items():
            found[f"torch.{cls.__name__}.{name}"] = value
    return found


def changed_names(before, after):
    """What is another object now, or gone; and what was added to torch's classes."""
    new = [name for name in after if name not in before]
    return [
        *[name for name, x in before.items() if after.get(name) is not x],
        *[name for name in new if name.split(".")[1] in ("Tensor", "Module")],
    ]


PLAIN = (bool, int, float, complex, str, bytes, type(None))


def is_plain(x, classes):
    """Is it made of plain values, tensors and the project's own classes alone? An
    object of a submission's own could equal everything."""
    import torch

    kind = type(x)
    if kind in PLAIN or kind in (torch.Tensor, torch.nn.Parameter, torch.Size):
        return True
    if isinstance(x, torch.dtype | torch.device | Path):
        return True
    if kind in (list, tuple, set, frozenset):
        return all(is_plain(each, classes) for each in x)
    if kind is dict:
        return all(is_plain(v, classes) for pair in x.items() for v in pair)
    return kind.__qualname__ in classes and kind.__module__.split("_")[0] in {
        file.removesuffix(".py") for file in FILES
    }


def guard(function, classes, tried):
    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if not is_plain(result, classes):
            tried.append(f"returned a {type(result).__name__}")
            raise TypeError(f"{function.__name__} returned a {type(result).__name__}")
        return result

    return call


def child():
    """Grade what stdin says; one line of JSON, with stdin's token, is the result."""
    task = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    tempfile.tempdir = task["folder"]
    limit_resources(task["seconds"])
    ex = kit.exercise(task["id"])
    kit.graders(ex)  # and with them torch and oracles
    reference = Modules()
    for file in FILES:  # whatever they import is imported before the hook
        getattr(reference, file.removesuffix(".py"))
    for _ in kit.results(ex, reference, task["seed"]):
        pass
    classes = {
        name for file in FILES for node in kit.parse(source(file)).body
        if isinstance(node, ast.ClassDef) for name in kit.bound_names(node)
    }  # fmt: skip
    before = watched(ex)
    token = task.pop("token")
    tried = install_hook(task["folder"], task["hidden"])

    work = kit.Work({f: (f, text) for f, text in task["files"].items()})

    def after(file, module):
        work.put_over([ex], file, module)
        for name in ex.names_in(file):
            if "." not in name:
                setattr(module, name, guard(vars(module)[name], classes, tried))

    results = {}
    for name, error in kit.results(ex, Modules(after=after), task["seed"]):
        results[name] = None if error is None else kit.explain(error, ex)
    changed = changed_names(before, watched(ex))
    blind = None
    if ex.mutants and not changed:
        name, changes, message = ex.mutants[0]
        wrong = kit.work_of(ex, changes).modules(ex)
        said = [kit.explain(e, ex) for _, e in kit.results(ex, wrong) if e is not None]
        if not any(message in " ".join(text.split()) for text in said):
            blind = name
    trouble = list(tried)
    trouble += [f"changed {name}" for name in changed]
    trouble += [f"graders no longer reject {blind!r}"] if blind else []
    json.dump({"token": token, "results": results, "trouble": trouble[:20]}, out)
    out.flush()
    os._exit(0)  # whatever a submission wants to do at the end, it does not


def limit_resources(seconds):
    try:
        import resource
    except ImportError:  # Windows
        return
    wanted = {"RLIMIT_CPU": 2 * seconds, "RLIMIT_FSIZE": 10**8, "RLIMIT_CORE": 0,
              "RLIMIT_DATA": 8 * 2**30}  # fmt: skip
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            pass


# ---- In the teacher's process ------------------------------------------------------


def read_submissions(folder):
    """{student: {file: text}}, read at once, so that nothing can change them later."""
    folder = Path(folder)
    if not folder.is_dir():
        raise KitError(f"{folder}: no such folder", "one folder for each student")
    found = {}
    for place in sorted(folder.iterdir()):
        if not place.is_dir():
            continue
        found[place.name] = {}
        for file in FILES:
            path = place / file
            if path.is_file() and path.stat().st_size <= BYTES:
                text = path.read_text(encoding="utf-8", errors="replace")
                found[place.name][file] = text
    if not found:
        raise KitError(f"{folder} has no folders in it", "one folder for each student")
    return found


def read_kit():
    """The project and the graders, {path: bytes}: each process gets a fresh copy."""
    paths = [FILES[file] / file for file in FILES] + [ROOT / "tests" / "oracles.py"]
    paths += HERE.glob("*.py")
    return {str(p.relative_to(ROOT)): p.read_bytes() for p in dict.fromkeys(paths)}


def kill(process):
    """The process and all that it started."""
    if os.name == "nt":
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False)
    else:
        try:
            os.killpg(process.pid, 9)
        except (ProcessLookupError, PermissionError):
            pass
    process.kill()


def run_child(files, ex, content, hidden, seed, seconds):
    """{test: message or None} and what was tried, or raises KitError."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        for path, text in content.items():
            at = folder / "project" / path
            at.parent.mkdir(parents=True, exist_ok=True)
            at.write_bytes(text)
        work = folder / "work"
        work.mkdir()
        token = secrets.token_hex(16)
        task = {"id": ex.id, "files": files, "folder": str(work), "seed": seed,
                "hidden": str(Path(hidden).resolve()), "token": token,
                "seconds": seconds}  # fmt: skip
        kept = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        env = {name: os.environ[name] for name in kept if name in os.environ}
        env |= {"OMP_NUM_THREADS": "1", "HOME": str(work), "TMPDIR": str(work),
                "TEMP": str(work), "TMP": str(work)}  # fmt: skip
        script = folder / "project" / "tests" / "exercises" / "grade.py"
        process = subprocess.Popen(
            [sys.executable, "-E", "-s", "-B", str(script), "--child"],
            cwd=work, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=os.name != "nt",
        )  # fmt: skip
        try:
            said, _ = process.communicate(json.dumps(task).encode(), seconds)
        except subprocess.TimeoutExpired:
            raise KitError(f"not done after {seconds} seconds", "") from None
        finally:
            kill(process)
            try:
                process.communicate(timeout=10)
            except (subprocess.TimeoutExpired, ValueError):
                pass
        try:
            answer = json.loads(said)
            if not secrets.compare_digest(answer["token"], token):
                raise ValueError
            return answer["results"], answer["trouble"]
        except (ValueError, KeyError, TypeError):
            code = process.returncode
            raise KitError(f"its process ended with {code} and no result", "") from None


def grade_one(files, ex, content, hidden, seed=0, seconds=SECONDS):
    """Points and a remark for one exercise of one submission."""
    try:
        work = kit.Work({file: (file, text) for file, text in files.items()})
    except KitError as error:
        return 0, f"{error}"
    state = work.state(ex)
    if state == "project":
        return 0, "! the project's own text"
    if state == "missing":
        return 0, ""
    if state == "stub":
        return 0, "not written"
    mine = {file: files[file] for file in ex.files}
    try:
        results, trouble = run_child(mine, ex, content, hidden, seed, seconds)
    except KitError as error:
        return 0, f"! {error}"
    if trouble:
        return 0, f"! {'; '.join(trouble)}"
    names = list(kit.graders(ex))
    wrong = [results.get(name, "no result") for name in names]
    wrong = [" ".join(text.split()) for text in wrong if text is not None]
    passed = len(names) - len(wrong)
    points = ex.points * passed // len(names) if wrong else ex.points
    remark = f"{passed} of {len(names)}: {wrong[0]}" if wrong else ""
    return points, remark[:300]


def grade_all(submissions, exs, hidden, seed, seconds, jobs):
    """A line for each submission, as a dict."""
    content = read_kit()
    pairs = [(student, ex) for student in submissions for ex in exs]

    def work(pair):
        student, ex = pair
        return grade_one(submissions[student], ex, content, hidden, seed, seconds)

    with ThreadPoolExecutor(jobs) as pool:
        graded = dict(zip(pairs, pool.map(work, pairs), strict=True))
    lines = []
    for student in submissions:
        points = {ex.id: graded[student, ex][0] for ex in exs}
        said = [(ex.id, graded[student, ex][1]) for ex in exs]
        remarks = [f"{name}: {text}" for name, text in said if text]
        lines.append({
            "submission": student, "points": sum(points.values()), **points,
            "remarks": " | ".join(remarks),
        })  # fmt: skip
    return lines


def write_table(path, lines):
    """A CSV. A cell that a spreadsheet would take for a formula gets a ' in front."""
    def cell(x):
        return f"'{x}" if isinstance(x, str) and x[:1] in tuple("=+-@\t\r") else x

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({k: cell(v) for k, v in line.items()} for line in lines)


def main(argv):
    if argv == ["--child"]:
        return child()
    parser = Parser(
        prog="tests/exercises/grade.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("submissions", help="a folder with one for each student")
    parser.add_argument("--to", required=True, metavar="FILE.csv")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these exercises")
    parser.add_argument("--seed", type=int, default=0, help="of the graders' inputs")
    parser.add_argument("--seconds", type=int, default=SECONDS,
                        help="for one exercise of one submission (default: 60)")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (default: 2)")
    args = parser.parse_args(argv)
    names = args.only or list(kit.exercises())
    exs = [kit.exercise(name) for name in names]
    for ex in exs:
        kit.graders(ex)
    submissions = read_submissions(args.submissions)
    lines = grade_all(
        submissions, exs, args.submissions, args.seed, args.seconds, args.jobs
    )
    write_table(args.to, lines)
    for line in lines:
        print(f"{line['submission']:20s} {line['points']:3d}  {line['remarks']}")
    print(f"{len(lines)} submissions: {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
