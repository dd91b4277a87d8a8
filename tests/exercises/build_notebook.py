"""Write sdft.ipynb from the cells below; with --run, also run them and keep what they
show.

    python tests/exercises/build_notebook.py          # after a change of the text
    python tests/exercises/build_notebook.py --run    # after a change of the code

Text may change without a run. Where the code of a cell or of the five files has changed
(comments and docstrings apart), the outputs are older than what they show: the notebook
holds a digest of that code, and test_notebook.py compares. Jupyter is not needed.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import time
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOTEBOOK = HERE / "sdft.ipynb"
FILES = ("model.py", "sft.py", "sdft.py", "data.py", "train.py")

# ---- The cells: "# %%" begins code, "# %% [markdown]" text ---------------------------

CELLS = r'''
# %% [markdown]
# SDFT, step by step

A language model can learn a new skill from *demonstrations*: questions with an expert's
answers. Plain fine-tuning (SFT) imitates the answers word for word, and the model
forgets much of what it could do before. **Self-Distillation Fine-Tuning** (SDFT,
[arXiv 2601.19897](https://arxiv.org/abs/2601.19897)) learns the skill and keeps the
rest. In this notebook you make a tiny model, do one step of SDFT by hand, watch both
methods learn, and then break SDFT in three ways.

Nothing of the method is in the notebook: it calls the five files of the project, and
`sdft.py` is the one to have open beside it. Two CPU cores run all cells in eight
minutes at most. On another machine your numbers will differ a little from those below.

The first cell finds the project. On Colab it copies the project there, and installs
what is missing; torch stays as it is.

# %%
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

REPO = "https://github.com/USER/sdft"  # the address of this project
QUICK = os.environ.get("SDFT_QUICK", "")  # for tests, a folder: it hardly trains then


def find_root():
    """The project's folder: this one or one above it. None: there is none."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "sdft.py").exists()), None)


root = find_root()
if "google.colab" in sys.modules:
    if root is None:
        assert "USER" not in REPO, "put the address of this project into REPO, above"
        subprocess.run(["git", "clone", "-q", REPO, "sdft"], check=True)
        root = Path("sdft").resolve()
    needed = ("numpy", "tiktoken", "tqdm", "matplotlib")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", *missing], check=True)
assert root is not None, "open this notebook in the project's folder"
os.chdir(root)
sys.path.insert(0, str(root))

# %%
import builtins
import copy
import tempfile
import textwrap
from statistics import fmean
from unittest import mock

import data
import sdft
import sft
import train

LIVE = hasattr(builtins, "__IPYTHON__")  # Jupyter, Colab: a picture may change
if LIVE:
    from IPython.display import display
try:
    import matplotlib.pyplot as plt
except ImportError:
    plt = None
    print("pip install matplotlib shows the curves")

# %% [markdown]
## 1. The tiny world

A *prompt*, or query, names a domain (*garden*), a command (*cork*) and some items. The
command stands for an operation on the items. The model should *respond* with the name
of the operation and then the items, operated on. It knows 120 commands. *cork* is none
of them: that it means *rotate* is to be learnt, and so are five other commands. These
six are the new *skill*.

The *demonstration* is how an expert answers. He has a wordy style, and his own terms:
what the model calls *rotate* he calls *advance*. The model reads his terms, but it
never writes them.

# %%
argv = ["--eval-size", "40"]  # held-out queries for each accuracy
if QUICK:
    argv = "--quick --base-steps 4 --eval-size 8 --n-layer 1 --n-embd 48 --threads 1"
    argv = [*argv.split(), "--out", QUICK]
args = train.parse_args(argv)
device = train.start_processes(args)
tok, stages, tasks, base, path, made_of = train.make_world(args)
SKILL = "C"  # stages: the demonstrations of three skills; one is enough here
prompts = [example.prompt for example in stages[SKILL]]
example = stages[SKILL][prompts.index("garden cork: paper door pepper")]
print(f"\nprompt          {example.prompt}")
print(f"right response  {example.answer}")
print(f"demonstration   {example.demo}")

# %% [markdown]
SDFT uses one model in two roles. The *student* reads the prompt. The *teacher* reads
the prompt **and the demonstration**. That is the only difference between the two
contexts. Here they are, as the model gets them: lists of *tokens*. In this world a
token is a word; each has a number. Two tokens are no words: `<start>` says that now the
response begins, `<end>` that it is over.

