"""e11, the whole step of SDFT. Difficulty 4, 75 minutes, 10 points.

The truth is a loop: one example after the other, token by token, without padding and
without a cache. Spies see what the models read, and when the optimizer steps.
"""

import copy
import functools
import itertools
from dataclasses import replace

import oracles
import torch
from kit import compare, one_number, weights

FLOAT64 = True
LR = 0.1


class Spy(torch.optim.SGD):
    """Counts its steps, and sees what the teacher is at each of them."""

    def __init__(self, student, teacher, lr=LR):
        super().__init__(student.parameters(), lr=lr)
        self.teacher, self.seen = teacher, []

    def step(self, closure=None):
        self.seen.append(weights(self.teacher))
        return super().step(closure)


@functools.cache
def model_of(seed, vocab_size, end, n_tokens):
    sizes = {"vocab_size": vocab_size, "n_tokens": n_tokens, "n_layer": 1}
    return oracles.make_model(seed, end, **sizes)


def make_model(impl, *args):
    """A small float64 GPT of impl's; its weights are made once."""
    truth = model_of(*args)
    model = impl.model.GPT(impl.model.GPTConfig(**vars(truth.config))).double()
    model.dtype = torch.float64
    model.load_state_dict(truth.state_dict())
    return model


def setting(impl, rng, size, max_new_tokens, **changes):
    """(student, teacher, optimizer, batch, u, tok, cfg): prompts and demonstrations of
    several lengths, that have no word in common."""
    tok, nouns = impl.data.Tokenizer(), impl.data.NOUNS
    seed = 2 * int(torch.randint(5, (), generator=rng))
    sizes = tok.vocab_size, tok.end, tok.n_tokens
    student, teacher = (make_model(impl, seed + i, *sizes) for i in (0, 1))
    teacher.requires_grad_(False).eval()
    order = iter(torch.randperm(len(nouns), generator=rng).tolist())

    def words(n):
        return " ".join(nouns[next(order)] for _ in range(n))

    batch = [
        impl.data.Example(words(2 + 3 * (i % 2)), words(3 + i), "", id=i)
        for i in range(size)
    ]
    u = torch.rand(size, max_new_tokens, generator=rng)
    cfg = impl.sdft.Config(**{
        "batch_size": 4 * size + 3, "max_new_tokens": max_new_tokens,
        "temperature": 0.7, "ema_rate": 0.25, "grad_clip": 1e9, **changes,
    })  # fmt: skip
    return student, teacher, Spy(student, teacher), batch, u, tok, cfg


def divergence(student_logits, teacher_logits, kl):
    s, t = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if kl == "reverse":
        return (s.exp() * (s - t)).sum(-1)
    return (t.exp() * (t - s)).sum(-1)


def true_responses(impl, student, batch, u, tok, cfg, prompt=None, temperature=None):
    prompt = prompt or impl.data.student_prompt
    temperature = cfg.temperature if temperature is None else temperature
    student = copy.deepcopy(student).eval()
    return [
        oracles.sample(student, prompt(e, tok), row, tok.end, temperature)
        for e, row in zip(batch, u.tolist(), strict=True)
    ]


def true_loss(
    impl, student, teacher, batch, responses, tok, cfg, kl="forward",
    reads=None, teacher_reads=None, temperature=None, mean=True, shift=0, divide=None,
):  # fmt: skip
    """The loss, differentiable in the student; the other arguments are mistakes."""
    reads = reads or impl.data.student_prompt
    teacher_reads = teacher_reads or impl.data.teacher_prompt
    temperature = temperature or cfg.temperature
    total = 0
    for e, response in zip(batch, responses, strict=True):
        rows = []
        for model, prompt in ((student, reads), (teacher, teacher_reads)):
            context = prompt(e, tok)
            first = len(context) - 1 + shift
            logits = model(torch.tensor([context + response]))[0]
            rows.append(logits[first : first + len(response)] / temperature)
        values = divergence(rows[0], rows[1].detach(), kl)
        total = total + (values.mean() if mean else values.sum())
    return total / (divide or len(batch))


def step(impl, *args):
    try:
        result = impl.extra.sdft_step(*args)
    except RuntimeError as error:
        assert "does not require grad" not in str(error), (
            "no gradient reaches the loss: are student and teacher exchanged where the "
            "KL is computed, or is something detached?"
        )
        raise
    assert isinstance(result, tuple) and len(result) == 3, (
        f"sdft_step returns (loss, response, mask); yours returned a "
        f"{type(result).__name__}"
    )
    loss, response, mask = result
    assert not one_number(loss).requires_grad, (
        "the loss that is returned still has its graph, which keeps all that was "
        "computed in memory: detach it"
    )
    assert response.shape == mask.shape and mask.dtype == torch.bool, (
        f"response is {tuple(response.shape)}, mask is {mask.dtype} "
        f"{tuple(mask.shape)}; they should be (B, R') both, and the mask bool"
    )
    return loss, oracles.rows_of(response, mask)


