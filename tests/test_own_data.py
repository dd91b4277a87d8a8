"""Users' own files: every form of a row, every bad line, grades, the two contexts."""

import json
import math
import random

import pytest

import data
from data import Example

# ---- Rows --------------------------------------------------------------------------

USER = {"role": "user", "content": "Q?"}
SYSTEM = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": "D."}
FORMS = {  # a row of each form; all of them ask Q? and demonstrate D.
    "prompt and demonstration": {"prompt": "Q?", "demonstration": "D."},
    "TRL (privileged_context)": {"prompt": "Q?", "privileged_context": "D."},
    "golden_response": {"prompt": "Q?", "golden_response": "D."},
    "prompt and completion": {"prompt": "Q?", "completion": "D."},
    "messages": {"messages": [USER, REPLY]},
    "Alpaca": {"instruction": "Q?", "input": "", "output": "D."},
}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(tmp_path, *rows, needs_demo=True):
    return data.read_examples(write(tmp_path / "a.jsonl", *rows), needs_demo)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_row_gives_the_same_example(form, tmp_path):
    examples, remarks = read(tmp_path, FORMS[form])
    assert examples == [Example("Q?", "D.", (), id=1)]
    assert remarks == ["1 rows, grade: none"]


def test_lists_of_messages_become_prompt_and_demonstration(tmp_path):
    rows = [
        {"prompt": [SYSTEM, USER], "completion": [REPLY]},
        {"messages": [SYSTEM, USER, REPLY]},
        {"messages": [USER, {"role": "assistant", "content": "A."}, USER, REPLY]},
        {"prompt": [USER], "privileged_context": [SYSTEM, REPLY]},
        {"prompt": "Q?", "golden_response": ["one", "two"]},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"messages": [{**USER, "name": None}, {**REPLY, "tool_calls": []}]},
    ]
    examples, _ = read(tmp_path, *rows)
    system = (("system", "Be brief."),)
    assert examples[0] == Example("Q?", "D.", (), id=1, earlier=system)
    assert examples[1] == Example("Q?", "D.", (), id=2, earlier=system)
    assert examples[2].earlier == (("user", "Q?"), ("assistant", "A."))
    assert examples[3].demo == "Be brief.\nD." and examples[3].earlier == ()
    assert examples[4].demo == "one\ntwo"
    assert examples[5].prompt == "Add.\n\n1 and 2" and examples[5].demo == "3"
    assert (examples[6].prompt, examples[6].demo) == ("Q?", "D.")


def test_answers_are_a_text_or_several_and_unknown_keys_are_named(tmp_path):
    row = FORMS["prompt and demonstration"]
    examples, remarks = read(
        tmp_path, {**row, "answer": "x", "id": 7}, {**row, "answer": ["x", "y"], "z": 1}
    )
    assert [example.answer for example in examples] == [("x",), ("x", "y")]
    assert remarks == ["2 rows, grade: contains", "key 'z' of 1 rows is not used"]


def test_a_row_has_its_own_grade_or_that_of_the_run_or_contains(tmp_path):
    row = {**FORMS["messages"], "answer": "x"}
    path = write(tmp_path / "a.jsonl", row, {**row, "grade": "exact"})
    for grade, wanted in ((None, "contains"), ("choice", "choice")):
        examples, remarks = data.read_examples(path, grade=grade)
        assert [example.grade for example in examples] == [wanted, "exact"]
        assert remarks == [f"2 rows, grade: {', '.join(sorted((wanted, 'exact')))}"]
    with pytest.raises(ValueError, match="grade: expected exact or contains or choice"):
        read(tmp_path, {**row, "grade": "word"})


def test_a_file_is_graded_whole_or_not_at_all(tmp_path):
    row = FORMS["prompt and completion"]
    mixed = write(tmp_path / "a.jsonl", row, {**row, "answer": "x"}, row)
    with pytest.raises(ValueError, match="have an answer, but not lines 1, 3"):
        data.read_examples(mixed)
    examples, _ = data.read_examples(mixed, grade="exact")
    assert [e.answer for e in examples] == [("D.",), ("x",), ("D.",)]  # the demo, then
    examples, remarks = data.read_examples(mixed, grade="none")
    assert not any(e.grade for e in examples) and remarks == ["3 rows, grade: none"]
    examples, _ = read(tmp_path, row, row)
    assert not any(e.grade for e in examples)
    examples, _ = read(tmp_path, {**row, "answer": "x", "grade": None})
    assert examples[0].grade == "contains"  # null is no grade of its own


