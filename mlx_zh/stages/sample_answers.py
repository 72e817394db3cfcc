"""Answers of the base and of each tuned model to the same prompts, stored in the run folder."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mlx_zh.errors import DeviceError
from mlx_zh.language.notice import Notice
from mlx_zh.stages import setbacks
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console
from mlx_zh.system.digests import value_digest
from mlx_zh.system.json_text import parse_json
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

    def ask(self, name: str, *, again: bool = True) -> None:
        """Store the current model's answers under `name`; with `again=False`, keep answers that exist."""
        prompts = self._prompts
        answered = self._read()
        if not prompts or (not again and name in answered):
            return

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
        stored = {"prompts": prompts, "expected": self._expected, "answers": answered | {name: answers}}
        stored["key"] = value_digest(prompts)[:16]  # the prompts are stored without secrets
        write_json(self._path, stored)

    def shown(self, *names: str) -> str:
        """The prompts, each with the answers of the models `names`, as text; empty if there are none."""
        answered = self._read()
        if not answered:
            return ""
        lines = []
        for index, prompt in enumerate(self._prompts):
            lines.append(f"  > {prompt}")
            lines += [f"    {name:<5} {_one_line(answered[name][index])}" for name in names if name in answered]
        return "\n".join(lines)

    def _read(self) -> dict[str, list[str]]:
        """The stored answers by model; empty if they belong to other prompts."""
        if not self._path.exists():
            return {}
        try:
            stored = parse_json(self._path.read_text(encoding="utf-8"))
            key = stored.get("key") or value_digest(stored["prompts"])[:16]
            return dict(stored["answers"]) if key == value_digest(self._prompts)[:16] else {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # damaged: ask again
            return {}


def _one_line(text: str, max_length: int = 150) -> str:
    text = " ".join(text.split())
    return text if len(text) <= max_length else f"{text[:max_length]}…"
