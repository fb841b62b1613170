"""Models, a tokenizer and checkpoints for the eval tests: made here, small, random."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evals.backend import MegaGPTLM
from megagpt.checkpoint.store import CheckpointStore, FileEntry, Manifest
from megagpt.checkpoint.tensors import KINDS, TensorSlice, write_slices
from megagpt.config.schema import GPT2Model, LlamaModel, TrainingRun
from megagpt.data.indexed import TokenFileWriter
from megagpt.data.manifest import Manifest as DataManifest
from megagpt.data.manifest import describe_file, write_manifest
from megagpt.model.build import build_model
from megagpt.model.decoder import Decoder
from megagpt.model.init import init_weights
from megagpt.tokenizer import Tokenizer, open_tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "evals"
"""Real benchmark files, where they lie beside the checkout."""
VOCAB_SIZE = 384
CONTEXT = 192
TEXT = [
    "The quick brown fox jumps over the lazy dog, then sleeps under the old apple tree until Tuesday.",
    "Question: How many legs does a dog have? Answer: four. Word: green. Again: green.",
    "A function returns a value; the list holds three strings and one integer.",
]

CONFIGS = {
    "gpt2": GPT2Model(family="gpt2", n_layer=2, n_head=2, d_model=32, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT),
    "llama": LlamaModel(
        family="llama",
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        d_model=32,
        d_ff=64,
        vocab_size=VOCAB_SIZE,
        max_seq_len=CONTEXT,
    ),
}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        TEXT * 3, vocab_size=VOCAB_SIZE, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return open_tokenizer(tokenizer_file)


def random_model(family: str = "gpt2", seed: int = 0) -> Decoder:
    """Weights five times the usual size: answers differ clearly from each other."""
    return _random(CONFIGS[family], seed)


def scaled_up(family: str, **sizes: int) -> tuple[Decoder, GPT2Model | LlamaModel]:
    """A random model of other sizes, and its configuration."""
    config = CONFIGS[family].model_copy(update=sizes)
    return _random(config, 0), config


def _random(config: GPT2Model | LlamaModel, seed: int) -> Decoder:
    model = build_model(config)
    init_weights(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()


@pytest.fixture(scope="session")
def model() -> Decoder:
    return random_model()


@pytest.fixture
def lm(model: Decoder, tokenizer: Tokenizer) -> MegaGPTLM:
    return MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, batch_size=4)


def save_run(
    run_dir: Path, tokenizer: Tokenizer, *, step: int = 10, seed: int = 0, family: str = "gpt2", nudge: float = 0.0
) -> Path:
    """A run's folder with one published checkpoint and validation tokens; returns it.

    `nudge` is added to one single weight. Of family llama it trained with Muon, which not every layout can do.
    """
    data = run_dir.parent / f"{run_dir.name}_data"
    text = TEXT * 40
    prefix = data / "tokens_val"
    with TokenFileWriter(prefix, "<u2") as writer:
        for document in text:
            writer.add_document([*tokenizer.encode(document), tokenizer.eot_id])
    n_bytes = sum(len(document.encode()) for document in text)
    entry = describe_file(prefix, text_bytes=n_bytes, sources={})
    write_manifest(data, DataManifest(tokenizer.describe(), {prefix.name: entry}, {}, ""))
    config = TrainingRun.model_validate_json(
        json.dumps(
            {
                "run": {"dir": str(run_dir)},
                "model": CONFIGS[family].model_dump(mode="json"),
                "data": {"train": str(prefix), "val": str(prefix)},
                "optim": {"lr": 1e-3, "name": "muon" if family == "llama" else "adamw"},
                "train": {"max_steps": 10, "global_batch_size": 1, "micro_batch_size": 1},
            }
        )
    )
    store = CheckpointStore(run_dir / "checkpoints")
    store.folder.mkdir(parents=True)
    staging = store.begin(step)
    model = random_model(family, seed)
    with torch.no_grad():
        next(model.parameters())[0, 0] += nudge
    slices = [
        TensorSlice(name, tuple(p.shape), 0, dict.fromkeys(KINDS, p.detach().flatten().float()))
        for name, p in model.named_parameters()
    ]
    files = {"rank_00000.safetensors": FileEntry(*write_slices(staging / "rank_00000.safetensors", slices))}
    saved = tokenizer.save(staging)
    content = saved.read_bytes()
    import xxhash

    files[saved.name] = FileEntry(len(content), xxhash.xxh3_128_hexdigest(content))
    plain = json.loads(config.model_dump_json())
    store.publish(Manifest(step, files, {"step": step}, plain, "", tokenizer.describe(), {}))
    return run_dir
