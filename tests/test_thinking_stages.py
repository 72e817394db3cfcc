"""Thinking in the stages: training, chat, exams, doctor and the plan follow model.thinking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from project import Project
from tolerances import LOSS

from mlx_zh import doctor, prepare
from mlx_zh.chatting.commands import thinking_mode
from mlx_zh.chatting.repl import Repl
from mlx_zh.core.logprobs import batch_logprobs
from mlx_zh.core.losses import sft_loss
from mlx_zh.core.packing import pack_conversations
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.render import Renderer
from mlx_zh.errors import MlxZhError, TemplateError
from mlx_zh.exams.catalog import Entry, Row
from mlx_zh.exams.csvfile import Question
from mlx_zh.exams.exam import Exam, Subject
from mlx_zh.exams.prompts import Prompter
from mlx_zh.exams.protocols import protocols
from mlx_zh.recipe import load_recipe
from mlx_zh.stages.rendering import renderer_of, thinking_problem
from mlx_zh.stages.talking import open_chatbot

TEMPLATE = r"""{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% if loop.last %}<think>
{{ m.reasoning_content or '' }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
EMPTY = "<think>\n\n</think>\n\n"
TURNS = (Message("user", "甲"), Message("assistant", "一"), Message("user", "乙"), Message("assistant", "二三"))


@pytest.fixture
def thinking(project: Project, tmp_path: Path) -> Project:
    """A project whose model has a template that thinks, and whose rows have two turns."""
    folder = tmp_path / "thinking"
    shutil.copytree(project.model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    rows = [{"messages": [{"role": m.role, "content": f"{m.content}{n}"} for m in TURNS]} for n in range(8)]
    Path("train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    project.recipe["model"] = {"path": str(folder)}
    project.recipe["data"] = {"sft": {"train": ["train.jsonl"]}, "max_length": 256}
    project.recipe["sft"] |= {"max_steps": 2}
    project.write_recipe()
    return project


def test_a_changed_mode_is_named_and_auto_is_not_stored(thinking: Project) -> None:
    thinking.train("model.thinking=off")
    refused = thinking.sft("data.reasoning=drop")
    assert refused.status == 2
    assert 'data.reasoning "learn" -> "drop"; model.thinking "off" -> "auto". Give' in refused.err
    assert thinking.sft("model.thinking=off").status == 0  # it goes on
    recipe = load_recipe("recipe.yaml")
    assert "thinking:" not in recipe.to_yaml() and "reasoning:" not in recipe.to_yaml()
    assert "thinking: 'off'" in load_recipe("recipe.yaml", ["model.thinking=off"]).to_yaml()


def test_prepare_shows_the_mode_and_each_reply_after_its_own_prompt(thinking: Project) -> None:
    shown = thinking.run(prepare.main, "model.thinking=off", "--show", "1").out
    assert "thinking: off; reasoning in the data: learn" in shown
    first = f"<|im_start|>user\n甲0<|im_end|>\n<|im_start|>assistant\n{EMPTY}⟦一0<|im_end|>⟧"
    second = (
        "<|im_start|>user\n甲0<|im_end|>\n<|im_start|>assistant\n一0<|im_end|>\n"
        f"<|im_start|>user\n乙0<|im_end|>\n<|im_start|>assistant\n{EMPTY}⟦二三0<|im_end|>⟧"
    )
    assert f"{first}\n\n{second}" in shown
    assert f"assistant\n⟦{EMPTY}一0<|im_end|>⟧" in thinking.run(prepare.main, "--show", "1").out


def test_a_mode_that_the_template_lacks_is_found_before_anything_starts(project: Project) -> None:
    project.recipe["model"]["thinking"] = "on"
    project.write_recipe()
    problem = thinking_problem(load_recipe("recipe.yaml"))
    assert problem is not None and "has no switch for thinking" in problem
    assert "has no switch for thinking" in project.sft().err
    checked = project.run(doctor.main, "--quick")
    assert checked.status == 1 and "has no switch for thinking" in checked.out


def test_doctor_shows_the_mode(thinking: Project) -> None:
    assert (
        "thinking: off; reasoning in the data: learn"
        in thinking.run(doctor.main, "--quick", "model.thinking=off").out
    )


@pytest.mark.parametrize("value", ["true", "false", "1", "yes"])
def test_other_modes_are_refused(project: Project, value: str) -> None:
    with pytest.raises(MlxZhError, match=r"model\.thinking"):
        load_recipe("recipe.yaml", [f"model.thinking={value}"])


# --- The loss ----------------------------------------------------------------------------------------------------


def test_the_loss_of_a_tree_is_that_of_its_replies_one_by_one(tiny_model: Any, byte_tokenizer: Any) -> None:
    """Whatever stands before a reply is exactly its own prompt, so each reply alone gives the same log-probs."""
    model = tiny_model("qwen3", layers=2)
    rendered = Renderer(byte_tokenizer, chat_template=TEMPLATE, thinking="off").conversation(TURNS)
    assert rendered is not None and rendered.segments is not None
    tree = pack_conversations([(rendered.tokens, rendered.trained, rendered.segments)])
    count = int(rendered.trained.sum())
    whole = float(sft_loss(batch_logprobs(model, tree), count))
    alone = 0.0
    for tokens, trained in rendered.paths():
        logits = model(mx.array(tokens)[None])[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        places = np.flatnonzero(trained)
        alone -= float(logprobs[mx.array(places - 1), mx.array(tokens[places])].sum()) / count
    assert whole == pytest.approx(alone, rel=LOSS)


# --- Exams -------------------------------------------------------------------------------------------------------

ASKED = Question("1", "丙", ("1", "2", "3", "4"), "C")
SHOT = Question("0", "甲", ("1", "2", "3", "4"), "A")
SUBJECT = Subject("s", Entry("自然"), (SHOT,), (ASKED,))
EXAM = Exam("e", "e", "ceval", "test", (Row("Average"),), (SUBJECT,), None)


def test_letters_follow_the_empty_thought_when_thinking_is_off(byte_tokenizer: Any) -> None:
    renderer = Renderer(byte_tokenizer, chat_template=TEMPLATE, thinking="off")
    [prompt] = Prompter(protocols()["chat"], byte_tokenizer, renderer, 10**6).subject(EXAM, SUBJECT)
    messages = protocols()["chat"].messages("ceval", "自然", (SHOT,), ASKED)
    rows = [{"role": m.role, "content": m.content} for m in messages]
    text = byte_tokenizer.apply_chat_template(
        rows, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert byte_tokenizer.decode(prompt.tokens) == text and text.endswith(f"assistant\n{EMPTY}")
    assert "assistant\nA<|im_end|>" in text
    assert prompt.letters == tuple((byte_tokenizer.convert_tokens_to_ids(x),) for x in "ABCD")


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_letters_mean_nothing_where_the_model_thinks_first(byte_tokenizer: Any, mode: str) -> None:
    renderer = Renderer(byte_tokenizer, chat_template=TEMPLATE, thinking=mode)
    with pytest.raises(TemplateError, match=r"protocol chat .* thinks before it answers\. Set model\.thinking: off"):
        Prompter(protocols()["chat"], byte_tokenizer, renderer, 10**6)
    Prompter(protocols()["generate"], byte_tokenizer, renderer, 10**6)


# --- Chat --------------------------------------------------------------------------------------------------------


class Lines:
    """Stands in for the terminal."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def note(self, text: str) -> None:
        self.shown.append(text)


class Bot:
    """A chat's model of which only the renderer is used."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer


def test_think_switches_the_prompt(byte_tokenizer: Any) -> None:
    bot, lines = Bot(Renderer(byte_tokenizer, chat_template=TEMPLATE)), Lines()
    repl = Repl(bot, lines, lambda: "")  # type: ignore[arg-type]
    question = [Message("user", "甲")]
    endings = []
    for command in ("/think off", "/think", "/think on", "/think 关", "／think　auto"):
        repl.handle(command)
        endings.append(byte_tokenizer.decode(bot.renderer.prompt(question)).endswith(EMPTY))
    assert lines.shown == [f"thinking: {mode}" for mode in ("off", "off", "on", "off", "auto")]
    assert endings == [True, True, False, True, False]
    with pytest.raises(MlxZhError, match="thinking is on, off or auto"):
        thinking_mode("maybe")
    plain = Bot(Renderer(byte_tokenizer))
    with pytest.raises(TemplateError, match="has no switch"):
        Repl(plain, lines, lambda: "").handle("/think on")  # type: ignore[arg-type]
    assert plain.renderer.mode == "auto"


def test_the_chat_of_a_recipe_has_its_mode(thinking: Project) -> None:
    recipe = load_recipe("recipe.yaml", ["model.thinking=off"])
    bot = open_chatbot(recipe)
    assert bot.renderer.mode == "off" == renderer_of(recipe, bot.loaded.tokenizer).mode
