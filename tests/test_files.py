"""The files of a run: written whole or not at all (at any call of a save: see
test_reliability), and read only if they are sound."""

import os
import pickle

import pytest
import torch
from test_train import same

import train

CONTENT = {"step": 3, "model": {"w": torch.arange(6.0)}, "list": [1, "a"]}


@pytest.fixture
def path(tmp_path):
    """A checkpoint with CONTENT."""
    train.write_checkpoint(tmp_path / "checkpoint.pt", CONTENT)
    return tmp_path / "checkpoint.pt"


def read_or_refused(path, read=train.read_checkpoint):
    """What a file holds, or None if it is refused with its path."""
    try:
        return read(path)
    except train.UserError as error:
        assert str(error).startswith(f"{path} cannot be read: "), error
        assert "\n" not in str(error) and "--out" in error.hint


def test_a_checkpoint_is_a_plain_file_of_torch_and_comes_back_as_it_was(path):
    """Any program can read it, and needs nothing of this one."""
    assert same(torch.load(path, weights_only=True), CONTENT)
    assert same(train.read_checkpoint(path, mmap=True), CONTENT)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_flipped_bit_or_a_cut_is_refused_or_changes_nothing(path):
    """Every bit of what says where things are (the zip's directory, at the end), and
    one of each byte before it: never is something else loaded. Each cut is seen."""
    good, refused = path.read_bytes(), 0
    start = good.index(b"PK\1\2")
    assert 0 < start < len(good) - 500
    file = os.open(path, os.O_RDWR)
    for place, byte in enumerate(good):
        for bit in range(8) if place >= start else [place % 8]:
            os.pwrite(file, bytes([byte ^ 1 << bit]), place)
            found = read_or_refused(path)
            refused += found is None
            assert found is None or same(found, CONTENT), (place - start, bit)
        os.pwrite(file, bytes([byte]), place)
    assert path.read_bytes() == good and refused > 2000
    path.write_bytes(good + b"\0")
    assert (found := read_or_refused(path)) is None or same(found, CONTENT)
    for n in reversed(range(len(good))):
        os.truncate(path, n)
        assert read_or_refused(path) is None, n


@pytest.mark.parametrize("write", [
    lambda bomb, path: train.write_checkpoint(path, bomb),
    lambda bomb, path: path.write_bytes(pickle.dumps(bomb)),
    lambda bomb, path: torch.save(bomb, path, _use_new_zipfile_serialization=False),
])  # fmt: skip
def test_nothing_in_a_file_is_executed(write, path, tmp_path):
    folder = tmp_path / "executed"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(folder),))})()
    write({"model": bomb}, path)
    assert read_or_refused(path) is None and not folder.exists()
    pickle.loads(pickle.dumps(bomb))
    assert folder.exists(), "the bomb is none: this shows nothing"


@pytest.mark.parametrize("content", [
    b"", b"mine\n", b"PK\5\6" + 18 * b"\0", [1], 3, torch.ones(2), {"step": 1},
])  # fmt: skip
def test_a_file_of_someone_else_is_refused(content, path):
    is_text = isinstance(content, bytes)
    path.write_bytes(content) if is_text else torch.save(content, path)
    assert read_or_refused(path) is read_or_refused(path, train.read_run) is None
    for other in path.parent, path.with_name("none"):
        with pytest.raises(train.UserError, match=f"{other}: no such file"):
            train.read_checkpoint(other)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("n", [6, 10**6])
def test_a_full_disk_is_an_error_with_the_path_and_the_old_file_stays(n, path):
    """The system's own error, in the writing of torch; of a text; of a record."""
    text, new = path.with_name("results.json"), {"model": torch.zeros(n)}
    text.write_text("old")
    for file, write, content in (
        (path, train.write_checkpoint, new), (text, train.write_text, "new"),
    ):  # fmt: skip
        file.with_name(f"{file.name}.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match=f"^{file} not written: .*No space left"):
            write(file, content)
    assert same(train.read_checkpoint(path), CONTENT) and text.read_text() == "old"
    assert len(list(path.parent.iterdir())) == 2
    path.with_name("metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        train.Run(path.parent).append("{}\n")
