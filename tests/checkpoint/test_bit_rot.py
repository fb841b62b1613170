"""Every flipped bit, cut and swapped file is refused, and the message names the file."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from megagpt.checkpoint.save import save_checkpoint
from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.checkpoint.tensors import KINDS, TensorSlice
from megagpt.errors import CheckpointError
from tests.checkpoint.folders import folder_in_memory
from tests.checkpoint.small_saves import ALONE, identity, save

pytestmark = pytest.mark.exhaustive


def refused(step_dir, name):
    """Verification fails, and says which file it is."""
    try:
        verify_checkpoint(step_dir)
    except CheckpointError as error:
        return f"{step_dir / name}: " in str(error)
    return False


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
