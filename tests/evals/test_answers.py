"""Answers kept while a task is scored: found again, never shared by two checkpoints; damage and kills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evals.answers import AnswerKey, AnswerStore, request_hash
from evals.backend import MegaGPTLM
from evals.data import write_dataset
from evals.results import TaskResult
from evals.run import EvalRequest, Evaluation, run_evals
from megagpt.checkpoint.open import open_checkpoint
from tests.evals.conftest import CONTEXT, TEXT, save_run
from tests.evals.test_backend import generated
from tests.evals.test_run import CONSOLE, SUITES

ROOT = Path(__file__).resolve().parents[2]
KEY = AnswerKey("weights", "fp32", 192, "tokenizer", "code", "arithmetic")
N_DOCS = 200


def put(folder: Path, key: AnswerKey = KEY, *requests: str, writer: str = "0") -> Path:
    with AnswerStore(folder, "a_task", key, writer) as store:
        for request in requests:
            store.put(request, [[-0.1, float(len(request))], [1, 0]])
        return store.files()[0]


def test_answers_are_found_again_as_they_were_put(tmp_path: Path) -> None:
    numbers = [-1 / 3, -1e-30, -123456.789]
    with AnswerStore(tmp_path, "a_task", KEY) as store:
        store.put("x", [numbers, [1, 0, 1]])
        store.put("y", "text with \n and \u2028 and ✓")
    with AnswerStore(tmp_path, "a_task", KEY) as store:
        assert (store.n_found, store.n_damaged) == (2, 0)
        assert store.get("x") == [numbers, [1, 0, 1]]
        assert store.get("y") == "text with \n and \u2028 and ✓"
        assert store.get("z") is None


@pytest.mark.parametrize("field", ["checkpoint", "dtype", "max_seq_len", "tokenizer", "code", "arithmetic"])
def test_whatever_decides_an_answer_is_part_of_the_key(tmp_path: Path, field: str) -> None:
    put(tmp_path, KEY, "x")
    other = replace(KEY, **{field: {"max_seq_len": 191}.get(field, "other")})
    assert AnswerStore(tmp_path, "a_task", other).n_found == 0
    assert AnswerStore(tmp_path, "another_task", KEY).n_found == 0
    assert AnswerStore(tmp_path, "a_task", KEY).n_found == 1


def test_a_torn_last_line_costs_that_answer_and_is_counted(tmp_path: Path) -> None:
    path = put(tmp_path, KEY, "x", "y", "z")
    path.write_bytes(path.read_bytes()[:-5])
    with AnswerStore(tmp_path, "a_task", KEY) as store:
        assert (store.n_found, store.n_damaged) == (2, 1)
        store.put("new", "answer")
    after = AnswerStore(tmp_path, "a_task", KEY)
    assert (after.n_found, after.get("new"), after.get("z")) == (3, "answer", None)


@pytest.mark.parametrize("where", ["header", "middle"])
def test_a_changed_byte_is_noticed(tmp_path: Path, where: str) -> None:
    path = put(tmp_path, KEY, "x", "y", "z")
    lines = path.read_bytes().split(b"\n")
    line = 0 if where == "header" else 2
    lines[line] = lines[line][:-3] + bytes([lines[line][-3] ^ 1]) + lines[line][-2:]
    path.write_bytes(b"\n".join(lines))
    store = AnswerStore(tmp_path, "a_task", KEY)
    assert (store.n_found, store.n_damaged) == ((0, 4) if where == "header" else (2, 1))
    with store:
        store.put("y", "again")
    assert AnswerStore(tmp_path, "a_task", KEY).get("y") == "again"


def test_processes_write_files_of_their_own_and_read_each_others(tmp_path: Path) -> None:
    put(tmp_path, KEY, "x", writer="0")
    put(tmp_path, KEY, "y", writer="1")
    with AnswerStore(tmp_path, "a_task", KEY, "7") as store:
        assert store.n_found == 2
        store.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_request_is_all_of_its_parts() -> None:
    hashes = [
        request_hash("score", b"ab", (1,)),
        request_hash("score", b"a", b"b", (1,)),
        request_hash("score", b"ab", (2,)),
        request_hash("text", b"ab", (1,)),
    ]
    assert len(set(hashes)) == 4


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    rows = [
        {
            "question": f"What is {i} and {i * i}?",
            "subject": "anatomy",
            "choices": [str(i + j) for j in range(4)],
            "answer": i % 4,
        }
        for i in range(N_DOCS)
    ]
    write_dataset(folder, "cais/mmlu", {"anatomy": {"dev": rows[:5], "test": rows}})
    return folder


def evaluate(run_dir: Path, out: Path, data_dir: Path, batch_size: int = 16) -> TaskResult:
    (result,) = run_evals(
        EvalRequest(run_dir, ("mmlu_anatomy",), data_dir, n_shots=0, batch_size=batch_size, out=out, suites_dir=SUITES),
        CONSOLE,
    )
    return result


@pytest.fixture(autouse=True)
def one_thread():
    """As in the process that is killed: bits are promised for the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def killed(tokenizer, data_dir, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The run of a `megagpt eval run` that was killed when it had written some answers, and how many."""
    run_dir = save_run(tmp_path_factory.mktemp("killed") / "a", tokenizer)
    words = ["eval", "run", "--checkpoint", run_dir, "--tasks", "mmlu_anatomy", "--data", data_dir, "--shots", "0"]
    code = "import torch, megagpt.cli; torch.set_num_threads(1); megagpt.cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words), "--batch-size", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    answers = run_dir / "evals" / "step_00000010" / "answers"
    while process.poll() is None and sum(path.read_bytes().count(b"\n") for path in answers.glob("*")) < 40:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    return run_dir, sum(path.read_bytes().count(b"\n") - 1 for path in answers.glob("*"))


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_results(killed, data_dir, tmp_path: Path) -> None:
    run_dir, n_kept = killed
    out, whole_out = tmp_path / "resumed", tmp_path / "whole"
    shutil.copytree(run_dir / "evals" / "step_00000010", out)
    assert 39 <= n_kept < 4 * N_DOCS
    assert not (out / "mmlu_anatomy.json").exists()
    resumed = evaluate(run_dir, out, data_dir, batch_size=16)
    whole = evaluate(run_dir, whole_out, data_dir, batch_size=5)
    assert whole.answers_resumed == 0
    assert n_kept <= resumed.answers_resumed < 4 * N_DOCS
    assert resumed.tokens_computed < whole.tokens_computed
    assert resumed.metrics == whole.metrics
    one, other = ((folder / "mmlu_anatomy.samples.jsonl").read_text() for folder in (out, whole_out))
    assert one == other
    assert list((out / "answers").iterdir()) == []


def test_a_checkpoint_with_one_changed_weight_shares_nothing(killed, tokenizer, data_dir, tmp_path: Path) -> None:
    run_dir, _ = killed
    other = save_run(tmp_path / "other", tokenizer, nudge=1e-3)
    assert open_checkpoint(other).hash != open_checkpoint(run_dir).hash
    out = tmp_path / "out"
    shutil.copytree(run_dir / "evals" / "step_00000010", out)
    left = sorted((out / "answers").iterdir())
    found, alone = (evaluate(other, folder, data_dir) for folder in (out, tmp_path / "alone"))
    assert (found.answers_resumed, found.tokens_computed) == (0, alone.tokens_computed)
    assert found.metrics == alone.metrics
    assert sorted((out / "answers").iterdir()) == left  # the killed one's, for its own checkpoint


def digest(run_dir: Path, **changes) -> str:
    """Of the key of an evaluation's answers."""
    request = EvalRequest(run_dir, ("mmlu_anatomy",), suites_dir=SUITES, **changes)
    return Evaluation(request, open_checkpoint(run_dir)).answer_key.digest


def test_row_invariant_answers_are_known_whatever_the_batches(killed) -> None:
    run_dir, _ = killed
    found = {digest(run_dir, batch_size=size, share_prefixes=share) for size in (1, 16) for share in (True, False)}
    assert len(found) == 1


def test_answers_that_depend_on_the_batch_are_known_for_the_same_batches_alone(killed) -> None:
    run_dir, _ = killed
    changes = [{"batch_invariant": False}, {"dtype": "bf16"}]
    changes += [{**change, **more} for change in changes for more in ({"batch_size": 4}, {"share_prefixes": False})]
    keys = [digest(run_dir, **change) for change in changes]
    assert len({*keys, digest(run_dir)}) == 7
    assert keys == [digest(run_dir, **change) for change in changes]


@pytest.mark.exhaustive
def test_another_number_of_threads_is_other_arithmetic(killed) -> None:
    run_dir, _ = killed
    one = digest(run_dir)
    torch.set_num_threads(2)
    assert digest(run_dir) != one


def test_generated_tokens_of_a_killed_evaluation_are_not_computed_again(model, tokenizer, tmp_path: Path) -> None:
    prompts = [generated(text, max_gen_toks=7) for text in TEXT]
    found = []
    for _ in range(2):
        with AnswerStore(tmp_path, "a_task", KEY) as answers:
            lm = MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, batch_size=2, answers=answers)
            found.append((lm.generate_until(prompts), lm.tokens_computed, lm.tokens_naive, lm.n_resumed))
    (texts, computed, naive, _), again = found
    assert again == (texts, 0, naive, 3)
    assert computed == naive


def test_a_text_is_kept_as_soon_as_it_is_whole_though_others_are_still_written(
    model, tokenizer, tmp_path: Path
) -> None:
    prompts = [generated(text, max_gen_toks=7) for text in TEXT]

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with AnswerStore(tmp_path, "a_task", KEY) as answers, pytest.raises(KeyboardInterrupt):
        MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, answers=answers, on_progress=kill).generate_until(prompts)
    with AnswerStore(tmp_path, "a_task", KEY) as answers:
        lm = MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, answers=answers)
        texts = lm.generate_until(prompts)
    assert lm.n_resumed == 2
    assert texts == MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT).generate_until(prompts)
