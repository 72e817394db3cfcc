"""Which program's project a file is, and its settings: YAML, JSON, shell scripts, Python scripts and notebooks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_zh.bridges import command_lines, launching
from mlx_zh.bridges.draft import TITLES, Program, Settings, is_off, shown
from mlx_zh.bridges.scripts import Script, code_of, read_script
from mlx_zh.bridges.text_files import read_text
from mlx_zh.errors import RecipeError
from mlx_zh.language.reader import say
from mlx_zh.recipe_text.document import parse_text
from mlx_zh.system.json_text import parse_json

# Settings that only one program has; the first program with one of them is meant.
_SIGNS: Sequence[tuple[Program, frozenset[str]]] = (
    (
        "llama-factory",
        frozenset(
            [
                "finetuning_type",
                "cutoff_len",
                "stage",
                "dataset_dir",
                "lora_target",
                "pref_beta",
                "pref_loss",
                "quantization_bit",
                "lora_rank",
                "preprocessing_num_workers",
                "template",
            ]
        ),
    ),
    (
        "mlx-lm-lora",
        frozenset(["train_mode", "train_type", "dpo_cpo_loss_type", "load_in_4bits", "reference_model_path"]),
    ),
    (
        "mlx-lm",
        frozenset(
            [
                "iters",
                "lora_parameters",
                "fine_tune_type",
                "grad_checkpoint",
                "mask_prompt",
                "num_layers",
                "lora_layers",
                "adapter_path",
                "steps_per_eval",
                "val_batches",
                "hf_dataset",
                "lr_schedule",
                "grad_accumulation_steps",
            ]
        ),
    ),
    (
        "trl",
        frozenset(
            [
                "use_peft",
                "lora_r",
                "dataset_name",
                "datasets",
                "dataset_train_split",
                "lora_target_modules",
                "assistant_only_loss",
                "completion_only_loss",
                "loss_type",
                "attn_implementation",
            ]
        ),
    ),
)
# Files of these programs that are no training: a setting of theirs, and the reason.
_OTHERS = (
    ({"compute_environment", "distributed_type"}, "import-is-accelerate"),
    ({"zero_optimization", "zero_allow_untested_optimizer"}, "import-is-deepspeed"),
    ({"kt_config"}, "import-is-accelerate"),
)
_TRAINERS = ("sft", "dpo", "kto")
_REFUSED_TRAINERS = (
    "grpo",
    "rloo",
    "reward",
    "ppo",
    "online_dpo",
    "cpo",
    "orpo",
    "gkd",
    "prm",
    "nash_md",
    "xpo",
    "bco",
)
_SCRIPT_KEYS = re.compile(r"--(?:stage|finetuning_type|model_name_or_path|per_device_train_batch_size|iters|train)\b")


def read_project(path: Path, program: Program | None = None) -> Settings:
    """The settings in a file. `program` overrides what its settings tell. Raises RecipeError."""
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".py":
        return _script(path, text)
    if suffix == ".ipynb":
        return _script(path, _code_of(path, text))
    if suffix in (".sh", ".bash", ".zsh", ".bat", ".cmd", ".ps1") or (
        suffix not in (".yaml", ".yml", ".json") and _SCRIPT_KEYS.search(text)
    ):
        return _shell(path, text, program)
    return _of(path, normal_keys(_values(path, text)), program)


def _values(path: Path, text: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises RecipeError."""
    if path.suffix.lower() == ".json":
        try:
            value = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(say("import-no-json", file=path, reason=str(error).splitlines()[0])) from None
    else:
        value = parse_text(text, path, "the settings of a training are a mapping of names and values").value
    if not isinstance(value, dict):
        raise RecipeError(say("import-no-settings", file=path))
    return value


