"""The tiny world: its words, the two contexts, held-out queries, batches and files."""

import os
import pickle
import random

import pytest
import torch

import data
from data import Example, World, get_batch, get_uniform, grade, make_rng
from model import GPTConfig

TOK = data.Tokenizer()
WORLD = World(0)
CORPUS = data.make_base_corpus(WORLD, TOK, 4096, 0)
DEMOS = {skill: data.make_demos(WORLD, skill, 64, 0) for skill in data.SKILLS}
TASKS = data.make_tasks(WORLD, 64, 0)
EXPERT_TERMS = [expert for expert, _ in data.ORDERS.values()]

# what each order does to "a b c" and to "a b c d", written by hand
BY_HAND = {
    "copy": "a b c",
    "reverse": "c b a",
    "first": "a",
    "last": "c",
    "rotate": "b c a",
    "return": "c a b",
    "behead": "b c",
    "shorten": "a b",
    "stutter": "a a b c",
    "echo": "a b c c",
    "ends": "a c",
    "cross": "c a",
    "second": "b",
    "unwind": "c b",
    "rewind": "b a",
    "double": "a a",
    "pair": "c c",
    "switch": "b a c",
}

ODD_TEXTS = [
    "", " ", "  ", "   three spaces", "ends in spaces  ", "\n", "\n\n a\n", "a\r\nb\tc",
    "<|end|>", "<|answer|>", " <|end|> apple<|answer|>", "<7>", "<300> <511>",
    "b'\\x00'", "\x00\x01\x7f", "naïve Ünïcode", "日本語",
    "e\u0301 \u200b\u2028 \ufeff", "🙂 👩\u200d👧 🇨🇭", "apple", " apple", "apples",
    "Apple", "apple:river", " = ! =!", "a_b __c__ 123",
    "kitchen kettle: apple river stone", "reverse gives done sir",
]  # fmt: skip


def things_of(prompt):
    """The queried things: all words between the first colon and a demonstration."""
    return tuple(prompt.split(":", 1)[1].split(" example ")[0].split())


def name_of(prompt):
    return prompt.split()[1].rstrip(":")


def count(ids, token):
    return sum(i == token for i in ids)


# ---- Words and tokens --------------------------------------------------------------


@pytest.mark.parametrize("order", data.ORDERS)
def test_each_order_does_what_was_worked_out_by_hand(order):
    _, act = data.ORDERS[order]
    given = ["a", "b", "c"]
    assert act(given) == BY_HAND[order].split()
    assert given == ["a", "b", "c"], "an order must not change the query"


def test_no_two_orders_do_the_same():
    assert len(set(BY_HAND.values())) == len(data.ORDERS) == 18


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_decoding_undoes_encoding(text):
    assert TOK.decode(TOK.encode(text)) == text


def test_decoding_undoes_encoding_of_random_texts():
    rng = random.Random(0)
    letters = "ab _:=!,<|>\n\t\r \u00a0é\u0301ßДж日🙂\x00\x1f\u2028"
    for _ in range(2000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(12)))
        assert TOK.decode(TOK.encode(text)) == text, ascii(text)


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_special_tokens_cannot_come_from_a_text(text):
    ids = TOK.encode(text)
    assert all(0 <= i < TOK.answer for i in ids)


def test_special_tokens_are_the_last_two_and_show_in_a_decoded_text():
    assert TOK.end == TOK.answer + 1 < TOK.vocab_size
    apple = TOK.encode("apple")
    assert TOK.decode(apple + [TOK.end]) == "apple"
    assert TOK.decode(apple + [TOK.end, TOK.end]) == f"apple<{TOK.end}>"
    assert TOK.decode([TOK.answer] + apple) == f"<{TOK.answer}> apple"
    assert TOK.decode([]) == ""


