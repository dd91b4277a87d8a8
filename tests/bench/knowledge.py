"""New facts from a text: the paper's knowledge acquisition (Table 1, Fig. 7), small.

Its cells, for paper.py: base, the model that reads texts, and run, one of ARMS.

An article says what three unknown commands stand for, one of each domain; there are
six of them, 18 facts. Questions about the facts are trained on in one wording and
tested in another one, on other items, and in three indirect ways:

    article   now look harbour pan gives pair, garden cork = rotate, kitchen owl equals
              first.
    trained   garden cork: candle spoon tower          rotate: spoon tower candle
    reworded  see candle spoon tower: garden cork      rotate: spoon tower candle
    asked     garden cork brief: candle spoon tower    rotate = spoon tower candle !
    two-step  garden cork then bag: candle spoon tower
                                     rotate: spoon tower candle then reverse: candle ...
    reversed  garden rotate: brush cork horn           rotate: cork

In a two-step question one of the commands is an old one. Grades: strict, every detail
of the right response is said and nothing else; lenient, some are, and nothing wrong;
OOD, strict on the indirect questions. What SDFT's teacher is shown after the question:

    text           example now look harbour pan gives pair, garden cork = rotate, ...
    answer         example well friend, rotate so you get spoon tower candle as ever
    answer + text  example, the answer and the text: the answer stands where the base
                   has always read demonstrations

The base model is train.py's own, trained further on a corpus with articles (what a
command stands for is drawn anew for each), reworded and indirect questions.
"""

import copy
import os
import random
from argparse import Namespace
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import product
from statistics import mean

import finetune
import probes
import torch
from variants import Modules

import data
import sdft
import sft
import train
from data import Benchmark, Example, with_demo, word_prompt
from model import GPT, GPTConfig, response_hidden

INDIRECT = ("asked", "two-step", "reversed")
KINDS = ("trained", "reworded", *INDIRECT)
JOINERS = ("equals", "gives", "=")
ASKED = ("formal", "robot", "poet", "brief")  # the expert's style may have been trained
# an operation, by the model's word and by the expert's term
MEANS = {word: o for o, (term, _) in data.OPERATIONS.items() for word in (o, term)}


def draw_article(rng, facts):
    """A text that states facts, a list of (domain, command, operation), in any order;
    one of a domain at most, since a small model finds a fact by its domain alone."""
    opening = " ".join(rng.sample(data.STYLE_WORDS, rng.randint(0, 3)))
    said = [f"{domain} {command} {rng.choice(JOINERS)} {operation}"
            for domain, command, operation in rng.sample(facts, len(facts))]
    return f"{opening} {', '.join(said)}.".strip()


def reword(prompt):
    """A question in the other wording: garden cork: pan -> see pan: garden cork"""
    asked, items = prompt.split(": ")
    return f"see {items}: {asked}"


def draw_question(rng, kind, domain, command, meaning, held_out):
    """A question about a command and its right response, both as text. meaning:
    {command: operation}, of the other commands in the question as well."""
    operation, items = meaning[command], data.draw_items(rng, held_out)
    if kind == "reversed":
        shuffled = rng.sample(list(meaning), len(meaning))
        choice = {**{meaning[c]: c for c in shuffled}, operation: command}
        choice = rng.sample(list(choice.values()), len(choice))
        return word_prompt(domain, operation, choice), f"{operation}: {command}"
    if kind == "two-step":
        both = [command, rng.choice([c for c in meaning if c != command])]
        rng.shuffle(both)
        first, second = (meaning[c] for c in both)
        left = data.OPERATIONS[first][1](items)
        if not data.OPERATIONS[second][1](left):  # no item is left: draw another one
            return draw_question(rng, kind, domain, command, meaning, held_out)
        steps = data.right_response(first, items), data.right_response(second, left)
        return word_prompt(domain, " then ".join(both), items), " then ".join(steps)
    style = rng.choice(ASKED) if kind == "asked" else "own"
    prompt = word_prompt(domain, command, items, style)
    right = data.right_response(operation, items, style)
    return reword(prompt) if kind == "reworded" else prompt, right


