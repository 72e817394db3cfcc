"""Conversations with tools: what is read, what the template writes, and which tokens are learned."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tool_templates import LLAMA31_TOOLS, QWEN3_TOOLS, QWEN25_TOOLS, TEXT_ARGUMENTS
from turns import branches, ids

from mlx_zh.core.packing import pack_conversations
from mlx_zh.corpus.chat_template import ChatTemplate
from mlx_zh.corpus.conversation import Conversation, Message
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.normalize import normalize
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.corpus.quality.rules import faults_of
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.scan import _item, _row
from mlx_zh.corpus.shards import RenderSettings, _accepted
from mlx_zh.corpus.sources import DataSource
from mlx_zh.errors import DataError, TemplateError

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "查天气", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]


def call(city: str, name: str = "get_weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"city": city}}, **more}


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"tool_calls": list(calls)} if calls else {})


def t(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **more}


# In the form that transformers' apply_chat_template takes: plain, with an earlier exchange, ending with a call,
# several steps, with a system message, without descriptions.
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [u("北京天气？"), a("", call("北京")), t('{"temp": 20}', name="get_weather"), a("20 度。")],
    "said": [u("北京天气？"), a("我查一下。", call("北京")), t("晴", name="get_weather"), a("晴。")],
    "call": [{"role": "system", "content": "你是助手"}, u("北京天气？"), a("", call("北京"))],
    "steps": [
        u("你好"), a("你好！"), u("比较北京和上海"), a("", call("北京")), t("20", name="get_weather"),
        a("", call("上海")), t("25", name="get_weather"), a("上海更热。"), u("谢谢"), a("不客气。"),
    ],
    "plain": [u("你好"), a("你好！")],
}  # fmt: skip
SEVERAL = {
    "two": [
        u("比较北京和上海"), a("", call("北京"), call("上海")), t("20", name="get_weather"),
        t("25", name="get_weather"), a("上海更热。"), u("谢谢"), a("不客气。"),
    ],
    "thought": [
        u("一"), a("<think>\n旧\n</think>\n\n好"), u("二"), 
        a("<think>\n想\n</think>\n\n", call("北京"), call("上海")),
        t("20", name="get_weather"), t("25", name="get_weather"), a("<think>\n再想\n</think>\n\n热。"),
    ],
}  # fmt: skip


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Reads one row; the reason for which it was dropped, or its item."""

    def read(row: dict[str, Any], kind: str = "sft", **options: Any) -> Any:
        path, report = tmp_path / "row.jsonl", LoadReport()
        path.write_text(json.dumps(row), encoding="utf-8")
        try:
            [item] = DataSource("row", (str(path),), **options).items(kind, "skip", report, normalize)
        except DataError:
            return next(iter(report.dropped))
        assert _item(json.loads(json.dumps(_row(item)))) == item
        return item

    return read


@pytest.fixture
def with_template(tokenizer_of: Any) -> Any:
    """A tokenizer of a family, with another chat template."""

    def make(family: str, template: Any) -> Any:
        changed = copy.deepcopy(tokenizer_of(family))
        changed.chat_template = template
        return changed

    return make


def independent(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, end: str) -> tuple[list[int], list[bool]]:
    """The tokens and the mask by transformers' own rendering of prefixes, without this program's layouts.

    What a reply adds to its generation prompt, up to the last end-of-turn token, is learned.
    """

    def render(count: int, ask: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages[:count], tools=tools, tokenize=False, add_generation_prompt=ask, date_string="26 Jul 2024"
        )
        return text

    whole, pieces, position = render(len(messages), False), [], 0
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(k, True)
        reply = render(k + 1, False).removeprefix(prompt)
        assert len(reply) < len(render(k + 1, False))
        learned = reply[: max(reply.rfind(token) + len(token) for token in end.split() if token in reply)]
        assert whole.startswith(prompt + learned)
        start = len(prompt)
        pieces += [(whole[position:start], False), (learned, True)]
        position = start + len(learned)
    ids: list[int] = []
    mask: list[bool] = []
    for text, trained in pieces:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        mask += [trained] * len(tokens)
    return ids, mask


