# make quickstart   environment, data, tokenizer, training, evaluation, report: the real programs, small sizes
# make test         environment if missing, then the whole test suite
# make test-matrix  every parallel layout up to eight processes against a plain loop
# make test-faults  all that can go wrong with a run: kills at every call of a save, damage, full disks, hangs, every layout to every other
# make test-long    the other tests that take long: every kill of a data job, long lists of layouts, Slurm, two hosts
# make test-soak    half an hour of random faults on a small run, which must end as if nothing had been
# make install      the environment that both use: .venv

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/quickstart
# A folder of benchmark files, where there is one: make quickstart EVAL_DATA=downloads/evals
EVAL_DATA ?=
# What make test-faults runs, its fast tests too.
FAULTS := tests/checkpoint tests/supervise $(addprefix tests/distributed/test_, save.py save_killed.py failed_save.py \
  exact_resume.py resume.py reshard.py deepspeed_import.py watch.py nonfinite.py refusals.py spikes.py supervise.py restarts.py \
  lock.py full_disk.py unreadable.py secrets.py) tests/config/test_hostile.py tests/engine/test_op_lock.py
export TOKENIZERS_PARALLELISM ?= false
# DeepSpeed builds its C++ op with the ninja that it finds: the environment's own.
export PATH := $(abspath $(BIN)):$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.PHONY: install quickstart test test-fast test-matrix test-faults test-long test-soak lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
	  "megagpt needs Python 3.11 or 3.12, this is %d.%d; say make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

quickstart: install
	$(BIN)/megagpt data run configs/data/quickstart.yaml
	$(BIN)/deepspeed --num_accelerators 1 launch/pretrain.py configs/quickstart.yaml
	$(BIN)/megagpt eval run --checkpoint $(RUN) --tasks fast $(if $(EVAL_DATA),--data $(EVAL_DATA))
	$(BIN)/megagpt generate --checkpoint $(RUN) --prompt 'Return the'
	$(BIN)/megagpt report $(RUN)

test: install lint
	$(BIN)/python -m pytest

test-fast: install
	$(BIN)/python -m pytest -m 'not slow and not exhaustive and not soak'

test-matrix: install
	$(BIN)/python -m pytest -m exhaustive tests/distributed/test_matrix.py --log-cli-level=INFO

test-faults: install
	$(BIN)/python -m pytest -m 'not soak' --durations 30 $(FAULTS)

test-long: install
	$(BIN)/python -m pytest -m exhaustive --durations 30 $(addprefix --ignore , $(FAULTS) tests/distributed/test_matrix.py)

test-soak: install
	$(BIN)/python -m pytest -m soak tests/soak --log-cli-level=INFO

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
