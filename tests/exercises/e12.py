"""e12: memory, the loss in chunks. Grader: test_e12_chunked_loss.py"""

from kit import Exercise

SHEET = """
The loss compares N tokens over a vocabulary of V. With 1,024 tokens and Qwen's 151,665
the logits of one model are 0.6 GB, and autograd keeps several such tensors for its
backward pass. None of them has to exist: rows of a loss do not know each other, and the
gradient of a row is known as soon as its logits are. Write forward and backward of
ChunkedLoss in model.py, an autograd.Function that takes hidden states and gives the
loss, a few rows at a time. chunked_nll (SFT) and chunked_kl (SDFT) both call it.

forward(ctx, hidden, head, weight, temperature, row_loss)
    hidden (N, C), in any dtype, and head (V, C); the logits are
    hidden @ head.T / temperature, (N, V), in the head's dtype. weight (N,), of the
    head's dtype, too; row_loss: the loss itself, a function, see below.
    Returns sum_n weight_n * loss_n, a scalar, in nats.
backward(ctx, grad)
    grad is what comes from upstream, a scalar. Returns one gradient for each of the
    five arguments of forward: over hidden (N, C), over head (V, C), three times None.

What you are given:
- row_loss(s, w, rows): s are the logits (chunk, V) of some rows, w (chunk,) a number
  for each, rows a slice that says which of the N they are. It returns their losses
  (chunk,), not weighted, and w * dloss/ds, (chunk, V). What was in s may be overwritten
  then. Call it once for each row: chunked_kl counts in it what is recorded.
- chunk_rows(head): how many rows of logits to make at a time. Use it.
- make_logits(hidden, head, temperature) makes the logits of the hidden states.

The rules: no tensor (N, V), in forward or backward, and none that is kept in pieces.
The size of the chunks changes no result. N may be 0. Hidden states in bfloat16 are cast
to the head's dtype first, and get their gradient in bfloat16. Nothing that you are
given may be changed; backward may be called twice (retain_graph). The logits are
divided by the temperature: their gradient is, too.

What to look at when it runs: with oracles.LargestTensor print the largest tensor of
your version and of kl_reference on dense logits, for 1,000 and for 2,000 rows. Then
time both: what is saved in memory costs little time, or none; why?
"""

HINTS = (
    """
Direction. The loss is a sum over rows, so its gradient over the hidden states is known
row by row, and that over the head is a sum over rows. Once the chunk's dloss/dlogits
is known, both follow by a matrix product, and the logits are not needed any more.
So the forward pass can do it all, and the backward pass only multiplies.
""",
    """
Plan. In forward: dh = zeros (N, C), dW = zeros (V, C), losses (N,). For each chunk,
rows = slice(i, i + chunk_rows(head)): make_logits of hidden[rows]; row_loss with
weight[rows] / temperature gives the losses and ds; dh[rows] = ds @ head; dW += ds.T @
hidden[rows]. Keep dh and dW by ctx.save_for_backward. In backward: both times grad.
(Inside forward grad mode is off; if you want autograd for a chunk, torch.enable_grad()
and torch.autograd.grad.)
""",
    """
Almost the code.
    h = hidden.to(head.dtype)
    for i in range(0, len(h), chunk_rows(head)):
        rows = slice(i, i + chunk_rows(head))
        s = make_logits(h[rows], head, temperature)
        losses[rows], ds = row_loss(s, weight[rows] / temperature, rows)
        dh[rows] = ...
        dW += ...
    ctx.save_for_backward(dh, dW)
    return (losses * weight).sum()
and backward:
    dh, dW = ctx.saved_tensors
    return dh * grad, dW * grad, None, None, None
""",
)

LOGITS = "make_logits(h[rows], head, temperature)"
ROWS = "losses[rows], ds = row_loss(s, weight[rows] / temperature, rows)"
SLICE = "rows = slice(i, i + chunk_rows(head))"
STARTS = "range(0, len(h), chunk_rows(head))"
DH = "torch.mm(ds, head, out=dh[rows])"
HEAD = "dW.addmm_(ds.T, h[rows])"
LOSS = "return (losses * weight).sum()"
RETURN = "return (dh * grad).to(ctx.dtype), dW * grad, None, None, None"

