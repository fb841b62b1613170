import pytest

from data_pipeline.extract.html import decode_page, extract_html

PAGE = """<html><head><title>Ducks</title></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/b">Birds</a></li></ul></nav>
<main><article><h1>Ducks</h1>
<p>Ducks are birds that live on ponds and rivers in most parts of the world.</p>
<p>They eat plants, insects and small fish, and they sleep on the water at night.</p>
<pre>def quack(n):
    for _ in range(n):
        say("quack")
</pre></article></main>
<footer><p>Copyright 2024 by the pond</p></footer></body></html>"""


def test_main_content_keeps_paragraphs_and_code_and_drops_the_frame() -> None:
    text = extract_html(PAGE.encode())
    assert "Ducks are birds that live on ponds and rivers in most parts of the world.\n\nThey eat plants" in text
    assert 'def quack(n):\n    for _ in range(n):\n        say("quack")' in text
    assert "Home" not in text
    assert "Copyright" not in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize("page", [b"", b"<html></html>", b"<html><body><script>x=1</script></body></html>", b"\x00"])
def test_a_page_without_text_gives_nothing(page: bytes) -> None:
    assert extract_html(page) == ""


RUSSIAN = "<p>Утки плавают на пруду.</p>"


@pytest.mark.parametrize(
    ("page", "http_charset", "text"),
    [
        (RUSSIAN.encode("koi8-r"), "koi8-r", RUSSIAN),
        (b'<meta charset="windows-1251">' + RUSSIAN.encode("cp1251"), "", RUSSIAN),
        (b'<meta http-equiv="x" content="text/html; charset=koi8-r">' + RUSSIAN.encode("koi8-r"), "", RUSSIAN),
        (b'<meta charset="koi8-r">' + RUSSIAN.encode(), "utf-8", RUSSIAN),  # HTTP before HTML
        (RUSSIAN.encode("cp1251"), "utf-8", RUSSIAN),  # a wrong header is not believed
        (b"\xef\xbb\xbf" + RUSSIAN.encode(), "koi8-r", RUSSIAN),  # a byte order mark before all
        (RUSSIAN.encode(), "", RUSSIAN),
        (RUSSIAN.encode(), "no-such-charset", RUSSIAN),
        ("<p>caf\u00e9 \u201cquoted\u201d</p>".encode("cp1252"), "iso-8859-1", "<p>caf\u00e9 \u201cquoted\u201d</p>"),
        ("<p>日本語のページ</p>".encode("euc-jp"), "euc-jp", "<p>日本語のページ</p>"),
    ],
)
def test_the_charset_that_applies_is_found(page: bytes, http_charset: str, text: str) -> None:
    assert decode_page(page, http_charset).endswith(text)


def test_one_stray_byte_does_not_change_the_charset_of_a_page() -> None:
    page = ("é" * 2000).encode() + b"\xff"
    assert decode_page(page, "utf-8") == "é" * 2000 + "\ufffd"
