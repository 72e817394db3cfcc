"""What the model cards say about the run that a model comes from."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from mlx_zh.exams.current import is_current
from mlx_zh.models.export import card
from mlx_zh.models.export.licences import Licence
from mlx_zh.models.export.merge import Fusion
from mlx_zh.models.load import hub_name
from mlx_zh.models.template_names import llama_factory_name
from mlx_zh.recipe import Recipe
from mlx_zh.stages.current_models import current_models
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system.json_text import load_json


def run_facts(recipe: Recipe, fusion: Fusion, title: str, licence: Licence, missing: Sequence[str]) -> card.RunFacts:
    """The facts of a run; `missing` names licence files that the base lacks."""
    base, spec, run = fusion.base, fusion.adapter.spec, RunFolder.of(recipe)
    stages = _stages(run, fusion)
    kind = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}[spec.kind]
    rank = "" if spec.kind == "full" else f" of rank {spec.rank}"
    name = hub_name(base.name)
    on_hub = not Path(expanduser(base.name)).exists() and "/" in name
    settings = [("lora.type", spec.kind), ("lora.rank", str(spec.rank)), ("scale", f"{spec.scale:g}")]
    settings += [(f"{s}.learning_rate", f"{getattr(recipe, s).learning_rate:g}") for s in stages]
    settings += [(f"{s}.batch_size", str(getattr(recipe, s).batch_size)) for s in stages]
    return card.RunFacts(
        title=title,
        base=name if on_hub else Path(base.name).name,
        base_hub_id=name if on_hub else None,
        original=None if fusion.original is None else Path(fusion.original.name).name,
        licence=licence,
        method=f"{kind}{rank}" + (f" by {', then '.join(s.upper() for s in stages)}" if stages else ""),
        data=_data_files(run) if stages else [],
        settings=settings,
        scores=_scores(run),
        missing=missing,
        template=llama_factory_name(base.tokenizer.chat_template, str(base.config.get("model_type", ""))),
    )


def _stages(run: RunFolder, fusion: Fusion) -> list[str]:
    """The run's stages that made the adapter, in order; none if it is not the run's own."""
    made = [name for name in TUNED if run.stage(name).adapter.is_dir()]
    folder = fusion.adapter.folder.resolve()
    last = next((i for i, name in enumerate(made) if run.stage(name).adapter.resolve() == folder), -1)
    return made[: last + 1]


def _data_files(run: RunFolder) -> list[tuple[str, str]]:
    """The name, without folders, and the SHA-256 of each data file of a run."""
    try:
        digests = load_json(run.manifest)["data"]
        return [(Path(path).name, str(digest)) for path, digest in digests.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _scores(run: RunFolder) -> list[tuple[str, str, str]]:
    """Exam, model and accuracy of each finished evaluation of the run's models as they are now.

    Figures of a fused model are of the one that is about to be replaced.
    """
    current = current_models(run)
    scores = []
    for path in sorted(run.exams.glob("*.json")):
        model, _, exam = path.stem.partition("-")
        try:
            report = load_json(path)
            if model == "fused" or not is_current(report.get("about"), current.get(model, {})):
                continue
            row = report["rows"][0]
            low, high = row["interval"]
            scores.append((exam, model, f"{row['macro']:.1%} ({low:.1%} to {high:.1%})"))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue  # a file for submission, or one of another program
    return scores
