"""e02: one token from a distribution. Grader: test_e02_sample_token.py"""

from kit import Exercise

SHEET = """
SDFT is on-policy: the student writes the responses that it then learns from. Its
sampler must therefore draw from exactly the distribution that is trained, and a run
must be repeatable: all randomness comes in as a number u in [0, 1) for each row.

Write sample_token(logits, u, temperature) of model.py. logits are float32 (B, V), u is
float32 (B,); the result is int64 (B,). For each row by itself:

1. p = softmax(logits / temperature).
2. The token is the first one whose cumulative probability p_0 + ... + p_i exceeds u. So
   a token of probability 0 never comes, whatever u is.
3. Rounding makes the sum of a float32 p a little less, or more, than 1: for u just
   below 1 the result must still be a token, that is at most V - 1.
4. temperature 0 means the most likely token; u is not used then, and may be None.

No generator of torch is used, and neither logits nor u are changed.

What to look at when it runs: 10,000 draws with temperatures 0.5, 1 and 2 from the same
four logits. Which one is flatter than the model believes? SDFT with --temperature 0
would learn from one response for each prompt, always the same.
"""

HINTS = (
    """
Direction. Lay the probabilities of a row side by side, from 0 to 1: u falls into the
piece of one of the tokens. Which pieces end at or before u?
""",
    """
Plan. cdf = p.cumsum(-1). The token is the number of entries of cdf that are <= u. Scale
u by the last entry of cdf, so that u < 1 is below it, and clamp the result for the last
rounding. Take care of temperature 0 before you divide.
""",
    """
Almost the code.
    if temperature == 0:
        return ...
    cdf = torch.softmax(logits / temperature, dim=-1).cumsum(-1)  # (B, V)
    token = (cdf <= u[:, None] * cdf[:, -1:]).sum(-1)
    return ...  # never more than V - 1
""",
)

P = "torch.softmax(logits / temperature, dim=-1)"
SEARCH = "torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]"

MUTANTS = (
    ("multiplied", ((P, "torch.softmax(logits * temperature, dim=-1)"),),
     "multiplied by the temperature"),
    ("temperature ignored", ((P, "torch.softmax(logits, dim=-1)"),),
     "temperature has no effect"),
    ("after the softmax", ((P, "torch.softmax(logits, dim=-1) / temperature"),),
     "temperature has no effect"),
    ("multinomial", ((SEARCH, "torch.multinomial(p, 1)[:, 0]"),),
     "torch's own generator"),
    ("greedy", ((SEARCH, "p.argmax(-1)"),), "the most likely token, whatever u is"),
    ("the other way round", ((SEARCH, SEARCH.replace("u[:", "(1 - u)[:")),),
     "from the other end"),
    ("zero comes", ((SEARCH, SEARCH.replace("right=True", "right=False")),),
     "has probability 0"),
    ("one u for all", ((SEARCH, SEARCH.replace("u[:, None]", "u[:1, None]")),),
     "another row's u"),
    ("over the end", ((SEARCH, SEARCH.replace(" * cdf[:, -1:]", "")),
                      (".clamp(max=logits.size(-1) - 1)", "")), "is no token"),
    ("temperature 0", (("if temperature == 0", "if temperature < 0"),),
     "temperature 0"),
    ("least likely", (("logits.argmax(-1)", "logits.argmin(-1)"),), "temperature 0"),
    ("in place", ((P, "torch.softmax(logits.div_(temperature), dim=-1)"),),
     "changes logits"),
    ("no softmax", ((P, "(logits / temperature).abs()"),), "of the distribution"),
    ("top two", ((P, "torch.softmax((logits / temperature).masked_fill(logits < "
                  "logits.topk(2).values[:, 1:], -math.inf), dim=-1)"),),
     "never comes"),
)  # fmt: skip

RIGHTS = (
    (
        "counts the pieces that end before u",
        """
def sample_token(logits, u, temperature=1.0):
    if temperature == 0:
        return logits.max(-1).indices
    p = (logits.double() / temperature).softmax(-1)
    return (p.cumsum(-1) <= u[:, None].double()).sum(-1).clamp(max=p.size(-1) - 1)
""",
    ),
    (
        "a loop over rows and tokens in Python",
        """
def sample_token(logits, u, temperature=1.0):
    tokens = []
    for b, row in enumerate(logits.tolist()):
        best = max(range(len(row)), key=row.__getitem__)
        if temperature == 0:
            tokens.append(best)
            continue
        p = [math.exp((x - row[best]) / temperature) for x in row]
        total, left = math.fsum(p), u[b].item()
        choice = best
        for i, x in enumerate(p):
            left -= x / total
            if left < 0:
                choice = i
                break
        tokens.append(choice)
    return torch.tensor(tokens, device=logits.device)
""",
    ),
)

EXERCISE = Exercise(
    id="e02",
    functions=("model.py sample_token",),
    title="Sample a token",
    goal="Sampling is part of the method: draw from exactly what is trained.",
    paper="arXiv 2601.19897, section 3: y ~ student(. | x), on-policy",
    difficulty=2,
    minutes=20,
    points=4,
    run_time="in a second",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
)
