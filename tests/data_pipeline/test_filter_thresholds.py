import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.document import Document
from data_pipeline.filters.registry import FilterChain, build_filters
from data_pipeline.filters.thresholds import RuleChange, what_if
from megagpt.errors import ConfigError, DataError

SECTION = {
    "gopher_quality": {},
    "c4": {"terminal_punctuation": False},
    "fineweb": {"max_short_lines": None, "max_duplicate_line_characters": None},
}
_WORDS = [*["the", "and", "of", "duck", "pond", "swims", "little", "bird"] * 2, "# ", "1 2", "..."]


def texts(n_documents: int) -> list[str]:
    draw = random.Random(5)
    lines = [" ".join(draw.choices(_WORDS, k=draw.randint(1, 14))) + draw.choice(".\n,") for _ in range(40)]
    return ["\n".join(draw.choices(lines, k=draw.randint(0, 20))) for _ in range(n_documents)]


def decide(chain: FilterChain, text: str, doc_id: int = 0) -> Document:
    document = Document(doc_id, text, "s")
    chain.apply(document)
    return document


def write_decisions(job: Path, partition: str, documents: list[Document], names: tuple[str, ...]) -> None:
    folder = job / "stages" / "filter" / partition
    folder.mkdir(parents=True)
    columns: dict[str, pa.Array] = {
        "doc_id": pa.array([document.doc_id for document in documents], pa.int64()),
        "reason": pa.array([document.failed[0] if document.failed else "" for document in documents], pa.string()),
        "failed": pa.array([document.failed for document in documents], pa.list_(pa.string())),
    }
    for name in names:
        columns[name] = pa.array([document.measures.get(name) for document in documents], pa.float32())
    pq.write_table(pa.table(columns), folder / "decisions.parquet", row_group_size=7)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    chain = build_filters(SECTION)
    documents = [decide(chain, text, doc_id) for doc_id, text in enumerate(texts(120))]
    foreign = Document(200, "Enten", "s", failed=["language.not_kept"])
    write_decisions(folder, "000000", [*documents[:50], foreign], chain.measure_names)
    write_decisions(folder, "000001", documents[50:], chain.measure_names)
    return folder


@settings(deadline=None, max_examples=30)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "gopher_quality.min_words": st.sampled_from([None, 0, 10, 30, 100]),
            "gopher_quality.max_hash_per_word": st.sampled_from([None, 0.0, 0.05, 1 / 9, 0.3]),
            "gopher_quality.min_mean_word_length": st.sampled_from([None, 0.0, 3.5, 10.0]),
            "c4.min_sentences": st.sampled_from([None, 1, 9]),
            "fineweb.max_short_lines": st.sampled_from([None, 0.0, 0.1, 1 / 3, 0.9]),
        },
    )
)
def test_the_answer_is_that_of_a_new_run(job: Path, overrides: dict[str, float | None]) -> None:
    section: dict[str, dict[str, object]] = {name: dict(values) for name, values in SECTION.items()}
    for rule, limit in overrides.items():
        name, _, field = rule.partition(".")
        section[name][field] = limit
    chain = build_filters(section)
    again = [decide(chain, text) for text in texts(120)]
    answer = what_if(job, overrides)
    assert answer.documents == 121
    assert answer.passing_after == sum(not document.failed for document in again)
    failing = Counter(rule for document in again for rule in document.failed) + Counter(["language.not_kept"])
    assert {rule.rule: rule.failing_after for rule in answer.rules if rule.failing_after} == failing


def test_nothing_changed_means_the_same_before_and_after(job: Path) -> None:
    answer = what_if(job, {})
    assert 0 < answer.passing_before == answer.passing_after < answer.documents
    assert all(rule.failing_before == rule.failing_after > 0 for rule in answer.rules)


def test_a_rule_that_was_off_can_be_tried(job: Path) -> None:
    found = {rule.rule: rule for rule in what_if(job, {"fineweb.max_short_lines": 0.0}).rules}
    assert found["fineweb.max_short_lines"].failing_before == 0
    assert found["fineweb.max_short_lines"].failing_after > 10


def test_a_document_without_text_after_the_filters_stays_out(tmp_path: Path) -> None:
    chain = build_filters({"c4": {"min_sentences": None}})
    document = decide(chain, "Menu")
    assert (document.text, document.failed) == ("", [])
    write_decisions(tmp_path, "0", [document], chain.measure_names)
    path = tmp_path / "stages/filter/0/decisions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "reason", pa.array(["no_text_after_filters"])), path)
    answer = what_if(tmp_path, {"c4.min_sentences": None})
    assert (answer.passing_before, answer.passing_after) == (0, 0)
    assert answer.rules == (RuleChange("c4.min_sentences", 0, 0),)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"finweb.max_short_lines": 0.5}, "unknown filter 'finweb'; did you mean 'fineweb'?"),
        ({"fineweb.max_short_line": 0.5}, "fineweb has no threshold 'max_short_line'; did you mean 'max_short_lines'?"),
        ({"fineweb.short_line_characters": 20}, "Only thresholds can be changed without a new run"),
        ({"fineweb.max_short_lines": "x"}, "fineweb.max_short_lines must be float, at least 0, or null, got 'x'"),
        ({"fineweb.max_short_lines": -1}, "fineweb.max_short_lines must be float, at least 0, or null, got -1"),
        ({"dclm.max_removed_words": 0.5}, "the job did not measure dclm.removed_words; it has gopher_quality.words"),
    ],
)
def test_what_cannot_be_answered_is_refused(job: Path, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        what_if(job, overrides)
    assert message in str(raised.value)


def test_a_folder_without_decisions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name the `out` folder of a job whose filter stage is done"):
        what_if(tmp_path, {})
