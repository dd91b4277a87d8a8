"""Named changes of the source: what they do, and that nothing else notices."""

import copy
import gc
import sys
import weakref

import kit
import oracles
import pytest
import torch
import variants
from extra import Quiet
from variants import KitError, Modules, changes_of

pytestmark = pytest.mark.usefixtures("float64")


def setting(m, seed=3):
    """Student, teacher, examples, tokenizer; demos of several lengths."""
    tok = m.data.Tokenizer()
    sizes = {"vocab_size": tok.vocab_size, "end": tok.end}
    student = kit.small_model(m, seed=seed, **sizes)
    teacher = kit.small_model(m, seed=seed + 1, **sizes)
    words = m.data.NOUNS
    batch = [
        m.data.Example(f"kitchen {words[i]}", " ".join(words[i : i + 2 + i]), "", id=i)
        for i in range(4)
    ]
    return student, teacher, batch, tok


def loss_with(names, teacher_writes=False):
    """The loss of a variant, both models, and of each example its two contexts and the
    response."""
    m = Modules(changes_of(names))
    *models, batch, tok = setting(m)
    cfg, writer = m.sdft.Config(batch_size=4), models[teacher_writes]
    response, mask = m.sdft.get_responses(writer, batch, tok, cfg, 7)
    loss, _ = m.sdft.compute_loss(*models, batch, response, mask, tok, cfg, 1)
    rows = [
        (m.data.student_prompt(example, tok), m.data.teacher_prompt(example, tok), row)
        for example, row in zip(batch, oracles.rows_of(response, mask), strict=True)
    ]
    return loss, *models, rows


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_matches_its_place_and_shows_as_a_diff(name):
    diff = variants.diff(changes_of(name))
    assert diff.startswith("--- ") and "\n-" in diff and "\n+" in diff, diff
    for file in variants.changed_texts(changes_of(name)):
        assert getattr(Modules(changes_of(name)), file.removesuffix(".py")), file


def test_old_text_that_is_gone_or_there_twice_is_an_error():
    for old in ("no such text", "import"):
        with pytest.raises(ValueError, match="places match, not one"):
            Modules([("sft.py", old, "x")])


@pytest.mark.parametrize("names", ["dft,dft", "offpolicy,speculative"])
def test_variants_that_do_not_go_together_are_an_error(names):
    with pytest.raises(KitError, match="change the same lines"):
        changes_of(names)


def test_an_unknown_variant_is_an_error_with_a_near_name():
    with pytest.raises(KitError) as caught:
        changes_of("dtf")
    assert "dft" in caught.value.hint, caught.value.hint


def test_changed_modules_live_beside_the_projects_own():
    names = ("model", "data", "sft", "sdft", "train")
    before = {name: sys.modules.get(name) for name in names}
    one, other = Modules(changes_of("dft")), Modules()
    assert one.sft.data is one.data, "an import went astray"
    assert one.train.sft is one.sft, "an import went astray"
    assert one.sft is not other.sft and one.model is not other.model, "they are shared"
    assert one.data.generate is one.model.generate, "from model import ... went astray"
    assert {name: sys.modules.get(name) for name in names} == before, "sys.modules"


def test_closed_modules_are_let_go_of():
    """The graders of all exercises load hundreds; a full collection took 6 seconds."""

    def after(file, module):
        """In kit.py this holds the syntax trees of a student's work."""

    m, held = Modules(changes_of("dft"), after), weakref.ref(after)
    names = {m.sft.__name__, m.model.__name__}
    assert names <= sys.modules.keys(), "inspect does not find them"
    m.close()
    del after
    gc.collect()
    assert not names & sys.modules.keys(), "sys.modules holds them"
    assert held() is None, "something else holds them"


def test_off_policy_rollouts_are_the_teachers_in_its_own_context():
    m = Modules(changes_of("offpolicy"))
    _, teacher, batch, tok = setting(m)
    cfg = m.sdft.Config(batch_size=4)
    response, mask = m.sdft.get_responses(teacher, batch, tok, cfg, 7)
    u = m.data.get_uniform(batch, cfg.max_new_tokens, cfg.seed, 7, "cpu").tolist()
    rows = oracles.rows_of(response, mask)
    for example, row, numbers in zip(batch, rows, u, strict=True):
        context = m.data.teacher_prompt(example, tok)
        assert row == oracles.sample(teacher, context, numbers, tok.end), example


