"""Self-distillation: contexts, responses, loss and the teacher's average.

What it promises together with SFT is tested in test_pair.py.
"""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from oracles import (
    divergences,
    entropy,
    equal_weights,
    gradients,
    make_model,
    next_logits,
    record_tokens,
    rows_of,
    sample,
)

import data
import sdft
import sft
import train
from data import Benchmark, Example, make_rng
from model import GPT, KLS, GPTConfig

pytestmark = pytest.mark.usefixtures("float64")

TOK = data.Tokenizer()
DEMOS = data.make_demos(data.World(0), "A", 16, 0)
BATCH = [  # prompts and demonstrations of several lengths
    *DEMOS[:5],
    Example("garden button: owl", "bag", "", id=5),
    Example("kitchen kettle robot: apple", "copy equals apple beep stop", "", id=6),
    Example("harbour violin: candle spoon tower bag", "bag", "", id=7),
]
OTHER_DEMOS = [replace(e, demo="double gives bag bag done sir") for e in BATCH]
CFG = sdft.Config(batch_size=len(BATCH), max_new_tokens=8)
KINDS = pytest.mark.parametrize("kl", KLS)


def small_model(seed=0, **changes):
    """In float64; about a fifth of what it predicts is the end."""
    sizes = {"vocab_size": TOK.vocab_size, "n_tokens": TOK.n_tokens, "n_layer": 1}
    return make_model(seed, end=TOK.end, **{**sizes, **changes})


def make_pair(seed=0):
    """Student and teacher with different weights."""
    return small_model(seed), sdft.make_teacher(small_model(seed + 1))


def respond(student, batch=BATCH, cfg=CFG, step=1):
    return sdft.get_responses(student, batch, TOK, cfg, step)


def sdft_loss(student, teacher, batch, response, mask, cfg=CFG, step=1):
    return sdft.compute_loss(student, teacher, batch, response, mask, TOK, cfg, step)[0]


def contexts_of(example):
    """The student's and the teacher's, written out."""
    bare = TOK.encode(example.prompt) + [TOK.start]
    shown = TOK.encode(f"{example.prompt} example {example.demo}") + [TOK.start]
    return bare, shown


def divergences_of(student, teacher, example, tokens, kl="forward", temperature=1.0):
    """One number for each token of a response: each context alone, no padding."""
    bare, shown = contexts_of(example)
    return divergences(student, bare, teacher, shown, tokens, kl, temperature)


def uniforms(n=CFG.max_new_tokens, step=1):
    """For each example of the batch, the numbers that its response is drawn with."""
    return data.get_uniform(BATCH, n, CFG.seed, step, "cpu").tolist()


# ---- The loss ----------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_the_loss_is_what_two_plain_loops_say(kl, tau):
    """Rows, then tokens, each formula typed out anew."""
    student, teacher = make_pair()
    cfg = replace(CFG, kl=kl, temperature=tau)
    response, mask = respond(student)
    means = []
    for example, tokens in zip(BATCH, rows_of(response, mask), strict=True):
        values = divergences_of(student, teacher, example, tokens, kl, tau)
        means.append(math.fsum(values) / len(tokens))
    loss = sdft_loss(student, teacher, BATCH, response, mask, cfg)
    assert loss.item() == pytest.approx(math.fsum(means) / len(BATCH), rel=1e-9)
    assert len({len(row) for row in rows_of(response, mask)}) > 2


@KINDS
def test_same_context_and_weights_give_zero_loss_and_gradient(kl, monkeypatch):
    """The signal is the demonstration, and nothing else."""
    student = small_model()
    teacher, cfg = sdft.make_teacher(student), replace(CFG, kl=kl)
    response, mask = respond(student)
    loss = sdft_loss(student, teacher, BATCH, response, mask, cfg)
    assert loss > 1e-3
    assert max(g.abs().max() for g in gradients(student, loss)) > 1e-4
    monkeypatch.setattr(data, "teacher_prompt", data.student_prompt)
    loss = sdft_loss(student, teacher, BATCH, response, mask, cfg)
    assert abs(loss) < 1e-12
    assert max(g.abs().max() for g in gradients(student, loss)) < 1e-7


