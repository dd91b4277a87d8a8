"""The project with some lines changed: named changes, shown as a diff, and run.

    python tests/exercises/variants.py                # the list
    python tests/exercises/variants.py dft            # one of them, as a diff
    python tests/exercises/variants.py dft --run --method sft --quick
    python tests/exercises/variants.py --run --method sft        # the project itself

A change is (file, old text, new text). The old text stands in the file exactly once, or
applying it is an error: so no change can drift away from the code in silence. What
follows --run goes to train.py; the base model is the project's own, made once and
shared, so that a variant changes the fine-tuning and nothing else.

`Modules` loads the changed files beside the project's own, which stay as they are:

    m = Modules(changes_of("dft"))
    m.sft.compute_loss       # the changed one; m.model, m.data, ... belong to it
"""

import argparse
import builtins
import copy
import difflib
import functools
import itertools
import linecache
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FILES = {
    **{f"{name}.py": ROOT for name in ("model", "data", "sft", "sdft", "train")},
    "extra.py": HERE,
}

# ---- The variants ------------------------------------------------------------------

KL_LOSS = """\
    return chunked_kl(
        hidden, teacher_hidden, *heads, weight, cfg.kl, cfg.temperature, watch
    )
"""


def own_loss(lines):
    """A change: these lines make sdft.py's loss, what else it records stays."""
    return "sdft.py", KL_LOSS, f"""{lines}\
    args = hidden, teacher_hidden, *heads, weight, cfg.kl, cfg.temperature, watch
    return loss, chunked_kl(*args)[1] if watch else {{}}
"""


DENSE = """\
    from model import make_logits

    dense = []
    for states, head in zip((hidden, teacher_hidden), heads, strict=True):
        rows = make_logits(states, head, cfg.temperature)  # (N, V)
        whole = rows.new_zeros(*mask.shape, rows.size(-1))  # (B, R, V)
        dense.append(whole.index_put(mask.nonzero(as_tuple=True), rows))
"""  # the logits of student and teacher, (B, R, V) each

DFT = [(
    "sft.py",
    "    loss = chunked_nll(hidden, student.head(), response[mask], weight)\n",
    """\
    # DFT (arXiv 2508.05629): a token weighs as much as the student believes in it
    head, tokens = student.head(), response[mask]  # (V, C), (N,)
    with torch.no_grad():
        parts = zip(*(x.split(chunk_rows(head)) for x in (hidden, tokens)))
        p = [make_logits(h, head).softmax(-1).gather(1, t[:, None]) for h, t in parts]
        weight = weight * torch.cat(p)[:, 0]  # (N,)
    loss = chunked_nll(hidden, head, tokens, weight)
""",
), ("sft.py", "import chunked_nll,", "import chunk_rows, chunked_nll, make_logits,")]

OFFPOLICY = [
    (
        "sdft.py",
        "    bare = data.pad_batch(data.student_prompt, batch, tok, device)"
        "  # (B, P), (B,)\n    u = data",
        "    bare = data.pad_batch(data.teacher_prompt, batch, tok, device)"
        "  # (B, P), (B,)\n    u = data",
    ),
    (
        "sdft.py",
        "get_responses(student, micro, tok, cfg, step)",
        "get_responses(teacher, micro, tok, cfg, step)",
    ),
]

KEPT = [(
    "sdft.py", "get_responses(student, micro, tok, cfg, step)",
    "get_responses(base, micro, tok, cfg, 0)",  # the same numbers: the same response
)]  # fmt: skip