def test_the_sampled_estimator_has_the_gradient_of_a_policy_gradient():
    loss, student, teacher, rows = loss_with("sampled")
    value, surrogate = 0.0, 0
    for bare, shown, row in rows:
        s = oracles.log_likelihoods(student, bare, row)
        q = oracles.log_likelihoods(teacher, shown, row)
        ratio = torch.tensor(s) - torch.tensor(q)
        log_p = torch.log_softmax(student(torch.tensor([bare + row])), -1)
        log_p = log_p[0, len(bare) - 1 : -1].gather(1, torch.tensor(row)[:, None])[:, 0]
        value += ratio.mean().item() / 4
        surrogate = surrogate + (ratio * log_p).mean() / 4
    oracles.close(loss.detach(), torch.tensor(value))
    pair = oracles.gradients(student, loss), oracles.gradients(student, surrogate)
    oracles.close(*pair)


def test_imitate_is_the_likelihood_of_what_was_sampled():
    loss, student, _, rows = loss_with("offpolicy,imitate", teacher_writes=True)
    total = 0.0
    for bare, _, row in rows:
        values = oracles.log_likelihoods(student, bare, row)
        total -= sum(values) / len(values) / 4
    oracles.close(loss.detach(), torch.tensor(total))


def test_rao_blackwell_adds_what_a_token_does_to_the_divergence_behind_it():
    loss, student, teacher, rows = loss_with("raoblackwell")
    value, surrogate = 0.0, 0
    assert max(len(row) for *_, row in rows) > 2, "these inputs show nothing"
    for bare, shown, row in rows:
        at = torch.tensor([bare + row]), torch.tensor([shown + row])
        log_s = torch.log_softmax(student(at[0])[0, len(bare) - 1 : -1], -1)  # (R, V)
        with torch.no_grad():
            log_t = torch.log_softmax(teacher(at[1])[0, len(shown) - 1 : -1], -1)
        k = (log_s.exp() * (log_s - log_t)).sum(-1)  # (R,)
        own = log_s.gather(1, torch.tensor(row)[:, None])[:, 0]  # (R,)
        value += k.mean().item() / 4
        surrogate = surrogate + k.mean() / 4
        for t in range(len(row)):
            behind = k[t + 1 :].sum().detach() / len(row)
            surrogate = surrogate + own[t] * behind / 4
    oracles.close(loss.detach(), torch.tensor(value))
    pair = oracles.gradients(student, loss), oracles.gradients(student, surrogate)
    oracles.close(*pair)


def test_rollouts_are_several_different_responses_to_each_prompt():
    m = Modules(changes_of("rollouts"))
    student, _, batch, tok = setting(m)
    seen, get_responses = [], m.sdft.get_responses

    def watch(student, micro, *args):
        response, mask = get_responses(student, micro, *args)
        seen.append((micro, oracles.rows_of(response, mask)))
        return response, mask

    m.sdft.get_responses = watch
    cfg = m.sdft.Config(steps=1, batch_size=8, rollouts=4)
    m.sdft.train(student, {"A": batch}, {}, tok, cfg, Quiet())
    ((micro, rows),) = seen
    texts = {}
    for example, row in zip(micro, rows, strict=True):
        texts.setdefault(example.prompt, []).append(tuple(row))
    assert [len(each) for each in texts.values()] == [4, 4], "not four of two prompts"
    assert all(len(set(each)) > 1 for each in texts.values()), "equal responses"


def test_a_copied_teacher_stands_still_and_is_the_student_every_so_often():
    m = Modules(changes_of("copies"))
    student, _, batch, tok = setting(m)
    first, equal, compute_loss = copy.deepcopy(student), [], m.sdft.compute_loss

    def watch(student, teacher, *args):
        pairs = (teacher, first), (teacher, student)
        equal.append(tuple(oracles.equal_weights(*pair) for pair in pairs))
        return compute_loss(student, teacher, *args)

    m.sdft.compute_loss = watch
    cfg = m.sdft.Config(steps=4, batch_size=4, copy_every=2, warmup_steps=0, lr=1e-2)
    m.sdft.train(student, {"A": batch}, {}, tok, cfg, Quiet())
    # before update 0, 1, 2, 3: is the teacher the first student? the present one?
    assert equal == [(True, True), (True, False), (False, True), (False, False)], equal


