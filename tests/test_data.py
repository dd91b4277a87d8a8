"""The tiny world: its words, the two contexts, grades, batches and evaluations."""

import hashlib
import json
import random
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from oracles import LargestTensor, divergences, log_likelihoods, sample
from test_pair import small_model

import data
import model
from data import Benchmark, Example, World, get_batch, get_uniform, make_rng
from sft import Config

pytestmark = pytest.mark.usefixtures("float64")
bare, shown, demo_ids = data.student_prompt, data.teacher_prompt, data.demo_response
TOK, WORLD = data.Tokenizer(), World(0)
CORPUS = data.make_base_corpus(WORLD, TOK, 16384, 0)
DEMOS = {skill: data.make_demos(WORLD, skill, 64, 0) for skill in data.SKILLS}
OF_SKILLS = sum(DEMOS.values(), [])
TASKS = data.make_tasks(WORLD, 64, 0)
BENCHMARKS = TASKS["new"] | TASKS["prior"]
TESTED = [e for benchmark in BENCHMARKS.values() for e in benchmark.examples]
TERMS = {expert: name for name, (expert, _) in data.OPERATIONS.items()}
TERM_IDS = {TOK.encode(term)[0] for term in TERMS}
# what each operation does to "a b c", written by hand
BY_HAND = dict(each.split("=") for each in (
    "copy=abc reverse=cba first=a last=c rotate=bca return=cab behead=bc shorten=ab "
    "stutter=aabc echo=abcc ends=ac cross=ca second=b unwind=cb rewind=ba double=aa "
    "pair=cc switch=bac"
).split())  # fmt: skip


def asked(example):
    domain, command, *style = example.prompt.split(":")[0].split()
    return domain, command, *(style or ["own"])


def right_items(operation, example):
    query = example.prompt.split(":")[1].split(" example ")[0].split()
    return [query["abc".index(x)] for x in BY_HAND[operation]]


def worded(style, thought, items):
    opening, joiner, closing = data.STYLES[style]
    words = " ".join([opening, thought, joiner, *items, closing]).split()
    return " ".join(words).replace(" :", ":")


def operation_in(text):
    """The operation that a response names, in its own word or in the expert's."""
    own = TERMS | {name: name for name in data.OPERATIONS}
    (found,) = {own[word] for word in text.replace(":", " ").split() if word in own}
    return found


def test_each_operation_does_what_was_worked_out_by_hand_and_each_word_is_a_token():
    """No two do or mean the same: an operation or a term is never graded as an item."""
    items = [*"abc"]
    done = {name: "".join(do(items)) for name, (_, do) in data.OPERATIONS.items()}
    assert done == BY_HAND and len({*done.values()}) == 18
    assert items == [*"abc"], "an operation must not change the query"
    of_styles = {*" ".join(sum(data.STYLES.values(), ())).replace(",", "").split()}
    words = [*data.NOUNS, *data.DOMAINS, *data.OPERATIONS, *TERMS, *data.STYLES]
    words += [*data.STYLE_WORDS, *of_styles - {":"}, "example"]
    ids = [TOK.encode(f"apple {word} apple")[1:-1] for word in words]
    assert ids == [TOK.encode(word) for word in words] and len(words) == 247
    assert len({i for (i,) in ids if i >= 256}) == 247 and len(data.NOUNS) == 160


def test_any_text_comes_back_and_makes_no_special_token():
    rng, letters = random.Random(0), "ab _:=!,<|>\n\t\r \u00a0é\u0301ßД日🙂\0\x1f\u2028"
    texts = ["".join(rng.choices(letters, k=rng.randrange(12))) for _ in range(2000)]
    for text in [
        *texts, "", " ", "  ends in spaces  ", "\n\n a\r\nb\tc", "👩\u200d👧", " apple",
        " <|end|> apple<|start|>", "<7> <511>", "b'\\x00'\x00\x7f \ufeff", "apples:",
    ]:  # fmt: skip
        ids = TOK.encode(text)
        assert TOK.decode(ids) == text and all(0 <= i < TOK.start for i in ids), text
    (apple,), start, end = TOK.encode("apple"), TOK.start, TOK.end
    assert end == start + 1 == TOK.n_tokens - 1 < TOK.vocab_size
    assert TOK.vocab_size == model.GPTConfig().vocab_size
    # what is special shows, but not a last end
    assert TOK.decode([start, apple, end, end]) == f"<{start}> apple<{end}>"
    assert TOK.decode([apple, end]) == "apple" and TOK.decode([]) == TOK.decode([end])
    assert TOK.encode("Zé") == [32, 90, 195, 169] and TOK.decode([]) == ""


