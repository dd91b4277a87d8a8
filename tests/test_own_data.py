"""Users' own files: every form of a row, every bad line, grades, the two contexts."""

import gzip
import json
import math
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

import data
from data import Example

USER, REPLY = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "D."}
SYSTEM, FIRST = {"role": "system", "content": "S"}, {**REPLY, "content": "A."}
TALK = ("system", "S"), ("user", "Q?"), ("assistant", "A.")
ROW, LINE = {"prompt": "Q?"}, '{"prompt": "Q?", "demonstration": "D."}'
SHOWN, GOOD = {**ROW, "demonstration": "D."}, Example("Q?", "D.", (), id=1)
ALPACA, ANSWERED = {"instruction": "Q?", "output": "D."}, {**SHOWN, "answer": "x"}
X = {"answer": ("x",), "grade": "contains"}
ROWS = [  # a row of each form, and how its example differs from GOOD
    *(({**ROW, key: "D."}, {}) for key in data.DEMOS),
    ({"messages": [USER, REPLY]}, {}), ({"prompt": [USER], "completion": [REPLY]}, {}),
    ({**ALPACA, "input": ""}, {}), ({**ALPACA, "input": None}, {}), (ALPACA, {}),
    ({**ALPACA, "input": "1 2"}, {"prompt": "Q?\n\n1 2"}),
    ({"messages": [{**USER, "name": None}, {**REPLY, "tool_calls": []}]}, {}),
    ({"prompt": [SYSTEM, USER], "completion": [REPLY]}, {"earlier": TALK[:1]}),
    ({"messages": [SYSTEM, USER, REPLY]}, {"earlier": TALK[:1]}),
    ({"messages": [USER, FIRST, USER, REPLY]}, {"earlier": TALK[1:]}),
    ({"messages": [SYSTEM, USER, FIRST, USER], "output": "D."}, {"earlier": TALK}),
    ({"prompt": ["a", "b"], "output": ["c", "d"]}, {"prompt": "a\nb", "demo": "c\nd"}),
    (ANSWERED, X), ({**ANSWERED, "grade": None, "id": 7, "task": "t"}, X),
    ({**SHOWN, "answer": ["x", "y"]}, {**X, "answer": ("x", "y")}),
    ({**ANSWERED, "grade": "choice"}, {**X, "grade": "choice"}),
    ({**SHOWN, "grade": "exact"}, {"answer": ("D.",), "grade": "exact"}),
    ({**ANSWERED, "grade": "exact"}, {**X, "grade": "exact"}),
    ({**ANSWERED, "grade": "none"}, {**X, "grade": ""}),
    ('{"prompt": " a\u2028\x85\\n", "output": "D."}\r', {"prompt": " a\u2028\x85\n"}),
]  # fmt: skip
OBJECT, TEXT = "expected an object, found ", "expected text, found "
TURN = "messages: expected a role and content only, found "
KINDS = "expected exact or contains or choice"
FORM = ("expected prompt or messages or instruction, and one demonstration that "
        "answers the user; found ")
