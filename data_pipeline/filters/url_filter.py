"""Whether an address is on a blocklist: by its domain, itself, or the words in it.

Source: Penedo et al. 2023, "The RefinedWeb Dataset", section G.1 (domains; strict subwords, words and soft words), and
the UT1 blacklists of Université Toulouse Capitole in squidGuard's form, where a listed domain blocks its subdomains
and a listed address the pages below it. Differences from datatrove's url_filter.py: words match in any case, the list
of addresses is compared without the scheme (with it, none ever matches), hosts in Unicode are found by their punycode
and the other way round, every parent of the host is looked up (datatrove: the registered domain and the whole host).
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import xxhash

from data_pipeline.filters.word_list import any_of
from megagpt.errors import DataError

DOMAINS_FILE = "domains.npy"
URLS_FILE = "urls.npy"
HOSTS_FILE = "url_hosts.npy"
WORDS_FILE = "words.json"

_ADDRESS = re.compile(r"\s*(?:(?:[A-Za-z][A-Za-z0-9+.-]*:)?//)?(?:[^/?#@]*@)?(\[[^\]/?#]*\]|[^/?#:]*)(?::\d*)?([^#]*)")
_DOMAIN = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.[a-z0-9-]*[a-z][a-z0-9-]*")
_ASCII_WORDS = re.compile(r"[a-z0-9]+")
_WORDS = re.compile(r"[^\W_]+")
_LONGEST_HOST = 253

Hashes = np.ndarray[tuple[int], np.dtype[np.uint64]]


def hash_entry(entry: str) -> int:
    """xxh3_64 of a normalised domain or address."""
    return xxhash.xxh3_64_intdigest(entry.encode("utf-8", "surrogatepass"))


def split_address(url: str) -> tuple[str, str]:
    """The host as blocklists have it, and what follows it in the address up to the fragment.

    The host is in lower case and punycode, without user, port, brackets and trailing dot.
    """
    match = _ADDRESS.match(url)
    # Every part of the pattern may be empty, so it always matches.
    host, rest = match.groups() if match else ("", "")
    host = host.lower().rstrip(".")
    if host.isascii() and "%" not in host and ":" not in host:
        return host, rest
    return _unusual_host(host), rest


def normal_domain(entry: str) -> str:
    """A line of a list of domains in the form that is looked up; empty where it is no domain.

    A domain has two labels or more, or is an IP address; `*.` and a dot before it, a scheme and a final slash are
    taken off.
    """
    if _DOMAIN.fullmatch(entry) and len(entry) <= _LONGEST_HOST:
        return entry
    if ":" in entry and is_ip_address(entry):  # IPv6 without the brackets that it has in an address
        return str(ipaddress.ip_address(entry))
    host, rest = split_address(entry.strip().removeprefix("*").lstrip("."))
    if rest not in ("", "/") or len(host) > _LONGEST_HOST:
        return ""
    return host if _DOMAIN.fullmatch(host) or is_ip_address(host) else ""


def normal_address(entry: str) -> str:
    """An address in the form that is looked up: without scheme, user, port, `www.`, fragment and trailing slash.

    In lower case, as squidGuard compares; empty where it has no host.
    """
    host, rest = split_address(entry)
    return _joined(host, rest)


def host_of(address: str) -> str:
    """The host in a normal address."""
    return re.split("[/?]", address, maxsplit=1)[0]


def _joined(host: str, rest: str) -> str:
    host = host.removeprefix("www.")
    return (host + rest.rstrip().lower()).rstrip("/") if host else ""


def is_ip_address(host: str) -> bool:
    """Whether a host is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _unusual_host(host: str) -> str:
    host = unquote(host).strip("[]")
    if ":" in host:
        return str(ipaddress.ip_address(host)) if is_ip_address(host) else host
    try:
        return host.encode("idna").decode("ascii").lower().rstrip(".")
    except UnicodeError:
        return host


@dataclass(frozen=True, slots=True)
class UrlBlocklist:
    """A compiled blocklist; the arrays lie in memory once for all processes of a machine."""

    domains: memoryview
    """Sorted hashes of domains, 8 bytes each."""
    urls: memoryview
    """Sorted hashes of addresses."""
    hosts: memoryview
    """Sorted hashes of the hosts of addresses; on other hosts, no address need be looked up."""
    words: frozenset[str]
    subwords: Callable[[str], object] | None
    soft_words: frozenset[str]
    max_soft_words: int

    @classmethod
    def open(cls, folder: Path) -> UrlBlocklist:
        """Map what the stage `blocklist` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        try:
            words = json.loads((folder / WORDS_FILE).read_bytes())
            return cls(
                _mapped(folder / DOMAINS_FILE),
                _mapped(folder / URLS_FILE),
                _mapped(folder / HOSTS_FILE),
                frozenset(words["words"]),
                re.compile(any_of(words["subwords"])).search if words["subwords"] else None,
                frozenset(words["soft_words"]),
                words["max_soft_words"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: no compiled blocklist ({error}); run the stage `blocklist` again") from None

    def why(self, url: str) -> str:
        """The first rule that blocks an address, or an empty string: domain, address, word, subword, soft_words.

        The rules are named `url.domain` and so on.
        """
        host, rest = split_address(url)
        if self._has_domain(host):
            return "url.domain"
        if len(self.hosts) and self._has_address(host, rest):
            return "url.address"
        if self.words or self.subwords or self.soft_words:
            return self._why_words(url)
        return ""

    def _has_domain(self, host: str) -> bool:
        domains = self.domains
        if not len(domains) or not host:
            return False
        if host[-1].isdigit() or ":" in host:  # no top-level domain ends in a digit: an IP address has no parents
            return _contains(domains, host)
        while True:
            dot = host.find(".")
            if dot < 0:
                return False
            if _contains(domains, host):
                return True
            host = host[dot + 1 :]

    def _has_address(self, host: str, rest: str) -> bool:
        host = host.removeprefix("www.")
        if not _contains(self.hosts, host):
            return False
        address = _joined(host, rest)
        # The address, and what it lies below: a/b?c, a/b, a.
        while address:
            if _contains(self.urls, address):
                return True
            cut = max(address.rfind("/"), address.rfind("?"))
            if cut < 0:
                return False
            address = address[:cut].rstrip("/")
        return False

    def _why_words(self, url: str) -> str:
        text = (unquote(url) if "%" in url else url).lower()
        words = (_ASCII_WORDS if text.isascii() else _WORDS).findall(text)
        if not self.words.isdisjoint(words):
            return "url.word"
        if self.subwords is not None and self.subwords("".join(words)):
            return "url.subword"
        if self.soft_words and len(self.soft_words.intersection(words)) > self.max_soft_words:
            return "url.soft_words"
        return ""


def _contains(hashes: memoryview, entry: str) -> bool:
    wanted = hash_entry(entry)
    at = bisect_left(hashes, wanted)
    return at < len(hashes) and hashes[at] == wanted


def _mapped(path: Path) -> memoryview:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.uint64 or array.ndim != 1:
        raise ValueError(f"{path.name} holds {array.dtype} of {array.ndim} dimensions")
    # Elements of a memoryview are Python integers without the cost of numpy's scalars.
    return memoryview(array)
