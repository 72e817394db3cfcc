"""What a run has exported, what it can export, and the command for it; without MLX, for pages that only show it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_zh.errors import MlxZhError
from mlx_zh.language.notice import notices_of
from mlx_zh.recipe import ADAPTER_FORMATS, Recipe
from mlx_zh.stages.current_models import adapter_digest
from mlx_zh.stages.placing import PROGRAMS, Place
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system.json_text import parse_json, read_object

FORMATS = ("mlx", "gguf", "hf", "mlx-adapter", "peft", "gguf-lora")
_SMALL_FILES = 40_000_000  # bytes of an adapter's tokenizer and texts, an upper estimate as in `fuser`
_CARD = 65536  # bytes of a model card that are read for its title


@dataclass(frozen=True, slots=True)
class ExamDelta:
    """The difference between the fused model and base + adapter in an exam, fractions of 1."""

    exam: str
    against: str
    difference: float
    low: float
    high: float
    won: int
    lost: int


@dataclass(frozen=True)
class Exported:
    """A format that `fuse` wrote."""

    kind: str
    detail: str
    size: float | None  # bytes
    kl: float | None  # nats per token, from base + adapter
    top1: float | None
    perplexity: float | None
    kept: float | None  # share of the adapter's change that is left
    in_llama_cpp: tuple[float, float] | None  # KL and top-1 as llama.cpp computes them
    exams: tuple[ExamDelta, ...]
    warnings: tuple[str, ...]  # notices where the summary has their codes
    unmeasured: str | None  # why there is no fidelity
    is_here: bool  # whether its folder is in the run
    is_current: bool  # whether it was made of the adapter as it is now


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be exported."""

    formats: tuple[str, ...]
    gguf_type: str = ""  # empty: as the recipe says, or as `fuse` chooses
    recover: bool = False
    name: str = ""  # empty: the recipe's
    to: str = ""  # a program to place it in, or empty
    replace: bool = False

    def words(self) -> list[str]:
        """The words of `mlx-zh fuse` after the run."""
        words = [f"export.formats=[{','.join(self.formats)}]"]
        if self.gguf_type and "gguf" in self.formats:
            words.append(f"export.gguf_type={self.gguf_type}")
        if self.recover:
            words.append("export.recover=true")
        if self.name:
            words.append(f"export.name={self.name}")
        words += ["--to", self.to] if self.to else []
        return [*words, "--replace"] if self.to and self.replace else words


@dataclass(frozen=True, slots=True)
class Room:
    """Disk space in bytes. `needed` is None if it cannot be told, and then `reason` says why."""

    needed: float | None
    free: int
    reason: str = ""

    @property
    def is_enough(self) -> bool:
        """Whether the export fits; true as well where nobody knows, because `fuse` checks again."""
        return self.needed is None or self.needed <= self.free


def exported(run: RunFolder) -> list[Exported]:
    """The formats that the run's summary names, in the order of `FORMATS`."""
    summary = read_object(run.fused_summary) or {}
    present = [_exported(run, kind, summary[kind]) for kind in FORMATS if isinstance(summary.get(kind), dict)]
    return present


def is_damaged(run: RunFolder) -> bool:
    """Whether there is a summary that cannot be read."""
    return run.fused_summary.exists() and read_object(run.fused_summary) is None


def _exported(run: RunFolder, kind: str, facts: Mapping[str, Any]) -> Exported:
    fidelity, llama, left = (_mapping(facts.get(key)) for key in ("fidelity", "llama_cpp", "left"))
    in_llama = (_number(llama.get("kl")), _number(llama.get("top1")))
    unmeasured = _notices([facts.get("unmeasured")], [facts.get("unmeasured_code")])
    return Exported(
        kind=kind,
        detail=str(facts.get("detail") or ""),
        size=_number(facts.get("size")),
        kl=_number(fidelity.get("kl")),
        top1=_number(fidelity.get("top1")),
        perplexity=_number(fidelity.get("fused_perplexity")),
        kept=_number(left.get("kept_mean")),
        in_llama_cpp=None if in_llama[0] is None or in_llama[1] is None else (in_llama[0], in_llama[1]),
        exams=tuple(_deltas(_mapping(facts.get("exams")))),
        warnings=_notices(facts.get("warnings"), facts.get("warning_codes")),
        unmeasured=unmeasured[0] if unmeasured else None,
        is_here=(run.fused / kind).is_dir(),
        is_current=_is_current(run, facts),
    )