def check(tokenizer: Any, item: Conversation, messages: list[dict[str, Any]], tools: Any, end: str) -> str:
    """The rendering of an item equals the independent one; returns the learned text."""
    rendered = Renderer(tokenizer).conversation(item)
    assert rendered is not None
    ids, mask = independent(tokenizer, messages, tools, end)
    assert rendered.tokens.tolist() == ids
    assert rendered.trained.tolist() == mask
    return str(tokenizer.decode(rendered.tokens[rendered.trained]))


@pytest.fixture(scope="module")
def llama31_tools(llama31: Any) -> Any:
    tokenizer = copy.deepcopy(llama31)
    tokenizer.chat_template = LLAMA31_TOOLS
    return tokenizer


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_llama31_learns_its_calls_and_no_result(name: str, tools: Any, load: Any, llama31_tools: Any) -> None:
    item = load({"messages": TALKS[name], "tools": tools})
    learned = check(llama31_tools, item, TALKS[name], tools, "<|eot_id|>")
    replies = [m for m in TALKS[name] if m["role"] == "assistant"]
    written = '{"name": "get_weather", "parameters": {"city": "%s"}}'
    assert learned == "".join(
        (written % m["tool_calls"][0]["function"]["arguments"]["city"] if "tool_calls" in m else m["content"])
        + "<|eot_id|>"
        for m in replies
    )


def test_llama31_ends_a_call_of_a_built_in_tool_as_its_template_does(load: Any, llama31_tools: Any) -> None:
    search = {"type": "function", "function": {"name": "brave_search", "arguments": {"query": "北京天气"}}}
    messages = [u("北京天气？"), a("", search), t("晴", name="brave_search"), a("晴。")]
    learned = check(llama31_tools, load({"messages": messages}), messages, None, "<|eot_id|> <|eom_id|>")
    assert learned == '<|python_tag|>brave_search.call(query="北京天气")<|eom_id|>晴。<|eot_id|>'


def kept_of(renderer: Renderer, items: list[Any], dropped: Counter[str]) -> list[Any]:
    """The rendered items with on_invalid: skip."""
    settings = RenderSettings("sft", "assistant", 4096, "truncate", None)
    return list(_accepted(renderer, settings, True, items, dropped))


def test_llama31_refuses_two_calls_in_one_reply(load: Any, llama31_tools: Any) -> None:
    item, dropped = load({"messages": SEVERAL["two"], "tools": TOOLS}), Counter[str]()
    with pytest.raises(TemplateError, match=r"row\.jsonl:1: .*single tool-calls"):
        Renderer(llama31_tools).conversation(item)
    assert kept_of(Renderer(llama31_tools), [item], dropped) == [None]
    assert dropped == {"tool message": 1}


@pytest.mark.parametrize("tools", [TOOLS, None])
@pytest.mark.parametrize("name", [*TALKS, *SEVERAL])
def test_qwen_learns_its_calls_and_no_result(name: str, tools: Any, load: Any, with_template: Any) -> None:
    messages = (TALKS | SEVERAL)[name]
    item = load({"messages": messages, "tools": json.dumps(tools)})
    learned = check(with_template("qwen2", QWEN25_TOOLS), item, messages, tools, "<|im_end|>")
    assert "tool_response" not in learned and "# Tools" not in learned and "user" not in learned
    assert learned.count("<tool_call>") == sum(len(m.get("tool_calls", ())) for m in messages)
    assert learned.count("<|im_end|>") == sum(m["role"] == "assistant" for m in messages)


def replies_of(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, **more: Any) -> list[tuple[Any, Any]]:
    """Each reply as tokens, with those of its generation prompt, by transformers' rendering of prefixes."""
    pairs = []
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            options = {"tools": tools, "tokenize": False, **more}
            prompt = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True, **options)
            whole = tokenizer.apply_chat_template(messages[: k + 1], **options)
            assert whole.startswith(prompt) and whole.endswith("<|im_end|>\n")
            pairs.append((ids(tokenizer, prompt), ids(tokenizer, whole[len(prompt) : -1])))
    return pairs


THINKING = {
    "kept within an exchange": [
        u("一"), a("好") | {"reasoning_content": "旧"}, u("二"),
        a("我查一下。", call("北京"), call("上海")) | {"reasoning_content": "想\n想"},
        t("20", name="get_weather"), t("25", name="get_weather"), a("热。") | {"reasoning_content": "再想"},
        u("谢谢"), a("不客气。") | {"reasoning_content": "客气"},
    ],
    "before a call alone": [u("北京天气？"), a("", call("北京")) | {"reasoning_content": "要查"}],
    "in the text": SEVERAL["thought"],
}  # fmt: skip


