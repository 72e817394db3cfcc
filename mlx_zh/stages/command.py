"""What every stage begins with: its command line, its recipe, its model, its run folder."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.recipe import Recipe, load_recipe
from mlx_zh.system import blas, console, device
from mlx_zh.system.locks import Lock, locked
from mlx_zh.system.redaction import hide_all, redact
from mlx_zh.system.storage import write_json, write_text

if TYPE_CHECKING:
    from mlx_zh.distributed.world import World
    from mlx_zh.models.load import LoadedModel


def parser(stage: str, purpose: str) -> argparse.ArgumentParser:
    """A stage's command line: RECIPE, `section.key=value` overrides, and what every stage understands."""
    found = argparse.ArgumentParser(prog=f"mlx-zh {stage}", description=purpose, allow_abbrev=False)
    found.add_argument("recipe", metavar="RECIPE", help="a recipe, for example recipes/quickstart.yaml")
    found.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example sft.learning_rate=2e-4")
    found.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    found.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return found


def read_recipe(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe of a command line, or None when it was only to be printed."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.print:
        print(recipe.to_yaml(), end="")
        return None
    return recipe


@contextmanager
def at_work(recipe: Recipe, what: str) -> Iterator[Lock]:
    """Alone in the run folder, on a machine that is kept awake. Raises StorageError where another run is at work."""
    with locked(recipe.run_folder(), what) as lock, device.awake():
        if lock.left_by:
            console.say(f"The last run here did not end by itself ({lock.left_by}); going on from what it kept.")
        if not lock.works:
            console.warn(f"the file system of {recipe.run_folder()} has no locks: see that only one run works there.")
        yield lock


@contextmanager
def all_at_work(recipe: Recipe, what: str, world: World) -> Iterator[None]:
    """The same for all ranks: rank 0 has the run folder."""
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(at_work(recipe, what))

        world.told(begin)
        if not world.first:
            stack.enter_context(device.awake())
        yield


def open_model(recipe: Recipe, world: World | None = None) -> LoadedModel:
    """The recipe's base model, checked against its own forward; with `distributed.shares: measured`, timed too."""
    from mlx_zh.core.logprobs import check_supported
    from mlx_zh.models.load import load_model

    device.bound_cache()
    if warning := blas.blas_warning():
        console.warn(warning)
    source = recipe.model
    loaded = load_model(
        source.path,
        hub=source.hub,
        revision=source.revision,
        dtype=source.dtype,
        quantize=source.quantization,
    )
    check_supported(loaded.model, loaded.config)
    if world and world.size > 1 and world.told(lambda: recipe.distributed.shares) == "measured":
        _measure(loaded, recipe.memory.micro_tokens, world)
    return loaded


def _measure(loaded: LoadedModel, tokens: int, world: World) -> None:
    """Deal out work by how fast each rank computes a row of text."""
    import mlx.core as mx

    from mlx_zh.core.logprobs import hidden_states
    from mlx_zh.core.packing import pack_conversations

    length = world.least(min(tokens, _MEASURED_TOKENS))
    row = pack_conversations([(range(1, length + 1), [False] * length)])

    def forward() -> float:
        mx.eval(hidden_states(loaded.model, row))
        return length

    world.measure(forward)
    shares = ", ".join(f"{speed / sum(world.speeds):.0%}" for speed in world.speeds)
    console.say(f"Measured for 10 s: the ranks get {shares} of the work.")


_MEASURED_TOKENS = 256


def write_run_files(recipe: Recipe, loaded: LoadedModel, data: dict[str, Any]) -> None:
    """`recipe.yaml` as resolved, and `manifest.json` with what a number needs to be reproduced."""
    from mlx_zh.system.hub import commit_of

    folder = recipe.run_folder()
    write_text(folder / "recipe.yaml", redact(recipe.to_yaml()))
    path = folder / "manifest.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    packages = ("mlx-zh", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "datasets")
    known |= {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "device": _device()},
        "git_commit": _git_commit(),
        "command": sys.argv,
        "model": {"source": loaded.source, "fingerprint": loaded.fingerprint, "revision": commit_of(loaded.path)},
        "data": known.get("data", {}) | data,
    }
    write_json(path, hide_all(known, redact))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> str:
    import mlx.core as mx

    return str(mx.default_device())


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def add_fresh(parser: argparse.ArgumentParser) -> None:
    """`--fresh`, which training stages understand."""
    parser.add_argument("--fresh", action="store_true", help="start over; an earlier run is kept beside the new one")


def add_force(parser: argparse.ArgumentParser) -> None:
    """`--force`, which training stages understand."""
    parser.add_argument("--force", action="store_true", help="start even if memory will not be enough")
