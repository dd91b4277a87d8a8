"""e06, two contexts and one response. Difficulty 3, 40 minutes, 7 points.

The truth is one forward pass over each row by itself, without padding.
"""

import torch
from kit import compare, is_close, small_model, unchanged, words

FLOAT64 = True


def test_the_teacher_reads_prompt_demonstration_and_start_and_nothing_else(impl, rng):
    tok = impl.data.Tokenizer()
    for n in (1, 9, 16):
        prompt, demo, answer = (words(impl, rng, k) for k in (3, n, 2))
        example = impl.data.Example(prompt, demo, answer)
        yours = impl.data.teacher_prompt(example, tok)
        assert isinstance(yours, list), (
            f"teacher_prompt returns a list of tokens, yours a {type(yours).__name__}"
        )
        yours = [int(token) for token in yours]
        text = tok.encode(f"{prompt} example {demo}")
        if yours == text + [tok.start]:
            continue
        assert tok.end not in yours, "tok.end stands in yours: a prompt has no end"
        assert yours.count(tok.start) == 1 and yours[-1] == tok.start, (
            "tok.start, the start of the response, comes last, and once"
        )
        body = yours[:-1]
        assert body != tok.encode(prompt), "there is no demonstration in yours"
        assert body != tok.encode(demo), "the prompt is missing in yours"
        assert body != tok.encode(f"{prompt} example {answer}"), (
            "yours shows example.answer, which is for the graders alone; the teacher "
            "sees example.demo"
        )
        assert body != tok.encode(f"{demo} example {prompt}"), (
            "the demonstration stands in front of the prompt in yours"
        )
        assert body != text[: len(body)], (
            f"a demonstration of {n} words is cut in yours: {len(body)} tokens of "
            f"{len(text)}"
        )
        raise AssertionError(
            f"yours reads {tok.decode(body)!r}, it should be {tok.decode(text)!r}"
        )


def setting(impl, rng, lengths, R, **changes):
    """A model, prompts (B, P) of these lengths padded with anything, responses (B, R)
    and a mask (B, R) of all their tokens."""
    seed = int(torch.randint(1000, (), generator=rng))
    model = small_model(impl, seed=seed, **changes)
    prompts = torch.randint(11, (len(lengths), max(lengths)), generator=rng)
    response = torch.randint(11, (len(lengths), R), generator=rng)
    mask = torch.ones(len(lengths), R, dtype=torch.bool)
    return model, prompts, torch.tensor(lengths), response, mask


@torch.no_grad()
def truth(model, prompts, lengths, response, mask, shift=-1):
    """(N, C), row after row; shift 0: at the token itself, -2: one too early."""
    states = []
    for prompt, n, tokens, wanted in zip(
        prompts.tolist(), lengths.tolist(), response.tolist(), mask.tolist(),
        strict=True,
    ):  # fmt: skip
        for t, is_wanted in enumerate(wanted):
            if is_wanted:
                row = (prompt[:n] + tokens)[: n + t + 1 + shift]
                ids = torch.tensor([row or prompt[:1]])
                states.append(model.hidden(ids)[0, -1])
    return torch.stack(states)


@torch.no_grad()
def mistakes(model, prompts, lengths, response, mask):
    args = model, prompts, lengths, response, mask
    P = prompts.size(1)
    full = torch.full_like(lengths, P)
    token_by_token = [(b, t) for t, b in mask.T.nonzero().tolist()]
    order = [tuple(x) for x in mask.nonzero().tolist()]
    right = truth(*args)
    idx = torch.cat((prompts, torch.zeros_like(response)), 1)
    for b, n in enumerate(lengths.tolist()):
        idx[b, n : n + response.size(1)] = response[b]
    row, t = mask.nonzero(as_tuple=True)
    return {
        "the state of yours is at the token itself: the token itself has been read, so "
        "there is nothing left to predict": truth(*args, shift=0),
        "yours is one column too early: it predicts the token before":
            truth(*args, shift=-2),
        "the response stands behind the pads in yours; it comes right behind its own "
        "prompt": truth(model, prompts, full, response, mask),
        "yours takes the columns of the longest prompt for every row":
            model.hidden(idx)[row, (P + t - 1)],
        "yours has token after token; it is row after row, as mask.nonzero() goes":
            torch.stack([right[order.index(place)] for place in token_by_token]),
    }  # fmt: skip


