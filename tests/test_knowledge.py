"""tests/bench/knowledge.py: articles, wordings, grades, contexts, the audit."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent / name) for name in ("exercises", "bench")]

import knowledge  # noqa: E402

import data  # noqa: E402

SEED, TOK, WORLD = 1, data.Tokenizer(), data.World(1)
OLD = {c: operation for c, (_, operation) in WORLD.known.items()}
NEW = {c: o for facts in knowledge.facts_of(WORLD).values() for c, o in facts.items()}
ARTICLES = knowledge.articles_of(WORLD, SEED)
MAKE = partial(knowledge.make_questions, WORLD, SEED)


def facts_in(text):
    """{command: (domain, operation)} of an article, behind a demonstration or not."""
    found = re.findall(r"(\w+) (\w+) (?:equals|gives|=) (\w+)(?=[,.])", text)
    assert len({d for d, *_ in found} & set(data.DOMAINS)) == len(found) > 0, text
    return {command: (domain, operation) for domain, command, operation in found}


def respond(prompt, meaning):
    parts, said = [part.split() for part in prompt.split(": ")], []  # items, by hand
    words, items = parts if parts[0][0] != "see" else (parts[1], parts[0][1:])
    if words[1] in data.OPERATIONS:  # reversed
        return [item for item in items if meaning.get(item) == words[1]]
    for command in filter(meaning.get, words[1:]):
        items = data.OPERATIONS[meaning[command]][1](items)
        said += items
    return said


def test_articles_state_each_fact_once_and_are_learnt_as_texts():
    said, texts = {}, knowledge.make_texts(WORLD, TOK, SEED)
    for article, example in zip(dict.fromkeys(ARTICLES.values()), texts, strict=True):
        said |= (facts := facts_in(article))
        assert len(facts) == 3 and all(ARTICLES[c] == article for c in facts)
        assert TOK.decode(data.student_prompt(example, TOK)) == "example"
        ids = torch.tensor(data.demo_response(example, TOK))
        mask = data.loss_mask([example], torch.tensor([len(ids)]))[0]
        assert TOK.decode(ids[mask].tolist()) == article
    new = {c: fact for skill in WORLD.skills.values() for c, fact in skill.items()}
    assert said == new and len(new) == 18 and not set(new) & set(WORLD.known)
    asked = [e.prompt.split(":")[0] for e in MAKE(knowledge.QUESTIONS)]
    assert {asked.count(each) for each in asked} == {32}


def test_contexts_are_literally_these_and_fit():
    for i, shown in enumerate(knowledge.SHOWN):
        e = MAKE(18, shown)[0]
        command = e.prompt.split(":")[0].split()[1]
        said = f"{NEW[command]} so you get {' '.join(respond(e.prompt, NEW))}"
        answer = f"well friend, {said} as ever"
        text = (ARTICLES[command], answer, f"{answer} {ARTICLES[command]}")[i]
        text = f"{e.prompt} example {text}"
        assert TOK.decode(data.teacher_prompt(e, TOK)[:-1]) == text
    rows = sum((MAKE(180, shown, how) for how in data.DISTANCES), [])  # 40: the cap
    assert max(len(data.teacher_prompt(e, TOK)) for e in rows) + 40 <= 128


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", knowledge.KINDS)
def test_answers_are_right_and_need_a_fact_and_no_trained_question(kind, known):
    trained, both = ([e.prompt for e in MAKE(576, wordings=n)] for n in (1, 2))
    taught = {*trained, *both, *map(knowledge.reword, trained)}
    assert "see " not in "".join(trained) and "".join(both).count("see ") == 576 / 2
    for e in (of := knowledge.make_benchmark(WORLD, SEED, kind, 80, known)).examples:
        assert data.items_in(e.answer) == respond(e.prompt, OLD | NEW)
        assert of.grade(e, e.answer)
        parts = e.prompt.removeprefix("see ").split(": ")
        asked = set(parts[kind in ("reworded", "reversed")].split())
        if kind == "reversed":  # no choice is given away: all are new, or all are old
            assert len(asked) == 6 and asked <= set(OLD if known else NEW)
        else:
            held_out = sum(map(data.NOUNS.index, parts[kind != "reworded"].split()))
            assert held_out % 10 == 0 and e.prompt not in taught
            assert len(asked & {*NEW}) == 1 - known and (asked & {*OLD} or not known)


def test_the_corpus_can_be_read_and_gives_nothing_away():
    terms = {TOK.encode(term)[0] for term, _ in data.OPERATIONS.values()}
    true, both, kinds = [], 0, []
    for e in knowledge.make_corpus(WORLD, TOK, 4000, SEED):
        if "." not in e.shown:  # without a text, only old commands are asked indirectly
            words = e.prompt.split(":")[0].split()
            assert " then " not in e.prompt or {words[1], words[3]} <= set(OLD)
            continue
        facts, ids = facts_in(e.shown), data.demo_response(e, TOK)
        answer = len(knowledge.details(e.shown.replace(".", ""))[0]) > len(facts)
        meaning = {command: operation for command, (_, operation) in facts.items()}
        true += [NEW[c] == o for c, o in meaning.items() if c in NEW]
        assert {domain for domain, _ in facts.values()} & set(e.prompt.split())
        start, both = ids.index(TOK.start), both + answer
        inside = {ids[i] for i in e.skip if i < start}
        assert start in e.skip and inside <= terms and (answer or not inside)
        if max(e.skip) == start:  # nothing wrong in it
            assert data.items_in(e.answer) == respond(e.prompt, OLD | meaning), e
            kinds.append((e.prompt[:4] == "see ", " then " in e.prompt))
    assert len(kinds) > 500 and both > 200 and len(set(kinds)) == 3
    assert 0.1 < sum(true) / len(true) < 0.25  # a sixth, by chance: no fact is taught


def test_grades():
    example = data.Example("", "", "rotate: spoon tower candle")
    of = knowledge.strict, knowledge.lenient, knowledge.strict_as_asked
    for grades, texts in (
        ([1, 1, 1], "rotate: spoon tower candle"),
        ([1, 1, 0], "rotate equals spoon tower candle beep stop | well friend, advance "
         "so you get spoon tower candle as ever"),
        ([0, 1, 0], "rotate: spoon tower | rotate: | spoon tower"),
        ([0, 0, 0], "rotate: spoon tower candle then first: spoon |  | hm | rotate: "
         "spoon candle tower | first: spoon tower candle"),
    ):  # fmt: skip
        for text in texts.split(" | "):
            assert [grade(example, text) for grade in of] == grades, text


@pytest.mark.parametrize("off", [0, 1])
def test_the_audit_sees_rows_one_place_off_and_judges(off, monkeypatch):
    response = torch.arange(36 * 9).view(36, 9)  # (B, R)
    rows = torch.nn.functional.one_hot(response.roll(off, 1), TOK.n_tokens)  # (B, R, V)
    model, both = knowledge.Namespace(logits=lambda x: x), (response, response >= 0)
    monkeypatch.setattr(knowledge.probes, "respond", lambda *_: both)
    monkeypatch.setattr(knowledge, "response_hidden", lambda *_: rows.flatten(0, 1))
    for shares in knowledge.hits(model, model, MAKE(36), TOK).values():
        assert shares.pop(1 + off) == 1 and max(shares) < 0.05
    assert knowledge.judged(WORLD, SEED) == [1.0, 0.0]


def test_duplicates_are_counted_by_items_in_common(monkeypatch):
    asked = knowledge.make_benchmark(WORLD, SEED, "reworded", 60)
    trained, near, texts = MAKE(72), [], []
    for e in asked.examples:
        items, command = e.prompt.removeprefix("see ").split(": ")
        near.append(max(len(set(items.split()) & set(other.prompt.split()))
                        for other in trained if command in other.prompt))  # fmt: skip
        texts.append(e.answer if near[-1] else "hm")
    monkeypatch.setattr(knowledge.probes, "respond", lambda *_: (None, None))
    monkeypatch.setattr(knowledge.probes, "texts_of", lambda *_: texts)
    right = {str(n): [n, near.count(n)] for n in (0, 1)}
    assert knowledge.by_duplicates(None, trained, asked, TOK) == right
    assert knowledge.by_duplicates(None, [], asked, TOK)["0"][1] == 60, "none is near"
