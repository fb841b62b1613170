"""Checkpoints from and to Hugging Face folders, and from GGUF files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt import __version__
from megagpt.checkpoint import fsio
from megagpt.checkpoint.gguf_import import import_gguf
from megagpt.checkpoint.gguf_tokenizer import rebuild_tokenizer
from megagpt.checkpoint.hf import export_hf, import_hf
from megagpt.checkpoint.open import CHECKPOINTS, open_checkpoint
from megagpt.checkpoint.rewrite import Writer, new_store, publish_alone
from megagpt.checkpoint.store import CheckpointStore, FileEntry, Manifest
from megagpt.checkpoint.tensors import MOMENTS, WEIGHT, RankFile, TensorSlice, rank_file, write_slices
from megagpt.config.load import dump_config
from megagpt.config.schema import (
    DataSection,
    GPT2Model,
    LlamaModel,
    OptimSection,
    RunSection,
    TrainingRun,
    TrainSection,
)
from megagpt.errors import CheckpointError
from megagpt.model.build import build_model
from megagpt.tokenizer import HFTokenizer, Tokenizer, open_tokenizer


def checkpoint_to_hf(checkpoint: Path, out: Path) -> str:
    """Write a checkpoint's weights and tokenizer as a folder that transformers loads.

    Returns:
        a sentence for the user.
    """
    opened = open_checkpoint(checkpoint)
    tokenizer_file = opened.path / "tokenizer.json"
    eot_id = opened.manifest.tokenizer["eot_id"] if opened.manifest.tokenizer is not None else None
    has_file = tokenizer_file.exists()
    export_hf(opened.load_model(), opened.model_config, tokenizer_file if has_file else None, out, eot_id=eot_id)
    note = "" if has_file else "; no tokenizer.json: bring the tokenizer from where it was published"
    return f"{out}: step {opened.step} of {opened.run_dir}{note}"


def hf_to_checkpoint(folder: Path, run_dir: Path) -> str:
    """Make a run whose step-0 checkpoint holds a published model's weights, with Adam's moments at zero.

    Evaluation and generation take the run as it is. To train on, give its folder as `run.dir` and the model section of
    its config.yaml.

    Returns:
        a sentence for the user.
    """
    new_store(run_dir)
    model, state = import_hf(folder)
    tokenizer_file = folder / "tokenizer.json"
    has_file = tokenizer_file.exists()
    _save_step_0(run_dir, model, state, open_tokenizer(tokenizer_file) if has_file else None)
    note = "" if has_file else "; the folder has no tokenizer.json, so text cannot be read or written"
    return f"{run_dir}: step 0 from {folder}{note}"


def gguf_to_checkpoint(file: Path, run_dir: Path, tokenizer: str | None = None) -> str:
    """Make a run whose step-0 checkpoint holds a GGUF file's weights in fp32, with Adam's moments at zero.

    Args:
        file: of llama.cpp's format, with a Llama in it.
        run_dir: of the new run.
        tokenizer: what `open_tokenizer` opens; None: the one in the file.

    Returns:
        a sentence for the user.
    """
    new_store(run_dir)
    model, state, header = import_gguf(file)
    if tokenizer is not None:
        opened = open_tokenizer(tokenizer)
    else:
        rebuilt = rebuild_tokenizer(header.metadata, model.vocab_size, str(file))
        opened = HFTokenizer(rebuilt, file)
    _save_step_0(run_dir, model, state, opened)
    notes = _left_out(header.metadata, opened)
    return "; ".join((f"{run_dir}: step 0 from {file}, tokenizer from {tokenizer or file}", *notes))


def _left_out(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    """What a GGUF file says about text and a run has no place for."""
    eos = metadata.get("tokenizer.ggml.eos_token_id", tokenizer.eot_id)
    if eos != tokenizer.eot_id:
        yield f"generation ends at token {tokenizer.eot_id}, which ends documents, not at the file's eos {eos}"
    if "tokenizer.chat_template" in metadata:
        yield "its chat template is not taken over"


def _save_step_0(
    run_dir: Path, model: GPT2Model | LlamaModel, state: Mapping[str, Tensor], tokenizer: Tokenizer | None
) -> None:
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding {model.vocab_size} rows; "
            "give the model's own"
        )
    config = _described_run(model, run_dir)
    slices = _whole_slices(model, state)
    writers: dict[str, Writer] = {rank_file(0): partial(write_slices, slices=slices)}
    publish_alone(
        CheckpointStore(run_dir / CHECKPOINTS),
        0,
        writers | (_tokenizer_writers(tokenizer) if tokenizer is not None else {}),
        partial(_manifest, config, tokenizer),
        RankFile.of(slices).n_bytes,
        {"config.yaml": dump_config(config).encode()},
    )


def _tokenizer_writers(tokenizer: Tokenizer) -> dict[str, Writer]:
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = tokenizer.save(Path(folder))
            return {file.name: partial(fsio.write_file, chunks=[file.read_bytes()])}
    except OSError as error:
        raise CheckpointError(f"{tempfile.gettempdir()}: the tokenizer cannot be written: {error}") from None


def _whole_slices(config: GPT2Model | LlamaModel, state: Mapping[str, Tensor]) -> list[TensorSlice]:
    with torch.device("meta"):
        names = [name for name, _ in build_model(config).named_parameters()]  # a tied head is named once
    slices = []
    for name in names:
        tensor = state[name]
        flat = tensor.float().reshape(-1)
        slices.append(
            TensorSlice(
                name,
                tuple(tensor.shape),
                0,
                {WEIGHT: flat, **{kind: torch.zeros_like(flat) for kind in MOMENTS}},
            )
        )
    return slices


def _described_run(model: GPT2Model | LlamaModel, run_dir: Path) -> TrainingRun:
    """A run that has not trained: only its model section means something."""
    return TrainingRun(
        run=RunSection(dir=run_dir),
        model=model,
        data=DataSection(train=Path("not-set")),
        optim=OptimSection(lr=1e-4),
        train=TrainSection(max_steps=1, global_batch_size=1, micro_batch_size=1),
    )


def _manifest(config: TrainingRun, tokenizer: Tokenizer | None, written: Mapping[str, FileEntry]) -> Manifest:
    return Manifest(
        step=0,
        files=written,
        state={"step": 0, "tokens": 0, "skipped_steps": 0, "engine": {"adam_step": 0}},
        config=json.loads(config.model_dump_json()),
        data_fingerprint=None,
        tokenizer=tokenizer.describe() if tokenizer is not None else None,
        versions={"megagpt": __version__},
    )
