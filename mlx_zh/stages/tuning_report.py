"""What a training stage prints: each validation, and its result at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_zh.stages.run_folder import RunFolder, StageFolder
from mlx_zh.stages.sample_answers import Samples
from mlx_zh.system import console
from mlx_zh.training.metrics import read_summary

_SHOWN = {
    "eval_rewards/accuracies": "reward accuracy",
    "eval_rewards/margins": "reward margin",
    "eval_rewards/chosen": "chosen reward",
    "eval_kl": "KL",
}


def report(run: RunFolder, folder: StageFolder, samples: Samples, names: Sequence[str]) -> None:
    """Print a stage's result: sample answers of the models `names`, validation before and after, paths of files."""
    summary = read_summary(folder.summary)
    if summary is None:
        return  # it was removed or damaged meanwhile
    before, after = summary["before"], summary["after"]
    console.say()
    if answers := samples.shown(*names):
        console.say(answers)
    if before:
        ratio = f" (x {after['eval_loss'] / before['eval_loss']:.2f})" if before["eval_loss"] else ""
        console.say(f"\nvalidation loss {before['eval_loss']:.3f} -> {after['eval_loss']:.3f}{ratio}")
    for key, label in _SHOWN.items():
        if key in before:
            console.say(f"validation {label} {before[key]:z.2f} -> {after[key]:z.2f}")
    console.say(f"trained {summary['steps']} steps in {console.duration(summary['seconds'])}\n")
    paths = [
        ("adapter", f"{folder.adapter}/"),
        ("metrics", str(folder.metrics)),
        *([("answers", str(run.samples))] if answers else []),
        ("resolved recipe", str(run.recipe)),
    ]
    console.say(console.table(paths))


def validation_sentence(figures: Mapping[str, object]) -> str:
    """A validation during training, in one line."""
    more = "".join(f", {label} {figures[key]:z.2f}" for key, label in _SHOWN.items() if key in figures)
    return f"step {figures['step']}: validation loss {figures['eval_loss']:.4f}{more}"
