"""The tiny world: its words, the two contexts, held-out queries, grades, batches, and
evaluations."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
import torch
from oracles import LargestTensor, divergences, make_model, record_tokens, sample

import data
import model
from data import Benchmark, Example, World, get_batch, get_uniform, make_rng
from model import GPTConfig
from sft import Config

TOK = data.Tokenizer()
WORLD = World(0)
CORPUS = data.make_base_corpus(WORLD, TOK, 4096, 0)
DEMOS = {skill: data.make_demos(WORLD, skill, 64, 0) for skill in data.SKILLS}
TASKS = data.make_tasks(WORLD, 64, 0)
TESTED = [e for group in TASKS.values() for b in group.values() for e in b.examples]
EXPERT_TERMS = [expert for expert, _ in data.OPERATIONS.values()]

# what each operation does to "a b c", written by hand
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
    "<|end|>", "<|start|>", " <|end|> apple<|start|>", "<7>", "<300> <511>",
    "b'\\x00'", "\x00\x01\x7f", "naïve Ünïcode", "日本語",
    "e\u0301 \u200b\u2028 \ufeff", "🙂 👩\u200d👧 🇨🇭", "apple", " apple", "apples",
    "Apple", "apple:river", " = ! =!", "a_b __c__ 123",
    "kitchen kettle: apple river stone", "reverse gives done sir",
]  # fmt: skip


def query_of(prompt):
    """The queried items: all words between the first colon and a demonstration."""
    return tuple(prompt.split(":", 1)[1].split(" example ")[0].split())


def command_of(prompt):
    return prompt.split()[1].rstrip(":")


def count(ids, token):
    return sum(i == token for i in ids)


def pieces(ids):
    """Tokens as one reads them, each by itself."""
    special = {TOK.start: "<start>", TOK.end: "<end>"}
    return " ".join(special.get(i) or TOK.decode([i]) for i in ids)


# ---- Words and tokens --------------------------------------------------------------


@pytest.mark.parametrize("operation", data.OPERATIONS)
def test_each_operation_does_what_was_worked_out_by_hand(operation):
    _, operate = data.OPERATIONS[operation]
    items = ["a", "b", "c"]
    assert operate(items) == BY_HAND[operation].split()
    assert items == ["a", "b", "c"], "an operation must not change the query"


def test_no_two_operations_do_the_same():
    """Else two commands of a domain could not be told apart by a demonstration."""
    results = [tuple(operate(list("abc"))) for _, operate in data.OPERATIONS.values()]
    assert len(results) == 18 and len(set(results)) == 18
    assert all(set(result) <= set("abc") and result for result in results)


def test_odd_texts_come_back_as_they_were_and_make_no_special_token():
    for text in ODD_TEXTS:
        ids = TOK.encode(text)
        assert TOK.decode(ids) == text, ascii(text)
        assert all(0 <= i < TOK.start for i in ids), ascii(text)


def test_decoding_undoes_encoding_of_random_texts():
    rng = random.Random(0)
    letters = "ab _:=!,<|>\n\t\r \u00a0é\u0301ßДж日🙂\x00\x1f\u2028"
    for _ in range(2000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(12)))
        assert TOK.decode(TOK.encode(text)) == text, ascii(text)


def test_special_tokens_are_the_last_two_and_show_in_a_decoded_text():
    assert TOK.end == TOK.start + 1 == TOK.n_tokens - 1
    assert TOK.n_tokens <= TOK.vocab_size == GPTConfig().vocab_size
    apple = TOK.encode("apple")
    assert TOK.decode(apple + [TOK.end]) == "apple"
    assert TOK.decode(apple + [TOK.end, TOK.end]) == f"apple<{TOK.end}>"
    assert TOK.decode([TOK.start] + apple) == f"<{TOK.start}> apple"
    assert TOK.decode([]) == ""


def test_every_word_of_the_world_is_exactly_one_token():
    words = [*data.NOUNS, *data.DOMAINS, *data.OPERATIONS, *data.STYLES, *EXPERT_TERMS]
    words += [*data.STYLE_WORDS, "example"]
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
    """Else an operation, a style or a term would be graded as an item."""
    parts = " ".join(" ".join(parts) for parts in data.STYLES.values())
    kinds = {
        "nouns": data.NOUNS,
        "domains": list(data.DOMAINS),
        "operations": list(data.OPERATIONS),
        "expert's terms": EXPERT_TERMS,
        "names of styles": list(data.STYLES),
        "words of styles": sorted(set(parts.replace(",", "").split())),
        "words of nameless styles": data.STYLE_WORDS,
        "template": ["example"],
    }
    seen = {}
    for kind, words in kinds.items():
        for word in words:
            assert word not in seen, f"{word}: {kind}, and {seen[word]}"
            seen[word] = kind
    assert len(data.NOUNS) == data.KNOWN + 40


# ---- The two contexts --------------------------------------------------------------


def test_the_contexts_of_one_example_are_these_tokens():
    """The README shows them: seed 0, the first demonstration of `garden cork`."""
    example = next(e for e in DEMOS["C"] if command_of(e.prompt) == "cork")
    student = data.student_prompt(example, TOK)
    teacher = data.teacher_prompt(example, TOK)
    response = data.demo_response(example, TOK)
    assert pieces(student) == "garden cork : paper door pepper <start>"
    assert pieces(teacher) == (
        "garden cork : paper door pepper example "
        "well friend , advance so you get door pepper paper as ever <start>"
    )
    assert pieces(response) == (
        "well friend , advance so you get door pepper paper as ever <end>"
    )
    assert (len(student), len(teacher), len(response)) == (7, 20, 13)
    assert pieces(TOK.encode(example.answer)) == "rotate : door pepper paper"


def test_the_teacher_sees_the_demonstration_and_the_student_does_not():
    """Another demonstration changes the teacher's context alone."""
    terms = {TOK.encode(term)[0] for term in EXPERT_TERMS}
    for examples in DEMOS.values():
        for example in examples:
            other = replace(example, demo="double equals bag beep stop")
            student = data.student_prompt(example, TOK)
            assert student == data.student_prompt(other, TOK)
            teacher = data.teacher_prompt(example, TOK)
            assert teacher != data.teacher_prompt(other, TOK)
            shown = TOK.decode(teacher[:-1]).removeprefix(example.prompt)
            assert shown == f" example {example.demo}"
            assert TOK.decode(student[:-1]) == example.prompt
            assert terms & set(teacher) and not terms & set(student)


