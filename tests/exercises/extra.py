"""Functions that an exercise asks for and the project does not have: their references.

Each stands alone; nothing here is used by the project. `make.py eNN --to mine` copies
one of them, emptied.
"""

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