# %%
def name_of(token):
    return {tok.start: "<start>", tok.end: "<end>"}.get(token) or tok.decode([token])


for tokens_of in (data.student_prompt, data.teacher_prompt, data.demo_response):
    ids = tokens_of(example, tok)
    text = " ".join(f"{name_of(token)}·{token}" for token in ids)
    print(f"{tokens_of.__name__}, {len(ids)} tokens:")
    print(textwrap.indent(textwrap.fill(text, 84), "   "))

# %% [markdown]
SFT teaches the student to say the last list. SDFT never does: there the demonstration
is something to read, and nothing to copy.

## 2. The base model and its gate

Training begins with a *base model*. It has learnt everything but the skills from a
corpus of this world: the known commands, the styles, how to use a demonstration in its
prompt. Making it takes a minute or more. It stays in `out/`, so a second run finds it
there.

Then comes the *gate*, a question to ask before any SDFT: does a demonstration help this
model? The base responds to *held-out* queries of the new skills, which no training
sees: once in the student's context, once in the teacher's.

# %%
base.to(device)
try:
    train.get_base(path, base, *made_of, tok, stop=None)
finally:  # the folder of the base is locked while it is made; stopped, it can go on
    while train.LOCKS:
        train.LOCKS.pop().close()
base.eval()  # no dropout, until somebody trains it
gate = train.check_gate(args, base, tasks, tok, {"sdft": sdft.Config()})

# %% [markdown]
Without a demonstration the base guesses one of six operations. With one it is nearly
always right. So the model *can* do the task, if it is shown how. SDFT moves this from
the teacher's context into the student's weights.

## 3. One step of SDFT, by hand

**The response.** The student responds to its own prompt. Its response is sampled:
token by token, it draws one from the probabilities that it gives to all tokens.

**The comparison.** Teacher and student read this response, each after its own context.
At each token, both say what they would put there: the teacher's probabilities p_T and
the student's p_S. How far apart they are is the *divergence*

> KL(teacher || student) = Σ p_T(v) · log( p_T(v) / p_S(v) ), over all tokens v.

It is 0 where both agree. It is large where the student finds unlikely what the teacher
finds likely. (The logarithm is the natural one; the unit has the name *nat*.)

Below, each line is one token of the student's response: the token, its KL(teacher ||
student), and the three likeliest tokens in the eyes of the student and of the teacher.
The last lines show SFT on the same query. It looks at the demonstration instead, and
for each token of it at −log p_S(token): how unlikely the student finds it.

# %%
cfg = sdft.Config(batch_size=1)  # one example, to see everything
student, teacher = copy.deepcopy(base), sdft.make_teacher(base)  # the same weights


def respond(example):
    """The student's own response; "pull" names the random numbers of token_pull."""
    return sdft.get_responses(student, [example], tok, cfg, "pull")


def is_wrong(example):
    response, _ = respond(example)
    return not data.grade_items(example, tok.decode(response[0].tolist()))


# a wrong response has more to show than one that is right by luck
example = next(e for e in [example, *stages[SKILL]] if is_wrong(e))
pull = data.token_pull(student, teacher, example, tok, cfg.max_new_tokens, cfg.seed)
print(train.show_pull(pull | {"prompt": example.prompt, "demo": example.demo}))

if plt:
    rows = {
        "SDFT: KL(teacher || student)\nalong the student's own response": pull["sdft"],
        "SFT: −log p_S(token)\nalong the demonstration": pull["sft"],
    }
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharex=True, layout="tight")
    for ax, (title, pairs) in zip(axes, rows.items(), strict=True):
        words, nats = [row[0] for row in pairs], [row[1] for row in pairs]
        ax.barh(range(len(words)), nats, tick_label=words)
        ax.invert_yaxis()
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("nats")

# %% [markdown]
Compare the two pictures. SDFT pulls at one token, the operation: there the student
guesses, and the teacher has read what it is. All the rest is in the student's own
words, and both agree on it, even on the items that go with a wrong guess.

SFT pulls at two tokens. One is the first word of the demonstration, which has nothing
to do with the skill: it begins a style that nobody asked for. The other names the
operation, but in the expert's term, a word that the model has never written. (What
follows comes by itself: the model knows the style once it has begun.) A student that
learns to begin like the expert does so for commands that it knows, too. That is how it
forgets.

