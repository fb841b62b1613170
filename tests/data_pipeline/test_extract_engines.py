import random

import pytest

from data_pipeline.config import ExtractSection
from data_pipeline.extract import engines
from data_pipeline.extract.engines import MAX_PAGE_BYTES, open_extractor
from data_pipeline.extract.watchdog import PageRejected, Watchdog

ENGINES = ["resiliparse", "trafilatura"]


def page(n: int) -> bytes:
    draw = random.Random(n)
    sentences = [" ".join(f"word{draw.randrange(300)}" for _ in range(14)) + "." for _ in range(12)]
    paragraphs = "".join(f"<p>{' '.join(sentences[i : i + 3])}</p>" for i in range(0, 12, 3))
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/b'>Birds</a></li></ul></nav>"
    comments = "<div id='comments'><p>First!</p></div>"
    body = f"{menu}<main><article><h1>Page {n}</h1>{paragraphs}<p>É.</p></article></main>{comments}"
    return f"<html><head><title>T</title></head><body>{body}</body></html>".encode("latin-1")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_article_stays_and_the_frame_goes(engine: str) -> None:
    text = open_extractor(ExtractSection(engine=engine))(page(1), "iso-8859-1")
    assert text.count("word") == 12 * 14
    assert "É." in text
    assert "Home" not in text
    assert text == text.strip()
    assert "\n\n\n" not in text


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pages_text_does_not_depend_on_the_pages_before_it(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_PAGES_BYTES_BETWEEN_RESETS", 20_000)
    extract = open_extractor(ExtractSection(engine=engine))
    # The same page again and again is what duplicate detection would drop.
    order = [*range(20), *[3] * 10]
    first = {n: extract(page(n), "") for n in order}
    random.Random(1).shuffle(order)
    assert all(extract(page(n), "") == first[n] for n in order)
    assert len(set(first.values())) == 20


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\x00",
        b"no markup",
        b"<html></html>",
        b"<html><body><script>x=1</script></body></html>",
        b"<" * 3000,
        b"&#xD800;<p>\xff\xfe\xfd",
        b"<?xml version='1.0' encoding='no-such'?><html><p>a</p></html>",
        b"<p>" + b"\x0b\x0c\x01" * 50,
        b"<html><body>" + b"<b>" * 2000 + b"x",
    ],
)
def test_no_page_ends_the_task(engine: str, bad: bytes) -> None:
    with Watchdog(20.0) as watchdog:
        text, reason = watchdog.run(0, open_extractor(ExtractSection(engine=engine)), bad, "")
    assert isinstance(text, str)
    assert reason in ("", "extract.failed")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_page_that_would_take_the_workers_memory_is_refused(engine: str) -> None:
    with pytest.raises(PageRejected, match=r"extract.too_large"):
        open_extractor(ExtractSection(engine=engine))(b"a" * (MAX_PAGE_BYTES + 1), "")
