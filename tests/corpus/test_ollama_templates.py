"""The TEMPLATE of a Modelfile writes the prompts that each family's chat template writes."""

from __future__ import annotations

import chat_templates
import pytest
import tool_templates
from modelfiles import run_template
from transformers import PreTrainedTokenizerFast

from mlx_zh.models.export.ollama import find_turns

FAMILIES = {
    "Llama 3.1": chat_templates.LLAMA31,
    "Llama 3.1, tools": tool_templates.LLAMA31_TOOLS,
    "Qwen2.5": chat_templates.QWEN25,
    "Qwen2.5, tools": tool_templates.QWEN25_TOOLS,
    "Qwen3": chat_templates.QWEN3,  # it writes thoughts into the last answer, which is in no prompt
    "Qwen3, tools": tool_templates.QWEN3_TOOLS,
    "SmolLM2": chat_templates.SMOLLM2,
    "thinking": chat_templates.THINKING,
    "cutting": chat_templates.CUTTING,
    "metadata": chat_templates.METADATA,
    "effort": chat_templates.EFFORT,  # its reply has another header than its answers
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("system", ["", "你是助手。"])
@pytest.mark.parametrize("exchanges", [0, 1, 3])
def test_ollama_writes_the_prompt_of_each_family(byte_tokenizer, family: str, system: str, exchanges: int):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer.backend_tokenizer,
        bos_token="<|begin_of_text|>",
        chat_template=FAMILIES[family],
    )
    turns = [turn for n in range(exchanges) for turn in (("user", f"问{n}"), ("assistant", f"答{n}"))]
    turns.append(("user", "再问"))
    said = [{"role": role, "content": text} for role, text in ([("system", system)] if system else []) + turns]
    expected = tokenizer.apply_chat_template(
        said, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    )
    template = find_turns(tokenizer, "26 Jul 2024")
    assert template is not None
    assert run_template(template.template(), system, turns) == expected
