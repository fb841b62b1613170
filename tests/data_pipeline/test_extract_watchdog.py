import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.extract.html import extract_html
from data_pipeline.extract.watchdog import HARD_FACTOR, PageRejected, Watchdog, ended_by_a_page, read_poison

ROOT = Path(__file__).resolve().parents[2]

DEEP_PAGE = b"<html><body>" + b"<div>a" * 60_000
"""The parser, which is C code to Python, takes the square of the depth: a minute."""


def spin(page: bytes, http_charset: str) -> str:
    while True:
        pass


def swallow(page: bytes, http_charset: str) -> str:
    try:
        while True:
            pass
    except Exception:  # noqa: BLE001
        return "swallowed"


def fail(error: BaseException):
    def extract(page: bytes, http_charset: str) -> str:
        raise error

    return extract


def recurse(page: bytes, http_charset: str) -> str:
    return recurse(page, http_charset)


def test_a_page_that_takes_too_long_is_rejected_and_the_next_is_read() -> None:
    with Watchdog(0.1) as watchdog:
        for endless in (spin, swallow):
            start = time.process_time()
            assert watchdog.run(1, endless, b"", "") == ("", "extract.timeout")
            assert 0.05 <= time.process_time() - start < 1.0  # the kernel counts in ticks
            assert watchdog.run(2, extract_html, b"<p>Ducks swim.</p>", "") == ("Ducks swim.", "")


@pytest.mark.parametrize(
    ("extract", "reason"),
    [
        (fail(MemoryError()), "extract.memory"),
        (fail(ValueError("x")), "extract.failed"),
        (fail(PageRejected("extract.too_large")), "extract.too_large"),
        (recurse, "extract.failed"),
    ],
)
def test_what_an_extractor_raises_ends_its_page_and_not_the_task(extract, reason: str) -> None:
    with Watchdog(5.0) as watchdog:
        assert watchdog.run(0, extract, b"", "") == ("", reason)


def test_what_the_user_does_is_not_taken_for_a_page(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Watchdog(5.0, tmp_path / "poison.json") as watchdog:
        watchdog.run(0, fail(KeyboardInterrupt()), b"", "")
    assert not ended_by_a_page(tmp_path / "poison.json")


def test_it_leaves_signals_and_timers_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGPROF)
    with Watchdog(0.05, tmp_path / "poison.json") as watchdog:
        watchdog.run(0, spin, b"", "")
    assert signal.getsignal(signal.SIGPROF) is before
    assert signal.getitimer(signal.ITIMER_PROF) == signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_time_in_which_the_process_waits_is_nobodys_fault(tmp_path: Path) -> None:
    def wait(page: bytes, http_charset: str) -> str:
        time.sleep(0.5)
        return "text"

    with Watchdog(0.05, tmp_path / "poison.json") as watchdog:
        assert watchdog.run(0, wait, b"", "") == ("text", "")


def test_in_a_thread_it_works_without_the_soft_limit() -> None:
    found = []

    def work() -> None:
        with Watchdog(5.0) as watchdog:
            found.append(watchdog.run(0, extract_html, b"<p>a</p>", ""))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [("a", "")]


def test_it_costs_microseconds(tmp_path: Path) -> None:
    with Watchdog(5.0, tmp_path / "poison.json") as watchdog:
        start = time.process_time()
        for n in range(5000):
            watchdog.run(n, lambda page, charset: "", b"", "")
        assert (time.process_time() - start) / 5000 < 100e-6  # 4 microseconds on an idle core


CHILD = """
import ctypes, os, sys
from pathlib import Path
from data_pipeline.extract.html import extract_html
from data_pipeline.extract.watchdog import Watchdog
from tests.data_pipeline.test_extract_watchdog import DEEP_PAGE

def crash(page, charset):
    ctypes.string_at(0)

def killed(page, charset):
    os.kill(os.getpid(), 9)

extract = {"hang": extract_html, "crash": crash, "killed": killed}[sys.argv[2]]
with Watchdog(float(sys.argv[3]), Path(sys.argv[1])) as watchdog:
    print(watchdog.run(6, extract_html, b"<p>a</p>", "")[1])
    print(watchdog.run(7, extract, DEEP_PAGE if extract is extract_html else b"", "")[1])
"""


def attempt(poison: Path, what: str, timeout_seconds: float = 0.2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(poison), what, str(timeout_seconds)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("what", "number", "reason"),
    [("hang", signal.SIGVTALRM, "extract.timeout"), ("crash", signal.SIGSEGV, "extract.crashed")],
)
def test_a_page_that_ends_its_worker_is_passed_over_by_the_next_attempt(
    tmp_path: Path, what: str, number: int, reason: str
) -> None:
    poison = tmp_path / "poison.json"
    first = attempt(poison, what)
    assert first.returncode == -number
    assert ended_by_a_page(poison)
    second = attempt(poison, what)
    assert (second.returncode, second.stdout.split()) == (0, [reason])
    assert not ended_by_a_page(poison)
    assert read_poison(poison) == {7: reason}


def test_a_worker_killed_from_outside_condemns_no_page(tmp_path: Path) -> None:
    poison = tmp_path / "poison.json"
    assert attempt(poison, "killed").returncode == -signal.SIGKILL
    assert not ended_by_a_page(poison)
    assert attempt(poison, "killed").returncode == -signal.SIGKILL
    assert read_poison(poison) == {}


def test_a_longer_limit_gives_a_page_another_chance(tmp_path: Path) -> None:
    poison = tmp_path / "poison.json"
    poison.write_text(json.dumps({"timeout_seconds": 1.0, "pages": {"0": "extract.timeout", "1": "extract.crashed"}}))
    with Watchdog(1.0, poison) as watchdog:
        assert watchdog.run(0, extract_html, b"<p>a</p>", "") == ("", "extract.timeout")
    with Watchdog(2.0, poison) as watchdog:
        assert watchdog.run(0, extract_html, b"<p>a</p>", "") == ("a", "")
        assert watchdog.run(1, extract_html, b"<p>a</p>", "") == ("", "extract.crashed")
    assert HARD_FACTOR > 1