def test_an_old_question_needs_no_demonstration(tmp_path):
    row = {"prompt": "Q?", "answer": "x"}
    examples, remarks = read(tmp_path, row, needs_demo=False)
    assert examples == [Example("Q?", "", ("x",), id=1, grade="contains")]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*; found prompt, answer"):
        read(tmp_path, row)


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path):
    line = '{"prompt": "a\u2028b\x85c", "demonstration": "d"}'
    examples, _ = read(tmp_path, line, "", "  ", line)
    assert [example.id for example in examples] == [1, 4]
    assert examples[0].prompt == "a\u2028b\x85c"


def test_a_mark_of_byte_order_and_windows_line_ends_are_accepted(tmp_path):
    path, row = tmp_path / "a.jsonl", json.dumps(FORMS["Alpaca"]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n" + row + b"\r\n")
    assert len(data.read_examples(path)[0]) == 2


GOOD = '{"prompt": "Q?", "demonstration": "D."}'
NO_FORM = ": expected prompt or messages or instruction, and a demonstration; found "
NO_DEMO = ": expected a user's turn and a demonstration; found "
BAD = {  # a line: what the error says of it, behind the file and the line
    '{"prompt": "Q?", demonstration: "D."}': ": Expecting property name",
    '[1, 2]': NO_FORM + "[1, 2]",
    "12": NO_FORM + "12",
    "null": NO_FORM + "null",
    '"text"': NO_FORM + '"text"',
    '{"promt": "Q?", "demonstration": "D."}': NO_FORM + "promt, demonstration",
    "{}": NO_FORM,
    '{"prompt": "Q?"}': NO_DEMO + "prompt",
    '{"prompt": "Q?", "demonstartion": "D."}': NO_DEMO + "prompt, demonstartion",
    '{"prompt": "Q?", "output": "D.", "completion": "E."}': NO_FORM + "prompt, output",
    '{"prompt": "Q?", "messages": []}': NO_FORM + "prompt, messages",
    '{"prompt": 3, "demonstration": "D."}': ": prompt: expected text, found 3",
    '{"prompt": "Q?", "privileged_context": null}': ": privileged_context: expected "
    "text, found null",
    '{"prompt": "Q?", "completion": {}}': ": completion: expected text, found {}",
    '{"prompt": " ", "demonstration": "D."}': ': prompt: expected text, found " "',
    '{"prompt": "Q?", "demonstration": ""}': ': demonstration: expected text, found ""',
    '{"prompt": [], "demonstration": "D."}': NO_DEMO + "prompt, demonstration",
    '{"messages": []}': NO_DEMO + "messages",
    '{"messages": "Q?"}': NO_DEMO + "messages",
    '{"messages": [{"role": "user", "content": "Q?"}]}': NO_DEMO + "messages",
    '{"messages": [{"role": "assistant", "content": "D."}]}': NO_DEMO + "messages",
    '{"messages": [{"role": "bot", "content": "D."}]}': ": messages: expected a role "
    'and content only, found {"role": "bot"',
    '{"messages": [{"role": "user", "content": null}]}': ": messages: content: "
    "expected text, found null",
    '{"messages": [{"role": "user", "content": "Q?", "weight": 0.5}]}': ": messages: "
    'expected a role and content only, found {"role": "user"',
    '{"messages": [{}, "hi"]}': ": messages: expected a role and content only",
    '{"prompt": "Q?", "demonstration": "\\ud800"}': ": 'utf-8' codec can't encode "
    "character '\\ud800'",
    '{"prompt": "Q?", "prompt": "R?", "demonstration": "D."}': ": a key is there "
    "twice: prompt, prompt",
    '{"prompt": "Q?", "demonstration": NaN}': ": demonstration: expected text, found "
    "NaN",
    '{"prompt": "Q?", "demonstration": "D.", "answer": 3}': ": answer: expected text, "
    "found 3",
    '{"prompt": "Q?", "demonstration": "D.", "answer": [3]}': ": answer: expected "
    "text, found 3",
    '{"prompt": "Q?", "demonstration": "D.", "grade": "word"}': ": grade: expected",
    '{"instruction": "Q?", "input": 3, "output": "D."}': ": input: expected text, "
    "found 3",
    '{"instruction": "Q?", "input": 0, "output": "D."}': ": input: expected text, "
    "found 0",
    '{"prompt": "Q?", "input": "x", "output": "D."}': ": input goes with instruction",
    '{"prompt": "Q?", "completion": [{"role": "user", "content": "U"}]}': ": "
    "completion: a demonstration has no turn of the user",
    '{"prompt": ' + "[" * 100000: ": maximum recursion depth exceeded",
    '{"prompt": ' + "9" * 5000 + "}": ": Exceeds the limit",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_with_what_is_wrong(line, tmp_path):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, GOOD, line, GOOD)
    (text,) = str(caught.value).splitlines()
    assert text.startswith(f"{tmp_path / 'a.jsonl'}:2{BAD[line]}"), text


def test_all_bad_lines_are_named_at_once_and_twenty_at_most(tmp_path):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, *list(BAD)[2:9], GOOD)
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == list(
        "1234567"
    )
    with pytest.raises(ValueError) as caught:
        read(tmp_path, GOOD, *["[]"] * 100)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "... and 80 more"


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for content in (b'{"prompt": "\xff"}\n', b"\x1f\x8b\x08\x00\xffgzip", b"PAR1\xff"):
        path.write_bytes(GOOD.encode() + b"\n" + content)
        with pytest.raises(ValueError, match=r"a\.jsonl:2: not UTF-8: invalid start"):
            data.read_examples(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "utf-32"])
