"""The text of a template: exact, pinned to a date, sandboxed."""

from __future__ import annotations

import time

import pytest
from chat_templates import LLAMA32
from transformers import PreTrainedTokenizerFast
from turns import TWO_TURNS, assistant, system, trained_runs, user

from mlx_zh.corpus.render import Renderer
from mlx_zh.errors import TemplateError

FAMILIES = ("llama3", "qwen2", "qwen3", "smollm2", "mistral")


def test_llama31_text_with_system(tokenizer_of):
    renderer = Renderer(tokenizer_of("llama3"))
    messages = [system(" 你是助手。\n"), user("Hello"), assistant("你好")]
    assert renderer.text(messages) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        "你是助手。<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n你好<|eot_id|>"
    )


def test_llama31_text_without_system_and_with_generation_prompt(tokenizer_of):
    renderer = Renderer(tokenizer_of("llama3"), date_string="01 Jan 2025")
    assert renderer.text([user("Hello")], add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2025\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("date", ["26 Jul 2024", "the first of May"])
def test_the_clock_is_pinned(tokenizer_of, date):
    # Llama 3.2's template calls strftime_now; a date that is not written like 26 Jul 2024 is used as it is.
    text = Renderer(tokenizer_of("llama3"), date_string=date, chat_template=LLAMA32).text([user("Hello")])
    assert f"Today Date: {date}\n\n" in text
    assert text.count("Date: ") == 2 and time.strftime("%d %b %Y") not in text


def test_qwen_and_smollm_write_a_system_message_of_their_own(tokenizer_of):
    assert Renderer(tokenizer_of("qwen2")).text([user("Hello")], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert Renderer(tokenizer_of("smollm2")).text([user("Hello"), assistant("Hi")]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_text_is_that_of_transformers(tokenizer_of, family, generation_prompt):
    tokenizer = tokenizer_of(family)
    messages = [*TWO_TURNS, user("Hello")] if generation_prompt else TWO_TURNS
    rows = [{"role": m.role, "content": m.content} for m in messages]
    expected = tokenizer.apply_chat_template(
        rows, tokenize=False, add_generation_prompt=generation_prompt, date_string="26 Jul 2024"
    )
    assert Renderer(tokenizer).text(messages, add_generation_prompt=generation_prompt) == expected


def test_broken_missing_and_several_templates(tokenizer_of):
    tokenizer = tokenizer_of("qwen2")
    with pytest.raises(TemplateError, match="not valid Jinja"):
        Renderer(tokenizer, chat_template="{% for %}")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    with pytest.raises(TemplateError, match="no chat template"):
        Renderer(bare)
    bare.chat_template = {"default": tokenizer.chat_template, "tool_use": "x"}
    assert Renderer(bare).text(TWO_TURNS) == Renderer(tokenizer).text(TWO_TURNS)
    bare.chat_template = {"tool_use": "x"}
    with pytest.raises(TemplateError, match="it has: tool_use"):
        Renderer(bare)


def test_a_template_cannot_leave_the_sandbox(tokenizer_of):
    for attack in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ dict.fromkeys.__globals__ }}{{ dict.mro() }}",
    ):
        with pytest.raises(TemplateError):
            Renderer(tokenizer_of("qwen2"), chat_template=attack).text(TWO_TURNS)


def test_generation_blocks_are_transparent(tokenizer_of):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_of("qwen2")
    rendered = Renderer(tokenizer, chat_template=template).conversation(TWO_TURNS[:2])
    assert trained_runs(tokenizer, rendered) == ["Hello 世界🙂<|im_end|>"]
