"""manifest.json and mixture.yaml: what the token files of a job hold, what made them, how training mixes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.config import MixtureSection, PackSection
from data_pipeline.mixture import write_mixture
from data_pipeline.tasks import Counts, Progress, hash_json
from megagpt.data.indexed import bin_path, idx_path
from megagpt.data.manifest import FileDigest, Manifest, TokenFileEntry, write_manifest
from megagpt.tokenizer import open_tokenizer


def write_manifest_of(
    folder: Path,
    packed: Mapping[str, Any],
    outputs: Mapping[str, Mapping[str, Any]],
    tokenizer_spec: str,
    job: dict[str, Any],
    progress: Progress | None = None,
) -> Counts:
    """Write manifest.json and mixture.yaml for the packed files. The token files are not read again.

    Args:
        folder: where to.
        packed: the detail of `write_packed`.
        outputs: the files of its record: name -> size and hash, taken when they were written.
        tokenizer_spec: what `open_tokenizer` opens.
        job: the configuration, without what cannot change the tokens; JSON values.
        progress: called with bytes of the token files.

    Raises:
        ConfigError: the mixture does not fit the sources.
    """
    entries = {name: _entry(name, values, outputs) for name, values in packed["files"].items()}
    tokenizer = open_tokenizer(tokenizer_spec).describe()
    write_manifest(folder, Manifest(tokenizer=tokenizer, files=entries, job=job, job_hash=hash_json(job)))
    pack, mixture = PackSection.model_validate(job["pack"]), MixtureSection.model_validate(job["mixture"])
    mixed = write_mixture(folder, packed, pack, mixture)
    if progress is not None:
        progress(sum(entry.bin.bytes for entry in entries.values()), 0)
    n_documents = sum(entry.n_documents for entry in entries.values())
    return Counts(n_documents, n_documents, detail={"mixture": mixed})


def _entry(name: str, values: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]]) -> TokenFileEntry:
    digests = [FileDigest(**outputs[path(Path(name)).name]) for path in (bin_path, idx_path)]
    return TokenFileEntry(
        n_tokens=values["tokens"],
        n_documents=values["documents"],
        dtype=values["dtype"],
        max_token_id=values["max_token_id"],
        bin=digests[0],
        idx=digests[1],
        text_bytes=values["text_bytes"],
        sources=values["sources"],
    )
