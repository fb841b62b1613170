"""metrics.jsonl after a kill: no row twice, none cut in two."""

import json
import resource
from contextlib import contextmanager

import pytest

from megagpt.errors import MegaGPTError
from megagpt.train.metrics import JsonlSink, Metrics, TensorBoardSink, WandbSink


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_after_the_resumed_step_and_a_cut_line_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [{"step": 0, "val_loss": 9.0}, *({"step": step, "loss": 1.0 / step} for step in range(1, 8))]
    path.write_text("".join(json.dumps(row) + "\n" for row in written) + '{"step": 8, "lo')
    sink = JsonlSink(path, resume_step=5, say=print)
    assert rows(path) == written[:6]
    sink.write({"step": 6, "loss": 0.5})
    assert rows(path) == [*written[:6], {"step": 6, "loss": 0.5}]  # at once, not only when closed
    sink.close()


def test_a_run_that_goes_back_writes_the_rows_anew(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=-1, say=print)
    for step in range(1, 6):
        sink.write({"step": step, "loss": 1.0})
    sink.rewind(3)
    sink.write({"step": 4, "loss": 2.0})
    sink.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "metrics.jsonl")][2:] == [(3, 1.0), (4, 2.0)]


def test_a_run_that_starts_at_step_0_keeps_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "val_loss": 9.0}\n{"step": 1, "loss": 2.0}\n')
    JsonlSink(path, resume_step=-1, say=print).close()
    assert path.read_text() == ""


def test_lines_that_are_no_rows_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\n{"loss": 2.0}\n\nnull\n{"step": 1, "loss": 2.0}\n')
    JsonlSink(path, resume_step=3, say=print).close()
    assert rows(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    "bad",
    [b"\xff\n", b'{"step": 4, "lo\xe4s": 1.0}\n', bytes(512) + b"\n", b'{"step": "4"}\n', b"[" * 100_000 + b"\n",
     b'{"step": 1' + b"0" * 5000 + b"}\n"],
    ids=["a byte", "a byte in a row", "a sector of zeros", "another type", "deep", "long"],
)  # fmt: skip
def test_damaged_lines_are_told_counted_and_kept_aside(bad, tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    good = [{"step": step, "loss": 1.0} for step in range(1, 8)]
    lines = [(json.dumps(row) + "\n").encode() for row in good]
    found = b"".join([*lines[:3], bad, *lines[3:], b'{"step": 8, "l'])
    path.write_bytes(found)
    sink = JsonlSink(path, resume_step=5, say=said.append)
    assert rows(path) == good[:5]
    assert sink.rows == 5
    assert sink.cut_off.steps == 2
    assert sink.damage.lines == 1
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == found
    assert said == [f"warning: {path}: 1 damaged lines were left out; the file as it was is metrics.jsonl.damaged"]
    sink.close()
    path.write_bytes(path.read_bytes() + b"\0")
    JsonlSink(path, resume_step=5, say=said.append).close()
    assert (tmp_path / "metrics.jsonl.damaged1").exists(), "the first one is not written over"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == found
    assert rows(path) == good[:5]


def test_rows_are_counted_those_that_wait_among_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=-1, say=[].append)
    sink.write({"step": 1, "loss": 2.0})
    with no_room_behind(path, 0):
        sink.write({"step": 2, "loss": 2.0})
        sink.write({"step": 3, "loss": 2.0})
    assert Metrics([sink], print).rows == 3
    sink.rewind(2)
    assert sink.rows == 2
    sink.write({"step": 3, "loss": 2.0})
    assert sink.rows == len(rows(path)) == 3
    sink.close()
    assert Metrics([], print).rows is None


