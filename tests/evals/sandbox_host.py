"""Whether this host allows what the sandbox is built of, found out without it: where it does, tests must run."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def _problem() -> str:
    if shutil.which("unshare") is None:
        return "util-linux's unshare is not installed"
    found = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--mount", "--ipc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if found.returncode == 0 else f"this host allows no namespaces: {found.stderr.strip()}"


PROBLEM = _problem()
needs_namespaces = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)
