"""What goes with the weights: Ollama's Modelfile, licence files, the model card, and the upload."""

from __future__ import annotations

import ast
import html
import re
import shlex
import sys
import types
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tuned import make_tuned

from mlx_zh.errors import UploadError
from mlx_zh.models.export import card, licences, ollama, upload
from mlx_zh.models.export.fidelity import Distance, Fidelity
from mlx_zh.models.export.merge import SurvivalSummary
from mlx_zh.models.load import hub_name
from mlx_zh.system.escaping import one_line

LLAMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ date_string }}\n\n{{ s }}<|eot_id|>{% for m in rest %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def go(template: str, system: str, messages: list[tuple[str, str]]) -> str:
    """What Ollama makes of a template of the one shape that is written here."""
    shape = re.compile(
        r"\{\{ if \.System \}\}(.*?)\{\{ \.System \}\}(.*?)(?:\{\{ else \}\}(.*?))?\{\{ end \}\}"
        r'\{\{ range \.Messages \}\}\{\{ if eq \.Role "user" \}\}(.*?)\{\{ \.Content \}\}(.*?)'
        r'\{\{ else if eq \.Role "assistant" \}\}(.*?)\{\{ \.Content \}\}(.*?)\{\{ end \}\}\{\{ end \}\}(.*)',
        re.DOTALL,
    )
    a, b, alone, c, d, e, f, reply = shape.fullmatch(template).groups()
    start = f"{a}{system}{b}" if system else alone or ""
    turns = "".join(f"{c}{t}{d}" if role == "user" else f"{e}{t}{f}" for role, t in messages)
    return start + turns + reply


@pytest.mark.parametrize("system", ["", "你是助手。"])
@pytest.mark.parametrize(("template", "bos"), [(LLAMA, "<|begin_of_text|>"), (CHATML, None)])
def test_ollama_writes_what_training_wrote(byte_tokenizer, template, bos, system):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer, bos_token=bos)
    tokenizer.chat_template = template
    turns = [("user", "你好"), ("assistant", "Hello!"), ("user", "再见")]
    said = [{"role": r, "content": t} for r, t in ([("system", system)] if system else []) + turns]
    expected = tokenizer.apply_chat_template(
        said, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    )
    found = ollama.find_turns(tokenizer, "26 Jul 2024")
    assert go(found.template(), system, turns) == expected


