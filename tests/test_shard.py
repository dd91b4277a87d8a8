"""--shard: two processes that hold a part each compute what one computes.

Over gloo, on the CPU. All that needs two processes is done in one group of them, by the
script GROUP, since to start one takes seconds; each test reads what it left behind.
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
if tuple(map(int, torch.__version__.split(".")[:2])) < train.SHARD_TORCH:
    pytest.skip("--shard needs a newer torch", allow_module_level=True)
from test_own_run import SHORT, files, folder, load, read, run, weights_of  # noqa: E402

__all__ = ["files", "folder"]  # fixtures

pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")
ROOT = Path(__file__).parents[1]

# A GPT in shards beside a whole one, then train.py with one command line after another
GROUP = """
import copy, json, shutil, sys, time
import torch
import torch.distributed as dist
import model, train
from model import GPT, GPTConfig, chunked_kl, generate, response_hidden

torch.set_num_threads(1)
dist.init_process_group("gloo")
dist.init_process_group = lambda *args, **more: None  # one group serves all
dist.destroy_process_group = lambda: None
rank, lines = dist.get_rank(), json.loads(sys.argv[1])
prompts = torch.arange(36).view(4, 9) % 11
lengths, own = torch.tensor([9, 4, 2, 7]), slice(2 * rank, 2 * rank + 2)
u = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))
found = []


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


