"""DeepSpeed's shared buffers leave nothing behind in /dev/shm, even while a run is alive to be killed."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.distributed.processes import start

SHARED = Path("/dev/shm")


def buffers() -> set[Path]:
    return set(SHARED.glob("deepspeed_allreduce_buffer_*"))


def sum_after_the_names_are_gone(told: Path) -> None:
    import torch

    from megagpt.engine.engine import init_distributed

    init_distributed(timedelta(seconds=60), device_type="cpu")
    told.with_suffix(f".{torch.distributed.get_rank()}").write_text(
        "\n".join(str(path) for path in mapped_buffers() if path.exists())
    )
    total = torch.ones(1000)
    torch.distributed.all_reduce(total)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if total.tolist() != [2.0] * 1000:
        raise SystemExit(1)


def mapped_buffers() -> set[Path]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {line[line.index("/dev/shm/deepspeed") :] for line in lines if "/dev/shm/deepspeed" in line}
    if not found:
        raise SystemExit("DeepSpeed maps no shared buffer any more: the correction may go")
    return {Path(name.removesuffix(" (deleted)")) for name in found}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no /dev/shm: not Linux")
def test_a_run_leaves_no_shared_buffer_behind_however_it_ends(tmp_path):
    before = buffers()
    start(sum_after_the_names_are_gone, 2, tmp_path / "told", log=tmp_path / "log").finish()
    assert not (buffers() - before)
    for rank in (0, 1):
        assert (tmp_path / f"told.{rank}").read_text() == ""  # gone while the processes still lived
