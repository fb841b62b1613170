"""Programs that try to get out of the sandbox, to bring the machine down, or to be taken for right ones."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evals.sandbox.driver import Opaque, decode, encode
from evals.sandbox.run import Limits, Outcome, probe, run_program, run_tests
from tests.evals.sandbox_host import needs_namespaces

ROOT = Path(__file__).resolve().parents[2]
MARK = f"mg{os.getpid()}"
MARKED = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{MARK}', 0, 0, 0)\n"
"""PR_SET_NAME: this process and its children can be found from outside."""
QUICK = Limits(wall_seconds=30, cpu_seconds=5)

pytestmark = needs_namespaces


def ask(program: str, limits: Limits = QUICK) -> Outcome:
    return run_program(program, limits)


def judge(program: str, tests: str = "assert f(3) == 9\nassert f(4) == 16", limits: Limits = QUICK) -> Outcome:
    return run_tests(program, setup="", tests=tests, entry_point="f", limits=limits)


def test_a_host_with_namespaces_has_the_sandbox() -> None:
    assert probe().ok, probe().reason
    assert "network namespace" in str(probe())


def test_a_right_program_passes_and_a_wrong_one_says_where() -> None:
    assert judge("def f(x):\n    return x * x\n").status == "passed"
    wrong = judge("def f(x):\n    return x + 6\n", "assert f(3) == 9\nassert f(4) == 16, 'four'")
    assert (wrong.status, wrong.detail) == ("failed", "AssertionError: four")
    assert judge("def f(x):\n    return [][x]\n").detail == "IndexError: list index out of range"
    assert judge("def f(x)\n").detail.startswith("SyntaxError")
    assert judge("def g(x):\n    return x\n").detail == "NameError: the program defines no f"


def test_what_it_prints_is_kept_and_its_exit_code_told() -> None:
    outcome = ask("import sys; print('to out'); print('to err', file=sys.stderr); sys.exit(7)")
    assert (outcome.status, outcome.exit_code, outcome.detail) == ("ended", 7, "exit code 7")
    assert sorted(outcome.output.splitlines()) == ["to err", "to out"]


class Listener:
    """A server of this test's own that counts who arrives."""

    def __init__(self, family: socket.AddressFamily, kind: socket.SocketKind, address) -> None:
        self.socket = socket.socket(family, kind)
        self.socket.bind(address)
        self.socket.settimeout(0.3)
        self.kind = kind
        if kind is socket.SOCK_STREAM:
            self.socket.listen()

    def was_reached(self) -> bool:
        try:
            if self.kind is socket.SOCK_STREAM:
                self.socket.accept()[0].close()
            else:
                self.socket.recvfrom(10)
        except TimeoutError:
            return False
        return True


@pytest.fixture(params=["tcp", "udp", "unix", "abstract"])
def network(request, tmp_path: Path) -> Iterator[tuple[Listener, str]]:
    """A listener, and a program that reaches it where nothing hinders it."""
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    address, family, kind = {
        "tcp": (("127.0.0.1", 0), socket.AF_INET, stream),
        "udp": (("127.0.0.1", 0), socket.AF_INET, datagram),
        "unix": (str(tmp_path / "s"), socket.AF_UNIX, stream),
        "abstract": (f"\0megagpt-test-{os.getpid()}", socket.AF_UNIX, stream),
    }[request.param]
    listener = Listener(family, kind, address)
    program = (
        f"import socket\ns = socket.socket({int(family)}, {int(kind)})\n"
        f"s.connect({listener.socket.getsockname()!r})\ns.send(b'x')\nprint('sent')\n"
    )
    yield listener, program
    listener.socket.close()


def test_no_network_is_reached(network: tuple[Listener, str]) -> None:
    listener, program = network
    outside = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outside.stdout == "sent\n", "without the sandbox the program reaches the listener"
    assert listener.was_reached()
    outcome = ask(program)
    assert "sent" not in outcome.output
    assert any(word in outcome.output for word in ("PermissionError", "FileNotFoundError", "ConnectionRefusedError"))
    assert not listener.was_reached()


