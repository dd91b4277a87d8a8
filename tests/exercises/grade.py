"""Grade a folder of submissions into one table, for teachers.

    python tests/exercises/grade.py submissions --to grades.csv
    python tests/exercises/grade.py submissions --to grades.csv --only e05 e07 --seed 31
    python tests/exercises/grade.py submissions --to grades.csv --feedback pages

In `submissions` there is a folder or a zip file for each student, with the files that
make.py wrote. The table has a line for each student, written as soon as it is graded:
points in all, points for each exercise that anybody handed in (its maximum is in the
first line), what to look at, and what the graders said. All tests passed: all points;
some of them: a share, rounded down. --feedback writes a page for each student and a
results.json as Gradescope reads it.

This is for a class that you trust. Each exercise of each submission runs in a process
of its own, on a copy, with limits of time, memory and file size, so that a mistake
harms nobody else. Nothing here stops who wants to cheat or to do harm: grade strangers'
code in a container, see TEACHERS.md.
"""

import argparse
import csv
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import kit
from tqdm import tqdm
from variants import FILES, HERE, ROOT, KitError, Parser, guarded

SECONDS = 60  # for one exercise of one submission
LIMITS = {"DATA": 8 * 2**30, "FSIZE": 10**8, "CORE": 0}  # bytes


# ---- In a process of its own -------------------------------------------------------


def child(name, seed):
    """Grade one exercise of the submission in this folder, or with "" list all that are
    in it. A JSON object in a line for each thing that is known."""
    with suppress(ImportError):  # Windows has no such limits
        import resource

        for what, most in LIMITS.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a submission may print

    def tell(**what):
        print(json.dumps(what), file=out, flush=True)

    place, archive = Path("submission"), Path("submission.zip")
    if archive.exists():
        shutil.unpack_archive(archive, place)
    work = kit.Work.of_folder(place)
    if name:
        ex = kit.exercise(name)
        for test, error in kit.results(ex, work.modules(ex), seed):
            tell(test=test, said=error and kit.explain(error, ex))
        os._exit(0)  # whatever a submission still runs ends here
    for error in work.errors.values():
        tell(error=str(error))
    missing = []
    for ex in kit.exercises().values():
        if set(ex.files) & set(work.errors):
            continue
        state, text = work.state(ex), ""
        if state == "written":
            parts = [kit.find(work.trees[f], n) for f, n in map(str.split, ex.functions)]
            text = "".join(kit.shape_of(part, names=False) for part in parts)
            pairs = [function.split() for function in ex.functions]
            copied = all(work.is_copy(*pair, names=False) for pair in pairs)
            long = sum(len(list(kit.ast.walk(part))) for part in parts) > 150
            text = hashlib.sha256(text.encode()).hexdigest() if long else ""
            tell(id=ex.id, state=state, key="project" if copied else text)
        elif state == "missing":
            missing.append(work.instead(ex))
        else:
            tell(id=ex.id, state=state, key="")
    if not work.files:
        missing = [f"no file of an exercise; there is {work.others or 'nothing'}"]
    tell(missing=sorted({text for text in missing if ";" in text}))


def run_child(submission, name="", seed=0, seconds=SECONDS):
    """(What child told, how it ended if not well) about a submission, on a copy of it,
    of the project and of the graders."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        at, lines = Path(folder), []
        for path in [*(FILES[f] / f for f in FILES), ROOT / "tests" / "oracles.py",
                     *HERE.glob("*.py")]:  # fmt: skip
            to = at / "project" / path.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
        if submission.is_dir():
            for path in (p for p in submission.rglob("*") if p.is_file()):
                to = at / "submission" / path.relative_to(submission)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to) if path.suffix == ".py" else to.touch()
            (at / "submission").mkdir(exist_ok=True)
        else:
            shutil.copyfile(submission, at / "submission.zip")
        kept = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        env = {key: os.environ[key] for key in kept if key in os.environ}
        env |= dict.fromkeys(("HOME", "TMPDIR", "TEMP", "TMP"), folder)
        script = at / "project" / "tests" / "exercises" / "grade.py"
        process = subprocess.Popen(
            [sys.executable, str(script), "--child", name, str(seed)],
            cwd=at, env=env | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            encoding="utf-8", errors="replace", start_new_session=os.name != "nt",
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=seconds)
            ended = f"its process ended with {process.returncode}: {err[-200:]}"
        except subprocess.TimeoutExpired:
            ended = f"not done after {seconds} seconds"
        finally:
            with suppress(OSError, AttributeError):  # with all that it has started
                os.killpg(process.pid, 9)
            process.kill()
        if "not done" in ended:
            out = process.communicate()[0]
        for line in out.splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        return lines, ended if "not done" in ended or process.returncode else ""


# ---- In the teacher's process ------------------------------------------------------


def clean(text):
    """In one line, without what would move a terminal's cursor or turn its letters."""
    text = " ".join(str(text).split())
    return "".join(c for c in text if unicodedata.category(c)[0] != "C")