@pytest.mark.parametrize("tools", [TOOLS, None])
@pytest.mark.parametrize("name", [*TALKS, *SEVERAL, *THINKING])
@pytest.mark.parametrize(
    ("mode", "variables"), [("auto", {}), ("on", {"enable_thinking": True}), ("off", {"enable_thinking": False})]
)
def test_calls_and_reasoning_are_learned_together(
    mode: str, variables: dict[str, bool], name: str, tools: Any, load: Any, with_template: Any
) -> None:
    """Qwen3's template writes a reply otherwise once others follow: each stands after its own generation prompt."""
    tokenizer, messages = with_template("qwen3", QWEN3_TOOLS), (TALKS | SEVERAL | THINKING)[name]
    item = load({"messages": messages, "tools": json.dumps(tools)})
    renderer = Renderer(tokenizer, thinking=mode)
    if mode == "off" and any(m.get("reasoning_content") or "<think>" in m["content"] for m in messages):
        dropped: Counter[str] = Counter()
        assert kept_of(renderer, [item], dropped) == [None]
        assert dropped == {"separate reasoning": 1}
        with pytest.raises(TemplateError, match=r"row\.jsonl:1: a reply has reasoning, and model\.thinking is off"):
            renderer.conversation(item)
        renderer = Renderer(tokenizer, thinking=mode, reasoning="drop")
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
        messages = [m | {"content": m["content"].rpartition("</think>\n\n")[2]} for m in messages]
    written = replies_of(tokenizer, messages, tools, **variables)
    asked = load({"messages": messages, "tools": json.dumps(tools)}).messages
    assert sorted(branches(renderer.conversation(item))) == sorted(written)
    for k, (prompt, reply) in zip(
        [k for k, m in enumerate(messages) if m["role"] == "assistant"], written, strict=True
    ):
        assert renderer.prompt(asked[: k + bool(tools)]) == prompt
        calls = messages[k].get("tool_calls", ())
        assert tokenizer.decode(reply).count("<tool_call>") == len(calls)


def test_the_reasoning_before_a_call_can_be_context_only(load: Any, with_template: Any) -> None:
    tokenizer, messages = with_template("qwen3", QWEN3_TOOLS), THINKING["kept within an exchange"]
    item = load({"messages": messages, "tools": TOOLS})
    learned = branches(Renderer(tokenizer, thinking="on", reasoning="context").conversation(item))
    for (prompt, reply), (before, answer) in zip(
        sorted(replies_of(tokenizer, messages, TOOLS, enable_thinking=True)), sorted(learned), strict=True
    ):
        assert before + answer == prompt + reply
        thought, said = tokenizer.decode(before[len(prompt) :]), tokenizer.decode(answer)
        assert thought.startswith("<think>\n") and thought.endswith("\n</think>\n\n")
        assert not said.startswith("\n") and "</think>" not in said


def test_an_exchange_beside_the_trunk_is_scored_after_its_own_prompts(load: Any, with_template: Any) -> None:
    """In the packed row, the position that predicts a token has the token's own prompt as its ancestors."""
    tokenizer, messages = with_template("qwen3", QWEN3_TOOLS), THINKING["kept within an exchange"]
    rendered = Renderer(tokenizer).conversation(load({"messages": messages, "tools": TOOLS}))
    row = pack_conversations([(rendered.tokens, rendered.trained, rendered.segments)])
    tokens, seen = np.array(row.tokens), []
    for predictor, target in zip(np.array(row.scored).tolist(), np.array(row.targets).tolist(), strict=True):
        index = next(i for i, s in enumerate(row.segments) if s.start <= predictor < s.stop)
        before = [tokens[row.segments[a].start : row.segments[a].stop] for a in row.ancestors(index)]
        seen.append(([*np.concatenate([*before, tokens[row.segments[index].start : predictor + 1]])], target))
    replies = replies_of(tokenizer, messages, TOOLS)
    assert sorted(seen) == sorted((p + r[:n], r[n]) for p, r in replies for n in range(len(r)))