@KINDS
def test_the_gradient_is_that_of_finite_differences(kl):
    """Through contexts, temperature and mean; the response itself stays fixed."""
    student, teacher = make_pair()
    cfg = replace(CFG, kl=kl, temperature=0.8, skip_first_tokens=1)
    response, mask = respond(student)

    def loss():
        return sdft_loss(student, teacher, BATCH, response, mask, cfg)

    rng, eps = make_rng(0), 1e-5
    for p, g in zip(student.parameters(), gradients(student, loss()), strict=True):
        direction = torch.randn(p.shape, generator=rng)
        with torch.no_grad():
            p += eps * direction
            up = loss().item()
            p -= 2 * eps * direction
            down = loss().item()
            p += eps * direction
        slope = (g * direction).sum().item()
        assert (up - down) / (2 * eps) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_logits_align_across_contexts():
    """Both sequences end in the same tokens, right behind contexts of their own."""
    student, teacher = make_pair()
    response, mask = respond(student)
    seen_student, seen_teacher = record_tokens(student), record_tokens(teacher)
    sdft_loss(student, teacher, BATCH, response, mask)
    (by_student,), (by_teacher,) = seen_student, seen_teacher
    for i, tokens in enumerate(rows_of(response, mask)):
        bare, shown = contexts_of(BATCH[i])
        for rows, right in ((by_student, bare + tokens), (by_teacher, shown + tokens)):
            row = rows[i].tolist()[: len(right)]
            assert row in (right, right[:-1]), "the longest lacks its last token"


