"""What the model, the losses and the sampler ought to give, written as on paper.

Every truth here is plain Python floats and loops: one token after the other, one
sequence after the other, no batch, no padding, no cache, nothing of the code that is
tested but a model's forward pass. Below are the helpers of the tests.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig


def log_softmax(logits, temperature=1.0):
    """The logarithms of the probabilities, of a list of logits."""
    logits = [x / temperature for x in logits]
    largest = max(logits)
    total = math.fsum(math.exp(x - largest) for x in logits)
    return [x - largest - math.log(total) for x in logits]


def softmax(logits, temperature=1.0):
    return [math.exp(x) for x in log_softmax(logits, temperature)]


def entropy(logits, temperature=1.0):
    """In nats."""
    return -math.fsum(math.exp(x) * x for x in log_softmax(logits, temperature))


def kl_of_log_p(log_p, log_q):
    """KL(p || q) in nats, of two lists of log-probabilities."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def mixture(log_p, log_q):
    """log (p + q) / 2, for the Jensen-Shannon divergence."""
    both = zip(log_p, log_q, strict=True)
    return [math.log((math.exp(a) + math.exp(b)) / 2) for a, b in both]


def divergence(student, teacher, kl="forward", temperature=1.0):
    """One number in nats, from the logits of both at one token.

    Log-probabilities are logits, too, so they may be given as well (at temperature 1).
    """
    log_s = log_softmax(student, temperature)
    log_t = log_softmax(teacher, temperature)
    log_m = mixture(log_s, log_t)
    return {
        "forward": kl_of_log_p(log_t, log_s),  # KL(teacher || student)
        "reverse": kl_of_log_p(log_s, log_t),  # KL(student || teacher)
        "jsd": kl_of_log_p(log_t, log_m) / 2 + kl_of_log_p(log_s, log_m) / 2,
    }[kl]


def divergence_gradient(student, teacher, kl="forward", temperature=1.0):
    """The gradient over the student's logits, one entry after the other, as a list."""
    log_s = log_softmax(student, temperature)
    log_t = log_softmax(teacher, temperature)
    log_m = mixture(log_s, log_t)
    reverse, student_m = kl_of_log_p(log_s, log_t), kl_of_log_p(log_s, log_m)
    gradient = []
    for s, t, m in zip(log_s, log_t, log_m, strict=True):
        by_kl = {
            "forward": math.exp(s) - math.exp(t),
            "reverse": math.exp(s) * (s - t - reverse),
            "jsd": 0.5 * math.exp(s) * (s - m - student_m),
        }
        gradient.append(by_kl[kl] / temperature)
    return gradient


def sample_token(logits, u, temperature=1.0):
    """The first token whose cumulative probability exceeds u; 0: the most likely."""
    if temperature == 0:
        return max(range(len(logits)), key=logits.__getitem__)
    total = 0.0
    for token, p in enumerate(softmax(logits, temperature)):
        total += p
        if total > u:
            return token
    raise AssertionError(f"u = {u!r} is not below {total!r}")


@torch.no_grad()
def next_logits(model, tokens):
    """What comes after these tokens: a list of V floats. They go through the model
    alone and whole."""
    device = model.wte.weight.device
    return model(torch.tensor([tokens], device=device))[0, -1].tolist()


def sample(model, context, uniforms, end, temperature=1.0):
    """A response to one context: a list of tokens, up to and including the end, at most
    as many as there are numbers u."""
    response = []
    for u in uniforms:
        logits = next_logits(model, context + response)
        response.append(sample_token(logits, u, temperature))
        if response[-1] == end:
            break
    return response


def log_likelihoods(model, context, response):
    """log p of each token of a response, given the context and what is before it."""
    rows = [next_logits(model, context + response[:t]) for t in range(len(response))]
    pairs = zip(rows, response, strict=True)
    return [log_softmax(row)[token] for row, token in pairs]


