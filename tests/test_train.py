"""The command line as a user runs it: real processes, real files, small models."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import sdft
import sft
import train
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
SMALL = shlex.split(
    "--n-layer 1 --n-head 2 --n-kv-head 1 --n-embd 32 --n-inner 48 --base-steps 4 "
    "--steps 3 --batch-size 8 --demos 16 --eval-size 8 --gate-margin -1 --log-every 1"
)
METHODS = {"sft": sft, "sdft": sdft}


def command(*args):
    return [sys.executable, str(ROOT / "train.py"), *map(str, args)]


def start(*args, cwd=ROOT, launcher=None, **environment):
    argv = [*launcher, *command(*args)[1:]] if launcher else command(*args)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, cwd=cwd, env=env, **pipes)


def run(*args, **kwargs):
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def read(out, method):
    results = json.loads((out / method / "results.json").read_text())
    lines = (out / method / "metrics.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def without_times(x):
    if isinstance(x, dict):
        return {k: without_times(v) for k, v in x.items() if k != "seconds"}
    return [without_times(v) for v in x] if isinstance(x, list) else x


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with one finished small run of both methods, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    code, text, err = run(*SMALL, "--method", "both", "--out", out)
    assert code == 0, err
    return out, text


def test_both_methods_write_results_with_the_promised_keys(finished):
    for method in METHODS:
        results, _ = read(finished[0], method)
        assert results["method"] == method and results["seed"] == 0
        assert set(results["seconds"]) == {"base", "fine_tune"}
        assert set(results["teacher_gate"]) == {"student", "teacher"}
        assert [stage["skill"] for stage in results["stages"]] == ["A", "B", "C"]
        for row in (results["base"], *results["stages"]):
            assert set(row["new"]) == {"A", "B", "C"} and len(row["prior"]) >= 4
            accuracies = [*row["new"].values(), *row["prior"].values()]
            assert all(0 <= accuracy <= 1 for accuracy in accuracies)
        for stage in results["stages"]:
            assert stage["kl_student_base"] > -1e-6 and stage["seconds"] > 0
            assert (stage["kl_teacher_base"] is None) == (method == "sft")


def test_both_methods_start_from_the_same_base_and_see_the_same_tasks(finished):
    (one, _), (other, _) = read(finished[0], "sft"), read(finished[0], "sdft")
    assert one["base"] == other["base"] and one["teacher_gate"] == other["teacher_gate"]
    shared = set(one["config"]) - {"lr"}  # each method has its own
    assert {key: other["config"][key] for key in shared} == {
        key: one["config"][key] for key in shared
    }


def test_sdft_records_what_sft_records_and_more(finished):
    (_, sft_rows), (_, sdft_rows) = read(finished[0], "sft"), read(finished[0], "sdft")
    steps = [row for row in sdft_rows if "loss" in row]
    assert len(steps) == 9 and all(math.isfinite(row["loss"]) for row in steps)
    extra = {"kl_student_teacher", "student_entropy", "teacher_entropy"}
    assert set(steps[0]) - set(sft_rows[1]) == extra
    assert set(sft_rows[1]) <= set(steps[0])
    ends = [row for row in sdft_rows if row.get("stage_end")]
    assert all(row["kl_teacher_student_by_position"] for row in ends)


def test_the_screen_shows_gate_table_samples_and_files(finished):
    out, text = finished
    assert "teacher gate" in text and "without a demonstration" in text
    assert text.count("after   new A") >= 9 and "  ->  " in text
    assert "after all skills" in text and f"{out}/sdft/results.json" in text


def test_the_base_is_found_again_and_a_finished_run_is_kept(finished, tmp_path):
    out = finished[0]
    before, _ = read(out, "sft")
    code, text, _ = run(*SMALL, "--method", "sft", "--out", out)
    assert code == 0 and "base model: found" in text
    assert without_times(read(out, "sft")[0]) == without_times(before)
    assert read(out, "sft.previous")[0] == before


def test_another_seed_gives_another_base_and_other_skills(finished, tmp_path):
    code, text, _ = run(*SMALL, "--method", "sft", "--seed", 1, "--out", tmp_path)
    assert code == 0 and "base model: found" not in text
    one, other = read(finished[0], "sft")[1][0], read(tmp_path, "sft")[1][0]
    assert one["samples"][0]["prompt"] != other["samples"][0]["prompt"]


def test_sample_answers_a_prompt_with_base_and_trained_model(finished):
    prompt = "garden cork: candle spoon tower"
    code, text, _ = run(*SMALL, "--sample", prompt, "--out", finished[0])
    lines = text.splitlines()
    assert code == 0 and lines[-2].startswith("base") and lines[-1].startswith("sdft")


# ---- Bad input ---------------------------------------------------------------------

BAD = {
    "--lr nan": "--lr",
    "--lr -1": "--lr",
    "--temperature -1": "--temperature",
    "--steps 0": "--steps",
    "--steps 2.5": "--steps",
    "--batch-size 0": "--batch-size",
    "--ema-rate 1.5": "--ema-rate",
    "--seed one": "--seed",
    "--kl both": "--kl",
    "--teacher nobody": "--teacher",
    "--method grpo": "--method",
    "--stpes 5": "did you mean --steps",
    "--max 7": "--max",
    "--device cuda:99": "CUDA devices found",
    "--device abacus": "--device abacus",
    "--n-embd 30 --n-head 4": "30",
    "--n-embd 12 --n-head 4 --n-kv-head 2": "even",
    "--n-head 4 --n-kv-head 3": "3",
    "--batch-size 64 --micro-batches 3": "multiple of 3",
    "--demos 16 --batch-size 64": "--demos",
    "--max-new-tokens 400": "block_size",
    "--resume --sample x --method sft": "no run of sft",
    "--out /proc/not-writable": "/proc/not-writable",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_an_error_a_hint_and_exit_2(flags, finished, tmp_path, capsys):
    out = tmp_path / "out"
    small = [] if "--n-" in flags else SMALL
    base = finished[0] / "base"
    out.mkdir()
    os.symlink(base, out / "base")
    code = train.main([*small, "--out", str(out), *shlex.split(flags)])
    text, err = capsys.readouterr()
    lines = err.strip().splitlines()[-2:]
    assert code == 2 and "Traceback" not in text + err
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    assert BAD[flags] in err


def test_an_out_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert train.main([*SMALL, "--out", str(tmp_path / "out")]) == 2
    assert "error: " in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_demonstration_that_does_not_help_stops_the_run(finished, capsys):
    args = [*SMALL, "--gate-margin", "0.9", "--out", str(finished[0])]
    assert train.main(args) == 2
    assert "does not help enough" in capsys.readouterr().err


def test_plot_without_matplotlib_says_so_before_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert train.main([*SMALL, "--plot", "--out", str(tmp_path / "out")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_lists_every_setting_with_its_default():
    text = " ".join(train.make_parser().format_help().split())
    for config in (sft.Config, sdft.Config):
        for name, value in vars(config()).items():
            shown = f"(default: {value})"
            other = getattr(sft.Config, name, getattr(sdft.Config, name))
            if other != getattr(sdft.Config, name):
                shown = f"(default: {getattr(sdft.Config, name)}, sft: {other})"
            flag = "--" + name.replace("_", "-")
            assert re.search(rf"{flag} .*?{re.escape(shown)}", text), flag


def test_a_method_has_its_own_defaults_unless_a_flag_is_given(finished):
    given = {m: read(finished[0], m)[0]["config"] for m in METHODS}
    assert given["sft"]["steps"] == given["sdft"]["steps"] == 3  # a flag
    assert given["sft"]["lr"] == sft.Config.lr != sdft.Config.lr == given["sdft"]["lr"]


# ---- Training ----------------------------------------------------------------------


def small_run(method, out_dir, **changes):
    """Ten steps of a method from random weights; returns the student."""
    tok, world = data.Tokenizer(), data.World(0)
    torch.set_num_threads(1)
    config = GPTConfig(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=48)
    student = GPT(config, data.make_rng(0, "weights"))
    with torch.no_grad():  # far from uniform, so that teacher and student differ
        for p in student.parameters():
            if p.dim() == 2:
                p *= 12
    settings = {"steps": 10, "batch_size": 8, "log_every": 1, "lr": 1e-3}
    settings |= {"warmup_steps": 3, **changes}
    stages = {"A": data.make_demos(world, "A", 16, 0)}
    out_dir.mkdir(exist_ok=True)
    cfg = METHODS[method].Config(**settings)
    METHODS[method].train(student, stages, {}, tok, cfg, out_dir)
    return student


LOSSES = {
    "sft": [7.06632, 6.99271, 6.61091, 6.65224, 6.49682, 6.27526, 6.05051, 5.9048,
            5.9749, 5.90992],
    "sdft": [1.02556, 0.94364, 1.12707, 1.01788, 1.04327, 1.02999, 1.06851, 0.90693,
             0.9264, 0.92122],
}


@pytest.mark.parametrize("method", METHODS)
def test_ten_losses_are_the_stored_ones(method, tmp_path):
    """A change that moves them says why in its commit."""
    small_run(method, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(LOSSES[method], abs=1e-4)


@pytest.mark.parametrize(("new_tokens", "sampled", "warning"), [
    (2, "none ends", "EOS rate 0 %, mean length 2.0: .*--max-new-tokens"),
    (16, "all end at once", "every response is empty"),
    (16, None, None),
])  # fmt: skip
def test_rollouts_that_never_end_or_are_empty_are_reported(
    new_tokens, sampled, warning, tmp_path, monkeypatch, capsys
):
    def generate(model, prompts, lengths, R, end, *args):
        if sampled == "none ends":
            return torch.ones(len(lengths), R, dtype=torch.int64), torch.ones(
                len(lengths), R, dtype=torch.bool
            )
        return torch.full((len(lengths), 1), end), torch.ones(
            len(lengths), 1, dtype=torch.bool
        )

    if sampled:
        monkeypatch.setattr(sdft, "generate", generate)
    small_run("sdft", tmp_path, max_new_tokens=new_tokens, micro_batches=2)
    text = capsys.readouterr().out
    assert len(re.findall(f"warning: {warning}", text)) == (10 if warning else 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_stops_before_the_step(method, tmp_path, monkeypatch):
    real = METHODS[method].compute_loss
    calls = []

    def broken(student, *args):
        calls.append({name: p.clone() for name, p in student.state_dict().items()})
        calls.append(student)
        loss, extra = real(student, *args)
        return (loss * math.nan if len(calls) == 6 else loss), extra

    monkeypatch.setattr(METHODS[method], "compute_loss", broken)
    with pytest.raises(FloatingPointError, match="step 2: loss nan.*was not made"):
        small_run(method, tmp_path)
    before, student = calls[4:]
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_program_with_3(monkeypatch, capsys):
    def run(args):
        raise FloatingPointError("step 2: loss nan")

    monkeypatch.setattr(train, "run", run)
    assert train.main([]) == 3
    assert "error: step 2" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["sdft"])
def test_a_stopped_run_resumes_to_the_same_numbers(method, finished, tmp_path):
    args = [*SMALL, "--method", method, "--steps", "40", "--out", tmp_path]
    os.symlink(finished[0] / "base", tmp_path / "base")
    process = start(*args)
    for line in process.stdout:  # stop it in the middle of the second skill
        if line.startswith("step   47"):
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "--resume" in err
    code, _, err = run(*args)
    assert code == 2 and "not finished" in err
    assert run(*args, "--resume")[0] == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    os.symlink(finished[0] / "base", whole / "base")
    assert run(*args[:-1], whole)[0] == 0
    for one, other in zip(read(tmp_path, method), read(whole, method), strict=True):
        assert without_times(one) == without_times(other)


# ---- The README --------------------------------------------------------------------


def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if "train.py" in line]


def test_the_readme_shows_the_two_commands_of_a_newcomer():
    text = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python train.py --method sdft" in text
    assert "pip install -r requirements.txt && pytest" in text
    assert len(readme_commands()) >= 4


@pytest.mark.parametrize("line", readme_commands())
def test_a_command_of_the_readme_is_accepted(line):
    argv = shlex.split(line)
    argv = argv[argv.index("train.py") + 1 :]
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            train.parse_args(argv)
    else:
        train.parse_args(argv)


def test_the_first_command_of_the_readme_runs(tmp_path):
    line = next(c for c in readme_commands() if "--method sdft" in c)
    words = shlex.split(line.split("&&")[-1])
    assert words[:2] == ["python", "train.py"]
    code, text, err = run(*words[2:], *SMALL, "--out", tmp_path)
    assert code == 0 and (tmp_path / "sdft" / "results.json").exists(), err
