"""e11: the whole step of SDFT. Grader: test_e11_sdft_step.py"""

from kit import Exercise

SHEET = """
All parts in one place, once. Write sdft_step(student, teacher, optimizer, batch, u,
tok, cfg) of extra.py: one update of SDFT, from model.py and data.py. (sdft.py holds the
project's own, in pieces: look at it afterwards.) cfg.batch_size is that of a whole run
and has no part in it.

(compute_loss, get_responses and update_teacher of sdft.py are not there while it is
graded.)

1. The student writes a response to each prompt, sampled: generate(student, prompts,
   lengths, cfg.max_new_tokens, tok.end, u, cfg.temperature) gives response and mask,
   (B, R'). It is shown data.student_prompt, without the demonstration. The mask says
   which tokens count; the end of a response does.
2. Both models predict that same response, each after a context of its own: the student
   after data.student_prompt, the teacher after data.teacher_prompt, which holds the
   demonstration. data.pad_batch makes (tokens, lengths) of either;
   response_hidden(model, tokens, lengths, response, mask) gives the N hidden states
   that predict the tokens under the mask, model.logits the logits (N, V). Both are
   divided by cfg.temperature, as the sampler divided them.
3. The loss is KL(teacher || student) over the whole vocabulary, in nats: the mean over
   the tokens of a response, then over the B responses. The gradient goes into the
   student, through its logits: not through the sampling, and never into the teacher.
4. One step of the optimizer, on this gradient alone (what an earlier step left in
   p.grad does not count), clipped to a norm of at most cfg.grad_clip
   (torch.nn.utils.clip_grad_norm_).
5. Then the teacher follows: teacher <- ema_rate * student + (1 - ema_rate) * teacher in
   each parameter, with cfg.ema_rate and the student after the step.

Return (loss, response, mask), the loss as it was before the update and without a graph.
The caller decides on dropout: compute the loss in the mode that each model is in, and
leave it in that mode (generate switches dropout off for the response by itself).
Micro-batches, cfg.kl and cfg.skip_first_tokens are not asked for.

What to look at when it runs: print the responses (tok.decode) and the loss of each
token for one example, every ten steps: which tokens does the teacher know something
about, and when does the student know it, too? Then the whole job,
python tests/exercises/run.py mine --method sdft.
"""

HINTS = (
    """
Direction. Keep the two contexts apart from the first line on: two names, one for what
the student sees and one for what the teacher sees, and one response. Ask of each tensor
whether a gradient should go through it. Begin with one example and one token; the
grader does, too.
""",
    """
Plan. pad_batch twice; generate with the student's context; response_hidden and logits
for the student, then for the teacher under no_grad; both divided by the temperature;
kl_reference of the two, which is (N,); weights 1 / (tokens of its row) / B, (B, R'),
indexed with the mask; the sum. zero_grad, backward, clip_grad_norm_, step, in this
order. The teacher's average under no_grad, parameter by parameter.
""",
    """
Almost the code.
    bare = data.pad_batch(data.student_prompt, batch, tok, u.device)
    shown = ...
    response, mask = generate(student, *bare, cfg.max_new_tokens, ...)
    s = student.logits(response_hidden(student, *bare, response, mask)) / ...
    with torch.no_grad():
        t = ...
    weight = mask / mask.sum(1, keepdim=True) / len(batch)
    loss = (weight[mask] * kl_reference(s, t, "forward")).sum()
    optimizer.zero_grad()
    ...
    return loss.detach(), response, mask
""",
)

ROLLOUT = "        student, *bare, cfg.max_new_tokens, tok.end, u, cfg.temperature\n"
OF_STUDENT = "hidden = response_hidden(student, *bare, response, mask)"
OF_TEACHER = "hidden = response_hidden(teacher, *shown, response, mask)"
WEIGHT = "mask / mask.sum(1, keepdim=True) / len(batch)"
CLIP = "    torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)\n"
FOLLOW = """\
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.copy_(cfg.ema_rate * s + (1 - cfg.ema_rate) * t)
"""
AVERAGE = "t.copy_(cfg.ema_rate * s + (1 - cfg.ema_rate) * t)"

