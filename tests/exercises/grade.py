"""Grade a folder of submissions into one table, for teachers.

    python tests/exercises/grade.py submissions --to grades.csv
    python tests/exercises/grade.py submissions --to grades.csv --only e05 e07 --seed 31
    python tests/exercises/grade.py submissions --to grades.csv --feedback pages

In `submissions` there is a folder or a zip file for each student, with the files that
make.py wrote. Each student gets a line of the table as soon as it is known: points in
all and for each exercise that anybody handed in (the first line has the maxima), what
to look at, and what the graders said. All tests: all points; some: a share, rounded
down. --feedback writes a page for each student, and results.json for Gradescope.

This is for a class that you trust. Each exercise of each submission runs in a process
of its own, on a copy, with limits of time, memory and file size: a mistake harms nobody
else. It does not stop anyone who wants to cheat or to do harm: grade strangers' code in
a container, see TEACHERS.md.
"""

import argparse
import csv
import functools
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
    """Grade one exercise of the submission in this folder, or for "" see which ones are
    in it. What is found goes out as lines of JSON, so that it stays if this ends."""
    with suppress(ImportError):  # Windows has no such limits
        import resource

        for what, most in LIMITS.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a submission may print

    def tell(**what):
        print(json.dumps(what), file=out, flush=True)

    if Path("submission.zip").exists():
        shutil.unpack_archive("submission.zip", "submission")
    work = kit.Work.of_folder("submission")
    if name:
        ex = kit.exercise(name)
        for test, error in kit.results(ex, work.modules(ex), seed):
            tell(test=test, said=error and kit.explain(error, ex))
        os._exit(0)  # and with it whatever a submission still runs
    for error in work.errors.values():
        tell(note=str(error))
    if not work.files:
        tell(note=f"no file of an exercise; there is {work.others or 'nothing'}")
    untouched = []
    for ex in kit.exercises().values():
        state = "" if set(ex.files) & set(work.errors) else work.state(ex)
        untouched += [ex.id] if state == "project" else []
        if state == "missing" and ";" in (instead := work.instead(ex)):
            tell(note=instead)
        elif state in ("stub", "written"):
            tell(id=ex.id, state=state, like=work.fingerprint(ex))
    if untouched:
        tell(note=f"the project's own text: {' '.join(untouched)}")


def run_child(submission, name="", seed=0, seconds=SECONDS):
    """What child tells about a copy of a submission, and how it ended if not well."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        at = Path(folder)
        needed = [FILES[f] / f for f in FILES] + [ROOT / "tests" / "oracles.py"]
        pairs = {p: at / "project" / p.relative_to(ROOT)
                 for p in [*needed, *HERE.glob("*.py")]}  # fmt: skip
        if submission.is_dir():
            pairs |= {p: at / "submission" / p.relative_to(submission)
                      for p in submission.rglob("*") if p.is_file()}  # fmt: skip
        else:
            pairs[submission] = at / "submission.zip"
        (at / "submission").mkdir()
        for path, to in pairs.items():
            to.parent.mkdir(parents=True, exist_ok=True)
            if to.suffix in (".py", ".zip"):
                shutil.copyfile(path, to)
            else:  # its name is all that counts
                to.touch()
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
            code = process.returncode
            ended = f"its process ended with {code}: {err[-200:]}" if code else ""
        except subprocess.TimeoutExpired:
            out, ended = None, f"not done after {seconds} seconds"
        finally:
            with suppress(OSError, AttributeError):  # with all that it has started
                os.killpg(process.pid, 9)
            process.kill()
        lines, out = [], process.communicate()[0] if out is None else out
        for line in out.splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        return lines, ended


# ---- In the teacher's process ------------------------------------------------------


def clean(text):
    """In one line, without what moves a terminal's cursor or turns its letters."""
    text = " ".join(str(text).split())
    return "".join(c for c in text if unicodedata.category(c)[0] != "C")


