"""A stage of a run that answers prompts: which model that is, and its answers, drawn in a process of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os.path import expanduser
from pathlib import Path

from mlx_zh.corpus.samples import Sampled, read_samples
from mlx_zh.errors import AdapterError, RecipeError
from mlx_zh.pipeline.process import run_stage
from mlx_zh.recipe import Recipe
from mlx_zh.stages.command import find_recipe
from mlx_zh.stages.current_models import adapter_digest
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system.digests import file_digest, value_digest
from mlx_zh.system.locks import Lock


@dataclass(frozen=True)
class Side:
    """A stage (base, sft or dpo) of a run; `words` are the run on the command line, and its overrides."""

    words: tuple[str, ...]
    recipe: Recipe
    stage: str

    @staticmethod
    def of(target: str, stage: str | None = None, overrides: Sequence[str] = ()) -> Side:
        """A stage of a run, or its newest one. Raises RecipeError, and AdapterError if it has no adapter."""
        recipe = find_recipe(target, overrides)
        run = RunFolder.of(recipe)
        if stage is None:
            stage = run.newest_stage() or "base"
        if stage not in ("base", *TUNED):
            raise RecipeError(f"there is no stage {stage!r}; choose from base, {', '.join(TUNED)}.")
        if stage in TUNED and not run.stage(stage).has_adapter:
            raise AdapterError(
                f"{run.stage(stage).adapter} holds no adapter yet; run `mlx-zh {stage} {target}` first."
            )
        return Side((target, *overrides), recipe, stage)

    @property
    def run(self) -> RunFolder:
        """The folder of the run."""
        return RunFolder.of(self.recipe)

    @property
    def name(self) -> str:
        """The run and the stage, in words."""
        return f"{self.recipe.name} {self.stage}"

    @property
    def adapter(self) -> Path | None:
        """The folder of its adapter; None for the base."""
        return None if self.stage == "base" else self.run.stage(self.stage).adapter

    @property
    def digest(self) -> str | None:
        """A digest of its adapter; None for the base."""
        return None if self.adapter is None else adapter_digest(self.adapter)

    def draw(self, asked: Asked, lock: Lock) -> int:
        """Let the stage answer prompts; what is there already is not drawn again. Returns the status of `sample`."""
        words = [*self.words, "--stage", self.stage, "--prompts", asked.prompts, "--n", str(asked.count)]
        return run_stage("sample", [*words, "--label", self._label(asked), *asked.options], lock)

    def drawn(self, asked: Asked) -> list[Sampled]:
        """The answers that were drawn. Raises DataError."""
        return read_samples(self.run.samples_called(self._label(asked)).answers)

    def _label(self, asked: Asked) -> str:
        """A name for the folder of the answers. Whatever may change an answer is in its digest."""
        recipe = self.recipe
        data = recipe.data.model_dump(mode="json")
        files = [
            asked.prompts,
            *(source.path for source in recipe.data.sft.train + recipe.data.dpo.train if source.path),
        ]
        digests = [file_digest(file) for name in files if (file := Path(expanduser(name))).is_file()]
        values = [recipe.model.model_dump(mode="json"), data, recipe.seed, self.digest, asdict(asked), digests]
        return f"{asked.purpose}-{self.stage}-{value_digest(values)[:12]}"


@dataclass(frozen=True)
class Asked:
    """What a stage is asked: a file or a set of prompts, how many answers to each, and more options of `sample`."""

    purpose: str  # for the folder's name
    prompts: str
    count: int
    options: tuple[str, ...]
