"""New facts from a text: the paper's knowledge acquisition (Table 1, Fig. 7), small.

    python tests/bench/knowledge.py --seed 100                   # all rows of the table
    python tests/bench/knowledge.py --seed 100 --row "SDFT text" # one of them, to read
    python tests/bench/knowledge.py audit --seed 100             # suspects, measured
    python tests/bench/knowledge.py rates --seed 100             # for choosing rates
    python tests/bench/knowledge.py --quick                      # does it run here?

An article says what three unknown commands stand for, one of each domain; there are
six of them, 18 facts. Questions about the facts are trained on in one wording and
tested in another one, on other items, and in three indirect ways that no training
shows:

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

    text           garden cork: candle spoon tower example now look harbour pan gives
                   pair, garden cork = rotate, kitchen owl equals first.
    answer         garden cork: candle spoon tower example well friend, rotate so you
                   get spoon tower candle as ever
    text + answer  the question, example, the text and the answer

The base model is train.py's own, which then goes on with a corpus that has articles
(what a command stands for is drawn anew for each), reworded and indirect questions in
it. So it can read an article in its context and do with a known command all that is
asked of a new one; the table says how well.
"""

import argparse
import copy
import json
import random
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "exercises")]
from variants import Modules  # noqa: E402

import data  # noqa: E402
import sdft  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from data import Benchmark, Example, with_demo, word_prompt  # noqa: E402
from model import GPT, generate, response_hidden  # noqa: E402

# ---- What is asked, and what is right ----------------------------------------------

INDIRECT = ("asked", "two-step", "reversed")
KINDS = ("trained", "reworded", *INDIRECT)
JOINERS = ("equals", "gives", "=")
ASKED = ("formal", "robot", "poet", "brief")  # the expert's style may have been trained
# an operation, by the model's word and by the expert's term
MEANS = {word: o for o, (term, _) in data.OPERATIONS.items() for word in (o, term)}


def draw_article(rng, facts):
    """A text that states facts, a list of (domain, command, operation), in any order.
    There is at most one of each domain: a small model finds a fact by its domain, whose
    operations it knows, and not yet among several commands of one domain."""
    opening = " ".join(rng.sample(data.STYLE_WORDS, rng.randint(0, 3)))
    said = [
        f"{domain} {command} {rng.choice(JOINERS)} {operation}"
        for domain, command, operation in rng.sample(facts, len(facts))
    ]
    return f"{opening} {', '.join(said)}.".strip()


def reword(prompt):
    """A question in the other wording: garden cork: pan -> see pan: garden cork"""
    asked, items = prompt.split(": ")
    return f"see {items}: {asked}"


def draw_question(rng, kind, domain, command, meaning, held_out):
    """A question about a command and its right response, both as text.

    meaning: {command: operation}, which has the other commands of the question, too:
    the second of a two-step one, and those among which a reversed one lets choose.
    """
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
    """The same as strict, and in the style that was asked for."""
    return strict(example, response) and data.grade_style(example, response)


# ---- The base model's corpus -------------------------------------------------------

INDIRECT_SHARE = 0.35  # of all examples: two-step and reversed questions, a third of
# them about an article that is shown
REWORDED = 0.25  # of the others
ARTICLES = 0.7  # of those that show a demonstration of an unknown command: an article
BOTH = 0.4  # ... of these: the article, and the demonstration behind it


def known_in(world, domain):
    """The known commands of a domain, {command: operation}."""
    return {c: o for c, (d, o) in world.known.items() if d == domain}


def unknown_in(world, domain):
    return [c for c, d in world.unknown.items() if d == domain]


def article_about(fact, rng, world):
    """An article of the base corpus: a fact, and perhaps others, each drawn anew."""
    others = [domain for domain in data.DOMAINS if domain != fact[0]]
    facts = [
        (d, rng.choice(unknown_in(world, d)), rng.choice(world.operations[d]))
        for d in rng.sample(others, rng.randint(0, 2))
    ]
    return draw_article(rng, [fact, *facts])