def test_both_contexts_have_the_same_header_and_the_same_last_token():
    for example in DEMOS["A"] + TESTED:
        student = data.student_prompt(example, TOK)
        teacher = data.teacher_prompt(example, TOK)
        assert student[-1] == teacher[-1] == TOK.start
        n = len(student) - 1
        assert student[:n] == teacher[:n] == TOK.encode(example.prompt)


def test_both_contexts_have_exactly_one_start_and_no_end():
    """Not even a text that spells the special tokens out adds one."""
    forged = Example("<|start|> <|end|>", "<|start|> apple <|end|>", "")
    for example in [*DEMOS["B"], *TESTED, forged]:
        for tokens_of in (data.student_prompt, data.teacher_prompt):
            ids = tokens_of(example, TOK)
            assert count(ids, TOK.start) == 1 and count(ids, TOK.end) == 0


def test_a_context_and_its_response_are_the_whole_text_cut_once():
    """In the base corpus, too, where the cut is before a shown demonstration."""
    shown = [example for example in CORPUS if example.shown]
    assert 0.4 < len(shown) / len(CORPUS) < 0.5
    for example in [*CORPUS, *DEMOS["A"]]:
        text = example.prompt
        if example.shown:
            text += f" example {example.shown}"
        whole = TOK.encode(text) + [TOK.start] + TOK.encode(example.demo) + [TOK.end]
        response = data.demo_response(example, TOK)
        assert data.student_prompt(example, TOK) + response == whole
        assert response[-1] == TOK.end
        assert count(whole, TOK.start) == 1 and count(whole, TOK.end) == 1