def test_another_demonstration_changes_the_teacher_and_not_the_student():
    """Bit for bit, in the loss and in the sampler."""
    student, teacher = make_pair()
    response, mask = respond(student)
    seen_student, seen_teacher = record_tokens(student), record_tokens(teacher)
    losses = [
        sdft_loss(student, teacher, batch, response, mask)
        for batch in (BATCH, OTHER_DEMOS)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert torch.equal(*seen_student)
    assert not torch.equal(seen_teacher[0][:, :20], seen_teacher[1][:, :20])
    again, _ = respond(student, OTHER_DEMOS)
    assert torch.equal(again, response)


def test_no_token_of_a_demonstration_reaches_the_sampler_or_the_evaluator():
    """What the student is given to read is its prompt."""
    student = small_model()
    seen = record_tokens(student)
    respond(student)
    data.accuracy(student, Benchmark(BATCH, data.grade_items), TOK, 8)
    whole = [idx for idx in seen if idx.size(1) > 1]  # the others are single new tokens
    assert len(whole) == 2
    for idx in whole:
        for row, example in zip(idx.tolist(), BATCH, strict=True):
            bare, _ = contexts_of(example)
            assert row[: len(bare)] == bare
            assert set(row[len(bare) :]) <= {TOK.end}


def test_skipped_tokens_are_left_out_of_the_loss_only():
    """Later tokens still see them; a row of fewer tokens adds 0."""
    student, teacher = make_pair()
    response, mask = respond(student)
    rows = rows_of(response, mask)
    assert min(map(len, rows)) <= 5 < max(map(len, rows))
    for skip in (0, 1, 5, 100):
        means = []
        for example, tokens in zip(BATCH, rows, strict=True):
            values = divergences_of(student, teacher, example, tokens)[skip:]
            means.append(math.fsum(values) / max(1, len(values)))
        cfg = replace(CFG, skip_first_tokens=skip)
        loss = sdft_loss(student, teacher, BATCH, response, mask, cfg)
        right = math.fsum(means) / len(BATCH)
        assert loss.item() == pytest.approx(right, rel=1e-9, abs=1e-15)


@KINDS
def test_where_all_tokens_are_skipped_loss_and_gradient_are_exactly_0(kl):
    """Not NaN from a mean over nothing; what is recorded is 0, too."""
    student, teacher = make_pair()
    response, mask = respond(student)
    cfg = replace(CFG, kl=kl, skip_first_tokens=mask.size(1))
    loss, extra = sdft.compute_loss(
        student, teacher, BATCH, response, mask, TOK, cfg, 0
    )
    assert loss == 0 and [x.item() for x in extra.values()] == [0, 0, 0]
    loss.backward()
    assert all(bool((p.grad == 0).all()) for p in student.parameters())


def test_a_run_that_skips_all_tokens_warns_at_each_record(tmp_path, capsys):
    """And its student stays what it was."""
    student, records = run(sdft, tmp_path, skip_first_tokens=16)
    assert [row["loss"] for row in records] == [row["grad_norm"] for row in records]
    assert [row["loss"] for row in records] == [0, 0, 0]
    assert equal_weights(student, small_model())
    text = capsys.readouterr().out
    assert text.count("warning: the gradient is 0, nothing is learnt") == 3
    run(sdft, tmp_path / "b", skip_first_tokens=1)
    assert "warning" not in capsys.readouterr().out


def test_the_warning_of_a_zero_gradient_is_not_hidden_by_another():
    """Where no response ends, both are said."""
    record = {"step": 0, "skill": "A", "loss": 0.0, "response_length": 16.0,
              "eos_rate": 0.0, "grad_norm": 0.0}  # fmt: skip
    text = train.describe(record)
    assert "EOS rate 0 %" in text and "the gradient is 0" in text


@KINDS
def test_a_temperature_divides_the_logits_of_both_models(kl):
    """The loss at 2 is that at 1 of two models with halved hidden states."""
    student, teacher = make_pair()
    response, mask = respond(student)
    cool = replace(CFG, kl=kl, temperature=2.0)
    loss = sdft_loss(student, teacher, BATCH, response, mask, cool)
    with torch.no_grad():
        student.ln_f.weight /= 2
        teacher.ln_f.weight /= 2
    same = sdft_loss(student, teacher, BATCH, response, mask, replace(CFG, kl=kl))
    assert loss.item() == pytest.approx(same.item(), rel=1e-12)


def test_what_is_recorded_beside_the_loss_is_right_by_plain_loops():
    """At a temperature of 1 and at another; and only in a step that is recorded."""
    student, teacher = make_pair()
    response, mask = respond(student)
    for tau in (1.0, 0.7):
        cfg = replace(CFG, temperature=tau)
        args = student, teacher, BATCH, response, mask, TOK, cfg
        (_, extra), (_, none) = (sdft.compute_loss(*args, step) for step in (10, 11))
        assert none == {}
        right = {"kl_student_teacher": 0, "student_entropy": 0, "teacher_entropy": 0}
        for example, tokens in zip(BATCH, rows_of(response, mask), strict=True):
            bare, shown = contexts_of(example)
            share = 1 / len(tokens) / len(BATCH)
            values = divergences_of(student, teacher, example, tokens, "reverse", tau)
            right["kl_student_teacher"] += share * math.fsum(values)
            for t in range(len(tokens)):
                s = next_logits(student, bare + tokens[:t])
                q = next_logits(teacher, shown + tokens[:t])
                right["student_entropy"] += share * entropy(s, tau)
                right["teacher_entropy"] += share * entropy(q, tau)
        got = {key: value.item() for key, value in extra.items()}
        assert got == pytest.approx(right, rel=1e-9)


# ---- The response ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_response_comes_from_the_current_student(temperature):
    """By a plain loop, before and after the student has changed."""
    student, seen = small_model(), []
    cfg = replace(CFG, temperature=temperature)
    for change in (0.0, 0.05):
        with torch.no_grad():
            for p in student.parameters():
                p += change * torch.randn(p.shape, generator=make_rng(0))
        got = rows_of(*respond(student, cfg=cfg))
        for example, row, u in zip(BATCH, got, uniforms(), strict=True):
            bare, _ = contexts_of(example)
            assert row == sample(student, bare, u, TOK.end, temperature)
        seen.append(got)
    assert seen[0] != seen[1]


def test_a_rollout_keeps_no_graph_and_restores_the_mode():
    student, teacher = make_pair()
    for training in (True, False):
        student.train(training)
        response, mask = respond(student)
        assert student.training == training
        assert not response.requires_grad and not response.is_inference()
        assert all(p.grad is None for p in student.parameters())
        loss = sdft_loss(student, teacher, BATCH, response, mask)
        assert loss.requires_grad, "the student still learns from it"


def test_a_rollout_cuts_off_no_unlikely_token(monkeypatch):
    """Neither top-k nor top-p; the last token of all can be drawn."""
    student = small_model(n_tokens=0)  # all rows of the embedding are tokens
    with torch.no_grad():  # make the last id the least likely of all
        student.lm_head.weight[-1] *= 3
        student.lm_head.weight[-1, 0] = student.lm_head.weight[:, 0].min() - 4
    bare = data.pad_batch(data.student_prompt, BATCH, TOK, "cpu")
    logits = student(bare[0])[range(len(BATCH)), bare[1] - 1]
    p = torch.softmax(logits, dim=-1)[:, -1]
    assert p.max() < 5e-3 and p.min() > 1e-12

    def nearly_one(batch, n, *_):
        return torch.full((len(batch), n), 1 - 1e-13)

    monkeypatch.setattr(data, "get_uniform", nearly_one)
    response, mask = respond(student)
    assert (response == TOK.vocab_size - 1).all() and len(response) == len(BATCH)


def test_the_mask_ends_with_the_first_end():
    """It is included; a response without one keeps all, and is counted."""
    student, ended = small_model(), 0
    cfg = replace(CFG, max_new_tokens=4)
    response, mask = respond(student, cfg=cfg)
    for row, seen in zip(response.tolist(), mask.tolist(), strict=True):
        n = row.index(TOK.end) + 1 if TOK.end in row else 4
        assert seen == [t < n for t in range(len(row))]
        ended += TOK.end in row
    assert 0 < ended < len(BATCH), "both kinds must occur"
    assert response.size(1) == 4
    sums, loss = {}, torch.zeros(())
    sdft.accumulate(sums, loss, response, mask, {}, TOK, cfg)
    assert sums["eos_rate"] == ended / len(BATCH)
    assert sums["response_length"] == mask.sum() / len(BATCH)


def test_each_prompt_of_a_step_is_another_one_and_gets_one_response_of_its_own():
    """Drawn after that prompt, with the numbers of that step and example."""
    student, cfg = small_model(), replace(CFG, max_new_tokens=3)
    for step in range(3):
        batch = data.get_batch(DEMOS, 8, CFG.seed, step)
        assert len({example.prompt for example in batch}) == 8
        rows = rows_of(*respond(student, batch, cfg, step))
        for example, row in zip(batch, rows, strict=True):
            u = data.get_uniform([example], 3, CFG.seed, step, "cpu")[0].tolist()
            assert row == sample(student, contexts_of(example)[0], u, TOK.end)


def test_each_step_draws_new_responses():
    student = small_model()
    first = respond(student, step=0)[0]
    assert torch.equal(first, respond(student, step=0)[0])
    second = respond(student, step=1)[0]
    assert first.tolist() != second.tolist()


# ---- The teacher -------------------------------------------------------------------


@KINDS
def test_no_gradient_reaches_the_teacher(kl):
    student = small_model()
    teacher = sdft.make_teacher(student)
    optimizer = sdft.make_optimizer(student, CFG)
    response, mask = respond(student)
    cfg = replace(CFG, kl=kl)
    sdft_loss(student, teacher, BATCH, response, mask, cfg).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert not teacher.training and student.training
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in student.parameters()}
    assert not trained & {id(p) for p in teacher.parameters()}
    mine, its = (
        {x.untyped_storage().data_ptr() for x in [*m.parameters(), *m.buffers()]}
        for m in (student, teacher)
    )
    assert not mine & its, "no storage is shared"
    teacher.requires_grad_(True)  # even so
    sdft_loss(student, teacher, BATCH, response, mask, cfg).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_making_a_teacher_leaves_the_student_alone():
    student = small_model()
    teacher = sdft.make_teacher(student)
    assert equal_weights(student, teacher)
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert teacher.dtype == student.dtype


