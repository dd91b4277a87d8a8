"""train.py with a model's folder, small and random as in test_pretrained.py, and users'
own files, from start to finish: is every number of the right thing?"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import data
import model
import sdft
import train

pytest.importorskip("transformers", reason="pip install transformers")
from test_pretrained import CHATML, make_folder, with_template  # noqa: E402
from test_train import read  # noqa: E402

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
def test_a_run_measures_all_files_and_writes_a_model(method, both):
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
    gpt, place = load(both / "source"), both / "out" / method
    base, trained = weights_of(gpt), weights_of(load(place / "model"))
    gpt.load_state_dict(train.read_run(place / "checkpoint.pt")["models"]["student"])
    assert torch.equal(trained, weights_of(gpt)) and not torch.equal(trained, base)


def test_a_run_is_the_one_that_is_made_by_hand(both, tmp_path):
    student, tok = load(both / "source"), data.ChatTokenizer(both / "source")
    tok.template, files = TEMPLATE, {name: both / f"{name}.jsonl" for name in "ab"}
    stages = {k: data.read_examples(file, True, "none")[0] for k, file in files.items()}
    cfg = sdft.Config(**train.REAL | {"steps": 3, "batch_size": 6, "max_new_tokens": 6})
    torch.set_num_threads(1)
    sdft.train(student, stages, {}, tok, cfg, train.Run(tmp_path))
    assert torch.equal(weights_of(student), weights_of(load(both / "out/sdft/model")))


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
    "it goes with --init MODEL": "--data x|--eval x|--prior x|--template x|--shard|"
    "--grade exact|--check-data",
    "it goes with the tiny world": "OWN --demos 9|OWN --base-steps 9|"
    "OWN --n-layer 9|OWN --n-embd 32|OWN --distance own",
    "no run in": "--sample x",
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
