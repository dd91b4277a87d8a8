"""e10, the slow teacher: an average of the student. Difficulty 2, 20 minutes, 5 points.

The truth is the closed form after n updates, which no update computes.
"""

import copy

import kit
import torch
from kit import compare, small_model, weights

FLOAT64 = True


def pair(impl, rng, **changes):
    """A student, and a teacher with other weights that wants no gradient."""
    seed = int(torch.randint(1000, (), generator=rng))
    student = small_model(impl, seed=seed, **changes)
    teacher = small_model(impl, seed=seed + 1, **changes)
    teacher = teacher.requires_grad_(False).eval()
    check_that_it_moves(impl, *copy.deepcopy((student, teacher)))
    return student, teacher


def check_that_it_moves(impl, student, teacher):
    """In every test first: who changes nothing learns nothing from the others."""
    s, t = weights(student), weights(teacher)
    impl.sdft.update_teacher(teacher, student, config(impl, ema_rate=0.5))
    if any(not torch.equal(p, t.get(n)) for n, p in weights(teacher).items()):
        return
    for name, p in student.named_parameters():
        assert torch.equal(p, s[name]), (
            f"{name} of the student is changed, and nothing of the teacher: write into "
            "the teacher's tensors"
        )
    raise AssertionError(
        "no parameter moved: write into the teacher's tensors (copy_, lerp_); `t = "
        "...` only renames, and a returned teacher is not used"
    )


def parameters(teacher, student):
    """(name, the teacher's) of all parameters that the student has."""
    names = [name for name, _ in student.named_parameters()]
    return [(name, teacher.get_parameter(name)) for name in names]


def config(impl, ema_rate=0.5):
    return impl.sdft.Config(ema_rate=ema_rate)


@torch.no_grad()
def fill(model, value):
    for p in model.parameters():
        p.fill_(value)


@torch.no_grad()
def move(student, rng):
    """As an optimizer does it: in place."""
    for p in student.parameters():
        p.add_(torch.randn(p.shape, generator=rng))


def after(before, students, rate):
    """The teacher's weight after one update for each of these weights of the student:
    (1 - rate)^n of what it was, rate (1 - rate)^k of the student k updates ago."""
    n = len(students)
    value = (1 - rate) ** n * before
    for k, s in enumerate(reversed(students)):
        value = value + rate * (1 - rate) ** k * s
    return value


def test_a_quarter_of_the_student_from_zero_to_one(impl, rng):
    """Teacher 0, student 1, ema_rate .25: afterwards .25 in every weight."""
    student, teacher = pair(impl, rng)
    fill(student, 1.0)
    fill(teacher, 0.0)
    impl.sdft.update_teacher(teacher, student, config(impl, ema_rate=0.25))
    for name, p in parameters(teacher, student):
        compare(p, torch.full_like(p, 0.25), {
            "the rates are exchanged: ema_rate is the share of the student, and small":
                torch.full_like(p, 0.75),
            f"{name} of the teacher does not move: every parameter is averaged, biases "
            "and norms too": torch.zeros_like(p),
            f"{name} of the teacher is a copy of the student's: ema_rate is not used":
                torch.ones_like(p),
            f"{name} is averaged twice: head and embedding are one tensor, and "
            "state_dict has it under both names; parameters() gives it once":
                torch.full_like(p, 0.4375),
            f"{name} is ema_rate * student alone: (1 - ema_rate) * teacher is missing, "
            "or is it added?": torch.full_like(p, 1.25),
            f"{name} moves by the ema_rate of another configuration: take cfg.ema_rate":
                torch.full_like(p, impl.sdft.Config().ema_rate),
            f"{name} moves by cfg.lr: take cfg.ema_rate":
                torch.full_like(p, impl.sdft.Config().lr),
        }, f"{name} of the teacher, from 0 towards 1")  # fmt: skip


