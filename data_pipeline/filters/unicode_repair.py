"""Characters put right: one form for each, none that nobody sees, and UTF-8 that was read in the wrong charset.

1. Line ends are line feeds: carriage returns, vertical tabs, form feeds, line and paragraph separators become one.
2. Mojibake, UTF-8 that was decoded as Windows-1252 or Latin-1, is decoded again where that is possible and the
   characters cannot have been meant: two sequences in a row (`Ð¿Ñ€`), an undefined byte, `â€™` and its like, `ðŸ˜€`,
   and a capital with a sign behind it (`Ã©`), unless it may be the end of a word in capitals with a quotation mark or
   space behind. `vérité »`, `Maß` before a soft hyphen and `Úžasné` are valid UTF-8 as well, and stay. Several layers
   are taken off.
3. Control characters of Latin-1's range that are signs in Windows-1252 become these signs.
4. Characters without a glyph go: controls, byte order marks, soft hyphens, word joiners, non-characters; zero-width
   spaces but between letters of Thai, Lao, Burmese and Khmer, which they separate; zero-width (non-)joiners but where
   a script or an emoji needs them.
5. Unicode normal form C. Lone surrogates become U+FFFD; replacement characters are counted.

Running it again changes nothing. Source: the idea of step 2 is ftfy's (Speer, "ftfy"), the mapping of step 3 the
Encoding standard's windows-1252; ftfy's own tables of what is likely cost 2 ms and more a document, and it also
straightens quotation marks and unescapes HTML, which change good text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView

# Windows-1252 leaves five bytes undefined; as in the Encoding standard they are the control characters of Latin-1.
_WINDOWS_1252 = {
    byte: bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte)
    for byte in range(0x80, 0xA0)
}
_BYTE_OF = {ord(character): byte for byte, character in _WINDOWS_1252.items()}
_SIGN_OF = {byte: character for byte, character in _WINDOWS_1252.items() if ord(character) != byte}

_HIGH = "\x80-\x9f" + "".join(map(re.escape, _SIGN_OF.values()))
_TAIL = f"[{_HIGH}\xa0-\xbf]"
_SEQUENCE = f"[\xc2-\xde]{_TAIL}|[\xe0-\xef]{_TAIL}{{2}}|\xf0{_TAIL}{{3}}"
_MOJIBAKE = re.compile(f"(?:{_SEQUENCE})+")
_MAY_BE_MOJIBAKE = re.compile(f"[\xc2-\xde\xe0-\xf0]{_TAIL}")
_UNNATURAL_BEGINNINGS = (
    "\xe2\u20ac",
    "\xe2\u201a",
    "\xe2\u201e",
    "\xe2\u2020",
    "\xef\xbb\xbf",
    "\xef\xbf\xbd",
    "\xf0\u0178",
)
"""Of quotation marks and dashes, the euro, the trade mark, arrows, the byte order mark, U+FFFD and emoji."""
_LETTERS_OF_WORDS = frozenset("\u0160\u0152\u017d\u0161\u0153\u017e\u0178")
_MAY_FOLLOW_A_WORD = frozenset(
    "\u2019\u201d\u2018\u201c\u201a\u201e\u2039\u203a\u2013\u2014\u2026\u2022\u2122\xa0\xab\xbb\xb7\xae\xb0\xb9\xb2\xb3"
)
_ASCII_UNWANTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_LETTERS_WITH_JOINERS = (
    "\u0590-\u1cff\ua800-\uabff\ufb1d-\ufdff\ufe0f\ufe70-\ufefc\u2190-\u2bff\U00010800-\U00011fff\U0001f000-\U0001faff"
)
_LETTERS_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\u2028\u2029]")
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u2060-\u2064\ufeff\ufff9-\ufffb\ufffe\uffff]"
    f"|(?<![{_LETTERS_WITHOUT_SPACES}])\u200b|\u200b(?![{_LETTERS_WITHOUT_SPACES}])"
    f"|(?<![{_LETTERS_WITH_JOINERS}])[\u200c\u200d]|[\u200c\u200d](?![{_LETTERS_WITH_JOINERS}])"
)
_SUSPECT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200d\u2028\u2029\u2060-\u2064\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]"
)
"""Whatever steps 1, 3 and 4 may change: one search spares clean texts the others."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class UnicodeRepair(Settings):
    """Thresholds and what is repaired."""

    counts: ClassVar[tuple[str, ...]] = ("repaired_characters", "removed_characters")

    max_replacement_characters: float | None = None
    """Share of U+FFFD among the characters, after the repair."""
    mojibake: bool = True
    """Decode again what was read in the wrong charset."""


