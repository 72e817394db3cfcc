"""What LLaMA-Factory, TRL and Unsloth share: the settings of transformers' Trainer.

A step there takes per_device_train_batch_size × gradient_accumulation_steps × devices rows, the last step of an epoch
the rows that remain. Steps: ceil(epochs × ceil(rows / rows of a step)), or max_steps. Warm-up: warmup_steps, or
where that is below 1, this share of the steps; else ceil(warmup_ratio × steps).
"""

from __future__ import annotations

from mlx_zh.bridges.draft import Draft, Level
from mlx_zh.language.reader import say

# Their schedules -> ours; those that ours only resembles, with the reason's code.
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_RESEMBLED = {
    "cosine_with_restarts": "cosine",
    "polynomial": "linear",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "inverse_sqrt": "linear",
    "reduce_lr_on_plateau": "constant",
    "warmup_stable_decay": "constant",
}
# Names of AdamW in other kernels or with rounded moments.
_ADAMW = {
    *("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw"),
    *(
        "adamw_apex_fused",
        "adamw_anyprecision",
        "adamw_torch_4bit",
        "adamw_torch_8bit",
        "adamw_8bit",
        "adamw_bnb_8bit",
    ),
    *("paged_adamw", "paged_adamw_8bit", "paged_adamw_32bit"),
}
TRACKERS = ("tensorboard", "swanlab", "wandb")


def convert_training(draft: Draft, stage: str) -> None:
    """Batch, steps, schedule, optimizer, validation, checkpoints and trackers, for a stage (sft or dpo)."""
    batch_size(draft, stage)
    _length_of_run(draft, stage)
    _rates(draft, stage)
    _optimizer(draft, stage)
    _validation(draft, stage)
    _checkpoints(draft)
    trackers(draft)
    seed(draft)


def batch_size(draft: Draft, stage: str) -> None:
    """The rows of an optimizer step."""
    rows = draft.whole("per_device_train_batch_size", 1) or 1
    steps = draft.whole("gradient_accumulation_steps", 1) or 1
    devices = draft.settings.devices or 1
    said = say("import-batch", rows=rows, steps=steps, devices=devices)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    draft.batch(f"{stage}.batch_size", rows * steps * devices, names, said)
    named = any(draft.given(name) and draft.raw(name) for name in ("deepspeed", "fsdp", "ray_num_workers"))
    several = named or draft.settings.several
    if draft.settings.devices is None and several:
        draft.remark(say("import-devices", devices=1))


def _length_of_run(draft: Draft, stage: str) -> None:
    steps = draft.whole("max_steps", -1)
    if steps is not None and steps > 0:
        draft.put(f"{stage}.max_steps", steps, "max_steps")
        if draft.given("num_train_epochs"):
            draft.note("num_train_epochs", say("import-max-steps-first"))
        draft.use("num_train_epochs")
        return
    draft.use("max_steps")
    epochs = draft.number("num_train_epochs", 0)
    draft.put(f"{stage}.epochs", plain(epochs or 3.0), "num_train_epochs")


def _rates(draft: Draft, stage: str) -> None:
    rate = draft.number("learning_rate", 0)
    if not rate:
        draft.refuse(say("import-no-rate", key="learning_rate"))
    draft.put(f"{stage}.learning_rate", rate, "learning_rate")
    _schedule(draft, stage)


def _schedule(draft: Draft, stage: str) -> None:
    theirs = (draft.text("lr_scheduler_type") or "linear").lower().removeprefix("schedulertype.")
    further = draft.section("lr_scheduler_kwargs")
    if theirs in _SCHEDULES:
        draft.put(f"{stage}.lr_scheduler", _SCHEDULES[theirs], "lr_scheduler_type")
    elif theirs in _RESEMBLED:
        single = theirs == "cosine_with_restarts" and further.get("num_cycles", 1) == 1
        near = theirs == "polynomial" and further.get("power", 1) == 1 and further.get("lr_end", 1e-7) <= 1e-7
        same = single or near
        note = "" if same else say("import-schedule", theirs=theirs, ours=_RESEMBLED[theirs])
        level: Level = "mapped" if same else "differs"
        draft.put(f"{stage}.lr_scheduler", _RESEMBLED[theirs], "lr_scheduler_type", note=note, level=level)
    else:
        known = ", ".join((*_SCHEDULES, *_RESEMBLED))
        draft.refuse(say("import-wants-choice", key="lr_scheduler_type", value=theirs, known=known))
    if theirs == "constant":
        draft.put(f"{stage}.warmup_steps", 0, "lr_scheduler_type", note=say("import-constant"))
        draft.use("warmup_steps", "warmup_ratio")
        return
    _warmup(draft, stage)