def test_a_call_of_a_tree_is_never_cut_from_its_result(load: Any, with_template: Any) -> None:
    tokenizer, messages = with_template("qwen3", QWEN3_TOOLS), THINKING["kept within an exchange"]
    renderer, item = Renderer(tokenizer), load({"messages": messages, "tools": TOOLS})
    replies = replies_of(tokenizer, messages, TOOLS)
    whole, counts = renderer.conversation(item), set()
    for most in range(1, len(whole.tokens) + 1):
        rendered = renderer.conversation(item, max_length=most)
        if rendered is not None:
            assert len(rendered.tokens) <= most
            learned = branches(rendered)
            assert sorted(learned) == sorted(replies[: len(learned)])
            counts.add(len(learned))
    assert counts == {1, 3, 4}  # the second reply is a call


def test_arguments_are_given_as_text_where_a_template_wants_them_so(load: Any, with_template: Any) -> None:
    as_text = copy.deepcopy(SEVERAL["two"])
    for one in as_text[1]["tool_calls"]:
        one["function"]["arguments"] = json.dumps(one["function"]["arguments"], ensure_ascii=False)
    item = load({"messages": SEVERAL["two"], "tools": TOOLS})
    assert load({"messages": as_text, "tools": TOOLS}) == item
    learned = check(with_template("qwen2", TEXT_ARGUMENTS), item, as_text, TOOLS, "<|im_end|>")
    written = '<|endoftext|>get_weather\n{"city": "%s"}<|endoftext|>'
    assert learned == f"{written % '北京'}{written % '上海'}<|im_end|>上海更热。<|im_end|>不客气。<|im_end|>"


def test_the_template_for_tools_is_used_where_there_is_one(load: Any, with_template: Any, tokenizer_of: Any) -> None:
    plain = tokenizer_of("qwen2").chat_template
    both = with_template("qwen2", {"default": plain, "tool_use": QWEN25_TOOLS})
    item = load({"messages": TALKS["one"], "tools": TOOLS})
    assert np.array_equal(
        Renderer(both).conversation(item).tokens,
        Renderer(with_template("qwen2", QWEN25_TOOLS)).conversation(item).tokens,
    )
    assert Renderer(both).fingerprint != Renderer(tokenizer_of("qwen2")).fingerprint


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "smollm2", "mistral"])
def test_a_template_that_knows_no_tools_refuses_the_row_by_name(family: str, load: Any, tokenizer_of: Any) -> None:
    renderer, plain = Renderer(tokenizer_of(family)), load({"messages": TALKS["plain"]})
    for row in (
        {"messages": TALKS["one"]},
        {"messages": TALKS["call"][1:]},
        {"messages": TALKS["plain"], "tools": TOOLS},
    ):
        item, dropped = load(row), Counter[str]()
        with pytest.raises(TemplateError, match=r"row\.jsonl:1: the chat template does not write"):
            renderer.conversation(item)
        kept = kept_of(renderer, [plain, item, plain], dropped)
        assert [one is None for one in kept] == [False, True, False]
        assert dropped == {"tool message": 1}


def test_a_call_is_never_cut_from_its_result(load: Any, with_template: Any) -> None:
    renderer = Renderer(with_template("qwen2", QWEN25_TOOLS))
    item = load({"messages": TALKS["steps"], "tools": TOOLS})
    whole = renderer.conversation(item)
    ends = {len(renderer.conversation(item.messages[: k + 1]).tokens) for k in (2, 8, 10)}  # after the three answers
    lengths = set()
    for most in range(1, len(whole.tokens) + 1):
        dropped: Counter[str] = Counter()
        rendered = renderer.conversation(item, max_length=most, dropped=dropped)
        if rendered is None:
            assert dropped == {"first exchange longer than max_length": 1}
            continue
        lengths.add(len(rendered.tokens))
        assert rendered.tokens.tolist() == whole.tokens[: len(rendered.tokens)].tolist()
        assert rendered.trained.tolist() == whole.trained[: len(rendered.tokens)].tolist()
    assert lengths == ends


