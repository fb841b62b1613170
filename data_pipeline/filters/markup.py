"""What is left of HTML, wiki text and BBCode in extracted text.

Only what cannot be meant as text goes: a tag with attributes, a pair of tags that touches what it encloses
(`<b>bold</b>`, not "between <b> and </b>"), BBCode whose end tag is there, links and templates in double brackets of
wikis. A sentence about a tag keeps the tag.
"""

from __future__ import annotations

import html
import re

_TAGS = (
    "abbr|address|article|aside|blockquote|b|big|body|br|button|caption|center|cite|code|dd|del|details|div|dl|dt|em|"
    "embed|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|iframe|img|input|ins|i|kbd|label|li|link|main|"
    "mark|meta|nav|noscript|object|ol|option|param|picture|pre|p|q|section|select|small|source|span|strike|strong|sub|"
    "summary|sup|svg|s|table|tbody|td|textarea|tfoot|thead|th|tr|tt|ul|u|video|a"
)
_HAS_MARKUP = re.compile(r"<[a-zA-Z/!]|&[a-zA-Z#]|\[[/\[a-zA-Z]|\{\{|==")
_BLOCK_START = re.compile(r"<!--|<(script|style)\b[^<>]{0,500}>", re.IGNORECASE)
_BLOCK_ENDS = {
    "": re.compile("-->"),
    "script": re.compile(r"</script\s{0,9}>", re.IGNORECASE),
    "style": re.compile(r"</style\s{0,9}>", re.IGNORECASE),
}
_LONGEST_BLOCK = 20_000
_BREAK = re.compile(r"<br\s*/?>|(?<=\S)</p>", re.IGNORECASE)
_ATTRIBUTES = r"""(?:\s+[\w:@-]+(?:\s*=\s*(?:"[^"<>\n]{0,1000}"|'[^'<>\n]{0,1000}'|[^\s"'<>]{1,500}))?){1,20}\s*/?"""
_TAG = re.compile(rf"</?(?:{_TAGS})(?:{_ATTRIBUTES}|\s*/)>", re.IGNORECASE)
_PAIR = re.compile(rf"<({_TAGS})>(?=\S)([^<>\n]{{0,5000}})(?<=\S)</\1>", re.IGNORECASE)
_LONE_END = re.compile(rf"(?<=[^\s<>])</(?:{_TAGS})>|^\s*</?(?:{_TAGS})>\s*$", re.IGNORECASE | re.MULTILINE)
_ENTITY = re.compile(r"&(?:[a-zA-Z][a-zA-Z0-9]{1,30}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});")
_WIKI_FILE = re.compile(
    r"\[\[(?:file|image|category|datei|bild|kategorie|fichier|archivo):[^\[\]\n]{0,500}\]\]", re.IGNORECASE
)
_WIKI_LINK = re.compile(r"(?<![\w)\]])\[\[(?=[^\W\d_])(?:[^\[\]|\n]{0,200}\|)?([^\[\]|\n]{1,200})\]\]")
_WIKI_QUOTES = re.compile(r"('{2,3})(?=[^\s'])([^'\n]{0,500})(?<=[^\s'])\1")
_TEMPLATE = re.compile(r"\{\{[^{}\n]{1,500}\}\}")
_HEADING = re.compile(r"^(={2,6})[ \t]*([^=\n]{1,200}?)[ \t]*\1[ \t]*$", re.MULTILINE)
_EDIT_LINK = re.compile(r"\[(?:edit|edit source|citation needed)\]", re.IGNORECASE)
_BBCODE_MEDIA = re.compile(r"\[(img|youtube|media|attach)(?:=[^\]\n]{0,300})?\][^\[\]\n]{0,500}\[/\1\]", re.IGNORECASE)
_BBCODE = re.compile(
    r"\[(b|i|u|s|url|quote|code|color|size|font|center|left|right|list|spoiler|email|align|sub|sup)(?:=[^\]\n]{0,300})?\]"
    r"([^\[\]]{0,5000})\[/\1\]",
    re.IGNORECASE,
)
_SHORTCODE = re.compile(
    r"\[/?(?:caption|gallery|embed|playlist|contact-form-7|mc4wp_form|wpforms|adrotate|vc_\w+|et_pb_\w+|su_\w+|"
    r"fusion_\w+|elementor-template)(?:\s[^\]\n]{0,400})?\]"
)


def strip_markup(text: str) -> str:
    """The text without tags, comments, entities, wiki and BBCode marks; never longer than before.

    Text that was escaped twice is unescaped twice, so that stripping again changes nothing.
    """
    while _HAS_MARKUP.search(text):
        stripped = _strip_once(text)
        if stripped == text:
            break
        text = stripped
    return text


def _strip_once(text: str) -> str:
    if "&" in text:
        text = _ENTITY.sub(_unescape, text)
    if "<" in text:
        text = _BREAK.sub("\n", _strip_blocks(text))
        text = _LONE_END.sub("", _PAIR.sub(r"\2", _TAG.sub("", text)))
    if "[" in text:
        text = _strip_brackets(text)
    if "{{" in text:
        text = _TEMPLATE.sub("", text)
    return _HEADING.sub(r"\2", text) if "==" in text else text


def _strip_blocks(text: str) -> str:
    """The text without comments, scripts and style sheets that have an end within 20,000 characters."""
    kept: list[str] = []
    at = 0
    next_end: dict[str, tuple[int, int]] = {}
    for start in _BLOCK_START.finditer(text):
        if start.start() < at:
            continue
        kind = (start[1] or "").lower()
        # Looked up once for all starts before it, so that many starts without an end cost no more than one.
        if next_end.get(kind, (-1, -1))[0] < start.end():
            found = _BLOCK_ENDS[kind].search(text, start.end())
            next_end[kind] = found.span() if found else (len(text) + _LONGEST_BLOCK, 0)
        end, after = next_end[kind]
        if end - start.start() <= _LONGEST_BLOCK:
            kept.append(text[at : start.start()])
            at = after
    return "".join(kept) + text[at:]


def _strip_brackets(text: str) -> str:
    if "[[" in text:
        linked = _WIKI_LINK.sub(r"\1", _WIKI_FILE.sub("", text))
        # Two apostrophes are the empty string in many a programming language; only next to wiki links are they marks.
        text = _WIKI_QUOTES.sub(r"\2", linked) if linked != text else text
    if "[/" in text:
        text = _BBCODE.sub(r"\2", _BBCODE_MEDIA.sub("", text))
    return _SHORTCODE.sub("", _EDIT_LINK.sub("", text))


def _unescape(match: re.Match[str]) -> str:
    character = html.unescape(match[0])
    # html.unescape knows some names without their semicolon: &notit; would become ¬it;
    return character if len(character) <= 2 and not character.endswith(";") else match[0]