SPECULATIVE = [
    (
        "sdft.py",
        "from model import chunked_kl, generate, response_hidden\n",
        "from model import KVCache, chunked_kl, kl_reference, response_hidden, "
        "sample_token\n",
    ),
    (
        "sdft.py",
        "    skip_first_tokens: int = 0",
        "    tau: float = 0.3  # the teacher writes a token where KL(teacher || "
        "student) > tau\n    skip_first_tokens: int = 0",
    ),
    (
        "sdft.py",
        "def get_responses(student, batch, tok, cfg, step):\n",
        "def get_responses(student, teacher, batch, tok, cfg, step):\n",
    ),
    (
        "sdft.py",
        "    return generate(student, *bare, cfg.max_new_tokens, tok.end, u, "
        "cfg.temperature)\n",
        """\
    shown = data.pad_batch(data.teacher_prompt, batch, tok, device)
    both = [(student.eval(), *bare), (teacher, *shown)]
    B, R = u.size()
    response = torch.full((B, R), tok.end, device=device)
    alive = torch.ones(B, dtype=torch.bool, device=device)
    caches = [KVCache(m.config, p, n, R, m.dtype) for m, p, n in both]
    last = [
        m.hidden(p, cache=cache)[range(B), n - 1]  # (B, C)
        for (m, p, n), cache in zip(both, caches, strict=True)
    ]
    for t in range(R):
        logits = [m.logits(x) for (m, _, _), x in zip(both, last, strict=True)]
        s, q = (x / cfg.temperature for x in logits)  # (B, V), student and teacher
        teacher_writes = kl_reference(s, q, "forward") > cfg.tau  # (B,)
        token = sample_token(torch.where(teacher_writes[:, None], q, s), u[:, t])
        response[:, t] = torch.where(alive, token, tok.end)
        alive = alive & (token != tok.end)
        if t == R - 1 or not alive.any():
            break
        last = [
            m.hidden(response[:, t : t + 1], n + t, cache)[:, 0]
            for (m, _, n), cache in zip(both, caches, strict=True)
        ]
    student.train()
    n_tokens = ((response != tok.end).sum(1) + 1).clamp(max=R)  # (B,), an end counts
    R = int(n_tokens.max())
    mask = torch.arange(R, device=device) < n_tokens[:, None]  # (B, R)
    return response[:, :R], mask
""",
    ),
    (
        "sdft.py",
        "get_responses(student, micro, tok, cfg, step)",
        "get_responses(student, teacher, micro, tok, cfg, step)",
    ),
    ("train.py", '"temperature": (1e-3, 1e3),', '"temperature": (1e-3, 1e3), '
     '"tau": (0, 1e9),'),
]  # fmt: skip

SCALED = "    scaled = hidden.to(weight.dtype) / cfg.temperature  # (N, C)\n"

SAMPLED = [own_loss(f"""\
    # KL(student || teacher) from the sampled token alone: what policy gradients use
    n, tokens = chunk_rows(heads[0]), response[mask]  # (N,)

    def log_p(hidden, head):
        rows = []
        for h, t in zip(hidden.split(n), tokens.split(n), strict=True):
            chunk = make_logits(h, head, cfg.temperature).log_softmax(-1)
            rows.append(chunk.gather(1, t[:, None])[:, 0])
        return torch.cat(rows)  # (N,)

    with torch.no_grad():
        ratio = log_p(hidden, heads[0]) - log_p(teacher_hidden, heads[1])
        ratio = weight * ratio  # (N,)
{SCALED}\
    loss = chunked_nll(scaled, heads[0], tokens, -ratio)  # has the gradient
    loss = loss - loss.detach() + ratio.sum()  # and the value
"""), (
    "sdft.py",
    "from model import chunked_kl, generate,",
    "from model import chunk_rows, chunked_kl, chunked_nll, generate\n"
    "from model import make_logits,",
)]  # fmt: skip

IMITATE = [own_loss(f"""\
{SCALED}\
    loss = chunked_nll(scaled, heads[0], response[mask], weight)
"""), ("sdft.py", "import chunked_kl,", "import chunked_kl, chunked_nll,")]

RAO_BLACKWELL = [(
    "sdft.py", KL_LOSS, f"""\
    # KL(student || teacher), and what each token does to the divergence behind it: a
    # token that leads to where the two disagree gets less likely (appendix A.1)
    T, states = cfg.temperature, (hidden, teacher_hidden)
    loss, sums = chunked_kl(*states, *heads, weight, "reverse", T, watch)
    n, k = chunk_rows(heads[0]), torch.zeros(mask.shape, device=mask.device)  # (B, R)
    with torch.no_grad():
        pairs = zip(*(x.split(n) for x in states))
        k[mask] = weight * torch.cat([
            kl_reference(*map(make_logits, pair, heads, (T, T)), "reverse")
            for pair in pairs
        ])
    behind = k.sum(1, keepdim=True) - k.cumsum(1)  # (B, R), of the tokens after it
{SCALED}\
    score = chunked_nll(scaled, heads[0], response[mask], -behind[mask])
    return loss + score - score.detach(), sums  # its gradient, and not its value
""",
), (
    "sdft.py",
    "from model import chunked_kl, generate,",
    "from model import chunk_rows, chunked_kl, chunked_nll, generate, kl_reference\n"
    "from model import make_logits,",
)]  # fmt: skip