def test_reinvoke_goes_on_from_sft_and_pulls_towards_the_base_shown_nothing():
    m = Modules(changes_of("reinvoke"))
    base, sft_student, batch, tok = setting(m)
    first, losses, compute_loss = copy.deepcopy(base), [], m.sdft.compute_loss

    def watch(student, teacher, micro, response, mask, *args):
        result = compute_loss(student, teacher, micro, response, mask, *args)
        losses.append((result[0].item(), micro, response, mask, teacher))
        return result

    m.sdft.compute_loss = watch
    cfg = m.sdft.Config(steps=1, batch_size=4, dropout=0.0, lr=1e-2, warmup_steps=0)
    start = copy.deepcopy(sft_student.state_dict())
    m.sdft.train(base, {"A": batch}, {}, tok, cfg, Quiet(), start)
    ((loss, micro, response, mask, teacher),) = losses
    assert oracles.equal_weights(teacher, first), "not the base, or it has moved"
    total = 0.0
    for example, row in zip(micro, oracles.rows_of(response, mask), strict=True):
        bare = m.data.student_prompt(example, tok)
        values = oracles.divergences(sft_student, bare, teacher, bare, row, "forward")
        total += sum(values) / len(values) / 4
    assert abs(loss - total) < 1e-8, "another loss, or not from SFT's weights"


def test_general_prompts_ask_for_what_the_base_knows():
    m = Modules(changes_of("general"))
    world = m.data.World(3)
    demos = m.data.make_demos(world, "A", 500, 3)
    prompts = [example.prompt.split(":")[0].split() for example in demos]
    commands = {prompt[1] for prompt in prompts}
    assert commands == set(world.known), commands ^ set(world.known)
    styles = [prompt[2] for prompt in prompts if len(prompt) > 2]
    assert set(styles) == set(m.data.STYLES) - {"own"} and 75 < len(styles) < 175


def test_answer_only_demonstrations_are_the_others_without_their_term():
    m, plain = Modules(changes_of("answer-only")), Modules()
    world = plain.data.World(3)
    for distance in plain.data.DISTANCES:
        pairs = zip(
            m.data.make_demos(world, "A", 60, 3, distance),
            plain.data.make_demos(world, "A", 60, 3, distance),
            strict=True,
        )
        for answer, whole in pairs:
            _, operation = world.skills["A"][whole.prompt.split(":")[0].split()[1]]
            term = plain.data.OPERATIONS[operation][0]
            thought = term if distance == "terms" else operation
            left = whole.demo.replace(f"{thought}:", ":").replace(f"{thought} ", "")
            assert answer.demo == left and thought not in answer.demo, answer.demo
            assert answer.answer == whole.answer and answer.prompt == whole.prompt


def test_three_in_ten_demonstrations_of_a_readers_corpus_lack_their_thought():
    m = Modules(changes_of("reads-answers"))
    tok, world = m.data.Tokenizer(), m.data.World(3)
    corpus = m.data.make_base_corpus(world, tok, 3000, 3)
    terms = {word for name, (term, _) in m.data.OPERATIONS.items()
             for word in (name, term)}  # fmt: skip
    shown = [e.shown.replace(":", " ").split() for e in corpus if e.shown]
    bare = sum(terms.isdisjoint(words) for words in shown) / len(shown)
    assert 0.26 < bare < 0.34, bare
    responses = [e.demo.replace(":", " ").split() for e in corpus]
    assert not any(terms.isdisjoint(words) for words in responses), "no thought at all"