MUTANTS = (
    ("zero_grad at the end only", (("    optimizer.zero_grad()\n", ""),
     ("    return loss", "    optimizer.zero_grad()\n    return loss")),
     "where is zero_grad"),
    ("the demonstration leaks into the rollout", ((ROLLOUT,
     ROLLOUT.replace("*bare", "*shown")),), "the student reads a demonstration"),
    ("the teacher writes", ((ROLLOUT, ROLLOUT.replace("student, *bare",
     "teacher, *shown")),), "the teacher wrote the responses"),
    ("SFT's responses", (("    hidden = response_hidden(student", "    response, n = "
     "data.pad_batch(data.demo_response, batch, tok, u.device)\n    mask = torch."
     "arange(response.size(1)) < n[:, None]\n    hidden = response_hidden(student"),),
     "the responses are the demonstrations"),
    ("greedy", ((ROLLOUT, ROLLOUT.replace("cfg.temperature", "0")),),
     "the responses are the most likely tokens"),
    ("rollouts at temperature 1", ((ROLLOUT, ROLLOUT.replace("cfg.temperature", "1")),),
     "cfg.temperature is not used for the responses"),
    ("the end does not count", (("    hidden = response_hidden(student", "    mask = "
     "mask & (response != tok.end)\n    hidden = response_hidden(student"),
     (WEIGHT, "mask / mask.sum(1, keepdim=True).clamp(min=1) / len(batch)")),
     "the end of each response is missing"),
    ("the teacher sees no demonstration", ((OF_TEACHER,
     OF_TEACHER.replace("*shown", "*bare")),), "without the demonstration"),
    ("the student's loss sees the demonstration", ((OF_STUDENT,
     OF_STUDENT.replace("*bare", "*shown")),), "the demonstration leaks into the loss"),
    ("contexts exchanged", ((OF_STUDENT, OF_STUDENT.replace("*bare", "*shown")),
     (OF_TEACHER, OF_TEACHER.replace("*shown", "*bare"))),
     "the contexts of yours are exchanged"),
    ("reverse", (('"forward"', '"reverse"'),), "is KL(student || teacher)"),
    ("arguments exchanged", (("kl_reference(student_logits, teacher_logits",
     "kl_reference(teacher_logits, student_logits"),),
     "are student and teacher exchanged"),
    ("F.kl_div the wrong way", (('kl_reference(student_logits, teacher_logits, '
     '"forward")', "torch.nn.functional.kl_div(teacher_logits.log_softmax(-1), "
     "student_logits.log_softmax(-1), log_target=True, reduction='none').sum(-1)"),),
     "is KL(student || teacher)"),
    ("loss at temperature 1", (
     ("student_logits = student.logits(hidden) / cfg.temperature",
      "student_logits = student.logits(hidden)"),
     ("teacher_logits = teacher.logits(hidden) / cfg.temperature",
      "teacher_logits = teacher.logits(hidden)")), "is without the temperature"),
    ("sum over tokens", ((WEIGHT, "mask / len(batch)"),),
     "a sum over the tokens of a response"),
    ("sum over the batch", ((WEIGHT, "mask / mask.sum(1, keepdim=True)"),),
     "a sum over the batch"),
    ("mean over all tokens", ((WEIGHT, "mask / mask.sum()"),),
     "mean over all tokens of the batch"),
    ("no shift", (
     (OF_STUDENT, "hidden = response_hidden(student, *bare, torch.nn.functional.pad("
      "response, (0, 1)), torch.nn.functional.pad(mask, (1, 0)))"),
     (OF_TEACHER, "hidden = response_hidden(teacher, *shown, torch.nn.functional.pad("
      "response, (0, 1)), torch.nn.functional.pad(mask, (1, 0)))")),
     "from the state at the token itself"),
    ("gradients add up", (("    optimizer.zero_grad()\n", ""),),
     "where is zero_grad"),
    ("zero_grad after backward", (
     ("    optimizer.zero_grad()\n    loss.backward()\n",
      "    loss.backward()\n    optimizer.zero_grad()\n"),),
     "does not move"),
    ("no clipping", ((CLIP, ""),), "clip it after backward() and before step()"),
    ("clipped before backward", ((f"    loss.backward()\n{CLIP}",
     f"{CLIP}    loss.backward()\n"),), "clip it after backward() and before step()"),
    ("climbs", (("loss.backward()", "(-loss).backward()"),), "moves the wrong way"),
    ("two steps", (("optimizer.step()", "optimizer.step()\n    optimizer.step()"),),
     "it should be one"),
    ("a step for each example", (("loss.backward()", "loss.backward()\n    for _ in "
     "batch[1:]:\n        optimizer.step()"),), "it should be one"),
    ("the teacher follows before the step", (
     ("    optimizer.zero_grad()\n", f"{FOLLOW}    optimizer.zero_grad()\n"),
     (f"    optimizer.step()\n{FOLLOW}", "    optimizer.step()\n")),
     "the student of before the step"),
    ("the teacher is forgotten", ((FOLLOW, ""),), "the teacher does not follow"),
    ("rates exchanged", ((AVERAGE,
     "t.copy_((1 - cfg.ema_rate) * s + cfg.ema_rate * t)"),), "rates of the teacher's"),
    ("a live teacher", ((AVERAGE, "t.copy_(s)"),), "is a copy of the student"),
    ("the teacher gets a gradient", (
     ("    with torch.no_grad():\n        hidden = response_hidden(teacher",
      "    if True:\n        hidden = response_hidden(teacher"),
     ('kl_reference(student_logits, teacher_logits, "forward")', "(teacher_logits."
      "softmax(-1) * (teacher_logits.log_softmax(-1) - student_logits.log_softmax(-1)))"
      ".sum(-1)")), "of the teacher has a gradient"),
    ("the graph is returned", (("loss.detach()", "loss"),), "still has its graph"),
    ("eval mode is left on", (("    optimizer.zero_grad()\n",
     "    student.eval()\n    optimizer.zero_grad()\n"),), "is in eval mode"),
    ("the student is detached", (("(weight[mask] * kl)", "(weight[mask] * kl.detach() "
     "+ 0 * student_logits.sum(-1))"),), "does not move"),
    ("only the head learns", ((OF_STUDENT, f"{OF_STUDENT}.detach()"),),
     "does not move"),
    ("each value clipped", (("clip_grad_norm_", "clip_grad_value_"),),
     "clip the norm, not each value"),
    ("the loss after the update", (("    return loss.detach()", "    logits = student."
     "logits(response_hidden(student, *bare, response, mask)) / cfg.temperature\n    "
     "loss = (weight[mask] * kl_reference(logits, teacher_logits)).sum()\n    "
     "return loss.detach()"),), "is that of the student after the update"),
)  # fmt: skip

