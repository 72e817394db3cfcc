"""Layouts in few bits that keep the tuning: mixed bits, and codes chosen by what the model predicts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_zh.core.packing import PackedBatch
from mlx_zh.errors import DataError, DeviceError, DownloadError, RecipeError
from mlx_zh.models.export import bits, card
from mlx_zh.models.export.folder_files import Layout, packed_layout
from mlx_zh.models.export.merge import Fusion
from mlx_zh.models.export.recover import Recovery, needed_bytes, rounding_errors
from mlx_zh.recipe import Recipe
from mlx_zh.stages.calibration import calibration_rows
from mlx_zh.stages.current_models import adapter_digest
from mlx_zh.system import console, device


def mixed_layout(recipe: Recipe, fusion: Fusion, others: int) -> Layout:
    """More bits where rounding hurts most; `others`: bytes of the folder's other files.

    Raises RecipeError if not even the fewest bits fit into `export.size_gb`, DataError without text, DeviceError
    without memory.
    """
    export = recipe.export
    least, more = (packed_layout(fusion, n, export.group_size, at_least=True) for n in bits.CHOICES[:2])
    if export.recover:
        least, more = bits.with_fine_tables(least), bits.with_fine_tables(more)
    sizes = [sum(entry.size for entry in layout.entries()) for layout in (least, more)]
    limit = sum(sizes) // 2 if export.size_gb is None else int(export.size_gb * 1e9) - others
    if limit < sizes[0]:
        raise RecipeError(
            f"export.size_gb is {export.size_gb:g}, and this model takes {(sizes[0] + others) / 1e9:.2f} "
            "GB with the fewest bits. Raise it, or leave it out."
        )
    text = calibration_rows(recipe, fusion.base.tokenizer)
    _need_memory(fusion, text)
    console.say("Measuring what rounding does to the output of each matrix ...")
    bar = console.CountBar("errors", _blocks(fusion), "block")
    try:
        errors = rounding_errors(least, text, bits.CHOICES, partial(bar.update, 1))
    finally:
        bar.close()
    return bits.mixed_layout(least, errors, limit)


def recovered_layout(recipe: Recipe, layout: Layout, kept: Path) -> tuple[Layout, card.Recovered]:
    """`layout` with codes that keep the tuning, computed with a progress bar; `kept` holds finished blocks.

    Raises DataError without text, DeviceError without memory, StorageError.
    """
    fusion = layout.fusion
    text = calibration_rows(recipe, fusion.base.tokenizer)
    recovery = Recovery(layout, text, kept)
    _need_memory(fusion, text)
    console.say(
        f"Rounding block by block over {recovery.tokens} tokens of the training data; finished blocks are kept, "
        "so the same command goes on after an interruption ..."
    )
    bar = console.CountBar("recover", _blocks(fusion), "block")
    mx.reset_peak_memory()
    start = time.monotonic()
    try:
        chosen = recovery.run(adapter_digest(fusion.adapter.folder), partial(bar.update, 1))
    finally:
        bar.close()
    seconds = time.monotonic() - start
    return chosen, card.Recovered(recovery.tokens, seconds, mx.get_peak_memory() / 1e9)


def recovery_fits(recipe: Recipe, fusion: Fusion) -> bool:
    """Whether there is text and memory for `recovered_layout`."""
    try:
        _need_memory(fusion, calibration_rows(recipe, fusion.base.tokenizer))
    except (DataError, DownloadError, DeviceError):
        return False
    return True


def _blocks(fusion: Fusion) -> int:
    return int(fusion.source.config["num_hidden_layers"])


def _need_memory(fusion: Fusion, text: Sequence[PackedBatch]) -> None:
    """Raise DeviceError if a pass over `text`, block by block, does not fit into free memory."""
    mx.clear_cache()
    file = fusion.source.path
    held = file.stat().st_size if file.is_file() else 0  # a GGUF file is read whole
    needed = held + needed_bytes(fusion.source.outline.shapes, [row.tokens.size for row in text])
    free = device.free_bytes()
    if needed > free:
        raise DeviceError(
            f"export.recover and mixed bits need {needed / 1e9:.1f} GB of memory for this model, and "
            f"{free / 1e9:.1f} GB are free. Close other programs, or write the model with export.bits=8 and "
            "without export.recover."
        )