def divergences(student, context, teacher, teacher_context, response, kl="forward"):
    """One number in nats for each token of a response: both models read the same
    response, each after a context of its own."""
    values = []
    for t in range(len(response)):  # token t is predicted from all that is before it
        s = next_logits(student, context + response[:t])
        q = next_logits(teacher, teacher_context + response[:t])
        values.append(divergence(s, q, kl))
    return values


SMALL = {
    "block_size": 64,
    "vocab_size": 11,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 16,
    "n_inner": 24,
    "rope_theta": 50.0,
}


@torch.no_grad()
def make_model(seed=0, end=None, scale=1.4, **changes):
    """A small GPT in float64 whose predictions are not flat: they depend on every token
    of the context, and biases and norms are not at their first values either.

    Args:
        end: a token that gets about a fifth of the probability, so that responses of
            several lengths occur; None: it is a token like any other.
        scale: about the standard deviation of the logits.
        changes: of the configuration SMALL, such as vocab_size or tie_weights.
    """
    config = GPTConfig(**{**SMALL, **changes})
    model, rng = GPT(config).double(), torch.Generator().manual_seed(seed)
    model.dtype = torch.float64
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        noise *= scale / math.sqrt(config.n_embd)
        p.copy_(noise if p.dim() == 2 else p + noise)
    if end is None:
        return model
    # channel 0 of the residual stream is 1 for every token, and only the end's row of
    # the head listens to it
    for block in model.h:
        block.attn.o_proj.weight[0] = 0
        block.mlp.down_proj.weight[0] = 0
    model.lm_head.weight[:, 0] = 0
    model.wte.weight[:, 0] = 1
    model.ln_f.weight[0] = 1
    tokens = [v for v in range(len(model.head())) if v != end]
    context = torch.tensor(tokens)[torch.randint(len(tokens), (16, 16), generator=rng)]
    hidden = model.hidden(context)
    for _ in range(5):
        p = model.logits(hidden).softmax(-1)[..., end].mean()
        missing = math.log(0.2 / 0.8) - torch.logit(p)
        model.lm_head.weight[end, 0] += missing / hidden[..., 0].mean()
    return model


def gradients(model, loss):
    """One tensor for each parameter; p.grad stays what it is."""
    return torch.autograd.grad(loss, list(model.parameters()))


def equal_weights(a, b):
    """To the bit."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def record_tokens(model):
    """A list that gets the tokens (B, T) of every later forward pass of the model."""
    seen = []
    model.wte.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    return seen


def close(a, b, tolerance=1e-10):
    """Raise unless all entries of both (tensors or tuples of them) are close."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def draw(*shape, seed=0, scale=2.0, dtype=torch.float64):
    """Normal numbers, for logits and hidden states."""
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype)


def pad(rows, fill=0, more=0):
    """Lists of tokens -> int64 (B, P + more), padded on the right, and lengths (B,)."""
    lengths = [len(row) for row in rows]
    P = max(lengths) + more
    padded = [row + [fill] * (P - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor(lengths)


def rows_of(response, mask):
    """The tokens under the mask of each row, as lists: responses without their pads."""
    pairs = zip(response.tolist(), mask.tolist(), strict=True)
    return [[x for x, on in zip(*pair, strict=True) if on] for pair in pairs]


class LargestTensor(TorchDispatchMode):
    """Sees every tensor that is made inside of it, in forward and backward passes.
    Views and tensors that are handed back as they came do not count: what an operation
    returned has to have memory of its own.
    """

    def __init__(self):
        super().__init__()
        self.numel, self.shape, self.operation = 0, None, None

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given, made = (
            [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
            for tree in ((args, kwargs), result)
        )
        given = {x.untyped_storage().data_ptr() for x in given}
        for x in made:
            memory = x.untyped_storage()
            n = memory.nbytes() // x.element_size()
            if n > self.numel and memory.data_ptr() not in given:
                self.numel, self.shape, self.operation = n, tuple(x.shape), operation
        return result
