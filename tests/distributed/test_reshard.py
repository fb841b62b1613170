"""A checkpoint of any layout goes on under any other: the same state bit for bit, the same loss.

Each layout trains `FIRST` steps, saves, and trains on. Then each of them
- restores the checkpoints of all, one after the other into one engine, and compares what its ranks hold (fp32 weights,
  both moments, the weights it works with, counters, settings of the groups) with the logical tensors as this file puts
  them together from the writer's files: every ordered pair;
- goes on from one of them in a new engine, to the losses that the writer had without a break;
- goes on from the same one after `megagpt checkpoint reshard`, to the last bit of the losses before;
- restores one state from the files of every layout (those that `reshard` makes, which are byte for byte the ones that
  the layout writes), with a step of training between them, and hashes all that its ranks then hold: the same hash each
  time. It goes on from one of these for all the steps, to the losses that the state's writer had without a break.

So every ordered pair goes on within the bound, although not every pair is trained: the steps of a reader are the same
code on the same batches, and a function of what its ranks hold, which after a restore is the same to the last bit
whichever layout wrote. One continuation of a reader is that of all writers. (That nothing beside what is hashed matters
is tried too: an engine that has trained and restored many times, and a new one, go on from it to the last bit alike.)
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file

from megagpt.checkpoint.reshard import reshard
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import rank_file
from megagpt.cli import main
from megagpt.config.schema import ParallelSection, TrainingRun
from megagpt.parallel.legal import allowed_layouts
from megagpt.parallel.plan import is_legal
from tests.distributed.layouts import relative
from tests.distributed.processes import start
from tests.distributed.reshard_jobs import FEW, Laid, Shown, Written, read_shown, run_layouts
from tests.distributed.runs import metric_rows, saved_state, step_dir, train_to_the_end
from tests.tiny import run_config, run_words

LOG = logging.getLogger(__name__)
FIRST, LAST = 5, 25
# Heads of an odd width: parts end inside tensors, and groups do not divide by what DeepSpeed aligns them to.
SIZES = {
    "gpt2": ("gpt2", ["model.n_head=4", "model.d_model=36", "model.n_layer=2"]),
    "few": ("gpt2", ["model.n_head=2", "model.d_model=22", "model.n_layer=2"]),
    "mqa": ("llama", ["model.n_head=4", "model.n_kv_head=1", "model.d_model=32", "model.qk_norm=true",
                      "model.tied_head=true"]),
    "wide": ("gpt2", ["model.n_head=4", "model.d_model=32", "model.vocab_size=16384"]),
}  # fmt: skip
FP16 = ("train.dtype=fp16", "parallel.extra={fp16: {initial_scale_power: 10, loss_scale_window: 4}}")
BF16 = ("train.dtype=bf16",)
CPU = ("parallel.offload_optimizer=cpu",)
BOTH = (*CPU, "parallel.offload_weights=cpu", "parallel.keep_gathered_below_elements=0")
DISK = ("parallel.zero_stage=3", "parallel.offload_optimizer=nvme", "parallel.update_elements=262144")


@dataclass(frozen=True)
class Layout:
    """A name, a configuration and how many processes; those with the same degrees share them."""

    name: str
    config: TrainingRun
    world_size: int

    @property
    def degrees(self):
        parallel = self.config.parallel
        return self.world_size, parallel.pipeline, parallel.sequence, parallel.tensor

    @property
    def dtype(self):
        return self.config.train.dtype

    def laid(self, last, **what) -> Laid:
        return Laid(self.name, self.config, first=FIRST, last=last, **what)


def layout(where, tokens, name, world_size, *words, family="gpt2") -> Layout:
    base, sizes = SIZES[family]
    usual = [f"train.max_steps={LAST}", "optim.lr=3e-3"]
    config = quick(run_config(where / "unused", tokens, *sizes, *usual, *words, family=base), world_size)
    assert is_legal(config, world_size), name
    return Layout(name, config, world_size)


def quick(config: TrainingRun, world_size: int) -> TrainingRun:
    """With the largest micro-batch (nothing here depends on it): a pipeline has as many as stages, others one."""
    parallel = config.parallel
    data = world_size // (parallel.tensor * parallel.sequence * parallel.pipeline)
    micro = config.train.global_batch_size // (data * parallel.pipeline)
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": micro})})


def plain_layouts(where, tokens, family="gpt2", most=4) -> list[Layout]:
    """All of 1, 2 and 4 processes that the product's own table allows, of degrees up to 2, in fp32."""
    found = []
    for world_size in (1, 2, 4)[: most.bit_length()]:
        base = layout(where, tokens, "base", world_size, family=family)
        for config in allowed_layouts(base.config, world_size):
            parallel = config.parallel
            if max(parallel.tensor, parallel.pipeline, parallel.sequence) <= 2 and not lies_as_another(parallel):
                degrees = f"pp{parallel.pipeline}sp{parallel.sequence}tp{parallel.tensor}"
                name = f"{world_size}-{degrees}{'ts' * parallel.tensor_sequence}-zero{parallel.zero_stage}"
                found.append(Layout(name, quick(config, world_size), world_size))
    return found