IN_LISTS = '''
class ChunkedLoss:
    @staticmethod
    def forward(ctx, hidden, head, weight, temperature, row_loss):
        n, W = chunk_rows(head), head.detach()
        losses, dh, dW, kept = [weight[:0]], [hidden[:0]], 0 * W, []
        for i in range(0, len(hidden), n):
            j = min(len(hidden), i + n)
            with torch.enable_grad():
                h = hidden[i:j].detach().to(W.dtype).requires_grad_()
                s = h @ W.T / temperature
            loss, ds = row_loss(s.detach().clone(), weight[i:j], slice(i, j))
            losses.append(loss)
            dh.append(torch.autograd.grad(s, h, ds)[0].to(hidden.dtype))
            dW = dW + ds.T @ h.detach() / temperature
            kept.append(ds)
        ctx.save_for_backward(torch.cat(dh), dW)
        return torch.dot(torch.cat(losses), weight)

    @staticmethod
    def backward(ctx, grad):
        return *(x * grad for x in ctx.saved_tensors), None, None, None
'''

RECOMPUTE = '''
class ChunkedLoss:
    @staticmethod
    def forward(ctx, hidden, head, weight, temperature, row_loss):
        ctx.given = hidden.detach(), head.detach(), weight, temperature, row_loss
        h, losses = hidden.to(head.dtype), torch.zeros_like(weight)
        for i in range(0, len(h), chunk_rows(head)):
            rows = slice(i, i + chunk_rows(head))
            s = make_logits(h[rows], head, temperature)
            losses[rows] = row_loss(s, weight[rows], rows)[0]
        return (losses * weight).sum()

    @staticmethod
    def backward(ctx, grad):
        hidden, head, weight, temperature, row_loss = ctx.given
        h = hidden.to(head.dtype)
        dh, dW, n = torch.zeros_like(h), torch.zeros_like(head), chunk_rows(head)
        for i in range(0, len(h), n):
            rows = slice(i, i + n)
            s = make_logits(h[rows], head, temperature)
            ds = row_loss(s, grad * weight[rows] / temperature, rows)[1]
            dh[rows] = ds @ head
            dW += ds.T @ h[rows]
        return dh.to(hidden.dtype), dW, None, None, None
'''

MUTANTS = (
    ("all rows at once", ((STARTS, "range(min(1, len(h)))"),
     (SLICE, "rows = slice(0, len(h))")), "the forward pass makes a tensor"),
    ("all rows at once in backward", RECOMPUTE.replace("(head), chunk_rows(head)\n",
     "(head), len(h) + 1\n"), "the backward pass makes a tensor"),
    ("gradients kept in pieces", IN_LISTS.replace("            kept.append(ds)\n",
     "            kept.append(ds)\n        ctx.kept = kept\n"),
     "are kept for the backward pass"),
    ("each chunk again in backward", RECOMPUTE, "row_loss is called 2 times for row 0"),
    ("once for the losses, once for the gradients", ((ROWS, ROWS.replace(
     ", ds =", " =").replace("(s,", "(s.clone(),").replace("rows)", "rows)[0]") +
     "\n            ds = row_loss(s, weight[rows] / temperature, rows)[1]"),),
     "row_loss is called 2 times for row 0"),
    ("the last chunk alone", ((HEAD, "torch.mm(ds.T, h[rows], out=dW)"),),
     "is that of the last chunk"),
    ("the last chunk is missing", ((STARTS, "range(0, max(1, len(h) - chunk_rows(head))"
     ", chunk_rows(head))"),), "the last chunk of rows is missing"),
    ("the rows of the first chunk", ((ROWS, ROWS.replace(" rows)",
     " slice(0, len(s)))")),), "is told the rows of the first chunk each time"),
    ("gradient without 1 / temperature", ((ROWS, ROWS.replace(" / temperature", "")),),
     "lacks 1 / temperature"),
    ("1 / temperature twice", ((ROWS, ROWS.replace("temperature", "temperature**2")),),
     "has 1 / temperature twice"),
    ("logits divided twice", ((LOGITS, f"{LOGITS} / temperature"),),
     "make_logits has divided by it"),
    ("temperature forgotten", ((LOGITS, "make_logits(h[rows], head)"),),
     "the temperature is not in yours"),
    ("loss divided by the temperature", ((LOSS, f"{LOSS} / temperature"),),
     "that is for the gradient"),
    ("upstream forgotten", ((RETURN, "return dh.to(ctx.dtype), dW, None, None, None"),),
     "not multiplied by what comes from upstream"),
    ("upstream forgotten for the head", ((RETURN, RETURN.replace("dW * grad", "dW")),),
     "over the head is not multiplied by what comes from upstream"),
    ("weights not in the gradient", ((ROWS, ROWS.replace("weight[rows] / temperature",
     "torch.ones_like(weight[rows]) / temperature")),),
     "lacks the weights"),
    ("weights not in the loss", ((LOSS, "return losses.sum()"),),
     "the weights are not in the loss"),
    ("weights twice", ((LOSS, "return (losses * weight**2).sum()"),),
     "the weights are in the loss of yours twice"),
    ("mean", ((LOSS, "return (losses * weight).mean() if len(losses) else "
     "losses.sum()"),), "is a mean"),
    ("what is left in s is the gradient", ((DH, DH.replace("ds", "s")),
     (HEAD, HEAD.replace("ds", "s"))), "takes s for the gradient"),
    ("in place in backward", ((RETURN, "return dh.mul_(grad), dW.mul_(grad), None, "
     "None, None"),), "in place"),
    ("logits in bfloat16", ((LOGITS, "make_logits(hidden[rows], "
     "head.to(hidden.dtype), temperature).to(head.dtype)"),), "logits are float32"),
    ("errors of row_loss are caught", ((ROWS, f"try:\n                {ROWS}\n"
     "            except AssertionError:\n                continue"),),
     "is not refused"),
    ("weight changed in place", ((ROWS, ROWS.replace(" / temperature",
     ".div_(temperature)")),), "changes weight"),
    ("no rows", IN_LISTS.replace("[hidden[:0]]", "[]"), "it ended with"),
    ("hidden states get no gradient", ((RETURN, RETURN.replace(
     "(dh * grad).to(ctx.dtype)", "None")),), "over the hidden"),
)  # fmt: skip

