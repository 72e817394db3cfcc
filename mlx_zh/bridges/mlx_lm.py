"""mlx-lm and mlx-lm-lora: their YAML and command lines.

An iteration there is a batch; every grad_accumulation_steps of them make one optimizer step, and the schedule counts
optimizer steps. Adapters are scaled by `scale`, which is alpha / rank here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_zh.bridges import base_models
from mlx_zh.bridges.adapters import put_targets
from mlx_zh.bridges.datasets import Entry, existing, source_of
from mlx_zh.bridges.draft import Draft, shown
from mlx_zh.bridges.training_arguments import plain, seed, trackers
from mlx_zh.language.reader import say
from mlx_zh.models.catalog import HUB_ID
from mlx_zh.training.schedule import learning_rate

_TUNING = {"lora": "lora", "dora": "dora", "full": "full"}
_MODES = ("sft", "dpo", "orpo")
_LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo"}
# Settings of mlx-lm-lora's modes without a counterpart; its sample files name all of them.
_OF_OTHERS = (
    *(
        "beta",
        "reward_scaling",
        "dpo_cpo_loss_type",
        "delta",
        "reference_model_path",
        "judge",
        "judge_config",
        "alpha",
    ),
    *("lambda_mse_target", "tau_mse_target", "lambda_mse", "clip_epsilon_logits", "group_size", "epsilon"),
    *("epsilon_high", "max_completion_length", "temperature", "reward_weights", "grpo_loss_type"),
    *("importance_sampling_level", "lm_studio_name"),
)
_TELLING = 0.001  # of the peak: a difference of learning rates that is told
_LONGEST = 100_000  # steps of which every rate is compared


def convert(draft: Draft, model: str | None) -> str:
    """Fill the draft; the stage (sft or dpo) that it is for."""
    theirs = draft.settings.program == "mlx-lm-lora"
    mode = (draft.text("train_mode") or "sft").lower() if theirs else "sft"
    if mode not in _MODES:
        draft.refuse(say("import-mode", mode=shown(mode), known=", ".join(_MODES)))
        return "sft"
    stage = "sft" if mode == "sft" else "dpo"
    draft.use("train", "train_mode")
    tuning = draft.choice("train_type" if theirs else "fine_tune_type", _TUNING) or "lora"
    bits = next((b for b in (4, 6, 8) if draft.switch(f"load_in_{b}bits")), None)
    base_models.convert_model(draft, "model", bits, whole=tuning == "full", proposed=model)
    _adapter(draft, tuning, stage, "train_type" if theirs else "fine_tune_type")
    _data(draft, stage)
    _steps(draft, stage, "gradient_accumulation_steps" if theirs else "grad_accumulation_steps")
    _rates(draft, stage)
    _optimizer(draft, stage)
    if stage == "dpo":
        _preferences(draft, mode)
    if draft.switch("grad_checkpoint"):
        draft.put("memory.checkpoint_layers", True, "grad_checkpoint")
    trackers(draft)
    seed(draft)
    if str(draft.raw("sft_loss_type") or "nll") not in ("nll", "chunked_nll"):
        draft.refuse(say("import-sft-loss", loss=shown(draft.raw("sft_loss_type"))))
    if draft.switch("qat_enable"):
        draft.note("qat_enable", say("import-qat"), "differs")
    draft.use(
        "adapter_path", "config", *[f"qat_{n}" for n in ("bits", "group_size", "mode", "start_step", "interval")]
    )
    if theirs:
        draft.idle(*_OF_OTHERS)
    return stage


def _adapter(draft: Draft, tuning: str, stage: str, name: str) -> None:
    draft.put("lora.type", tuning, name)
    layers = draft.whole("lora_layers" if draft.given("lora_layers") else "num_layers", -1)
    if layers is not None and layers > 0:
        draft.put("lora.num_layers", layers, "num_layers", note=say("import-top-layers"))
    else:
        draft.put("lora.num_layers", "all", "num_layers")
    if tuning == "full":
        draft.use("lora_parameters")
        return
    own = draft.section("lora_parameters")
    part = {**draft.defaults["lora_parameters"], **{key: value for key, value in own.items() if value is not None}}
    numbers = {key: _number(draft, f"lora_parameters.{key}", part.get(key)) for key in ("rank", "scale", "dropout")}
    if "alpha" in own and "scale" not in own:  # of old versions
        numbers["scale"] = _number(draft, "lora_parameters.alpha", own["alpha"]) / max(numbers["rank"], 1)
    rank = int(numbers["rank"])
    if rank < 1 or numbers["scale"] <= 0:
        draft.refuse(say("import-no-scale", rank=rank, scale=f"{numbers['scale']:g}"))
        return
    scale, dropout = numbers["scale"], numbers["dropout"]
    name = "lora_parameters"
    draft.put("lora.rank", rank, name, words=f"{name}.rank: {rank}")
    note = say("import-scale", scale=f"{scale:g}")
    draft.put("lora.alpha", plain(scale * rank), name, note=note, words=f"{name}.scale: {scale:g}")
    words = f"{name}.dropout: {dropout:g}"
    if stage == "sft" or not dropout:
        draft.put("lora.dropout", dropout, name, words=words)
    else:
        draft.put("lora.dropout", 0.0, name, note=say("import-dropout-dpo"), level="differs", words=words)
    keys = part.get("keys")
    targets = [str(key) for key in keys] if isinstance(keys, list) else []
    put_targets(draft, name, targets, words=f"{name}.keys: {shown(targets)}" if targets else "")


def _number(draft: Draft, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < 2**31:
        draft.refuse(say("import-wants-least", key=name, value=shown(value), least=0))
        return 1.0
    return number


# Data -------------------------------------------------------------------------------------------------------


def _data(draft: Draft, stage: str) -> None:
    sets = draft.raw("hf_dataset")
    if sets:
        _hub_sets(draft, stage, sets if isinstance(sets, list) else [sets])
        draft.use("data")
    else:
        _folder(draft, stage)
    masked = draft.switch("mask_prompt")
    if stage == "sft":
        note = say("import-mask" if masked else "import-no-mask")
        draft.put("data.train_on", "last" if masked else "all", "mask_prompt", note=note)
    draft.put("data.max_length", draft.whole("max_seq_length", 1) or 2048, "max_seq_length")


def _columns(draft: Draft, part: dict[str, Any] | None = None) -> dict[str, str]:
    names = {
        "prompt_feature": "prompt",
        "completion_feature": "response",
        "chat_feature": "messages",
        "text_feature": "text",
    }
    values = part if part is not None else {name: draft.raw(name) for name in names}
    named = {ours: values[name] for name, ours in names.items() if isinstance(values.get(name), str)}
    if "text" in named and len(named) > 1:
        del named["text"]
    return {ours: theirs for ours, theirs in named.items() if ours != theirs}


def _folder(draft: Draft, stage: str) -> None:
    """A folder with train.jsonl and valid.jsonl, or a set on a hub."""
    name = draft.text("data") or ""
    columns = _columns(draft)
    reading: Entry = {"columns": columns} if columns else {}
    train = existing(draft, f"{name}/train.jsonl")
    local = train or existing(draft, name) or not HUB_ID.fullmatch(name) or name.startswith((".", "/"))
    if not local:
        source = source_of(draft, name, stage, columns=columns)
        draft.put(f"data.{stage}.train", [source], "data")
        draft.put(f"data.{stage}.validation", [{**(source or {}), "split": "valid"}], "data")
        return
    if train is None:
        draft.remark(say("import-no-data", name=shown(f"{name}/train.jsonl")))
    folder = str(Path(train).parent) if train else name.rstrip("/") or "data"
    draft.put(f"data.{stage}.train", [{"path": f"{folder}/train.jsonl", **reading}], "data")
    if existing(draft, f"{name}/valid.jsonl"):
        draft.put(f"data.{stage}.validation", [{"path": f"{folder}/valid.jsonl", **reading}], "data")


def _hub_sets(draft: Draft, stage: str, sets: list[Any]) -> None:
    train, validation = [], []
    for part in sets:
        if not isinstance(part, dict) or not isinstance(part.get("path") or part.get("name"), str):
            draft.refuse(say("import-wants-section", key="hf_dataset", value=shown(part)))
            continue
        name = str(part.get("path") or part.get("name"))
        further = part.get("config") if isinstance(part.get("config"), dict) else {}
        subset = further.get("name") if isinstance(further, dict) and isinstance(further.get("name"), str) else None
        columns = _columns(draft, part)
        wanted = str(part.get("train_split") or "train[:80%]")
        source = source_of(draft, name, stage, split=wanted, subset=subset, columns=columns)
        train += [source] if source else []
        split = part.get("valid_split")
        if isinstance(split, str) and split.isidentifier() and source:
            validation.append({**source, "split": split})
        elif split:
            draft.remark(say("import-test-split", split=shown(split)))
    draft.put(f"data.{stage}.train", train, "hf_dataset")
    if validation:
        draft.put(f"data.{stage}.validation", validation, "hf_dataset")


# Steps ------------------------------------------------------------------------------------------------------


def _steps(draft: Draft, stage: str, name: str) -> None:
    rows = draft.whole("batch_size", 1) or 4
    together = draft.whole(name, 1) or 1
    draft.put(f"{stage}.batch_size", rows * together, "batch_size", name)
    iterations = draft.whole("iters", 1)
    if iterations is not None:
        if iterations < together:
            draft.refuse(say("import-no-step", iters=iterations, steps=together))
        note = say("import-iterations", iters=iterations, steps=together) if together > 1 else ""
        draft.put(f"{stage}.max_steps", max(iterations // together, 1), "iters", note=note)
        draft.use("epochs")
    elif epochs := draft.number("epochs", 0):
        draft.put(f"{stage}.epochs", plain(epochs), "epochs")
    else:
        draft.refuse(say("import-no-length"))
    for theirs, ours in (("steps_per_eval", f"{stage}.eval_steps"), ("save_every", "checkpoint.every_steps")):
        every = draft.whole(theirs, 1)
        if every is not None and draft.given(theirs):
            draft.put(ours, max(every // together, 1), theirs)
    file = draft.text("resume_adapter_file")
    if file is not None:
        folder = str(Path(file).parent) if Path(file).suffix else file
        draft.put(f"{stage}.start", existing(draft, folder) or folder, "resume_adapter_file")


def _rates(draft: Draft, stage: str) -> None:
    schedule = draft.section("lr_schedule")
    if not schedule:
        rate = draft.number("learning_rate", 0)
        if not rate:
            draft.refuse(say("import-no-rate", key="learning_rate"))
        draft.put(f"{stage}.learning_rate", rate, "learning_rate")
        draft.put(f"{stage}.lr_scheduler", "constant", "lr_schedule", note=say("import-no-schedule"))
        draft.put(f"{stage}.warmup_ratio", 0.0, "lr_schedule")
        return
    draft.use("learning_rate")
    numbers = [_finite(value) for value in schedule.get("arguments") or () if not isinstance(value, dict | list)]
    if not isinstance(schedule.get("arguments"), list) or None in numbers or not numbers or not numbers[0]:
        draft.refuse(say("import-schedule-arguments", value=shown(schedule.get("arguments"))))
        return
    _schedule(draft, stage, str(schedule.get("name")), [float(number or 0.0) for number in numbers], schedule)


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# Their schedules: the rate after `step` steps of the schedule, from its arguments.
_FUNCTIONS: dict[str, tuple[str, Callable[[list[float], int], float]]] = {
    "cosine_decay": ("cosine", lambda a, k: _cosine(a, k)),
    "linear_schedule": ("linear", lambda a, k: a[0] + min(k, a[2]) * (a[1] - a[0]) / max(a[2], 1)),
    "exponential_decay": ("cosine", lambda a, k: a[0] * a[1] ** k),
    "step_decay": ("linear", lambda a, k: a[0] * a[1] ** (k // max(a[2], 1))),
}
_ARGUMENTS = {"cosine_decay": 2, "linear_schedule": 3, "exponential_decay": 2, "step_decay": 3}


def _cosine(arguments: list[float], step: int) -> float:
    start, steps, end = (*arguments, 0.0)[:3]
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / max(steps, 1)))


def _schedule(draft: Draft, stage: str, name: str, arguments: list[float], schedule: dict[str, Any]) -> None:
    if name not in _FUNCTIONS or len(arguments) < _ARGUMENTS[name] or arguments[0] <= 0:
        known = ", ".join(_FUNCTIONS)
        draft.refuse(say("import-wants-choice", key="lr_schedule.name", value=shown(name), known=known))
        return
    ours, theirs = _FUNCTIONS[name]
    warmup = int(_number(draft, "lr_schedule.warmup", schedule.get("warmup") or 0))
    peak, rises = arguments[0], warmup + 1 if warmup else 0
    said = f"lr_schedule.arguments: {shown(schedule.get('arguments'))}"
    draft.put(f"{stage}.learning_rate", peak, "lr_schedule", note=say("import-peak"), words=said)
    draft.put(f"{stage}.lr_scheduler", ours, "lr_schedule", words=f"lr_schedule.name: {name}")
    note = say("import-warmup-mlx") if warmup else ""
    draft.put(f"{stage}.warmup_steps", rises, "lr_schedule", note=note, words=f"lr_schedule.warmup: {warmup}")
    total = draft.values.get(f"{stage}.max_steps")
    if total is None or total > _LONGEST:
        draft.remark(say("import-schedule", theirs=name, ours=ours))
        return
    gap = max(
        (
            abs(theirs(arguments, k - rises) - learning_rate(k, total, peak=peak, kind=ours, warmup=rises))
            for k in range(rises, total)
        ),
        default=0.0,
    )
    if gap > _TELLING * peak:
        last = theirs(arguments, max(total - 1 - rises, 0))
        draft.remark(say("import-rates", share=100 * gap / peak, last=f"{last:g}", kind=ours))


def _optimizer(draft: Draft, stage: str) -> None:
    name = (draft.text("optimizer") or "adam").lower()
    own = draft.section("optimizer_config").get(name)
    config = own if isinstance(own, dict) else {}
    if name not in ("adam", "adamw"):
        draft.note("optimizer", say("import-optimizer", theirs=shown(name)), "differs")
    elif not config.get("bias_correction"):
        draft.note("optimizer", say("import-bias-correction"), "differs")
    if name == "adamw":
        decay = _number(draft, "optimizer_config.adamw.weight_decay", config.get("weight_decay", 0.01))
        draft.put(f"{stage}.weight_decay", decay, "optimizer")
    betas = config.get("betas")
    if isinstance(betas, list) and len(betas) == 2:
        for key, beta in zip(("adam_beta1", "adam_beta2"), betas, strict=True):
            draft.put(f"{stage}.{key}", _number(draft, "optimizer_config.betas", beta), "optimizer_config")
    draft.values[f"{stage}.max_grad_norm"] = None
    draft.comments[f"{stage}.max_grad_norm"] = say("import-no-clipping")


def _preferences(draft: Draft, mode: str) -> None:
    loss = "orpo" if mode == "orpo" else draft.choice("dpo_cpo_loss_type", _LOSSES) or "sigmoid"
    draft.put("dpo.loss", loss, "train_mode" if mode == "orpo" else "dpo_cpo_loss_type")
    draft.put("dpo.beta", draft.number("beta", 0) or 0.1, "beta")
    draft.use("dpo_cpo_loss_type", "delta", "reward_scaling")
    if draft.given("resume_adapter_file"):
        file = draft.text("resume_adapter_file") or ""
        folder = str(Path(file).parent) if Path(file).suffix else file
        draft.put("dpo.start", existing(draft, folder) or folder, "resume_adapter_file")
        if loss != "orpo":
            draft.put("dpo.reference", "base", "reference_model_path", note=say("import-reference-base"))
    other = draft.text("reference_model_path")
    if other is not None and other != draft.text("model") and loss != "orpo":
        draft.refuse(say("import-reference", model=shown(other)))
    if loss in ("ipo", "orpo"):
        draft.remark(say("import-whole-means", loss=loss))
