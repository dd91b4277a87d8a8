"""train.py with a model's folder, small and random as in test_pretrained.py, and users'
own files, from start to finish: is every number of the right thing?"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import data
import model
import train
from model import GPT, GPTConfig

pytest.importorskip("transformers", reason="pip install transformers")
from test_pretrained import CHATML, make_folder, with_template  # noqa: E402
from test_train import read, same  # noqa: E402

WORDS = "the theory other one they there rest theirs user assistant system end".split()
FILES = "data/a data/b eval/a_test eval/b_test prior/old prior/older".split()
SHORT = "--steps 3 --max-new-tokens 6 --gate-margin -1 --threads 1 --device cpu".split()
TEMPLATE, N = "{prompt} so: {demonstration} now you", 129824  # parameters of the model


def row(i, **more):
    a, b = WORDS[i % 12], WORDS[(5 * i + 1) % 12]
    return {"prompt": f"the {a} {i}", "demonstration": f"one {b}", "answer": b, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    return str(path)


def make_files(place, source):
    """The flags of a run: two skills and what is held out; old questions, no demos."""
    (place / "template.txt").write_text(TEMPLATE)
    argv = ["--init", str(source), "--template", str(place / "template.txt"), *SHORT]
    for n, (flag, name) in enumerate(each.split("/") for each in FILES):
        rows = [row(i) for i in range(6 * n, 6 * n + 6)]
        [x.pop("demonstration") for x in rows if flag == "prior"]
        argv += [f"--{flag}", write(place / f"{name}.jsonl", rows)]
    return argv


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A place with a model that refuses a word, files and a run; no test changes it."""
    place, threads = tmp_path_factory.mktemp("both"), torch.get_num_threads()
    source = make_folder(place / "source", tie_word_embeddings=True)
    make_folder(place / "short", num_hidden_layers=1)
    no = "{% if 'boo' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    with_template(source, no + CHATML)
    write(place / "boo.jsonl", [row(0), row(1, prompt="boo")])
    (place / "latin.txt").write_bytes(b"{prompt} caf\xe9 {demonstration}")
    (place / "loop").symlink_to("loop")
    argv = [*make_files(place, source), "--method", "both", "--out", str(place / "out")]
    assert train.main(argv) == 0
    torch.set_num_threads(threads)
    return place


def run(capsys, *argv):
    return train.main(list(map(str, argv))), *capsys.readouterr()


def stop_at(step, *argv):
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(range(100))
        patch.setattr(train.Run, "stop_wanted", lambda _: float(next(steps) == step))
        return train.main(list(map(str, argv)))


def load(folder):
    return model.from_pretrained(folder, data.ChatTokenizer(folder).n_tokens)


def weights_of(gpt):
    return torch.cat([p.detach().flatten() for p in gpt.parameters()])


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_a_run_measures_all_files_and_writes_the_model_made_by_hand(
    method, both, tmp_path
):
    results, lines = read(both / "out", method)
    base, *ends = results["evaluations"]
    first = [(end["skill"], end["responses"][0]["prompt"]) for end in ends]  # of --eval
    assert base["step"] == 0 and first == [("a", "the the 12"), ("b", "the rest 18")]
    assert [x for x in lines if x.get("stage_end")] == ends
    assert ends[-1]["step"] == 6 and results["config"]["batch_size"] == 6
    for each in (base, *ends):
        assert set(each["new"]) == set(each["nll"]) == {"a", "b"}  # prior has no demos
        assert {*each["prior"]} == {*each["kl_student_base_prior"]} == {"old", "older"}
    assert max(map(abs, base["kl_student_base_prior"].values())) < 1e-5
    student, tok = load(both / "source"), data.ChatTokenizer(both / "source")
    tok.template, files = TEMPLATE, {name: both / f"{name}.jsonl" for name in "ab"}
    stages = {k: data.read_examples(file, True, "none")[0] for k, file in files.items()}
    trainer, base = train.METHODS[method], weights_of(student)
    more = {"steps": 3, "batch_size": 6, "max_new_tokens": 6}
    torch.set_num_threads(1)
    run = train.Run(tmp_path)
    trainer.train(student, stages, {}, tok, trainer.Config(**train.REAL | more), run)
    trained, place = weights_of(student), both / "out" / method
    assert torch.equal(trained, weights_of(load(place / "model")))
    assert not torch.equal(trained, base)
    saved = train.read_run(place / "checkpoint.pt")["models"]["student"]
    student.load_state_dict(saved)
    assert torch.equal(trained, weights_of(student))


