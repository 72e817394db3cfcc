"""What training starts from: a new adapter on the base model, the run's SFT adapter, or another adapter."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_zh.distributed.world import ALONE, World
from mlx_zh.errors import AdapterError, RecipeError
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.files import adapter_about, load_adapter, read_adapter
from mlx_zh.models.adapters.layers import adapted_layers, add_adapter, saved_modules
from mlx_zh.models.adapters.peft import is_peft
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE, PEFT_FILE, AdapterSpec
from mlx_zh.models.identity import is_model
from mlx_zh.models.load import LoadedModel
from mlx_zh.recipe import Lora, Recipe
from mlx_zh.stages.run_folder import RunFolder, StageFolder
from mlx_zh.system import console
from mlx_zh.system.digests import file_digest


@dataclass(frozen=True)
class Start:
    """Where training starts.

    `folder` is an adapter folder to train further, or None for a new adapter on the base model. `name` is the path of
    that folder on rank 0; on other ranks `folder` is a copy of it.
    """

    recipe: Recipe
    folder: Path | None
    name: str = ""

    @property
    def described(self) -> str:
        """The start in words, for the user."""
        return "the base model" if self.folder is None else f"the adapter in {self.name}"

    @property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the adapter's files, by name; empty for a new adapter."""
        if self.folder is None:
            return {}
        return {name: file_digest(self.folder / name) for name in adapter_files(self.folder)}

    def spec(self, loaded: LoadedModel) -> AdapterSpec:
        """The shape of what is trained: by the recipe's `lora` section, or that of the adapter to train further.

        Raises AdapterError for an adapter that is damaged or was trained on another base model.
        """
        layers = len(loaded.model.layers)
        wanted = adapter_spec(self.recipe.lora, layers)
        wanted = replace(wanted, saved=saved_modules(loaded.model, wanted.saved))
        if self.folder is None:
            adapted_layers(loaded.model, wanted)  # raises before anything is written
            return wanted
        spec, _ = read_adapter(self.folder)
        spec = replace(spec, num_layers=min(spec.num_layers, layers), saved=saved_modules(loaded.model, spec.saved))
        about = adapter_about(self.folder)
        if not is_model(about.get("base_fingerprint", loaded.fingerprint), loaded.path, loaded.fingerprint):
            raise AdapterError(
                f"{self.name} was trained on {about.get('base', 'another model')}, whose files are not those of "
                f"{loaded.source}. Set model.path to the model it was trained on, or run the SFT stage again."
            )
        differences = [
            Notice("adapter-differs", setting=shown, value=_shown(spec, name), wanted=_shown(wanted, name))
            for name, shown in _COMPARED.items()
            if getattr(spec, name) != getattr(wanted, name)
        ]
        if differences:
            console.warn(Notice("adapter-keeps-shape", folder=self.name, differences=differences))
        return spec

    def attach(self, loaded: LoadedModel, spec: AdapterSpec) -> None:
        """Add the adapter to the base model: a new one of shape `spec`, or the one to train further."""
        if self.folder is None:
            add_adapter(loaded.model, spec, seed=self.recipe.seed)
        else:
            load_adapter(loaded.model, self.folder)


# fields of an AdapterSpec that a continued adapter keeps, by the names that the user knows
_COMPARED = {name: name for name in ("kind", "rank", "scale", "num_layers")} | {"saved": "modules_to_save"}


def _shown(spec: AdapterSpec, name: str) -> str | int | float:
    value: str | int | float | tuple[str, ...] = getattr(spec, name)
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else value


def adapter_spec(lora: Lora, layers: int) -> AdapterSpec:
    """The adapter's shape by the recipe's `lora` section, for a model of `layers` blocks. Raises RecipeError."""
    if lora.num_layers != "all" and lora.num_layers > layers:
        raise RecipeError(
            f"lora.num_layers is {lora.num_layers}, but the model has {layers} layers; write a smaller number, or "
            "all."
        )
    return AdapterSpec(
        kind=lora.type,
        num_layers=layers if lora.num_layers == "all" else lora.num_layers,
        rank=lora.rank,
        scale=AdapterSpec.scale_of(lora.alpha, lora.rank, rslora=lora.rslora),
        dropout=lora.dropout,
        targets=None if lora.targets == "all" else lora.targets,
        saved=lora.modules_to_save,
    )


def choose_start(recipe: Recipe, stage: str, world: World = ALONE) -> Start:
    """The recipe's `sft.start` or `dpo.start`, the same on every rank.

    Raises AdapterError if the adapter does not exist, RecipeError if this stage would overwrite it.
    """
    name, files = world.broadcast_result(lambda: _adapter_folder(recipe, stage))
    if name is None:
        return Start(recipe, None)
    return Start(recipe, world.folder(Path(name), files), name)


def adapter_files(folder: Path) -> tuple[str, ...]:
    """The names of an adapter's files: weights in mlx-lm's format or PEFT's, and settings."""
    return (PEFT_FILE if is_peft(folder) else ADAPTER_FILE, CONFIG_FILE)


def _adapter_folder(recipe: Recipe, stage: str) -> tuple[str | None, tuple[str, ...]]:
    """The folder of the adapter to start from and the names of its files; None for a new adapter."""
    start, key, run = recipe.start(stage), f"{stage}.start", RunFolder.of(recipe)
    if start == "base":
        return None, ()
    own = stage == "dpo" and start == "sft"
    folder = run.stage("sft").adapter if own else Path(start)
    if run.stage(stage).path.resolve() in folder.resolve().parents:
        raise RecipeError(
            f"{key} is {start}, the adapter that this run made itself. Give the new run another name, for example "
            f"name={RunFolder.of(recipe).unused_name()}, and its results go beside it."
        )
    files = adapter_files(folder)
    if all((folder / name).is_file() for name in files):
        return str(folder), files
    inner = [
        path for path in (StageFolder(folder).adapter, run.at(folder).newest_adapter()) if path and path.is_dir()
    ]
    if own and recipe.data.sft.train:
        hint = f"run `mlx-zh sft {recipe.words}` first, or set dpo.start=base"
    elif own:
        hint = "the recipe has no SFT data, so set dpo.start=base"
    elif inner:
        setting = shlex.quote(f"{key}={inner[0]}")
        hint = f"it is in {inner[0]}, so set {setting}"
    else:
        hint = f"set it to the folder that holds {ADAPTER_FILE} or {PEFT_FILE}, or to base"
    raise AdapterError(f"{key} is {start}, but there is no adapter in {folder}: {hint}.")
