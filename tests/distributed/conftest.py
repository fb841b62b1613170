"""What most tests of layouts begin with; some have fixtures of their own by these names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.layouts import Configure, References, configuration
from tests.distributed.processes import prepare_server


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    """For processes that the product starts from the same server."""
    prepare_server()


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="session")
def configured(tokens: Path, val_tokens: Path) -> Configure:
    return lambda layout, *words: configuration(layout, tokens, f"data.val={val_tokens}", *words)


@pytest.fixture(scope="session")
def references(configured: Configure) -> References:
    return References(configured)