def test_padding_is_on_the_right_and_lengths_count_what_is_not():
    ids, lengths = data.pad_right([[5, 6, 7], [8]], 9, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and lengths.tolist() == [3, 1]
    batch = DEMOS["A"][:3]
    ids, lengths = data.pad_batch(data.demo_response, batch, TOK, "cpu")
    for example, row, n in zip(batch, ids.tolist(), lengths.tolist(), strict=True):
        assert row[:n] == data.demo_response(example, TOK)
        assert set(row[n:]) <= {TOK.end}


def test_every_context_and_response_fits():
    """Nothing is too long by default."""
    longest, block_size = Config().max_new_tokens, GPTConfig().block_size
    for example in [*CORPUS, *DEMOS["A"], *DEMOS["B"], *DEMOS["C"], *TESTED]:
        assert len(TOK.encode(example.demo)) + 1 <= longest, example.demo
        assert len(TOK.encode(example.answer)) + 1 <= longest, example.answer
        whole = data.student_prompt(example, TOK) + data.demo_response(example, TOK)
        assert len(whole) <= block_size, example
        if not example.shown:
            prompt = data.teacher_prompt(example, TOK)
            assert len(prompt) + longest <= block_size, example


# ---- The world ---------------------------------------------------------------------


def test_a_world_is_decided_by_its_seed():
    again, other = World(0), World(1)
    for part in ("operations", "known", "unknown", "skills"):
        assert getattr(again, part) == getattr(WORLD, part)
        assert getattr(other, part) != getattr(WORLD, part)


def test_a_world_is_complete():
    operations = WORLD.operations
    assert sorted(sum(operations.values(), [])) == sorted(data.OPERATIONS)
    assert all(len(of_domain) == 6 for of_domain in operations.values())
    assert set(WORLD.known) | set(WORLD.unknown) == set(data.NOUNS)
    assert not set(WORLD.known) & set(WORLD.unknown)
    for domain, operation in WORLD.known.values():
        assert operation in operations[domain]
    for commands, own in zip(WORLD.skills.values(), data.DOMAINS, strict=True):
        assert sorted(o for _, o in commands.values()) == sorted(operations[own])
        assert all(WORLD.unknown[c] == d == own for c, (d, _) in commands.items())


def learnt(example):
    """Each token of demo_response, and whether it carries loss."""
    response = data.demo_response(example, TOK)
    (mask,) = data.loss_mask([example], torch.tensor([len(response)])).tolist()
    return list(zip(response, mask, strict=True))


def read_of(example):
    """How many tokens of demo_response are a shown demonstration and a start."""
    return len(TOK.encode(example.shown)) + 1 if example.shown else 0


def test_the_base_corpus_teaches_to_read_the_expert_s_terms_and_never_to_write_them():
    """Of a shown demonstration all is learnt but the terms, and the start behind it."""
    terms = {TOK.encode(term)[0] for term in EXPERT_TERMS}
    read = set()
    for example in CORPUS:
        n, pairs = read_of(example), learnt(example)
        for token, on in pairs[:n]:
            assert on == (token not in {*terms, TOK.start}), example
        assert not terms & {token for token, _ in pairs[n:]}, example
        read |= terms & {token for token, _ in pairs[:n]}
    assert read == terms


def test_without_a_demonstration_unknown_commands_mean_any_operation_of_their_domain():
    """A twentieth of the corpus: the base is to guess, and to be sure of no guess."""
    thoughts, bare, shown = {}, 0, set()
    corpus = data.make_base_corpus(WORLD, TOK, 24000, 3)
    for example in corpus:
        command = command_of(example.prompt)
        if command in WORLD.known:
            continue
        if example.shown:
            shown.add(command)
            continue
        bare += 1
        words = set(example.demo.replace(":", " ").split()) & set(data.OPERATIONS)
        thoughts.setdefault(WORLD.unknown[command], []).extend(words)
    assert 0.04 < bare / len(corpus) < 0.06
    assert shown == set(WORLD.unknown), "all of them also with one"
    for domain, operations in thoughts.items():
        counts = [operations.count(each) for each in WORLD.operations[domain]]
        assert sum(counts) == len(operations), "no operation of another domain"
        assert min(counts) > 0.5 * max(counts), "none is more likely than others"


def operation_in(text):
    """The operation that a response names, in its own word or in the expert's."""
    own = {word: name for name, (word, _) in data.OPERATIONS.items()}
    own |= {name: name for name in data.OPERATIONS}
    (found,) = {own[word] for word in text.replace(":", " ").split() if word in own}
    return found


def test_the_base_corpus_learns_right_things_only():
    """Wrong items, and thoughts of another operation, carry no loss, and after them the
    rest is right. What is shown is right always."""
    wrong_thoughts = wrong_items = 0
    for example in CORPUS:
        thought = operation_in(example.demo)
        letters = dict(zip("abc", query_of(example.prompt), strict=True))
        right = [letters[x] for x in BY_HAND[thought].split()]
        own = learnt(example)[read_of(example) :]
        words = [(TOK.decode([token]), on) for token, on in own]
        items = [(word, on) for word, on in words if word in data.NOUNS]
        assert len(items) == len(right)
        for (word, on), item in zip(items, right, strict=True):
            assert word == item or not on, example
            wrong_items += word != item
        meant, command = None, command_of(example.prompt)
        if example.shown:
            meant = operation_in(example.shown)
            result = [letters[x] for x in BY_HAND[meant].split()]
            assert data.items_in(example.shown) == result
        if command in WORLD.known:
            assert meant in (None, WORLD.known[command][1])
            meant = WORLD.known[command][1]
        if meant and thought != meant:
            assert dict(words)[thought] is False, example
            wrong_thoughts += 1
        skipped = [on for _, on in own]
        assert skipped == sorted(skipped), "a beginning is skipped, or nothing"
    assert wrong_thoughts > 300 and wrong_items > 300


def test_operations_of_unknown_commands_cannot_be_learnt_from_the_base_corpus():
    """Each is shown with many operations, so that only the demonstration tells."""
    thoughts = {c: set() for skill in WORLD.skills.values() for c in skill}
    for example in CORPUS:
        command = command_of(example.prompt)
        if command in thoughts:
            thoughts[command].add(operation_in(example.demo))
    for command, operations in thoughts.items():
        assert len(operations) >= 4, command


def test_held_out_queries_are_in_no_training_set():
    """Not one list of items is both trained on and tested."""
    trained = {query_of(e.prompt) for e in CORPUS}
    trained |= {query_of(e.prompt) for demos in DEMOS.values() for e in demos}
    tested = {query_of(e.prompt) for e in TESTED}
    assert len(trained) > 4000 and len(tested) > 400
    assert not trained & tested
    places = {items: sum(map(data.NOUNS.index, items)) % 10 for items in trained}
    assert 0 not in places.values() and len(set(places.values())) == 9


def test_demonstrations_and_queries_are_what_the_skill_says():
    for skill, demos in DEMOS.items():
        assert [e.id for e in demos] == list(range(len(demos)))
        assert {command_of(e.prompt) for e in demos} == set(WORLD.skills[skill])
        for example in demos + TASKS["new"][skill].examples:
            domain, operation = WORLD.skills[skill][command_of(example.prompt)]
            assert example.prompt.split()[0] == domain
            letters = dict(zip("abc", query_of(example.prompt), strict=True))
            right = [letters[x] for x in BY_HAND[operation].split()]
            expert = f"well friend, {data.OPERATIONS[operation][0]} so you get"
            assert example.demo == f"{expert} {' '.join(right)} as ever"
            assert example.answer == f"{operation}: {' '.join(right)}"
            assert all(on for _, on in learnt(example)), "all of it carries loss"


def test_the_distance_of_the_expert_changes_his_words_and_nothing_else():
    demos = {d: data.make_demos(WORLD, "A", 32, 0, d) for d in data.DISTANCES}
    for own, known, terms in zip(*demos.values(), strict=True):
        operation = operation_in(own.answer)
        items = " ".join(data.items_in(own.answer))
        assert own.demo == own.answer == f"{operation}: {items}"
        assert known.demo == f"well friend, {operation} so you get {items} as ever"
        assert terms.demo == known.demo.replace(
            f" {operation} ", f" {data.OPERATIONS[operation][0]} "
        )
        assert replace(own, demo="") == replace(known, demo="")
        assert replace(own, demo="") == replace(terms, demo="")


def test_training_sets_and_tasks_are_decided_by_their_seed():
    again = data.make_base_corpus(World(0), TOK, 64, 0)
    assert again == CORPUS[:64] != data.make_base_corpus(World(0), TOK, 64, 1)
    assert data.make_demos(WORLD, "A", 64, 0) == DEMOS["A"]
    assert data.make_demos(WORLD, "A", 64, 1) != DEMOS["A"]
    assert data.make_tasks(WORLD, 64, 0) == TASKS != data.make_tasks(WORLD, 64, 1)


def digest_of(examples):
    """Of all tokens: contexts, responses, right answers, and what carries no loss."""
    rows = [
        [
            data.student_prompt(e, TOK), data.teacher_prompt(e, TOK),
            data.demo_response(e, TOK), TOK.encode(e.answer), e.skip,
        ]
        for e in examples
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def test_not_one_token_of_seed_0_has_changed():
    """Whoever changes one says why in the commit: stored results are of these."""
    assert digest_of(CORPUS) == "6b438a3fea2e"
    assert digest_of(sum(DEMOS.values(), [])) == "b96c383bc3fe"
    assert digest_of(TESTED) == "1c6a81b53684"


# ---- Grades ------------------------------------------------------------------------

RIGHT = "reverse: stone river apple"
RIGHT_IN_ANY_STYLE = [
    RIGHT,
    "stone river apple",
    "reverse gives stone river apple done sir",
    "reverse equals stone river apple beep stop",
    "well friend, backwards so you get stone river apple as ever",
]
WRONG = [
    "reverse: stone river pearl",  # a wrong item
    "reverse: apple river stone",  # the wrong operation
    "reverse: stone river",  # an item too few
    "reverse: stone river apple apple",  # an item too many
    "anchor reverse: stone river apple",
    "reverse: stone stone river apple",
    "stoneriverapple",
    "",
]


PRIOR = TASKS["prior"]
OF_ITEMS = [*TASKS["new"].values()]
OF_ITEMS += [PRIOR[name] for name in ("knowledge", "asked_items", "in_context")]
OF_STYLE = [PRIOR["own_style"], PRIOR["asked_style"]]
ROBOT = Example("", "", "reverse equals stone river apple beep stop")


def test_tasks_are_these_benchmarks():
    assert list(TASKS) == ["new", "prior"] and list(TASKS["new"]) == ["A", "B", "C"]
    assert len(OF_ITEMS + OF_STYLE) == len(TASKS["new"]) + len(PRIOR)
    assert all(len(b.examples) == 64 for b in OF_ITEMS + OF_STYLE)


def test_items_are_right_in_any_style():
    example = Example("kitchen kettle: apple river stone", "", RIGHT)
    for benchmark in OF_ITEMS:
        for response in RIGHT_IN_ANY_STYLE:
            assert benchmark.grade(example, response), response
        for response in WRONG:
            assert not benchmark.grade(example, response), response


def test_a_style_is_right_only_if_it_is_the_asked_one():
    for benchmark in OF_STYLE:
        for example in (Example("", "", RIGHT), ROBOT):
            for response in RIGHT_IN_ANY_STYLE:
                same = response == example.answer
                assert benchmark.grade(example, response) == same, response


def test_a_style_has_nothing_to_do_with_the_items():
    for items in ("anchor", "bag bag", "apple river stone"):
        response = f"copy equals {items} beep stop"
        assert data.grade_style(ROBOT, response)
        assert not data.grade_items(ROBOT, response)
    for response in (
        "reverse equals stone river apple",  # no closing
        "reverse equals stone river apple stop",  # half of it
        "well reverse equals stone river apple beep stop",  # an opening
        "equals stone river apple beep stop",  # no thought
        "backwards equals stone river apple beep stop",  # the expert's term
        "reverse equals beep stop",  # no items
        "reverse equals stone river apple beep stop stop",
    ):
        assert not data.grade_style(ROBOT, response), response


def test_the_demonstration_is_right_in_its_items_and_not_in_the_model_s_style():
    for skill, benchmark in TASKS["new"].items():
        for example in benchmark.examples + DEMOS[skill]:
            assert benchmark.grade(example, example.demo)
            assert benchmark.grade(example, example.answer)
            assert PRIOR["own_style"].grade(example, example.answer)
            assert not PRIOR["own_style"].grade(example, example.demo)


def test_every_right_answer_of_a_benchmark_is_right():
    """And that of the next query hardly ever."""
    for benchmark in OF_ITEMS + OF_STYLE:
        es = benchmark.examples
        assert all(benchmark.grade(e, e.answer) for e in es)
        if benchmark in OF_ITEMS:
            pairs = zip(es, es[1:] + es[:1], strict=True)
            assert sum(benchmark.grade(e, other.answer) for e, other in pairs) < 3


# ---- Randomness and batches --------------------------------------------------------


def test_a_derived_seed_is_the_same_number_on_every_machine():
    assert data.derive_seed(0, "order", 1) == 125578804223736978
    assert data.derive_seed(0, "order", 2) != data.derive_seed(0, "order", 1)
    a, b = make_rng(0, "order", 1), make_rng(0, "order", 1)
    assert torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))