def with_article(example, rng, world, tok):
    """An example of data.make_base_corpus that shows an unknown command, with an
    article that says the same in the place of its demonstration, or before it."""
    domain, command = example.prompt.replace(":", "").split()[:2]
    words = example.shown.replace(":", "").split()
    operation = next(MEANS[word] for word in words if word in MEANS)
    shown = article = article_about((domain, command, operation), rng, world)
    n, skip = len(tok.encode(article)), example.skip
    if rng.random() < BOTH:
        shown = f"{article} {example.shown}"
    else:  # what is skipped of the demonstration goes with it
        without = len(tok.encode(example.shown))
        n, skip = n - without, [i for i in skip if i >= without]
    return replace(example, shown=shown, skip=tuple(n + i for i in skip))


def indirect_example(i, rng, world, tok):
    """A two-step or a reversed question, of known commands or of an article."""
    domain, kind = rng.choice(data.DOMAINS), rng.choice(("two-step", "reversed"))
    meaning, text = known_in(world, domain), ""
    command = rng.choice(list(meaning))
    if rng.random() < 1 / 3:
        new = dict(zip(
            rng.sample(unknown_in(world, domain), 6),
            rng.sample(world.operations[domain], 6),
            strict=True,
        ))  # fmt: skip
        command = rng.choice(list(new))
        text = article_about((domain, command, new[command]), rng, world)
        meaning = new if kind == "reversed" else {**meaning, command: new[command]}
    prompt, right = draw_question(rng, kind, domain, command, meaning, held_out=False)
    skip = (len(tok.encode(text)),) if text else ()  # the start of the response
    return Example(prompt, right, right, i, text, skip)


def make_corpus(world, tok, size, seed):
    """What the base model is trained on: data.make_base_corpus, with articles, reworded
    and indirect questions in the shares above. What carries loss is as there."""
    rng = random.Random(data.derive_seed(seed, "knowledge corpus"))
    corpus = []
    fresh = data.derive_seed(seed, "with texts")  # not what train.py's base has seen
    for example in data.make_base_corpus(world, tok, size, fresh):
        command = example.prompt.replace(":", "").split()[1]
        unknown = example.shown and command in world.unknown
        if rng.random() < INDIRECT_SHARE:
            corpus.append(indirect_example(example.id, rng, world, tok))
            continue
        if unknown and rng.random() < ARTICLES:
            example = with_article(example, rng, world, tok)
        if rng.random() < REWORDED:
            example = replace(example, prompt=reword(example.prompt))
        corpus.append(example)
    return corpus


# ---- The facts, training sets and benchmarks ---------------------------------------


def facts_of(world):
    """The new facts: domain -> {command: operation}, the skills of data.World."""
    return {
        domain: {c: operation for c, (_, operation) in world.skills[skill].items()}
        for skill, domain in zip(data.SKILLS, data.DOMAINS, strict=True)
    }


def articles_of(world, seed):
    """command -> the article that states its fact: six of them, one fact of each
    domain in each."""
    rng, articles = random.Random(data.derive_seed(seed, "articles")), {}
    rows = [[(d, *fact) for fact in facts.items()]
            for d, facts in facts_of(world).items()]  # fmt: skip
    for facts in zip(*rows, strict=True):
        text = draw_article(rng, list(facts))
        articles |= {command: text for _, command, _ in facts}
    return articles


SHOWN = ("text", "answer", "text + answer")


def make_questions(world, seed, size, shown="answer", manner="known", wordings=1,
                   held_out=False):
    """Questions about the facts, each fact equally often: a training set, a list.

    shown: what Example.demo holds, hence what SFT imitates (an answer) or what SDFT's
        teacher reads. manner: data.DISTANCES, how the expert words an answer.
    wordings: 1, the trained wording; 2, every other question is reworded.
    """  # fmt: skip
    rng = random.Random(data.derive_seed(seed, "questions", held_out))
    facts, articles = facts_of(world), articles_of(world, seed)
    everything = [(d, c) for d in facts for c in facts[d]]
    examples = []
    for i in range(size):
        domain, command = everything[i % len(everything)]
        operation, items = facts[domain][command], data.draw_items(rng, held_out)
        answer = data.expert_demo(operation, items, manner)
        demo = {
            "text": articles[command],
            "answer": answer,
            "text + answer": f"{articles[command]} {answer}",
        }[shown]
        prompt = word_prompt(domain, command, items)
        prompt = reword(prompt) if i // len(everything) % wordings else prompt
        right = data.right_response(operation, items)
        examples.append(Example(prompt, demo, right, id=i))
    return examples


