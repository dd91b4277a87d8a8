"""e17: speculative self-distillation. Grader: test_e17_speculative.py"""

from kit import Exercise

SHEET = """
(When you are done.) Who writes the responses? If the teacher does (off-policy),
training is fast and ends lower; if the student does (SDFT), it is slow, and after one
wrong token the two may agree on nonsense. One number lies between them: the student
writes, but where it and the teacher are further apart than tau, the teacher writes the
token. tau = 0 is off-policy, tau = infinity is SDFT. As a diff of sdft.py:

    python tests/exercises/variants.py speculative

Write speculative_responses(student, teacher, batch, tok, cfg, tau, step) of extra.py:

1. Contexts: data.pad_batch with data.student_prompt for the student, with
   data.teacher_prompt for the teacher: (prompts, lengths) each. Numbers:
   data.get_uniform(batch, cfg.max_new_tokens, cfg.seed, step, device), (B, R), R =
   cfg.max_new_tokens.
2. For t = 0 .. R - 1: the logits (B, V) of both models for token t, after the *same*
   response so far, divided by cfg.temperature. Per row: if KL(teacher || student) > tau
   (nats, over the whole vocabulary), the token is drawn from the teacher's
   distribution, else from the student's, by sample_token(logits, u[:, t]) either way.
3. A row has ended after tok.end. Return as generate does: response int64 (B, R'), mask
   bool (B, R'), true up to and including the end; after it the response is filled
   with tok.end. R' is the length of the longest response.

No cache is needed: response_hidden(model, prompts, lengths, response[:, :t + 1], here)
with `here` true in column t alone gives the (B, C) states that predict token t. Both
respond without dropout, and afterwards their modes (train, eval) are what they were.

What to look at when it runs: python tests/exercises/run.py mine --only e17 --method
sdft runs with tau 0.3. Without a cache each token reads the whole row again, twice: the
run takes half an hour more than the project's own ten minutes. (--only e11 trains plain
SDFT, if both are in the folder.) python tests/exercises/variants.py speculative --run
--tau 1 needs no line of yours and has a cache. Which tau learns fastest, which keeps
most? Let your function print the mean KL of each t: where along the response do the two
disagree, and does tau change that?
"""

HINTS = (
    """
Direction. It is generate with two models in step. What do both have to have read before
token t, and what is different between their contexts? Which of the two distributions is
each row's token drawn from?
""",
    """
Plan. response (B, R) full of tok.end, alive (B,) all true. In each turn: two calls of
response_hidden and model.logits, both divided by the temperature; kl_reference(s, q,
"forward") is (B,); torch.where(kl[:, None] > tau, q, s) are the logits to draw from
(they are divided already: sample_token gets no temperature). Dead rows get tok.end.
""",
    """
Almost the code, of the loop.
    here = torch.zeros(B, t + 1, dtype=torch.bool)
    here[:, t] = True
    s = student.logits(response_hidden(student, *bare, response[:, :t + 1], here))
    q = ...  # the same of the teacher, after `shown`
    s, q = s / cfg.temperature, q / cfg.temperature
    teacher_writes = kl_reference(s, q, "forward") > tau
    token = sample_token(torch.where(...), u[:, t])
    response[:, t] = torch.where(alive, token, tok.end)
    alive = alive & ...
""",
)

JUDGE = 'kl_reference(s, q, "forward") > tau'
DRAW = "torch.where(teacher_writes[:, None], q, s)"
PAIRS = "(student, data.student_prompt), (teacher, data.teacher_prompt)"
PUT = "torch.where(alive, token, tok.end)"
COUNT = "((response != tok.end).sum(1) + 1).clamp(max=u.size(1))"

