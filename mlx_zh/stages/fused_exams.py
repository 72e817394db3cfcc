"""The exams of a fused model against those of base + adapter, in its summary and its model card."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from mlx_zh.exams.statistics import Comparison
from mlx_zh.models.export.card import with_exams
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system.json_text import read_object
from mlx_zh.system.storage import write_json, write_text


def fused_stage(run: RunFolder) -> str | None:
    """The stage whose adapter the fused model was made of; None if it is not the run's own, or not known."""
    about = (read_object(run.fused_summary) or {}).get(run.fused_model().name)
    stage = about.get("stage") if isinstance(about, dict) else None
    return stage if stage in TUNED else None


def record(run: RunFolder, exam: str, comparison: Comparison) -> None:
    """Store the difference between the fused model and `fused_stage`, in points. Raises StorageError."""
    folder, summary = run.fused_model(), read_object(run.fused_summary) or {}
    about = summary[folder.name]
    stored = about.get("exams")
    exams = dict(stored) if isinstance(stored, dict) else {}
    exams[exam] = {**comparison.as_dict(), "against": about["stage"]}
    about["exams"] = exams
    write_json(run.fused_summary, summary)
    card = folder / "README.md"
    try:
        text = card.read_text("utf-8")
    except (OSError, UnicodeDecodeError):  # removed, or the user's own
        return
    write_text(card, with_exams(text, _rows(exams)))


def _rows(exams: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for exam, result in sorted(exams.items()):
        with suppress(KeyError, TypeError, ValueError):  # changed by hand
            low, high = (100 * value for value in result["interval"])
            figures = f"{100 * result['difference']:+.2f} points ({low:+.1f} to {high:+.1f})"
            answers = f"{result['won']} questions won, {result['lost']} lost"
            rows.append((exam, str(result["against"]), f"{figures}; {answers}"))
    return rows
