"""Would the quick tests notice? One-line changes of the five files, one at a time.

    python tests/bench/mutants.py               # all: a table of what caught them
    python tests/bench/mutants.py model train   # those of some files

Each change is made in a copy of the project, and `pytest -x` runs there, first the test
files that should notice. A change that no test notices is named at the end, and the
exit code is 1. Takes about half a minute for each change.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIRST = {  # the test files that should notice a change of a file
    "model": ("test_model", "test_kl", "test_pair", "test_pretrained"),
    "sft": ("test_pair", "test_train"), "sdft": ("test_pair", "test_train"),
    "data": ("test_data", "test_own_data", "test_own_run", "test_pretrained"),
    "train": ("test_train", "test_reliability", "test_faults", "test_own_run"),
}
UNLIKE = [  # these notice that a text has changed, whatever it does
    "--ignore=tests/test_house.py", "--ignore=tests/test_readme.py",
    "--ignore=tests/exercises/test_notebook.py",
]  # fmt: skip
MUTANTS = {  # file: what stands there once -> what it becomes
    "model": [
        ("cos - b * sin, b * cos + a", "cos + b * sin, b * cos - a"),
        ("cos = self.cos[positions]", "cos = self.cos[positions - 1]"),
        ("pads = (column >= lengths[:, None])", "pads = (column > lengths[:, None])"),
        ("masked_fill(pads, -math.inf)", "masked_fill(pads, 0.0)"),
        ("self.v[:, rows], self.mask[rows]", "self.v[:, rows], self.mask"),
        ("is_causal=True", "is_causal=False"),
        ("self.q_norm(q), self.k_norm(k)", "self.k_norm(q), self.q_norm(k)"),
        ("F.silu(gate) * up", "F.silu(up) * gate"),
        ("self.dropout if self.training else 0.0", "self.dropout"),
        ("0.02 / math.sqrt(2 * config.n_layer)", "0.02"),
        ("self.config.n_tokens or None", "None"),
        ("known[row, 0] + t - 1", "known[row, 0] + t"),
        ("place = lengths[:, None] +", "place = lengths.max() +"),
        ("torch.softmax(logits / temperature", "torch.softmax(logits * temperature"),
        ("p.cumsum(-1, dtype=torch.float64)", "p.cumsum(-1)"),
        ("right=True)[:, 0]", "right=False)[:, 0]"),
        ("last = hidden[row, lengths - 1]", "last = hidden[row, -1]"),
        ("[:, None], lengths + t, cache)", "[:, None], lengths + t + 1, cache)"),
        ("((response != end).sum(1) + 1)", "((response != end).sum(1))"),
        ("log_t.exp() * (log_t - log_s)", "log_s.exp() * (log_t - log_s)"),
        ("log_s.exp() * (log_s - log_t)).sum", "log_s.exp() * (log_t - log_s)).sum"),
        ("(s, weight[rows] / temperature, rows)", "(s, weight[rows], rows)"),
        ("dW.addmm_(ds.T, h[rows])", "dW.copy_(ds.T @ h[rows])"),
        ("torch.sub(p_s, p_t, out=s)", "torch.sub(p_t, p_s, out=s)"),
        ("diff.sub_(mean[:, None]), out=s", "diff, out=s"),
        ("s.mul_(weight[:, None])", "s.mul_(weight.sum())"),
        ("theirs.data = ours  # so", "pass  # so"),
    ],
    "sft": [
        ("warmup = min(cfg.warmup_steps, cfg.steps // 2)", "warmup = cfg.warmup_steps"),
        ("(t + 1) / warmup", "t / warmup"),
        ("mask.sum(1, keepdim=True).clamp(min=1) / cfg.batch_size", "mask.sum() "),
        ("if p.dim() >= 2]", "]"),
        ("((response == tok.end) & mask)", "(response == tok.end)"),
        ("        optimizer.zero_grad()\n", ""),
        ("loss.backward()", "loss.backward() if not sums.get('tokens') else None"),
    ],
    "sdft": [
        ("tok.end, u, cfg.temperature)", "tok.end, u)"),
        ("(data.teacher_prompt", "(data.student_prompt"),
        ("student_prompt, batch, tok, mask", "teacher_prompt, batch, tok, mask"),
        ("cumsum(1) > cfg.skip", "cumsum(1) >= cfg.skip"),
        ("= student.head(), teacher.head()", "= teacher.head(), student.head()"),
        ("* s + (1 - cfg.ema_rate) * t", "* t + (1 - cfg.ema_rate) * s"),
        ("        update_teacher(teacher, student, cfg)  #", "        #"),
        ("        run.all_reduce(student, sums)\n", ""),
        ("if stop or t == cfg.steps - 1 or", "if t == cfg.steps - 1 or"),
        ("run.save(step + 1,", "run.save(step,"),
        ("optimizer = make_optimizer(student, cfg)\n        for", "pass\n        for"),
    ],
    "data": [
        ("(with_demo(example.prompt, example.demo)) + [tok", "(example.prompt) + [tok"),
        ("row[list(example.skip)] = False", "pass"),
        ("mask = place < lengths[:, None]", "mask = place < lengths[:, None] - 1"),
        ('make_rng(seed, "order", epoch)', 'make_rng(seed, "order")'),
        ("rank if j % 2 == 0 else world_size - 1 - rank", "rank"),
        ('"rollout", when, example.id)', '"rollout", example.id)'),
        ("% 10 == 0) == held_out", "% 10 == 0) != held_out"),
        ("skip += range(len(read), len(read) + given)", "pass"),
        ("if token in (*terms, tok.start)", "if token == tok.start"),
        ("return items_in(response) == items_in(example.answer)", "return True"),
        ('student"] += pairs.count((True, False))',
         'student"] += pairs.count((False, True))'),
        ("q_hidden, p_hidden, q.head(), p.", "p_hidden, q_hidden, p.head(), q."),
        ("(mask / lengths[:, None])[mask]", "(mask / mask.sum())[mask]"),
        ("return place < math.inf and plain(choice)", "return plain(choice)"),
        ("split_special_tokens=True", "split_special_tokens=False"),
    ],
    "train": [
        ("os.replace(temporary, path)", "path.write_bytes(temporary.read_bytes())"),
        ("damaged = file.testzip()", "damaged = None"),
        ("fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        ('if row["step"] < start]', 'if row["step"] <= start]'),
        ('= saved["step"], saved["unrecorded"]', '= saved["step"] + 1, 0'),
        ('check_settings(self.folder, saved["settings"], self.settings)', "pass"),
        ("                    dist.all_reduce(p.grad)\n", "                    pass\n"),
        ("self.stop and self.stop.signal", "None"),
        ('gate["teacher"] - gate["student"] <', 'gate["student"] - gate["teacher"] <'),
        ("return 128 + ", "return 0 * "),
        ("            signal.signal(signum, handler)\n", "            pass\n"),
        ("repr((asdict(config), asdict(cfg),", "repr((asdict(config),"),
        ("now < then - GATE_LOSS", "now > then + GATE_LOSS"),
    ],
}


def first_failure(folder, name):
    """The first test that fails in a changed copy of the project, or None. Those that
    should notice run first, then all of the quick ones."""
    first = [f"tests/{each}.py" for each in FIRST[name]]
    for tests in (first, ["tests", *UNLIKE]):
        command = [sys.executable, *"-m pytest -x -q -p no:cacheprovider -m".split()]
        args = {"cwd": folder, "capture_output": True, "text": True}
        run = subprocess.run([*command, "not slow", *tests], **args)
        if run.returncode:
            word = r"(?m)^(?:FAILED|ERROR) (?:\S*/)?(\w+\.py(?:::\w+)?)"
            found = re.search(word, run.stdout)
            return found[1] if found else run.stdout.strip().splitlines()[-1][:60]
    return None


def main(names):
    missed, count = [], 0
    print("| file | change | caught by | seconds |\n|---|---|---|---|")
    for name in names or MUTANTS:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for old, new in MUTANTS[name]:
            assert source.count(old) == 1, f"{name}.py: not once there: {old!r}"
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                ignore = shutil.ignore_patterns(".git", "out*", "__pycache__")
                copy = shutil.copytree(ROOT, Path(folder) / "project", ignore=ignore)
                text = source.replace(old, new)
                (copy / f"{name}.py").write_text(text, encoding="utf-8")
                caught = first_failure(copy, name)
            seconds, count = time.perf_counter() - start, count + 1
            change = " ".join(f"`{old.strip()}` → `{new.strip()}`".split())
            row = [name, change.replace("|", "¦"), caught or "**nothing**"]
            print(f"| {' | '.join(row)} | {seconds:.0f} |", flush=True)
            missed += [] if caught else [change]
    print(f"\n{count} changes, {len(missed)} not caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