def lies_as_another(parallel: ParallelSection) -> bool:
    """With the sequence cut over the tensor group too the same tensors lie in the same places: at one ZeRO stage."""
    return parallel.tensor_sequence and parallel.zero_stage != 1


def other_layouts(where, tokens) -> list[Layout]:
    """In bf16 and fp16, and with state in host memory."""
    tp, pp, sp = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=2"
    z2, z3 = "parallel.zero_stage=2", "parallel.zero_stage=3"
    rows = {
        "cpu-zero1": (2, CPU),
        "cpu-zero2": (2, (*CPU, z2)),
        "cpu-zero3": (2, (*BOTH, z3)),
        "cpu-tp": (2, (*CPU, tp)),
        "cpu-pp": (2, (*CPU, pp)),
        "cpu-tp-zero3": (4, (*BOTH, z3, tp)),
        "bf16-zero1": (2, BF16),
        "bf16-zero2": (2, (*BF16, z2)),
        "bf16-zero3": (2, (*BF16, z3)),
        "bf16-cpu": (2, (*BF16, *CPU)),
        "bf16-pp-tp": (4, (*BF16, pp, tp)),
        "bf16-sp": (2, (*BF16, sp)),
        "fp16-zero1": (2, FP16),
        "fp16-zero2": (2, (*FP16, z2)),
        "fp16-zero3": (2, (*FP16, z3)),
        "fp16-tp": (2, (*FP16, tp)),
        "fp16-pp": (2, (*FP16, pp)),
        "fp16-cpu-zero2": (2, (*FP16, *CPU, z2)),
        "fp16-cpu-zero3": (2, (*FP16, *BOTH, z3)),
        "fp16-tp-pp": (4, (*FP16, pp, tp)),
    }
    return [layout(where, tokens, name, world_size, *words) for name, (world_size, words) in rows.items()]


def muon_layouts(where, tokens) -> list[Layout]:
    found = []
    for world_size in (1, 2, 4):
        base = layout(where, tokens, "base", world_size, "optim.name=muon")
        for config in allowed_layouts(base.config, world_size):
            parallel = config.parallel
            if max(parallel.tensor, parallel.sequence) <= 2 and not lies_as_another(parallel):
                name = f"muon-{world_size}-sp{parallel.sequence}tp{parallel.tensor}{'ts' * parallel.tensor_sequence}"
                found.append(Layout(f"{name}-zero{parallel.zero_stage}", quick(config, world_size), world_size))
    return found


def disk_layouts(where, tokens) -> list[Layout]:
    """Half of the wide embedding is 2**18 elements, which DeepSpeed takes to a disk."""
    disk = where / "disk"
    disk.mkdir()
    rows = {
        "alone": (1, ()),
        "disk": (1, (*DISK, f"parallel.nvme_dir={disk}")),
        "disk-2": (2, (*DISK, f"parallel.nvme_dir={disk}")),
        "tensor": (2, ("parallel.tensor=2",)),
        "pipeline": (2, ("parallel.pipeline=2",)),
    }
    return [layout(where, tokens, name, n, *words, family="wide") for name, (n, words) in rows.items()]


