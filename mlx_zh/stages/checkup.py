"""The checks of `doctor`: one result each, with a remedy if something is wrong."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx
import psutil

from mlx_zh import __version__
from mlx_zh.core.families import Config
from mlx_zh.errors import MlxZhError, first_line
from mlx_zh.language.notice import Notice
from mlx_zh.planning.memory import weight_bytes
from mlx_zh.recipe import Recipe
from mlx_zh.stages import half_precision, memory_check
from mlx_zh.stages.rendering import thinking_problem, thinking_text
from mlx_zh.system import cpu_processes, cpu_threads, device, downloads, hub_choice, huggingface, storage
from mlx_zh.system.blas import blas_warning
from mlx_zh.system.downloads import host
from mlx_zh.system.environment import pip_install
from mlx_zh.training.check_cases import Case, cases
from mlx_zh.training.self_check import check

# The versions that the tests run with; equal to those in constraints.txt.
TESTED = {"mlx": "0.32.4", "mlx-lm": "0.32.2"}


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check."""

    level: str  # ok, warn or fail
    name: str
    text: str
    remedy: str = ""


def checks(recipe: Recipe | None = None) -> Iterator[Check]:
    """All checks except `self_checks` and `measurements`; with a recipe, also whether it can run here."""
    yield Check("ok", "program", f"mlx-zh {__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from versions()
    yield back_end()
    yield processor()
    yield from precision(recipe)
    yield memory()
    yield wired()
    if sys.platform == "linux":
        yield blas()
    yield disk(recipe)
    yield hub(recipe)
    if recipe is not None:
        yield thinking(recipe)
        yield from fits(recipe)


def versions() -> Iterator[Check]:
    """The installed versions of MLX and mlx-lm, against the tested ones."""
    for name, tested in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield Check("fail", name, "is not installed", pip_install(f"{name}=={tested}"))
            continue
        if _numbers(installed) < _numbers(tested):
            yield Check("fail", name, f"{installed}; {tested} is needed", pip_install(f"{name}=={tested}"))
        elif _numbers(installed) > _numbers(tested):
            remedy = f"if results look wrong: {pip_install(f'{name}=={tested}')}"
            yield Check("warn", name, f"{installed}; tested with {tested}", remedy)
        else:
            yield Check("ok", name, f"{installed}, the tested version")


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def back_end() -> Check:
    """The device that MLX computes on."""
    kind = "Metal" if mx.metal.is_available() else "the CPU" if device.is_cpu() else "CUDA"
    text = f"MLX computes on {kind}"
    if sys.platform == "darwin" and kind == "the CPU":
        intel = platform.machine() != "arm64"
        remedy = "install Python for Apple silicon (arm64), not for Intel" if intel else "unset MLX_DEFAULT_DEVICE"
        return Check("fail", "back end", text, remedy)
    if kind == "the CPU":
        return Check("ok", "back end", f"{text}: good for small models only; weights become float32")
    return Check("ok", "back end", text)


def processor() -> Check:
    """The chip and its cores."""
    info = mx.device_info()
    name = str(info.get("device_name") or platform.processor() or "unknown")
    return Check(
        "ok", "chip", f"{name} ({info.get('architecture', platform.machine())}), {cpu_threads.usable_cores()} cores"
    )


def precision(recipe: Recipe | None) -> Iterator[Check]:
    """The advice to use float16, where bfloat16 is slow."""
    from mlx_zh.models.load import find_config

    config: Config | None = None
    if recipe is not None:
        with suppress(MlxZhError):
            config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    if remark := half_precision.advice(recipe, config):
        yield Check("ok", "precision", "bfloat16 works, but slowly", remark)


def memory() -> Check:
    """The memory of this machine, and how much of it may be used."""
    built_in = psutil.virtual_memory().total
    machine = memory_check.this_machine()
    text = f"{built_in / 2**30:.0f} GB built in; {machine.budget / 1e9:.1f} GB are the {machine.name}"
    if machine.budget < 2e9:
        return Check("fail", "memory", text, "close other programs; the smallest run needs about 2 GB")
    if machine.budget < 0.4 * built_in:
        return Check("warn", "memory", text, "close other programs before a long run")
    return Check("ok", "memory", text)


def wired() -> Check:
    """The memory that training keeps resident on macOS."""
    if not mx.metal.is_available():
        return Check("ok", "wired", "this system has no limit to set")
    info = mx.device_info()
    limit, built_in = device.wired_limit(info), int(info["memory_size"])
    text = f"training keeps up to {limit / 1e9:.1f} GB resident and leaves {(built_in - limit) / 1e9:.1f} GB"
    try:
        command = ["sysctl", "-n", "iogpu.wired_limit_mb"]
        set_limit = int(subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return Check("ok", "wired", text)
    return Check("ok", "wired", f"{text}; iogpu.wired_limit_mb is {set_limit or 'the default of the system'}")


def blas() -> Check:
    """The BLAS for matrix products on Linux, and its threads."""
    if warning := blas_warning():
        return Check("warn", "BLAS", warning)
    if not device.is_cpu():
        return Check("ok", "BLAS", "not used: matrix products run on the accelerator")
    cores = cpu_threads.usable_cores()
    idle = max(cores - round(os.getloadavg()[0]), 1)
    setting = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    if not (setting.isdigit() and int(setting)):
        threads = cpu_threads.settle()
        fastest = cpu_processes.fastest()
        if fastest.processes > 1:
            text = (
                f"OpenBLAS; {fastest.processes} processes with one thread each are fastest now, {fastest.gain:.1f} "
                f"times one process with {threads} threads; {cores} cores"
            )
            return Check("ok", "BLAS", text)
        return Check("ok", "BLAS", f"OpenBLAS, {threads} threads, the fastest number now; {cores} cores")
    text = f"OpenBLAS, {setting} threads; {idle} of {cores} cores are idle"
    if int(setting) > idle:
        remedy = f"export OPENBLAS_NUM_THREADS={idle}: more threads than idle cores slow each other down"
        return Check("warn", "BLAS", text, remedy)
    return Check("ok", "BLAS", text)


def disk(recipe: Recipe | None) -> Check:
    """Free disk space for the model, the run folder and the cache."""
    folder = storage.cache_folder() if recipe is None else Path(recipe.runs)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = 1e10 if recipe is None else _needed(recipe)
    user = "a usual run" if recipe is None else "this recipe"
    text = f"{free / 1e9:.0f} GB free; {user} takes up to {needed / 1e9:.1f} GB"
    if free < needed:
        return Check("fail", "disk", text, "make room, or choose another disk with MLX_ZH_CACHE, HF_HOME and `runs`")
    return Check("ok", "disk", text)


def _needed(recipe: Recipe) -> float:
    """Bytes on disk for the model, checkpoints with the optimizer's state, and the fused model."""
    from mlx_zh.models.load import find_config
    from mlx_zh.stages.needs import disk_bytes

    try:
        config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    except MlxZhError:
        return 1e10
    step = memory_check.training_step(recipe, "sft", config, memory_check.mac(16 * 2**30))
    fused = 0.0 if "export" in recipe.model_fields_set else weight_bytes(step.model, step.target)
    return weight_bytes(step.model, step.target) + fused + disk_bytes(recipe, config)


def hub(recipe: Recipe | None) -> Check:
    """The hub of models, and whether it answers. Never a failure, because cached models need no hub."""
    chosen = "auto" if recipe is None else recipe.model.hub
    mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    proxy = ", through a proxy" if any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")) else ""
    if huggingface.is_offline():
        return Check("ok", "hub", "no hub is asked: HF_HUB_OFFLINE is set")
    remedy = (
        "models in the cache still work; for others set HF_ENDPOINT to a mirror, use model.hub: modelscope, or "
        "give the path of a folder"
    )
    if chosen == "auto":
        result = hub_choice.answers()
        failed = "; ".join(f"{host(hub_choice.addresses()[name])}: {why}" for name, why in result.failed.items())
        if result.hub is None:
            return Check("warn", "hub", f"no hub{proxy} answers ({failed})", remedy)
        name = host(hub_choice.addresses()[result.hub])
        other = f"; {failed}" if failed else ""
        set_by = "HF_ENDPOINT" if mirror and result.hub == "huggingface" else "hub: auto"
        return Check("ok", "hub", f"{name} ({set_by}){proxy} answers{other}")
    address, name = hub_choice.addresses()[chosen], host(hub_choice.addresses()[chosen])
    if problem := hub_choice.unreachable(address, downloads.LIMITS.probe):
        return Check("warn", "hub", f"{name} (model.hub: {chosen}){proxy} does not answer: {problem}", remedy)
    return Check("ok", "hub", f"{name} (model.hub: {chosen}){proxy} answers")


def thinking(recipe: Recipe) -> Check:
    """The mode of thinking, and whether the model's chat template has it, if that is on this disk."""
    problem = thinking_problem(recipe)
    if problem is None:
        return Check("ok", "thinking", thinking_text(recipe))
    return Check("fail", "thinking", problem)


def fits(recipe: Recipe) -> Iterator[Check]:
    """Whether each training stage of a recipe fits into memory."""
    from mlx_zh.models.load import find_config

    try:
        config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    except MlxZhError as error:
        yield Check(
            "warn", "recipe", "the config of its model is not here, so its memory need is unknown", str(error)
        )
        return
    machine = memory_check.within_limit(memory_check.this_machine(), recipe.memory)
    for name, split in (("sft", recipe.data.sft), ("dpo", recipe.data.dpo)):
        if not split.train:
            continue
        step, settings = memory_check.training_step(recipe, name, config, machine), recipe.memory
        estimate = step.memory(settings)
        text = f"needs up to {estimate.peak / 1e9:.1f} GB of {machine.budget / 1e9:.1f} GB"
        if estimate.peak <= machine.budget:
            yield Check("ok", name, text)
        else:
            yield Check("warn", name, text, memory_check.suggestion(step, settings, machine))


def self_checks() -> Iterator[Check]:
    """Whether MLX's device computes a training step as the CPU does, case by case."""
    yield Check("ok", "self-check", "a training step against fp32 on the CPU; largest difference:")
    for case in cases():
        yield self_check(case)


def self_check(case: Case) -> Check:
    """One case of the self-check."""
    outcome = check(case)
    if outcome.passed:
        worst = outcome.largest
        name = f"{f'{case}:':<28}"
        return Check(
            "ok",
            "self-check",
            Notice("self-check-passed", case=name, quantity=worst.quantity, value=worst.value, bound=worst.bound),
        )
    text = Notice("self-check-case-failed", case=str(case), problem=outcome.problem)
    with device.unfused_attention():
        unfused_passes = check(case).passed
    if unfused_passes:
        remedy = "training here takes unfused attention by itself, which passes; please report it (doctor --report)"
        return Check("warn", "self-check", text, remedy)
    remedy = (
        "do not train models of this kind here; update macOS and MLX and try again, or report it (doctor --report)"
    )
    return Check("fail", "self-check", text, remedy)


def attention() -> Check:
    """The time of attention with its gradient in both ways, in milliseconds."""
    from mlx_zh.planning.machine import ATTENTION_LENGTHS, attention_seconds

    try:
        fused, unfused = (
            [1000 * attention_seconds(tokens, fused=way) for tokens in ATTENTION_LENGTHS] for way in (True, False)
        )
    except RuntimeError as error:
        return Check("warn", "attention", f"cannot be timed: {first_line(error)}")
    lengths = "/".join(map(str, ATTENTION_LENGTHS))
    ways = (
        f"{name} {'/'.join(f'{ms:.2g}' for ms in way)} ms" for name, way in (("fused", fused), ("unfused", unfused))
    )
    return Check("ok", "attention", f"{lengths} tokens: {', '.join(ways)}")


def products() -> Check:
    """The time of a product with 4-bit weights and its gradient in both ways, in milliseconds."""
    from mlx_zh.core.product_speed import ROWS, layer_of, seconds_of

    dtype = mx.float16 if device.emulates_bfloat16() else mx.bfloat16
    try:
        quantized, unpacked = seconds_of(layer_of(4096, 4096, dtype), ROWS[0], dtype)
    except RuntimeError as error:
        return Check("warn", "products", f"cannot be timed: {first_line(error)}")
    text = (
        f"4-bit, {ROWS[0]} rows, 4096 x 4096: {1000 * quantized:.2g} ms as they are, "
        f"{1000 * unpacked:.2g} ms from unpacked weights"
    )
    return Check("ok", "products", text)


def measurements() -> Iterator[Check]:
    """The speed of matrix products and of memory, measured in about ten seconds."""
    from mlx_zh.planning.machine import measure_machine

    speed = measure_machine()
    text = (
        f"matrix products: float32 {speed.float32:.3g}, bfloat16 {speed.bfloat16:.3g}, 4-bit {speed.four_bit:.3g} "
        f"GFLOP/s; memory {speed.bandwidth / 1e9:.3g} GB/s"
    )
    slow = speed.float32 < 10
    yield Check("warn" if slow else "ok", "speed", text, "close other programs and run doctor again" if slow else "")
    if not device.is_cpu():  # the CPU has no fused attention
        yield attention()
        yield products()