def make_texts(world, tok, seed):
    """The articles as a training set of next tokens: all of a text carries loss, but
    not the start and the end of a response, which are no text."""
    texts = dict.fromkeys(articles_of(world, seed).values())
    return [
        Example("", "", "", i, text, (len(tok.encode(text)), len(tok.encode(text)) + 1))
        for i, text in enumerate(texts)
    ]


def make_benchmark(world, seed, kind, size, known=False, articles=None):
    """Questions of a kind on held-out items, about the facts or, known, about commands
    that the base knows. With articles, see articles_of, the prompt shows the text."""
    rng = random.Random(data.derive_seed(seed, "benchmark", kind, known))
    examples = []
    for i in range(size):
        domain = rng.choice(data.DOMAINS)
        old = known_in(world, domain)
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
    new = {kind: make_benchmark(world, seed, kind, size, articles=articles)
           for kind in KINDS}  # fmt: skip
    return {
        "new": new,
        "lenient": {k: Benchmark(new[k].examples, lenient) for k in KINDS[:2]},
        "known": {k: make_benchmark(world, seed, k, size, known=True) for k in KINDS},
        "prior": data.make_tasks(world, size, seed)["prior"],
    }


# ---- Cells: one arm, one seed ------------------------------------------------------

# The base model goes on from train.py's own: smaller steps, each example seen once.
MORE = replace(
    train.BASE, steps=500, lr=1.5e-3, warmup_steps=50, dropout=0.1, micro_batches=4
)
RATES = {  # that were tried, on seeds that no result reports
    "cpt": (1e-4, 3e-4, 1e-3),
    "sft": (1e-4, 3e-4, 6e-4),
    "sdft": (5e-5, 1e-4, 2e-4, 4e-4),
}
QUESTIONS = 18 * 32  # in a training set: 32 about each fact
EVAL_SIZE = 250  # questions of each kind
ARMS = {  # arm: trainer, what Example.demo holds, what differs from its Config
    "base": (None, None, {}),
    "oracle": (None, None, {}),
    "cpt": (sft, None, {"steps": 60, "batch_size": 6, "lr": 3e-4, "warmup_steps": 10}),
    "sft": (sft, "answer", {"steps": 160, "lr": 3e-4}),
    "sdft-text": (sdft, "text", {"steps": 160, "lr": 1e-4}),
    "sdft-answer": (sdft, "answer", {"steps": 160, "lr": 1e-4}),
    "sdft-both": (sdft, "text + answer", {"steps": 160, "lr": 1e-4}),
}


def get_base(seed, folder, quick=False, device="auto"):
    """The base model of a seed: train.py's own, in folder/base, and beside it the one
    that has gone on from there and reads articles. What is missing is made, by
    train.get_base; who comes while another process makes it waits.
    Returns: the GPT, and the seconds that both took to make."""
    out, device = Path(folder), train.choose_device(device)[0]
    tok, world = data.Tokenizer(), data.World(seed)
    flags = ["--base-steps", "8"] if quick else []
    args = train.parse_args(["--seed", str(seed), *flags])
    config, first = train.base_settings(args, 1)
    more = replace(MORE, seed=seed)
    more = replace(more, steps=4, warmup_steps=2) if quick else more
    base = GPT(config, data.make_rng(seed, "weights")).to(device)
    base.dtype = train.choose_dtype("auto", device)
    reader = Modules()  # a copy of the project: no other code meets this corpus
    reader.data.make_base_corpus = make_corpus
    total = 0.0
    for own, cfg in ((train, first), (reader.train, more)):
        args = Namespace(seed=seed, out=str(out), base=None)
        path = own.find_base(args, config, cfg, world, tok, base.dtype)
        while True:
            try:
                total += own.get_base(
                    args, path, config, cfg, base, world, tok, None, None
                )
                break
            except own.UserError as error:
                if "in use" not in str(error):
                    raise
                time.sleep(5)
        out = path.parent  # the second one lies inside the first one's folder
    return base.eval(), total


def fine_tune(arm, base, seed, folder, quick=False, manner="known", wordings=1,
              questions=QUESTIONS, **settings):
    """A student made from the base by one arm, and its trainer's Config. What a folder
    has of the run is not made again. settings: fields of Config."""  # fmt: skip
    trainer, shown, own = ARMS[arm]
    student = copy.deepcopy(base)
    if trainer is None:
        return student, sft.Config(seed=seed)
    cfg = trainer.Config(seed=seed, **{**own, **settings})
    cfg = replace(cfg, steps=4, batch_size=min(16, cfg.batch_size)) if quick else cfg
    world, tok = data.World(seed), data.Tokenizer()
    examples = (
        make_questions(world, seed, questions, shown, manner, wordings)
        if shown else make_texts(world, tok, seed)
    )  # fmt: skip
    run = train.Run(folder, resume=True, note={"arm": arm})
    trainer.train(student, {"facts": examples}, {}, tok, cfg, run)
    return student.eval(), cfg


