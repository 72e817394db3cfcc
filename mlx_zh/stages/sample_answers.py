"""Answers of the base and of each tuned model to the same prompts, stored in the run folder.

Beside the answers of a model is a key of all that can change them. Answers under another key are asked again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.errors import DeviceError
from mlx_zh.language.notice import Notice
from mlx_zh.stages import setbacks
from mlx_zh.stages.current_models import adapter_digest
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console
from mlx_zh.system.digests import value_digest
from mlx_zh.system.json_text import load_json
from mlx_zh.system.storage import write_json

if TYPE_CHECKING:
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe


class Samples:
    """Greedy answers to the recipe's `evaluate.prompts`, by model (base, sft, dpo)."""

    def __init__(self, recipe: Recipe, renderer: Renderer, loaded: LoadedModel) -> None:
        self._recipe, self._renderer, self._loaded = recipe, renderer, loaded
        self._path = RunFolder.of(recipe).samples
        self._prompts = [sample.prompt for sample in recipe.sample_prompts()]
        self._expected = [sample.expect for sample in recipe.sample_prompts()]

    def lacks(self, name: str, adapter: Path | None = None) -> bool:
        """Whether the model `name`, the base with `adapter`, has not answered the prompts."""
        if not self._prompts or not self._renderer.has_template:  # a model of raw text answers nothing
            return False
        return not (name in self._read("answers") and self._read("keys").get(name) == self._key(adapter))

    def ask(self, name: str, adapter: Path | None = None) -> None:
        """Store the current model's answers under `name`, unless they are there; `adapter` is the adapter it has."""
        if not self.lacks(name, adapter):
            return
        key, prompts = self._key(adapter), self._prompts

        from mlx_zh.corpus.conversation import Message
        from mlx_zh.models.generate import GenerationSession, Sampling

        sampling = Sampling(temperature=0.0, max_tokens=self._recipe.evaluate.max_new_tokens)
        message = self._recipe.system_message()
        system = [Message("system", message)] if message else []
        loaded = self._loaded

        def answer(prompt: str, chunk: int) -> str:
            session = GenerationSession(loaded.model, loaded.tokenizer, loaded.eos_token_ids, chunk)
            tokens = self._renderer.prompt([*system, Message("user", prompt)])
            return "".join(session.stream(tokens, sampling)).strip()

        answers, chunk = [], GenerationSession.prefill_chunk
        try:
            for prompt in prompts:
                text, chunk = setbacks.persistent(partial(answer, prompt), Notice("during-answers"), chunk)
                answers.append(text)
        except DeviceError as error:
            console.warn(Notice("answers-left-out", reason=str(error)))
            return
        stored = {"prompts": prompts, "expected": self._expected, "answers": self._read("answers") | {name: answers}}
        stored["key"] = value_digest(prompts)[:16]  # the prompts are stored without secrets
        write_json(self._path, stored | {"keys": self._read("keys") | {name: key}})

    def shown(self, *names: str) -> str:
        """The prompts, each with the answers of the models `names`, as text; empty if there are none."""
        answered = self._read("answers")
        if not answered:
            return ""
        lines = []
        for index, prompt in enumerate(self._prompts):
            lines.append(f"  > {prompt}")
            lines += [f"    {name:<5} {_one_line(answered[name][index])}" for name in names if name in answered]
        return "\n".join(lines)

    def _key(self, adapter: Path | None) -> str:
        """A digest of everything that can change the answers of the base with `adapter`."""
        recipe, loaded = self._recipe, self._loaded
        model = (loaded.fingerprint, recipe.model.dtype, recipe.model.quantization, self._renderer.fingerprint)
        asked = (self._prompts, self._expected, recipe.system_message(), recipe.evaluate.max_new_tokens)
        tuned = None if adapter is None else adapter_digest(adapter)
        return value_digest([*model, *asked, tuned])[:32]

    def _read(self, part: str) -> dict[str, Any]:
        """A part of what is stored (answers or keys), by model; empty if it belongs to other prompts."""
        try:
            stored = load_json(self._path)
            key = stored.get("key") or value_digest(stored["prompts"])[:16]
            values = stored[part] if key == value_digest(self._prompts)[:16] else {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # damaged: ask again
            return {}
        if not isinstance(values, dict):
            return {}
        return {name: value for name, value in values.items() if part != "answers" or self._are_answers(value)}

    def _are_answers(self, value: Any) -> bool:
        """Whether a stored value is an answer to each prompt."""
        is_text = isinstance(value, list) and all(isinstance(text, str) for text in value)
        return is_text and len(value) == len(self._prompts)


def _one_line(text: str, max_length: int = 150) -> str:
    text = " ".join(text.split())
    return text if len(text) <= max_length else f"{text[:max_length]}…"
