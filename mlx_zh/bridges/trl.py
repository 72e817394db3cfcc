"""TRL: SFTConfig, DPOConfig, KTOConfig, ModelConfig and ScriptArguments, and Unsloth's scripts, which set the same.

Their DPO and KTO compare with the model without its adapter, and turn dropout off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_zh.bridges import base_models
from mlx_zh.bridges.adapters import put_targets
from mlx_zh.bridges.datasets import Entry, source_of
from mlx_zh.bridges.draft import Draft, shown
from mlx_zh.bridges.training_arguments import convert_training, plain
from mlx_zh.language.reader import say

_LOSSES = {
    name: name
    for name in (
        *("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero"),
        *("apo_down", "discopop", "sigmoid_norm", "aot"),
    )
} | {"aot_pair": "aot"}
_UNPAIRED = {"kto": "kto", "apo_zero_unpaired": "apo_zero_unpaired"}
_KTO = ("desirable_weight", "undesirable_weight")
_DPO = (
    "beta",
    "loss_weights",
    "f_divergence_type",
    "rpo_alpha",
    "ld_alpha",
    "precompute_ref_log_probs",
    "label_smoothing",
)


def trainer_of(draft: Draft) -> str:
    """sft, dpo, kto or orpo: what the command says, else what only one of them has."""
    named = draft.text("trainer")
    if named is not None:
        return named.lower()
    losses = draft.names("loss_type")
    if any(draft.given(name) for name in _KTO) or any(loss in _UNPAIRED for loss in losses):
        return "kto"
    return "dpo" if any(draft.given(name) for name in _DPO) or any(loss in _LOSSES for loss in losses) else "sft"


def convert(draft: Draft, model: str | None) -> str:
    """Fill the draft; the stage (sft or dpo) that it is for."""
    trainer = trainer_of(draft)
    if trainer not in ("sft", "dpo", "kto", "orpo"):
        draft.refuse(say("import-trainer", file=draft.settings.path, trainer=shown(trainer)))
        return "sft"
    stage = "sft" if trainer == "sft" else "dpo"
    scripted = draft.settings.scripted
    whole = _is_whole(draft, scripted)
    name = "model_name" if scripted and not draft.given("model_name_or_path") else "model_name_or_path"
    base_models.convert_model(draft, name, _bits(draft), whole=whole, proposed=model)
    if draft.given("model_revision") and draft.text("model_revision") != "main":
        draft.put("model.revision", draft.text("model_revision"), "model_revision")
    draft.use("model_revision")
    _adapter(draft, stage, whole, scripted)
    if scripted:
        _script_data(draft, stage)
    else:
        _data(draft, stage)
    _length(draft, scripted)
    _packing(draft, stage)
    convert_training(draft, stage)
    if stage == "dpo":
        _preferences(draft, trainer)
    else:
        _sft_loss(draft)
    _rest(draft, scripted)
    return stage


def _is_whole(draft: Draft, scripted: bool) -> bool:
    if scripted:
        return draft.switch("full_finetuning") or "lora" not in draft.settings.calls
    return not draft.switch("use_peft")


def _bits(draft: Draft) -> int | None:
    four, eight = draft.switch("load_in_4bit"), draft.switch("load_in_8bit")
    return 8 if eight else 4 if four else None


def _adapter(draft: Draft, stage: str, whole: bool, scripted: bool) -> None:
    rank_name = "r" if scripted else "lora_r"
    if whole:
        draft.put("lora.type", "full", "full_finetuning" if scripted else "use_peft")
        draft.use("lora_r", "r", "lora_alpha", "lora_dropout", "lora_target_modules", "target_modules", "use_dora")
        draft.use("use_rslora")
        return
    draft.use("use_peft", "full_finetuning")
    rank = draft.whole(rank_name, 1) or 16
    draft.put("lora.type", "dora" if draft.switch("use_dora") else "lora", "use_dora")
    draft.put("lora.rank", rank, rank_name)
    draft.put("lora.alpha", plain(draft.number("lora_alpha", 0) or 2.0 * rank), "lora_alpha")
    dropout = draft.number("lora_dropout", 0) or 0.0
    off = stage == "dpo" and (draft.raw("disable_dropout") is None or draft.switch("disable_dropout"))
    draft.use("disable_dropout")
    if off and dropout:
        draft.note("lora_dropout", say("import-no-dropout", program="TRL"))
    elif stage == "dpo" and dropout:
        draft.note("lora_dropout", say("import-dropout-dpo"), "differs")
    else:
        draft.put("lora.dropout", dropout, "lora_dropout")
    _targets(draft, scripted)
    if draft.switch("use_rslora"):
        draft.put("lora.rslora", True, "use_rslora")
    _layers(draft)


def _targets(draft: Draft, scripted: bool) -> None:
    name = "target_modules" if scripted else "lora_target_modules"
    targets = draft.names(name)
    if targets:
        put_targets(draft, name, [target for target in targets if target not in ("embed_tokens", "lm_head")] or ["?"])
    elif draft.settings.program == "unsloth":
        put_targets(draft, name, [])
    else:
        draft.put("lora.targets", ["q_proj", "v_proj"], name, note=say("import-peft-targets"))
    saved = draft.names("lora_modules_to_save") + draft.names("modules_to_save")
    saved += [target for target in targets if target in ("embed_tokens", "lm_head")]
    known = [name for name in dict.fromkeys(saved) if name in ("embed_tokens", "lm_head")]
    if known:
        draft.put("lora.modules_to_save", known, "modules_to_save" if scripted else "lora_modules_to_save")
    if tables := [target for target in known if target in targets]:
        draft.note(name, say("import-table-targets", names=", ".join(tables)), "differs")
    if set(saved) - set(known):
        others = ", ".join(sorted(set(saved) - set(known)))
        key = "modules_to_save" if draft.given("modules_to_save") else "lora_modules_to_save"
        draft.note(key, say("import-modules", names=shown(others)), "differs")


def _layers(draft: Draft) -> None:
    layers = draft.raw("layers_to_transform")
    if layers is None:
        return
    draft.note("layers_to_transform", say("import-some-layers"), "differs")


# Data -------------------------------------------------------------------------------------------------------


def _data(draft: Draft, stage: str) -> None:
    sets = draft.raw("datasets")
    sources: list[Entry] = []
    subset = draft.text("dataset_config")
    name = draft.text("dataset_name")
    split = draft.text("dataset_train_split")
    if isinstance(sets, list) and sets:
        for part in sets:
            sources += _mixed(draft, stage, part)
        draft.put(f"data.{stage}.train", sources, "datasets")
    elif name is not None:
        source = source_of(draft, name, stage, split=split, subset=subset)
        sources = [source] if source else []
        draft.put(f"data.{stage}.train", sources, "dataset_name")
        if str(draft.raw("eval_strategy") or "no").lower() not in ("no", "none", "false") and source:
            held = draft.text("dataset_test_split") or "test"
            draft.put(f"data.{stage}.validation", [{**source, "split": held}], "dataset_test_split")
            if "path" in source:
                del draft.values[f"data.{stage}.validation"]
                draft.remark(say("import-test-split", split=held))
    else:
        draft.refuse(say("import-no-dataset", key="dataset_name"))
    draft.use("dataset_test_split", "dataset_streaming", "streaming", "ignore_bias_buffers")
    _share(draft)
    if stage == "sft":
        _train_on(draft, sources)


def _mixed(draft: Draft, stage: str, part: Any) -> list[Entry]:
    if not isinstance(part, Mapping) or not isinstance(part.get("path"), str):
        draft.refuse(say("import-wants-section", key="datasets", value=shown(part)))
        return []
    if part.get("fraction") is not None:
        draft.remark(say("import-fraction", name=shown(part["path"])))
    source = source_of(
        draft,
        str(part["path"]),
        stage,
        split=str(part.get("split") or "train"),
        subset=part["name"] if isinstance(part.get("name"), str) else None,
        files=part.get("data_files"),
    )
    return [source] if source else []


def _share(draft: Draft, name: str = "test_split_size") -> None:
    share = draft.number(name, 0) or 0.0
    if share >= 1:
        draft.note(name, say("import-val-rows", rows=f"{share:g}"), "differs")
    elif share > 0.5:
        draft.refuse(say("import-val-share", key=name, share=f"{share:g}"))
    elif share:
        draft.put("data.validation_fraction", share, name, note=say("import-val"))


def _own_text(draft: Draft) -> None:
    """Tell a script that writes its prompts itself, in place of a chat template."""
    calls = draft.settings.calls
    if draft.given("dataset_text_field") and not {"rendered", "template"} & calls.keys():
        draft.remark(say("import-own-text", column=shown(draft.raw("dataset_text_field"))))


def _train_on(draft: Draft, sources: list[Entry]) -> None:
    """Which tokens are learned: by default all of messages, and only the completion of prompt-completion rows."""
    if draft.switch("assistant_only_loss"):
        draft.put("data.train_on", "assistant", "assistant_only_loss")
    elif draft.given("completion_only_loss"):
        only = draft.switch("completion_only_loss")
        draft.put("data.train_on", "assistant" if only else "all", "completion_only_loss")
    elif (completions := _are_completions(draft, sources)) is not None:
        draft.put("data.train_on", "assistant" if completions else "all", "completion_only_loss")
    else:
        draft.put("data.train_on", "all", "completion_only_loss", note=say("import-train-on"), level="differs")
    draft.use("assistant_only_loss", "completion_only_loss")


def _are_completions(draft: Draft, sources: list[Entry]) -> bool | None:
    """Whether the first file's rows have a prompt and a completion; None if that cannot be told."""
    path = next((source["path"] for source in sources if "path" in source), None)
    if path is None:
        return None
    try:
        with open(Path(draft.target_folder, path), "rb") as file:
            head = file.read(1 << 16)
    except (OSError, ValueError):
        return None
    if b'"messages"' in head or b'"conversations"' in head or b'"text"' in head:
        return False
    return True if b'"completion"' in head else None