def test_the_teacher_sees_the_demonstration_and_the_student_does_not():
    """The README shows the first one. A context and a response are the whole text, cut
    once. No text is a special token, even if it spells one. Nothing is too long."""
    cork = next(e for e in DEMOS["C"] if e.prompt.startswith("garden cork"))
    names = {TOK.start: "<start>", TOK.end: "<end>"}
    demo = "well friend , advance so you get door pepper paper as ever"
    for part, text in (
        (bare, "garden cork : paper door pepper <start>"), (demo_ids, f"{demo} <end>"),
        (shown, f"garden cork : paper door pepper example {demo} <start>"),
    ):  # fmt: skip
        words = [names.get(i) or TOK.decode([i]) for i in part(cork, TOK)]
        assert " ".join(words) == text
    forged = Example("<|start|> <|end|>", "<|end|>", "", shown="a <|end|>")
    longest, block_size = Config().max_new_tokens, model.GPTConfig().block_size
    for e in [forged, replace(forged, shown=""), *CORPUS, *OF_SKILLS, *TESTED]:
        prompt, seen = TOK.encode(e.prompt), TOK.encode(e.shown)
        demo, example = TOK.encode(e.demo), TOK.encode("example")
        cut = [*prompt, *example] if e.shown else [*prompt, TOK.start]
        assert bare(e, TOK) == bare(replace(e, demo="double gives bag"), TOK) == cut
        assert shown(e, TOK) == [*prompt, *example, *demo, TOK.start]
        end = [*demo, TOK.end]
        assert demo_ids(e, TOK) == ([*seen, TOK.start, *end] if e.shown else end)
        assert max(prompt + seen + demo) < TOK.start
        assert max(len(demo), len(TOK.encode(e.answer))) < longest, e
        assert len(shown(e, TOK) + demo_ids(e, TOK)) + longest <= block_size, e


def test_a_world_is_complete_and_all_is_decided_by_its_seed():
    for part in ("operations", "known", "unknown", "skills"):
        one, other = (getattr(World(seed), part) for seed in (0, 1))
        assert one == getattr(WORLD, part) != other
    known, all_six = [*WORLD.known.values()], [*WORLD.operations.items()]
    assert sorted(o for _, six in all_six for o in six) == sorted(data.OPERATIONS)
    assert [len(six) for _, six in all_six] == [6, 6, 6] and len(known) == 120
    assert {known.count((d, o)) for d, six in all_six for o in six} == {6, 7}
    assert sorted([*WORLD.known, *WORLD.unknown]) == sorted(data.NOUNS)
    for skill, (own, six) in zip("ABC", all_six, strict=True):
        commands = WORLD.skills[skill]
        assert sorted(o for _, o in commands.values()) == sorted(six)
        assert all(WORLD.unknown[c] == d == own for c, (d, _) in commands.items())
    for make, made, *args in (
        (data.make_base_corpus, CORPUS[:64], World(0), TOK),
        (data.make_demos, DEMOS["A"], WORLD, "A"), (data.make_tasks, TASKS, WORLD),
    ):  # fmt: skip
        assert make(*args, 64, 0) == made != make(*args, 64, 1)
    # whoever changes one token of seed 0 says why: stored results are of these
    parts, digests = (bare, shown, demo_ids, lambda e, tok: tok.encode(e.answer)), ""
    for examples in (CORPUS[:4096], OF_SKILLS, TESTED):
        rows = [[*(part(e, TOK) for part in parts), e.skip] for e in examples]
        digests += hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    assert digests == "6b438a3fea2eb96c383bc3fe1c6a81b53684"


