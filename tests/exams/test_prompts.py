"""Token ids of prompts and letters: boundaries that split cleanly, and prompts that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_zh.corpus.render import Renderer
from mlx_zh.errors import TemplateError
from mlx_zh.exams.catalog import Entry, Row
from mlx_zh.exams.csvfile import Question
from mlx_zh.exams.exam import Exam, Subject
from mlx_zh.exams.prompts import Prompter
from mlx_zh.exams.protocols import protocols

SHORT = Question("0", "甲", ("1", "2", "3", "4"), "A")
LONG = Question("1", "乙" * 40, ("1", "2", "3", "4"), "B")
ASKED = (Question("2", "丙", ("1", "2", "3", "4"), "C"), Question("3", "丁" * 100, ("1", "2", "3", "4"), "D"))
SUBJECT = Subject("s", Entry("自然"), (SHORT, LONG), ASKED)
EXAM = Exam("e", "e", "ceval", "test", (Row("Average"),), (SUBJECT,), None)


def byte_level(*merged: str, mark: str | None = None) -> PreTrainedTokenizerFast:
    """A token a byte, and one for each of `merged`; `mark` is written before every text, like BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for text in merged:
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
        left = spelled[0]
        for letter in spelled[1:]:
            merges.append((left, letter))
            left += letter
            vocabulary.setdefault(left, len(vocabulary))
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<s>"]})
    if mark is not None:
        from tokenizers import processors

        inner = tokenizer.backend_tokenizer
        inner.post_processor = processors.TemplateProcessing(
            single=f"{mark} $A", special_tokens=[(mark, inner.token_to_id(mark))]
        )
    return tokenizer


def made(protocol: str, tokenizer: Any, longest: int = 10**6, renderer: Renderer | None = None):
    return Prompter(protocols()[protocol], tokenizer, renderer, longest).subject(EXAM, SUBJECT)


def test_letters_are_the_tokens_that_follow(byte_tokenizer: Any):
    first, second = made("official", byte_tokenizer)
    expected = protocols()["official"].text("ceval", "自然", (SHORT, LONG), ASKED[0])
    assert byte_tokenizer.decode(first.tokens) == expected
    assert first.letters == second.letters == tuple((byte_tokenizer.convert_tokens_to_ids(x),) for x in "ABCD")
    assert not first.truncated and not second.truncated


def test_text_begins_as_the_tokenizer_begins_texts():
    tokenizer = byte_level(mark="<s>")
    first = made("official", tokenizer)[0]
    assert first.tokens[0] == tokenizer.convert_tokens_to_ids("<s>")
    assert tokenizer.decode(first.tokens[1:]) == protocols()["official"].text(
        "ceval", "自然", (SHORT, LONG), ASKED[0]
    )


def test_the_harness_s_continuation_may_be_several_tokens(byte_tokenizer: Any):
    blank = byte_tokenizer.convert_tokens_to_ids("Ġ")
    assert [letter[0] for letter in made("lm-eval", byte_tokenizer)[0].letters] == [blank] * 4
    assert all(len(letter) == 2 for letter in made("lm-eval", byte_tokenizer)[0].letters)
    one = byte_level(" A", " B", " C", " D")
    assert made("lm-eval", one)[0].letters == tuple((one.convert_tokens_to_ids(f"Ġ{x}"),) for x in "ABCD")


def test_chat_goes_through_the_model_s_template(byte_tokenizer: Any):
    first = made("chat", byte_tokenizer, renderer=Renderer(byte_tokenizer))[0]
    text = byte_tokenizer.decode(first.tokens)
    assert text.count("<|im_start|>user\n") == 3 and text.endswith("答案：<|im_end|>\n<|im_start|>assistant\n")
    assert "<|im_start|>assistant\nA<|im_end|>\n" in text
    assert first.letters == tuple((byte_tokenizer.convert_tokens_to_ids(x),) for x in "ABCD")
    assert made("generate", byte_tokenizer, renderer=Renderer(byte_tokenizer))[0].letters == ()


