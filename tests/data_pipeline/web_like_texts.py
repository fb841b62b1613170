"""Texts that look like extracted web pages, some good and most with one fault or another; the same on every run."""

import random

_STOP_WORDS = ["the", "be", "to", "of", "and", "that", "have", "with"]
_NOUNS = [
    "duck",
    "goose",
    "swan",
    "heron",
    "reed",
    "pond",
    "river",
    "marsh",
    "feather",
    "nest",
    "egg",
    "wing",
    "beak",
    "island",
    "current",
    "winter",
    "season",
]
_VERBS = [
    "swims",
    "rests",
    "waits",
    "dives",
    "returns",
    "calls",
    "hides",
    "feeds",
    "sleeps",
    "follows",
    "watches",
    "leaves",
    "builds",
    "carries",
]
_REST = [
    "quietly",
    "under",
    "over",
    "bright",
    "cold",
    "early",
    "small",
    "large",
    "northern",
    "wild",
    "several",
    "often",
    "perhaps",
    "never",
    "near",
]
_NOTES = ["Read more", "Home", "Share this", "3 comments", "Posted by admin", "Menu", "Next page", "12 / 05 / 2021"]
_ODD = ["javascript is off.", "our privacy policy applies here.", "lorem ipsum dolor sit amet.", "a { b: c }", "# tag"]


def web_like_texts(n_texts: int = 300, seed: int = 7) -> list[str]:
    """That many pages."""
    draw = random.Random(seed)
    return [_page(draw) for _ in range(n_texts)]


def _page(draw: random.Random) -> str:
    stop, full_stop, note, again, odd, digits = (
        draw.choice(choices)
        for choices in (
            [0.0, 0.02, 0.3, 0.3, 0.3, 0.3],
            [0.05, 0.15, 0.9, 0.9, 0.9],
            [0.0, 0.0, 0.0, 0.1, 0.75],
            [0.0, 0.0, 0.0, 0.0, 0.02, 0.3],
            [0.0, 0.0, 0.0, 0.0, 0.04],
            [0.0, 0.0, 0.03, 0.12, 0.4],
        )
    )
    lines: list[str] = []
    for _ in range(draw.choice([0, 3, 10, 25, 25, 25, 45, 45, 60, 60])):
        if lines and draw.random() < again:
            lines.append(draw.choice(lines))
        elif draw.random() < note:
            lines.append(draw.choice(_NOTES))
        elif draw.random() < odd:
            lines.append(f"Here the {draw.choice(_ODD)}")
        else:
            lines.append(_line(draw, stop, full_stop, digits))
    bullet = draw.choice([*[""] * 12, "- ", "\u2022 "])
    return draw.choice(["\n", "\n", "\n\n"]).join(bullet + line for line in lines)


def _line(draw: random.Random, stop: float, full_stop: float, digits: float) -> str:
    words = []
    for _ in range(draw.randint(4, 22)):
        if draw.random() < digits:
            words.append(str(draw.randint(1, 9999)))
        elif draw.random() < stop:
            words.append(draw.choice(_STOP_WORDS))
        else:
            words.append(draw.choice(draw.choice([_NOUNS, _VERBS, _REST])) + draw.choice([*[""] * 17, ",", ".", ";"]))
    end = draw.choice([".", ".", ".", "!", "?", "...", '."']) if draw.random() < full_stop else ""
    return " ".join(words).rstrip(",.").capitalize() + end