ROLLOUTS = [
    (
        "sdft.py",
        "    skip_first_tokens: int = 0",
        "    rollouts: int = 2  # responses to a prompt; batch_size counts responses\n"
        "    skip_first_tokens: int = 0",
    ),
    (
        "sdft.py",
        "        batch = data.get_batch(stages[names[stage]], cfg.batch_size, "
        "cfg.seed, step)\n",
        """\
        n = cfg.batch_size // cfg.rollouts  # prompts
        batch = data.get_batch(stages[names[stage]], n, cfg.seed, step)
        # another id, other random numbers, another response
        ids = range(0, cfg.rollouts * 10**6, 10**6)
        batch = [replace(example, id=example.id + i) for example in batch for i in ids]
""",
    ),
    (
        "sdft.py",
        "from dataclasses import dataclass\n",
        "from dataclasses import dataclass, replace\n",
    ),
    ("train.py", '"temperature": (1e-3, 1e3),', '"temperature": (1e-3, 1e3), '
     '"rollouts": (1, 10**4),'),
]  # fmt: skip

COPIES = [
    (
        "sdft.py",
        "    temperature: float = 1.0",
        "    copy_every: int = 40  # updates; in between the teacher stands still\n"
        "    temperature: float = 1.0",
    ),
    (
        "sdft.py",
        "        update_teacher(teacher, student, cfg)  # critical: once per update, "
        "after it\n",
        """\
        if (step + 1) % cfg.copy_every == 0:
            teacher.load_state_dict(student.state_dict())
""",
    ),
    ("train.py", '"temperature": (1e-3, 1e3),', '"temperature": (1e-3, 1e3), '
     '"copy_every": (1, 10**7),'),
]  # fmt: skip

REINVOKE = [
    (
        "sdft.py",
        "    shown = data.pad_batch(data.teacher_prompt, batch, tok, mask.device)\n",
        "    shown = bare  # the teacher is the base, shown nothing\n",
    ),
    (
        "sdft.py",
        "def train(student, stages, tasks, tok, cfg, run):\n",
        "def train(student, stages, tasks, tok, cfg, run, start):\n",
    ),
    (
        "sdft.py",
        "    teacher = make_teacher(student)\n",
        "    teacher = make_teacher(student)  # the base\n"
        "    student.load_state_dict(start)  # what SFT has made of it\n",
    ),
    (
        "sdft.py",
        "        update_teacher(teacher, student, cfg)  # critical: once per update, "
        "after it\n",
        "",
    ),
    (
        "train.py",
        "    evaluations = METHODS[method].train("
        "student, stages, tasks, tok, cfg, run)\n",
        """\
    args = student, stages, tasks, tok, cfg, run
    if method == "sdft":
        saved = read_run(run.folder.parent / "sft" / "checkpoint.pt")
        args += (saved["models"]["student"],)
    evaluations = METHODS[method].train(*args)
""",
    ),
]

GENERAL = [
    (
        "data.py",
        "    commands, demos = list(world.skills[skill]), []\n",
        "    commands, demos = list(world.known), []  # nothing of the skill\n",
    ),
    (
        "data.py",
        "        domain, operation = world.skills[skill][command]\n"
        "        items = draw_items(rng, held_out=False)\n"
        "        prompt = word_prompt(domain, command, items)\n",
        """\
        domain, operation = world.known[command]
        items = draw_items(rng, held_out=False)
        style = rng.choice(list(STYLES)[1:]) if rng.random() < ASKED else "own"
        prompt = word_prompt(domain, command, items, style)
""",
    ),
]

ANSWER_ONLY = [(
    "data.py",
    '    thought = term if distance == "terms" else operation\n',
    '    thought = ""  # the expert says what comes out, and not why\n',
)]  # fmt: skip

READS_ANSWERS = [(
    "data.py",
    "    return word_response(rng.choice((operation, term)), operate(items), style)\n",
    """\
    thought = rng.choice((operation, term)) if rng.random() > 0.3 else ""
    return word_response(thought, operate(items), style)
""",
)]  # fmt: skip

