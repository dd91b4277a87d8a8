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
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist

from model import chunked_nll, generate, kl_models, response_hidden

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
    same token in any place; decode(encode(x)) == x for any x.
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
    row i, except those that the base corpus skips."""
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
    which are cut from it, have little padding. (Do not bucket whole batches by length:
    long examples contain a demonstration, so some steps would teach the model to use it
    and others to ignore it.)
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
    # forth and back, so that each process gets short and long ones
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
SHOWN = 0.45  # there is a demonstration in the prompt
SHOWN_UNKNOWN = 0.36  # ... of an unknown command (.36 of all), its operation drawn anew
# each time, so that only the demonstration tells which
GUESSED = 0.05  # an unknown command and nothing shown, any operation of its domain: so
# the base is not sure of one guess, which a skill would have to drive out
ASKED = 0.25  # a style is asked for
WRONG_THOUGHT = 0.2  # the thought is wrong, and the items are right for that thought
WRONG_ITEM = 0.1  # ... has a wrong item, after which the rest is right


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
    # (example, response as text) -> is it right? None: not graded
    grade: Callable | None = field(repr=False)  # (an address is not the same next time)


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
    per_token = 2 * 4 * c.n_layer * c.n_kv_head * c.head_dim  # bytes
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


def teacher_gate(model, benchmarks, tok, max_new_tokens, temperature=1.0, seed=0):
    """Does a demonstration help? Over benchmarks {name: Benchmark}, a dict: mean
    accuracy in the student's context (without one) and in the teacher's (with one); how
    many queries only one of the two gets right; and the teacher's accuracy when it
    samples, as in training, on 64 queries of each."""
    keys = ("student", "teacher", "only_student", "only_teacher", "sampled")
    gate, device = dict.fromkeys(keys, 0), next(model.parameters()).device
    gate["skills"] = {}  # the teacher's accuracy on each
    for name, benchmark in benchmarks.items():
        student, teacher = (
            is_right(model, benchmark, tok, max_new_tokens, prompt)
            for prompt in (student_prompt, teacher_prompt)
        )
        gate["student"] += sum(student) / len(student) / len(benchmarks)
        gate["skills"][name] = sum(teacher) / len(teacher)
        gate["teacher"] += gate["skills"][name] / len(benchmarks)
        pairs = list(zip(student, teacher, strict=True))
        gate["only_student"] += pairs.count((True, False))
        gate["only_teacher"] += pairs.count((False, True))
        few = benchmark.examples[:64]
        u = get_uniform(few, max_new_tokens, seed, "gate", device)
        contexts = [teacher_prompt(example, tok) for example in few]
        texts = get_texts(model, contexts, tok, max_new_tokens, u, temperature)
        right = sum(map(benchmark.grade, few, texts))
        gate["sampled"] += right / len(few) / len(benchmarks)
    return gate


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


# ---- Users' own files ----------------------------------------------------------------
#
# A file of JSON lines is a skill: see read_examples. tok is a ChatTokenizer then, and
# tok.template the template of the teacher's prompt.

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
        total += chunked_nll(hidden, model.head(), response[mask], weight).item()
    return total / len(examples)


# ---- Users' rows, and their grades ---------------------------------------------------

PROMPTS = ("prompt", "messages", "instruction")  # a row has one of these keys
DEMOS = (  # and one of these, or a demonstration as the last of its messages
    "demonstration", "completion", "golden_response", "privileged_context", "output"
)  # fmt: skip
ROLES, GRADES = ("system", "user", "assistant"), ("exact", "contains", "choice")
MAX_ERRORS = 20  # lines that are named one by one


def check_text(value, key):
    """The value of a key, if it is a text that a model can read."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: expected text, found {json.dumps(value)[:40]}")
    value.encode()  # raises for half a character, as "\\ud83d"
    return value