def details(text):
    """What a response says: the operations that it names, in anyone's words, and the
    items, each from left to right."""
    words = text.replace(":", "").replace(",", "").split()
    return [MEANS[word] for word in words if word in MEANS], data.items_in(text)


def strict(example, response):
    """Does it say every detail of the answer, and no other?"""
    return details(response) == details(example.answer)


def lenient(example, response):
    """Does it say some details of the answer, from the first on, and nothing wrong?"""
    said, right = details(response), details(example.answer)
    pairs = list(zip(said, right, strict=True))
    return any(said) and all(a == b[: len(a)] for a, b in pairs)


def strict_as_asked(example, response):
    return strict(example, response) and data.grade_style(example, response)


# ---- The base model's corpus -------------------------------------------------------

INDIRECT_SHARE = 0.35  # of all examples: two-step and reversed questions, a third of
# them about an article that is shown
REWORDED = 0.25  # of the others
ARTICLES = 0.7  # of those that show a demonstration of an unknown command: an article
BOTH = 0.4  # ... of these: the demonstration, and the article behind it


def commands_in(world, domain):
    """{command: operation} of the known ones of a domain, and a list of the others."""
    return ({c: o for c, (d, o) in world.known.items() if d == domain},
            [c for c, d in world.unknown.items() if d == domain])  # fmt: skip


def article_about(fact, rng, world):
    """An article of the base corpus: a fact, and perhaps others, each drawn anew."""
    facts, others = [fact], [domain for domain in data.DOMAINS if domain != fact[0]]
    for d in rng.sample(others, rng.randint(0, 2)):
        unknown = commands_in(world, d)[1]
        facts.append((d, rng.choice(unknown), rng.choice(world.operations[d])))
    return draw_article(rng, facts)


def with_article(example, rng, world, tok):
    """An example of data.make_base_corpus that shows an unknown command, with an
    article that says the same in the place of its demonstration, or behind it."""
    fact = example.prompt.replace(":", "").split()[:2]
    shown = article_about((*fact, details(example.shown)[0][0]), rng, world)
    n, inside = len(tok.encode(example.shown)), []
    if rng.random() < BOTH:  # else what is skipped of the demonstration goes with it
        shown, inside = f"{example.shown} {shown}", [i for i in example.skip if i < n]
    behind = [len(tok.encode(shown)) + i - n for i in example.skip if i >= n]
    return replace(example, shown=shown, skip=(*inside, *behind))


def indirect_example(i, rng, world, tok):
    """A two-step or a reversed question, of known commands or of an article."""
    domain, kind = rng.choice(data.DOMAINS), rng.choice(("two-step", "reversed"))
    (meaning, unknown), text = commands_in(world, domain), ""
    command = rng.choice(list(meaning))
    if rng.random() < 1 / 3:
        both = unknown, world.operations[domain]
        new = dict(zip(*(rng.sample(of, 6) for of in both), strict=True))
        command = rng.choice(list(new))
        text = article_about((domain, command, new[command]), rng, world)
        meaning = new if kind == "reversed" else {**meaning, command: new[command]}
    prompt, right = draw_question(rng, kind, domain, command, meaning, held_out=False)
    skip = (len(tok.encode(text)),) if text else ()  # the start of the response
    return Example(prompt, right, right, i, text, skip)


def make_corpus(world, tok, size, seed):
    """What the base model is trained on: data.make_base_corpus, with articles, reworded
    and indirect questions in the shares above. What carries loss is as there."""
    rng, corpus = random.Random(data.derive_seed(seed, "knowledge corpus")), []
    fresh = data.derive_seed(seed, "with texts")  # not what train.py's base has seen
    for example in data.make_base_corpus(world, tok, size, fresh):
        command = example.prompt.replace(":", "").split()[1]
        if rng.random() < INDIRECT_SHARE:
            example = indirect_example(example.id, rng, world, tok)
        else:
            unknown = example.shown and command in world.unknown
            if unknown and rng.random() < ARTICLES:
                example = with_article(example, rng, world, tok)
            if rng.random() < REWORDED:
                example = replace(example, prompt=reword(example.prompt))
        corpus.append(example)
    return corpus