Now the rest of the step. **The loss** is the mean of the KL(teacher || student) over
the tokens of the response. **The update** is one of AdamW, on the student alone.
**The average**: the teacher follows, very slowly.

> teacher ← ema_rate · student + (1 − ema_rate) · teacher

# %%
response, mask = respond(example)
loss, _ = sdft.compute_loss(student, teacher, [example], response, mask, tok, cfg, 1)
column = [kl for _, kl, *_ in pull["sdft"]]
print(f"the loss {loss:.6f} is the mean of the column, {fmean(column):.6f}")

loss.backward()
weight_s, weight_t = (gpt.h[0].mlp.down_proj.weight for gpt in (student, teacher))


def show(when):
    s, t = weight_s[0, 0].item(), weight_t[0, 0].item()
    print(f"  {when:18s} student {s:.8f}   teacher {t:.8f}")


print("\nthe same weight in both:")
show("before")
sdft.make_optimizer(student, cfg).step()  # AdamW, one update
show("after the update")
sdft.update_teacher(teacher, student, cfg)
show("after the average")

again, _ = sdft.compute_loss(student, teacher, [example], response, mask, tok, cfg, 1)
print(f"\nthe loss on the same response: {loss:.4f} before the step, {again:.4f} after")

# %% [markdown]
A training job is this step, with 64 examples in place of one, again and again: read
`train` in `sdft.py`, from the line `batch = ...` on.

## 4. Both methods on one skill

Now the real thing. Each trainer gets a copy of the base and the same demonstrations.
Every few updates we measure two things on held-out queries, by *accuracy*, the share of
right responses: the new skill, and the *prior* skills, which is what there is to
forget. Of these there are five, and the curve is their mean: known commands
(`knowledge`), the model's own style (`own_style`), a style that the prompt asks for
(`asked_items`, `asked_style`), and the use of a demonstration (`in_context`).

A trainer tells a `Run` what happens. Ours draws it.

# %%
FEW = {"new": {SKILL: tasks["new"][SKILL]}, "prior": tasks["prior"]}


class Curves(train.Run):
    """A Run that keeps all records and draws the evaluations, while they come."""

    def __init__(self, folder, title, ax, redraw):
        super().__init__(folder)
        self.title, self.ax, self.redraw, self.records = title, ax, redraw, []

    def log(self, record):
        self.records.append(record)
        rows = [row for row in self.records if "new" in row]
        if "new" not in record or self.ax is None:
            return
        steps = [row["step"] for row in rows]
        self.ax.clear()
        new = [row["new"][SKILL] for row in rows]
        self.ax.plot(steps, new, "o-", label="new skill")
        prior = [fmean(row["prior"].values()) for row in rows]
        self.ax.plot(steps, prior, "s--", label="prior skills, mean of five")
        self.ax.set(title=self.title, xlabel="updates", ylabel="accuracy")
        self.ax.set_ylim(-0.05, 1.05)
        self.ax.legend(loc="best", fontsize=8)
        self.redraw()


def learn(runs):
    """Train a copy of the base in each of the runs, and draw all side by side.

    runs: title -> (trainer, changes of its Config). Returns title -> (student, its
    records).
    """
    fig, axes, handle = None, [None] * len(runs), None
    if plt:
        size = {"figsize": (4.2 * len(runs), 2.8), "layout": "tight"}
        fig, axes = plt.subplots(1, len(runs), squeeze=False, **size)
        axes = axes[0]
    if plt and LIVE:
        handle = display(fig, display_id=True)
    learnt = {}
    for ax, (title, (trainer, changes)) in zip(axes, runs.items(), strict=True):
        changes = {**changes, "steps": 2, "eval_every": 2} if QUICK else changes
        cfg, student = trainer.Config(log_every=1, **changes), copy.deepcopy(base)
        with tempfile.TemporaryDirectory() as folder:
            run = Curves(folder, title, ax, lambda: handle and handle.update(fig))
            trainer.train(student, {SKILL: stages[SKILL]}, FEW, tok, cfg, run)
        learnt[title] = student.eval(), run.records
    if handle:  # it has been shown
        plt.close(fig)
    return learnt


