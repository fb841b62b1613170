"""Every flipped bit, cut and swapped file is refused, and the message names the file."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from megagpt.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.rewrite import publish_alone
from megagpt.checkpoint.save import save_checkpoint, verify_together
from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.checkpoint.tensors import KINDS, SliceReader, TensorSlice, rank_file, write_slices
from megagpt.errors import CheckpointError
from tests.checkpoint.folders import folder_in_memory
from tests.checkpoint.small_saves import ALONE, identity, save

exhaustive = pytest.mark.exhaustive


def refused(step_dir, name):
    """Verification fails, and says which file it is."""
    try:
        verify_checkpoint(step_dir)
    except CheckpointError as error:
        return f"{step_dir / name}: " in str(error)
    return False


@exhaustive
def test_every_bit_of_a_small_checkpoint(folder):
    tokenizer_file = folder / "tokenizer.json"
    tokenizer_file.write_text('{"a": 1}')
    store = CheckpointStore(folder / "checkpoints")
    save(store, 2, tokenizer_file)
    accepted, tried = [], 0
    for path in sorted(store.step_dir(2).iterdir()):
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(flipped)
            tried += 1
            if not refused(store.step_dir(2), path.name):
                accepted.append((path.name, bit))
        path.write_bytes(content)
    assert accepted == []
    assert tried > 8_000
    verify_checkpoint(store.step_dir(2))


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Two steps of 1.2 MB in three files of tensors each."""
    store = CheckpointStore(tmp_path_factory.mktemp("larger") / "checkpoints")
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        slices = [
            TensorSlice(f"t{i}", (33_333,), 0, {kind: torch.randn(33_333, generator=generator) for kind in KINDS})
            for i in range(3)
        ]
        save_checkpoint(store, ALONE, slices, {"step": step}, identity())
    return store


@pytest.fixture
def folder(tmp_path):
    with folder_in_memory(tmp_path) as where:
        yield where


@pytest.fixture
def store(larger, folder):
    return CheckpointStore(shutil.copytree(larger.folder, folder / "checkpoints"))


@exhaustive
def test_ten_thousand_random_bits_of_a_larger_checkpoint(store):
    path = store.step_dir(2) / "rank_00000.safetensors"
    choose = random.Random(1)
    size = path.stat().st_size
    accepted = []
    with path.open("r+b", buffering=0) as file:
        for _ in range(10_000):
            bit = choose.randrange(8 * size)
            file.seek(bit // 8)
            before = file.read(1)[0]
            for value in (before ^ 1 << (bit % 8), before):
                file.seek(bit // 8)
                file.write(bytes([value]))
                if value != before and not refused(store.step_dir(2), path.name):
                    accepted.append(bit)
    assert accepted == []
    verify_checkpoint(store.step_dir(2))


@exhaustive
def test_every_cut_at_a_sector_and_every_addition(store):
    path = store.step_dir(2) / "rank_00000.safetensors"
    content = path.read_bytes()
    for length in range(len(content) // 512 * 512, -1, -512):
        with path.open("r+b") as file:
            file.truncate(length)
        assert refused(store.step_dir(2), path.name), length
    for more in (b"\0", content):
        path.write_bytes(content + more)
        assert refused(store.step_dir(2), path.name)


@exhaustive
def test_files_that_are_swapped_missing_or_of_another_step(store):
    one, other = store.step_dir(1), store.step_dir(2)
    name = "rank_00000.safetensors"
    shutil.copy(one / name, one / "aside")
    shutil.copy(other / name, one / name)
    assert refused(one, name)
    shutil.move(one / "aside", one / name)
    verify_checkpoint(one)
    (one / "manifest.json").rename(one / "aside")
    shutil.copy(other / "manifest.json", one / "manifest.json")
    assert refused(one, "manifest.json"), "of another step"
    shutil.move(one / "aside", one / "manifest.json")
    (one / name).unlink()
    assert refused(one, name)


NUMEL = 3000
RANKS = (rank_file(0), rank_file(1))


def of_two_ranks(folder, step):
    """The store of a checkpoint whose two ranks have written half of a tensor each, in files of one size."""
    store = CheckpointStore(folder / "checkpoints")
    values = torch.arange(NUMEL, dtype=torch.float32) + 10_000 * step

    def part(rank):
        held = values[rank * NUMEL // 2 : (rank + 1) * NUMEL // 2]
        return [TensorSlice("weight", (NUMEL,), rank * NUMEL // 2, {kind: held.clone() for kind in KINDS})]

    publish_alone(
        store,
        step,
        {rank_file(rank): partial(write_slices, slices=part(rank)) for rank in (0, 1)},
        lambda files: Manifest(step, files, {"step": step}, identity().config, "data", None, {}),
        0,
        {},
    )
    sizes = {(store.step_dir(step) / name).stat().st_size for name in RANKS}
    assert len(sizes) == 1, "a swap is not to be seen by the sizes"
    with SliceReader(rank_files(store.step_dir(step), read_manifest(store.step_dir(step)))) as reader:
        assert torch.equal(reader.read_whole("weight"), values)
    return store.step_dir(step)


def swap_names(step_dir):
    one, other = (step_dir / name for name in RANKS)
    one.rename(step_dir / "aside")
    other.rename(one)
    (step_dir / "aside").rename(other)


def swap_contents(step_dir):
    contents = [(step_dir / name).read_bytes() for name in RANKS]
    for name, content in zip(RANKS, reversed(contents), strict=True):
        with (step_dir / name).open("r+b") as file:
            file.write(content)


def swap_entries(step_dir):
    """In the manifest, whose own checksum is made to fit."""
    manifest = read_manifest(step_dir)
    one, other = RANKS
    files = {one: manifest.files[other], other: manifest.files[one]}
    (step_dir / MANIFEST).write_bytes(replace(manifest, files=files).to_json())


@pytest.mark.parametrize("swap", [swap_names, swap_contents, swap_entries])
def test_two_ranks_files_that_are_swapped_are_refused_both_by_name(swap, folder):
    step_dir = of_two_ranks(folder, 3)
    verify_together(step_dir, ALONE)
    swap(step_dir)
    assert refused(step_dir, RANKS[0])
    with pytest.raises(CheckpointError) as told:
        verify_together(step_dir, ALONE)
    assert [f"{step_dir / name}: damaged: " in str(told.value) for name in RANKS] == [True, True]


def test_entries_that_are_swapped_in_the_manifest_alone_are_refused_as_its_damage(folder):
    step_dir = of_two_ranks(folder, 3)
    content = json.loads((step_dir / MANIFEST).read_bytes())
    one, other = RANKS
    content["files"][one], content["files"][other] = content["files"][other], content["files"][one]
    (step_dir / MANIFEST).write_bytes((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    assert refused(step_dir, MANIFEST)


def test_one_ranks_file_of_another_step_is_refused_by_name(folder):
    step_dir, earlier = of_two_ranks(folder, 3), of_two_ranks(folder / "other", 2)
    shutil.copy(earlier / RANKS[1], step_dir / RANKS[1])
    assert refused(step_dir, RANKS[1])
    assert not refused(step_dir, RANKS[0])
