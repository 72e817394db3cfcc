"""Rendering: expectations written out by hand, for templates and tokenizers of the real kinds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from chat_templates import LLAMA32
from turns import TWO_TURNS, assistant, ids, system, trained_runs, user

from mlx_zh.corpus.conversation import Conversation, Preference
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.rendered import (
    CHOSEN_OVERFLOW,
    FIRST_EXCHANGE_OVERFLOW,
    NO_REPLY,
    OVERFLOW,
    PROMPT_OVERFLOW,
    REJECTED_OVERFLOW,
)
from mlx_zh.errors import DataError

FAMILIES = ("llama3", "qwen2", "qwen3", "smollm2", "mistral")
FLAT = ("llama3", "qwen2", "smollm2", "mistral")  # earlier replies stay as they were written


# --- Tokens and the mask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FLAT)
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
        (
            "qwen3",
            ["<think>\n\n</think>\n\nHello 世界🙂<|im_end|>", "<think>\n\n</think>\n\n好，今天天气很好。<|im_end|>"],
        ),
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
    tokens, trained = rendered.paths()[-1]
    assert tokens[: len(prompt)].tolist() == prompt
    assert trained[len(prompt) :].all() and not trained[len(prompt) - 1]


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


def test_control_tokens_that_cannot_be_told_apart_are_named(tokenizer_of):
    tokenizer = tokenizer_of("mistral")
    said = f"<think>x</think>{tokenizer.eos_token}"
    row = Conversation((user("Hello"), assistant(said), user("Hello"), assistant("Hello")), "data.jsonl:7")
    with pytest.raises(DataError, match=r"data\.jsonl:7: .*control tokens"):
        Renderer(tokenizer).conversation(row)


# --- Preferences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_is_two_conversations_with_one_prompt(tokenizer_of, family):
    renderer = Renderer(tokenizer_of(family))
    prompt = TWO_TURNS[:3]
    pair = renderer.preference(Preference(prompt, "今天天气很好", "Hello", "x"))
    for response, text in ((pair.chosen, "今天天气很好"), (pair.rejected, "Hello")):
        whole = renderer.conversation([*prompt, assistant(text)], train_on="last")
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
