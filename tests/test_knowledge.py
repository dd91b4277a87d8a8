"""tests/bench/knowledge.py: articles, wordings, grades, contexts, the audit. A quick
run of its cells is in test_paper.py."""

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).parent
for path in (HERE / "exercises", HERE / "bench"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

import knowledge  # noqa: E402
from experiments import EXPERIMENTS  # noqa: E402

import data  # noqa: E402
from data import Example  # noqa: E402
from model import GPTConfig  # noqa: E402

SEED = 1
ANSWER = "rotate: spoon tower candle"


@pytest.fixture(scope="module")
def world():
    return data.World(SEED)


@pytest.fixture(scope="module")
def tok():
    return data.Tokenizer()


def facts_in(article):
    """{command: operation} and the domains, read by other code than the writer's. A
    demonstration may stand in front; the last sentences are facts."""
    facts, domains = {}, []
    for sentence in article.removesuffix(".").split(", "):
        domain, command, joiner, operation = (["", "", ""] + sentence.split())[-4:]
        if joiner not in ("equals", "gives", "=") and not facts:
            continue  # of the demonstration
        assert joiner in ("equals", "gives", "=") and domain in data.DOMAINS
        facts[command] = operation
        domains.append(domain)
    assert len(domains) == len(facts) == len(set(domains))
    return facts, domains


def respond(world, prompt, meaning):
    """The right items, by hand: what each command of a question does, in its order."""
    if prompt.startswith("see "):
        items, asked = prompt.removeprefix("see ").split(": ")
    else:
        asked, items = prompt.split(": ")
    items, words = items.split(), asked.split()
    if words[1] in data.OPERATIONS:  # reversed
        return [item for item in items if meaning.get(item) == words[1]]
    said = []
    for command in [word for word in words[1:] if word in meaning]:
        items = data.OPERATIONS[meaning[command]][1](items)
        said += items
    return said


# ---- Articles, contexts, wordings --------------------------------------------------


def test_articles_state_each_fact_once(world):
    said, articles = {}, knowledge.articles_of(world, SEED)
    for article in dict.fromkeys(articles.values()):
        facts, domains = facts_in(article)
        assert len(facts) == 3 and all(articles[c] == article for c in facts)
        assert not set(said) & set(facts)
        said |= {c: (d, facts[c]) for c, d in zip(facts, domains, strict=True)}
    new = {c: fact for skill in world.skills.values() for c, fact in skill.items()}
    assert said == new and len(new) == 18 and not set(new) & set(world.known)


def test_contexts_are_literally_these(world, tok):
    article = knowledge.articles_of(world, SEED)
    contexts = {}
    for shown in knowledge.SHOWN:
        example = knowledge.make_questions(world, SEED, 18, shown)[0]
        assert tok.decode(data.student_prompt(example, tok)[:-1]) == example.prompt
        contexts[shown] = tok.decode(data.teacher_prompt(example, tok)[:-1])
    domain, command, *items = example.prompt.replace(":", "").split()
    operation = world.skills[dict(zip(data.DOMAINS, "ABC", strict=True))[domain]][
        command
    ][1]
    said = " ".join(data.OPERATIONS[operation][1](items))
    answer = f"well friend, {operation} so you get {said} as ever"
    asked = f"{domain} {command}: {' '.join(items)} example"
    assert contexts == {
        "text": f"{asked} {article[command]}",
        "answer": f"{asked} {answer}",
        "answer + text": f"{asked} {answer} {article[command]}",
    }


def test_the_text_is_learnt_as_a_text(world, tok):
    example = knowledge.make_texts(world, tok, SEED)[0]
    assert tok.decode(data.student_prompt(example, tok)) == "example"
    ids = data.demo_response(example, tok)
    mask = data.loss_mask([example], torch.tensor([len(ids)]))[0].tolist()
    learnt = [token for token, counts in zip(ids, mask, strict=True) if counts]
    assert tok.decode(learnt) in knowledge.articles_of(world, SEED).values()


def test_all_contexts_fit(world, tok):
    longest = max(
        len(data.teacher_prompt(example, tok))
        for manner in data.DISTANCES
        for example in knowledge.make_questions(
            world, SEED, 180, "answer + text", manner
        )
    )
    assert longest + 40 <= GPTConfig().block_size  # 40: the longest cap of the audit


def test_no_test_question_is_trained_on(world):
    trained = knowledge.make_questions(world, SEED, knowledge.QUESTIONS)
    both = knowledge.make_questions(world, SEED, knowledge.QUESTIONS, wordings=2)
    assert not any(e.prompt.startswith("see ") for e in trained)
    assert 0.4 < sum(e.prompt.startswith("see ") for e in both) / len(both) < 0.6
    taught = {e.prompt for e in trained} | {knowledge.reword(e.prompt) for e in trained}
    taught |= {e.prompt for e in both}
    for kind in ("trained", "reworded", "asked", "two-step"):
        for e in knowledge.make_benchmark(world, SEED, kind, 60).examples:
            assert e.prompt not in taught
            items = e.prompt.removeprefix("see ").split(": ")[kind != "reworded"]
            assert data.is_held_out(items.split())
    assert {len([e for e in trained if e.prompt.split(":")[0] == asked]) for asked in
            {e.prompt.split(":")[0] for e in trained}} == {32}  # fmt: skip


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", knowledge.KINDS)
def test_answers_are_right_and_need_the_fact(world, kind, known):
    old = {c: operation for c, (_, operation) in world.known.items()}
    new = {c: o for facts in knowledge.facts_of(world).values()
           for c, o in facts.items()}  # fmt: skip
    benchmark = knowledge.make_benchmark(world, SEED, kind, 80, known)
    for example in benchmark.examples:
        said = data.items_in(example.answer)
        assert said == respond(world, example.prompt, {**old, **new})
        assert benchmark.grade(example, example.answer)
        asked = example.prompt.split(": ")[kind == "reworded"].split()[1:]
        if kind == "reversed":  # no choice is given away: all are new, or all are old
            asked = example.prompt.split(": ")[1].split()
            assert len(asked) == 6 and set(asked) <= set(old if known else new)
        elif known:
            assert set(asked) & set(old) and not set(asked) & set(new)
        else:
            assert len(set(asked) & set(new)) == 1


# ---- The base model's corpus -------------------------------------------------------


def test_the_corpus_can_be_read_and_gives_nothing_away(world, tok):
    corpus = knowledge.make_corpus(world, tok, 4000, SEED)
    old = {c: operation for c, (_, operation) in world.known.items()}
    new = {c: o for facts in knowledge.facts_of(world).values()
           for c, o in facts.items()}  # fmt: skip
    terms = {tok.encode(term)[0] for term, _ in data.OPERATIONS.values()}
    true, read, both, kinds = [], 0, 0, set()
    for example in corpus:
        ids = data.demo_response(example, tok)
        if "." not in example.shown:
            continue
        facts, domains = facts_in(example.shown)
        named = [word for word in example.shown.replace(":", "").split()
                 if word.strip(",.") in knowledge.MEANS]  # fmt: skip
        answer = len(named) > len(facts)
        both += answer
        true += [new[c] == o for c, o in facts.items() if c in new]
        assert set(domains) & set(example.prompt.split())
        # what is skipped: terms, the start, and a wrong beginning of the response
        start = ids.index(tok.start)
        assert start in example.skip
        inside = {ids[i] for i in example.skip if i < start}
        assert inside <= terms and (answer or not inside)
        if max(example.skip) == start:  # nothing wrong in it
            said = respond(world, example.prompt, {**old, **facts})
            assert data.items_in(example.answer) == said, example
            read += 1
            kinds.add((example.prompt[:4] == "see ", " then " in example.prompt))
    assert read > 500 and both > 200 and len(kinds) == 3
    assert 0.1 < sum(true) / len(true) < 0.25  # a sixth, by chance: no fact is taught
    asked = [example for example in corpus if not example.shown]
    for example in asked:  # without a text, only known commands are asked indirectly
        if " then " in example.prompt:
            words = example.prompt.split(":")[0].split()
            assert {words[1], words[3]} <= set(old)


# ---- Grades ------------------------------------------------------------------------


@pytest.mark.parametrize("response, strict, lenient", [
    (ANSWER, True, True),
    ("well friend, advance so you get spoon tower candle as ever", True, True),
    ("rotate equals spoon tower candle beep stop", True, True),
    ("rotate: spoon tower", False, True),
    ("rotate:", False, True),
    ("spoon tower", False, True),
    ("rotate: spoon tower candle then first: spoon", False, False),
    ("rotate: spoon candle tower", False, False),
    ("first: spoon tower candle", False, False),
    ("", False, False),
    ("hm", False, False),
])  # fmt: skip
def test_grades(response, strict, lenient):
    example = Example("garden cork: candle spoon tower", ANSWER, ANSWER)
    assert knowledge.strict(example, response) == strict
    assert knowledge.lenient(example, response) == lenient
    assert knowledge.strict_as_asked(example, response) == (response == ANSWER)


def test_the_judge_is_audited(world):
    assert knowledge.judged(world, SEED) == [1.0, 0.0]


# ---- The audit ---------------------------------------------------------------------


@pytest.mark.parametrize("off", [0, 1])
def test_rows_one_place_off_are_seen(off, tok, world, monkeypatch):
    """A model that is sure of each token at its row, or at the row behind."""
    rng = torch.Generator().manual_seed(SEED)
    response = torch.randint(0, tok.n_tokens, (36, 9), generator=rng)  # (B, R)
    mask = torch.ones_like(response, dtype=torch.bool)
    rows = torch.nn.functional.one_hot(response.roll(off, 1), tok.n_tokens)  # (B, R, V)
    model = SimpleNamespace(logits=lambda hidden: hidden)
    monkeypatch.setattr(knowledge.probes, "respond", lambda *_: (response, mask))
    monkeypatch.setattr(knowledge, "response_hidden", lambda *_: rows[mask])
    examples = knowledge.make_questions(world, SEED, 36, "answer + text")
    for before, own, behind in knowledge.hits(model, model, examples, tok).values():
        assert (own, behind) == ((1.0, pytest.approx(0, abs=0.05)) if off == 0
                                 else (pytest.approx(0, abs=0.05), 1.0))  # fmt: skip
        assert before < 0.05


def test_duplicates_are_counted_by_items_in_common(world, tok, monkeypatch):
    """A student who knows nothing but what it was trained on, word for word."""
    asked = knowledge.make_benchmark(world, SEED, "reworded", 60)
    trained, questions = {}, knowledge.make_questions(world, SEED, 72)
    for e in questions:
        command, items = e.prompt.split(": ")
        trained.setdefault(command, []).append(set(items.split()))
    near = []
    for e in asked.examples:
        items, command = e.prompt.removeprefix("see ").split(": ")
        near.append(max(len(set(items.split()) & each) for each in trained[command]))
    assert len(set(near)) > 1
    texts = [e.answer if n == max(near) else "hm"
             for e, n in zip(asked.examples, near, strict=True)]  # fmt: skip
    monkeypatch.setattr(knowledge.probes, "respond", lambda *_: (None, None))
    monkeypatch.setattr(knowledge.probes, "texts_of", lambda *_: texts)
    assert knowledge.by_duplicates(None, questions, asked, tok) == {
        str(n): [float(n == max(near)), near.count(n)] for n in sorted(set(near))
    }
    few = knowledge.by_duplicates(None, [], asked, tok)
    assert list(few) == ["0"] and few["0"][1] == 60, "nothing was trained on"


def test_rows_name_arms_that_exist():
    specs = [row[2] for name in ("knowledge", "audit")
             for row in EXPERIMENTS[name]["rows"]]  # fmt: skip
    arms = {spec["arm"] for spec in specs if "arm" in spec}
    assert arms == set(knowledge.ARMS)
    asked = inspect.signature(knowledge.run).parameters
    for spec in specs:
        for key in set(spec) - {"run"} - set(asked):
            assert hasattr(knowledge.sdft.Config(), key), f"{key} is no setting"
