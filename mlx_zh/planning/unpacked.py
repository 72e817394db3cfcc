"""The memory of frozen quantized weights that are unpacked for dense products, and whether there is room for it."""

from __future__ import annotations

from mlx_zh.planning.memory import weight_bytes
from mlx_zh.planning.shapes import ModelShape, Target
from mlx_zh.recipe import Memory

# MLX schedules up to ten command buffers ahead of a GPU, and the product with a large weight ends one. So the weights
# of ten products may be there at once; a block has seven.
_BLOCKS_AHEAD = 2
_HEADS_AHEAD = 2  # of a chunk, and of the next one
# What is unpacked may take this share of what the weights leave. More would have to be won back by computing layers
# again, which could take longer than dense products save.
_SHARE = 1 / 8
_EXPERTS = ("gate_proj", "up_proj", "down_proj")  # where there are experts, MLX gathers their products


def of_blocks(model: ModelShape, target: Target) -> float:
    """Bytes of the unpacked weights of blocks."""
    names = [name for name in model.linear if not (model.experts and name in _EXPERTS)]
    values = sum(model.share(name) * model.matrix(name)[0] * model.matrix(name)[1] for name in names)
    return min(_BLOCKS_AHEAD, model.layers) * values * target.value_bytes


def of_head(model: ModelShape, target: Target) -> float:
    """Bytes of the unpacked weight of the output head."""
    return float(_HEADS_AHEAD * model.vocabulary * model.hidden * target.value_bytes)


def room(settings: Memory, model: ModelShape, target: Target, limit: float) -> tuple[bool, bool]:
    """Whether the weights of blocks, and that of the head too, may be unpacked in a step within `limit` bytes.

    `memory.dense_products: true` takes the room for the blocks in any case.
    """
    if settings.dense_products is False or target.packing is None:
        return False, False
    free = _SHARE * (limit - weight_bytes(model, target))
    blocks, head = of_blocks(model, target), of_head(model, target)
    return settings.dense_products is True or blocks <= free, blocks + head <= free


def unpacked_bytes(settings: Memory, model: ModelShape, target: Target, limit: float, *, faster: bool) -> float:
    """Bytes of unpacked weights in a step; `faster` says whether dense products were measured to be faster."""
    if settings.dense_products is not True and not faster:
        return 0.0
    blocks, head = room(settings, model, target, limit)
    return blocks * of_blocks(model, target) + head * of_head(model, target)
