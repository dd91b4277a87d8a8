"""A tiny world in English: texts, tasks, batches and grades. Nothing is downloaded.

A prompt names a domain and a command, and gives some items. The model responds with a
thought (the operation that the command stands for) and then the items, operated on:

                   prompt                               response of the model
    known command  kitchen horn: apple river stone      reverse: stone river apple
    style asked    harbour brush robot: lamp pearl rope first equals lamp beep stop
    new command    garden cork: candle spoon tower      rotate: spoon tower candle

                   the expert's demonstration of the last one
                   well friend, advance so you get spoon tower candle as ever

    domain       kitchen, harbour or garden: a part of the world with six operations
    command      horn, brush, cork: a noun as the name of an operation of its domain
    operation    reverse, first, rotate: what is done to the items
    item         apple, river, stone: what it is done to
    style        how a response is worded: "... equals ... beep stop" is robot style
    expert term  advance: the expert's word for what the model calls rotate
    skill        six new commands of one domain, one for each of its operations

Learning a skill means to find out, from demonstrations, which command stands for which
operation. Held-out queries have other items, so it cannot be learnt by heart. The model
reads the expert's style and terms in its base corpus, and never writes the terms. What
stands for what in the paper (arXiv 2601.19897, section 3):

    student_prompt = prompt                     # what is asked
    teacher_prompt = prompt + demonstration     # the paper's template, in one word
    prior skills   = known commands (knowledge), the model's own style, a style when
                     asked (instruction following), use of a demonstration in the prompt

Everything random comes from derive_seed(seed, purpose, ...): a pure function.
"""

import difflib
import functools
import hashlib
import itertools
import json
import math
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist

from model import (
    LazyLogits,
    fused_linear_nll,
    generate,
    kl_models,
    read_json,
    response_hidden,
)

try:  # comes with torch; only for chat templates
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError:
    jinja2 = None

# ---- The words ---------------------------------------------------------------------

# operation: the model's own word, the expert's term, and what it does to three items
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
    same token wherever it stands; decode(encode(x)) == x for any x.
    """

    vocab_size = 512  # a multiple of 16: rows of logits stay aligned in memory
    chat = None  # a real model has a chat form: see ChatTokenizer
    template, digest = "{prompt} example {demonstration}", "tiny world"

    def __init__(self):
        words = [*NOUNS, *DOMAINS, *STYLE_WORDS, *OPERATIONS, *STYLES, "example"]
        words += [term for term, _ in OPERATIONS.values()]
        for parts in STYLES.values():
            words += " ".join(parts).replace(",", "").replace(":", "").split()
        ranks = {bytes([i]): i for i in range(256)}
        for word in words:
            ranks.setdefault(f" {word}".encode(), len(ranks))
        self.start, self.end = len(ranks), len(ranks) + 1
        self.n_tokens = len(ranks) + 2
        assert self.n_tokens <= self.vocab_size, self.n_tokens
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
    answer: str  # a right response, as the model would put it; graders compare with it
    id: int = 0  # its place in the training set: its random numbers depend on it
    # the base corpus only
    shown: str = ""  # a demonstration in the prompt whose text is learnt, too
    skip: tuple = ()  # tokens of demo_response that carry no loss, by their place
    # users' own files only
    earlier: tuple = ()  # (role, text) of what was said before the prompt


def with_demo(prompt, demo):
    """A prompt with a demonstration of how to respond to it (the paper's template)."""
    return f"{prompt} example {demo}".strip()


def student_prompt(example, tok):
    """The student's context: the prompt alone."""
    if tok.chat:
        return tok.chat(messages_of(example, example.prompt))
    if example.shown:  # base corpus: what is learnt begins with the demonstration
        return tok.encode(with_demo(example.prompt, ""))
    return tok.encode(example.prompt) + [tok.start]


def teacher_prompt(example, tok):
    """The teacher's context: the same prompt, and the demonstration. Nothing else."""
    if tok.chat:
        return tok.chat(messages_of(example, fill_template(tok.template, example)))
    return tok.encode(with_demo(example.prompt, example.demo)) + [tok.start]


def demo_response(example, tok):
    """The demonstration as a response, its end included: what SFT imitates."""
    shown = tok.encode(example.shown) + [tok.start] if example.shown else []
    return shown + tok.encode(example.demo) + [tok.end]


def loss_mask(batch, lengths):
    """Which tokens of demo_response carry loss, bool (B, R): the first lengths[i] of
    row i, but for those that the base corpus skips."""
    place = torch.arange(int(lengths.max()), device=lengths.device)  # (R,)
    mask = place < lengths[:, None]  # (B, R)
    for row, example in zip(mask, batch, strict=True):
        row[list(example.skip)] = False
    return mask


def pad_right(rows, fill, device):
    """Lists of tokens -> int64 (B, T), padded on the right, and lengths, int64 (B,)."""
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    ids = torch.full((len(rows), int(lengths.max())), fill)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)


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


@functools.lru_cache(maxsize=2)  # a shuffle serves a whole epoch
def shuffled(size, seed, epoch):
    """0 .. size - 1 in the order of an epoch, as a list."""
    return torch.randperm(size, generator=make_rng(seed, "order", epoch)).tolist()


