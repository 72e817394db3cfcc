"""The chat: cache, streaming, commands, and the program as a user runs it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tolerances import LOGITS
from transformers import PreTrainedTokenizerFast

from mlx_zh import chat
from mlx_zh.chatting.chatbot import Chatbot, context_length
from mlx_zh.chatting.repl import COMMANDS, Repl, command_in
from mlx_zh.chatting.terminal import LineEditor, Screen, plain, side_by_side, text_width, unfinished, wrap
from mlx_zh.chatting.transcript import ContextError, Transcript
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.reader import read_rows
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.row_messages import messages_of
from mlx_zh.errors import DataError, MlxZhError, StorageError
from mlx_zh.models.adapters.files import read_adapter, save_adapter
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.peft import write_peft
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.generate import GenerationSession, Sampling, StreamDecoder, common_prefix
from mlx_zh.models.load import LoadedModel, load_model
from mlx_zh.system.interrupts import stop_on_interrupt

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 258,
    "eos_token_id": 256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
GREEDY = Sampling(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so every Chinese character is three tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """A model folder as it lies on a hub."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer.save_pretrained(path)
    mx.random.seed(3)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    letters = [index for byte, index in tokenizer.get_vocab().items() if byte.isascii() and byte.isalpha()]
    letter = mx.array([index in letters for index in range(CONFIG["vocab_size"])])
    model.lm_head.weight = mx.where(letter[:, None], model.lm_head.weight, 0)  # so that it writes text
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def loaded(folder) -> LoadedModel:
    return load_model(str(folder))


@pytest.fixture
def bot(loaded) -> Chatbot:
    return Chatbot(loaded, Renderer(loaded.tokenizer), context=2048, sampling=GREEDY)


@dataclass
class Scripted:
    """The model, made to prefer certain tokens at certain positions."""

    model: Any
    script: dict[int, int] = field(default_factory=dict)

    @property
    def layers(self) -> Any:
        return self.model.layers

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        logits = self.model(tokens, cache=cache)
        if (wanted := self.script.get(cache[0].offset)) is not None:
            logits = logits + 100 * (mx.arange(logits.shape[-1]) == wanted)
        return logits