def test_the_teachers_own_share_stays(impl, rng):
    """Teacher 1, student 0, ema_rate .25: afterwards .75 in every weight."""
    student, teacher = pair(impl, rng)
    fill(student, 0.0)
    fill(teacher, 1.0)
    impl.sdft.update_teacher(teacher, student, config(impl, ema_rate=0.25))
    for name, p in parameters(teacher, student):
        compare(p, torch.full_like(p, 0.75), {
            "(1 - ema_rate) * teacher is missing: the teacher shrinks":
                torch.zeros_like(p),
            "the teacher keeps all of itself, and the student's share comes on top":
                torch.ones_like(p),
            "the rates are exchanged: ema_rate is the share of the student":
                torch.full_like(p, 0.25),
            f"{name} is averaged twice: head and embedding are one tensor":
                torch.full_like(p, 0.5625),
        }, f"{name} of the teacher, from 1 towards 0")  # fmt: skip


def test_updates_towards_a_student_that_stays_follow_the_closed_form(impl, rng):
    student, teacher = pair(impl, rng)
    s, t = weights(student), weights(teacher)
    for _ in range(5):
        impl.sdft.update_teacher(teacher, student, config(impl, ema_rate=0.3))
    for name, p in parameters(teacher, student):
        compare(p, s[name] + 0.7**5 * (t[name] - s[name]), {
            "the rates are exchanged: ema_rate is the share of the student":
                s[name] + 0.3**5 * (t[name] - s[name]),
            f"{name} is averaged twice at each update":
                s[name] + 0.7**10 * (t[name] - s[name]),
        }, f"{name} of the teacher after 5 updates")  # fmt: skip


def test_updates_towards_a_student_that_moves_follow_the_closed_form(impl, rng):
    student, teacher = pair(impl, rng)
    t, seen = weights(teacher), []
    for _ in range(4):
        move(student, rng)
        seen.append(weights(student))
        impl.sdft.update_teacher(teacher, student, config(impl, ema_rate=0.2))
    for name, p in parameters(teacher, student):
        students = [s[name] for s in seen]
        compare(p, after(t[name], students, 0.2), {
            "the student's mean over time has equal weights: it is to forget its past, "
            "(1 - ema_rate) at a time": sum(students) / 4,
            "the teacher follows the first student that it saw, not the present one":
                after(t[name], students[:1] * 4, 0.2),
        }, f"{name} after 4 updates towards a student that moves")  # fmt: skip


def test_head_and_embedding_stay_one_tensor_if_they_are_and_two_if_not(impl, rng):
    for tied in (True, False):
        student, teacher = pair(impl, rng, tie_weights=tied)
        s, t = weights(student), weights(teacher)
        impl.sdft.update_teacher(teacher, student, config(impl, ema_rate=0.25))
        head, embedding = teacher.lm_head.weight, teacher.wte.weight
        shared = head.data_ptr() == embedding.data_ptr()
        assert shared == tied, (
            "head and embedding of the teacher "
            + ("were one tensor and are two now: change the parameters in place"
               if tied else "were two tensors and are one now")
        )  # fmt: skip
        for name, p in parameters(teacher, student):
            compare(p, 0.25 * s[name] + 0.75 * t[name],
                    what=f"{name} of the teacher, tie_weights={tied}")  # fmt: skip


def test_a_frozen_teacher_stays_to_the_bit(impl, rng):
    student, teacher = pair(impl, rng)
    before = weights(teacher)
    impl.sdft.update_teacher(teacher, student, config(impl, ema_rate=0.0))
    for name, p in parameters(teacher, student):
        assert torch.equal(p, before[name]) or not kit.rounds_to_float32(
            p, before[name]
        ), f"{name} of a frozen teacher is rounded. {kit.FLOAT32}"
        assert torch.equal(p, before[name]), (
            f"{name} of a teacher that is frozen moves: with ema_rate 0 it stays as it "
            "is, to the bit"
        )


