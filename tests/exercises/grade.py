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

import csv
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import kit
from tqdm import tqdm
from variants import KitError, Parser, guarded

LIMITS = {"DATA": 8 * 2**30, "FSIZE": 10**8, "CORE": 0}  # bytes

# ---- In a process of its own -------------------------------------------------------


def child(name, seed):
    """Grade one exercise of the submission in this folder, or for "" see what is in it.
    Each result goes out as a line of JSON, so that it stays if this process ends."""
    with suppress(ImportError):  # Windows has no such limits
        import resource

        for what, most in LIMITS.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))
    if Path("submission.zip").exists():
        shutil.unpack_archive("submission.zip", "submission")
    work = kit.Work.of_folder("submission")
    with open("told", "w", encoding="utf-8") as file:
        for line in results(work, kit.exercise(name), seed) if name else read(work):
            print(json.dumps(line), file=file, flush=True)
    os._exit(0)  # and with it whatever a submission still runs


def results(work, ex, seed):
    """(test, None or what it said) of an exercise."""
    for test, error in kit.results(ex, work.modules(ex), seed):
        yield test, error and kit.explain(error, ex)


def read(work):
    """(id, (state, fingerprint)) of what is begun in a submission; ("", notes)."""
    notes, untouched = [str(error) for error in work.errors.values()], []
    if not work.files:
        notes.append(f"no file of an exercise; there is {work.others or 'nothing'}")
    for ex in kit.exercises().values():
        if set(ex.files) & set(work.errors):
            continue
        state = work.state(ex)
        if state == "project":
            untouched.append(ex.id)
        elif state != "missing":
            yield ex.id, (state, work.fingerprint(ex))
        elif ";" in (instead := work.instead(ex)):
            notes.append(instead)
    if untouched:
        notes.append(f"the project's own text: {' '.join(untouched)}")
    yield "", notes


# ---- In the teacher's process ------------------------------------------------------


def run_child(path, name, seed, seconds):
    """What child tells of a copy of a submission, a dict, and how its process ended if
    not well."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        pairs = {path: Path(place, "submission.zip")}
        if path.is_dir():
            pairs = {file: Path(place, "submission", file.relative_to(path))
                     for file in path.rglob("*") if file.is_file()}  # fmt: skip
        Path(place, "submission").mkdir()
        for file, to in pairs.items():
            to.parent.mkdir(parents=True, exist_ok=True)
            if to.suffix in (".py", ".zip"):
                shutil.copyfile(file, to)
            else:  # its name is all that counts
                to.touch()
        kept = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        env = {key: os.environ[key] for key in kept if key in os.environ}
        env |= dict.fromkeys(("HOME", "TMPDIR", "TEMP", "TMP"), place)
        told, errors = Path(place, "told"), Path(place, "errors")
        told.touch()
        with open(errors, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, __file__, "--child", name, str(seed)], cwd=place,
                env=env | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=file, start_new_session=True,
            )  # fmt: skip
        try:
            code = process.wait(seconds)
            said = errors.read_text("utf-8", "replace")[-200:]
            ended = f"its process ended with {code}: {said}" if code else ""
        except subprocess.TimeoutExpired:
            ended = f"not done after {seconds} seconds"
        finally:
            with suppress(OSError, AttributeError):  # with all that it has started
                os.killpg(process.pid, 9)
            process.kill()
        process.wait()
        found = {}
        for line in told.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError):
                key, what = json.loads(line)
                found[key] = what
        return found, ended


def clean(text):
    """In one line, without what moves a terminal's cursor or turns its letters."""
    text = " ".join(str(text).split())
    return "".join(c for c in text if unicodedata.category(c)[0] != "C")