def _deltas(exams: Mapping[str, Any]) -> list[ExamDelta]:
    deltas = []
    for exam, facts in sorted(exams.items()):
        values = _mapping(facts)
        ends = values.get("interval")
        low, high = (_number(end) for end in ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
        difference, won, lost = (_number(values.get(key)) for key in ("difference", "won", "lost"))
        if low is None or high is None or difference is None or won is None or lost is None:
            continue  # changed by hand
        against = str(values.get("against") or "")
        deltas.append(ExamDelta(exam, against, difference, low, high, int(won), int(lost)))
    return deltas


def _is_current(run: RunFolder, facts: Mapping[str, Any]) -> bool:
    """Whether the adapter is the one that was merged; true where the summary does not say."""
    stage, digest = facts.get("stage"), facts.get("adapter")
    if stage not in TUNED or not isinstance(digest, str):
        return True
    newest = run.newest_stage()
    if newest != stage:
        return newest is None
    try:
        return adapter_digest(run.stage(stage).adapter) == digest
    except MlxZhError:  # the adapter cannot be read: nothing says that it changed
        return True


def _notices(texts: Any, codes: Any) -> tuple[str, ...]:
    """Sentences of a summary, as notices where it has their codes."""
    listed = [text for text in texts if isinstance(text, str)] if isinstance(texts, list) else []
    records = codes if isinstance(codes, list) else []
    return tuple(notices_of(listed, [record for record in records if isinstance(record, dict)]))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and value == value and abs(value) != float("inf") else None


def title_of(run: RunFolder, recipe: Recipe) -> str:
    """The model's name: that of an earlier export, whose licence may ask for more than the recipe's name."""
    wanted = recipe.export.name or recipe.name
    for kind in FORMATS:
        try:
            with (run.fused / kind / "README.md").open("rb") as file:
                card = file.read(_CARD).decode("utf-8", "replace")
        except OSError:
            continue
        title = next((line[2:].strip() for line in card.splitlines() if line.startswith("# ")), "")
        if title.endswith(wanted):  # another export.name makes it another model
            return title
    return wanted


def places(run: RunFolder, recipe: Recipe) -> list[Place]:
    """Where the model can be placed."""
    return [Place(program, title_of(run, recipe), False) for program in PROGRAMS]


def room(run: RunFolder, target: str, wish: Wish, project: Path) -> Room:
    """The space that an export needs, and what is free; starts a process, which takes some seconds.

    `target` is the run as the command names it, from the folder `project`.
    """
    existing = next(path for path in (run.fused, *run.fused.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    adapter = run.newest_adapter()
    files = [] if adapter is None else [path for path in adapter.glob("*.safetensors") if path.is_file()]
    adapters = sum(kind in ADAPTER_FORMATS for kind in wish.formats)
    small = adapters * (sum(path.stat().st_size for path in files) + _SMALL_FILES)
    words = [word for word in wish.words() if not word.startswith("--") and word not in PROGRAMS]
    answer = _asked([target, *words], project)
    if "needed" not in answer:
        return Room(None, free, str(answer.get("error", "")))
    return Room(float(answer["needed"]) + small, free)


def _asked(words: Sequence[str], project: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "mlx_zh.stages.exporting", *words]
    try:
        done = subprocess.run(
            command, cwd=project, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
        answer = parse_json(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
    return answer if isinstance(answer, dict) else {}


def main(argv: list[str]) -> int:
    """`RUN KEY=VALUE …` writes the bytes that the formats need to standard output, as JSON."""
    from mlx_zh.models.load import find_config
    from mlx_zh.planning.exports import export_bytes
    from mlx_zh.stages import memory_check
    from mlx_zh.stages.command import find_recipe

    try:
        recipe = find_recipe(argv[0], argv[1:])
        config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
        step = memory_check.training_step(recipe, "sft", config, memory_check.mac(16 * 2**30))
        answer: dict[str, Any] = {"needed": export_bytes(recipe.export, step.model, step.target)}
    except MlxZhError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(lambda arguments: main(arguments or []))
