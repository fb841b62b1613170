"""Tensor parallelism applied from outside: layers of a single-device model are replaced by their parallel kin.

Parameter names stay as they are: they are the contract of checkpoints, initial values and conversion.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from megagpt.model.decoder import Decoder
from megagpt.model.layers import Attention, Block
from megagpt.model.layout import Layout, Shard
from megagpt.parallel.collectives import Region, SequenceRegion, TensorRegion, summed
from megagpt.parallel.cross_entropy import vocab_parallel_nll
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.tensor import (
    ColumnParallelLinear,
    GatheredLinear,
    GroupedQKVLinear,
    RankedAttentionCore,
    RankedDropout,
    RowParallelLinear,
    SequencePositions,
    VocabParallelEmbedding,
    VocabParallelHead,
)

TAG = "tensor_model_parallel"
"""Attribute by which DeepSpeed knows that a parameter is cut over the tensor group: its norm is counted on each."""

FUSED = {"up": 1, "gate_up": 2}
"""First layer of a feed-forward -> how many matrices of equal size are fused in it."""


def apply_tensor_parallel(model: Decoder, mesh: Mesh, *, sequence: bool = False, exact: bool = False) -> None:
    """Cut the model over the tensor group; with a group of one, leave it as it is.

    Before `init_weights`, and best on the meta device: then no process ever holds a whole weight.

    Args:
        model: fresh from `build_model`.
        mesh: this process's place.
        sequence: between the regions each process holds a part of the sequence (`parallel.tensor_sequence`).
        exact: for evaluation: no product is summed in parts, so that with the same kernels the hidden vectors are
            those of one process, bit for bit (with MKL in fp32, from 16 columns a process on).

    Raises:
        NotImplementedError: the model has a weight that this module does not know how to cut.
    """
    if mesh.groups is None or mesh.tensor == 1:
        return
    region: Region = (SequenceRegion if sequence else TensorRegion)(mesh.groups.tensor, mesh.tensor, mesh.tensor_rank)
    for block in model.blocks:
        assert isinstance(block, Block)  # noqa: S101 - a ModuleList does not know what it holds
        way_out = GatheredLinear if exact else RowParallelLinear
        _cut_attention(block.attention, region, way_out)
        _cut_feed_forward(block.feed_forward, region, way_out)
    model.embedding.tokens = VocabParallelEmbedding(model.embedding.tokens, region)
    model.head = VocabParallelHead(model.head, region)
    model.tie_head()
    if sequence:
        _share_out_sequence(model, region)
    model.shards = _shards(model, region, sequence=sequence)
    model.nll = partial(vocab_parallel_nll, shard=model.head.shards["weight"], group=mesh.groups.tensor)


def prepare_parameters(model: nn.Module, shards: dict[str, Shard], mesh: Mesh) -> None:
    """Tag what is cut, as DeepSpeed's gradient norm wants it, and add up gradients of which each process has a part.

    Once the parameters are on their device, before DeepSpeed takes them.
    """
    if mesh.groups is None:
        return
    for name, parameter in model.named_parameters():
        shard = shards.get(name)
        if shard is None:
            continue
        if shard.is_cut:
            setattr(parameter, TAG, True)
        elif shard.layout.summed:
            # A hook of the tensor itself: it runs before the gradient is accumulated, so that DeepSpeed sees the sum.
            parameter.register_hook(partial(summed, group=mesh.groups.tensor))  # type: ignore[no-untyped-call]


def qkv_sizes(attention: Attention) -> tuple[int, int, int]:
    """Rows of queries, keys and values in an attention's fused projection, as long as it is not cut."""
    kv_size = attention.n_kv_head * attention.d_head
    return attention.n_head * attention.d_head, kv_size, kv_size


WayOut = type[RowParallelLinear] | type[GatheredLinear]


def _cut_attention(attention: Attention, region: Region, way_out: WayOut) -> None:
    n_head, n_kv_head = attention.n_head, attention.n_kv_head
    sub_sizes = qkv_sizes(attention)
    if n_kv_head < region.size:
        attention.qkv = GroupedQKVLinear(attention.qkv, region, sub_sizes, n_kv_head)
    else:
        attention.qkv = ColumnParallelLinear(attention.qkv, region, sub_sizes)
    attention.output = way_out(attention.output, region)
    for module in attention.modules():  # the attention itself, and its norm of queries and keys
        if hasattr(module, "n_head"):
            module.n_head = n_head // region.size  # type: ignore[assignment]
            module.n_kv_head = max(1, n_kv_head // region.size)  # type: ignore[assignment]
    grouped = attention.n_head != attention.n_kv_head
    attention.core.grouped = grouped
    if attention.core.dropout > 0:
        attention.core = RankedAttentionCore(attention.core, region, grouped=grouped)


def _cut_feed_forward(feed_forward: nn.Module, region: Region, way_out: WayOut) -> None:
    for name, count in FUSED.items():
        first = getattr(feed_forward, name, None)
        if first is not None:
            sub_sizes = (first.out_features // count,) * count
            setattr(feed_forward, name, ColumnParallelLinear(first, region, sub_sizes))
    feed_forward.down = way_out(feed_forward.down, region)  # type: ignore[arg-type]


def _share_out_sequence(model: Decoder, region: Region) -> None:
    """What stands between the regions works on T / n positions."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(parent, name, RankedDropout(child, region))
            elif name == "positions" and isinstance(child, nn.Embedding):
                setattr(parent, name, SequencePositions(child, region))


def _shards(model: Decoder, region: Region, *, sequence: bool) -> dict[str, Shard]:
    """The layout of every parameter, by name."""
    found: dict[str, Shard] = {}
    for path, module in model.named_modules():
        declared = getattr(module, "shards", {}) if module is not model else {}
        if type(module) is nn.Linear:
            raise NotImplementedError(f"{path}: apply_tensor_parallel does not know how to cut this layer")
        for name, parameter in module.named_parameters(recurse=False):
            # A norm of queries and keys lies inside the region: each process sees the gradient of its own heads.
            whole_layout = Layout("replicated", summed=sequence or ".qk_norm" in path)
            whole = Shard(whole_layout, tuple(parameter.shape), region.size, region.rank)
            found[f"{path}.{name}"] = declared.get(name, whole)
    return found
