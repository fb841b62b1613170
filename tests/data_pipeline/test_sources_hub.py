import json
from pathlib import Path

import pytest

from data_pipeline.config import Source
from data_pipeline.document import Damage
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.shards import list_shards, read_shard
from megagpt.errors import DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"text": "Ducks.", "url": "http://a.b"}, {"text": None, "url": ""}, {"text": "Geese.", "url": ""}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def test_a_data_set_is_one_shard_and_its_rows_are_records(folder: Path) -> None:
    source = Source(path=str(folder), kind="hub", name="birds")
    (shard,) = list_shards(source, 4)
    assert (shard.ordinal, shard.kind, shard.source) == (4, "hub", "birds")
    found = list(read_shard(shard, source))
    assert [(r.ordinal, r.text, r.url) for r in found if isinstance(r, RawRecord)] == [
        (0, "Ducks.", "http://a.b"),
        (2, "Geese.", f"{folder}:train:2"),
    ]
    assert [(d.offset, d.unit, d.reason) for d in found if isinstance(d, Damage)] == [
        (1, "row", "hub.text_not_a_string")
    ]


def test_a_missing_column_and_a_missing_split_are_named(folder: Path) -> None:
    source = Source(path=str(folder), kind="hub", text_key="body")
    with pytest.raises(DataError, match=r"no column 'body'; columns are text, url"):
        list(read_shard(list_shards(source, 0)[0], source))
    source = Source(path=str(folder), kind="hub", split="test")
    with pytest.raises(DataError, match=r"split 'test'\): cannot be loaded"):
        list(read_shard(list_shards(source, 0)[0], source))
