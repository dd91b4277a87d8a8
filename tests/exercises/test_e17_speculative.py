"""e17, speculative self-distillation: the student writes, but where it and the teacher
are further apart than tau, the teacher. Difficulty 3, 45 minutes, 6 points.

The truth goes token by token: two contexts, two forward passes, one divergence in plain
floats, one draw with a given number.
"""

import functools
import math

import oracles
import torch
from kit import small_model, words
from variants import Modules, changes_of

FLOAT64 = True


@functools.lru_cache(maxsize=2)
def models(impl):
    """Student and teacher, other weights; about a fifth of what they say is the end."""
    tok = impl.data.Tokenizer()
    sizes = {"vocab_size": tok.vocab_size, "n_tokens": tok.n_tokens, "n_layer": 1,
             "end": tok.end}  # fmt: skip
    student, teacher = (small_model(impl, seed=seed, **sizes) for seed in (1, 2))
    return tok, student, teacher.requires_grad_(False)


class Setting:
    """Two models; a batch and numbers, drawn from rng; and the truth about them."""

    def __init__(self, impl, rng, B=3, R=4, temperature=1.0):
        self.impl = impl
        self.tok, self.student, self.teacher = models(impl)
        for model in (self.student, self.teacher):
            model.eval().dropout = 0.0
        self.batch = [
            impl.data.Example(
                words(impl, rng, 2 + i % 2), words(impl, rng, 1 + i), "", id=i
            )
            for i in range(B)
        ]
        self.cfg = impl.sdft.Config(
            seed=int(torch.randint(10**6, (), generator=rng)), batch_size=4 * B + 3,
            max_new_tokens=R, temperature=temperature,
        )
        self.step = 3
        self.u = impl.data.get_uniform(
            self.batch, R, self.cfg.seed, self.step, "cpu"
        ).tolist()

    def contexts(self, example):
        """The student's and the teacher's, in the grader's own words."""
        tok = self.tok
        bare = tok.encode(example.prompt) + [tok.start]
        shown = tok.encode(f"{example.prompt} example {example.demo}") + [tok.start]
        return bare, shown

    def logits(self, model, tokens):
        key = id(model), tuple(tokens)
        if key not in self.known:
            self.known[key] = oracles.next_logits(model, tokens)
        return self.known[key]

    @functools.cached_property
    def known(self):
        return {}

    def write(self, choose, contexts=None):
        """Rows of tokens. choose(student's logits, teacher's logits, state) gives the
        logits to draw from, and at which temperature."""
        rows = []
        for example, numbers in zip(self.batch, self.u, strict=True):
            bare, shown = (contexts or self.contexts)(example)
            row, state = [], {}
            for u in numbers:
                s = self.logits(self.student, bare + row)
                q = self.logits(self.teacher, shown + row)
                logits, temperature = choose(s, q, state)
                row.append(oracles.sample_token(logits, u, temperature))
                if row[-1] == self.tok.end:
                    break
            rows.append(row)
        return rows

    def distance(self, s, q, kl="forward", temperature=None):
        temperature = temperature or self.cfg.temperature
        key = id(s), id(q), kl, temperature
        if key not in self.known:  # the logits stay there, too
            self.known[key] = oracles.divergence(s, q, kl, temperature)
        return self.known[key]

    def right(self, tau, contexts=None, kl="forward", temperature=None):
        return self.write(
            lambda s, q, _: (
                q if self.distance(s, q, kl, temperature) > tau else s,
                self.cfg.temperature,
            ),
            contexts,
        )

    def middle(self):
        """A tau that about half of the tokens pass."""
        distances = []

        def see(s, q, _):
            distances.append(self.distance(s, q))
            return s, self.cfg.temperature

        self.write(see)
        ordered = sorted(distances)
        i = max(1, len(ordered) // 2)
        return (ordered[i - 1] + ordered[i]) / 2

    def mistakes(self, tau):
        """message: what this mistake writes; made one after the other."""
        T, tok = self.cfg.temperature, self.tok

        def turned(example):
            return self.contexts(example)[::-1]

        def once(s, q, state):
            state["on"] = state.get("on") or self.distance(s, q) > tau
            return q if state["on"] else s, T

        def first(s, q, state):
            state.setdefault("on", self.distance(s, q) > tau)
            return q if state["on"] else s, T

        def mixed(s, q, _):
            pairs = zip(oracles.softmax(s, T), oracles.softmax(q, T), strict=True)
            mixture = [math.log((x + y) / 2) * T for x, y in pairs]
            return mixture if self.distance(s, q) > tau else s, T

        def greedy(s, q, _):
            return (q, 0) if self.distance(s, q) > tau else (s, T)

        def plain(s, q, _):
            return q if self.distance(s, q) > tau else s, 1.0

        if tau in (0, math.inf):
            yield (f"with tau {tau} the student writes all in yours: where the KL is "
                   "above tau, the teacher does", self.write(lambda s, q, _: (s, T)))
            yield (f"with tau {tau} the teacher writes all in yours: where the KL is "
                   "not above tau, the student does",
                   self.write(lambda s, q, _: (q, T)))
        yield ("in yours the student writes where the two disagree: it is the teacher "
               "that does", self.write(
                   lambda s, q, _: (s if self.distance(s, q) > tau else q, T)))
        yield ("in yours the teacher sees no demonstration: it would agree with the "
               "student", self.right(tau, lambda e: (self.contexts(e)[0],) * 2))
        yield ("in yours the student sees the demonstration: it is shown the prompt "
               "alone", self.right(tau, lambda e: (self.contexts(e)[1],) * 2))
        yield ("in yours student and teacher have each other's prompt",
               self.right(tau, turned))
        yield ("yours has a KL in bits: tau is in nats",
               self.right(tau * math.log(2)))
        yield ("yours has the mean over the vocabulary: a KL is a sum over it",
               self.right(tau * self.student.config.n_tokens))
        yield ("yours has the KL the other way round: KL(teacher || student) is asked",
               self.right(tau, kl="reverse"))
        yield "yours has the JSD, not KL(teacher || student)", self.right(tau, kl="jsd")
        yield ("in yours the KL has no temperature: it compares what is drawn from",
               self.right(tau, temperature=1.0))
        yield ("yours draws without the temperature", self.write(plain))
        yield ("in yours the teacher's token is its most likely one: it is drawn",
               self.write(greedy))
        yield ("in yours the teacher writes the rest of the response, too: each token "
               "is decided anew", self.write(once))
        yield ("in yours the first token decides who writes the whole response",
               self.write(first))
        yield ("yours draws from a mixture where they disagree, not from the teacher",
               self.write(mixed))
        yield ("in yours the student writes all, as if tau had no effect",
               self.write(lambda s, q, _: (s, T)))
        yield ("in yours the teacher writes all, as if tau had no effect",
               self.write(lambda s, q, _: (q, T)))
        self.u = [[*row[1:], row[0]] for row in self.u]
        wrong = self.right(tau)
        self.u = [[row[-1], *row[:-1]] for row in self.u]
        yield "yours draws with the number of another place", wrong
        yield ("yours leaves the end of a response out of its mask",
               [row[:-1] if row[-1] == tok.end else row for row in self.right(tau)])

    def call(self, tau, batch=None):
        result = self.impl.extra.speculative_responses(
            self.student, self.teacher, batch or self.batch, self.tok, self.cfg, tau,
            self.step,
        )  # fmt: skip
        assert isinstance(result, tuple) and len(result) == 2, (
            "speculative_responses returns the response and its mask"
        )
        response, mask = result
        assert response.shape == mask.shape and response.dim() == 2, (
            f"response and mask are (B, R), yours are {tuple(response.shape)} and "
            f"{tuple(mask.shape)}"
        )
        assert mask.dtype == torch.bool, f"the mask is {mask.dtype}, not bool"
        return response, mask

    def check(self, tau, what):
        response, mask = self.call(tau)
        yours, right = oracles.rows_of(response, mask), self.right(tau)
        if yours == right:
            return
        fits = [m for m, rows in self.mistakes(tau) if yours == rows != right]
        assert not fits, "\nor: ".join(fits)
        for row, good in zip(yours, right, strict=True):
            lost = len(row) > len(good) and row[: len(good)] == good
            assert not lost, (
                "in yours a response goes on behind its end: once it has ended, "
                "nothing of it counts"
            )
        assert yours == right, f"{what}: yours are {yours}, they should be {right}"


def test_no_tau_is_reached_so_the_student_writes_all(impl, rng):
    setting = Setting(impl, rng)
    setting.check(math.inf, "the responses with tau infinite, SDFT's")
    own, mask = impl.sdft.get_responses(
        setting.student, setting.batch, setting.tok, setting.cfg, setting.step
    )
    yours = setting.call(math.inf)
    same = torch.equal(yours[0], own) and torch.equal(yours[1], mask)
    assert same, "with tau infinite, response and mask are those of sdft.get_responses"


def test_tau_zero_is_off_policy_the_teacher_writes_all(impl, rng):
    setting = Setting(impl, rng)
    setting.check(0.0, "the responses with tau 0, off-policy")


def test_between_them_each_token_is_decided_by_itself(impl, rng):
    setting = Setting(impl, rng, B=5)
    tau = setting.middle()
    setting.check(tau, f"the responses with tau {tau:.3f}")


def test_the_temperature_belongs_to_both_distributions(impl, rng):
    setting = Setting(impl, rng, B=5, temperature=1.3)
    tau = setting.middle()
    setting.check(tau, f"the responses with tau {tau:.3f} and temperature 1.3")


def test_a_tau_that_only_one_direction_of_the_kl_reaches(impl, rng):
    """Between KL(teacher || student) and KL(student || teacher) of the first token."""
    setting = Setting(impl, rng)
    bare, shown = setting.contexts(setting.batch[0])
    s = setting.logits(setting.student, bare)
    q = setting.logits(setting.teacher, shown)
    tau = (setting.distance(s, q) + setting.distance(s, q, "reverse")) / 2
    setting.check(tau, f"the responses with tau {tau:.3f}")


def test_the_mask_ends_with_the_end_and_the_rest_is_end(impl, rng):
    setting = Setting(impl, rng, B=2, R=16)  # 16: nearly all responses end
    response, mask = setting.call(2.0)
    longest = int(mask.sum(1).max())
    assert longest == response.size(1), (
        f"the longest response has {longest} tokens, yours has {response.size(1)} "
        "columns"
    )
    n = mask.sum(1, keepdim=True)
    whole = torch.equal(mask, torch.arange(mask.size(1)) < n)
    assert whole, "the mask has a hole: it is true up to the end, false behind it"
    rest = response[~mask]
    assert (rest == setting.tok.end).all(), (
        f"behind a response stands {rest.tolist()}, it should be the end, as generate "
        "has it"
    )
    for row in oracles.rows_of(response, mask):
        ended = [i for i, token in enumerate(row) if token == setting.tok.end]
        assert len(row) == 16 or ended == [len(row) - 1], (
            f"a response of {len(row)} tokens does not end with the end: {row}"
        )


def test_a_row_does_not_depend_on_its_neighbours(impl, rng):
    setting = Setting(impl, rng)
    tau = setting.middle()
    together = oracles.rows_of(*setting.call(tau))
    for example, row in zip(setting.batch, together, strict=True):
        alone = oracles.rows_of(*setting.call(tau, [example]))[0]
        assert alone == row, (
            f"alone, a response is {alone}, and beside others {row}: is the KL a mean "
            "over the batch, or a row in the place of another?"
        )


def test_nothing_drops_out_and_the_modes_stay(impl, rng):
    setting = Setting(impl, rng)
    tau, student = 2.0, setting.student
    before = oracles.rows_of(*setting.call(tau))
    student.train().dropout = 0.5
    after = oracles.rows_of(*setting.call(tau))
    assert student.training, "the student was in train mode, and is not any more"
    assert not setting.teacher.training, "the teacher is in train mode afterwards"
    assert after == before, "the student writes with dropout: eval() while it responds"
    setting.student.eval()
    setting.teacher.train().dropout = 0.5
    again = oracles.rows_of(*setting.call(tau))
    assert not student.training, "the student was in eval mode, and is not any more"
    assert setting.teacher.training, "the teacher was in train mode, and is not now"
    setting.teacher.eval()
    assert again == before, "the teacher writes with dropout: eval() while it responds"


def test_it_leaves_no_trace(impl, rng):
    setting = Setting(impl, rng)
    both = setting.student, setting.teacher
    before = [p.clone() for m in both for p in m.parameters()]
    state = torch.get_rng_state()
    response, _ = setting.call(2.0)
    assert torch.equal(state, torch.get_rng_state()), (
        "torch's own generator was used: all numbers come from data.get_uniform"
    )
    assert not response.requires_grad, "the response has a gradient"
    after = [p for m in both for p in m.parameters()]
    same = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert same and all(p.grad is None for p in after), "the models were changed"


@functools.cache
def variant():
    return Modules(changes_of("speculative"))


def test_it_is_what_the_variant_of_sdft_does(impl, rng):
    """variants.py speculative, the diff, writes the same responses with a cache."""
    setting, m = Setting(impl, rng, B=4), variant()
    models = setting.student, setting.teacher
    for tau in (0.0, setting.middle(), 1e9):
        cfg = m.sdft.Config(
            seed=setting.cfg.seed, max_new_tokens=setting.cfg.max_new_tokens, tau=tau
        )
        theirs = m.sdft.get_responses(
            *models, setting.batch, setting.tok, cfg, setting.step
        )
        yours = setting.call(tau)
        same = all(torch.equal(x, y) for x, y in zip(yours, theirs, strict=True))
        assert same, f"variants.py speculative --tau {tau} writes other responses here"