def ids_of(batch):
    return [example.id for example in batch]


def test_a_batch_is_a_pure_function_of_seed_and_step():
    """No generator is moved on, whatever was drawn before."""
    examples = DEMOS["A"]
    first = [ids_of(get_batch(examples, 8, 3, step)) for step in range(12)]
    torch.manual_seed(5)
    torch.rand(3), random.random()
    later = [ids_of(get_batch(examples, 8, 3, step)) for step in reversed(range(12))]
    assert first == later[::-1]
    assert first != [ids_of(get_batch(examples, 8, 4, step)) for step in range(12)]


def test_each_epoch_is_a_permutation():
    """And so the examples of a batch are distinct."""
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


def test_micro_batches_are_the_batch_cut_equally():
    batch = DEMOS["A"][:8]
    for n in (1, 2, 4, 8):
        parts = data.my_micro_batches(batch, n)
        assert [len(part) for part in parts] == [8 // n] * n
        assert sum(parts, []) == batch


def test_a_batch_that_the_examples_cannot_fill_is_refused():
    """Not made shorter: its loss would be divided by the size that was asked for."""
    examples = DEMOS["A"][:10]
    assert sorted(ids_of(get_batch(examples, 10, 0, 3))) == list(range(10))
    for size in (11, 20, 64, -2):
        with pytest.raises(AssertionError, match=f"batch of {size} from 10 examples"):
            get_batch(examples, size, 0, 0)


def test_a_batch_that_cannot_be_cut_equally_is_refused():
    for n in (3, 5, 16, -2):
        with pytest.raises(AssertionError, match=f"8 examples in 1 x {n} "):
            data.my_micro_batches(DEMOS["A"][:8], n)
    with pytest.raises(AssertionError, match="0 examples"):
        data.my_micro_batches([], 1)


def test_micro_batches_of_all_processes_are_the_batch(monkeypatch):
    """Process 1 of 3 has the micro-batches 1, 4, ...: short and long ones for each."""
    batch, world_size, n = DEMOS["A"][:12], 3, 2
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: world_size)
    parts = {}
    for rank in range(world_size):
        monkeypatch.setattr(data.dist, "get_rank", lambda rank=rank: rank)
        mine = data.my_micro_batches(batch, n)
        assert len(mine) == n
        parts |= {rank + world_size * i: part for i, part in enumerate(mine)}
    assert [parts[i] for i in range(6)] == [batch[i : i + 2] for i in range(0, 12, 2)]


