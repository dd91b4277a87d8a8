"""e05: the loss of supervised fine-tuning. Grader: test_e05_sft_loss.py"""

from kit import Exercise

SHEET = """
Supervised fine-tuning (SFT) is the baseline that SDFT is compared with: the student
reads the prompt and is to give the demonstration's tokens a high probability. Write
compute_loss(student, batch, response, mask, tok, cfg) of sft.py. It returns (loss, {}):
the loss is a tensor of shape (), the dict holds further numbers for the record.

    student   the GPT: vocabulary V, hidden states of width C
    batch     a list of B data.Example: one micro-batch
    response  int64 (B, R), the tokens of the responses, padded on the right
    mask      bool (B, R), true at the N tokens that count
    tok, cfg  the tokenizer, and the sft.Config with batch_size

1. The contexts: data.pad_batch(data.student_prompt, batch, tok, device) gives prompts
   (B, P), padded on the right, and their lengths (B,).
2. The hidden states that predict the N response tokens under the mask:
   response_hidden(student, prompts, lengths, response, mask) -> (N, C), row after row,
   in the order of response[mask]. The shift by one (the state at a token predicts the
   next one) is done in there. Logits are student.logits(hidden) -> (N, V).
3. The loss, in nats per token: -log p of each token under the mask; the mean over the
   tokens of a response; then the sum over the responses, divided by cfg.batch_size.

Divide by cfg.batch_size and not by the number of rows that you were given: a batch of
64 may come as four micro-batches of 16 whose losses are added up. Each response weighs
the same, whatever its length; one of which nothing counts adds 0.
Nothing that you are given may be changed, the mode of the student (train, eval)
neither: who calls decides on dropout. Keep the dtype that you are given (no .float()):
the grader works in float64, where a right loss is right to nine digits.

What to look at when it runs: python tests/exercises/run.py mine --method sft. The loss
falls within the first hundred updates and the skill is learnt; then read the columns of
the old skills.
"""

HINTS = (
    """
Direction. Which tokens does the loss see, and what is each of them worth? Write down
one weight for each token of the response, 0 where the mask is false, so that the loss
is the sum of weight * -log p over all tokens.
""",
    """
Plan. weight = mask / (tokens of its row) / cfg.batch_size is (B, R); indexing it with
the mask gives (N,), row after row, in the order of response_hidden and of
response[mask]. For log p use log_softmax over the vocabulary, and gather the column of
each token. A row without any token divides by 0: clamp the number of tokens.
""",
    """
Almost the code.
    bare = data.pad_batch(data.student_prompt, batch, tok, mask.device)
    hidden = response_hidden(student, *bare, response, mask)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / cfg.batch_size
    log_p = ...  # (N,), of response[mask], from student.logits(hidden)
    return ..., {}
""",
)

WEIGHT = "mask / mask.sum(1, keepdim=True).clamp(min=1) / cfg.batch_size"
LOSS = "chunked_nll(hidden, student.head(), response[mask], weight)"
HIDDEN = "response_hidden(student, *bare, response, mask)"