BAD = [  # a row, or a line, and what the error says of it
    *((row, FORM + ", ".join(row)) for row in (
        {}, ROW, {**ROW, "answer": "x"}, {"promt": "Q?", "demonstration": "D."},
        {**ROW, "demonstartion": "D."}, {**ROW, "output": "D.", "completion": "E."},
        {**SHOWN, "messages": []}, {**SHOWN, "instruction": "Q?"}, {"messages": [USER]},
        {"messages": [USER, REPLY], "output": "E."}, {"messages": [USER, REPLY, FIRST]},
        {"messages": [USER, SYSTEM, REPLY]}, {"messages": [REPLY]}, {"messages": "Q?"},
        {**ROW, "privileged_context": [SYSTEM, REPLY]}, {**ROW, "completion": [USER]},
        {**ROW, "completion": [FIRST, REPLY]}, {**ROW, "completion": [USER, REPLY]},
        {**ALPACA, "instruction": [USER, FIRST], "input": "x"},
    )),
    *(({**ANSWERED, key: x}, f"{key}: {TEXT}{json.dumps(found)}") for key, x, found in (
        ("prompt", 3, 3), ("prompt", " ", " "), ("prompt", [], []), ("answer", "", ""),
        ("answer", ["x", 3], 3), ("answer", None, None), ("demonstration", None, None),
        ("demonstration", ["a", {}], {}), ("demonstration", math.nan, math.nan),
    )),
    *(({**ALPACA, "input": x}, f"input: {TEXT}{x}") for x in (0, 3)),
    ({"messages": []}, f"messages: {TEXT}[]"), ({"messages": [{}, "hi"]}, TURN + "{}"),
    ({"messages": [{**USER, "content": None}]}, f"messages: {TEXT}null"),
    ({"messages": [{"role": "bot", "content": "D."}]}, TURN + '{"role": "bot", "cont'),
    *(({"messages": [USER, {**REPLY, **more}]}, TURN + json.dumps({**REPLY, **more}))
      for more in ({"weight": 0}, {"weight": 0.5}, {"train": False}, {"a": {}})),
    ({**SHOWN, "answer": [["a", "b"]]}, "answer: a list in a list"),
    ({"messages": [USER, "hi"]}, TURN + '"hi"'), (LINE + LINE, "Extra data"),
    ({**SHOWN, "grade": "a"}, f"grade: {KINDS}, found a"),
    *(({**SHOWN, "grade": x}, f"grade: {KINDS}, found {x}") for x in (0, False, [])),
    *(({**SHOWN, "grade": x}, f"no answer for the grade {x}")
      for x in ("contains", "choice")),
    *((value, OBJECT + value) for value in ("[1, 2]", "12", "null", '"text"')),
    ('{"prompt": "Q?", demonstration: "D."}', "Expecting property name"),
    ('{"prompt": "\\ud800", "output": "D."}', "'utf-8' codec can't encode character"),
    (b'{"prompt": "\xff"}', "'utf-8' codec can't decode byte 0xff in position 12"),
    ('{"prompt": "Q?", "prompt": "R?"}', "a key is there twice: prompt, prompt"),
    ('{"prompt": ' + "[" * 100000, "maximum recursion depth exceeded"),
    ('{"prompt": ' + "9" * 5000 + "}", "Exceeds the limit"),
]  # fmt: skip
def read(tmp_path, *rows, **how):
    """(examples, remarks), or the lines of the error, in which the file is F."""
    path, content = tmp_path / "a.jsonl", b""
    for row in rows:
        row = json.dumps(row) if isinstance(row, dict) else row
        content += row if isinstance(row, bytes) else f"{row}\n".encode()
    path.write_bytes(content)
    try:
        return data.read_examples(path, **how)
    except ValueError as error:
        return str(error).replace(str(path), "F").split("\n")


def test_each_form_of_a_row_gives_its_example_and_a_file_is_graded_whole(tmp_path):
    turns = ["1 rows have earlier responses, which are read, not learnt"]
    for row, changes in ROWS:
        example = replace(GOOD, **changes)
        remarks = [f"1 rows, grade: {example.grade or 'none'}"]
        remarks += turns * ("assistant" in str(example.earlier))
        assert read(tmp_path, row) == ([example], remarks), row
    # by the rows' own grade, or the run's; old questions need no demonstration
    exact = {**ANSWERED, "grade": "exact"}
    for rows, how, grades in (
        ([ANSWERED, exact], {}, "contains, exact"), ([SHOWN, SHOWN], {}, "none, none"),
        ([ANSWERED, exact], {"grade": "choice"}, "choice, exact"),
        ([SHOWN, ANSWERED], {"grade": "exact"}, "exact, exact"),
        ([SHOWN, ANSWERED], {"grade": "none"}, "none, none"),
    ):  # fmt: skip
        examples, remarks = read(tmp_path, *rows, **how)
        assert [e.grade or "none" for e in examples] == grades.split(", ")
        assert remarks == ["2 rows, grade: " + ", ".join(sorted({*grades.split(", ")}))]
    wrong = read(tmp_path, SHOWN, ANSWERED, SHOWN)
    assert wrong == ["F:1: no answer", "F:3: no answer"]
    rows = {**ROW, "answer": "x", "input": "y"}, "", {**ANSWERED, "z": 1}
    examples, (_, *remarks) = read(tmp_path, *rows, needs_demo=False)
    assert examples == [replace(GOOD, demo="", **X), replace(GOOD, id=3, **X)]
    assert remarks == [f"key '{x}' of 1 rows is not used" for x in ("input", "z")]