def test_vsock_and_raw_sockets_are_refused() -> None:
    outcome = ask(
        "import socket\n"
        "for family in (socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_INET6, 38):\n"
        "    try:\n        socket.socket(family, socket.SOCK_RAW); print('got', family)\n"
        "    except PermissionError: print('no')\n"
    )
    assert outcome.output == "no\n" * 5


def test_nothing_outside_is_written_or_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("sesame")
    here = Path(__file__)
    targets = [
        tmp_path / "new",
        secret,
        here,
        Path("/usr/bin/megagpt_test"),
        Path("/etc/megagpt_test"),
        Path("/dev/megagpt_test"),
        Path("/megagpt_test"),
        Path(os.path.realpath(sys.base_prefix)) / "megagpt_test",
    ]
    outcome = ask(
        f"for path in {[str(target) for target in targets]!r}:\n"
        "    for mode in ('w', 'a', 'r'):\n"
        "        try:\n            open(path, mode).close(); print('opened', path, mode)\n"
        "        except OSError as error: pass\n"
        f"try: print(open({str(secret)!r}).read())\nexcept OSError: pass\n"
        "open('mine.txt', 'w').write('x'); print('wrote', open('/tmp/mine.txt').read())\n"
    )
    assert outcome.output == "wrote x\n"
    assert secret.read_text() == "sesame"
    assert [target.exists() for target in targets] == [False, True, True, *[False] * 5]
    assert not Path("/tmp/mine.txt").exists()


def test_the_parents_files_processes_environment_and_descriptors_are_out_of_sight(tmp_path: Path) -> None:
    os.environ["MEGAGPT_TEST_SECRET"] = "sesame"
    with (tmp_path / "held_open").open("w") as held:
        os.set_inheritable(held.fileno(), True)  # noqa: FBT003
        outcome = ask(
            "import os\n"
            "def held():\n"
            "    found = []\n"
            "    for fd in range(64):\n"
            "        try: os.fstat(fd); found.append(fd)\n"
            "        except OSError: pass\n"
            "    return found\n"
            f"print(os.path.exists('/proc'), os.path.exists('/etc/passwd'), os.path.exists({__file__!r}))\n"
            "print(os.path.exists('/home'), os.path.exists('/var'), os.path.exists('/sys'))\n"
            "print(sorted(os.environ), os.getppid())\n"
            "print(held())\n"
            "print(os.getuid(), os.geteuid(), os.listdir('/tmp'))\n"
        )
    del os.environ["MEGAGPT_TEST_SECRET"]
    assert outcome.output.splitlines() == [
        "False False False",
        "False False False",
        "['HOME', 'LANG', 'PATH', 'TMPDIR'] 1",
        "[0, 1, 2]",
        "1000 1000 ['program.py']",
    ]


def test_a_fork_bomb_is_stopped_and_nothing_of_it_is_left() -> None:
    outcome = ask(
        MARKED + "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
        Limits(wall_seconds=1),
    )
    assert outcome.status == "timed_out"
    assert outcome.seconds < 20
    assert programs_left() == []


def test_a_bomb_of_threads_is_stopped() -> None:
    outcome = ask(
        "import threading, time\nn = 0\ntry:\n    while True:\n"
        "        threading.Thread(target=time.sleep, args=(5,), daemon=True).start(); n += 1\n"
        "except RuntimeError: print(0 < n < 9, flush=True)\n"
        "import os; os._exit(0)\n"
    )
    assert outcome.output == "True\n"


def test_ten_gigabytes_are_not_to_be_had() -> None:
    program = "def f(x):\n    return len(bytearray(10 * 2**30))\n"
    assert judge(program).status == "out_of_memory"
    outcome = ask("x = bytearray(10 * 2**30)")
    assert (outcome.exit_code, outcome.output.splitlines()[-1]) == (1, "MemoryError")