@contextmanager
def no_room_behind(path, room_bytes):
    """As on a full disk: the file may not grow, or only by a part of a row."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room_bytes", [0, 9, 40])
def test_rows_that_cannot_be_written_wait_until_there_is_room(room_bytes, tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    sink = JsonlSink(path, resume_step=-1, say=said.append)
    every = [{"step": step, "loss": 2.0} for step in range(1, 6)]
    sink.write(every[0])
    with no_room_behind(path, room_bytes):
        for row in every[1:4]:
            sink.write(row)
        assert rows(path) == every[: len(rows(path))], "none cut in two"
    sink.write(every[4])
    assert rows(path) == every
    sink.close()
    assert [line for line in said if "cannot be written" in line] == said[:1]
    assert said[1:] == [f"{path}: there is room again; {3 - room_bytes // 27} rows that waited are written"]


def test_rows_that_wait_to_the_end_are_an_error_that_counts_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=-1, say=[].append)
    sink.write({"step": 1, "loss": 2.0})
    with no_room_behind(path, 9):
        sink.write({"step": 2, "loss": 2.0})
        sink.write({"step": 3, "loss": 2.0})
        with pytest.raises(MegaGPTError, match=r"metrics\.jsonl: 2 rows of steps 2 to 3 are lost"):
            sink.close()
    assert rows(path) == [{"step": 1, "loss": 2.0}]


def test_rows_that_wait_are_cut_off_too_when_the_run_goes_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=-1, say=[].append)
    with no_room_behind(path, 0):
        for step in (1, 2, 3):
            sink.write({"step": step, "loss": 1.0})
    sink.rewind(2)
    sink.write({"step": 3, "loss": 9.0})
    sink.close()
    assert rows(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0}]


@pytest.mark.filterwarnings("default")  # the thread of TensorBoard's writer ends with the error too
def test_a_mirror_that_fails_is_told_and_left_out(tmp_path):
    said = []
    metrics = Metrics(
        [JsonlSink(tmp_path / "metrics.jsonl", -1, print), Gone(), TensorBoardSink(tmp_path / "tb", -1)], said.append
    )
    for step in (1, 2):
        metrics.write({"step": step, "loss": 2.0})
    metrics.close()
    assert len(rows(tmp_path / "metrics.jsonl")) == 2
    assert said == ["warning: Gone takes no more rows: [Errno 28] No space left on device; metrics.jsonl has all"]
    assert list((tmp_path / "tb").iterdir())


class Gone:
    """A mirror whose disk is full."""

    def write(self, row):
        raise OSError(28, "No space left on device")

    rewind = close = write


def test_every_sink_gets_every_row(tmp_path):
    metrics = Metrics([JsonlSink(tmp_path / "a", -1, print), JsonlSink(tmp_path / "b", -1, print)], print)
    metrics.write({"step": 1, "loss": 2.0, "grad_norm": None})
    metrics.close()
    assert rows(tmp_path / "a") == rows(tmp_path / "b") == [{"step": 1, "loss": 2.0, "grad_norm": None}]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("last_kept", "expected"), [(1, [0, 1, 2]), (-1, [2])])
def test_tensorboard_hides_the_rows_that_come_again(last_kept, expected, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = TensorBoardSink(tmp_path, resume_step=-1)
    for step in range(3):
        killed.write({"step": step, "val_loss": 9.0})
    killed.close()
    again = TensorBoardSink(tmp_path, resume_step=last_kept)
    again.write({"step": 2, "val_loss": 1.0})
    again.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("val_loss")] == expected
    assert events.Scalars("val_loss")[-1].value == 1.0


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, resume_step=0)
    sink.write({"step": 1, "loss": 2.5, "grad_norm": None})
    sink.write({"step": 2, "loss": 1.5, "grad_norm": 0.5})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("grad_norm")] == [(2, 0.5)]


def test_a_missing_wandb_is_told_with_the_extra_to_install(tmp_path):
    from importlib.util import find_spec

    if find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(MegaGPTError, match=r"pip install 'megagpt\[wandb\]'"):
        WandbSink("project", tmp_path, {})
