"""megagpt.tokenizer: text to ids and back."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from tiktoken_ext import openai_public
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from megagpt.errors import DataError
from megagpt.tokenizer import TIKTOKEN_SOURCES, HFTokenizer, TiktokenTokenizer, open_recorded_tokenizer, open_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 3
SAMPLES = ["", " ", "The quick fox", "naïve café — 東京 🎉\r\n\tx", "a\x00b", "<|endoftext|>", "x<|endoftext|>y</s>"]


def run_alone(program: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_bpe(special: str = "<|endoftext|>") -> RustTokenizer:
    """A byte-level BPE of 300 tokens; the special token is number 0."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def tiny_encoding(name: str = "tiny") -> tiktoken.Encoding:
    """All bytes, two merges, and a separator whose id leaves a gap, as cl100k_base's does."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    return tiktoken.Encoding(name, pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 259})


@pytest.fixture
def bpe_file(tmp_path) -> Path:
    path = tmp_path / "my_bpe.json"
    train_bpe().save(str(path))
    return path


@pytest.fixture(params=["hf", "tiktoken"])
def tokenizer(request, bpe_file):
    return open_tokenizer(bpe_file) if request.param == "hf" else TiktokenTokenizer(tiny_encoding())


def test_text_survives_the_round_trip(tokenizer):
    assert [tokenizer.decode(tokenizer.encode(text)) for text in SAMPLES] == SAMPLES
    assert tokenizer.encode_batch(SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]
    assert tokenizer.encode_batch([]) == []


def test_a_literal_separator_in_a_text_is_ordinary_text(tokenizer):
    texts = ["<|endoftext|>", "a<|endoftext|>b", "\n<|endoftext|>\n" * 3]
    for ids in [*map(tokenizer.encode, texts), *tokenizer.encode_batch(texts)]:
        assert ids
        assert tokenizer.eot_id not in ids
    assert tokenizer.decode([tokenizer.eot_id]) == "<|endoftext|>"


def test_ids_stay_below_the_vocabulary(tokenizer):
    assert max(max(tokenizer.encode(text), default=0) for text in [*SAMPLES, TEXT]) < tokenizer.vocab_size
    assert 0 <= tokenizer.eot_id < tokenizer.vocab_size


def test_the_vocabulary_is_the_largest_id_and_one(bpe_file):
    assert TiktokenTokenizer(tiny_encoding()).vocab_size == 260
    assert TiktokenTokenizer(tiny_encoding()).eot_id == 259
    trained = train_bpe()
    assert open_tokenizer(bpe_file).vocab_size == trained.get_vocab_size()
    assert open_tokenizer(bpe_file).eot_id == trained.token_to_id("<|endoftext|>") == 0


def test_our_ids_are_those_of_the_library(bpe_file):
    assert open_tokenizer(bpe_file).encode(TEXT) == train_bpe().encode(TEXT).ids
    assert TiktokenTokenizer(tiny_encoding()).encode("the th") == [257, 32, 256]


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "new" / "folder")
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    for spec in (path, path.parent, str(path.parent)):
        again = open_tokenizer(spec)
        assert again.describe() == tokenizer.describe()
        assert again.encode_batch(SAMPLES) == tokenizer.encode_batch(SAMPLES)


@pytest.mark.parametrize("place", ["tokenizer", "."])
def test_the_tokenizer_of_token_files_is_found_beside_them(tokenizer, tmp_path, place):
    tokenizer.save(tmp_path / "job" / place)
    found = open_recorded_tokenizer(tmp_path / "job", tokenizer.describe())
    assert found.encode(TEXT) == tokenizer.encode(TEXT)


def test_token_files_without_their_tokenizer_say_what_is_missing(bpe_file, tmp_path):
    described = open_tokenizer(bpe_file).describe()
    with pytest.raises(DataError, match=r"neither tokenizer/tokenizer\.json nor tokenizer\.json is there"):
        open_recorded_tokenizer(tmp_path, described)
    other = HFTokenizer(train_bpe("</s>").to_str(), Path("x"))
    other.save(tmp_path / "tokenizer")
    with pytest.raises(DataError) as error:
        open_recorded_tokenizer(tmp_path, described)
    assert str(error.value) == (
        f"{tmp_path}/tokenizer/tokenizer.json: tokenizer with fingerprint {other.fingerprint}, but the manifest "
        f"in {tmp_path} says that the tokens were made with {described['fingerprint']}"
    )


def test_describe_says_what_a_manifest_needs(bpe_file):
    hf, tiny = open_tokenizer(bpe_file), TiktokenTokenizer(tiny_encoding())
    assert hf.describe() == {
        "kind": "hf",
        "file": "tokenizer.json",
        "vocab_size": hf.vocab_size,
        "eot_id": 0,
        "fingerprint": hf.fingerprint,
    }
    assert tiny.describe() == {
        "kind": "tiktoken",
        "name": "tiny",
        "vocab_size": 260,
        "eot_id": 259,
        "fingerprint": tiny.fingerprint,
    }
    assert len(bytes.fromhex(hf.fingerprint)) == len(bytes.fromhex(tiny.fingerprint)) == 16


def test_the_fingerprint_is_of_the_content(bpe_file, tmp_path):
    content = json.loads(bpe_file.read_text())
    fingerprint = open_tokenizer(bpe_file).fingerprint

    def changed(change) -> str:
        copy = json.loads(json.dumps(content))
        change(copy)
        (tmp_path / "changed.json").write_text(json.dumps(copy))
        return open_tokenizer(tmp_path / "changed.json").fingerprint

    older_spelling = [" ".join(pair) for pair in content["model"]["merges"]]
    assert changed(lambda copy: copy["model"].update(merges=older_spelling)) == fingerprint
    assert changed(lambda copy: copy.update(model=dict(reversed(copy["model"].items())))) == fingerprint
    assert changed(lambda copy: copy["model"]["merges"].pop()) != fingerprint
    assert changed(lambda copy: copy["pre_tokenizer"].update(add_prefix_space=True)) != fingerprint
    assert TiktokenTokenizer(tiny_encoding("a")).fingerprint == TiktokenTokenizer(tiny_encoding("b")).fingerprint


def test_a_file_that_truncates_and_pads_does_neither(bpe_file, tmp_path):
    with_limits = train_bpe()
    with_limits.enable_truncation(2)
    with_limits.enable_padding(length=8)
    with_limits.save(str(tmp_path / "limits.json"))
    limited = open_tokenizer(tmp_path / "limits.json")
    assert limited.encode(TEXT) == open_tokenizer(bpe_file).encode(TEXT)
    assert limited.encode("a") == open_tokenizer(bpe_file).encode("a")
    assert limited.fingerprint == open_tokenizer(bpe_file).fingerprint


@pytest.mark.parametrize("name", ["<|end_of_text|>", "</s>", "<eos>"])
def test_other_names_of_the_separator_are_known(tmp_path, name):
    train_bpe(name).save(str(tmp_path / "t.json"))
    opened = open_tokenizer(tmp_path / "t.json")
    assert opened.eot_id == 0
    assert 0 not in opened.encode(f"a{name}b")


def test_a_tokenizer_without_separator_is_refused_with_the_accepted_names(tmp_path):
    train_bpe("<pad>").save(str(tmp_path / "t.json"))
    with pytest.raises(DataError) as error:
        open_tokenizer(tmp_path / "t.json")
    assert str(error.value) == (
        f"{tmp_path}/t.json: has no end-of-text token to separate documents; one of <|endoftext|>, <|end_of_text|>, "
        "</s>, <eos> is accepted, its special tokens are <pad>"
    )
    without = tiktoken.Encoding("x", pat_str=r".", mergeable_ranks={b"a": 0}, special_tokens={})
    with pytest.raises(DataError, match="tiktoken encoding x: has no end-of-text token"):
        TiktokenTokenizer(without)


def test_a_separator_that_text_can_make_is_refused(tmp_path):
    careless = train_bpe("<pad>")
    careless.add_tokens([AddedToken("<|endoftext|>", special=False)])
    careless.save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"a document that mentions .* would be cut in two"):
        open_tokenizer(tmp_path / "t.json")


def test_half_a_surrogate_pair_is_refused_where_it_stands(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["ok", text])):
        with pytest.raises(DataError, match=r"text holds '\\ud800' at character 2"):
            encode("ab\ud800")


@pytest.mark.parametrize("bad", [258, 9999, -1])
def test_ids_without_a_token_are_named(bad):
    with pytest.raises(DataError, match=f"token id {bad} is not in the tokenizer, whose vocabulary size is 260"):
        TiktokenTokenizer(tiny_encoding()).decode([1, bad])


@pytest.mark.parametrize("bad", [9999, -1])
def test_ids_without_a_token_are_named_for_files_too(bpe_file, bad):
    with pytest.raises(DataError, match=f"token id {bad} is not in the tokenizer"):
        open_tokenizer(bpe_file).decode([1, bad])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not a tokenizer file, which is JSON"),
        ("[]", "not a tokenizer.json that `tokenizers` can read"),
        ('{"version": "1.0"}', "not a tokenizer.json that `tokenizers` can read"),
        ('{"kind": "tiktoken"}', "key 'name' is missing; expected name, pattern, ranks, special_tokens"),
        ('{"kind": "tiktoken", "name": "x", "pattern": ".", "ranks": [], "special_tokens": {}}', "megagpt wrote"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path, content, complaint):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError) as error:
        open_tokenizer(tmp_path / "t.json")
    assert str(error.value).startswith(f"{tmp_path}/t.json: ")
    assert complaint in str(error.value)


def test_unknown_names_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(DataError) as error:
        open_tokenizer("gpt3")
    assert str(error.value) == (
        "tokenizer 'gpt3' is neither a file nor a folder, nor one of gpt2, cl100k_base, o200k_base (tiktoken)"
    )
    with pytest.raises(DataError, match=r"holds tokenizer\.json or tiktoken\.json, this one neither"):
        open_tokenizer(tmp_path)
    HFTokenizer(train_bpe().to_str(), Path("x")).save(tmp_path)
    TiktokenTokenizer(tiny_encoding()).save(tmp_path)
    with pytest.raises(DataError, match=r"this one tokenizer\.json and tiktoken\.json"):
        open_tokenizer(tmp_path)


def test_an_encoding_that_cannot_be_loaded_says_how_to_provide_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    tiktoken.registry.ENCODINGS.pop("o200k_base", None)
    with pytest.raises(DataError, match=r"tiktoken cannot load 'o200k_base': .*set TIKTOKEN_CACHE_DIR to a folder"):
        open_tokenizer("o200k_base")


def test_the_files_of_an_encoding_are_those_that_tiktoken_loads():
    for name, sources in TIKTOKEN_SOURCES.items():
        program = inspect.getsource(openai_public.ENCODING_CONSTRUCTORS[name])
        assert re.findall(r'"(https://[^"]+)"', program) == list(sources)


def test_gpt2_through_tiktoken_is_gpt2(monkeypatch):
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    try:
        gpt2 = open_tokenizer("gpt2")
    except DataError:
        pytest.skip("tiktoken's gpt2 files are not in its cache (TIKTOKEN_CACHE_DIR)")
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert 50256 not in gpt2.encode("a<|endoftext|>b")


def test_importing_it_loads_neither_torch_nor_tokenizers():
    program = (
        "import sys, megagpt.tokenizer, megagpt.data.mixture, megagpt.data.manifest\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'tiktoken') if name in sys.modules])"
    )
    shown = run_alone(program)
    assert shown.strip() == "[]"


def test_using_it_loads_no_torch(bpe_file):
    program = (
        "import sys, megagpt.tokenizer as t\n"
        f"t.open_tokenizer({str(bpe_file)!r}).encode_batch(['a'])\n"
        "import tiktoken\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    shown = run_alone(program)
    assert shown.strip() == "[]"