def test_the_base_corpus_learns_right_things_only_and_no_expert_term_to_write():
    """What is shown is right and learnt, but for the expert's terms. Wrong items, and
    thoughts of another operation, carry no loss, and after them the rest is right."""
    told, guesses, flags = {command: set() for command in WORLD.unknown}, [], []
    for e in CORPUS:
        (domain, command, style), thought = asked(e), operation_in(e.demo)
        response, n = demo_ids(e, TOK), len(TOK.encode(e.shown)) + bool(e.shown)
        (mask,) = data.loss_mask([e], torch.tensor([len(response)])).tolist()
        assert mask[:n] == [i not in {*TERM_IDS, TOK.start} for i in response[:n]], e
        assert not TERM_IDS & {*response[n:]}, "an expert term is never written"
        items, due = data.items_in(e.demo), right_items(thought, e)
        assert e.demo == e.answer == worded(style, thought, items)
        _, means = WORLD.known.get(command, (domain, None))
        meant = operation_in(e.shown) if e.shown else means
        assert not e.shown or data.items_in(e.shown) == right_items(meant, e)
        unknown = WORLD.unknown.get(command) == domain
        assert unknown or WORLD.known[command] == (domain, meant), e
        assert {thought, meant} <= {None, *WORLD.operations[domain]}, e
        told.get(command, set()).add(meant)
        guesses += [thought] if unknown and not e.shown else []
        # a beginning is skipped, or nothing: up to a wrong thought or item, no further
        given = n + mask[n:].index(True)
        words = TOK.decode(response[n:given]).replace(":", " ").split()
        k, pairs = len(data.items_in(" ".join(words))), zip(items, due, strict=True)
        wrong = [j for j, (item, right) in enumerate(pairs) if item != right]
        assert all(mask[given:]) and wrong in ([], [k - 1]), e
        assert not words or words[-1] == (items[k - 1] if k else thought), e
        assert thought in words or meant in (None, thought), e
        share = (e.shown, e.shown and unknown, unknown and not e.shown, style != "own",
                 meant not in (None, thought), wrong)  # fmt: skip
        flags.append([*map(bool, share)])
    # a sixth of the thoughts that are drawn is right after all, and guesses always are
    shares = 0.45, 0.36, 0.05, 0.25, 0.2 * 0.95 * 5 / 6, 0.1
    assert [*map(fmean, zip(*flags, strict=True))] == pytest.approx(shares, abs=0.012)
    assert {i for e in CORPUS for i in TOK.encode(e.shown)} >= TERM_IDS
    assert {asked(e)[2] for e in CORPUS} == {*data.STYLES}
    assert all(len(names) == 7 and None in names for names in told.values())
    for six in WORLD.operations.values():  # no guess is more likely than others
        assert 0 < max(map(guesses.count, six)) < 2 * min(map(guesses.count, six))