def test_other_encodings_of_unicode_are_read(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{GOOD}\r\n{GOOD}\r\n".encode(encoding))
    assert [e.id for e in data.read_examples(path)[0]] == [1, 2]


def test_a_line_number_counts_empty_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n\n{GOOD}\n[1]\n")
    with pytest.raises(ValueError, match="jsonl:4: expected prompt or"):
        data.read_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", (f"[{GOOD}]", f"\ufeff[\n {GOOD},\n {GOOD}\n]\n"))
def test_a_list_of_rows_gets_one_message_and_not_one_a_line(content, tmp_path):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="one list; write a row a line"):
        data.read_examples(tmp_path / "a.json")


@pytest.mark.parametrize("content", ("", "\n \n\n"))
def test_a_file_without_rows_is_refused(content, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.jsonl: no rows"):
        data.read_examples(path)


def test_damaged_files_raise_nothing_but_value_errors(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.jsonl"
    text = "\n".join(json.dumps(row) for row in FORMS.values()).encode()
    refused = 0
    for _ in range(500):
        content = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(1, 300)))])
        try:
            data.read_examples(path)
        except ValueError as error:
            refused += 1
            assert all(str(path) in line for line in str(error).splitlines())
    assert refused > 250


# ---- Grades ------------------------------------------------------------------------


def graded(grade, answer, response, others=()):
    answers = [(each,) if isinstance(each, str) else each for each in (answer, *others)]
    examples = [Example("Q?", "D.", each, grade=grade) for each in answers]
    return data.make_benchmark(examples).grade(examples[0], response)


