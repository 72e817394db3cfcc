"""The model card (README.md) of what a run hands over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from mlx_zh.models.export.fidelity import Fidelity
from mlx_zh.models.export.licences import Licence
from mlx_zh.models.export.merge import SurvivalSummary

_LIBRARIES = {"mlx": "mlx", "hf": "transformers", "gguf": "gguf", "peft": "peft"}
_USE = {
    "mlx": "```bash\npip install mlx-lm\nmlx_lm.chat --model {place}\n```",
    "hf": (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("{place}")\n```'
    ),
    "gguf": (
        "```bash\nllama-cli -m {file}            # llama.cpp\nollama create {name} -f Modelfile  # Ollama\n```\n\n"
        "LM Studio: put the file into its models folder, or `lms import {file}`."
    ),
    "peft": (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, "{place}")\n```'
    ),
}


@dataclass(frozen=True)
class Story:
    """What a card tells about a run, whatever the format."""

    title: str
    base: str  # as the recipe names it
    base_hub_id: str | None  # where that is an id on a hub
    original: str | None  # the full-precision model merged into, where that is another
    licence: Licence
    method: str  # for example "LoRA (rank 16) by SFT, then DPO"
    data: Sequence[str]
    settings: Sequence[tuple[str, str]]  # key and value of the recipe
    scores: Sequence[tuple[str, str, str]] = ()  # exam, model, accuracy
    missing: Sequence[str] = ()  # what the licence asks for and is not there


@dataclass(frozen=True)
class Delivery:
    """One format."""

    kind: str
    detail: str  # for example "4-bit" or "Q8_0"
    file: str = ""
    left: SurvivalSummary | None = None
    fidelity: Fidelity | None = None
    warnings: Sequence[str] = field(default_factory=list)


def model_card(story: Story, delivery: Delivery) -> str:
    """README.md with the hub's metadata at its head."""
    parts = [_metadata(story, delivery), f"# {story.title}"]
    if story.licence.version is not None:
        parts.append("**Built with Llama**")
    origin = f"`{story.base}`"
    made = f"{origin}, tuned with mlx-zh: {story.method}. Format: {delivery.kind}, {delivery.detail}."
    if story.original:
        made += f" The adapter was merged into `{story.original}`, the base in full precision."
    parts += [made, "## Use", _use(story, delivery)]
    parts += ["## Training", _table(("key", "value"), story.settings)]
    if story.data:
        parts.append("Data:\n\n" + "\n".join(f"- {line}" for line in story.data))
    if story.scores:
        parts += ["## Scores", _table(("exam", "model", "accuracy"), story.scores)]
    if text := fidelity_text(delivery):
        parts += ["## Fidelity", text]
    parts += ["## Licence", _licence(story)]
    return "\n\n".join(parts) + "\n"


def _metadata(story: Story, delivery: Delivery) -> str:
    data: dict[str, Any] = {
        "license": story.licence.tag,
        "language": ["zh", "en"],
        "library_name": _LIBRARIES[delivery.kind],
        "pipeline_tag": "text-generation",
        "tags": ["mlx-zh", "chat", *(["llama"] if story.licence.version else [])],
    }
    if story.licence.tag == "other":
        data["license_name"] = "see-base-model"
    if story.base_hub_id:
        data["base_model"] = story.base_hub_id
    return f"---\n{yaml.safe_dump(data, allow_unicode=True, sort_keys=False)}---"


def _use(story: Story, delivery: Delivery) -> str:
    place = "." if not story.title else story.title
    return _USE[delivery.kind].format(place=place, file=delivery.file, name=story.title.lower(), base=story.base)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def fidelity_text(delivery: Delivery) -> str:
    """What was measured of a fused model, in sentences; empty where nothing was."""
    sentences = []
    if f := delivery.fidelity:
        sentences.append(
            f"Against base + adapter on {f.tokens} tokens of held-out text: mean KL {f.kl:.4f} nats a token (tuning "
            f"itself moved the model by {f.moved:.4f}), the same likeliest token {f.top1:.1%} of the time, "
            f"perplexity {f.fused_perplexity:.3f} where base + adapter has {f.perplexity:.3f}."
        )
    if left := delivery.left:
        sentences.append(
            f"Of the adapter's change to {left.matrices} matrices {left.kept_mean:.1%} is left (the least: "
            f"{left.kept_least:.1%}); rounding is {left.error_mean:.2f} times the size of the change (the most: "
            f"{left.error_largest:.2f})."
        )
    sentences += [f"**Note:** {warning}." for warning in delivery.warnings]
    return " ".join(sentences)


def _licence(story: Story) -> str:
    text = f"This model is made from {story.base} and is under {story.licence.title}."
    if story.licence.notice:
        text += f" {story.licence.notice.strip()}"
    if story.licence.tag == "other":
        text = f"This model is made from {story.base}; that model's licence holds for this one too."
    text += " The training data may have terms of their own."
    return text + "".join(f"\n\n**Before you share it:** {line}." for line in story.missing)
