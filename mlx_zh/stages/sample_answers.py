"""The same prompts answered by the base and by each tuned model, kept in the run folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mlx_zh.stages.run_folder import RunFolder
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

    def ask(self, name: str, *, again: bool = True) -> None:
        """Let the model as it is now answer as `name`; `again=False` keeps answers that are there."""
        prompts = list(self._recipe.evaluate.prompts)
        known = self._read()
        if not prompts or (not again and name in known):
            return

        from mlx_zh.corpus.conversation import Message
        from mlx_zh.models.generate import GenerationSession, Sampling

        sampling = Sampling(temperature=0.0, max_tokens=self._recipe.evaluate.max_new_tokens)
        system = [Message("system", self._recipe.data.system)] if self._recipe.data.system else []
        answers = []
        for prompt in prompts:
            loaded = self._loaded
            session = GenerationSession(loaded.model, loaded.tokenizer, loaded.eos_token_ids)
            tokens = self._renderer.prompt([*system, Message("user", prompt)])
            answers.append("".join(session.stream(tokens, sampling)).strip())
        write_json(self._path, {"prompts": prompts, "answers": known | {name: answers}})

    def shown(self, *names: str) -> str:
        """Prompts and answers as text, one under another."""
        known = self._read()
        if not known:
            return ""
        lines = []
        for index, prompt in enumerate(self._recipe.evaluate.prompts):
            lines.append(f"  > {prompt}")
            lines += [f"    {name:<5} {_one_line(known[name][index])}" for name in names if name in known]
        return "\n".join(lines)

    def _read(self) -> dict[str, list[str]]:
        """Answers so far, unless they are to other prompts."""
        if not self._path.exists():
            return {}
        kept = json.loads(self._path.read_text(encoding="utf-8"))
        return kept["answers"] if kept["prompts"] == list(self._recipe.evaluate.prompts) else {}


def _one_line(text: str, most: int = 150) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}…"
