"""The sections `evaluate`, `export` and `rounds`: what is done with a trained model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from mlx_zh.recipe.section import LaterText, Located, Section, folder_name, resolved_path

BENCHMARKS = ("ceval", "cmmlu")


def _exam(value: str, info: ValidationInfo) -> str:
    """The name of a benchmark, or the path of the user's own exam."""
    return value if value in BENCHMARKS else resolved_path(value, info)


class SamplePrompt(Section):
    """A prompt, and the text that a right answer contains."""

    prompt: Annotated[str, Field(min_length=1)]
    expect: Annotated[str, Field(min_length=1)] | None = None


class Evaluate(Section):
    """The prompts and benchmarks that the model answers before and after training.

    A prompt is a text, or a section with `prompt` and `expect`.
    """

    prompts: tuple[str | SamplePrompt, ...] = ()
    max_new_tokens: PositiveInt = 64
    benchmarks: tuple[Annotated[str, Field(min_length=1), AfterValidator(_exam)], ...] = ()
    protocol: Literal["official", "chat", "zero-shot-chat", "lm-eval", "generate", "cloze"] = "official"
    shots: Annotated[int, Field(ge=0, le=5)] | None = None
    split: Literal["val", "test"] | None = None
    limit: PositiveInt | None = None
    max_length: PositiveInt | None = None
    bootstrap: PositiveInt = 10_000
    hub: Literal["auto", "huggingface", "modelscope"] | None = None
    folder: dict[Literal["ceval", "cmmlu"], Located] = {}


Format = Literal["mlx", "hf", "gguf", "peft", "gguf-lora", "mlx-adapter"]
ADAPTER_FORMATS = ("peft", "gguf-lora", "mlx-adapter")  # those that hold the adapter alone


class Export(Section):
    """The files that `mlx-zh fuse` writes from the trained model."""

    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = ("mlx",)
    bits: Literal["auto", "mixed", 4, 6, 8, 16] = "auto"
    size_gb: PositiveFloat | None = None  # of mixed bits: the most that the model may take; None: as with 5 bits
    recover: bool = False  # mlx: round so that the model's outputs stay, and not each weight for itself
    group_size: Literal[32, 64, 128] | None = None
    gguf_type: Literal[
        "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"
    ] = "q8_0"
    imatrix: bool = False
    max_shard_gb: PositiveFloat = 5.0
    original: Annotated[Located | None, Field(alias="from")] = None
    name: Annotated[str, AfterValidator(folder_name)] | None = None


def as_rounds(value: Any) -> Any:
    """A number alone is how many rounds; none are the same as leaving the section out."""
    if isinstance(value, bool):
        return value
    return None if value == 0 else {"count": value} if isinstance(value, int) else value


class Rounds(Section):
    """Rounds after training: answers of the model itself, pairs chosen among them, and DPO on those pairs.

    A round starts from the weights of the one before, which are its reference too. `check` is the share of the
    prompts that no round learns from: on them a round is compared with the one before, and the rounds end where it is
    not better by more than chance.
    """

    count: Annotated[int, Field(ge=1, le=99)] = 1
    prompts: Located | None = None  # a file; by default the prompts of data.sft.train
    samples: Annotated[int, Field(ge=2, le=64)] = 4  # answers to each prompt
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0  # of these answers
    max_new_tokens: PositiveInt = 256
    by: Literal["rule", "judge"] = "rule"
    judge: Located | None = None  # a model on this machine
    judge_url: LaterText = None  # an OpenAI-compatible address; its key is in MLX_ZH_JUDGE_KEY
    judge_model: LaterText = None
    check: Annotated[float, Field(gt=0, le=0.9)] = 0.2

    @model_validator(mode="after")
    def _has_a_judge(self) -> Rounds:
        named = (self.judge is not None) + (self.judge_url is not None and self.judge_model is not None)
        if self.by == "judge" and named != 1:
            raise ValueError("a section with judge, or with both judge_url and judge_model, because by is judge")
        if self.by == "rule" and (self.judge or self.judge_url or self.judge_model):
            raise ValueError("a section with by: judge, because it names a judge")
        return self
