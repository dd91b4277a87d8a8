"""e14, find the silent bug: a check that finds ten broken copies of sdft.py and leaves
the right ones alone. Difficulty 4, 60 minutes, 10 points: one for each copy.

Right are the project's sdft.py, and one that is written in another way. Each broken
copy has one bug; all of them train without an error. A bug counts as found if the check
raises on it and raises on no right copy, before and after.
"""

import functools
import inspect

import torch
from variants import KL_LOSS, Modules

FLOAT64 = True
STEP = "        optimizer.step()\n        optimizer.zero_grad()\n"
UPDATE = ("        update_teacher(teacher, student, cfg)"
          "  # critical: once per update, after it\n")  # fmt: skip
MASK = "    mask = mask & (mask.cumsum(1) > cfg.skip_first_tokens)"
AVERAGE = "t.copy_(cfg.ema_rate * s + (1 - cfg.ema_rate) * t)"
PROMPTS = "    shown = data.pad_batch(data.teacher_prompt, batch, tok, mask.device)\n"
SUMS = '        sums = {"stop"'

REWRITTEN = (
    (KL_LOSS, """\
    s, t = map(make_logits, (hidden, teacher_hidden), heads, [cfg.temperature] * 2)
    sums = {"kl_student_teacher": kl_reference(s, t, "reverse"),
            "student_entropy": entropy(s), "teacher_entropy": entropy(t)}
    sums = {key: weight @ x.detach() for key, x in sums.items() if watch}
    return weight @ kl_reference(s, t, cfg.kl), sums
"""),
    ("import chunked_kl,", "import entropy, kl_reference, make_logits,"),
    (AVERAGE, "t.lerp_(s, cfg.ema_rate)"),
    (STEP, "        optimizer.step()\n"),
    (SUMS, f"        optimizer.zero_grad()\n{SUMS}"),
)  # fmt: skip

PROMPT_COUNTS = """\
    # the <|start|> of each prompt becomes the first token of its response
    bare, shown = (bare[0], bare[1] - 1), (shown[0], shown[1] - 1)
    response = torch.nn.functional.pad(response, (1, 0), value=tok.start)
    mask = torch.nn.functional.pad(mask, (1, 0), value=True)
"""

BUGS = {  # what is wrong with a copy: changes of sdft.py
    "the teacher sees no demonstration": (
        (PROMPTS, PROMPTS.replace("teacher_prompt", "student_prompt")),
    ),
    "the student sees the demonstration when it responds": (
        ("    bare = data.pad_batch(data.student_prompt, batch, tok, device)",
         "    bare = data.pad_batch(data.teacher_prompt, batch, tok, device)"),
    ),
    "forward and reverse KL are exchanged": (
        (KL_LOSS, KL_LOSS.replace("cfg.kl", '{"forward": "reverse", "reverse": '
                                            '"forward"}.get(cfg.kl, cfg.kl)')),
    ),
    "the last token of the prompt counts in the loss": (
        (PROMPTS, PROMPTS + PROMPT_COUNTS),
    ),
    "the end of a response does not count in the loss": (
        (MASK, f"    mask = mask & (response != tok.end)\n{MASK}"),
    ),
    "the responses are stale: the base writes them, not the student as it is now": (
        ("get_responses(student, micro,", "get_responses(base, micro,"),
    ),
    "the average is inverted: ema_rate of the teacher, 1 - ema_rate of the student": (
        (AVERAGE, "t.copy_(cfg.ema_rate * t + (1 - cfg.ema_rate) * s)"),
    ),
    "the teacher is updated before the step, so it is always one step behind": (
        (STEP + UPDATE, UPDATE + STEP),
    ),
    "the teacher has dropout, as a student in train mode": (
        ("requires_grad_(False).eval()", "requires_grad_(False).train()"),
    ),
    "the gradients are never set to zero, and add up over the steps": (
        (STEP, "        optimizer.step()\n"),
    ),
}  # fmt: skip

RIGHT = {
    "the project's own sdft.py": (),
    "a right sdft.py, written in another way (other functions for KL and average, the "
    "gradients set to zero before the loss, not after the step)": REWRITTEN,
}  # fmt: skip

