"""Held-out loss, against the plain sum over the stream."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evals.heldout import _ratio, heldout_loss
from megagpt.data.indexed import TokenFileWriter
from megagpt.errors import EvalError
from tests.evals.conftest import save_run


def test_every_token_but_the_first_is_predicted_once(model, tmp_path) -> None:
    stream = [(7 * i) % 300 for i in range(101)]
    with TokenFileWriter(tmp_path / "val", "<u2") as writer:
        writer.add_document(stream)
    found = heldout_loss(model, tmp_path / "val", max_seq_len=32, batch_size=3)
    nats = 0.0
    for start in (0, 32, 64, 96):
        window = torch.tensor(stream[start : start + 33])
        with torch.inference_mode():
            nats += float(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum"))
    assert (found.n_tokens, found.n_windows, found.n_windows_total) == (100, 4, 4)
    assert found.nats_per_token == pytest.approx(nats / 100, rel=1e-5)
    assert found.bits_per_byte is None  # no manifest.json counts the bytes


def test_bits_per_byte_divide_by_the_texts_bytes_of_the_manifest(model, tokenizer, tmp_path) -> None:
    save_run(tmp_path / "run", tokenizer)
    prefix = tmp_path / "run_data" / "tokens_val"
    whole = heldout_loss(model, prefix, max_seq_len=64)
    from megagpt.data.manifest import read_manifest

    entry = read_manifest(prefix).files["tokens_val"]
    expected = whole.nats_per_token * entry.n_tokens / math.log(2) / entry.text_bytes
    assert whole.bits_per_byte == pytest.approx(expected)
    part = heldout_loss(model, prefix, max_seq_len=64, n_windows=3)
    assert (part.n_windows, part.n_tokens) == (3, 192)


def test_the_standard_error_of_equal_windows_is_that_of_a_mean() -> None:
    sums = np.array([10.0, 14.0, 18.0, 22.0])
    mean, stderr = _ratio(sums, np.full(4, 2.0))
    assert mean == pytest.approx(8.0)
    assert stderr == pytest.approx(np.std(sums / 2, ddof=1) / 2)


def test_tokens_of_another_vocabulary_are_an_error(model, tmp_path) -> None:
    with TokenFileWriter(tmp_path / "val", "<u2") as writer:
        writer.add_document([1, 2, 5000])
    with pytest.raises(EvalError, match="holds token 5000, but the model knows 0 to 383"):
        heldout_loss(model, tmp_path / "val", max_seq_len=32)
