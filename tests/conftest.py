"""What tests of several folders share."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# The first example of a test may compile a kernel or load a library, and machines differ: time limits are pytest's.
settings.register_profile("megagpt", deadline=None)
settings.load_profile("megagpt")

# Tests start several processes on few cores; a process that starts more threads than its share slows all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# lm-eval bootstraps in forks of a process that has threads of its own, and now and then waits for one for ever.
os.environ.setdefault("DISABLE_MULTIPROC", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test-soak` says."""
    parser.addoption("--soak-minutes", type=float, default=30.0, help="how long tests/soak injects faults")
    parser.addoption("--soak-seed", type=int, default=1, help="which faults tests/soak injects")


def pytest_collection_finish() -> None:
    """What all tests have loaded stays: no collection need walk through its millions of objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file without a manifest, for tests/tiny.py."""
    from tests.tiny import write_tokens

    return write_tokens(tmp_path_factory.mktemp("tokens") / "train")


@pytest.fixture(scope="session")
def val_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import write_tokens

    return write_tokens(tmp_path_factory.mktemp("val_tokens") / "val", n_documents=30, seed=1)