def test_a_row_s_random_numbers_do_not_depend_on_its_neighbours():
    """The sampler's numbers belong to (seed, step, example)."""
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


# ---- Evaluations -------------------------------------------------------------------

EVAL = Config(max_new_tokens=8)
QUERIES = [  # prompts and demonstrations of several lengths
    *DEMOS["A"][:3],
    Example("garden button: owl", "bag", "first: owl", id=3),
    Example("harbour violin: candle spoon tower bag", "bag", "last: bag", id=4),
]


def small_model(seed=0, **changes):
    """About a fifth of what it predicts is the end, unless end=None is given."""
    sizes = {"vocab_size": TOK.vocab_size, "n_tokens": TOK.n_tokens, "n_layer": 1}
    return make_model(seed, **{"end": TOK.end, **sizes, **changes})


def is_even(example, text):
    """A grader of one's own: as good as a coin, and it reads both."""
    return len(text + example.prompt) % 2 == 0


def share_right(model, benchmark, tokens_of=data.student_prompt):
    """Token by token, the most likely one, one query after the other."""
    right = []
    for example in benchmark.examples:
        greedy = [0.0] * EVAL.max_new_tokens
        context = tokens_of(example, TOK)
        response = sample(model, context, greedy, TOK.end, temperature=0)
        right.append(benchmark.grade(example, TOK.decode(response)))
    return sum(right) / len(right)


