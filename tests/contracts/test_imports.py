"""Data preparation and configuration run where no torch is installed."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import data_pipeline

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS_TO_IMPORT = {"data_pipeline.bench.datatrove_side"}
"""A program for the environment that has datatrove."""
LIGHT = [
    "megagpt.config.schema",
    "megagpt.config.load",
    "megagpt.config.reference",
    "megagpt.data.indexed",
    "megagpt.data.manifest",
    "megagpt.data.mixture",
    "megagpt.data.order",
    "megagpt.tokenizer",
    "megagpt.text.ngrams",
    "evals.contamination_scan",  # its worker processes shall start quickly
    "megagpt.parallel.plan",
    "megagpt.parallel.legal",
    "megagpt.verify.shrink",
    "megagpt.train.command",
    "megagpt.train.describe",
    *sorted(
        {module.name for module in pkgutil.walk_packages(data_pipeline.__path__, "data_pipeline.")} - NOT_OURS_TO_IMPORT
    ),
]


def test_no_light_module_loads_torch_or_deepspeed():
    """One process imports them one after the other and says which of them brought torch in."""
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module(name)
    loaded = {{"torch", "deepspeed", "transformers", "datasets"}} & set(sys.modules)
    if loaded:
        sys.exit(f"{{name}} loads {{sorted(loaded)}}")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", ["megagpt.data.indexed", "data_pipeline.run"])
def test_the_list_holds_what_it_should(name):
    assert name in LIGHT