MUTANTS = (
    ("sum", ((WEIGHT, "mask / cfg.batch_size"),), "the sum over the tokens"),
    (
        "mean over all tokens",
        ((WEIGHT, "mask / mask.sum()"),),
        "mean over all tokens of the micro-batch",
    ),
    (
        "divides by its own rows",
        ((WEIGHT, "mask / mask.sum(1, keepdim=True).clamp(min=1) / len(batch)"),),
        "number of rows that you were given",
    ),
    (
        "divides by R",
        ((WEIGHT, "mask / mask.size(1) / cfg.batch_size"),),
        "divided by R",
    ),
    ("sign", ((LOSS, f"-{LOSS}"),), "the minus sign"),
    (
        "mask ignored",
        (("  # (B, P), (B,)\n", "\n    mask = torch.ones_like(mask)\n"),),
        "pads behind the response",
    ),
    (
        "end left out",
        (
            (
                "  # (B, P), (B,)\n",
                "\n    mask = mask & (mask.cumsum(1) < mask.sum(1, keepdim=True))\n",
            ),
        ),
        "last token of each response, its end, is missing",
    ),
    (
        "no shift",
        (
            (
                HIDDEN,
                "response_hidden(student, *bare, torch.nn.functional.pad(response, "
                "(0, 1)), torch.nn.functional.pad(mask, (1, 0)))",
            ),
        ),
        "predicted from the state at the token itself",
    ),
    (
        "sees the demonstration",
        (("data.student_prompt", "data.teacher_prompt"),),
        "the teacher's context",
    ),
    (
        "probability, not its logarithm",
        (
            (
                LOSS,
                "-(weight * student.logits(hidden).softmax(-1).gather("
                "1, response[mask][:, None])[:, 0]).sum()",
            ),
        ),
        "-p, not -log p",
    ),
    (
        "empty response",
        ((".clamp(min=1)", ""), ("weight = weight[mask]", "weight = weight[mask] + "
                                 "0 * weight.sum()")),
        "no token counts",
    ),
    ("no gradient", ((HIDDEN, f"{HIDDEN}.detach()"),), "no gradient reaches"),
    (
        "log of a softmax",
        (
            (
                LOSS,
                "-(weight * student.logits(hidden).softmax(-1).log().gather("
                "1, response[mask][:, None])[:, 0]).sum()",
            ),
        ),
        "log_softmax",
    ),
    (
        "in float32",
        (
            (
                LOSS,
                "-(weight * student.logits(hidden).float().log_softmax(-1).gather("
                "1, response[mask][:, None])[:, 0]).sum()",
            ),
        ),
        "right up to float32 rounding",
    ),
    ("float32 meets float64", ((HIDDEN, f"{HIDDEN}.float()"),), "Keep the dtype"),
    (
        "shifted twice",
        (
            (
                LOSS,
                "chunked_nll(hidden[:-1], student.head(), response[mask][1:], "
                "weight[1:])",
            ),
        ),
        "do you shift a second time",
    ),
    (
        "mean over all tokens, times rows / batch_size",
        ((WEIGHT, "mask / mask.sum() * len(batch) / cfg.batch_size"),),
        "times rows / batch_size",
    ),
    ("a number", ((LOSS, f"{LOSS}.item()"),), "has no gradient"),
    ("eval mode is left on", (("    hidden = response", "    student.eval()\n    "
                               "hidden = response"),), "mode"),
    ("train mode is left on", (("    return loss, {}", "    student.train()\n    "
                                "return loss, {}"),), "was in eval mode"),
    ("eval mode for the loss", (("    hidden = response", "    was = student.training"
                                 "\n    student.eval()\n    hidden = response"),
                                ("    return loss, {}", "    student.train(was)\n    "
                                 "return loss, {}")), "who calls decides on dropout"),
    ("an empty row gets a token", (("    hidden = response", "    mask[mask.sum(1) == "
                                    "0, 0] = True\n    hidden = response"),),
     "compute_loss changes mask"),
    (
        "changes the mask",
        (
            ("hidden = response", "response[~mask] = tok.end\n    hidden = response"),
        ),
        "changes response",
    ),
)  # fmt: skip

RIGHTS = (
    (
        "cross entropy with ignore_index, a mean for each row",
        '''
import torch.nn.functional as F

def compute_loss(student, batch, response, mask, tok, cfg):
    prompts, lengths = data.pad_batch(data.student_prompt, batch, tok, mask.device)
    all_of_them = torch.ones_like(mask)
    hidden = response_hidden(student, prompts, lengths, response, all_of_them)
    logits = student.logits(hidden).view(*mask.shape, -1)  # (B, R, V)
    target = response.masked_fill(~mask, -100)
    loss = 0
    for row, wanted in zip(logits, target):
        if (wanted >= 0).any():
            loss = loss + F.cross_entropy(row, wanted, ignore_index=-100)
    return loss / cfg.batch_size, {}
''',
    ),
    (
        "row after row without padding, whole sequences",
        '''
def compute_loss(student, batch, response, mask, tok, cfg):
    total = torch.zeros((), dtype=torch.float64)
    for example, tokens, counts in zip(batch, response, mask):
        context = data.student_prompt(example, tok)
        ids = torch.tensor(context + tokens.tolist())
        log_p = torch.log_softmax(student(ids[None, :-1])[0], -1)
        log_p = log_p[len(context) - 1 :]
        values = [-log_p[t, tokens[t]] for t in range(len(tokens)) if counts[t]]
        if values:
            total = total + torch.stack(values).mean()
    return total / cfg.batch_size, {}
''',
    ),
    (
        "logits minus logsumexp",
        '''
def compute_loss(student, batch, response, mask, tok, cfg):
    prompts = data.pad_batch(data.student_prompt, batch, tok, mask.device)
    logits = student.logits(response_hidden(student, *prompts, response, mask))
    nll = logits.logsumexp(-1) - logits[torch.arange(len(logits)), response[mask]]
    per_row = torch.zeros(mask.shape, dtype=nll.dtype).masked_scatter(mask, nll).sum(1)
    return (per_row / mask.sum(1).clamp(min=1)).sum() / cfg.batch_size, {}
''',
    ),
)

EXERCISE = Exercise(
    id="e05",
    functions=("sft.py compute_loss",),
    title="The loss of SFT",
    goal="Write the baseline: which tokens count, and what each of them weighs.",
    paper="arXiv 2601.19897, section 2: SFT on expert demonstrations",
    difficulty=2,
    minutes=25,
    points=5,
    run_time="in 2 seconds; the training job takes minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
)
