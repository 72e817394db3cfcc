"""Python scripts in Unsloth's way: the keywords of the calls that set up a training. Nothing is run or imported.

Only literals are read: numbers, texts, lists, mappings, names that are assigned one literal, and products of whole
numbers. Whatever a script computes otherwise is told as unread.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CALLS = {
    "from_pretrained": "model",
    "get_peft_model": "lora",
    "LoraConfig": "lora",
    "SFTTrainer": "trainer",
    "UnslothTrainer": "trainer",
    "DPOTrainer": "trainer",
    "KTOTrainer": "trainer",
    "ORPOTrainer": "trainer",
    "SFTConfig": "arguments",
    "DPOConfig": "arguments",
    "KTOConfig": "arguments",
    "ORPOConfig": "arguments",
    "TrainingArguments": "arguments",
    "UnslothTrainingArguments": "arguments",
    "load_dataset": "data",
    "train_on_responses_only": "responses",
    "get_chat_template": "template",
    "BitsAndBytesConfig": "model",
    "train_test_split": "split",
    "apply_chat_template": "rendered",
}
_FIRST = {"from_pretrained": "model_name", "train_test_split": "test_size"}  # names of arguments without one
# Trainers for which there is no recipe.
REFUSED = ("GRPOTrainer", "PPOTrainer", "RewardTrainer", "OnlineDPOTrainer", "RLOOTrainer", "CPOTrainer")
_MOST_NODES = 50_000
_UNKNOWN = object()


@dataclass
class Script:
    """The keywords of each kind of call, which calls there are, and the keywords that are no literals."""

    keywords: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    is_unsloth: bool = False
    trained: int | None = None  # the last line of the trainer's call
    selected: list[int] = field(default_factory=list)  # rows that `select(range(N))` takes


def read_script(text: str) -> Script:
    """The calls of a script or of a notebook's code. Raises SyntaxError with the line."""
    lines = _plain(text.split("\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse("\n".join(lines))
        except (ValueError, RecursionError, MemoryError) as error:  # NUL characters, and deep nesting
            raise SyntaxError(str(error) or "too deep") from None
    nodes = []
    for node in _walked(tree):
        nodes.append(node)
        if len(nodes) > _MOST_NODES:
            raise SyntaxError("too long")
    names = _assigned(nodes)
    script = Script(is_unsloth=any(map(_imports_unsloth, nodes)))
    for node in nodes:
        if isinstance(node, ast.Call):
            _take(node, names, script)
    return script


def _imports_unsloth(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "unsloth" for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unsloth"


def _plain(lines: list[str]) -> list[str]:
    """The lines of a notebook: commands for its shell and questions are left out, their indentation stays."""
    plain = []
    goes_on = False
    for line in lines:
        stripped = line.strip()
        outside = goes_on or stripped.startswith(("!", "%", "?")) or _QUESTION.fullmatch(stripped) is not None
        indent = "" if goes_on else line[: len(line) - len(line.lstrip())]
        plain.append("" if goes_on else f"{indent}pass" if outside else line)
        goes_on = outside and stripped.endswith("\\")
    return plain


_QUESTION = re.compile(r"[\w.]+\?{1,2}")


def code_of(cell: str) -> str:
    """The Python of a notebook's cell; "" where its first line gives it to another program, as %%bash does."""
    first = cell.lstrip().split("\n", 1)[0].strip()
    other = first.startswith("%%") and not first.startswith(_PYTHON_CELLS)
    return "" if other else cell


_PYTHON_CELLS = ("%%capture", "%%time", "%%prun")  # and %%timeit


def _walked(tree: ast.AST) -> Iterator[ast.AST]:
    yield from sorted(
        (node for node in ast.walk(tree) if isinstance(node, ast.expr | ast.stmt)),
        key=lambda node: (node.lineno, node.col_offset),
    )


def _assigned(nodes: list[ast.AST]) -> dict[str, Any]:
    """Names that are assigned a literal, and nothing else."""
    names: dict[str, Any] = {}
    seen: set[str] = set()
    for node in nodes:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Name):
                value = _literal(node.value, names) if isinstance(node, ast.Assign) else _UNKNOWN
                names[target.id] = _UNKNOWN if target.id in seen and names.get(target.id) != value else value
                seen.add(target.id)
    return names


def _take(node: ast.Call, names: dict[str, Any], script: Script) -> None:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called in REFUSED:
        script.calls.append(called)
    owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
    if called == "select":
        _select(node, names, script)
    kind = CALLS.get(called)
    if kind is None or (called == "from_pretrained" and _is_no_model(owner, node, script)):
        return
    script.calls.append(called)
    if called.endswith("Trainer"):
        script.trained = node.end_lineno or node.lineno
    values = script.keywords.setdefault(kind, {})
    if kind == "data":
        values.setdefault("sets", []).append(_data(node, names))
        return
    first = _FIRST.get(called)
    if first and node.args and (value := _literal(node.args[0], names)) is not _UNKNOWN:
        values[first] = value
    for keyword in node.keywords:
        _keyword(keyword, called, names, values, script)


def _is_no_model(owner: str, node: ast.Call, script: Script) -> bool:
    """Whether it is a tokenizer, or the result that is loaded after the training, to try it."""
    other = any(word in owner for word in ("Tokenizer", "Processor", "Config"))
    known = "model_name" in script.keywords.get("model", {})
    return other or (known and script.trained is not None and node.lineno > script.trained)


def _select(node: ast.Call, names: dict[str, Any], script: Script) -> None:
    """`data.select(range(N))`, which takes the first N rows. Any other choice of rows is told as unread."""
    inner = node.args[0] if node.args else None
    if isinstance(inner, ast.Call) and getattr(inner.func, "id", "") == "range":
        ends = [_literal(argument, names) for argument in inner.args]
        if len(ends) == 2 and ends[0] == 0:
            ends = ends[1:]
        if len(ends) == 1 and isinstance(ends[0], int) and not isinstance(ends[0], bool) and ends[0] > 0:
            script.selected.append(ends[0])
            return
    script.unread.append("select(…)")


def _keyword(
    keyword: ast.keyword, called: str, names: dict[str, Any], values: dict[str, Any], script: Script
) -> None:
    if keyword.arg is None:
        value = _literal(keyword.value, names)
        if isinstance(value, dict):
            values.update({str(key): below for key, below in value.items()})
        else:
            script.unread.append(f"{called}(**…)")
        return
    value = _literal(keyword.value, names)
    if value is not _UNKNOWN:
        values[keyword.arg] = value
    elif keyword.arg not in _OBJECTS and CALLS[called] != "rendered":
        script.unread.append(f"{called}({keyword.arg}=…)")


# Keywords whose values are objects of the script, and say nothing.
_OBJECTS = frozenset(
    (
        *("model", "tokenizer", "processing_class", "args", "train_dataset", "eval_dataset", "data_collator"),
        *("peft_config", "formatting_func", "callbacks", "compute_metrics", "bf16", "fp16", "dtype", "torch_dtype"),
        *("ref_model", "token", "quantization_config", "device_map", "bnb_4bit_compute_dtype", "max_memory"),
    )
)


def _data(node: ast.Call, names: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, argument in zip(("path", "name"), node.args, strict=False):
        value = _literal(argument, names)
        if value is not _UNKNOWN:
            values[name] = value
    for keyword in node.keywords:
        value = _literal(keyword.value, names)
        if keyword.arg is not None and value is not _UNKNOWN:
            values[keyword.arg] = value
    return values


def _literal(node: ast.expr, names: dict[str, Any], depth: int = 20) -> Any:
    """The value of a literal; `_UNKNOWN` for anything that would have to be computed."""
    if depth == 0:
        return _UNKNOWN
    if isinstance(node, ast.Name):
        return names.get(node.id, _UNKNOWN)
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str | int | float | bool | None) else _UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand, names, depth - 1)
        return -value if isinstance(value, int | float) and not isinstance(value, bool) else _UNKNOWN
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        sides = _literal(node.left, names, depth - 1), _literal(node.right, names, depth - 1)
        fine = all(isinstance(side, int) and not isinstance(side, bool) and abs(side) < 2**31 for side in sides)
        return sides[0] * sides[1] if fine else _UNKNOWN
    if isinstance(node, ast.List | ast.Tuple):
        parts = [_literal(part, names, depth - 1) for part in node.elts]
        return _UNKNOWN if any(part is _UNKNOWN for part in parts) else parts
    if isinstance(node, ast.Dict):
        keys = [_UNKNOWN if key is None else _literal(key, names, depth - 1) for key in node.keys]
        parts = [_literal(part, names, depth - 1) for part in node.values]
        if any(part is _UNKNOWN for part in (*keys, *parts)):
            return _UNKNOWN
        return {str(key): part for key, part in zip(keys, parts, strict=True)}
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict" and not node.args:
        parts = [_literal(keyword.value, names, depth - 1) for keyword in node.keywords]
        if any(part is _UNKNOWN for part in parts) or any(keyword.arg is None for keyword in node.keywords):
            return _UNKNOWN
        return {str(keyword.arg): part for keyword, part in zip(node.keywords, parts, strict=True)}
    return _UNKNOWN
