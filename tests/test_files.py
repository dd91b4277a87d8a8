"""The files of a run: written whole or not at all, and read only if they are sound."""

import os
import pickle

import pytest
import torch

import train

CONTENT = {"step": 3, "models": {"student": {"w": torch.arange(6.0)}}, "list": [1, "a"]}


def saved_file(folder):
    path = folder / "checkpoint.pt"
    train.write_checkpoint(path, CONTENT)
    return path


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    read = train.read_checkpoint(saved_file(tmp_path))
    assert read["step"] == 3 and read["list"] == [1, "a"]
    assert torch.equal(read["models"]["student"]["w"], torch.arange(6.0))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    path = saved_file(tmp_path)
    good = path.read_bytes()
    places = [*range(80), *range(80, len(good), 7), len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="not loaded"):
            train.read_checkpoint(path)


def test_a_cut_or_longer_file_is_refused(tmp_path):
    path = saved_file(tmp_path)
    good = path.read_bytes()
    for bad in (good[:-1], good[: len(good) // 2], good[:70], b"", good + b"\0"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{len(bad)} bytes"):
            train.read_checkpoint(path)


def test_a_foreign_pickle_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(CONTENT, path)
    with pytest.raises(ValueError, match="not loaded"):
        train.read_checkpoint(path)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    """Not even with a right checksum in front of it."""
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "executed"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(trace),))})()
    train.write_checkpoint(path, {"step": bomb})
    with pytest.raises(ValueError, match="not loaded"):
        train.read_checkpoint(path)
    assert not trace.exists()
    path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError):
        train.read_checkpoint(path)
    assert not trace.exists()


def test_the_checkpoint_before_is_kept(tmp_path):
    path = saved_file(tmp_path)
    train.write_checkpoint(path, {"step": 4})
    assert train.read_checkpoint(path) == {"step": 4}
    previous = tmp_path / "checkpoint.pt.previous"
    assert train.read_checkpoint(previous)["step"] == 3
    path.write_bytes(b"broken")
    with pytest.raises(train.UserError, match="not loaded") as caught:
        train.read_checkpoint(path)
    assert f"{previous}: rename it" in caught.value.hint


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    train.write_atomically(path, b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(train.os, "fsync", fail)
    with pytest.raises(OSError):
        train.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_another_run_s_settings_are_named():
    saved = {"lr": 1, "steps": 2}
    assert train.differences(saved, {"lr": 1, "steps": 2}) == ""
    other = train.differences(saved, {"lr": 1, "steps": 3, "kl": "jsd"})
    assert other == "steps: 2 -> 3, kl: None -> jsd"