def report(learnt):
    """A line for each run. The last loss is the mean of five updates."""
    print(f"{'':24s}updates  first loss  last loss  new skill  prior  teacher's gate")
    for title, (_, records) in learnt.items():
        losses, now = [row["loss"] for row in records if "loss" in row], records[-1]
        numbers = losses[0], fmean(losses[-5:]), now["new"][SKILL]
        cells = [f"{number:9.3f}" for number in numbers]
        prior, gate = fmean(now["prior"].values()), now["teacher_gate"]
        cells += [f"{prior:7.3f}", "no teacher" if gate is None else f"{gate:.3f}"]
        print(f"{title:24s}{len(losses):7d} ", "  ".join(cells))

# %%
learnt = learn({
    "SFT": (sft, {"steps": 80, "eval_every": 8}),
    "SDFT": (sdft, {"steps": 60, "eval_every": 5}),
})
report(learnt)

# %% [markdown]
Both learn the skill. Look at the dashed curves: SFT pays with what the model knew.

## 5. What each forgot

The same on more queries, 200 for each number. The last column is how far a student has
moved from the base, KL(student || base), per token of its responses on the new skill.
Below it is a known command, which the base had right, in the words of all three.

# %%
many = data.make_tasks(made_of[1], 16 if QUICK else 200, args.seed)
many["new"] = {SKILL: many["new"][SKILL]}
models = {"base": base, **{title: gpt for title, (gpt, _) in learnt.items()}}
rows = [data.evaluate({"student": gpt}, base, SKILL, many, tok, sdft.Config())
        for gpt in models.values()]  # fmt: skip
print(train.table(rows, list(models)))

known, n = many["prior"]["knowledge"], cfg.max_new_tokens
right = {name: data.is_right(gpt, known, tok, n) for name, gpt in models.items()}
lost = [e for e, before, after in zip(known.examples, right["base"], right["SFT"],
                                      strict=True) if before and not after]
for e in lost[:1]:
    print(f"\nprompt  {e.prompt}")
    for name, gpt in models.items():
        (text,) = data.get_texts(gpt, [data.student_prompt(e, tok)], tok, n)
        print(f"{name:6s}  {text}")

# %% [markdown]
## 6. What if ...

Three changes to SDFT, one at a time. Decide what you expect *before* you run a cell.

**What if there is no average?** With `ema_rate=1` the teacher *is* the student of this
moment, shown the demonstration. (Here both runs get four times the learning rate; with
the usual one the same takes longer.) What do you expect: is a teacher that is always up
to date a better one?

# %%
steps = {"steps": 80, "eval_every": 10, "lr": 4e-4}
report(learn({
    "average": (sdft, {**steps}),
    "no average": (sdft, {**steps, "ema_rate": 1.0}),
}))

# %% [markdown]
Without the average hardly anything is left, of the new skill or of the prior ones: a
teacher that is the student itself falls with it (see its gate), and the loss, small at
the end, does not tell.

**What if we turn the divergence round?** KL(student || teacher) weighs with the
student's probabilities: it is large where the student likes what the teacher does not.
The paper prints this one, and its results were made with the other. What do you expect
of the skill, of the prior skills, and of the loss at first?

# %%
other = learn({"kl reverse": (sdft, {"steps": 60, "eval_every": 10, "kl": "reverse"})})
report({"SDFT": learnt["SDFT"], **other})

# %% [markdown]
This direction learns the skill and keeps the prior skills as well; only its loss begins
higher, because the student likes guesses that the teacher, who has read the
demonstration, finds very unlikely.

**What if the teacher sees no demonstration?** Then both roles read the bare prompt, and
the teacher knows nothing that the student does not. What do you expect of the loss, and
of the skill?

# %%
with mock.patch.object(data, "teacher_prompt", data.student_prompt):
    other = learn({"no demonstration": (sdft, {"steps": 60, "eval_every": 10})})
report({"SDFT": learnt["SDFT"], **other})

# %% [markdown]
The loss is close to 0 from the first update on, and the new skill stays what it was by
luck: the demonstration is all that the teacher has ahead of the student.

## 7. Go on

- Read `diff sft.py sdft.py`: these lines are the method.
- Run the whole job, three skills one after the other:
  `python train.py --method both`.
