"""The slash commands: their names, what they are called elsewhere, and how a message is told from one."""

from __future__ import annotations

import contextlib
import difflib
import re
import unicodedata

from mlx_zh.errors import MlxZhError

# Command -> usage, Chinese and English description, method of Repl.
COMMANDS = {
    "/help": ("/help", "显示帮助", "show this help", "help"),
    "/system": ("/system [TEXT|none]", "查看或设置系统提示", "show or set the system prompt", "system"),
    "/reset": ("/reset", "清空对话", "start over; the system prompt stays", "reset"),
    "/retry": ("/retry", "重新回答上一个问题", "answer the last question again", "retry"),
    "/undo": ("/undo", "撤回上一轮问答", "take back the last exchange", "undo"),
    "/good": ("/good", "记下：回答好", "record that the answer is good", "good"),
    "/bad": ("/bad", "记下：回答不好", "record that the answer is bad", "bad"),
    "/better": ("/better [TEMP]", "再答一次，选出好的", "answer again, and choose", "better"),
    "/edit": ("/edit", "改写回答并记下", "correct the answer in $EDITOR", "edit"),
    "/feedback": ("/feedback [FILE]", "查看记下的评价", "what was recorded; choose its file", "feedback"),
    "/compare": ("/compare [A B]", "两个模型并排回答", "two models' answers side by side", "compare"),
    "/adapter": ("/adapter [NAME]", "更换或卸下适配器", "sft, dpo, a folder, or none", "adapter"),
    "/temp": ("/temp [N]", "温度，0 为不随机", "show or set temperature; 0 is greedy", "temp"),
    "/top-p": ("/top-p [N]", "核采样，1 为关闭", "show or set top-p; 1 turns it off", "top_p"),
    "/max-tokens": ("/max-tokens [N]", "回答最多几个词元", "longest answer, in tokens", "max_tokens"),
    "/seed": ("/seed [N|none]", "下一个回答的种子", "seed of the next answer", "seed"),
    "/think": ("/think [MODE]", "是否先思考再回答", "think first: on, off or auto", "think"),
    "/save": ("/save FILE", "存为 JSON 或 .md", "save as JSON, or as Markdown (.md)", "save"),
    "/load": ("/load FILE", "载入存下的对话", "load a saved conversation", "load"),
    "/exit": ("/exit", "退出", "leave (or Ctrl-D)", "leave"),
}
KEYS = (
    ("Enter", "发送", "send"),
    ("Alt+Enter, \\ Enter", "换行", "new line"),
    ('"""…"""', "多行文本，空行也可以", "a block of lines"),
    ("Ctrl-C", "中止回答（不退出）", "stop the answer, not the program"),
    ("↑ ↓, Ctrl-R", "历史记录，搜索", "history, search"),
    ("Tab", "补全命令和路径", "complete a command or a path"),
    ("Ctrl-X Ctrl-E", "用 $EDITOR 编辑", "edit in $EDITOR"),
)
# A Chinese input method writes ／ or 、 for the key of "/", and may write wide letters and a wide space after it.
_COMMAND = re.compile(r"[/／、]([^\W\d][\w－-]*|[?？])(?:\s+(.*))?", re.DOTALL)
# What other chat programs call these commands, and Chinese names; all of them work.
_OTHER_NAMES = {
    "/exit": ("/quit", "/q", "/bye", "/close", "/退出", "/再见"),
    "/help": ("/h", "/?", "/commands", "/帮助"),
    "/reset": ("/clear", "/new", "/清空", "/重置"),
    "/retry": ("/regenerate", "/regen", "/again", "/重试"),
    "/undo": ("/back", "/撤回", "/撤销"),
    "/good": ("/like", "/好"),
    "/bad": ("/dislike", "/不好", "/差"),
    "/better": ("/another", "/再答"),
    "/edit": ("/correct", "/改写"),
    "/feedback": ("/votes", "/评价", "/反馈"),
    "/temp": ("/temperature", "/温度"),
    "/top-p": ("/topp", "/核采样"),
    "/max-tokens": ("/max-new-tokens", "/num-predict", "/长度"),
    "/seed": ("/种子",),
    "/think": ("/thinking", "/思考"),
    "/save": ("/export", "/保存"),
    "/load": ("/open", "/载入"),
    "/adapter": ("/lora", "/适配器"),
    "/compare": ("/diff", "/对比", "/比较"),
    "/system": ("/prompt", "/系统"),
}
_MODES = {"on": "on", "off": "off", "auto": "auto", "开": "on", "关": "off", "自动": "auto"}
_SYNONYMS = {other: name for name, others in _OTHER_NAMES.items() for other in others}
_MOST_TOKENS = 1 << 20
_SEEDS = 1 << 63
_NONE = ("none", "random", "无", "随机")


def command_in(text: str) -> tuple[str, str] | None:
    """The command in a message, as `/name`, and what follows it; None where the message is for the model.

    The name is one of COMMANDS, or that of no command.
    """
    match = _COMMAND.fullmatch(text)
    if match is None:
        return None
    name = "/" + unicodedata.normalize("NFKC", match[1]).lower().replace("_", "-")
    if not name.isascii() and name not in _SYNONYMS:
        return None
    return _SYNONYMS.get(name, name), (match[2] or "").strip()


def nearest_command(name: str) -> str | None:
    """The command that someone who typed `name` most likely means, or None."""
    if completed := [command for command in COMMANDS if command.startswith(name)]:
        return completed[0]
    near = difflib.get_close_matches(name, [*COMMANDS, *_SYNONYMS], 1)
    return _SYNONYMS.get(near[0], near[0]) if near else None


def temperature(text: str) -> float:
    """A temperature, 0 to 10, from text. Raises MlxZhError."""
    value = _number(text)
    if value is None or not 0 <= value <= 10:
        raise MlxZhError(f"the temperature must be a number from 0 (greedy) to 10, got {text!r}")
    return value


def top_p(text: str) -> float:
    """A share of the probability, 0.01 to 1, from text. Raises MlxZhError."""
    value = _number(text)
    if value is None or not 0.01 <= value <= 1:
        raise MlxZhError(f"top-p must be a number from 0.01 to 1 (off), got {text!r}")
    return value


def max_tokens(text: str) -> int:
    """A number of tokens from text. Raises MlxZhError."""
    value = _whole(text)
    if value is None or not 1 <= value <= _MOST_TOKENS:
        raise MlxZhError(f"the longest answer must be a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int | None:
    """A seed from text; None for `none`. Raises MlxZhError."""
    if unicodedata.normalize("NFKC", text).strip().lower() in _NONE:
        return None
    value = _whole(text)
    if value is None or not 0 <= value < _SEEDS:
        raise MlxZhError(f"the seed must be a whole number from 0, or none, got {text!r}")
    return value


def thinking_mode(text: str) -> str:
    """A mode of thinking (on, off or auto) from text. Raises MlxZhError."""
    mode = _MODES.get(unicodedata.normalize("NFKC", text).strip().lower())
    if mode is None:
        raise MlxZhError(f"thinking is on, off or auto, got {text!r}")
    return mode


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return float(unicodedata.normalize("NFKC", text))
    return None


def _whole(text: str) -> int | None:
    plain = unicodedata.normalize("NFKC", text).strip()
    return int(plain) if plain.isdecimal() and len(plain) < 20 else None