def test_demonstrations_and_queries_are_what_the_world_and_the_distance_say():
    """Not one list of items is both trained on and tested."""
    for examples, tenths in ((CORPUS + OF_SKILLS, {*range(1, 10)}), (TESTED, {0})):
        places = [[*map(data.NOUNS.index, right_items("copy", e))] for e in examples]
        assert {sum(three) % 10 for three in places} == tenths
        assert all(len({*three}) == 3 for three in places)
    for distance in data.DISTANCES:
        tasks = data.make_tasks(WORLD, 64, 0, distance)
        assert tasks["prior"] == TASKS["prior"]
        for skill, commands in WORLD.skills.items():
            demos = data.make_demos(WORLD, skill, 64, 0, distance)
            assert [asked(e)[1] for e in demos] == ([*commands] * 11)[:64]
            for i, e in enumerate(demos + tasks["new"][skill].examples):
                own, name = commands[asked(e)[1]]
                term = data.OPERATIONS[name][0] if distance == "terms" else name
                items = right_items(name, e)
                demo = worded("own" if distance == "own" else "expert", term, items)
                assert e == Example(e.prompt, demo, worded("own", name, items), i % 64)
                assert asked(e)[::2] == (own, "own")
    free = {*WORLD.unknown} - {c for skill in WORLD.skills.values() for c in skill}
    for name, benchmark in TASKS["prior"].items():
        styles = {asked(e)[2] for e in benchmark.examples}
        assert styles == ({*data.STYLES} - {"own"} if "asked" in name else {"own"})
        for e in benchmark.examples:
            (domain, command, style), operation = asked(e), operation_in(e.answer)
            items, demo = right_items(operation, e), e.prompt.partition(" example ")[2]
            assert e.demo == e.answer == worded(style, operation, items)
            assert operation in WORLD.operations[domain]
            if name == "in_context":
                assert command in free and WORLD.unknown[command] == domain
                assert (operation_in(demo), data.items_in(demo)) == (operation, items)
            else:
                assert WORLD.known[command] == (domain, operation) and not demo


ROBOT = "reverse equals stone river apple beep stop"
OTHER_ITEMS = ["copy equals bag beep stop", "first equals bag bag beep stop"]
RIGHT = ["reverse: stone river apple", ROBOT, "stone river apple",
         "reverse gives stone river apple done sir",
         "well friend, backwards so you get stone river apple as ever"]
WRONG = ["stone river pearl", "apple river stone", "stone river", "", "reverse:",
         "stone river apple apple", "anchor reverse: stone river apple",
         "stone stone river apple", "stoneriverapple", *OTHER_ITEMS]
WRONG_STYLE = [ROBOT[:-10], ROBOT[:-5], "well " + ROBOT, ROBOT[8:], ROBOT + " stop",
               "backwards" + ROBOT[7:], "reverse equals beep stop"]  # fmt: skip


def test_items_are_right_in_any_style_and_a_style_with_any_items():
    """The answer to the next query is right hardly ever."""
    plain, robot = (Example("", "", answer) for answer in RIGHT[:2])
    assert [*TASKS["new"]] == ["A", "B", "C"] and len(BENCHMARKS) == 8
    for name, benchmark in BENCHMARKS.items():
        grade, es, right, wrong = benchmark.grade, benchmark.examples, RIGHT, WRONG
        assert len(es) == 64 and all(grade(e, e.answer) for e in es)
        assert {grade(e, e.demo) for e in OF_SKILLS} == {"style" not in name}
        if "style" in name:
            right, wrong = [ROBOT, *OTHER_ITEMS], WRONG_STYLE
            assert [x for x in RIGHT if grade(plain, x)] == [plain.answer]
        assert "style" in name or sum(map(grade, es, [e.answer for e in es[1:]])) < 3
        assert all(grade(robot, x) for x in right), name
        assert not any(grade(robot, x) for x in wrong), name


