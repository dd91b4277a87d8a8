"""e05, the loss of SFT: -log p, shift, mask, mean. Difficulty 2, 25 minutes, 5 points.

The truth is a loop: one context, one token, one forward pass after the other.
"""

import functools
from dataclasses import replace

import oracles
import torch
from kit import compare, mean, one_number, small_model, unchanged, words

FLOAT64 = True  # what is made in here, or in the function, is float64 by default


def setting(impl, rng, lengths, batch_size=None):
    """A model, examples with prompts and demos of several lengths, responses (B, R) of
    any tokens, and their mask (B, R); behind the mask the response holds anything."""
    tok = impl.data.Tokenizer()
    seed = int(torch.randint(1000, (), generator=rng))
    student = small_model(impl, seed=seed, vocab_size=tok.vocab_size)
    batch = [
        impl.data.Example(
            words(impl, rng, 2 + 3 * (i % 2)), words(impl, rng, 3), "", id=i
        )
        for i in range(len(lengths))
    ]
    B, R = len(lengths), max(1, *lengths)
    response = torch.randint(tok.vocab_size, (B, R), generator=rng)
    mask = torch.arange(R) < torch.tensor(lengths)[:, None]
    cfg = impl.sft.Config(batch_size=batch_size or B)
    return student, batch, response, mask, tok, cfg


def log_likelihoods(impl, student, batch, response, tok, prompt=None, shift=0):
    """log p of each of the R tokens, float64 (B, R), by a loop. shift 1: from the state
    at the token itself."""
    prompt, rows = prompt or impl.data.student_prompt, []
    for example, tokens in zip(batch, response.tolist(), strict=True):
        context, row = prompt(example, tok), []
        for t, token in enumerate(tokens):
            logits = oracles.next_logits(student, context + tokens[: t + shift])
            row.append(oracles.log_softmax(logits)[token])
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def loss_of(impl, *args):
    result = impl.sft.compute_loss(*args)
    assert isinstance(result, tuple) and len(result) == 2, (
        f"compute_loss returns (loss, a dict of what else to record), "
        f"yours returned a {type(result).__name__}"
    )
    loss, extra = result
    assert isinstance(extra, dict), f"what else to record is a dict, not {extra!r}"
    return one_number(loss)


def mistakes(impl, args):
    """A function that says what usual mistakes give, by the message that names them."""
    return functools.partial(values_of_mistakes, impl, *args)


def values_of_mistakes(impl, student, batch, response, mask, tok, cfg):
    n, B = cfg.batch_size, len(batch)
    log_p = log_likelihoods(impl, student, batch, response, tok)
    no_end = mask & (mask.cumsum(1) < mask.sum(1, keepdim=True))
    no_start = mask & (mask.cumsum(1) > 1)
    after = log_likelihoods(impl, student, batch, response, tok, shift=1)
    shown = impl.data.teacher_prompt
    shown = log_likelihoods(impl, student, batch, response, tok, shown)
    sums = (log_p * mask).sum()
    return {
        "yours is -loss: where is the minus sign?": mean(log_p, mask, n),
        "yours is the sum over the tokens of a response, not their mean": -sums / n,
        "yours is the mean over all tokens of the micro-batch: a long response then "
        "weighs more than a short one": -sums / mask.sum(),
        "yours is the mean over all tokens of the micro-batch, times rows / "
        "batch_size: a long response then weighs more than a short one":
            -sums / mask.sum() * B / n,
        "yours is divided by the number of rows that you were given, not by "
        "cfg.batch_size: micro-batches would not add up": -mean(log_p, mask, B),
        "yours is divided by R, the longest response, not by the tokens of each":
            -sums / mask.size(1) / n,
        "yours counts the pads behind the response: where is the mask?":
            -mean(log_p, torch.ones_like(mask), n),
        "the last token of each response, its end, is missing from yours: who does "
        "not learn to stop writes for ever": -mean(log_p, no_end, n),
        "the first token of each response is missing from yours: response_hidden "
        "shifts by one already, do you shift a second time?": -mean(log_p, no_start, n),
        "yours is predicted from the state at the token itself, which has seen it: "
        "the state before it predicts it": -mean(after, mask, n),
        "yours has the demonstration in the prompt, the teacher's context: the student "
        "sees the prompt alone": -mean(shown, mask, n),
        "yours is -p, not -log p": -mean(log_p.exp(), mask, n),
    }  # fmt: skip


def test_one_token_of_one_response_gives_minus_log_p(impl, rng):
    args = setting(impl, rng, [1])
    student, batch, response, mask, tok, cfg = args
    log_p = log_likelihoods(impl, student, batch, response, tok)
    yours, truth = loss_of(impl, *args), -mean(log_p, mask, 1)
    assert yours != 0, (
        "the loss of one token is 0: no token is left, or its end is missing: do you "
        "shift a second time? response_hidden does it"
    )
    compare(yours, truth, mistakes(impl, args), "the loss of one token")