RIGHTS = (
    ("lists of chunks, the gradient of a chunk by autograd", IN_LISTS),
    (
        "row after row, only the gradients that are wanted",
        '''
class ChunkedLoss:
    @staticmethod
    def forward(ctx, hidden, head, weight, temperature, row_loss):
        total, wide = 0 * weight.sum(), hidden.to(head.dtype)
        ctx.dh, ctx.dW = torch.zeros_like(wide), torch.zeros_like(head)
        for n in range(len(hidden)):
            s = head @ wide[n] / temperature
            loss, ds = row_loss(s[None], weight[n : n + 1], slice(n, n + 1))
            total += weight[n] * loss[0]
            ds = ds[0] / temperature
            if ctx.needs_input_grad[0]:
                ctx.dh[n] = ds @ head
            if ctx.needs_input_grad[1]:
                ctx.dW += torch.outer(ds, wide[n])
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        grads = (grad * ctx.dh).to(ctx.dtype), grad * ctx.dW
        wanted = ctx.needs_input_grad
        return *(g if w else None for g, w in zip(grads, wanted)), None, None, None
''',
    ),
    (
        "equal chunks by tensor_split, the weights multiplied in last",
        '''
class ChunkedLoss:
    @staticmethod
    def forward(ctx, hidden, head, weight, temperature, row_loss):
        places = torch.arange(len(hidden), device=hidden.device)
        h, losses = hidden.to(head.dtype), weight.new_zeros(len(hidden))
        dh, dW = torch.zeros_like(h), torch.zeros_like(head)
        for part in places.tensor_split(-(-len(h) // chunk_rows(head)) or 1):
            if len(part):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                s = make_logits(h[rows], head, temperature)
                losses[rows], ds = row_loss(s, torch.ones_like(weight[rows]), rows)
                share = weight[rows, None] / temperature
                dh[rows] = share * (ds @ head)
                dW += (share * ds).T @ h[rows]
        ctx.save_for_backward(dh.to(hidden.dtype), dW)
        return weight @ losses

    @staticmethod
    def backward(ctx, grad):
        over_hidden, over_head = ctx.saved_tensors
        return over_hidden * grad, over_head * grad, None, None, None
''',
    ),
)

EXERCISE = Exercise(
    id="e12",
    functions=("model.py ChunkedLoss.forward", "model.py ChunkedLoss.backward"),
    title="Memory: the loss in chunks",
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
