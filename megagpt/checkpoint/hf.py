"""Weights and sizes in Hugging Face's format, both ways: GPT-2, Llama, and Qwen3 (which is Llama with QK-norm).

Files are safetensors only. Neither direction needs `transformers`. One table per family says which of our tensors is
which of theirs; everything else follows from it. What the configuration cannot express is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from megagpt.atomic import temporary_name
from megagpt.checkpoint import fsio
from megagpt.checkpoint.hf_config import ModelConfig, model_from_hf_config, model_to_hf_config
from megagpt.config.schema import GPT2Model
from megagpt.errors import CheckpointError
from megagpt.model.build import build_model


@dataclass(frozen=True, slots=True)
class Entry:
    """One of our tensors, and the Hugging Face tensors that make it when joined along the rows."""

    name: str
    parts: tuple[str, ...]
    part_rows: tuple[int, ...] = ()
    """Rows of each part, where there are several."""
    transposed: bool = False
    """Theirs is (in, out): GPT-2's Conv1D."""

    def to_hf(self, ours: Tensor) -> dict[str, Tensor]:
        """Cut one tensor of ours into theirs."""
        cuts = torch.split(ours, list(self.part_rows)) if self.part_rows else (ours,)
        return {
            part: (cut.t() if self.transposed else cut).contiguous() for part, cut in zip(self.parts, cuts, strict=True)
        }

    def from_hf(self, theirs: Mapping[str, Tensor]) -> Tensor:
        """Join theirs into ours."""
        cuts = [theirs[part].t() if self.transposed else theirs[part] for part in self.parts]
        return torch.cat(cuts) if len(cuts) > 1 else cuts[0].contiguous()


def hf_entries(config: ModelConfig) -> Iterator[Entry]:
    """Every parameter of the model, a tied head once."""
    yield from _gpt2_entries(config.n_layer) if isinstance(config, GPT2Model) else _llama_entries(config)


def model_to_hf_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict -> Hugging Face's, without a tied head (they tie it again on loading).

    Raises:
        CheckpointError: a parameter is missing, or one is not this model's.
    """
    entries = list(hf_entries(config))
    known = {entry.name for entry in entries} | ({"head.weight"} if _is_tied(config) else set())
    check_names("the model's state", set(state), {entry.name for entry in entries}, known)
    converted: dict[str, Tensor] = {}
    for entry in entries:
        converted.update(entry.to_hf(state[entry.name]))
    return converted


def hf_state_to_model(config: ModelConfig, theirs: Mapping[str, Tensor], where: str = "weights") -> dict[str, Tensor]:
    """Hugging Face's state dict -> ours, for a strict `load_state_dict`.

    Raises:
        CheckpointError: a tensor is missing, unknown, or a head that should be tied differs from the embedding.
    """
    entries = list(hf_entries(config))
    theirs = {with_prefix(config, name): tensor for name, tensor in theirs.items() if not _is_buffer(name)}
    needed = {part for entry in entries for part in entry.parts}
    check_names(where, set(theirs), needed, needed | {_HF_HEAD})
    state = {entry.name: entry.from_hf(theirs) for entry in entries}
    if _is_tied(config):
        state["head.weight"] = state["embedding.tokens.weight"]
        if _HF_HEAD in theirs and not torch.equal(theirs[_HF_HEAD], state["head.weight"]):
            raise CheckpointError(f"{where}: {_HF_HEAD} differs from the embedding although the head is tied")
    return state


def import_hf(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read config.json and the safetensors files of a Hugging Face model folder.

    Returns:
        The model's sizes, and a state dict for `build_model(config).load_state_dict(state)`, in the files' types.

    Raises:
        CheckpointError: no folder, no safetensors, damaged files, or a model that cannot be expressed.
    """
    config_file = folder / "config.json"
    config = model_from_hf_config(_read_json(config_file), str(config_file))
    theirs: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            theirs.update(load_file(file))
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{file}: not a complete safetensors file: {error}") from None
    state = hf_state_to_model(config, theirs, str(folder))
    _check_shapes(config, state, folder)
    return config, state


def export_hf(
    model: nn.Module | Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_file: Path | None,
    folder: Path,
    *,
    eot_id: int | None = None,
) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Args:
        model: the model, or its state dict.
        config: its sizes.
        tokenizer_file: a `tokenizer.json` to copy, or None.
        folder: must not exist yet; it appears complete or not at all.
        eot_id: token that ends a document, written as theirs for beginning and end of text.

    Raises:
        CheckpointError: the folder exists, or the weights are not this model's.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; name a folder that does not, or remove it")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    theirs = {name: tensor.detach().cpu() for name, tensor in model_to_hf_state(config, state).items()}
    dtype = str(next(iter(theirs.values())).dtype).removeprefix("torch.")
    temporary = temporary_name(folder)
    if temporary.exists():
        fsio.remove_tree(temporary)
    fsio.make_dir(temporary)
    _write_json(temporary / "config.json", model_to_hf_config(config, dtype, eot_id))
    fsio.write_file(temporary / "model.safetensors", [save(theirs, metadata={"format": "pt"})])
    if tokenizer_file is not None:
        fsio.write_file(temporary / "tokenizer.json", [tokenizer_file.read_bytes()])
        _write_json(temporary / "tokenizer_config.json", _tokenizer_config(config, tokenizer_file, eot_id))
    fsio.flush_folder(temporary)
    fsio.publish(temporary, folder)