def test_a_resume_is_exact_and_less_memory_changes_nothing(capsys, both, tmp_path):
    argv = [*make_files(tmp_path, both / "source"), "--dropout", 0.1, "--out"]
    assert run(capsys, *argv, tmp_path / "whole")[0] == 0
    assert stop_at(3, *argv, tmp_path / "cut") == 143
    code, text, err = run(capsys, *argv, tmp_path / "cut", "--resume")
    assert code == 0 and "goes on after update 4" in text and "--resume" in err
    assert run(capsys, *argv, tmp_path / "less", "--checkpointing")[0] == 0
    models = [tmp_path / name / "sdft" / "model" for name in ("whole", "cut", "less")]
    one, cut, less = map(weights_of, map(load, models))
    assert torch.equal(one, cut) and torch.allclose(one, less, atol=1e-6)


def test_what_could_not_be_written_is_written_by_a_resume(capsys, both, tmp_path):
    made = shutil.copytree(both / "out", tmp_path / "out") / "sft" / "model"
    file = made / "model.safetensors"
    file.unlink(), file.mkdir()
    again = [*make_files(tmp_path, both / "source"), "--method", "sft", "--resume"]
    code, _, err = run(capsys, *again, "--out", tmp_path / "out")
    assert code == 2 and f"error: {made} not written: " in err
    file.rmdir()
    kept = made.rename(tmp_path / "kept")
    made.touch()  # known before the work
    code, text, err = run(capsys, *again, "--out", tmp_path / "out")
    assert code == 2 and f"error: {made} is not a folder" in err and "gate" not in text
    made.unlink(), kept.rename(made)
    assert run(capsys, *again, "--out", tmp_path / "out")[0] == 0
    assert torch.equal(*(weights_of(load(x)) for x in (made, both / "out/sft/model")))
    argv = [*make_files(tmp_path, made), "--grade", "none", "--out", tmp_path / "two"]
    code, text, err = run(capsys, *argv)
    assert code == 0 and "teacher gate: not measured" in text, err
    last = read(tmp_path / "two", "sdft")[0]["evaluations"][-1]
    assert last["prior"] == last["new"] == {} and "old" in last["kl_student_base_prior"]


def test_a_sample_is_in_the_chat_form_and_needs_no_base(capsys, both, tmp_path):
    source, out = both / "source", shutil.copytree(both / "out", tmp_path / "out")
    tok, argv = data.ChatTokenizer(source), (*SHORT[-2:], "--sample", "the", "--out")
    contexts = [tok.chat((), "the")]

    def best(name, folder, n=6):
        return f"{name:5s}  {data.get_texts(load(folder), contexts, tok, n)[0]}\n"

    sft, last = (best(name, out / name / "model") for name in ("sft", "sdft"))
    text = run(capsys, *argv, tmp_path / "none", "--init", source)[1]
    assert best("base", source, 128) in text and text.count("sampled") == 2
    text = run(capsys, *argv, out, "--method", "both")[1]  # the run knows its model
    assert all(each in text for each in (best("base", source), sft, last))
    assert text.count("sampled") == 6
    moved = source.rename(tmp_path / "moved")  # what was written has all that it needs
    gone, found = (run(capsys, *argv, out, *x)[1] for x in ((), ("--init", moved)))
    moved.rename(source)
    assert last in gone and f"{source} is gone\n" in gone and "base  " not in gone
    assert last in found and "is gone" not in found and "base  " in found


