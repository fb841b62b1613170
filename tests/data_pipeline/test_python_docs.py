import json
from pathlib import Path

import pytest

from data_pipeline.config import DataJob, Source
from data_pipeline.document import Damage, Shard
from data_pipeline.extract.html import extract_html
from data_pipeline.sources import python_docs
from data_pipeline.sources.docstring_pages import Entry, read_entries, render_page
from data_pipeline.sources.python_docs import build_python_docs
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.shards import prepare_sources, read_shard
from megagpt.errors import DataError

MODULE = '''"""Ducks and what they do.

A longer story about ducks, told so that this module has enough to say. WORDS
"""

def swim(duck, *, speed=1):
    """Let a duck swim.

    Parameters
    ----------
    duck : Duck
        The duck in question.

    Examples
    --------
    >>> swim(duck)
    'splash'
    """

class Duck(Bird):
    """A bird <of the pond>."""

    def quack(self, times):
        """Say quack a number of times."""

    def honk(self, times):
        """Say quack a number of times."""

add_docstr(pond.flow, r"""Flows down the river. WORDS""")
raise RuntimeError("importing this module is an accident")
'''.replace("WORDS", "word " * 60)


def test_entries_are_read_without_running_the_module() -> None:
    entries = read_entries(MODULE, "ducks")
    assert entries is not None
    assert [(entry.heading, entry.level) for entry in entries] == [
        ("ducks", 1),
        ("swim(duck, speed)", 2),
        ("class Duck(Bird)", 2),
        ("quack(times)", 3),
        ("pond.flow", 2),
    ]


def test_what_is_not_python_or_says_little_makes_no_page() -> None:
    assert read_entries("def (:", "x") is None
    assert read_entries('"""Short."""', "x") == []


def test_a_page_gives_its_text_back() -> None:
    entries = read_entries(MODULE, "ducks")
    text = extract_html(render_page("ducks", entries or [], ["geese"]).encode())
    assert "Ducks and what they do.\n\nA longer story about ducks, told" in text
    assert ">>> swim(duck)\n'splash'" in text
    assert "A bird <of the pond>." in text
    assert "geese" not in text


def test_paragraphs_flow_and_terms_stand_apart() -> None:
    page = render_page("x", [Entry("x", 1, "One line\nand its end.\n\nduck : Bird\n    Swims\n    far.")], [])
    assert "<p>One line and its end.</p>" in page
    assert "<p>duck : Bird</p>\n<p>Swims far.</p>" in page


@pytest.fixture
def few_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole standard library would take seconds."""
    monkeypatch.setattr(python_docs, "MAX_PACKAGE_CHARACTERS", 60_000)


@pytest.mark.usefixtures("few_modules")
def test_two_builds_of_one_installation_are_equal_byte_for_byte(tmp_path: Path) -> None:
    first, second = (build_python_docs(tmp_path / name, ("click",)) for name in ("a", "b"))
    assert [path.read_bytes() for path in first.pages] == [path.read_bytes() for path in second.pages]
    assert first.texts.read_bytes() == second.texts.read_bytes()
    assert "stdlib" in first.capped


@pytest.mark.usefixtures("few_modules")
def test_a_build_is_used_again_until_something_changes(tmp_path: Path) -> None:
    built = build_python_docs(tmp_path, ("click",))
    times = [path.stat().st_mtime_ns for path in built.pages]
    assert build_python_docs(tmp_path, ("click",)) == built
    assert [path.stat().st_mtime_ns for path in built.pages] == times
    assert build_python_docs(tmp_path, ("click", "jinja2")).n_pages > built.n_pages
    again = build_python_docs(tmp_path, ("click",))
    again.pages[1].write_bytes(again.pages[1].read_bytes()[:-1])
    assert build_python_docs(tmp_path, ("click",)) == built
    (tmp_path / "stamp.json").write_text("{")
    assert build_python_docs(tmp_path, ("click",)) == built


@pytest.mark.usefixtures("few_modules")
def test_a_source_of_python_docs_is_five_shards_that_read_without_damage(tmp_path: Path) -> None:
    source = Source(kind="python_docs", packages=("click",))
    job = DataJob(out=tmp_path, sources=(source,))
    shards = prepare_sources(job)
    assert [shard.ordinal for shard in shards] == list(range(5))
    assert [shard.kind for shard in shards] == ["warc"] * 4 + ["jsonl"]
    assert {shard.source for shard in shards} == {"python_docs"}
    assert all(Path(shard.path).is_relative_to(tmp_path / "sources") for shard in shards)
    *pages, texts = (records(shard, source) for shard in shards)
    assert {page.url.split("/")[3] for part in pages for page in part[1:]} == {"stdlib", "click", "reference"}
    assert [page.reject for part in pages for page in part[:1]] == ["not_response"] * 4
    assert not any(page.reject for part in pages for page in part[1:])
    assert min(len(part) for part in pages) > 10
    addresses = [page.url for part in pages for page in part[1:]]
    assert len(set(addresses)) == len(addresses) > 100
    assert texts[-1].url == "https://pydoc.invalid/click/description"
    assert texts[-1].meta["pile_set_name"] == "PythonPackages"


def records(shard: Shard, source: Source) -> list[RawRecord]:
    found = list(read_shard(shard, source))
    assert not [record for record in found if isinstance(record, Damage)]
    return [record for record in found if isinstance(record, RawRecord)]


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"imported as 'clik'; did you mean 'click'\?"):
        build_python_docs(tmp_path, ("clik",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("few_modules")
def test_the_stamp_says_what_it_was_built_from(tmp_path: Path) -> None:
    build_python_docs(tmp_path, ("click",))
    stamp = json.loads((tmp_path / "stamp.json").read_text())
    assert list(stamp["built_from"]["packages"]) == ["click", "stdlib"]
    assert "stdlib" in stamp["counts"]["capped"]
