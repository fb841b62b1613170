"""Weights out of a GGUF file, llama.cpp's format: Llama, in every type that the `gguf` package can unpack."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megagpt.checkpoint.gguf_config import check_tensors, expected_shapes, llama_from_gguf
from megagpt.checkpoint.gguf_header import GGUFHeader, StoredTensor, read_gguf_header
from megagpt.checkpoint.hf import hf_state_to_model
from megagpt.config.schema import LlamaModel
from megagpt.errors import CheckpointError


def import_gguf(path: Path) -> tuple[LlamaModel, dict[str, Tensor], GGUFHeader]:
    """Read a GGUF file.

    Returns:
        The model's sizes, a state dict in fp32 for `build_model(config).load_state_dict(state)`, and the header.

    Raises:
        CheckpointError: the `gguf` package is missing, the file is damaged, or the model cannot be expressed.
    """
    gguf = _package(path)
    header = read_gguf_header(path)
    config = llama_from_gguf(header, str(path))
    check_tensors(header, config, str(path))
    ends = {name: tensor.start + _size(gguf, name, tensor, path) for name, tensor in header.tensors.items()}
    _check_ends(header, ends, path)
    data = np.memmap(path, np.uint8, mode="r")
    theirs: dict[str, Tensor] = {}
    for name, hf_name, _ in expected_shapes(config):
        tensor = header.tensors[name]
        theirs[hf_name] = _unpacked(gguf, name, tensor, data[tensor.start : ends[name]], path)
    for layer in range(config.n_layer):
        for part, n_head in (("q", config.n_head), ("k", config.n_kv_head)):
            key = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            theirs[key] = _halves(theirs[key], n_head)
    return config, hf_state_to_model(config, theirs, str(path)), header


def _package(path: Path) -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise CheckpointError(
            f"{path}: reading it needs the gguf package, which is not installed; pip install 'megagpt[gguf]'"
        ) from None


def _size(gguf: Any, name: str, tensor: StoredTensor, path: Path) -> int:
    """Bytes of a tensor's data."""
    try:
        ggml_type = gguf.GGMLQuantizationType(tensor.ggml_type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{path}: tensor {name} is of ggml type {tensor.ggml_type}, which the gguf package does not know"
        ) from None
    columns = tensor.shape[-1]
    if columns % block:
        raise CheckpointError(
            f"{path}: tensor {name} has rows of {columns}, but {ggml_type.name} has blocks of {block}"
        )
    return math.prod(tensor.shape) // int(block) * int(block_bytes)


def _check_ends(header: GGUFHeader, ends: dict[str, int], path: Path) -> None:
    """No tensor reaches beyond the file or into the next one: so they need no more memory than their file."""
    before = 0
    for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].start):
        if ends[name] > header.file_size:
            raise CheckpointError(
                f"{path}: tensor {name} ends at byte {ends[name]}, the file has {header.file_size}; is it whole?"
            )
        if tensor.start < before:
            raise CheckpointError(f"{path}: tensor {name} begins at byte {tensor.start}, inside another tensor")
        before = ends[name]


def _unpacked(gguf: Any, name: str, tensor: StoredTensor, raw: Any, path: Path) -> Tensor:
    """The values in fp32."""
    ggml_type = gguf.GGMLQuantizationType(tensor.ggml_type)
    try:
        with np.errstate(all="ignore"):  # what is not finite is told below
            values = gguf.dequantize(raw.reshape(*tensor.shape[:-1], -1), ggml_type)
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: tensor {name} is of type {ggml_type.name}, which the gguf package cannot turn into numbers"
        ) from None
    unpacked = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
    if not torch.isfinite(unpacked).all():
        raise CheckpointError(f"{path}: tensor {name} holds values that are not finite")
    return unpacked


def _halves(rows: Tensor, n_head: int) -> Tensor:
    """A head's rows in Hugging Face's order: llama.cpp turns rows 2i and 2i + 1 together, they i and i + d_head / 2.

    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py, here undone.
    """
    return rows.view(n_head, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
