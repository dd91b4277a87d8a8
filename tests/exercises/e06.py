"""e06: the teacher's context, and rows that predict one token. test_e06_contexts.py"""

from kit import Exercise

SHEET = """
The teacher of SDFT is the student itself, shown the demonstration: another context, the
same response. Two functions make this work.

teacher_prompt(example, tok) of data.py: a list of tokens. The text is
with_demo(example.prompt, example.demo), which is the prompt, the word "example" and the
demonstration; tok.encode(text) gives its tokens, and tok.start, the start of a
response, comes after them. All of the demonstration, nothing cut, and nothing else:
above all not example.answer. (student_prompt of data.py also serves real tokenizers and
chats; the tiny world has neither, and yours need not.)

response_hidden(model, prompts, lengths, response, mask) of model.py: the hidden states
that predict the response. prompts (B, P) are padded on the right, lengths (B,) are
theirs; response (B, R) is padded with anything; mask (B, R) is true at the N tokens
that are wanted. The result is (N, C), row after row.

1. Each response comes right after its own prompt, not after the pads: put the rows
   together as (B, P + R) tokens and call model.hidden(idx) -> (B, T, C) once.
2. The state *at* a token predicts the *next* one: token t of the response of row b is
   predicted at column lengths[b] + t - 1. This shift is made here and nowhere else.
3. A wanted token and all before it may be model.config.block_size tokens, and no more:
   check_fit(model, prompts, lengths, n_tokens) raises ValueError if n_tokens are too
   many; ValueError, too, if you look yourself. Nothing is ever cut. Tokens after the
   last wanted one need not be read and must not make it fail: a row of 20 tokens, of
   which the first 16 are wanted, fits into 16. (So the docstring is meant.)

Student and teacher call it with prompts of different lengths and one response: row n of
the one and row n of the other then predict the same token. The other
rows of a batch change no row. The mode of the model (train, eval) is the caller's.

What to look at when it runs: decode the two contexts of one example. Then the two lines
that train.py calls the gate: the accuracy of the base without and with a demonstration
in its prompt. The difference is all that SDFT has to give.
"""

HINTS = (
    """
Direction. Draw two rows with prompts of 3 and 1 tokens and responses of 2, column by
column, as the docstring does. Below each token write the column that predicts it.
""",
    """
Plan. row, t = mask.nonzero(as_tuple=True) are the N wanted tokens; their columns are
lengths[row] + t - 1. The rows: a tensor (B, P + R), prompts on the left, and response
scattered to the places lengths[:, None] + arange(R), which overwrites pads of the
prompt. Feed the columns up to the last one that you need, then index [row, column].
""",
    """
Almost the code.
    row, t = mask.nonzero(as_tuple=True)
    column = lengths[row] + t - 1
    T = max(column.tolist(), default=0) + 1
    check_fit(model, prompts, lengths, ...)  # the last token counts, too
    place = lengths[:, None] + torch.arange(response.size(1), device=response.device)
    idx = F.pad(prompts, (0, response.size(1))).scatter(1, place, response)
    return model.hidden(...)[...]
and teacher_prompt: return tok.encode(with_demo(...)) + [...]
""",
)

SHOWN = "tok.encode(with_demo(example.prompt, example.demo)) + [tok.start]"
COLUMN = "column = known[row, 0] + t - 1"
FIT = "check_fit(model, prompts, known[:, 0], T + 1)"
NONZERO = "row, t = known[:, 1:].nonzero(as_tuple=True)"

