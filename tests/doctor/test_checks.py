"""Each fact that would stop or spoil a run is an error that says the value and what to do; nothing else is."""

import pytest

from tests.doctor.facts import GIB, gpu, ill, well

SHM = "/dev/shm"
LOCK = {"path": "/ext/py311_cu128/cpu_adam/lock", "age_seconds": 3600.0, "held_by": None}


def test_a_host_that_is_well_has_no_findings_but_good_ones():
    assert ill() == {}
    assert ill(several=False) == {}


@pytest.mark.parametrize(
    ("check", "facts", "value", "fix"),
    [
        ("python", {"python": {"path": "p", "version": "3.12.1"}}, "3.12.1", "n1 has 3.11.7"),
        ("packages", {"packages": well()["packages"] | {"torch": "2.12.0"}}, "torch 2.12.0 (wanted ==2.13.0)", "make"),
        ("packages", {"packages": well()["packages"] | {"deepspeed": None}}, "deepspeed is not installed", "make"),
        ("packages", {"packages": well()["packages"] | {"numpy": "2.4.0"}}, "numpy 2.4.0", "n1 has numpy 2.3.1"),
        ("megagpt", {"source": None}, "not importable", "same path"),
        ("megagpt", {"source": {"path": "/opt/megagpt", "hash": "xyz"}}, "/opt/megagpt is xyz", "n1 has abc"),
        ("compiler", {"compiler": None}, "no C++ compiler", "g++"),
        ("compiler", {"ninja": None}, "no ninja", "pip install ninja"),
        ("op build locks", {"locks": [LOCK]}, "lock (3600 s old)", "rm /ext/py311_cu128/cpu_adam/lock"),
        ("disk", {"disk": {"/data": None}}, "no folder /data", "mount"),
        ("disk", {"disk": {"/d": {"total_bytes": 1, "free_bytes": 1, "writable": False}}}, "/d: not writable", "right"),
        ("network", {"interfaces": {"lo": "127.0.0.1"}}, "no interface but lo", "network up"),
        ("clock", {"clock": [110.0, 111.0]}, "at least 9.9 s ahead", "chronyd"),
        ("clock", {"clock": [90.0, 91.0]}, "at least 9.9 s behind", "chronyd"),
        ("torch", {"torch": {"error": "OSError: libcudart"}}, "libcudart", "make install"),
        ("torch", {"torch": {"cuda": None, "nccl": None, "devices": 0}}, "built for the CPU", "CUDA build"),
        ("torch", {"torch": {"cuda": "13.0", "nccl": "2.28", "devices": 8}}, "driver 570.86 has 12.8", "driver"),
        ("torch", {"torch": {"cuda": "12.8", "nccl": "2.27.5", "devices": 0}}, "torch sees none", "VISIBLE_DEVICES"),
        ("torch", {"torch": {"cuda": "12.8", "nccl": "2.21.5", "devices": 8}}, "NCCL 2.21.5", "n1 has CUDA 12.8"),
        ("slots", {"gpus": None}, "no GPU", "nvidia-smi"),
        ("slots", {"gpus": well()["gpus"] | {"devices": [gpu(0)]}}, "1 GPUs for 8 slots", "slots=1"),
        ("slots", {"gpus": well()["gpus"] | {"devices": [gpu(i, pids=[77]) for i in range(8)]}}, "processes 77", "end"),
        (
            "slots",
            {"gpus": well()["gpus"] | {"devices": [*map(gpu, range(7)), gpu(7, used_mib=3000.0)]}},
            "GPU 7 is in use: 3000.0 of 81920.0 MiB, no process that shows",
            "--exclude",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_is_wrong_is_an_error_with_value_and_remedy(check, facts, value, fix):
    status, told, remedy = ill(**facts)[check]
    assert (status, value in told, fix in remedy) == ("error", True, True), (told, remedy)


@pytest.mark.parametrize(
    ("check", "facts"),
    [
        ("op build locks", {"locks": [LOCK | {"held_by": 123}]}),
        ("op build locks", {"locks": [LOCK | {"age_seconds": 5.0}]}),
        ("disk", {"disk": {SHM: {"total_bytes": GIB, "free_bytes": GIB // 16, "writable": True}}}),
        ("clock", {"clock_is_set": False}),
        ("locked memory", {"memlock_bytes": 65536}),
    ],
)
def test_what_may_be_wrong_is_a_warning(check, facts):
    found = ill(**facts)
    assert found.keys() == {check}
    assert found[check][0] == "warning"


def test_a_clock_is_judged_by_what_is_certain():
    """An answer that took 20 s leaves the clock unknown by 20 s: no false alarm, and no false peace beyond it."""
    slow = {"our_clock": (80.0, 101.1)}
    assert ill(**slow, clock=[100.0, 101.0]) == {}
    assert "clock" in ill(**slow, clock=[70.0, 71.0])


@pytest.mark.parametrize(
    ("variable", "good", "bad"),
    [("NCCL_SOCKET_IFNAME", ["ib", "=eth0", "^docker", "eth1,ib0"], ["bond0", "=eth", "^eth,ib"])],
)
def test_an_interface_that_is_named_must_exist(variable, good, bad):
    for value in good:
        assert ill({variable: value}) == {}, value
    for value in bad:
        status, told, _ = ill({variable: value})["network"]
        assert (status, f"{variable}={value}, but there is eth0 10.0.0.1, ib0 10.1.0.1" in told) == ("error", True)


def test_a_name_that_leads_to_loopback_is_gloos_trap():
    trap = {"hostname_address": "127.0.1.1", "gpus": None, "torch": {"cuda": None, "nccl": None, "devices": 0}}
    status, told, fix = ill(**trap)["network"]
    assert (status, "127.0.1.1" in told, "GLOO_SOCKET_IFNAME=eth0" in fix) == ("error", True, True)
    assert "network" not in ill({"GLOO_SOCKET_IFNAME": "eth0"}, **trap)
    assert "network" not in ill(several=False, **trap)


def test_more_processes_than_cores_is_a_warning_where_there_is_no_gpu():
    cpu = {"gpus": None, "torch": {"cuda": None, "nccl": None, "devices": 0}, "cores": 2}
    assert ill(slots=4, several=False, **cpu)["slots"][0] == "warning"
    assert "slots" not in ill(slots=2, several=False, **cpu)