def test_pairs_of_calls(load: Any, with_template: Any) -> None:
    tokenizer = with_template("qwen2", QWEN25_TOOLS)
    good, bad, said = a("", call("北京")), a("", call("上海")), a("我不知道。")
    prompt = [u("北京天气？")]
    later = [*prompt, good, t("20", name="get_weather")]
    for before, chosen, rejected in ((prompt, good, bad), (prompt, good, said), (later, a("20 度"), bad)):
        rows = [
            {"messages": before, "chosen": chosen, "rejected": rejected, "tools": TOOLS},
            {"prompt": before, "chosen": [chosen], "rejected": [rejected], "tools": TOOLS},
            {"chosen": [*before, chosen], "rejected": [*before, rejected], "tools": TOOLS},
            {"messages": [*before, chosen], "rejected_messages": [*before, rejected], "tools": TOOLS},
            {
                "input": {"messages": before, "tools": TOOLS, "parallel_tool_calls": True},
                "preferred_output": [chosen],
                "non_preferred_output": [rejected],
            },
        ]
        pairs = [Renderer(tokenizer).preference(load(row, "dpo")) for row in rows]
        for pair in pairs:
            for answer, message in ((pair.chosen, chosen), (pair.rejected, rejected)):
                ids, mask = independent(tokenizer, [*before, message], TOOLS, "<|im_end|>")
                assert [*pair.prompt.tolist(), *answer.tolist()] == ids
                assert mask[-len(answer) - 1 :] == [False] + [True] * len(answer)
    same = {"messages": prompt, "chosen": good, "rejected": a("", call("北京"))}
    assert load(same, "dpo") == "identical responses"


# ---- forms of rows

