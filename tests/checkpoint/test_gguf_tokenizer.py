"""Tokenizers rebuilt from GGUF files against the ones that were written, and against transformers' rebuilding."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megagpt.checkpoint.convert import gguf_to_checkpoint
from megagpt.checkpoint.gguf_header import read_gguf_header
from megagpt.checkpoint.gguf_tokenizer import rebuild_tokenizer
from megagpt.checkpoint.open import open_checkpoint
from megagpt.errors import CheckpointError, DataError
from megagpt.tokenizer import HFTokenizer
from tests.checkpoint.gguf_files import CONTROL, hf_llama, hostile_texts, tokenizer_keys, trained, write_model

PRES = ("gpt-2", "smollm", "llama-bpe")


@pytest.fixture(scope="module", params=PRES)
def written(request, tmp_path_factory):
    """(the trained tokenizer, its GGUF file, the one rebuilt from that)."""
    file = write_model(tmp_path_factory.mktemp("gguf") / "m.gguf", hf_llama(), request.param)
    return trained(request.param), file, rebuilt(file)


def rebuilt(file):
    return HFTokenizer(rebuild_tokenizer(read_gguf_header(file).metadata, 384, str(file)), file)


def plain(tokenizer, text):
    """Ids of the text with special tokens' names as text."""
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_every_text_has_the_ids_of_the_tokenizer_that_was_written(written):
    original, _, ours = written
    for text in hostile_texts():
        assert ours.encode(text) == plain(original, text), repr(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == 384
    assert ours.eot_id == 0


@settings(max_examples=150)
@given(text=st.text(st.sampled_from("a1 \n\t.'é東½e\u0301\u00a0sT") | st.characters(exclude_categories=["Cs"])))
def test_any_text_has_the_ids_of_the_tokenizer_that_was_written(written, text):
    original, _, ours = written
    assert ours.encode(text) == plain(original, text)


def test_ids_are_those_of_transformers_rebuilding(written):
    """For `smollm`, transformers cuts as GPT-2 does, which differs where two or more blanks stand before a number."""
    _, file, ours = written
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer
    differs = [text for text in hostile_texts() if ours.encode(text) != plain(theirs, text)]
    if read_gguf_header(file).metadata["tokenizer.ggml.pre"] == "smollm":
        assert "a   12 345  6789\n\n1\t2" in differs
        assert all(re.search(r"\s\s[0-9]", text) for text in differs)
    else:
        assert not differs


def test_numbers_are_cut_into_digits_and_the_space_before_them_is_apart(tmp_path):
    ours = rebuilt(write_model(tmp_path / "m.gguf", hf_llama(), "smollm"))
    pieces = [ours.decode([i]) for i in ours.encode("7 2024")]
    assert pieces == ["7", " ", "2", "0", "2", "4"]


def test_a_whole_word_of_the_vocabulary_needs_no_merges_in_llama_3(tmp_path):
    found = {}
    for pre in ("gpt-2", "llama-bpe"):
        keys = tokenizer_keys(trained(pre), pre)
        *tokens, last = keys["tokenizer.ggml.tokens"]
        assert "ĠThe" not in tokens
        merges = [
            merge for merge in keys["tokenizer.ggml.merges"] if last not in (merge.replace(" ", ""), *merge.split(" "))
        ]
        change = {"tokenizer.ggml.tokens": [*tokens, "ĠThe"], "tokenizer.ggml.merges": merges}
        found[pre] = rebuilt(write_model(tmp_path / f"{pre}.gguf", hf_llama(), pre, change=change)).encode("a The")
    assert found["llama-bpe"][-1] == 383
    assert 383 not in found["gpt-2"]


def test_control_tokens_are_found_only_where_they_are_asked_for(written):
    _, file, ours = written
    for i, name in enumerate(CONTROL):
        assert i not in ours.encode(f"a {name} b")
        assert ours.decode([i]) == name
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert theirs.convert_tokens_to_ids(list(CONTROL)) == [0, 1, 2]


def test_user_defined_tokens_are_found_in_a_text_as_transformers_finds_them(tmp_path):
    keys = tokenizer_keys(trained("gpt-2"), "gpt-2")
    tokens, kinds = list(keys["tokenizer.ggml.tokens"]), list(keys["tokenizer.ggml.token_type"])
    longest = max(range(len(tokens)), key=lambda i: (kinds[i] == 1 and i > 370, i))
    word = tokens[longest]
    kept = [merge for merge in keys["tokenizer.ggml.merges"] if word not in (merge.replace(" ", ""), *merge.split(" "))]
    tokens[longest], kinds[longest] = "<think>", 4
    change = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": kept,
    }
    file = write_model(tmp_path / "m.gguf", hf_llama(), "gpt-2", change=change)
    ours = rebuilt(file)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("a <think> b<think>c", "<thin", "<think>"):
        assert ours.encode(text) == plain(theirs.backend_tokenizer, text)
    assert ours.encode("x<think>").count(longest) == 1