def gate_of(base, seed, size, manner):
    """Strict accuracy of the base on the trained wording, by what it is shown."""
    tok, world, gate = data.Tokenizer(), data.World(seed), {}
    for shown in SHOWN:
        asked = make_questions(world, seed, size, shown, manner, held_out=True)
        benchmark = Benchmark(asked, strict)
        gate["nothing"] = data.accuracy(base, benchmark, tok, 16)
        gate[shown] = data.accuracy(base, benchmark, tok, 16, data.teacher_prompt)
    return gate


def mean_length(student, tasks, tok, cap):
    """Tokens of a greedy response to a reworded question, its end included."""
    contexts = [data.student_prompt(e, tok) for e in tasks["new"]["reworded"].examples]
    texts = data.greedy_responses(student, contexts, tok, cap)
    return mean(min(cap, len(tok.encode(text)) + 1) for text in texts)


def run_cell(seed, folder, quick=False, arm="base", base=None, device="auto",
             manner="known", max_new_tokens=16, **settings):
    """Train and evaluate one arm on one seed.

    Args:
        folder: of this cell, a Path. The base model is looked for, or made, in the
            folder "base" beside it; `base` names another folder that has a "base".
        quick: a base of 12 updates, arms of 4: does it run?
        manner, settings: see make_questions and fine_tune.
    Returns: a dict of plain values: accuracies {"new", "lenient", "known", "prior"},
        "kl_student_base" in nats per token, "length" in tokens, "seconds", "config".
    """  # fmt: skip
    folder = Path(folder)
    model, base_seconds = get_base(seed, Path(base or folder.parent), quick, device)
    tok, world = data.Tokenizer(), data.World(seed)
    size = 18 if quick else EVAL_SIZE
    start = time.perf_counter()
    run = folder / "run"
    student, cfg = fine_tune(arm, model, seed, run, quick, manner, **settings)
    seconds = time.perf_counter() - start
    articles = articles_of(world, seed) if arm == "oracle" else None
    tasks = make_tasks(world, seed, size, articles)
    cfg = replace(cfg, max_new_tokens=max_new_tokens)
    record = data.evaluate({"student": student}, model, "trained", tasks, tok, cfg)
    return {
        "arm": arm, "seed": seed, "manner": manner, "quick": quick,
        "config": asdict(cfg), "settings": settings,
        "machine": train.machine_of(student),
        "seconds": {"base": base_seconds, "fine_tune": seconds,
                    "evaluate": time.perf_counter() - start - seconds},
        **{key: record[key] for key in tasks},
        "kl_student_base": record["kl_student_base"],
        "length": mean_length(student, tasks, tok, max_new_tokens),
        "gate": gate_of(model, seed, size, manner) if arm == "base" else None,
    }  # fmt: skip


# ---- The table ---------------------------------------------------------------------

ROWS = [  # label, seeds, keywords of run_cell
    ("base", 5, {"arm": "base"}),
    ("oracle: base + text", 5, {"arm": "oracle"}),
    ("CPT", 5, {"arm": "cpt"}),
    ("SFT", 5, {"arm": "sft"}),
    ("SDFT text + answer", 5, {"arm": "sdft-both"}),
    ("SDFT answer", 5, {"arm": "sdft-answer"}),
    ("SDFT text", 5, {"arm": "sdft-text"}),
    ("SFT, own manner", 5, {"arm": "sft", "manner": "own"}),
    ("SDFT text + answer, own manner", 5, {"arm": "sdft-both", "manner": "own"}),
]
PAPER = {  # Table 1 and Fig. 7, in per cent: strict, lenient, OOD
    "base": ("0", "0", "0"),
    "oracle: base + text": ("91", "100", "100"),
    "CPT": ("9", "37", "7"),
    "SFT": ("80", "95", "80"),
    "SDFT text + answer": ("89", "100", "98"),
    "SDFT answer": ("75 to 89", "", ""),
    "SDFT text": ("75", "", ""),
}
claim = (
    "SDFT whose teacher is shown text and answer knows the facts better than SFT on "
    "the answers, most of all when they are asked for indirectly; both know them "
    "better than CPT on the text. A teacher shown the text alone teaches less."
)
fails_if = (
    "over the seeds, strict (reworded) or OOD of 'SDFT text + answer' is not above "
    "SFT's, or CPT is not the lowest of the trained rows, or 'SDFT text' is not below "
    "'SDFT text + answer' in strict."
)