ITEM = [
    Message("tools", json.dumps(TOOLS, ensure_ascii=False)),
    Message("user", "北京天气？"),
    Message("assistant", "", calls='[{"name": "get_weather", "arguments": {"city": "北京"}}]'),
    Message("tool", '{"temp": 20}', calls='{"name": "get_weather"}'),
    Message("assistant", "20 度。"),
]
ONE = '{"name": "get_weather", "arguments": {"city": "北京"}}'
SHAREGPT = [
    {"from": "human", "value": "北京天气？"},
    {"from": "function_call", "value": ONE},
    {"from": "observation", "value": '{"temp": 20}'},
    {"from": "gpt", "value": "20 度。"},
]
WITH_TEXT = {"name": "get_weather", "arguments": '{"city": "北京"}'}
OLD_CALL = {"role": "assistant", "content": None, "function_call": WITH_TEXT}
FORMS = {
    "openai": {"messages": TALKS["one"], "tools": TOOLS},
    "arguments as text": {
        "messages": [u("北京天气？"), OLD_CALL, t('{"temp": 20}'), a("20 度。")], "tools": TOOLS,
    },
    "functions": {
        "messages": [
            u("北京天气？"), OLD_CALL, {"role": "function", "name": "get_weather", "content": '{"temp": 20}'},
            a("20 度。"),
        ],
        "functions": [FUNCTION],
    },
    "llama-factory": {"conversations": SHAREGPT, "tools": json.dumps([FUNCTION])},
    "a list of calls": {
        "conversations": [SHAREGPT[0], {"from": "function_call", "value": f"[{ONE}]"}, *SHAREGPT[2:]],
        "tools": json.dumps(TOOLS),
    },
    "ms-swift": {
        "messages": [
            u("北京天气？"), {"role": "tool_call", "content": ONE},
            {"role": "tool_response", "content": '{"temp": 20}'}, a("20 度。"),
        ],
        "tools": [json.dumps(FUNCTION)],
    },
    "a result that is an object": {
        "messages": [u("北京天气？"), a("", call("北京")), {"role": "tool", "content": {"temp": 20}}, a("20 度。")],
        "tools": TOOLS,
    },
    "nulls of a table": {
        "messages": [
            u("北京天气？") | {"tool_calls": None},
            a("", {"function": {"name": "get_weather", "arguments": {"city": "北京", "query": None}}}),
            t('{"temp": 20}') | {"tool_calls": []}, a("20 度。") | {"tool_calls": None},
        ],
        "tools": [{"type": "function", "function": FUNCTION | {"strict": None}}],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_calls_is_read_alike(form: str, load: Any) -> None:
    assert list(load(FORMS[form]).messages) == ITEM


def test_a_column_of_tools_can_have_another_name(load: Any) -> None:
    row = {"conversations": SHAREGPT, "apis": json.dumps([FUNCTION])}
    assert list(load(row, columns={"tools": "apis"}).messages) == ITEM
    assert list(load(row | {"apis": ""}, columns={"tools": "apis"}).messages) == ITEM[1:]


def test_text_before_calls_and_calls_of_their_own_turns_become_one_reply(load: Any) -> None:
    two = [
        u("北京和上海？"), a("我查一下。"), {"role": "tool_call", "content": ONE},
        {"role": "tool_call", "content": ONE.replace("北京", "上海")}, t("20"), t("25"), a("好"),
    ]  # fmt: skip
    _, reply, first, second, _ = load({"messages": two}).messages
    assert reply.content == "我查一下。"
    assert [c["arguments"]["city"] for c in json.loads(reply.calls)] == ["北京", "上海"]
    assert first.calls == second.calls == '{"name": "get_weather"}'


def test_results_are_named_after_the_call_that_they_belong_to(load: Any) -> None:
    calls = [call("北京", "one", id="c1"), call("北京", "two", id="c2")]
    talk = [u("问"), a("", *calls), t("二", tool_call_id="c2"), t("一", tool_call_id="c1"), a("好")]
    _, _, first, second, _ = load({"messages": talk}).messages
    assert [(json.loads(m.calls), m.content) for m in (first, second)] == [
        ({"name": "two", "id": "c2"}, "二"),
        ({"name": "one", "id": "c1"}, "一"),
    ]


def test_a_system_message_that_describes_the_tools_itself_stays_the_only_one(load: Any) -> None:
    system = {"from": "system", "value": "<tools>" + json.dumps(FUNCTION) + "</tools>"}
    hermes = [
        system, {"from": "human", "value": "北京天气？"},
        {"from": "gpt", "value": f"<tool_call>\n{ONE}\n</tool_call>"},
        {"from": "tool", "value": "20"}, {"from": "gpt", "value": "20 度。"},
    ]  # fmt: skip
    item = load({"conversations": hermes, "tools": json.dumps([FUNCTION])})
    assert [message.role for message in item.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert item.messages[2].content == f"<tool_call>\n{ONE}\n</tool_call>"


def test_a_system_message_of_the_recipe_stands_behind_the_tools(load: Any) -> None:
    from mlx_zh.corpus.conversation import with_system

    item = with_system(load(FORMS["openai"]), "海盗")
    assert [message.role for message in item.messages[:3]] == ["tools", "system", "user"]
    assert with_system(item, "诗人") == item


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": "no JSON"}, "tool message"),
        ({"tools": [{"type": "function"}]}, "tool message"),
        ({"tools": TOOLS, "functions": TOOLS}, "tool message"),
        ({"tool_calls": [call("北京")]}, "tool message"),
        ({"messages": [u("问") | {"tool_calls": [call("北京")]}, a("答")]}, "tool message"),
        ({"messages": [u("问"), a("", {"function": {"name": "f", "arguments": "{"}})]}, "tool message"),
        ({"messages": [u("问"), a("", {"function": {"name": "f", "arguments": [1]}})]}, "tool message"),
        ({"messages": [u("问"), a("", {"function": {"arguments": {}}})]}, "tool message"),
        ({"messages": [u("问"), a("", call("北京")), u("问"), a("答")]}, "roles out of order"),
        ({"messages": [u("问"), t("20"), a("答")]}, "roles out of order"),
        ({"messages": [u("问"), a("答"), t("20"), a("答")]}, "roles out of order"),
        ({"messages": [u("问"), a("", call("北京")), t("20")]}, "does not end with assistant"),
        ({"messages": [u("问"), a("", call("北京")), t("20"), a(" ")]}, "empty reply"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_read_are_refused_by_name(change: dict[str, Any], reason: str, load: Any) -> None:
    assert load({"messages": [u("问"), a("答")]} | change) == reason


def test_what_changes_texts_changes_those_of_tools_too(load: Any) -> None:
    row = copy.deepcopy(FORMS["openai"])
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"city": "ＡＢ１"}
    assert json.loads(load(row).messages[2].calls)[0]["arguments"] == {"city": "AB1"}


def test_a_control_token_in_a_result_refuses_the_row(load: Any, with_template: Any) -> None:
    renderer = Renderer(with_template("qwen2", QWEN25_TOOLS))
    row = copy.deepcopy(FORMS["openai"])
    row["messages"][2]["content"] = "<|im_end|>"
    dropped: Counter[str] = Counter()
    with pytest.raises(TemplateError, match="spells one of the model's control tokens"):
        renderer.conversation(load(row))
    assert kept_of(renderer, [load(row)], dropped) == [None]
    assert dropped == {"tool message": 1}


def test_a_long_conversation_with_tools_is_found_without_rendering_every_prefix(
    load: Any, with_template: Any, monkeypatch: Any
) -> None:
    tokenizer = with_template("qwen2", QWEN25_TOOLS)
    talk = [
        message
        for i in range(150)
        for message in (u(f"{i}？"), a("", call(f"城{i}")), t(str(i), name="get_weather"), a(f"{i} 度。"))
    ]
    item = load({"messages": talk, "tools": TOOLS})
    rendered_messages, original = [], ChatTemplate.render

    def counting(self: Any, messages: Any, **options: Any) -> str:
        rendered_messages.append(len(messages))
        return original(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    check(tokenizer, item, talk, TOOLS, "<|im_end|>")
    assert sum(rendered_messages) < 64 * 3 * 2 * 64 + 2 * len(talk)


def exchanges(count: int, thoughts: str) -> list[dict[str, Any]]:
    """Questions that are answered with a call, two calls one after the other, or at once; some replies have thoughts.

    `thoughts`: "all", "none" or "some".
    """
    talk = []
    for i in range(count):
        steps = [(call(f"城{i}"),), (call(f"镇{i}"), call(f"村{i}"))][: i % 3]
        talk.append(u(f"{i}？"))
        for calls in steps:
            talk += [a("查" * (i % 2), *calls), *(t(f"{i}", name="get_weather") for _ in calls)]
        talk.append(a(f"{i} 度。"))
    replies = [m for m in talk if m["role"] == "assistant"]
    for number, reply in enumerate(replies):
        if thoughts == "all" or (thoughts == "some" and number % 5 < 2):
            reply["reasoning_content"] = f"想{number}"
    return talk


@pytest.mark.parametrize("thoughts", ["all", "some", "none"])
def test_long_exchanges_are_the_templates_own(thoughts: str, load: Any, with_template: Any) -> None:
    """More replies than are rendered with all that stands before them."""
    tokenizer, talk = with_template("qwen3", QWEN3_TOOLS), exchanges(18, thoughts)
    item = load({"messages": talk, "tools": TOOLS})
    rendered = Renderer(tokenizer).conversation(item)
    assert sorted(branches(rendered)) == sorted(replies_of(tokenizer, talk, TOOLS))


def test_an_exchange_of_many_calls_is_the_templates_own(load: Any, with_template: Any) -> None:
    tokenizer, talk = with_template("qwen3", QWEN3_TOOLS), [u("一"), a("二"), u("各地？")]
    for i in range(40):
        talk += [a("", call(f"城{i}")) | ({"reasoning_content": "想"} if i % 3 else {}), t("晴", name="get_weather")]
    talk += [a("都晴。"), u("谢谢"), a("不谢")]
    rendered = Renderer(tokenizer).conversation(load({"messages": talk, "tools": TOOLS}))
    assert sorted(branches(rendered)) == sorted(replies_of(tokenizer, talk, TOOLS))


NUMBERED_TURNS = QWEN3_TOOLS.replace(
    "'<|im_start|>assistant\\n'", "'<|im_start|>assistant ' ~ loop.index ~ '\\n'"
).replace(
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant ' ~ loop.index ~ '\\n' }}",
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant ' ~ (messages | length + 1) ~ '\\n' }}",
)


@pytest.mark.parametrize("thoughts", ["all", "none"])
def test_a_template_that_numbers_its_turns_is_rendered_whole(thoughts: str, load: Any, with_template: Any) -> None:
    """The turns next to a reply do not say its number."""
    assert NUMBERED_TURNS.count("assistant ' ~") == 2
    tokenizer, talk = with_template("qwen3", NUMBERED_TURNS), exchanges(18, thoughts)
    rendered = Renderer(tokenizer).conversation(load({"messages": talk, "tools": TOOLS}))
    assert sorted(branches(rendered)) == sorted(replies_of(tokenizer, talk, TOOLS))


@pytest.mark.parametrize("thoughts", ["all", "some", "none"])
def test_what_is_rendered_grows_with_the_replies_of_a_conversation(
    thoughts: str, load: Any, with_template: Any, monkeypatch: Any
) -> None:
    """Beyond the first replies, each of which is rendered with all that stands before it."""
    tokenizer = with_template("qwen3", QWEN3_TOOLS)
    items = [load({"messages": exchanges(count, thoughts), "tools": TOOLS}) for count in (100, 200, 400)]
    renderer = Renderer(tokenizer)
    renderer.conversation(items[0].messages[:5])  # what the template does is known from here on
    rendered_messages, original = [0], ChatTemplate.render

    def counting(self: Any, messages: Any, **options: Any) -> str:
        rendered_messages[-1] += len(messages)
        return original(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    for item in items:
        rendered_messages.append(0)
        assert renderer.conversation(item) is not None
    once, twice, four_times = rendered_messages[1:]
    assert twice - once < 100 * 100
    assert four_times - twice < 200 * 100


def test_load_functions_take_rows_with_tools(write: Any) -> None:
    path = write(json.dumps(FORMS["openai"]))
    [item], _ = load_conversations(path)
    assert list(item.messages) == ITEM
    pair = {"messages": [u("问")], "chosen": a("", call("北京")), "rejected": a("不知道"), "tools": TOOLS}
    [loaded], _ = load_preferences(write(json.dumps(pair), "pair.jsonl"))
    assert loaded.chosen == "" and json.loads(loaded.chosen_calls)[0]["name"] == "get_weather"


def test_the_reasoning_of_a_call_is_kept_in_every_form(load: Any) -> None:
    thought = {"reasoning_content": "要查"}
    forms = (
        [a("", call("北京")) | thought],
        [{"role": "assistant", "content": None, "tool_calls": [call("北京")]} | thought],
        [{"role": "function_call", "content": ONE} | thought],
        [a("") | thought, {"role": "tool_call", "content": ONE}],
        [a("") | {"reasoning": "要"}, {"role": "tool_call", "content": ONE, "reasoning": "查"}],
    )
    for calls in forms:
        item = load({"messages": [u("北京天气？"), *calls, t("晴"), a("晴。")]})
        assert item.messages[1].reasoning.replace("\n", "") == "要查"
        assert item.messages[1].calls == ITEM[2].calls and len(item.messages) == 4
    row = {"messages": [u("北京天气？"), a("", call("北京")), t("晴") | thought, a("晴。")]}
    assert load(row) == "separate reasoning"


def test_personal_data_is_masked_in_calls_results_and_reasoning(load: Any) -> None:
    mail = "zhang.san@foxmail.com"
    row = {
        "messages": [
            u("写信"),
            a("", call(mail)) | {"reasoning_content": f"写给 {mail}"},
            t(f"已发给 {mail}"),
            a("好"),
        ],
        "tools": TOOLS,
    }
    item = load(row)
    faults, masked = faults_of(item)
    assert mail not in repr(masked) and "personal" in faults
    [tools, _, reply, result, _] = masked.messages
    assert json.loads(tools.content) == TOOLS and json.loads(reply.calls)[0]["name"] == "get_weather"
    assert reply.reasoning.startswith("写给 ") and result.content.startswith("已发给 ")
    pair = load({"prompt": "写信", "chosen": a("", call(mail)), "rejected": "不会", "tools": TOOLS}, "dpo")
    assert mail not in repr(faults_of(pair)[1]) and faults_of(pair)[1].answers[0].calls


@pytest.mark.parametrize("more", [{"tools": TOOLS}, {"reasoning": "想"}])
def test_a_raw_text_has_neither_tools_nor_reasoning(more: dict[str, Any], load: Any) -> None:
    assert load({"text": "北京是首都。"} | more) == ("tool message" if "tools" in more else "separate reasoning")


def test_the_score_of_a_raw_text_is_not_that_of_an_answer(load: Any) -> None:
    assert load({"text": "北京是首都。", "score": -1}).text == "北京是首都。"
    assert load({"instruction": "首都？", "output": "北京", "score": -1}) == "answer not to imitate"