_HF_HEAD = "lm_head.weight"


def _gpt2_entries(n_layer: int) -> Iterator[Entry]:
    yield Entry("embedding.tokens.weight", ("transformer.wte.weight",))
    yield Entry("embedding.positions.weight", ("transformer.wpe.weight",))
    matrices = {
        "attention.qkv": "attn.c_attn",  # the same order of rows: q, k, v
        "attention.output": "attn.c_proj",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    norms = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
    for layer in range(n_layer):
        for ours, theirs in (matrices | norms).items():
            name, part = f"blocks.{layer}.{ours}", f"transformer.h.{layer}.{theirs}"
            yield Entry(f"{name}.weight", (f"{part}.weight",), transposed=ours in matrices)
            yield Entry(f"{name}.bias", (f"{part}.bias",))
    yield Entry("final_norm.weight", ("transformer.ln_f.weight",))
    yield Entry("final_norm.bias", ("transformer.ln_f.bias",))


def _llama_entries(config: Any) -> Iterator[Entry]:
    d_head = config.d_model // config.n_head
    kv_rows = config.n_kv_head * d_head
    yield Entry("embedding.tokens.weight", ("model.embed_tokens.weight",))
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        yield Entry(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",))
        yield Entry(
            f"{ours}.attention.qkv.weight",
            tuple(f"{attention}.{part}_proj.weight" for part in "qkv"),
            (config.d_model, kv_rows, kv_rows),
        )
        if config.qk_norm:
            yield Entry(f"{ours}.attention.qk_norm.query_weight", (f"{attention}.q_norm.weight",))
            yield Entry(f"{ours}.attention.qk_norm.key_weight", (f"{attention}.k_norm.weight",))
        yield Entry(f"{ours}.attention.output.weight", (f"{attention}.o_proj.weight",))
        yield Entry(f"{ours}.feed_forward_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))
        yield Entry(
            f"{ours}.feed_forward.gate_up.weight",
            (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            (config.d_ff, config.d_ff),
        )
        yield Entry(f"{ours}.feed_forward.down.weight", (f"{mlp}.down_proj.weight",))
    yield Entry("final_norm.weight", ("model.norm.weight",))
    if not config.tied_head:
        yield Entry("head.weight", (_HF_HEAD,))


def _is_tied(config: ModelConfig) -> bool:
    return isinstance(config, GPT2Model) or config.tied_head


def _is_buffer(name: str) -> bool:
    """Old files hold masks and rotary frequencies, which follow from the sizes."""
    return name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))


def with_prefix(config: ModelConfig, name: str) -> str:
    """OpenAI's GPT-2 files on the hub leave out `transformer.`."""
    bare = isinstance(config, GPT2Model) and name.startswith(("wte.", "wpe.", "h.", "ln_f."))
    return f"transformer.{name}" if bare else name


def check_names(where: str, found: set[str], needed: set[str], known: set[str]) -> None:
    """Compare the names that are there with those that must and may be.

    Raises:
        CheckpointError: naming the first that are missing or unknown.
    """
    missing, unknown = sorted(needed - found), sorted(found - known)
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{where}: {problem} tensors: {', '.join(names[:3])}{more}; not the model of its config"
            )


def _check_shapes(config: ModelConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, but config.json says {tuple(expected[name].shape)}"
            )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files, by the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(_indexed(index))]
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        raise CheckpointError(
            f"{folder}: {pickles[0]} is a pickle, which can run any code when it is read; "
            "convert it to model.safetensors first (transformers: save_pretrained)"
        )
    raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _indexed(index: Path) -> set[str]:
    """Names of the files in an index, all of them beside it."""
    named = _read_json(index).get("weight_map")
    names = set(map(str, named.values())) if isinstance(named, dict) else set()
    outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if outside or not names:
        raise CheckpointError(f"{index}: weight_map must name safetensors files beside it, found {outside or named!r}")
    return names


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; name the folder of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, found {type(content).__name__}")
    return content


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    fsio.write_file(file, [json.dumps(content, indent=2).encode() + b"\n"])


def _tokenizer_config(config: ModelConfig, tokenizer_file: Path, eot_id: int | None) -> dict[str, Any]:
    added = _read_json(tokenizer_file).get("added_tokens", [])
    eot = {token["id"]: token["content"] for token in added}.get(eot_id)
    special = {} if eot is None else {"bos_token": eot, "eos_token": eot, "unk_token": eot}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_seq_len, **special}
