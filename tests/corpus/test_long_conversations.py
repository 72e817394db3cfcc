"""Replies are where rendering the messages before each of them puts them, which takes quadratic time."""

from __future__ import annotations

import pytest
from chat_templates import LLAMA32
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.corpus import layout
from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.render import Renderer

NUMBERED = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {{ messages|length + 1 }}\n{% endif %}"
)
ROUNDS = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ loop.index0 // 2 + 1 }}]\n问：{{ m.content }}\n答："
    "{% else %}{{ m.content|trim }}<|im_end|>\n{% endif %}{% endfor %}"
)
# family, and a template other than its own
TEMPLATES = [
    ("llama3", None),
    ("llama3", LLAMA32),
    ("qwen2", None),
    ("qwen2", NUMBERED),
    ("qwen2", ROUNDS),
    ("smollm2", None),
]
CONTENT = st.text(st.sampled_from(" \nab你1答：[]"), min_size=1, max_size=6).filter(str.strip)


def plain_spans(renderer: Renderer, template: ChatTemplate, messages: list[Message]) -> list[tuple[int, int]]:
    """Each reply from the end of the prompt for it to its end-of-turn token, in characters."""
    text = renderer.text(messages)
    spans = []
    for k, message in enumerate(messages):
        if message.role == "assistant":
            prompt = template.render(messages[:k], add_generation_prompt=True)
            assert text.startswith(prompt)
            end = text.index(renderer.end_of_turn, len(prompt)) + len(renderer.end_of_turn)
            spans.append((len(prompt), end))
    return spans


@pytest.mark.parametrize(("family", "chosen"), TEMPLATES)
@pytest.mark.parametrize("checked", [0, 16])
@given(contents=st.lists(CONTENT, min_size=1, max_size=40))
def test_replies_are_where_their_prompts_end(tokenizer_of, family, chosen, checked, contents):
    """Also where no reply but the last is looked for by itself (`checked` 0): the text around it must tell."""
    tokenizer = tokenizer_of(family)
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate([*contents, *contents])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_CHECKED", checked)
        renderer = Renderer(tokenizer, chat_template=chosen)
        rendered = renderer.conversation(messages)
    assert rendered is not None
    text = renderer.text(messages)
    spans = plain_spans(renderer, renderer._template, messages)
    tokens, trained, position = [], [], 0
    for start, end in spans:
        for piece, is_reply in ((text[position:start], False), (text[start:end], True)):
            ids = tokenizer.encode(piece, add_special_tokens=False)
            tokens += ids
            trained += [is_reply] * len(ids)
        position = end
    assert rendered.tokens.tolist() == tokens
    assert rendered.trained.tolist() == trained


@pytest.mark.parametrize("replies", [65, 200])
def test_each_thought_of_a_long_conversation_is_learned(tokenizer_of, replies):
    """More replies than are looked for one by one, in a template that rewrites them."""
    renderer = Renderer(tokenizer_of("qwen3"))
    messages = []
    for number in range(replies):
        thought = f"<think>\n{number}\n</think>\n\n"
        messages += [Message("user", str(number)), Message("assistant", f"{thought}a{number}")]
    rendered = renderer.conversation(messages)
    assert rendered is not None
    runs = renderer.decode(rendered.tokens[rendered.trained]).split("<|im_end|>")
    assert runs == [*(f"<think>\n{n}\n</think>\n\na{n}" for n in range(replies)), ""]
    last, _ = rendered.paths()[-1]
    assert renderer.decode(last).count("<think>") == 1
