"""tests/bench/real.py runs; in its data held out is held out, and names are names."""

import json
import math
import sys
from pathlib import Path

import pytest

import data

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import real  # noqa: E402

MAKERS = {"facts": real.make_facts, "rule": real.make_rule}
PRIOR = real.make_prior()


def contains(answer, text):
    return data.place_of(answer, text) < math.inf


@pytest.mark.parametrize("task", MAKERS)
def test_held_out_prompts_are_not_trained_on_and_only_demonstrations_hold_answers(task):
    for seed, demos in [(s, d) for s in range(20) for d in real.FORMS]:
        train, held_out = MAKERS[task](seed, demos)
        assert (len(train), len(held_out)) == (72, 24)
        prompts = {row["prompt"] for row in train + held_out}
        assert len(prompts) == 96, "one prompt stands in two rows"
        assert not prompts & {row["prompt"] for row in PRIOR}
        for row in train + held_out if seed == 0 else ():
            answer, demo = row["answer"], row["demonstration"]
            assert contains(answer, demo) and not contains(answer, row["prompt"])
            said = demo if demos == "plain" else json.loads(demo)["answer"]
            assert said == answer or demos != "json" and answer in said
    assert MAKERS[task](0) == MAKERS[task](0) != MAKERS[task](1)


def test_a_held_out_fact_is_trained_in_three_other_wordings():
    train, held_out = real.make_facts(0)
    for row in held_out:
        same = [r["prompt"] for r in train if r["answer"] == row["answer"]]
        assert len(same) == 3 and row["prompt"] not in same
        (country,) = [c for c in real.COUNTRIES if c in row["prompt"]]
        assert all(country in prompt for prompt in same)
    # the wording of a held-out row is that of no trained one
    assert all(len({*words}) == 4 for _, words, _ in real.FACTS.values())
    # no name is a part of another one or of a country: `contains` cannot be lucky
    names = [*(row["answer"] for row in held_out), *real.COUNTRIES]
    assert [sum(a.lower() in b.lower() for b in names) for a in names] == [1] * 32


def test_rows_of_the_rule_follow_it_and_held_out_ones_ask_for_other_things():
    asked, parts = [], (real.ASKED[:3], real.ASKED[3:])
    for rows, allowed in zip(real.make_rule(0), parts, strict=True):
        named = {w.format(thing): thing for w in allowed for thing in real.THINGS}
        asked.append([named[row["prompt"]] for row in rows])
        numbers = [*map(real.part_number, asked[-1])]
        assert [row["answer"] for row in rows] == numbers
    assert not {*asked[0]} & {*asked[1]}
    assert real.part_number("brass valve, size 12") == "NV-12-brass"


def test_prior_questions_are_many_and_do_not_give_their_answers_away(tmp_path):
    """And what is written is read by train.py."""
    assert len({row["prompt"] for row in PRIOR}) == len(PRIOR) >= 300
    assert PRIOR == real.make_prior()
    for answer, prompt in [(a, row["prompt"]) for row in PRIOR for a in row["answer"]]:
        assert answer == answer.strip() != "" and not contains(answer, prompt), prompt
    for rows in (PRIOR, *(make(0)[0] for make in MAKERS.values())):
        real.write_rows(tmp_path / "a.jsonl", rows)
        examples, remarks = data.read_examples(tmp_path / "a.jsonl", rows is not PRIOR)
        for e, row in zip(examples, rows, strict=True):
            answer = tuple(row["answer"]) if rows is PRIOR else (row["answer"],)
            assert (e.prompt, e.answer) == (row["prompt"], answer)
            assert e.demo == row.get("demonstration", "")
        assert remarks == [f"{len(rows)} rows, grade: contains"]


@pytest.mark.slow
def test_a_cell_and_what_is_measured_of_a_base_run_in_small(
    tmp_path, monkeypatch, capsys
):
    """On a small random model of transformers, with --quick."""
    make_folder = pytest.importorskip("test_pretrained").make_folder
    folder, work = str(make_folder(tmp_path / "base")), str(tmp_path / "work")
    monkeypatch.setattr(real, "RESULTS", tmp_path / "real.json")
    right = {row["prompt"]: i > 0 for i, row in enumerate(PRIOR[:23])}
    real.write_results({"cells": {}, "prior": right})
    for what in ["gate"], ["prior"], ["sampled"], ["wordings"], ["rule", "--only",
                 "sdft 3e-05"], ["facts", "--only", "speculative 3e-05"]:  # fmt: skip
        argv = ["real.py", folder, *what, "--quick", "--work", work]
        monkeypatch.setattr(sys, "argv", argv)
        real.main()
    said, known = capsys.readouterr().out, json.loads(real.RESULTS.read_text())
    assert said.count('"held_out": 0') == 2 and "the base gets 22 of 24" in said
    assert len(known["gates"]) == 2 * 2 * 3 + 2 and len(known["prior"]) == 24