def _warmup(draft: Draft, stage: str) -> None:
    steps = draft.number("warmup_steps", 0) or 0.0
    ratio = draft.number("warmup_ratio", 0) or 0.0
    if steps >= 1:
        if steps != int(steps):
            draft.refuse(say("import-wants-whole", key="warmup_steps", value=f"{steps:g}", least=0))
        draft.put(f"{stage}.warmup_steps", int(min(steps, 2**31)), "warmup_steps", note=say("import-warmup"))
        draft.use("warmup_ratio")
    elif steps > 0 or ratio > 0:
        name = "warmup_steps" if steps > 0 else "warmup_ratio"
        draft.put(f"{stage}.warmup_ratio", steps or ratio, name, note=say("import-warmup"))
        draft.use("warmup_steps", "warmup_ratio")
    else:
        draft.put(f"{stage}.warmup_ratio", 0.0, "warmup_ratio")
        draft.use("warmup_steps")


def _optimizer(draft: Draft, stage: str) -> None:
    optimizer = draft.text("optim")
    if optimizer is not None and optimizer.lower() not in _ADAMW:
        draft.note("optim", say("import-optimizer", theirs=optimizer), "differs")
    elif optimizer is not None and draft.given("optim"):
        draft.note("optim", say("import-adamw"))
    decay = draft.number("weight_decay", 0) or 0.0
    if decay or draft.given("weight_decay"):
        draft.put(f"{stage}.weight_decay", decay, "weight_decay")
    for name, default in (("adam_beta1", 0.9), ("adam_beta2", 0.999)):
        value = draft.number(name, 0)
        if value is not None and (value != default or draft.given(name)):
            draft.put(f"{stage}.{name}", value, name)
    norm = draft.number("max_grad_norm", 0)
    if norm is not None and (norm != 1.0 or draft.given("max_grad_norm")):
        draft.put(f"{stage}.max_grad_norm", norm or None, "max_grad_norm")
    noise = draft.number("neftune_noise_alpha", 0)
    if noise:
        draft.put(f"{stage}.neftune_alpha", noise, "neftune_noise_alpha")


def _validation(draft: Draft, stage: str) -> None:
    name = next((n for n in ("eval_strategy", "evaluation_strategy") if draft.given(n)), "eval_strategy")
    strategy = str(draft.raw(name) or "no").lower()
    draft.use("eval_strategy", "evaluation_strategy")
    every = draft.number("eval_steps", 0)
    if strategy == "steps" or (strategy in ("no", "none", "false") and every and draft.given("eval_steps")):
        every = every or draft.number("logging_steps", 0) or 500
        _every(draft, every, stage)
    elif strategy == "epoch":
        draft.note(name, say("import-eval-epoch", stage=stage), "none")
    elif draft.given(name):
        draft.note(name, say("import-validation"))
    draft.use("eval_steps")
    if draft.switch("load_best_model_at_end"):
        draft.put(f"{stage}.load_best", True, "load_best_model_at_end")
    for patience in ("early_stopping_steps", "early_stopping_patience"):
        if (value := draft.whole(patience, 0)) is not None and value > 0:
            draft.put(f"{stage}.early_stopping", value, patience)


def _every(draft: Draft, every: float, stage: str) -> None:
    total = draft.values.get(f"{stage}.max_steps")
    if every >= 1:
        draft.put(f"{stage}.eval_steps", round(every), "eval_steps")
    elif total:
        draft.put(f"{stage}.eval_steps", max(round(every * total), 1), "eval_steps")
    else:
        draft.note("eval_steps", say("import-eval-share", stage=stage))


def _checkpoints(draft: Draft) -> None:
    every = draft.number("save_steps", 0)
    if draft.given("save_steps") and every is not None and every >= 1:
        draft.put("checkpoint.every_steps", round(every), "save_steps")
    elif draft.given("save_steps") or draft.given("save_strategy"):
        draft.note("save_steps" if draft.given("save_steps") else "save_strategy", say("import-saving"))
    draft.use("save_strategy", "save_steps")
    keep = draft.whole("save_total_limit", 0)
    if keep:
        draft.put("checkpoint.keep", keep, "save_total_limit")


def trackers(draft: Draft) -> None:
    """Which trackers are used."""
    named = [name.lower() for name in draft.names("report_to")]
    known = [name for name in dict.fromkeys(named) if name in TRACKERS]
    if draft.switch("use_swanlab") and "swanlab" not in known:
        known.append("swanlab")
        draft.use("use_swanlab")
    if known:
        draft.put("track", known, "report_to" if draft.given("report_to") else "use_swanlab")
    others = [name for name in named if name not in (*TRACKERS, "none", "all")]
    if others:
        draft.note("report_to", say("import-trackers", names=", ".join(others), known=", ".join(TRACKERS)))
    elif draft.given("report_to") and not known:
        draft.note("report_to", say("import-off"))


def seed(draft: Draft) -> None:
    """The seed, within the range that a recipe takes."""
    value = draft.whole("seed", 0)
    if value is not None and (draft.given("seed") or value != 42):
        draft.put("seed", value % 2**31, "seed", note=say("import-seed"))


def plain(number: float) -> float | int:
    """A whole number without its point."""
    return int(number) if number == int(number) else number