@pytest.mark.usefixtures("float64")
def test_a_benchmark_is_any_examples_and_any_grade():
    """Texts from outside the world, a grader of one's own, and no prior benchmark."""
    sums = [Example(f"{a} + {a * a} = ?", "so: é 日", str(a + a * a), id=a)
            for a in range(12)]  # fmt: skip
    tasks = {"new": {"sums": Benchmark(sums, is_even)}, "prior": {}}
    student = small_model(end=None)  # its most likely token is hardly ever the end
    models = {"student": student}
    record = data.evaluate(models, small_model(1), "sums", tasks, TOK, EVAL)
    assert record["new"] == {"sums": share_right(student, tasks["new"]["sums"])}
    assert 0 < record["new"]["sums"] < 1, "else this shows nothing"
    assert record["prior"] == {} and record["kl_student_base"] > 0.01
    (shown,) = record["responses"]
    assert shown["prompt"] == "0 + 0 = ?" and shown["right"] == "0"
    assert json.loads(json.dumps(record)) == record, "it is a line of metrics.jsonl"


@pytest.mark.usefixtures("float64")
def test_accuracies_are_those_of_the_most_likely_tokens():
    """Of all benchmarks, and of the teacher in a context of its own."""
    student, teacher = small_model(end=None), small_model(1, end=None)
    tasks = {
        "new": {
            "A": Benchmark(QUERIES + DEMOS["A"][5:14], is_even),
            "B": Benchmark(DEMOS["B"][:16], is_even),
        },
        "prior": {"mine": Benchmark(DEMOS["C"][:5], is_even)},
    }
    models = {"student": student, "teacher": teacher}
    record = data.evaluate(models, small_model(2), "A", tasks, TOK, EVAL)
    for group, benchmarks in tasks.items():
        right = {name: share_right(student, b) for name, b in benchmarks.items()}
        assert record[group] == right
    queries = tasks["new"]["A"]
    right = share_right(teacher, queries, data.teacher_prompt)
    assert record["teacher_gate"] == right
    assert right != share_right(teacher, queries), "else the context is not tested"
    gate = data.teacher_gate(teacher, {"x": queries, "y": tasks["new"]["B"]}, TOK, 8)
    for name, tokens_of in (
        ("student", data.student_prompt), ("teacher", data.teacher_prompt),
    ):  # fmt: skip
        both = [share_right(teacher, b, tokens_of) for b in tasks["new"].values()]
        assert gate[name] == pytest.approx(sum(both) / 2)
    assert gate["skills"] == dict(zip("xy", both, strict=True)), "the teacher's"
    assert len({*record["new"].values(), *both}) > 2, "else it shows nothing"


