"""Functions that an exercise asks for and the project does not have: their references.

Each stands alone; nothing here is used by the project. `make.py eNN --to mine` copies
one of them, emptied.
"""

import hashlib
import io
import math
import os
import shutil

import torch

import data
from model import generate, kl_reference, response_hidden, sample_token


def log_softmax(x):
    """The logarithm of the softmax over the last dimension.

    Args: x, floating point (..., V); entries may be -inf (probability 0), but not all
        of a row.
    Returns: (..., V), dtype of x; -inf where x is. Differentiable in x.
    """
    x = x - x.amax(-1, keepdim=True).detach()
    return x - x.exp().sum(-1, keepdim=True).log()


def response_mask(ids, lengths, end):
    """Which tokens of whole rows, prompt and response and pads, are the response.

    Args:
        ids: int64 (B, T): a prompt, its response right after it, then pads. A pad may
            be any token, `end` too; so may the tokens of a prompt.
        lengths: int64 (B,), tokens of each prompt, 1 to T.
        end: the token that ends a response.
    Returns: bool (B, T), true from the first token after the prompt up to and
        including the first end; to the last column if the response has none.
    """
    behind = torch.arange(ids.size(1), device=ids.device) >= lengths[:, None]  # (B, T)
    ends = (ids == end) & behind  # (B, T)
    before = ends.cumsum(1) - ends.long()  # (B, T) how many ends stand to the left
    return behind & (before == 0)


def reverse_kl(student_logits, teacher_logits, mask):
    """KL(student || teacher) over the whole vocabulary, in nats: the mean over the
    tokens of a response, then over the responses.

    Args:
        student_logits, teacher_logits: float (B, R, V). Where the mask is false they
            may hold anything, NaN too.
        mask: bool (B, R), true at the tokens that count. A row in which none counts
            adds 0 to the sum over the responses, which is divided by B all the same.
    Returns: a scalar, differentiable in student_logits; the teacher gets no gradient.
    """
    log_s = torch.log_softmax(student_logits[mask], -1)  # (N, V)
    log_t = torch.log_softmax(teacher_logits.detach()[mask], -1)  # (N, V)
    values = (log_s.exp() * (log_s - log_t)).sum(-1)  # (N,)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)  # (B, R)
    return (weight[mask] * values).sum()


def kl_surrogate(student_logits, teacher_logits, tokens, mask, estimator):
    """One number for each response, whose gradient estimates that of KL(student ||
    teacher) of whole responses.

    Args:
        student_logits, teacher_logits: float (B, R, V), at each token of responses that
            the student sampled.
        tokens: int64 (B, R), what was sampled; mask: bool (B, R), which of them count.
        estimator: "token", "full" or "rao_blackwell".
    Returns: (B,), sums over the tokens; differentiable in student_logits alone. The
        value may be anything, the gradient is the estimate.
    """
    log_p = torch.log_softmax(student_logits, -1)  # (B, R, V)
    log_q = torch.log_softmax(teacher_logits.detach(), -1)  # (B, R, V)
    own = log_p.gather(-1, tokens[..., None])[..., 0] * mask  # (B, R)
    if estimator == "token":
        other = log_q.gather(-1, tokens[..., None])[..., 0] * mask  # (B, R)
        return ((own - other).detach() * own).sum(1)
    k = (log_p.exp() * (log_p - log_q)).sum(-1) * mask  # (B, R)
    if estimator == "full":
        return k.sum(1)
    later = (k.sum(1, keepdim=True) - k.cumsum(1)).detach()  # (B, R) of all t > i
    return k.sum(1) + (own * later).sum(1)


def sdft_step(student, teacher, optimizer, batch, u, tok, cfg):
    """One update of SDFT: changes the student, then the teacher, in place.

    Args:
        student, teacher: GPT, with weights of their own.
        optimizer: over the student's parameters.
        batch: list of B data.Example.
        u: float (B, R) in [0, 1), with R = cfg.max_new_tokens: the sampler's numbers.
        tok: data.Tokenizer; cfg: sdft.Config, of which max_new_tokens, temperature,
            grad_clip and ema_rate count here.
    Returns: (loss, response, mask): the loss before the update, in nats per token, a
        scalar without a graph; what the student wrote, int64 (B, R') and bool (B, R').
    """
    bare = data.pad_batch(data.student_prompt, batch, tok, u.device)  # (B, P), (B,)
    shown = data.pad_batch(data.teacher_prompt, batch, tok, u.device)
    response, mask = generate(
        student, *bare, cfg.max_new_tokens, tok.end, u, cfg.temperature
    )  # (B, R'), (B, R')
    hidden = response_hidden(student, *bare, response, mask)  # (N, C)
    student_logits = student.logits(hidden) / cfg.temperature  # (N, V)
    with torch.no_grad():
        hidden = response_hidden(teacher, *shown, response, mask)  # (N, C)
        teacher_logits = teacher.logits(hidden) / cfg.temperature  # (N, V)
    weight = mask / mask.sum(1, keepdim=True) / len(batch)  # (B, R')
    kl = kl_reference(student_logits, teacher_logits, "forward")  # (N,)
    loss = (weight[mask] * kl).sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip)
    optimizer.step()
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.copy_(cfg.ema_rate * s + (1 - cfg.ema_rate) * t)
    return loss.detach(), response, mask


