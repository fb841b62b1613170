"""Small files of several units each, ways to damage them, and what a reader owes of them afterwards."""

from __future__ import annotations

import gzip
import io
import json
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_pipeline.config import Source
from data_pipeline.document import Damage
from data_pipeline.memory import peak_rss_bytes
from data_pipeline.sources.shards import list_shards, read_shard

LIMIT_SECONDS = 5.0
"""Processor time in which a file of a few kilobytes has to be read, however damaged."""


@dataclass(frozen=True)
class Unit:
    """What a file is damaged by: a gzip member, a zstd block, a plain WARC record, a row group.

    Its records are intact if no byte of `needs` was touched: its own bytes and those without which it cannot be decoded
    by anyone (a zstd block: its frame up to its end; a row group: the footer).
    """

    texts: tuple[str, ...]
    needs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sample:
    name: str
    data: bytes
    units: tuple[Unit, ...]
    checked: bool = False
    """Everything that is given out has passed a checksum: nothing altered may come out."""
    absolute: bool = False
    """Units are found by absolute offsets: one that moved is not intact."""


def words(draw: random.Random, n: int) -> str:
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyzé", k=draw.randrange(2, 9))) for _ in range(n))


def _joined(name: str, parts: list[bytes], texts: list[list[str]], **flags: bool) -> Sample:
    units, at = [], 0
    for part, own in zip(parts, texts, strict=True):
        units.append(Unit(tuple(own), ((at, at + len(part)),)))
        at += len(part)
    return Sample(name, b"".join(parts), tuple(units), **flags)


def _response(n: int, text: str) -> bytes:
    block = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<p>{text}</p>".encode()
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.b/{n}\r\nContent-Length: {len(block)}\r\n\r\n"
    return head.encode() + block + b"\r\n\r\n"


def _line(text: str) -> bytes:
    return json.dumps({"text": text, "meta": {"pile_set_name": "Ponds"}}).encode() + b"\n"


_zstd = zstandard.ZstdCompressor(write_checksum=True)


def warc_gz(draw: random.Random) -> Sample:
    texts = [words(draw, draw.randrange(30, 120)) for _ in range(12)]
    parts = [gzip.compress(_response(n, text), mtime=0) for n, text in enumerate(texts)]
    return _joined("x.warc.gz", parts, [[text] for text in texts], checked=True)


def warc_zst(draw: random.Random) -> Sample:
    texts = [words(draw, draw.randrange(30, 120)) for _ in range(12)]
    parts = [_zstd.compress(_response(n, text)) for n, text in enumerate(texts)]
    return _joined("x.warc.zst", parts, [[text] for text in texts], checked=True)


def warc_plain(draw: random.Random) -> Sample:
    texts = [words(draw, draw.randrange(30, 120)) for _ in range(12)]
    return _joined("x.warc", [_response(n, text) for n, text in enumerate(texts)], [[text] for text in texts])


def jsonl_gz(draw: random.Random) -> Sample:
    texts = [[words(draw, draw.randrange(5, 60)) for _ in range(8)] for _ in range(8)]
    return _joined("x.jsonl.gz", [gzip.compress(b"".join(map(_line, own)), mtime=0) for own in texts], texts)


def jsonl_zst(draw: random.Random) -> Sample:
    units: list[Unit] = []
    data = b""
    for _ in range(4):
        begin = len(data)
        compressor = _zstd.compressobj()
        for block in range(4):
            own = [words(draw, draw.randrange(5, 60)) for _ in range(5)]
            last = block == 3
            data += compressor.compress(b"".join(map(_line, own)))
            data += compressor.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH if last else zstandard.COMPRESSOBJ_FLUSH_BLOCK)
            units.append(Unit(tuple(own), ((begin, len(data)),)))
    return Sample("x.jsonl.zst", data, tuple(units))


def parquet(draw: random.Random) -> Sample:
    texts = [words(draw, draw.randrange(5, 30)) for _ in range(120)]
    table = pa.table({"text": texts, "url": [f"http://a.b/{n}" for n in range(120)], "meta": ['{"k": 1}'] * 120})
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=20,
        compression=draw.choice(["zstd", "snappy", "none"]),
        use_dictionary=draw.random() < 0.5,
        write_page_checksum=draw.random() < 0.5,
        data_page_size=draw.choice([1500, 2**20]),
    )
    data = buffer.getvalue()
    footer = (len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data))
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    units = []
    for group in range(metadata.num_row_groups):
        chunks = [metadata.row_group(group).column(column) for column in range(3)]
        spans = [
            (start, start + chunk.total_compressed_size)
            for chunk in chunks
            for start in [chunk.dictionary_page_offset or chunk.data_page_offset]
        ]
        units.append(Unit(tuple(texts[group * 20 : group * 20 + 20]), (*spans, footer)))
    return Sample("x.parquet", data, tuple(units), absolute=True)


FORMATS: dict[str, tuple[Callable[[random.Random], Sample], int]] = {
    "warc_gz": (warc_gz, 2800),
    "warc_zst": (warc_zst, 1000),
    "warc_plain": (warc_plain, 1000),
    "jsonl_gz": (jsonl_gz, 1200),
    "jsonl_zst": (jsonl_zst, 2000),
    "parquet": (parquet, 2000),
}
"""Format -> maker of a sample, and how many mutants of it are read: 10,000 in all."""


