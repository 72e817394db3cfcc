"""The model card (README.md) of an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from json import dumps
from shlex import quote
from typing import Any

import yaml

from mlx_zh.models.export.fidelity import Distance, Fidelity
from mlx_zh.models.export.in_llama_cpp import USUAL_KL
from mlx_zh.models.export.licences import Licence
from mlx_zh.models.export.merge import SurvivalSummary
from mlx_zh.models.export.ollama import ollama_name
from mlx_zh.system.escaping import markdown, markdown_code, markdown_table, one_line

_LIBRARIES = {
    "mlx": "mlx",
    "hf": "transformers",
    "gguf": "gguf",
    "peft": "peft",
    "gguf-lora": "gguf",
    "mlx-adapter": "mlx",
}
_USE = {
    "mlx": "```bash\npip install mlx-lm\nmlx_lm.chat --model .\n```",
    "hf": (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```'
    ),
    "gguf": (
        "```bash\nllama-cli -m {file}            # llama.cpp\nollama create {name} -f Modelfile  # Ollama\n```\n\n"
        "LM Studio: put the file into its models folder, or `lms import {file}`."
    ),
    "peft": (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, ".")\n```'
    ),
    "gguf-lora": (
        "```bash\nllama-cli -m BASE.gguf --lora {file}\n```\n\n"
        "Ollama: name the base in the `FROM` line of `Modelfile`, then `ollama create {name} -f Modelfile`. Only "
        "some versions of Ollama take adapters."
    ),
    "mlx-adapter": (
        "```bash\npip install mlx-lm\nmlx_lm.chat --model {base} --adapter-path .\n"
        "mlx_lm.server --model {base} --adapter-path .\n```"
    ),
}


@dataclass(frozen=True)
class RunFacts:
    """What a card says about a run, for every format."""

    title: str
    base: str  # as the recipe names it
    base_hub_id: str | None  # the same if it is an id on a hub
    original: str | None  # the full-precision model that the adapter was merged into, if not the base
    licence: Licence
    method: str  # for example "LoRA (rank 16) by SFT, then DPO"
    data: Sequence[tuple[str, str]]  # name and SHA-256 of each data file
    settings: Sequence[tuple[str, str]]  # key and value of the recipe
    scores: Sequence[tuple[str, str, str]] = ()  # exam, model, accuracy
    missing: Sequence[str] = ()  # sentences on what the licence demands and the folder does not have
    template: str = ""  # LLaMA-Factory's name of its chat template, if one is known


@dataclass(frozen=True)
class Recovered:
    """How a quantized model was adjusted to base + adapter. The names of the fields are keys of summary.json."""

    tokens: int  # of training text
    seconds: float  # that it took this time; blocks of an interrupted run are not counted
    memory_gb: float  # the peak of MLX's memory


@dataclass(frozen=True)
class FormatFacts:
    """What a card says about one exported format."""

    kind: str  # one of export.formats
    detail: str  # for example "4-bit" or "Q8_0"
    file: str = ""  # name of the GGUF file
    left: SurvivalSummary | None = None  # what is left of the adapter's change
    fidelity: Fidelity | None = None
    warnings: Sequence[str] = field(default_factory=list)
    llama_cpp: Distance | None = None  # of a GGUF file, as llama.cpp computes it
    recovered: Recovered | None = None


def model_card(run: RunFacts, exported: FormatFacts) -> str:
    """The text of README.md, with the hub's metadata at its head."""
    parts = [_metadata(run, exported), f"# {markdown(run.title)}"]
    if run.licence.version is not None:
        parts.append("**Built with Llama**")
    description = f"{markdown_code(run.base)}, tuned with mlx-zh: {markdown(run.method)}. "
    description += f"Format: {exported.kind}, {markdown(exported.detail)}."
    if run.original:
        description += f" The adapter was merged into {markdown_code(run.original)}, the base in full precision."
    parts += [description, "## Use", _use(run, exported)]
    parts += ["## Training", markdown_table(["key", "value"], run.settings)]
    if run.data:
        parts.append("Data:\n\n" + "\n".join(_data_line(*data) for data in run.data))
    if run.scores:
        parts += ["## Scores", markdown_table(["exam", "model", "accuracy"], run.scores)]
    if text := fidelity_text(exported):
        parts += ["## Fidelity", text]
    parts += ["## Licence", _licence(run)]
    return "\n\n".join(parts) + "\n"


def with_exams(text: str, rows: Sequence[tuple[str, str, str]]) -> str:
    """A card with a table of exam, fused stage and difference; without a licence section it stays as it is."""
    before, heading, after = text.rpartition("\n## Licence\n")
    if not heading:
        return text
    before = before.partition(f"\n{_EXAMS}\n")[0].rstrip("\n")
    table = markdown_table(["exam", "base + adapter", "difference of this model"], rows)
    return f"{before}\n\n{_EXAMS}\n\n{table}\n{heading}{after}"


_EXAMS = "## Exams after fusing"