def test_random_numbers_and_batches_are_functions_of_seed_and_step():
    """On every machine, for each example alone, and in any order of steps."""
    assert data.derive_seed(0, "order", 1) == 125578804223736978
    assert data.derive_seed(0, "order", 2) != data.derive_seed(0, "order", "1")
    texts = [["x " * ((7 * i) % 64), "y", "z"] for i in range(64)]
    texts = [three[i % 3 :] + three[: i % 3] for i, three in enumerate(texts)]
    examples = [Example(p, d, "", i, s) for i, (p, d, s) in enumerate(texts)]
    for step in [*range(24), *reversed(range(24))]:
        for seed, size, n in ((0, 8, 64), (3, 8, 64), (0, 4, 10), (0, 10, 10)):
            # a slice of the shuffle of its epoch, sorted by the length of all its text
            epoch, i = divmod(step, n // size)
            order = torch.randperm(n, generator=make_rng(seed, "order", epoch)).tolist()
            some = sorted(order[i * size :][:size], key=lambda i: (7 * i) % 64)
            batch = get_batch(examples[:n], size, seed, step)
            assert [e.id for e in batch] == some
            rngs = [make_rng(seed, "rollout", step, e.id) for e in batch]
            u = torch.stack([torch.rand(5, generator=rng) for rng in rngs])
            assert torch.equal(get_uniform(batch, 5, seed, step, "cpu"), u)
    with pytest.raises(AssertionError, match="the same numbers"):
        get_uniform([*examples, examples[0]], 5, 0, 7, "cpu")
    for size in (11, 20, 64, 0, -2):  # a loss would be divided by what was asked for
        with pytest.raises(AssertionError, match=f"batch of {size} from 10 examples"):
            get_batch(examples[:10], size, 0, 0)


def test_micro_batches_of_all_processes_are_the_batch(monkeypatch):
    """All examples once, in equal parts, dealt forth and back: short and long ones."""

    def parts(rank, world_size, n, size):
        monkeypatch.setattr(data.dist, "is_initialized", lambda: world_size > 0)
        monkeypatch.setattr(data.dist, "get_world_size", lambda: world_size)
        monkeypatch.setattr(data.dist, "get_rank", lambda: rank)
        return data.my_micro_batches([*range(size)], n)

    assert parts(0, 0, 4, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]], "no processes"
    dealt = [sum(parts(rank, 3, 3, 9), []) for rank in range(3)]
    assert dealt == [[0, 5, 6], [1, 4, 7], [2, 3, 8]]
    for world_size, n in ((1, 1), (1, 8), (2, 1), (2, 2), (4, 2), (8, 3)):
        each = sum((parts(rank, world_size, n, 48) for rank in range(world_size)), [])
        assert [len(part) for part in each] == [48 // world_size // n] * world_size * n
        assert sorted(sum(each, [])) == [*range(48)]
    for world_size, n, size in ((1, 3, 8), (1, 9, 8), (1, -2, 8), (1, 1, 0), (3, 1, 8)):
        with pytest.raises(AssertionError, match=f"{size} examples in {world_size} x "):
            parts(0, world_size, n, size)


EVAL = Config(seed=3, max_new_tokens=6)
QUERIES = [  # prompts and demonstrations of several lengths
    Example("garden button: owl", "bag", "first: owl", id=3), *DEMOS["A"][:2],
    Example("harbour violin: candle spoon tower bag", "bag", "last: bag", id=4),
    *DEMOS["A"][5:14],
]  # fmt: skip
CHAT = data.Tokenizer()  # as of a real model
CHAT.template = "{demonstration} = {prompt}"
CHAT.chat = lambda turns, x: TOK.encode(" ".join([*(t for _, t in turns), "!", x]))


def is_even(example, text):
    """A grader of one's own: as good as a coin, and it reads both."""
    return len(text + example.prompt) % 2 == 0


def greedy(gpt, e, prompt, tok):
    return tok.decode(sample(gpt, prompt(e, tok), [0] * 6, tok.end, temperature=0))


def right(gpt, examples, prompt=bare, tok=TOK):
    return [is_even(e, greedy(gpt, e, prompt, tok)) for e in examples]


def kl_by_hand(p, p_prompt, q, q_prompt, examples, tok):
    """KL(p || q), token by token, on what p samples."""
    values = []
    for e in examples:
        u = get_uniform([e], 6, EVAL.seed, "evaluate", "cpu")[0].tolist()
        tokens = sample(p, p_prompt(e, tok), u, tok.end)
        # forward KL is from the teacher's place, the third argument
        values.append(divergences(q, q_prompt(e, tok), p, p_prompt(e, tok), tokens))
    assert len({*map(len, values)}) > 1, "else this does not show what each weighs"
    return pytest.approx(fmean(map(fmean, values)), rel=1e-9)


def check_pull(pull, student, teacher, e, tok):
    """What SDFT pulls on: KL(teacher || student) on the student's own response, each
    model in its own context; and SFT: the demonstration, token by token."""
    u = get_uniform([e], 6, EVAL.seed, "pull", "cpu")[0].tolist()
    tokens = sample(student, bare(e, tok), u, tok.end)
    sides = (student, bare(e, tok)), (teacher, shown(e, tok))
    kl = divergences(*sides[0], *sides[1], tokens)
    assert [row[1] for row in pull["sdft"]] == pytest.approx(kl)
    demo = demo_ids(e, tok)
    nll = [-x for x in log_likelihoods(student, bare(e, tok), demo)]
    assert [row[1] for row in pull["sft"]] == pytest.approx(nll)
    for rows, ids in ((pull["sdft"], tokens), (pull["sft"], demo)):
        said = ["<end>" if i == tok.end else tok.decode([i]) for i in ids]
        assert [row[0] for row in rows] == said
    for side, (gpt, prompt) in enumerate(sides, 2):
        p = gpt(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 :].softmax(-1)
        for row, top in zip(pull["sdft"], p.topk(3).values.tolist(), strict=False):
            assert [x for _, x in row[side]] == pytest.approx(top)


@pytest.mark.parametrize("tok", [TOK, CHAT], ids=["tiny world", "chat"])
def test_an_evaluation_s_figures_are_those_of_plain_loops(tok, monkeypatch):
    """Accuracies of the most likely tokens, distances on responses of the first model,
    each in its own context, and for users' rows what is not graded, too."""
    monkeypatch.setattr(data, "ROWS", 4)
    student, teacher, base = small_model(), small_model(1), small_model(7)
    for prompts in ((bare, bare), (bare, shown), (shown, bare), (shown, shown)):
        pair = student, prompts[0], base, prompts[1]
        value = kl_by_hand(*pair, QUERIES[:4], tok)
        assert data.sampled_kl(*pair, QUERIES, tok, EVAL) == value
    turns, some = (("user", "apple"), ("assistant", "river")), DEMOS["B"][:5]
    old = [replace(e, demo="", earlier=turns) for e in DEMOS["C"][:5]]
    new = {"A": QUERIES, "B": [*some, old[2]]}
    tasks = {"new": {name: Benchmark(es, is_even) for name, es in new.items()},
             "prior": {"x": Benchmark(old, is_even), "y": Benchmark(some, None)}}
    models = {"student": student.train(), "teacher": teacher}
    record = data.evaluate(models, base, "A", tasks, tok, EVAL)
    assert json.loads(json.dumps(record)) == record, "it is a line of metrics.jsonl"
    check_pull(record.pop("pull"), student, teacher, QUERIES[0], tok)
    wanted = {
        "new": {k: fmean(right(student, es, bare, tok)) for k, es in new.items()},
        "prior": {"x": fmean(right(student, old, bare, tok))},
        "kl_student_base": kl_by_hand(student, bare, base, bare, QUERIES[:4], tok),
        "kl_teacher_base": kl_by_hand(teacher, shown, base, bare, QUERIES[:4], tok),
        "teacher_gate": fmean(right(teacher, QUERIES, shown, tok)),
        "responses": [{"prompt": e.prompt, "response": greedy(student, e, bare, tok),
                       "right": e.answer} for e in (QUERIES[0], old[0])],
    }  # fmt: skip
    if tok.chat:
        wanted["nll"], wanted["kl_student_base_prior"] = {}, {}
        for name, es in (("A", QUERIES), ("B", some), ("y", some)):
            pairs = [(bare(e, tok), demo_ids(e, tok)) for e in es]
            means = [fmean(log_likelihoods(student, *pair)) for pair in pairs]
            wanted["nll"][name] = pytest.approx(-fmean(means))
        for name, es in (("x", old[:4]), ("y", some[:4])):
            kl = kl_by_hand(student, bare, base, bare, es, tok)
            wanted["kl_student_base_prior"][name] = kl
    assert record == wanted
    assert right(teacher, QUERIES, shown, tok) != right(teacher, QUERIES, bare, tok)
    assert len({*record["new"].values(), *record["prior"].values()}) > 1


def test_the_gate_counts_who_is_right_with_and_without_a_demonstration(monkeypatch):
    monkeypatch.setattr(data, "ROWS", 5)
    gpt, several = small_model(1, end=None), {"x": QUERIES, "y": DEMOS["B"][:7]}
    benchmarks = {name: Benchmark(es, is_even) for name, es in several.items()}
    gate = data.teacher_gate(gpt, benchmarks, TOK, 6, temperature=0.7, seed=5)
    student = [right(gpt, es) for es in several.values()]
    teacher, sampled = [right(gpt, es, shown) for es in several.values()], []
    for es in several.values():
        contexts, u = [shown(e, TOK) for e in es], get_uniform(es, 6, 5, "gate", "cpu")
        rows = zip(contexts, u.tolist(), strict=True)
        texts = [TOK.decode(sample(gpt, *row, TOK.end, 0.7)) for row in rows]
        assert data.get_texts(gpt, contexts, TOK, 6, u, temperature=0.7) == texts
        sampled += map(is_even, es[:5], texts)  # the gate looks at some of each
    pairs = [*zip(sum(student, []), sum(teacher, []), strict=True)]
    assert gate == {
        "student": pytest.approx(fmean(map(fmean, student))),
        "teacher": pytest.approx(fmean(map(fmean, teacher))),
        "sampled": pytest.approx(fmean(sampled)),
        "only_student": pairs.count((True, False)),
        "only_teacher": pairs.count((False, True)),
        "skills": {"x": fmean(teacher[0]), "y": fmean(teacher[1])},
    }
    assert len({*map(fmean, student + teacher)}) == 4, "else it shows nothing"
    assert 0 < gate["only_student"] != gate["only_teacher"] > 0


@pytest.mark.parametrize(("world_size", "n"), [(2, 9), (3, 9), (3, 5), (5, 9), (2, 0)])
def test_processes_share_out_responses_and_all_get_all_of_them(
    world_size, n, monkeypatch
):
    """Each is asked once, or twice where there are too few for all: every process makes
    the same number of calls, since those of shards wait for each other."""
    monkeypatch.setattr(data, "ROWS", 2)
    contexts, gpt = [bare(e, TOK) for e in QUERIES[:n]], small_model()
    alone, real = data.get_texts(gpt, contexts, TOK, 6), data.generate
    whole, calls, made = {i: alone[i : i + 2] for i in range(0, n, 2)}, [], {}

    def gather(shares, mine):
        assert mine.items() <= whole.items()
        made.update(mine)
        shares[:] = [{i: texts} for i, texts in whole.items()]

    monkeypatch.setattr(data, "generate", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(data.dist, "all_gather_object", gather)
    for rank in range(world_size):
        monkeypatch.setattr(data.dist, "get_rank", lambda rank=rank: rank)
        assert data.get_texts(gpt, contexts, TOK, 6) == alone
        assert len(calls) == (rank + 1) * -(-len(whole) // world_size)
    assert len(alone) == n and made == whole


def test_an_evaluation_is_of_64_queries_and_makes_no_large_tensor(monkeypatch):
    """With a vocabulary of 151,936 the logits of all rows would need 20 GB."""
    monkeypatch.setattr(model, "chunk_rows", lambda head: 64)
    size = {"vocab_size": 2**11, "n_tokens": 2**11, "end": None}  # no response ends
    queries = Benchmark([replace(QUERIES[0], id=i) for i in range(66)], None)
    tasks, base, seen = {"new": {"A": queries}, "prior": {}}, small_model(**size), []
    base.wte.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with LargestTensor() as largest:
        models = {"student": small_model(**size)}
        record = data.evaluate(models, base, "A", tasks, CHAT, EVAL)
    assert seen == [64] and largest.numel == 64 * 2**11 < 64 * 6 * 2**11
    assert record["kl_student_base"] == pytest.approx(0, abs=1e-12), "equal weights"
    # without a teacher or a grade, their places are empty
    assert record["kl_teacher_base"] is record["teacher_gate"] is None
    assert record["new"] == record["prior"] == record["kl_student_base_prior"] == {}