def test_a_live_teacher_is_the_student_and_shares_nothing_with_it(impl, rng):
    student, teacher = pair(impl, rng)
    s, t = weights(student), weights(teacher)
    impl.sdft.update_teacher(teacher, student, config(impl, ema_rate=1.0))
    for name, p in parameters(teacher, student):
        compare(p, s[name], {
            f"{name} of a live teacher does not move": t[name],
            f"{name} of a live teacher keeps a share of itself: with ema_rate 1 it is "
            "the student": 0.999 * s[name] + 0.001 * t[name],
        }, f"{name} of a live teacher, ema_rate 1,")  # fmt: skip
    move(student, rng)
    for name, p in parameters(teacher, student):
        compare(p, s[name], {
            f"{name} of the teacher moves with the student: they share one memory. "
            "Copy the numbers, not the tensor": student.get_parameter(name),
        }, f"{name} of the teacher, when the student went on")  # fmt: skip


def test_the_student_stays_as_it_is(impl, rng):
    student, teacher = pair(impl, rng)
    student(torch.tensor([[1, 2, 3]])).sum().backward()
    s, t = weights(student), weights(teacher)
    grads = {name: p.grad.clone() for name, p in student.named_parameters()}
    cfg = config(impl, ema_rate=0.25)
    before = copy.copy(cfg)
    impl.sdft.update_teacher(teacher, student, cfg)
    for name, p in student.named_parameters():
        moved = 0.25 * s[name] + 0.75 * t[name]
        assert torch.equal(p, s[name]), (
            f"{name} of the student is changed: "
            + ("it got the average, which is the teacher's"
               if torch.allclose(p, moved) else "only the teacher moves")
        )  # fmt: skip
        assert p.requires_grad, f"{name} of the student wants no gradient any more"
        same = p.grad is not None and torch.equal(p.grad, grads[name])
        assert same, f"the gradient of {name} of the student is changed"
    for mode in (False, True):  # any mode is looked at in every call
        student.train(mode), teacher.train(not mode)
        impl.sdft.update_teacher(teacher, student, cfg)
    assert cfg == before, "update_teacher changes the configuration"


def test_the_teacher_gets_no_gradient_and_no_graph(impl, rng):
    student, teacher = pair(impl, rng)
    student(torch.tensor([[1, 2, 3]])).sum().backward()
    for _ in range(2):
        impl.sdft.update_teacher(teacher, student, config(impl))
        for name, p in parameters(teacher, student):
            assert p.grad_fn is None and p.is_leaf, (
                f"{name} of the teacher remembers how it was made: autograd keeps "
                "every student of the past. Use torch.no_grad()"
            )
            assert not p.requires_grad, (
                f"{name} of the teacher wants a gradient: it is never trained"
            )
            assert p.grad is None, f"{name} of the teacher has a gradient"
    missing = set(weights(student)) - set(weights(teacher))
    assert not missing, f"the teacher lost its parameters {sorted(missing)}"


def test_small_steps_in_float32_are_not_lost(impl, rng):
    """ema_rate .001 and a student 1 % away: a thousandth of a hundredth is less than
    the three digits of bfloat16, and more than the seven of float32."""
    student, teacher = (model.float() for model in pair(impl, rng))
    with torch.no_grad():
        for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
            # from 1 to 2, numbers that bfloat16 has, too
            t.copy_(torch.randint(128, 256, t.shape, generator=rng) / 128)
            s.copy_(1.01 * t)
    s, t = weights(student), weights(teacher)
    for _ in range(20):
        impl.sdft.update_teacher(teacher, student, config(impl, ema_rate=0.001))
    for name, p in parameters(teacher, student):
        assert p.dtype == torch.float32, f"{name} is {p.dtype}, it was float32"
        gap = s[name].double() - t[name].double()
        truth = s[name].double() - 0.999**20 * gap
        lost = (p == t[name]).double().mean().item()
        assert lost < 0.01, (
            f"{lost:.0%} of {name} do not move in 20 small steps: they round to "
            "nothing in bfloat16 or float16. Average in float32"
        )
        # each update rounds at most three times, by 2^-24 of a number below 2.1
        compare(p.double(), truth, what=f"{name} after 20 small steps",
                tolerance=20 * 3 * 2**-24)  # fmt: skip