LEAK = [  # a word opens each style, the model's own, too: it says whose words follow
    ("data.py", f'"{style}": ("{old}', f'"{style}": ("{new}') for style, old, new in (
        ("own", "", "do"), ("formal", '", "gives", "done sir', 'sir", "gives", "done'),
        ("robot", '", "equals", "beep stop', 'beep", "equals", "stop'),
        ("poet", '", "like", "oh tonight', 'oh", "like", "tonight'),
        ("brief", "", "so"), ("expert", "well friend,", "well"),
    )
] + [("data.py", old, new) for old, new in (
    ("size = rng.randint(0, 3), ", "size = 1, "),
    # more demonstrations, since fewer of them are answered in the model's own words
    ("SHOWN = 0.45 ", "SHOWN = 0.6 "), ("UNKNOWN = 0.36 ", "UNKNOWN = 0.48 "),
    ("        read = tok.encode(shown) + [tok.start] if shown else []\n", """\
        if shown and style == "own" and rng.random() < 0.6:  # it repeats what it reads
            response, given = shown, 0
        read = tok.encode(shown) + [tok.start] if shown else []
"""),
)]  # fmt: skip

VARIANTS = {  # name: (what it is, changes)
    "dft": ("SFT whose tokens weigh as much as the student believes in them", DFT),
    "offpolicy": ("SDFT, but the teacher writes the responses", OFFPOLICY),
    "kept": ("SDFT, but the base has written the responses, once for all", KEPT),
    "speculative": (
        "SDFT, but the teacher writes a token where KL(teacher || student) > --tau "
        "(0: offpolicy, large: SDFT)", SPECULATIVE,
    ),
    "sampled": (
        "SDFT with KL(student || teacher) estimated from the sampled token", SAMPLED,
    ),
    "raoblackwell": (
        "SDFT with the gradient of KL(student || teacher) of whole responses",
        RAO_BLACKWELL,
    ),
    "rollouts": ("SDFT with --rollouts responses to each prompt", ROLLOUTS),
    "imitate": (
        "SDFT's responses, imitated as SFT does; with offpolicy: generate with the "
        "demonstration, then imitate", IMITATE,
    ),
    "copies": (
        "SDFT whose teacher is a copy of the student, a fresh one every --copy-every "
        "updates", COPIES,
    ),
    "reinvoke": (
        "after SFT, on-policy distillation from the base that is shown nothing; SFT's "
        "run stands beside it in --out", REINVOKE,
    ),
    "general": (
        "prompts with commands that the base knows in place of the skill's, for "
        "reinvoke", GENERAL,
    ),
    "answer-only": ("demonstrations without their thought", ANSWER_ONLY),
    "reads-answers": (
        "a base corpus in which .3 of the demonstrations lack their thought",
        READS_ANSWERS,
    ),
    "leak": (
        "styles that open with one word each, and a base corpus in which .6 of the "
        "responses repeat a demonstration where no style is asked for", LEAK,
    ),
}  # fmt: skip


# ---- Changed text ------------------------------------------------------------------


class KitError(ValueError):
    """Something that the user can mend: printed as an error and a hint, exit code 2."""

    def __init__(self, message, hint):
        super().__init__(message)
        self.hint = hint


def source(file):
    """The text of one of the project's files."""
    return (FILES[file] / file).read_text(encoding="utf-8")


def change(text, old, new, where):
    """The text with old replaced by new. Raises ValueError unless old is there once."""
    if (n := text.count(old)) != 1:
        raise ValueError(f"{where}: {n} places match, not one:\n{old}")
    return text.replace(old, new)


def changed_texts(changes):
    """{file: text} of the files that these changes, made in order, touch."""
    texts = {}
    for file, old, new in changes:
        texts[file] = change(texts.get(file) or source(file), old, new, file)
    return texts


def changes_of(names):
    """The changes of one or more variants: "dft", or "offpolicy,sampled". Raises
    KitError for a name that is unknown, and for variants that do not go together."""
    found, names = [], names.split(",") if isinstance(names, str) else names
    for name in names:
        if name not in VARIANTS:
            near = difflib.get_close_matches(name, VARIANTS, 1, 0.4)
            raise KitError(
                f"no variant {name!r}",
                f"did you mean {near[0]}?" if near else f"one of {', '.join(VARIANTS)}",
            )
        found += VARIANTS[name][1]
    try:
        changed_texts(found)
    except ValueError:
        if len(names) < 2:  # the project's own file has changed: say where
            raise
        message = f"{', '.join(names)}: two of these change the same lines"
        raise KitError(message, "one of them at a time") from None
    return found


def diff(changes):
    """The changes as one diff, as `diff -u` writes it."""
    lines = []
    for file, text in changed_texts(changes).items():
        before, after = source(file).splitlines(), text.splitlines()
        lines += difflib.unified_diff(before, after, file, file, lineterm="")
    return "\n".join(lines)


