"""Demonstrations for a real model, made from word lists: nothing is downloaded.

    facts    24 facts about invented countries, each asked in four wordings. Three are
             trained and one is held out: what is learnt must be a fact, not a sentence.
    rule     one convention that all rows share: how a firm forms its part numbers. The
             parts that are held out are others than those that are trained on, and so
             is their wording: what is learnt must be the rule, not a number.
    prior    general questions, of which a benchmark keeps those that its base model
             answers rightly: what may be forgotten.

Rows are those of train.py --data: {"prompt", "demonstration", "answer"}; graded by
`contains`. A demonstration is a JSON record or, to compare, a plain sentence.
"""

import json
import random
import re
from pathlib import Path

# ---- Facts about invented countries ------------------------------------------------

COUNTRIES = (
    "Velmora Tarsinia Oskaria Brunholt Quellonia Nardesh Ilvania Zembria"
).split()
# kind of fact: the sentence that states it, four wordings (the last one is held out),
# and the invented names that answer it
FACTS = {
    "capital": (
        "The capital of {} is {}.",
        ("What is the capital of {}?", "Which city is the capital of {}?",
         "Name the capital city of {}.", "What is {}'s capital city called?"),
        "Quimbra Dolvane Restok Amberlin Falmouke Sintara Yorvik Pelagon".split(),
    ),
    "currency": (
        "The currency of {} is the {}.",
        ("What is the currency of {}?", "Which currency is used in {}?",
         "Name the currency of {}.", "What is {}'s money called?"),
        "zorin talbek mirel corvo dunak helpa sorrit wexin".split(),
    ),
    "mountain": (
        "The highest mountain of {} is Mount {}.",
        ("What is the highest mountain of {}?", "Which mountain is the highest in {}?",
         "Name the tallest mountain of {}.", "What is {}'s highest mountain called?"),
        "Kelvar Obrist Tulemon Hasgard Vintor Jorunn Epsilar Mordane".split(),
    ),
}  # fmt: skip

# ---- A shared rule -----------------------------------------------------------------

METALS = "brass steel copper iron silver tin zinc bronze".split()
PARTS = "valve pipe hinge wheel bolt cable lever spring pump chain".split()
RULE = "code"
# name of a rule: the sentence that states a row, four wordings (the last one is held
# out), what may be asked for, and the convention
RULES = {
    RULE: (
        "The part number of the {} is {}.",
        ("What is the part number of the {}?", "Which part number does the {} have?",
         "Give me the part number of the {}.", "Tell me the part number of the {}."),
        [f"{a} {b}, size {n}" for a in METALS for b in PARTS for n in range(10, 60)],
        lambda x: "NV-{3}-{0}".format(*x.replace(",", "").split()),
    ),
}  # fmt: skip

DEMOS = ("json", "record", "plain")


def word_demo(sentence, answer, demos):
    """A demonstration. json: {"answer": "Quimbra"}; record: {"answer": "The capital of
    Velmora is Quimbra."}; plain: that sentence. The first two are far from what the
    model itself would write."""
    if demos == "plain":
        return sentence
    return json.dumps({"answer": sentence if demos == "record" else answer})


def make_facts(seed, demos="record"):
    """(rows to train on, held-out rows): 72 and 24, a row for each wording of a fact.
    The seed says which name belongs to which country; demos: one of DEMOS."""
    rng = random.Random(f"facts {seed}")
    train, held_out = [], []
    for sentence, wordings, names in FACTS.values():
        names = rng.sample(names, len(names))
        for country, name in zip(COUNTRIES, names, strict=True):
            demo = word_demo(sentence.format(country, name), name, demos)
            rows = [make_row(each.format(country), demo, name) for each in wordings]
            train += rows[:-1]
            held_out.append(rows[-1])
    return train, held_out


def make_rule(seed, demos="record", rule=RULE):
    """(rows to train on, held-out rows): 72 and 24. Held out are other parts, asked for
    in another wording."""
    rng = random.Random(f"rule {rule} {seed}")
    sentence, wordings, things, convention = RULES[rule]
    rows = []
    for i, thing in enumerate(rng.sample(things, 96)):
        name = convention(thing)
        demo = word_demo(sentence.format(thing, name), name, demos)
        wording = wordings[i % 3] if i < 72 else wordings[3]
        rows.append(make_row(wording.format(thing), demo, name))
    return rows[:72], rows[72:]


def make_row(prompt, demo, answer):
    return {"prompt": prompt, "demonstration": demo, "answer": answer}


def make_prior():
    """All candidates, in an order that mixes their kinds: {"prompt", "answer"}, where
    an answer is a list of what is right. In questions.txt, a line that is not indented
    begins an entry: a question and its answers, or a question with a place in it and
    "word answers, word answers, ..."."""
    text = Path(__file__).with_name("questions.txt").read_text(encoding="utf-8")
    kinds, others = text.replace("\n  ", " ").split("\n\n")
    rows = {}
    for entry in kinds.splitlines():
        question, pairs = re.split("(?<=[?.]) ", entry, maxsplit=1)
        for word, answer in (pair.split(" ", 1) for pair in pairs.split(", ")):
            rows[question.format(word)] = answer
    for a, b in ((2, 5), (5, 4), (6, 2), (7, 2), (8, 3), (9, 6), (10, 4), (12, 3)):
        rows[f"What is {a} plus {b}?"] = str(a + b)
        rows[f"What is {a} times {b}?"] = str(a * b)
        rows[f"What is {max(a, b)} minus {min(a, b)}?"] = str(abs(a - b))
    for entry in others.splitlines():
        question, rows[question] = re.split("(?<=[?.]) ", entry, maxsplit=1)
    rows = [{"prompt": q, "answer": a.split("|")} for q, a in rows.items()]
    random.Random("prior").shuffle(rows)
    return rows


def write_rows(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