@torch.no_grad()
def check(impl, args, what):
    model, prompts, lengths, response, mask = args
    given = {"prompts": prompts, "lengths": lengths, "response": response, "mask": mask}
    with unchanged("response_hidden", **given):
        yours = impl.model.response_hidden(*args)
    N, C = int(mask.sum()), model.config.n_embd
    assert torch.is_tensor(yours) and yours.shape == (N, C), (
        f"the result is (N, C) = ({N}, {C}), one row for each true of the mask; yours "
        f"is {tuple(getattr(yours, 'shape', ()))}"
    )
    compare(yours, truth(*args), lambda: mistakes(*args), what, 1e-9)


def test_one_response(impl, rng):
    check(impl, setting(impl, rng, [3], 2), "the states of one response")


def test_a_prompt_of_one_token(impl, rng):
    check(impl, setting(impl, rng, [1], 3), "the states behind a prompt of one token")


def test_rows_with_prompts_of_several_lengths(impl, rng):
    args = setting(impl, rng, [2, 6, 1, 4], 3)
    check(impl, args, "the states of rows with prompts of several lengths")


def test_tokens_that_are_not_wanted_are_left_out_and_still_read(impl, rng):
    args = setting(impl, rng, [2, 5, 3], 4)
    args[-1][0, 2:] = False
    args[-1][1, 0] = False
    args[-1][2, 1] = False
    check(impl, args, "the states under a mask with holes")


def test_student_and_teacher_predict_the_same_tokens(impl, rng):
    """A demonstration of no token makes them equal, one of several does not; and both
    have the rows in the same order."""
    model, prompts, lengths, response, mask = setting(impl, rng, [2, 4], 3)
    mask[0, 2] = False
    bare = impl.model.response_hidden(model, prompts, lengths, response, mask)
    demo = torch.randint(11, (2, 9), generator=rng)
    for n in (0, 1, 9):
        longer = torch.zeros(2, prompts.size(1) + n, dtype=torch.int64)
        for b, length in enumerate(lengths.tolist()):
            longer[b, : length + n] = torch.cat((prompts[b, :length], demo[b, :n]))
        args = model, longer, lengths + n, response, mask
        check(impl, args, f"the teacher's states, a demonstration of {n} tokens")
        if n == 0:
            shown = impl.model.response_hidden(*args)
            assert is_close(bare, shown, 1e-9), (
                "without a demonstration teacher and student differ"
            )


@torch.no_grad()
def test_the_mode_of_the_model_is_the_callers(impl, rng):
    """It is looked at in every call; here is a model with dropout in eval mode."""
    args = setting(impl, rng, [2, 3], 2)
    args[0].eval().dropout = 0.5
    check(impl, args, "the states of a model in eval mode, with dropout,")


def test_a_gradient_reaches_the_model(impl, rng):
    args = setting(impl, rng, [2, 3], 2)
    yours = impl.model.response_hidden(*args)
    assert yours.requires_grad, (
        "no gradient flows through response_hidden: it is for the caller to say where "
        "none is wanted"
    )


@torch.no_grad()
def test_exactly_block_size_tokens_fit_and_one_more_is_refused(impl, rng):
    model, prompts, lengths, response, mask = setting(
        impl, rng, [12, 4], 5, block_size=16
    )  # 12 + 5 = 17
    try:
        impl.model.response_hidden(model, prompts, lengths, response, mask)
    except ValueError:
        pass
    except NotImplementedError:
        raise
    except (RuntimeError, IndexError, AssertionError) as error:
        raise AssertionError(
            f"17 tokens are more than a block_size of 16, and yours raises "
            f"{type(error).__name__}: ValueError is asked ({error})"
        ) from None
    else:
        raise AssertionError(
            "12 tokens of a prompt and 5 of a response are more than a block_size of "
            "16, and yours goes on, cut in silence; ValueError is right"
        )
    mask[0, 4] = False  # 16: the last token of the long row is not wanted
    try:
        check(impl, (model, prompts, lengths, response, mask), "a row of block_size")
    except ValueError as error:
        raise AssertionError(
            f"a row whose wanted tokens end at block_size fits, yours refuses: {error}"
        ) from None
