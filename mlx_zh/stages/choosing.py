"""Choosing among the samples of a run: who chooses, what is kept of it, and the data file that comes of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.corpus.samples import read_samples
from mlx_zh.errors import DataError
from mlx_zh.judging.preferences import Chosen, To, choose
from mlx_zh.stages.answer_verdicts import Verdicts
from mlx_zh.stages.run_folder import RunFolder, SamplesFolder
from mlx_zh.system import console
from mlx_zh.system.storage import write_exact_text, write_json


@dataclass
class Choosing:
    """The samples of one label, and the verdicts on them so far."""

    folder: SamplesFolder
    decided: Verdicts

    @staticmethod
    def of(run: RunFolder, label: str | None, words: str) -> Choosing:
        """The samples of a label, or the newest ones. Raises DataError if there are none."""
        folder = run.samples_called(label) if label else _newest(run, words)
        if not folder.answers.is_file():
            labels = ", ".join(sorted(path.parent.name for path in _labels(run))) or "none"
            raise DataError(
                f"{folder.answers} does not exist. The samples of this run are: {labels}. "
                f"`mlx-zh sample {words}` draws them."
            )
        samples = sorted(read_samples(folder.answers), key=lambda sampled: sampled.id)
        if not samples:
            raise DataError(f"{folder.answers} holds no sampled answers. `mlx-zh sample {words}` draws them.")
        return Choosing(folder, Verdicts(folder.chosen, samples))

    def finish(self, to: To, out: Path | None) -> int:
        """Write the data file and say what it holds; returns the exit status, 1 if it would be empty."""
        samples, decided = self.decided.samples, self.decided.verdicts
        chosen = choose(samples, decided, to)
        path = out or self.folder.data(to)
        counts = {"prompts": len(samples), "used": chosen.prompts, "rows": len(chosen.rows), "file": str(path)}
        undecided = len(samples) - chosen.prompts - chosen.left_out.total()
        counts |= {"left_out": dict(chosen.left_out), "undecided": undecided}
        write_json(self.folder.choice, {"version": 1, "to": to, **self.decided.about, **counts})
        console.say(console.table(_counted(len(samples), chosen, undecided)))
        if not chosen.rows:
            console.say("No prompt has a better and a worse answer, so no data file was written.")
            return 1
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen.rows)
        write_exact_text(path, "".join(lines))  # as the model wrote it: what is learned must not have changed
        console.say(f"{path} holds {len(chosen.rows)} rows. Name it in a recipe:\n")
        console.say(_recipe_lines(path, to))
        return 0


def _newest(run: RunFolder, words: str) -> SamplesFolder:
    paths = sorted(_labels(run), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise DataError(f"{run.sampled} holds no samples. `mlx-zh sample {words}` draws them.")
    return SamplesFolder(paths[-1].parent)


def _labels(run: RunFolder) -> list[Path]:
    return list(run.sampled.glob("*/answers.jsonl"))


def _counted(prompts: int, chosen: Chosen, undecided: int) -> list[tuple[str, str]]:
    rows = [("prompts", str(prompts)), ("used", str(chosen.prompts))]
    rows += [(reason, str(count)) for reason, count in chosen.left_out.most_common()]
    return rows + ([("not decided yet", str(undecided))] if undecided else [])


def _recipe_lines(path: Path, to: To) -> str:
    """The lines that name a data file in a recipe."""
    section = "sft" if to == "best" else "dpo"
    lines = ["data:", f"  {section}:", f"    train: [{json.dumps(os.path.abspath(path), ensure_ascii=False)}]"]
    return "\n".join([*lines, *(["dpo:", "  loss: kto"] if to == "kto" else [])])
