"""Decisions equal to those of datatrove 0.10.1 on the same texts; its answers were recorded beforehand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from data_pipeline.document import Document
from data_pipeline.filters.registry import build_filters
from tests.data_pipeline.web_like_texts import web_like_texts

PRESET = Path(__file__).resolve().parents[2] / "configs" / "data" / "filters" / "fineweb.yaml"
TEXTS = web_like_texts(300)

# One bit a text, the first text in the highest: 1 where it passes. Of the chain of examples/fineweb.py with its
# defaults, and of each filter alone, C4QualityFilter with min_num_sentences=3, min_words_per_line=5.
CHAIN = "0104004801040108b0100000040800000200000118b520010e0080140892000064000100020"
ALONE = {
    "gopher_repetition": "4377b9ca973d0f3ff67ad74b577f4bbdbfaddb55bebfbf63cfdfa6d56efbeecbffc78dcfd3f",
    "gopher_quality": "8114015a81941d08b4181c010408420e0685850bdcb5a6210e04abf688f21404e51181000a5",
    "c4": "9b77fd5b7ffe3ffffefaeeffd79ffffbbfbbdfff1bffbff3efeaefb7efbfbedf7edfddfffff",
    "fineweb": "0374b848910c011ff0309348567e0995bb2c5a5598bf3103cfd384556e9aaacbfdc60d4b022",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "gopher_quality": {"shares_of": "tokens"},
    "c4": {"terminal_punctuation": False, "max_page_characters": None},
}


def passing(section: Mapping[str, Mapping[str, Any]]) -> list[bool]:
    chain = build_filters(section)
    documents = [Document(number, text, "s") for number, text in enumerate(TEXTS)]
    for document in documents:
        chain.apply(document)
    return [not document.failed for document in documents]


def agreement(found: list[bool], recorded: str) -> float:
    """Over the texts that are not empty; an empty one never reaches the filters of a job."""
    bits = [bit == "1" for bit in f"{int(recorded, 16):0{len(TEXTS)}b}"]
    equal = [one == other for text, one, other in zip(TEXTS, found, bits, strict=True) if text]
    return sum(equal) / len(equal)


def test_the_fineweb_preset_decides_as_datatrove() -> None:
    found = passing(YAML(typ="safe", pure=True).load(PRESET.read_text())["filters"])
    assert 30 < sum(found) < 50
    assert agreement(found, CHAIN) >= 0.99


@pytest.mark.parametrize("name", sorted(ALONE))
def test_each_filter_decides_as_datatrove(name: str) -> None:
    found = passing({name: SETTINGS.get(name, {})})
    assert 50 < sum(found) < 270
    assert agreement(found, ALONE[name]) >= 0.98
