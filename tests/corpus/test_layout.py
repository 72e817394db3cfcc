"""Templates that rewrite, move or drop messages, and tokenizers that do not fit: found or refused, never guessed."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from turns import TWO_TURNS, assistant, ids, system, trained_runs, user

from mlx_zh.corpus.conversation import Conversation
from mlx_zh.corpus.render import Renderer
from mlx_zh.errors import ModelError, TemplateError

FAMILIES = ("llama3", "qwen2", "qwen3", "smollm2", "mistral")


def test_reasoning_dropped_from_earlier_replies(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    renderer = Renderer(tokenizer)
    messages = (
        user("Hello"),
        assistant("<think>\nwell\n</think>\n\n你好"),
        user("再见"),
        assistant("<think>\nso\n</think>\n\nHello\n"),
    )
    rendered = renderer.conversation(messages)
    replies = ["<think>\nwell\n</think>\n\n你好<|im_end|>", "<think>\nso\n</think>\n\nHello\n<|im_end|>"]
    assert trained_runs(tokenizer, rendered) == replies
    last, _ = rendered.paths()[-1]
    assert tokenizer.decode(last) == renderer.text(messages).removesuffix("\n")
    prompt = renderer.prompt(messages[:3])
    assert last[: len(prompt)].tolist() == prompt


def test_a_message_the_template_leaves_out_is_an_error(tokenizer_of):
    # Mistral's template shows the system message only where the last message is the user's.
    with pytest.raises(TemplateError, match="leaves out the system message"):
        Renderer(tokenizer_of("mistral")).conversation([system("a"), user("b"), assistant("c")])
    prompt = Renderer(tokenizer_of("mistral")).prompt([system("Hello"), user("how")])
    assert prompt == ids(tokenizer_of("mistral"), "<s>[INST] Hello\n\nhow[/INST]")


def test_a_template_that_ends_replies_with_no_token(tokenizer_of):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(TemplateError, match="never stop"):
        Renderer(tokenizer_of("qwen2"), chat_template=template).conversation(TWO_TURNS)


def test_a_reply_that_cannot_be_found(tokenizer_of):
    # Written twice, a reply has no one place; the layout of the roles does not tell, this conversation does.
    template = tokenizer_of("smollm2").chat_template.replace(
        "message['content'] +", "(message['content'] * (2 if '世界' in message['content'] else 1)) +"
    )
    renderer = Renderer(tokenizer_of("smollm2"), chat_template=template)
    row = Conversation(TWO_TURNS, "data.jsonl:3")
    with pytest.raises(TemplateError, match=r"data\.jsonl:3: cannot tell where .* message 2"):
        renderer.conversation(row)


def test_a_template_that_refuses(tokenizer_of):
    renderer = Renderer(tokenizer_of("mistral"))
    row = Conversation((user("a"), user("b"), assistant("c")), "data.jsonl:12")
    with pytest.raises(TemplateError, match=r"data\.jsonl:12: .*user, user, assistant.*must alternate"):
        renderer.conversation(row)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        chat_template, special_tokens_map = "x", {}

    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Renderer(Slow())


def test_a_tokenizer_whose_tokens_stand_across_a_cut():
    # Words between blanks: "assistant:Hello" is one token, half header and half reply.
    vocabulary = {"<unk>": 0, "</s>": 1, "user:Hello": 2, "assistant:Hello": 3}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    renderer = Renderer(tokenizer)
    renderer._encoder.cuts_anywhere = False
    with pytest.raises(TemplateError, match="across the start of a reply near"):
        renderer.conversation([user("Hello"), assistant("Hello")])
