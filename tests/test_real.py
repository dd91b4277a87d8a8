"""The data of tests/bench/real.py: held out is held out, and names are names."""

import json
import math
import sys
from pathlib import Path

import pytest

import data

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import real_data  # noqa: E402

MAKERS = {"facts": real_data.make_facts, "rule": real_data.make_rule}


def contains(answer, text):
    return data.place_of(answer, text) < math.inf


@pytest.mark.parametrize("task", MAKERS)
@pytest.mark.parametrize("demos", real_data.DEMOS)
def test_held_out_prompts_are_not_trained_on(task, demos):
    for seed in range(20):
        train, held_out = MAKERS[task](seed, demos)
        assert (len(train), len(held_out)) == (72, 24)
        prompts = [row["prompt"] for row in train + held_out]
        assert len(set(prompts)) == 96, "one prompt stands in two rows"


def test_a_held_out_fact_is_trained_in_three_other_wordings():
    train, held_out = real_data.make_facts(0)
    for row in held_out:
        same = [r["prompt"] for r in train if r["answer"] == row["answer"]]
        assert len(same) == 3 and row["prompt"] not in same
        country = [c for c in real_data.COUNTRIES if c in row["prompt"]]
        assert len(country) == 1 and all(country[0] in prompt for prompt in same)
    # the wording of a held-out row is that of no trained one
    for _, wordings, _ in real_data.FACTS.values():
        assert len(set(wordings)) == 4


@pytest.mark.parametrize("rule", real_data.RULES)
def test_rows_of_a_rule_follow_it_and_held_out_ones_ask_for_other_things(rule):
    train, held_out = real_data.make_rule(0, rule=rule)
    _, wordings, things, convention = real_data.RULES[rule]
    asked = []
    for rows, allowed in ((train, wordings[:3]), (held_out, wordings[3:])):
        named = {w.format(thing): thing for w in allowed for thing in things}
        asked.append([named[row["prompt"]] for row in rows])
        for thing, row in zip(asked[-1], rows, strict=True):
            assert row["answer"] == convention(thing)
    assert not set(asked[0]) & set(asked[1])


def test_the_convention_of_the_trained_rule():
    assert real_data.RULES[real_data.RULE][3]("brass valve, size 12") == "NV-12-brass"


@pytest.mark.parametrize("task", MAKERS)
def test_demonstrations_hold_the_answer_and_prompts_do_not(task):
    for demos in real_data.DEMOS:
        train, held_out = MAKERS[task](0, demos)
        for row in train + held_out:
            assert contains(row["answer"], row["demonstration"])
            assert not contains(row["answer"], row["prompt"])
            if demos == "json":
                assert json.loads(row["demonstration"]) == {"answer": row["answer"]}
            if demos == "record":
                assert row["answer"] in json.loads(row["demonstration"])["answer"]


def test_names_of_facts_are_unique_and_seeds_differ():
    _, held_out = real_data.make_facts(0)
    answers = [row["answer"] for row in held_out]
    assert len(set(answers)) == 24
    # no name is a part of another one or of a country: `contains` cannot be lucky
    names = [*answers, *real_data.COUNTRIES]
    for a in names:
        assert sum(a.lower() in b.lower() for b in names) == 1, a
    assert real_data.make_facts(0) == real_data.make_facts(0)
    assert real_data.make_facts(0) != real_data.make_facts(1)
    assert real_data.make_rule(0) != real_data.make_rule(1)


def test_prior_questions_are_many_and_do_not_give_their_answers_away():
    rows = real_data.make_prior()
    assert len(rows) >= 300 and rows == real_data.make_prior()
    assert len({row["prompt"] for row in rows}) == len(rows)
    given = []
    for row in rows:
        assert all(answer == answer.strip() != "" for answer in row["answer"])
        if any(contains(answer, row["prompt"]) for answer in row["answer"]):
            given.append(row["prompt"])
    assert not given
    new = [row["prompt"] for make in MAKERS.values() for row in make(0)[0]]
    assert not {row["prompt"] for row in rows} & set(new)


@pytest.mark.parametrize("task", MAKERS)
def test_written_rows_are_read_by_train(task, tmp_path):
    train, _ = MAKERS[task](0)
    real_data.write_rows(tmp_path / "demos.jsonl", train)
    examples, remarks = data.read_examples(tmp_path / "demos.jsonl")
    assert [e.prompt for e in examples] == [row["prompt"] for row in train]
    assert [e.demo for e in examples] == [row["demonstration"] for row in train]
    assert remarks == ["72 rows, grade: contains"]
    prior = real_data.make_prior()
    real_data.write_rows(tmp_path / "prior.jsonl", prior)
    examples, _ = data.read_examples(tmp_path / "prior.jsonl", needs_demo=False)
    assert [list(e.answer) for e in examples] == [row["answer"] for row in prior]