def _script_data(draft: Draft, stage: str) -> None:
    sets = [part for part in draft.settings.calls.get("data", {}).get("sets", []) if part.get("path")]
    if not sets:
        draft.refuse(say("import-no-load"))
    sources = []
    for part in sets[:1]:
        split = part.get("split") if isinstance(part.get("split"), str) else None
        subset = part.get("name") if isinstance(part.get("name"), str) else None
        source = source_of(draft, str(part["path"]), stage, split=split, subset=subset, files=part.get("data_files"))
        sources += [source] if source else []
    if isinstance(most := draft.settings.calls.get("data", {}).get("selected"), int):
        for source in sources:
            source["max_samples"] = min(most, source.get("max_samples", most))
    _share(draft, "test_size")
    _own_text(draft)
    if len(sets) > 1:
        draft.remark(say("import-several-sets", sets=shown([part["path"] for part in sets[1:]])))
    draft.put(f"data.{stage}.train", sources, "load_dataset")
    if stage == "sft":
        answers = "responses" in draft.settings.calls
        note = say("import-responses" if answers else "import-whole-text")
        draft.put("data.train_on", "assistant" if answers else "all", "train_on_responses_only", note=note)


def _length(draft: Draft, scripted: bool) -> None:
    order = ("max_seq_length", "max_length") if scripted else ("max_length", "max_seq_length")
    name = next((name for name in order if draft.given(name)), order[0])
    draft.put("data.max_length", draft.whole(name, 1) or 1024, name)
    draft.use(*order)
    for other in ("max_prompt_length", "max_completion_length"):
        if draft.given(other):
            draft.note(other, say("import-prompt-length"))


