"""LLaMA-Factory: the settings of `llamafactory-cli train`, from YAML, JSON or a command line."""

from __future__ import annotations

from typing import Any

from mlx_zh.bridges import base_models
from mlx_zh.bridges.adapters import put_targets
from mlx_zh.bridges.datasets import Entry, existing, llama_factory_sources
from mlx_zh.bridges.draft import Draft, is_off, shown
from mlx_zh.bridges.training_arguments import convert_training, plain
from mlx_zh.language.reader import say

_STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "dpo"}
_LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
_WITHOUT_REFERENCE = ("orpo", "simpo")
# Its templates that read enable_thinking. Only Qwen3's own chat template has this switch, too.
_REASONING = ("mimo", "seed_oss", "glmz1", "deepseekr1")
_SWITCHED = "qwen3"
# Settings of one stage or of one way of tuning; a file may keep them when it is changed to another.
_OF_OTHERS = (
    *("pref_beta", "pref_ftx", "pref_loss", "dpo_label_smoothing", "kto_chosen_weight", "kto_rejected_weight"),
    *("simpo_gamma", "ld_alpha", "ref_model", "ref_model_adapters", "ref_model_quantization_bit", "dpo_beta"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora", "use_dora"),
    *("loraplus_lr_ratio", "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
    *("oft_rank", "oft_block_size", "oft_target", "module_dropout", "max_new_tokens", "temperature", "export_size"),
    *("export_device", "export_quantization_bit", "export_quantization_dataset", "export_quantization_nsamples"),
    *("export_quantization_maxlen", "export_legacy_format", "export_hub_model_id"),
)


def convert(draft: Draft, model: str | None) -> str:
    """Fill the draft; the stage (sft or dpo) that it is for."""
    kind = (draft.text("stage") or "sft").lower()
    if kind not in _STAGES:
        code = "import-stage" if kind in ("rm", "ppo") else "import-stage-unknown"
        draft.refuse(say(code, stage=shown(kind)))
        return "sft"
    draft.note("stage", say("import-stage-is", stage=_STAGES[kind]))
    if not _trains(draft):
        return _STAGES[kind]
    stage = _STAGES[kind]
    tuning = _tuning(draft, stage)
    base_models.convert_model(
        draft,
        "model_name_or_path",
        draft.whole("quantization_bit", 1),
        whole=tuning in ("full", "freeze"),
        proposed=model,
    )
    if draft.given("model_revision") and draft.text("model_revision") != "main":
        draft.put("model.revision", draft.text("model_revision"), "model_revision")
    _template(draft)
    _data(draft, stage, kind)
    convert_training(draft, stage)
    if stage == "dpo":
        _preferences(draft, kind)
    _memory(draft)
    draft.idle(*_OF_OTHERS)
    return stage


def _trains(draft: Draft) -> bool:
    """Whether the file is for training, and not for merging, chatting or predicting."""
    if draft.given("export_dir"):
        draft.refuse(say("import-is-export"))
        return False
    predicts = not is_off(draft.settings.values.get("do_predict"))
    prediction = predicts or draft.given("infer_backend") or draft.given("eval_dataset")
    if not draft.switch("do_train") and prediction and not draft.given("dataset"):
        draft.refuse(say("import-is-inference"))
        return False
    return True


def _tuning(draft: Draft, stage: str) -> str:
    tuning = (draft.text("finetuning_type") or "lora").lower()
    if tuning == "lora":
        _lora(draft, stage)
    elif tuning == "full":
        draft.put("lora.type", "full", "finetuning_type")
    elif tuning == "freeze":
        _freeze(draft)
    else:
        draft.refuse(say("import-tuning", tuning=shown(tuning)))
    return tuning


def _freeze(draft: Draft) -> None:
    draft.put("lora.type", "full", "finetuning_type")
    layers = draft.whole("freeze_trainable_layers", -(2**31)) or 0
    if layers > 0:
        draft.put("lora.num_layers", layers, "freeze_trainable_layers", note=say("import-top-layers"))
    else:
        draft.refuse(say("import-first-layers", layers=layers))
    if draft.names("freeze_trainable_modules") not in (["all"], []):
        draft.note("freeze_trainable_modules", say("import-freeze-modules"), "differs")
    if draft.names("freeze_extra_modules"):
        draft.note("freeze_extra_modules", say("import-freeze-extra"), "differs")


def _lora(draft: Draft, stage: str) -> None:
    rank = draft.whole("lora_rank", 1) or 8
    draft.put("lora.type", "dora" if draft.switch("use_dora") else "lora", "finetuning_type")
    draft.use("use_dora")
    draft.put("lora.rank", rank, "lora_rank")
    alpha = draft.number("lora_alpha", 0)
    if alpha:
        draft.put("lora.alpha", plain(alpha), "lora_alpha")
    else:
        draft.put("lora.alpha", 2 * rank, "lora_rank", note=say("import-alpha"))
        draft.use("lora_alpha")
    dropout = draft.number("lora_dropout", 0) or 0.0
    if stage == "dpo" and dropout:
        draft.note("lora_dropout", say("import-no-dropout", program="LLaMA-Factory"))
    else:
        draft.put("lora.dropout", dropout, "lora_dropout")
    put_targets(draft, "lora_target", draft.names("lora_target"))
    if draft.switch("use_rslora"):
        draft.put("lora.rslora", True, "use_rslora")
    if (ratio := draft.number("loraplus_lr_ratio", 0)) is not None and ratio > 0:
        draft.put("lora.loraplus_ratio", ratio, "loraplus_lr_ratio")
    draft.use("loraplus_lr_embedding")
    _saved_modules(draft)


def _saved_modules(draft: Draft) -> None:
    names = draft.names("additional_target")
    known = [name for name in dict.fromkeys(names) if name in ("embed_tokens", "lm_head")]
    if known:
        draft.put("lora.modules_to_save", known, "additional_target")
    if set(names) - set(known):
        others = ", ".join(name for name in names if name not in known)
        draft.note("additional_target", say("import-modules", names=shown(others)), "differs")


def _template(draft: Draft) -> None:
    template = draft.text("template")
    if template is not None:
        model = draft.text("model_name_or_path") or ""
        if not base_models.template_known(template):
            draft.note("template", say("import-template-other", template=template), "differs")
        elif not base_models.template_fits(template, model):
            draft.note("template", say("import-template-wrong", template=template, model=model), "differs")
        else:
            draft.note("template", say("import-template", template=template))
    if draft.given("enable_thinking") and not draft.switch("enable_thinking"):
        if template == _SWITCHED:
            draft.put("model.thinking", "off", "enable_thinking")
        elif template in _REASONING:
            draft.note("enable_thinking", say("import-thinking-written"), "differs")
        else:  # its other templates do not read it, and a model without this switch refuses model.thinking
            draft.note("enable_thinking", say("import-no-thinking", template=template or "–"))
    elif draft.given("enable_thinking"):
        draft.note("enable_thinking", say("import-thinking"))
    if (system := draft.text("default_system")) is not None:
        draft.put("data.system", system, "default_system")


# Data -------------------------------------------------------------------------------------------------------


def _data(draft: Draft, stage: str, kind: str) -> None:
    names = draft.names("dataset")
    sources = llama_factory_sources(draft, names, kind)
    draft.use("dataset_dir", "streaming")
    if not names:
        draft.refuse(say("import-no-dataset", key="dataset"))
    _limits(draft, sources)
    _mixing(draft, sources)
    draft.put(f"data.{stage}.train", sources, "dataset")
    validation = draft.names("eval_dataset")
    if validation:
        draft.put(f"data.{stage}.validation", llama_factory_sources(draft, validation, kind), "eval_dataset")
    _validation_share(draft)
    draft.put("data.max_length", draft.whole("cutoff_len", 1) or 2048, "cutoff_len")
    _packing(draft, stage, kind)
    if kind == "pt":
        if draft.given("train_on_prompt"):
            draft.note("train_on_prompt", say("import-raw-text"))
    elif draft.switch("train_on_prompt"):
        draft.put("data.train_on", "all", "train_on_prompt")
    elif draft.switch("mask_history"):
        draft.put("data.train_on", "last", "mask_history")
    draft.use("train_on_prompt", "mask_history")


def _limits(draft: Draft, sources: list[Entry]) -> None:
    most = draft.whole("max_samples", 1)
    if most is None:
        return
    for source in sources:
        source["max_samples"] = min(most, source.get("max_samples", most))
    draft.note("max_samples", say("import-max-samples"))


def _mixing(draft: Draft, sources: list[Entry]) -> None:
    strategy = (draft.text("mix_strategy") or "concat").lower()
    if strategy == "concat":
        draft.use("interleave_probs")
        return
    if strategy not in ("interleave_under", "interleave_over", "interleave_once"):
        draft.refuse(say("import-wants-choice", key="mix_strategy", value=shown(strategy), known=_STRATEGIES))
        return
    level: Any = "mapped" if strategy == "interleave_under" else "differs"
    draft.put("data.mixing", "interleave", "mix_strategy", note=say("import-interleave"), level=level)
    shares = [_share(draft, text) for text in draft.names("interleave_probs")]
    if shares and len(shares) != len(sources):
        draft.refuse(say("import-shares", shares=len(shares), sets=len(sources)))
    for source, share in zip(sources, shares, strict=False):
        source["weight"] = share


_STRATEGIES = "concat, interleave_under, interleave_over, interleave_once"


def _share(draft: Draft, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1e9:
        draft.refuse(say("import-wants-number", key="interleave_probs", value=shown(text)))
        return 1.0
    return share


def _validation_share(draft: Draft) -> None:
    share = draft.number("val_size", 0) or 0.0
    if share >= 1:
        draft.note("val_size", say("import-val-rows", rows=f"{share:g}"), "differs")
    elif share > 0.5:
        draft.refuse(say("import-val-share", key="val_size", share=f"{share:g}"))
    elif share > 0:
        draft.put("data.validation_fraction", share, "val_size", note=say("import-val"))


def _packing(draft: Draft, stage: str, kind: str) -> None:
    packed = draft.switch("neat_packing") or draft.switch("packing") or (kind == "pt" and not draft.given("packing"))
    name = "neat_packing" if draft.given("neat_packing") else "packing"
    if packed and stage == "sft":
        length = draft.values["data.max_length"]
        draft.note(name, say("import-packing", length=length), "differs")
    draft.use("packing", "neat_packing")
    if not packed and (draft.given("packing") or draft.given("neat_packing")):
        draft.note(name, say("import-not-packed"))


# Preferences ------------------------------------------------------------------------------------------------


def _preferences(draft: Draft, kind: str) -> None:
    draft.put("dpo.beta", draft.number("pref_beta", 0) or 0.1, "pref_beta")
    loss = "kto" if kind == "kto" else draft.choice("pref_loss", _LOSSES) or "sigmoid"
    draft.put("dpo.loss", loss, "stage" if kind == "kto" else "pref_loss")
    draft.use("pref_loss")
    if weight := draft.number("pref_ftx", 0):
        if loss in _WITHOUT_REFERENCE:
            draft.note("pref_ftx", say("import-ftx-unused", loss=loss))
        else:
            draft.put("dpo.sft_weight", weight, "pref_ftx")
    if loss == "simpo":
        draft.put("dpo.simpo_gamma", draft.number("simpo_gamma", 0) or 0.0, "simpo_gamma")
    draft.use("simpo_gamma")
    if (smoothing := draft.number("dpo_label_smoothing", 0)) and loss == "sigmoid":
        draft.put("dpo.label_smoothing", smoothing, "dpo_label_smoothing")
    if loss == "kto":
        draft.put("dpo.desirable_weight", draft.number("kto_chosen_weight", 0), "kto_chosen_weight")
        draft.put("dpo.undesirable_weight", draft.number("kto_rejected_weight", 0), "kto_rejected_weight")
    draft.use("kto_chosen_weight", "kto_rejected_weight", "dpo_label_smoothing")
    if (alpha := draft.number("ld_alpha", 0)) is not None and kind == "dpo":
        draft.put("dpo.ld_alpha", alpha, "ld_alpha")
    _start(draft, "dpo")
    _reference(draft, loss)


def _start(draft: Draft, stage: str) -> None:
    adapters = draft.names("adapter_name_or_path")
    draft.use("adapter_name_or_path", "create_new_adapter")
    if not adapters:
        return
    if len(adapters) > 1:
        draft.refuse(say("import-adapters", count=len(adapters)))
    if draft.switch("create_new_adapter"):
        draft.note("create_new_adapter", say("import-new-adapter"), "differs")
    path = existing(draft, adapters[0])
    note = "" if path is not None else say("import-no-adapter", path=shown(adapters[0]))
    draft.put(f"{stage}.start", path or adapters[0], "adapter_name_or_path", note=note)


def _reference(draft: Draft, loss: str) -> None:
    draft.use("ref_model", "ref_model_adapters", "ref_model_quantization_bit")
    if loss in _WITHOUT_REFERENCE:
        return
    other = draft.text("ref_model")
    if other is not None and other != draft.text("model_name_or_path"):
        draft.refuse(say("import-reference", model=shown(other)))
    elif draft.given("adapter_name_or_path"):
        if draft.given("ref_model_adapters"):
            draft.put("dpo.reference", "start", "ref_model_adapters")
        elif not draft.switch("create_new_adapter"):
            draft.put("dpo.reference", "base", "adapter_name_or_path", note=say("import-reference-base"))


def _memory(draft: Draft) -> None:
    off = draft.switch("disable_gradient_checkpointing")
    if not off:
        draft.put("memory.checkpoint_layers", True, "disable_gradient_checkpointing", note=say("import-checkpoint"))
    if "sft.batch_size" in draft.values and draft.given("adapter_name_or_path"):
        _start(draft, "sft")
    for name in ("bf16", "fp16", "pure_bf16"):
        if draft.given(name):
            draft.note(name, say("import-precision"))
    for name in ("resume_from_checkpoint",):
        if draft.given(name):
            draft.note(name, say("import-resume"), "differs" if draft.text(name) not in ("true", None) else "none")
    draft.use("output_dir", "run_name", "bf16", "fp16", "pure_bf16", "resume_from_checkpoint")
