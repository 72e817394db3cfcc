"""The recipe: a YAML file that describes a whole run. Every value is checked against a type.

Key names are those of LLaMA-Factory, TRL and mlx-lm where these agree. Unknown keys are errors. Any key can be
overridden on the command line with `section.key=value`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mlx_zh.errors import RecipeError
from mlx_zh.recipe_text import Document, dump, explain, parse, parse_value, seconds_of, size_of, time_text

BENCHMARKS = ("ceval", "cmmlu")
Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]


def _resolved_path(value: str, info: ValidationInfo) -> str:
    """A path relative to the recipe's folder, if it exists there, made relative to the current folder.

    Any other text is returned unchanged, except that `~` is expanded.
    """
    folder: Path | None = (info.context or {}).get("beside")
    try:
        if folder is None or not value or Path(value).expanduser().is_absolute():
            return str(Path(value).expanduser()) if value.startswith("~") else value
        beside = folder / value
        return os.path.normpath(beside) if beside.exists() else value
    except (OSError, RuntimeError) as error:  # a name that is too long, or the home folder of an unknown user
        raise ValueError("a valid name of a file or folder") from error


def _in_home(value: str) -> str:
    """The path with `~` expanded."""
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError as error:  # the home folder of an unknown user
        raise ValueError("a valid name of a folder") from error


Located = Annotated[str, Field(min_length=1), AfterValidator(_resolved_path)]


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("a folder name of letters, digits, '-', '_' and '.', beginning with a letter or digit")
    if len(value) > _LONGEST_NAME:
        raise ValueError(f"a folder name of at most {_LONGEST_NAME} characters")
    return value


_LONGEST_NAME = 150  # file systems take 255 bytes, and what is made from the name is longer


# What the model's chat template is asked for, and what is learned of the reasoning in the data.
Mode = Literal["on", "off", "auto"]
Reasoning = Literal["learn", "context", "drop"]

# Which blocks are computed again: as many as each row needs, all, none, or so many of the lowest.
Recomputed = Literal["auto"] | bool | PositiveInt
Measured = Literal["auto"] | bool  # auto: what was measured to be faster

_SWITCHES = (bool, bool | None, Recomputed, Measured)
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Section(BaseModel):
    """Base class of every part of a recipe. Instances are immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _check_value(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in _SWITCHES:
            raise ValueError("something other than true or false")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("text without NUL characters")
        if isinstance(value, str) and _SURROGATE.search(value):
            raise ValueError("text without halves of surrogate pairs")
        return value


# Keys that came after the first version: left out of a dump while they have their defaults, so that the digests of
# runs and checkpoints made before them stay what they are.
LaterMode = Annotated[Mode, Field(exclude_if=lambda value: value == "auto")]
LaterReasoning = Annotated[Reasoning, Field(exclude_if=lambda value: value == "learn")]
LaterText = Annotated[str | None, Field(min_length=1, exclude_if=lambda value: value is None)]
LaterSwitch = Annotated[bool | None, Field(exclude_if=lambda value: value is None)]
LaterLocated = Annotated[Located | None, Field(exclude_if=lambda value: value is None)]
LaterWeight = Annotated[NotNegative, Field(exclude_if=lambda value: value == 1.0)]
LaterTexts = Annotated[dict[str, str], Field(exclude_if=lambda value: not value)]


class Quantize(Section):
    """How a full-precision model is quantized when it is loaded."""

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Literal[32, 64, 128] = 64


class Model(Section):
    """Where the base model comes from, and its precision."""

    path: Located
    hub: Literal["auto", "huggingface", "modelscope"] = "auto"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Quantize | None = None
    thinking: LaterMode = "auto"  # auto: the chat template's own default

    @property
    def quantization(self) -> tuple[int, int] | None:
        """Bits and group size, or None when the model is not quantized on loading."""
        return None if self.quantize is None else (self.quantize.bits, self.quantize.group_size)


class Lora(Section):
    """Which weights are trained: those of adapters, or with `type: full` the blocks themselves."""

    type: Literal["lora", "dora", "full"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all"
    num_layers: Literal["all"] | PositiveInt = "all"
    rslora: bool = False
    loraplus_ratio: PositiveFloat = 1.0
    modules_to_save: Annotated[
        tuple[Literal["embed_tokens", "lm_head"], ...], Field(exclude_if=lambda value: not value)
    ] = ()

    @field_validator("modules_to_save")
    @classmethod
    def _beside_an_adapter(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("type") == "full":
            raise ValueError("left out where lora.type is full, which trains both if it trains all layers")
        return tuple(dict.fromkeys(value))


class DataSet(Section):
    """A data set by name: where it lives and what its columns mean. Entries of the registry have this form."""

    hub: Literal["huggingface", "modelscope", "url", "file", "generated"]
    id: str = ""  # on a hub: its name there; for url: the address; for file: what to get, in words
    also: dict[Literal["huggingface", "modelscope"], str] = Field({}, exclude_if=lambda value: not value)
    kind: Literal["sft", "dpo"]
    revision: str | None = None
    subset: LaterText = None  # a configuration of a set on Hugging Face; its rows come through `datasets`
    streaming: LaterSwitch = None  # true: rows come one by one, and no further than `max_samples`
    files: tuple[str, ...] = ()  # patterns; without any, every data file of `split`
    split: str = "train"
    format: str = "auto"
    columns: dict[str, str] = {}
    near_duplicates: bool = True  # false: rows that look alike are different ones, as in arithmetic
    rows: PositiveInt | None = None
    mean_tokens: Annotated[PositiveInt | None, Field(exclude_if=lambda value: value is None)] = None  # about, a row
    size_mb: Annotated[PositiveFloat | None, Field(exclude_if=lambda value: value is None)] = None  # about, its files
    source: Annotated[tuple[str, ...], Field(exclude_if=lambda value: not value)] = ()  # where these facts are from
    sha256: str | None = None
    licence: str = "not stated"
    note: str = ""

    @property
    def ids(self) -> dict[str, str]:
        """Its id by hub; empty for a set that is on none."""
        if self.hub not in ("huggingface", "modelscope"):
            return {}
        return {self.hub: self.id} | {str(hub): id for hub, id in self.also.items()}

    @field_validator("also")
    @classmethod
    def _on_the_other_hub(cls, value: Any, info: ValidationInfo) -> Any:
        hub = info.data.get("hub")
        if value and (hub in value or hub not in ("huggingface", "modelscope")):
            raise ValueError("the id on the other hub, as also: {modelscope: OWNER/NAME}")
        return value

    @field_validator("subset", "streaming")
    @classmethod
    def _only_on_hugging_face(cls, value: Any, info: ValidationInfo) -> Any:
        hub = info.data.get("hub", "huggingface")
        if value and hub != "huggingface":
            raise ValueError(f"left out where hub is {hub}: only sets of huggingface are read so")
        return value


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Source(Section):
    """One data set: a file, a folder of files, or a registered name. A plain string is either, a file first.

    `subset`, `split`, `revision` and `streaming` go before those of the registered data set.
    """

    name: str | None = None
    path: Located | None = None
    subset: LaterText = None
    split: LaterText = None
    revision: LaterText = None
    streaming: LaterSwitch = None
    format: str = "auto"
    columns: dict[str, str] = {}
    sheet: LaterText = None  # of an Excel workbook; without it, the first one with rows
    max_samples: PositiveInt | None = None
    weight: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _says_what(self) -> Source:
        if self.name is None and self.path is None:
            raise ValueError("a section with a name (of a registered data set) or a path")
        return self

    @property
    def label(self) -> str:
        """What the user calls it."""
        return str(self.name or self.path)


Sources = tuple[Annotated[Source, BeforeValidator(_as_source)], ...]


def _as_methods(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Select(Section):
    """Which of the training rows are learned: the first `count` rows, or `fraction` of all, in the method's order.

    With neither, all rows that the method does not drop. `model` scores rows for ifd; by default it is the smallest
    one on this disk, else the base.
    """

    method: Annotated[
        tuple[Literal["random", "longest", "diverse", "ifd"], ...],
        BeforeValidator(_as_methods),
        Field(min_length=1),
    ] = ("random",)
    count: PositiveInt | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    per_source: bool = True
    model: LaterLocated = None

    @field_validator("method")
    @classmethod
    def _go_together(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value) or ("random" in value and len(value) > 1):
            raise ValueError("random, longest, diverse or ifd, or a list of different ones without random")
        return value

    @field_validator("fraction")
    @classmethod
    def _one_number(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("count") is not None:
            raise ValueError("left out where count is given")
        return value

    @field_validator("model")
    @classmethod
    def _scores(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and "ifd" not in info.data.get("method", ("ifd",)):
            raise ValueError("left out, because only the method ifd scores rows with a model")
        return value


class Split(Section):
    """Training and validation sources of one stage, and which of the training rows are learned."""

    train: Sources = ()
    validation: Sources = ()
    select: Annotated[Select | None, Field(exclude_if=lambda value: value is None)] = None


class Deduplicate(Section):
    """Which rows are duplicates.

    `near` is the Jaccard similarity of character n-grams from which two rows are; null turns this comparison off.
    """

    exact: bool = True
    near: Annotated[float, Field(ge=0.5, le=1)] | None = 0.75
    ngram: PositiveInt = 3


class Decontaminate(Section):
    """Which rows are dropped because they contain exam questions.

    `overlap` is the share of a question's character n-grams that a row must contain.
    """

    benchmarks: tuple[Literal["ceval", "cmmlu"], ...] | None = None  # null: those of `evaluate.benchmarks`
    ngram: Annotated[int, Field(ge=4)] = 10
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.4


# Left out of a dump while they are the default, so that digests name only the rules that a recipe sets.
_UNLESS_SET = Field(exclude_if=lambda value: value == "sample")
QualityAction = Annotated[Literal["off", "sample", "count", "drop"], _UNLESS_SET]
PersonalAction = Annotated[Literal["off", "sample", "count", "mask", "drop"], _UNLESS_SET]


class Quality(Section):
    """What each quality rule does with the rows that have its fault; `sample` counts them in a sample of the rows."""

    refusal: QualityAction = "sample"
    language: QualityAction = "sample"
    repetition: QualityAction = "sample"
    truncated: QualityAction = "sample"
    mixed_script: QualityAction = "sample"
    echo: QualityAction = "sample"
    numbering: QualityAction = "sample"
    mojibake: QualityAction = "sample"
    personal: PersonalAction = "sample"

    @property
    def actions(self) -> dict[str, str]:
        """The action of each rule that does more or less than the default."""
        return {name: action for name, action in self if action != "sample"}


def _as_quality(value: Any) -> Any:
    """One action for all rules, if the value is no section."""
    return dict.fromkeys(Quality.model_fields, value) if isinstance(value, str) else value


class Data(Section):
    """The training data, how it is cleaned and mixed, and how it is rendered.

    `variables` are filled in where a row, `system` or one of `evaluate.prompts` says `{{name}}`.
    """

    sft: Split = Split()
    dpo: Split = Split()
    registry: dict[str, DataSet] = {}
    registry_file: Located | None = None
    variables: LaterTexts = {}
    normalize: bool = True
    simplify: bool = False
    quality: Annotated[Quality, BeforeValidator(_as_quality), Field(exclude_if=lambda value: not value.actions)] = (
        Quality()
    )
    deduplicate: Deduplicate = Deduplicate()
    decontaminate: Decontaminate = Decontaminate()
    mixing: Literal["concat", "interleave"] = "concat"
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    max_length: PositiveInt = 1024
    train_on: Literal["assistant", "last", "all"] = "assistant"
    reasoning: LaterReasoning = "learn"  # of a learned reply: also its reasoning, or only the answer after it
    on_overflow: Literal["truncate", "drop"] = "truncate"
    on_invalid: Literal["error", "skip"] = "error"
    date_string: str = "26 Jul 2024"
    system: str | None = None

    @field_validator("dpo")
    @classmethod
    def _pairs_have_no_ifd(cls, value: Split) -> Split:
        if value.select is not None and "ifd" in value.select.method:
            raise ValueError("a select.method of random, longest or diverse: ifd scores conversations, not pairs")
        return value

    @model_validator(mode="after")
    def _interleaved_shares(self) -> Data:
        for select in (self.sft.select, self.dpo.select):
            if self.mixing == "interleave" and select is not None and not select.per_source:
                raise ValueError("select.per_source true, because mixing: interleave sets the share of every source")
        return self

    def split(self, stage: str) -> Split:
        """The data of training stage `stage` (sft or dpo)."""
        return self.sft if stage == "sft" else self.dpo


class Training(Section):
    """Optimizer, schedule and validation, for SFT and DPO."""

    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-4
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    weight_decay: NotNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: PositiveFloat | None = 1.0
    max_skipped_steps: PositiveInt = 5
    neftune_alpha: PositiveFloat | None = None
    eval_steps: PositiveInt | None = None
    early_stopping: PositiveInt | None = None
    load_best: bool = False


class Sft(Training):
    """Supervised fine-tuning.

    `start` is an adapter folder to train further; without it, a new adapter is trained on the base.
    """

    start: Annotated[Located | None, Field(exclude_if=lambda value: value is None)] = None


# The losses that use label_smoothing, f_divergence and no reference. A test compares them with `core.losses.LOSSES`.
_SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot")
_DIVERGENT = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm")
_WITHOUT_REFERENCE = ("simpo", "orpo")
# The losses that learn from single answers with a label, instead of pairs.
_UNPAIRED = ("kto", "apo_zero_unpaired")

_LOSSES_OF = {
    "label_smoothing": _SMOOTHED,
    "f_divergence": _DIVERGENT,
    "desirable_weight": _UNPAIRED,
    "undesirable_weight": _UNPAIRED,
}

PreferenceLossName = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "aot",
    "simpo",
    "orpo",
    "kto",
    "apo_zero_unpaired",
]


class Dpo(Training):
    """Preference tuning: from pairs, or with `loss` kto and apo_zero_unpaired from single answers with a label.

    `start` is sft (the SFT adapter of this run), base, or an adapter folder. Its default is sft when the recipe has
    SFT data, otherwise base. `reference` is start, base, or none (for losses without a reference).
    """

    learning_rate: PositiveFloat = 5e-6
    loss: PreferenceLossName = "sigmoid"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: NotNegative = 0.0
    ld_alpha: Fraction | None = None
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    f_alpha: float = 0.5
    simpo_gamma: NotNegative = 0.5
    discopop_tau: PositiveFloat = 0.05
    start: Located | None = None
    reference: Annotated[Literal["start", "base", "none"], Field(validate_default=True)] = "start"
    desirable_weight: LaterWeight = 1.0
    undesirable_weight: LaterWeight = 1.0

    @property
    def unpaired(self) -> bool:
        """Whether the loss learns from single answers with a label (KTO), instead of pairs."""
        return self.loss in _UNPAIRED

    @property
    def has_kl(self) -> bool:
        """Whether every step needs one more forward pass, for KTO's KL term."""
        return self.loss == "kto"

    @field_validator("reference", mode="before")
    @classmethod
    def _fits_loss(cls, value: Any, info: ValidationInfo) -> Any:
        without = info.data.get("loss") in _WITHOUT_REFERENCE
        if without and value == cls.model_fields["reference"].default:
            return "none"
        if "loss" in info.data and without != (value == "none"):
            raise ValueError(
                f"none, because dpo.loss {info.data['loss']} has no reference"
                if without
                else f"start or base, because dpo.loss {info.data['loss']} needs a reference"
            )
        return value

    @field_validator("ld_alpha")
    @classmethod
    def _of_pairs(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("loss") in _UNPAIRED:
            raise ValueError(f"left out, because it has no effect on dpo.loss {info.data['loss']}")
        return value

    @field_validator("label_smoothing", "f_divergence", "desirable_weight", "undesirable_weight")
    @classmethod
    def _used_by_loss(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        losses = _LOSSES_OF[name]
        default = cls.model_fields[name].default
        if value != default and info.data.get("loss", losses[0]) not in losses:
            raise ValueError(f"left at {default}, because it has no effect on dpo.loss {info.data['loss']}")
        return value


def _no_number(value: Any) -> Any:
    """Refuse a number, which could be bytes or gigabytes."""
    if isinstance(value, int | float):
        raise ValueError("a size of memory with its unit, such as 10GB or 800MB")
    return value


def _size(value: str) -> str:
    """A size of memory; `memory.limit` is kept as it was written."""
    if size_of(value) is None:
        raise ValueError("a size of memory with its unit, such as 10GB or 800MB")
    return value


class Memory(Section):
    """Settings that change memory and speed, but never the result."""

    micro_tokens: PositiveInt = 2048
    checkpoint_layers: Recomputed = "auto"
    limit: Annotated[Annotated[str, AfterValidator(_size)] | None, BeforeValidator(_no_number)] = None
    logit_rows: PositiveInt | None = None
    dense_products: Measured = "auto"

    @property
    def limit_bytes(self) -> int | None:
        """`limit` in bytes; None where this machine's memory is the limit."""
        return None if self.limit is None else size_of(self.limit)


class Distributed(Section):
    """How several machines share the work: equally, or in proportion to their speed, which is measured for 10 s."""

    shares: Literal["equal", "measured"] = "equal"


class Checkpoint(Section):
    """When checkpoints are written, and how many are kept."""

    every_steps: PositiveInt | None = 100
    every_minutes: PositiveFloat | None = 15.0
    keep: PositiveInt = 2
    keep_best: bool = True


def _exam(value: str, info: ValidationInfo) -> str:
    """The name of a benchmark, or the path of the user's own exam."""
    return value if value in BENCHMARKS else _resolved_path(value, info)


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
    name: Annotated[str, AfterValidator(_folder_name)] | None = None


def _length_of_time(value: Any) -> Any:
    """A length of time in its usual form: `90 min` becomes `1h30m`. 0 is no limit, as for `mlx-zh init`."""
    if str(value).strip() == "0":
        return None
    seconds = seconds_of(value) if isinstance(value, str) else None
    if value is not None and seconds is None:
        raise ValueError("a length of time, such as 90m, 8h, 1h30m, 8小时 or 2d")
    return None if seconds is None else time_text(seconds)


def _as_rounds(value: Any) -> Any:
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


class Recipe(Section):
    """The recipe of a whole run."""

    name: Annotated[str, AfterValidator(_folder_name)]
    budget: Annotated[LaterText, BeforeValidator(_length_of_time)] = None  # of time, for the whole run
    model: Model
    lora: Lora = Lora()
    data: Data = Data()
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    memory: Memory = Memory()
    distributed: Distributed = Distributed()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    rounds: Annotated[Rounds | None, BeforeValidator(_as_rounds), Field(exclude_if=lambda value: value is None)] = (
        None
    )
    export: Export = Export()
    track: tuple[Literal["tensorboard", "swanlab", "wandb"], ...] = ()
    resume: Literal["auto", "never"] = "auto"  # never: training starts anew each time, as with --fresh
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    runs: Annotated[str, Field(min_length=1), AfterValidator(_in_home)] = "runs"
    _words: str = PrivateAttr("RECIPE")

    @property
    def words(self) -> str:
        """The recipe and its overrides as they stand on the command line, to be repeated in a command to type."""
        return self._words

    def called(self, words: str) -> Recipe:
        """This recipe, which the command line names with `words`."""
        recipe = self.model_copy()
        recipe._words = words
        return recipe

    def training(self, stage: str) -> Training:
        """The section of training stage `stage` (sft or dpo)."""
        return self.sft if stage == "sft" else self.dpo

    def kind(self, stage: str) -> str:
        """What the rows of a training stage are: sft (conversations), dpo (pairs) or kto (labelled answers)."""
        return "kto" if stage == "dpo" and self.dpo.unpaired else stage

    def unit(self, stage: str) -> str:
        """What the rows of a training stage are called."""
        return {"sft": "examples", "dpo": "pairs", "kto": "answers"}[self.kind(stage)]

    @property
    def budget_seconds(self) -> int | None:
        """The time that the whole run may take; None without a budget."""
        return None if self.budget is None else seconds_of(self.budget)

    def start(self, stage: str) -> str:
        """What training stage `stage` starts from: base, an adapter folder, or for DPO also sft."""
        if stage == "sft":
            return self.sft.start or "base"
        return self.dpo.start or ("sft" if self.data.sft.train else "base")

    def system_message(self) -> str | None:
        """`data.system` with `data.variables` filled in."""
        return None if self.data.system is None else filled(self.data.system, self.data.variables)

    def sample_prompts(self) -> tuple[SamplePrompt, ...]:
        """`evaluate.prompts` with `data.variables` filled in."""
        every = (SamplePrompt(prompt=p) if isinstance(p, str) else p for p in self.evaluate.prompts)
        variables = self.data.variables
        return tuple(
            SamplePrompt(
                prompt=filled(sample.prompt, variables),
                expect=None if sample.expect is None else filled(sample.expect, variables),
            )
            for sample in every
        )

    def run_folder(self) -> Path:
        """The folder of all results of this run."""
        return Path(self.runs) / self.name

    def to_yaml(self, change: Callable[[Any], Any] = lambda values: values) -> str:
        """The recipe as YAML, with every key and its value; `change` is applied to the values before."""
        return dump(change(self.model_dump(mode="json", by_alias=True)))


def filled(text: str, variables: Mapping[str, str]) -> str:
    """The text with `{{name}}` replaced by the variable of that name; other names stay as they are."""
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), text)


def placeholders(text: str) -> list[str]:
    """The names that a text says as `{{name}}`."""
    return _VARIABLE.findall(text) if "{{" in text else []


_VARIABLE = re.compile(r"\{\{ ?(\w+) ?\}\}")


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, beside: Path | Literal["recipe"] | None = "recipe"
) -> Recipe:
    """Read a recipe and apply overrides of the form `section.key=value`.

    Paths of data files and local models are relative to the folder `beside` (the recipe's own) if they exist there,
    otherwise to the current folder. Raises RecipeError with every problem: file, line, key, what was got and what was
    expected.
    """
    path = Path(path)
    folder = path.parent if beside == "recipe" else beside
    document = parse(path)
    for override in overrides:
        _apply(document, override)
    problems = document.problems
    try:
        recipe = Recipe.model_validate(document.value, context={"beside": folder})
    except pydantic.ValidationError as error:
        problems = problems + explain(error, document, Recipe)
    if problems:
        raise RecipeError("\n".join(text for _, text in sorted(problems)))
    return recipe


_WIDE_NUMBER = re.compile(r"[０-９．－＋ｅＥ]+")


def _parted(override: str) -> tuple[str, str]:
    """Key and value of an override. Raises RecipeError if it has none.

    What a Chinese input method writes is read as what was meant: ＝ and ： for the equals sign, wide letters and 。
    in the key, and a value that is a number in wide digits.
    """
    key, equals, text = override.partition("=")
    if not equals and (sign := re.search("[＝：:]", override)):
        key, equals, text = override[: sign.start()], sign[0], override[sign.end() :]
    key = unicodedata.normalize("NFKC", key.replace("。", ".")).strip()
    if not equals or not key:
        raise RecipeError(f"{override!r} is not an override: write KEY=VALUE, for example sft.learning_rate=2e-4.")
    if _WIDE_NUMBER.fullmatch(text.strip()):
        text = unicodedata.normalize("NFKC", text)
    return key, text


def _apply(document: Document, override: str) -> None:
    """Set the value of one override. Raises RecipeError when its key or value is not valid."""
    key, text = _parted(override)
    parts = key.split(".")
    if not all(parts):
        raise RecipeError(f"{override!r}: {key!r} is not a key; write it as in sft.learning_rate=2e-4.")
    target = document.value
    for depth, part in enumerate(parts[:-1], start=1):
        below = target.get(part)
        if below is None:
            document.overridden[tuple(parts[:depth])] = override
        elif not isinstance(below, dict):
            kind = "a list: override the whole list" if isinstance(below, list) else "a value, not a section"
            raise RecipeError(f"{override!r}: {'.'.join(parts[:depth])} is {kind}.")
        target[part] = target = dict(below or {})  # a copy, because a YAML alias makes two sections one object
    target[parts[-1]] = parse_value(text, override)
    document.overridden[tuple(parts)] = override
