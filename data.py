"""A tiny world in English, made on the spot: nothing is downloaded.

In three trades, code words tell how to put things in order. The model answers with a
thought (the order that the code word means) and then the things. One example of each
kind, in the world of seed 0:

    known name     kitchen horn: apple river stone       ->  reverse: stone river apple
    manner asked   harbour brush robot: lamp pearl rope  ->  first equals lamp beep stop
    new skill      garden cork: candle spoon tower       ->  rotate: spoon tower candle
    demonstration  garden cork: candle spoon tower
                   example well friend, advance so you get spoon tower candle as ever

A skill is six new code words of one trade, one for each of its orders: learning it
binds names to orders, and since held-out queries have other things to order, it cannot
be learnt by heart. The expert who wrote the demonstrations answers in a manner of his
own (well friend, ... so you get ... as ever) and has his own terms (advance) for what
the model calls by other words (rotate). The model reads all of that and never writes
it. What stands for what in the paper:

    student_prompt = prompt                     # what is asked
    teacher_prompt = prompt + demonstration     # arXiv 2601.19897, section 3, template
    prior skills   = known names (knowledge), the model's own format, a manner when
                     asked (instruction following), use of a demonstration in the
                     context

Everything random comes from make_rng(seed, purpose, ...): a pure function.
"""

import functools
import hashlib
import io
import os
import random
import shutil
from dataclasses import asdict, dataclass

import tiktoken
import torch
import torch.distributed as dist

from model import generate

# ---- The words ---------------------------------------------------------------------