def test_a_modelfile(byte_tokenizer):
    tokenizer = byte_tokenizer
    text = ollama.modelfile("m.gguf", tokenizer, "26 Jul 2024", system="你好", context=4096, notes=["a note"]).text
    assert text.startswith('# a note\nFROM ./m.gguf\n\nTEMPLATE """{{ if .System }}<|im_start|>system\n')
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 4096" in text and 'SYSTEM """你好"""' in text


def test_a_template_that_cannot_be_told_is_left_to_ollama(byte_tokenizer):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    for template in (PLAIN, "{{ raise_exception('no') }}", CHATML + "{{ messages | length }}"):
        tokenizer.chat_template = template
        assert ollama.find_turns(tokenizer, "26 Jul 2024") is None
        assert "TEMPLATE" not in ollama.modelfile("m.gguf", tokenizer, "", system=None, context=10).text


@pytest.fixture
def source(tmp_path):
    return make_tuned(tmp_path).fusion().base


def renamed(source, name, **changes):
    return replace(source, name=name, config=source.config | changes)


@pytest.mark.parametrize(
    ("name", "tag", "version"),
    [
        ("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", "llama3.1", "3.1"),
        ("meta-llama/Llama-3.2-1B", "llama3.2", "3.2"),
        ("meta-llama/Meta-Llama-3-8B", "llama3", "3"),
        ("Qwen/Qwen2.5-7B-Instruct", "apache-2.0", None),
        ("Qwen/Qwen2.5-3B-Instruct", "other", None),
        ("smollm2-135m-instruct", "apache-2.0", None),
        ("someone/something", "other", None),
    ],
)
def test_licences_by_name(source, name, tag, version):
    found = licences.find_licence(renamed(source, name))
    assert (found.tag, found.version) == (tag, version)


def test_a_llama_under_another_name_is_known_by_its_vocabulary(source):
    shapes = source.outline.shapes | {"model.embed_tokens.weight": (128256, 64)}
    llama = replace(source, name="/models/mine", outline=replace(source.outline, shapes=shapes))
    assert licences.find_licence(renamed(llama, "mine", rope_scaling={"factor": 8.0})).version == "3.1"
    assert licences.find_licence(renamed(llama, "mine", rope_scaling={"factor": 32.0})).version == "3.2"


def test_llamas_name_and_notice(source, tmp_path):
    licence = licences.find_licence(renamed(source, "meta-llama/Llama-3.1-8B"))
    assert licences.display_name(licence, "llama31-zh") == "Llama31-zh"
    assert licences.display_name(licence, "chinese") == "Llama-3.1-chinese"
    assert licences.display_name(licence, "Llama-zh") == "Llama-zh"
    licences.check_repository(licence, "me/Llama-3.1-zh")
    with pytest.raises(UploadError, match=r"me/zh: .* begins with \"Llama\"\. Choose for example me/Llama-3.1-zh\."):
        licences.check_repository(licence, "me/zh")
    out = tmp_path / "out"
    out.mkdir()
    missing = licences.write_licence_files(out, licence, source)
    assert "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms" in (
        (out / "NOTICE").read_text(encoding="utf-8")
    )
    assert missing == ["a copy of the Llama 3.1 Community License (LICENSE) must go with the model"]
    (source.path / "LICENSE.txt").write_text("the text")
    assert licences.write_licence_files(out, licence, source) == []
    assert (out / "LICENSE.txt").read_text() == "the text"


def test_a_card(source):
    licence = licences.find_licence(renamed(source, "meta-llama/Llama-3.1-8B"))
    story = card.RunFacts(
        title="Llama-zh",
        base="meta-llama/Llama-3.1-8B",
        base_hub_id="meta-llama/Llama-3.1-8B",
        original=None,
        licence=licence,
        method="LoRA of rank 16 by SFT, then DPO",
        data=[("train.jsonl", "abc" * 9)],
        settings=[("sft.learning_rate", "0.0001")],
        scores=[("ceval", "dpo", "50.0% (49.0% to 51.0%)")],
        missing=["a copy of the licence must go with the model"],
    )
    left = SurvivalSummary(224, 0.998, 0.97, 0.4, 0.6)
    delivery = card.FormatFacts(
        "mlx", "6-bit", "mlx", left, Fidelity(1000, 0.01, 0.98, 5.0, 5.1, 0.3), ["it is slow"]
    )
    text = card.model_card(story, delivery)
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "llama3.1",
        "language": ["zh", "en"],
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx-zh", "chat", "llama"],
        "base_model": "meta-llama/Llama-3.1-8B",
    }
    for part in (
        "# Llama-zh\n\n**Built with Llama**",
        "by SFT, then DPO. Format: mlx, 6-bit.",
        "| ceval | dpo | 50.0% (49.0% to 51.0%) |",
        "mean KL 0.0100 nats a token (tuning itself moved the model by 0.3000)",
        "change to 224 matrices, 99.8% is left on average (minimum: 97.0%)",
        "**Note:** it is slow.",
        "**Before you share it:** a copy of the licence must go with the model.",
        "In this folder; elsewhere, write its path or its name on a hub in place of the dot:\n\n```bash",
        "mlx_lm.chat --model .\n",
    ):
        assert part in body
    for kind, command in (
        ("hf", 'from_pretrained(".", dtype="auto")'),
        ("peft", 'PeftModel.from_pretrained(base, ".")'),
        ("gguf", "In this folder:\n\n```bash\nllama-cli -m x.gguf "),
    ):
        assert command in card.model_card(story, card.FormatFacts(kind, "", "x.gguf"))


@pytest.mark.parametrize(
    ("base", "hub_id", "named", "loaded"),
    [
        ("org/base", "org/base", "", "org/base"),
        ("my-model", None, "`BASE` stands for `my-model`: its path, or its name on a hub.", "BASE"),
        ("m.gguf", None, "`BASE` stands for the model of which `m.gguf` is a GGUF copy: its path", "BASE"),
    ],
)
def test_a_card_of_an_adapter_names_a_base_that_its_reader_loads(base, hub_id, named, loaded):
    story = card.RunFacts("t", base, hub_id, None, licences.Licence("mit", "MIT"), "LoRA", [], [])
    chat = card.model_card(story, card.FormatFacts("mlx-adapter", "adapter"))
    assert f"mlx_lm.chat --model {loaded} --adapter-path .\n" in chat and named in chat
    assert chat.index("This is an adapter: it needs the base model.") < chat.index("In this folder; elsewhere")
    merged = card.model_card(story, card.FormatFacts("peft", "adapter"))
    assert f'from_pretrained("{loaded}", dtype="auto")' in merged and named in merged


def test_the_built_in_model_is_named_by_what_it_is_a_copy_of():
    """Its short name is known to no other program."""
    assert hub_name("smollm2-135m-instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_name("some/model") == "some/model"


class FakeApi:
    calls: ClassVar[list[tuple]] = []
    error: ClassVar[Exception | None] = None
    endpoint = "https://hub.example"

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))
        if self.error:
            raise self.error

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, folder_path))


@pytest.fixture
def api(monkeypatch):
    import huggingface_hub

    FakeApi.calls, FakeApi.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return FakeApi


def test_upload_is_private_unless_asked(api, tmp_path):
    assert upload.push(tmp_path, "me/zh", "huggingface", public=False) == "https://hub.example/me/zh"
    upload.push(tmp_path, "me/zh", "huggingface", public=True)
    assert api.calls[:2] == [("create", "me/zh", True, True), ("upload", "me/zh", str(tmp_path))]
    assert api.calls[2] == ("create", "me/zh", False, True)


def test_a_failed_upload_is_told_plainly_and_without_the_token(api, tmp_path):
    api.error = RuntimeError("401 Client Error with hf_abcDEF123 (Request ID: x)\nmore lines")
    api.error.response = types.SimpleNamespace(status_code=401)
    with pytest.raises(UploadError) as failure:
        upload.push(tmp_path, "me/zh", "huggingface", public=False)
    text = str(failure.value)
    assert text.startswith("me/zh could not be uploaded: 401 Client Error with ***") and "hf_abc" not in text
    assert "run `hf auth login` with a token that can write" in text and "more lines" not in text
    api.error = OSError("no route to host")
    with pytest.raises(UploadError, match=r"no route to host\. Check the network; the model itself is whole"):
        upload.push(tmp_path, "me/zh", "huggingface", public=False)


def test_what_would_fail_late_is_found_early(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UploadError, match="no access token for Hugging Face was found"):
        upload.check("me/zh", "huggingface")
    with pytest.raises(UploadError, match="'zh' is not a repository's name; write it as OWNER/NAME"):
        upload.check("zh", "huggingface")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(UploadError, match=r"pip install 'mlx-zh\[modelscope\]'"):
        upload.check("me/zh", "modelscope")


def test_upload_to_modelscope(monkeypatch, tmp_path):
    calls = []

    class HubApi:
        def repo_exists(self, name):
            return False

        def create_model(self, name, visibility):
            calls.append((name, visibility))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, folder_path))

    module = types.ModuleType("modelscope.hub.api")
    module.HubApi = HubApi
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", module)
    assert upload.push(tmp_path, "me/zh", "modelscope", public=False) == "me/zh on ModelScope"
    assert calls == [("me/zh", 1), ("me/zh", str(tmp_path))]


HOSTILE = st.text(
    st.one_of(st.sampled_from("\\`*_[]()|~$#>+-=.!&<:;'\"{}%@ \n\t\x1b\u2028\u202ea中"), st.characters())
)
SEEN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
LICENCE = licences.Licence("other", "its base's licence")


def hostile_card(kind: str, texts: list[str]) -> tuple[dict[str, Any], str]:
    """The metadata and the page of a card that has these texts everywhere."""
    title, base, original, method, name, key, value, warning = texts
    story = card.RunFacts(
        title, base, base, original, LICENCE, method, [(name, "ab")], [(key, value)], [(key, name, value)], [warning]
    )
    text = card.model_card(story, card.FormatFacts(kind, value, f"{title}.gguf", warnings=[warning]))
    # How the hub finds the metadata: between two lines of three dashes.
    head = re.match(r"---\n([\s\S]*?)\n---(?:\n|$)", text)
    assert head is not None
    return yaml.safe_load(head[1]), SEEN.render(text[head.end() :])


@given(st.sampled_from(["mlx", "hf", "gguf", "peft"]), st.lists(HOSTILE, min_size=8, max_size=8))
@example(
    "peft",
    ['"); import os; os.system("x") #', '"""\n```\n# x', "`", "<script>", "a|b", "---\nlicense: mit", "|", "**"],
)
@example("gguf", ["a; rm -rf ~", "x\n---\nlicense: mit\n", "``", "\\", "[a](b)", "- x", "", "\u2028# x"])
def test_a_card_shows_hostile_texts_as_texts(kind: str, texts: list[str]):
    metadata, page = hostile_card(kind, texts)
    title, base, original, method, name, key, value, warning = map(one_line, texts)
    assert metadata["license"] == "other" and metadata.get("base_model", "") == base
    assert set(metadata) <= {
        "license", "language", "library_name", "pipeline_tag", "tags", "license_name", "base_model"
    }  # fmt: skip
    tags = set(re.findall(r"</?([a-z0-9]+)", page))
    assert tags <= set(
        ["h1", "h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "strong"]
    ), page
    assert re.findall("<h2>(.*?)</h2>", page) == ["Use", "Training", "Scores", "Fidelity", "Licence"]
    seen = html.unescape(page).replace("\u200b", "")
    assert f"<h1>{title}</h1>".replace("\u200b", "") in seen
    for text in (base, original, name):
        assert f"<code>{text}</code>".replace("\u200b", "") in seen or not text
    for text in (method, key, value, warning):
        assert text.replace("\u200b", "") in seen
    if kind == "peft":  # the program text is still one that names the base
        code = html.unescape(re.search('<code class="language-python">(.*?)</code>', page, re.DOTALL)[1])
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        assert len(calls) == 2 and calls[0].args[0].value == base
    if kind == "gguf":
        lines = html.unescape(re.search('<code class="language-bash">(.*?)</code>', page, re.DOTALL)[1]).splitlines()
        assert shlex.split(lines[0], comments=True) == ["llama-cli", "-m", one_line(f"{texts[0]}.gguf")]


def test_the_licence_files_of_the_original_go_along(source, tmp_path):
    original = replace(source, path=tmp_path / "original", name="meta-llama/Llama-3.1-8B")
    original.path.mkdir()
    for name, text in {"LICENSE": "Llama", "USE_POLICY.md": "policy", "NOTICE": "of others"}.items():
        (original.path / name).write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    licence = licences.find_licence(original)
    assert licences.write_licence_files(out, licence, source, original) == []
    assert (out / "LICENSE").read_text() == "Llama" and (out / "USE_POLICY.md").read_text() == "policy"
    notice = (out / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith("Llama 3.1 is licensed under") and notice.endswith("\n\nof others")


def test_two_licences_of_one_name_are_both_kept(source, tmp_path):
    original = replace(source, path=tmp_path / "original")
    original.path.mkdir()
    (original.path / "LICENSE.txt").write_text("original")
    (source.path / "LICENSE.txt").write_text("base")
    out = tmp_path / "out"
    out.mkdir()
    licences.write_licence_files(out, LICENCE, source, original)
    assert (out / "LICENSE.txt").read_text() == "base"
    assert (out / "LICENSE-original.txt").read_text() == "original"


def test_a_card_says_what_q8_0s_fidelity_is_of():
    exact = Fidelity(1000, 0.0001, 0.99, 5.0, 5.0, 0.3)
    alone = card.fidelity_text(card.FormatFacts("gguf", "Q8_0", fidelity=exact))
    assert "the fidelity of the weights alone" in alone and "a KL of about 0.005" in alone
    assert "weights alone" not in card.fidelity_text(card.FormatFacts("gguf", "F16", fidelity=exact))
    measured = card.FormatFacts("gguf", "Q8_0", fidelity=exact, llama_cpp=Distance(0.0051, 0.97, 5.02))
    text = card.fidelity_text(measured)
    assert "mean KL 0.0051, the same most likely token 97.0% of the time, perplexity 5.020" in text
    assert "weights alone" not in text