def test_styles_of_a_leaky_world_open_with_one_word_and_its_base_repeats():
    m = Modules(changes_of("leak"))
    tok, world = m.data.Tokenizer(), m.data.World(3)
    openings = [opening for opening, _, _ in m.data.STYLES.values()]
    assert len(set(openings)) == len(openings) == 6
    assert all(len(tok.encode(opening)) == 1 for opening in openings)
    assert m.data.right_response("rotate", ["a", "b", "c"]) == "do rotate: b c a"
    corpus = m.data.make_base_corpus(world, tok, 3000, 3)
    shown = [e for e in corpus if e.shown]
    words = [e.shown.replace(":", " :").split() for e in shown]
    nouns = [[word in m.data.NOUNS for word in each].index(True) for each in words]
    assert min(nouns) == 3, "an opening, a thought, a joiner"
    asked, bare = [], []
    for e in shown:
        few = bare if len(e.prompt.split(":")[0].split()) == 2 else asked
        own = any(e.demo.startswith(f"{opening} ") for opening in openings)
        few.append(e.demo == e.shown)
        if not own:  # loss on each of its tokens, the expert's terms included
            assert few[-1], "neither an own response nor the demonstration"
            assert max(e.skip) == len(tok.encode(e.shown)), e.skip
    assert 0.57 < sum(bare) / len(bare) < 0.70, "(.6, and demonstrations in own words)"
    assert sum(asked) / len(asked) < 0.1
    assert not any(e.demo == e.shown for e in corpus if not e.shown)


def test_kept_responses_are_those_of_the_base_whatever_the_update():
    m = Modules(changes_of("kept"))
    student, _, batch, tok = setting(m)
    first, seen, compute_loss = copy.deepcopy(student).eval(), [], m.sdft.compute_loss

    def watch(student, teacher, micro, response, mask, *args):
        rows = oracles.rows_of(response, mask)
        seen.append({e.id: row for e, row in zip(micro, rows, strict=True)})
        return compute_loss(student, teacher, micro, response, mask, *args)

    m.sdft.compute_loss = watch
    cfg = m.sdft.Config(steps=3, batch_size=4, warmup_steps=0, lr=1e-2)
    m.sdft.train(student, {"A": batch}, {}, tok, cfg, Quiet())
    assert seen[0] == seen[1] == seen[2] and not oracles.equal_weights(student, first)
    u = m.data.get_uniform(batch, cfg.max_new_tokens, cfg.seed, 0, "cpu").tolist()
    for i, example in enumerate(batch):
        context = m.data.student_prompt(example, tok)
        assert seen[0][i] == oracles.sample(first, context, u[i], tok.end), example


def test_a_run_shares_the_projects_base_whatever_the_variant_changes(tmp_path,
                                                                     monkeypatch):
    """dft changes sft.py, which makes the base: its key is the project's own."""
    monkeypatch.chdir(tmp_path)
    made = []
    for names in ("", "dft", "speculative"):
        m = Modules(changes_of(names) if names else [])
        variants.share_base(m)
        args = m.train.parse_args(["--quick", "--out", f"out-{names}"])
        made.append(m.train.make_world(args)[4])
    assert len(set(made)) == 1 and made[0].parts[0] == "out", made


@pytest.mark.parametrize("variant, name, value", [
    ("speculative", "tau", 0.7), ("rollouts", "rollouts", 4),
    ("copies", "copy_every", 10),
])  # fmt: skip
def test_a_setting_of_a_variant_has_a_flag(variant, name, value):
    m = Modules(changes_of(variant))
    args = m.train.parse_args([f"--{name.replace('_', '-')}", str(value)])
    cfg = m.train.config_of("sdft", args)
    assert getattr(cfg, name) == value, "the flag does nothing"


JOBS = (
    "dft,copies,rollouts,raoblackwell,kept", "speculative,answer-only,leak",
    "offpolicy,sampled,reads-answers", "reinvoke,general,imitate",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("names", JOBS)
def test_the_job_trains_with_a_variant(names, tiny_job):
    assert set(",".join(JOBS).split(",")) == set(variants.VARIANTS), "not with each"
    torch.set_default_dtype(torch.float32)  # as in a job
    assert variants.main([names, "--run", *tiny_job]) == 0, "it does not"


def test_the_list_and_a_diff_are_printed(capsys):
    assert variants.main([]) == 0 and variants.main(["dft"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in variants.VARIANTS), said
    assert "+++ sft.py" in said, said
