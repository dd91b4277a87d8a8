"""Does a device compute what a CPU computes? There have been silently wrong kernels
(MPS: attention with a mask).

    python tests/bench/check_device.py --device mps

Compares log-probabilities of whole sequences, and greedy tokens from a cache, of one
model of random weights. Exit codes: 0 it does, 1 it does not, 2 there is no device.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: E402
from data import make_rng  # noqa: E402
from model import GPT, GPTConfig, generate  # noqa: E402


@torch.no_grad()
def make_model():
    gpt = GPT(GPTConfig(), make_rng(0, "weights")).eval()
    for p in gpt.h.parameters():
        if p.dim() == 2:  # with small weights it would only repeat its last token
            p.mul_(4)
    return gpt


@torch.no_grad()
def compare(one, other):
    """The largest difference of log-probabilities of two models, and whether they write
    the same tokens. Each computes on its own device."""
    prompts = torch.randint(512, (4, 12), generator=make_rng(0, "prompts"))  # (B, P)
    lengths, log_p, tokens = torch.tensor([12, 7, 3, 1]), [], []
    for gpt in (one, other):
        both = [x.to(next(gpt.parameters()).device) for x in (prompts, lengths)]
        log_p.append(gpt(both[0]).log_softmax(-1).cpu())  # (B, P, V)
        tokens.append(generate(gpt, *both, 8, 0, temperature=0)[0].cpu())
    difference = (log_p[0] - log_p[1]).abs().max().item()
    return difference, torch.equal(*tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps")
    try:
        device = train.choose_device(parser.parse_args().device)
    except train.UserError as error:
        parser.error(f"{error}\nhint: {error.hint}")  # exit code 2
    difference, same = compare(make_model(), make_model().to(device))
    right = difference < 1e-2 and same  # nan is wrong, too
    print(f"{device}: log-probabilities differ by {difference:.1g}, greedy tokens "
          f"{'are equal' if same else 'differ'}: "
          + ("it computes what a CPU does" if right else "do not trust its results"))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