@pytest.fixture
def adapter(loaded, tmp_path) -> Path:
    """An adapter folder that changes what the tiny model says."""
    spec = AdapterSpec(kind="lora", num_layers=2, rank=4, scale=20.0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    add_adapter(model, spec, seed=1)
    mx.random.seed(5)
    weights = {name: mx.random.normal(a.shape) for name, a in trainable(model).items()}
    folder = tmp_path / "adapters"
    save_adapter(folder, weights, spec, {})
    return folder


def test_a_peft_folder_is_an_adapter(
    folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, weights = read_adapter(adapter)
    write_peft(tmp_path / "peft", spec, weights, base="b", matrices=[])
    answers = []
    for options in ([], ["--adapter", str(adapter)], ["--adapter", str(tmp_path / "peft")]):
        piped(monkeypatch, "你好")
        assert chat.main([str(folder), "--max-tokens", "8", "--temp", "0", *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1] == answers[2]


def fresh_logits(model: Any, tokens: list[int]) -> mx.array:
    return model(mx.array([tokens]))[0, -1]


# The cache


def test_three_turns_leave_exactly_the_rendered_prompt_in_the_cache(bot, loaded):
    transcript = Transcript("你是助手。")
    for text in ("你好", "再说一次", "第三个问题"):
        transcript.ask(text)
        prompt, _ = bot.fit(transcript)
        answer = "".join(bot.stream(prompt))
        tokens = bot.session.tokens
        assert tokens[: len(prompt)] == prompt  # no second BOS, no second system message
        assert len(tokens) == len(prompt) + bot.session.statistics.generated
        assert all(layer.offset == len(tokens) for layer in bot.session.cache)
        transcript.answer(answer)

    assert bot.session.statistics.prompt_cached > 0
    extra = mx.array([[7]])
    cached = loaded.model(extra, cache=bot.session.cache)[0, -1]
    assert mx.allclose(cached, fresh_logits(loaded.model, [*tokens, 7]), rtol=0, atol=LOGITS)


def test_a_later_turn_prefills_only_what_is_new(bot, loaded):
    transcript = Transcript()
    transcript.ask("你好")
    prompt, _ = bot.fit(transcript)
    reply = [*loaded.tokenizer.encode("好的", add_special_tokens=False), loaded.tokenizer.eos_token_id]
    bot.session.model = Scripted(loaded.model, {len(prompt) + i: token for i, token in enumerate(reply)})
    assert "".join(bot.stream(prompt)) == "好的"
    assert bot.session.tokens == prompt + reply
    transcript.answer("好的")

    transcript.ask("再见")
    prompt, _ = bot.fit(transcript)
    "".join(bot.stream(prompt))
    statistics = bot.session.statistics
    assert statistics.prompt_cached == len("_user\n") + 6 + len("_\n") + len("_assistant\n") + 7 == 32
    assert statistics.prompt_new == len("\n_user\n") + 6 + len("_\n_assistant\n") == 26


def test_answers_with_a_cache_are_those_without_one(bot, loaded):
    transcript = Transcript("系统")
    for text in ("一", "二", "三"):
        transcript.ask(text)
        prompt, _ = bot.fit(transcript)
        answer = "".join(bot.stream(prompt))
        session = GenerationSession(loaded.model, loaded.tokenizer, loaded.eos_token_ids)
        assert answer == "".join(session.stream(prompt, GREEDY))
        transcript.answer(answer)


def test_small_prefill_chunks_change_nothing(loaded):
    prompt = list(range(40, 120))
    texts = [
        "".join(GenerationSession(loaded.model, loaded.tokenizer, {257}, prefill_chunk=size).stream(prompt, GREEDY))
        for size in (7, 512)
    ]
    assert texts[0] == texts[1]


def test_an_abandoned_answer_and_a_stopped_prefill_leave_a_whole_cache(loaded):
    prompt = list(range(40, 120))
    session = GenerationSession(loaded.model, loaded.tokenizer, set(), prefill_chunk=16)
    calls = iter(range(100))
    assert "".join(session.stream(prompt, GREEDY, lambda: next(calls) >= 2)) == ""
    assert session.statistics.reason == "stopped"
    assert session.tokens == prompt[:32]  # two chunks of 16 were done when the wish was heard
    assert [layer.offset for layer in session.cache] == [32, 32]

    stream = session.stream(prompt, GREEDY)
    next(stream)
    stream.close()
    assert session.tokens[:80] == prompt
    assert [layer.offset for layer in session.cache] == [len(session.tokens)] * 2
    expected = "".join(GenerationSession(loaded.model, loaded.tokenizer, set()).stream(prompt, GREEDY))
    assert "".join(session.stream(prompt, GREEDY)) == expected


def test_an_interrupt_in_the_middle_of_a_step_drops_the_cache(loaded):
    class Interrupting:
        """A model whose second layer is never reached the third time it is called."""

        calls = 0
        layers = loaded.model.layers

        def __call__(self, tokens, cache):
            self.calls += 1
            if self.calls == 3:
                cache[0].offset += 1
                raise KeyboardInterrupt
            return loaded.model(tokens, cache=cache)

    session = GenerationSession(Interrupting(), loaded.tokenizer, set())
    with pytest.raises(KeyboardInterrupt):
        list(session.stream([1, 2, 3], GREEDY))
    assert session.tokens == [] and session.cache == []


def test_the_end_token_ends_the_answer_and_stays_in_the_cache(loaded):
    session = GenerationSession(loaded.model, loaded.tokenizer, set())
    list(session.stream([1, 2, 3], GREEDY))
    third = session.tokens[5]
    ending = GenerationSession(loaded.model, loaded.tokenizer, {third})
    list(ending.stream([1, 2, 3], GREEDY))
    assert ending.statistics.reason == "end"
    assert ending.tokens == session.tokens[: session.tokens.index(third, 3) + 1]
    assert session.statistics.reason == "length" and session.statistics.generated == 12


def test_a_seed_makes_sampling_reproducible(loaded):
    def sample(seed: int) -> str:
        mx.random.seed(seed)
        session = GenerationSession(loaded.model, loaded.tokenizer, set())
        return "".join(session.stream([1, 2, 3], Sampling(1.0, 0.9, 16)))

    assert sample(1) == sample(1) != sample(2)


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2


# Streaming


@pytest.mark.parametrize("text", ["你好，世界", "a你b 好", "👩‍👩‍👧 家", "naïve\n　全角", " 前导空格"])
def test_streamed_pieces_never_break_a_character(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text and decoder.finish() == ""


def test_a_character_that_is_cut_off_is_never_shown(tokenizer):
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("你好", add_special_tokens=False)[:5]
    assert [decoder.push(token) for token in ids] == ["", "", "你", "", ""]
    assert decoder.finish() == ""


def test_whole_characters_before_the_one_that_is_cut_off_are_shown_at_the_end():
    """As in the vocabularies of GPT-4 and Qwen, a token may end within a character."""
    inner = Tokenizer(models.BPE(vocab={"a": 0, "ä": 1, "aä": 2}, merges=[("a", "ä")]))
    inner.decoder = decoders.ByteLevel()  # "ä" stands for the byte E4, the first of 你
    decoder = StreamDecoder(PreTrainedTokenizerFast(tokenizer_object=inner))
    assert [decoder.push(token) for token in (0, 2)] == ["a", ""]
    assert decoder.finish() == "a"


def test_a_stray_byte_leaves_what_is_shown_and_what_follows():
    """With byte fallback, 你 and a byte FF after it decode together as four U+FFFD."""
    bytes_of = {f"<0x{byte:02X}>": byte for byte in range(256)}
    inner = Tokenizer(models.BPE(vocab={**bytes_of, "▁a": 256, "▁b": 257}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    decoder = StreamDecoder(PreTrainedTokenizerFast(tokenizer_object=inner))
    tokens = [256, *"你".encode(), 0xFF, 257, *"好".encode()]
    assert [decoder.push(token) for token in tokens] == ["a", "", "", "你", "", "\ufffd b", "", "", "好"]
    assert decoder.finish() == ""


def test_notes_are_wrapped_on_a_terminal():
    out = io.StringIO()
    Screen(out, colour=True, live=True, fixed_width=8).note("你好世界再见")
    assert out.getvalue() == "\x1b[2m你好世界\x1b[0m\n\x1b[2m再见\x1b[0m\n"


def test_special_tokens_are_not_shown(tokenizer):
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("你<|im_start|>好", add_special_tokens=False)
    assert "".join(decoder.push(token) for token in ids) == "你好"


# Conversation, context and files


def test_undo_retry_and_a_question_without_an_answer():
    transcript = Transcript()
    assert not transcript.undo() and not transcript.retract_answer()
    transcript.ask("一")
    transcript.ask("二")  # the first was never answered
    assert [m.content for m in transcript.turns] == ["二"]
    transcript.answer("答")
    assert transcript.retract_answer() and transcript.pending
    transcript.answer("新答")
    transcript.ask("三")
    assert transcript.undo() and [m.content for m in transcript.turns] == ["二", "新答"]
    assert transcript.undo() and transcript.turns == []


def length(messages: list[Message]) -> list[int]:
    """A renderer of one token a character."""
    return [0] * sum(len(m.content) for m in messages)


def test_the_oldest_exchanges_leave_a_full_context():
    transcript = Transcript("s" * 10)
    for _ in range(9):
        transcript.ask("q" * 5)
        transcript.answer("a" * 5)
    transcript.ask("q" * 5)
    # 10 + 9 * 10 + 5 = 105 tokens; with 25 of answer that is over 120, and half of 120 holds 10 + 5 + 4 * 10.
    prompt, dropped = transcript.fit(length, limit=120, reserve=25)
    assert (len(prompt), dropped, transcript.first) == (55, 5, 10)
    assert transcript.question[0] == Message("system", "s" * 10)
    assert transcript.fit(length, limit=120, reserve=25) == (prompt, 0)
    assert len(transcript.turns) == 19  # still there to be saved
    while transcript.turns:
        transcript.undo()
    assert transcript.first == 0


def test_a_message_longer_than_the_context_is_refused():
    transcript = Transcript()
    transcript.ask("q" * 50)
    with pytest.raises(ContextError, match=r"takes 50 tokens .* holds 40"):
        transcript.fit(length, limit=40, reserve=10)
    transcript.ask("q" * 39)  # fits, with one token of answer
    assert transcript.fit(length, limit=40, reserve=10) == ([0] * 39, 0)


def test_save_and_load_round_trip(tmp_path):
    path = tmp_path / "chat.json"
    transcript = Transcript("系统", [Message("user", "你好\n世界"), Message("assistant", "好")])
    transcript.save(path)
    transcript.save(path)  # its own file may be replaced
    assert Transcript.load(path) == transcript
    assert json.loads(path.read_text("utf-8"))["messages"][0] == {"role": "system", "content": "系统"}
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


def test_save_does_not_overwrite_something_else(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    answered = Transcript(None, [Message("user", "你好"), Message("assistant", "好")])
    with pytest.raises(StorageError, match="not a saved chat"):
        answered.save(notes)
    assert notes.read_text() == "mine"
    with pytest.raises(StorageError):
        answered.save(tmp_path)  # a folder


def test_a_saved_chat_is_training_data(tmp_path):
    """What `/save` writes, `prepare` reads: one row, which ends with an answer."""
    path = tmp_path / "chat.json"
    turns = [Message("user", "你好\n世界\u2028"), Message("assistant", "好")]
    transcript = Transcript("系统", [*turns, Message("user", "还在等")])
    assert transcript.save(path) == 2
    ((_, row),) = read_rows(path)
    assert messages_of(row["messages"], "messages") == [Message("system", "系统"), *turns]
    assert Transcript.load(path) == Transcript("系统", turns)
    with pytest.raises(MlxZhError, match="nothing to save"):
        Transcript("系统", [Message("user", "还在等")]).save(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "expected"),
        ('[{"role": "bot", "content": "x"}]', "message 1: role must be .* got 'bot'"),
        ('[{"role": "user", "content": 3}]', "message 1: content must be a text, got int"),
        ('[{"role": "user", "content": " "}]', "message 1: content is empty"),
        ("[1]", "message 1 is not an object"),
        ('[{"role": "assistant", "content": "x"}]', "message 1 must be from user"),
        (
            '[{"role": "system", "content": "x"}, {"role": "assistant", "content": "x"}]',
            "message 2 must be from user",
        ),
    ],
)
def test_load_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        Transcript.load(path)


def test_load_refuses_what_is_not_text(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe[]")
    with pytest.raises(DataError, match="not UTF-8"):
        Transcript.load(path)
    with pytest.raises(DataError, match="cannot read"):
        Transcript.load(tmp_path / "missing.json")


def test_context_is_never_more_than_the_model_was_made_for():
    assert context_length({"max_position_embeddings": 2048}, None) == 2048
    assert context_length({"max_position_embeddings": 2048}, 9000) == 2048
    assert context_length({"max_position_embeddings": 2048}, 100) == 100
    assert context_length({}, None) == 4096


# Width


def test_lines_are_wrapped_by_width_and_never_begin_with_a_full_stop():
    assert text_width("你好ab") == 6
    assert wrap("你好世界再见", 8) == ["你好世界", "再见"]
    assert wrap("你好世界。再见", 8) == ["你好世", "界。再见"]
    assert wrap("hello world 你好", 8) == ["hello", "world 你", "好"]
    assert wrap("一\n\n二", 8) == ["一", "", "二"]
    assert wrap("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    long = "苹果公司发布了 Apple silicon 芯片，用 Python 训练模型。👩‍👩‍👧 一家人 " * 5
    assert max(text_width(line) for line in wrap(long, 20)) <= 20
    assert "".join(wrap(long, 20)).replace(" ", "") == long.replace(" ", "")


def test_columns_stand_straight_with_chinese_text():
    rows = side_by_side("你好，我是助手。" * 8, "short", 80, ("微调前 base", "tuned"))
    assert rows is not None
    bars = {text_width(row.split("│")[0]) for row in rows}
    assert bars == {39}  # (80 - 3) // 2 columns of text and one space
    assert all(text_width(row) <= 80 for row in rows)
    assert side_by_side("a", "b", 62, ("l", "r")) is None


def test_a_model_cannot_repaint_the_terminal(monkeypatch):
    out = io.StringIO()
    Screen(out).write("a\x1b[2Jb\x07\n\tc")
    assert out.getvalue() == "a[2Jb\n\tc"
    out.truncate(out.seek(0))
    Screen(out).write("1\u202e2\u20663\u20694")  # an override and an isolate would turn the digits around
    assert out.getvalue() == "1234"

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Screen.on(Tty()).colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Screen.on(Tty()).colour
    assert not Screen.on(io.StringIO()).live


# The program at a terminal


@pytest.fixture
def repl(bot):
    """A session fed with lines instead of keys; `.screen.stream` is what the user sees."""
    lines: list[str] = []

    def read() -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    session = Repl(bot, Screen(io.StringIO(), fixed_width=100), read)

    def say(*texts: str) -> str:
        lines.extend(texts)
        session.screen.stream = io.StringIO()
        session.run()
        return session.screen.stream.getvalue()

    session.say = say
    return session


def test_an_answer_and_its_statistics(repl):
    shown = repl.say("你好")
    assert repl.transcript.turns[1].content in shown
    assert "12 tokens · " in shown and "tokens/s · first after " in shown
    prompt = len(repl.bot.session.tokens) - 12
    assert f"prompt {prompt} new + 0 cached" in shown


def test_retry_undo_and_reset(repl):
    repl.say("你好", "再见")
    answer = repl.transcript.turns[3].content
    shown = repl.say("/retry")
    assert repl.transcript.turns[3].content == answer  # greedy
    assert "prompt 1 new" in shown  # all of the prompt but its last token is in the cache
    assert "余 1 轮" in repl.say("/undo") and len(repl.transcript.turns) == 2
    repl.say("/system 你是诗人", "/reset")
    assert repl.transcript.turns == [] and repl.transcript.system == "你是诗人"
    assert "nothing to undo" in repl.say("/undo")
    assert "nothing to retry" in repl.say("/retry")
    assert "nothing to compare" in repl.say("/compare")


def test_settings(repl):
    assert "temperature: 0.3" in repl.say("/temp 0.3") and repl.bot.sampling.temperature == 0.3
    for bad in ("-1", "nan", "hot"):
        assert "must be a number" in repl.say(f"/temp {bad}") and repl.bot.sampling.temperature == 0.3
    assert "system: none" in repl.say("/system none")
    shown = repl.say("/help")
    assert all(row[0] in shown and row[1] in shown and row[2] in shown for row in COMMANDS.values())
    assert "  /help                显示帮助            show this help\n" in shown  # one row each
    assert max(text_width(line) for line in shown.splitlines()) < 80
    repl.screen.fixed_width = 60
    assert max(text_width(line) for line in repl.say("/help").splitlines()) <= 60


def test_unknown_commands_and_paths_that_look_like_one(repl):
    near = {"/retyr": "/retry", "/sys": "/system", "/max-token": "/max-tokens", "/clera": "/reset"}
    for other, meant in near.items():
        assert f"maybe {meant}?" in repl.say(other)
    assert "see /help" in repl.say("/xyzzy")
    assert repl.transcript.turns == []
    repl.say("/usr/bin/python 是什么")
    assert repl.transcript.turns[0].content == "/usr/bin/python 是什么"
    assert repl.say("   ", "/exit", "never read") == ""


@pytest.mark.parametrize("typed", ["、help", "／help", "／ｈｅｌｐ", "、HELP", "/help"])
def test_what_a_chinese_input_method_writes_for_a_slash_is_one(repl, typed):
    assert "命令 Commands" in repl.say(typed)
    assert repl.transcript.turns == []


def test_a_command_in_wide_characters_takes_its_text(repl):
    repl.say("、system\u3000你是诗人")
    assert repl.transcript.system == "你是诗人" and repl.transcript.turns == []
    assert "unknown command /foo" in repl.say("、foo")


@pytest.mark.parametrize("text", ["、你好", "/你好", "／ 你好", "、", "//", "/2 加 3"])
def test_a_message_that_only_begins_like_a_command_is_for_the_model(text):
    assert command_in(text) is None


def test_save_and_load_commands(repl, tmp_path):
    repl.say("/system 你是诗人", "你好", f"/save {tmp_path / 'a chat.json'}")
    before = replace(repl.transcript, turns=list(repl.transcript.turns))
    shown = repl.say("/reset", f"/load {tmp_path / 'a chat.json'}")
    assert repl.transcript == before and "已载入 2 条消息" in shown
    assert "cannot read" in repl.say("/load nowhere.json") and repl.transcript == before
    assert "a path is missing" in repl.say("/save")


def test_adapter_changes_live_and_compare_shows_both(repl, bot, loaded, adapter):
    base = repl.say("你好") and repl.transcript.turns[1].content
    assert "nothing to compare with" in repl.say("/compare")
    repl.say(f"/adapter {adapter}", "/retry")
    tuned = repl.transcript.turns[1].content
    assert tuned != base

    calls = []
    real = bot.compare

    def compare(*arguments):
        calls.append(real(*arguments))
        return calls[-1]

    bot.compare = compare
    tokens = list(bot.session.tokens)
    shown = repl.say("/compare")
    assert (calls[0][0].text, calls[0][1].text) == (base, tuned)
    assert "微调前 base" in shown and "│ 微调后 tuned (adapters)" in shown
    assert "base: 12 tokens" in shown and "tuned: 12 tokens" in shown
    assert bot.session.tokens == tokens and bot.session.statistics.prompt_new == 1  # the chat's cache survived
    repl.screen.fixed_width = 40
    assert "│" not in repl.say("/compare")

    repl.say("/adapter none", "/retry")
    assert repl.transcript.turns[1].content == base
    assert not any("lora" in name for name, _ in tree_flatten(loaded.model.parameters()))


def test_an_adapter_that_does_not_fit_leaves_the_old_one(repl, bot, adapter, tmp_path):
    repl.say(f"/adapter {adapter}", "你好")
    tuned = repl.transcript.turns[1].content
    (tmp_path / "empty").mkdir()
    assert "is not an adapter folder" in repl.say(f"/adapter {tmp_path / 'empty'}")
    assert bot.adapter == adapter
    repl.say("/retry")
    assert repl.transcript.turns[1].content == tuned
    (adapter / "adapters.safetensors").unlink()
    assert "is not an adapter folder" in repl.say("/compare")
    assert bot.adapter is None  # what is left is the base model, and the program says so
    assert "adapter: none" in repl.say("/adapter")


def test_a_fully_tuned_model_comes_off_too(repl, bot, loaded, tmp_path):
    spec = AdapterSpec(kind="full", num_layers=2)
    weights = {name: array + 0.3 for name, array in tree_flatten(loaded.model.parameters())}
    save_adapter(tmp_path / "full", weights, spec, {})
    base = repl.say("你好") and repl.transcript.turns[1].content
    repl.say(f"/adapter {tmp_path / 'full'}", "/retry")
    assert repl.transcript.turns[1].content != base
    repl.say("/adapter none", "/retry")
    assert repl.transcript.turns[1].content == base


def test_a_long_chat_drops_its_beginning_and_goes_on(repl, bot):
    bot.context = 160
    shown = repl.say(*(f"问题 {i}" for i in range(6)))
    assert "轮不再参考" in shown and len(repl.transcript.turns) == 12
    assert len(bot.session.tokens) <= 160
    assert "too long" in repl.say("长" * 100)
    assert "12 tokens" in repl.say("短")


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(repl, bot):
    bot.sampling = Sampling(0, max_tokens=500)
    before = signal.getsignal(signal.SIGINT)  # a shell starts its background jobs with Ctrl-C ignored
    write = repl.screen.write

    def interrupting(text: str) -> None:
        write(text)
        os.kill(os.getpid(), signal.SIGINT)
        repl.screen.write = write

    repl.screen.write = interrupting
    shown = repl.say("你好", "/temp")
    assert "已中止 stopped" in shown and "temperature: 0" in shown
    assert bot.session.statistics.generated == 1
    assert repl.transcript.turns[1].content in shown
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        os.kill(os.getpid(), signal.SIGINT)


def test_multi_line_marks():
    assert unfinished('"""ab') and unfinished('"""') and unfinished("a\\")
    assert not unfinished('"""ab"""') and not unfinished("ab") and not unfinished('""""""')
    assert plain('"""\na\n\nb\n"""') == "a\n\nb"
    assert plain(" a ") == "a"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("你好\r", "你好"),
        ("一\\\r二\r", "一\n二"),
        ("一\x1b\r二\r", "一\n二"),
        ('"""一\r\r二"""\r', "一\n\n二"),
        ("\x1b[200~粘\n贴\x1b[201~\r", "粘\n贴"),
        ("\x1b[A\r", "旧的"),
    ],
)
def test_keys(tmp_path, keys, message):
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    history = tmp_path / "cache" / "history"
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text("旧的\r")
        LineEditor(history, sorted(COMMANDS)).read()
        editor = LineEditor(history, sorted(COMMANDS))  # another session, the same history
        pipe.send_text(keys)
        assert editor.read() == message
        pipe.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            editor.read()
        pipe.send_text("\x04")
        with pytest.raises(EOFError):
            editor.read()
    assert history.stat().st_mode & 0o077 == 0


def test_the_whole_session_through_the_line_editor(repl, bot, tmp_path):
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        repl.read = LineEditor(tmp_path / "history", sorted(COMMANDS)).read
        pipe.send_text("你好\r/temp 0\r\x03再见\r\x04")
        repl.run()
    assert [m.role for m in repl.transcript.turns] == ["user", "assistant"] * 2
    assert "Ctrl-D" in repl.screen.stream.getvalue()


# The program from outside


def piped(monkeypatch, text: str | bytes) -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def run(*arguments: object, text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_zh.chat", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_piped_input_gives_the_answer_and_nothing_else(folder, loaded):
    done = run(folder, "--temp", 0, "--max-tokens", 12, text="你好\n")
    prompt = Renderer(loaded.tokenizer).prompt([Message("user", "你好")])
    session = GenerationSession(loaded.model, loaded.tokenizer, loaded.eos_token_ids)
    answer = "".join(session.stream(prompt, GREEDY))
    assert done.returncode == 0
    assert done.stdout.rstrip("\n") == answer.rstrip("\n") and done.stdout.endswith("\n")
    assert "tokens/s" not in done.stderr and "Traceback" not in done.stderr


def test_empty_input_is_an_error():
    done = run("nowhere", text=" \n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "standard input is empty" in done.stderr and "Traceback" not in done.stderr


def test_help_loads_nothing_heavy():
    code = "import sys, mlx_zh.chat as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += (
        "sys.exit(any(name in sys.modules for name in ('mlx.core', 'transformers', 'prompt_toolkit', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_verbose_says_on_stderr_what_it_cost(folder, monkeypatch, capsys):
    piped(monkeypatch, "一\n二\n")
    assert chat.main([str(folder), "--verbose", "--max-tokens", "5", "--seed", "1", "--system", "系统"]) == 0
    first = capsys.readouterr()
    assert "5 tokens · " in first.err and "adapter: none · context: 2048 tokens" in first.err
    piped(monkeypatch, "一\n二\n")
    chat.main(["--max-tokens", "5", "--seed", "1", "--system", "系统", str(folder)])
    second = capsys.readouterr()
    assert second.out == first.out and "tokens/s" not in second.err


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        ([], b"\xff\xfe", "not UTF-8"),
        (["sft.epochs=2"], b"x", "sft.epochs=2 sets a key of a recipe"),
        (["--adapter", "nowhere"], b"x", "nowhere is not an adapter folder"),
        (["--max-context", "20"], b"x" * 40, "too long"),
    ],
)
def test_what_the_user_can_mend(folder, monkeypatch, capsys, arguments, text, message):
    piped(monkeypatch, text)
    with pytest.raises(MlxZhError, match=message):
        chat.main([str(folder), *arguments])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("option", [["--temp", "-1"], ["--top-p", "0"], ["--top-p", "2"], ["--max-tokens", "0"]])
def test_options_out_of_range(run_stage, capsys, option):
    assert run_stage(chat.main, "model", *option) == 2
    assert "expected a" in capsys.readouterr().err


def test_a_recipe_brings_its_model_its_system_prompt_and_its_newest_adapter(
    folder, adapter, tmp_path, monkeypatch, capsys
):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"name: tiny\nruns: {tmp_path}\nmodel:\n  path: {folder}\ndata:\n"
        "  system: 你是{{who}}\n  variables: {who: 诗人}\n"
    )

    def ask(*options: str) -> str:
        piped(monkeypatch, "你好")
        assert chat.main([str(recipe), "--verbose", "--max-tokens", "3", *options]) == 0
        return capsys.readouterr().err

    assert "adapter: none" in ask()
    shutil.copytree(adapter, tmp_path / "tiny" / "sft" / "adapters")
    assert "tiny/sft/adapters" in ask()
    shutil.copytree(adapter, tmp_path / "tiny" / "dpo" / "adapters")
    with_system = ask("--temp", "0")
    assert "tiny/dpo/adapters" in with_system
    assert "adapter: none" in ask("--adapter", "none")

    # "<|im_start|>system\n你是诗人<|im_end|>\n" is 1 + 7 + 12 + 2 tokens.
    def prompt_tokens(shown: str) -> int:
        return int(shown.split("prompt ")[1].split()[0])

    assert prompt_tokens(with_system) - prompt_tokens(ask("data.system=null")) == 22


# Seeds, stages by name, and one question


def test_the_seed_of_an_answer_draws_it_again(repl, bot):
    bot.sampling = Sampling(1.0, 1.0, 12)
    repl.say("/seed 7", "你好")
    first = repl.transcript.turns[1].content
    assert bot.origin.seed == 7
    repl.say("/retry")
    second, seed = repl.transcript.turns[1].content, bot.origin.seed
    assert second != first and seed == 8  # another answer, or /retry would be of no use
    repl.say("/seed 7", "/retry")
    assert repl.transcript.turns[1].content == first
    repl.say("/seed none", "/retry")
    drawn, text = bot.origin.seed, repl.transcript.turns[1].content
    assert "last answer: " + str(drawn) in repl.say("/seed")
    repl.say(f"/seed {drawn}", "/retry")
    assert repl.transcript.turns[1].content == text


def test_any_two_stages_are_compared_by_name(repl, bot, loaded, adapter, tmp_path):
    bot.stages = {"sft": adapter, "dpo": tmp_path / "dpo"}
    spec, weights = read_adapter(adapter)
    other = {name: -array if name.endswith("lora_b") else array for name, array in weights.items()}
    save_adapter(bot.stages["dpo"], other, spec, {})
    texts = {}
    for name in ("none", "sft", "dpo"):
        repl.say("/reset", f"/adapter {name}", "你好")
        texts[name] = repl.transcript.turns[1].content
    assert len(set(texts.values())) == 3

    calls = []
    real = bot.compare
    bot.compare = lambda *arguments: calls.append(real(*arguments)) or calls[-1]
    for asked, first, second in (
        ("/compare", "none", "dpo"),
        ("/compare sft", "sft", "dpo"),
        ("/compare dpo", "none", "dpo"),
        ("/compare base sft", "none", "sft"),
        ("/compare dpo SFT", "dpo", "sft"),
    ):
        shown = repl.say(asked)
        assert [answer.text for answer in calls[-1]] == [texts[first], texts[second]], asked
        assert [answer.origin.adapter for answer in calls[-1]] == [first, second]
        assert bot.adapter == bot.stages["dpo"] and f"{second}: 12 tokens" in shown
    assert "both are dpo" in repl.say("/compare dpo dpo")
    assert "at most, got 3" in repl.say("/compare a b c")
    count = len(calls)
    assert "is not an adapter folder" in repl.say("/compare base nowhere") and len(calls) == count
    repl.say("/retry")
    assert repl.transcript.turns[1].content == texts["dpo"]


def test_the_fingerprint_is_that_of_model_and_adapter(repl, bot, adapter):
    repl.say("你好")
    base = bot.origin.fingerprint
    repl.say(f"/adapter {adapter}", "/retry")
    tuned = bot.origin.fingerprint
    assert len(base) == 64 and base != tuned and bot.origin.adapter == str(adapter)
    repl.say("/adapter none", "/retry")
    assert bot.origin.fingerprint == base


def test_one_question_as_an_option(folder, monkeypatch, capsys):
    piped(monkeypatch, "not read")
    assert chat.main([str(folder), "--prompt", " 你好 ", "--temp", "0", "--max-tokens", "12"]) == 0
    by_option = capsys.readouterr()
    piped(monkeypatch, "你好")
    assert chat.main([str(folder), "--temp", "0", "--max-tokens", "12"]) == 0
    assert by_option == capsys.readouterr() and by_option.err == ""
    with pytest.raises(MlxZhError, match="the question of `mlx-zh chat --prompt` is empty"):
        chat.main([str(folder), "--prompt", " "])


def test_a_run_says_on_stderr_which_model_answers(folder, adapter, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"name: tiny\nruns: {tmp_path}\nmodel:\n  path: {folder}\n")

    def ask(*options: str) -> str:
        assert chat.main([str(recipe), "--prompt", "你好", "--max-tokens", "3", *options]) == 0
        return capsys.readouterr().err

    assert "adapter: none" in (shown := ask()) and "the base model answers" in shown
    shutil.copytree(adapter, tmp_path / "tiny" / "sft" / "adapters")
    assert "adapter: sft" in (shown := ask()) and "base model" not in shown
    assert "adapter: none" in ask("--adapter", "none")
    with pytest.raises(MlxZhError, match="there is no adapter of dpo here"):
        ask("--adapter", "dpo")
