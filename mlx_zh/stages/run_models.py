"""The models of a run, one at a time: the base, the base with each adapter it has learned, and the fused model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.distributed.world import ALONE, World
from mlx_zh.errors import AdapterError, ModelError
from mlx_zh.models.adapters.files import ADAPTER_FILE, CONFIG_FILE, load_adapter
from mlx_zh.models.adapters.layers import remove_adapter
from mlx_zh.stages import command
from mlx_zh.system.digests import file_digest, value_digest

if TYPE_CHECKING:
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe

TUNED = ("sft", "dpo")
NAMES = ("base", *TUNED, "fused")
_ADAPTER = (CONFIG_FILE, ADAPTER_FILE)


class Candidates:
    """`names` are those that were asked for: one, or the base and every adapter in the run folder."""

    def __init__(self, recipe: Recipe, asked: str | None = None, world: World = ALONE) -> None:
        self._recipe, self._run, self._world = recipe, recipe.run_folder(), world
        self._loaded: LoadedModel | None = None
        self._state = ""  # which candidate `_loaded` is now
        self.present = world.told(lambda: self._present(asked))
        self.names = ["base", *self.present] if asked is None else [asked]
        if asked == "fused" and not self.fused.is_dir():
            raise ModelError(f"there is no fused model at {self.fused}; run `mlx-zh fuse RECIPE` first.")

    def _present(self, asked: str | None) -> list[str]:
        present = [name for name in TUNED if (self.adapter(name) / ADAPTER_FILE).is_file()]
        if asked in TUNED and asked not in present:
            raise AdapterError(f"{self.adapter(asked)} holds no adapter yet; run `mlx-zh {asked} RECIPE` first.")
        return present

    @property
    def fused(self) -> Path:
        """The fused model in `runs/NAME/fused`: MLX's, else another one that can be loaded."""
        places = [self._run / "fused" / kind for kind in ("mlx", "hf", "gguf")]
        return next((place for place in places if place.is_dir()), places[0])

    def adapter(self, name: str) -> Path:
        """`runs/NAME/STAGE/adapters`."""
        return self._run / name / "adapters"

    def take(self, name: str) -> LoadedModel:
        """The model as `name`; one that was taken before changes with it."""
        if self._loaded is None or "fused" in (name, self._state):
            self._loaded = None  # frees it before the next is loaded
            self._loaded = command.open_model(self._recipe if name != "fused" else self._of_fused(), self._world)
            self._state = "fused" if name == "fused" else "base"
        if name == self._state:
            return self._loaded
        if self._state != "base":
            remove_adapter(self._loaded.model)
            self._state = "base"
        if name != "base":
            spec = load_adapter(self._loaded.model, self._world.folder(self.adapter(name), _ADAPTER))
            # Full fine-tuning replaces weights: what was there is gone, and the base must be loaded anew next time.
            self._state = "fused" if spec.kind == "full" else name
        self._loaded.model.freeze()
        self._loaded.model.eval()
        return self._loaded

    def adapter_digest(self, name: str) -> str | None:
        """A digest of a stage's adapter; None where the stage has none of its own."""
        if name not in TUNED:
            return None
        folder = self.adapter(name)
        return value_digest([file_digest(folder / name) for name in _ADAPTER])[:16]

    def _of_fused(self) -> Recipe:
        model = self._recipe.model.model_copy(update={"path": str(self.fused), "quantize": None})
        return self._recipe.model_copy(update={"model": model})