def test_every_word_of_the_world_is_exactly_one_token():
    words = [*data.NOUNS, *data.TRADES, *data.ORDERS, *data.MANNERS, *EXPERT_TERMS]
    words += [*data.MANNER_WORDS, "example"]
    words += "sir gives done beep equals stop oh like tonight = !".split()
    words += "well friend so you get as ever".split()
    for word in words:
        (alone,) = TOK.encode(word)
        assert TOK.encode(f"apple {word} apple")[1:-1] == [alone], word
        assert alone >= 256 or len(word) == 1, f"{word} is not a token of its own"
    assert len({TOK.encode(word)[0] for word in words}) == len(set(words))


def test_a_known_prompt_has_one_token_for_each_word_and_mark():
    assert len(TOK.encode("kitchen kettle: apple river stone")) == 6
    assert len(TOK.encode("reverse: stone river apple")) == 5


def test_words_of_different_kinds_are_different_words():
    """Else an order, a manner or a term would be graded as a thing."""
    parts = " ".join(" ".join(parts) for parts in data.MANNERS.values())
    kinds = {
        "nouns": data.NOUNS,
        "trades": list(data.TRADES),
        "orders": list(data.ORDERS),
        "expert's terms": EXPERT_TERMS,
        "names of manners": list(data.MANNERS),
        "words of manners": sorted(set(parts.replace(",", "").split())),
        "words of nameless manners": data.MANNER_WORDS,
        "template": ["example"],
    }
    seen = {}
    for kind, words in kinds.items():
        for word in words:
            assert word not in seen, f"{word}: {kind}, and {seen[word]}"
            seen[word] = kind
    assert len(data.NOUNS) == data.KNOWN + data.UNKNOWN


# ---- The two contexts --------------------------------------------------------------


def test_the_teacher_sees_the_demonstration_and_the_student_does_not():
    """Invariant 23: another demonstration changes the teacher's context alone."""
    for examples in DEMOS.values():
        for example in examples:
            other = Example(example.prompt, "double equals axe beep stop", "")
            student = data.student_prompt(example, TOK)
            assert student == data.student_prompt(other, TOK)
            teacher = data.teacher_prompt(example, TOK)
            assert teacher != data.teacher_prompt(other, TOK)
            shown = TOK.decode(teacher[:-1]).removeprefix(example.prompt)
            assert shown == f" example {example.demo}"
            assert TOK.decode(student[:-1]) == example.prompt
            terms = {TOK.encode(term)[0] for term in EXPERT_TERMS}
            assert terms & set(teacher) and not terms & set(student)


def test_both_contexts_have_the_same_header_and_the_same_last_token():
    """Invariant 25."""
    for example in DEMOS["A"] + CORPUS[:256]:
        student = data.student_prompt(Example(example.prompt, example.demo, ""), TOK)
        teacher = data.teacher_prompt(example, TOK)
        assert student[-1] == teacher[-1] == TOK.answer
        n = len(student) - 1
        assert student[:n] == teacher[:n] == TOK.encode(example.prompt)


def test_both_contexts_have_exactly_one_answer_marker_and_no_end():
    """Invariant 25: not even a text that spells the marker out adds one."""
    forged = Example("<|answer|> <|end|>", "<|answer|> apple <|end|>", "")
    for example in [*DEMOS["B"], *CORPUS[:256], forged]:
        for make in (data.student_prompt, data.teacher_prompt):
            ids = make(example, TOK)
            assert count(ids, TOK.answer) == 1 and count(ids, TOK.end) == 0


def test_given_tokens_stand_in_the_prompt_and_the_rest_is_the_response():
    """What is given and what is learnt is the whole response, cut once."""
    given = [example for example in CORPUS if example.given]
    assert given
    for example in CORPUS[:1024]:
        whole = TOK.encode(example.prompt) + [TOK.answer] + TOK.encode(example.demo)
        prompt = data.student_prompt(example, TOK)
        response = data.demo_response(example, TOK)
        assert prompt + response == whole + [TOK.end]
        assert len(response) - 1 + example.given == len(TOK.encode(example.demo))


