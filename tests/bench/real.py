"""SFT and SDFT on a real model, SmolLM2-135M-Instruct, on CPU cores.

    python tests/bench/smollm2.py smollm2        # makes the folder, once
    python tests/bench/real.py smollm2 gate      # does a demonstration help the base?
    python tests/bench/real.py smollm2 prior     # the questions that it gets right
    python tests/bench/real.py smollm2 rule      # train what is missing, print tables
    python tests/bench/real.py smollm2 facts --only "sdft 3e-05" --seeds 0
    python tests/bench/real.py smollm2 tables    # no training: what was measured
    python tests/bench/real.py smollm2 tokens    # one rollout of each kind, by token
    python tests/bench/real.py smollm2 sampled   # the gate, sampled as in training
    python tests/bench/real.py smollm2 wordings  # the base's prior, asked otherwise

A cell is one run of train.py, as a user would type it, from rows of real_data.py; the
command is printed. A finished cell is not run again; one that was cut off goes on. Then
the model that it saved is measured here, once, with functions of data.py: all methods
by the same questions. (train.py --prior would measure the base again in each cell.)
Results stand in tests/bench/results/real.json, the notebook is tests/bench/real.md.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]

import real_data  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402

RESULTS = ROOT / "tests" / "bench" / "results" / "real.json"
N_TOKENS = 24  # longest response, everywhere
EVAL_ROWS = 4  # held-out rows that train.py itself looks at: its gate, its log

# ---- Templates and candidates: what the gate is measured on ------------------------

REQUEST = "\n\nAnswer the question in one short sentence."
TEMPLATES = {
    "paper": data.TEMPLATE,
    "short": "Question: {prompt}\nAnswer: {demonstration}" + REQUEST,
}
# the questions of the prior as they are, after one more space, as the template "short"
# begins and ends, and with another request
WORDINGS = (
    "{}", "{} ", "Question: {}", "{}" + REQUEST, "Please help me with this: {}",
)  # fmt: skip
TASKS = {"facts": real_data.make_facts, "rule": real_data.make_rule}

# ---- Cells ---------------------------------------------------------------------------
#
# task -> label: (variant of tests/exercises/variants.py or "", template, form of the
# demonstrations, flags of train.py)

SFT, SDFT = "--method sft --lr", "--method sdft --ema-rate 0 --lr"
RATES = {SFT: (5e-6, 2e-5, 8e-5), SDFT: (1e-5, 3e-5, 1e-4)}
# batches of 8 from 72 rows: 9 updates are a pass. Both methods see each row as often
PASSES = {"rule": 3, "facts": 6}
DEMOS = {"rule": "json", "facts": "record"}  # the gates say why
SHARED = f"--batch-size 8 --max-new-tokens {N_TOKENS} --warmup-steps 4"
CELLS = {
    task: {
        f"{flags.split()[1]} {lr:g}": ("", "short", DEMOS[task], f"{flags} {lr:g}")
        for flags, rates in RATES.items()
        for lr in rates
    }
    for task in TASKS
}
# three passes left SDFT half-way through the rule (real.md)
CELLS["rule"] |= {
    **{
        f"sdft {lr:g} long": ("", "short", "json", f"{SDFT} {lr:g} --steps 81")
        for lr in RATES[SDFT]
    },
    "sdft 3e-05 T=.5": ("", "short", "json", f"{SDFT} 3e-5 --temperature .5"),
    "speculative 3e-05": ("speculative", "short", "json", f"{SDFT} 3e-5 --tau .5"),
}
# at temperature 1 the teacher seldom says what it knows (real.md)
CELLS["facts"] |= {
    **{
        f"sdft {lr:g} T=.3": (
            "", "short", "record", f"{SDFT} {lr:g} --temperature .3 --steps 162"
        )
        for lr in RATES[SDFT]
    },
    # the temperature alone, with as many updates as at temperature 1
    "sdft 0.0001 T=.3 short": ("", "short", "record", f"{SDFT} 1e-4 --temperature .3"),
    "speculative 3e-05": ("speculative", "short", "record", f"{SDFT} 3e-5 --tau .5"),
    "sdft plain 3e-05": ("", "short", "plain", f"{SDFT} 3e-5"),
}


def make_rows(task, seed, demos, work):
    """Write the files of a task; returns (train, held out) as rows."""
    work.mkdir(parents=True, exist_ok=True)
    rows = TASKS[task](seed, demos)
    names = ("demos.jsonl", "held_out.jsonl")
    for name, part in zip(names, rows, strict=True):
        real_data.write_rows(work / name, part)
    real_data.write_rows(work / "few.jsonl", rows[1][:: len(rows[1]) // EVAL_ROWS])
    return rows


def run_cell(folder, task, label, seed, args):
    """Train and measure one cell; returns what is known of it."""
    variant, template, demos, flags = CELLS[task][label]
    name = f"{'quick ' * args.quick}{task} {label} {seed}".replace(" ", "_")
    work = args.work / name
    rows = make_rows(task, seed, demos, work)
    (work / "template.txt").write_text(TEMPLATES[template], encoding="utf-8")
    method = flags.split()[1]
    of_variant = ["tests/exercises/variants.py", variant, "--run"]
    command = of_variant if variant else ["train.py"]
    if "--steps" not in flags:
        flags += f" --steps {9 * PASSES[task]}"
    flags += f" {SHARED}"
    if args.quick:
        flags += " --steps 2 --gate-margin -1"
    command += flags.split()
    command += f"--threads {args.threads} --seed {seed} --grade contains".split()
    command += ["--init", str(folder), "--out", str(work)]
    files = {"data": "demos.jsonl", "eval": "few.jsonl", "template": "template.txt"}
    for flag, name in files.items():
        command += [f"--{flag}", str(work / name)]
    if not (work / method / "results.json").exists():
        print("python", *command, flush=True)
        if (work / method / "checkpoint.pt").exists():
            command.append("--resume")
        cpu = os.times().children_user
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code:
            sys.exit(code)
        cpu = os.times().children_user - cpu
        (work / "cpu_seconds").write_text(f"{cpu:.0f}")
    if args.train_only:
        return None
    results = json.loads((work / method / "results.json").read_text())
    lines = (work / method / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    about = {
        "task": task, "label": label, "seed": seed, "flags": flags,
        "template": template, "demos": demos, "variant": variant,
        "few gate": results["teacher_gate"],
        "cpu_seconds": int((work / "cpu_seconds").read_text()),
        "seconds": round(results["seconds"]["fine_tune"], 1),
        "machine": results["machine"], "processor": platform.machine(),
        "loss": [round(r["loss"], 3) for r in records if "loss" in r],
        "by position": [
            [round(x, 3) for x in r["kl_teacher_student_by_position"]]
            for r in records if r.get("kl_teacher_student_by_position")
        ],
    }  # fmt: skip
    about |= measure(folder, work / method / "model", rows, args)
    if not args.keep:
        shutil.rmtree(work)
    return about


# ---- Measuring ---------------------------------------------------------------------


def load(folder):
    tok = data.ChatTokenizer(folder)
    return model.from_pretrained(folder, tok.n_tokens).eval(), tok


def examples_of(rows):
    examples = []
    for i, row in enumerate(rows):
        demo, right = row.get("demonstration", ""), row["answer"]
        right = (right,) if isinstance(right, str) else tuple(right)
        examples.append(data.Example(row["prompt"], demo, right, i, grade="contains"))
    return examples


def is_right(example, text):
    return data.grade_answer(example, text, options=())


def respond(gpt, tok, rows, prompt=data.student_prompt):
    """Greedy responses to rows, as texts, and which of them are right."""
    examples, texts = examples_of(rows), []
    contexts = [prompt(example, tok) for example in examples]
    for i in range(0, len(contexts), 48):  # short batches: little to compute at once
        texts += data.greedy_responses(gpt, contexts[i : i + 48], tok, N_TOKENS)
    return texts, list(map(is_right, examples, texts))


def share(right):
    return round(sum(right) / len(right), 3)


def kl_on(rows, gpt, base, tok):
    """KL(student || base) in nats per token, along what the student samples."""
    examples, total = examples_of(rows), 0.0
    for i in range(0, len(examples), 32):
        part = examples[i : i + 32]
        bare = data.pad_batch(data.student_prompt, part, tok, "cpu")
        u = data.get_uniform(part, N_TOKENS, 0, "prior", "cpu")
        total += len(part) * data.sampled_kl(gpt, bare, base, bare, u, tok, N_TOKENS)[0]
    return round(total / len(examples), 3)


@torch.no_grad()
def measure(folder, saved, rows, args):
    """What a saved model has learnt and forgotten, and three responses to read."""
    prior = prior_rows(folder, args)
    gpt, tok = load(saved)
    base, _ = load(folder)
    train, held_out = rows
    # one trained wording of each fact, or a third of the parts
    train_texts, train_right = respond(gpt, tok, train[::3])
    texts, right = respond(gpt, tok, held_out)
    prior_texts, prior_right = respond(gpt, tok, prior)
    record = [text.lstrip().startswith("{") for text in prior_texts]
    return {
        "firm": firm_share(prior, prior_right, read_results()),
        "train": share(train_right), "held_out": share(right),
        "prior": share(prior_right), "json_on_prior": share(record),
        "asked": len(asked(args)), "prior_questions": len(prior),
        "kl_rows": min(args.kl_rows, len(prior)),
        "kl_on_prior": kl_on(prior[: args.kl_rows], gpt, base, tok),
        "responses": [
            (train[0]["prompt"], train_texts[0]), (held_out[0]["prompt"], texts[0]),
            (held_out[-1]["prompt"], texts[-1]),
            (prior[0]["prompt"], prior_texts[0]), (prior[1]["prompt"], prior_texts[1]),
        ],
    }  # fmt: skip


def asked(args):
    return real_data.make_prior()[: 24 if args.quick else args.questions]


@torch.no_grad()
def prior_rows(folder, args):
    """The general questions that the base answers rightly, among all or the first
    --questions. Each is asked once; what is known is kept after every 48."""
    rows, known = asked(args), read_results()
    right = known.setdefault("prior", {})  # prompt: does the base get it right?
    unknown = [row for row in rows if row["prompt"] not in right]
    gpt, tok = load(folder) if unknown else (None, None)
    for i in range(0, len(unknown), 48):
        part = unknown[i : i + 48]
        texts, ok = respond(gpt, tok, part)
        right.update(zip((row["prompt"] for row in part), ok, strict=True))
        write_results(known)
        for row, text, good in zip(part, texts, ok, strict=True):
            if args.what == "prior" and not good:
                print(f"wrong: {row['prompt']} {row['answer']}  {text!r}", flush=True)
    kept = [row for row in rows if right[row["prompt"]]]
    if args.what == "prior":
        print(f"the base gets {len(kept)} of {len(rows)} questions right")
    return kept


@torch.no_grad()
def gates(folder, args):
    """Each task, form of demonstrations and template, and each candidate for the rule:
    the share of held-out rows that the base gets right, shown nothing and shown the
    demonstration. Of every second row: there are many of these."""
    gpt, tok = load(folder)
    cells = [
        (task, demos, name, make(args.seeds[0], demos)[1])
        for name in ("short", "paper")
        for task, make in TASKS.items()
        for demos in real_data.DEMOS
    ]
    cells += [
        (f"rule: {rule}", demos, "short", real_data.make_rule(0, demos, rule)[1])
        for rule in real_data.RULES if rule != real_data.RULE
        for demos in ("record",)
    ]
    for task, demos, name, rows in cells:
        known, rows = read_results(), rows[::2]
        table, key = known.setdefault("gates", {}), f"{task}, {demos}, {name}"
        if f"{task}, nothing shown" not in table:
            texts, right = respond(gpt, tok, rows)
            table[f"{task}, nothing shown"] = share(right)
            print(f"{task}, nothing shown: {share(right)}  {texts[:2]}", flush=True)
        if key not in table:
            tok.template = TEMPLATES[name]
            texts, right = respond(gpt, tok, rows, data.teacher_prompt)
            table[key] = share(right)
            print(f"{key}: {share(right)}  {texts[:3]}", flush=True)
        write_results(known)


@torch.no_grad()
def tokens(folder, args):
    """Rollouts of the student, token by token: what it wrote, KL(teacher || student)
    there, and what the teacher would have written."""
    base, tok = load(folder)
    gpt = load(args.model)[0] if args.model else base
    for task in args.only or TASKS:
        _, held_out = TASKS[task](args.seeds[0], DEMOS[task])
        for name in args.templates:
            tok.template = TEMPLATES[name]
            # (greedily, the model would show its likeliest path alone)
            examples = examples_of(held_out[:: len(held_out) // 3][:3])
            bare = data.pad_batch(data.student_prompt, examples, tok, "cpu")
            shown = data.pad_batch(data.teacher_prompt, examples, tok, "cpu")
            u = data.get_uniform(examples, N_TOKENS, args.seeds[0], "tokens", "cpu")
            response, mask = model.generate(gpt, *bare, N_TOKENS, tok.end, u)
            hidden = [
                m.logits(model.response_hidden(m, *context, response, mask))
                for m, context in ((gpt, bare), (base, shown))
            ]
            kl = model.kl_reference(*hidden)  # (N,): KL(teacher || student)
            best = hidden[1].argmax(-1).tolist()  # (N,)
            at = 0
            for example, row, n in zip(
                examples, response.tolist(), mask.sum(1).tolist(), strict=True
            ):
                cells = [
                    f"{tok.hf.decode([t])!r} {kl[at + i]:.1f}"
                    + ("" if best[at + i] == t else
                       f" ({tok.hf.decode([best[at + i]])!r})")
                    for i, t in enumerate(row[:n])
                ]
                at += n
                print(f"{task}, {name}: {example.prompt} [{example.answer[0]}]\n   "
                      + " | ".join(cells), flush=True)


@torch.no_grad()
def sampled(folder, args):
    """How often student and teacher say what is right when they are sampled, by
    temperature: one trained row of each fact, or a third of the parts."""
    gpt, tok = load(folder)
    tok.template = TEMPLATES["short"]
    for task in args.only or TASKS:
        examples = examples_of(TASKS[task](args.seeds[0], DEMOS[task])[0][::3])
        u = data.get_uniform(examples, N_TOKENS, args.seeds[0], "sampled", "cpu")
        for temperature in (1.0, 0.5, 0.3):
            for prompt in (data.student_prompt, data.teacher_prompt):
                contexts = [prompt(example, tok) for example in examples]
                texts = data.get_texts(gpt, contexts, tok, N_TOKENS, u, temperature)
                right = list(map(is_right, examples, texts))
                print(f"{task}, temperature {temperature:g}, {prompt.__name__}: right "
                      f"{share(right):.2f} of {len(right)}", flush=True)


@torch.no_grad()
def wordings(folder, args):
    """How much of its prior the base keeps, without any training, when the questions
    are worded otherwise; a loss of that size need not be forgetting. The questions that
    it gets right in every wording are the firm ones: --model is asked these, too."""
    rows, known = prior_rows(folder, args), read_results()
    if "firm" not in known:
        gpt, tok = load(folder)
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
        firm = firm_share(rows, right, known)
        print(f"{args.model}: prior {share(right)}, firm {firm}")


def firm_share(rows, right, known):
    """Of the general questions that the base gets right in every wording, the share
    that is right here; None if it was not asked yet."""
    firm, pairs = known.get("firm", []), zip(rows, right, strict=True)
    of_firm = [ok for row, ok in pairs if row["prompt"] in firm]
    return share(of_firm) if of_firm else None


# ---- Results -----------------------------------------------------------------------


def read_results():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}}


def write_results(known):
    temporary = RESULTS.with_suffix(".tmp")
    text = json.dumps(known, indent=1, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, RESULTS)


def show_tables(task=None):
    known = read_results()
    for name in [task] if task in TASKS else TASKS:
        cells = [c for c in known["cells"].values() if c["task"] == name]
        if not cells:
            continue
        print(f"\n| {name} | seed | train wording | held-out wording | prior | JSON on "
              "prior | KL(student ‖ base) on prior | seconds | CPU seconds |\n"
              "|---|---|---|---|---|---|---|---|---|")
        for c in cells:
            print(f"| {c['label']} | {c['seed']} | {c['train']:.2f} | "
                  f"{c['held_out']:.2f} | {c['prior']:.2f} | {c['json_on_prior']:.2f} "
                  f"| {c['kl_on_prior']:.2f} | {c['seconds']:.0f} | "
                  f"{c['cpu_seconds']:.0f} |")
        capabilities = {c["machine"]["capability"] for c in cells}
        threads = {c["machine"]["threads"] for c in cells}
        print(f"\nCPU capability {', '.join(sorted(capabilities))}, torch "
              f"{cells[0]['machine']['torch']}, threads {threads}; general questions "
              + ", ".join(sorted({f"{c['prior_questions']} (KL: {c['kl_rows']})"
                                  for c in cells})))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    choices = ("gate", "prior", *TASKS, "tables", "tokens", "sampled", "wordings")
    parser.add_argument("what", choices=choices)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="LABEL",
                        help="some of the cells; of tokens and sampled: a task")
    parser.add_argument("--questions", type=int, metavar="N",
                        help="general questions to ask (default: all)")
    parser.add_argument("--kl-rows", type=int, default=64, metavar="N",
                        help="of these, for KL(student || base) (default: 64)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "out-real")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("--train-only", action="store_true", help="measure later")
    parser.add_argument("--quick", action="store_true", help="2 updates, no results")
    parser.add_argument("--model", type=Path, help="of tokens, wordings: a student")
    parser.add_argument("--templates", nargs="+", default=["short"], choices=TEMPLATES)
    args = parser.parse_args()
    args.folder, args.work = args.folder.absolute(), args.work.absolute()
    torch.set_num_threads(args.threads)
    start = time.process_time()
    if args.what == "gate":
        gates(args.folder, args)
    elif args.what == "prior":
        prior_rows(args.folder, args)
    elif args.what == "tokens":
        tokens(args.folder, args)
    elif args.what == "sampled":
        sampled(args.folder, args)
    elif args.what == "wordings":
        wordings(args.folder, args)
    elif args.what in TASKS:
        for label in args.only or CELLS[args.what]:
            if label not in CELLS[args.what]:
                labels = ", ".join(CELLS[args.what])
                sys.exit(f"error: no cell {label!r}\nhint: one of {labels}")
            for seed in args.seeds:
                key = f"{args.what} {label} {seed}"
                # (one that was measured on fewer questions is measured again)
                done = read_results()["cells"].get(key, {}).get("asked", 0)
                if done >= len(asked(args)) and not args.quick:
                    continue
                result = run_cell(args.folder, args.what, label, seed, args)
                known = read_results()
                if args.train_only:
                    print(f"trained: {key}")
                elif args.quick:
                    print(json.dumps(result, indent=1))
                else:
                    known["cells"][key] = result
                    write_results(known)
    if args.what in ("tables", *TASKS):
        show_tables(args.what)
    print(f"{time.process_time() - start:.0f} CPU seconds of this process")


if __name__ == "__main__":
    main()
