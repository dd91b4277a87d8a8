"""Grading many submissions: a hostile one takes no points and gives itself none."""

import csv
import os
from concurrent.futures import ThreadPoolExecutor

import grade
import kit
import pytest
from variants import source

RIGHT = kit.function_source(source("extra.py"), "response_mask")
# the same to a reader, another text: the project's own text gets no points
RIGHT = RIGHT.replace("behind &", "behind.logical_and(ends == ends) &")
WRONG = RIGHT.replace("before == 0", "before == 7")
EX = kit.exercise("e04")


def hostile(*lines, body=WRONG):
    """A submission whose function does something first."""
    head, docstring_end, rest = body.partition('has none.\n    """\n')
    return head + docstring_end + "".join(f"    {line}\n" for line in lines) + rest


def tries(*lines):
    """All of these, one after the other, whatever each of them raises."""
    each = [(f"try: {line}", "except Exception: pass") for line in lines]
    return hostile(*[line for pair in each for line in pair])


# what the process has to withstand: (text of extra.py, what the remark has in it,
# points)
HOSTILE = {
    "is right and prints a lot": (
        hostile('print("passed " * 10**5)', body=RIGHT), [], 4,
    ),
    "hangs": (hostile("while True:", "    pass"), ["! not done after"], 0),
    "exits": (hostile("raise SystemExit(0)"), ["0 of 10", "SystemExit"], 0),
    "ends its process": (hostile("import os", "os._exit(0)"), ["no result"], 0),
    "writes a result": (
        hostile(
            "import os",
            "for fd in range(3, 64):",
            "    try:",
            '        os.write(fd, b\'{"token": "", "results": {}, "trouble": []}\')',
            "    except OSError:",
            "        pass",
            "os._exit(0)",
        ),
        ["no result"], 0,
    ),
    "starts processes, opens sockets and files": (
        "import gc, os, socket, subprocess, sys\n\n\n" + tries(
            "os.fork()", "subprocess.run([sys.executable])", "socket.socket()",
            "os.kill(os.getppid(), 9)", 'os.system("true")', "open(OTHER).read()",
            'open(OTHER, "w").write("")', "os.remove(OTHER)",
            "os.listdir(os.path.dirname(OTHER))", 'open("../project/data.py", "w")',
            "gc.get_objects()", "sys.settrace(None)",
        ),
        [
            *(() if os.name == "nt" else ["os.fork", "os.kill"]), "subprocess.Popen",
            "socket", "os.system", "; open ", "; write ", "os.remove", "os.listdir",
            "gc.get_objects", "sys.settrace",
        ],
        0,
    ),
    "patches": (
        "import builtins, sys\n\n\n" + tries(
            "torch.equal = torch.is_tensor = lambda *_: True",
            "torch.Tensor.any = lambda *_: False",
            "builtins.ascii = lambda *_: 0",
            'sys.modules["oracles"].softmax = None',
            'sys.modules["kit"].run_test = lambda *_: None',
            'sys.modules["test_e04_response_mask"].right_row.__code__ = '
            "(lambda row, n: row).__code__",
        ),
        [
            "changed torch.equal", "changed torch.Tensor.any", "changed builtins.ascii",
            "changed kit.run_test", "changed oracles.softmax", "changed test_e04",
        ],
        0,
    ),
    "equals everything": (
        "class Yes(torch.Tensor):\n    __torch_function__ = classmethod(\n"
        "        lambda *_, **__: True)\n\n\n"
        + hostile("return ids.bool().as_subclass(Yes)"),
        ["returned a Yes"], 0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Points and remark of all of them, and the folder where a good one lies."""
    folder = tmp_path_factory.mktemp("submissions")
    other = folder / "ann" / "extra.py"
    other.parent.mkdir()
    other.write_text(RIGHT, encoding="utf-8")
    content = grade.read_kit()

    def run(name):
        text = f"import torch\n\nOTHER = {str(other)!r}\n\n\n{HOSTILE[name][0]}"
        seconds = 8 if name == "hangs" else 120
        files = {"extra.py": text}
        return grade.grade_one(files, EX, content, folder, 0, seconds)

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(HOSTILE, pool.map(run, HOSTILE), strict=True))
    return found, other


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_submission_gets_what_it_deserves(graded, name):
    _, remarks, points = HOSTILE[name]
    found = graded[0][name]
    assert found[0] == points, found
    for remark in remarks:
        assert remark in found[1], (remark, found)
    assert remarks or not found[1], found


@pytest.mark.slow
def test_nothing_happened_to_the_others(graded):
    assert graded[1].read_text(encoding="utf-8") == RIGHT, "it was written to"


def test_a_file_is_not_run_only_its_function_is():
    text = f"{RIGHT}\n\nwhile True:\n    pass\n\n\nif 1:\n    import os\n"
    work = kit.Work({"extra.py": ("extra.py", text)})
    assert [node.name for node in work.taken([EX], "extra.py")[0]] == ["response_mask"]


def test_copies_stubs_and_empty_folders_get_nothing(tmp_path):
    own = source("extra.py")
    stub = kit.empty_function(own, "response_mask", "e04: yours")
    for files, remark in (
        ({"extra.py": own}, "! the project's own text"), ({"extra.py": stub}, "not "),
        ({}, ""), ({"extra.py": "def x(:"}, "invalid syntax"),
    ):  # fmt: skip
        points, said = grade.grade_one(files, EX, {}, tmp_path)
        assert points == 0 and remark in said, said


def test_a_table_has_a_line_for_each_student_and_no_formulas(tmp_path):
    for name in ("ann", "=cmd()"):
        (tmp_path / "in" / name).mkdir(parents=True)
    to = tmp_path / "grades.csv"
    code = grade.main([str(tmp_path / "in"), "--to", str(to), "--only", "e04"])
    with open(to, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert code == 0 and [line["submission"] for line in lines] == ["'=cmd()", "ann"]
    assert all(line["points"] == line["e04"] == "0" for line in lines), lines


def test_a_folder_that_is_not_there_is_an_error_and_a_hint(tmp_path, capsys):
    argv = [str(tmp_path / "nothing"), "--to", str(tmp_path / "x.csv")]
    assert grade.guarded(grade.main, argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["error", "hint"], said