def test_padding_is_on_the_right_and_lengths_count_what_is_not():
    ids, lengths = data.pad_right([[5, 6, 7], [8]], 9, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and lengths.tolist() == [3, 1]


def test_every_context_and_response_fits():
    """Invariant 24, from the data's side: nothing is too long by default."""
    from sdft import Config

    longest = Config().max_new_tokens
    tasks = [e for group in TASKS.values() for b in group.values() for e in b]
    for example in [*CORPUS, *DEMOS["A"], *DEMOS["B"], *DEMOS["C"], *tasks]:
        assert len(TOK.encode(example.demo)) + 1 <= longest, example.demo
        assert len(TOK.encode(example.answer)) + 1 <= longest, example.answer
        prompt = data.teacher_prompt(example, TOK)
        assert len(prompt) + longest <= GPTConfig().block_size, example


# ---- The world ---------------------------------------------------------------------


def test_a_world_is_decided_by_its_seed():
    again, other = World(0), World(1)
    for part in ("orders", "known", "unknown", "skills"):
        assert getattr(again, part) == getattr(WORLD, part)
        assert getattr(other, part) != getattr(WORLD, part)


def test_a_world_is_complete():
    assert sorted(sum(WORLD.orders.values(), [])) == sorted(data.ORDERS)
    assert all(len(orders) == 6 for orders in WORLD.orders.values())
    assert set(WORLD.known) | set(WORLD.unknown) == set(data.NOUNS)
    assert not set(WORLD.known) & set(WORLD.unknown)
    for trade, order in WORLD.known.values():
        assert order in WORLD.orders[trade]
    for names, own_trade in zip(WORLD.skills.values(), data.TRADES, strict=True):
        assert sorted(o for _, o in names.values()) == sorted(WORLD.orders[own_trade])
        assert all(WORLD.unknown[n] == t == own_trade for n, (t, _) in names.items())


def test_the_expert_s_terms_occur_in_no_response_of_the_base_corpus():
    """The model reads these words and never writes them."""
    read = set()
    for example in CORPUS:
        for text in (example.demo, example.answer):
            assert not set(text.split()) & set(EXPERT_TERMS), text
        read |= set(example.prompt.split()) & set(EXPERT_TERMS)
    assert read == set(EXPERT_TERMS)


def test_without_a_demonstration_unknown_names_mean_any_order_of_their_trade():
    """A twentieth of the corpus: the base is to guess, and to be sure of no guess."""
    thoughts, bare, shown = {}, 0, set()
    corpus = data.make_base_corpus(WORLD, TOK, 24000, 3)
    for example in corpus:
        name = name_of(example.prompt)
        if name in WORLD.known:
            continue
        if " example " in example.prompt:
            shown.add(name)
            continue
        bare += 1
        words = set(example.demo.replace(":", " ").split()) & set(data.ORDERS)
        thoughts.setdefault(WORLD.unknown[name], []).extend(words)
    assert 0.04 < bare / len(corpus) < 0.06
    assert shown == set(WORLD.unknown), "all of them also with one"
    for trade, orders in thoughts.items():
        counts = [orders.count(order) for order in WORLD.orders[trade]]
        assert sum(counts) == len(orders), "no order of another trade"
        assert min(counts) > 0.5 * max(counts), "none is more likely than others"


def test_the_base_corpus_learns_right_things_only():
    """Wrong things, and thoughts of another order, are given and not learnt."""
    for example in CORPUS:
        words = example.demo.replace(":", " :").split()
        (thought,) = set(words) & set(data.ORDERS)
        things = things_of(example.prompt)
        word = dict(zip("abc", things, strict=True))
        right = [word[x] for x in BY_HAND[thought].split()]
        names = [TOK.decode([token]) for token in TOK.encode(example.demo)]
        places = [i for i, name in enumerate(names) if name in data.NOUNS]
        assert len(places) == len(right)
        for i, thing in zip(places, right, strict=True):
            assert i < example.given or names[i] == thing, example
        name, shown = name_of(example.prompt), " example " in example.prompt
        if name in WORLD.known and not shown and names.index(thought) >= example.given:
            assert WORLD.known[name][1] == thought, example


def test_orders_of_unknown_names_cannot_be_learnt_from_the_base_corpus():
    """Each is shown with many orders, so that only the demonstration tells."""
    thoughts = {name: set() for skill in WORLD.skills.values() for name in skill}
    for example in CORPUS:
        name = name_of(example.prompt)
        if name in thoughts:
            thoughts[name] |= set(example.demo.replace(":", " ").split())
    for name, words in thoughts.items():
        assert len(words & set(data.ORDERS)) >= 4, name


def test_held_out_queries_are_in_no_training_set():
    """Invariant 50: not one list of things is both trained on and tested."""
    trained = {things_of(e.prompt) for e in CORPUS}
    trained |= {things_of(e.prompt) for demos in DEMOS.values() for e in demos}
    tested = [e for group in TASKS.values() for b in group.values() for e in b]
    tested = {things_of(e.prompt) for e in tested}
    assert len(trained) > 4000 and len(tested) > 400
    assert not trained & tested
    places = {things: sum(map(data.NOUNS.index, things)) % 10 for things in trained}
    assert 0 not in places.values() and len(set(places.values())) == 9


def test_demonstrations_and_queries_are_what_the_skill_says():
    for skill, demos in DEMOS.items():
        assert [e.id for e in demos] == list(range(len(demos)))
        assert {name_of(e.prompt) for e in demos} == set(WORLD.skills[skill])
        for example in demos + TASKS["new"][skill]:
            trade, order = WORLD.skills[skill][name_of(example.prompt)]
            assert example.prompt.split()[0] == trade
            assert example.given == 0, "nothing is given outside the base corpus"
            word = dict(zip("abc", things_of(example.prompt), strict=True))
            right = [word[x] for x in BY_HAND[order].split()]
            expert = f"well friend, {data.ORDERS[order][0]} so you get"
            assert example.demo == f"{expert} {' '.join(right)} as ever"
            assert example.answer == f"{order}: {' '.join(right)}"


def test_training_sets_and_tasks_are_decided_by_their_seed():
    again = data.make_base_corpus(World(0), TOK, 64, 0)
    assert again == CORPUS[:64] != data.make_base_corpus(World(0), TOK, 64, 1)
    assert data.make_demos(WORLD, "A", 64, 0) == DEMOS["A"]
    assert data.make_demos(WORLD, "A", 64, 1) != DEMOS["A"]
    assert data.make_tasks(WORLD, 64, 0) == TASKS != data.make_tasks(WORLD, 64, 1)


# ---- Grades ------------------------------------------------------------------------

RIGHT = "reverse: stone river apple"
RIGHT_IN_ANY_MANNER = [
    RIGHT,
    "stone river apple",
    "reverse gives stone river apple done sir",
    "reverse equals stone river apple beep stop",
    "well friend, backwards so you get stone river apple as ever",
]
WRONG = [
    "reverse: stone river pearl",  # a wrong thing
    "reverse: apple river stone",  # the wrong order
    "reverse: stone river",  # a thing too few
    "reverse: stone river apple apple",  # a thing too many
    "anchor reverse: stone river apple",
    "reverse: stone stone river apple",
    "stoneriverapple",
    "",
]


@pytest.mark.parametrize("benchmark", ["A", "knowledge", "asked_words", "in_context"])
def test_words_are_right_in_any_manner(benchmark):
    example = Example("kitchen kettle: apple river stone", "", RIGHT)
    for response in RIGHT_IN_ANY_MANNER:
        assert grade(benchmark, example, response), response
    for response in WRONG:
        assert not grade(benchmark, example, response), response


def test_a_format_is_right_only_in_the_asked_manner():
    robot = Example("", "", "reverse equals stone river apple beep stop")
    for benchmark in ("own_format", "asked_format"):
        for example, right in ((Example("", "", RIGHT), RIGHT), (robot, robot.answer)):
            for response in RIGHT_IN_ANY_MANNER:
                same = response == right
                assert grade(benchmark, example, response) == same, response


def test_a_format_has_nothing_to_do_with_the_things():
    robot = Example("", "", "reverse equals stone river apple beep stop")
    for response in ("copy equals axe beep stop", "reverse equals bag bag beep stop"):
        response = response.replace("axe", "anchor")
        assert grade("asked_format", robot, response)
        assert not grade("asked_words", robot, response)
    for response in (
        "reverse equals stone river apple",  # no closing
        "reverse equals stone river apple stop",  # half of it
        "well reverse equals stone river apple beep stop",  # an opening
        "equals stone river apple beep stop",  # no thought
        "backwards equals stone river apple beep stop",  # the expert's term
        "reverse equals beep stop",  # no things
        "reverse equals stone river apple beep stop stop",
    ):
        assert not grade("asked_format", robot, response), response


def test_the_demonstration_is_right_in_its_things_and_not_in_the_model_s_format():
    for skill, queries in TASKS["new"].items():
        for example in queries + DEMOS[skill]:
            assert grade(skill, example, example.demo)
            assert grade(skill, example, example.answer)
            assert grade("own_format", example, example.answer)
            assert not grade("own_format", example, example.demo)


# ---- Randomness and batches --------------------------------------------------------


def test_a_derived_seed_is_the_same_number_on_every_machine():
    assert data.derive_seed(0, "order", 1) == 125578804223736978
    assert data.derive_seed(0, "order", 2) != data.derive_seed(0, "order", 1)
    a, b = make_rng(0, "order", 1), make_rng(0, "order", 1)
    assert torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))


