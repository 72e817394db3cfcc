"""LLaMA-Factory's names of chat templates, and the card that tells them."""

from __future__ import annotations

import pytest

from mlx_zh.models.export import card, licences
from mlx_zh.models.template_names import llama_factory_name

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "family", "name"),
    [
        (CHATML, "qwen2", "qwen"),
        (CHATML, "qwen3", "qwen3_nothink"),
        (f"{CHATML}<think>\n\n</think>", "qwen3_moe", "qwen3"),
        (CHATML, "llama", "chatml"),
        (f"You are SmolLM{CHATML}", "llama", "smollm2"),
        ("<|start_header_id|>user<|end_header_id|>", "llama", "llama3"),
        ("[INST] <<SYS>> [/INST]", "llama", "llama2"),
        ("[INST]{{ m }}[/INST]", "mistral", "mistral"),
        ("[INST]{{ m }}[/INST]", "llama", ""),
        ("[gMASK]<sop><|user|>", "glm4", "glm4"),
        ("<|user|>{{ m }}<|end|>", "phi3", "phi"),
        ("<start_of_turn>user", "gemma3_text", "gemma3"),
        ({"default": CHATML, "tools": "x"}, "qwen2", "qwen"),
        ("{{ m }}", "qwen2", ""),
        (None, "qwen2", ""),
    ],
)
def test_the_name_follows_the_marks_and_the_family(template: object, family: str, name: str) -> None:
    assert llama_factory_name(template, family) == name


@pytest.mark.parametrize("kind", ["peft", "hf", "mlx"])
def test_a_card_names_the_template_that_other_programs_need(kind: str) -> None:
    licence = licences.Licence("mit", "MIT")
    for name in ("qwen", ""):
        story = card.RunFacts("t", "o/b", "o/b", None, licence, "LoRA", [], [], template=name)
        text = card.model_card(story, card.FormatFacts(kind, "adapter"))
        assert ("template: qwen" in text) == (kind != "mlx" and name != "")
        assert ("No template of LLaMA-Factory" in text) == (kind != "mlx" and name == "")