def test_a_bad_line_or_file_is_named_with_what_is_wrong_and_twenty_at_most(tmp_path):
    """A file is UTF-8, with any line ends, and not a list."""
    for line, wrong in BAD:
        (text,) = read(tmp_path, LINE, line, *[] if isinstance(line, bytes) else [LINE])
        assert text.startswith(f"F:2: {wrong}"), line
    lines = read(tmp_path, "", *(line for line, _ in BAD[7:14]), " ", "[")
    assert [line.split(":")[1] for line in lines] == [*"2345678", "10"]
    for n, more in (100, ["... and 80 more"]), (21, ["... and 1 more"]), (20, []):
        lines = read(tmp_path, LINE, *["[]"] * n)
        assert lines[19].startswith("F:21: ") and lines[20:] == more
    assert [e.id for e in read(tmp_path, f"\ufeff{LINE}\r", LINE + "\r")[0]] == [1, 2]
    binary = "not UTF-8; iconv -f utf-16, or gunzip, makes it so"
    a_list = "one list; jq -c '.[]' writes one row a line"
    for content, wrong in (
        (f"\ufeff{LINE}".encode("utf-16-le"), binary), (b"", "no rows"),
        (f"\ufeff{LINE}".encode("utf-16-be"), binary), (b" \n\n", "no rows"),
        (LINE.encode("utf-16-le"), binary), (gzip.compress(LINE.encode()), binary),
        (f"[{LINE}]", a_list), (f" [\n{LINE},\n{LINE}\n]\n", a_list),
        (f"\ufeff[\n{LINE}]", a_list),
    ):  # fmt: skip
        assert read(tmp_path, content) == [f"F: {wrong}"]


def test_damaged_files_raise_nothing_but_value_errors(tmp_path):
    rng, refused = random.Random(0), 0
    text = "\n".join(json.dumps(row) for row, _ in ROWS[:9]).encode()
    for _ in range(300):
        content = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        content = content[: rng.choice((len(content), rng.randrange(1, 300)))]
        result = read(tmp_path, bytes(content), grade="none")
        assert isinstance(result, tuple) or all(line[:2] == "F:" for line in result)
        refused += isinstance(result, list)
    assert refused > 150