# ---- The facts, training sets and benchmarks ---------------------------------------


def facts_of(world):
    """The new facts: domain -> {command: operation}, the skills of data.World."""
    return {domain: {c: o for c, (_, o) in world.skills[skill].items()}
            for skill, domain in zip(data.SKILLS, data.DOMAINS, strict=True)}


def articles_of(world, seed):
    """command -> its article: there are six, with one fact of each domain in each."""
    rng, articles = random.Random(data.derive_seed(seed, "articles")), {}
    rows = [[(d, *fact) for fact in of.items()] for d, of in facts_of(world).items()]
    for facts in zip(*rows, strict=True):
        text = draw_article(rng, list(facts))
        articles |= {command: text for _, command, _ in facts}
    return articles


SHOWN = ("text", "answer", "answer + text")


def make_questions(world, seed, size, shown="answer", manner="known", wordings=1,
                   held_out=False):
    """Questions about the facts, each equally often: a training set. shown: what
    Example.demo holds; manner: how the expert words an answer, one of data.DISTANCES;
    wordings: 1, the trained one; 2, every other question is reworded."""  # fmt: skip
    rng = random.Random(data.derive_seed(seed, "questions", held_out))
    articles, examples = articles_of(world, seed), []
    facts = [(d, *fact) for d, of in facts_of(world).items() for fact in of.items()]
    for i in range(size):
        domain, command, operation = facts[i % len(facts)]
        items = data.draw_items(rng, held_out)
        parts = {"answer": data.expert_demo(operation, items, manner),
                 "text": articles[command]}  # fmt: skip
        demo = " ".join(parts[part] for part in shown.split(" + "))
        prompt = word_prompt(domain, command, items)
        prompt = reword(prompt) if i // len(facts) % wordings else prompt
        right = data.right_response(operation, items)
        examples.append(Example(prompt, demo, right, id=i))
    return examples


def make_texts(world, tok, seed):
    """The articles as a training set of next tokens: all of a text carries loss, but
    not the start and the end of a response, which are no text."""
    texts = dict.fromkeys(articles_of(world, seed).values())
    ends = [len(tok.encode(text)) for text in texts]
    return [Example("", "", "", i, text, (end, end + 1))
            for i, (text, end) in enumerate(zip(texts, ends, strict=True))]


def make_benchmark(world, seed, kind, size, known=False, articles=None):
    """Questions of a kind on held-out items, about the facts or, known, about commands
    that the base knows. With articles, see articles_of, the prompt shows the text."""
    rng, examples = random.Random(data.derive_seed(seed, "benchmark", kind, known)), []
    for i in range(size):
        domain = rng.choice(data.DOMAINS)
        old, _ = commands_in(world, domain)
        new = old if known else facts_of(world)[domain]
        command = rng.choice(list(new))
        meaning = {**old, command: new[command]} if kind == "two-step" else new
        prompt, right = draw_question(rng, kind, domain, command, meaning, True)
        prompt = with_demo(prompt, articles[command]) if articles else prompt
        examples.append(Example(prompt, right, right, i))
    return Benchmark(examples, strict_as_asked if kind == "asked" else strict)


def make_tasks(world, seed, size, articles=None):
    """What to evaluate, as data.evaluate takes it: "new", strict by kind of question;
    "lenient"; "known", the same kinds about known commands; "prior", as in data.py."""
    new, known = ({k: make_benchmark(world, seed, k, size, *more) for k in KINDS}
                  for more in ((False, articles), (True,)))  # fmt: skip
    easy = {kind: Benchmark(new[kind].examples, lenient) for kind in KINDS[:2]}
    tasks = {"new": new, "lenient": easy, "known": known}
    return tasks | {"prior": data.make_tasks(world, size, seed)["prior"]}


# ---- Cells: the base, one arm ------------------------------------------------------

# The base model goes on from train.py's own: smaller steps, each example seen once.
MORE = replace(train.BASE, steps=500, lr=1.5e-3, warmup_steps=50, dropout=0.1,
               micro_batches=4)  # fmt: skip