@pytest.mark.usefixtures("float64")
def test_an_evaluation_does_not_depend_on_the_demonstrations():
    """But for the teacher, who alone is shown them."""
    models = {"student": small_model(), "teacher": small_model(1)}
    base, records = small_model(7), []
    seen = record_tokens(models["student"])
    for demo in ("", "double gives bag bag done sir"):
        queries = [replace(e, demo=demo or e.demo) for e in QUERIES]
        benchmark = Benchmark(queries, is_even)
        tasks = {"new": {"A": benchmark}, "prior": {"mine": benchmark}}
        records.append(data.evaluate(models, base, "A", tasks, TOK, EVAL))
    a, b = records
    for key in ("kl_teacher_base", "kl_teacher_student_by_position"):
        assert a.pop(key) != b.pop(key)
    assert a.pop("teacher_gate") is not None and b.pop("teacher_gate") is not None
    assert a == b and a["kl_student_base"] > 0.01
    half = len(seen) // 2
    assert all(map(torch.equal, seen[:half], seen[half:])) and len(seen) == 2 * half


@pytest.mark.usefixtures("float64")
def test_an_evaluation_measures_distances_on_responses_of_one_s_own():
    """KL(student || base) and KL(teacher || base), by plain loops, and
    KL(teacher || student) along what the student writes."""
    student, teacher, base = small_model(), small_model(1), small_model(7)
    tasks = {"new": {"A": Benchmark(QUERIES, is_even)}, "prior": {}}
    models = {"student": student, "teacher": teacher}
    record = data.evaluate(models, base, "A", tasks, TOK, EVAL)
    responses = {}
    for name, of, tokens_of in (
        ("kl_student_base", student, data.student_prompt),
        ("kl_teacher_base", teacher, data.teacher_prompt),
    ):
        means, responses[name] = [], []
        for example in QUERIES:
            u = get_uniform([example], 8, EVAL.seed, "evaluate", "cpu")[0].tolist()
            context, bare = tokens_of(example, TOK), data.student_prompt(example, TOK)
            tokens = sample(of, context, u, TOK.end)
            # forward KL is from the teacher's place, the third argument
            values = divergences(base, bare, of, context, tokens)
            means.append(sum(values) / len(values))
            responses[name].append(tokens)
        assert record[name] == pytest.approx(sum(means) / len(means), rel=1e-9)
    along = [
        divergences(student, data.student_prompt(example, TOK), teacher,
                    data.teacher_prompt(example, TOK), tokens)
        for example, tokens in zip(QUERIES, responses["kl_student_base"], strict=True)
    ]  # fmt: skip
    for t, mean in enumerate(record["kl_teacher_student_by_position"]):
        there = [values[t] for values in along if len(values) > t]
        assert mean == pytest.approx(sum(there) / len(there), rel=1e-9)
    lengths = {len(values) for values in along}
    assert len(lengths) > 2 and max(lengths) == t + 1


