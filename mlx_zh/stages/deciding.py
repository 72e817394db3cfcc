"""Decide a run's time budget, in a process of its own so that the model's memory is freed: the first part of `run`.

`python -m mlx_zh.stages.deciding RECIPE [--force] [KEY=VALUE ...]`
"""

from __future__ import annotations

from mlx_zh.stages.command import find_recipe


def main(argv: list[str] | None = None) -> int:
    """Measure this machine and store the decision in the run folder; returns 0. Raises MlxZhError."""
    from mlx_zh.stages.budgeting import settle
    from mlx_zh.stages.run_folder import RunFolder

    recipe_path, *rest = argv or []
    recipe = find_recipe(recipe_path, [text for text in rest if text != "--force"])
    with RunFolder.of(recipe).at_work("run"):
        settle(recipe, force="--force" in rest)
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
