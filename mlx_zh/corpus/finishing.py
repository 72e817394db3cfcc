"""The last step of a corpus: its splits, its report, and the folder's final name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_zh.corpus import choosing, left_out, statistics
from mlx_zh.corpus.examples import (
    OPENED,
    SCHEMAS,
    Shards,
    content_digest,
    positions_of,
)
from mlx_zh.corpus.prepared import MANIFEST, CorpusContent, CorpusSettings
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.scan import Scan
from mlx_zh.corpus.selection import SelectionReport
from mlx_zh.corpus.shards import counts_of
from mlx_zh.corpus.sources import DataSource
from mlx_zh.corpus.statistics import CorpusReport, ExamCheck
from mlx_zh.errors import DataError
from mlx_zh.system.digests import digests_of, value_digest
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.storage import (
    storage_errors,
    sync_folder,
    write_exact_json,
    written_whole,
)


def finish(
    sources: Sequence[DataSource],
    settings: CorpusSettings,
    scans: Sequence[Scan],
    choice: choosing.Choice,
    paths: Sequence[Path],
    renderer: Renderer,
    values: CorpusContent,
    exam_report: ExamCheck,
    selection: SelectionReport | None,
    folder: Path,
) -> None:
    """Write which rows of the files belong to each split, write the report, and give the folder its final name."""
    shards = Shards(paths)
    rendered = choice.starts[shards.numbers("source")] + shards.numbers("row")  # numbers of the rows in the files
    splits = {"train": positions_of(choice.train, rendered), "validation": positions_of(choice.validation, rendered)}
    if not len(splits["train"]):
        raise DataError(_nothing_left(sources, scans, choice, paths))
    work = paths[0].parent
    for split, positions in splits.items():
        with written_whole(work / f"{split}.npy") as file:
            np.save(file, positions)
    rendering: dict[int, Counter[str]] = {}
    for counts in counts_of(paths):
        for source, reasons in counts.items():
            rendering.setdefault(source, Counter()).update(reasons)
    kind = settings.render.kind
    opened: dict[str, Any] = {split: OPENED[kind](shards, positions) for split, positions in splits.items()}
    report: CorpusReport = {
        **statistics.describe(sources, scans, choice, rendering, opened["train"], opened["validation"]),
        "exam_questions": exam_report,
        "tokens_per_chinese_character": statistics.tokens_per_character(scans, choice, renderer),
    }
    if selection is not None:
        report["selection"] = selection
    names = [f"data-{i:05d}-of-{len(paths):05d}.arrow" for i in range(len(paths))]
    with storage_errors(folder):
        for path, name in zip(paths, names, strict=True):
            path.rename(work / name)
            path.with_suffix(".json").unlink()
        (work.parent / left_out.FILE).replace(work / left_out.FILE)
        digests = digests_of(work, [*names, *(f"{split}.npy" for split in splits), left_out.FILE])
    _write_datasets_files(work, folder.name, kind, names)
    manifest = {"files": names, "digests": digests, "made_of": values, "report": report}
    manifest = parse_json(json.dumps(manifest | {"content": content_digest(opened)}))  # as it will be read
    write_exact_json(work / MANIFEST, manifest | {"check": value_digest(manifest)})
    with storage_errors(folder):
        work.replace(folder)
        sync_folder(folder.parent)


def _nothing_left(
    sources: Sequence[DataSource], scans: Sequence[Scan], choice: choosing.Choice, paths: Sequence[Path]
) -> str:
    reasons: Counter[str] = Counter()
    for scan_, dropped in zip(scans, choice.dropped, strict=True):
        reasons.update(scan_.report.dropped)
        reasons.update(dropped)
    for counts in counts_of(paths):
        for counted in counts.values():
            reasons.update(counted)
    counted_reasons = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    names = ", ".join(source.name for source in sources if not source.validation)
    return (
        f"nothing is left to learn from in {names} ({counted_reasons or 'no row was read'}). Change the setting that "
        "drops the rows, or add data."
    )


def _write_datasets_files(folder: Path, key: str, kind: str, names: Sequence[str]) -> None:
    """Write the two JSON files that `datasets.load_from_disk` reads."""
    features: dict[str, Any] = {}
    for field in SCHEMAS[kind]:
        value = {"dtype": "int32", "_type": "Value"}
        whole = {"dtype": str(field.type), "_type": "Value"}
        features[field.name] = {"feature": value, "_type": "List"} if "list" in str(field.type) else whole
    write_exact_json(folder / "dataset_info.json", {"features": features})
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": key[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_exact_json(folder / "state.json", state)