def test_many_processes_cannot_take_together_what_one_may_not() -> None:
    limits = Limits(wall_seconds=50, memory_bytes=400 << 20, total_memory_bytes=300 << 20)
    program = "import os, time\nfor _ in range(3): os.fork()\nx = bytearray(b'1') * (150 << 20)\ntime.sleep(60)\n"
    outcome = ask(program, limits)
    assert (outcome.status, outcome.detail) == ("out_of_memory", "all processes together")
    assert outcome.seconds < 40


def test_memory_that_no_limit_counts_is_refused() -> None:
    outcome = ask(
        "import os, ctypes\n"
        "try: os.memfd_create('x'); print('got memory')\nexcept PermissionError: print('no')\n"
        "print(ctypes.CDLL(None).shmget(1, 1 << 30, 0o1600))\n"
    )
    assert outcome.output == "no\n-1\n"


def test_files_are_limited_in_size_number_and_sum() -> None:
    limits = Limits(wall_seconds=30, file_bytes=1 << 20, folder_bytes=4 << 20, open_files=20)
    outcome = ask(
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def say(error): print(type(error).__name__, error.errno)\n"
        "try: open('a', 'wb').write(bytes(2 << 20))\nexcept OSError as error: say(error)\n"
        "try:\n    for i in range(9): open(f'b{i}', 'wb').write(bytes(1 << 20))\nexcept OSError as error: say(error)\n"
        "try: held = [open('/dev/null') for _ in range(30)]\nexcept OSError as error: say(error)\n",
        limits,
    )
    assert outcome.output.splitlines() == ["OSError 27", "OSError 28", "OSError 24"]


@pytest.mark.parametrize(
    ("program", "limits"),
    [
        ("while True: pass", Limits(wall_seconds=50, cpu_seconds=1)),
        ("import time; time.sleep(60)", Limits(wall_seconds=1)),
        (
            "import signal, time\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, lambda *a: None)\n"
            "while True: time.sleep(1)",
            Limits(wall_seconds=1),
        ),
    ],
    ids=["busy", "asleep", "deaf"],
)
def test_an_endless_program_is_ended(program: str, limits: Limits) -> None:
    outcome = ask(program, limits)
    assert outcome.status == "timed_out"
    assert outcome.seconds < 40


def test_signals_reach_neither_the_parent_nor_anybody_else() -> None:
    received = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in (15, 10, 12, 1)}
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        targets = [os.getpid(), os.getppid(), bystander.pid, -os.getpgrp()]
        outcome = ask(
            "import os\n"
            f"for pid in [*{targets}, os.getppid(), 0, -1]:\n"
            "    for number in (1, 10, 12, 15, 19, 9):\n"
            "        if pid == 0: os.setpgid(0, 0) if os.getpgrp() != os.getpid() else None\n"
            "        try: os.kill(pid, number) if pid else None\n"
            "        except OSError as error: pass\n"
            "print('still here')\n"
        )
        assert outcome.output == "still here\n", "its own parent is process 1, which takes no signal from inside"
        assert outcome.exit_code == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert received == []


def test_a_flood_of_output_is_counted_and_cut() -> None:
    outcome = ask("import sys\nfor _ in range(64): sys.stdout.write('x' * 2**20)\n")
    assert outcome.exit_code == 0
    assert outcome.output_bytes == 64 << 20
    assert outcome.output == "x" * QUICK.output_bytes


def test_a_program_without_standard_streams_ends_like_any_other() -> None:
    assert ask("import os, time\nfor fd in (0, 1, 2): os.close(fd)\ntime.sleep(.2)\nos._exit(3)").exit_code == 3
    assert judge("import os\nos.closerange(0, 3)\ndef f(x):\n    return x * x\n").status == "passed"


def test_background_processes_end_with_the_program() -> None:
    outcome = ask(
        MARKED + "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\n"
        "print('done')\n"
    )
    assert (outcome.exit_code, outcome.output) == (0, "done\n")
    assert outcome.seconds < 30
    assert programs_left() == []


