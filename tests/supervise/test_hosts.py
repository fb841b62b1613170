"""Which hosts a run is started on: those that answer, as many as its layout and batch can use."""

from __future__ import annotations

import pytest

from megagpt.doctor.hosts import Host
from megagpt.errors import MegaGPTError, SystemFailed
from megagpt.supervise.hosts import Hosts, legal_hosts
from tests.tiny import run_config

HOSTS = tuple(Host(f"node{number}", 2) for number in range(1, 6))


@pytest.fixture
def configured(tmp_path, tokens):
    return lambda *words: run_config(tmp_path / "run", tokens, "train.micro_batch_size=1", *words)


def names(hosts):
    return [host.name for host in hosts]


@pytest.mark.parametrize(
    ("answering", "most", "used"),
    [
        (HOSTS[:4], None, 4),
        (HOSTS, None, 4),  # 8 sequences a step do not divide among 10 processes
        (HOSTS[:3], None, 2),
        (HOSTS, 2, 2),
        (HOSTS[:1], None, 1),
    ],
)
def test_the_first_hosts_are_used_as_many_as_the_batch_divides_among(answering, most, used, configured):
    assert names(legal_hosts(configured(), answering, most)) == names(HOSTS[:used])


def test_hosts_in_the_middle_may_be_away(configured):
    there = (HOSTS[0], HOSTS[2], HOSTS[4])
    assert names(legal_hosts(configured(), there)) == ["node1", "node3"]


def test_too_few_for_the_layout_is_an_error_that_says_which_answer(configured):
    config = configured("parallel.tensor=4", "model.n_head=4", "model.d_model=32")
    assert names(legal_hosts(config, HOSTS[:2])) == ["node1", "node2"]
    with pytest.raises(MegaGPTError, match=r"hosts that answer \(node1\): .*parallel.tensor"):
        legal_hosts(config, HOSTS[:1])
    with pytest.raises(MegaGPTError, match="no host answers"):
        legal_hosts(config, ())


def test_hosts_that_do_not_answer_may_again_and_those_that_are_not_listed_never_will(configured, tmp_path):
    hostfile, said = tmp_path / "hosts", []
    hostfile.write_text("127.0.0.1 slots=2\n")
    with pytest.raises(SystemFailed, match=r"too few hosts answer: .*no host answers"):
        Hosts(hostfile, configured(), None, 1, said.append).launcher_arguments()  # nothing listens on port 1
    assert said[0].startswith("left out: 127.0.0.1: ")
    config = configured("parallel.tensor=4", "model.n_head=4", "model.d_model=32")
    with pytest.raises(MegaGPTError, match=r"on the hosts in the hostfile \(127.0.0.1\): .*parallel.tensor") as wrong:
        Hosts(hostfile, config, None, 1, said.append).launcher_arguments()
    assert wrong.value.exit_code == 2