shared = Modules()


@functools.cache
def copy_of(changes):
    """A set of modules with a changed sdft.py; model and data are the same for all."""
    m = Modules([("sdft.py", *change) for change in changes])
    m._loaded.update(model=shared.model, data=shared.data)
    return m


def namespaces(m):
    """Where a check may patch something: the modules, and the classes in them."""
    for module in (m.model, m.data, m.sdft):
        yield module
        own = (x for x in vars(module).values() if isinstance(x, type))
        yield from (x for x in own if x.__module__ == module.__name__)


def restore(before):
    for where, names in before:
        for name, value in names.items():
            if vars(where).get(name) is not value:
                setattr(where, name, value)
        for name in vars(where).keys() - names.keys():
            delattr(where, name)


def outcome(impl, changes):
    """What the student's check does with a copy: None, or what it raised."""
    m, own = copy_of(changes), impl.sdft
    theirs = inspect.unwrap(impl.extra.check_sdft)
    names = getattr(theirs, "__globals__", vars(impl.extra))
    # whoever imports sdft to compare with it gets the copy itself
    impl._loaded["sdft"] = m.sdft
    imported = [name for name in names if names[name] is own]
    names.update(dict.fromkeys(imported, m.sdft))
    before = [(where, dict(vars(where))) for where in namespaces(m)]
    try:
        value = impl.extra.check_sdft(m)
    except NotImplementedError:
        raise
    except Exception as error:
        return error
    finally:
        restore(before)
        impl._loaded["sdft"] = own
        names.update(dict.fromkeys(imported, own))
    assert value is None, (
        f"your check returns {value!r}: it is to raise an AssertionError where sdft.py "
        "is broken, and to return nothing where it is right"
    )
    return None


@functools.lru_cache(maxsize=1)
def false_alarm(impl):
    """(which right copy, what the check raised there), or None."""
    for what, changes in RIGHT.items():
        if (error := outcome(impl, changes)) is not None:
            return what, error
    return None


def no_alarm(found):
    if found is None:
        return
    what, error = found
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    raise AssertionError(
        f"false alarm: your check raises on {what}. It says: {kind}{error}"
    )


def find(impl, rng, bug):
    torch.manual_seed(int(torch.randint(1000, (), generator=rng)))
    no_alarm(false_alarm(impl))
    error = outcome(impl, BUGS[bug])
    assert error is not None, f"not found: your check passes on a copy in which {bug}"


def test_it_raises_on_no_right_copy(impl):
    no_alarm(false_alarm(impl))


def test_it_finds_a_teacher_without_demonstration(impl, rng):
    find(impl, rng, list(BUGS)[0])


def test_it_finds_a_student_that_responds_with_the_demonstration(impl, rng):
    find(impl, rng, list(BUGS)[1])


def test_it_finds_exchanged_kls(impl, rng):
    find(impl, rng, list(BUGS)[2])


def test_it_finds_a_prompt_in_the_mask(impl, rng):
    find(impl, rng, list(BUGS)[3])


def test_it_finds_a_missing_end(impl, rng):
    find(impl, rng, list(BUGS)[4])


def test_it_finds_stale_responses(impl, rng):
    find(impl, rng, list(BUGS)[5])


def test_it_finds_an_inverted_average(impl, rng):
    find(impl, rng, list(BUGS)[6])


def test_it_finds_a_teacher_that_is_a_step_behind(impl, rng):
    find(impl, rng, list(BUGS)[7])


def test_it_finds_a_teacher_with_dropout(impl, rng):
    find(impl, rng, list(BUGS)[8])


def test_it_finds_gradients_that_add_up(impl, rng):
    find(impl, rng, list(BUGS)[9])


def test_it_still_leaves_a_right_copy_alone(impl, rng):
    """A check may not count its calls."""
    what = list(RIGHT)[int(torch.randint(2, (), generator=rng))]
    error = outcome(impl, RIGHT[what])
    no_alarm(error and (f"{what}, when it is called again", error))