def _metadata(run: RunFacts, exported: FormatFacts) -> str:
    data: dict[str, Any] = {
        "license": run.licence.tag,
        "language": ["zh", "en"],
        "library_name": _LIBRARIES[exported.kind],
        "pipeline_tag": "text-generation",
        "tags": ["mlx-zh", "chat", *(["llama"] if run.licence.version else [])],
    }
    if run.licence.tag == "other":
        data["license_name"] = "see-base-model"
    if run.base_hub_id:
        data["base_model"] = one_line(run.base_hub_id)
    return f"---\n{yaml.safe_dump(data, allow_unicode=True, sort_keys=False)}---"


def _use(run: RunFacts, exported: FormatFacts) -> str:
    file, name = quote(one_line(exported.file)), quote(ollama_name(run.title))
    base = "BASE" if run.base_hub_id is None else run.base_hub_id
    shown = quote(one_line(base)) if exported.kind == "mlx-adapter" else dumps(one_line(base), ensure_ascii=False)
    text = _USE[exported.kind].format(file=file, name=name, base=shown)
    on_hub = (
        ""
        if exported.kind in ("gguf", "gguf-lora")
        else "; elsewhere, write its path or its name on a hub in place of the dot"
    )
    return f"{_needed(run, exported)}In this folder{on_hub}:\n\n{text}{_prompts(run, exported)}"


def _prompts(run: RunFacts, exported: FormatFacts) -> str:
    """How prompts must be written, as a paragraph; "" for formats that no training program reads."""
    if exported.kind not in ("hf", "peft"):
        return ""
    text = "Prompts are written by the chat template in this folder, as in training."
    if run.template:
        return f"\n\n{text} LLaMA-Factory calls it `template: {run.template}`."
    return f"\n\n{text} No template of LLaMA-Factory is known to be the same."


def _needed(run: RunFacts, exported: FormatFacts) -> str:
    """What an adapter needs beside it, as a paragraph; "" for a whole model."""
    if exported.kind == "gguf-lora":
        return "This is an adapter: it needs a GGUF file of the base model (any quantization).\n\n"
    if exported.kind not in ("peft", "mlx-adapter"):
        return ""
    text = "This is an adapter: it needs the base model."
    if run.base_hub_id is None:
        base = markdown_code(run.base)
        gguf = run.base.lower().endswith(".gguf")
        stands = f"the model of which {base} is a GGUF copy" if gguf else base
        text += f" `BASE` stands for {stands}: its path, or its name on a hub."
    return f"{text}\n\n"


def _data_line(name: str, digest: str) -> str:
    return f"- {markdown_code(name)} (SHA-256 {markdown(digest[:12])}…)"


def fidelity_text(exported: FormatFacts) -> str:
    """The measurements of a fused model in sentences; "" if there are none."""
    sentences = []
    if f := exported.fidelity:
        sentences.append(
            f"Against base + adapter on {f.tokens} tokens of held-out text: mean KL {f.kl:.4f} nats a token (tuning "
            f"itself moved the model by {f.moved:.4f}), the same most likely token {f.top1:.1%} of the time, "
            f"perplexity {f.fused_perplexity:.3f} where base + adapter has {f.perplexity:.3f}."
        )
    if measured := exported.llama_cpp:
        sentences.append(
            f"As llama.cpp itself computes it, activations rounded too: mean KL {measured.kl:.4f}, the same most "
            f"likely token {measured.top1:.1%} of the time, perplexity {measured.perplexity:.3f}."
        )
    elif exported.fidelity and exported.kind == "gguf" and exported.detail not in ("F16", "BF16"):
        sentences.append(
            "This is the fidelity of the weights alone. On a CPU and with CUDA, llama.cpp also rounds the "
            f"activations to 8 bits, which moves the predictions by a KL of about {USUAL_KL}."
        )
    if recovered := exported.recovered:
        sentences.append(
            f"The matrices were rounded together, for {recovered.tokens} tokens of the training data, so that their "
            "errors cancel in the outputs of base + adapter (GPTQ)."
        )
    if left := exported.left:
        sentences.append(
            f"Of the adapter's change to {left.matrices} matrices, {left.kept_mean:.1%} is left on average (minimum: "
            f"{left.kept_least:.1%}); the rounding error is {left.error_mean:.2f} times the size of the change "
            f"(maximum: {left.error_largest:.2f})."
        )
    sentences += [f"**Note:** {markdown(warning)}." for warning in exported.warnings]
    return " ".join(sentences)


def _licence(run: RunFacts) -> str:
    base = markdown_code(run.base)
    text = f"This model is made from {base} and is under {run.licence.title}."
    if run.licence.notice:
        text += f" {run.licence.notice.strip()}"
    if run.licence.tag == "other":
        text = f"This model is made from {base}; that model's licence holds for this one too."
    text += " The training data may have licences of their own."
    return text + "".join(f"\n\n**Before you share it:** {markdown(line)}." for line in run.missing)