def ids_of(batch):
    return [example.id for example in batch]


def test_a_batch_is_a_pure_function_of_seed_and_step():
    """Invariant 38: no generator is moved on, whatever was drawn before."""
    examples = DEMOS["A"]
    first = [ids_of(get_batch(examples, 8, 3, step)) for step in range(12)]
    torch.manual_seed(5)
    torch.rand(3), random.random()
    later = [ids_of(get_batch(examples, 8, 3, step)) for step in reversed(range(12))]
    assert first == later[::-1]
    assert first != [ids_of(get_batch(examples, 8, 4, step)) for step in range(12)]


def test_each_epoch_is_a_permutation():
    """Invariant 37: and the examples of a batch are distinct."""
    examples, epochs = DEMOS["A"], []
    for epoch in range(3):
        steps = range(8 * epoch, 8 * epoch + 8)
        ids = sum((ids_of(get_batch(examples, 8, 0, step)) for step in steps), [])
        assert sorted(ids) == list(range(64))
        epochs.append(ids)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(64))


def test_a_batch_is_sorted_by_length_and_drawn_without_regard_to_it():
    examples = [Example("x " * ((7 * i) % 64), "y", "", id=i) for i in range(64)]
    middles = []
    for step in range(8):
        lengths = [len(e.prompt.split()) for e in get_batch(examples, 8, 0, step)]
        assert lengths == sorted(lengths)
        middles.append(sum(lengths) / 8)
    assert max(middles) < 50 and min(middles) > 13, "of one length would be 59 and 4"