CHEATS = {
    "prints": "print('passed')\nprint('{\"status\": \"passed\"}')\n",
    "exits": "import sys\nprint('passed')\nsys.exit(0)\n",
    "exits in the call": "import sys\ndef f(x):\n    sys.exit(0)\n",
    "leaves at once": "import os\nos._exit(0)\n",
    "leaves in the call": "import os\ndef f(x):\n    os._exit(0)\n",
    "leaves at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x):\n    return 0\n",
    "equal to all": "class E:\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x):\n    return E()\n",
    "an int equal to all": "class E(int):\n    def __eq__(self, o): return True\ndef f(x):\n    return E(1)\n",
    "breaks assertions": "import builtins\nbuiltins.AssertionError = type('A', (), {})\ndef f(x):\n    return 0\n",
    "writes an answer": 'import os\nos.write(4, b\'{"status": "passed"}\\n\' * 9)\ndef f(x):\n    return 0\n',
    "writes everywhere": (
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"status": "passed", "detail": ""}\\n\')\n'
        "    except OSError: pass\ndef f(x):\n    return 0\n"
    ),
    "writes rubbish": "import os\nos.write(4, b'\\x00\\xff[[[[\\n')\ndef f(x):\n    return 0\n",
    "writes depth": "import os\nos.write(4, b'{\"value\": ' + b'[' * 100000 + b'\\n')\ndef f(x):\n    return 0\n",
    "kills the tester": "import os, signal\nos.kill(1, 9)\nos.kill(-1, 9)\ndef f(x):\n    return 0\n",
    "interrupts the tester": (
        "import os, signal\nfor _ in range(99): os.kill(1, signal.SIGINT)\ndef f(x):\n    return 0\n"
    ),
    "reads the tester": (
        "import gc, os, ctypes\n"
        "libc = ctypes.CDLL(None)\nassert libc.ptrace(16, 1, 0, 0) == -1\n"
        "try: os.kill(1, 19)\nexcept OSError: pass\n"
        "found = [o for o in gc.get_objects() if isinstance(o, dict) and 'tests' in o]\n"
        "def f(x):\n    return found\n"
    ),
    "changes the driver": (
        "import sys\nm = sys.modules['__main__']\nm.encode = lambda value: ['list', []]\n"
        'm.json.dumps = lambda *a: \'{"loaded": true, "status": "passed"}\'\ndef f(x):\n    return 0\n'
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_program_declares_itself_right(name: str) -> None:
    outcome = judge(CHEATS[name])
    assert outcome.status in ("failed", "ended"), outcome
    assert outcome.seconds < 25


REFUSED_CALLS = {
    "ptrace": "libc.ptrace(0, 0, 0, 0)",
    "new user namespace": "libc.unshare(0x10000000)",
    "new mount namespace": "libc.unshare(0x20000)",
    "clone with namespaces": "libc.syscall(56 if x86 else 220, 0x10000011, 0, 0, 0, 0)",
    "mount": "libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)",
    "umount": "libc.umount2(b'/tmp', 2)",
    "chroot": "libc.chroot(b'/tmp')",
    "read another's memory": "libc.process_vm_readv(1, None, 0, None, 0, 0)",
    "io_uring": "libc.syscall(425, 8, None)",
    "bpf": "libc.syscall(321 if x86 else 280, 0, None, 0)",
    "keyring": "libc.syscall(250 if x86 else 219, 0, -3, 1)",
    "become root": "libc.setuid(0)",
    "more memory": "libc.setrlimit(9, (ctypes.c_ulong * 2)(-1 % 2**64, -1 % 2**64))",
    "32-bit numbers": "libc.syscall(0x40000000 + 39)",
}


def test_calls_of_the_kernel_through_ctypes_are_refused() -> None:
    outcome = ask(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nx86 = os.uname().machine == 'x86_64'\n"
        + "".join(f"ctypes.set_errno(0); print({code}, ctypes.get_errno())\n" for code in REFUSED_CALLS.values())
    )
    refused = dict(zip(REFUSED_CALLS, outcome.output.splitlines(), strict=True))
    assert refused == dict.fromkeys(REFUSED_CALLS, "-1 1")  # EPERM


def test_devices_and_links_lead_nowhere() -> None:
    outcome = ask(
        "import os\n"
        "def attempt(do):\n    try: print('did', do())\n    except OSError: print('no')\n"
        "attempt(lambda: os.mknod('disk', 0o60600, os.makedev(8, 0)))\n"
        "attempt(lambda: (os.symlink('/../../../etc/passwd', 'l'), open('l').read()))\n"
        "attempt(lambda: os.open('/dev/mem', os.O_RDONLY))\n"
        "attempt(lambda: os.listdir('/..') and open('/../../proc/1/environ').read())\n"
        "attempt(lambda: os.chmod('/usr/bin/env', 0o4777))\n"
    )
    assert outcome.output == "no\n" * 5


def test_the_sandbox_ends_with_the_evaluation(tmp_path: Path) -> None:
    """SIGKILL to the process that waits: nothing of it can tidy up, the kernel does."""
    program = f"{MARKED}import time; time.sleep(60)"
    code = f"from evals.sandbox.run import *; run_program({program!r}, Limits(wall_seconds=60))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 20
    while not programs_left():
        assert time.monotonic() < deadline, "the program never started"
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while programs_left():
        assert time.monotonic() < deadline, "the program outlives the evaluation"
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == [], "something is left in the folder for temporary files"


def test_several_at_once_do_not_disturb_each_other() -> None:
    """Limits of processes are each one's own."""
    found: list[Outcome] = []
    program = "import os\nfor _ in range(4):\n    if os.fork() == 0: os._exit(0)\n    os.wait()\nprint('ok')\n"
    threads = [threading.Thread(target=lambda: found.append(ask(program, Limits()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.output for outcome in found] == ["ok\n"] * 3


def test_where_a_protection_is_missing_nothing_is_run() -> None:
    """A host that allows no user namespaces: here a namespace in which their number is limited to none."""
    code = (
        "from evals.sandbox.run import probe, run_program\nprint(probe().ok, probe().reason)\n"
        "try: print(run_program('print(1)'))\nexcept Exception as error: print(type(error).__name__)\n"
    )
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    found = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", script, sys.executable, code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    first, last = found.stdout.splitlines()
    assert first.startswith("False namespaces: unshare: No space left on device; the sandbox needs user namespaces"), (
        found
    )
    assert last == "SandboxUnavailableError"


def test_root_of_a_container_without_root_has_the_same_sandbox() -> None:
    code = "from evals.sandbox.run import probe; print(probe().ok)"
    found = subprocess.run(
        ["unshare", "-Ur", sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert found.stdout == "True\n", found


@pytest.mark.skipif(os.geteuid() != 0, reason="a change of the user needs root")
def test_a_user_without_rights_has_the_same_sandbox(tmp_path: Path) -> None:
    """The suite may run as root; most users are not. Some Python and the project must be readable to them."""
    code = (
        "from evals.sandbox.run import probe, run_program\n"
        "print(probe().ok, run_program('import os; print(os.getuid())').output)"
    )
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    found = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        user=12345,
        group=12345,
        extra_groups=[],
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if "Permission denied" in found.stderr or "No module named" in found.stderr:
        pytest.skip("Python or the project lies where other users may not read")
    assert found.stdout == "True 1000\n\n", found


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -(10**5000),
        2.5,
        float("inf"),
        "text \ud800",
        [1, [2.0, "a"], (3, None)],
        {"a": (1, 2), 3: [], (4, 5): {6}},
        frozenset({1, 2}),
        b"\x00\xff",
        1 + 2j,
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_cross_with_their_types(value) -> None:
    import json

    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        found = decode(json.loads(json.dumps(encode(value))))
    finally:
        sys.set_int_max_str_digits(digits)
    assert found == value
    assert type(found) is type(value)


def test_other_values_equal_nothing() -> None:
    found = decode(encode(object()))
    assert isinstance(found, Opaque)
    assert found != found.type_name
    assert "object of type object" in repr(found)


def programs_left() -> list[str]:
    """Processes on this machine, whoever their parent is, that began as a program with `MARKED`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name = (entry / "comm").read_text().strip()
            except OSError:
                continue
            if name == MARK:
                found.append(entry.name)
    return found
