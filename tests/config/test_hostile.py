"""Configurations that want more than to be read: every one is refused with a reason, soon, and runs nothing."""

from __future__ import annotations

import time

import pytest

from data_pipeline.config import DataJob
from evals.suites import Suite
from megagpt.config.load import load_config
from megagpt.config.schema import TrainingRun
from megagpt.errors import MegaGPTError

TRACE = "executed"
CALLS = ("os.system", "subprocess.check_output", "builtins.eval", "builtins.open")
HOSTILE = {
    **{f"object/apply of {call}": f'run: !!python/object/apply:{call} ["touch {{trace}}"]\n' for call in CALLS},
    "object/new": 'run: !!python/object/new:os.system ["touch {trace}"]\n',
    "a name": "run: !!python/name:os.system\n",
    "a module": "run: !!python/module:{trace}\n",
    "a tag of somebody's": "run: !Include {trace}\n",
    "aliases that multiply": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    + "run: {dir: *a11}\n",
    "aliases that multiply in mappings": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(10))}}}\n" for n in range(1, 12))
    + "run: *a11\n",
    "a mapping that holds itself": "run: &a {dir: *a}\n",
    "brackets without end": "run: " + "[" * 10_000,
    "mappings within mappings": "run: " + "{a: " * 1_000 + "1" + "}" * 1_000,
    "a number of a million digits": "run: {seed: " + "9" * 1_000_000 + "}\n",
    "a number in base sixty": "run: {seed: 190:20:30}\n",
    "nul bytes": "run: {dir: a\0b}\n",
    "two documents": "run: {dir: a}\n---\nrun: {dir: b}\n",
    "a key twice": "run: {dir: a, dir: b}\n",
    "a merge of something else": "run: {<<: [1, 2]}\n",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("schema", [TrainingRun, DataJob, Suite])
def test_it_is_refused_with_a_reason_and_nothing_runs(name, schema, tmp_path):
    trace = tmp_path / TRACE
    file = tmp_path / "config.yaml"
    file.write_text(HOSTILE[name].replace("{trace}", str(trace)))
    began = time.monotonic()
    with pytest.raises(MegaGPTError, match=r"config\.yaml") as error:
        load_config(schema, [file])
    assert time.monotonic() - began < 20
    assert len(str(error.value)) < 20_000
    assert not trace.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]
