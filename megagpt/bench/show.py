"""A comparison as a table for a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megagpt.bench.compare import Comparison, Measured, summary
from megagpt.model import flops

EQUAL = """\
Equal for all: sizes, micro-batches, tokens, threads, AdamW, clipping. `plain` is our model and numerics in plain
PyTorch; `nanogpt` and `litgpt` keep fp32 weights under bf16 autocast and their own shape of block, as they document.
Reading data, logging and saving are nobody's. MFU: full counts all of attention (PaLM, nanoGPT), causal the half that
the mask leaves (llm.c, Megatron-LM). The ratios are medians over rounds."""


def show(comparison: Comparison, console: Console) -> None:
    """Print what was measured on which device, and how ours stands."""
    config, is_cpu = comparison.request.config, comparison.device == "cpu"
    threads = f", {comparison.threads} threads" if is_cpu else ""
    peak = "" if comparison.peak_tflops is None else f", peak {comparison.peak_tflops:g}"
    console.print(
        f"{flops.parameter_count(config.model):,} parameters, {config.train.dtype}, ZeRO-{config.parallel.zero_stage}, "
        f"{config.train.global_batch_size} x {config.model.max_seq_len} tokens a step "
        f"in micro-batches of {config.train.micro_batch_size}{', compiled' if config.train.compile else ''}\n"
        f"{comparison.device}{threads}: a product reaches {comparison.matmul_tflops:.3g} TFLOP/s{peak}",
        highlight=False,
        markup=False,
    )
    table = Table()
    peaks = _peaks(comparison)
    table.add_column("loop")
    for heading in ("tokens/s", "ms/step", "speed over ours", *(["CPU s/step", "by CPU time"] if is_cpu else [])):
        table.add_column(heading, justify="right")
    for name in peaks:
        table.add_column(f"{name}, full / causal", justify="right")
    for heading in ("peak memory", "loss"):
        table.add_column(heading, justify="right")
    for one in comparison.measured:
        table.add_row(*_row(comparison, one, peaks, is_cpu=is_cpu))
    console.print(table)
    console.print("\n".join([*summary(comparison), EQUAL]), highlight=False, markup=False)


def _peaks(comparison: Comparison) -> dict[str, float]:
    known = {} if comparison.peak_tflops is None else {"MFU": comparison.peak_tflops}
    return known | {"of product": comparison.matmul_tflops}


def _row(comparison: Comparison, one: Measured, peaks: dict[str, float], *, is_cpu: bool) -> list[str]:
    tokens_per_second = comparison.tokens_per_second(one)
    cells = [
        one.loop,
        f"{tokens_per_second:,.0f}",
        f"{comparison.tokens_per_step / tokens_per_second * 1e3:,.1f}",
        f"{comparison.speed(one):.3f}",
    ]
    if is_cpu:
        cells += [f"{min(one.step_cpu_seconds):.3g}", f"{comparison.speed(one, cpu=True):.3f}"]
    for peak in peaks.values():
        full, causal = (comparison.utilization(one, count, peak) for count in ("full", "causal"))
        cells.append(f"{full:.1%} / {causal:.1%}")
    return [*cells, f"{one.peak_bytes / 2**30:.2f} GiB", f"{one.loss:.3f}"]