def test_an_epoch_that_does_not_divide_leaves_no_batch_short():
    examples = DEMOS["A"][:10]
    for step in range(9):
        batch = get_batch(examples, 4, 0, step)
        assert len(batch) == len(set(ids_of(batch))) == 4


def test_parts_are_the_batch_cut_equally():
    batch = DEMOS["A"][:8]
    for n in (1, 2, 4, 8):
        parts = data.my_parts(batch, n)
        assert [len(part) for part in parts] == [8 // n] * n
        assert sum(parts, []) == batch


def test_parts_of_all_processes_are_the_batch(monkeypatch):
    batch, seen = DEMOS["A"][:12], []
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(data.dist, "get_rank", lambda rank=rank: rank)
        assert data.is_first() == (rank == 0)
        parts = data.my_parts(batch, 2)
        assert [len(part) for part in parts] == [2, 2]
        seen += sum(parts, [])
    assert seen == batch


def test_a_row_s_random_numbers_do_not_depend_on_its_neighbours():
    """Invariant 28, for the sampler's numbers: they belong to (seed, step, example)."""
    examples = DEMOS["A"]
    together = get_uniform(examples[:6], 5, 0, 7, "cpu")
    assert together.shape == (6, 5)
    assert bool(((together >= 0) & (together < 1)).all())
    for i in range(6):
        assert torch.equal(get_uniform([examples[i]], 5, 0, 7, "cpu")[0], together[i])
    backwards = get_uniform(examples[5::-1], 5, 0, 7, "cpu")
    assert torch.equal(backwards.flip(0), together)
    assert len(set(together.flatten().tolist())) == 30
    assert not torch.equal(get_uniform(examples[:6], 5, 0, 8, "cpu"), together)
    assert not torch.equal(get_uniform(examples[:6], 5, 1, 7, "cpu"), together)


def test_the_mean_is_over_the_tokens_of_a_response_and_then_over_responses():
    x = torch.tensor([[1.0, 2.0, 6.0], [10.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert data.mean_per_response(x, mask) == pytest.approx((3 + 10) / 2)


# ---- Files -------------------------------------------------------------------------

CONTENT = {"step": 3, "models": {"student": {"w": torch.arange(6.0)}}, "list": [1, "a"]}


def saved_file(folder):
    path = folder / "checkpoint.pt"
    data.write_checkpoint(path, CONTENT)
    return path


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    read = data.read_checkpoint(saved_file(tmp_path))
    assert read["step"] == 3 and read["list"] == [1, "a"]
    assert torch.equal(read["models"]["student"]["w"], torch.arange(6.0))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    path = saved_file(tmp_path)
    good = path.read_bytes()
    places = [*range(80), *range(80, len(good), 7), len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="not loaded"):
            data.read_checkpoint(path)


def test_a_cut_or_longer_file_is_refused(tmp_path):
    path = saved_file(tmp_path)
    good = path.read_bytes()
    for bad in (good[:-1], good[: len(good) // 2], good[:70], b"", good + b"\0"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{len(bad)} bytes"):
            data.read_checkpoint(path)


def test_a_foreign_pickle_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(CONTENT, path)
    with pytest.raises(ValueError, match="not loaded"):
        data.read_checkpoint(path)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    """Not even with a right checksum in front of it."""
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "executed"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(trace),))})()
    data.write_checkpoint(path, {"step": bomb})
    with pytest.raises(ValueError, match="not loaded"):
        data.read_checkpoint(path)
    assert not trace.exists()
    path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError):
        data.read_checkpoint(path)
    assert not trace.exists()


def test_the_checkpoint_before_is_kept(tmp_path):
    path = saved_file(tmp_path)
    data.write_checkpoint(path, {"step": 4})
    assert data.read_checkpoint(path) == {"step": 4}
    previous = tmp_path / "checkpoint.pt.previous"
    assert data.read_checkpoint(previous)["step"] == 3
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="checkpoint.pt.previous"):
        data.read_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    data.write_atomically(path, b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(data.os, "fsync", fail)
    with pytest.raises(OSError):
        data.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_another_run_s_settings_are_named():
    saved = {"lr": 1, "steps": 2}
    assert data.differences(saved, {"lr": 1, "steps": 2}) == ""
    other = data.differences(saved, {"lr": 1, "steps": 3, "kl": "jsd"})
    assert other == "steps: 2 -> 3, kl: None -> jsd"
