"""The models of a run, one at a time: the base, the base with each trained adapter, and the fused model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_zh.distributed.world import ALONE, World
from mlx_zh.errors import AdapterError, ModelError
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.adapters.layers import remove_adapter
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE
from mlx_zh.models.identity import is_foreign
from mlx_zh.recipe import ADAPTER_FORMATS
from mlx_zh.stages import product_choice
from mlx_zh.stages.current_models import adapter_digest
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system import blas, console, cpu_threads, device

if TYPE_CHECKING:
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe

NAMES = ("base", *TUNED, "fused")
_ADAPTER = (CONFIG_FILE, ADAPTER_FILE)


class RunModels:
    """The models of a run; `names` lists the requested one, or else the base and every adapter in the run folder.

    Raises ModelError or AdapterError if the requested model does not exist.
    """

    def __init__(self, recipe: Recipe, requested: str | None = None, world: World = ALONE) -> None:
        self._recipe, self._run, self._world = recipe, RunFolder.of(recipe), world
        self._loaded: LoadedModel | None = None
        self._state = ""  # which of the models `_loaded` is now
        self.present = world.broadcast_result(lambda: self._present(requested))
        self.names = ["base", *self.present] if requested is None else [requested]
        world.each(lambda: self._require_fused(requested))

    def _require_fused(self, requested: str | None) -> None:
        recipe = self._recipe
        if requested == "fused" and not self._run.fused_model().is_dir():
            loadable = "" if set(recipe.export.formats) - set(ADAPTER_FORMATS) else " 'export.formats=[mlx]'"
            raise ModelError(
                f"there is no fused model at {self._run.fused_model()}; run `mlx-zh fuse {recipe.words}{loadable}` "
                "first."
            )

    def _present(self, requested: str | None) -> list[str]:
        present = [name for name in TUNED if self._run.stage(name).has_adapter]
        if requested in TUNED and requested not in present:
            adapter, recipe = self._run.stage(requested).adapter, self._recipe
            if not recipe.data.split(requested).train:
                raise AdapterError(
                    f"{adapter} holds no adapter, and the recipe has no data to train it (data.{requested}.train)."
                )
            raise AdapterError(f"{adapter} holds no adapter yet; run `mlx-zh {requested} {recipe.words}` first.")
        return present

    def take(self, name: str) -> LoadedModel:
        """Load the model called `name`. The model returned by an earlier call is changed or freed."""
        if self._loaded is None or "fused" in (name, self._state):
            self._loaded = None  # free this model before the next one is loaded
            self._loaded = open_model(self._recipe if name != "fused" else fused_recipe(self._recipe), self._world)
            self._state = "fused" if name == "fused" else "base"
        if name == self._state:
            return self._loaded
        if self._state != "base":
            remove_adapter(self._loaded.model)
            self._state = "base"
        if name != "base":
            folder = self._world.folder(self._run.stage(name).adapter, _ADAPTER)
            spec = load_adapter(self._loaded.model, folder)
            if is_foreign(folder, self._loaded.path, self._loaded.fingerprint):
                adapter = str(self._run.stage(name).adapter)
                console.warn(Notice("adapter-of-another-model", adapter=adapter, model=self._recipe.model.path))
            # Full fine-tuning replaces the base's weights, so the base must be loaded again next time.
            self._state = "fused" if spec.kind == "full" else name
        self._loaded.model.freeze()
        self._loaded.model.eval()
        return self._loaded

    def adapter_digest(self, name: str) -> str | None:
        """A digest of a stage's adapter, 16 hex digits; None for a model without an adapter of its own."""
        if name not in TUNED:
            return None
        return adapter_digest(self._run.stage(name).adapter)


def fused_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the fused model of its run as base."""
    folder = RunFolder.of(recipe).fused_model()
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"path": str(folder), "quantize": None})}
    )


def open_model(recipe: Recipe, world: World = ALONE, *, trains: bool = False) -> LoadedModel:
    """Load the recipe's base model, and check that this program's forward pass gives the same as the model's own.

    If the model is to be trained (`trains`), its gradient is compared too.

    With several ranks and `distributed.shares: measured`, also measure each rank's speed. Raises ModelError,
    DownloadError; with several ranks, as `World.each`.
    """
    loaded = world.each(lambda: _open(recipe, trains))
    if world.size > 1 and world.broadcast_result(lambda: recipe.distributed.shares) == "measured":
        _measure(loaded, recipe.memory.micro_tokens, world)
    return loaded


def _open(recipe: Recipe, trains: bool) -> LoadedModel:
    from mlx_zh.core.proof import check_supported
    from mlx_zh.models.load import load_model

    device.limit_cache()
    if warning := blas.blas_warning():
        console.warn(warning)
    cpu_threads.settle()
    source = recipe.model
    loaded = load_model(
        source.path,
        hub=source.hub,
        revision=source.revision,
        dtype=source.dtype,
        quantize=source.quantization,
        progress=console.DownloadBar(),
        reading=console.say_reading,
    )
    check_supported(loaded.model, loaded.config, gradient=trains)
    product_choice.settle(recipe, loaded, tell=trains)
    return loaded


def _measure(loaded: LoadedModel, tokens: int, world: World) -> None:
    """Set each rank's share of the work by how fast it computes a row of tokens."""
    import mlx.core as mx

    from mlx_zh.core.logprobs import hidden_states
    from mlx_zh.core.packing import pack_conversations

    length = world.min(min(tokens, _MEASURED_TOKENS))
    row = pack_conversations([(range(1, length + 1), [False] * length)])

    def forward() -> float:
        mx.eval(hidden_states(loaded.model, row, grad=False))
        return length

    world.measure(forward)
    shares = ", ".join(f"{speed / sum(world.speeds):.0%}" for speed in world.speeds)
    console.say(f"Measured the speed of each rank for 10 s: the ranks get {shares} of the work.")


_MEASURED_TOKENS = 256