RIGHTS = (
    (
        "one example after the other, without cache or padding, gradients added up",
        '''
from model import sample_token

def sdft_step(student, teacher, optimizer, batch, u, tok, cfg):
    optimizer.zero_grad()
    training, loss, rows = student.training, 0.0, []
    for example, numbers in zip(batch, u):
        bare = data.student_prompt(example, tok)
        shown = data.teacher_prompt(example, tok)
        row = []
        student.eval()
        for x in numbers:
            with torch.no_grad():
                logits = student(torch.tensor([bare + row]))[:, -1]
            row.append(sample_token(logits, x[None], cfg.temperature).item())
            if row[-1] == tok.end:
                break
        student.train(training)
        own = student(torch.tensor([bare + row]))[0, len(bare) - 1 : -1]
        log_s = (own / cfg.temperature).log_softmax(-1)
        q = teacher(torch.tensor([shown + row]))[0, len(shown) - 1 : -1].detach()
        q = (q / cfg.temperature).softmax(-1)
        kl = (q * (q.log() - log_s)).sum() / len(row) / len(batch)
        kl.backward()
        loss += kl.detach()
        rows.append(row)
    torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
    optimizer.step()
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.data.lerp_(s.data, cfg.ema_rate)
    R = max(len(row) for row in rows)
    response = torch.tensor([row + [tok.end] * (R - len(row)) for row in rows])
    mask = torch.arange(R) < torch.tensor([len(row) for row in rows])[:, None]
    return loss, response, mask
''',
    ),
    (
        "loss in chunks, gradients by autograd.grad and clipped by hand",
        '''
from model import chunked_kl
import sdft

def sdft_step(student, teacher, optimizer, batch, u, tok, cfg):
    contexts = [data.pad_batch(prompt, batch, tok, u.device)
                for prompt in (data.student_prompt, data.teacher_prompt)]
    response, mask = generate(student, *contexts[0], cfg.max_new_tokens, tok.end, u,
                              cfg.temperature)
    both = list(zip((student, teacher), contexts))
    hidden = [response_hidden(m, *context, response, mask) for m, context in both]
    heads = [model.head() for model, _ in both]
    n = mask.sum(1)
    weight = (1.0 / n / len(batch)).repeat_interleave(n)
    loss, _ = chunked_kl(*hidden, *heads, weight, "forward", cfg.temperature)
    params = list(student.parameters())
    grads = torch.autograd.grad(loss, params)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    scale = min(1.0, cfg.grad_clip / (norm.item() + 1e-6))
    for p, g in zip(params, grads):
        p.grad = g * scale
    optimizer.step()
    for p in params:
        p.grad = None
    with torch.no_grad():
        for (name, t), s in zip(teacher.named_parameters(), params):
            t += cfg.ema_rate * (s - t)
    return loss.detach(), response, mask
''',
    ),
    (
        "all R tokens of all rows, F.kl_div, and zero_grad at the end",
        '''
import torch.nn.functional as F

def sdft_step(student, teacher, optimizer, batch, u, tok, cfg):
    optimizer.zero_grad(set_to_none=False)
    with torch.no_grad():
        bare = data.pad_batch(data.student_prompt, batch, tok, "cpu")
        shown = data.pad_batch(data.teacher_prompt, batch, tok, "cpu")
        response, mask = generate(student, bare[0], bare[1], u.size(1), tok.end, u,
                                  temperature=cfg.temperature)
        everything = torch.ones_like(mask)
        q = teacher.logits(response_hidden(teacher, *shown, response, everything))
        q = (q / cfg.temperature).log_softmax(-1)
    p = student.logits(response_hidden(student, *bare, response, everything))
    p = (p / cfg.temperature).log_softmax(-1)
    kl = F.kl_div(p, q, log_target=True, reduction="none").sum(-1).view(mask.shape)
    loss = ((kl * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(student.parameters()), cfg.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        new = [torch.lerp(t, s, cfg.ema_rate)
               for t, s in zip(teacher.parameters(), student.parameters())]
        for t, x in zip(teacher.parameters(), new):
            t.copy_(x)
    return loss.detach().clone(), response, mask
''',
    ),
)

