"""Run a whole recipe on a simulated Metal and print what it asks of Metal (`make metal-calls`).

    python tests/metal_calls.py recipes/quickstart.yaml [KEY=VALUE ...]

All steps, then `fuse` and one chat answer, in this process and in a folder that is deleted afterwards. A call that
Metal refuses ends it with Metal's message.
"""

from __future__ import annotations

import importlib
import io
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)
from mlx_zh.pipeline.steps import steps
from mlx_zh.recipe import load_recipe
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console

sys.path.insert(0, str(Path(__file__).parent))
from metal_rules import MAC, Call
from watchman import Watchman, simulated_metal

Row = tuple[str, ...]


def run_stage(stage: str, arguments: list[str]) -> None:
    """One stage in this process. Ends this process if the stage fails."""
    print(f"== {stage} {' '.join(arguments[1:])}", flush=True)
    if stage == "chat":
        sys.stdin = io.TextIOWrapper(io.BytesIO("中国的首都是哪里？".encode()))
    status = importlib.import_module(f"mlx_zh.{stage}").main(arguments)
    if status:
        sys.exit(status)


def run_recipe(recipe: str, overrides: list[str], folder: str) -> None:
    """Every stage of a recipe, with its run folder in `folder`."""
    arguments = [recipe, "model.dtype=float32", *overrides, f"runs={folder}"]  # the CPU has no fast half precision
    loaded = load_recipe(recipe, arguments[1:])
    planned = [(step.stage, [*arguments, *step.arguments]) for step in steps(loaded, RunFolder.of(loaded))]
    stages = [stage for stage, _ in planned]
    extra = [] if "fuse" in stages or not {"sft", "dpo"} & set(stages) else [("fuse", arguments)]
    for stage, command in [*planned, *extra, ("chat", [*arguments, "--max-tokens", "40"])]:
        run_stage(stage, command)


def call_rows(watchman: Watchman) -> list[Row]:
    """A line for each kind of call: how many with and without a gradient, and what is known of their arrays."""
    counted: Counter[tuple[str, bool]] = Counter()
    for call, times in watchman.calls.items():
        counted[_kind(call), call.gradient] += times
    kinds = sorted({kind for kind, _ in counted})
    head = ("call", "with a gradient", "without")
    return [head, *((kind, f"{counted[kind, True]:,}", f"{counted[kind, False]:,}") for kind in kinds)]


def _kind(call: Call) -> str:
    options = dict(call.options)
    if call.kind == "attention":
        return f"attention, mask {options['mask']}, head {call.shapes[0][-1]}, {call.dtypes[0]}"
    if call.kind == "rope":
        return f"rope, offset: {options['offset']}, {call.dtypes[0]}"
    if call.kind == "quantized_matmul":
        way = "transposed" if options["transpose"] else "not transposed"
        return (
            f"quantized product, {way}, {options['bits']} bits, groups of {options['group_size']}, {call.dtypes[0]}"
        )
    return call.kind


def extreme_rows(watchman: Watchman) -> list[Row]:
    """The largest and smallest of everything that Metal limits."""
    largest = watchman.largest
    rows = [("", "here", "Metal's limit")]
    for gradient in (True, False):
        name = "with a gradient" if gradient else "without a gradient"
        for mask, fewest in sorted(watchman.fewest_queries(gradient=gradient).items()):
            rows.append((f"fewest queries {name}, mask {mask}", str(fewest), _limit(gradient, mask)))
    for kind in ("split", "concatenate"):
        most = max((call["parts"] for call in watchman.of(kind)), default=0)
        rows.append((f"most parts of a {kind}", str(most), "none"))
    size = f"{largest.nbytes / 2**20:,.1f} MiB, {largest.dtype} {largest.shape} in {largest.function}"
    rows.append(("largest array", size, f"{int(MAC['max_buffer_length']) / 2**20:,.0f} MiB"))
    rows.append(("most arrays alive", f"{watchman.most_alive:,}", f"{MAC['resource_limit']:,}"))
    rows.append(("most arrays in one evaluation", f"{watchman.most_evaluated:,}", ""))
    rows.append(("evaluations", f"{watchman.evaluations:,}", ""))
    return rows


def _limit(gradient: bool, mask: str) -> str:
    return "more than 8, where the head size has a kernel" if gradient and mask in ("none", "causal") else "none"


def main() -> None:
    recipe, *overrides = sys.argv[1:] or ["recipes/quickstart.yaml"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, simulated_metal(fast_products=True) as watchman:
        try:
            run_recipe(recipe, overrides, folder)
        finally:  # a run that was refused or stopped shows what came before
            print(f"\n{' '.join([recipe, *overrides])} on a simulated Metal, {time.monotonic() - start:.0f} s\n")
            print(f"{console.table(call_rows(watchman))}\n")
            print(console.table(extreme_rows(watchman)))


if __name__ == "__main__":
    main()