class Submission:
    def __init__(self, seconds, path):
        self.path, self.stem = path, path.stem if path.is_file() else path.name
        self.name, self.look = clean(self.stem), []
        self.tests = {}  # id: what results.json has of an exercise
        self.found, ended = run_child(path, "", 0, seconds)
        notes = [*self.found.pop("", []), *filter(None, [ended])]
        self.said = [clean(note.replace(f"submission{os.sep}", "")) for note in notes]

    def grade(self, exs, seed, seconds):
        for ex in (ex for ex in exs if ex.id in self.found):
            points, output, note = 0, "not written yet", "not written yet"
            if self.found[ex.id][0] == "written":
                told, ended = run_child(self.path, ex.id, seed, seconds)
                said = dict.fromkeys(kit.graders(ex), f"no result, {ended}") | told
                said = {test: text and clean(text) for test, text in said.items()}
                wrong = [text for text in said.values() if text]
                passed = len(said) - len(wrong)
                points = ex.points * passed // len(said)
                page = [f"{test[5:].replace('_', ' ')}: {text or 'passed'}"
                        for test, text in said.items()]  # fmt: skip
                output = "\n".join(page + [ex.hint_line] * bool(wrong))
                # in quotes: a submission may choose the words
                words = wrong[0].replace('"', "'")[:300] if wrong else ""
                note = f'{passed} of {len(said)}: "{words}"' if wrong else ""
            self.tests[ex.id] = {"name": ex.id, "score": points,
                                 "max_score": ex.points, "output": output}
            self.said += [f"{ex.id}: {note}"] * bool(note)
        return self

    def look_at(self, submissions):
        """Whose function is the project's or somebody else's, but for its names."""
        for name, (state, like) in self.found.items():
            others = [x.name for x in submissions
                      if x is not self and x.found.get(name) == [state, like]]
            others = ["the project"] if like == "project" else others
            if state == "written" and like and others:
                yield f"{name} is that of {', '.join(others)}"

    def line(self, exs, submissions):
        """Of the table."""
        got = {f"{ex.id} ({ex.points})": self.tests.get(ex.id, {}).get("score", 0)
               for ex in exs}  # fmt: skip
        return {"submission": self.name, "points": sum(got.values()), **got,
                "look at": " | ".join(self.look_at(submissions)),
                "remarks": " | ".join(self.said)}  # fmt: skip

    def write(self, folder, exs):
        """The student's page, and the file of Gradescope."""
        tests, folder = list(self.tests.values()), Path(folder) / self.stem
        page = [f"{self.name}: {sum(test['score'] for test in tests)} of "
                f"{sum(ex.points for ex in exs)} points"]  # fmt: skip
        for test in tests:
            title = f"\n{test['name']}, {kit.exercise(test['name']).title}: "
            page += [f"{title}{test['score']} of {test['max_score']}", test["output"]]
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join([*page, "", *self.said])
        (folder / "feedback.txt").write_text(f"{text}\n", encoding="utf-8")
        (folder / "results.json").write_text(json.dumps({"tests": tests}, indent=1))


def cell(x):
    """A spreadsheet takes some texts for formulas: a ' in front of them."""
    return f"'{x}" if isinstance(x, str) and x[:1] in tuple("=+-@") else x


def grade_all(args, exs, places):
    """The lines of the table, each written when it is known."""
    bar = functools.partial(tqdm, total=len(places), disable=None, leave=False)
    with ThreadPoolExecutor(args.jobs) as pool, open(
        args.to, "x", newline="", encoding="utf-8"
    ) as file:
        made = pool.map(functools.partial(Submission, args.seconds), places)
        submissions = list(bar(made, desc="reading"))
        exs = [ex for ex in exs if any(ex.id in x.found for x in submissions)]
        writer = csv.DictWriter(file, list(submissions[0].line(exs, submissions)))
        writer.writeheader()
        jobs = [pool.submit(x.grade, exs, args.seed, args.seconds) for x in submissions]
        try:
            for job in bar(as_completed(jobs), desc="grading"):
                line = job.result().line(exs, submissions)
                writer.writerow({key: cell(x) for key, x in line.items()})
                file.flush()
                notes = [line[key] for key in ("look at", "remarks") if line[key]]
                tqdm.write(f"{line['submission']:20s} {line['points']:3d}  "
                           f"{' | '.join(notes)}")  # fmt: skip
                if args.feedback:
                    job.result().write(args.feedback, exs)
        except KeyboardInterrupt:
            print(f"stopped, as soon as what runs is done; {args.to} has the others")
            pool.shutdown(cancel_futures=True)
            return 130
    print(f"{len(submissions)} submissions: {args.to}")
    return 0


def main(argv):
    if argv[:1] == ["--child"]:
        return child(argv[1], int(argv[2]))
    parser = Parser("tests/exercises/grade.py", __doc__)
    parser.add_argument("submissions", help="a folder with one for each student")
    parser.add_argument("--to", required=True, metavar="FILE.csv")
    parser.add_argument("--feedback", metavar="FOLDER", help="a page for each student")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these exercises")
    parser.add_argument("--seed", type=int, default=0, help="of the graders' inputs")
    parser.add_argument("--seconds", type=int, default=60,
                        help="for one exercise of one submission (default: 60)")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (default: 2)")
    args = parser.parse_args(argv)
    if min(args.jobs, args.seconds) < 1:
        raise KitError("--jobs and --seconds start at 1", "leave them out")
    exs = [kit.exercise(name) for name in args.only or kit.exercises()]
    folder = Path(args.submissions)
    found = sorted(folder.glob("[!._]*"))
    places = [p for p in found if p.is_dir() or p.suffix == ".zip"]
    if not places:
        what = "has neither folders nor zip files" if found else "holds no submission"
        raise KitError(f"{folder} {what}", "one folder or zip file for each student")
    for path in sorted(set(found) - set(places)):
        print(f"left out: {clean(path.name)}")
    return grade_all(args, exs, places)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
