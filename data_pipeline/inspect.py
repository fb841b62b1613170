"""`megagpt data inspect PATH`: are these token files what they claim to be, and what is in them?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megagpt.data.indexed import TokenFile, bin_path, idx_path
from megagpt.data.manifest import MANIFEST_NAME, read_manifest, verify_token_file
from megagpt.errors import DataError
from megagpt.tokenizer import SAVED_FOLDER, Tokenizer, open_tokenizer

_SAMPLE_TOKENS = 200
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_LENGTHS_LOOKED_AT = 1_000_000


def inspect(path: Path, n_samples: int = 3) -> str:
    """Verify token files and describe them.

    Args:
        path: prefix of a .bin/.idx pair, either of its files, or the folder of a data job.
        n_samples: documents to show of each pair, spread evenly over the file; their first tokens.

    Raises:
        DataError: a file is missing, cut or damaged, or its size or hash is not what manifest.json says.
    """
    prefixes = _prefixes(path)
    tokenizer = _find_tokenizer(prefixes[0].parent)
    return "\n".join(_describe(prefix, tokenizer, n_samples) for prefix in prefixes)


def _prefixes(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path.with_suffix("") if path.suffix in (".bin", ".idx") else path]
    manifest = read_manifest(path)
    if manifest is not None:
        return [path / name for name in sorted(manifest.files)]
    found = sorted(
        {file.with_suffix("") for file in path.glob("*.idx")} | {f.with_suffix("") for f in path.glob("*.bin")}
    )
    if not found:
        raise DataError(f"{path}: neither {MANIFEST_NAME} nor token files (.bin/.idx) in this folder")
    return found


def _find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that lies beside the files, if it is the one that the manifest names."""
    manifest = read_manifest(folder)
    if not (folder / SAVED_FOLDER).is_dir():
        return None
    tokenizer = open_tokenizer(folder / SAVED_FOLDER)
    named = manifest.tokenizer.get("fingerprint") if manifest is not None else None
    if named is not None and named != tokenizer.fingerprint:
        raise DataError(
            f"{folder / SAVED_FOLDER}: fingerprint {tokenizer.fingerprint}, but {folder / MANIFEST_NAME} says that "
            f"the tokens were made with {named}"
        )
    return tokenizer


def _describe(prefix: Path, tokenizer: Tokenizer | None, n_samples: int) -> str:
    token_file = TokenFile.open(prefix)
    lines = [str(prefix), *_verification(prefix)]
    sizes = [path(prefix).stat().st_size for path in (bin_path, idx_path)]
    lines += [
        f"  documents      {token_file.n_documents:,}",
        f"  tokens         {token_file.n_tokens:,}",
        f"  dtype          {token_file.dtype.name}",
        f"  size           {sizes[0]:,} + {sizes[1]:,} bytes (.bin, .idx)",
        f"  tokens a doc   {_length_quantiles(token_file)}",
    ]
    lines.append("  tokenizer      " + ("unknown" if tokenizer is None else _name(tokenizer)))
    chosen = np.unique(np.linspace(0, token_file.n_documents - 1, n_samples).astype(np.int64))
    for i in chosen.tolist() if token_file.n_documents else []:
        lines += ["", f"  document {i}:", *_sample(token_file, tokenizer, i)]
    return "\n".join(lines) + "\n"


def _verification(prefix: Path) -> list[str]:
    manifest = read_manifest(prefix)
    if manifest is None or prefix.name not in manifest.files:
        return [f"  verified       sizes and offsets; {MANIFEST_NAME} does not exist or list it, so no hashes"]
    verify_token_file(prefix)
    entry = manifest.files[prefix.name]
    return [
        f"  verified       sizes, offsets and hashes (xxh3_128 {entry.bin.xxh3_128})",
        f"  text           {entry.text_bytes:,} bytes ({entry.text_bytes / max(entry.n_tokens, 1):.2f} a token)",
        *(f"  source         {name}: {_counted(values)}" for name, values in entry.sources.items()),
    ]


def _counted(values: object) -> str:
    """What a manifest says of a source: of our own jobs, documents, tokens and bytes of text."""
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(
        f"{number:,} {name.replace('_', ' ')}" if isinstance(number, int) else f"{name} {number}"
        for name, number in values.items()
    )


def _length_quantiles(token_file: TokenFile) -> str:
    n = token_file.n_documents
    if n == 0:
        return "no documents"
    step = -(-n // _LENGTHS_LOOKED_AT)
    lengths = np.array([len(token_file.document(i)) for i in range(0, n, step)])
    values = np.quantile(lengths, _QUANTILES, method="nearest")
    shown = "  ".join(f"{q:.0%} {int(v):,}" for q, v in zip(_QUANTILES, values, strict=True))
    return shown if step == 1 else f"{shown}  (of every {step}th document)"


def _name(tokenizer: Tokenizer) -> str:
    facts = tokenizer.describe()
    return f"{facts['kind']}, {facts['vocab_size']:,} tokens, fingerprint {facts['fingerprint']}"


def _sample(token_file: TokenFile, tokenizer: Tokenizer | None, i: int) -> list[str]:
    tokens = token_file.document(i)
    shown = tokens[:_SAMPLE_TOKENS].tolist()
    text = " ".join(map(str, shown)) if tokenizer is None else tokenizer.decode(shown)
    more = f" ... ({len(tokens) - len(shown):,} more tokens)" if len(tokens) > len(shown) else ""
    return [f"    | {line}" for line in (text + more).splitlines()]
