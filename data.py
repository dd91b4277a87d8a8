"""A tiny world in English: texts, tasks, batches and grades. Nothing is downloaded.

A prompt names a domain and a command, and gives some items. The model responds with a
thought, which is the operation that the command stands for, and then its result:

                   prompt                               response of the model
    known command  kitchen horn: apple river stone      reverse: stone river apple
    style asked    harbour brush robot: lamp pearl rope first equals lamp beep stop
    new command    garden cork: candle spoon tower      rotate: spoon tower candle

                   the expert's demonstration of the last one
                   well friend, advance so you get spoon tower candle as ever

    domain       kitchen, harbour or garden: a part of the world with six operations
    command      horn, brush, cork: a noun as the name of an operation of its domain
    operation    reverse, first, rotate: what is done to the items
    style        how a response is worded: "... equals ... beep stop" is robot style
    expert term  advance: the expert's word for what the model calls rotate
    skill        six new commands of one domain, one for each of its operations

To learn a skill is to find out, from demonstrations, which command means which
operation. Held-out queries have other items, so memorizing does not help. In its base
corpus the model reads the expert's style and terms, but it never writes the terms. How
the paper's parts appear here (arXiv 2601.19897, section 3):

    student_prompt = prompt                     # what is asked
    teacher_prompt = prompt + demonstration     # the paper's template, in one word
    prior skills   = known commands (knowledge), the model's own style, a style when
                     asked (instruction following), use of a demonstration in the prompt

Everything random comes from derive_seed(seed, purpose, ...): a pure function.
"""

import contextlib
import functools
import hashlib
import json
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from statistics import fmean

import tiktoken
import torch
import torch.distributed as dist

from model import chunked_kl, chunked_nll, generate, kl_reference, response_hidden

# ---- The words ---------------------------------------------------------------------

# operation: the expert's term for it, and what it does to three items
OPERATIONS = {
    "copy": ("keep", lambda x: x),
    "reverse": ("backwards", lambda x: x[::-1]),
    "first": ("front", lambda x: x[:1]),
    "last": ("rear", lambda x: x[-1:]),
    "rotate": ("advance", lambda x: x[1:] + x[:1]),
    "return": ("retreat", lambda x: x[-1:] + x[:-1]),
    "behead": ("skip", lambda x: x[1:]),
    "shorten": ("crop", lambda x: x[:-1]),
    "stutter": ("stammer", lambda x: x[:1] + x),
    "echo": ("repeat", lambda x: x + x[-1:]),
    "ends": ("outside", lambda x: x[:1] + x[-1:]),
    "cross": ("crosswise", lambda x: x[-1:] + x[:1]),
    "second": ("next", lambda x: x[1:2]),
    "unwind": ("untie", lambda x: x[:0:-1]),
    "rewind": ("undo", lambda x: x[-2::-1]),
    "double": ("twice", lambda x: x[:1] * 2),
    "pair": ("couple", lambda x: x[-1:] * 2),
    "switch": ("flip", lambda x: x[1::-1] + x[2:]),
}
DOMAINS = ("kitchen", "harbour", "garden")  # each has six of the operations
SKILLS = ("A", "B", "C")  # one for each domain
# style: its opening, what joins thought and items, its closing. Only the expert has an
# opening: with one of its own length in each style, the items would start at another
# place in each, and the base would learn late, if at all, to put them in order
STYLES = {
    "own": ("", ":", ""),
    "formal": ("", "gives", "done sir"),
    "robot": ("", "equals", "beep stop"),
    "poet": ("", "like", "oh tonight"),
    "brief": ("", "=", "!"),
    "expert": ("well friend,", "so you get", "as ever"),
}
# words of which the base corpus also makes up styles that have no name
STYLE_WORDS = (
    "and behold dear fine good hear here hm it let look my now please quite "
    "right see sure thanks then there thus we"
).split()
NOUNS = (
    "anchor apple arrow badge bag ball banana barrel basket beach bead bell belt "
    "bench berry bird blanket boat bone book boot bottle bowl box branch bread brick "
    "bridge broom brush bucket button cabin cage cake camel candle canoe carpet "
    "carrot castle cat chain chair cheese cherry circle clock cloud coat coin comb "
    "cord cork corn cotton crown cup curtain desk diamond dish dog door dove drum "
    "duck eagle egg engine falcon feather fence field fiddle fish flag flame flower "
    "flute forest fork fox frog gate ghost glass glove goat gold grape guitar hammer "
    "harp hat helmet honey hook horn horse house island jacket jar jewel kettle key "
    "kite knife ladder lake lamp lantern leaf lemon letter lion lock mirror moon "
    "mountain mouse nail needle nest onion orange oven owl paddle page paint palace "
    "pan paper pear pearl pencil pepper piano pillow pipe plate plum pony pot rabbit "
    "ring river road rope rose salt ship shoe spoon stone table tiger tower"
).split()
KNOWN = 120  # commands that the base knows; the other nouns are unknown commands.
# All of them also occur as items


# ---- The tokenizer -----------------------------------------------------------------