EXERCISE = Exercise(
    id="e11",
    functions=("extra.py sdft_step",),
    title="The whole step of SDFT",
    goal="Put rollout, teacher, loss, optimizer and average together, in order.",
    paper="arXiv 2601.19897, section 3, Algorithm 1 (with the loss its results had)",
    difficulty=4,
    minutes=75,
    points=10,
    run_time="in 2 seconds; the training job takes minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
    not_with=("sdft.compute_loss", "sdft.get_responses", "sdft.update_teacher",
              "sdft.train"),
    changes=("student", "teacher", "optimizer"),
    wire=(
        (
            "sdft.py",
            """\
            response, mask = get_responses(student, micro, tok, cfg, step)
            loss, extra = compute_loss(
                student, teacher, micro, response, mask, tok, cfg, step
            )
            loss.backward()
            accumulate(sums, loss, response, mask, extra, tok, cfg)
""",
            """\
            from extra import sdft_step

            assert cfg.micro_batches == 1, "e11 makes the update of a whole batch"
            u = data.get_uniform(micro, cfg.max_new_tokens, cfg.seed, step, device)
            loss, response, mask = sdft_step(
                student, teacher, optimizer, micro, u, tok, cfg
            )
            accumulate(sums, loss, response, mask, {}, tok, cfg)
""",
        ),
        (
            "sdft.py",
            """\
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, cfg)  # critical: once per update, after it
""",
            "        optimizer.zero_grad()  # sdft_step has made the update\n",
        ),
    ),
)
