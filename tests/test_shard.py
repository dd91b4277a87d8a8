"""--shard: two processes that hold a part each compute what one computes.

Over gloo, on the CPU, in one group of two, by the script GROUP, since to start one
takes seconds; each test reads what it left behind.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train

pytest.importorskip("transformers", reason="pip install transformers")
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    pytest.skip("--shard needs torch 2.13 or newer", allow_module_level=True)
from test_own_run import load, make_files, run, stop_at, weights_of  # noqa: E402
from test_pretrained import make_folder  # noqa: E402
from test_train import read, same  # noqa: E402

ROOT, OUTS = Path(__file__).parents[1], ("one", "two", "cut", "plain")

# A GPT in shards beside a whole one, then train.py with one command line after another
GROUP = """
import copy, itertools, json, pathlib, shutil, sys, time
import torch
import torch.distributed as dist
import model, train
from model import GPT, GPTConfig, chunked_kl, generate, response_hidden

torch.set_num_threads(1)
dist.init_process_group("gloo")
dist.init_process_group = lambda *args, **more: None  # one group serves all
dist.destroy_process_group = lambda: None
rank, (name, *lines), found = dist.get_rank(), json.loads(sys.argv[1]), []
prompts = torch.arange(36).view(4, 9) % 11
lengths, own = torch.tensor([9, 4, 2, 7]), slice(2 * rank, 2 * rank + 2)
u = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))


def loss_of(student, teacher, rows):
    args = prompts[rows], lengths[rows]
    response, mask = generate(student, *args, 12, 5, u[rows])
    torch.manual_seed(3)  # of dropout
    hidden = response_hidden(student, *args, response, mask)
    with torch.no_grad():
        shown = response_hidden(teacher, *args, response, mask) * 1.5
    weight = torch.full((len(hidden),), 0.01)
    loss, _ = chunked_kl(hidden, shown, student.head(), teacher.head(), weight)
    loss.backward()
    return loss.detach(), response, mask, hidden.detach()


for tie, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16)):
    config = GPTConfig(n_layer=2, n_head=6, n_kv_head=2, n_embd=24, n_inner=21,
                       vocab_size=13, n_tokens=11, tie_weights=tie)
    gpt = GPT(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(4)  # far from uniform
    gpt.dtype, gpt.dropout, gpt.checkpointing = dtype, 0.1, not tie
    cut = model.shard(copy.deepcopy(gpt), torch.device("cpu"))
    teacher, shown = (copy.deepcopy(x).requires_grad_(False).eval() for x in (gpt, cut))
    # what each rank computes with shards, it computes alone with a whole model
    mine, same = loss_of(cut, shown, own), loss_of(gpt, teacher, own)
    gpt.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):  # the gradient of both ranks' rows
        loss_of(gpt, teacher, rows)
    grads = [model.whole(p.grad) for p in cut.parameters()]
    kept = sum(p.to_local().numel() for p in shown.parameters())
    found.append({
        "kept": kept / gpt.num_params(),
        "shards": all(hasattr(p, "full_tensor") for p in cut.parameters()),
        "equal": [torch.equal(x, y) for x, y in zip(mine, same, strict=True)],
        "end": mine[1].size(1),
        "limit": 1e-5 if dtype == torch.float32 else 0.03,
        "error": max(((g - p.grad).abs().max() / p.grad.abs().max()).item()
                     for g, p in zip(grads, gpt.parameters(), strict=True)),
        "norm": torch.nn.utils.clip_grad_norm_(cut.parameters(), 1.0).item(),
    })

real, load = train.Run.stop_wanted, train.load_own
for stop, *argv in lines:
    steps = iter(range(100))
    if stop:
        train.Run.stop_wanted = lambda self: float(next(steps) == 3)
    train.load_own = lambda name, device, n: found.append(n) or load(name, device, n)
    assert train.main(argv) == (143 if stop else 0)
    train.Run.stop_wanted = real
    if stop and rank == 0:
        shutil.copytree(argv[-1], argv[-1] + " copy")
