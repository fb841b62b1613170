"""Slices of several ranks are one logical tensor again; other readers of safetensors agree."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from megagpt.checkpoint.tensors import KINDS, MOMENTUM, WEIGHT, SliceReader, TensorSlice, write_slices
from megagpt.errors import CheckpointError

WHOLE = {kind: torch.randn(5, 7, generator=torch.Generator().manual_seed(i)) for i, kind in enumerate(KINDS)}


def part(start, end):
    return TensorSlice("w", (5, 7), start, {kind: whole.flatten()[start:end] for kind, whole in WHOLE.items()})


def write(folder, *cuts):
    """A file for each part between two cuts."""
    files = []
    for rank, (start, end) in enumerate(pairwise(cuts)):
        files.append(folder / f"rank_{rank:05d}.safetensors")
        write_slices(files[-1], [part(start, end)])
    return files


def test_the_safetensors_library_reads_our_files(tmp_path):
    (file,) = write(tmp_path, 3, 20)
    with safe_open(file, framework="pt") as opened:
        assert sorted(opened.keys()) == sorted(f"w|{kind}" for kind in KINDS)
        assert opened.metadata() == {"w": '{"shape": [5, 7], "start": 3}'}
        for kind in KINDS:
            assert torch.equal(opened.get_tensor(f"w|{kind}"), WHOLE[kind].flatten()[3:20])


@given(cuts=st.sets(st.integers(1, 34), max_size=4), start=st.integers(0, 34), numel=st.integers(0, 35))
def test_any_range_is_read_from_any_cut(cuts, start, numel, tmp_path_factory):
    numel = min(numel, 35 - start)
    with SliceReader(write(tmp_path_factory.mktemp("cut"), 0, *sorted(cuts), 35)) as reader:
        assert reader.shapes == {"w": (5, 7)}
        for kind in KINDS:
            assert torch.equal(reader.read("w", kind, start, numel), WHOLE[kind].flatten()[start : start + numel])
            assert torch.equal(reader.read_whole("w", kind), WHOLE[kind])


def test_values_of_other_types_are_written_as_fp32(tmp_path):
    values = torch.arange(4, dtype=torch.bfloat16)
    write_slices(tmp_path / "f", [TensorSlice("w", (4,), 0, dict.fromkeys(KINDS, values))])
    with SliceReader([tmp_path / "f"]) as reader:
        assert torch.equal(reader.read_whole("w"), torch.tensor([0.0, 1.0, 2.0, 3.0]))


def test_a_missing_part_is_told(tmp_path):
    files = write(tmp_path, 0, 10, 20, 35)
    with (
        SliceReader([files[0], files[2]]) as reader,
        pytest.raises(CheckpointError, match=r"'w': 25 of 35 values from 0 on are in the checkpoint's files"),
    ):
        reader.read_whole("w")


def test_each_tensor_keeps_what_its_optimizer_has(tmp_path):
    values = torch.arange(4.0)
    kept = {"matrix": (WEIGHT, MOMENTUM), "bias": KINDS}
    slices = [TensorSlice(name, (4,), 0, dict.fromkeys(kinds, values)) for name, kinds in kept.items()]
    write_slices(tmp_path / "f", slices)
    with SliceReader([tmp_path / "f"]) as reader:
        assert {name: reader.kinds(name) for name in kept} == kept
        assert torch.equal(reader.read_whole("matrix", MOMENTUM), values)
        with pytest.raises(
            CheckpointError, match=r"'matrix' has no 'exp_avg' .*it has weight, momentum.*another optim"
        ):
            reader.read_whole("matrix", "exp_avg")


def test_an_unknown_tensor_is_told(tmp_path):
    with (
        SliceReader(write(tmp_path, 0, 35)) as reader,
        pytest.raises(CheckpointError, match=r"no tensor 'v'; it belongs to another model.*example 'w'"),
    ):
        reader.read("v", "weight", 0, 1)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"not safetensors at all"])
def test_a_file_that_is_no_safetensors_is_told(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match="file: not a readable safetensors file"):
        SliceReader([tmp_path / "file"])


def test_differences_between_models_are_named(tmp_path):
    with SliceReader(write(tmp_path, 0, 35)) as reader:
        reader.check_model({"w": (5, 7)})
        with pytest.raises(CheckpointError, match=r"w is \(5, 7\) in the checkpoint, \(7, 5\) in the model"):
            reader.check_model({"w": (7, 5)})
        with pytest.raises(CheckpointError, match=r"missing \['v'\]; unknown \['w'\]"):
            reader.check_model({"v": (5, 7)})
