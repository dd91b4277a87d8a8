"""The tests import the project's files from the folder above this one."""

import contextlib
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py: read by torch

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when model.py defines its kernel
pytest.register_assert_rewrite("oracles")


@pytest.fixture
def float64():
    """New tensors are float64, so that weights of a loss, which are made of whole
    numbers, lose no digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own():
    """Threads as they were afterwards, where train.main ran in this process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser):
    """--all, and the options of tests/exercises. Here, because pytest reads this file
    first, however it is called, and refuses options that it does not know."""
    parser.addoption("--all", action="store_true", help="also the slow tests")
    parser.addoption("--impl", metavar="FOLDER", help="grade the exercises in a folder")
    with contextlib.suppress(ValueError):  # a plugin has a --seed: it will do
        parser.addoption("--seed", type=int, default=0, help="other inputs, same tests")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: an experiment, a sweep, many processes: with --all only"
    )


def pytest_collection_modifyitems(config, items):
    """Leave out what is slow, unless it is asked for by --all, by name or by -k."""
    named = any("test_" in str(arg) for arg in config.invocation_params.args)
    if not (config.getoption("--all") or config.option.keyword or named):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