class Submission:
    def __init__(self, path, seconds):
        self.path, self.name = path, clean(path.stem if path.is_file() else path.name)
        self.points, self.said, self.look, self.pages = {}, [], [], {}
        told, ended = run_child(path, seconds=seconds)
        self.states = {x["id"]: x["state"] for x in told if "id" in x}
        self.keys = {x["id"]: x["key"] for x in told if x.get("key")}
        self.said += [clean(x["error"]) for x in told if "error" in x]
        missing = [text for x in told for text in x.get("missing", ())]
        self.said += [clean(text) for text in [*missing, ended] if text]

    def grade(self, ex, seed, seconds):
        """Points, a remark, and a page of the feedback, for one exercise."""
        tests, state = list(kit.graders(ex)), self.states[ex.id]
        if state != "written":
            why = {"stub": "not written yet", "project": "the project's own text"}
            self.points[ex.id], self.pages[ex.id] = 0, why[state]
            return self.said.append(f"{ex.id}: {why[state]}")
        told, ended = run_child(self.path, ex.id, seed, seconds)
        said = {x["test"]: x["said"] for x in told if "test" in x}
        wrong = {t: said.get(t, f"no result: {ended}") for t in tests}
        wrong = {t: text for t, text in wrong.items() if text is not None}
        n = len(tests) - len(wrong)
        self.points[ex.id] = ex.points * n // len(tests)
        lines = [f"{t.replace('_', ' ')[5:]}: {clean(wrong.get(t, 'passed'))}"
                 for t in tests]  # fmt: skip
        self.pages[ex.id] = "\n".join(lines + [ex.hint_line] * bool(wrong))
        for text in list(wrong.values())[:1]:
            quoted = clean(text).replace('"', "'")[:300]
            self.said.append(f'{ex.id}: {n} of {len(tests)}: "{quoted}"')

    def line(self, exs):
        points = {title(ex): self.points.get(ex.id, 0) for ex in exs}
        return {"submission": self.name, "points": sum(points.values()), **points,
                "look at": " | ".join(self.look), "remarks": " | ".join(self.said)}

    def write_feedback(self, folder, exs):
        """A page to read, and one for Gradescope."""
        total = f"{sum(self.points.values())} of {sum(ex.points for ex in exs)} points"
        parts, tests = [f"{self.name}: {total}", *self.said], []
        for ex in (ex for ex in exs if ex.id in self.points):
            got, page = self.points[ex.id], self.pages[ex.id]
            parts.append(f"\n{ex.id}, {ex.title}: {got} of {ex.points}\n{page}")
            tests.append({"name": ex.id, "score": got, "max_score": ex.points,
                          "output": page})  # fmt: skip
        place = folder / self.path.stem
        place.mkdir(parents=True, exist_ok=True)
        (place / "feedback.txt").write_text("\n".join(parts) + "\n", encoding="utf-8")
        (place / "results.json").write_text(json.dumps({"tests": tests}, indent=1))


def title(ex):
    return f"{ex.id} ({ex.points})"


def name_copies(submissions):
    """Whose function is the project's or somebody else's, but for its names."""
    whose = defaultdict(list)
    for each in submissions:
        for pair in each.keys.items():
            whose[pair].append(each)
    for (name, key), group in whose.items():
        for each in group:
            others = ["the project"] if key == "project" else [
                x.name for x in group if x is not each]  # fmt: skip
            if others:
                each.look.append(f"{name} is that of {', '.join(others)}")


def cell(x):
    """A spreadsheet takes some texts for formulas: a ' in front of them."""
    return f"'{x}" if isinstance(x, str) and x[:1] in tuple("=+-@") else x


def main(argv):
    if argv[:1] == ["--child"]:
        return child(argv[1], int(argv[2]))
    parser = Parser(
        prog="tests/exercises/grade.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("submissions", help="a folder with one for each student")
    parser.add_argument("--to", required=True, metavar="FILE.csv")
    parser.add_argument("--feedback", metavar="FOLDER", help="a page for each student")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these exercises")
    parser.add_argument("--seed", type=int, default=0, help="of the graders' inputs")
    parser.add_argument("--seconds", type=int, default=SECONDS,
                        help="for one exercise of one submission (default: 60)")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (default: 2)")
    args = parser.parse_args(argv)
    exs = [kit.exercise(name) for name in args.only or kit.exercises()]
    if not Path(args.submissions).is_dir():
        raise KitError(f"{args.submissions}: no such folder", "one for each student")
    found = sorted(p for p in Path(args.submissions).iterdir() if p.name[0] not in "._")
    places = [p for p in found if p.is_dir() or p.suffix == ".zip"]
    if not places:
        raise KitError(f"{args.submissions} has neither folders nor zip files in it",
                       "one for each student")  # fmt: skip
    for path in found:
        if path not in places:
            print(f"left out: {clean(path.name)}")
    with ThreadPoolExecutor(args.jobs) as pool, open(
        args.to, "w", newline="", encoding="utf-8"
    ) as file:
        try:
            bar = functools.partial(tqdm, disable=None, leave=False)
            read = pool.map(lambda p: Submission(p, args.seconds), places)
            submissions = list(bar(read, total=len(places), desc="reading"))
            name_copies(submissions)
            exs = [ex for ex in exs if any(ex.id in x.states for x in submissions)]

            def grade(each):
                for ex in exs:
                    if ex.id in each.states:
                        each.grade(ex, args.seed, args.seconds)
                return each

            writer = csv.DictWriter(file, list(submissions[0].line(exs)))
            writer.writeheader()
            jobs = [pool.submit(grade, each) for each in submissions]
            for job in bar(as_completed(jobs), total=len(jobs), desc="grading"):
                line = job.result().line(exs)
                writer.writerow({k: cell(v) for k, v in line.items()})
                file.flush()
                remarks = " | ".join(filter(None, (line["look at"], line["remarks"])))
                tqdm.write(f"{line['submission']:20s} {line['points']:3d}  {remarks}")
                if args.feedback:
                    job.result().write_feedback(Path(args.feedback), exs)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    print(f"{len(submissions)} submissions: {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