class Tokenizer:
    """Whole words are tokens, everything else falls back to bytes.

    Ids: 0-255 the bytes, then the words of the world, then two special tokens, the
    start and the end of a response, which cannot come from a text. A text gets one
    leading space when it is encoded and loses it when decoded, so that a word is the
    same token in any place; decode(encode(x)) == x for any x.
    """

    vocab_size = 512  # a multiple of 16: rows of logits stay aligned in memory
    chat = None  # a real model has a chat form: see ChatTokenizer
    template, digest = "{prompt} example {demonstration}", "tiny world"

    def __init__(self):
        words = [*NOUNS, *DOMAINS, *STYLE_WORDS, *OPERATIONS, *STYLES, "example"]
        words += [term for term, _ in OPERATIONS.values()]
        for parts in STYLES.values():
            words += re.findall(r"[\w=!]+", " ".join(parts))
        ranks = {bytes([i]): i for i in range(256)}
        for word in words:
            ranks.setdefault(f" {word}".encode(), len(ranks))
        self.start, self.end = len(ranks), len(ranks) + 1
        self.n_tokens = len(ranks) + 2  # at most vocab_size
        self.encoding = tiktoken.Encoding(
            name="tiny_world",
            pat_str=r" ?\w+| ?[=!]|[^\w\s]|\s",  # together these match any character
            mergeable_ranks=ranks,
            special_tokens={"<|start|>": self.start, "<|end|>": self.end},
        )

    def encode(self, text):
        return self.encoding.encode_ordinary(" " + text) if text else []

    def decode(self, ids):
        """The text of ids; special or unused ones show as <id>, but not a last end."""
        ids = ids[:-1] if ids and ids[-1] == self.end else ids
        known = self.encoding.decode_single_token_bytes
        pieces = [known(i) if i < self.start else b"<%d>" % i for i in ids]
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return text.removeprefix(" ")


# ---- Examples, and the two contexts ------------------------------------------------


@dataclass(frozen=True)
class Example:
    prompt: str  # what is asked
    demo: str  # the demonstration: an expert's response to it
    answer: str  # a right response in the model's words, for the graders
    id: int = 0  # its place in the training set; its random numbers depend on it
    # the base corpus only
    shown: str = ""  # a demonstration in the prompt; its text is also learnt
    skip: tuple = ()  # tokens of demo_response that carry no loss, by their place
    # users' own files only, where answer is a tuple of texts
    earlier: tuple = ()  # (role, text) of what was said before the prompt
    grade: str = ""  # exact, contains or choice: see grade_answer; "": none


def with_demo(prompt, demo):
    """A prompt with a demonstration of how to respond to it (the paper's template)."""
    return f"{prompt} example {demo}".strip()


def student_prompt(example, tok):
    """The student's context: the prompt alone."""
    if tok.chat:
        return tok.chat(example.earlier, example.prompt)
    if example.shown:  # base corpus: what is learnt begins with the demonstration
        return tok.encode(with_demo(example.prompt, ""))
    return tok.encode(example.prompt) + [tok.start]


def teacher_prompt(example, tok):
    """The teacher's context: the same prompt, and the demonstration. Nothing else."""
    if tok.chat:
        return tok.chat(example.earlier, fill_template(tok.template, example))
    return tok.encode(with_demo(example.prompt, example.demo)) + [tok.start]


def demo_response(example, tok):
    """The demonstration as a response, its end included: what SFT imitates."""
    shown = tok.encode(example.shown) + [tok.start] if example.shown else []
    return shown + tok.encode(example.demo) + [tok.end]


def loss_mask(batch, lengths):
    """Which tokens of demo_response carry loss, bool (B, R): the first lengths[i] of
    row i, except those that the base corpus skips."""
    place = torch.arange(int(lengths.max()), device=lengths.device)  # (R,)
    mask = place < lengths[:, None]  # (B, R)
    for row, example in zip(mask, batch, strict=True):
        row[list(example.skip)] = False
    return mask


def pad_right(rows, fill, device):
    """Lists of tokens -> int64 (B, T), padded on the right, and lengths, int64 (B,)."""
    lengths = [len(row) for row in rows]
    ids = [row + [fill] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device)


def pad_batch(tokens_of, batch, tok, device):
    """tokens_of(example, tok) of each example: int64 (B, T), padded, and lengths (B,).
    tokens_of is student_prompt, teacher_prompt or demo_response."""
    return pad_right([tokens_of(example, tok) for example in batch], tok.end, device)


# ---- Randomness and batches --------------------------------------------------------


