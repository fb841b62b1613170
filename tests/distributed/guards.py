"""Guards against silent errors of DeepSpeed, each to be switched off by name: a test must then see the error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from deepspeed.runtime.pipe.engine import PipelineEngine

from megagpt.engine import engine as engine_module
from megagpt.engine import pipeline as pipeline_module
from megagpt.parallel import apply_tensor


def _partitioned(config: Any, plan: Any) -> dict[str, Any]:
    from megagpt.engine.ds_config import ds_config

    settings = ds_config(config, plan)
    settings["pipeline"] |= {"pipe_partitioned": True, "grad_partitioned": True}  # DeepSpeed's defaults
    return settings


def _default_accumulation(config: Any, plan: Any) -> dict[str, Any]:
    from megagpt.engine.ds_config import ds_config

    settings = ds_config(config, plan)
    del settings["data_types"]["grad_accum_dtype"]
    return settings


@contextmanager
def _with_deepspeeds_access() -> Iterator[None]:
    with (
        patch.object(engine_module, "swapping_through", lambda scratch: nullcontext()),
        patch.object(engine_module, "reserve_for", lambda *_: None),
    ):
        yield


GUARDS: dict[str, Any] = {
    "fp16 scale": lambda: patch.object(engine_module, "unscale_with_the_scale_of_the_step", lambda optimizer: None),
    "spare copies": lambda: patch.object(engine_module, "spare_copies", lambda engine, data_parallel: None),
    "tied gradients": lambda: patch.object(
        pipeline_module.PipelinedEngine, "_add_up_tied_gradients", lambda self, engine: None
    ),
    "own tied reduction": lambda: patch.object(
        pipeline_module.PipelinedEngine,
        "_add_up_tied_gradients",
        lambda self, engine: PipelineEngine._exec_reduce_tied_grads(engine),
    ),
    "checked disk access": _with_deepspeeds_access,
    "whole activations": lambda: patch.object(pipeline_module, "ds_config", _partitioned),
    "fp32 accumulation": lambda: patch.object(engine_module, "ds_config", _default_accumulation),
    "summed norms": lambda: patch.object(apply_tensor, "summed", lambda gradient, group: gradient),
    "tags": lambda: patch.object(apply_tensor, "TAG", "not_what_deepspeed_reads"),
    "boundary": lambda: patch.object(
        engine_module.deepspeed.DeepSpeedEngine, "set_gradient_accumulation_boundary", lambda self, boundary: None
    ),
}


@contextmanager
def without(guard: str | None) -> Iterator[None]:
    """Inside, an engine is built and trains without that guard."""
    if guard is None:
        yield
        return
    with GUARDS[guard]():
        yield
