"""Boilerplate and markup.

Measured on 496 extracted pages of 6.8 KB: 0.25 ms a document; 311 lines go, of them 14 with eight words or more that
end like a sentence, every one a notice about cookies, copyright or reCAPTCHA.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.filters.boilerplate import is_boilerplate, is_prose
from data_pipeline.filters.markup import strip_markup
from tests.data_pipeline.filter_case import PAGES, clean, cpu_seconds, extracted_pages, run_filter

PROSE = "The duck that lives under the old bridge swims here every morning."


@pytest.mark.parametrize(
    "line",
    [
        *(
            "Home",
            "Read more...",
            "READ MORE »",
            "Share this:",
            "Skip to content",
            "Log in",
            "3 Comments",
            "Leave a Reply",
        ),
        *(
            "Home | About us | Contact us",
            "Home » News » Local news",
            "Facebook · Twitter · RSS",
            "Follow us on Facebook",
        ),
        *("We use cookies to improve your experience on our website.", "Please enable JavaScript to see this page."),
        *(
            "© 2024 Duck Ltd.",
            "Copyright (c) 2019 The Pond. All rights reserved.",
            "0 items in your cart",
            "Mehr lesen",
        ),
        *("By continuing to use this site you agree to our use of cookies.", "This site is protected by reCAPTCHA."),
        *("$(document).ready(function(){", "window.dataLayer = window.dataLayer || [];", "#main { color: red; }"),
        *("font-size: 12px;", "gtag('js', new Date());", "{% if user %}", ".duck > a {"),
    ],
)
def test_a_line_of_the_frame_goes_and_the_text_around_it_stays(line: str) -> None:
    found = run_filter("boilerplate", f"{PROSE}\n{line}\n{PROSE}\n")
    assert found.text == f"{PROSE}\n{PROSE}\n"
    assert found.measures["boilerplate.removed_lines"] == 1.0
    assert found.failed == []


@pytest.mark.parametrize(
    "line",
    [
        *(
            "Read more books, said the duck to the other ducks.",
            "Cookies taste best when they are still warm.",
            "Tea - milk",
        ),
        *("Home is where the duck sleeps at night, they say.", "He used cookies to lure the duck.", "a < b and c > d"),
        *("Next to the pond", "if (a && b) { return; }", "x = '' or ''", "AT&T & co", "In HTML, <b> makes text bold."),
        *("The tags <b> and </b> enclose bold text.", "List<String> names", "a[i][j] = b[[0]]", "f(x) == g(x) == 1"),
    ],
)
def test_ordinary_lines_stay(line: str) -> None:
    assert clean("boilerplate", line) == line


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("a <b>duck</b> <a href='x.html' class=y>swims</a>", "a duck swims"),
        ("one<br/>two<BR>three", "one\ntwo\nthree"),
        ("a<!-- not\nseen -->b<script type='x'>if (a<b) {}\n</script>c", "abc"),
        ("Tom &amp; Jerry &lt;3 &#8211; &nbsp;&eacute;", "Tom & Jerry <3 \u2013 \xa0\u00e9"),
        ("&amp;amp;amp; &amp;lt;b&amp;gt;x&amp;lt;/b&amp;gt;", "& x"),
        ("[[Duck|the duck]] and '''[[Pond]]'''[edit]", "the duck and Pond"),
        ("== History ==\nx", "History\nx"),
        ("{{infobox}}x[[File:a.png|thumb]]", "x"),
        ("[b]bold [i]both[/i][/b] [url=http://x.org]link[/url][img]http://x/y.png[/img]", "bold both link"),
        ("[caption id='1']A duck[/caption]", "A duck"),
    ],
)
def test_markup_goes_and_its_text_stays(text: str, stripped: str) -> None:
    assert strip_markup(text) == stripped


def test_the_share_that_went_can_be_limited() -> None:
    found = run_filter("boilerplate", "Home\n" + PROSE, max_removed_characters=0.05)
    assert found.measures["boilerplate.removed_characters"] == pytest.approx(5 / (5 + len(PROSE)))
    assert found.failed == ["boilerplate.max_removed_characters"]
    assert clean("boilerplate", "Home\n<b>x</b>", lines=False) == "Home\nx"
    assert clean("boilerplate", "Home\n<b>x</b>", markup=False) == "<b>x</b>"


WORDS = st.lists(st.sampled_from(["the", "duck", "reads", "more", "cookies", "home", "share", "©", "uses"]), min_size=8)


@given(WORDS)
def test_a_sentence_goes_only_where_it_begins_like_a_notice(words: list[str]) -> None:
    line = "Yesterday " + " ".join(words) + "."
    assert clean("boilerplate", line) == line


PIECES = st.sampled_from(
    [
        *(
            "<b>",
            "</b>",
            "<p>",
            "&amp;",
            "lt;",
            "&",
            "amp;",
            "[b]",
            "[/b]",
            "[[",
            "]]",
            "|",
            "{{",
            "}}",
            "==",
            "''",
            "\n",
        ),
        *("a", " ", "Home", "<!--", "-->", "<a href=x>", "</a>", "<", ">", "/", "'", PROSE),
    ]
)


@given(st.lists(PIECES, max_size=14).map("".join))
def test_running_again_changes_nothing_and_nothing_grows(text: str) -> None:
    stripped = strip_markup(text)
    assert len(stripped) <= len(text)
    assert strip_markup(stripped) == stripped
    once = clean("boilerplate", text)
    assert clean("boilerplate", once) == once


@pytest.mark.skipif(not PAGES.is_file(), reason="shared/data/web/pages.warc.gz is not on this machine")
def test_the_prose_of_real_pages_survives() -> None:
    notices = ("cookies", "\u00a9", "recaptcha")
    for text in extracted_pages(PAGES, 150):
        cut = [line for line in text.split("\n") if is_prose(line) and is_boilerplate(line)]
        assert all(any(notice in line.lower() for notice in notices) for line in cut), cut
        kept = set(strip_markup(clean("boilerplate", text)).split("\n"))
        prose = {line for line in strip_markup(text).split("\n") if is_prose(line)}
        assert prose - kept <= set(cut)


@pytest.mark.parametrize("name", ["boilerplate", "line_dedup", "pii", "unicode_repair"])
@pytest.mark.parametrize(
    "unit",
    [
        *("a", " ", "1", "1.", "1-", "+1 ", "a@", "@a.", "[b]", "[[a", "{{a", "<", "<a b=", "<!--", "<script>", "&a"),
        *(
            "==",
            "::",
            "2001:",
            "\u00c3\u00a9",
            "\u00e2\u20ac",
            "\u200b",
            "a|",
            "\u00a9 ",
            "by using ",
            "4111 ",
            "<p>a",
            "a{a:",
        ),
    ],
)
def test_no_text_makes_a_cleaner_slow(name: str, unit: str) -> None:
    text = (unit * 50_000)[:50_000]
    assert cpu_seconds(name, text + "!") < 1.0  # measured: 0.2 at most