def test_check_data_shows_contexts_and_makes_remarks(capsys, both, tmp_path):
    argv, rows = make_files(tmp_path, both / "source"), [row(i) for i in range(6)]
    rows[3]["demonstration"], rows[5]["answer"] = "one theory " * 9, "42"
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "a_test.jsonl", [*rows[1:4], row(40)])
    argv += ["--check-data", "--max-new-tokens", 12, "--out", tmp_path / "out"]
    code, text, err = run(capsys, *argv)
    assert code == 0 and not (tmp_path / "out").exists(), err
    shown = {"student_prompt, 14": "", "teacher_prompt, 27": " so: one theory now you"}
    for title, end in shown.items():
        turns = f"user\nthe the 0{end}<|im_end|>\n<|im_start|>assistant\n\n"
        assert f"a, line 1: {title} tokens\n<|im_start|>{turns}" in text
    assert "a, line 1: demo_response, 3 tokens\none theory<|im_end|>\n" in text
    assert f"{tmp_path / 'a.jsonl'}: 6 rows, grade: contains\n" in text
    assert "a: held-out prompts are also in --data: [1, 2, 3]\n" in text
    assert "a.jsonl: 1 demonstrations are longer than --max-new-tokens 12, " in text
    assert "jsonl: 2 demonstrations are wrong by their own answer, lines [4, 6]" in text
    at = argv.index("--eval")
    text = run(capsys, *argv[:at], *argv[at + 4 :], "--eval-size", 5)[1]
    assert f"{tmp_path}/a.jsonl: an evaluation takes 5 of them (--eval-size)" in text
    assert "no --eval: the new skills are measured on the rows that are trained" in text


def test_a_model_that_does_not_fit_is_not_even_loaded(
    capsys, monkeypatch, both, tmp_path
):
    limit = tmp_path / "memory.max"  # of a container; two processes share it
    limit.write_text("2000\n")
    group = "/sys/fs/cgroup/memory.max"
    monkeypatch.setattr(train, "Path", lambda x: limit if x == group else Path(x))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(model, "from_pretrained", None)
    argv = *make_files(tmp_path, both / "source"), "--out", tmp_path / "new"
    code, _, err = run(capsys, *argv)
    assert code == 2 and f"it needs {20e-9 * N:.3g} GB, 1e-06 GB are free" in err
    assert "that fits into memory" in err and not (tmp_path / "new").exists()


def test_a_sample_is_shown_with_the_template_of_its_run_or_the_one_that_is_given(
    capsys, monkeypatch, both, tmp_path
):
    seen, other = [], tmp_path / "other.txt"
    other.write_text("{demonstration} {prompt}")

    def token_pull(student, teacher, example, tok, *more):
        seen.append(tok.template)
        return {"sdft": [], "sft": []}

    monkeypatch.setattr(data, "token_pull", token_pull)
    argv = "--sample", "the", "--demo", "one", "--max-new-tokens", 2, "--out"
    for more in (), ("--init", both / "source", "--template", other):
        assert run(capsys, *argv, both / "out", *more)[0] == 0
    assert seen == [TEMPLATE] * 3 + [other.read_text()] * 3


@pytest.mark.parametrize(("n_rows", "batch", "parts"), [
    (1, 1, 1), (6, 6, 1), (11, 11, 11), (14, 14, 2), (100, 32, 4),
])  # fmt: skip
def test_a_batch_of_users_rows_is_cut_into_parts_of_at_most_eight(
    n_rows, batch, parts, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "4")  # left by somebody: there is one process
    args = train.parse_args("--init x --data y".split())
    cfg = train.config_of("sdft", args, n_rows)
    assert (cfg.batch_size, cfg.micro_batches) == (batch, parts)


