import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.substrings import anchors_of, tokenise
from data_pipeline.dedup.text_batches import TextBatch
from tests.data_pipeline.passage_dedup import read_spans, substring_spans, write_clusters_file, write_shard

SHARD = 1 << 32
TOKEN = re.compile(r"\w+|[^\w\s]")


def batch_of(*texts: str) -> TextBatch:
    return TextBatch(np.arange(len(texts)), pa.array(texts, pa.string()))


def suffix_array(symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of all suffixes (Manber, Myers 1993), and the length that neighbours share (Kasai et al. 2001)."""
    n = len(symbols)
    rank, step = np.unique(symbols, return_inverse=True)[1].astype(np.int64), 1
    while True:
        after = np.concatenate([rank[step:], np.full(min(step, n), -1)])
        order = np.lexsort((after, rank))
        new = np.zeros(n, np.int64)
        new[order[1:]] = np.cumsum((rank[order][1:] != rank[order][:-1]) | (after[order][1:] != after[order][:-1]))
        rank, step = new, step * 2
        if rank.max() == n - 1 or step > 2 * n:
            break
    common, shared = np.zeros(n, np.int64), 0
    for i in range(n):
        if rank[i] == 0:
            shared = 0
            continue
        j = order[rank[i] - 1]
        while max(i, j) + shared < n and symbols[i + shared] == symbols[j + shared]:
            shared += 1
        common[rank[i]] = shared
        shared = max(shared - 1, 0)
    return order, common


def spans_by_suffix_array(documents: dict[int, str], n_tokens: int) -> dict[int, list[tuple[int, int]]]:
    """All documents in a row, each ended by a symbol of its own; suffixes with equal windows are neighbours."""
    numbers: dict[str, int] = {}
    symbols, places = [], []
    for k, (doc_id, text) in enumerate(sorted(documents.items())):
        for match in TOKEN.finditer(text):
            symbols.append(numbers.setdefault(match.group(), len(numbers) + 1))
            places.append((doc_id, *match.span()))
        symbols.append(-1 - k)
        places.append((doc_id, -1, -1))
    cut = np.zeros(len(symbols), bool)
    if symbols:
        order, common = suffix_array(np.array(symbols))
        group = np.cumsum(common < n_tokens)
        for number in np.unique(group):
            members = order[group == number]
            for place in members[members != members.min()]:
                cut[place : place + n_tokens] = True
    spans: dict[int, list[tuple[int, int]]] = {}
    joined = False
    for is_cut, (doc_id, start, end) in zip(cut, places, strict=True):
        if is_cut:
            known = spans.setdefault(doc_id, [])
            known[-1:] = [(known[-1][0], end)] if joined and known else [*known[-1:], (start, end)]
        joined = bool(is_cut)
    return spans


def spans_by_windows(documents: dict[int, str], n_tokens: int) -> dict[int, list[tuple[int, int]]]:
    """The definition: a set of all windows seen so far."""
    seen, spans = set(), {}
    for doc_id, text in sorted(documents.items()):
        tokens = list(TOKEN.finditer(text))
        cut = [False] * len(tokens)
        for i in range(len(tokens) - n_tokens + 1):
            window = tuple(token.group() for token in tokens[i : i + n_tokens])
            if window in seen:
                cut[i : i + n_tokens] = [True] * n_tokens
            seen.add(window)
        for i, token in enumerate(tokens):
            if cut[i] and i and cut[i - 1]:
                spans[doc_id][-1] = (spans[doc_id][-1][0], token.end())
            elif cut[i]:
                spans.setdefault(doc_id, []).append(token.span())
    return spans


def found_spans(folder: Path, shards: list[dict[int, str]], n_tokens: int, n_partitions: int = 1) -> dict:
    """The four stages; spans are joined where only white space lies between, as cut passages are."""
    files = [write_shard(folder / f"{i}.parquet", texts) for i, texts in enumerate(shards)]
    spans = read_spans(substring_spans(folder, files, n_tokens, n_partitions))
    texts = {i: text for shard in shards for i, text in shard.items()}
    return joined(spans, texts)


def joined(spans: dict, texts: dict[int, str]) -> dict:
    result: dict[int, list[tuple[int, int]]] = {}
    for doc_id, rows in spans.items():
        for start, end in rows:
            known = result.setdefault(doc_id, [])
            if known and not texts[doc_id][known[-1][1] : start].strip():
                known[-1] = (known[-1][0], end)
            else:
                known.append((start, end))
    return result


@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=4))
@example(["don't _x_ 3.14", "", "日本語、テキスト", "a\u0301 \u1680 \U0001f600\U0001f600", "\x1c\x85x"])
def test_tokens_are_those_of_the_pattern(texts: list[str]):
    tokens = tokenise(batch_of(*texts))
    matches = [list(TOKEN.finditer(text)) for text in texts]
    assert np.diff(tokens.bounds).tolist() == [len(found) for found in matches]
    flat = [match for found in matches for match in found]
    assert tokens.starts.tolist() == [match.start() for match in flat]
    assert tokens.ends.tolist() == [match.end() for match in flat]
    words = [match.group() for match in flat]
    assert len(set(tokens.hashes.tolist())) == len(set(words))
    assert len(set(zip(words, tokens.hashes.tolist(), strict=True))) == len(set(words))


@given(st.lists(st.sampled_from("ab"), max_size=60), st.integers(2, 9))
def test_every_window_holds_an_anchor_and_equal_windows_hold_it_at_the_same_place(letters: list[str], n_tokens: int):
    tokens = tokenise(batch_of(" ".join(letters)))
    keys, _, positions = anchors_of(tokens, n_tokens)
    places = dict(zip(positions.tolist(), keys.tolist(), strict=True))
    gram = n_tokens // 2
    offsets: dict[tuple[str, ...], set] = {}
    for i in range(len(letters) - n_tokens + 1):
        inside = [(places[p], -p) for p in range(i, i + n_tokens - gram + 1) if p in places]
        assert inside
        key, place = min(inside)
        offsets.setdefault(tuple(letters[i : i + n_tokens]), set()).add((key, -place - i))
    assert all(len(found) == 1 for found in offsets.values())


def test_share_of_anchors_is_that_of_winnowing(tmp_path: Path):
    rng = random.Random(0)
    text = " ".join(f"w{rng.randrange(5000)}" for _ in range(30_000))
    _, _, positions = anchors_of(tokenise(batch_of(text)), 50)
    # Schleimer et al. 2003, section 3.3: density 2 / (w + 1) for w = 26 values in a window.
    assert len(positions) / 30_000 == pytest.approx(2 / 27, rel=0.05)


DOCUMENTS = st.lists(st.lists(st.sampled_from(["a", "b", "b.", "\n"]), max_size=25).map(" ".join), max_size=5)


@given(st.lists(DOCUMENTS, min_size=1, max_size=3), st.integers(1, 3))
@example([["a a a a a a a a a", "a a a a"], ["a a a a a"]], 1)
@example([["a b a b a b a b a b a", "b a b a b"]], 2)
@settings(max_examples=50, deadline=None)
def test_spans_are_those_of_a_suffix_array(shards: list[list[str]], n_partitions: int):
    documents = [{s * SHARD + i: text for i, text in enumerate(texts)} for s, texts in enumerate(shards)]
    texts = {i: text for shard in documents for i, text in shard.items()}
    expected = spans_by_suffix_array(texts, 4)
    assert expected == spans_by_windows(texts, 4)
    with tempfile.TemporaryDirectory() as name:
        assert found_spans(Path(name), documents, 4, n_partitions) == expected


def corpus(seed: int = 0) -> list[dict[int, str]]:
    """Documents of new words, with passages of 30 to 80 words that come again in others."""
    rng = random.Random(seed)

    def words(n: int) -> str:
        return " ".join(f"w{rng.randrange(100_000)}" + rng.choice(["", "", ",", ".\n"]) for _ in range(n))

    passages = [words(rng.randrange(30, 80)) for _ in range(10)]
    parts = [[words(rng.randrange(0, 60)), rng.choice(passages), words(40)] for _ in range(45)]
    return [{s * SHARD + i: " ".join(parts[15 * s + i]) for i in range(15)} for s in range(3)]


@pytest.mark.parametrize("n_partitions", [1, 4])
def test_passages_of_fifty_tokens_are_found_across_shards(tmp_path: Path, n_partitions: int):
    shards = corpus()
    expected = spans_by_windows({i: text for shard in shards for i, text in shard.items()}, 50)
    assert found_spans(tmp_path, shards, 50, n_partitions) == expected
    assert 20 < len(expected) < 45


def test_the_order_of_shards_changes_nothing(tmp_path: Path):
    files = [write_shard(tmp_path / f"{i}.parquet", texts) for i, texts in enumerate(corpus())]
    one = substring_spans(tmp_path / "a", files, 50)
    other = substring_spans(tmp_path / "b", files[::-1], 50)
    assert one[0].read_bytes() == other[0].read_bytes()


def test_one_partition_writes_each_passage_as_one_row(tmp_path: Path):
    text = " ".join(f"w{i}" for i in range(200))
    file = write_shard(tmp_path / "d.parquet", {0: text, 1: "new " + text + " new"})
    (repeats,) = substring_spans(tmp_path, [file], 50)
    assert pq.read_table(repeats).to_pylist() == [{"doc_id": 1, "start": 4, "end": 4 + len(text)}]


def test_documents_that_were_removed_take_no_part(tmp_path: Path):
    text = " ".join(f"w{i}" for i in range(30))
    file = write_shard(tmp_path / "d.parquet", {0: text, 1: text, 2: "x " + text})
    rows = [(0, 0, 2, False, "exact_duplicate"), (1, 0, 2, True, "")]
    clusters = write_clusters_file(tmp_path / "c.parquet", rows)
    spans = read_spans(substring_spans(tmp_path, [file], 20, clusters=clusters))
    assert spans == {2: [(2, 2 + len(text))]}


def test_case_counts_and_white_space_does_not(tmp_path: Path):
    words = [f"w{i}" for i in range(30)]
    file = write_shard(tmp_path / "d.parquet", {0: " ".join(words), 1: "\n\n".join(words), 2: " ".join(words).upper()})
    assert set(read_spans(substring_spans(tmp_path, [file], 20))) == {1}