def test_each_response_of_a_ragged_batch_weighs_the_same(impl, rng):
    args = setting(impl, rng, [3, 1, 5], batch_size=6)
    student, batch, response, mask, tok, cfg = args
    log_p = log_likelihoods(impl, student, batch, response, tok)
    truth = -mean(log_p, mask, 6)
    compare(loss_of(impl, *args), truth, mistakes(impl, args), "the loss of the batch")


def test_tokens_in_the_middle_that_do_not_count_are_left_out_and_still_read(impl, rng):
    args = setting(impl, rng, [4, 3])
    student, batch, response, mask, tok, cfg = args
    mask[0, 1] = False
    log_p = log_likelihoods(impl, student, batch, response, tok)
    yours = loss_of(impl, *args)
    compare(yours, -mean(log_p, mask, 2), mistakes(impl, args),
            "the loss with a hole in the mask")  # fmt: skip


def test_micro_batches_add_up_to_the_batch(impl, rng):
    args = setting(impl, rng, [2, 5, 1, 3])
    student, batch, response, mask, tok, cfg = args
    whole = loss_of(impl, *args).detach()
    for size in (2, 1):
        parts = [
            loss_of(impl, student, batch[i : i + size], response[i : i + size],
                    mask[i : i + size], tok, cfg).detach()
            for i in range(0, 4, size)
        ]  # fmt: skip
        compare(sum(parts), whole, what=f"the sum of {4 // size} micro-batches")


def test_a_response_of_which_nothing_counts_adds_zero(impl, rng):
    args = setting(impl, rng, [3, 0])
    student, batch, response, mask, tok, cfg = args
    yours = loss_of(impl, *args)
    assert yours.isfinite(), (
        f"the loss is {yours.item()} when no token counts in a row: 0 / 0?"
    )
    log_p = log_likelihoods(impl, student, batch, response, tok)
    compare(yours, -mean(log_p, mask, 2), mistakes(impl, args),
            "the loss of a batch with an empty response")  # fmt: skip


def test_the_mode_of_the_student_is_the_callers(impl, rng):
    """What it computes in which mode, and what the mode is afterwards, is looked at in
    every call; here is a student that would drop something out, if it were not for
    eval()."""
    args = setting(impl, rng, [2, 3], batch_size=5)
    student, batch, response, mask, tok, cfg = args
    truth = -mean(log_likelihoods(impl, student, batch, response, tok), mask, 5)
    student.eval().dropout = 0.5
    compare(loss_of(impl, *args), truth, what="the loss in eval mode, with dropout,")


def test_the_gradient_is_that_of_the_loss(impl, rng):
    args = setting(impl, rng, [2, 4])
    student, batch, response, mask, tok, cfg = args
    yours = loss_of(impl, *args)
    assert yours.requires_grad, "the loss has no gradient: is something detached?"
    total = 0
    for example, tokens, n in zip(batch, response, mask.sum(1), strict=True):
        context = impl.data.student_prompt(example, tok)
        ids = torch.tensor([context + tokens[:n].tolist()])
        log_p = torch.log_softmax(student(ids), -1)[0, len(context) - 1 : -1]
        total = total - log_p.gather(1, tokens[:n, None]).mean() / 2
    truths = oracles.gradients(student, total)
    yours.backward()
    for name, p in student.named_parameters():
        assert p.grad is not None, f"no gradient reaches {name}: is something detached?"
    for (name, p), truth in zip(student.named_parameters(), truths, strict=True):
        compare(p.grad, truth, what=f"the gradient over {name}")


def test_the_loss_is_finite_where_a_probability_rounds_to_zero(impl, rng):
    args = setting(impl, rng, [3, 2])
    student, batch, response, mask, tok, cfg = args
    with torch.no_grad():
        student.ln_f.weight.mul_(1e4)
    yours = loss_of(impl, *args)
    assert yours.isfinite(), (
        f"the loss is {yours.item()} where p rounds to 0: log(softmax(x)) is log(0); "
        "log_softmax(x) is not"
    )
    log_p = log_likelihoods(impl, student, batch, response, tok)
    compare(yours, -mean(log_p, mask, 2), what="the loss of large logits")


def test_what_it_is_given_stays_as_it_is(impl, rng):
    args = setting(impl, rng, [1, 3])
    student, batch, response, mask, tok, cfg = args
    before = replace(cfg)
    with unchanged("compute_loss", response=response, mask=mask):
        loss_of(impl, *args)
    assert cfg == before, "compute_loss changes the configuration"