MUTANTS = (
    ("no start", ((SHOWN, SHOWN.replace(" + [tok.start]", "")),), "tok.start"),
    ("the answer", ((SHOWN, SHOWN.replace("example.demo", "example.answer")),),
     "example.answer"),
    ("no demonstration", ((SHOWN, "tok.encode(example.prompt) + [tok.start]"),),
     "no demonstration"),
    ("no prompt", ((SHOWN, "tok.encode(example.demo) + [tok.start]"),),
     "the prompt is missing"),
    ("with an end", ((SHOWN, SHOWN.replace("[tok.start]", "[tok.end, tok.start]")),),
     "tok.end"),
    ("another order", ((SHOWN, SHOWN.replace("example.prompt, example.demo",
     "example.demo, example.prompt")),), "in front of the prompt"),
    ("cut", ((SHOWN, "tok.encode(with_demo(example.prompt, example.demo))[:16] + "
              "[tok.start]"),), "cut"),
    ("start in the middle", ((SHOWN, "tok.encode(example.prompt) + [tok.start] + "
     "tok.encode('example ' + example.demo)"),), "tok.start"),
    ("at the token itself", ((COLUMN, "column = lengths[row] + t"),),
     "the token itself has been read"),
    ("one too early", ((COLUMN, "column = (lengths[row] + t - 2).clamp(min=0)"),),
     "one column too early"),
    ("behind the pads", (
        (COLUMN, "column = prompts.size(1) + t - 1"),
        ("place = lengths[:, None]", "place = 0 * lengths[:, None] + prompts.size(1)"),
    ), "behind the pads"),
    ("columns of the longest prompt", ((COLUMN, "column = prompts.size(1) + t - 1"),),
     "longest prompt"),
    ("token after token", ((NONZERO, "t, row = mask.T.nonzero(as_tuple=True)"),),
     "row after row"),
    ("mask ignored", ((NONZERO, "row, t = torch.ones_like(mask).nonzero("
                       "as_tuple=True)"),), "(N, C)"),
    ("cut in silence", (("T = max(column.tolist(), default=0) + 1",
     "T = min(max(column.tolist(), default=0) + 1, model.config.block_size - 1)"),
     ("[row, column]", "[row, column.clamp(max=T - 1)]")), "cut in silence"),
    ("refuses what fits", ((FIT, FIT.replace("+ 1", "+ 2")),), "fits"),
    ("counts pads", ((FIT, FIT.replace("T + 1", "prompts.size(1) + R")),), "fits"),
)  # fmt: skip

MODEL = """
def response_hidden(model, prompts, lengths, response, mask):
    rows = []
    for prompt, n, tokens, wanted in zip(prompts, lengths, response, mask):
        places = wanted.nonzero()[:, 0]
        if len(places) == 0:
            continue
        ids = torch.cat((prompt[:n], tokens[: places[-1] + 1]))
        if len(ids) > model.config.block_size:
            raise ValueError(f"{len(ids)} tokens > {model.config.block_size}")
        rows.append(model.hidden(ids[None, :-1])[0, n - 1 + places])
    return torch.cat(rows)
"""

RIGHTS = (
    (
        "each row by itself; tokens of the two texts",
        {
            "data.py": """
def teacher_prompt(example, tok):
    ids = tok.encode(example.prompt) + tok.encode("example " + example.demo)
    ids.append(tok.start)
    return ids
""",
            "model.py": MODEL,
        },
    ),
    (
        "a loop that fills the rows, all columns fed",
        {
            "data.py": """
def teacher_prompt(example, tok):
    return [*tok.encode(f"{example.prompt} example {example.demo}"), tok.start]
""",
            "model.py": """
def response_hidden(model, prompts, lengths, response, mask):
    n_last = [int(m.nonzero().max()) + 1 if m.any() else 0 for m in mask]
    longest = max(int(n) + k for n, k in zip(lengths, n_last))
    if longest > model.config.block_size:
        raise ValueError(f"{longest} tokens do not fit")
    idx = torch.zeros(len(prompts), longest, dtype=torch.int64)
    pick = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for b, (n, k) in enumerate(zip(lengths.tolist(), n_last)):
        idx[b, :n] = prompts[b, :n]
        idx[b, n : n + k] = response[b, :k]
        pick[b, n - 1 : n - 1 + k] = mask[b, :k]
    return model.hidden(idx)[pick]
""",
        },
    ),
)

EXERCISE = Exercise(
    id="e06",
    functions=("data.py teacher_prompt", "model.py response_hidden"),
    title="Two contexts, one response",
    goal="Make the teacher out of the student: a demonstration more, the same tokens.",
    paper="arXiv 2601.19897, section 3: the teacher is p(. | x, c)",
    difficulty=3,
    minutes=40,
    points=7,
    run_time="in 2 seconds",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
)