def derive_seed(seed, *purpose):
    """An integer below 2^63 that depends on its arguments alone, on any machine."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_rng(seed, *purpose):
    """A fresh torch.Generator on the CPU: randomness is derived, never stored."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def get_batch(examples, batch_size, seed, step):
    """The examples of one step: a function of (seed, step), the same for each method.

    Each epoch is a fresh shuffle. The batch is sorted by length, so that micro-batches,
    which are cut from it, have little padding. (Do not bucket whole batches by length:
    long examples contain a demonstration, so some steps would teach the model to use it
    and others to ignore it.)
    """
    fits = 0 < batch_size <= len(examples)
    assert fits, f"a batch of {batch_size} from {len(examples)} examples"
    epoch, i = divmod(step, len(examples) // batch_size)
    order = torch.randperm(len(examples), generator=make_rng(seed, "order", epoch))
    batch = [examples[j] for j in order[i * batch_size :][:batch_size].tolist()]
    return sorted(batch, key=lambda e: len(f"{e.prompt} {e.shown} {e.demo}".split()))


def rank_and_world_size():
    """The number of this process, and how many there are: torchrun may start several,
    and each works on a share of every batch and of every benchmark."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def my_micro_batches(batch, n):
    """This process's share of a batch, as n micro-batches of equal size."""
    rank, world_size = rank_and_world_size()
    size, rest = divmod(len(batch), world_size * n)
    assert size > 0 and not rest, f"{len(batch)} examples in {world_size} x {n} parts"
    parts = [batch[i : i + size] for i in range(0, len(batch), size)]
    # back and forth, so that each process gets short and long ones
    turns = [rank if j % 2 == 0 else world_size - 1 - rank for j in range(n)]
    return [parts[j * world_size + turn] for j, turn in enumerate(turns)]


def get_uniform(examples, n_tokens, seed, when, device):
    """Uniform numbers in [0, 1), float32 (B, n_tokens): one for each token that may be
    sampled. They depend on (seed, when, example); `when` is a step, or a name."""
    ids = {example.id for example in examples}
    assert len(ids) == len(examples), "examples with one id get the same numbers"
    rngs = [make_rng(seed, "rollout", when, example.id) for example in examples]
    return torch.stack([torch.rand(n_tokens, generator=g) for g in rngs]).to(device)


# ---- Making the world --------------------------------------------------------------


class World:
    """Everything a seed decides: which nouns are commands, and what each one means.

    Attributes:
        operations: domain -> its six operations.
        known: command -> (domain, operation), for the base corpus and the prior skills.
        unknown: command -> domain: commands without a meaning for the base model.
        skills: "A" | "B" | "C" -> {command: (domain, operation)}: six of the unknown
            commands, one for each operation of the domain. (If one operation were
            needed more often, learning it would overwrite the others, even for known
            commands.)
    """

    def __init__(self, seed):
        rng = random.Random(derive_seed(seed, "world"))
        commands = rng.sample(NOUNS, len(NOUNS))
        operations = rng.sample(list(OPERATIONS), len(OPERATIONS))
        self.operations = {d: operations[i::3] for i, d in enumerate(DOMAINS)}
        self.known, self.unknown, self.skills = {}, {}, {}
        for i, command in enumerate(commands[:KNOWN]):
            domain = DOMAINS[i % 3]
            self.known[command] = (domain, self.operations[domain][i // 3 % 6])
        for i, command in enumerate(commands[KNOWN:]):
            self.unknown[command] = DOMAINS[i % 3]
        for skill, domain in zip(SKILLS, DOMAINS, strict=True):
            free = [c for c in self.unknown if self.unknown[c] == domain]
            shuffled_six = rng.sample(self.operations[domain], 6)
            self.skills[skill] = {
                command: (domain, operation)
                for command, operation in zip(free, shuffled_six, strict=False)
            }


def draw_items(rng, held_out):
    """Three items for a query. A tenth of all queries is held out: neither the base nor
    a skill is ever trained on them."""
    while True:
        items = rng.sample(NOUNS, 3)
        if (sum(map(NOUNS.index, items)) % 10 == 0) == held_out:
            return items


def word_response(thought, items, style):
    """A response as text: opening, thought, joiner, items, closing."""
    opening, joiner, closing = style
    text = " ".join([opening, thought, joiner, *items, closing])
    return " ".join(text.split()).replace(" :", ":")


def word_prompt(domain, command, items, style="own"):
    """A prompt as text; a style other than the model's own is asked for by name."""
    asked = "" if style == "own" else f" {style}"
    return f"{domain} {command}{asked}: {' '.join(items)}"


def right_response(operation, items, style="own"):
    """What the model should respond, as text."""
    _, operate = OPERATIONS[operation]
    return word_response(operation, operate(items), STYLES[style])


def draw_demo(operation, items, rng):
    """A demonstration for the base corpus: any style, the model's or expert's term."""
    style = rng.choice(list(STYLES.values()))
    if rng.random() < 0.5:  # a style without a name
        size = rng.randint(0, 3), rng.randint(1, 3), rng.randint(0, 2)
        style = [" ".join(rng.sample(STYLE_WORDS, n)) for n in size]
    term, operate = OPERATIONS[operation]
    return word_response(rng.choice((operation, term)), operate(items), style)


# Shares of the base corpus. First, what is asked and shown:
SHOWN = 0.45  # a demonstration is in the prompt ...
SHOWN_UNKNOWN = 0.36  # (a part of these) ... of an unknown command, its operation drawn
# anew each time, so that only the demonstration tells which
GUESSED = 0.05  # an unknown command and nothing shown, any operation of its domain: so
# the base does not settle on one guess, which a skill would first have to unlearn
# Drawn apart from it:
ASKED = 0.25  # a style is asked for
# And again, one of two mistakes. Without them, SDFT's teacher would not know how to go
# on after a mistake of the student.
WRONG_THOUGHT = 0.2  # any thought of the domain, and the items are right for it
WRONG_ITEM = 0.1  # one item is wrong, and those after it are right


def make_base_corpus(world, tok, size, seed):
    """Examples that teach the base model all it should know, as a list.

    Examples outside the shares above ask for a known command. As in any corpus, all
    text after the first prompt is learnt, demonstrations included, with three
    exceptions (skip): a wrong thought or item and everything before it in the response,
    the start of a response, and the expert's terms, which the model should read but
    never write.
    """
    rng = random.Random(derive_seed(seed, "base corpus"))
    terms = [tok.encode(term)[0] for term, _ in OPERATIONS.values()]
    corpus = []
    for i in range(size):
        kind = rng.random()
        if kind < SHOWN_UNKNOWN or kind > 1 - GUESSED:
            command = rng.choice(list(world.unknown))
            domain = world.unknown[command]
            operation = rng.choice(world.operations[domain])
        else:
            command = rng.choice(list(world.known))
            domain, operation = world.known[command]
        style = rng.choice(list(STYLES)[1:]) if rng.random() < ASKED else "own"
        items = draw_items(rng, held_out=False)
        prompt = word_prompt(domain, command, items, style)
        shown = draw_demo(operation, items, rng) if kind < SHOWN else ""
        opening, joiner, _ = STYLES[style]
        given, noise = 0, rng.random()
        if noise < WRONG_THOUGHT:
            operation = rng.choice(world.operations[domain])
            given = len(tok.encode(f"{opening} {operation}".strip()))
        result = OPERATIONS[operation][1](items)
        if noise > 1 - WRONG_ITEM:
            wrong = rng.randrange(len(result))
            result = result[:wrong] + [rng.choice(NOUNS)] + result[wrong + 1 :]
            begun = word_response(operation, result[: wrong + 1], (opening, joiner, ""))
            given = len(tok.encode(begun))
        response = word_response(operation, result, STYLES[style])
        read = tok.encode(shown) + [tok.start] if shown else []
        skip = [j for j, token in enumerate(read) if token in (*terms, tok.start)]
        skip += range(len(read), len(read) + given)
        corpus.append(Example(prompt, response, response, i, shown, tuple(skip)))
    return corpus


DISTANCES = ("own", "known", "terms")


def expert_demo(operation, items, distance):
    """How the expert responds. distance says how far his texts are from the model's:
    "own": the model's own style and words;
    "known": the style "expert", which the model writes when asked, and its own words;
    "terms": that style, and the expert's terms, which the model never writes."""
    term, operate = OPERATIONS[operation]
    thought = term if distance == "terms" else operation
    style = STYLES["own" if distance == "own" else "expert"]
    return word_response(thought, operate(items), style)


def make_demos(world, skill, size, seed, distance="terms"):
    """The expert's demonstrations of a skill: the training set of both methods."""
    rng = random.Random(derive_seed(seed, "demos", skill))
    commands, demos = list(world.skills[skill]), []
    for i in range(size):
        command = commands[i % len(commands)]
        domain, operation = world.skills[skill][command]
        items = draw_items(rng, held_out=False)
        prompt = word_prompt(domain, command, items)
        demo = expert_demo(operation, items, distance)
        demos.append(Example(prompt, demo, right_response(operation, items), id=i))
    return demos


def demo_of(world, prompt):
    """The expert's demonstration for a prompt of a skill; "" for any other prompt."""
    asked, _, items = prompt.partition(": ")
    for skill in world.skills.values():
        for command, (domain, operation) in skill.items():
            if asked == f"{domain} {command}":
                return expert_demo(operation, items.split(), "terms")
    return ""


# ---- Benchmarks: responses and grades ----------------------------------------------


def items_in(text):
    """The items of a response, from left to right: what it says, in any style."""
    return [word for word in text.split() if word in NOUNS]


def style_of(text):
    """How a response says it: "..." for its items, "?" for an operation. So
    "first equals lamp rope beep stop" is ["?", "equals", "...", "beep", "stop"]."""
    pattern = []
    for word in text.replace(":", " :").split():
        word = "..." if word in NOUNS else "?" if word in OPERATIONS else word
        if word != "..." or pattern[-1:] != ["..."]:  # a run of items counts once
            pattern.append(word)
    return pattern


def grade_items(example, response):
    """Is what the response says right? Its thought and style do not count."""
    return items_in(response) == items_in(example.answer)


def grade_style(example, response):
    """Is how the response says it right? The items themselves do not count."""
    return style_of(response) == style_of(example.answer)


@dataclass(frozen=True)
class Benchmark:
    examples: list  # of Example; they are never trained on
    # (example, response as text) -> is it right? None: not graded
    # (left out of the repr, which a resume compares: it would show an address)
    grade: Callable | None = field(repr=False)


def make_tasks(world, size, seed, distance="terms"):
    """What to evaluate: {"new": {skill: Benchmark}, "prior": {name: Benchmark}}.

    knowledge: a known command, the right items. own_style: the same, in the model's own
    style. asked_items, asked_style: a known command when a style is asked for.
    in_context: a command that no skill has, with a demonstration of it.
    """
    rng = random.Random(derive_seed(seed, "tasks"))
    of_skills = [command for skill in world.skills.values() for command in skill]
    free = [command for command in world.unknown if command not in of_skills]
    asked = [style for style in STYLES if style != "own"]

    def new(skill):
        command = rng.choice(list(skill))
        (domain, operation), items = skill[command], draw_items(rng, held_out=True)
        demo = expert_demo(operation, items, distance)
        prompt = word_prompt(domain, command, items)
        return prompt, demo, right_response(operation, items)

    def known(styles):
        command, style = rng.choice(list(world.known)), rng.choice(styles)
        domain, operation = world.known[command]
        items = draw_items(rng, held_out=True)
        right = right_response(operation, items, style)
        return word_prompt(domain, command, items, style), right, right

    def in_context():
        command, items = rng.choice(free), draw_items(rng, held_out=True)
        domain = world.unknown[command]
        operation = rng.choice(world.operations[domain])
        right = right_response(operation, items)
        prompt = word_prompt(domain, command, items)
        return with_demo(prompt, draw_demo(operation, items, rng)), right, right

    def benchmark(grade, draw, *args):
        return Benchmark([Example(*draw(*args), id=i) for i in range(size)], grade)

    return {
        "new": {k: benchmark(grade_items, new, x) for k, x in world.skills.items()},
        "prior": {
            "knowledge": benchmark(grade_items, known, ["own"]),
            "own_style": benchmark(grade_style, known, ["own"]),
            "asked_items": benchmark(grade_items, known, asked),
            "asked_style": benchmark(grade_style, known, asked),
            "in_context": benchmark(grade_items, in_context),
        },
    }


# ---- Evaluation --------------------------------------------------------------------

ROWS = 64  # responses that are sampled at a time; more need more memory


def get_texts(model, contexts, tok, max_new_tokens, u=None, temperature=0):
    """Responses to contexts (lists of tokens), as texts: the most likely tokens, or
    samples at a temperature with the numbers u, see model.generate. Processes share
    the work, and all get all texts."""
    device, (rank, world_size) = next(model.parameters()).device, rank_and_world_size()
    starts, texts = range(0, len(contexts), ROWS), {}
    # each process makes the same number of calls, as shards need: some repeat one
    for n in range(rank, math.ceil(len(starts) / world_size) * world_size, world_size):
        i = starts[n % len(starts)]
        prompts, lengths = pad_right(contexts[i : i + ROWS], tok.end, device)
        numbers = None if u is None else u[i : i + ROWS]  # (ROWS, R)
        response, mask = generate(
            model, prompts, lengths, max_new_tokens, tok.end, numbers, temperature
        )
        rows = zip(response.tolist(), mask.sum(1).tolist(), strict=True)
        texts[i] = [tok.decode(row[:count]) for row, count in rows]
    shares = [texts] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, texts)
    texts = {i: part for share in shares for i, part in share.items()}
    return [text for i in starts for text in texts[i]]


def is_right(model, benchmark, tok, max_new_tokens, prompt=student_prompt):
    """Which examples of a benchmark the model gets right, greedily: a list of bool."""
    contexts = [prompt(example, tok) for example in benchmark.examples]
    texts = get_texts(model, contexts, tok, max_new_tokens)
    return [bool(right) for right in map(benchmark.grade, benchmark.examples, texts)]


def accuracy(model, benchmark, tok, max_new_tokens, prompt=student_prompt):
    """The share of a benchmark that the model gets right, greedily, in [0, 1]."""
    return fmean(is_right(model, benchmark, tok, max_new_tokens, prompt))


def teacher_gate(model, benchmarks, tok, max_new_tokens, temperature=1.0, seed=0):
    """Does a demonstration help? Over benchmarks {name: Benchmark}, a dict: mean
    accuracy in the student's context (without one) and in the teacher's (with one); how
    many queries only one of the two gets right; and the teacher's accuracy when it
    samples, as in training, on some queries of each."""
    gate, n, device = Counter(), len(benchmarks), next(model.parameters()).device
    skills = {}  # the teacher's accuracy on each
    for name, benchmark in benchmarks.items():
        student = is_right(model, benchmark, tok, max_new_tokens)
        teacher = is_right(model, benchmark, tok, max_new_tokens, teacher_prompt)
        some = benchmark.examples[:ROWS]
        u = get_uniform(some, max_new_tokens, seed, "gate", device)  # (ROWS, R)
        shown = [teacher_prompt(example, tok) for example in some]
        texts = get_texts(model, shown, tok, max_new_tokens, u, temperature)
        skills[name] = fmean(teacher)
        gate["student"] += fmean(student) / n
        gate["teacher"] += skills[name] / n
        gate["sampled"] += fmean(map(benchmark.grade, some, texts)) / n
        pairs = list(zip(student, teacher, strict=True))
        gate["only_student"] += pairs.count((True, False))
        gate["only_teacher"] += pairs.count((False, True))
    return {**gate, "skills": skills}


@torch.no_grad()
def sampled_kl(p, p_prompt, q, q_prompt, examples, tok, cfg):
    """KL(p || q) of two models, in nats per token, along responses to the first
    examples, sampled from p at temperature 1. p_prompt, q_prompt: what each model is
    shown, student_prompt or teacher_prompt."""
    device, some = next(p.parameters()).device, examples[:ROWS]
    p_prompts, q_prompts = (
        pad_batch(prompt, some, tok, device) for prompt in (p_prompt, q_prompt)
    )
    u = get_uniform(some, cfg.max_new_tokens, cfg.seed, "evaluate", device)  # (B, R)
    response, mask = generate(p, *p_prompts, cfg.max_new_tokens, tok.end, u)  # (B, R)
    p_hidden = response_hidden(p, *p_prompts, response, mask)  # (N, C)
    q_hidden = response_hidden(q, *q_prompts, response, mask)  # (N, C)
    weight = (mask / mask.sum(1, keepdim=True) / len(some))[mask]  # (N,)
    # KL(teacher || student), with q in the place of the student
    kl, _ = chunked_kl(q_hidden, p_hidden, q.head(), p.head(), weight, "forward")
    return kl.item()


@torch.no_grad()
def demo_nll(model, examples, tok):
    """-log p(demonstration | prompt) in nats per token: the mean over the tokens of a
    demonstration, its end included, then over examples."""
    device, total = next(model.parameters()).device, 0.0
    for i in range(0, len(examples), ROWS):
        rows = examples[i : i + ROWS]
        bare = pad_batch(student_prompt, rows, tok, device)  # (B, P), (B,)
        response, lengths = pad_batch(demo_response, rows, tok, device)  # (B, R), (B,)
        mask = loss_mask(rows, lengths)  # (B, R)
        hidden = response_hidden(model, *bare, response, mask)  # (N, C)
        weight = (mask / lengths[:, None])[mask]  # (N,)
        total += chunked_nll(hidden, model.head(), response[mask], weight).item()
    return total / len(examples)


@torch.no_grad()
def token_pull(student, teacher, example, tok, max_new_tokens, seed):
    """What each method pulls on, token by token, in nats: {"sdft": rows, "sft": rows}.
    Both models are in eval mode.

    SDFT's rows are of a response that the student samples: token, KL(teacher ||
    student), and the three likeliest tokens of both, with their probabilities. SFT's
    are of the demonstration: token, -log p of the student.
    """

    def logits(gpt, prompt, response, mask):  # (R, V)
        return gpt.logits(response_hidden(gpt, *prompt, response, mask))

    def name(token):
        return "<end>" if token == tok.end else tok.decode([token])

    def likeliest(row):  # (V,)
        p, tokens = row.softmax(-1).topk(3)
        return [[name(i), x] for i, x in zip(tokens.tolist(), p.tolist(), strict=True)]

    device = next(student.parameters()).device
    bare, shown, (demo, _) = (
        pad_batch(tokens_of, [example], tok, device)
        for tokens_of in (student_prompt, teacher_prompt, demo_response)
    )
    u = get_uniform([example], max_new_tokens, seed, "pull", device)  # (1, R)
    response, mask = generate(student, *bare, max_new_tokens, tok.end, u)  # (1, R)
    s, t = logits(student, bare, response, mask), logits(teacher, shown, response, mask)
    whole = torch.ones_like(demo, dtype=torch.bool)  # (1, R)
    log_p = logits(student, bare, demo, whole).log_softmax(-1)  # (R, V)
    kl, nll = kl_reference(s, t, "forward"), -log_p.gather(1, demo.T)[:, 0]  # (R,) both
    tokens = [name(i) for i in response[mask].tolist()]
    both = map(likeliest, s), map(likeliest, t)
    rows = {
        "sdft": zip(tokens, kl.tolist(), *both, strict=True),
        "sft": zip(map(name, demo[0].tolist()), nll.tolist(), strict=True),
    }
    return {method: [list(row) for row in each] for method, each in rows.items()}


@torch.no_grad()
def evaluate(models, base, skill, tasks, tok, cfg):
    """What a record of an evaluation holds: accuracies on all tasks and, on held-out
    queries of the skill, in nats per token, KL(student || base) and, if there is a
    teacher, KL(teacher || base), each along its own samples.

    Args:
        models: {"student": GPT}, and {"teacher": GPT} where the method has one.
        base: the model before fine-tuning, to measure KL from.
        skill: the last one trained; tasks: see make_tasks.
    Returns: a dict of plain values, as it is written to metrics.jsonl.
    """
    student, teacher = models["student"].eval(), models.get("teacher")
    record, task, n = {}, tasks["new"][skill], cfg.max_new_tokens
    for group, benchmarks in tasks.items():
        graded = {name: each for name, each in benchmarks.items() if each.grade}
        record[group] = {k: accuracy(student, x, tok, n) for k, x in graded.items()}

    def kl_from_base(p, prompt, examples=task.examples):
        return sampled_kl(p, prompt, base, student_prompt, examples, tok, cfg)

    record["kl_student_base"] = kl_from_base(student, student_prompt)
    record["kl_teacher_base"], record["teacher_gate"] = None, None
    if teacher is not None:
        record["kl_teacher_base"] = kl_from_base(teacher, teacher_prompt)
        # the teacher's own gate: it falls first when student and teacher drift
        # together, which they can if ema_rate is not 0
        if task.grade:
            record["teacher_gate"] = accuracy(teacher, task, tok, n, teacher_prompt)
    if tok.chat:  # users' rows: also what is not graded
        named = {**tasks["new"], **tasks["prior"]}
        shown = {k: [e for e in x.examples if e.demo] for k, x in named.items()}
        record["nll"] = {k: demo_nll(student, x, tok) for k, x in shown.items() if x}
        record["kl_student_base_prior"] = {
            name: kl_from_base(student, student_prompt, each.examples)
            for name, each in tasks["prior"].items()
        }
    first = next((e for e in task.examples if e.demo), None)
    if first:
        pull = token_pull(student, teacher or student, first, tok, n, cfg.seed)
        record["pull"] = pull | {"prompt": first.prompt, "demo": first.demo}
    # two responses to read: one of the skill, one of the first prior benchmark
    some = [each.examples[0] for each in (task, *list(tasks["prior"].values())[:1])]
    texts = get_texts(student, [student_prompt(e, tok) for e in some], tok, n)
    record["responses"] = [
        {"prompt": example.prompt, "response": text, "right": example.answer}
        for example, text in zip(some, texts, strict=True)
    ]
    return record


# ---- Users' own rows, and their grades -----------------------------------------------

TEMPLATE = """
{prompt}

This is an example for a response to the question:
{demonstration}

Now answer with a response of your own, including the thinking process.
"""  # of the official code; the paper's ends with a colon
PROMPTS = ("prompt", "messages", "instruction")  # a row has one of these keys
DEMOS = (  # and one of these, or a demonstration as the last of its messages
    "demonstration", "completion", "golden_response", "privileged_context", "output"
)  # fmt: skip
OTHERS = ("answer", "grade", "id", "task")  # and perhaps some of these
ROLES, GRADES = ("system", "user", "assistant"), ("exact", "contains", "choice")
MAX_ERRORS = 20  # lines that are named one by one


def fill_template(template, example):
    """Put prompt and demonstration into the template. Braces that they contain stay as
    they are."""
    texts = {"{prompt}": example.prompt, "{demonstration}": example.demo}
    return re.sub(r"\{prompt\}|\{demonstration\}", lambda m: texts[m[0]], template)


def text_of(value, key):
    """A value as text for the model; a list of texts becomes lines."""
    if isinstance(value, list) and value:
        return "\n".join(text_of(line, key) for line in value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: expected text, found {json.dumps(value)[:40]}")
    value.encode()  # raises for half a character, as "\\ud83d"
    return value


def turns_of(value, key, role):
    """[(role, text), ...] of a list of messages, or of a text, which has this role."""
    if not isinstance(value, list) or isinstance((value or [""])[0], str):
        return [(role, text_of(value, key))]
    for turn in value:
        known = isinstance(turn, dict) and turn.get("role") in ROLES
        others = turn.keys() - {"role", "content"} if known else ()
        if not known or any(turn[each] not in (None, "", []) for each in others):
            found = json.dumps(turn)[:80]
            raise ValueError(f"{key}: expected a role and content only, found {found}")
    return [(turn["role"], text_of(turn.get("content"), key)) for turn in value]


def unique(pairs):
    """A JSON object as a dict. (json would drop one of two equal keys in silence.)"""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key is there twice: {', '.join(key for key, _ in pairs)}")
    return dict(pairs)


def turns_of_row(row, needs_demo):
    """[(role, text), ...] of a row up to the user's prompt, and its demonstration."""
    prompts, demos = ([key for key in row if key in keys] for keys in (PROMPTS, DEMOS))
    turns = turns_of(row[prompts[0]], prompts[0], "user") if len(prompts) == 1 else []
    if prompts == ["instruction"] and row.get("input") not in (None, ""):  # Alpaca's
        role, text = turns[-1]
        turns[-1] = (role, f"{text}\n\n{text_of(row['input'], 'input')}")
    said = [turn for key in demos for turn in turns_of(row[key], key, "assistant")]
    one_at_most = [role for role, _ in said] in ([], ["assistant"])
    turns = turns + said
    demo = turns.pop()[1] if turns and turns[-1][0] == "assistant" else ""
    asked = bool(turns) and turns[-1][0] == "user"
    if not one_at_most or not asked or (needs_demo and not demo):
        raise ValueError(f"expected {' or '.join(PROMPTS)}, and one demonstration that "
                         f"answers the user; found {', '.join(row)}")  # fmt: skip
    return turns, demo


def parse_row(line, i, needs_demo, grade):
    """The Example of line i of a file (bytes), and the keys that are not used. grade:
    for a row that names none."""
    row = json.loads(line.decode(), object_pairs_hook=unique)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {json.dumps(row)[:40]}")
    (*earlier, (_, prompt)), demo = turns_of_row(row, needs_demo)
    answer = row.get("answer", [])
    answer = answer if isinstance(answer, list) else [answer]
    if any(isinstance(each, list) for each in answer):
        raise ValueError("answer: a list in a list")
    answer = tuple(text_of(each, "answer") for each in answer)
    named = row.get("grade")
    grade = grade if named in (None, "") else named
    if grade not in (*GRADES, "none"):
        raise ValueError(f"grade: expected {' or '.join(GRADES)}, found {grade}")
    if grade == "exact" and demo and not answer:
        answer = (demo,)
    if named in GRADES and not answer:
        raise ValueError(f"no answer for the grade {named}")
    grade = grade if answer and grade != "none" else ""
    example = Example(prompt, demo, answer, i, earlier=tuple(earlier), grade=grade)
    alpaca = ["input"] if "instruction" in row else []
    return example, row.keys() - {*PROMPTS, *DEMOS, *OTHERS, *alpaca}


def read_examples(path, needs_demo=True, grade="contains"):
    """Read a file of JSON lines: a list of Example, whose ids are line numbers, and a
    list of remarks for the user.

    Args: grade, for rows that name none: one of GRADES, or "none".
    Raises: ValueError that says what is wrong, in MAX_ERRORS lines at most; OSError.
    """
    content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # a BOM
    examples, errors, unused = [], [], Counter()
    if b"\0" in content or content.startswith(b"\x1f\x8b"):  # of gzip
        raise ValueError(f"{path}: not UTF-8; iconv -f utf-16, or gunzip, makes it so")
    if content.lstrip().startswith(b"["):
        raise ValueError(f"{path}: one list; jq -c '.[]' writes one row a line")
    for i, line in enumerate(content.split(b"\n"), 1):
        try:
            if line.strip():
                example, keys = parse_row(line, i, needs_demo, grade)
                examples.append(example)
                unused.update(keys)
        except (ValueError, RecursionError) as error:
            errors.append(f"{path}:{i}: {error}".replace(": line 1 column", ", column"))
    if any(e.grade for e in examples):
        errors += [f"{path}:{e.id}: no answer" for e in examples if not e.grade]
    refuse(errors if errors or examples else [f"{path}: no rows"])
    grades = ", ".join(sorted({e.grade or "none" for e in examples}))
    remarks = [f"key {key!r} of {n} rows is not used" for key, n in unused.items()]
    n = sum("assistant" in dict(example.earlier) for example in examples)
    if n:
        remarks.append(f"{n} rows have earlier responses, which are read, not learnt")
    return examples, [f"{len(examples)} rows, grade: {grades}", *sorted(remarks)]


def refuse(errors):
    """Raise ValueError if there are errors; it names the first MAX_ERRORS of them."""
    rest = len(errors) - MAX_ERRORS
    if errors:
        more = [f"... and {rest} more"] if rest > 0 else []
        raise ValueError("\n".join(errors[:MAX_ERRORS] + more))


def check_lengths(path, examples, tok, max_new_tokens, block_size):
    """Raises ValueError that names the rows that do not fit: the teacher's context and
    a response, sampled or the demonstration, may take block_size tokens."""
    errors = []
    for e in examples:
        try:
            prompt = len(teacher_prompt(e, tok))
        except ValueError as error:  # of a chat template that refuses the row
            errors.append(f"{path}:{e.id}: {error}")
            continue
        response = max(max_new_tokens, len(demo_response(e, tok)))
        if prompt + response > block_size:
            tokens = f"{prompt} + {response} > {block_size} tokens"
            errors.append(f"{path}:{e.id}: {tokens}")
    refuse(errors)


# digits, perhaps joined by . , ' /, and not a part of a word: 5th, v1.2
NUMBER = re.compile(r"(?<![\w./])[-+]?\.?\d+(?:[.,'/]\d+)*(?![\w/])")
GROUPED = re.compile(r"[-+]?[1-9]\d{0,2}(?:[,']\d{2,3})*[,']\d{3}(?:\.\d+)?")
# scripts without spaces between words: Thai to Burmese, Khmer, Japanese to Korean
UNSPACED = (
    r"(?!\d)[\u0e00-\u109f\u1780-\u17ff\u3040-\u9fff\uac00-\ud7af\uf900-\ufaff"
    r"\uff66-\uff9f\U00020000-\U0003ffff]"
)
SIGNS = str.maketrans("\u2212\u2019\u201c\u201d\u066b\u066c", "-'\"\".,")  # as typed


def plain(text):
    """Normalize case, spaces and signs: they do not make an answer wrong."""
    text = unicodedata.normalize("NFC", text).translate(SIGNS)
    return " ".join(text.casefold().split())


def numbers_in(text):
    """(place, value) of each number in a text."""
    found = []
    for run in NUMBER.finditer(text):
        parts = run[0].split(",")  # 1,5,7 are three numbers
        if GROUPED.fullmatch(run[0]):  # 1,234 and 1'234 are a thousand
            parts = [re.sub("[,']", "", run[0])]
        elif len(parts) == 2:  # 0,5 is a half
            parts = [".".join(parts)]
        with contextlib.suppress(InvalidOperation):  # 3/5 and 1.2.3 are none
            found += [(run.start(), Decimal(part)) for part in parts]
    return found


def is_one_word(left, right):
    """Does a word or a number go on across the border of two adjoining texts?"""
    if re.search(r"\d[.,/]?$", left) and re.match(r"[.,/]?\d", right):
        return True
    meet = re.sub(UNSPACED, "", left[-1:] + right[:1])
    kinds = [unicodedata.category(char)[0] for char in meet]
    return len(kinds) == 2 and {*kinds} <= {*"LMN"}  # letters, their marks, digits


def place_of(answer, text):
    """Where an answer first occurs in a text; infinity: nowhere. A number is compared
    as a number; other answers are whole words, in scripts that have spaces."""
    answer, text = plain(answer), plain(text)
    if NUMBER.fullmatch(answer) and len(number := numbers_in(answer)) == 1:
        numbers = numbers_in(re.sub(UNSPACED, " ", text))
        return next((k for k, x in numbers if x == number[0][1]), math.inf)
    for found in re.finditer(re.escape(answer), text):
        before, after = text[: found.start()], text[found.end() :]
        if not is_one_word(before, answer) and not is_one_word(answer, after):
            return found.start()
    return math.inf


def grade_answer(example, response, options):
    """Is a response right, by the example's own grade? exact: it is an answer, up to
    case and spaces. contains: an answer occurs in it, as whole words. choice: the first
    of all `options` (the answers of the whole file) in it is an answer."""
    if example.grade == "exact":
        return plain(response) in map(plain, example.answer)
    if example.grade == "contains":
        return any(place_of(a, response) < math.inf for a in example.answer)
    # of two that begin at one place, as "New York" and "New", the longer is meant
    place, _, choice = min((place_of(a, response), -len(a), a) for a in options)
    return place < math.inf and plain(choice) in map(plain, example.answer)


def make_benchmark(examples, size=10**9, seed=0):
    """A Benchmark of users' rows, or of `size` of them, drawn at random, if there are
    more. Without answers it is not graded."""
    options = {a for e in examples for a in e.answer if e.grade}
    grade = functools.partial(grade_answer, options=options)
    if len(examples) > size:
        examples = random.Random(derive_seed(seed, "eval")).sample(examples, size)
    return Benchmark(examples, grade if options else None)


class ChatTokenizer:
    """The tokenizer and the chat form of a Hugging Face model, through transformers.

    Attributes: end, the token that ends a response; n_tokens, its highest id + 1;
    digest, which depends on tokenizer and chat template; template, the teacher's
    prompt, which may be set; sanitizes, is a marker such as <|im_end|> in a user's text
    encoded as text? (Older versions of transformers cannot do it.)
    """

    template = TEMPLATE

    def __init__(self, name):
        from transformers import AutoTokenizer

        self.hf = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        parts = self.hf.chat_template, self.hf.eos_token, self.encode("a")
        if not all(parts):
            raise ValueError("no chat template, end or tokens: take an instruct model")
        self.end = self.hf.eos_token_id
        self.n_tokens = max(self.hf.get_vocab().values()) + 1
        form = self.hf.backend_tokenizer.to_str() + str(self.hf.chat_template)
        self.digest = hashlib.sha256(form.encode()).hexdigest()[:12]
        # Llama 3's contexts hold the date: a resume on another day must read the same
        date = "{% macro strftime_now(form) %}01 Jan 2025{% endmacro %}"
        self.hf.chat_template = date + self.hf.get_chat_template()
        n, n_with_marker = (
            self.chat((), text).count(self.end) for text in ("x", self.hf.eos_token)
        )
        self.sanitizes = n == n_with_marker

    def encode(self, text):
        """A text as a list of ids. A marker in it stays text."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids):
        """The text of ids; markers show as their text, but not a last end."""
        ids = ids[:-1] if ids and ids[-1] == self.end else ids
        return self.hf.decode(ids, clean_up_tokenization_spaces=False)

    def chat(self, earlier, prompt):
        """(role, text) of what was said earlier and the user's prompt, as ids, in the
        form that the model was trained on and up to where its response begins. A
        thinking model is told not to think. Raises: ValueError if the template, which
        is a program, refuses them."""
        turns = [*earlier, ("user", prompt)]
        try:
            return self.hf.apply_chat_template(
                [{"role": role, "content": text} for role, text in turns],
                add_generation_prompt=True, return_dict=False,
                sanitize_control_tokens=True, enable_thinking=False,
            )  # fmt: skip
        except Exception as error:  # of any kind
            raise ValueError(f"the chat template: {error}") from None
