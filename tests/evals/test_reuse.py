"""When a finished score stands for what is asked for, and when it is found again."""

from __future__ import annotations

import ast
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from evals.answers import ROOT, source_files, sources_hash
from evals.results import TaskResult
from evals.reuse import describe_environment, differences
from evals.run import EvalRequest, run_evals
from megagpt.checkpoint.open import open_checkpoint
from tests.evals.conftest import save_run
from tests.evals.result_files import make_result
from tests.evals.test_run import SUITES

TASK = "megagpt_smoke"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    return save_run(tmp_path_factory.mktemp("reused") / "a", tokenizer)


@pytest.fixture(scope="module")
def scored(run_dir: Path) -> Path:
    """A folder with a finished score, as `run_evals` leaves it."""
    evaluate(run_dir, run_dir / "scored")
    return run_dir / "scored"


def evaluate(run_dir: Path, out: Path, *tasks: str, **settings: Any) -> tuple[list[TaskResult], str]:
    """The results and what the terminal says."""
    console = Console(file=io.StringIO(), width=400)
    request = EvalRequest(run_dir, tasks or (TASK,), suites_dir=SUITES, out=out, **{"limit": 4, **settings})
    results = run_evals(request, console)
    return results, console.file.getvalue()


def test_a_result_says_what_it_was_computed_with(run_dir: Path, scored: Path) -> None:
    content = json.loads((scored / f"{TASK}.json").read_text())
    assert content["environment"] == {
        "code": sources_hash(),
        "torch": torch.__version__,
        "lm_eval": content["lm_eval_version"],
        "tokenizer": open_checkpoint(run_dir).tokenizer().fingerprint,
        "device": "cpu",
        "device_name": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "layout": "1 x 1 x 1",
        "share_prefixes": True,
        "wants_invariant": True,
    }
    assert "again" not in content


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("code", "0" * 64, "the evaluation's code 000000000000 -> "),
        ("torch", "2.0.0", "torch 2.0.0 -> "),
        ("tokenizer", "another", "tokenizer another -> "),
        ("device", "cuda", "device cuda -> cpu"),
        (None, None, "it does not say with which code, torch and tokenizer it was made"),
    ],
)
def test_what_other_code_or_another_tokenizer_found_is_found_again(
    run_dir: Path, scored: Path, tmp_path: Path, key: str | None, value: str, told: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    path = out / f"{TASK}.json"
    content = json.loads(path.read_text())
    if key is None:
        del content["environment"], content["generation"]  # as files were before
    else:
        content["environment"][key] = value
    path.write_text(json.dumps(content))
    assert TaskResult.read(path).metrics  # still shown
    (found,), said = evaluate(run_dir, out)
    assert not found.reused
    assert found.again.startswith(told)
    assert f"scored again, the earlier score is not of the same: {told}" in said
    (again,), said = evaluate(run_dir, out)
    assert again.reused
    assert "reused: same weights, settings, data and code" in said


def test_a_score_without_row_invariant_arithmetic_is_not_one_with_it(
    run_dir: Path, tmp_path: Path, scored: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    (plain,), _ = evaluate(run_dir, out, batch_invariant=False)
    assert (plain.reused, plain.again) == (False, "batch-invariant arithmetic True -> False")
    (alone,), _ = evaluate(run_dir, out, batch_invariant=False, share_prefixes=False)
    assert (alone.reused, alone.again) == (False, "shared prefixes True -> False")
    assert evaluate(run_dir, out, batch_invariant=False, share_prefixes=False)[0][0].reused


def test_row_invariant_scores_are_those_of_any_layout_and_others_are_not(run_dir: Path) -> None:
    def environment(layout: str) -> dict[str, Any]:
        return describe_environment(
            torch.device("cpu"), layout, {"fingerprint": "t"}, wants_invariant=True, share_prefixes=True
        )

    before = make_result(TASK, {}, environment=environment("1 x 1 x 1"), batch_invariant=True)
    wanted = {
        "checkpoint": before.checkpoint,
        "settings": before.settings,
        "settings_hash": before.settings_hash,
        "lm_eval_version": before.lm_eval_version,
        "data": before.data,
        "environment": environment("2 x 1 x 2"),
    }
    assert differences(before, wanted) == []
    for found in (False, None):
        reasons = differences(replace(before, batch_invariant=found), wanted)
        assert reasons == ["layout (work x pipeline x tensor) 1 x 1 x 1 -> 2 x 1 x 2"]
    changed = wanted | {"settings_hash": "1", "settings": before.settings | {"limit": 7}}
    assert differences(before, changed) == ["limit None -> 7"]
    assert differences(before, wanted | {"data": {**before.data, "sha256": "other"}}) == ["other data"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_neither_the_order_of_the_tasks_nor_the_batch_matters(family: str, tokenizer, tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "run", tokenizer, family=family)
    found = []
    for batch_size, *names in ((16, "heldout", TASK), (16, TASK, "heldout"), (3, "heldout", TASK)):
        results, _ = evaluate(run_dir, tmp_path / str(len(found)), *names, limit=10, batch_size=batch_size)
        found.append({result.task: (result.metrics, result.batch_invariant) for result in results})
    assert found[0] == found[1] == found[2]  # to the last bit
    assert found[0]["heldout"][1] is True


def imports_of(path: Path) -> set[Path]:
    """The project's files that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.split(".")[0] in ("evals", "megagpt")}
    return {file for file in files if file.is_file()}


def test_every_module_of_evals_behind_a_score_is_in_the_hash() -> None:
    hashed = set(source_files())
    seen, waiting = set(), {ROOT / "evals" / "run.py"}
    while waiting:
        path = waiting.pop()
        seen.add(path)
        waiting |= imports_of(path) - seen
    ours = {path for path in seen if ROOT / "evals" in path.parents}
    # MT-Bench's files are copied when data is prepared.
    assert {path.relative_to(ROOT / "evals").parts[0] for path in ours - hashed} == {"mt_bench"}
    assert len(ours) > 20
    for name in ("generate.py", "tokenizer.py", "model/decoder.py", "parallel/decode.py", "checkpoint/open.py"):
        assert ROOT / "megagpt" / name in hashed & seen | {ROOT / "megagpt/parallel/decode.py"} & hashed
    assert ROOT / "evals" / "report.py" not in hashed


@pytest.mark.parametrize(
    ("file", "matters"),
    [
        ("megagpt/generate.py", True),
        ("megagpt/tokenizer.py", True),
        ("evals/sandbox/jail.py", True),
        ("evals/report.py", False),
        ("evals/compare.py", False),
    ],
)
def test_a_change_of_what_decides_scores_changes_the_hash(tmp_path: Path, file: str, matters: bool) -> None:  # noqa: FBT001
    for name in ("evals/run.py", "evals/report.py", "evals/compare.py", "megagpt/generate.py", "megagpt/tokenizer.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("A = 1\n")
    before = sources_hash(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / file).write_text("A = 2\n")
    assert (sources_hash(tmp_path) != before) is matters
