"""What the benchmarks share: models that need no download, taking turns, medians and ratios, figures with versions.

Import it first: it loads the fast BLAS before anything imports mlx.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama

from mlx_zh.core.frozen_products import install
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.rendered import Rendered
from mlx_zh.models.load import BUILT_IN, LoadedModel, load_model, load_tokenizer, resolve_model

RANK, SCALE, RATE = 16, 2.0, 1e-4  # LoRA of both sides, on every linear layer
ROOT = Path(__file__).resolve().parent.parent

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
LLAMA31_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "quantization": {"bits": 4, "group_size": 64},
}
# Random weights cost the same time and memory as real ones.
RANDOM = {
    "random-128k": SMOLLM2 | {"vocab_size": 128_256},
    "random-llama31-8b-4bit": LLAMA31_8B,
}

Item = TypeVar("Item")
Figures = dict[str, dict[str, float]]  # side -> seconds, processor seconds, gigabytes


def parser(doc: str, *, repeats: int = 5) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if mx.is_available(mx.gpu) else "cpu")
    made.add_argument("--model", choices=(BUILT_IN, *RANDOM), help=f"{BUILT_IN}, on a GPU random-llama31-8b-4bit")
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--json", type=Path, help="write the figures here too")
    return made


def choose_device(arguments: argparse.Namespace) -> None:
    """Compute where `--device` says."""
    if arguments.device == "gpu" and not mx.is_available(mx.gpu):
        sys.exit("MLX finds no GPU here: on Linux it needs `pip install 'mlx[cuda13]'`; or take --device cpu.")
    mx.set_default_device(mx.Device(mx.gpu if arguments.device == "gpu" else mx.cpu))


def load(arguments: argparse.Namespace) -> LoadedModel:
    """The model on the device asked for."""
    choose_device(arguments)
    name = arguments.model or (BUILT_IN if arguments.device == "cpu" else "random-llama31-8b-4bit")
    arguments.model = name
    return load_model(name) if name == BUILT_IN else random_model(RANDOM[name])


def random_model(config: Mapping[str, Any]) -> LoadedModel:
    """A model of random weights with the tokenizer of the built-in one: 4-bit and bfloat16, or float32."""
    place = resolve_model(BUILT_IN)
    tokenizer = load_tokenizer(place)
    model = empty_model(config)
    if quantization := config.get("quantization"):
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, **quantization)
    for layer in model.layers:  # one by one: the whole in full precision would not fit
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    model.freeze()
    model.eval()
    return LoadedModel(model, tokenizer, dict(config), place, "random", "random", (tokenizer.eos_token_id,))


def empty_model(config: Mapping[str, Any]) -> Any:
    """An mlx-lm model whose random weights exist when they are first used."""
    return llama.Model(llama.ModelArgs.from_dict(dict(config)))


def copy_of(loaded: LoadedModel) -> Any:
    """The same weights (shared) in a model of its own."""
    model = empty_model(loaded.config)
    modules = dict(loaded.model.named_modules())

    def form(name: str, _: nn.Module) -> dict[str, Any] | bool:
        found: Any = modules[name]
        packed = isinstance(found, nn.QuantizedLinear | nn.QuantizedEmbedding)
        return {"group_size": found.group_size, "bits": found.bits, "mode": found.mode} if packed else False

    nn.quantize(model, class_predicate=form)
    install(model)
    model.update(loaded.model.parameters())
    model.freeze()
    mx.eval(model.parameters())
    return model


def conversations(loaded: LoadedModel, path: Path, max_length: int) -> list[Rendered]:
    """Samples as both sides get them."""
    found, _ = load_conversations(path, on_invalid="skip")
    rendered = Renderer(loaded.tokenizer).conversations(found, max_length=max_length, on_overflow="drop")
    return [example for example in rendered if example is not None]


def batches(count: int, size: int, repeats: int) -> list[list[int]]:
    """The same `repeats` batches for every side, drawn from `count` samples without repetition."""
    order = np.random.default_rng(0).permutation(count).tolist()
    if repeats * size > count:
        sys.exit(f"{repeats} batches of {size} need {repeats * size} samples, and there are {count}")
    return [order[i * size : (i + 1) * size] for i in range(repeats)]


# ---- measuring


@dataclass(frozen=True)
class Reading:
    """One call: elapsed and processor seconds, and peak memory over what was there before."""

    seconds: float
    processor: float
    gb: float


def read(call: Callable[[], object], *, keep_cache: bool = False) -> Reading:
    """Call once; unless `keep_cache`, with MLX's cache of buffers empty, as it is between rows of other shapes."""
    gc.collect()
    if not keep_cache:
        mx.clear_cache()
    mx.reset_peak_memory()
    active, used, start = mx.get_active_memory(), processor_seconds(), time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return Reading(seconds, processor_seconds() - used, (mx.get_peak_memory() - active) / 1e9)


def processor_seconds() -> float:
    """Seconds of processor time that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def take_turns(
    sides: Mapping[str, Callable[[Item], object]], items: Iterable[Item], *, keep_cache: bool = False
) -> dict[str, list[Reading]]:
    """Every item by every side in turn, so that what else the machine does falls on all alike.

    Each side has seen the item once before the clock starts: who compiles for a new shape has done so.
    """
    readings: dict[str, list[Reading]] = {name: [] for name in sides}
    for number, item in enumerate(items):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            sides[name](item)
        for name in names:
            readings[name].append(read(partial(sides[name], item), keep_cache=keep_cache))
    return readings


def medians(readings: Mapping[str, Sequence[Reading]], against: str) -> Figures:
    """Medians of each side; `speed` and `memory` are medians of the ratios, item by item, to side `against`:
    how many times as fast, and the share of its memory."""
    peers = readings[against]
    found: Figures = {}
    for name, own in readings.items():
        found[name] = {
            "seconds": median(r.seconds for r in own),
            "processor_seconds": median(r.processor for r in own),
            "gb": median(r.gb for r in own),
            "speed": median(p.seconds / r.seconds for r, p in zip(own, peers, strict=True)),
            "speed_in_processor_time": median(p.processor / r.processor for r, p in zip(own, peers, strict=True)),
            "memory": median(r.gb / p.gb for r, p in zip(own, peers, strict=True)),
        }
    return found


# ---- telling


def show(title: str, figures: Figures, against: str) -> None:
    """A table of sides."""
    print(f"\n{title}")
    print(f"  {'':28}{'seconds':>9}{'CPU s':>9}{'GB':>8}   {'against ' + against}")
    for name, side in figures.items():
        line = f"  {name:28}{side['seconds']:9.2f}{side['processor_seconds']:9.2f}{side['gb']:8.3f}"
        if name != against:
            line += f"   {side['speed']:.2f}x as fast ({side['speed_in_processor_time']:.2f}x in CPU time), "
            line += f"{side['memory']:.2f}x the memory"
        print(line, flush=True)


def about(arguments: argparse.Namespace, peers: Sequence[str] = ()) -> dict[str, Any]:
    """Versions, machine and options: what figures mean nothing without."""
    return {
        "versions": {name: version(name) for name in ("mlx-zh", "mlx", "mlx-lm", *peers)},
        "machine": {
            "system": platform.platform(),
            "processor": mx.device_info().get("device_name") or platform.processor(),
            "device": str(mx.default_device()),
            "python": platform.python_version(),
        },
        "options": {name: str(value) for name, value in vars(arguments).items() if name != "json"},
    }


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def write(path: Path | None, about: dict[str, Any], figures: Any) -> None:
    """Figures as JSON where `path` is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": about, "figures": figures}, indent=2) + "\n", encoding="utf-8")
