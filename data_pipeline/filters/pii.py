"""Personal data in texts: e-mail addresses, telephone numbers, IP addresses and card numbers get stand-ins.

The same value always gets the same stand-in, a function of its xxh3_64 hash and the salt, in every document and run;
stand-ins are values that the standards keep free for examples, so that nobody is reached by them, and are themselves
left alone, so that running the filter again changes nothing:

    e-mail    user-3f2a9c@example.com                     RFC 2606
    telephone +1-NXX-555-01XX                             numbers for fiction, NANPA
    IPv4      192.0.2.N, 198.51.100.N, 203.0.113.N        RFC 5737
    IPv6      2001:db8::XXXX:XXXX                         RFC 3849
    card      0000-NNNN-NNNN-NNNN                         no issuer's number begins with 0 (ISO/IEC 7812)

What is taken for one. E-mail: not `logo@2x.png`. IPv4: four numbers up to 255 with no digit, letter or further dot next
to them; without a word such as `IP` or `server` before them, four numbers below 32 are a version or a section
(12.2.0.1) rather than an address (one in 4,096 of them), as is what follows `v`, `version` and the like or `name/`.
IPv6: what `ipaddress` reads, within 2000::/3. Cards: the issuer's prefix and length, groups as printed, and the check
digit (Luhn, ISO/IEC 7812-1 annex B). Telephone: +country with 8 to 15 digits (ITU-T E.164), and (NXX) NXX-XXXX,
NXX-NXX-XXXX, NXX.NXX.XXXX of North America; so no dates, prices or ISBNs.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import xxhash

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView

Kind = Literal["email", "ip", "card", "phone"]

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z0-9_][A-Za-z0-9._%+'-]{0,63}@"
    r"((?:[A-Za-z0-9\u00c0-\u024f](?:[A-Za-z0-9\u00c0-\u024f-]{0,61}[A-Za-z0-9\u00c0-\u024f])?\.){1,8}"
    r"(?:[A-Za-z]{2,24}|xn--[a-z0-9-]{2,59}))(?![A-Za-z0-9\u00c0-\u024f@_-])"
)
_RESERVED_DOMAIN = re.compile(r"(?:^|\.)(?:example\.(?:com|net|org)|example|test|invalid|localhost)$")
_FILE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".css", ".js", ".scss")
_IPV4 = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?!\w|\.[0-9]|-[A-Za-z]|-[0-9]+(?![0-9.]))")
_IPV6 = re.compile(
    r"(?<![\w:.])(?:[23][0-9A-Fa-f]{3}|[fF][cCdDeE][0-9A-Fa-f]{2})(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]|\.[0-9])"
)
_IPV4_NEIGHBOUR = re.compile(r"[\w.]$|[^\W\d]-$")
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:v|ver|vers|versions?|release|rel|build|firmware|revision|rev|patch|update|section|chapter|sec|art|figure|"
    r"table|rfc|oid)[.:#]?\s*|§\s*|[A-Za-z)]/)$",
    re.IGNORECASE,
)
_ADDRESS_BEFORE = re.compile(
    r"\b(?:ips?|ipv4|address(?:es)?|server|host|hosts|dns|ping|gateway|proxy|router|client|from|subnet|://)\b\W*(?:is\W+)?$"
    r"|://$|@$",
    re.IGNORECASE,
)
# What every match has in it, in a form that is searched for quickly.
_HAS_IPV4 = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_HAS_CARD = re.compile(r"[0-9][0-9]{3}[ -]?[0-9]{4}[0-9 -]")
_HAS_PHONE = re.compile(r"\+[0-9]|[0-9][0-9]{2}[.)-] ?[0-9]{3}[ .-][0-9]{4}")
_CONTEXT_CHARACTERS = 24
_LARGEST_VERSION_PART = 32
_CARD = re.compile(
    r"(?<![\w.,/=+#&?:-])(?:"
    r"(?:[2456][0-9]{3}|35[0-9]{2})"
    r"(?:(?P<sign>[ -])(?:[0-9]{4}(?P=sign)){2}[0-9]{4}(?:(?P=sign)[0-9]{3})?|[0-9]{12,15}|[0-9]{9})"
    r"|3[4-7][0-9]{2}(?:(?P<amex>[ -])[0-9]{6}(?P=amex)[0-9]{5}|[0-9]{11})"
    r"|3[0689][0-9]{2}(?:(?P<diners>[ -])[0-9]{6}(?P=diners)[0-9]{4}|[0-9]{10})"
    r")(?![\w/=@-]|[.,][0-9]| [0-9])"
)
_ISSUERS = tuple(
    (re.compile(prefix), frozenset(lengths))
    for prefix, lengths in (
        (r"4", (13, 16, 19)),  # Visa
        (r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),  # Mastercard
        (r"3[47]", (15,)),  # American Express
        (r"6011|64[4-9]|65", range(16, 20)),  # Discover
        (r"30[0-5]|3[689]", (14,)),  # Diners Club
        (r"352[89]|35[3-8]", range(16, 20)),  # JCB
        (r"62", range(16, 20)),  # UnionPay
    )
)
_STAND_IN_PHONE = r"\+1-[2-9][0-9][0-9]-555-01[0-9][0-9](?![0-9])"
_PHONE = re.compile(
    rf"(?P<stand_in>{_STAND_IN_PHONE})"
    r"|(?<![\w+.,=-])\+(?P<international>[1-9][0-9]{0,2}(?:[ .-]?\([0-9]{1,4}\)|(?:[ ./-]|)[0-9]){4,20}[0-9])"
    r"(?![\w@]|[.,][0-9])"
    r"|(?<![\w+.,/=$€£#(-])(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.-])[2-9][0-9]{2}[ .-][0-9]{4}"
    r"(?![\w@/-]|[.,][0-9])"
)
_FEWEST_DIGITS, _MOST_DIGITS = 8, 15
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:([ .,])000)(?:\1[0-9]{3})*")
_NO_DIGIT = re.compile(r"\D+")


@dataclass(frozen=True, slots=True)
class Pii(Settings):
    """What is replaced."""

    counts: ClassVar[tuple[str, ...]] = ("emails", "ip_addresses", "cards", "phones")

    kinds: tuple[Kind, ...] = ("email", "ip", "card", "phone")
    public_addresses_only: bool = True
    """Leave addresses alone that belong to no one: 10.0.0.0/8, 127.0.0.1, fe80::/10 and the like."""
    salt: str = ""
    """Another salt, other stand-ins; with a secret one, nobody can find the stand-in of a value that he knows."""


def bind_pii(settings: Pii) -> Apply:
    """The cleaning function."""
    salt = settings.salt.encode()
    kinds = frozenset(settings.kinds)

    def apply(view: TextView) -> Finding:
        text = view.text
        counts = dict.fromkeys(Pii.counts, 0)
        if "email" in kinds and "@" in text:
            text, counts["emails"] = _replace_all(_EMAIL, lambda found: _email(found, salt), text)
        if "ip" in kinds:
            text, counts["ip_addresses"] = _replace_ips(text, salt, public_only=settings.public_addresses_only)
        if "card" in kinds and _HAS_CARD.search(text):
            text, counts["cards"] = _replace_all(_CARD, lambda found: _card(found, salt), text)
        if "phone" in kinds and _HAS_PHONE.search(text):
            text, counts["phones"] = _replace_all(_PHONE, lambda found: _phone(found, salt), text)
        return Finding(counts, text if any(counts.values()) else None)

    return apply


def passes_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    doubled = [int(digit) * 2 for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(value - 9 * (value > 9) for value in doubled)) % 10 == 0


def _replace_all(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str) -> tuple[str, int]:
    """(text, replaced); `replace` gives an empty string for a match that stays."""
    n_replaced = 0

    def put(match: re.Match[str]) -> str:
        nonlocal n_replaced
        stand_in = replace(match)
        n_replaced += bool(stand_in)
        return stand_in or match[0]

    return pattern.sub(put, text), n_replaced


def _hash(value: str, salt: bytes) -> int:
    return xxhash.xxh3_64_intdigest(salt + b"\0" + value.encode("utf-8", "surrogatepass"))


def _email(match: re.Match[str], salt: bytes) -> str:
    value = match[0].lower()
    if _RESERVED_DOMAIN.search(match[1].lower()) or value.endswith(_FILE_ENDINGS):
        return ""
    return f"user-{_hash(value, salt) % 2**24:06x}@example.com"


def _replace_ips(text: str, salt: bytes, *, public_only: bool) -> tuple[str, int]:
    n_ipv6 = 0
    if "::" in text or text.count(":") >= 7:
        text, n_ipv6 = _replace_all(_IPV6, lambda found: _ipv6(found, salt, public_only=public_only), text)
    n_ipv4 = 0
    if _HAS_IPV4.search(text):
        text, n_ipv4 = _replace_all(_IPV4, lambda found: _ipv4(found, salt, public_only=public_only), text)
    return text, n_ipv4 + n_ipv6


def _ipv4(match: re.Match[str], salt: bytes, *, public_only: bool) -> str:
    try:
        address = ipaddress.IPv4Address(match[0])
    except ValueError:
        return ""
    if any(address in network for network in _DOCUMENTATION_V4) or (public_only and not address.is_global):
        return ""
    before = match.string[max(match.start() - _CONTEXT_CHARACTERS, 0) : match.start()]
    if _IPV4_NEIGHBOUR.search(before) or _is_version(match[0], before):
        return ""
    drawn = _hash(str(address), salt)
    network = _DOCUMENTATION_V4[drawn % 3]
    return str(network[1 + drawn // 3 % 254])


def _is_version(value: str, before: str) -> bool:
    if _VERSION_BEFORE.search(before) and not before.endswith("//"):
        return True
    return all(int(part) < _LARGEST_VERSION_PART for part in value.split(".")) and not _ADDRESS_BEFORE.search(before)


def _ipv6(match: re.Match[str], salt: bytes, *, public_only: bool) -> str:
    try:
        address = ipaddress.IPv6Address(match[0])
    except ValueError:
        return ""
    if address in _DOCUMENTATION_V6 or (public_only and not address.is_global):
        return ""
    drawn = _hash(str(address), salt) % 2**32
    return f"2001:db8::{drawn >> 16 | 1:x}:{drawn & 0xFFFF | 1:x}"


def _card(match: re.Match[str], salt: bytes) -> str:
    digits = _NO_DIGIT.sub("", match[0])
    is_issued = any(len(digits) in lengths and prefix.match(digits) for prefix, lengths in _ISSUERS)
    if not is_issued or not passes_luhn(digits) or len(set(digits)) == 1:
        return ""
    drawn = f"{_hash(digits, salt) % 10**12:012}"
    return f"0000-{drawn[:4]}-{drawn[4:8]}-{drawn[8:]}"


def _phone(match: re.Match[str], salt: bytes) -> str:
    if match["stand_in"]:
        return ""
    digits = _NO_DIGIT.sub("", match[0])
    if match["international"]:
        if not _FEWEST_DIGITS <= len(digits) <= _MOST_DIGITS or _THOUSANDS.fullmatch(match["international"]):
            return ""
    else:
        digits = "1" + digits[-10:]
    drawn = _hash(digits, salt)
    # Area codes N11 are services.
    area = 200 + drawn // 100 % 800
    return f"+1-{area + (area % 100 == 11)}-555-01{drawn % 100:02}"


_DOCUMENTATION_V4 = tuple(map(ipaddress.IPv4Network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")))
_DOCUMENTATION_V6 = ipaddress.IPv6Network("2001:db8::/32")