def normal_keys(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings under their names in lower case with underscores."""
    return {command_lines.normal(str(name)): value for name, value in values.items()}


def _of(path: Path, values: dict[str, Any], program: Program | None) -> Settings:
    for signs, code in () if {"stage", "finetuning_type"} & values.keys() else _OTHERS:
        if signs <= values.keys() or (len(signs) == 2 and code == "import-is-deepspeed" and signs & values.keys()):
            raise RecipeError(say(code, file=path))
    if program is None and "model" in values and {"model_class", "peft_config"} & values.keys():
        raise RecipeError(say("import-is-v1", file=path))
    program = program or recognised(values)
    if program is None:
        names = ", ".join(list(map(str, values))[:8]) or "–"
        raise RecipeError(say("import-unrecognised", file=path, keys=shown(names), programs=", ".join(TITLES)))
    found = Settings(program, path, values)
    if program == "trl":
        found.several = "accelerate_config" in values
        found.devices = launching.of_settings(values, partial(_beside, path))
    return found


def recognised(values: Mapping[str, Any]) -> Program | None:
    """The program whose settings these are; None if none of them is any one program's own."""
    if "model" in values and not {"model_name_or_path", "stage"} & values.keys():
        order: Sequence[Program] = ("mlx-lm-lora", "mlx-lm", "llama-factory", "trl")
    elif "finetuning_type" in values or "stage" in values:
        order = ("llama-factory",)
    else:
        order = ("llama-factory", "trl", "mlx-lm-lora", "mlx-lm")
    signs = dict(_SIGNS)
    counts = {program: len(signs[program] & values.keys()) for program in order}
    best = max(counts.values(), default=0)
    if best:
        return next(program for program in order if counts[program] == best)
    return "trl" if "model_name_or_path" in values else None


# Shell scripts ----------------------------------------------------------------------------------------------


def _shell(path: Path, text: str, program: Program | None) -> Settings:
    for command in command_lines.commands(text):
        found = _training_of(path, command, program)
        if found is not None:
            beside = partial(_beside, path)
            found.devices = launching.devices_of(command, beside) or found.devices
            found.several = launching.starts_several(command)
            if command.variables.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "y"):
                found.hub = "modelscope"
            return found
    raise RecipeError(say("import-no-command", file=path))


def _training_of(path: Path, command: command_lines.Command, program: Program | None) -> Settings | None:
    """The settings of a command that trains; None for any other command."""
    words = command.words
    names = [Path(word).name.removesuffix(".py").removesuffix(".exe") for word in words]
    joined = " ".join(names)
    if "llamafactory-cli" in names or "lmf" in names or re.search(r"\bllamafactory|LLaMA-Factory", " ".join(words)):
        start = next((i for i, name in enumerate(names) if name in ("llamafactory-cli", "lmf")), 0)
        rest = words[start + 1 :]
        if rest and rest[0] not in ("train",) and not rest[0].startswith("-") and "." not in rest[0]:
            return None
        return _with_file(path, rest, program or "llama-factory")
    if "mlx_lm_lora" in joined:
        return _with_file(path, words[1:], program or "mlx-lm-lora")
    if re.search(r"mlx_lm(\.lora| lora)", joined) or "mlx_lm.lora" in words:
        return _with_file(path, words[1:], program or "mlx-lm")
    trainer = _trl_trainer(names, words)
    if trainer is not None:
        if trainer in _REFUSED_TRAINERS:
            raise RecipeError(say("import-trainer", file=path, trainer=trainer))
        found = _with_file(path, words[1:], program or "trl")
        found.values.setdefault("trainer", trainer)
        return found
    start = next((i + 1 for i, word in enumerate(words) if word.endswith(".py")), 0)  # what is before starts it
    settings, files = command_lines.options(words[start:])
    named = "train" in names and any(file.endswith((".yaml", ".yml", ".json")) for file in files)
    if named or settings.keys() & {"stage", "finetuning_type", "iters", "dataset", "dataset_name"}:
        return _with_file(path, words[start:], program)
    return None


def _trl_trainer(names: Sequence[str], words: Sequence[str]) -> str | None:
    if "trl" in names:
        after = names[names.index("trl") + 1 :]
        return next((name for name in after if name in (*_TRAINERS, *_REFUSED_TRAINERS)), None)
    scripts = [name.removeprefix("trl.scripts.") for name, word in zip(names, words, strict=True) if _is_script(word)]
    return next((name for name in scripts if name in (*_TRAINERS, *_REFUSED_TRAINERS)), None)


