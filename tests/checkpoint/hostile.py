"""Checkpoints made to harm who opens them. What the manifest says of the files is true: no checksum gives them away."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from megagpt.checkpoint import fsio

SHARD = "rank_00000.safetensors"
CANARY = "executed"
"""A file that every payload makes where it runs."""


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def encoded(content: Any) -> bytes:
    """A manifest as a save writes one."""
    content = {key: value for key, value in content.items() if key != "xxh3_128"}
    told = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return (json.dumps(content | {"xxh3_128": told}, indent=1, sort_keys=True) + "\n").encode()


def seal(folder: Path, **changes: Any) -> None:
    """Make the manifest true of the files, and lie in what is given."""
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    for name in sorted({*content["files"], *(file.name for file in folder.glob("rank_*"))}):
        if (folder / name).is_file():
            size, told = fsio.checksum((folder / name).resolve())
            content["files"][name] = {"bytes": size, "xxh3_128": told}
    path.write_bytes(encoded(content | changes))


def shard(content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / SHARD).write_bytes(content)
        seal(folder)

    return make


def manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: seal(folder, **changes)


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The shard with another header over the same data."""

    def make(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        length = int.from_bytes(content[:8], "little")
        told = json.loads(content[8 : 8 + length])
        changed = change(told)
        text = changed if isinstance(changed, bytes) else json.dumps(told if changed is None else changed).encode()
        (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        seal(folder)

    return make


NAME = "final_norm.bias"


def entry(**changes: Any) -> Callable[[Path], None]:
    return header(lambda told: told[f"{NAME}|weight"].update(changes))


def described(**changes: Any) -> Callable[[Path], None]:
    def change(told: dict[str, Any]) -> None:
        inner = json.loads(told["__metadata__"][NAME]) | changes
        told["__metadata__"][NAME] = json.dumps(inner)

    return header(change)


def swapped_offsets(told: dict[str, Any]) -> None:
    one, other = told[f"{NAME}|weight"], told[f"{NAME}|exp_avg"]
    one["data_offsets"] = other["data_offsets"]


def in_metadata(text: str) -> Callable[[Path], None]:
    return header(lambda told: told["__metadata__"].update({NAME: text}))


def twice(told: dict[str, Any]) -> bytes:
    text = json.dumps(told)
    key = f'"{NAME}|weight": '
    return text.replace(key, f'{key}{{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, {key}').encode()


def described_twice(told: dict[str, Any]) -> bytes:
    text = json.dumps(told)
    return text.replace('"__metadata__": {', f'"__metadata__": {{"{NAME}": "{{}}", ', 1).encode()


def sparse(size: int, first: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / SHARD).write_bytes(first)
        os.truncate(folder / SHARD, size)
        seal(folder)

    return make


def second_shard(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Another rank's file with the same slices."""

    def make(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        length = int.from_bytes(content[:8], "little")
        told = json.loads(content[8 : 8 + length])
        change(told)
        text = json.dumps(told).encode()
        (folder / "rank_00001.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        seal(folder)

    return make


def other_shape(told: dict[str, Any]) -> None:
    inner = json.loads(told["__metadata__"][NAME])
    told["__metadata__"][NAME] = json.dumps(inner | {"shape": [7 * inner["shape"][0]]})


def instead_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replaced(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replaced


def linked_shard(folder: Path) -> None:
    """The same bytes, elsewhere."""
    outside = folder.parent.parent / "outside"
    (folder / SHARD).rename(outside)
    (folder / SHARD).symlink_to(outside)
    seal(folder)


def model(**changes: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_bytes())
        content["config"]["model"].update(changes)
        seal(folder, config=content["config"])

    return make


def raw_manifest(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def files(**named: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_bytes())
        seal(folder, files=content["files"] | named)

    return make


def tokenizer(content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(content)
        told = json.loads((folder / "manifest.json").read_bytes())
        size, digest = fsio.checksum(folder / "tokenizer.json")
        seal(folder, files=told["files"] | {"tokenizer.json": {"bytes": size, "xxh3_128": digest}}, tokenizer={})

    return make


def hf(**contents: bytes) -> Callable[[Path], None]:
    """A Hugging Face folder instead of a checkpoint; `__` stands for a dot."""

    def make(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        config = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 2}
        (folder / "config.json").write_text(json.dumps(config))
        for name, content in contents.items():
            (folder / name.replace("__", ".")).write_bytes(content)

    return make


def saved_by_torch(**how: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"w": Payload()}, file, **how)
    return file.getvalue()


def zipped(n_bytes: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../escaped", bytes(n_bytes))
    return file.getvalue()


def array_of_objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
    return file.getvalue()


PICKLE = pickle.dumps(Payload())
DEEP = b"[" * 200_000
ENTRY = {"bytes": 1, "xxh3_128": "0" * 32}

HOSTILE: dict[str, Callable[[Path], object]] = {
    "a pickle for a shard": shard(PICKLE),
    "a pickle of protocol 0": shard(pickle.dumps(Payload(), 0)),
    "a torch.save file": shard(saved_by_torch()),
    "an old torch.save file": shard(saved_by_torch(_use_new_zipfile_serialization=False)),
    "an array of objects": shard(array_of_objects()),
    "a pickle behind a header length": shard(struct.pack("<Q", len(PICKLE)) + PICKLE),
    "a zip bomb that escapes": shard(zipped(50_000_000)),
    "a gzip bomb": shard(gzip.compress(bytes(50_000_000))),
    "nothing": shard(b""),
    "seven bytes": shard(b"\0" * 7),
    "a header length of 2^64-1": shard(b"\xff" * 8 + b"{}"),
    "a header length of 2^63": shard(struct.pack("<Q", 2**63) + b"{}"),
    "a header that is one byte too long": shard(struct.pack("<Q", 3) + b"{}"),
    "a header of no bytes": shard(struct.pack("<Q", 0)),
    "a header of 150 MB of nothing": sparse(150_000_008, struct.pack("<Q", 150_000_000)),
    "a header of 90 MB of nothing": sparse(90_000_008, struct.pack("<Q", 90_000_000)),
    "a deep header": header(lambda told: DEEP),
    "a list for a header": header(lambda told: [1]),
    "a number for a header": header(lambda told: b"1"),
    "a header in UTF-16": header(lambda told: json.dumps(told).encode("utf-16")),
    "a tensor that stands twice": header(twice),
    "a description that stands twice": header(described_twice),
    "tensors that overlap": header(swapped_offsets),
    "offsets behind the end": entry(data_offsets=[10**9, 10**9 + 96]),
    "offsets below zero": entry(data_offsets=[-96, 0]),
    "offsets in the wrong order": entry(data_offsets=[96, 0]),
    "offsets that are text": entry(data_offsets=["0", "96"]),
    "offsets of 5,000 digits": header(lambda told: json.dumps(told).replace("[0,", "[" + "9" * 5000 + ",").encode()),
    "three offsets": entry(data_offsets=[0, 1, 2]),
    "another type of values": entry(dtype="F64"),
    "an unknown type of values": entry(dtype="__import__('os')"),
    "a shape of 10^18": entry(shape=[10**18]),
    "a shape below zero": entry(shape=[-24]),
    "a shape that is true": entry(shape=[True]),
    "a matrix": entry(shape=[4, 6]),
    "no dtype": header(lambda told: told[f"{NAME}|weight"].pop("dtype") and None),
    "data behind the last tensor": lambda folder: shard((folder / SHARD).read_bytes() + b"more")(folder),
    "a tensor that is not described": header(lambda told: told["__metadata__"].pop(NAME) and None),
    "a description without a tensor": header(lambda told: told["__metadata__"].update(x="{}")),
    "a tensor without a weight": header(lambda told: told.update({f"{NAME}|other": told.pop(f"{NAME}|weight")})),
    "a deep description": in_metadata(DEEP.decode()),
    "a description that is no JSON": in_metadata("!!python/object/apply:os.system ['touch executed']"),
    "a start below zero": described(start=-1),
    "a start behind the end": described(start=20),
    "a start that is no number": described(start="0"),
    "a logical shape of 2^124": described(shape=[2**62, 2**62]),
    "a logical shape of 2^61": described(shape=[2**61]),
    "a logical shape that is text": described(shape="24"),
    "a shard of no dimension": described(shard={"dim": 5, "spans": [[0, 24]]}),
    "a shard of dimension -1": described(shard={"dim": -1, "spans": [[0, 24]]}),
    "a shard that overlaps itself": described(shard={"dim": 0, "spans": [[0, 24], [0, 24]]}),
    "a shard below zero": described(shard={"dim": 0, "spans": [[-24, 24]]}),
    "a shard of 10^12": described(shard={"dim": 0, "spans": [[0, 10**12]]}),
    "a shard of 100,000 empty stretches": described(shard={"dim": 0, "spans": [[0, 0]] * 100_000}),
    "two ranks with the same values": second_shard(lambda told: None),
    "two ranks that differ about a shape": second_shard(other_shape),
    "a manifest that is a pickle": raw_manifest(PICKLE),
    "a deep manifest": raw_manifest(DEEP),
    "a deep object": raw_manifest(b'{"a":' * 200_000),
    "a manifest of 100 MB": lambda folder: os.truncate(folder / "manifest.json", 100_000_000),
    "a manifest that is a link": instead_of("manifest.json", lambda path: path.symlink_to("/etc/passwd")),
    "a manifest that is a pipe": instead_of("manifest.json", os.mkfifo),
    "a manifest that is a folder": instead_of("manifest.json", Path.mkdir),
    "a manifest without end": instead_of("manifest.json", lambda path: path.symlink_to("/dev/zero")),
    "a shard that is a link": linked_shard,
    "a shard that is a pipe": instead_of(SHARD, os.mkfifo),
    "a shard without end": instead_of(SHARD, lambda path: path.symlink_to("/dev/zero")),
    "a shard that is a folder": instead_of(SHARD, Path.mkdir),
    "a file above the folder": files(**{"../outside": ENTRY}),
    "a file by its absolute path": files(**{"/etc/passwd": ENTRY}),
    "a file in a folder": files(**{"a/b.safetensors": ENTRY}),
    "the folder itself": files(**{".": ENTRY}),
    "the folder above": files(**{"..": ENTRY}),
    "a file without a name": files(**{"": ENTRY}),
    "a name with a zero in it": files(**{"a\0b": ENTRY}),
    "fewer than no bytes": files(**{SHARD: {"bytes": -1, "xxh3_128": "0" * 32}}),
    "true bytes": files(**{SHARD: {"bytes": True, "xxh3_128": "0" * 32}}),
    "a checksum that is a number": files(**{SHARD: {"bytes": 1, "xxh3_128": 0}}),
    "an entry of another kind": files(**{SHARD: {"bytes": 1, "xxh3_128": "0" * 32, "run": "touch executed"}}),
    "a list of files": manifest(files=[SHARD]),
    "no files": manifest(files={}),
    "a step that is text": manifest(step="2"),
    "a step below zero": manifest(step=-2),
    "another step": manifest(step=3),
    "a format of the future": manifest(format=2),
    "a state that is a list": manifest(state=[]),
    "a configuration that is text": manifest(config="!!python/object/apply:os.system ['touch executed']"),
    "a configuration without a model": manifest(config={}),
    "a model that is a list": manifest(config={"model": []}),
    "a tokenizer that is a list": manifest(tokenizer=[]),
    "a key that is not known": manifest(execute="touch executed"),
    "a model of 10^9 layers": model(n_layer=10**9),
    "a vocabulary of 10^12": model(vocab_size=10**12),
    "heads below zero": model(n_head=-2),
    "another model": model(n_layer=1),
    "a tokenizer that is a pickle": tokenizer(PICKLE),
    "a deep tokenizer": tokenizer(DEEP),
    "Hugging Face, a pickle alone": hf(pytorch_model__bin=saved_by_torch()),
    "Hugging Face, a pickle for tensors": hf(model__safetensors=PICKLE),
    "Hugging Face, a header that lies": hf(model__safetensors=b"\xff" * 8),
    "Hugging Face, a deep configuration": hf(config__json=DEEP, model__safetensors=b""),
    "Hugging Face, an index that escapes": hf(
        model__safetensors__index__json=json.dumps({"weight_map": {"w": "../../outside"}}).encode()
    ),
    "Hugging Face, an index of pickles": hf(
        model__safetensors__index__json=json.dumps({"weight_map": {"w": "a.bin"}}).encode(), a__bin=saved_by_torch()
    ),
    "Hugging Face, an index that is a list": hf(model__safetensors__index__json=b"[]"),
}
