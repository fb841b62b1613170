"""Lines that belong to a page's frame rather than its text, and what is left of its markup.

A line goes if it is, as a whole, a piece of navigation, a button, a share or follow link, "Read more", a breadcrumb, a
copyright line, a notice about cookies or JavaScript, or a line of CSS, script or template. A line of prose (eight words
or more that end like a sentence) goes only if it begins as such a notice does: "We use cookies ...", "(c) 2024 ...".

Source: the idea and some of the phrases are those of C4 (Raffel et al. 2020, section 2.2: policy and JavaScript lines)
and RefinedWeb (Penedo et al. 2023, section G.2: "items in cart", "Read more...", "Sign-in"), which drop a page if more
than 5 % of its words went; that is `max_removed_characters: 0.05` here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.filters.line_dedup import without_lines
from data_pipeline.filters.markup import strip_markup
from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView

_PHRASES = frozenset(
    phrase
    for row in (
        "home|homepage|menu|main menu|navigation|skip to content|skip to main content|skip navigation",
        "jump to navigation",
        "log in|login|log out|sign in|sign-in|sign up|sign out|register|my account|create account|forgot password",
        "cart|view cart|checkout|add to cart|my cart|shopping cart|add to wishlist|items in cart|buy now",
        "next|previous|prev|next page|previous page|next post|previous post|older posts|newer posts|back",
        "back to top|top",
        "share|share this|share this post|share this article|share this page|tweet|retweet|pin it|copy link|print",
        "print this page|email this|facebook|twitter|whatsapp|pinterest|linkedin|reddit|tumblr|instagram|telegram|rss",
        "rss feed|subscribe|subscribe now|follow|follow us|unsubscribe|newsletter|advertisement|advertisements",
        "sponsored|sponsored content|read more|read the full story|continue reading|learn more|find out more|more info",
        "click here|load more|show more|see more|see all|view all|view more|related posts|related articles",
        "you may also like|you might also like|recommended for you|most read|most popular|trending|leave a comment",
        "leave a reply|post a comment|add a comment|no comments|reply|report abuse|flag as inappropriate|like",
        "privacy|privacy policy|privacy notice|terms of use|terms of service|terms and conditions|terms & conditions",
        "terms|disclaimer|legal notice|imprint|cookie policy|cookie settings|cookie preferences|cookies",
        "site map|sitemap",
        "contact us|about us|accept|accept all|accept cookies|accept all cookies|reject all|decline|got it|i agree",
        "manage cookies|manage preferences|all rights reserved|close|loading|please wait|toggle navigation|search",
        "weiterlesen|mehr lesen|mehr erfahren|impressum|datenschutz|datenschutzerklärung|agb|startseite",
        "nach oben|teilen",
        "drucken|zum inhalt springen|anzeige|werbung|anmelden|kommentar schreiben|alle rechte vorbehalten",
        "lire la suite|en savoir plus|mentions légales|accueil|partager|imprimer|tous droits réservés|publicité",
        "leer más|seguir leyendo|compartir|imprimir|aviso legal|inicio|todos los derechos reservados|publicidad",
        "leia mais|saiba mais|compartilhar|leggi tutto|continua a leggere|condividi|lees meer|lees verder",
        "czytaj więcej",
        "続きを読む|もっと見る|阅读更多|返回顶部",
    )
    for phrase in row.split("|")
)
_SHORT_BEGINNINGS = re.compile(
    r"(?:read|see|view|show|load|learn) (?:more|all)\b|continue reading\b|share (?:this|on|via|it)\b|tweet this\b|"
    r"follow (?:us|me) on\b|(?:like|find|join) us on\b|click (?:here|to) (?:to|share|print|email)\b|"
    r"leave a (?:comment|reply)\b|"
    r"\d+ (?:comments?|shares?|likes?|views?|retweets?|items? in (?:your )?cart)\b|posted in:?\b|filed under\b|tags?:|"
    r"tagged (?:with|as)\b|categor(?:y|ies):|powered by\b|designed by\b|log ?in to\b|sign (?:in|up) (?:to|for|with)\b|"
    r"you must be logged in\b|skip to\b|jump to\b|back to (?:top|home)\b|save my name, email\b|"
    r"(?:enter )?your email(?: address)?\b|(?:all )?rights reserved\b",
    re.IGNORECASE,
)
_NOTICES = re.compile(
    r"(?:we|this (?:web)?site|our (?:web)?sites?|the (?:web)?site|our partners and we|we and our partners) (?:also )?"
    r"(?:uses?|may use|store|employs?) (?:\w+ ){0,3}?(?:cookies|and/or access information)\b|"
    r"(?:by|if you) (?:continu(?:e|ing)|us(?:e|ing)|brows(?:e|ing)|click(?:ing)?|clos(?:e|ing)|"
    r"accept(?:ing)?)\b.{0,100}"
    r"\b(?:cookies|privacy policy|cookie policy|terms of (?:use|service))\b|cookies (?:help us|are used|are small)\b|"
    r"(?:please |you (?:need|have) to )?(?:enable|activate|turn on) (?:javascript|cookies)\b|"
    r"javascript (?:is|must be|seems to be|appears to be) (?:currently )?(?:disabled|enabled|required|turned off)\b|"
    r"(?:sorry, )?(?:your|this) browser (?:does not|doesn.t|is not|isn.t) support|"
    r"this (?:site|form) is protected by recaptcha\b|"
    r"(?:copyright\s*)?(?:©|\(c\))\s*(?:copyright\s*)?(?:\d{4}|[\w .,&-]{2,60}\d{4})|copyright (?:by )?\d{4}\b|"
    r"(?:sign up|subscribe) (?:for|to) (?:our|the) (?:[\w-]+ ){0,4}newsletter\b|"
    r"diese (?:web)?seite verwendet cookies\b|"
    r"wir verwenden cookies\b|ce site utilise des cookies\b|nous utilisons des cookies\b|"
    r"este sitio (?:web )?utiliza cookies\b",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"(?:\$\(document\)|jQuery\(|\(function\s*\(|window\.\w+\s*=|document\.(?:write|getElement|create|cookie)|"
    r"var _?(?:gaq|gtag|paq|hmt|fbq|qevents|comscore|adsense)\b|_gaq\.push|gtag\(|fbq\(|ga\('|googletag\.|"
    r"dataLayer\b|//<!\[CDATA\[|//\]\]>|<!\[CDATA\[|@(?:media|import|font-face|charset)\b.*[;{]$|"
    r"(?:color|background(?:-\w+)?|margin(?:-\w+)?|padding(?:-\w+)?|font(?:-\w+)?|border(?:-\w+)?|width|"
    r"height|display|float|"
    r"position|text-\w+|line-height|overflow|z-index|opacity|max-width|min-height)\s*:\s*[^;{}]{1,80};\s*\}?$|"
    r"\{%.*%\}$|<%.*%>$|<\?(?:php|xml)\b.*|"
    r"[.#@a-zA-Z][\w.#:>, -]{0,100}\{[^{}]{0,300}:[^{}]{0,300}\}$|[.#][\w.#:>, -]{1,100}\{$)"
)
_BETWEEN_LINKS = re.compile(r"\s+[|·•»\u203a>/\u2013-]\s+|\s*[|·•»\u203a]\s*")
_EDGES = " \t\u00a0.…:!?»«\u203a\u2039>→←↑▲▼|·•*+-[]()\u200b"
_SENTENCE_ENDS = (".", "!", "?", "…", '"', "”", "\u2019", "»", ")", "。", "\uff01", "\uff1f")
_LONGEST_SHORT_LINE = 80
_LONGEST_NOTICE = 400
_PROSE_WORDS = 8


@dataclass(frozen=True, slots=True)
class Boilerplate(Settings):
    """Thresholds and what is cleaned."""

    counts: ClassVar[tuple[str, ...]] = ("removed_lines", "markup_characters")

    max_removed_characters: float | None = None
    """Share of the characters that went, with lines or as markup."""
    lines: bool = True
    """Remove lines of the page's frame."""
    markup: bool = True
    """Remove tags, entities, wiki and BBCode marks inside lines."""