def summary(cell):
    """The numbers of a cell that the table shows, as {column: value}."""
    new, prior = cell["new"], mean(cell["prior"].values())
    return {
        "strict": new["reworded"],
        "lenient": cell["lenient"]["reworded"],
        "OOD": mean(new[kind] for kind in INDIRECT),
        **{kind: new[kind] for kind in ("trained", *INDIRECT)},
        "known, OOD": mean(cell["known"][kind] for kind in INDIRECT),
        "prior": prior,
        "length": cell["length"],
        "KL(student ‖ base)": cell["kl_student_base"],
    }


def spread(values):
    """mean (lowest to highest), or the value alone"""
    text = f"{mean(values):.2f}"
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return text if len(values) == 1 else f"{text} ({low} to {high})"


def make_table(results):
    """{label: [cell of each seed]} -> the table and the gate, as markdown."""
    lines, titles = [], None
    for label, cells in results.items():
        rows = [summary(cell) for cell in cells]
        if titles is None:
            titles = list(rows[0])
            lines += ["| run | seeds | paper: strict, lenient, OOD | "
                      + " | ".join(titles) + " |"]  # fmt: skip
            lines += ["|---|" * 1 + "---|" * (2 + len(titles))]
        paper = " / ".join(filter(None, PAPER.get(label, ())))
        values = " | ".join(spread([row[title] for row in rows]) for title in titles)
        lines.append(f"| {label} | {len(rows)} | {paper} | {values} |")
    if gates := [cell["gate"] for cell in results.get("base", [])]:
        values = (f"{shown} {spread([g[shown] for g in gates])}" for shown in gates[0])
        lines += ["", f"Gate, the base shown: {'; '.join(values)}."]
        rows = [cell["known"] for cell in results["base"]]
        values = (f"{kind} {spread([row[kind] for row in rows])}" for kind in KINDS)
        lines.append(f"Premise, the base on known commands: {'; '.join(values)}.")
    return "\n".join(lines)