def _packing(draft: Draft, stage: str) -> None:
    if draft.switch("packing") and stage == "sft":
        draft.note("packing", say("import-packing", length=draft.values["data.max_length"]), "differs")
    elif draft.given("packing"):
        draft.note("packing", say("import-not-packed"))


# Losses -----------------------------------------------------------------------------------------------------


def _sft_loss(draft: Draft) -> None:
    loss = str(draft.raw("loss_type") or "nll").lower()
    if loss not in ("nll", "chunked_nll"):
        draft.refuse(say("import-sft-loss", loss=shown(loss)))


def _preferences(draft: Draft, trainer: str) -> None:
    loss = _loss(draft, trainer)
    draft.put("dpo.beta", draft.number("beta", 0) or 0.1, "beta")
    for name, ours, losses in _FURTHER:
        value = draft.number(name, 0)
        if value is not None and loss in losses and (draft.given(name) or name not in draft.defaults):
            draft.put(f"dpo.{ours}", value, name)
        elif draft.given(name) and value:
            draft.note(name, say("import-ftx-unused", loss=loss))
    if (divergence := draft.text("f_divergence_type")) and draft.given("f_divergence_type"):
        kind = divergence.lower().removeprefix("fdivergencetype.").replace("js_divergence", "js")
        kind = kind.replace("alpha_divergence", "alpha")
        draft.put("dpo.f_divergence", kind, "f_divergence_type")
        if kind == "alpha":
            draft.put("dpo.f_alpha", draft.number("f_alpha_divergence_coef") or 0.5, "f_alpha_divergence_coef")
    draft.use("f_divergence_type", "f_alpha_divergence_coef", "rpo_alpha", "loss_weights")
    for name in ("ref_model", "reference_free"):
        if draft.given(name) and draft.raw(name):
            draft.refuse(say("import-reference", model=shown(draft.raw(name))))