def bind_boilerplate(settings: Boilerplate) -> Apply:
    """The cleaning function."""

    def apply(view: TextView) -> Finding:
        text = strip_markup(view.text) if settings.markup else view.text
        markup_characters = len(view.text) - len(text)
        removed_lines = 0
        if settings.lines:
            lines = text.split("\n")
            removed = {position for position, line in enumerate(lines) if line and is_boilerplate(line)}
            removed_lines = len(removed)
            text = without_lines(lines, removed) if removed else text
        measures = {
            "removed_characters": (len(view.text) - len(text)) / len(view.text) if view.text else 0.0,
            "removed_lines": removed_lines,
            "markup_characters": markup_characters,
        }
        return Finding(measures, None if text == view.text else text)

    return apply


def is_boilerplate(line: str) -> bool:
    """Whether a line is part of a page's frame."""
    if len(line) > _LONGEST_NOTICE:
        return False
    bare = line.strip(_EDGES)
    if not bare:
        return False
    if _NOTICES.match(bare) or _NOTICES.match(line.lstrip()):
        return True
    if is_prose(line):
        return False
    return _CODE.match(line.strip()) is not None or (len(line) <= _LONGEST_SHORT_LINE and _is_link(bare))


def is_prose(line: str) -> bool:
    """Whether a line has eight words or more and ends like a sentence."""
    return line.rstrip().endswith(_SENTENCE_ENDS) and len(line.split()) >= _PROSE_WORDS


def _is_link(bare: str) -> bool:
    """Whether a short line is a link of the frame, a row of them, or a breadcrumb."""
    lower = bare.lower()
    if lower in _PHRASES or _SHORT_BEGINNINGS.match(bare):
        return True
    parts = [part.strip(_EDGES) for part in _BETWEEN_LINKS.split(lower)]
    return len(parts) > 1 and (
        parts[0] in ("home", "startseite", "accueil", "inicio") or all(p in _PHRASES for p in parts)
    )
