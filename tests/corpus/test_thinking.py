"""Thinking: each learned reply stands after exactly the prompt from which a model writes it."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CUTTING, EFFORT, METADATA, QWEN25, THINKING
from hypothesis import given
from hypothesis import strategies as st
from turns import TWO_TURNS, assistant, branches, ids, system, user

from mlx_zh.core.packing import pack_conversations
from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Conversation, Message, Preference
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.rendered import FIRST_EXCHANGE_OVERFLOW, NOT_TRAINED, OVERFLOW, PROMPT_OVERFLOW
from mlx_zh.corpus.thinking import thinking_of
from mlx_zh.errors import DataError, RefusedReasoning, TemplateError


def thoughtful(content: str, reasoning: str) -> Message:
    return Message("assistant", content, reasoning=reasoning)


THOUGHT = (user("9.11 和 9.8"), thoughtful("9.8", "先比较小数"), user("再见"), thoughtful("Hello", "so"))


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of("qwen3")


def rows_of(messages, key):
    return [{"role": m.role, "content": m.content} | ({key: m.reasoning} if m.reasoning else {}) for m in messages]


def expected(tokenizer, template, messages, end="<|im_end|>", *, key="reasoning_content", **variables):
    """For each reply its prompt and itself as tokens, from transformers' own rendering of what comes before it."""
    reference = copy.deepcopy(tokenizer)
    reference.chat_template = template
    rows = rows_of(messages, key)
    pairs = []
    for k, row in enumerate(rows):
        if row["role"] == "assistant":
            prompt = reference.apply_chat_template(
                rows[:k], tokenize=True, return_dict=False, add_generation_prompt=True, **variables
            )
            before = reference.apply_chat_template(rows[:k], tokenize=False, add_generation_prompt=True, **variables)
            whole = reference.apply_chat_template(rows[: k + 1], tokenize=False, **variables)
            assert whole.startswith(before)
            reply = whole[len(before) :]
            pairs.append((prompt, ids(tokenizer, reply[: reply.rindex(end) + len(end)])))
    return pairs


# --- What a template does ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "switch", "way", "opened", "effort"),
    [
        (THINKING, "enable_thinking", "reasoning_content", False, None),
        (THINKING.replace("enable_thinking", "thinking"), "thinking", "reasoning_content", False, None),
        (CUTTING, None, "apart", True, None),
        (METADATA, "enable_thinking", "inline", False, None),
        (EFFORT, None, "thinking", False, "reasoning_effort"),
        (QWEN25, None, None, False, None),
    ],
)
def test_what_a_template_does_is_found_by_rendering_it(template, switch, way, opened, effort):
    thinking = thinking_of(ChatTemplate(template, date_string="26 Jul 2024", variables={}))
    assert (thinking.switch, thinking.way, thinking.opened, thinking.effort) == (switch, way, opened, effort)


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize(
    ("template", "message"), [(QWEN25, "has no switch"), (EFFORT, "reasoning_effort, which says how much")]
)
def test_a_mode_that_a_template_lacks_is_refused(tokenizer, template, mode, message):
    with pytest.raises(TemplateError, match=f"model.thinking is {mode}.*{message}"):
        Renderer(tokenizer, chat_template=template, thinking=mode)


def test_a_template_that_always_thinks_can_be_on_only(tokenizer):
    Renderer(tokenizer, chat_template=CUTTING, thinking="on")
    with pytest.raises(TemplateError, match="always begins a reply with <think>"):
        Renderer(tokenizer, chat_template=CUTTING, thinking="off")


# --- Token for token ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "variables"), [("auto", {}), ("on", {"enable_thinking": True})])
def test_replies_with_reasoning_are_the_templates_own(tokenizer, mode, variables):
    rendered = Renderer(tokenizer, chat_template=THINKING, thinking=mode).conversation(THOUGHT)
    assert branches(rendered) == expected(tokenizer, THINKING, THOUGHT, **variables)
    text = tokenizer.decode(branches(rendered)[0][1])
    assert text == "<think>\n先比较小数\n</think>\n\n9.8<|im_end|>"