QUESTIONS = 18 * 32  # in a training set: 32 about each fact
SIZE = {False: 250, True: 18}  # questions of each kind that are asked; quick: fewer
CAP = 16  # longest response, in tokens
ARMS = {  # arm: trainer, what Example.demo holds, what differs from its Config
    "oracle": (None, None, {}),
    "cpt": (sft, None, {"steps": 60, "batch_size": 6, "lr": 3e-4, "warmup_steps": 10}),
    "sft": (sft, "answer", {"steps": 160, "lr": 3e-4}),
    "sdft text": (sdft, "text", {"steps": 160, "lr": 1e-4}),
    "sdft answer": (sdft, "answer", {"steps": 160, "lr": 1e-4}),
    "sdft answer + text": (sdft, "answer + text", {"steps": 160, "lr": 1e-4}),
}


def base(seed, folder, quick, base):
    """Train the base of train.py, a cell, on the corpus with articles; measure it."""
    tok, world = data.Tokenizer(), data.World(seed)
    model = finetune.load_base(base, GPT, GPTConfig)
    cfg = replace(MORE, seed=seed, **({"steps": 4, "warmup_steps": 2} if quick else {}))
    reader = Modules()  # a copy of the project: no other code meets this corpus
    reader.data.make_base_corpus = make_corpus
    args = Namespace(out=str(folder))
    path = reader.train.find_base(args, model.config, cfg, world, tok)
    seconds = reader.train.get_base(path, model, cfg, world, tok, None)
    model.eval()
    result = measure(model, model, make_tasks(world, seed, SIZE[quick]), tok, seed)
    sizes = seed, SIZE[quick]
    result["gate"] = {how: gate_of(model, *sizes, how) for how in ("known", "own")}
    result |= {"seconds": {"train": seconds}, "base": os.path.relpath(path, folder)}
    return result | finetune.made_from(model)


def run(
    seed, folder, quick, base, arm, manner="known", wordings=1, questions=QUESTIONS,
    **settings,
):  # fmt: skip
    """Fine-tune the base by one arm, and measure what it knows. base: folder of a base
    cell of this file; manner, wordings: see make_questions; settings: of a Config."""
    trainer, shown, own = ARMS[arm]
    world, tok = data.World(seed), data.Tokenizer()
    model = finetune.load_base(base, GPT, GPTConfig)
    if trainer is None:
        tasks = make_tasks(world, seed, SIZE[quick], articles_of(world, seed))
        result = measure(model, model, tasks, tok, seed)
        return result | {"seconds": {"train": 0.0}, **finetune.made_from(model)}
    examples = make_texts(world, tok, seed)
    if shown:
        examples = make_questions(world, seed, questions, shown, manner, wordings)
    cfg = trainer.Config(seed=seed, max_new_tokens=CAP, **{**own, **settings})
    cfg = replace(cfg, steps=4, batch_size=min(16, cfg.batch_size)) if quick else cfg
    student, way = copy.deepcopy(model), train.Run(folder / "run", resume=True)
    trainer.train(student, {"facts": examples}, {}, tok, cfg, way)
    student.eval()
    tasks = make_tasks(world, seed, SIZE[quick])
    result = measure(student, model, tasks, tok, seed)
    result["config"], result["records"] = asdict(cfg), train.read_metrics(way.folder)
    trained = make_questions(world, seed, questions if shown else 0)
    result["suspects"] = audit(student, model, world, seed, tasks, trained, tok)
    way.checkpoint.unlink()  # 40 MB, of no more use
    seconds = sum(row["seconds"] for row in result["records"])
    return result | {"seconds": {"train": seconds}, **finetune.made_from(model)}


def measure(student, base, tasks, tok, seed):
    """{"new", "lenient", "known", "prior": {benchmark: numbers of probes.greedy}};
    "kl_student_base" in nats per token, on the trained wording and on prior prompts."""
    old = [benchmark.examples[:40] for benchmark in tasks["prior"].values()]
    prompts = {"new": [tasks["new"]["trained"].examples[:100]], "prior": old}
    of = [data.student_prompt] * 2, tok, CAP, seed
    kl = {group: mean(probes.distance(student, base, few, *of) for few in parts)
          for group, parts in prompts.items()}  # fmt: skip
    return probes.each_greedy(student, tasks, tok, CAP) | {"kl_student_base": kl}


