"""Grading many submissions: right work gets its points in whatever form it comes, and
one that goes wrong takes no points of another."""

import csv
import json
import zipfile

import grade
import kit
import pytest
from variants import FILES, source

E04, E05 = (kit.exercise(name).rights[0][1] for name in ("e04", "e05"))
OWN = kit.function_source(source("extra.py"), "response_mask")
HEAD = "import torch\n\n\n"
ESCAPES = 'raise ValueError("\\x1b[2J\\u202e = e05: ! copied \\"")'

# name: ({file: text or bytes}, points of e04 and of e05, part of the line in the table)
CASES = {
    "plain": ({"extra.py": E04, "sft.py": E05}, 4, 5, ""),
    "windows": ({"sft.py": b"\xef\xbb\xbf" + E05.replace("\n", "\r\n").encode()}, 0, 5,
                ""),
    "wide": ({"extra.py": E04.encode("utf-16")}, 4, 0, ""),
    "old": ({"extra.py": "# gr\xfc\xdfe\n".encode("cp1252") + E04.encode()}, 4, 0, ""),
    "deep": ({"work/mine/extra.py": E04, ".git/extra.py": "def x(:"}, 4, 0, ""),
    "beside": ({**{f"sdft/{f}": source(f) for f in FILES if f != "extra.py"},
                "sdft/mine/extra.py": E04}, 4, 0, ""),
    "zipped": ({"mine/extra.py": E04}, 4, 0, ""),
    "half broken": ({"extra.py": "def x(:", "sft.py": E05}, 0, 5,
                    "extra.py:1:7: invalid syntax"),
    "minus signs": ({"extra.py": f"x = {'-' * 20000}1", "sft.py": E05}, 0, 5,
                    "extra.py:1:1:"),
    "spelt otherwise": ({"extra.py": E04.replace("response_mask", "responseMask")}, 0,
                        0, "line 2 of extra.py makes responseMask"),
    "no exercise": ({"notes.txt": "hello"}, 0, 0, "there is notes.txt"),
    "too large": ({"extra.py": E04 + "#" * kit.MAX_BYTES}, 0, 0, "it is not read"),
    "not begun": ({"extra.py": kit.stub_of(OWN, "response_mask", "e04: yours")},
                  0, 0, "e04: not written yet"),
    "whole file": ({"extra.py": source("extra.py")}, 0, 0, "the project's own text"),
    "copy": ({"extra.py": HEAD + OWN.replace("behind", "later").replace(
        "    ends =", "    pass\n    ends =")}, 4, 0, "e04 is that of the project"),
    "ends": ({"extra.py": E04.replace(
        "    mask =", "    import os\n\n    os._exit(3)\n    mask =")}, 0, 0,
        "its process ended with 3"),
    "hangs": ({"extra.py": E04.replace("    mask =", "    while len(ids) > 1:\n"
                                       "        pass\n    mask =")}, 3, 0, "not done"),
    "shouts": ({"extra.py": f"def response_mask(ids, lengths, end):\n    {ESCAPES}\n"},
               0, 0, "e04: 0 of 10: \"it ended with ValueError"),
    "=eats()": ({"extra.py": E04.replace("    mask =", "    torch.zeros(4 * 10**9)\n"
                                         "    mask =")}, 0, 0, "allocate"),
}  # fmt: skip


def write(folder, name, files):
    if name == "zipped":
        with zipfile.ZipFile(folder / "zipped.zip", "w") as file:
            for path, text in files.items():
                file.writestr(path, text)
        return
    for path, content in files.items():
        at = folder / name / path
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """({name: its line of the table}, the folder of the feedback)."""
    at = tmp_path_factory.mktemp("class")
    for name, (files, *_) in CASES.items():
        write(at / "in", name, files)
    (at / "in" / "__MACOSX").mkdir()
    (at / "in" / "readme.txt").write_text("x")
    to, pages = str(at / "grades.csv"), str(at / "pages")
    argv = [str(at / "in"), "--to", to, "--feedback", pages, "--seconds", "40"]
    assert grade.main(argv) == 0
    with open(to, encoding="utf-8", newline="") as file:
        return {line["submission"]: line for line in csv.DictReader(file)}, at / "pages"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_submission_gets_its_points_and_its_remark(graded, name):
    _, e04, e05, remark = CASES[name]
    line = graded[0]["'=eats()" if name == "=eats()" else name]
    said = f"{line['look at']} | {line['remarks']}"
    assert (line["e04 (4)"], line["e05 (5)"]) == (str(e04), str(e05)), line
    assert line["points"] == str(e04 + e05) and remark in said, line
    assert remark or not line["remarks"], line


@pytest.mark.slow
def test_the_table_has_what_was_handed_in_and_no_control_characters(graded):
    lines, pages = graded
    assert len(lines) == len(CASES), list(lines)
    columns = ["submission", "points", "e04 (4)", "e05 (5)", "look at", "remarks"]
    assert list(lines["plain"]) == columns, lines["plain"]
    assert lines["shouts"]["remarks"].isprintable(), lines["shouts"]
    assert lines["plain"]["look at"].startswith("e04 is that of beside"), lines["plain"]
    page = (pages / "plain" / "feedback.txt").read_text(encoding="utf-8")
    assert "e05, The loss of SFT: 5 of 5" in page and "plain: 9 of 9" in page, page
    tests = json.loads((pages / "hangs" / "results.json").read_text())["tests"]
    assert [tests[0][k] for k in ("name", "score", "max_score")] == ["e04", 3, 4], tests


def test_what_cannot_be_graded_or_would_be_overwritten_is_an_error(tmp_path, capsys):
    write(tmp_path / "class", "a", {"sft.py": "x"})
    (tmp_path / "there.csv").write_text("of last week")
    for folder, to, *more in (
        ("nothing", "x.csv"), (".", "x.csv/y"), ("class", "there.csv"),
        ("class", "x.csv", "--jobs", "0"), ("class", "x.csv", "--seconds", "-1"),
    ):  # fmt: skip
        argv = [str(tmp_path / folder), "--to", str(tmp_path / to), *more]
        assert grade.guarded(grade.main, argv) == 2
        assert (tmp_path / "there.csv").read_text() == "of last week"
        said = capsys.readouterr().err.splitlines()
        assert [line.split(":")[0] for line in said] == ["error", "hint"], said