@KINDS
def test_a_live_teacher_gives_the_gradient_of_a_copy(kl):
    """The student itself as teacher is a constant, too."""
    student, teacher = make_pair()
    cfg = replace(CFG, kl=kl, ema_rate=1.0)
    sdft.update_teacher(teacher, student, cfg)
    assert equal_weights(teacher, student)
    response, mask = respond(student)
    by_teacher = []
    for each in (teacher, copy.deepcopy(student), student):
        loss = sdft_loss(student, each, BATCH, response, mask, cfg)
        by_teacher.append(gradients(student, loss))
    for a, b, c in zip(*by_teacher, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert max(g.abs().max() for g in by_teacher[0]) > 1e-4


def test_ema_rate_0_freezes_and_1_copies():
    student, teacher = make_pair()
    before = copy.deepcopy(teacher)
    for _ in range(5):
        sdft.update_teacher(teacher, student, replace(CFG, ema_rate=0.0))
    assert equal_weights(teacher, before) and not equal_weights(teacher, student)
    sdft.update_teacher(teacher, student, replace(CFG, ema_rate=1.0))
    assert equal_weights(teacher, student)


@pytest.mark.parametrize("ema_rate", [0.02, 0.3])
def test_the_teacher_approaches_a_constant_student_geometrically(ema_rate):
    """Teacher_n = student + (1 - ema_rate)^n (teacher_0 - student)."""
    student, teacher = make_pair()
    first, student_before = copy.deepcopy(teacher), copy.deepcopy(student)
    cfg = replace(CFG, ema_rate=ema_rate)
    for n in range(1, 8):
        sdft.update_teacher(teacher, student, cfg)
        for t, s, t_0 in zip(
            teacher.parameters(), student.parameters(), first.parameters(), strict=True
        ):
            right = s + (1 - ema_rate) ** n * (t_0 - s)
            assert (t - right).abs().max() < 1e-14
    assert equal_weights(student, student_before)


def share_closed(dtype):
    """How much of a gap of 1 % an ema_rate of 0.01 closes in 250 updates."""
    sizes = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "n_inner": 48}
    student = GPT(GPTConfig(**sizes), make_rng(0, "weights"))
    teacher = sdft.make_teacher(student)
    with torch.no_grad():
        for p in student.parameters():
            p *= 1.01
    student, teacher = student.to(dtype), teacher.to(dtype)

    def gap():
        pairs = zip(student.parameters(), teacher.parameters(), strict=True)
        return sum((s.double() - t.double()).abs().sum() for s, t in pairs)

    before, cfg = gap(), replace(CFG, ema_rate=0.01)
    for _ in range(250):
        sdft.update_teacher(teacher, student, cfg)
    return 1 - (gap() / before).item()


