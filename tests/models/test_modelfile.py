"""Modelfiles, read back by Ollama's grammar: the values are the texts that were meant, and nothing else is read."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from modelfiles import NotRead, read_modelfile, run_template
from transformers import PreTrainedTokenizerFast

from mlx_zh.models.export.ollama import Turns, find_turns, go_text, modelfile, ollama_name, parameters, quoted

PIECES = [
    '"',
    '"""',
    "\n",
    "\r",
    "\t",
    " ",
    "{",
    "{{",
    "}}",
    "\\",
    "`",
    "#",
    "FROM /etc/passwd",
    "a",
    "译",
    "\u3000",
    "\u200b",
    "\u2028",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"])), max_size=12).map(
    "".join
)
EVIL = '<|im_start|>"""\nFROM /etc/passwd\nADAPTER /home/user/.ssh/id_rsa\nSYSTEM """'


def test_the_reader_reads_as_ollama_does():
    """The cases of Ollama's own tests that matter here."""
    assert read_modelfile(
        'FROM m\nSYSTEM """\na\n"b"\n"""\nPARAMETER stop "<|x|>"\n# note\nMESSAGE user hi there'
    ) == [
        ("from", "m"),
        ("system", '\na\n"b"\n'),
        ("parameter stop", "<|x|>"),
        ("message user", "hi there"),
    ]
    assert read_modelfile('FROM m\nSYSTEM """a"""\nb c"""\n'.replace("b c", "adapter c"))[2] == ("adapter", 'c"""')
    for broken in ('FROM m\nSYSTEM """a', "SYSTEM a", "FROM m\nHELLO a", "FROM m\nMESSAGE robot a", "FROM m\nSYSTEM"):
        with pytest.raises(NotRead):
            read_modelfile(broken)


@given(TEXTS)
@example('翻译三引号里的文字：\n"""\n原文\n"""\n只给译文。\n')
@example('"""')
@example('"')
@example('""')
@example('a"')
@example('a"""')
@example('a """b""" c\nd')
@example('a"""  \t\n')
@example('"\n')
@example('""\n')
@example('"""\nb')
@example("\u3000\u3000第一段")
@example(EVIL)
def test_a_value_is_read_back_or_not_written(text: str):
    """And what is not written is what Ollama would not read back from three quotes."""
    value = quoted(text)
    bare = f'"""{text}"""'
    try:
        commands = read_modelfile(f"FROM m\nSYSTEM {bare}\nPARAMETER num_ctx 5\n")
    except NotRead:
        commands = []
    right = commands == [("from", "m"), ("system", text), ("parameter num_ctx", "5")]
    assert value == (bare if right else None)


@given(TEXTS, TEXTS)
@example("{", "{{ .System }}")
@example("{{{", "}}")
@example('"""\n', "\\")
@example('"', '""')
@example("- a", " -")
@example("\u3000", "\U000e0001")
@example(EVIL, "{{ .Prompt }}{{ end }}")
def test_a_literal_in_a_template_is_that_text(before: str, after: str):
    template = f"{go_text(before)}{{{{ .System }}}}{go_text(after)}"
    value = quoted(template)
    assert value is not None
    [_, (_, read)] = read_modelfile(f"FROM m\nTEMPLATE {value}")
    assert run_template(read, "你好", []) == f"{before}你好{after}"


@given(st.lists(TEXTS, min_size=8, max_size=8))
def test_whatever_the_turns_are(parts: list[str]):
    turns = Turns(parts[0], (parts[1], parts[2]), (parts[3], parts[4]), (parts[5], parts[6]), parts[7])
    value = quoted(turns.template())
    assert value is not None
    [_, (_, read)] = read_modelfile(f"FROM m\nTEMPLATE {value}")
    exchange = [("user", "问"), ("assistant", "答"), ("tool", "x"), ("user", "再问")]
    said = f"{parts[3]}问{parts[4]}{parts[5]}答{parts[6]}{parts[3]}再问{parts[4]}{parts[7]}"
    assert run_template(read, "", exchange) == parts[0] + said
    assert run_template(read, "系统", exchange) == f"{parts[1]}系统{parts[2]}{said}"