def draw(results, path):
    """What each run knows, ours (filled, a dot for each seed, the mean as a bar) and
    the paper's (a ring), as a picture without a background. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grey, colors = "#808080", {"SFT": "#e07b1a", "SDFT": "#3f8fd6", "CPT": "#2aa198"}
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color")
    with plt.rc_context({key: grey for key in keys} | {"font.size": 9}):
        size = (9.5, 0.6 + 0.3 * len(results))
        figure, axes = plt.subplots(1, 3, figsize=size, sharey=True)
        for j, (axis, title) in enumerate(zip(axes, ("strict", "lenient", "OOD"),
                                              strict=True)):  # fmt: skip
            for i, (label, cells) in enumerate(results.items()):
                color = colors.get(label.split()[0].strip(","), grey)
                ours = [summary(cell)[title] for cell in cells]
                axis.plot(ours, [-i] * len(ours), "o", color=color, ms=4, alpha=0.55)
                axis.plot([mean(ours)] * 2, [-i - 0.3, -i + 0.3], color=color, lw=2)
                paper = PAPER.get(label, ("", "", ""))[j]
                if paper.isdigit():
                    axis.plot(int(paper) / 100, -i, "o", ms=9, mfc="none", mec=grey)
                    if title == "strict" and label.startswith("oracle"):
                        axis.annotate("paper", (int(paper) / 100, -i), (-36, -3),
                                      textcoords="offset points")  # fmt: skip
            axis.set_title(title, loc="left", color=grey)
            axis.set(xlim=(-0.05, 1.05), ylim=(-len(results) + 0.4, 0.6))
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
        axes[0].set_yticks([-i for i in range(len(results))], list(results))
        for text, label in zip(axes[0].get_yticklabels(), results, strict=True):
            text.set_color(colors.get(label.split()[0].strip(","), grey))
        figure.savefig(path, dpi=150, bbox_inches="tight", transparent=True)
        plt.close(figure)


# ---- The audit: what else could explain the table ----------------------------------


@torch.no_grad()
def audit_alignment(student, base, examples, tok):
    """Do the rows of logits in a loss predict the token that they are paired with? What
    the teacher writes greedily, scored in both contexts; or its neighbours."""
    device = next(base.parameters()).device
    shown = data.pad_batch(data.teacher_prompt, examples, tok, device)
    bare = data.pad_batch(data.student_prompt, examples, tok, device)
    response, mask = generate(base, *shown, 16, tok.end, temperature=0)  # (B, R)
    found = []
    for name, model, prompt in (("teacher", base, shown), ("student", student, bare)):
        best = torch.full_like(response, -1)  # (B, R): the most likely token of a row
        hidden = response_hidden(model, *prompt, response, mask)  # (N, C)
        best[mask] = model.logits(hidden).argmax(-1)
        hits = []
        for k in (-1, 0, 1):  # the row of token t, and token t + k
            rows, tokens = best.roll(k, 1)[:, 1:-1], response[:, 1:-1]
            hits.append((rows == tokens)[mask[:, 1:-1]].float().mean().item())
        found.append(f"{name} " + " / ".join(f"{hit:.2f}" for hit in hits))
    return "; ".join(found)


def audit_judge(world, seed):
    """Right answers in all styles and anyone's words; answers about another fact."""
    examples = make_questions(world, seed, 36)
    right, wrong = [], []
    for example in examples:
        operation, items = MEANS[example.answer.split(":")[0]], data.items_in(
            example.prompt.split(": ")[1])  # fmt: skip
        for style in data.STYLES.values():
            for word in (operation, data.OPERATIONS[operation][0]):
                said = data.OPERATIONS[operation][1](items)
                right.append(data.word_response(word, said, style))
                yes = strict(example, right[-1]), lenient(example, right[-1])
                right[-1] = all(yes)
            for other in data.OPERATIONS:
                if other != operation:
                    said = data.OPERATIONS[other][1](items)
                    text = data.word_response(other, said, style)
                    wrong.append(strict(example, text) or lenient(example, text))
    return f"accepted: right {mean(right):.2f}, of another fact {mean(wrong):.2f}"


def audit_cap(student, tasks, tok):
    """Do responses reach the cap, and does a longer one change a grade?"""
    benchmark, shares = tasks["new"]["reworded"], []
    contexts = [data.student_prompt(e, tok) for e in benchmark.examples]
    for cap in (16, 40):
        texts = data.greedy_responses(student, contexts, tok, cap)
        shares.append(mean(len(tok.encode(text)) >= cap for text in texts))
    caps = (data.accuracy(student, benchmark, tok, cap) for cap in (16, 40))
    return ("strict at a cap of 16 and 40: {:.2f}, {:.2f}; not ended: {:.2f}, {:.2f}"
            .format(*caps, *shares))  # fmt: skip


def audit_duplicates(student, world, seed, tasks, tok):
    """Is a test question right because its like was trained on? Items in common with
    the nearest training question about the same command."""
    trained = {}
    for example in make_questions(world, seed, QUESTIONS):
        asked, items = example.prompt.split(": ")
        trained.setdefault(asked, []).append(set(items.split()))
    benchmark, groups = tasks["new"]["reworded"], {}
    contexts = [data.student_prompt(e, tok) for e in benchmark.examples]
    texts = data.greedy_responses(student, contexts, tok, 16)
    for example, text in zip(benchmark.examples, texts, strict=True):
        items, asked = example.prompt.removeprefix("see ").split(": ")
        common = max(len(set(items.split()) & each) for each in trained[asked])
        groups.setdefault(common, []).append(strict(example, text))
    return ", ".join(
        f"{n} in common: {mean(groups[n]):.2f} (of {len(groups[n])})"
        for n in sorted(groups)
    )


