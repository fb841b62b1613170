"""FineWeb's own rules, which catch lists and menus that passed the others.

Source: Penedo et al. 2024, "The FineWeb Datasets", section 3.5, and datatrove's fineweb_quality_filter.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView, count_repeats

_TERMINAL_RANGES = """
0021 002E 003F 0589 061D-061F 06D4 0700-0702 07F9 0837 0839 083D-083E 0964-0965 104A-104B 1362 1367-1368 166E 1735-1736
17D4-17D6 17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049
2E2E 2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52
FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD
111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 11946
11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F 1DA88
"""
TERMINAL_PUNCTUATION = frozenset(
    chr(code)
    for first, _, last in (part.partition("-") for part in _TERMINAL_RANGES.split())
    for code in range(int(first, 16), int(last or first, 16) + 1)
)
"""Signs that end a sentence, closing quotes and brackets not among them. Source: datatrove's utils/text.py, which is
Unicode's property Sentence_Terminal and three Khmer signs."""


@dataclass(frozen=True, slots=True)
class FineWeb(Settings):
    """Thresholds; a text without lines has no punctuated ones, and no other measure above 0."""

    min_punctuated_lines: float | None = 0.12
    """Share of lines that end with terminal punctuation."""
    max_short_lines: float | None = 0.67
    """Share of lines of at most `short_line_characters`."""
    max_duplicate_line_characters: float | None = 0.01
    """Share of the characters that stand in lines that occurred before."""
    max_newlines_per_word: float | None = 0.3
    short_line_characters: int = 30


def bind_fineweb(settings: FineWeb) -> Apply:
    """The measuring function."""

    def apply(view: TextView) -> Finding:
        lines = view.lines
        if not lines:
            return Finding(dict.fromkeys(_MEASURES, 0.0))
        newlines = view.text.count("\n")
        _, duplicate_characters = count_repeats(lines)
        values = (
            sum(line.rstrip()[-1] in TERMINAL_PUNCTUATION for line in lines) / len(lines),
            sum(len(line) <= settings.short_line_characters for line in lines) / len(lines),
            duplicate_characters / (len(view.text) - newlines),
            newlines / view.words.n_tokens,
        )
        return Finding(dict(zip(_MEASURES, values, strict=True)))

    return apply


_MEASURES = ("punctuated_lines", "short_lines", "duplicate_line_characters", "newlines_per_word")
