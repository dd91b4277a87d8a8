"""e12: memory, the fused kernel. Grader: test_e12_fused_kernel.py"""

from kit import Exercise

SHEET = """
The loss compares N tokens over a vocabulary of V. With 1,024 tokens and Qwen's 151,665
the logits of one model are 0.6 GB, and autograd keeps several such tensors for its
backward pass. None of them has to exist: rows of the KL do not know each other, and the
gradient has a closed form. Write forward and backward of FusedLinearKL in model.py, an
autograd.Function that takes hidden states and gives the loss, a few rows at a time.

forward(ctx, hidden, head, temperature, teacher_logits, weight, kl, grad)
    hidden (N, C), in any dtype, and head (V, C) of the student; its logits are
    hidden @ head.T / temperature, (N, V), in the head's dtype. teacher_logits:
    LazyLogits of the teacher, with hidden states and head of its own. weight (N,); kl
    "forward", "reverse" or "jsd"; grad: will anybody ask for gradients?
    Returns (loss, values): sum_n weight_n * value_n, a scalar, and the divergences
    (N,), not weighted, in nats. values are ctx.mark_non_differentiable.
backward(ctx, grad, _)
    grad is what comes from upstream, a scalar. Returns one gradient for each of the
    seven arguments of forward: over hidden (N, C), over head (V, C), five times None.

What the file gives you:
- LazyLogits(hidden, head, temperature): .rows(i, j) makes the logits of rows i to
  j - 1, .chunks() says which rows to make at a time. Use both; with out= rows() writes
  into a buffer of yours.
- kl_rows(s, t, weight, kl, grad): from logits s and t (rows, V), which belong to you,
  the values (rows,); if grad, it overwrites s with weight * dKL/ds. kl_reference and
  autograd inside a chunk would do as well.
- check_kl((N, V) of the one, (N, V) of the other, kl) raises ValueError if they differ.

The rules: no tensor (N, V), in forward or backward, and none that is kept in pieces.
The size of the chunks changes no result. N may be 0. Hidden states in bfloat16 are cast
to the head's dtype first. Nothing that you are given may be changed; backward may be
called twice (retain_graph). The logits are divided by the temperature: their gradient
is, too.

What to look at when it runs: with oracles.LargestTensor print the largest tensor of
your version and of kl_reference on dense logits, for 1,000 and for 2,000 rows. Then
time both: what is saved in memory costs little time, or none; why?
"""

HINTS = (
    """
Direction. The loss is a sum over rows, so its gradient over the hidden states is known
row by row, and that over the head is a sum over rows. Once the chunk's dKL/dlogits
stands there, both follow by a matrix product, and the logits are not needed any more.
So the forward pass can do it all, and the backward pass only multiplies.
""",
    """
Plan. In forward: dh = zeros (N, C), dW = zeros (V, C), values (N,). For each (i, j) of
chunks(): s = student.rows(i, j), t = teacher.rows(i, j); kl_rows with weight[i:j] /
temperature leaves the gradient in s; dh[i:j] = s @ head; dW += s.T @ hidden[i:j]. Keep
dh and dW by ctx.save_for_backward. In backward: both times grad. (Inside forward grad
mode is off; if you want autograd for a chunk, torch.enable_grad() and
torch.autograd.grad.)
""",
    """
Almost the code.
    student = LazyLogits(hidden.to(head.dtype), head, temperature)
    check_kl((len(hidden), len(head)), ..., kl)
    for i, j in student.chunks():
        s, t = student.rows(i, j), teacher_logits.rows(i, j)
        values[i:j] = kl_rows(s, t, weight[i:j] / temperature, kl, grad)
        if grad:
            dh[i:j] = ...
            dW += ...
    loss = (values * weight).sum()
    ctx.save_for_backward(dh, dW)
    ctx.mark_non_differentiable(values)
    return loss, values
and backward:
    dh, dW = ctx.saved_tensors
    return dh * grad, dW * grad, None, None, None, None, None
""",
)

ROWS = "kl_rows(s, t, weight[i:j] / temperature, kl, grad)"
HEAD = "dW.addmm_(s.T, student.hidden[i:j])"
RETURN = "return (dh * grad).to(ctx.hidden_dtype), dW * grad, *[None] * 5"
S_BUFFER = "s = student.rows(i, j, out=s_buffer[: j - i])"
T_BUFFER = "t = teacher.rows(i, j, out=t_buffer[: j - i])"
LOSS = "loss = (values * weight).sum()"