def get_batch(examples, batch_size, seed, step):
    """The examples of one step: a function of (seed, step), the same for each method.

    Each epoch is a fresh shuffle. The batch is sorted by length, so that micro-batches,
    which are cut from it, have little padding. (Whole batches must not be of one
    length: the long ones hold a demonstration, so that some steps would teach to read
    it and others to forget it.)
    """
    fits = 0 < batch_size <= len(examples)
    assert fits, f"a batch of {batch_size} from {len(examples)} examples"
    epoch, i = divmod(step, len(examples) // batch_size)
    places = shuffled(len(examples), seed, epoch)[i * batch_size : (i + 1) * batch_size]
    batch = [examples[j] for j in places]
    return sorted(batch, key=lambda e: len(f"{e.prompt} {e.shown} {e.demo}".split()))


def my_micro_batches(batch, n):
    """This process's share of a batch, as n micro-batches of equal size. (torchrun may
    start several processes; each works on a share of every batch.)"""
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    size, rest = divmod(len(batch), world_size * n)
    assert size > 0 and not rest, f"{len(batch)} examples in {world_size} x {n} parts"
    parts = [batch[i : i + size] for i in range(0, len(batch), size)]
    return parts[rank * n : (rank + 1) * n]


def get_uniform(examples, n_tokens, seed, when, device):
    """Uniform numbers in [0, 1), float32 (B, n_tokens): one for each token that may be
    sampled. They depend on (seed, when, example); `when` is a step, or a name."""
    ids = {example.id for example in examples}
    assert len(ids) == len(examples), "examples with one id get the same numbers"
    rngs = [make_rng(seed, "rollout", when, example.id) for example in examples]
    return torch.stack([torch.rand(n_tokens, generator=g) for g in rngs]).to(device)


# ---- Making the world --------------------------------------------------------------


class World:
    """All that a seed decides: which nouns are commands, and what each stands for.

    Attributes:
        operations: domain -> its six operations.
        known: command -> (domain, operation), for the base corpus and the prior skills.
        unknown: command -> domain: commands without a meaning for the base model.
        skills: "A" | "B" | "C" -> {command: (domain, operation)}: six of the unknown
            commands, one for each operation of the domain. (Were one operation wanted
            more often than another, learning it would first drive the other out, for
            known commands, too.)
    """

    def __init__(self, seed):
        rng = random.Random(derive_seed(seed, "world"))
        commands = rng.sample(NOUNS, len(NOUNS))
        operations = rng.sample(list(OPERATIONS), len(OPERATIONS))
        self.operations = {d: operations[i::3] for i, d in enumerate(DOMAINS)}
        self.known, self.unknown, self.skills = {}, {}, {}
        for i, command in enumerate(commands[:KNOWN]):
            domain = DOMAINS[i % 3]
            own = self.operations[domain]
            self.known[command] = (domain, own[i // 3 % len(own)])
        for i, command in enumerate(commands[KNOWN:]):
            self.unknown[command] = DOMAINS[i % 3]
        for skill, domain in zip(SKILLS, DOMAINS, strict=True):
            free = [c for c in self.unknown if self.unknown[c] == domain]
            own = self.operations[domain]
            self.skills[skill] = {
                command: (domain, operation)
                for command, operation in zip(
                    free, rng.sample(own, len(own)), strict=False
                )
            }


def is_held_out(items):
    """A tenth of all queries is never trained on, by the base or by a skill."""
    return sum(NOUNS.index(item) for item in items) % 10 == 0


def draw_items(rng, held_out):
    """Three items of a query that is held out, or of one that is not."""
    while True:
        items = rng.sample(NOUNS, 3)
        if is_held_out(items) == held_out:
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
    """A demonstration as the base corpus has them: in any style, in anyone's terms."""
    style = rng.choice(list(STYLES.values()))
    if rng.random() < 0.5:  # a style without a name
        size = rng.randint(0, 3), rng.randint(1, 3), rng.randint(0, 2)
        style = [" ".join(rng.sample(STYLE_WORDS, n)) for n in size]
    term, operate = OPERATIONS[operation]
    return word_response(rng.choice((operation, term)), operate(items), style)


# Shares of the base corpus. Without the last two, SDFT's teacher would not know how to
# go on after a mistake of the student.
SHOWN = 0.45  # a demonstration stands in the prompt
SHOWN_UNKNOWN = 0.36  # ... of an unknown command (.36 of all), its operation drawn anew
# each time, so that only the demonstration tells which
GUESSED = 0.05  # an unknown command and nothing shown, any operation of its domain: so
# the base is not sure of one guess, which a skill would have to drive out
ASKED = 0.25  # a style is asked for
WRONG_THOUGHT = 0.2  # the thought is wrong, and the items are right for that thought
WRONG_ITEM = 0.1  # ... has a wrong item, after which the rest is right


def make_base_corpus(world, tok, size, seed):
    """Examples that teach the base model all it should know, as a list.

    What is not in the shares above asks for a known command. As in any corpus, all text
    behind the first prompt is learnt, demonstrations included, with three exceptions
    (skip): a wrong thought or item with all before it in the response, the start of a
    response, and the expert's terms, which the model is to read and never to write.
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
    assert distance in DISTANCES, distance
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


# ---- Benchmarks: responses and grades ----------------------------------------------


def items_in(text):
    """The items of a response, from left to right: what it says, in whatever style."""
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
    grade: Callable | None  # (example, response as text) -> is it right? None: no grade


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
        "new": {
            name: benchmark(grade_items, new, skill)
            for name, skill in world.skills.items()
        },
        "prior": {
            "knowledge": benchmark(grade_items, known, ["own"]),
            "own_style": benchmark(grade_style, known, ["own"]),
            "asked_items": benchmark(grade_items, known, asked),
            "asked_style": benchmark(grade_style, known, asked),
            "in_context": benchmark(grade_items, in_context),
        },
    }


def rows_at_once(model, n_tokens):
    """How many rows of n_tokens an evaluation takes at a time: their keys and values
    fill 1 GiB at most. In the tiny world that is all of them."""
    c = model.config
    per_token = 2 * 4 * c.n_layer * c.n_kv_head * (c.n_embd // c.n_head)  # bytes
    return max(1, 2**30 // (per_token * n_tokens))


def greedy_responses(model, contexts, tok, max_new_tokens):
    """The most likely tokens after each context (a list of tokens), as texts."""
    return get_texts(model, contexts, tok, max_new_tokens, None, 0)


def get_texts(model, contexts, tok, max_new_tokens, u, temperature):
    """Responses to contexts (lists of tokens), as texts. u: see model.generate."""
    n = rows_at_once(model, max(map(len, contexts)) + max_new_tokens)
    device, texts = next(model.parameters()).device, []
    for i in range(0, len(contexts), n):
        prompts, lengths = pad_right(contexts[i : i + n], tok.end, device)
        numbers = None if u is None else u[i : i + n]  # (n, R)
        response, mask = generate(
            model, prompts, lengths, max_new_tokens, tok.end, numbers, temperature
        )
        rows = zip(response.tolist(), mask.sum(1).tolist(), strict=True)
        texts += [tok.decode(row[:count]) for row, count in rows]
    return texts


def is_right(model, benchmark, tok, max_new_tokens, prompt=student_prompt):
    """Which examples of a benchmark the model gets right, greedily: a list of bool."""
    contexts = [prompt(example, tok) for example in benchmark.examples]
    texts = greedy_responses(model, contexts, tok, max_new_tokens)
    pairs = zip(benchmark.examples, texts, strict=True)
    return [bool(benchmark.grade(*pair)) for pair in pairs]


def accuracy(model, benchmark, tok, max_new_tokens, prompt=student_prompt):
    """The share of a benchmark that the model gets right, greedily, in [0, 1]."""
    right = is_right(model, benchmark, tok, max_new_tokens, prompt)
    return sum(right) / len(right)


def teacher_gate(model, benchmarks, tok, max_new_tokens):
    """Does a demonstration help? Mean accuracy over benchmarks {name: Benchmark} in the
    student's context (without one) and in the teacher's (with one)."""
    prompts = {"student": student_prompt, "teacher": teacher_prompt}
    return {
        name: sum(
            accuracy(model, benchmark, tok, max_new_tokens, prompt)
            for benchmark in benchmarks.values()
        ) / len(benchmarks)
        for name, prompt in prompts.items()
    }  # fmt: skip


def mean_per_response(x, mask):
    """The mean of x (B, R) over the tokens of each response, then over responses."""
    return ((x * mask).sum(1) / mask.sum(1)).mean().item()


def sampled_kl(p, p_prompts, q, q_prompts, u, tok, max_new_tokens):
    """KL(p || q) of two models, in nats per token, along responses that p samples at
    temperature 1. Returns it with those responses, (B, R), and their mask."""
    response, mask = generate(p, *p_prompts, max_new_tokens, tok.end, u)  # (B, R)
    kl = kl_models(p, p_prompts, q, q_prompts, response, mask)  # (B, R)
    return mean_per_response(kl, mask), response, mask


@torch.no_grad()
def evaluate(models, base, skill, tasks, tok, cfg):
    """What a record of an evaluation holds: accuracies on all tasks and, on at most 128
    held-out queries of the skill, in nats per token, KL(student || base) on responses
    that the student samples, at temperature 1, and KL(teacher || base), if there is a
    teacher, on responses that the teacher samples.

    Args:
        models: {"student": GPT}, and {"teacher": GPT} where the method has one.
        base: the model before fine-tuning, to measure KL from.
        skill: the last one trained; tasks: see make_tasks.
    Returns: a dict of plain values, as it is written to metrics.jsonl.
    """
    student, teacher, record = models["student"].eval(), models.get("teacher"), {}
    for group, benchmarks in tasks.items():
        record[group] = {
            name: accuracy(student, benchmark, tok, cfg.max_new_tokens)
            for name, benchmark in benchmarks.items()
            if benchmark.grade
        }
    if tok.chat:
        record.update(evaluate_own(student, base, tasks, tok, cfg))
    queries = first_queries(student, tasks["new"][skill], tok, cfg)
    device = next(student.parameters()).device
    u = get_uniform(queries, cfg.max_new_tokens, cfg.seed, "evaluate", device)  # (B, R)
    bare = pad_batch(student_prompt, queries, tok, device)
    record["kl_student_base"], response, mask = sampled_kl(
        student, bare, base, bare, u, tok, cfg.max_new_tokens
    )
    record["kl_teacher_base"], record["teacher_gate"] = None, None
    if teacher is not None:
        # its own gate: with non-zero ema_rate, the first thing that falls when student
        # and teacher drift together
        if tasks["new"][skill].grade:
            record["teacher_gate"] = accuracy(
                teacher, tasks["new"][skill], tok, cfg.max_new_tokens, teacher_prompt
            )
        shown = pad_batch(teacher_prompt, queries, tok, device)
        # KL(teacher || student), along what the student writes
        kl = kl_models(teacher, shown, student, bare, response, mask)  # (B, R)
        by_position = kl.sum(0) / mask.sum(0)  # (R,)
        record["kl_teacher_student_by_position"] = by_position.tolist()
        record["kl_teacher_base"], _, _ = sampled_kl(
            teacher, shown, base, bare, u, tok, cfg.max_new_tokens
        )
    # two responses to read: one of the skill, one of the first prior benchmark
    prior = [benchmark.examples[0] for benchmark in tasks["prior"].values()]
    chosen = [queries[0], *prior[:1]]
    contexts = [student_prompt(example, tok) for example in chosen]
    texts = greedy_responses(student, contexts, tok, cfg.max_new_tokens)
    record["responses"] = [
        {"prompt": example.prompt, "response": text, "right": example.answer}
        for example, text in zip(chosen, texts, strict=True)
    ]
    return record


def first_queries(model, benchmark, tok, cfg):
    """The first examples of a benchmark, at most 128, and no more than rows_at_once."""
    queries = benchmark.examples[:128]
    longest = max(len(teacher_prompt(example, tok)) for example in queries)
    return queries[: rows_at_once(model, longest + cfg.max_new_tokens)]


# ---- Users' own files: here a first reading may stop ---------------------------------
#
# A file of JSON lines is a skill. Six forms of a row are known: see README, "Your own
# model and data". tok is a ChatTokenizer then, and tok.template the teacher's template.

TEMPLATE = """
{prompt}

This is an example for a response to the question:
{demonstration}

Now answer with a response of your own, including the thinking process.
"""  # of the official code; the paper's ends with a colon


def messages_of(example, prompt):
    """A conversation whose last turn is the prompt: [{"role": ..., "content": ...}]."""
    turns = [*example.earlier, ("user", prompt)]
    return [{"role": role, "content": text} for role, text in turns]


def fill_template(template, example):
    """The template with prompt and demonstration in their places; braces that these
    hold themselves stay as they are."""
    texts = {"{prompt}": example.prompt, "{demonstration}": example.demo}
    return re.sub(r"\{prompt\}|\{demonstration\}", lambda m: texts[m[0]], template)


@torch.no_grad()
def evaluate_own(student, base, tasks, tok, cfg):
    """What users' own files have in addition. nll: name -> nats per token of the
    demonstrations, the mean of each and then of all. kl_student_base_prior: name ->
    KL(student || base) in nats per token, along what the student samples there."""
    device = next(student.parameters()).device
    nll, drift = {}, {}
    for name, benchmark in [*tasks["new"].items(), *tasks["prior"].items()]:
        shown = [example for example in benchmark.examples if example.demo]
        if shown:
            nll[name] = demo_nll(student, shown, tok)
    for name, benchmark in tasks["prior"].items():
        queries = first_queries(student, benchmark, tok, cfg)
        n = cfg.max_new_tokens
        u = get_uniform(queries, n, cfg.seed, "evaluate prior", device)  # (B, R)
        bare = pad_batch(student_prompt, queries, tok, device)
        drift[name], _, _ = sampled_kl(student, bare, base, bare, u, tok, n)
    return {"nll": nll, "kl_student_base_prior": drift}


@torch.no_grad()
def demo_nll(model, examples, tok):
    """-log p(demonstration | prompt) in nats per token: the mean over the tokens of a
    demonstration, its end included, then over examples."""
    device, total = next(model.parameters()).device, 0.0
    longest = max(len(demo_response(e, tok) + student_prompt(e, tok)) for e in examples)
    n = rows_at_once(model, longest)
    for i in range(0, len(examples), n):
        rows = examples[i : i + n]
        bare = pad_batch(student_prompt, rows, tok, device)  # (B, P), (B,)
        response, lengths = pad_batch(demo_response, rows, tok, device)  # (B, R), (B,)
        mask = loss_mask(rows, lengths)  # (B, R)
        hidden = response_hidden(model, *bare, response, mask)  # (N, C)
        weight = (mask / lengths[:, None])[mask]  # (N,)
        logits = LazyLogits(hidden, model.head())  # (N, V)
        total += fused_linear_nll(logits, response[mask], weight).item()
    return total / len(examples)


def plain(text):
    """A text without the case and the spaces in which two answers may differ."""
    return " ".join(text.casefold().split())


def answers_of(example):
    return (example.answer,) if isinstance(example.answer, str) else example.answer


def place_of(answer, text):
    """Where an answer first stands in a text as whole words; infinity: nowhere."""
    pattern = rf"(?<!\w){re.escape(plain(answer))}(?!\w)"
    found = re.search(pattern, plain(text))
    return found.start() if found else math.inf


def grade_exact(example, response):
    """Is the response one of the answers, but for case and spaces?"""
    return plain(response) in map(plain, answers_of(example))


def grade_contains(example, response):
    """Does one of the answers stand in the response, as whole words? ("incorrect" does
    not contain "correct".)"""
    return any(place_of(a, response) < math.inf for a in answers_of(example))


def make_grade_choice(examples):
    """A grade: of all answers that occur in these examples, the first that stands in
    the response is what it chooses."""
    options = {a for example in examples for a in answers_of(example)}

    def grade_choice(example, response):
        # of two that begin at one place, as "New York" and "New", the longer is meant
        place, _, choice = min((place_of(a, response), -len(a), a) for a in options)
        return place < math.inf and choice in answers_of(example)

    return grade_choice


def make_benchmark(examples, grade):
    """A Benchmark of one's own; grade is exact, contains, choice or none."""
    if grade == "choice":
        return Benchmark(examples, make_grade_choice(examples))
    grades = {"exact": grade_exact, "contains": grade_contains, "none": None}
    return Benchmark(examples, grades[grade])


# What tells a form of a row, the keys that hold its prompt and its demonstration, and
# its name
FORMS = [
    (("prompt", "demonstration"), "prompt and demonstration"),
    (("prompt", "privileged_context"), "TRL (privileged_context)"),
    (("prompt", "golden_response"), "golden_response"),
    (("prompt", "completion"), "prompt and completion"),
    (("messages",), "messages"),
    (("instruction", "output"), "Alpaca"),
    (("prompt", "answer"), "prompt and answer"),  # where no demonstration is needed
]
ROLES = ("system", "user", "assistant")
MAX_ERRORS = 20  # lines that are named one by one


class RowError(ValueError):
    """What is wrong with a row; read_examples adds the place."""


def check_text(value, key):
    """The value of a key, if it is a text that a model can read."""
    if not isinstance(value, str):
        raise RowError(f"{key}: expected text, found {json_type(value)}")
    if not value.strip():
        raise RowError(f"{key} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise RowError(f"{key}: \\u{code:04x} is half a character") from None
    return value


def json_type(value):
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false",
             int: "a number", float: "a number", type(None): "null"}  # fmt: skip
    return names[type(value)]


def check_messages(value, key):
    """A list of messages as [(role, text)]."""
    if not isinstance(value, list):
        raise RowError(f"{key}: expected a list, found {json_type(value)}")
    if not value:
        raise RowError(f"{key} is empty")
    turns = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            found = json_type(message)
            raise RowError(f"{key}[{i}]: expected an object, found {found}")
        role = message.get("role")
        if role not in ROLES:
            raise RowError(f"{key}[{i}]: role {role!r}, expected {', '.join(ROLES)}")
        turns.append((role, check_text(message.get("content"), f"{key}[{i}].content")))
    return turns


def parse_row(row, needs_demo):
    """(form, earlier, prompt, demo, answer) of a row. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError(f"expected an object, found {json_type(row)}")
    forms = [(keys, name) for keys, name in FORMS if row.keys() >= set(keys)]
    if not forms or (needs_demo and forms[0][1] == FORMS[-1][1]):
        known = {key for keys, _ in FORMS for key in keys}
        near = [
            f"{key!r}: did you mean {match[0]!r}?"
            for key in row.keys() - known
            if (match := difflib.get_close_matches(key, known - row.keys(), 1, 0.7))
        ]
        found = ", ".join(sorted(row)) or "none"
        near = "; ".join(["no known form", *sorted(near)])
        raise RowError(f"keys found: {found}; {near}")
    keys, name = forms[0]
    demo = ""
    if name == "messages":
        turns = check_messages(row["messages"], "messages")
        if turns[-1][0] != "assistant":
            raise RowError(f"messages: the last role is {turns[-1][0]}, not assistant")
        *turns, (_, demo) = turns
    elif name == "Alpaca":
        prompt = check_text(row["instruction"], "instruction")
        if row.get("input") not in (None, ""):
            prompt += "\n\n" + check_text(row["input"], "input")
        turns = [("user", prompt)]
        demo = check_text(row["output"], "output")
    else:
        value = row["prompt"]
        if isinstance(value, list):
            turns = check_messages(value, "prompt")
        else:
            turns = [("user", check_text(value, "prompt"))]
        if keys[1] != "answer":
            value = row[keys[1]]
            if isinstance(value, list) and name == "golden_response":  # its lines
                value = "\n".join(check_text(x, keys[1]) for x in value)
            elif isinstance(value, list):
                value = "\n".join(text for _, text in check_messages(value, keys[1]))
            demo = check_text(value, keys[1])
    if not turns or turns[-1][0] != "user":
        found = turns[-1][0] if turns else "none"
        raise RowError(f"the last role of the prompt is {found}, not user")
    *earlier, (_, prompt) = turns
    answer = row.get("answer", "")
    if isinstance(answer, list) and answer:
        answer = tuple(check_text(x, "answer") for x in answer)
    elif answer == []:
        raise RowError("answer is empty")
    elif "answer" in row:
        answer = check_text(answer, "answer")
    return name, tuple(earlier), prompt, demo, answer


def unlike_json(name):
    raise RowError(f"{name} is no JSON")


def no_doubles(pairs):
    """A JSON object as a dict; a key that stands twice would be lost in silence."""
    keys = [key for key, _ in pairs]
    if doubles := sorted({key for key in keys if keys.count(key) > 1}):
        raise RowError(f"key {doubles[0]!r} stands twice")
    return dict(pairs)


def read_examples(path, needs_demo=True):
    """A file of JSON lines as a list of Example, whose ids are their line numbers, and
    a list of remarks: how many rows of which form, keys that are not used.

    Raises: ValueError that names every bad line (the first MAX_ERRORS of them), with
        what is wrong there; OSError if the file cannot be read.
    """
    content = Path(path).read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}: this is UTF-16; save it as UTF-8")
    content = content.removeprefix(b"\xef\xbb\xbf")
    text = content.strip()
    if text[:1] + text[-1:] == b"[]" and b"\n[" not in text:
        raise ValueError(f"{path}: one list; each row needs a line of its own, "
                         "as jq -c '.[]' writes them")  # fmt: skip
    examples, errors, forms, unused = [], [], Counter(), Counter()
    # not splitlines(), which takes U+2028 inside a text for the end of a line
    for i, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(
                line.decode(), object_pairs_hook=no_doubles, parse_constant=unlike_json
            )
            form, earlier, prompt, demo, answer = parse_row(row, needs_demo)
        except UnicodeDecodeError as error:
            byte = line[error.start]
            errors.append(f"{path}:{i}: byte 0x{byte:02x} at {error.start} is no UTF-8")
        except json.JSONDecodeError as error:
            near = error.doc[max(0, error.pos - 20) : error.pos + 20]
            errors.append(f"{path}:{i}:{error.colno}: {error.msg}, near {near!r}")
        except RecursionError:
            errors.append(f"{path}:{i}: nested too deeply")
        except RowError as error:
            errors.append(f"{path}:{i}: {error}")
        else:
            examples.append(Example(prompt, demo, answer, i, earlier=earlier))
            forms[form] += 1
            keys = dict((name, keys) for keys, name in FORMS)[form]
            unused.update(row.keys() - {*keys, "answer", "input", "id", "task"})
    if errors:
        shown = errors[:MAX_ERRORS]
        if len(errors) > MAX_ERRORS:
            shown.append(f"... and {len(errors) - MAX_ERRORS} more lines")
        raise ValueError("\n".join(shown))
    if not examples:
        raise ValueError(f"{path}: no rows")
    remarks = [f"{n} rows, form: {form}" for form, n in forms.items()]
    remarks += [f"key {key!r} of {n} rows is not used" for key, n in unused.items()]
    return examples, remarks


def check_lengths(path, examples, tok, max_new_tokens, block_size):
    """Which examples do not fit: [(Example, text)]. The teacher's context and a
    response, the student's or the demonstration, must fit into block_size tokens."""
    too_long = []
    for example in examples:
        prompt = len(teacher_prompt(example, tok))
        response = max(max_new_tokens, len(demo_response(example, tok)))
        if prompt + response > block_size:
            text = f"{path}:{example.id}: {prompt} + {response} > {block_size} tokens"
            too_long.append((example, text))
    return too_long


# ---- Real models: tokenizer and chat form --------------------------------------------

# A text is first split into pieces, by a regular expression, and tokens never cross
# pieces. These are the splits that were compared with the tokenizers library, token by
# token (tests/bench/test_real_equal.py); another one is refused. (The libraries know
# different versions of Unicode: about the newest characters they may disagree.)
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2, LLAMA3 = rf"{WORD}|\p{{N}}|{REST}", rf"{WORD}|\p{{N}}{{1,3}}|{REST}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT2, after each digit was cut out (SmolLM2): spaces before a digit end a text
DIGITS = (
    r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?![^\s\p{N}])|\s+"
)
LONGEST = 900_000  # characters; tiktoken's splitting panics at 1,000,000 spaces
MARKER = r"<.+>|\[.+\]"  # no ordinary text, so that it may be a token of its own


def byte_of_characters():
    """The 256 characters that stand for the bytes in a tokenizer.json: a printable one
    for itself, those from U+0100 on for the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


def merge(piece, ranks, below=math.inf):
    """Byte pair encoding as on paper: of all neighbours, join the two whose token has
    the lowest rank, again and again, while that is < below. bytes -> list of bytes."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = enumerate(itertools.pairwise(parts))
        options = [(ranks.get(a + b, below), i) for i, (a, b) in pairs]
        rank, i = min(options, default=(below, 0))
        if rank >= below:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def split_of(pre):
    """The regular expression of a pre_tokenizer; None if it is not one of ours."""
    steps = pre.get("pretokenizers") if pre.get("type") == "Sequence" else [pre]
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        return None
    *first, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
        return None
    own = last.get("use_regex", True)
    if own is True and not first:
        return GPT2
    if own is True and first == [{"type": "Digits", "individual_digits": True}]:
        return DIGITS
    for pattern in (QWEN2, LLAMA3):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "invert": False}
        if own is False and first == [{**split, "behavior": "Isolated"}]:
            return pattern
    return None


def read_tokenizer(path):
    """A tokenizer.json with byte pair encoding, as what tiktoken needs.

    tiktoken joins by rank, and knows no list of merges. Both agree on every text if
    merges come in the order of ranks, and if joining the bytes of each token by lower
    ranks alone ends in a pair that has a merge. That is checked, so no merge is lost.

    Returns: ranks {bytes: id}; special {text: id}, of all added tokens; pattern, see
        split_of; nfc, whether a text is to be normalised.
    Raises: ValueError that names the file and the first thing that does not fit.
    """
    content = read_json(path)

    def check(fits, what):
        if not fits:
            raise ValueError(f"{path}: {what}")

    model, added = content.get("model"), content.get("added_tokens") or []
    check(isinstance(model, dict) and model.get("type") == "BPE",
          "model is no BPE; other kinds, as of SentencePiece, are not read")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        check(not model.get(key), f"model.{key} is {model.get(key)!r}, not null")
    check(not model.get("byte_fallback"), "model.byte_fallback is set")
    decoder = content.get("decoder")
    check(isinstance(decoder, dict) and decoder.get("type") == "ByteLevel",
          "decoder is not ByteLevel")
    normalizer = content.get("normalizer")
    check(normalizer in (None, {"type": "NFC"}),
          f"normalizer is {normalizer!r}; read are null and NFC")
    pre = content.get("pre_tokenizer")
    pattern = split_of(pre) if isinstance(pre, dict) else None
    check(pattern, "pre_tokenizer is none that we know: ByteLevel without a prefix "
          "space, alone, after Digits, or after the Split of Qwen2 or Llama 3")

    # added tokens: markers, which a text never yields
    special = {}
    check(isinstance(added, list) and all(isinstance(t, dict) for t in added),
          "added_tokens is no list of objects")
    for token in added:
        text, number = token.get("content"), token.get("id")
        check(isinstance(text, str) and text, f"added token {number!r} has no text")
        check(type(number) is int, f"the id of {text!r} is {number!r}")
        check(text not in special, f"added token {text!r} twice")
        for key in ("lstrip", "rstrip", "single_word"):
            check(not token.get(key), f"added token {text!r}: {key} is set")
        check(token.get("special") or re.fullmatch(MARKER, text),
              f"added token {text!r} may be a part of ordinary text")
        special[text] = number

    # the vocabulary: its texts are bytes, its ids ranks
    vocab, byte_of = model.get("vocab"), byte_of_characters()
    check(isinstance(vocab, dict) and vocab, "model.vocab is no object")
    ranks = {}
    for text, number in vocab.items():
        check(type(number) is int, f"the id of {text!r} is {number!r}")
        if text in special:
            check(special[text] == number,
                  f"{text!r} has the ids {number} and {special[text]}")
            continue
        check(text and all(c in byte_of for c in text), f"{text!r} is no text of bytes")
        ranks[bytes(byte_of[c] for c in text)] = number
    ids = sorted([*ranks.values(), *special.values()])
    for i, number in enumerate(ids):
        check(i == number, f"ids have a gap: {i} is missing, or {number} twice")

    # the merges
    merges, before = set(), -1
    listed = model.get("merges")
    check(isinstance(listed, list), "model.merges is no list")
    for pair in listed:
        parts = pair.split(" ") if isinstance(pair, str) else pair
        check(isinstance(parts, list) and len(parts) == 2
              and all(isinstance(part, str) for part in parts),
              f"merge {pair!r} is no pair")
        check(all(c in byte_of for part in parts for c in part),
              f"merge {pair!r} is no text of bytes")
        a, b = (bytes(byte_of[c] for c in part) for part in parts)
        check(a in ranks and b in ranks and a + b in ranks,
              f"merge {pair!r}: not all three are in the vocabulary")
        check((a, b) not in merges, f"merge {pair!r} twice")
        rank = ranks[a + b]
        check(rank >= before, f"merge {pair!r} makes id {rank}, after id {before}")
        before = rank
        merges.add((a, b))
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = tuple(merge(token, ranks, rank))
            check(parts in merges, f"token {rank}, {token!r}, is not what merges make")

    # a byte without a token: the tokenizers library drops it, or puts unk_token there
    if len({token for token in ranks if len(token) == 1}) < 256:
        check(model.get("unk_token") is None, "a byte is missing, but unk_token is set")
    return ranks, special, pattern, normalizer is not None


def read_template(folder, settings):
    """The chat template of a folder, as text; settings: tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, with names
        named = [t for t in template if isinstance(t, dict)]
        named = {str(t.get("name")): t.get("template") for t in named}
        template = named.get("default")
    if not isinstance(template, str) or not template:
        raise ValueError(
            f"{folder} has no chat template, neither in tokenizer_config.json nor as "
            f"{path.name}: take an instruct model"
        )
    return template


def compile_template(template, where):
    """A chat template, a program in Jinja that nobody has checked, in a sandbox."""
    if jinja2 is None:
        raise ValueError("chat templates need the package: pip install jinja2")
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise ValueError("the sandbox of jinja2 < 3.1.6 leaks: pip install -U jinja2")

    def fail(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, **how):  # jinja2's own writes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": fail, "strftime_now": time.strftime}
    try:
        return environment.from_string(template)
    except Exception as error:  # whatever a wrong program leads to
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from None


def text_of(token):
    """tokenizer_config.json has a token as text, or as an object with its text."""
    return token.get("content") if isinstance(token, dict) else token


class ChatTokenizer:
    """The tokenizer and the chat form of a folder of Hugging Face.

    Attributes: end, the token that ends a response; n_tokens, one more than the highest
    id; vocab_size, the same; name; digest, which another tokenizer or chat template
    changes; template, that of the teacher's prompt, which may be set.
    Raises: ValueError that names the file, if there is something that we cannot do
    exactly as the libraries tokenizers and transformers; OSError.
    """

    template = TEMPLATE

    def __init__(self, folder):
        folder = Path(folder)
        path, settings = folder / "tokenizer_config.json", {}
        if path.is_file():
            settings = read_json(path)
        ranks, self.special, self.pattern, self.nfc = read_tokenizer(
            folder / "tokenizer.json"
        )
        self.ranks = ranks
        self.n_tokens = self.vocab_size = len(ranks) + len(self.special)
        # tiktoken needs all bytes: those that have no token get ids that are dropped
        missing = [bytes([i]) for i in range(256) if bytes([i]) not in ranks]
        spare = {byte: self.n_tokens + i for i, byte in enumerate(missing)}
        self.encoding = tiktoken.Encoding(
            name=folder.resolve().name,
            pat_str=self.pattern,
            mergeable_ranks={**ranks, **spare},
            special_tokens=self.special,
        )
        self.name = self.encoding.name
        template = read_template(folder, settings)
        self.chat_template = compile_template(template, f"{folder}, chat template")
        names = [f"{x}_token" for x in "bos eos unk sep pad cls mask".split()]
        named = {name: text_of(settings.get(name)) for name in names}
        self.named = {name: text for name, text in named.items() if text is not None}
        self.end = self.find_end(folder)
        longest_first = sorted(self.special, key=len, reverse=True)
        self.markers = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        content = (folder / "tokenizer.json").read_bytes() + template.encode()
        self.digest = hashlib.sha256(content).hexdigest()[:12]

    def find_end(self, folder):
        """eos_token, else the first of eos_token_id in one of the other files."""
        if "eos_token" in self.named:
            text = self.named["eos_token"]
            if not isinstance(text, str) or text not in self.special:
                raise ValueError(
                    f"{folder / 'tokenizer_config.json'}: eos_token is {text!r}, which "
                    "is no added token of tokenizer.json"
                )
            return self.special[text]
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                end = read_json(folder / name).get("eos_token_id")
                end = end[0] if isinstance(end, list) and end else end
                if type(end) is int and end in self.special.values():
                    return end
        raise ValueError(f"{folder}: no file says which token ends a response")

    def encode(self, text):
        """A text as a list of ids. A marker in it stays text, and never becomes one."""
        if len(text) > LONGEST:
            raise ValueError(f"a text of {len(text)} characters; at most {LONGEST}")
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        ids = self.encoding.encode_ordinary(text)
        if max(ids, default=0) < self.n_tokens:
            return ids
        # a byte that has no token is dropped, and its neighbours may be joined
        import regex  # tiktoken needs it, so it is there

        ids = []
        for piece in regex.findall(self.pattern, text):
            known = bytes(b for b in piece.encode() if bytes([b]) in self.ranks)
            ids += [self.ranks[token] for token in merge(known, self.ranks)]
        return ids

    def decode(self, ids):
        """The text of ids; markers show as their text, but not a last end."""
        ids = ids[:-1] if ids and ids[-1] == self.end else ids
        known, n = self.encoding.decode_single_token_bytes, self.n_tokens
        pieces = [known(i) if i < n else b"<%d>" % i for i in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def chat(self, messages):
        """Messages [{"role", "content"}, ...] in the form that the model was trained
        on, up to where its response begins, as a list of ids.

        The template's markers become ids, and all else text, what the messages hold
        included: a user cannot write a marker. (apply_chat_template lets him.) So the
        template is rendered with a stand-in for each content, cut at the markers, and
        the contents are put back into the text between.
        Raises: ValueError if the template fails, or changes a content.
        """
        text = self.render(messages)
        for strip in (False, True):  # some templates strip what they are given
            contents = [m["content"] for m in messages]
            contents = [c.strip() for c in contents] if strip else contents
            # (an empty content stays one: templates ask whether there is any)
            stand_ins = [c and f"\ue000{i}\ue001" for i, c in enumerate(contents)]
            pairs = zip(messages, stand_ins, strict=True)
            form = self.render([{**m, "content": x} for m, x in pairs])

            def put_back(part, contents=contents):
                return re.sub(
                    "\ue000(\\d+)\ue001", lambda match: contents[int(match[1])], part
                )

            if put_back(form) == text:
                ids, start = [], 0
                for marker in self.markers.finditer(form):
                    ids += self.encode(put_back(form[start : marker.start()]))
                    ids.append(self.special[marker[0]])
                    start = marker.end()
                return ids + self.encode(put_back(form[start:]))
        raise ValueError(
            f"the chat template of {self.name} changes what a message says; which part "
            "of it is a marker cannot be told"
        )

    def render(self, messages):
        """The template's text for these messages. Raises: ValueError if it fails."""
        try:
            return self.chat_template.render(
                messages=messages, add_generation_prompt=True, tools=None,
                documents=None, **self.named,
            )  # fmt: skip
        except Exception as error:  # the template is a program, and fails as it likes
            raise ValueError(
                f"the chat template of {self.name}: {type(error).__name__}: {error}"
            ) from None