def test_the_average_moves_in_float32_and_hardly_in_bfloat16():
    """1 - 0.99^250 = 0.919; in bfloat16 most steps round to nothing."""
    assert share_closed(torch.float32) == pytest.approx(1 - 0.99**250, abs=1e-3)
    assert share_closed(torch.bfloat16) < 0.1


def test_tied_embeddings_are_averaged_once_and_stay_tied():
    """Averaged twice, the teacher would run ahead; tables are copied."""
    student, teacher = make_pair()
    first = teacher.wte.weight.clone()
    sdft.update_teacher(teacher, student, replace(CFG, ema_rate=0.25))
    right = 0.25 * student.wte.weight + 0.75 * first
    assert (teacher.wte.weight - right).abs().max() < 1e-15
    assert teacher.lm_head.weight is teacher.wte.weight
    assert len(list(teacher.parameters())) == len(list(student.parameters()))
    assert torch.equal(teacher.cos, student.cos)
    assert torch.equal(teacher.sin, student.sin)
    untied = sdft.make_teacher(small_model(tie_weights=False))
    assert untied.lm_head.weight is not untied.wte.weight


# ---- The loop ----------------------------------------------------------------------


def run(module, folder, seed=0, **settings):
    """Three steps of a method; returns its student and its records, without times."""
    student = small_model()
    cfg = module.Config(
        steps=3, batch_size=4, warmup_steps=1, lr=1e-3, log_every=1, save_every=1,
        seed=seed, **settings,
    )  # fmt: skip
    module.train(student, {"A": DEMOS}, {}, TOK, cfg, train.Run(folder))
    records = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in records]
    assert len(records) == 3
    return student, [{**record, "seconds": None} for record in records]