pathlib.Path(f"{name}.{rank}.json").write_text(json.dumps(found))
time.sleep(0.1)  # see the end of train.main
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder in which one process and a group have worked, their flags, what the
    group has found and printed."""
    place, threads = tmp_path_factory.mktemp("pair"), torch.get_num_threads()
    source = make_folder(place / "source", tie_word_embeddings=True)
    argv = [*make_files(place, source), "--log-every", "1"]
    one, two, cut, plain = (["--out", str(place / name)] for name in OUTS)
    assert stop_at(3, *argv, *plain) == 143
    assert train.main([*argv, "--method", "both", *one]) == 0
    torch.set_num_threads(threads)
    shard = [*argv, "--shard"]
    lines = [
        ["", *shard, "--method", "both", *two],
        ["stop", *shard, "--checkpointing", *cut],
        ["", *shard, "--checkpointing", "--resume", *cut],
        ["", *shard, "--resume", *plain],
    ]
    (place / "group.py").write_text(GROUP)
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone".split()
    torchrun.append("--nproc_per_node=2")
    done = subprocess.run(
        [*torchrun, place / "group.py", json.dumps([str(place), *lines])],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = [json.loads(Path(f"{place}.{rank}.json").read_text()) for rank in (0, 1)]
    return place, argv, found, done.stdout


@pytest.mark.slow
def test_a_process_holds_half_and_computes_what_it_computes_alone(pair):
    """Loss, tokens, masks and hidden states to the bit, in bfloat16, too, where norms
    stay float32; and so though the responses of one process end before those of the
    other. Gradients are summed over processes. The memory that it asks for is half."""
    both = list(zip(*pair[2], strict=True))
    assert any(one["end"] != other["end"] for one, other in both[:4])
    for one, other in both[:4]:
        assert one["shards"] and other["shards"] and one["norm"] == other["norm"] > 0
        assert one["kept"] + other["kept"] == pytest.approx(1)
        assert 0.45 < one["kept"] < 0.55
        for each in (one, other):
            assert each["equal"] == [True] * 4 and each["error"] < each["limit"]
    assert both[4:] == [(20 / 2, 20 / 2)] * 4  # bytes for each weight


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_a_run_in_shards_is_the_run_of_one_process(method, pair):
    """Records, the folder, and a checkpoint of student, teacher and AdamW: a plain file
    of whole tensors, where AdamW's state is by the names of parameters."""
    outs = pair[0] / "two", pair[0] / "one"
    (results, lines), (wanted, wanted_lines) = (read(out, method) for out in outs)
    assert len(lines) == 9  # 6 updates, 3 evaluations
    for line, right in zip(lines, wanted_lines, strict=True):
        assert same(line, right, 1e-5), (line, right)
    assert results["machine"]["processes"] == 2
    assert results["machine"]["device"] == "cpu, in shards"
    assert results["teacher_gate"] == wanted["teacher_gate"]
    saved, other = (
        torch.load(out / method / "checkpoint.pt", weights_only=True) for out in outs
    )
    for key in "models", "optimizer":
        assert same(saved[key], other[key], 1e-5), key
    weights = saved["models"]["student"]
    assert saved["optimizer"]["state"].keys() == weights.keys() - {"lm_head.weight"}
    assert ("teacher" in saved["models"]) == (method == "sdft")
    written, one = (load(out / method / "model") for out in outs)
    assert torch.equal(written.wte.weight, weights["wte.weight"])
    assert torch.allclose(weights_of(written), weights_of(one), atol=1e-5)
    moved = weights_of(one) - weights_of(load(pair[0] / "source"))
    assert moved.abs().max() > 1e-4  # so that 1e-5 says something


@pytest.mark.slow
def test_runs_go_on_in_shards_and_out_of_them(capsys, pair, tmp_path):
    """From two processes to two, to the bit, and with --checkpointing, which changes no
    number; from one to two (it does not fit any more); and from two to one."""
    place, argv, _, text = pair
    models = [load(place / name / "sdft" / "model") for name in OUTS]
    one, two, cut, plain = map(weights_of, models)
    assert torch.equal(two, cut) and "goes on after update 4" in text
    assert torch.allclose(one, plain, atol=1e-5)
    assert "not to the bit (saved -> now): device: cpu -> cpu, in shards, " in text
    out = shutil.copytree(place / "cut copy", tmp_path / "out")
    saved = train.read_run(out / "sdft" / "checkpoint.pt")
    assert saved["step"] == 4  # in the second stage: AdamW's state is part of it
    code, text, err = run(capsys, *argv, "--resume", "--out", out)
    assert code == 0, err
    assert "not to the bit (saved -> now): device: cpu, in shards -> cpu, " in text
    assert torch.allclose(one, weights_of(load(out / "sdft" / "model")), atol=1e-5)


def test_shard_is_refused_where_it_cannot_be(monkeypatch):
    args = train.parse_args(["--init", "x", "--data", "y", "--shard"])
    for name, n in (("cpu", 1), ("mps", 2)):
        monkeypatch.setattr(train, "choose_device", lambda _, x=name: torch.device(x))
        monkeypatch.setattr(train, "world_size", lambda n=n: n)
        with pytest.raises(train.UserError, match="--shard needs several") as caught:
            train.start_processes(args)
        assert caught.value.hint.startswith("torchrun --standalone")
    monkeypatch.setattr(train, "choose_device", lambda _: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "set_device", print)
    assert train.start_processes(args) == torch.device("cuda:0")