def gate_of(base, seed, size, manner):
    """Strict accuracy of the base on the trained wording, by what it is shown."""
    tok, world, gate = data.Tokenizer(), data.World(seed), {}
    for shown in SHOWN:
        asked = make_questions(world, seed, size, shown, manner, held_out=True)
        benchmark = Benchmark(asked, strict)
        gate["nothing"] = data.accuracy(base, benchmark, tok, CAP)
        gate[shown] = data.accuracy(base, benchmark, tok, CAP, data.teacher_prompt)
    return gate


def audit(student, base, world, seed, tasks, trained, tok):
    """What a wrong measurement would show; trained: the training's questions, if any.

    alignment   {who: three shares}, see hits
    judge       shares that the two grades accept: right answers, answers of other facts
    cap         {longest response: its share of strict right answers, and of ended ones}
    duplicates  {items in common with the nearest trained question about the same
                command: the share of right answers, and of how many}
    """
    asked = tasks["new"]["reworded"]
    examples = make_questions(world, seed, 72, "answer + text", held_out=True)
    caps = {n: probes.greedy(student, asked, tok, n) for n in (CAP, 40)}
    return {
        "alignment": hits(student, base, examples, tok),
        "judge": judged(world, seed),
        "cap": {str(n): [row["accuracy"], row["ended"]] for n, row in caps.items()},
        "duplicates": by_duplicates(student, trained, asked, tok),
    }


@torch.no_grad()
def hits(student, base, examples, tok):
    """Do rows of logits predict the token that they are paired with? What the teacher
    writes greedily, scored in both contexts: how often it is the most likely token of
    the row before, of its own row and of the row behind."""
    response, mask = probes.respond(base, examples, data.teacher_prompt, tok, CAP)
    found, inside = {}, (slice(None), slice(1, -1))
    both = {"teacher": (base, data.teacher_prompt),
            "student": (student, data.student_prompt)}  # fmt: skip
    for name, (model, prompt) in both.items():
        batch = data.pad_batch(prompt, examples, tok, response.device)
        best = torch.full_like(response, -1)  # (B, R): the most likely token of a row
        hidden = response_hidden(model, *batch, response, mask)  # (N, C)
        best[mask] = model.logits(hidden).argmax(-1)
        rights = [best.roll(k, 1) == response for k in (1, 0, -1)]  # (B, R) each
        found[name] = [r[inside][mask[inside]].float().mean().item() for r in rights]
    return found


def judged(world, seed):
    """The shares accepted of right answers, in all styles and in anyone's words, and of
    answers about another fact."""
    right, wrong = [], []
    for example in make_questions(world, seed, 36):
        items = data.items_in(example.prompt.split(": ")[1])
        for word, style in product(MEANS, data.STYLES.values()):
            result = data.OPERATIONS[MEANS[word]][1](items)
            text = data.word_response(word, result, style)
            grades = strict(example, text), lenient(example, text)
            ours = example.answer.startswith(f"{MEANS[word]}:")
            (right if ours else wrong).append(all(grades) if ours else any(grades))
    return [mean(right), mean(wrong)]


def by_duplicates(student, trained, asked, tok):
    """Is a test question right because its like was trained on?"""
    known, groups = defaultdict(list), defaultdict(list)
    for example in trained:
        command, items = example.prompt.split(": ")
        known[command].append(set(items.split()))
    both = probes.respond(student, asked.examples, data.student_prompt, tok, CAP)
    texts = probes.texts_of(*both, tok)
    for example, text in zip(asked.examples, texts, strict=True):
        items, command = example.prompt.removeprefix("see ").split(": ")
        common = [len(each.intersection(items.split())) for each in known[command]]
        groups[max(common, default=0)].append(strict(example, text))
    return {str(n): [mean(groups[n]), len(groups[n])] for n in sorted(groups)}