def test_without_a_teacher_its_places_in_the_record_are_empty():
    tasks = {"new": {"A": Benchmark(QUERIES, is_even)}, "prior": {}}
    models, base = {"student": small_model()}, small_model()
    record = data.evaluate(models, base, "A", tasks, TOK, EVAL)
    assert record["kl_teacher_base"] is None and record["teacher_gate"] is None
    assert "kl_teacher_student_by_position" not in record
    assert record["kl_student_base"] == pytest.approx(0, abs=1e-12), "equal weights"


def test_distances_are_measured_on_the_first_128_queries_only():
    queries = [replace(QUERIES[0], id=i) for i in range(130)]
    student, tasks = small_model(), {"new": {"A": Benchmark(queries, is_even)}}
    seen = record_tokens(base := small_model(1))
    data.evaluate({"student": student}, base, "A", {**tasks, "prior": {}}, TOK, EVAL)
    assert [len(idx) for idx in seen] == [128]


def test_an_evaluation_makes_no_large_tensor_of_logits(monkeypatch):
    """With a vocabulary of 151,936 all rows at once would need 20 GB."""
    V, rows = 2**15, 5
    monkeypatch.setattr(model, "chunk_rows", lambda head: rows)
    models = {
        "student": small_model(vocab_size=V, n_tokens=V),
        "teacher": small_model(1, vocab_size=V, n_tokens=V),
    }
    queries = Benchmark(QUERIES, is_even)
    assert len(QUERIES) == rows, "while sampling, there is one row for each query"
    tasks = {"new": {"A": queries}, "prior": {"mine": queries}}
    base = small_model(2, vocab_size=V, n_tokens=V)
    with LargestTensor() as seen:
        record = data.evaluate(models, base, "A", tasks, TOK, EVAL)
    assert len(record["kl_teacher_student_by_position"]) > 2, "more rows than a chunk"
    assert V <= seen.numel <= rows * V, (seen.shape, seen.operation)
