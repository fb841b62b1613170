"""A checkpoint in the files of another layout, and back: the same bytes. Without a process group.

That the files are those which the processes of the layout write themselves: tests/distributed/test_reshard.py.
"""

from __future__ import annotations

import json
import shutil
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from megagpt.checkpoint.open import CHECKPOINTS, open_checkpoint, rank_files
from megagpt.checkpoint.reshard import reshard
from megagpt.checkpoint.save import Identity, save_checkpoint
from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.checkpoint.tensors import KINDS, MOMENTUM, WEIGHT, SliceReader, TensorSlice
from megagpt.cli import main
from megagpt.errors import CheckpointError, ConfigError
from megagpt.model.build import build_model
from megagpt.parallel.legal import allowed_layouts
from megagpt.parallel.matrices import hidden_matrices
from tests.checkpoint.small_saves import ALONE
from tests.tiny import run_config

STEP = 7
STATE = {"step": STEP, "tokens": 896, "skipped_steps": 2, "engine": {"adam_step": 5, "loss_scale": 1024.0}}


def make_run(run_dir, config):
    """A run that one process saved at step 7, with numbers that are all different."""
    with torch.device("meta"):
        model = build_model(config.model)
    matrices = {matrix.name for matrix in hidden_matrices(model)} if config.optim.name == "muon" else set()
    slices, first = [], 0.0
    for name, parameter in model.named_parameters():
        kinds = (WEIGHT, MOMENTUM) if name in matrices else KINDS
        values = {}
        for kind in kinds:
            values[kind] = torch.arange(first, first + parameter.numel())
            first += parameter.numel()
        slices.append(TensorSlice(name, tuple(parameter.shape), 0, values))
    (run_dir / "tokenizer").mkdir(parents=True)
    (run_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    (run_dir / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    plain = json.loads(config.model_dump_json())
    identity = Identity(plain, "data", None, (run_dir / "tokenizer" / "tokenizer.json",), {"torch": "2"})
    save_checkpoint(CheckpointStore(run_dir / CHECKPOINTS), ALONE, slices, STATE, identity)
    return run_dir


def config_of(which, tmp_path):
    words = ["optim.name=muon"] if which == "muon" else []
    family = "llama" if which == "llama" else "gpt2"
    return run_config(tmp_path / "run", tmp_path / "no tokens", "train.micro_batch_size=1", *words, family=family)


@pytest.fixture
def config(tmp_path):
    return config_of("gpt2", tmp_path)


def step_dir(run_dir):
    return CheckpointStore(run_dir / CHECKPOINTS).step_dir(STEP)


def tensors_of(run_dir):
    return {path.name: path.read_bytes() for path in step_dir(run_dir).glob("*.safetensors")}


def words_of(parallel):
    return [f"parallel.{key}={json.dumps(value)}" for key, value in json.loads(parallel.model_dump_json()).items()]


FAST = {("gpt2", 2), ("muon", 2)}


@pytest.mark.parametrize(
    ("which", "world_size"),
    [
        pytest.param(*pair, marks=() if pair in FAST else pytest.mark.exhaustive)
        for pair in product(("gpt2", "llama", "muon"), (1, 2, 4))
    ],
)
def test_there_and_back_through_every_layout_gives_the_same_bytes(which, world_size, tmp_path):
    config = config_of(which, tmp_path)
    make_run(tmp_path / "run", config)
    layouts = list(allowed_layouts(config, world_size))
    assert len(layouts) >= 2
    for index, laid_out in enumerate(layouts):
        there, back = tmp_path / f"there{index}", tmp_path / f"back{index}"
        reshard(tmp_path / "run", there, world_size, words_of(laid_out.parallel))
        manifest = verify_checkpoint(step_dir(there))
        assert manifest.state == STATE
        assert {f"rank_{rank:05d}.safetensors" for rank in range(world_size)} | {"tokenizer.json"} == set(
            manifest.files
        )
        assert manifest.config["parallel"] == json.loads(laid_out.parallel.model_dump_json())
        reshard(there, back, 1, words_of(config.parallel))
        assert tensors_of(back) == tensors_of(tmp_path / "run")
        shutil.rmtree(there)
        shutil.rmtree(back)


def test_each_value_is_written_once(config, tmp_path):
    make_run(tmp_path / "run", config)
    reshard(tmp_path / "run", tmp_path / "new", 4, ["parallel.tensor=2"])
    sizes = [sum(map(len, tensors_of(tmp_path / name).values())) for name in ("run", "new")]
    assert sizes[0] < sizes[1] < 1.2 * sizes[0]  # headers


def test_the_new_run_opens_and_brings_its_history(config, tmp_path):
    make_run(tmp_path / "run", config)
    reshard(step_dir(tmp_path / "run"), tmp_path / "new", 2, ["parallel.tensor=2", "optim.lr=0.5"])
    opened = open_checkpoint(tmp_path / "new")
    assert opened.step == STEP
    assert (tmp_path / "new" / "metrics.jsonl").read_text() == '{"step": 7, "loss": 1.0}\n'
    assert "lr: 0.5" in (tmp_path / "new" / "config.yaml").read_text()
    assert opened.config.optim.lr == config.optim.lr  # so that the next start tells it as a change
    assert opened.manifest.data_fingerprint == "data"
    with SliceReader(rank_files(opened.path, opened.manifest)) as new:
        found = {name: new.read_whole(name) for name in new.shapes}
    for name, parameter in open_checkpoint(tmp_path / "run").load_model().named_parameters():
        assert torch.equal(found[name], parameter)


def test_what_cannot_be_is_refused_and_leaves_nothing(config, tmp_path):
    make_run(tmp_path / "run", config)
    new = tmp_path / "new"
    with pytest.raises(CheckpointError, match=r"model is .*n_layer=2.* in the checkpoint, .*n_layer=3"):
        reshard(tmp_path / "run", new, 2, ["model.n_layer=3"])
    with pytest.raises(CheckpointError, match=r"optim.name is 'adamw' .* 'muon'"):
        reshard(tmp_path / "run", new, 2, ["optim.name=muon"])
    with pytest.raises(ConfigError, match=r"parallel.pipeline is more than the blocks"):
        reshard(tmp_path / "run", new, 4, ["parallel.pipeline=4"])
    with pytest.raises(ConfigError, match="3 processes"):
        reshard(tmp_path / "run", new, 3, [])
    with pytest.raises(ConfigError, match=r"unknown key 'parallel.tensr'"):
        reshard(tmp_path / "run", new, 2, ["parallel.tensr=2"])
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        reshard(tmp_path / "run", tmp_path / "run", 2, [])
    assert not new.exists()


def test_a_damaged_checkpoint_is_not_resharded(config, tmp_path):
    make_run(tmp_path / "run", config)
    file = step_dir(tmp_path / "run") / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: damaged"):
        reshard(tmp_path / "run", tmp_path / "new", 2, [])
    assert not (tmp_path / "new").exists()


def test_the_command(config, tmp_path):
    make_run(tmp_path / "run", config)
    words = ["checkpoint", "reshard", str(tmp_path / "run"), str(tmp_path / "new"), "--processes", "2"]
    done = CliRunner().invoke(main, [*words, "parallel.tensor=2"])
    assert done.exit_code == 0, done.output
    assert f"{step_dir(tmp_path / 'new')}: step 7 of {tmp_path / 'run'} as 2 processes write it, 3 files" in done.output
    again = CliRunner().invoke(main, [*words, "parallel.tensor=2"])
    assert again.exit_code == 2
    assert "holds checkpoints already; name another folder" in again.output


def test_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path):
    sizes = {"vocab_size": 2**13, "d_model": 256, "n_layer": 12, "n_head": 4, "n_kv_head": 4, "d_ff": 1024}
    words = [f"model.{key}={value}" for key, value in sizes.items()]
    config = run_config(tmp_path / "run", tmp_path / "no tokens", *words, family="llama")
    make_run(tmp_path / "run", config)
    largest = 4 * 2**13 * 256
    whole = sum(map(len, tensors_of(tmp_path / "run").values()))
    assert whole > 20 * largest
    with Watched() as watched:
        reshard(tmp_path / "run", tmp_path / "new", 4, ["parallel.tensor=2", "parallel.zero_stage=3"])
    assert watched.grown_by < 4 * largest


class Watched:
    """Most memory that this process took while the block ran; files that it has mapped do not count."""

    def __enter__(self):
        self._before, self._most, self._done = resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.0005):
            self._most = max(self._most, resident())

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.grown_by = self._most - self._before


def resident():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])
