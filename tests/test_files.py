"""The files of a run: written whole or not at all, and read only if they are sound.

That a save may die or fail at any of its calls is in test_reliability.py.
"""

import os
import pickle
from pathlib import Path

import pytest
import torch

import train

CONTENT = {"step": 3, "models": {"student": {"w": torch.arange(6.0)}}, "list": [1, "a"]}


@pytest.fixture
def path(tmp_path):
    """A checkpoint with CONTENT."""
    train.write_checkpoint(tmp_path / "checkpoint.pt", CONTENT)
    return tmp_path / "checkpoint.pt"


def is_content(read):
    rest = {key: value for key, value in read.items() if key != "models"}
    weights = read["models"]["student"]["w"]
    return rest == {"step": 3, "list": [1, "a"]} and weights.equal(torch.arange(6.0))


def read_or_refused(path):
    """What a file holds, or None if it is refused with its path."""
    try:
        return train.read_checkpoint(path)
    except train.UserError as error:
        assert str(error).startswith(f"{path} cannot be read: "), error
        assert "\n" not in str(error) and "--out" in error.hint
        return None


def test_a_checkpoint_comes_back_as_it_was(path):
    assert is_content(train.read_checkpoint(path))
    assert is_content(train.read_checkpoint(path, mmap=True))
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_is_a_plain_file_of_torch(path):
    """Any program can read it, and needs nothing of this one."""
    assert is_content(torch.load(path, weights_only=True))


def test_a_flipped_bit_is_refused_or_changes_nothing(path):
    """Every bit of what says where things are (the zip's directory, at the end), and
    one bit of each byte before it: never is something else loaded."""
    good, other, refused = path.read_bytes(), [], 0
    start = good.index(b"PK\1\2")
    assert 0 < start < len(good) - 500
    with open(path, "r+b", buffering=0) as file:
        for place, byte in enumerate(good):
            for bit in range(8) if place >= start else [place % 8]:
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), place)
                read = read_or_refused(path)
                refused += read is None
                if not (read is None or is_content(read)):
                    other.append((place - start, bit))
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert path.read_bytes() == good
    assert other == [] and refused > 2000


def test_a_cut_file_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")  # a longer one, at first
    read = read_or_refused(path)
    assert read is None or is_content(read)
    for n in reversed(range(path.stat().st_size - 1)):
        os.truncate(path, n)
        assert read_or_refused(path) is None, n


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def save_old_format(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [
    lambda content, path: train.write_checkpoint(path, content),
    lambda content, path: path.write_bytes(pickle.dumps(content)),
    save_old_format,
])  # fmt: skip
def test_nothing_in_a_file_is_executed(write, tmp_path):
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "executed"
    write({"step": Bomb(trace)}, path)
    assert read_or_refused(path) is None and not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists(), "the bomb is none: this shows nothing"


@pytest.mark.parametrize("content", [b"", b"mine\n", b"PK\5\6" + 18 * b"\0"])
def test_a_file_of_someone_else_is_refused(content, path):
    path.write_bytes(content)
    assert read_or_refused(path) is None


def a_base(path):
    return train.get_base(path, train.GPTConfig(), train.BASE, *[None] * 4)


@pytest.mark.parametrize("content", [[1], 3, torch.ones(2), {"step": 1}])
def test_a_file_of_torch_that_is_no_run_or_base_is_refused(content, path):
    """With its path: another program's checkpoint may have the same name."""
    torch.save(content, path)
    for read in (train.read_run, a_base):
        with pytest.raises(train.UserError, match=str(path)):
            read(path)


def test_no_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        with pytest.raises(train.UserError, match=f"{path}: no such file"):
            train.read_checkpoint(path)


@pytest.mark.parametrize("content", [
    CONTENT, {"w": torch.zeros(10**6)}, {"w": torch.zeros(100), "list": [1] * 10**5},
])  # fmt: skip
def test_a_full_disk_is_an_error_with_the_path_and_the_old_file_stays(content, path):
    """The system's own error, in the writing of torch; of a text; of a line."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    text, log = path.with_name("results.json"), path.with_name("metrics.jsonl")
    text.write_text("old")
    log.symlink_to("/dev/full")
    for file, write in (
        (path, lambda: train.write_checkpoint(path, content)),
        (text, lambda: train.write_text(text, "new")),
        (log, lambda: train.append_line(log, "{}")),
    ):
        if file != log:
            file.with_name(f"{file.name}.tmp").symlink_to("/dev/full")
        message = f"^{file} not written: .*No space left on device"
        with pytest.raises(OSError, match=message):
            write()
    assert is_content(train.read_checkpoint(path)) and text.read_text() == "old"
    assert len(list(path.parent.iterdir())) == 3


def test_what_differs_is_named():
    saved = {"lr": 1, "steps": 2}
    assert train.differences(saved, {"lr": 1, "steps": 2}) == ""
    other = train.differences(saved, {"lr": 1, "steps": 3, "kl": "jsd"})
    assert other == "steps: 2 -> 3, kl: None -> jsd"


def test_the_name_for_what_is_kept_is_free_and_no_link(tmp_path):
    (tmp_path / "sft.previous1").symlink_to("nowhere")
    (tmp_path / "sft.previous3").mkdir()
    assert train.free_name(tmp_path / "sft").name == "sft.previous2"