# a whole class, with two holes: what is kept, and how the chunks are cut
RECOMPUTE = '''
class FusedLinearKL:
    @staticmethod
    def forward(ctx, hidden, head, temperature, teacher_logits, weight, kl, grad):
        student = LazyLogits(hidden, head, temperature)
        both = [(len(x.hidden), len(x.head)) for x in (student, teacher_logits)]
        check_kl(*both, kl)
        values = torch.zeros_like(weight)
        kept = []
        for i, j in CHUNKS:
            s, t = student.rows(i, j), teacher_logits.rows(i, j)
            values[i:j] = kl_reference(s, t, kl)
            kept.append(s)
        ctx.save_for_backward(hidden, head, weight)
        ctx.rest = temperature, teacher_logits, kl
        KEEP
        ctx.mark_non_differentiable(values)
        return (values * weight).sum(), values

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head, weight = ctx.saved_tensors
        temperature, teacher, kl = ctx.rest
        hidden, head = hidden.detach(), head.detach()
        dh, dW = [], torch.zeros_like(head)
        student = LazyLogits(hidden, head, temperature)
        for i, j in CHUNKS:
            h, w = hidden[i:j].requires_grad_(), head.requires_grad_()
            with torch.enable_grad():
                s = LazyLogits(h, w, temperature).rows(0, j - i)
                kl_values = kl_reference(s, teacher.rows(i, j).detach(), kl)
                total = (kl_values * weight[i:j]).sum() * grad
            over_h, over_w = torch.autograd.grad(total, (h, w))
            dh.append(over_h)
            dW += over_w
        dh = torch.cat(dh) if dh else torch.zeros_like(hidden)
        return dh, dW, None, None, None, None, None
'''


def recompute(chunks="student.chunks()", keep=""):
    return RECOMPUTE.replace("CHUNKS", chunks).replace("KEEP", keep)


BY_ROWS = '''
def row_of(s, t, kl):
    """The divergence of one row, and its gradient over s."""
    log_s, log_t = s.log_softmax(0), t.log_softmax(0)
    p, q = log_s.exp(), log_t.exp()
    if kl == "forward":
        return q @ (log_t - log_s), p - q
    if kl == "reverse":
        value = p @ (log_s - log_t)
        return value, p * (log_s - log_t - value)
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    own = p @ (log_s - log_m)
    return (q @ (log_t - log_m) + own) / 2, p * (log_s - log_m - own) / 2


class FusedLinearKL:
    @staticmethod
    def forward(ctx, hidden, head, temperature, teacher_logits, weight, kl, grad):
        teacher = teacher_logits
        if (len(hidden), len(head)) != (len(teacher.hidden), len(teacher.head)):
            raise ValueError("shapes")
        values, wide = torch.zeros_like(weight), hidden.to(head.dtype)
        dh, dW = torch.zeros_like(wide), torch.zeros_like(head)
        for n in range(len(hidden)):
            s = head @ wide[n] / temperature
            t = teacher.head @ teacher.hidden[n].to(head.dtype) / teacher.temperature
            values[n], ds = row_of(s, t, kl)
            if grad:
                ds = ds * weight[n] / temperature
                dh[n] = ds @ head
                dW += torch.outer(ds, wide[n])
        ctx.dh, ctx.dW, ctx.dtype = dh, dW, hidden.dtype
        ctx.mark_non_differentiable(values)
        return (values * weight).sum(), values

    @staticmethod
    def backward(ctx, grad, _):
        return (grad * ctx.dh).to(ctx.dtype), grad * ctx.dW, *[None] * 5
'''

