"""Functions that an exercise asks for and the project does not have: their references.

Each stands alone; nothing here is used by the project. `make.py eNN --to mine` copies
one of them, emptied.
"""

import math

import torch


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
        ids: int64 (B, T): a prompt, its response right behind it, then pads. A pad may
            be any token, `end` too; so may the tokens of a prompt.
        lengths: int64 (B,), tokens of each prompt, 1 to T.
        end: the token that ends a response.
    Returns: bool (B, T), true from the first token behind the prompt up to and
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
