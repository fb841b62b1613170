"""torch.compile of each block. Applied from outside: no layer knows about it."""

from __future__ import annotations

import torch

from megagpt.errors import ConfigError
from megagpt.model.decoder import Decoder
from megagpt.model.layers import Block


def compile_blocks(model: Decoder) -> None:
    """Let each block's forward run as one compiled graph, the same for all of them. Before `apply_recompute`.

    Recomputation of whole blocks then runs the compiled ones again. Parameter names stay as they are. The first step of
    each shape takes longer.

    Raises:
        ConfigError: nothing that could compile is installed.
    """
    _check_compiler()
    for block in model.blocks:
        if isinstance(block, Block):  # not the place of another stage's
            # An attribute of the instance, not a wrapping module: a wrapper would change every parameter's name.
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]


def _check_compiler() -> None:
    """PyTorch's own error comes from within the first step, and is forty lines long."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ConfigError(
            f"train.compile is true, but there is no C++ compiler here ({error}); "
            "install g++ (or name one in CXX), or set train.compile=false"
        ) from None