GRADED = {  # grade: (answer, what is right, what is wrong), ...
    "exact": [
        ("Paris", ["Paris", " paris\n", "PARIS"], ["Paris.", "Oh Paris", ""]),
        (("a b", "c"), ["A  b", "c"], ["a", "ab", "b a"]), ("ß", ["SS"], ["s"]),
        ("café", ["Cafe\u0301"], ["cafe"]), ("5", ["5"], ["5.0", "55"]),
    ],
    "contains": [
        ("Paris", ["Paris.", "It is paris!", "(Paris)"], ["Parisian", "Paris1", ""]),
        ("Paris", ["是Paris。", "Paris市"], ["aparis"]), ("C++", ["C++."], ["C"]),
        ("東京", ["は東京です", "東京"], ["京都", "東 京"]), ("a.c", ["a.c"], ["abc"]),
        ("กรุงเทพ", ["คือกรุงเทพครับ"], ["เชียง"]), ("서울", ["서울입니다"], ["부산"]),
        ("correct", ["correct"], ["INCORRECT"]), ("café", ["a cafe\u0301!"], ["cafés"]),
        (("two", "2"), ["It is 2.", "two"], ["22", "2nd"]), ("3/4", ["3/4."], ["13/4"]),
        ("200", ["$200.", "200, or so", "200.0"], ["$1,200", "200th"]),
        ("1200", ["$1,200", "1200"], ["$1,200,000", "1,2,0,0"]),
        ("5", ["5.", "3-5", "1,5,7", "(5)"], ["0.5", "5.25", "3/5", "-5"]),
        ("-5", ["x = -5", "-5.0", "\u22125"], ["5", "3-5"]), ("7", ["7"], ["\u22127"]),
        ("0.5", ["0.5", ".5", "0.50"], ["5", "0.55"]), ("12", ["\u0661\u0662"], []),
        ("$5", ["$5.", "$5, or"], ["$5,000", "$5.50", "$55"]), ("v1.2", [], ["v1.25"]),
        ("5", ["是5。", "5個", "ราคา5บาท", "12月5日"], ["是15。", "0,5", "1,5"]),
        ("3.5", ["3,5 km", "3,50", "\u0663\u066b\u0665"], ["3", "3,500", "1,3,5"]),
        ("0,125", ["0.125"], ["125"]), ("-5", ["是-5度"], ["是5度"]),
        ("1000", ["1'000", "1\u2019000.50 or 1,000"], ["1'000'000", "1,0"]),
        ("100000", ["1,00,000"], ["1,000"]), ("2", [], ["12시"]),
        ("don't", ["don\u2019t"], ["dont"]),
        ("9007199254740993", ["9,007,199,254,740,993"], ["9007199254740992"]),
        ("50%", ["50%.", "or 50%"], ["1.50%", "1,50%", "150%"]),
        ("कमल", ["कमल है", "कमल।"], ["कमला"]), ("བོད", ["བོད་ལྗོངས"], []),
    ],
    "choice": [  # of A, B, C, New, New York and the answer
        ("B", ["B, and not A", "it is b"], ["A or B", "I do not know", ""]),
        ("New", ["it is New, York"], ["it is New York"]), ("c", ["C"], ["A", "Cc"]),
        ("New York", ["it is new york"], ["New", "New, New York", ""]),
        (("B", "C"), ["the answer is C", "B or A"], ["A", "A or C"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("grade", GRADED)
def test_a_grade_says_what_is_right(grade):
    """A choice is the first option that is named, of two in one place the longer."""
    options = "A", "B", "C", "New", "New York"
    others = [Example("Q?", "", (option,), grade=grade) for option in options]
    for answer, right, wrong in GRADED[grade]:
        answer = (answer,) if isinstance(answer, str) else answer
        example = Example("Q?", "D.", answer, grade=grade)
        is_right = data.make_benchmark([example, *others]).grade
        assert [x for x in right + wrong if is_right(example, x)] == right
    assert data.make_benchmark([Example("Q?", "D.", ("x",))]).grade is None
    draws = [data.make_benchmark(others, 3, seed) for seed in (0, 0, 1, 2)]
    assert draws[0].examples == draws[1].examples and draws[0].grade(others[0], "A")
    assert {len(x.examples) for x in draws} == {3} and draws[1].examples != others[:3]
    assert any(x.examples != draws[0].examples for x in draws)
    assert data.place_of("B", "a b c b") == 2 and data.place_of("d", "a") == math.inf


def as_chat(earlier, prompt):
    turns = *earlier, ("user", prompt), ("assistant", "")
    return [*map(ord, "".join(f"[{role}]{text}" for role, text in turns))]


CHAT = SimpleNamespace(template=data.TEMPLATE, end=0, chat=as_chat)
CHAT.encode = lambda text: [*map(ord, text)]


def test_the_two_contexts_of_a_real_model_are_these_texts_and_must_fit():
    """Braces of the user's text stay as they are. What does not fit is named."""
    example, begin = replace(GOOD, earlier=TALK), "[system]S[user]Q?[assistant]A."
    for part, text in (
        (data.student_prompt, f"{begin}[user]Q?[assistant]"),
        (data.teacher_prompt, f"{begin}[user]\nQ?\n\nThis is an example for a response "
         "to the question:\nD.\n\nNow answer with a response of your own, including "
         "the thinking process.\n[assistant]"), (data.demo_response, "D.\0"),
    ):  # fmt: skip
        assert "".join(map(chr, part(example, CHAT))) == text
    braces = Example("{demonstration} {0} {prompt}", "{prompt}\\1", "")
    text = data.fill_template("<{prompt}|{demonstration}|{other}>", braces)
    assert text == "<{demonstration} {0} {prompt}|{prompt}\\1|{other}>"
    n = len(data.teacher_prompt(example, CHAT))
    data.check_lengths("a.jsonl", [example], CHAT, 2, n + 3)
    for new, room, needed in ((2, n + 2, 3), (9, n + 8, 9)):
        lines = [f"a.jsonl:1: {n} + {needed} > {room} tokens"] * 20
        text = "\n".join([*lines, "... and 1 more"])
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            data.check_lengths("a.jsonl", [example] * 21, CHAT, new, room)