def saved_teacher(folder):
    teacher = small_model()
    saved = train.read_checkpoint(folder / "checkpoint.pt")
    teacher.load_state_dict(saved["models"]["teacher"])
    return teacher


def test_the_same_seed_gives_the_same_losses(tmp_path):
    """And another seed others."""
    student, first = run(sdft, tmp_path / "a")
    again, second = run(sdft, tmp_path / "b")
    other, third = run(sdft, tmp_path / "c", seed=1)
    assert first == second and equal_weights(student, again)
    assert first != third and not equal_weights(student, other)


def test_both_methods_see_the_same_examples_in_the_same_order(tmp_path, monkeypatch):
    """However many random numbers the responses take."""
    get_batch, drawn = data.get_batch, []

    def keep(*args):
        batch = get_batch(*args)
        drawn.append([example.id for example in batch])
        return batch

    monkeypatch.setattr(data, "get_batch", keep)
    run(sft, tmp_path / "a")
    run(sdft, tmp_path / "b")
    run(sdft, tmp_path / "c", max_new_tokens=3)
    assert drawn[:3] == drawn[3:6] == drawn[6:]
    assert drawn[0] != drawn[1]


def test_the_teacher_is_averaged_once_after_each_optimizer_step(tmp_path, monkeypatch):
    """Not for each micro-batch, and never before the step."""
    update, students, teachers = sdft.update_teacher, [small_model()], []

    def keep(teacher, student, cfg):
        assert not equal_weights(student, students[-1]), "the step comes first"
        students.append(copy.deepcopy(student))
        update(teacher, student, cfg)
        teachers.append(copy.deepcopy(teacher))

    monkeypatch.setattr(sdft, "update_teacher", keep)
    student, _ = run(sdft, tmp_path / "a", micro_batches=2, ema_rate=0.25)
    assert len(teachers) == 3 and equal_weights(student, students[-1])
    weights = 0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25  # of base and three students
    for t, *ps in zip(
        saved_teacher(tmp_path / "a").parameters(),
        *[each.parameters() for each in students],
        strict=True,
    ):
        right = sum(w * p for w, p in zip(weights, ps, strict=True))
        assert (t - right).abs().max() < 1e-14


@pytest.mark.parametrize("ema_rate", [0.0, 0.001, 1.0])
def test_training_with_a_frozen_an_averaged_and_a_live_teacher(ema_rate, tmp_path):
    """At 0 it stays the base, at 1 it is the student, between them neither."""
    student, _ = run(sdft, tmp_path, ema_rate=ema_rate)
    teacher = saved_teacher(tmp_path)
    assert equal_weights(teacher, small_model()) == (ema_rate == 0)
    assert equal_weights(teacher, student) == (ema_rate == 1)
    assert not equal_weights(student, small_model())


def test_the_teacher_is_the_student_s_weights_before_the_first_step(tmp_path):
    """The first loss of a run is that of the base model, shown the demonstrations."""
    _, records = run(sdft, tmp_path / "a", dropout=0.0)
    base, means = small_model(), []
    for example in data.get_batch(DEMOS, 4, 0, 0):
        u = data.get_uniform([example], 16, 0, 0, "cpu")[0].tolist()
        tokens = sample(base, contexts_of(example)[0], u, TOK.end)
        values = divergences_of(base, base, example, tokens)
        means.append(math.fsum(values) / len(values))
    assert records[0]["loss"] == pytest.approx(math.fsum(means) / 4, rel=1e-9)


def test_distillation_closes_the_gap_to_the_teacher(tmp_path):
    """Eighty steps towards a fixed teacher, on the same prompts, lower the loss."""
    student = small_model()
    cfg = sdft.Config(
        steps=80, batch_size=8, warmup_steps=1, lr=3e-3, log_every=79,
        ema_rate=0.0, max_new_tokens=8, dropout=0.0,
    )  # fmt: skip
    sdft.train(student, {"A": DEMOS[:8]}, {}, TOK, cfg, train.Run(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["loss"] for line in lines)
    assert last < 0.25 * first
