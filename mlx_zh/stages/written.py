"""What `fuse` wrote for each format, and what was measured of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_zh.language.notice import Notice
from mlx_zh.models.export import card, fidelity
from mlx_zh.models.export.fidelity import Distance
from mlx_zh.models.export.merge import Survival, SurvivalSummary


@dataclass(frozen=True)
class Result:
    """What was written for a format."""

    detail: str  # for example "4-bit" or "Q8_0"
    bits: int | None
    survivals: list[Survival]  # what is left of the adapter's change to each matrix
    model: Path | None  # the folder or file that can be loaded; None for an adapter
    warnings: tuple[Notice, ...] = ()  # on what could not be written
    file: str = ""  # the name of a file to be loaded; "" if the folder is
    recovered: card.Recovered | None = None  # how the tuning was kept


@dataclass(frozen=True)
class Assessment:
    """What was measured of a written format. The names of the fields are keys of summary.json."""

    size: int  # bytes
    left: SurvivalSummary | None  # how much of the adapter's change is left after quantization
    fidelity: fidelity.Fidelity | None
    unmeasured: Notice | None  # why `fidelity` is None
    warnings: list[Notice]
    llama_cpp: Distance | None = None  # of a GGUF file, as llama.cpp computes it


@dataclass(frozen=True)
class Written:
    """A format that is on disk."""

    kind: str
    folder: Path
    result: Result
    assessment: Assessment

    @property
    def format_facts(self) -> card.FormatFacts:
        """The same facts as the model card needs them."""
        measured = self.assessment
        return card.FormatFacts(
            self.kind,
            self.result.detail,
            self.result.file,
            measured.left,
            measured.fidelity,
            measured.warnings,
            measured.llama_cpp,
            self.result.recovered,
        )

    def as_dict(self) -> dict[str, object]:
        """Plain values for summary.json: each notice as its English sentence and as its code."""
        recovered = self.result.recovered
        about: dict[str, object] = {
            "detail": self.result.detail,
            "bits": self.result.bits,
            "folder": str(self.folder),
        }
        about["recovered"] = None if recovered is None else asdict(recovered)
        reason = self.assessment.unmeasured
        codes = {
            "unmeasured_code": reason and reason.as_dict(),
            "warning_codes": [warning.as_dict() for warning in self.assessment.warnings],
        }
        return about | asdict(self.assessment) | codes