def test_with_thinking_off_the_empty_thought_is_context(tokenizer):
    renderer = Renderer(tokenizer, chat_template=THINKING, thinking="off")
    rendered = renderer.conversation(TWO_TURNS)
    reference = expected_off(tokenizer)
    assert branches(rendered) == reference
    assert [tokenizer.decode(reply) for _, reply in reference] == [
        "Hello 世界🙂<|im_end|>",
        "好，今天天气很好。<|im_end|>",
    ]
    assert tokenizer.decode(reference[0][0]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert [prompt for prompt, _ in reference] == [renderer.prompt(TWO_TURNS[:k]) for k in (1, 3)]


def expected_off(tokenizer):
    return expected(tokenizer, THINKING, TWO_TURNS, enable_thinking=False)


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_metadata_in_the_system_turn(tokenizer, mode):
    variables = {} if mode == "auto" else {"enable_thinking": mode == "on"}
    messages = (system("你好"), *TWO_TURNS)
    rendered = Renderer(tokenizer, chat_template=METADATA, thinking=mode).conversation(messages)
    assert branches(rendered) == expected(tokenizer, METADATA, messages, **variables)


def test_thoughts_in_a_channel(tokenizer):
    rendered = Renderer(tokenizer, chat_template=EFFORT).conversation(THOUGHT)
    assert branches(rendered) == expected(tokenizer, EFFORT, THOUGHT, "<|endoftext|>", key="thinking")


def test_a_template_that_cuts_reasoning_away(tokenizer):
    """It cannot write reasoning, so the reply is what the model writes after the prompt, which opens the thought."""
    rendered = Renderer(tokenizer, chat_template=CUTTING).conversation(THOUGHT)
    pairs = [(tokenizer.decode(prompt), tokenizer.decode(reply)) for prompt, reply in branches(rendered)]
    first = "<|im_start|>user\n9.11 和 9.8<|im_end|>\n"
    second = f"{first}<|im_start|>assistant\n9.8<|im_end|>\n<|im_start|>user\n再见<|im_end|>\n"
    header = "<|im_start|>assistant\n<think>\n"
    assert pairs == [
        (first + header, "先比较小数\n</think>\n\n9.8<|im_end|>"),
        (second + header, "so\n</think>\n\nHello<|im_end|>"),
    ]


WORDS = st.text(st.sampled_from("ab你1 \n。"), min_size=1, max_size=8).filter(str.strip)
TURNS = st.lists(st.tuples(WORDS, WORDS, st.one_of(st.just(""), WORDS.map(str.strip))), min_size=1, max_size=6)


@pytest.mark.parametrize("template", [THINKING, METADATA])
@pytest.mark.parametrize("mode", ["auto", "on", "off"])
@given(turns=TURNS, skipped=st.sets(st.integers(0, 5)))
def test_any_conversation_is_the_templates_own(tokenizer_of, template, mode, turns, skipped):
    tokenizer = tokenizer_of("qwen3")
    inline = template == METADATA
    messages = []
    for number, (question, answer, thought) in enumerate(turns):
        reasoning = "" if mode == "off" or inline else thought
        messages += [user(question), Message("assistant", answer, number not in skipped, reasoning)]
    dropped: Counter[str] = Counter()
    rendered = Renderer(tokenizer, chat_template=template, thinking=mode).conversation(messages, dropped=dropped)
    variables = {} if mode == "auto" else {"enable_thinking": mode == "on"}
    pairs = [
        pair
        for number, pair in enumerate(expected_texts(tokenizer, template, messages, **variables))
        if number not in skipped
    ]
    if not pairs:
        assert rendered is None and dropped == {NOT_TRAINED: 1}
        return
    decoded = [(tokenizer.decode(prompt), tokenizer.decode(reply)) for prompt, reply in branches(rendered)]
    assert decoded == pairs


def expected_texts(tokenizer, template, messages, **variables):
    return [
        (tokenizer.decode(prompt), tokenizer.decode(reply))
        for prompt, reply in expected(tokenizer, template, messages, **variables)
    ]


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_long_conversation_is_the_templates_own(tokenizer, mode):
    """More replies than are rendered with all that stands before them."""
    messages = [Message(("user", "assistant")[i % 2], f"{i}你" * (1 + i % 3)) for i in range(80)]
    rendered = Renderer(tokenizer, chat_template=THINKING, thinking=mode).conversation(messages)
    variables = {} if mode == "auto" else {"enable_thinking": False}
    assert branches(rendered) == expected(tokenizer, THINKING, messages, **variables)


# --- What is learned of reasoning --------------------------------------------------------------------------------


def test_reasoning_in_the_text_is_the_same_as_apart(tokenizer):
    written = tuple(
        replace(m, content=f"<think>\n{m.reasoning}\n</think>\n\n{m.content}", reasoning="") if m.reasoning else m
        for m in THOUGHT
    )
    renderer = Renderer(tokenizer, chat_template=THINKING)
    assert branches(renderer.conversation(written)) == branches(renderer.conversation(THOUGHT))


@pytest.mark.parametrize("template", [THINKING, CUTTING, EFFORT])
def test_reasoning_as_context(tokenizer, template):
    whole = branches(Renderer(tokenizer, chat_template=template).conversation(THOUGHT))
    answers = branches(Renderer(tokenizer, chat_template=template, reasoning="context").conversation(THOUGHT))
    for (prompt, reply), (before, answer), text in zip(whole, answers, ("9.8", "Hello"), strict=True):
        assert tokenizer.decode(before + answer) == tokenizer.decode(prompt + reply)
        assert tokenizer.decode(answer).startswith(text)


def test_dropped_reasoning_is_as_if_there_were_none(tokenizer):
    plain = tuple(replace(message, reasoning="") for message in THOUGHT)
    for mode in ("on", "off"):
        renderer = Renderer(tokenizer, chat_template=THINKING, thinking=mode, reasoning="drop")
        assert branches(renderer.conversation(THOUGHT)) == branches(renderer.conversation(plain))


def test_reasoning_that_is_never_written_is_refused(tokenizer):
    row = Conversation(THOUGHT, "d.jsonl:4")
    with pytest.raises(RefusedReasoning, match=r"d\.jsonl:4: .*model.thinking is off"):
        Renderer(tokenizer, chat_template=THINKING, thinking="off").conversation(row)
    with pytest.raises(RefusedReasoning, match=r"d\.jsonl:4: .*does not know reasoning; set data.reasoning: drop"):
        Renderer(tokenizer, chat_template=QWEN25).conversation(row)
    assert Renderer(tokenizer, chat_template=QWEN25, reasoning="drop").conversation(row) is not None


def test_history_may_hold_thoughts_when_thinking_is_off(tokenizer):
    renderer = Renderer(tokenizer, chat_template=THINKING, thinking="off")
    said = (user("Hello"), assistant("<think>\nwell\n</think>\n\n你好"), user("再见"))
    plain = (user("Hello"), assistant("你好"), user("再见"))
    assert renderer.prompt(said) == renderer.prompt(plain)


# --- Length, control tokens, pairs -------------------------------------------------------------------------------


def test_a_tree_is_cut_after_the_last_reply_that_fits(tokenizer):
    renderer = Renderer(tokenizer, chat_template=THINKING, thinking="off")
    whole, first = renderer.conversation(TWO_TURNS), renderer.conversation(TWO_TURNS[:2])
    cut = renderer.conversation(TWO_TURNS, max_length=len(whole.tokens) - 1)
    assert cut.truncated and cut.segments is None
    assert branches(cut) == branches(first)
    dropped: Counter[str] = Counter()
    short = len(first.tokens) - 1
    assert renderer.conversation(TWO_TURNS, max_length=short, dropped=dropped) is None
    assert renderer.conversation(TWO_TURNS, max_length=short, on_overflow="drop", dropped=dropped) is None
    assert dropped == {FIRST_EXCHANGE_OVERFLOW: 1, OVERFLOW: 1}


def test_only_the_last_reply(tokenizer):
    renderer = Renderer(tokenizer, chat_template=THINKING, thinking="off")
    rendered = renderer.conversation(TWO_TURNS, train_on="last")
    assert rendered.segments is None
    assert branches(rendered) == expected_off(tokenizer)[1:]


def test_control_tokens_in_messages_end_no_turn(tokenizer):
    renderer = Renderer(tokenizer, chat_template=THINKING, thinking="off")
    messages = (user("a<|im_end|>"), assistant("<|im_start|>b"), user("c"), assistant("d<|im_end|>"))
    for tokens, trained in renderer.conversation(messages).paths():
        reply = tokens[trained].tolist()
        assert reply.index(tokenizer.eos_token_id) == len(reply) - 1
    texts = [tokenizer.decode(reply) for _, reply in branches(renderer.conversation(messages))]
    assert texts == ["<|im_start|>b<|im_end|>", "d<|im_end|><|im_end|>"]


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_pairs(tokenizer, mode):
    renderer = Renderer(tokenizer, chat_template=THINKING, thinking=mode)
    pair = renderer.preference(Preference(TWO_TURNS[:3], "Hello", "你好", "x"))
    assert pair.prompt.tolist() == renderer.prompt(TWO_TURNS[:3])
    for response, text in ((pair.chosen, "Hello"), (pair.rejected, "你好")):
        rendered = renderer.conversation([*TWO_TURNS[:3], assistant(text)], train_on="last")
        assert [(pair.prompt.tolist(), response.tolist())] == branches(rendered)


@pytest.mark.parametrize("template", [THINKING, QWEN25])
def test_a_long_prompt_is_rendered_no_further_than_it_fits(tokenizer, template, monkeypatch):
    """The pair is dropped for the same reason; one that fits is as without a limit."""
    renderer = Renderer(tokenizer, chat_template=template)
    turns = [Message(("user", "assistant")[i % 2], f"{i}你") for i in range(1601)]
    pair, fits = Preference(tuple(turns), "Hello", "你好", "x"), Preference(tuple(turns[:201]), "Hello", "你好", "x")
    whole = renderer.preference(fits)
    limit = len(whole.prompt) + 100
    rendered, original = [], ChatTemplate.render

    def counting(self, messages, **options):
        rendered.append(len(messages))
        return original(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    dropped: Counter[str] = Counter()
    assert renderer.preference(pair, max_length=limit, dropped=dropped) is None
    assert dropped == {PROMPT_OVERFLOW: 1} and max(rendered) < 600
    kept = renderer.preference(fits, max_length=limit)
    assert [kept.prompt.tolist(), kept.chosen.tolist()] == [whole.prompt.tolist(), whole.chosen.tolist()]


def test_with_thinking_off_a_template_may_leave_the_empty_thought_out(tokenizer):
    """As MiniCPM's: the generation prompt has it, the reply does not; the model still writes the reply after it."""
    template = THINKING.replace("(loop.last or reasoning)", "reasoning")
    rendered = Renderer(tokenizer, chat_template=template, thinking="off").conversation(TWO_TURNS)
    assert branches(rendered) == expected_off(tokenizer)


def test_the_fingerprint_knows_the_mode(tokenizer):
    def made(**options):
        return Renderer(tokenizer, chat_template=THINKING, **options)

    prints = {made(thinking=mode).fingerprint for mode in ("on", "off", "auto")}
    assert len(prints | {made(reasoning="context").fingerprint, made(reasoning="drop").fingerprint}) == 5
    assert len({made(thinking=mode).template_fingerprint for mode in ("on", "off", "auto")}) == 1


def test_a_tree_scores_each_reply_after_its_own_prompt(tokenizer):
    """In the packed row, the position that predicts a token has the token's own prompt as its ancestors."""
    rendered = Renderer(tokenizer, chat_template=THINKING, thinking="off").conversation(TWO_TURNS)
    row = pack_conversations([(rendered.tokens, rendered.trained, rendered.segments)])
    tokens, predictors = np.array(row.tokens), np.array(row.scored)
    targets = np.array(row.targets).tolist()
    seen = []
    for predictor in predictors.tolist():
        index = next(i for i, s in enumerate(row.segments) if s.start <= predictor < s.stop)
        before = [tokens[row.segments[a].start : row.segments[a].stop] for a in row.ancestors(index)]
        seen.append(np.concatenate([*before, tokens[row.segments[index].start : predictor + 1]]).tolist())
    reference = [
        (prompt + reply[:n], reply[n]) for prompt, reply in expected_off(tokenizer) for n in range(len(reply))
    ]
    assert list(zip(seen, targets, strict=True)) == reference


@pytest.mark.parametrize(
    ("beside", "refused"), [("甲", False), (" 甲\n", False), ("乙", True)], ids=["equal", "but for blanks", "other"]
)
def test_reasoning_in_the_text_and_beside_it_must_be_the_same(tmp_path: Path, beside: str, refused: bool) -> None:
    """Only one of them could be learned, and the other would be lost."""
    reply = {"role": "assistant", "content": "<think>甲</think>\n\n答", "reasoning_content": beside}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "问"}, reply]}, ensure_ascii=False))
    if refused:
        with pytest.raises(DataError, match=r"d\.jsonl:1: .messages.\[1\]: the text begins with other reasoning"):
            load_conversations(path)
    else:
        load_conversations(path)
