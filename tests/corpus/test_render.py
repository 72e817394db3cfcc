"""Rendering: expectations written out by hand, for templates and tokenizers of the real kinds."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from chat_templates import LLAMA32
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mlx_zh.corpus.conversation import Conversation, Message, Preference
from mlx_zh.corpus.render import (
    CHOSEN_OVERFLOW,
    FIRST_EXCHANGE_OVERFLOW,
    NO_REPLY,
    OVERFLOW,
    PROMPT_OVERFLOW,
    REJECTED_OVERFLOW,
    Renderer,
)
from mlx_zh.errors import DataError, ModelError, TemplateError

FAMILIES = ("llama3", "qwen2", "qwen3", "smollm2", "mistral")


def system(content: str) -> Message:
    return Message("system", content)


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


TWO_TURNS = (user("你好"), assistant("Hello 世界🙂"), user("再见"), assistant("好，今天天气很好。"))


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def trained_runs(tokenizer, rendered) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], rendered.trained, [False]]).astype(int)))
    runs = edges.reshape(-1, 2)
    return [tokenizer.decode(rendered.tokens[start:stop]) for start, stop in runs]


# --- The text of each template -----------------------------------------------------------------------------------


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


# --- Tokens and the mask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_text_encoded_once(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    renderer = Renderer(tokenizer)
    rendered = renderer.conversation(TWO_TURNS)
    whole = ids(tokenizer, renderer.text(TWO_TURNS).removesuffix("\n"))  # ChatML's last newline follows the last turn
    assert rendered.tokens.tolist() == whole
    assert rendered.tokens.dtype == np.int32 and rendered.trained.dtype == bool
    assert not rendered.truncated


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama3", ["Hello 世界🙂<|eot_id|>", "好，今天天气很好。<|eot_id|>"]),
        ("qwen2", ["Hello 世界🙂<|im_end|>", "好，今天天气很好。<|im_end|>"]),
        ("smollm2", ["Hello 世界🙂<|im_end|>", "好，今天天气很好。<|im_end|>"]),
        # What follows the generation prompt is what the model writes, an empty reasoning included.
        ("qwen3", ["Hello 世界🙂<|im_end|>", "<think>\n\n</think>\n\n好，今天天气很好。<|im_end|>"]),
    ],
)
def test_mask_is_reply_and_end_of_turn(tokenizer_of, family, expected):
    tokenizer = tokenizer_of(family)
    rendered = Renderer(tokenizer).conversation(TWO_TURNS)
    assert trained_runs(tokenizer, rendered) == expected


def test_mask_of_a_sentencepiece_tokenizer(tokenizer_of):
    tokenizer = tokenizer_of("mistral")
    renderer = Renderer(tokenizer)
    rendered = renderer.conversation([user("Hello"), assistant("fine today")])
    # "[/INST]" is a token of its own; the reply begins with the space that the template writes.
    start = rendered.tokens.tolist().index(tokenizer.convert_tokens_to_ids("[/INST]")) + 1
    assert rendered.trained.tolist() == [False] * start + [True] * (len(rendered.tokens) - start)
    assert rendered.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(int(rendered.tokens[start]))[0] == "▁"


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_one_bos(tokenizer_of, family):
    # Both templates write BOS, and both tokenizers would add one.
    tokenizer = tokenizer_of(family)
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    renderer = Renderer(tokenizer)
    for tokens in (renderer.conversation(TWO_TURNS).tokens.tolist(), renderer.prompt(TWO_TURNS[:1])):
        assert tokens[0] == tokenizer.bos_token_id and tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_the_beginning_of_the_conversation(tokenizer_of, family):
    # What the model is asked with is token for token what its reply was trained after.
    renderer = Renderer(tokenizer_of(family))
    rendered = renderer.conversation(TWO_TURNS)
    prompt = renderer.prompt(TWO_TURNS[:3])
    assert rendered.tokens[: len(prompt)].tolist() == prompt
    assert rendered.trained[len(prompt) :].all() and not rendered.trained[len(prompt) - 1]


def test_characters_split_over_byte_tokens_are_wholly_trained(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    rendered = Renderer(tokenizer).conversation([user("Hello"), assistant("🙂龘")])
    # Neither character was seen in training, so they are at least 4 and 3 byte tokens.
    reply = rendered.tokens[rendered.trained]
    assert len(reply) == 4 + 3 + 1
    assert tokenizer.decode(reply) == "🙂龘<|eot_id|>"


@pytest.mark.parametrize("reply", ["\nHello", "\n\nHello", "  Hello", "\n", " \t 你好 \n"])
def test_a_reply_never_merges_with_its_header(tokenizer_of, reply):
    # Encoded in one go, "assistant\n" + "\nHello" holds one token for both newlines, which no prompt ends with.
    tokenizer = tokenizer_of("qwen2")
    renderer = Renderer(tokenizer)
    rendered = renderer.conversation([user("Hello"), assistant(reply)])
    prompt = renderer.prompt([user("Hello")])
    assert rendered.tokens[: len(prompt)].tolist() == prompt
    assert rendered.tokens[~rendered.trained].tolist() == prompt
    assert rendered.tokens[rendered.trained].tolist() == ids(tokenizer, reply + "<|im_end|>")


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["Hello 世界🙂<|im_end|>", "好，今天天气很好。<|im_end|>"]),
        ("last", ["好，今天天气很好。<|im_end|>"]),
    ],
)
def test_train_on(tokenizer_of, train_on, expected):
    tokenizer = tokenizer_of("qwen2")
    assert trained_runs(tokenizer, Renderer(tokenizer).conversation(TWO_TURNS, train_on=train_on)) == expected


def test_train_on_all_is_every_token_but_the_first(tokenizer_of):
    rendered = Renderer(tokenizer_of("qwen2")).conversation(TWO_TURNS, train_on="all")
    assert rendered.trained.tolist() == [False] + [True] * (len(rendered.tokens) - 1)


def test_options_are_checked(tokenizer_of):
    renderer = Renderer(tokenizer_of("qwen2"))
    with pytest.raises(ValueError, match="assistant, last, all"):
        renderer.conversation(TWO_TURNS, train_on="user")
    with pytest.raises(ValueError, match="truncate, drop"):
        renderer.conversation(TWO_TURNS, on_overflow="error")


def test_a_conversation_without_reply_is_counted(tokenizer_of):
    dropped: Counter[str] = Counter()
    assert Renderer(tokenizer_of("qwen2")).conversation([user("Hello")], dropped=dropped) is None
    assert dropped == {NO_REPLY: 1}


def test_many_at_once_are_as_one_by_one(tokenizer_of):
    renderer = Renderer(tokenizer_of("llama3"))
    batch = [TWO_TURNS, TWO_TURNS[:2], (system("<|eot_id|>"), *TWO_TURNS), [user("x")]] * 150  # more than one slice
    for one, many in zip(batch, renderer.conversations(batch), strict=True):
        alone = renderer.conversation(one)
        if alone is None:
            assert many is None
        else:
            assert many.tokens.tolist() == alone.tokens.tolist() and many.trained.tolist() == alone.trained.tolist()


def test_padding_and_truncation_of_the_tokenizer_do_not_reach_the_result(tokenizer_of):
    tokenizer = tokenizer_of("smollm2")
    expected = Renderer(tokenizer).conversation(TWO_TURNS).tokens.tolist()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=400)
    assert Renderer(tokenizer).conversation(TWO_TURNS).tokens.tolist() == expected


# --- Too long ----------------------------------------------------------------------------------------------------


def test_truncation_keeps_whole_turns(tokenizer_of):
    renderer = Renderer(tokenizer_of("qwen2"))
    whole, first = renderer.conversation(TWO_TURNS), renderer.conversation(TWO_TURNS[:2])
    n, m = len(whole.tokens), len(first.tokens)
    assert not renderer.conversation(TWO_TURNS, max_length=n).truncated
    for max_length in (n - 1, m):
        cut = renderer.conversation(TWO_TURNS, max_length=max_length)
        assert cut.truncated
        assert cut.tokens.tolist() == first.tokens.tolist() and cut.trained.tolist() == first.trained.tolist()
    dropped: Counter[str] = Counter()
    assert renderer.conversation(TWO_TURNS, max_length=m - 1, dropped=dropped) is None
    assert dropped == {FIRST_EXCHANGE_OVERFLOW: 1}


def test_a_truncated_conversation_is_rendered_as_if_it_had_ended_there(tokenizer_of):
    # Qwen3 writes an empty reasoning into the last reply only, so 世界's reply has one once it is the last.
    tokenizer = tokenizer_of("qwen3")
    renderer = Renderer(tokenizer)
    n = len(renderer.conversation(TWO_TURNS).tokens)
    cut = renderer.conversation(TWO_TURNS, max_length=n - 1)
    assert trained_runs(tokenizer, cut) == ["<think>\n\n</think>\n\nHello 世界🙂<|im_end|>"]


def test_dropping_what_is_too_long(tokenizer_of):
    renderer = Renderer(tokenizer_of("qwen2"))
    n = len(renderer.conversation(TWO_TURNS).tokens)
    dropped: Counter[str] = Counter()
    assert renderer.conversation(TWO_TURNS, max_length=n, on_overflow="drop", dropped=dropped) is not None
    assert renderer.conversation(TWO_TURNS, max_length=n - 1, on_overflow="drop", dropped=dropped) is None
    # train_on="last" cannot lose the one reply it trains on
    assert renderer.conversation(TWO_TURNS, max_length=n - 1, train_on="last", dropped=dropped) is None
    assert dropped == {OVERFLOW: 2}


# --- Control tokens in messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "qwen2", "smollm2"])
def test_control_tokens_in_messages_are_ordinary_text(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    renderer = Renderer(tokenizer)
    end = tokenizer.eos_token
    typed = f"a{end}b"
    messages = [system(typed), user(f"{end}{tokenizer.all_special_tokens[0]}"), assistant(typed)]
    rendered = renderer.conversation(messages)
    # Three turns end, although the token's text stands there six times.
    assert rendered.tokens.tolist().count(tokenizer.eos_token_id) == 3
    assert tokenizer.decode(rendered.tokens) == renderer.text(messages).removesuffix("\n")
    assert trained_runs(tokenizer, rendered) == [typed + end]
    reply = rendered.tokens[rendered.trained].tolist()
    assert reply.index(tokenizer.eos_token_id) == len(reply) - 1  # the content cannot end the turn
    prompt = renderer.prompt(messages[:2])
    assert rendered.tokens[: len(prompt)].tolist() == prompt


def test_only_the_messages_control_tokens_change(tokenizer_of):
    # The rest of such a conversation has the tokens it would have without.
    tokenizer = tokenizer_of("llama3")
    renderer = Renderer(tokenizer)
    plain = renderer.conversation([user("Hello"), assistant("你好，世界"), user("x"), assistant("Hello world")])
    typed = renderer.conversation(
        [user("Hello"), assistant("你好，世界"), user("<|eot_id|>"), assistant("Hello world")]
    )
    first = plain.tokens.tolist().index(tokenizer.convert_tokens_to_ids("x"))
    assert typed.tokens[:first].tolist() == plain.tokens[:first].tolist()
    after = len(plain.tokens) - first - 1
    assert typed.tokens[-after:].tolist() == plain.tokens[-after:].tolist()
    assert typed.trained[-after:].tolist() == plain.trained[-after:].tolist()


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_control_tokens_that_cannot_be_told_apart_are_named(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    said = f"<think>x</think>{tokenizer.eos_token}"
    row = Conversation((user("Hello"), assistant(said), user("Hello"), assistant("Hello")), "data.jsonl:7")
    with pytest.raises(DataError, match=r"data\.jsonl:7: .*control tokens"):
        Renderer(tokenizer).conversation(row)


# --- Templates that rewrite messages, or fail --------------------------------------------------------------------


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
    assert trained_runs(tokenizer, rendered) == ["你好<|im_end|>", "<think>\nso\n</think>\n\nHello\n<|im_end|>"]
    assert tokenizer.decode(rendered.tokens) == renderer.text(messages).removesuffix("\n")
    prompt = renderer.prompt(messages[:3])
    assert rendered.tokens[: len(prompt)].tolist() == prompt


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


# --- Preferences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_is_two_conversations_with_one_prompt(tokenizer_of, family):
    renderer = Renderer(tokenizer_of(family))
    prompt = TWO_TURNS[:3]
    pair = renderer.preference(Preference(prompt, "今天天气很好", "Hello", "x"))
    for response, text in ((pair.chosen, "今天天气很好"), (pair.rejected, "Hello")):
        whole = renderer.conversation([*prompt, assistant(text)])
        assert np.concatenate([pair.prompt, response]).tolist() == whole.tokens.tolist()
        assert response.dtype == np.int32
    assert pair.prompt.tolist() == renderer.prompt(prompt)


def test_a_pair_ends_with_the_end_of_turn(tokenizer_of):
    tokenizer = tokenizer_of("qwen2")
    pair = Renderer(tokenizer).preference(Preference((user("Hello"),), "\n你好", "<|im_end|>x", "x"))
    assert tokenizer.decode(pair.chosen) == "\n你好<|im_end|>"
    assert tokenizer.decode(pair.rejected) == "<|im_end|>x<|im_end|>"
    for response in (pair.chosen, pair.rejected):
        assert response.tolist().count(tokenizer.eos_token_id) == 1 and response[-1] == tokenizer.eos_token_id


def test_pairs_that_do_not_fit_are_dropped_with_the_reason(tokenizer_of):
    renderer = Renderer(tokenizer_of("qwen2"))
    long_chosen = Preference((user("Hello"),), "今天天气很好" * 3, "好", "x")
    long_rejected = Preference((user("Hello"),), "好", "今天天气很好" * 3, "x")
    pair = renderer.preference(long_chosen)
    prompt, short, long = len(pair.prompt), len(pair.rejected), len(pair.chosen)
    assert short < long

    def reasons(preference: Preference, max_length: int) -> dict[str, int]:
        dropped: Counter[str] = Counter()
        kept = renderer.preference(preference, max_length=max_length, dropped=dropped)
        assert (kept is None) == bool(dropped)
        return dict(dropped)

    assert reasons(long_chosen, prompt + long) == {}
    assert reasons(long_chosen, prompt + long - 1) == {CHOSEN_OVERFLOW: 1}
    assert reasons(long_rejected, prompt + long - 1) == {REJECTED_OVERFLOW: 1}
    assert reasons(long_rejected, prompt) == {PROMPT_OVERFLOW: 1}


# --- Fingerprint -------------------------------------------------------------------------------------------------


def test_fingerprint_knows_tokenizer_template_and_date(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    same = {Renderer(tokenizer).fingerprint, Renderer(tokenizer, date_string="26 Jul 2024").fingerprint}
    assert len(same) == 1
    others = {
        Renderer(tokenizer, date_string="27 Jul 2024").fingerprint,
        Renderer(tokenizer, chat_template=LLAMA32).fingerprint,
        Renderer(tokenizer_of("qwen2")).fingerprint,
    }
    assert len(same | others) == 4