def forgetting(acc):
    """How much of each skill was lost since it was known best, by the last row.

    Args: acc, floating point (S, K): row i was measured after stage i (row 0: the
        base), column k is a skill; NaN where it was not measured, as for a skill that
        was not trained yet. It stays as it is.
    Returns: (K,), the best of the earlier rows minus the last row; below 0 for a skill
        that got better. NaN where the last row or all earlier ones are NaN.
    """
    earlier = acc[:-1]  # (S - 1, K)
    best = acc.new_full(acc.shape[1:], -math.inf)  # (K,)
    for row in earlier:
        best = torch.fmax(best, row)  # of a number and NaN: the number
    lost = best - acc[-1]
    return lost.masked_fill(best == -math.inf, math.nan)


def backward_transfer(acc):
    """What later stages did to the skills that were there before, as one number.

    Args: acc, (S, K), as in forgetting.
    Returns: a scalar: the last row minus the first number of each column, which is the
        skill as it was just learnt; the mean over the columns that have a number in the
        last row and in an earlier one; NaN if there is none. Below 0: forgotten.
    """
    changes = []
    for column in acc.T:  # (S,)
        measured = column[:-1][~column[:-1].isnan()]  # before the last row
        if len(measured) and not column[-1].isnan():
            changes.append(column[-1] - measured[0])
    return torch.stack(changes).mean() if changes else acc.new_full((), math.nan)


class Quiet:
    """What sdft.train needs of a run, and no files: after m.sdft.train(student,
    {"A": examples}, {}, tok, cfg, run) its last models are in run.models."""

    def load(self, models, optimizer, cfg, examples):
        self.models, self.records, self.evaluations = models, [], []
        return 0

    def progress(self, start, end):
        return range(start, end)

    def log(self, record):
        self.records.append(record)

    def all_reduce(self, student, sums):
        pass

    def save(self, step, models, optimizer):
        self.models = models

    def stop_wanted(self):
        return 0.0


@torch.no_grad()
def small_world(m, seed=16):
    """Something small to try m.sdft with, m a set of modules: student, teacher (other
    weights, float64, much of what they predict is the end), a batch of two examples,
    the tokenizer and a configuration. Change what you like in it."""
    tok, models = m.data.Tokenizer(), []
    config = m.model.GPTConfig(
        vocab_size=tok.vocab_size, n_tokens=tok.n_tokens, n_layer=1, n_head=2,
        n_kv_head=2, n_embd=16, n_inner=16, tie_weights=False,
    )  # fmt: skip
    for i in range(2):
        model, rng = m.model.GPT(config).double(), m.data.make_rng(seed, "small", i)
        model.dtype = torch.float64
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.copy_(p if p.dim() == 1 else noise * 0.35)
        # channel 0 is 1 for every token, and only the end's row of the head reads it
        model.wte.weight[:, 0], model.lm_head.weight[:, 0] = 1, 0
        model.h[0].attn.o_proj.weight[0] = model.h[0].mlp.down_proj.weight[0] = 0
        model.lm_head.weight[tok.end, 0] = 9
        models.append(model)
    teacher = models[1].requires_grad_(False).eval()
    texts = [
        ("garden cork: candle spoon tower", "advance so you get spoon tower candle"),
        ("kitchen horn: apple", "well friend"),
    ]
    batch = [m.data.Example(*text, "", id=i) for i, text in enumerate(texts)]
    cfg = m.sdft.Config(
        steps=2, batch_size=2, lr=0.002, warmup_steps=0, dropout=0.0, max_new_tokens=4,
        log_every=1, ema_rate=0.25,
    )  # fmt: skip
    return models[0].eval(), teacher, batch, tok, cfg