MUTANTS = (
    ("the other way round", ((JUDGE, JUDGE.replace(">", "<=")),),
     "the student writes where the two disagree"),
    ("reverse KL", ((JUDGE, JUDGE.replace("forward", "reverse")),),
     "the KL the other way round"),
    ("arguments swapped", ((JUDGE, JUDGE.replace("s, q", "q, s")),),
     "the KL the other way round"),
    ("JSD", ((JUDGE, JUDGE.replace("forward", "jsd")),), "yours has the JSD"),
    ("bits", ((JUDGE, JUDGE.replace(" >", " / math.log(2) >")),), "tau is in nats"),
    ("no demonstration", ((PAIRS, PAIRS.replace("teacher_prompt", "student_prompt")),),
     "the teacher sees no demonstration"),
    ("the student is shown", ((PAIRS, PAIRS.replace("student_prompt",
                                                   "teacher_prompt")),),
     "the student sees the demonstration"),
    ("prompts exchanged", ((PAIRS, "(student, data.teacher_prompt), (teacher, "
                            "data.student_prompt)"),), "each other's prompt"),
    ("teacher is greedy", (
        (f"sample_token({DRAW}, u[:, t])", "torch.where(teacher_writes, q.argmax(-1), "
         "sample_token(s, u[:, t]))"),), "its most likely one"),
    ("for ever", (("    for t in range", "    on = torch.zeros_like(alive)\n"
                   "    for t in range"),
                  (JUDGE, f"(on := on | ({JUDGE}))")),
     "the rest of the response, too"),
    ("the first token decides", ((JUDGE, f"first if t else (first := {JUDGE})"),),
     "the first token decides"),
    ("a mixture", ((DRAW, "torch.where(teacher_writes[:, None], torch.logaddexp("
                    "s.log_softmax(-1), q.log_softmax(-1)), s)"),), "from a mixture"),
    ("never", ((JUDGE, f"({JUDGE}) & False"),), "with tau 0.0 the student writes all"),
    ("always", ((JUDGE, f"({JUDGE}) | True"),), "with tau inf the teacher writes all"),
    ("KL without temperature", (
        (JUDGE, 'kl_reference(s * cfg.temperature, q * cfg.temperature, "forward") > '
         "tau"),), "the KL has no temperature"),
    ("drawn without temperature", ((DRAW, f"{DRAW} * cfg.temperature"),),
     "draws without the temperature"),
    ("mean over the batch", ((JUDGE, 'kl_reference(s, q, "forward").mean() > tau'),
                             (DRAW, "torch.where(teacher_writes, q, s)")),
     "a mean over the batch"),
    ("another number", (("u[:, t])", "u.roll(-1, 1)[:, t])"),),
     "the number of another place"),
    ("torch's generator", ((f"sample_token({DRAW}, u[:, t])",
                            f"torch.multinomial({DRAW}.softmax(-1), 1)[:, 0]"),),
     "torch's own generator"),
    ("goes on behind the end", ((PUT, "token"), (COUNT, COUNT.replace(
        "(response != tok.end).sum(1) + 1", "(response != tok.end).sum(1) + 9"))),
     "goes on behind its end"),
    ("end not in the mask", ((" < n_tokens[:, None]", " < n_tokens[:, None] - "
                              "(response[range(len(n_tokens)), n_tokens - 1] == "
                              "tok.end)[:, None].long()"),),
     "leaves the end of a response out"),
    ("rest is zero", (("return response[:, : mask.size(1)], mask",
                       "return response[:, : mask.size(1)] * mask, mask"),),
     "behind a response stands"),
    ("not trimmed", (("torch.arange(int(n_tokens.max())", "torch.arange(u.size(1)"),),
     "columns"),
    ("dropout", (("    student.eval(), teacher.eval()\n", ""),), "with dropout"),
    ("stays in eval", (("student.train(training[0]), teacher", "teacher"),),
     "was in train mode"),
    ("ends in train", (("student.train(training[0]), teacher.train(training[1])",
                        "student.train()"),), "was in eval mode"),
)  # fmt: skip

