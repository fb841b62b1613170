"""The lock of C++ operations: whoever dies with it leaves it to the next one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.utils.cpp_extension
from torch.utils.file_baton import FileBaton

from megagpt.engine.op_lock import FOREIGN_SECONDS, MARK, KernelLock
from tests.tiny import run_words

HOLDS = """
import sys, time
from megagpt.engine.op_lock import KernelLock
lock = KernelLock(sys.argv[1])
print(lock.try_acquire(), flush=True)
time.sleep(float(sys.argv[2]))
lock.release()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


def holder(path, seconds):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, path, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


def ended(process):
    process.stdout.close()
    return process.wait()


def test_pytorch_asks_for_the_name_that_is_replaced():
    """Where this fails, PyTorch takes its lock in another way, and `use_locks_...` does nothing."""
    assert "FileBaton" in torch.utils.cpp_extension._jit_compile.__code__.co_names
    assert {name for name in vars(FileBaton) if not name.startswith("__")} == {"try_acquire", "wait", "release"}


def test_a_free_lock_is_taken_and_its_file_removed(path):
    lock = KernelLock(str(path))
    assert lock.try_acquire()
    assert path.read_bytes() == MARK
    lock.release()
    assert not path.exists()


def test_the_second_waits_for_the_first_and_need_not_build(path):
    first = holder(path, 1.0)
    began = time.monotonic()
    assert not KernelLock(str(path)).try_acquire()
    assert time.monotonic() - began > 0.5
    assert not path.exists()
    assert ended(first) == 0


def test_of_one_who_was_killed_it_is_taken_over(path):
    first = holder(path, 600)
    first.send_signal(signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    assert path.exists(), "as after any kill"
    lock = KernelLock(str(path))
    assert lock.try_acquire()
    lock.release()
    assert not path.exists()


def test_one_who_waits_takes_over_when_the_first_is_killed(path):
    first = holder(path, 600)
    second = subprocess.Popen([sys.executable, "-c", HOLDS, path, "0"], stdout=subprocess.PIPE, text=True)
    time.sleep(0.5)
    first.kill()
    assert second.stdout.readline() == "True\n"
    assert ended(first) == -signal.SIGKILL
    assert ended(second) == 0


def test_of_another_programs_file_only_an_old_one_is_taken_over(path):
    baton = FileBaton(str(path))
    assert baton.try_acquire()
    waiting = subprocess.Popen([sys.executable, "-c", HOLDS, path, "0"], stdout=subprocess.PIPE, text=True)
    time.sleep(2.0)
    assert waiting.poll() is None
    baton.release()
    assert waiting.stdout.readline() == "False\n"
    waiting.kill()
    ended(waiting)
    path.touch()
    os.utime(path, (time.time() - FOREIGN_SECONDS - 1,) * 2)
    assert KernelLock(str(path)).try_acquire()


@pytest.mark.exhaustive
def test_training_starts_where_a_killed_process_left_the_lock(tmp_path, tokens):
    """As the soak found it: without this, every start after the kill waits until `watch.startup_seconds`."""
    extensions = tmp_path / "extensions"
    built = os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix) / "torch_extensions")
    shutil.copytree(built, extensions)
    (left,) = (folder / "lock" for folder in extensions.iterdir() if folder.name == "deepspeed_shm_comm")
    left.write_bytes(MARK)
    words = run_words(tmp_path / "run", tokens, "watch.startup_seconds=60")
    megagpt = Path(sys.executable).with_name("megagpt")
    done = subprocess.run(
        [megagpt, "train", "--processes", "2", *words],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions)},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not left.exists()