def test_options_are_scored_whole_and_without_what_closes_the_turn(byte_tokenizer: Any):
    question = Question("0", "甲", ("1", "1。", " 23", "乙"), "A")
    subject = Subject("s", Entry("自然"), (), (question,))
    exam = Exam("e", "e", "ceval", "test", (Row("Average"),), (subject,), None)
    prompt = Prompter(protocols()["cloze"], byte_tokenizer, Renderer(byte_tokenizer), 10**6).subject(exam, subject)[0]
    assert byte_tokenizer.decode(prompt.tokens).endswith("<|im_start|>user\n甲<|im_end|>\n<|im_start|>assistant\n")
    assert [byte_tokenizer.decode(list(ids)) for ids in prompt.letters] == ["1", "1。", "23", "乙"]
    assert [len(ids) for ids in prompt.letters] == [1, 4, 2, 3]  # bytes


def test_a_token_across_the_boundary_is_an_error():
    # "：A" is one token here, so what the model would see before "A" is not the prompt.
    with pytest.raises(TemplateError, match=r"official cannot .* stands across the boundary .*evaluate.protocol"):
        made("official", byte_level("：A"))


def test_a_letter_of_several_tokens_is_an_error_where_one_is_scored():
    class Split(PreTrainedTokenizerFast):
        """Writes every letter as a mark and the letter."""

        def __call__(self, texts: list[str], **options: Any) -> Any:
            spread = [f"{text[:-1]} {text[-1]}" if text[-1] in "ABCD" else text for text in texts]
            return super().__call__(spread, **options)

    split = Split(tokenizer_object=byte_level().backend_tokenizer)
    with pytest.raises(TemplateError, match="a letter is not one token"):
        made("official", split)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [("chat", "a letter is not one token"), ("cloze", "separate the option '1' .* log-prob of an option")],
)
def test_a_template_that_changes_what_is_scored_is_an_error(byte_tokenizer: Any, protocol: str, message: str):
    class Answers(Renderer):
        def conversation(self, messages: Any, **options: Any) -> Any:
            *others, last = messages
            return super().conversation([*others, type(last)(last.role, f"*{last.content}")], **options)

    with pytest.raises(TemplateError, match=message):
        made(protocol, byte_tokenizer, renderer=Answers(byte_tokenizer))


def test_the_longest_example_is_left_out_first(byte_tokenizer: Any):
    whole = made("official", byte_tokenizer)
    text = protocols()["official"].text
    size = [len(text("ceval", "自然", shots, ASKED[0]).encode()) for shots in ((SHORT, LONG), (SHORT,), ())]
    assert [len(prompt.tokens) for prompt in whole] == [size[0], size[0] + 3 * 99]
    first, second = made("official", byte_tokenizer, longest=size[0])
    assert not first.truncated and second.truncated
    first = made("official", byte_tokenizer, longest=size[0] - 1)[0]
    assert first.truncated
    assert byte_tokenizer.decode(first.tokens) == text("ceval", "自然", (SHORT,), ASKED[0])
    first = made("official", byte_tokenizer, longest=size[1] - 1)[0]
    assert byte_tokenizer.decode(first.tokens) == text("ceval", "自然", (), ASKED[0])
    # When not even the question fits, its end is kept, for there the answer is asked.
    first = made("official", byte_tokenizer, longest=20)[0]
    assert (len(first.tokens), first.truncated) == (20, True)
    assert byte_tokenizer.decode(first.tokens).endswith("\n答案：")


def test_the_harness_cuts_at_the_left(byte_tokenizer: Any):
    # HFLM keeps the last max_length tokens of prompt and continuation, less the last: " A" is two tokens here.
    whole = made("lm-eval", byte_tokenizer)[0]
    cut = made("lm-eval", byte_tokenizer, longest=100)[0]
    assert (len(cut.tokens), cut.truncated) == (99, True)
    assert cut.tokens.tolist() == whole.tokens[-99:].tolist()
    assert not made("lm-eval", byte_tokenizer, longest=len(whole.tokens) + 1)[0].truncated
