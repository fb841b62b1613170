"""A tensor cut in one way and written in parts is read in any other way, element by element."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from megagpt.checkpoint.tensors import KINDS, SliceReader, TensorSlice, write_slices
from megagpt.errors import CheckpointError
from megagpt.model.layout import column, row, vocab

SHAPE = (12, 8)
WHOLE = {kind: torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i, kind in enumerate(KINDS)}
WAYS = {
    "whole": lambda degree, rank: None,
    "column": lambda degree, rank: column(SHAPE, (12,), degree, rank),
    "fused": lambda degree, rank: column(SHAPE, (4, 8), degree, rank),
    "row": lambda degree, rank: row(SHAPE, degree, rank),
    "vocab": lambda degree, rank: vocab(SHAPE, degree, rank, 8),
}
ways = st.tuples(st.sampled_from(sorted(WAYS)), st.sampled_from([1, 2, 4]))


def shards_of(way):
    kind, degree = way
    return [WAYS[kind](degree, rank) for rank in range(degree if kind != "whole" else 1)]


def local(shard, kind):
    return (WHOLE[kind] if shard is None else shard.cut(WHOLE[kind])).flatten()


def write(folder, way, cuts):
    """A file for each shard and each part of it between two cuts, as ZeRO makes them."""
    files = []
    for shard in shards_of(way):
        numel = 96 if shard is None else shard.held_numel
        for start, end in pairwise(sorted({0, *(cut for cut in cuts if cut < numel), numel})):
            values = {kind: local(shard, kind)[start:end] for kind in KINDS}
            files.append(folder / f"{len(files)}.safetensors")
            write_slices(files[-1], [TensorSlice("w", SHAPE, start, values, shard)])
    return files


@given(
    written=ways,
    wanted=ways,
    cuts=st.sets(st.integers(1, 95), max_size=3),
    start=st.integers(0, 95),
    numel=st.integers(0, 96),
)
def test_any_cut_is_read_from_any_other(written, wanted, cuts, start, numel, tmp_path_factory):
    kinds = {written[0], wanted[0]}
    across = "row" in kinds and len(kinds) > 1 and "whole" not in kinds
    with SliceReader(write(tmp_path_factory.mktemp("cut"), written, cuts)) as reader:
        for shard in shards_of(wanted):
            held = 96 if shard is None else shard.held_numel
            begin = min(start, held)
            end = min(begin + numel, held)
            for kind in KINDS:
                reader.bytes_read = 0
                found = reader.read("w", kind, begin, end - begin, shard)
                assert torch.equal(found, local(shard, kind)[begin:end])
                if not across:  # those are read by way of the whole tensor
                    assert reader.bytes_read == 4 * (end - begin)
        assert torch.equal(reader.read_whole("w"), WHOLE["weight"])


@pytest.mark.parametrize("way", ["column", "row"])
def test_of_a_file_only_those_pages_are_touched_that_hold_what_is_read(way, tmp_path):
    """One of four processes reads its part of a tensor that was written whole: a quarter of it."""
    shape = (4, 2**21)
    whole = torch.arange(2**23, dtype=torch.float32).view(shape)
    file = tmp_path / "f"
    write_slices(file, [TensorSlice("w", shape, 0, {"weight": whole.flatten()})])
    shard = column(shape, (4,), 4, 1) if way == "column" else row(shape, 4, 1)
    with SliceReader([file]) as reader:
        assert torch.equal(reader.read("w", "weight", 0, shard.held_numel, shard), shard.cut(whole).flatten())
        touched = touched_bytes(file)
        assert reader.bytes_read == whole.nbytes // 4
        assert whole.nbytes // 4 <= touched < 0.6 * whole.nbytes  # the system maps pages ahead
        reader.read_whole("w")
        assert touched_bytes(file) >= whole.nbytes  # the measure sees what is read


def touched_bytes(file):
    """Of the pages of a file that this process has mapped, those that it has looked at."""
    touched, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            touched += 1024 * int(line.split()[1])
    return touched


def test_a_lost_shard_is_told(tmp_path):
    files = write(tmp_path, ("row", 2), set())
    with SliceReader(files[:1]) as reader, pytest.raises(CheckpointError, match="'w': 48 of 96 values from 0 on"):
        reader.read_whole("w")


def test_the_file_says_which_part_it_holds(tmp_path):
    file = write(tmp_path, ("fused", 2), set())[1]
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {
            "w": '{"shape": [12, 8], "start": 0, "shard": {"dim": 0, "spans": [[2, 2], [8, 4]]}}'
        }