for tie in (True, False):
    for dtype in (torch.float32, torch.bfloat16):
        config = GPTConfig(n_layer=2, n_head=6, n_kv_head=2, n_embd=24, n_inner=21,
                           vocab_size=13, n_tokens=11, tie_weights=tie)
        gpt = GPT(config, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for p in gpt.parameters():
                p.mul_(4)  # far from uniform
        gpt.dtype, gpt.dropout = dtype, 0.1
        gpt.checkpointing = not tie
        cut = model.shard(copy.deepcopy(gpt), torch.device("cpu"))
        teacher = copy.deepcopy(gpt).requires_grad_(False).eval()
        shown = copy.deepcopy(cut).requires_grad_(False).eval()
        kept = sum(p.to_local().numel() for p in shown.parameters())
        # what each rank computes with shards, it computes alone with a whole model
        loss, *mine = loss_of(cut, shown, own)
        same_loss, *same = loss_of(gpt, teacher, own)
        equal = [torch.equal(x, y) for x, y in zip(mine, same, strict=True)]
        ends = [None, None]
        dist.all_gather_object(ends, mine[0].size(1))
        gpt.zero_grad()
        for rows in (slice(0, 2), slice(2, 4)):  # the gradient of both ranks' rows
            loss_of(gpt, teacher, rows)
        grads = [model.whole(p.grad) for p in cut.parameters()]
        error = max((g - p.grad).abs().max().item() / p.grad.abs().max().item()
                    for g, p in zip(grads, gpt.parameters(), strict=True))
        norm = torch.nn.utils.clip_grad_norm_(cut.parameters(), 1.0).item()
        found.append({
            "dtype": str(dtype), "kept": kept / gpt.num_params(), "ends": ends,
            "equal": equal, "loss": [loss.item(), same_loss.item()], "error": error,
            "norm": norm,
            "shards": all(hasattr(p, "full_tensor") for m in (cut, shown)
                          for p in m.parameters()),
        })
with open(f"{lines[0][-1]}.{rank}.json", "w") as file:
    json.dump(found, file)

real = train.Run.stop_wanted
for argv in lines[1:]:
    steps = iter(range(100))
    if argv[0] == "stop":
        train.Run.stop_wanted = lambda self: float(next(steps) == 3)
    code = train.main(argv[1:])
    train.Run.stop_wanted = real
    assert code == (128 if argv[0] == "stop" else 0), code
    if argv[0] == "stop" and rank == 0:
        shutil.copytree(argv[-1], argv[-1] + " copy")
time.sleep(0.1)  # see the end of train.main
"""


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory):
    """The folder in which a group of two and one process have worked."""
    place = tmp_path_factory.mktemp("pair")
    own = files.__wrapped__(place)
    argv = ["--init", str(folder), *own, *SHORT, "--log-every", "1"]
    argv += ["--threads", "1"]
    stopped = [*argv, "--shard", "--checkpointing"]
    plain = [*argv, "--out", str(place / "plain")]
    steps = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "stop_wanted", lambda self: float(next(steps) == 3))
        assert train.main(plain) == 128
    lines = [
        [str(place / "found")],
        ["", *argv, "--shard", "--method", "both", "--out", str(place / "two")],
        ["stop", *stopped, "--out", str(place / "cut")],
        ["", *stopped, "--resume", "--out", str(place / "cut")],
        ["", *plain, "--shard", "--resume"],
    ]
    script = place / "group.py"
    script.write_text(GROUP)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node=2", script, json.dumps(lines)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (place / "text").write_text(done.stdout)
    code = train.main([*argv, "--method", "both", "--out", str(place / "one")])
    assert code == 0
    return place, argv


def found(pair):
    return [json.loads((pair[0] / f"found.{rank}.json").read_text()) for rank in (0, 1)]


def test_each_process_holds_half_of_student_and_teacher(pair):
    for one, other in zip(*found(pair), strict=True):
        assert one["shards"] and other["shards"]
        assert one["kept"] + other["kept"] == pytest.approx(1)
        assert 0.45 < one["kept"] < 0.55


def test_what_a_process_computes_is_what_it_computes_alone(pair):
    """Tokens, masks and hidden states to the bit, in bfloat16, too, where norms stay
    float32; and so though the responses of one process end before those of the other.
    """
    assert any(one["ends"][0] != one["ends"][1] for one in found(pair)[0])
    for one in sum(found(pair), []):
        assert one["equal"] == [True] * 3
        assert one["loss"][0] == one["loss"][1]


def test_gradients_are_summed_over_processes(pair):
    for one, other in zip(*found(pair), strict=True):
        assert one["error"] < (1e-5 if one["dtype"] == "torch.float32" else 0.03)
        assert one["norm"] == other["norm"] > 0


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_a_run_in_shards_is_the_run_of_one_process(method, pair):
    """Losses, evaluations, checkpoints of student, teacher, AdamW, and the folder."""
    place = pair[0]
    (results, lines), (wanted, wanted_lines) = (
        read(place / name, method) for name in ("two", "one")
    )
    assert len(lines) == len(wanted_lines) == 9  # 6 updates, 3 evaluations
    for line, other in zip(lines, wanted_lines, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"seconds"}:
            assert line[key] == close(other[key]), key
    assert results["machine"].pop("shards") and results["machine"]["processes"] == 2
    assert results["teacher_gate"] == wanted["teacher_gate"]
    saved, other = (
        train.read_checkpoint(place / name / method / "checkpoint.pt")
        for name in ("two", "one")
    )
    assert_close(saved["models"], other["models"])
    assert_close(saved["optimizer"]["state"], other["optimizer"]["state"])
    assert ("teacher" in saved["models"]) == (method == "sdft")
    written, other = (load(place / name / method / "model") for name in ("two", "one"))
    assert torch.equal(written.wte.weight, saved["models"]["student"]["wte.weight"])
    assert torch.allclose(weights_of(written), weights_of(other), atol=1e-5)
    moved = weights_of(other) - weights_of(load(Path(pair[1][1])))
    assert moved.abs().max() > 1e-4  # so that 1e-5 says something


def close(x):
    """x, of which numbers may differ by rounding; lists of dicts hold texts."""
    if isinstance(x, dict):
        return {key: close(value) for key, value in x.items()}
    if isinstance(x, list) and x and isinstance(x[0], dict):
        return x
    return pytest.approx(x, rel=1e-3, abs=1e-5) if isinstance(x, float | list) else x


def assert_close(state, other):
    assert state.keys() == other.keys()
    for key, x in state.items():
        if isinstance(x, dict):
            assert_close(x, other[key])
        else:
            assert torch.allclose(x, other[key], atol=1e-5), key


def test_a_stopped_run_in_shards_goes_on_to_the_bit(pair):
    """With --checkpointing, which changes no number."""
    place = pair[0]
    one, other = (load(place / x / "sdft" / "model") for x in ("two", "cut"))
    assert torch.equal(weights_of(one), weights_of(other))
    assert "goes on after update 4" in (place / "text").read_text()


def test_one_process_goes_on_with_a_run_in_shards(capsys, pair, tmp_path):
    place, argv = pair
    shutil.copytree(place / "cut copy", tmp_path / "out")
    saved = train.read_checkpoint(tmp_path / "out" / "sdft" / "checkpoint.pt")
    assert saved["step"] == 4  # in the second stage: AdamW's state is part of it
    assert train.main([*argv, "--resume", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "not to the bit (saved -> now): " in text and "shards: True -> None" in text
    one, other = (load(x / "sdft" / "model") for x in (place / "one", tmp_path / "out"))
    assert torch.allclose(weights_of(one), weights_of(other), atol=1e-5)


def test_shards_go_on_with_a_run_of_one_process(pair):
    """It did not fit any more, or there are more GPUs now: cut what was saved."""
    place = pair[0]
    assert "shards: None -> True" in (place / "text").read_text()
    one, other = (load(place / x / "sdft" / "model") for x in ("one", "plain"))
    assert torch.allclose(weights_of(one), weights_of(other), atol=1e-5)


def test_the_plan_is_that_of_one_process_of_several(pair):
    text = (pair[0] / "text").read_text()
    n = load(Path(pair[1][1])).num_params()
    for parts in (1, 2):
        need = f"plan: {20e-9 * n / parts:.3g} GB for weights, gradients, AdamW"
        assert (need in text) == (parts == 2)


def test_a_checkpoint_of_shards_is_a_plain_file_of_whole_tensors(pair):
    """The same names and shapes as that of one process, for torch and without train.py;
    AdamW's state is by the names of parameters."""
    saved, other = (
        torch.load(pair[0] / name / "sdft" / "checkpoint.pt", weights_only=True)
        for name in ("two", "one")
    )
    for each in (saved, other):
        weights = each["models"]["student"]
        state = each["optimizer"]["state"]
        assert state.keys() == weights.keys() - {"lm_head.weight"}  # tied
        for name in state:
            assert state[name]["exp_avg"].shape == weights[name].shape
    assert shapes(saved["models"]) == shapes(other["models"])
    assert shapes(saved["optimizer"]) == shapes(other["optimizer"])


def shapes(x):
    if isinstance(x, dict):
        return {key: shapes(value) for key, value in x.items()}
    return (type(x), x.shape, x.dtype) if isinstance(x, torch.Tensor) else type(x)


def test_shard_is_refused_where_it_cannot_be(capsys, folder, files, tmp_path):
    code, _, err = run(capsys, folder, files, tmp_path / "out", *SHORT, "--shard")
    assert code == 2 and "--shard needs several processes, and this is one" in err
    assert "hint: torchrun --standalone" in err and not (tmp_path / "out").exists()
    args = train.parse_args(["--init", "x", "--data", "y", "--shard"])
    with pytest.raises(train.UserError, match="--shard: not on mps"):
        train.check_shard(args, torch.device("mps"), 2)
    for name in ("cpu", "cuda:0"):
        train.check_shard(args, torch.device(name), 2)