_ALL = tuple(dict.fromkeys((*_LOSSES.values(), "orpo")))
_FURTHER = (
    ("label_smoothing", "label_smoothing", ("sigmoid", "robust", "exo_pair", "aot")),
    ("ld_alpha", "ld_alpha", _ALL),
    ("discopop_tau", "discopop_tau", ("discopop",)),
    ("desirable_weight", "desirable_weight", tuple(_UNPAIRED)),
    ("undesirable_weight", "undesirable_weight", tuple(_UNPAIRED)),
)


def _loss(draft: Draft, trainer: str) -> str:
    named = [name.lower() for name in draft.names("loss_type")]
    if trainer == "orpo":
        draft.put("dpo.loss", "orpo", "trainer")
        draft.remark(say("import-whole-means", loss="orpo"))
        return "orpo"
    known = _UNPAIRED if trainer == "kto" else {**_LOSSES, "sft": "sft"}
    for name in named:
        if name not in known:
            draft.refuse(say("import-wants-choice", key="loss_type", value=shown(name), known=", ".join(known)))
    weights = [_weight(draft, value) for value in draft.names("loss_weights")] or [1.0] * len(named)
    shares = dict(zip(named, weights, strict=False))
    own = [name for name in named if name != "sft"]
    if len(own) > 1:
        draft.refuse(say("import-several-losses", losses=", ".join(own)))
    loss = known.get(own[0], "sigmoid") if own else "kto" if trainer == "kto" else "sigmoid"
    draft.put("dpo.loss", loss, "loss_type")
    weight = draft.number("rpo_alpha", 0)
    if "sft" in shares and own and shares.get(own[0]):
        draft.put("dpo.sft_weight", shares["sft"] / shares[own[0]], "loss_weights")
        if shares[own[0]] != 1:
            draft.remark(say("import-loss-scale", weight=f"{shares[own[0]]:g}"))
    elif weight:
        draft.put("dpo.sft_weight", weight, "rpo_alpha")
    return loss


def _weight(draft: Draft, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < 1e9:
        draft.refuse(say("import-wants-number", key="loss_weights", value=shown(text)))
        return 1.0
    return weight


def _rest(draft: Draft, scripted: bool) -> None:
    name = "use_gradient_checkpointing" if scripted else "gradient_checkpointing"
    if str(draft.raw(name)).lower() in ("true", "unsloth"):
        draft.put("memory.checkpoint_layers", True, name, note=say("import-checkpoint"))
    draft.use(
        "gradient_checkpointing", "use_gradient_checkpointing", "output_dir", "run_name", "trainer", "random_state"
    )
    for precision in ("bf16", "fp16", "dtype", "torch_dtype", "model_dtype"):
        if draft.given(precision):
            draft.note(precision, say("import-precision"))
    if draft.given("resume_from_checkpoint"):
        draft.note("resume_from_checkpoint", say("import-resume"))
    draft.use("plain_arguments", "peft_config", "model_init_kwargs")
    if scripted and "template" in draft.settings.calls:
        draft.remark(say("import-template-call"))