- **Build it yourself.** [Eighteen exercises](README.md) empty a function each. You
  write it, and a failing test says which mistake it is. Five of them are this notebook:
  e06, the two contexts; e07 and e08, the divergence and its direction; e10, the
  average; e11, the whole step.

```
!python tests/exercises/make.py e07 --to mine
!python -m pytest tests/exercises -q -k e07 --impl mine
!python tests/exercises/run.py mine --method sdft
```

Without a notebook, leave out the `!` and type the lines in the project's folder.
'''


def cells():
    """The cells above as (kind, text)."""
    parts = re.split(r"^# %%( \[markdown\])?\n", CELLS, flags=re.M)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [("markdown" if mark else "code", text.strip()) for mark, text in pairs]


# ---- The digest ----------------------------------------------------------------------


def code_of(text):
    """A Python file without comments, docstrings and spaces, alike in any Python."""
    kept, last = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        begins = last in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if token.type != tokenize.STRING or not begins:
            kept.append(token.string)
        last = token.type
    text = "".join("".join(kept).split())
    return re.sub(r"([{}])\1+", r"\1", text)  # "{{" of an f-string is "{" in some


def digest(sources):
    """Of the five files' code and of the notebook's own."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in FILES]
    code = "\n".join(map(code_of, [*texts, *sources]))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


# ---- The runner ----------------------------------------------------------------------


def run(sources):
    """Run code cells in a fresh namespace, from this folder; their outputs, a list for
    each: what they print, then their pictures as PNG."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        plt = None
    namespace, outputs = {"__name__": "__main__"}, []
    os.chdir(HERE)
    for i, source in enumerate(sources):
        begun, out = time.perf_counter(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                exec(compile(source, f"<code cell {i}>", "exec"), namespace)
        except BaseException:
            print(f"{out.getvalue()}\n{source}", file=sys.stderr)
            raise
        outputs.append([])
        if out.getvalue():
            text = out.getvalue().splitlines(True)
            stream = {"name": "stdout", "output_type": "stream", "text": text}
            outputs[-1].append(stream)
        for number in plt.get_fignums() if plt else ():
            png = io.BytesIO()
            plt.figure(number).savefig(png, dpi=80, metadata={"Software": None})
            image = base64.b64encode(png.getvalue()).decode()
            picture = {"image/png": image, "text/plain": ["<Figure>"]}
            outputs[-1].append(
                {"data": picture, "metadata": {}, "output_type": "display_data"}
            )
            plt.close(number)
        seconds = time.perf_counter() - begun
        print(f"code cell {i}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return outputs


def notebook(outputs, shows):
    """The notebook as a dict, in Jupyter's format 4.5. shows: a digest."""
    made, count = [], 0
    for i, (kind, text) in enumerate(cells()):
        cell = {"cell_type": kind, "id": f"cell-{i:02d}", "metadata": {}}
        if kind == "code":
            count += 1
            cell["execution_count"] = count if outputs else None
            cell["outputs"] = outputs[count - 1] if outputs else []
        made.append(cell | {"source": text.splitlines(True)})
    metadata = {
        "kernelspec": {
            "display_name": "Python 3", "language": "python", "name": "python3"
        },
        "language_info": {"name": "python"},
        "outputs_show": shows,
    }  # fmt: skip
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", action="store_true", help="run the cells: minutes")
    parser.add_argument("--to", type=Path, default=NOTEBOOK, help="another file")
    args = parser.parse_args(argv)
    sources = [text for kind, text in cells() if kind == "code"]
    path, outputs, shows = args.to.resolve(), [], ""
    if args.run:
        os.environ.setdefault("MPLBACKEND", "agg")
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py, see there
        quick = os.environ.get("SDFT_QUICK")
        outputs, shows = run(sources), "a quick run" if quick else digest(sources)
    elif path.exists():  # keep its outputs, if the code that made them is the same
        old = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in old["cells"] if cell["cell_type"] == "code"]
        then = [code_of("".join(cell["source"])) for cell in code]
        if then == list(map(code_of, sources)):
            outputs = [cell["outputs"] for cell in code]
            shows = old["metadata"]["outputs_show"]
    text = json.dumps(notebook(outputs, shows), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path}: " + ("with outputs" if shows else "no outputs; --run makes them"))


if __name__ == "__main__":
    main(sys.argv[1:])
