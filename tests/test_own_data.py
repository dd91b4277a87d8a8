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
    assert examples == [Example("Q?", "D.", "", id=1)]
    assert remarks == [f"1 rows, form: {form}"]


def test_forms_may_be_mixed_and_are_counted(tmp_path):
    examples, remarks = read(tmp_path, *FORMS.values(), FORMS["Alpaca"])
    assert [example.id for example in examples] == [1, 2, 3, 4, 5, 6, 7]
    assert len(remarks) == 6 and "2 rows, form: Alpaca" in remarks


def test_lists_of_messages_become_prompt_and_demonstration(tmp_path):
    rows = [
        {"prompt": [SYSTEM, USER], "completion": [REPLY]},
        {"messages": [SYSTEM, USER, REPLY]},
        {"messages": [USER, {"role": "assistant", "content": "A."}, USER, REPLY]},
        {"prompt": [USER], "privileged_context": [SYSTEM, REPLY]},
        {"prompt": "Q?", "golden_response": ["one", "two"]},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ]
    examples, _ = read(tmp_path, *rows)
    system = (("system", "Be brief."),)
    assert examples[0] == Example("Q?", "D.", "", id=1, earlier=system)
    assert examples[1] == Example("Q?", "D.", "", id=2, earlier=system)
    assert examples[2].earlier == (("user", "Q?"), ("assistant", "A."))
    assert examples[3].demo == "Be brief.\nD." and examples[3].earlier == ()
    assert examples[4].demo == "one\ntwo"
    assert examples[5].prompt == "Add.\n\n1 and 2" and examples[5].demo == "3"


def test_answers_are_a_text_or_several_and_unknown_keys_are_named(tmp_path):
    row = FORMS["prompt and demonstration"]
    examples, remarks = read(
        tmp_path, {**row, "answer": "x", "id": 7}, {**row, "answer": ["x", "y"], "z": 1}
    )
    assert [example.answer for example in examples] == ["x", ("x", "y")]
    assert remarks[1:] == ["key 'z' of 1 rows is not used"]


def test_an_old_question_needs_no_demonstration(tmp_path):
    row = {"prompt": "Q?", "answer": "x"}
    examples, remarks = read(tmp_path, row, needs_demo=False)
    assert examples == [Example("Q?", "", "x", id=1)]
    assert remarks == ["1 rows, form: prompt and answer"]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: keys found: answer, prompt"):
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
BAD = {  # a line: what the error says of it, behind the file and the line
    '{"prompt": "Q?", demonstration: "D."}': "18: Expecting property name",
    "[1, 2]": " expected an object, found a list",
    "12": " expected an object, found a number",
    "null": " expected an object, found null",
    '"text"': " expected an object, found text",
    '{"promt": "Q?", "demonstration": "D."}': " keys found: demonstration, promt; no "
    "known form; 'promt': did you mean 'prompt'?",
    "{}": " keys found: none; no known form",
    '{"prompt": "Q?"}': " keys found: prompt; no known form",
    '{"prompt": 3, "demonstration": "D."}': " prompt: expected text, found a number",
    '{"prompt": "Q?", "privileged_context": null}': " privileged_context: expected "
    "text, found null",
    '{"prompt": "Q?", "completion": {}}': " completion: expected text, found an object",
    '{"prompt": " ", "demonstration": "D."}': " prompt is empty",
    '{"prompt": "Q?", "demonstration": ""}': " demonstration is empty",
    '{"prompt": [], "demonstration": "D."}': " prompt is empty",
    '{"messages": []}': " messages is empty",
    '{"messages": "Q?"}': " messages: expected a list, found text",
    '{"messages": [{"role": "user", "content": "Q?"}]}': " messages: the last role is "
    "user, not assistant",
    '{"messages": [{"role": "assistant", "content": "D."}]}': " the last role of the "
    "prompt is none, not user",
    '{"messages": [{"role": "bot", "content": "D."}]}': " messages[0]: role 'bot', "
    "expected system, user, assistant",
    '{"messages": [{"role": "user", "content": null}]}': " messages[0].content: "
    "expected text, found null",
    '{"messages": ["hi"]}': " messages[0]: expected an object, found text",
    '{"prompt": "Q?", "demonstration": "\\ud800"}': " demonstration: \\ud800 is half a "
    "character",
    '{"prompt": "Q?", "prompt": "R?", "demonstration": "D."}': " key 'prompt' stands "
    "twice",
    '{"prompt": "Q?", "demonstration": NaN}': " NaN is no JSON",
    '{"prompt": "Q?", "demonstration": "D.", "answer": 3}': " answer: expected text, "
    "found a number",
    '{"prompt": "Q?", "demonstration": "D.", "answer": [3]}': " answer: expected text, "
    "found a number",
    '{"prompt": "Q?", "demonstration": "D.", "answer": []}': " answer is empty",
    '{"instruction": "Q?", "input": 3, "output": "D."}': " input: expected text, found "
    "a number",
    "[" * 100000: " nested too deeply",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_with_what_is_wrong(line, tmp_path):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, GOOD, line, GOOD)
    (text,) = str(caught.value).splitlines()
    assert text.startswith(f"{tmp_path / 'a.jsonl'}:2:{BAD[line]}"), text


def test_all_bad_lines_are_named_at_once_and_twenty_at_most(tmp_path):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, *list(BAD)[:7], GOOD)
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == list(
        "1234567"
    )
    with pytest.raises(ValueError) as caught:
        read(tmp_path, *["[]"] * 100)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "... and 80 more lines"


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: byte 0xff at 12 is no UTF-8"):
        data.read_examples(path)
    path.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(ValueError, match="this is UTF-16; save it as UTF-8"):
        data.read_examples(path)


def test_a_line_number_counts_empty_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n\n{GOOD}\n[1]\n")
    with pytest.raises(ValueError, match="jsonl:4: expected an object"):
        data.read_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", (f"[{GOOD}]", f"\ufeff[\n {GOOD},\n {GOOD}\n]\n"))
def test_a_list_of_rows_gets_one_message_and_not_one_a_line(content, tmp_path):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="one list; each row needs a line of its own"):
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
    example = Example("Q?", "D.", answer)
    examples = [example, *(Example("Q?", "D.", other) for other in others)]
    return data.make_benchmark(examples, grade).grade(example, response)


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


def test_no_grade_is_no_grade():
    assert data.make_benchmark([Example("Q?", "D.", "")], "none").grade is None


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
    tok, example = Chat(), Example("Q" * 10, "D" * 5, "", id=7)
    n = len(data.teacher_prompt(example, tok))
    assert data.check_lengths("a.jsonl", [example], tok, 4, n + 6) == []
    ((found, text),) = data.check_lengths("a.jsonl", [example], tok, 4, n + 5)
    assert found is example and text == f"a.jsonl:7: {n} + 6 > {n + 5} tokens"
    ((_, text),) = data.check_lengths("a.jsonl", [example], tok, 9, n + 8)
    assert text == f"a.jsonl:7: {n} + 9 > {n + 8} tokens"
