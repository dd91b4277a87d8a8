"""train.py with a real model's folder and users' own files, from start to finish.

The folder is that of test_pretrained.py: small, random weights. Nothing is learnt from
it that a user would want; what is tested is that every number is of the right thing.
"""

import json
import re
import shutil

import pytest
import torch

import data
import model
import sdft
import train

pytest.importorskip("transformers", reason="pip install transformers")
from test_pretrained import make_folder  # noqa: E402

pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")

WORDS = "the theory other one they there rest theirs user assistant system end".split()
TEMPLATE = "{prompt} so: {demonstration} now you"


def row(i, **more):
    a, b = WORDS[i % 12], WORDS[(5 * i + 1) % 12]
    return {"prompt": f"the {a} {i}", "demonstration": f"one {b}", "answer": b, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    return make_folder(path, shards=2, tie_word_embeddings=True)


@pytest.fixture
def files(tmp_path):
    """Flags of two skills, held-out files of both, and two of old questions."""
    template = tmp_path / "template.txt"
    template.write_text(TEMPLATE)
    names = {
        "--data": ("a.jsonl", "b.jsonl"), "--eval": ("a_test.jsonl", "b_test.jsonl"),
        "--prior": ("old.jsonl", "older.jsonl"),
    }  # fmt: skip
    flags, start = ["--template", str(template)], 0
    for flag, group in names.items():
        flags.append(flag)
        for name in group:
            rows = [row(i) for i in range(start, start + 6)]
            if flag == "--prior":
                rows = [{k: x[k] for k in ("prompt", "answer")} for x in rows]
            flags.append(write(tmp_path / name, rows))
            start += 6
    return flags


def run(capsys, folder, files, out, *flags):
    argv = ["--init", str(folder), *files, "--out", str(out), "--threads", "1"]
    code = train.main([*argv, *flags])
    return (code, *capsys.readouterr())


SHORT = ("--steps", "3", "--max-new-tokens", "6", "--gate-margin", "-1")


def read(out, method):
    results = json.loads((out / method / "results.json").read_text())
    lines = (out / method / "metrics.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def weights_of(gpt):
    return torch.cat([p.detach().flatten() for p in gpt.parameters()])


def load(folder):
    return model.from_pretrained(folder, data.ChatTokenizer(folder).n_tokens)


def test_both_methods_from_a_folder_to_a_folder(capsys, folder, files, tmp_path):
    out = tmp_path / "out"
    code, text, err = run(capsys, folder, files, out, *SHORT, "--method", "both")
    assert code == 0, err
    for method in ("sft", "sdft"):
        results, lines = read(out, method)
        assert [stage["skill"] for stage in results["stages"]] == ["a", "b"]
        for stage in (results["base"], *results["stages"]):
            assert set(stage["new"]) == {"a", "b"}
            assert set(stage["prior"]) == {"old", "older"}
        ends = [x for x in lines if x.get("stage_end")]
        assert ends[-1]["step"] == 6 and results["config"]["batch_size"] == 6
        assert set(ends[-1]["nll"]) == {"a", "b"}  # old questions have no demonstration
        assert set(ends[-1]["kl_student_base_prior"]) == {"old", "older"}
        first = next(x for x in lines if "new" in x)
        assert max(map(abs, first["kl_student_base_prior"].values())) < 1e-5
        saved = train.read_checkpoint(out / method / "checkpoint.pt")["models"]
        written = load(out / method / "model")
        for name, weight in written.state_dict().items():
            assert torch.equal(weight, saved["student"][name]), name
        assert not torch.equal(weights_of(written), weights_of(load(folder)))
    assert "right only with it: " in text and "GB for weights, gradients, AdamW" in text
    # what was written is a folder like any other: it can be trained on
    code, _, err = run(capsys, out / "sft" / "model", files, tmp_path / "2", *SHORT)
    assert code == 0, err


def test_a_run_is_what_its_parts_say(capsys, folder, files, tmp_path):
    """The same run again, by hand, without train.py's reading and checking."""
    out = tmp_path / "out"
    code, _, err = run(capsys, folder, files, out, *SHORT, "--grade", "none")
    assert code == 0, err
    tok = data.ChatTokenizer(folder)
    tok.template = TEMPLATE
    student = load(folder)
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("a", "b")}
    stages = {n: data.read_examples(path, True, "none")[0] for n, path in paths.items()}
    defaults = {k: v for k, v in train.REAL.items() if k != "steps"}
    cfg = sdft.Config(**{**defaults, "steps": 3, "batch_size": 6, "max_new_tokens": 6})
    torch.set_num_threads(1)
    sdft.train(student, stages, {}, tok, cfg, train.Run(tmp_path / "by hand"))
    assert torch.equal(weights_of(student), weights_of(load(out / "sdft" / "model")))
    # without a grade, there is no accuracy, but what is measured all the same
    _, lines = read(out, "sdft")
    last = [x for x in lines if "new" in x][-1]
    assert last["prior"] == last["new"] == {}
    assert set(last["kl_student_base_prior"]) == {"old", "older"}


def test_a_stopped_run_goes_on_to_the_bit(capsys, folder, files, tmp_path):
    flags = (*SHORT, "--save-every", "2", "--dropout", "0.1")
    assert run(capsys, folder, files, tmp_path / "whole", *flags)[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        steps = iter(range(100))
        patch.setattr(train.Run, "stop_wanted", lambda self: float(next(steps) == 3))
        code, _, err = run(capsys, folder, files, tmp_path / "cut", *flags)
    assert code == 128 and "--resume" in err
    code, text, err = run(capsys, folder, files, tmp_path / "cut", *flags, "--resume")
    assert code == 0 and "goes on after update 4" in text, err
    one, other = (load(tmp_path / x / "sdft" / "model") for x in ("whole", "cut"))
    assert torch.equal(weights_of(one), weights_of(other))
    # other data, another template or another model is another run
    (tmp_path / "template.txt").write_text(f"{TEMPLATE} please")
    code, _, err = run(capsys, folder, files, tmp_path / "cut", *flags, "--resume")
    assert code == 2 and "template" in err


def test_a_full_disk_at_the_end_is_told_and_a_resume_writes_the_model(
    capsys, folder, files, tmp_path, monkeypatch
):
    resource, real = pytest.importorskip("resource"), model.save_pretrained

    def on_a_full_disk(*args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
        try:
            real(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    out, flags = tmp_path / "out", (*SHORT, "--method", "sft")
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_pretrained", on_a_full_disk)
        code, _, err = run(capsys, folder, files, out, *flags)
    assert code == 2 and f"error: {out / 'sft' / 'model'} not written: " in err
    assert run(capsys, folder, files, out, *flags, "--resume")[0] == 0
    assert load(out / "sft" / "model").num_params() == load(folder).num_params()


def test_checkpointing_changes_nothing_but_memory(capsys, folder, files, tmp_path):
    for name, more in (("plain", ()), ("less", ("--checkpointing",))):
        flags = (*SHORT, "--dropout", "0.1", *more)
        assert run(capsys, folder, files, tmp_path / name, *flags)[0] == 0
    one, other = (load(tmp_path / x / "sdft" / "model") for x in ("plain", "less"))
    assert torch.allclose(weights_of(one), weights_of(other), atol=1e-6)


def test_check_data_shows_both_contexts_and_writes_nothing(
    capsys, folder, files, tmp_path
):
    out = tmp_path / "out"
    code, text, err = run(capsys, folder, files, out, "--check-data")
    assert code == 0 and not out.exists(), err
    assert f"{tmp_path / 'a.jsonl'}: 6 rows, grade: contains" in text
    student = "<|im_start|>user\nthe the 0<|im_end|>\n<|im_start|>assistant\n"
    teacher = (
        "<|im_start|>user\nthe the 0 so: one theory now you<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tok = data.ChatTokenizer(folder)
    for title, context in (("student", student), ("teacher", teacher)):
        ids = tok.chat([{"role": "user", "content": context[17:-33]}])
        assert f"a, line 1: {title}_prompt, {len(ids)} tokens\n{context}\n" in text
    assert "demo_response, " in text and "one theory<|im_end|>\n" in text


def test_a_gate_that_is_closed_stops_the_run(capsys, folder, files, tmp_path):
    code, text, err = run(capsys, folder, files, tmp_path / "out", "--steps", "1")
    assert code == 2 and "a demonstration does not help enough" in err
    assert "another --template" in err
    assert re.search(r"right only with it: \d+, only without: \d+", text)
    assert not (tmp_path / "out" / "sdft").exists()


def test_the_gate_counts_who_alone_is_right(monkeypatch, folder):
    """Two skills of different size, which weigh the same."""
    gpt, tok = load(folder).eval(), data.ChatTokenizer(folder)
    sizes, right = {"a": 8, "b": 4}, {
        ("a", data.student_prompt): "11000000", ("a", data.teacher_prompt): "10111000",
        ("b", data.student_prompt): "0001", ("b", data.teacher_prompt): "1110",
    }  # fmt: skip

    def grade(example, text):
        return example.prompt == "a"

    benchmarks = {
        name: data.Benchmark([data.Example(name, "d", "", i) for i in range(n)], grade)
        for name, n in sizes.items()
    }

    def is_right(model, benchmark, tok, n, prompt):
        name = benchmark.examples[0].prompt
        return [bit == "1" for bit in right[name, prompt]]

    monkeypatch.setattr(data, "is_right", is_right)
    gate = data.teacher_gate(gpt, benchmarks, tok, 4)
    assert gate == {
        "student": (2 / 8 + 1 / 4) / 2, "teacher": (4 / 8 + 3 / 4) / 2,
        "only_student": 2, "only_teacher": 6, "sampled": 1 / 2,
        "skills": {"a": 4 / 8, "b": 3 / 4},
    }  # fmt: skip


@pytest.mark.parametrize("temperature", [50.0, 1e-6])
def test_a_teacher_that_is_right_only_greedily_gets_a_warning(
    temperature, capsys, folder
):
    """Right is what the teacher says greedily; hence at a temperature of almost 0."""
    gpt, tok = load(folder).eval(), data.ChatTokenizer(folder)
    examples = [data.Example(f"the {i}", "one", "", id=i) for i in range(20)]
    contexts = [data.teacher_prompt(example, tok) for example in examples]
    best = data.greedy_responses(gpt, contexts, tok, 6)
    tasks = {"new": {
        "a": data.Benchmark(examples, lambda example, text: text == best[example.id]),
        "not graded": data.Benchmark(examples, None),
    }}  # fmt: skip
    configs = {"sdft": sdft.Config(max_new_tokens=6, temperature=temperature)}
    args = train.parse_args(["--init", "x", "--data", "y", "--gate-margin", "-1"])
    gate = train.check_gate(args, gpt, tasks, tok, configs)
    text = capsys.readouterr().out
    wanted = f"at temperature {temperature:g}: {gate['sampled']:.2f}"
    assert gate["teacher"] == 1 and wanted in text
    assert (gate["sampled"] < 0.5) == ("a lower --temperature" in text)
    assert gate["sampled"] == (1 if temperature < 1 else pytest.approx(0, abs=0.4))


def test_a_sample_is_in_the_chat_form(capsys, folder, files, tmp_path):
    out, tok = tmp_path / "out", data.ChatTokenizer(folder)
    argv = ["--sample", "the one", "--out", str(out), "--threads", "1"]
    assert train.main(["--init", str(folder), "--max-new-tokens", "5", *argv]) == 0
    base = load(folder)
    ids = tok.chat([{"role": "user", "content": "the one"}])
    (expected,) = data.greedy_responses(base, [ids], tok, 5)
    assert f"base   {expected}\n" in capsys.readouterr().out
    assert run(capsys, folder, files, out, *SHORT)[0] == 0
    assert train.main(argv) == 0  # the run knows its model
    text = capsys.readouterr().out
    trained = load(out / "sdft" / "model")
    (expected,) = data.greedy_responses(trained, [ids], tok, 6)
    assert f"sdft   {expected}\n" in text and text.count("sampled") == 4


BAD = {  # more flags, or a change of the files: what the error says
    "--data nothing.jsonl {b}": "No such file or directory: 'nothing.jsonl'",
    "--data {a} {dir}": "Is a directory",
    "--init {dir}/nothing": "nothing: Repo id must be",
    "--init {dir}": "hint: --init takes an instruct model of Llama's shape",
    "--eval {a} {b} {a}": "2 files in --data, 3 in --eval",
    "--data {a} {a}": "two files of one name",
    "--prior {a} {a}": "two files of one name",
    "--prior {a}": "two files of one name",
    "--data {a} --data {a}": "two files of one name",  # both count
    "--template {a}": "no {prompt} in it",
    "--template {dir}/templat.txt": "No such file or directory",
    "--template {dir}": "Is a directory",
    "--max-new-tokens 390": "a.jsonl:1: ",
    "--batch-size 7": "batch size 7 > 6 examples",
    "--batch-size 6 --micro-batches 4": "cannot be cut into equal parts",
    "--grade word": "invalid choice: 'word'",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_error_and_one_hint(capsys, folder, files, tmp_path, flags):
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("a", "b")}
    paths["dir"], message = tmp_path, BAD[flags]
    for flag in {"--data", "--eval", "--prior"} & set(flags.split()):
        start = files.index(flag)  # else theirs would be further files
        del files[start : start + 3]
    flags = [x.format(**paths) for x in flags.split()]
    out = tmp_path / "out"
    code, _, err = run(capsys, folder, files, out, *SHORT[2:], *flags)
    assert code == 2 and message in err, err
    assert err.startswith("error: ") and err.count("\nhint: ") == 1
    assert "Traceback" not in err and not out.exists()


def test_flags_of_own_files_need_a_model(capsys, tmp_path):
    for flags in (["--data", "x"], ["--prior", "x"], ["--check-data"]):
        assert train.main(flags) == 2
        assert f"{flags[0]} needs --init" in capsys.readouterr().err
    assert train.main(["--init", str(tmp_path)]) == 2
    assert "--init needs --data" in capsys.readouterr().err


def test_what_deserves_a_remark_gets_one(capsys, folder, files, tmp_path):
    rows = [row(i) for i in range(6)]
    rows[3]["demonstration"] = "one theory " * 9
    rows[5]["answer"] = "42"
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "a_test.jsonl", [*rows[1:4], row(40)])
    more = ("--check-data", "--max-new-tokens", "12")
    code, text, err = run(capsys, folder, files, tmp_path / "out", *more)
    assert code == 0, err
    assert "a: the held-out prompts of lines 1, 2, 3 are also in --data" in text
    assert "a.jsonl: 1 demonstrations are longer than --max-new-tokens 12" in text
    assert "wrong by their own answer, lines " in text and ", 6\n" in text


def test_a_tokenizer_of_another_model_is_refused(capsys, files, tmp_path):
    make_folder(tmp_path / "small", vocab_size=300)
    code, _, err = run(capsys, tmp_path / "small", files, tmp_path / "out", *SHORT)
    assert code == 2 and re.search(r"n_tokens \d+ > vocab_size 300", err)


def test_a_run_of_another_folder_shows_its_own_model(capsys, folder, files, tmp_path):
    """The model it started from was moved: what it wrote has all that is needed."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(folder, source)
    assert run(capsys, source, files, out, *SHORT)[0] == 0
    source.rename(tmp_path / "moved")
    argv = ["--sample", "the one", "--out", str(out), "--threads", "1"]
    assert train.main(argv) == 0
    gone = capsys.readouterr().out
    assert train.main([*argv, "--init", str(tmp_path / "moved")]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("sdft   ")]
    assert "base   not shown" in gone and lines[0] in gone and "base   not" not in text


def test_a_model_in_the_folder_of_the_run_is_refused_before_it_is_moved(
    capsys, folder, files, tmp_path
):
    """The second skill from the model just made: its folder would move away."""
    out = tmp_path / "out"
    assert run(capsys, folder, files, out, *SHORT)[0] == 0
    made, before = out / "sdft" / "model", sorted(tmp_path.rglob("*"))
    code, _, err = run(capsys, made, files, out, *SHORT)
    assert code == 2 and f"{made} is in {out / 'sdft'}, where this run writes" in err
    assert sorted(tmp_path.rglob("*")) == before
    assert run(capsys, made, files, tmp_path / "second", *SHORT)[0] == 0


def test_a_sample_of_a_run_with_another_model_is_refused(
    capsys, folder, files, tmp_path
):
    out = tmp_path / "out"
    assert run(capsys, folder, files, out, *SHORT)[0] == 0
    other = make_folder(tmp_path / "other", num_hidden_layers=1)
    argv = ["--sample", "the one", "--out", str(out), "--init", str(other)]
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert "started from another model" in err and "n_layer: 2 -> 1" in err


def test_a_row_that_the_chat_template_refuses_is_named(
    capsys, folder, files, tmp_path
):
    shutil.copytree(folder, tmp_path / "strict")
    form = (tmp_path / "strict" / "chat_template.jinja").read_text()
    (tmp_path / "strict" / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}"
        "{% endif %}" + form
    )
    rows = [row(i) for i in range(6)]
    rows[4]["prompt"] = [{"role": r, "content": "the"} for r in ("system", "user")]
    write(tmp_path / "a.jsonl", rows)
    code, _, err = run(capsys, tmp_path / "strict", files, tmp_path / "out", *SHORT)
    assert code == 2 and "a.jsonl:5: the chat template: no system turn" in err


def test_without_held_out_rows_it_is_said(capsys, folder, files, tmp_path):
    at = files.index("--eval")
    less = files[:at] + files[at + 3 :]
    code, text, _ = run(capsys, folder, less, tmp_path / "out", "--check-data")
    assert code == 0
    assert "no --eval: the new skills are measured on the rows that are trained" in text


def test_a_run_that_cannot_fit_is_refused_before_it_is_loaded(
    capsys, monkeypatch, folder, files, tmp_path
):
    monkeypatch.setattr(train, "free_memory", lambda device: 1e-6)
    code, _, err = run(capsys, folder, files, tmp_path / "out", *SHORT)
    assert code == 2 and f"{folder} needs 0.00" in err and "1e-06 GB are free" in err
    assert "--shard on several GPUs" in err and not (tmp_path / "out").exists()