def check_sdft(m):
    """Raise AssertionError, with the reason, if m.sdft is broken; else return None.

    Args: m, a set of modules as attributes. m.sdft may be broken, in one place; m.data
        and m.model are right. Each call gets a set of its own: it may be patched.
    """
    student, teacher, batch, tok, cfg = small_world(m)

    # the response: the student's own, to the bare prompt
    bare = m.data.pad_batch(m.data.student_prompt, batch, tok, "cpu")
    u = m.data.get_uniform(batch, cfg.max_new_tokens, cfg.seed, 0, "cpu")
    own, _ = m.model.generate(student, *bare, cfg.max_new_tokens, tok.end, u)
    response, mask = m.sdft.get_responses(student, batch, tok, cfg, 0)
    assert torch.equal(response, own), "the responses are not the student's own"
    ends = (response == tok.end) & mask
    assert ends.any() and not mask.all(), "no response ends: try another seed"

    # the loss: KL(teacher || student), both after their own context; the teacher comes
    # from a model with dropout and is to have none
    teacher.dropout = 0.3
    teacher = m.sdft.make_teacher(teacher.train())
    loss, _ = m.sdft.compute_loss(student, teacher, batch, response, mask, tok, cfg, 1)
    teacher.eval()
    total = 0.0
    for example, row, counts in zip(batch, response, mask, strict=True):
        tokens, logits = row[counts].tolist(), []
        for model, prompt in (
            (student, m.data.student_prompt), (teacher, m.data.teacher_prompt)
        ):  # fmt: skip
            context = prompt(example, tok)
            ids = torch.tensor([context + tokens])
            logits.append(model(ids)[0, len(context) - 1 : -1])  # (R, V)
        total += m.model.kl_reference(*logits, "forward").mean() / len(batch)
    assert abs(loss - total) < 1e-4, f"the loss is {loss}, it should be {total}"

    # the average
    before = [p.clone() for p in teacher.parameters()]
    m.sdft.update_teacher(teacher, student, cfg)
    for old, new, s in zip(
        before, teacher.parameters(), student.parameters(), strict=True
    ):
        right = cfg.ema_rate * s + (1 - cfg.ema_rate) * old
        assert torch.allclose(new, right), "the teacher's average is wrong"

    # the loop: who responds, from which gradients, and when the teacher moves
    get_responses = m.sdft.get_responses

    def watch(model, *args):
        pairs = zip(model.parameters(), student.parameters(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs), "stale responses"
        left = [p for p in student.parameters() if p.grad is not None and p.grad.any()]
        assert not left, "the gradients of the step before are still there"
        return get_responses(model, *args)

    m.sdft.get_responses = watch
    cfg.ema_rate, run = 1.0, Quiet()  # the teacher is the student
    m.sdft.train(student, {"A": batch}, {}, tok, cfg, run)
    pairs = zip(run.models["teacher"].parameters(), student.parameters(), strict=True)
    assert all(torch.allclose(x, y) for x, y in pairs), "the teacher is a step behind"


def sync_folder(folder):
    """Put new names in a folder on the disk. (Windows opens no folders.)"""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_previous(path):
    """A second name, <name>.previous, for a file that is about to be replaced. At every
    moment there is one, from the end of the first call on."""
    spare = path.with_name(f"{path.name}.tmp.{os.getpid()}0")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except (OSError, AttributeError):  # exFAT, Android, Google Drive have no links
        shutil.copyfile(path, spare)
    try:
        os.replace(spare, path.with_name(f"{path.name}.previous"))
    finally:  # to rename one of two names of a file does nothing
        spare.unlink(missing_ok=True)


def write_atomically(path, content, keep=False):
    """The bytes `content` become the file `path`: at every moment there is the old file
    or the new one, whole, and after a power cut, too.

    Args: path, a pathlib.Path; content, bytes; keep: the file that is replaced stays
        as <name>.previous.
    Raises: OSError, with the path, when the disk is full; the old file is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            keep_previous(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} not written: {error.strerror}") from None


def remove_temporary(folder):
    """Remove what write_atomically left in this folder when it was killed."""
    for path in folder.iterdir():
        if path.stem.endswith(".tmp") and path.suffix[1:].isdigit():
            path.unlink()


def write_checkpoint(path, content):
    """A dict of tensors and plain values -> SHA-256 and torch.save's bytes, in one
    file. The checkpoint before it is kept as <name>.previous."""
    remove_temporary(path.parent)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()
    head = f"sdft {hashlib.sha256(body).hexdigest()}\n".encode()
    write_atomically(path, head + body, keep=True)


def read_checkpoint(path):
    """The dict of write_checkpoint, its tensors on the CPU. Nothing in the file is ever
    executed.

    Raises: ValueError, with the path, if the file is not one of write_checkpoint, is
        cut, or differs from what was written.
    """
    head, _, content = path.read_bytes().partition(b"\n")  # torch.load checks no sum
    if head != f"sdft {hashlib.sha256(content).hexdigest()}".encode():
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, checksum differs, not loaded"
        )
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own kinds: whatever it met, not ours
        raise ValueError(
            f"{path} is not one of our checkpoints, not loaded ({type(error).__name__})"
        ) from None


def dft_loss(logits, tokens, weight):
    """The loss of DFT: SFT's, each token weighed by its own probability as well.

    Args: logits, floating point (N, V), of the rows that carry loss; tokens, int64
        (N,), what is imitated; weight, (N,), what each row counts.
    Returns: a scalar, sum_n weight_n * p_n * -log p_n in nats, with p_n the probability
        of the token. No gradient flows through p_n: it is a weight.
    """
    log_p = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]  # (N,)
    return -(weight * log_p.detach().exp() * log_p).sum()


@torch.no_grad()
def speculative_responses(student, teacher, batch, tok, cfg, tau, step):
    """Responses that the student writes, but where the teacher disagrees, the teacher.

    At each token both predict what comes next, the student after student_prompt, the
    teacher after teacher_prompt, both after the same response so far. Where
    KL(teacher || student) > tau, in nats, the token is drawn from the teacher, else
    from the student; in both cases with the number of data.get_uniform at its place.

    Args: as in sdft.get_responses; teacher, a GPT; tau, at least 0: 0 is off-policy
        (the teacher writes all), infinity SDFT. cfg.temperature is that of both
        distributions, in the KL, too; it is above 0.
    Returns: response int64 (B, R), mask bool (B, R), as generate gives them.
    """
    device = next(student.parameters()).device
    contexts = [
        (model, data.pad_batch(prompt, batch, tok, device))
        for model, prompt in (
            (student, data.student_prompt), (teacher, data.teacher_prompt)
        )
    ]  # fmt: skip
    u = data.get_uniform(batch, cfg.max_new_tokens, cfg.seed, step, device)  # (B, R)
    response = torch.full(u.shape, tok.end, device=device)
    alive = torch.ones(len(batch), dtype=torch.bool, device=device)
    training = student.training, teacher.training
    student.eval(), teacher.eval()
    for t in range(u.size(1)):
        here = torch.zeros_like(response[:, : t + 1], dtype=torch.bool)
        here[:, t] = True  # the last column alone, one of each row
        s, q = (  # (B, V), student and teacher
            model.logits(response_hidden(model, *prompts, response[:, : t + 1], here))
            / cfg.temperature
            for model, prompts in contexts
        )
        teacher_writes = kl_reference(s, q, "forward") > tau  # (B,)
        token = sample_token(torch.where(teacher_writes[:, None], q, s), u[:, t])
        response[:, t] = torch.where(alive, token, tok.end)
        alive = alive & (token != tok.end)
        if not alive.any():
            break
    student.train(training[0]), teacher.train(training[1])
    n_tokens = ((response != tok.end).sum(1) + 1).clamp(max=u.size(1))  # (B,)
    mask = torch.arange(int(n_tokens.max()), device=device) < n_tokens[:, None]
    return response[:, : mask.size(1)], mask


def summarize(runs):
    """A table of runs as means over seeds, with the range beside them.

    Args: runs, a list of dicts with method, lr, seed, and the results new and prior
        (accuracies), in any order. It stays as it is.
    Returns: a list of dicts, one for each (method, lr), sorted by method, then lr:
        method, lr, seeds (how many), and for new and prior a tuple (mean, lowest,
        highest).
    Raises: ValueError if a (method, lr, seed) comes twice, or if not every (method, lr)
        has the same seeds: such means do not compare methods.
    """
    groups = {}
    for run in runs:
        group = groups.setdefault((run["method"], run["lr"]), {})
        if run["seed"] in group:
            raise ValueError(f"twice: {run['method']}, {run['lr']}, {run['seed']}")
        group[run["seed"]] = run
    if len({frozenset(group) for group in groups.values()}) > 1:
        raise ValueError(f"seeds differ: { {k: [*g] for k, g in groups.items()} }")
    rows = []
    for (method, lr), group in sorted(groups.items()):
        row = {"method": method, "lr": lr, "seeds": len(group)}
        for key in ("new", "prior"):
            values = [run[key] for run in group.values()]
            row[key] = sum(values) / len(values), min(values), max(values)
        rows.append(row)
    return rows
