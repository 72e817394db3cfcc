"""How many devices a training is started on: by its command, its variables, and accelerate's file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_zh.bridges.command_lines import Command, normal
from mlx_zh.bridges.text_files import read_text
from mlx_zh.errors import RecipeError
from mlx_zh.recipe_text.document import parse_text

_PER_NODE = ("nproc_per_node", "num_gpus")
_NODES = ("nnodes", "num_machines", "num_nodes")
_STARTERS = ("torchrun", "deepspeed", "torch.distributed.run", "torch.distributed.launch")
_CARDS = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
_MOST = 65_536
# Names that `trl --accelerate_config` takes in place of a file; each of these files has num_processes: 8.
_OF_TRL = ("fsdp1", "fsdp2", "multi_gpu", "zero1", "zero2", "zero3")
_EIGHT = 8


def devices_of(command: Command, beside: Callable[[str], Path]) -> int | None:
    """How many devices a command and its variables name; None if they name none.

    `beside` finds a file that the command names.
    """
    options = _options(command.words)
    cards = next((command.variables[name] for name in _CARDS if command.variables.get(name)), None)
    per_node = next((count for name in _PER_NODE if (count := _whole(options.get(name)))), None)
    per_node = per_node or _whole(command.variables.get("NPROC_PER_NODE")) or _included(options.get("include"))
    nodes = next((count for name in _NODES if (count := _whole(options.get(name)))), None)
    nodes = nodes or _whole(command.variables.get("NNODES")) or 1
    if all_of_them := _whole(options.get("num_processes")):
        return all_of_them
    listed = options.get("gpu_ids", "") if options.get("gpu_ids") != "all" else ""
    per_node = per_node or _counted(listed) or _counted(cards or "")
    if per_node is not None:
        return per_node * nodes if per_node * nodes <= _MOST else None
    named = options.get("config_file") or options.get("accelerate_config")
    return of_accelerate(named, beside) if named and {"accelerate", "trl"} & set(command.words) else None


def of_settings(values: dict[str, Any], beside: Callable[[str], Path]) -> int | None:
    """How many devices TRL's file names, where options of accelerate may stand too; they are taken out of it."""
    processes, named = values.pop("num_processes", None), values.pop("accelerate_config", None)
    return _whole(str(processes)) or (of_accelerate(named, beside) if isinstance(named, str) else None)


def of_accelerate(named: str, beside: Callable[[str], Path]) -> int | None:
    """The processes of accelerate's file, or of the one that TRL has under this name; None if it cannot be read."""
    if named in _OF_TRL:
        return _EIGHT
    file = beside(named)
    try:
        values = parse_text(read_text(file), file, "").value
    except RecipeError:
        return None
    single = str(values.get("distributed_type", "")).upper() == "NO"
    return 1 if single else _whole(str(values.get("num_processes")))


def starts_several(command: Command) -> bool:
    """Whether a command starts a process for each card, however many there are."""
    words, variables = command.words, command.variables
    if (
        variables.get("FORCE_TORCHRUN", "").lower() in ("1", "true", "y")
        or (_whole(variables.get("NNODES")) or 1) > 1
    ):
        return True
    names = {Path(word).name for word in words}
    accelerated = "accelerate" in names and {"config_file", "multi_gpu"} & _options(words).keys()
    named = "accelerate_config" in _options(words) and "single_gpu" not in words
    return bool(accelerated or named or names & set(_STARTERS))


def _options(words: list[str]) -> Mapping[str, str]:
    """The options of a command with the first word after each."""
    options: dict[str, str] = {}
    for index, word in enumerate(words):
        if word.startswith("-"):
            name, equals, text = word.partition("=")
            options.setdefault(normal(name), text if equals else "".join(words[index + 1 : index + 2]))
    return options


def _included(text: str | None) -> int | None:
    """The cards that DeepSpeed's --include names: `host:0,1,2@other:0,1`."""
    if not text or not re.fullmatch(r"[\w.-]+:\d+(,\d+)*(@[\w.-]+:\d+(,\d+)*)*", text):
        return None
    return sum(_counted(part.partition(":")[2]) or 0 for part in text.split("@"))


def _counted(cards: str) -> int | None:
    return len([card for card in cards.split(",") if card.strip()]) or None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() and 0 < int(text) <= _MOST else None
