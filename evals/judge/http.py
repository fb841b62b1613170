"""A judge behind an OpenAI-compatible URL: OpenAI's own, vLLM, llama.cpp, and so on. Standard library only."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from evals.judge.ask import JudgeRequest
from megagpt.errors import EvalError

MAX_TOKENS = 2048
"""Of a judgement. Source: FastChat, llm_judge/common.py."""
TEMPERATURE = 0
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
MAX_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class ServerSettings:
    """How a server is asked."""

    model: str
    """As the server names it."""
    timeout_seconds: float = 120.0
    tries: int = 5
    parallel: int = 4
    """Requests at a time."""
    first_wait_seconds: float = 1.0
    """Before the second try; doubled each time, unless the server says how long."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse."""
        return


@dataclass(frozen=True)
class ServerJudge:
    """POSTs to `<url>/chat/completions` at temperature 0."""

    url: str
    """Base, such as http://127.0.0.1:8000/v1."""
    server: ServerSettings
    key: str | None = field(default=None, repr=False)
    """Sent in the Authorization header and nowhere else: never stored, never told."""
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        """Refuse an address that is none or that holds a secret."""
        server_address(self.url)

    @property
    def name(self) -> str:
        """The model that judges."""
        return self.server.model

    @property
    def settings(self) -> dict[str, Any]:
        """Which model of which server, and how it is asked."""
        return {
            "kind": "server",
            "server": self._without_key(server_address(self.url)),
            "model": self.server.model,
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
        }

    def ask_all(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, str]]:
        """Several at a time. The first that fails for good ends it; those under way are still given out.

        Raises:
            EvalError: a request failed as often as it may, or was refused.
        """
        failures: list[EvalError] = []

        def ask(request: JudgeRequest) -> str | None:
            if failures:
                return None
            try:
                return self._ask(request)
            except EvalError as error:
                failures.append(error)
                return None

        with ThreadPoolExecutor(max_workers=self.server.parallel) as pool:
            futures = {pool.submit(ask, request): request for request in requests}
            try:
                for future in as_completed(futures):
                    if (text := future.result()) is not None:
                        yield futures[future], text
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise failures[0]

    def _ask(self, request: JudgeRequest) -> str:
        messages = [{"role": "user", "content": request.user}]
        if request.system:
            messages.insert(0, {"role": "system", "content": request.system})
        content = {
            "model": self.server.model,
            "messages": messages,
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
        }
        wait = self.server.first_wait_seconds
        for number in range(1, self.server.tries + 1):
            try:
                return _text_of(self._post(content))
            except _Transient as error:
                if number == self.server.tries:
                    raise EvalError(f"judge {self.url}: {error} ({number} tries)") from None
                self.sleep(min(MAX_WAIT_SECONDS, wait if error.wait is None else error.wait))
                wait *= 2
        raise EvalError(f"judge {self.url}: {self.server.tries} tries; at least 1 is needed")

    def _post(self, content: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(content).encode(), headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=self.server.timeout_seconds) as response:
                answer: bytes = response.read()
                return answer
        except urllib.error.HTTPError as error:
            told = self._without_key(error.read(2000).decode("utf-8", "replace")).strip()[:300]
            if error.code in RETRIED:
                raise _Transient(f"HTTP {error.code}: {told}", _seconds(error.headers.get("Retry-After"))) from None
            raise EvalError(f"judge {self.url}: HTTP {error.code}: {told}") from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            raise _Transient(f"{type(error).__name__}: {self._without_key(str(error))}") from None

    def _without_key(self, text: str) -> str:
        return text if not self.key else text.replace(self.key, "[key]")


def server_address(url: str) -> str:
    """What tells one server from another: scheme, host, port and path.

    Raises:
        EvalError: it names no host, or holds a user, a password or a query, which would be stored and shown.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        where = f"{host}:{parts.port}" if parts.port is not None else host
    except ValueError:
        host = where = ""
    if not host:
        raise EvalError("judge: its URL names no host, or a port that is none; expected http://HOST:PORT/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise EvalError(
            f"judge {parts.scheme}://{where}: its URL holds a user, a password or a query (not shown here); give the "
            "bare URL, and the key in an environment variable that --judge-key-env names"
        )
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


class _Transient(Exception):  # noqa: N818 - it says what is
    """Worth another try."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def _seconds(header: str | None) -> float | None:
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:  # a date
        return None


def _text_of(answer: bytes) -> str:
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Transient(f"not an answer of chat completions ({type(error).__name__}: {answer[:200]!r})") from None
    if not isinstance(text, str):
        raise _Transient(f"an answer without text: {answer[:200]!r}")
    return text