def mutate(draw: random.Random, sample: Sample) -> tuple[bytes, list[tuple[int, int]]]:
    """Damaged bytes, and the ranges of the old ones that were changed, left out or torn apart."""
    data = bytearray(sample.data)
    size = len(data)
    kind = draw.choice(["flip", "truncate", "delete", "insert", "overwrite", "duplicate"])
    at, n_bytes = draw.randrange(size), draw.choice([1, 7, 60, 400])
    end = min(at + n_bytes, size)
    moved = [(at, size)] if sample.absolute else []
    if kind == "flip":
        places = [draw.randrange(size) for _ in range(draw.choice([1, 1, 3]))]
        for place in places:
            data[place] ^= 1 << draw.randrange(8)
        return bytes(data), [(place, place + 1) for place in places]
    if kind == "truncate":
        return bytes(data[:at]), [(at, size)]
    if kind == "delete":
        del data[at:end]
        return bytes(data), moved or [(at, end)]
    start = draw.randrange(size)
    piece = draw.randbytes(n_bytes) if kind == "insert" else sample.data[start : start + end - at]
    if kind == "overwrite":
        data[at : at + len(piece)] = piece
        return bytes(data), [(at, min(at + len(piece), size))]
    data[at:at] = piece
    return bytes(data), moved or [(at, at)]


def is_touched(unit: Unit, touched: list[tuple[int, int]]) -> bool:
    # An insertion (start == end) touches what it tears apart, not what it lies between.
    return any(
        start < high and end > low if start < end else low < start < high
        for low, high in unit.needs
        for start, end in touched
    )


class TooSlow(BaseException):
    """Reading took longer than LIMIT_SECONDS of processor time."""


@contextmanager
def time_limit() -> Iterator[None]:
    def on_timer(number: int, frame: object) -> None:
        raise TooSlow

    old = signal.signal(signal.SIGPROF, on_timer)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


@dataclass
class Tally:
    """What became of many mutants."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def read(self, sample: Sample, seed: int, data: bytes, touched: list[tuple[int, int]], folder: Path) -> None:
        path = folder / sample.name
        path.write_bytes(data)
        source = Source(path=str(path))
        with time_limit():
            found = list(read_shard(list_shards(source, 0)[0], source))
        damages = [one for one in found if isinstance(one, Damage)]
        records = [one for one in found if not isinstance(one, Damage)]
        texts = [record.text or record.html.decode(errors="replace")[3:-4] for record in records if not record.reject]
        self._compare(sample, seed, touched, Counter(texts), damages, sum(bool(record.reject) for record in records))
        if len({record.ordinal for record in records}) != len(records):
            self.faults.append(f"{sample.name} {seed}: an ordinal occurs twice")
        for damage in damages:
            # What is wrong inside a member that could be inflated is counted in plain bytes.
            n_bytes = 0 if damage.reason.startswith("warc.") else damage.bytes_lost
            in_file = damage.unit != "byte" or damage.offset + n_bytes <= len(data)
            if damage.path != str(path) or damage.offset < 0 or damage.bytes_lost < 0 or not in_file:
                self.faults.append(f"{sample.name} {seed}: {damage} is no place in a file of {len(data)} bytes")

    def _compare(
        self,
        sample: Sample,
        seed: int,
        touched: list[tuple[int, int]],
        texts: Counter[str],
        damages: list[Damage],
        n_rejected: int,
    ) -> None:
        lost = intact = 0
        for unit in sample.units:
            missing = sum(text not in texts for text in unit.texts)
            lost += missing
            if not is_touched(unit, touched):
                intact += len(unit.texts)
                self.counts["intact lost"] += missing
        known = {text for unit in sample.units for text in unit.texts}
        altered = len(set(texts) - known)
        self.counts.update({"mutants": 1, "intact": intact, "lost": lost, "damages": len(damages), "altered": altered})
        # The end of a cut member is given out though its checksum is missing, and said to be cut.
        if sample.checked and altered and not any(damage.reason.endswith(".truncated") for damage in damages):
            self.faults.append(f"{sample.name} {seed}: {altered} records came out altered in spite of their checksum")
        n_seen = texts.total() + n_rejected
        # A plain archive that lost exactly what lay between two like places is a whole, shorter archive; so is any file
        # that is cut between two units.
        undetectable = sample.name == "x.warc" or any(
            start == low for unit in sample.units for low, _ in unit.needs[:1] for start, _ in touched
        )
        if n_seen < sum(len(unit.texts) for unit in sample.units) and not damages and not undetectable:
            self.faults.append(f"{sample.name} {seed}: {lost} records lost in silence")

    def __str__(self) -> str:
        return f"{dict(self.counts)}\n" + "\n".join(self.faults[:20])


def read_mutants(name: str, seeds: range, folder: Path) -> Tally:
    make, _ = FORMATS[name]
    tally = Tally()
    for seed in seeds:
        # A new sample every 50 mutants: making one costs more than reading it.
        sample = make(random.Random(f"{name} {seed // 50}"))
        data, touched = mutate(random.Random(f"{name} mutant {seed}"), sample)
        tally.read(sample, seed, data, touched, folder)
    return tally


def main() -> None:
    """Print the peak memory in bytes of reading healthy files and, after that, of reading mutants."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, _) in FORMATS.items():
            sample = make(random.Random(name))
            for _ in range(3):
                Tally().read(sample, 0, sample.data, [], Path(folder))
        healthy = peak_rss_bytes()
        for name in FORMATS:
            read_mutants(name, range(10_000, 10_300), Path(folder))
    print(healthy, peak_rss_bytes())  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