def parse_turns(value, key, role):
    """A text, a list of its lines, or a list of messages, as [(role, text), ...]."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = "\n".join(check_text(line, key) for line in value)
    if not isinstance(value, list):
        return [(role, check_text(value, key))]
    for turn in value:
        known = isinstance(turn, dict) and turn.get("role") in ROLES
        if not known or any(turn[each] for each in turn.keys() - {"role", "content"}):
            found = json.dumps(turn)[:80]
            raise ValueError(f"{key}: expected a role and content only, found {found}")
    return [(t["role"], check_text(t.get("content"), f"{key}: content")) for t in value]


def parse_row(row, needs_demo):
    """A row as ([(role, text), ...], demonstration, answers); "" and () if none."""
    keys = [key for key in row if key in PROMPTS] if isinstance(row, dict) else []
    demo_keys = [key for key in row if key in DEMOS] if keys else []
    if len(keys) != 1 or len(demo_keys) > 1:
        found = ", ".join(row) if isinstance(row, dict) else json.dumps(row)[:40]
        one_of = " or ".join(PROMPTS)
        raise ValueError(f"expected {one_of}, and a demonstration; found {found}")
    turns = parse_turns(row[keys[0]], keys[0], "user")
    if keys[0] != "instruction" and "input" in row:
        raise ValueError(f"input goes with instruction, not with {keys[0]}")
    if row.get("input") not in (None, ""):  # Alpaca's rows: instruction, input, output
        text = check_text(row["input"], "input")
        turns[-1] = ("user", f"{turns[-1][1]}\n\n{text}")
    demo = ""
    for key in demo_keys:
        said = parse_turns(row[key], key, "assistant")
        if "user" in dict(said):
            raise ValueError(f"{key}: a demonstration has no turn of the user")
        demo = "\n".join(text for _, text in said)
    if not demo and turns and turns[-1][0] == "assistant":
        demo = turns.pop()[1]
    if not turns or turns[-1][0] != "user" or (needs_demo and not demo):
        found = ", ".join(row)
        raise ValueError(f"expected a user's turn and a demonstration; found {found}")
    answers = row.get("answer", [])
    answers = answers if isinstance(answers, list) else [answers]
    return turns, demo, tuple(check_text(each, "answer") for each in answers)


def unique(pairs):
    """A JSON object as a dict. Of a key that is there twice, json would keep one."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key is there twice: {', '.join(key for key, _ in pairs)}")
    return dict(pairs)


def read_examples(path, needs_demo=True, grade=None):
    """A file of JSON lines as a list of Example, whose ids are line numbers, and a list
    of remarks on it.

    Args: grade, for rows that name none: one of GRADES, or "none"; by default contains.
    Raises: ValueError that says what is wrong, in MAX_ERRORS lines at most; OSError.
    """
    content, examples, errors, unused = Path(path).read_bytes(), [], [], Counter()
    known = {*PROMPTS, *DEMOS, "input", "answer", "grade", "id", "task"}
    try:
        text = content.decode(json.detect_encoding(content))  # UTF-8 or UTF-16
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: {error.reason}") from None
    if text.lstrip().startswith("["):
        raise ValueError(f"{path}: one list; write a row a line: jq -c '.[]' does that")
    for i, line in enumerate(text.split("\n"), 1):  # (splitlines() splits at U+2028)
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique)
            turns, demo, answer = parse_row(row, needs_demo)
            own = row.get("grade") or grade or "contains"
            if own not in (*GRADES, grade):
                raise ValueError(f"grade: expected {' or '.join(GRADES)}, found {own}")
        except (ValueError, RecursionError) as error:
            errors.append(f"{path}:{i}: {error}".replace(": line 1 column", ", column"))
            continue
        if own == "exact" and demo and not answer:
            answer = (demo,)
        *earlier, (_, prompt) = turns
        earlier, own = tuple(earlier), own if answer and own != "none" else ""
        examples.append(Example(prompt, demo, answer, i, earlier=earlier, grade=own))
        unused.update(f"key {key!r}" for key in row.keys() - known)
    without = [str(e.id) for e in examples if not e.grade]
    if 0 < len(without) < len(examples):
        lines = ", ".join(without[:MAX_ERRORS])
        errors.append(f"{path}: the others have an answer, but not lines {lines}")
    if errors or not examples:
        more = [f"... and {len(errors) - MAX_ERRORS} more"] * (len(errors) > MAX_ERRORS)
        raise ValueError("\n".join(errors[:MAX_ERRORS] + more) or f"{path}: no rows")
    grades = ", ".join(sorted({e.grade or "none" for e in examples}))
    remarks = [f"{what} of {n} rows is not used" for what, n in unused.items()]
    return examples, [f"{len(examples)} rows, grade: {grades}", *remarks]


def check_lengths(path, examples, tok, max_new_tokens, block_size):
    """Raises ValueError that names the rows that do not fit: the teacher's context and
    a response, sampled or the demonstration, may take block_size tokens."""
    errors = []
    for e in examples:
        try:
            prompt = len(teacher_prompt(e, tok))
            response = max(max_new_tokens, len(demo_response(e, tok)))
            if prompt + response > block_size:
                raise ValueError(f"{prompt} + {response} > {block_size} tokens")
        except ValueError as error:  # also of a chat template that refuses the row
            errors.append(f"{path}:{e.id}: {error}")
    if errors:
        raise ValueError("\n".join(errors[:MAX_ERRORS]))