def truth_of(step_dir: Path, out: Path) -> None:
    """Put the logical tensors together by numpy's own indexing, each element from exactly one file."""
    wholes: dict[str, np.ndarray] = {}
    for path in sorted(step_dir.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name = key.partition("|")[0]
                described = json.loads(metadata[name])
                shape = tuple(described["shape"])
                places = np.arange(np.prod(shape)).reshape(shape)
                if "shard" in described:
                    spans = described["shard"]["spans"]
                    taken = [np.arange(first, first + size) for first, size in spans]
                    places = np.take(places, np.concatenate(taken), axis=described["shard"]["dim"])
                values = file.get_tensor(key)
                mine = places.ravel()[described["start"] : described["start"] + values.size]
                whole = wholes.setdefault(key, np.full(shape, np.nan, np.float32))
                assert np.isnan(whole.ravel()[mine]).all(), f"{path}: {key} stands in another file too"
                whole.ravel()[mine] = values
    assert not any(np.isnan(whole).any() for whole in wholes.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(wholes, out)


def run_groups(laid: list[tuple[Layout, Laid]], where: Path, seconds: float) -> dict[str, Shown]:
    """A group of processes for all layouts of the same degrees; two at a time: one computes while the other waits."""
    groups = defaultdict(list)
    for one, what in laid:
        groups[one.degrees].append(what)

    def run_group(degrees: tuple[int, ...]) -> dict[str, Shown]:
        out = where / f"{'x'.join(map(str, degrees))}.json"
        start(run_layouts, degrees[0], groups[degrees], out, log=out.with_suffix(".log")).finish(seconds)
        return read_shown(out)

    longest_first = sorted(groups, key=lambda degrees: -degrees[0] * len(groups[degrees]))
    with ThreadPoolExecutor(2) as pool:
        return {name: shown for found in pool.map(run_group, longest_first) for name, shown in found.items()}


@dataclass(frozen=True)
class Matrix:
    """All pairs of some layouts."""

    layouts: list[Layout]
    writers: dict[str, Shown]
    readers: dict[str, Shown]
    go_on: dict[str, str]
    """Reader -> the writer that it went on from."""
    alike: tuple[Written, ...]
    """The state of the first layout in the files of each kind of writer."""
    where: Path

    def of_dtype(self, *dtypes):
        return {one.name for one in self.layouts if one.dtype in dtypes}


def one_state(layouts: list[Layout], first: Written, where: Path) -> tuple[Written, ...]:
    """The state of the first layout in the files of all of its precision; of those with the same files, one."""
    found: dict[tuple[bytes, ...], Written] = {}
    for one in layouts:
        if one.dtype == layouts[0].dtype:
            reshard(first.step_dir, where / one.name, one.world_size, _parallel_words(one))
            step_dir = CheckpointStore(where / one.name / "checkpoints").step_dir(FIRST)
            files = tuple((step_dir / rank_file(rank)).read_bytes() for rank in range(one.world_size))
            found.setdefault(files, Written(one.name, step_dir, first.truth))
    return tuple(found.values())


def _parallel_words(one: Layout) -> list[str]:
    words = [f"parallel.{key}={json.dumps(value)}" for key, value in _plain(one.config)["parallel"].items()]
    return [*words, "train.micro_batch_size=1"]


def all_pairs(layouts: list[Layout], where: Path, last: int = LAST, seconds: float = 1200) -> Matrix:
    writers = run_groups(
        [(one, one.laid(last, write=where / "written" / one.name)) for one in layouts], where / "a", seconds
    )
    written = {}
    for one in layouts:
        step_dir = CheckpointStore(where / "written" / one.name).step_dir(FIRST)
        truth = where / "truth" / f"{one.name}.safetensors"
        truth_of(step_dir, truth)
        written[one.name] = Written(one.name, step_dir, truth)
    go_on = {one.name: _another_writer(one, layouts) for one in layouts}
    alike = one_state(layouts, written[layouts[0].name], where / "alike")
    laid = []
    for one in layouts:
        other = written[go_on[one.name]]
        reshard(other.step_dir, where / "resharded" / one.name, one.world_size, _parallel_words(one))
        step_dir = CheckpointStore(where / "resharded" / one.name / "checkpoints").step_dir(FIRST)
        resharded = Written("resharded", step_dir, other.truth)
        what = one.laid(
            last,
            read=tuple(written.values()),
            go_on=(other,),
            same=(resharded,),
            alike=alike,
            save_again=where / "again" / one.name,
        )
        laid.append((one, what))
    return Matrix(layouts, writers, run_groups(laid, where / "b", seconds), go_on, alike, where)


def _plain(config):
    return json.loads(config.model_dump_json())


def _another_writer(reader: Layout, layouts: list[Layout]) -> str:
    """The next of the same precision; over all readers, every writer comes up."""
    alike = [one.name for one in layouts if one.dtype == reader.dtype]
    return alike[(alike.index(reader.name) + 1) % len(alike)]


def check_state(matrix: Matrix) -> None:
    names = [one.name for one in matrix.layouts]
    assert sorted(matrix.readers) == sorted(names)
    wrong = {
        f"{writer} -> {reader}": problems
        for reader, shown in matrix.readers.items()
        for writer, problems in shown.differing.items()
        if problems
    }
    assert wrong == {}
    assert all(sorted(shown.differing) == sorted(names) for shown in matrix.readers.values())


def check_losses(matrix: Matrix, dtypes: tuple[str, ...], tolerance: float) -> None:
    worst = {
        f"{writer} -> {reader}": relative(
            matrix.readers[reader].continued[writer], matrix.writers[writer].losses[FIRST:]
        )
        for reader in matrix.of_dtype(*dtypes)
        for writer in [matrix.go_on[reader]]
    }
    LOG.info("%s: %d continuations, largest relative difference %.2g", dtypes, len(worst), max(worst.values()))
    assert {pair: value for pair, value in worst.items() if not value < tolerance} == {}
    assert {writer for pair in worst for writer in [pair.partition(" -> ")[0]]} == matrix.of_dtype(*dtypes)


def check_resharded(matrix: Matrix) -> None:
    """The files of `reshard` are those that the layout writes itself, and to go on from them makes no difference."""
    for one in matrix.layouts:
        own = CheckpointStore(matrix.where / "again" / one.name).step_dir(FIRST)
        resharded = CheckpointStore(matrix.where / "resharded" / one.name / "checkpoints").step_dir(FIRST)
        files = [rank_file(rank) for rank in range(one.world_size)]
        assert sorted(read_manifest(own).files) == files
        assert [(resharded / name).read_bytes() == (own / name).read_bytes() for name in files] == [True] * len(files)
        continued = matrix.readers[one.name].continued
        assert len(continued["resharded"]) == FEW
        assert continued["resharded"] == continued[matrix.go_on[one.name]][:FEW], one.name


def check_alike(matrix: Matrix, at_least: int) -> None:
    """Whichever layout wrote it, a reader holds the same to the last bit and goes on as the state's writer did."""
    writers = [written.name for written in matrix.alike]
    LOG.info("%d readers of one state in %d kinds of files", len(matrix.readers), len(writers))
    assert len(writers) >= at_least
    uninterrupted = matrix.writers[matrix.layouts[0].name].losses[FIRST:]
    for reader, shown in matrix.readers.items():
        assert sorted(shown.digests) == sorted(writers)
        different = [writer for writer in writers if shown.digests[writer] != shown.digests[writers[0]]]
        assert different == [], f"{reader} holds other bits after {different} than after {writers[0]}"
        goes_on = shown.continued["from the last"]
        assert shown.continued["from the first"] == goes_on[:FEW], reader
        if reader in matrix.of_dtype(matrix.layouts[0].dtype):
            assert relative(goes_on, uninterrupted) < 1e-5, reader


def check_reading(matrix: Matrix) -> None:
    """No rank reads more than it fills."""
    for one in matrix.layouts:
        shown = matrix.readers[one.name]
        if one.config.parallel.offload_optimizer != "nvme":
            for read in shown.bytes_read.values():
                assert all(found <= held for found, held in zip(read, shown.bytes_held, strict=True)), one.name


def whole_bytes(matrix: Matrix) -> int:
    return sum(tensor.nbytes for tensor in _load_truth(matrix).values())


def _load_truth(matrix):
    from safetensors.numpy import load_file

    return load_file(matrix.where / "truth" / f"{matrix.layouts[0].name}.safetensors")


@pytest.fixture(scope="module")
def few(tmp_path_factory, tokens) -> Matrix:
    where = tmp_path_factory.mktemp("few")
    layouts = [
        layout(
            where, tokens, "zero3", 2, "parallel.zero_stage=3", "parallel.keep_gathered_below_elements=0", family="few"
        ),
        layout(where, tokens, "zero2", 2, "parallel.zero_stage=2", family="few"),
        layout(where, tokens, "pipeline", 2, "parallel.pipeline=2", family="few"),
    ]
    return all_pairs(layouts, where, FIRST + 8)


def test_state_is_bit_equal_between_zero_2_zero_3_and_a_pipeline(few):
    check_state(few)


def test_the_loss_goes_on_between_them(few):
    check_losses(few, ("fp32",), 1e-5)


def test_resharded_files_are_those_that_each_of_them_writes(few):
    check_resharded(few)


def test_each_of_them_goes_on_alike_from_the_files_of_all(few):
    check_alike(few, 3)


def test_a_rank_reads_its_own_part_alone(few):
    check_reading(few)
    whole = whole_bytes(few)
    for read in few.readers["zero3"].bytes_read.values():
        assert sum(read) == whole


@pytest.fixture(scope="module")
def every(tmp_path_factory, tokens) -> Matrix:
    where = tmp_path_factory.mktemp("every")
    return all_pairs([*plain_layouts(where, tokens), *other_layouts(where, tokens)], where)


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_state_is_bit_equal_between_all_pairs(every):
    LOG.info("%d layouts, %d ordered pairs", len(every.layouts), len(every.layouts) ** 2)
    assert len(every.layouts) >= 55
    check_state(every)


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_the_loss_goes_on_between_all(every):
    """In bf16 and fp16 layouts round in other places: as test_matrix.py has it."""
    check_losses(every, ("fp32",), 1e-5)
    check_losses(every, ("bf16",), 2e-3)
    check_losses(every, ("fp16",), 2e-3)


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_every_layout_goes_on_alike_from_the_files_of_every_other(every):
    check_alike(every, 14)


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_resharded_files_are_those_that_every_layout_writes(every):
    check_resharded(every)


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_no_rank_reads_more_than_it_fills(every):
    check_reading(every)
    whole = whole_bytes(every)
    # Of weights and two moments: a third of what the process works with, and what it updates.
    shares = {
        "4-pp2sp1tp2-zero1": 1 / 3 / 4 + 1 / 4,
        "4-pp1sp1tp2-zero3": 1 / 3 / 2 + 1 / 4,
        "4-pp1sp1tp1-zero3": 1 / 3 + 1 / 4,
    }
    for name, share in shares.items():
        for writer, read in every.readers[name].bytes_read.items():
            assert sum(read) / 4 < 1.15 * share * whole, (writer, name)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["mqa", "muon", "disk"])
def test_the_same_of_grouped_query_attention_muon_and_state_on_disk(which, tmp_path, tokens):
    layouts = {
        "mqa": lambda: plain_layouts(tmp_path, tokens, "mqa", 2),
        "muon": lambda: muon_layouts(tmp_path, tokens),
        "disk": lambda: disk_layouts(tmp_path, tokens),
    }[which]()
    matrix = all_pairs(layouts, tmp_path)
    assert len(layouts) >= 5
    check_state(matrix)
    check_losses(matrix, ("fp32",), 1e-5)
    check_alike(matrix, 4)
    check_resharded(matrix)


@pytest.mark.exhaustive
def test_the_command_goes_on_from_a_resharded_run_as_from_the_run_itself(tmp_path, tokens):
    """Two processes under ZeRO-2 write; four under tensor and pipeline parallelism go on, with the metrics so far."""
    written, resharded = tmp_path / "written", tmp_path / "resharded"
    usual = ["checkpoint.save_every=6", "train.micro_batch_size=1", "model.dropout=0.1"]
    train_to_the_end(run_words(written, tokens, *usual, "parallel.zero_stage=2"), tmp_path / "log", 2)
    shutil.rmtree(step_dir(written, 12))
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.zero_stage=1"]
    done = CliRunner().invoke(
        main, ["checkpoint", "reshard", str(written), str(resharded), "--processes", "4", *layout]
    )
    assert done.exit_code == 0, done.output
    for run_dir in (written, resharded):
        train_to_the_end(run_words(run_dir, tokens, *usual, *layout), run_dir.with_suffix(".log"), 4)
    assert saved_state(step_dir(resharded, 12)) == saved_state(step_dir(written, 12))
    assert metric_rows(resharded) == metric_rows(written)
    assert [row["step"] for row in metric_rows(resharded)] == list(range(1, 13))