def check_responses(impl, responses, student, teacher, batch, u, tok, cfg):
    """That they are what the student, as it was, writes after the prompts alone."""
    shown = impl.data.teacher_prompt
    make = functools.partial(true_responses, impl, batch=batch, u=u, tok=tok, cfg=cfg)
    if responses == make(student):
        return
    wrong = {
        "the teacher wrote the responses: SDFT is on-policy, the student writes them":
            lambda: make(teacher, prompt=shown),
        "the demonstration was in the prompt when the response was written: the "
        "student sees the prompt alone": lambda: make(student, prompt=shown),
        "the responses are the demonstrations: that is SFT's data. In SDFT the student "
        "writes them": lambda: [impl.data.demo_response(e, tok) for e in batch],
        "the responses are the most likely tokens: sample them, with u":
            lambda: make(student, temperature=0),
        "cfg.temperature is not used for the responses":
            lambda: make(student, temperature=1.0),
        "the teacher wrote the responses, and after the prompt alone":
            lambda: make(teacher),
    }  # fmt: skip
    for message, value in wrong.items():
        assert responses != value(), message
    short = [x[:-1] for x in make(student)]
    assert responses != short, "the end of each response is missing: it counts, too"
    raise AssertionError(
        f"the responses are {responses}; the student writes {make(student)} with these "
        "u, temperature and max_new_tokens"
    )


def mistakes_of_loss(impl, student, teacher, batch, responses, tok, cfg, after):
    """The loss by the message that names the mistake; of models as they were."""
    args = impl, student, teacher, batch, responses, tok, cfg
    bare, shown = impl.data.student_prompt, impl.data.teacher_prompt
    with torch.no_grad():
        return {
            "the loss of yours is KL(student || teacher): the results of the paper "
            "were made with KL(teacher || student)": true_loss(*args, kl="reverse"),
            "the loss of yours is that of the student after the update: return the one "
            "that was minimised":
                true_loss(impl, after, teacher, batch, responses, tok, cfg),
            "the loss of yours is below 0: where is the sign?": -true_loss(*args),
            "the teacher of yours reads the prompt without the demonstration: it knows "
            "nothing that the student does not": true_loss(*args, teacher_reads=bare),
            "the demonstration leaks into the loss: the student of yours reads it, too":
                true_loss(*args, reads=shown),
            "the contexts of yours are exchanged: the student reads the demonstration, "
            "the teacher does not": true_loss(*args, reads=shown, teacher_reads=bare),
            "the loss of yours is without the temperature: student and teacher are "
            "divided by it, as in the sampler": true_loss(*args, temperature=1.0),
            "the loss of yours is a sum over the tokens of a response, not their mean":
                true_loss(*args, mean=False),
            "the loss of yours is a sum over the batch, not its mean":
                true_loss(*args, divide=1),
            "the loss of yours is divided by R', the longest response, and not by B":
                true_loss(*args, divide=max(map(len, responses))),
            "the loss of yours is divided by cfg.batch_size: here it is the mean over "
            "the responses that you are given, B":
                true_loss(*args, divide=cfg.batch_size),
            "each token of yours is predicted from the state at the token itself, not "
            "from the one before it": true_loss(*args, shift=1),
            "the loss of yours is the mean over all tokens of the batch: a long "
            "response weighs more":
                true_loss(*args, mean=False, divide=sum(map(len, responses))),
        }  # fmt: skip


def check_loss(impl, loss, models, batch, responses, tok, cfg, after, what):
    args = impl, *models, batch, responses, tok, cfg
    truth = true_loss(*args).detach()
    compare(loss, truth, functools.partial(mistakes_of_loss, *args, after), what)


def test_one_token_of_one_example(impl, rng):
    student, teacher, optimizer, batch, u, tok, cfg = setting(impl, rng, 1, 1)
    before = copy.deepcopy(student), copy.deepcopy(teacher)
    loss, responses = step(impl, student, teacher, optimizer, batch, u, tok, cfg)
    check_responses(impl, responses, *before, batch, u, tok, cfg)
    check_loss(impl, loss, before, batch, responses, tok, cfg, student,
               "the loss of one token")  # fmt: skip