@pytest.mark.parametrize(
    ("grade", "answer", "right", "wrong"),
    [
        ("exact", "Paris", ["Paris", " paris\n", "PARIS"], ["Paris.", "Oh Paris", ""]),
        ("exact", ("a b", "c"), ["A  b", "c"], ["a", "ab", "b a"]),
        ("contains", "Paris", ["Paris.", "It is paris!", "(Paris)"], ["Parisian", ""]),
        ("contains", "correct", ["correct"], ["INCORRECT", "incorrect"]),
        ("contains", ("two", "2"), ["It is 2.", "two"], ["22", "2nd"]),
        ("contains", "C++", ["I use C++."], ["C"]),
        ("contains", "a.c", ["a.c"], ["abc"]),
        ("contains", "東京", ["首都は東京です。", "東京"], ["京都", "東 京"]),
        ("contains", "서울", ["수도는 서울입니다."], ["부산"]),
        ("contains", "กรุงเทพ", ["เมืองหลวงคือกรุงเทพครับ"], ["เชียงใหม่"]),
        ("contains", "Paris", ["答案是Paris。", "Paris市"], ["Parisian", "Paris1"]),
        ("contains", "café", ["a cafe\u0301!"], ["cafés"]),
        ("contains", "200", ["$200.", "200, or so", "200.0"], ["$1,200", "200th"]),
        ("contains", "1200", ["$1,200", "1200"], ["$1,200,000", "1,2,0,0"]),
        ("contains", "5", ["5.", "3-5", "1,5,7", "(5)"], ["0.5", "5.25", "3/5", "-5"]),
        ("contains", "-5", ["x = -5"], ["5", "3-5"]),
        ("contains", "3/4", ["it is 3/4."], ["3", "13/4"]),
    ],
)
def test_a_grade_says_what_is_right(grade, answer, right, wrong):
    for response in right:
        assert graded(grade, answer, response), response
    for response in wrong:
        assert not graded(grade, answer, response), response


def test_a_choice_is_the_first_option_that_is_named():
    others = ("A", "B", "C", "New", "New York")
    assert graded("choice", "B", "B, and not A", others)
    assert not graded("choice", "B", "A or B", others)
    assert not graded("choice", "B", "I do not know", others)
    assert graded("choice", "New York", "it is new york", others)
    assert not graded("choice", "New", "it is New York", others)
    assert graded("choice", ("B", "C"), "the answer is C", others)
    assert graded("choice", "paris", "it is Paris", ("Paris", "Rome"))


def test_no_grade_is_no_grade():
    assert data.make_benchmark([Example("Q?", "D.", ("x",))]).grade is None


def test_the_place_of_an_answer_is_where_its_words_begin():
    assert data.place_of("B", "a b c b") == 2
    assert data.place_of("d", "a b c") == math.inf


# ---- The two contexts --------------------------------------------------------------


class Chat:
    """A tokenizer whose tokens are characters and whose chat form can be read."""

    template, end = data.TEMPLATE, 0

    def encode(self, text):
        return [ord(letter) for letter in text]

    def chat(self, messages):
        turns = "".join(f"[{turn['role']}]{turn['content']}" for turn in messages)
        return self.encode(f"{turns}[assistant]")

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_the_two_contexts_of_a_real_model_are_these_texts():
    tok, earlier = Chat(), (("system", "S"), ("user", "U"), ("assistant", "A"))
    example = Example("Q?", "D.", "", earlier=earlier)
    begin = "[system]S[user]U[assistant]A[user]"
    student = tok.decode(data.student_prompt(example, tok))
    assert student == f"{begin}Q?[assistant]"
    teacher = tok.decode(data.teacher_prompt(example, tok))
    assert teacher == (
        f"{begin}\nQ?\n\nThis is an example for a response to the question:\nD.\n\n"
        "Now answer with a response of your own, including the thinking process.\n"
        "[assistant]"
    )
    assert tok.decode(data.demo_response(example, tok)) == "D.\0"


def test_braces_of_the_user_s_text_stay_as_they_are():
    example = Example("{demonstration} {0} {prompt}", "{prompt}\\1", "")
    text = data.fill_template("<{prompt}|{demonstration}|{other}>", example)
    assert text == "<{demonstration} {0} {prompt}|{prompt}\\1|{other}>"


def test_what_does_not_fit_is_named_by_its_line():
    tok, example = Chat(), Example("Q" * 10, "D" * 5, (), id=7)
    n = len(data.teacher_prompt(example, tok))
    data.check_lengths("a.jsonl", [example], tok, 4, n + 6)
    for new, room, needed in ((4, n + 5, 6), (9, n + 8, 9)):
        with pytest.raises(ValueError) as caught:
            data.check_lengths("a.jsonl", [example] * 2, tok, new, room)
        (line, other) = str(caught.value).split("\n")
        assert line == other == f"a.jsonl:7: {n} + {needed} > {room} tokens"