class Submission:
    def __init__(self, seconds, path):
        self.path, self.name = path, clean(path.stem if path.is_file() else path.name)
        self.points, self.pages, self.look = {}, {}, []
        told, ended = run_child(path, seconds=seconds)
        self.found = {x["id"]: x for x in told if "id" in x}
        notes = [x["note"] for x in told if "note" in x]
        self.said = [clean(text) for text in [*notes, ended] if text]

    def grade(self, exs, seed, seconds):
        for ex in (ex for ex in exs if ex.id in self.found):
            state, tests = self.found[ex.id]["state"], list(kit.graders(ex))
            if state == "stub":
                self.points[ex.id], self.pages[ex.id] = 0, "not written yet"
                self.said.append(f"{ex.id}: not written yet")
                continue
            told, ended = run_child(self.path, ex.id, seed, seconds)
            said = dict.fromkeys(tests, f"no result, {ended}")
            said |= {x["test"]: x["said"] for x in told if "test" in x}
            said = {test: text and clean(text) for test, text in said.items()}
            wrong = [text for text in said.values() if text]
            passed = len(tests) - len(wrong)
            self.points[ex.id] = ex.points * passed // len(tests)
            page = [f"{test[5:].replace('_', ' ')}: {text or 'passed'}"
                    for test, text in said.items()]  # fmt: skip
            self.pages[ex.id] = "\n".join(page + [ex.hint_line] * bool(wrong))
            if wrong:  # in quotes: a submission may choose the words
                words = wrong[0].replace('"', "'")[:300]
                self.said.append(f'{ex.id}: {passed} of {len(tests)}: "{words}"')
        return self

    def line(self, exs):
        points = {f"{ex.id} ({ex.points})": self.points.get(ex.id, 0) for ex in exs}
        return {"submission": self.name, "points": sum(points.values()), **points,
                "look at": " | ".join(self.look), "remarks": " | ".join(self.said)}

    def write(self, folder, exs):
        """The student's page, and the file of Gradescope."""
        total = f"{sum(self.points.values())} of {sum(ex.points for ex in exs)} points"
        page, tests, folder = [f"{self.name}: {total}"], [], folder / self.path.stem
        for ex in (ex for ex in exs if ex.id in self.points):
            got, output = self.points[ex.id], self.pages[ex.id]
            page.append(f"\n{ex.id}, {ex.title}: {got} of {ex.points}\n{output}")
            tests.append({"name": ex.id, "score": got, "max_score": ex.points,
                          "output": output})  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join([*page, "", *self.said])
        (folder / "feedback.txt").write_text(f"{text}\n", encoding="utf-8")
        (folder / "results.json").write_text(json.dumps({"tests": tests}, indent=1))


def name_copies(submissions):
    """Whose function is the project's or somebody else's, but for its names."""
    whose = defaultdict(list)
    for each in submissions:
        for x in each.found.values():
            if x["state"] == "written" and x["like"]:
                whose[x["id"], x["like"]].append(each)
    for (name, like), group in whose.items():
        for each in group:
            others = [x.name for x in group if x is not each]
            others = ["the project"] * (like == "project") or others
            each.look += [f"{name} is that of {', '.join(others)}"] * bool(others)


def cell(x):
    """A spreadsheet takes some texts for formulas: a ' in front of them."""
    return f"'{x}" if isinstance(x, str) and x[:1] in tuple("=+-@") else x


def grade_all(args, exs, places):
    """The lines of the table, each written when it is known."""
    bar = functools.partial(tqdm, total=len(places), disable=None, leave=False)
    with ThreadPoolExecutor(args.jobs) as pool, open(
        args.to, "w", newline="", encoding="utf-8"
    ) as file:
        read = pool.map(functools.partial(Submission, args.seconds), places)
        submissions = list(bar(read, desc="reading"))
        name_copies(submissions)
        exs = [ex for ex in exs if any(ex.id in x.found for x in submissions)]
        writer = csv.DictWriter(file, list(submissions[0].line(exs)))
        writer.writeheader()
        jobs = [pool.submit(x.grade, exs, args.seed, args.seconds) for x in submissions]
        try:
            for job in bar(as_completed(jobs), desc="grading"):
                line = job.result().line(exs)
                writer.writerow({key: cell(x) for key, x in line.items()})
                file.flush()
                notes = [line[key] for key in ("look at", "remarks") if line[key]]
                tqdm.write(f"{line['submission']:20s} {line['points']:3d}  "
                           f"{' | '.join(notes)}")  # fmt: skip
                if args.feedback:
                    job.result().write(Path(args.feedback), exs)
        except KeyboardInterrupt:
            print(f"stopped, as soon as what runs is done; {args.to} has the others")
            pool.shutdown(cancel_futures=True)
            return 130
    print(f"{len(submissions)} submissions: {args.to}")
    return 0


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
    folder = Path(args.submissions)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [p for p in found if p.name[0] not in "._"]
    places = [p for p in found if p.is_dir() or p.suffix == ".zip"]
    if not places:
        what = "has neither folders nor zip files" if found else "holds no submission"
        raise KitError(f"{folder} {what}", "one folder or zip file for each student")
    for path in (p for p in found if p not in places):
        print(f"left out: {clean(path.name)}")
    return grade_all(args, exs, places)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