MUTANTS = (
    ("all rows at once", (("chunks = student.chunks()",
     "chunks = [(0, len(hidden))]"),), "the forward pass makes a tensor"),
    ("all rows at once in backward", {"model.py": recompute().replace(
     "for i, j in student.chunks():\n            h, w",
     "for i, j in [(0, len(hidden))]:\n            h, w")},
     "the backward pass makes a tensor"),
    ("logits kept in pieces", recompute(keep="ctx.kept = kept"),
     "are kept for the backward pass"),
    ("the last chunk alone", ((HEAD, "torch.mm(s.T, student.hidden[i:j], out=dW)"),),
     "is that of the last chunk"),
    ("the last chunk is missing", (("for i, j in chunks:", "for i, j in chunks[:-1] or "
     "chunks:"),), "the last chunk of rows is missing"),
    ("gradient without 1 / temperature", ((ROWS, ROWS.replace(" / temperature", "")),),
     "lacks 1 / temperature"),
    ("1 / temperature twice", ((ROWS, ROWS.replace("temperature", "temperature**2")),),
     "has 1 / temperature twice"),
    ("logits divided twice", ((S_BUFFER, f"{S_BUFFER}.div_(temperature)"),
     (T_BUFFER, f"{T_BUFFER}.div_(temperature)")), "rows() has divided by it"),
    ("temperature forgotten", (
     ("LazyLogits(hidden.to(head.dtype), head, temperature)",
      "LazyLogits(hidden.to(head.dtype), head)"),
     ("teacher = teacher_logits\n",
      "teacher = teacher_logits._replace(temperature=1.0)\n")),
     "the temperature is not in yours"),
    ("upstream forgotten", ((RETURN, "return dh.to(ctx.hidden_dtype), dW, "
     "*[None] * 5"),), "not multiplied by what comes from upstream"),
    ("upstream forgotten for the head", ((RETURN, RETURN.replace("dW * grad", "dW")),),
     "over the head is not multiplied by what comes from upstream"),
    ("weights not in the gradient", ((ROWS, ROWS.replace("weight[i:j] / temperature",
     "torch.ones_like(weight[i:j]) / temperature")),),
     "the weights are not in the gradient"),
    ("weights not in the loss", ((LOSS, "loss = values.sum()"),),
     "the weights are not in the loss"),
    ("mean", ((LOSS, "loss = (values * weight).mean() if len(values) else "
     "values.sum()"),), "is a mean"),
    ("values weighted", ((LOSS, "values *= weight\n        loss = values.sum()"),),
     "is weighted"),
    ("student and teacher exchanged", ((ROWS, ROWS.replace("s, t", "t, s")),),
     "are student and teacher exchanged"),
    ("one buffer for both", ((T_BUFFER, T_BUFFER.replace("t_buffer", "s_buffer")),),
     "share one buffer"),
    ("in place in backward", ((RETURN, "return dh.mul_(grad), dW.mul_(grad), "
     "*[None] * 5"),), "in place"),
    ("logits in bfloat16", (("LazyLogits(hidden.to(head.dtype), head, temperature)",
     "LazyLogits(hidden, head.to(hidden.dtype), temperature)"),
     (S_BUFFER, "s = student.rows(i, j).to(head.dtype)"),
     (HEAD, "dW.addmm_(s.T, hidden[i:j].to(head.dtype))"),
     ("torch.mm(s, head, out=dh[i:j])", "dh[i:j] = s @ head")),
     "logits are float32"),
    ("shapes not checked", BY_ROWS.replace('raise ValueError("shapes")', "pass"),
     "is not refused with ValueError"),
    ("weight changed in place", ((ROWS, "kl_rows(s, t, weight[i:j].div_(temperature), "
     "kl, grad)"),), "weight changes"),
    ("no rows", recompute().replace("torch.cat(dh) if dh else torch.zeros_like(hidden)",
     "torch.cat(dh)"), "it ended with"),
    ("hidden states get no gradient", ((RETURN, RETURN.replace(
     "(dh * grad).to(ctx.hidden_dtype)", "None")),), "over the hidden"),
    ("another direction's gradient", ((ROWS, 'kl_rows(s.clone(), t, weight[i:j] / '
     'temperature, kl, grad)\n            kl_rows(s, t, weight[i:j] / temperature, '
     '"forward", grad)'),), "the gradient of kl 'reverse'"),
)  # fmt: skip

RIGHTS = (
    ("nothing kept but the arguments: each chunk again in backward, by autograd",
     recompute()),
    (
        "gradients in forward, by autograd inside a chunk, no row kernel",
        '''
class FusedLinearKL:
    @staticmethod
    def forward(ctx, hidden, head, temperature, teacher_logits, weight, kl, grad):
        N, V = len(hidden), len(head)
        check_kl((N, V), (len(teacher_logits.hidden), len(teacher_logits.head)), kl)
        student = LazyLogits(hidden.detach(), head.detach(), temperature)
        values, dh, dW = [weight[:0]], [hidden[:0].to(head.dtype)], 0 * head
        for i, j in student.chunks():
            with torch.enable_grad():
                s = student.rows(i, j).requires_grad_()
                value = kl_reference(s, teacher_logits.rows(i, j), kl)
                (ds,) = torch.autograd.grad((value * weight[i:j]).sum(), s)
            values.append(value.detach())
            dh.append(ds @ head / temperature)
            dW = dW + ds.T @ hidden[i:j].to(head.dtype) / temperature
        values = torch.cat(values)
        ctx.save_for_backward(torch.cat(dh).to(hidden.dtype), dW)
        ctx.mark_non_differentiable(values)
        return torch.dot(values, weight), values

    @staticmethod
    def backward(ctx, grad, _):
        return *(x * grad for x in ctx.saved_tensors), None, None, None, None, None
''',
    ),
    (
        "row after row, closed forms",
        BY_ROWS,
    ),
)

EXERCISE = Exercise(
    id="e12",
    functions=("model.py FusedLinearKL.forward", "model.py FusedLinearKL.backward"),
    title="Memory: the fused kernel",
    goal="Compute the loss and its gradient without ever making all logits.",
    paper="arXiv 2601.19897, appendix A.1: the whole vocabulary, at each token",
    difficulty=5,
    minutes=90,
    points=12,
    run_time="in 2 seconds; the training job takes minutes",
    sheet=SHEET,
    hints=HINTS,
    mutants=MUTANTS,
    rights=RIGHTS,
)