ERRORS = {  # what the error says: command lines
    "--init needs --data": "--init source",
    "no/model/here: Repo id must be": "--init no/model/here --data a.jsonl",
    "--init takes an instruct model of Llama's shape": "--init . --data a.jsonl",
    "where this run writes": "--init out/sdft/model --data a.jsonl --out out",
    "boo.jsonl:2: the chat template: no": "--init source --data boo.jsonl",
    "No such file or directory: 'no'": "--init source --data no|OWN --template no",
    "Is a directory": "OWN --data .|OWN --template .",
    "1 files in --data, 3 in --eval": "OWN --eval a.jsonl b.jsonl a.jsonl",
    "two files of one name": "OWN a.jsonl|OWN --data a.jsonl|OWN --prior a.jsonl|OWN "
    "--prior b.jsonl b.jsonl",
    "no {prompt} in it": "OWN --template a.jsonl",
    "latin.txt: not UTF-8": "OWN --template latin.txt",
    "a.jsonl:1: ": "OWN --max-new-tokens 390",
    "a batch of 7 from 6 examples": "OWN --batch-size 7",
    "4 micro-batches of one size": "OWN --batch-size 6 --micro-batches 4",
    "invalid choice: 'word'": "OWN --grade word",
    "--shard needs several processes": "OWN --shard",
    "it goes with the tiny world": "OWN --demos 9|OWN --base-steps 9|"
    "OWN --n-layer 9|OWN --n-embd 32|OWN --distance own",
    "no run in": "--sample x", "Too many levels": "OWN --data loop",
    "exclude each other": "OWN --check-data --resume|--show --resume|--sample x --show",
    "template: {prompt} so: {demonstration} now you -> ": "OWN --resume --out out",
}
BAD = {flags: text for text, lines in ERRORS.items() for flags in lines.split("|")}


@pytest.mark.parametrize("flags", [*BAD, "--sample x --out out --init short"])
def test_bad_input_is_one_error_with_a_hint(capsys, monkeypatch, both, tmp_path, flags):
    monkeypatch.chdir(both)
    argv = flags.replace("OWN", "--init source --data a.jsonl").split()
    before = sorted([*both.rglob("*"), *tmp_path.rglob("*")])
    code, _, err = run(capsys, "--out", tmp_path / "out", *argv)
    assert code == 2 and BAD.get(flags, "n_layer: 2 -> 1") in err, err
    assert err.startswith("error: ") and err.count("\nhint: ") == 1
    assert sorted([*both.rglob("*"), *tmp_path.rglob("*")]) == before


def test_a_model_in_shards_and_its_copy_compute_what_it_computes_whole():
    """In one process, which holds all shards: states, samples, gradients, the copy."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "n_inner": 48}
        plain = GPT(GPTConfig(vocab_size=64, n_tokens=60, **sizes), data.make_rng(0))
        parts = model.shard(copy.deepcopy(plain), torch.device("cpu"))
        gpts, outcomes = (plain, parts, copy.deepcopy(parts)), []
        prompts = torch.arange(24).view(3, 8), torch.tensor([3, 8, 5])
        u = torch.rand(3, 6, generator=data.make_rng(1))
        for gpt in gpts:
            response, mask = model.generate(gpt, *prompts, 6, 59, u)
            hidden = model.response_hidden(gpt, *prompts, response, mask)  # (N, C)
            weight = torch.full((len(hidden),), 0.1)
            model.chunked_nll(hidden, gpt.head(), response[mask], weight).backward()
            grads = [model.whole(p.grad) for p in gpt.parameters()]
            outcomes.append([response, mask, hidden, *grads])
        assert gpts[2].wte.weight is not gpts[1].wte.weight
        for outcome in outcomes[1:]:
            for x, right in zip(outcome, outcomes[0], strict=True):
                assert torch.equal(x, right)
    finally:
        dist.destroy_process_group()


# --shard: two processes that hold a part each compute what one computes. To start two
# takes seconds: the script GROUP does all, over gloo; each test reads what it left.
ROOT, OUTS = Path(__file__).parents[1], ("one", "two", "cut", "plain")
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
needs_torch = pytest.mark.skipif(VERSION < (2, 13), reason="torch 2.13 or newer")

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
@needs_torch
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
@needs_torch
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
@needs_torch
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


@needs_torch
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