# a number, and not a part of one: neither 200 in 1,200 nor 5 in 0.5, 3/5 and 5th
NUMBER = r"(?<![\w./])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w/]|\.\d|,\d{3}\b)"
# a letter or digit of a script that puts spaces between words: not Thai, Lao, Burmese,
# Khmer, Japanese, Chinese, Korean
SPACED = (
    r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
    r"\uac00-\ud7af\U00020000-\U0003ffff]"
)


def plain(text):
    """A text without the case, spaces and Unicode form in which answers may differ."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def place_of(answer, text):
    """Where an answer first occurs in a text; infinity: nowhere. A number is compared
    as a number; other answers are whole words, in scripts that have spaces."""
    answer, text = plain(answer), plain(text)
    if re.fullmatch(NUMBER, answer):
        numbers = [(float(m[0].replace(",", "")), m) for m in re.finditer(NUMBER, text)]
        value = float(answer.replace(",", ""))
        return next((m.start() for number, m in numbers if number == value), math.inf)
    before = f"(?<!{SPACED})" if re.match(SPACED, answer) else ""
    after = f"(?!{SPACED})" if re.match(SPACED, answer[-1]) else ""
    found = re.search(before + re.escape(answer) + after, text)
    return found.start() if found else math.inf


def grade_answer(example, response, options):
    """Is a response right, by the example's own grade? exact: it is an answer, but for
    case and spaces. contains: an answer occurs in it, as whole words. choice: the first
    of all `options` (the answers of the whole file) in it is an answer."""
    if example.grade == "exact":
        return plain(response) in map(plain, example.answer)
    if example.grade == "contains":
        return any(place_of(a, response) < math.inf for a in example.answer)
    # of two that begin at one place, as "New York" and "New", the longer is meant
    place, _, choice = min((place_of(a, response), -len(a), a) for a in options)
    return place < math.inf and plain(choice) in map(plain, example.answer)


def make_benchmark(examples):
    """A Benchmark of users' rows. Without answers it has no grade."""
    options = {a for e in examples for a in e.answer if e.grade}
    grade = functools.partial(grade_answer, options=options)
    return Benchmark(examples, grade if options else None)


class ChatTokenizer:
    """The tokenizer and the chat form of a Hugging Face model, through transformers.

    Attributes: end, the token that ends a response; n_tokens, its highest id + 1;
    digest, which another tokenizer or chat template changes; template, the teacher's
    prompt, which may be set; sanitizes, is a marker such as <|im_end|> in a user's text
    encoded as text? (Older versions of transformers cannot do it.)
    """

    template = TEMPLATE

    def __init__(self, name):
        from transformers import AutoTokenizer

        self.hf = AutoTokenizer.from_pretrained(name)
        parts = self.hf.chat_template, self.hf.eos_token, self.encode("a")
        if not all(parts):
            raise ValueError("no chat template, end or tokens: take an instruct model")
        self.end = self.hf.eos_token_id
        self.n_tokens = max(self.hf.get_vocab().values()) + 1
        form = self.hf.backend_tokenizer.to_str() + str(self.hf.chat_template)
        self.digest = hashlib.sha256(form.encode()).hexdigest()[:12]
        texts = ([{"role": "user", "content": x}] for x in ("x", self.hf.eos_token))
        n, n_with_marker = (self.chat(text).count(self.end) for text in texts)
        self.sanitizes = n == n_with_marker

    def encode(self, text):
        """A text as a list of ids. A marker in it stays text."""
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids):
        """The text of ids; markers show as their text, but not a last end."""
        ids = ids[:-1] if ids and ids[-1] == self.end else ids
        return self.hf.decode(ids, clean_up_tokenization_spaces=False)

    def chat(self, messages):
        """Messages [{"role", "content"}, ...] as ids, in the form that the model was
        trained on and up to where its response begins. A thinking model is told not to
        think. Raises: ValueError if the template refuses the messages."""
        try:
            return self.hf.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False,
                sanitize_control_tokens=True, enable_thinking=False,
            )  # fmt: skip
        except Exception as error:  # the template is a program, and fails as it likes
            raise ValueError(f"the chat template: {error}") from None