def test_a_batch_of_several_lengths(impl, rng):
    student, teacher, optimizer, batch, u, tok, cfg = setting(impl, rng, 4, 5)
    u[0, 0], u[1] = 1 - 1e-9, 0.0  # one response ends at once, another one never
    before = copy.deepcopy(student), copy.deepcopy(teacher)
    loss, responses = step(impl, student, teacher, optimizer, batch, u, tok, cfg)
    check_responses(impl, responses, *before, batch, u, tok, cfg)
    check_loss(impl, loss, before, batch, responses, tok, cfg, student,
               "the loss of a batch")  # fmt: skip


def holds(row, part):
    return any(row[i : i + len(part)] == part for i in range(len(row)))


def test_what_student_and_teacher_read(impl, rng):
    student, teacher, optimizer, batch, u, tok, cfg = setting(impl, rng, 3, 4)
    read = oracles.record_tokens(student), oracles.record_tokens(teacher)
    step(impl, student, teacher, optimizer, batch, u, tok, cfg)
    by_student, by_teacher = ([row for x in xs for row in x.tolist()] for xs in read)
    for e in batch:
        demo, prompt = tok.encode(e.demo), impl.data.student_prompt(e, tok)
        shown = impl.data.teacher_prompt(e, tok)
        assert not any(holds(row, demo) for row in by_student), (
            "the student reads a demonstration: it sees the prompt alone, when it "
            "writes and in the loss"
        )
        assert any(holds(row, prompt) for row in by_student), (
            "the student does not read data.student_prompt of each example"
        )
        assert any(holds(row, shown) for row in by_teacher), (
            "the teacher does not read data.teacher_prompt of each example, the prompt "
            "with its demonstration"
        )


def gradients(impl, student, teacher, batch, u, tok, cfg):
    """Of the true loss over the student's parameters, by name."""
    responses = true_responses(impl, student, batch, u, tok, cfg)
    loss = true_loss(impl, student, teacher, batch, responses, tok, cfg)
    names = [name for name, _ in student.named_parameters()]
    return dict(zip(names, oracles.gradients(student, loss), strict=True))


def norm_of(grads):
    return sum((g**2).sum() for g in grads.values()).sqrt()


def check_student(student, before, grads, more=()):
    for name, p in student.named_parameters():
        assert not torch.equal(p, before[name]) or not grads[name].any(), (
            f"{name} of the student does not move: is something detached, or does the "
            "optimizer not step?"
        )
    for name, p in student.named_parameters():
        g = grads[name]
        compare(p, before[name] - LR * g, {
            f"{name} of the student moves the wrong way: it climbs the loss":
                before[name] + LR * g,
            f"{name} of the student moves twice: one step of the optimizer":
                before[name] - 2 * LR * g,
            **{message: before[name] + change[name] for message, change in more},
        }, f"{name} of the student after the step")  # fmt: skip


def test_the_student_takes_one_step_down_the_gradient(impl, rng):
    args = setting(impl, rng, 3, 4)
    student, teacher, optimizer, *rest = args
    grads, before = gradients(impl, student, teacher, *rest), weights(student)
    step(impl, *args)
    assert len(optimizer.seen) == 1, (
        f"the optimizer makes {len(optimizer.seen)} steps in one call, it should be one"
    )
    check_student(student, before, grads)


def test_gradients_of_the_step_before_do_not_count(impl, rng):
    args = setting(impl, rng, 2, 3)
    student, teacher, optimizer, batch, u, tok, cfg = args
    step(impl, *args)
    for p in student.parameters():  # of whoever trained it before
        p.grad = torch.randn(p.shape, generator=rng)
    old = {name: p.grad.clone() for name, p in student.named_parameters()}
    u = torch.rand(u.shape, generator=rng)
    grads = gradients(impl, student, teacher, batch, u, tok, cfg)
    before = weights(student)
    step(impl, student, teacher, optimizer, batch, u, tok, cfg)
    both = {name: -LR * (grads[name] + old[name]) for name in grads}
    check_student(student, before, grads, [(
        "the gradient of the step before is added to that of this one: where is "
        "zero_grad?", both,
    )])  # fmt: skip


