"""e04: which tokens are the response. Grader: test_e04_response_mask.py"""

from kit import Exercise

SHEET = """
Which tokens carry loss is decided by one tensor of booleans, and most silent bugs of
fine-tuning live in it. Write response_mask(ids, lengths, end): ids (B, T) int64 hold in
each row a prompt of lengths[b] tokens, its response right after it, then pads. The
result is bool (B, T), true at the tokens of the response:

1. from column lengths[b] on, never in the prompt;
2. up to and including the first `end` after the prompt: the student must learn when
   to stop;
3. nothing after that end, whatever is there; a response without an end goes on to
   the last column.

Do not compare with a pad token: there is none. Rows are padded with any token, `end` is
one, and a prompt may hold `end`, too. A prompt that fills its row has no response.

What to look at when it runs: the mask beside the decoded row, in one print. In a
training run look at eos_rate, the share of responses that end: with a mask that leaves
the end out, it falls to 0 and the responses run to --max-new-tokens.
"""

HINTS = (
    """
Direction. Say it for one token: it counts if it comes after the prompt and if no end
of the response is to the left of it. Both halves can be written for all tokens in one
line.
""",
    """
Plan. place = arange(T); behind = place >= lengths[:, None]. The ends of the response
are (ids == end) & behind, so those of the prompt are out. cumsum(1) counts the ends up
to and including a column; take the column itself away: where 0 is left, it counts.
""",
    """
Almost the code.
    behind = torch.arange(ids.size(1), device=ids.device) >= lengths[:, None]
    ends = (ids == end) & behind
    before = ...  # ends strictly to the left, (B, T)
    return behind & (before == 0)
""",
)

MUTANTS = (
    ("end left out", (("ends.cumsum(1) - ends.long()", "ends.cumsum(1)"),),
     "the end itself is missing"),
    ("pads by comparison", (("behind & (before == 0)", "behind & (ids != end)"),),
     "the end itself is missing"),
    ("prompt counts", (("return behind & ", "return "),), "tokens of the prompt count"),
    ("ends of the prompt", (("(ids == end) & behind", "ids == end"),),
     "an end in the prompt"),
    ("one late", ((">= lengths", "> lengths"),), "first token of the response"),
    ("one early", ((">= lengths[:, None]", ">= lengths[:, None] - 1"),),
     "tokens of the prompt count"),
    ("everything behind", (("return behind & (before == 0)", "return behind"),),
     "behind the end"),
    ("one too many", (("before == 0", "before <= 1"),), "the second end"),
    ("last end", (
        ("ends.cumsum(1) - ends.long()", "ends.flip(1).cumsum(1).flip(1)"),
        ("(before == 0)", "((before > 0) | (ends.sum(1, keepdim=True) == 0))"),
    ), "last end, not the first"),
    ("needs an end", (("return behind & (before == 0)", "return behind & (before == 0)"
                       " & ends.any(1, keepdim=True)"),), "no end"),
    ("integers", (("return behind & (before == 0)",
                   "return (behind & (before == 0)).long()"),), "bool"),
    ("first row's length", (("lengths[:, None]", "lengths[0]"),),
     "length of another row"),
)  # fmt: skip

RIGHTS = (
    (
        "a loop over rows",
        """
def response_mask(ids, lengths, end):
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        start = int(lengths[b])
        stop = row.index(end, start) + 1 if end in row[start:] else len(row)
        mask[b, start:stop] = True
    return mask
""",
    ),
    (
        "the place of the first end, by argmax",
        """
def response_mask(ids, lengths, end):
    B, T = ids.shape
    place = torch.arange(T).expand(B, T)
    behind = place >= lengths.unsqueeze(1)
    hit = torch.logical_and(ids.eq(end), behind)
    last = torch.where(hit.any(1), hit.float().argmax(1), T)
    return behind & (place <= last.unsqueeze(1))
""",
    ),
    (
        "a product of what came before",
        """
def response_mask(ids, lengths, end):
    behind = torch.arange(ids.size(1))[None] >= lengths[:, None]
    goes_on = 1 - ((ids == end) & behind).int()
    before = torch.cat((torch.ones_like(goes_on[:, :1]), goes_on[:, :-1]), 1)
    return behind & before.cumprod(1).bool()
""",
    ),
)

EXERCISE = Exercise(
    id="e04",
    functions=("extra.py response_mask",),
    title="The mask of the response",
    goal="Decide which tokens carry loss: the end does, prompt and pads do not.",
    paper="arXiv 2601.19897, section 3: sums over the tokens of y",
    difficulty=2,
    minutes=20,
    points=4,
    run_time="in a second",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    wire=(
        (
            "model.py",
            "    mask = torch.arange(R, device=device) < n_tokens[:, None]",
            "    import extra\n\n"
            "    mask = extra.response_mask(response[:, :R], 0 * n_tokens, end)",
        ),
    ),
)