# ---- Changed modules ---------------------------------------------------------------

counter = itertools.count(1)


@functools.lru_cache(maxsize=32)
def compiled(text, path):
    return compile(text, path, "exec")


class Modules:
    """model, data, sft, sdft, train and extra with changes, as attributes. Each is
    loaded when it is first asked for; they import each other, never the project's.

    changes: a list of (file, old, new). after: a function (file name, module), called
    when a module was loaded and before another one imports from it.
    """

    def __init__(self, changes=(), after=None):
        self._texts, self._after = changed_texts(changes), after
        self._loaded = {}
        # an import statement asks the __builtins__ of its module: so no other code in
        # this process can see or meet the changed modules
        self._builtins = {**vars(builtins), "__import__": self._import}

    def _import(self, name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and f"{name}.py" in FILES:
            return getattr(self, name)
        return builtins.__import__(name, globals, locals, fromlist, level)

    def __getattr__(self, name):
        file = f"{name}.py"
        if name.startswith("_") or file not in FILES:
            raise AttributeError(name)
        return self._loaded.get(name) or self._load(name, file)

    def close(self):
        """Empty the modules, which nobody may use any more. sys.modules and triton's
        list of kernels would keep them, and the syntax trees of a student's work,
        until the process ends."""
        for module in self._loaded.values():
            sys.modules.pop(module.__name__, None)
            if module.__file__.startswith("<"):
                linecache.cache.pop(module.__file__, None)
            vars(module).clear()
        self._loaded, self._after = {}, None

    def _load(self, name, file):
        path, text = str(FILES[file] / file), self._texts.get(file)
        n = next(counter)
        if text is None:
            text = source(file)
        else:  # tracebacks and inspect find the changed lines here
            path = f"<{file}, changed, {n}>"
            linecache.cache[path] = len(text), None, text.splitlines(True), path
        module = types.ModuleType(f"{name}_{n}")
        module.__file__, module.__builtins__ = path, self._builtins
        sys.modules[module.__name__] = module  # inspect looks for classes there
        exec(compiled(text, path), vars(module))
        self._loaded[name] = module  # what comes after may import it
        if self._after:
            self._after(file, module)
        return module


# ---- Runs --------------------------------------------------------------------------


def share_base(modules):
    """Let these modules' train find, or make, the base model with the project's own
    code, in out/base: whatever was changed, the base is the same and is made once."""
    own = Modules()
    own.train.LOCKS = modules.train.LOCKS  # closed when that run ends

    def find_base(args, *rest):
        args = copy.copy(args)
        args.out = "out"
        return own.train.find_base(args, *rest)

    def get_base(path, student, *rest):
        base = own.model.GPT(student.config).to(next(student.parameters()).device)
        base.load_state_dict(student.state_dict())  # the first weights
        seconds = own.train.get_base(path, base, *rest)
        student.load_state_dict(base.state_dict())
        return seconds

    modules.train.find_base, modules.train.get_base = find_base, get_base


def train_with(modules, argv, out):
    """train.py's main with these modules, on the project's base model, files in `out`
    unless argv names another folder. Returns its exit code."""
    share_base(modules)
    named = any(flag.split("=")[0] == "--out" for flag in argv)
    return modules.train.main(argv if named else [*argv, "--out", out])


def guarded(main, argv):
    """Run main(argv); what the user can mend becomes an error, a hint and a 2."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return main(argv)
    except (KitError, OSError) as error:
        hint = getattr(error, "hint", "is the path right?")
        print(f"error: {error}\nhint: {hint}", file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """What all tools of this folder have in common. prog: the script's path."""

    def __init__(self, prog, description):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False,
                         formatter_class=form)  # fmt: skip

    def error(self, message):
        raise KitError(message, f"python {self.prog} --help")


def main(argv):
    at = argv.index("--run") if "--run" in argv else len(argv)
    parser = Parser("tests/exercises/variants.py", __doc__)
    parser.add_argument("names", nargs="?", help="a variant, or several with commas")
    args = parser.parse_args(argv[:at])
    changes = changes_of(args.names) if args.names else []
    if at < len(argv):
        out = f"out-{args.names.replace(',', '-')}" if args.names else "out"
        return train_with(Modules(changes), argv[at + 1 :], out)
    if args.names:
        print(diff(changes))
        return 0
    for name, (text, changes) in VARIANTS.items():
        files = ", ".join(changed_texts(changes))
        print(f"{name:12s} {text} [{files}]")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