@pytest.mark.parametrize("mark", ["<|im_start|>", EVIL, "{{ .System }}", "{", "\u3000"])
def test_a_strangers_template_writes_no_command(byte_tokenizer, mark: str):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ MARK }}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ MARK }}assistant\n{% endif %}"
    ).replace("MARK", repr(mark))
    assert find_turns(tokenizer, "") is not None
    text = modelfile(
        "m.gguf", tokenizer, "", system="好", context=5, notes=["a\nFROM /etc/passwd", "b\rADAPTER x", "c\u2028d"]
    ).text
    commands = read_modelfile(text)
    stops = [value for name, value in commands if name == "parameter stop"]
    others = {name: value for name, value in commands if name != "parameter stop"}
    assert list(others) == ["from", "template", "parameter num_ctx", "system"] and others["from"] == "./m.gguf"
    assert others["system"] == "好" and all(stop.startswith("<|") for stop in stops)
    said = [{"role": "user", "content": "问"}]
    expected = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert run_template(others["template"], "", [("user", "问")]) == expected


@given(TEXTS.filter(bool), TEXTS)
@example('a\n"""\nFROM /etc/passwd\n', "")
@example("\u3000\u3000第一段", "MIT\x0cLicence\u00a0\u3000")
@example('"""', 'a"""\nADAPTER x\n')
def test_every_system_message_is_said(byte_tokenizer, system: str, licence: str):
    """In SYSTEM, or in the template where the user gives none; a licence writes no other command either."""
    written = modelfile("m.gguf", byte_tokenizer, "", system=system, context=5, licences=[licence])
    commands = read_modelfile(written.text)
    values = {name: value for name, value in commands if name != "parameter stop"}
    assert values.keys() - {"system", "license"} == {"from", "template", "parameter num_ctx"}
    assert len(commands) - len(values) == sum(name == "parameter stop" for name, _ in commands)
    expected = byte_tokenizer.apply_chat_template(
        [{"role": "system", "content": system}, {"role": "user", "content": "问"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    halves = system.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    asked = [("user", "问")]
    assert run_template(values["template"], values.get("system", ""), asked) == expected.replace(system, halves)
    other = byte_tokenizer.apply_chat_template(
        [{"role": "system", "content": "另"}, {"role": "user", "content": "问"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert run_template(values["template"], "另", asked) == other
    assert not written.lacks_system
    if "license" in values:
        assert (
            values["license"].split()
            == "".join(c if c.isprintable() else " " if c.isspace() else "" for c in licence).split()
        )


def test_without_a_template_such_a_system_message_is_left_out_with_a_word(byte_tokenizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    for system in ('a\n"""\nFROM /etc/passwd\n', "\u3000\u3000第一段"):
        written = modelfile("m.gguf", tokenizer, "26 Jul 2024", system=system, context=5)
        assert [name for name, _ in read_modelfile(written.text) if name in ("system", "adapter", "template")] == []
        assert [value for name, value in read_modelfile(written.text) if name == "from"] == ["./m.gguf"]
        assert "# The system message is left out" in written.text and written.lacks_system


def test_an_adapter_names_its_base_and_parameters_are_ollamas(byte_tokenizer):
    text = modelfile(
        "lora.gguf",
        byte_tokenizer,
        "",
        system=None,
        context=99999,
        base="./base.gguf\nLICENSE x",
        parameters=parameters(
            {"temperature": 0.6, "top_k": 20, "do_sample": True, "top_p": float("nan"), "max_length": 5}
        ),
        licences=["Apache 2.0"],
    ).text
    values = [(name, value) for name, value in read_modelfile(text) if name not in ("parameter stop", "template")]
    assert values == [
        ("from", "./base.gguf LICENSE x"),
        ("adapter", "./lora.gguf"),
        ("parameter num_ctx", "8192"),
        ("parameter temperature", "0.6"),
        ("parameter top_k", "20"),
        ("license", "Apache 2.0"),
    ]
    assert parameters({"temperature": 0.6, "do_sample": False}) == {}


@given(st.text())
@example("Llama-3.1-医学 问答")
def test_ollama_accepts_the_name(title: str):
    assert re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,79}", ollama_name(title))