def _is_script(word: str) -> bool:
    return word.endswith(".py") or word.startswith("trl.scripts.")


def _with_file(path: Path, words: list[str], program: Program | None) -> Settings:
    """The options of a command, over the settings of the YAML or JSON file that it names. Raises RecipeError."""
    values, others = command_lines.options(words)
    config = values.pop("config", None) or values.pop("c", None)
    trains = [word for word in others if word.lower().endswith((".yaml", ".yml", ".json"))]
    values.pop("config_file", None)  # that of accelerate
    for name in ("nproc_per_node", "nnodes", "num_processes", "num_machines", "node_rank", "machine_rank", "m"):
        values.pop(name, None)
    for name in (
        "main_process_port",
        "num_gpus",
        "standalone",
        "multi_gpu",
        "accelerate_config",
        "gpu_ids",
        "include",
    ):
        values.pop(name, None)
    named = str(config) if isinstance(config, str) else trains[-1] if trains else None
    if named is not None:
        file = _beside(path, named)
        below = normal_keys(_values(file, read_text(file)))
        return _of(path, {**below, **values}, program)
    return _of(path, values, program)


def _beside(path: Path, named: str) -> Path:
    """A file that a script names, seen from the current folder, the script's, or a folder above it."""
    if Path(named).is_absolute():
        return Path(named)
    places = [Path(), path.absolute().parent, *list(path.absolute().parent.parents)[:5]]
    return next((place / named for place in places if (place / named).is_file()), path.parent / named)


# Python scripts ---------------------------------------------------------------------------------------------


def _code_of(path: Path, text: str) -> str:
    """The code cells of a notebook. Raises RecipeError."""
    try:
        cells = parse_json(text)["cells"]
        sources = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        return "\n".join(code_of("".join(source)) for source in sources)
    except (ValueError, RecursionError, KeyError, TypeError):
        raise RecipeError(say("import-no-notebook", file=path)) from None


def _script(path: Path, text: str) -> Settings:
    try:
        script = read_script(text)
    except SyntaxError as error:
        raise RecipeError(say("import-no-python", file=path, line=error.lineno or 1, reason=error.msg)) from None
    refused = next((call for call in script.calls if call.endswith("Trainer") and call not in _KNOWN_TRAINERS), None)
    if refused is not None:
        raise RecipeError(say("import-trainer", file=path, trainer=refused))
    if not {"model", "arguments", "trainer", "lora"} & script.keywords.keys():
        raise RecipeError(say("import-no-calls", file=path))
    program: Program = "unsloth" if script.is_unsloth else "trl"
    settings = Settings(program, path, _flat(script), calls=script.keywords)
    settings.remarks = [say("import-unread", code=shown(code)) for code in dict.fromkeys(script.unread)]
    settings.values["trainer"] = _trainer_of(script)
    if script.selected:
        settings.calls.setdefault("data", {})["selected"] = min(script.selected)
    if "TrainingArguments" in script.calls:
        settings.values["plain_arguments"] = True
    return settings


_KNOWN_TRAINERS = ("SFTTrainer", "UnslothTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer")


def _trainer_of(script: Script) -> str:
    for name, trainer in (("DPO", "dpo"), ("KTO", "kto"), ("ORPO", "orpo")):
        if f"{name}Trainer" in script.calls or f"{name}Config" in script.calls:
            return trainer
    return "sft"


def _flat(script: Script) -> dict[str, Any]:
    """The keywords of all calls in one mapping; data sets stay in the calls."""
    values: dict[str, Any] = {}
    for kind in ("model", "lora", "trainer", "arguments", "split"):
        for name, value in script.keywords.get(kind, {}).items():
            if not (name in values and is_off(value)):
                values[command_lines.normal(name)] = value
    named = values.pop("model", None)  # a trainer takes a name, too
    if isinstance(named, str):
        values.setdefault("model_name", named)
    return values