AUDIT = [  # label, keywords of run_cell; each is compared with the rows SFT and SDFT
    ("frozen teacher", {"arm": "sdft-both", "teacher": "frozen"}),
    ("EMA .01", {"arm": "sdft-both", "ema_rate": 0.01}),
    ("SDFT, a quarter of the updates", {"arm": "sdft-both", "steps": 40}),
    ("SDFT, half of the updates", {"arm": "sdft-both", "steps": 80}),
    ("SDFT, twice the updates", {"arm": "sdft-both", "steps": 320}),
    ("SFT, a quarter of the updates", {"arm": "sft", "steps": 40}),
    ("SFT, half of the updates", {"arm": "sft", "steps": 80}),
    ("SFT, twice the updates", {"arm": "sft", "steps": 320}),
    ("SDFT, both wordings trained", {"arm": "sdft-both", "wordings": 2}),
    ("SFT, both wordings trained", {"arm": "sft", "wordings": 2}),
    ("SDFT, 4 questions a fact", {"arm": "sdft-both", "questions": 72}),
    ("SFT, 4 questions a fact", {"arm": "sft", "questions": 72}),
]


def audit(seed, out, quick=False):
    """A table, markdown: what rules a suspect out, or does not, by measurement."""
    world, tok = data.World(seed), data.Tokenizer()
    base, _ = get_base(seed, out / f"seed{seed}", quick)
    examples = make_questions(world, seed, 72, "text + answer", held_out=True)
    tasks = make_tasks(world, seed, 36 if quick else EVAL_SIZE)
    students = {}
    results = run_rows([*ROWS[3:5], *((n, 1, k) for n, k in AUDIT)], [seed], out, quick)
    for label, arm in (("SFT", "sft"), ("SDFT text + answer", "sdft-both")):
        run = folder_of(out / f"seed{seed}", label) / "run"
        students[label] = fine_tune(arm, base, seed, run, quick)[0]
    lines = ["| suspect | measured |", "|---|---|"]

    def add(suspect, text):
        lines.append(f"| {suspect} | {text} |")

    student = students["SDFT text + answer"]
    add("offset of the alignment: the row of token t predicts t - 1 / t / t + 1",
        audit_alignment(student, base, examples, tok))  # fmt: skip
    add("judge", audit_judge(world, seed))
    for label, student in students.items():
        add(f"response cap, {label}", audit_cap(student, tasks, tok))
    for label, student in students.items():
        add(f"near-duplicate questions, {label}",
            audit_duplicates(student, world, seed, tasks, tok))  # fmt: skip
    for label, cells in results.items():
        row = summary(cells[0])
        titles = ("trained", "strict", "OOD", "prior", "KL(student ‖ base)")
        add(label, ", ".join(f"{title} {row[title]:.2f}" for title in titles))
    return "\n".join(lines)


# ---- The command line --------------------------------------------------------------


def folder_of(out, label):
    """A folder for a row of a table."""
    return out / label.lower().replace(" ", "-").replace(",", "").replace("+-", "")


def run_rows(rows, seeds, out, quick=False):
    """{label: [cell of each seed]}; cells that are done are read from out."""
    results = {}
    for seed in seeds:
        for label, _, kwargs in rows:
            folder = folder_of(out / f"seed{seed}", label)
            path = folder / "result.json"
            if path.exists():
                cell = json.loads(path.read_text())
            else:
                base = out / f"seed{seed}"
                cell = run_cell(seed, folder, quick, base=base, **kwargs)
                train.write_atomically(path, json.dumps(cell).encode())
            results.setdefault(label, []).append(cell)
    return results


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="See the top of this file."
    )
    whats = ("table", "rates", "audit")
    parser.add_argument("what", nargs="?", choices=whats, default="table")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--row", choices=[label for label, *_ in ROWS], nargs="+")
    parser.add_argument("--quick", action="store_true", help="far too short: runs it?")
    parser.add_argument("--out", type=Path, help="(out-knowledge)")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="a picture, too")
    args = parser.parse_args(argv)
    out = args.out or ROOT / f"out-knowledge{'-quick' * args.quick}"
    if args.what == "audit":
        print(*(audit(seed, out, args.quick) for seed in args.seed), sep="\n\n")
        return
    rows = [row for row in ROWS if not args.row or row[0] in args.row]
    if args.what == "rates":
        rows = [
            (f"{label} {lr:g}", n, {**kwargs, "lr": lr})
            for label, n, kwargs in rows
            for lr in RATES.get(kwargs["arm"].split("-")[0], ())
        ]
    results = run_rows(rows, args.seed, out, args.quick)
    print(f"claim: {claim}\nfails if {fails_if}\n\n{make_table(results)}")
    if args.draw:
        draw(results, args.draw)


if __name__ == "__main__":
    main(sys.argv[1:])