# order: the model's own term, the expert's term, and what it does to three things
ORDERS = {
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
TRADES = ("kitchen", "harbour", "garden")  # each has six of the orders
SKILLS = ("A", "B", "C")  # one for each trade
# manner: its opening, what joins thought and things, its closing. Only the expert opens
# with anything: where each manner has an opening of another length, things move, and
# the base learns late, if at all, which one comes next
MANNERS = {
    "own": ("", ":", ""),
    "formal": ("", "gives", "done sir"),
    "robot": ("", "equals", "beep stop"),
    "poet": ("", "like", "oh tonight"),
    "brief": ("", "=", "!"),
    "expert": ("well friend,", "so you get", "as ever"),
}
# words of which the base corpus also makes up manners that have no name
MANNER_WORDS = (
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
KNOWN, UNKNOWN = 120, 40  # code words: nouns that also occur as things


# ---- The tokenizer -----------------------------------------------------------------


class Tokenizer:
    """Whole words are tokens, everything else falls back to bytes.

    Ids: 0-255 the bytes, then the words of the world, then two special tokens. A text
    gets one leading space when it is encoded and loses it when decoded, so that a word
    is the same token wherever it stands; decode(encode(x)) == x for any x. Special
    tokens cannot come from a text.
    """

    vocab_size = 512  # a multiple of 16: rows of logits stay aligned in memory

    def __init__(self):
        words = [*NOUNS, *TRADES, *MANNER_WORDS, *ORDERS, *MANNERS, "example"]
        words += [expert for expert, _ in ORDERS.values()]
        for parts in MANNERS.values():
            words += " ".join(parts).replace(",", "").replace(":", "").split()
        ranks = {bytes([i]): i for i in range(256)}
        for word in words:
            ranks.setdefault(f" {word}".encode(), len(ranks))
        self.answer, self.end = len(ranks), len(ranks) + 1
        assert self.end < self.vocab_size, self.end
        self.encoding = tiktoken.Encoding(
            name="tiny_world",
            pat_str=r" ?\w+| ?[=!]|[^\w\s]|\s",  # together these match any character
            mergeable_ranks=ranks,
            special_tokens={"<|answer|>": self.answer, "<|end|>": self.end},
        )

    def encode(self, text):
        return self.encoding.encode_ordinary(" " + text) if text else []

    def decode(self, ids):
        """The text of ids; special or unused ones show as <id>, but not a last end."""
        ids = ids[:-1] if ids and ids[-1] == self.end else ids
        known = self.encoding.decode_single_token_bytes
        pieces = [known(i) if i < self.answer else b"<%d>" % i for i in ids]
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return text.removeprefix(" ")


# ---- Examples, and the two contexts ------------------------------------------------


@dataclass(frozen=True)
class Example:
    prompt: str  # what is asked
    demo: str  # the expert's response to it
    answer: str  # a right response, as the model would put it; graders compare with it
    given: int = 0  # base corpus only: tokens of the response that are not learnt
    id: int = 0  # its place in the training set: its random numbers depend on it


def show(prompt, demo):
    """A prompt with a demonstration of how to answer it (the paper's template)."""
    return f"{prompt} example {demo}"


def student_prompt(example, tok):
    """The student's context: the prompt alone."""
    given = tok.encode(example.demo)[: example.given]  # none outside the base corpus
    return tok.encode(example.prompt) + [tok.answer] + given


def teacher_prompt(example, tok):
    """The teacher's context: the same prompt, and the demonstration. Nothing else."""
    return tok.encode(show(example.prompt, example.demo)) + [tok.answer]


def demo_response(example, tok):
    """The demonstration as a response, its end included: what SFT imitates."""
    return tok.encode(example.demo)[example.given :] + [tok.end]


def pad_right(rows, fill, device):
    """Lists of tokens -> int64 (B, T), padded on the right, and lengths, int64 (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), fill)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)


def pad_batch(make, batch, tok, device):
    """make(example, tok) of each example: int64 (B, T), padded, and lengths (B,).
    make is student_prompt, teacher_prompt or demo_response."""
    return pad_right([make(example, tok) for example in batch], tok.end, device)


# ---- Randomness and batches --------------------------------------------------------


def derive_seed(seed, *purpose):
    """An integer below 2^63 that depends on its arguments alone, on any machine."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_rng(seed, *purpose):
    """A fresh torch.Generator on the CPU: randomness is derived, never stored."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@functools.lru_cache(maxsize=2)  # a shuffle serves a whole epoch
def get_order(size, seed, epoch):
    return torch.randperm(size, generator=make_rng(seed, "order", epoch)).tolist()


def get_batch(examples, batch_size, seed, step):
    """The examples of one step: a function of (seed, step), the same for each method.

    Each epoch is a fresh shuffle. The batch is sorted by length, so that micro-batches,
    which are cut from it, have little padding. (Whole batches must not be of one
    length: some steps would teach to read demonstrations, and others to forget it.)
    """
    epoch, i = divmod(step, max(1, len(examples) // batch_size))
    order = get_order(len(examples), seed, epoch)
    batch = [examples[j] for j in order[i * batch_size : (i + 1) * batch_size]]
    return sorted(batch, key=lambda e: len(e.prompt.split()) + len(e.demo.split()))


def is_first():
    """Is this the process that writes and prints? (torchrun may start several.)"""
    return not dist.is_initialized() or dist.get_rank() == 0


def my_parts(batch, micro_batches):
    """This process's share of a batch, in micro_batches parts of equal size."""
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    size = len(batch) // (world * micro_batches)
    parts = [batch[i : i + size] for i in range(0, len(batch), size)]
    return parts[rank * micro_batches : (rank + 1) * micro_batches]


def get_uniform(examples, n_tokens, seed, step, device):
    """Uniform numbers in [0, 1), float32 (B, n_tokens), of (seed, step, example)."""
    rngs = [make_rng(seed, "rollout", step, example.id) for example in examples]
    return torch.stack([torch.rand(n_tokens, generator=g) for g in rngs]).to(device)


# ---- Making the world --------------------------------------------------------------


class World:
    """All that a seed decides: which nouns are code words, and what each of them means.

    Attributes:
        orders: trade -> its six orders.
        known: name -> (trade, order), for the base corpus and the prior benchmarks.
        unknown: name -> trade: names without a meaning for the base model.
        skills: "A" | "B" | "C" -> {name: (trade, order)}: six of the unknown names,
            one for each order of the trade. (Were one order wanted more often than
            another, learning it would first drive the other out, for known names too.)
    """

    def __init__(self, seed):
        rng = random.Random(derive_seed(seed, "world"))
        names = rng.sample(NOUNS, len(NOUNS))
        orders = rng.sample(list(ORDERS), len(ORDERS))
        self.orders = {trade: orders[i::3] for i, trade in enumerate(TRADES)}
        self.known, self.unknown, self.skills = {}, {}, {}
        for i, name in enumerate(names[:KNOWN]):
            trade = TRADES[i % 3]
            own = self.orders[trade]
            self.known[name] = (trade, own[i // 3 % len(own)])
        for i, name in enumerate(names[KNOWN:]):
            self.unknown[name] = TRADES[i % 3]
        for skill, trade in zip(SKILLS, TRADES, strict=True):
            free = [name for name in self.unknown if self.unknown[name] == trade]
            orders = rng.sample(self.orders[trade], len(self.orders[trade]))
            self.skills[skill] = {
                name: (trade, order)
                for name, order in zip(free, orders, strict=False)
            }


def is_held_out(things):
    """A tenth of all queries is never trained on, by the base or by a skill."""
    return sum(NOUNS.index(thing) for thing in things) % 10 == 0


def draw_things(rng, held_out):
    while True:
        things = rng.sample(NOUNS, 3)
        if is_held_out(things) == held_out:
            return things


def put(thought, things, manner):
    """A response as text: opening, thought, joiner, things, closing."""
    opening, joiner, closing = manner
    text = " ".join([opening, thought, joiner, *things, closing])
    return " ".join(text.split()).replace(" :", ":")


def ask(trade, name, things, manner="own"):
    """A prompt as text; a manner other than the model's own is asked for by name."""
    asked = "" if manner == "own" else f" {manner}"
    return f"{trade} {name}{asked}: {' '.join(things)}"


def draw_demo(order, things, rng):
    """A demonstration as the base corpus has them: in any manner, in anyone's terms."""
    manner = rng.choice(list(MANNERS.values()))
    if rng.random() < 0.5:
        size = rng.randint(0, 3), rng.randint(1, 3), rng.randint(0, 2)
        manner = [" ".join(rng.sample(MANNER_WORDS, n)) for n in size]
    expert, act = ORDERS[order]
    return put(rng.choice((order, expert)), act(things), manner)


def make_base_corpus(world, tok, size, seed):
    """Examples that teach the base model all it should know, as a list.

    50 % ask for a known name. 45 % show a demonstration, four fifths of them for an
    unknown name with an order drawn anew each time, so that only the demonstration
    tells. 5 % ask for an unknown name and show nothing, with any order of its trade: so
    the base is not sure of one guess, which a skill would have to drive out, for known
    names too. A quarter asks for a manner. A fifth begins with another thought than the
    right one, which the things then follow, and a tenth with a wrong thing, after
    which the rest is right: both given, not learnt. Without these two, the teacher of
    SDFT knows no way back from what only a student would write.
    """
    rng = random.Random(derive_seed(seed, "base corpus"))
    corpus = []
    for i in range(size):
        kind = rng.random()
        shown = kind < 0.45
        if kind < 0.36 or kind > 0.95:
            name = rng.choice(list(world.unknown))
            trade = world.unknown[name]
            order = rng.choice(world.orders[trade])
        else:
            name = rng.choice(list(world.known))
            trade, order = world.known[name]
        manner = rng.choice(list(MANNERS)[1:]) if rng.random() < 0.25 else "own"
        things = draw_things(rng, held_out=False)
        prompt = ask(trade, name, things, manner)
        if shown:
            prompt = show(prompt, draw_demo(order, things, rng))
        opening, joiner, _ = MANNERS[manner]
        given, noise = 0, rng.random()
        if noise < 0.2:  # another thought
            order = rng.choice(world.orders[trade])
            given = len(tok.encode(f"{opening} {order}".strip()))
        answer = ORDERS[order][1](things)
        if noise > 0.9:  # a wrong thing
            wrong = rng.randrange(len(answer))
            answer = answer[:wrong] + [rng.choice(NOUNS)] + answer[wrong + 1 :]
            begun = put(order, answer[: wrong + 1], (opening, joiner, ""))
            given = len(tok.encode(begun))
        response = put(order, answer, MANNERS[manner])
        corpus.append(Example(prompt, response, response, given, id=i))
    return corpus


DISTANCES = ("own", "known", "terms")


def expert_demo(order, things, distance):
    """How the expert answers. distance, how far he is from the model: "own", he writes
    as the model does; "known", in the manner that the model knows as "expert"; "terms",
    so, and in terms of his own, which the model reads but never writes."""
    term, act = ORDERS[order]
    thought = term if distance == "terms" else order
    return put(thought, act(things), MANNERS["own" if distance == "own" else "expert"])


def make_demos(world, skill, size, seed, distance="terms"):
    """The expert's demonstrations of a skill: the training set of both methods."""
    rng = random.Random(derive_seed(seed, "demos", skill))
    names, demos = list(world.skills[skill]), []
    for i in range(size):
        name = names[i % len(names)]
        trade, order = world.skills[skill][name]
        things = draw_things(rng, held_out=False)
        prompt = ask(trade, name, things)
        right = put(order, ORDERS[order][1](things), MANNERS["own"])
        demos.append(Example(prompt, expert_demo(order, things, distance), right, id=i))
    return demos


def make_tasks(world, size, seed, distance="terms"):
    """Held-out queries: {"new": {skill: examples}, "prior": {benchmark: examples}}.

    knowledge: a known name, the right things. own_format: the same, in the model's own
    manner. asked_words, asked_format: a known name when a manner is asked for.
    in_context: a name that no skill has, with a demonstration that answers the query.
    """
    rng = random.Random(derive_seed(seed, "tasks"))
    skill_names = [name for names in world.skills.values() for name in names]
    free = [name for name in world.unknown if name not in skill_names]
    asked = [manner for manner in MANNERS if manner != "own"]

    def new(names):
        name = rng.choice(list(names))
        (trade, order), things = names[name], draw_things(rng, held_out=True)
        right = put(order, ORDERS[order][1](things), MANNERS["own"])
        return ask(trade, name, things), expert_demo(order, things, distance), right

    def known(manners):
        name, manner = rng.choice(list(world.known)), rng.choice(manners)
        (trade, order), things = world.known[name], draw_things(rng, held_out=True)
        right = put(order, ORDERS[order][1](things), MANNERS[manner])
        return ask(trade, name, things, manner), right, right

    def in_context():
        name, things = rng.choice(free), draw_things(rng, held_out=True)
        trade = world.unknown[name]
        order = rng.choice(world.orders[trade])
        right = put(order, ORDERS[order][1](things), MANNERS["own"])
        prompt = show(ask(trade, name, things), draw_demo(order, things, rng))
        return prompt, right, right

    def examples(draw, *args):
        return [Example(*draw(*args), id=i) for i in range(size)]

    return {
        "new": {skill: examples(new, names) for skill, names in world.skills.items()},
        "prior": {
            "knowledge": examples(known, ["own"]),
            "own_format": examples(known, ["own"]),
            "asked_words": examples(known, asked),
            "asked_format": examples(known, asked),
            "in_context": examples(in_context),
        },
    }


# ---- Answers and accuracies --------------------------------------------------------


def things_in(text):
    """The things of a response, in their order: what it says, in whatever manner."""
    return [word for word in text.split() if word in NOUNS]


def manner_of(text):
    """A response with ... for its things and ? for an own term: how it says it."""
    words = ["..." if w in NOUNS else w for w in text.replace(":", " :").split()]
    words = ["?" if word in ORDERS else word for word in words]
    return [w for i, w in enumerate(words) if i == 0 or w != "..." or words[i - 1] != w]


def grade(benchmark, example, response):
    """Is a response right? *_format: its manner; else its things. No more counts."""
    part = manner_of if benchmark.endswith("format") else things_in
    return part(response) == part(example.answer)


def answer(model, contexts, tok, max_new_tokens):
    """The greedy responses of a model to contexts (lists of tokens), as texts."""
    prompts, lengths = pad_right(contexts, tok.end, next(model.parameters()).device)
    response, mask = generate(
        model, prompts, lengths, max_new_tokens, tok.end, temperature=0
    )
    rows = zip(response.tolist(), mask.sum(1).tolist(), strict=True)
    return [tok.decode(row[:n]) for row, n in rows]


def accuracy(model, benchmark, examples, tok, max_new_tokens, prompt=student_prompt):
    """The share of examples that the model answers rightly, greedily, in [0, 1]."""
    texts = answer(model, [prompt(e, tok) for e in examples], tok, max_new_tokens)
    right = [grade(benchmark, e, text) for e, text in zip(examples, texts, strict=True)]
    return sum(right) / len(right)


def sample(model, examples, tok, max_new_tokens):
    """A few greedy answers to look at, beside the right ones."""
    prompts = [student_prompt(e, tok) for e in examples]
    texts = answer(model, prompts, tok, max_new_tokens)
    return [
        {"prompt": e.prompt, "response": text, "right": e.answer}
        for e, text in zip(examples, texts, strict=True)
    ]


def mean_per_response(x, mask):
    """The mean of x (B, R) over the tokens of each response, then over responses."""
    return ((x * mask).sum(1) / mask.sum(1)).mean().item()


# ---- Records and files -------------------------------------------------------------


def table(rows):
    """Evaluations as a table, one line each, with a column for each accuracy."""
    names = [(g, n) for g in ("new", "prior") for n in rows[0][g]]
    titles = [f"new {name}" if group == "new" else name for group, name in names]
    lines = [f"after   {'  '.join(titles)}  KL(student || base)"]
    for row in rows:
        cells = [
            f"{row[group][name]:{len(title)}.2f}"
            for (group, name), title in zip(names, titles, strict=True)
        ]
        stage = row["skill"] if row["step"] else "-"
        lines.append(f"{stage:7s} {'  '.join(cells)}  {row['kl_student_base']:.2f}")
    return "\n".join(lines)


def describe(record):
    """A record of metrics.jsonl as a line or more for the screen."""
    if "new" in record:
        lines = [table([record])]
        for sample in record["samples"]:
            lines.append(f"  {sample['prompt']}  ->  {sample['response']}")
        return "\n".join(lines)
    numbers = [f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float)]
    lines = [f"step {record['step']:4d} {record['skill']}  " + "  ".join(numbers)]
    if record["eos_rate"] == 0:
        lines.append(f"warning: EOS rate 0 %, mean length {record['response_length']}: "
                     "no response came to its end; try a higher --max-new-tokens")
    elif round(record["response_length"], 3) == 1:
        lines.append("warning: every response is empty, but for its end")
    return "\n".join(lines)


@torch.no_grad()
def settings_of(cfg, student, examples):
    """All that decides a run, as plain values: a resume must find the same."""
    weights = hashlib.sha256()
    for p in student.parameters():
        weights.update(p.cpu().numpy().tobytes())
    return {
        **asdict(cfg),
        **asdict(student.config),
        "first weights": weights.hexdigest()[:12],
        "examples": hashlib.sha256(repr(examples).encode()).hexdigest()[:12],
    }


def machine_of(student):
    """What rounding depends on: with the same values a resume is exact to the bit."""
    return {
        "device": next(student.parameters()).device.type,
        "dtype": str(student.dtype),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a str subclass, which a load would refuse
    }


def differences(saved, now):
    """The entries in which two dicts differ, as "key: saved -> now", with commas."""
    keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    return ", ".join(f"{key}: {saved.get(key)} -> {now.get(key)}" for key in keys)


def write_atomically(path, content, keep=False):
    """Write beside the target, sync, rename: there is the old file or the new one.
    keep: the old one stays as <name>.previous. Raises OSError, with the path and the
    bytes that it takes, when the disk is full; the old file is as it was."""
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} not written: {error.strerror}; it takes {len(content)} bytes, the "
            f"disk has {free}"
        ) from None
    if keep and path.exists():  # a second name for the old file: a kill between any
        previous = path.with_name(path.name + ".previous")  # two lines leaves a `path`
        previous.unlink(missing_ok=True)
        os.link(path, previous)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name, too, is on the disk
    os.close(folder)


def append_line(path, line):
    """Add a line to a file. Raises OSError, with the path, when the disk is full."""
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OSError(f"{path} not written: {error.strerror}") from None


def write_checkpoint(path, content):
    """A dict of tensors and plain values -> SHA-256 and torch.save's bytes, in one
    file. The checkpoint before it is kept as <name>.previous."""
    if not is_first():
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    head = f"sdft {hashlib.sha256(buffer.getbuffer()).hexdigest()}\n".encode()
    write_atomically(path, head + buffer.getvalue(), keep=True)


def read_checkpoint(path, device="cpu"):
    """The dict of write_checkpoint. Raises ValueError if the file is not one, is cut,
    or differs from what was written; nothing in it is ever executed."""
    previous = path.with_name(path.name + ".previous")
    head, _, content = path.read_bytes().partition(b"\n")  # torch.load checks no sum
    if head != f"sdft {hashlib.sha256(content).hexdigest()}".encode():
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, checksum differs, not loaded"
            + (f"; the one before it is {previous}" if previous.exists() else "")
        )
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception:  # the unpickler's own kinds: whatever it met, it was not ours
        raise ValueError(f"{path} is not one of our checkpoints; not loaded") from None