def test_a_long_gradient_is_clipped(impl, rng):
    args = setting(impl, rng, 2, 3, grad_clip=1e-3)
    student, teacher, optimizer, *rest = args
    grads, before = gradients(impl, student, teacher, *rest), weights(student)
    length = norm_of(grads)
    step(impl, *args)
    moved = {n: (before[n] - p) / LR for n, p in student.named_parameters()}
    norm = norm_of({name: x.detach() for name, x in moved.items()})
    assert norm < 0.999 * length, (
        f"the gradient has norm {norm.item():.3g} when the optimizer steps, and "
        "cfg.grad_clip is 0.001: clip it after backward() and before step()"
    )
    assert norm < 1.01e-3, (
        f"the gradient has norm {norm.item():.3g} when the optimizer steps, and "
        "cfg.grad_clip is 0.001: clip the norm, not each value"
    )
    # clip_grad_norm_ divides by the norm + 1e-6
    shorter = {name: g * 1e-3 / length for name, g in grads.items()}
    for name, g in shorter.items():
        compare(moved[name], g, what=f"the clipped gradient of {name}", tolerance=1e-7)


def test_the_teacher_follows_after_the_optimizer(impl, rng):
    args = setting(impl, rng, 2, 3)
    student, teacher, optimizer, *_ = args
    s, t = weights(student), weights(teacher)
    step(impl, *args)
    assert optimizer.seen, "the optimizer makes no step"
    new = weights(student)
    for name, p in teacher.named_parameters():
        compare(p, 0.25 * new[name] + 0.75 * t[name], {
            "the teacher follows the student of before the step: it is updated after "
            "the optimizer": 0.25 * s[name] + 0.75 * t[name],
            f"{name} of the teacher does not follow: update each parameter after the "
            "optimizer's step": t[name],
            "the teacher is a copy of the student: it follows by cfg.ema_rate":
                new[name],
            "the rates of the teacher's average are exchanged: ema_rate is the share "
            "of the student": 0.75 * new[name] + 0.25 * t[name],
            "the teacher is updated twice":
                new[name] + 0.75**2 * (t[name] - new[name]),
        }, f"{name} of the teacher after the step")  # fmt: skip
    for seen in optimizer.seen:
        for name, value in seen.items():
            assert torch.equal(value, t[name]), (
                f"{name} of the teacher has changed before the optimizer steps: it "
                "follows after it"
            )


def test_the_teacher_gets_no_gradient_even_if_it_would_take_one(impl, rng):
    args = setting(impl, rng, 2, 3)
    student, teacher, *_ = args
    step(impl, *args)
    for name, p in teacher.named_parameters():
        assert p.grad is None and not p.requires_grad, (
            f"{name} of the teacher wanted no gradient, and now it does or has one"
        )
    teacher.requires_grad_(True)
    step(impl, *args)
    for name, p in teacher.named_parameters():
        assert p.grad is None or not p.grad.any(), (
            f"{name} of the teacher has a gradient: compute its logits under no_grad"
        )
        assert p.is_leaf, (
            f"{name} of the teacher remembers how it was made: update it under no_grad"
        )


def test_dropout_and_modes_are_left_to_who_calls(impl, rng):
    args = setting(impl, rng, 2, 3)
    student, teacher, _, batch, u, tok, cfg = args
    examples, numbers, settings = list(batch), u.clone(), replace(cfg)
    for modes in itertools.product((True, False), repeat=2):
        for model, mode in zip((student, teacher), modes, strict=True):
            model.train(mode).dropout = 0.0 if mode else 0.5  # none drops anything
        before = copy.deepcopy((student, teacher))
        loss, responses = step(impl, *args)
        check_responses(impl, responses, *before, batch, u, tok, cfg)
        check_loss(impl, loss, before, batch, responses, tok, cfg, student,
                   f"the loss with student.train({modes[0]}), teacher.train("
                   f"{modes[1]})")  # fmt: skip
    assert batch == examples, "sdft_step changes the batch"
    assert torch.equal(u, numbers), "sdft_step changes u"
    assert cfg == settings, "sdft_step changes the configuration"


def test_the_loss_on_a_fixed_batch_falls(impl, rng):
    """At the first token, which is predicted from the prompt alone: whatever is
    sampled, the loss is the same function of the weights, and the teacher stays."""
    args = setting(impl, rng, 4, 1, ema_rate=0.0, temperature=1.0)
    student, teacher, _, batch, u, tok, cfg = args
    responses = true_responses(impl, student, batch, u, tok, cfg)
    fixed = impl, student, teacher, batch, responses, tok, cfg
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    with torch.no_grad():
        before = true_loss(*fixed).item()
    for _ in range(8):
        step(impl, student, teacher, optimizer, batch, u, tok, cfg)
    with torch.no_grad():
        after = true_loss(*fixed).item()
    assert after < 0.7 * before, (
        f"KL(teacher || student) at the first token of a fixed batch is {before:.3f} "
        f"nats, and {after:.3f} after 8 steps: it should fall by 30 % at least"
    )
