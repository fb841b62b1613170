"""Hidden matrices are found, and each is seen by itself."""

from __future__ import annotations

import pytest
import torch

from megagpt.model.build import build_model
from megagpt.parallel.matrices import hidden_matrices
from tests.tiny import run_config

ROWS = {
    "gpt2": {
        "attention.qkv": (24, 24, 24),
        "attention.output": (24,),
        "feed_forward.up": (96,),
        "feed_forward.down": (24,),
    },
    "llama": {
        "attention.qkv": (24, 12, 12),
        "attention.output": (24,),
        "feed_forward.gate_up": (40, 40),
        "feed_forward.down": (24,),
    },
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_matrices_of_the_blocks_and_nothing_else_with_what_is_fused_in_them(family, tmp_path):
    model = build_model(run_config(tmp_path, tmp_path / "t", family=family).model)
    found = {matrix.name: matrix.shard.layout.sub_sizes for matrix in hidden_matrices(model)}
    assert found == {f"blocks.{i}.{name}.weight": rows for i in range(2) for name, rows in ROWS[family].items()}


def test_a_function_sees_q_k_and_v_one_by_one(tmp_path):
    model = build_model(run_config(tmp_path, tmp_path / "t", family="llama").model)
    (qkv, *_) = [matrix for matrix in hidden_matrices(model) if "qkv" in matrix.name]
    held = torch.randn(qkv.parameter.shape)
    seen = []

    def negated(whole):
        seen.append(whole.clone())
        return -whole

    assert torch.equal(qkv.map_whole(held, negated, None), -held)
    assert [tuple(whole.shape) for whole in seen] == [(24, 24), (12, 24), (12, 24)]
    assert torch.equal(torch.cat(seen), held)