def bind_unicode_repair(settings: UnicodeRepair) -> Apply:
    """The cleaning function."""

    def apply(view: TextView) -> Finding:
        text = view.text
        counts = {"repaired_characters": 0.0, "removed_characters": 0.0}
        while not _is_clean(text):
            before = text
            text = _repair_once(text, counts, mojibake=settings.mojibake)
            if text == before:
                break
        replaced = 0 if text.isascii() else text.count("\ufffd")
        share = replaced / len(text) if text else 0.0
        return Finding({"replacement_characters": share, **counts}, None if text == view.text else text)

    return apply


def repair_mojibake(text: str) -> str:
    """The text with UTF-8 that was read as Windows-1252 or Latin-1 decoded as UTF-8, one layer of it."""
    return _MOJIBAKE.sub(_decode_again, text) if _MAY_BE_MOJIBAKE.search(text) else text


def _is_clean(text: str) -> bool:
    return text.isascii() and not _ASCII_UNWANTED.search(text)


def _repair_once(text: str, counts: dict[str, float], *, mojibake: bool) -> str:
    if mojibake:
        # All layers before the controls go: a lower layer's undefined bytes are controls.
        n_before = len(text)
        while (repaired := repair_mojibake(text)) != text:
            text = repaired
        counts["repaired_characters"] += n_before - len(text)
    if _SUSPECT.search(text):
        text = _LINE_ENDS.sub("\n", text).translate(_SIGN_OF)
        cleaned = _UNSEEN.sub("", text)
        counts["removed_characters"] += len(text) - len(cleaned)
        text = _SURROGATE.sub("\ufffd", cleaned)
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _decode_again(match: re.Match[str]) -> str:
    run = match[0]
    try:
        decoded = bytes(_BYTE_OF.get(ord(character), ord(character) & 0xFF) for character in run).decode("utf-8")
    except UnicodeDecodeError:
        return run
    if not (_is_unnatural_pair(match) if len(run) == 2 else _is_unnatural_run(run, decoded)):
        return run
    return decoded if all(unicodedata.category(character) not in ("Cn", "Co", "Cs") for character in decoded) else run


def _is_unnatural_run(run: str, decoded: str) -> bool:
    """Whether one sequence of three or four bytes, or several of any length, cannot be text."""
    if len(decoded) > 1:
        return not _LETTERS_OF_WORDS.issuperset(character for character in run if not "\xc0" <= character <= "\xff")
    return run.startswith(_UNNATURAL_BEGINNINGS) or any("\x80" <= character <= "\x9f" for character in run)


def _is_unnatural_pair(match: re.Match[str]) -> bool:
    """Whether a capital and the character behind it cannot be the end of a word and what follows, or part of one."""
    text, start, lead, sign = match.string, match.start(), match[0][0], match[0][1]
    before = text[start - 1 : start]
    if "\x80" <= sign <= "\x9f" or before.islower():
        return True
    if before.isupper():
        return False
    if lead in "\xc2\xc3":
        return sign not in _MAY_FOLLOW_A_WORD or text[match.end() : match.end() + 1].islower()
    return sign not in _MAY_FOLLOW_A_WORD and sign not in _LETTERS_OF_WORDS