def test_a_bos_that_the_file_asks_for_is_in_the_tokenizer_json_and_not_in_our_ids(tmp_path):
    change = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ours = rebuilt(write_model(tmp_path / "m.gguf", hf_llama(), change=change))
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(ours.save(tmp_path)))
    ids = ours.encode("The dog")
    assert theirs.encode("The dog").ids == [1, *ids, 2]
    assert theirs.encode("The", "dog").ids == [1, *ours.encode("The"), 2, 1, *ours.encode("dog"), 2]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "llama", "model is 'llama'; only gpt2 can be rebuilt; give the model's own tokenizer.json"),
        ("model", None, "model is missing"),
        ("pre", "qwen2", "pre is 'qwen2'; only gpt-2, .*smollm"),
        ("pre", None, "pre is missing"),
        ("tokens", ["a", "b"], "token_type is a list of 384; a list of 2 whole numbers"),
        ("token_type", None, "token_type is missing"),
        ("token_type", [1.0] * 384, "token_type is a list of 384; a list of 384 whole numbers"),
        ("token_type", [3] * 383 + [9], "token_type says 9 of token 383"),
        ("merges", ["a b c"], "merges has 'a b c' as number 0, which is no merge"),
        ("merges", ["東 京"], "merges has .* as number 0"),
        ("add_bos_token", [True, False], "add_bos_token is a list of 2, and bos_token_id is 1"),
        ("bos_token_id", np.uint32(384), "bos_token_id is 384; there are 384 tokens"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(key, value, message, tmp_path):
    file = write_model(tmp_path / "m.gguf", hf_llama(), change={f"tokenizer.ggml.{key}": value})
    with pytest.raises((CheckpointError, DataError), match=message) as error:
        gguf_to_checkpoint(file, tmp_path / "run")
    assert str(file) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_tokens_that_stand_twice_or_are_more_than_rows_or_no_letters_of_bytes_are_refused(tmp_path):
    metadata = tokenizer_keys(trained("gpt-2"), "gpt-2")
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    with pytest.raises(CheckpointError, match="tokens has 384 tokens, the embedding 383 rows"):
        rebuild_tokenizer(metadata, 383, "m.gguf")
    tokens = metadata["tokenizer.ggml.tokens"]
    for i, token, message in (
        (9, tokens[7], f"tokens has {tokens[7]!r} twice"),
        (9, "東", "has '東' as number 9, which"),
    ):
        wrong = {
            **metadata,
            "tokenizer.ggml.tokens": [*tokens[:i], token, *tokens[i + 1 :]],
            "tokenizer.ggml.merges": [],
        }
        with pytest.raises(CheckpointError, match=re.escape(message)):
            rebuild_tokenizer(wrong, 384, "m.gguf")


def test_a_tokenizer_that_is_given_stands_in_for_one_that_cannot_be_rebuilt(tmp_path):
    file = write_model(tmp_path / "m.gguf", hf_llama(), change={"tokenizer.ggml.model": "llama"})
    own = tmp_path / "own.json"
    trained("gpt-2").save(str(own))
    assert str(own) in gguf_to_checkpoint(file, tmp_path / "run", str(own))
    assert open_checkpoint(tmp_path / "run").tokenizer().encode("The dog") == plain(trained("gpt-2"), "The dog")
    too_large = tmp_path / "large.json"
    trained("gpt-2", 390).save(str(too_large))
    with pytest.raises(CheckpointError, match="the tokenizer has 390 tokens, but the model's embedding 384 rows"):
        gguf_to_checkpoint(file, tmp_path / "other", str(too_large))