RIGHTS = (
    (
        "row after row, without padding",
        """
@torch.no_grad()
def speculative_responses(student, teacher, batch, tok, cfg, tau, step):
    modes = student.training, teacher.training
    student.eval()
    teacher.eval()
    u = data.get_uniform(batch, cfg.max_new_tokens, cfg.seed, step, "cpu")
    rows = []
    for example, numbers in zip(batch, u):
        bare = data.student_prompt(example, tok)
        shown = data.teacher_prompt(example, tok)
        row = []
        while len(row) < len(numbers) and tok.end not in row:
            s = student(torch.tensor([bare + row]))[:, -1] / cfg.temperature
            q = teacher(torch.tensor([shown + row]))[:, -1] / cfg.temperature
            log_s, log_q = s.log_softmax(-1), q.log_softmax(-1)
            kl = (log_q.exp() * (log_q - log_s)).sum()
            drawn = sample_token(q if kl > tau else s, numbers[None, len(row)])
            row.append(drawn.item())
        rows.append(row)
    student.train(modes[0])
    teacher.train(modes[1])
    response, lengths = data.pad_right(rows, tok.end, "cpu")
    return response, torch.arange(response.size(1)) < lengths[:, None]
""",
    ),
    (
        "two caches, as the variant has it",
        """
from model import KVCache

@torch.no_grad()
def speculative_responses(student, teacher, batch, tok, cfg, tau, step):
    device, was = next(student.parameters()).device, student.training
    drops, teacher.dropout = teacher.dropout, 0.0
    bare = data.pad_batch(data.student_prompt, batch, tok, device)
    shown = data.pad_batch(data.teacher_prompt, batch, tok, device)
    u = data.get_uniform(batch, cfg.max_new_tokens, cfg.seed, step, device)
    both = [(student.eval(), *bare), (teacher, *shown)]
    B, R = u.size()
    caches = [KVCache(m.config, p, n, R, m.dtype) for m, p, n in both]
    last = [
        m.hidden(p, cache=cache)[range(B), n - 1]
        for (m, p, n), cache in zip(both, caches)
    ]
    columns, ended = [], torch.zeros(B, dtype=torch.bool)
    lengths = torch.zeros(B, dtype=torch.long)
    for t in range(R):
        s, q = (m.logits(x) / cfg.temperature for (m, *_), x in zip(both, last))
        far = kl_reference(s, q, "forward") > tau
        by_both = sample_token(s, u[:, t]), sample_token(q, u[:, t])
        token = torch.where(far, by_both[1], by_both[0])
        columns.append(torch.where(ended, tok.end, token))
        lengths += ~ended
        ended |= token == tok.end
        if ended.all() or t == R - 1:
            break
        last = [
            m.hidden(columns[-1][:, None], n + t, cache)[:, 0]
            for (m, _, n), cache in zip(both, caches)
        ]
    student.train(was)
    teacher.dropout = drops
    response = torch.stack(columns, 1)
    return response, torch.arange(response.size(1)) < lengths[:, None]
""",
    ),
)

EXERCISE = Exercise(
    id="e17",
    functions=("extra.py speculative_responses",),
    title="Speculative self-distillation",
    goal="Put one knob between off-policy distillation and SDFT: who writes a token.",
    paper="Talaei et al. 2026 (agu18dec.github.io/ssd); tau = infinity is section 3 of "
    "arXiv 2601.19897",
    difficulty=3,
    minutes=45,
    points=6,
    run_time="in 3 seconds; the training job takes 40 minutes, see below",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    wire=(
        ("sdft.py", "import data\nfrom model",
         "import data\nimport extra as exercises\nfrom model"),
        ("sdft.py", "get_responses(student, micro, tok, cfg, step)",
         "exercises.speculative_responses(\n"
         "                student, teacher, micro, tok, cfg, 0.3, step)"),
    ),
    extra=True,
)  # fmt: skip
