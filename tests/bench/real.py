"""SFT and SDFT on a real model, SmolLM2-135M-Instruct, on CPU cores.

    python tests/bench/smollm2.py smollm2        # makes the folder, once
    python tests/bench/real.py smollm2 gate      # does a demonstration help the base?
    python tests/bench/real.py smollm2 prior     # the questions that it gets right
    python tests/bench/real.py smollm2 rule      # train what is missing, print tables
    python tests/bench/real.py smollm2 facts --only "sdft 3e-05" --seeds 0
    python tests/bench/real.py smollm2 tables    # no training: what was measured
    python tests/bench/real.py smollm2 sampled   # the gate, sampled as in training
    python tests/bench/real.py smollm2 wordings  # the base's prior, asked otherwise

A cell is one run of train.py, as a user would type it; the command is printed. A
finished cell is not run again; one that was cut off goes on. Then the model that it
saved is measured here, all methods by the same questions: is what was learnt a fact and
not a sentence, a rule and not a number, and what is left of the prior (questions.txt)?
Results stand in tests/bench/results/real.json, the notebook is tests/bench/real.md.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import measure
import probes
import torch

import data
import model
import train

ROOT, RESULTS = measure.ROOT, Path(__file__).with_name("results") / "real.json"

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

# ---- A shared rule: how a part number is formed -------------------------------------

METALS = "brass steel copper iron silver tin zinc bronze".split()
PARTS = "valve pipe hinge wheel bolt cable lever spring pump chain".split()
THINGS = [f"{a} {b}, size {n}" for a in METALS for b in PARTS for n in range(10, 60)]
STATED = "The part number of the {} is {}."
ASKED = (  # the last wording is held out
    "What is the part number of the {}?", "Which part number does the {} have?",
    "Give me the part number of the {}.", "Tell me the part number of the {}.",
)  # fmt: skip


def part_number(thing):
    return "NV-{3}-{0}".format(*thing.replace(",", "").split())


FORMS = ("json", "record", "plain")


def make_row(prompt, sentence, answer, demos):
    """A row by the form of its demonstration. json: {"answer": "Quimbra"}; record:
    {"answer": "The capital of Velmora is Quimbra."}; plain: that sentence, which the
    model might itself write."""
    said = {"answer": sentence if demos == "record" else answer}
    demo = sentence if demos == "plain" else json.dumps(said)
    return {"prompt": prompt, "demonstration": demo, "answer": answer}


def make_facts(seed, demos="record"):
    """(rows to train on, held-out rows): 72 and 24, a row for each wording of a fact.
    The seed says which name belongs to which country; demos: one of FORMS."""
    rng = random.Random(f"facts {seed}")
    train, held_out = [], []
    for sentence, wordings, names in FACTS.values():
        names = rng.sample(names, len(names))
        for country, name in zip(COUNTRIES, names, strict=True):
            of = sentence.format(country, name), name, demos
            rows = [make_row(each.format(country), *of) for each in wordings]
            train += rows[:-1]
            held_out.append(rows[-1])
    return train, held_out


def make_rule(seed, demos="record"):
    """(rows to train on, held-out rows): 72 and 24. Held out are other parts, asked for
    in another wording."""
    rng, rows = random.Random(f"rule code {seed}"), []
    for i, thing in enumerate(rng.sample(THINGS, 96)):
        name = part_number(thing)
        wording = ASKED[i % 3] if i < 72 else ASKED[3]
        of = STATED.format(thing, name), name, demos
        rows.append(make_row(wording.format(thing), *of))
    return rows[:72], rows[72:]


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


# ---- Cells -------------------------------------------------------------------------

N_TOKENS = 24  # longest response, everywhere
BARE, SHOWN = data.student_prompt, data.teacher_prompt

REQUEST = "\n\nAnswer the question in one short sentence."
TEMPLATES = {"paper": data.TEMPLATE,
             "short": "Question: {prompt}\nAnswer: {demonstration}" + REQUEST}
# of the questions of the prior; some as the template "short" begins and ends
WORDINGS = "{}", "{} ", "Question: {}", "{}" + REQUEST, "Please help me with this: {}"
TASKS = {"facts": make_facts, "rule": make_rule}

# batches of 8 from 72 rows: 9 updates are a pass. Both methods see each row as often
STEPS = {"rule": 27, "facts": 54}
DEMOS = {"rule": "json", "facts": "record"}  # the gates say why
SHARED = f"--batch-size 8 --max-new-tokens {N_TOKENS}"
SDFT, RATES = "--method sdft --ema-rate 0 --lr", (1e-5, 3e-5, 1e-4)
CELLS = {  # task -> label: flags of train.py
    task: {
        **{f"sft {lr:g}": f"--method sft --lr {lr:g}" for lr in (5e-6, 2e-5, 8e-5)},
        **{f"sdft {lr:g}": f"{SDFT} {lr:g}" for lr in RATES},
    }
    for task in STEPS
}
CELLS["rule"] |= {  # three passes left SDFT half-way through the rule (real.md)
    f"sdft {lr:g} long": f"{SDFT} {lr:g} --steps 81" for lr in RATES
}
CELLS["facts"] |= {  # at temperature 1 the teacher seldom says what it knows (real.md)
    **{f"sdft {lr:g} T=.3": f"{SDFT} {lr:g} --temperature .3 --steps 162"
       for lr in RATES},
    # the temperature alone, with as many updates as at temperature 1
    "sdft 0.0001 T=.3 short": f"{SDFT} 1e-4 --temperature .3",
    "speculative 3e-05": f"{SDFT} 3e-5 --tau .5",
}  # fmt: skip


def run_cell(task, label, seed, args):
    """Train and measure one cell; returns what is known of it."""
    demos, flags = DEMOS[task], CELLS[task][label]
    variant = "speculative" if "--tau" in flags else ""  # of variants.py
    flags += "" if "--steps" in flags else f" --steps {STEPS[task]}"
    flags += f" {SHARED}" + " --steps 2 --gate-margin -1" * args.quick
    work = args.work / f"{'quick_' * args.quick}{task}_{label.replace(' ', '_')}_{seed}"
    out = work / flags.split()[1]
    work.mkdir(parents=True, exist_ok=True)
    rows, held_out = TASKS[task](seed, demos)
    files = {flag: work / flag for flag in ("data", "eval", "template")}
    write_rows(files["data"], rows)
    write_rows(files["eval"], held_out[::6])  # what train.py itself looks at
    files["template"].write_text(TEMPLATES["short"], encoding="utf-8")
    program = f"tests/exercises/variants.py {variant} --run" if variant else "train.py"
    command = [*program.split(), *flags.split()]
    command += f"--threads 1 --seed {seed} --grade contains".split()
    for flag, path in {**files, "init": args.folder, "out": work}.items():
        command += [f"--{flag}", str(path)]
    if not (out / "results.json").exists():
        print("python", *command, flush=True)
        command += ["--resume"] * (out / "checkpoint.pt").exists()
        before = os.times().children_user
        if code := subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            sys.exit(code)
        seconds = os.times().children_user - before
        (work / "cpu_seconds").write_text(f"{seconds:.0f}")
    results = json.loads((out / "results.json").read_text())
    about = {
        "task": task, "label": label, "seed": seed, "flags": flags,
        "demos": demos, "few gate": results["teacher_gate"],
        "cpu_seconds": int((work / "cpu_seconds").read_text()),
        "seconds": round(results["seconds"]["fine_tune"], 1),
        "machine": results["machine"],
        "loss": [round(r["loss"], 3) for r in train.read_metrics(out) if "loss" in r],
    }  # fmt: skip
    about |= measure_model(out / "model", rows, held_out, args)
    if not args.keep:
        shutil.rmtree(work)
    return about


# ---- Measuring ---------------------------------------------------------------------


def asked(args):
    return make_prior()[: 24 if args.quick else args.questions]


def load(folder):
    tok = data.ChatTokenizer(folder)
    tok.template = TEMPLATES["short"]
    return model.from_pretrained(folder, tok.n_tokens).eval(), tok


def examples_of(rows):
    return [
        data.Example(row["prompt"], row.get("demonstration", ""), (right,) if
                     isinstance(right, str) else tuple(right), i, grade="contains")
        for i, row in enumerate(rows) for right in [row["answer"]]
    ]  # fmt: skip


def respond(gpt, tok, rows, prompt=BARE, u=None, temperature=0):
    """Responses to rows, as texts, and which of them are right."""
    examples = examples_of(rows)
    contexts = [prompt(example, tok) for example in examples]
    texts = data.get_texts(gpt, contexts, tok, N_TOKENS, u, temperature)
    pairs = zip(examples, texts, strict=True)
    return texts, [data.grade_answer(example, text, ()) for example, text in pairs]


def share(right):
    return round(sum(right) / len(right), 3)


def measure_model(saved, rows, held_out, args):
    """What a saved model has learnt and forgotten, and three responses to read."""
    prior, (gpt, tok), (base, _) = prior_rows(args), load(saved), load(args.folder)
    # one trained wording of each fact, or a third of the parts
    train_texts, train_right = respond(gpt, tok, rows[::3])
    texts, right = respond(gpt, tok, held_out)
    prior_texts, prior_right = respond(gpt, tok, prior)
    record = [text.lstrip().startswith("{") for text in prior_texts]
    some = examples_of(prior[: args.kl_rows])
    of = tok, SimpleNamespace(max_new_tokens=N_TOKENS, seed=0)
    kl = data.sampled_kl(gpt, BARE, base, BARE, some, *of)
    at = examples_of(held_out[::6]), tok, N_TOKENS, 0
    return {
        # KL(teacher || student) by the place of a token, before and after
        "by position": [
            [round(x, 3) for x in probes.by_position(base, student, *at)]
            for student in (base, gpt)
        ],
        "firm": firm_share(prior, prior_right, read_results()),
        "train": share(train_right), "held_out": share(right),
        "prior": share(prior_right), "json_on_prior": share(record),
        "asked": len(asked(args)), "prior_questions": len(prior),
        "kl_rows": len(some[: data.ROWS]), "kl_on_prior": round(kl, 3),
        "responses": [(row["prompt"], text) for row, text in (
            (rows[0], train_texts[0]), (held_out[0], texts[0]),
            (prior[0], prior_texts[0]), (prior[1], prior_texts[1]),
        )],
    }  # fmt: skip


def prior_rows(args):
    """The general questions that the base answers rightly, among all or the first
    --questions. Each is asked once."""
    rows, known = asked(args), read_results()
    right = known.setdefault("prior", {})  # prompt: does the base get it right?
    if unknown := [row for row in rows if row["prompt"] not in right]:
        _, ok = respond(*load(args.folder), unknown)
        right.update(zip((row["prompt"] for row in unknown), ok, strict=True))
        write_results(known)
    kept = [row for row in rows if right[row["prompt"]]]
    print(f"the base gets {len(kept)} of {len(rows)} questions right")
    return kept


def gates(args):
    """For each task, form of demonstrations and template: the share of every second
    held-out row that the base gets right, shown nothing and shown the demonstration."""
    gpt, tok = load(args.folder)
    for name, task, demos in product(("short", "paper"), TASKS, FORMS):
        known, tok.template = read_results(), TEMPLATES[name]
        rows = TASKS[task](args.seeds[0], demos)[1][::2]
        table, shown = known.setdefault("gates", {}), f"{task}, {demos}, {name}"
        for key, prompt in ((f"{task}, nothing shown", BARE), (shown, SHOWN)):
            if key not in table:
                texts, right = respond(gpt, tok, rows, prompt)
                table[key] = share(right)
                print(f"{key}: {share(right)}  {texts[:3]}", flush=True)
                write_results(known)


def sampled(args):
    """How often student and teacher say what is right when they are sampled, by
    temperature: one trained row of each fact, or a third of the parts."""
    (gpt, tok), seed = load(args.folder), args.seeds[0]
    for task in args.only or TASKS:
        rows = TASKS[task](seed, DEMOS[task])[0][::3]
        u = data.get_uniform(examples_of(rows), N_TOKENS, seed, "sampled", "cpu")
        for temperature in (1.0, 0.5, 0.3):
            for prompt in (BARE, SHOWN):
                _, right = respond(gpt, tok, rows, prompt, u, temperature)
                print(f"{task}, temperature {temperature:g}, {prompt.__name__}: right "
                      f"{share(right):.2f} of {len(right)}", flush=True)


def wordings(args):
    """How much of its prior the base keeps, untrained, when the questions are worded
    otherwise. The firm ones, right in every wording, are also asked of --model."""
    rows, known = prior_rows(args), read_results()
    if "firm" not in known:
        gpt, tok = load(args.folder)
        firm, table = {row["prompt"] for row in rows}, {}
        for wording in WORDINGS:
            worded = [{**row, "prompt": wording.format(row["prompt"])} for row in rows]
            texts, right = respond(gpt, tok, worded)
            # the opening that on-policy training takes over from the template
            opening = [text.startswith("The answer") for text in texts]
            table[wording] = {"right": share(right), "The answer ...": share(opening)}
            firm -= {r["prompt"] for r, ok in zip(rows, right, strict=True) if not ok}
        known |= {"wordings": table, "firm": sorted(firm)}
        if not (args.quick or args.questions):  # (of all questions, or not kept)
            write_results(known)
    for wording, found in known["wordings"].items():
        print(f"{wording!r}: {found}")
    print(f"{len(known['firm'])} are right in every wording")
    if args.model:
        _, right = respond(*load(args.model), rows)
        print("prior", share(right), "firm", firm_share(rows, right, known))


def firm_share(rows, right, known):
    """Of the firm questions, the share that is right; None if none is known yet."""
    firm, pairs = known.get("firm", []), zip(rows, right, strict=True)
    of_firm = [ok for row, ok in pairs if row["prompt"] in firm]
    return share(of_firm) if of_firm else None


def read_results():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}}


def write_results(known):
    train.write_text(RESULTS, json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def show_tables(names):
    for name in names:
        cells = [c for c in read_results()["cells"].values() if c["task"] == name]
        if not cells:
            continue
        print(f"\n| {name} | seed | train wording | held-out wording | prior | JSON on "
              "prior | KL(student ‖ base) on prior | seconds | CPU seconds |\n"
              "|---|---|---|---|---|---|---|---|---|")
        row = ("| {label} | {seed} | {train:.2f} | {held_out:.2f} | {prior:.2f} | "
               "{json_on_prior:.2f} | {kl_on_prior:.2f} | {seconds:.0f} | "
               "{cpu_seconds:.0f} |")  # fmt: skip
        print(*(row.format(**c) for c in cells), sep="\n")
        asked = sorted({f"{c['prior_questions']} (KL: {c['kl_rows']})" for c in cells})
        of = [f"{key} {', '.join(sorted({str(c['machine'][key]) for c in cells}))}"
              for key in ("capability", "torch", "threads")]  # fmt: skip
        print(f"\n{', '.join(of)}; general questions {', '.join(asked)}")


def train_cells(args):
    """Train and measure what is missing of a task."""
    for label, seed in product(args.only or CELLS[args.what], args.seeds):
        if label not in CELLS[args.what]:
            labels = ", ".join(CELLS[args.what])
            sys.exit(f"error: no cell {label!r}\nhint: one of {labels}")
        key = f"{args.what} {label} {seed}"
        # (one that was measured on fewer questions is measured again)
        done = read_results()["cells"].get(key, {}).get("asked", 0)
        if done < len(asked(args)) or args.quick:
            result = run_cell(args.what, label, seed, args)
            if args.quick:
                print(json.dumps(result, indent=1))
                continue
            known = read_results()
            known["cells"][key] = result
            write_results(known)
    show_tables([args.what])


DO = {"gate": gates, "prior": prior_rows, "sampled": sampled, "wordings": wordings,
      "tables": lambda args: show_tables(TASKS), **dict.fromkeys(TASKS, train_cells)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=DO)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="some cells; of sampled: a task")
    parser.add_argument("--questions", type=int, help="general ones to ask (all)")
    parser.add_argument("--kl-rows", type=int, default=64, help="... for the KL (64)")
    parser.add_argument("--work", type=Path, default=ROOT / "out-real")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("--quick", action="store_true", help="2 updates, no results")
    parser.add_argument("--model", type=Path, help="of wordings: a student")
    args = parser.parse_args()
    args.folder, args.work = args.folder.absolute(), args.work.absolute()
    torch.set_num_threads(1)
    start = time.process_time()
    DO[args.what](args)
    print(f"{time.process_time() - start:.0f} CPU seconds of this process")


if __name__ == "__main__":
    main()
