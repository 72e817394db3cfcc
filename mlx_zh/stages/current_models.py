"""The models of a run as they are now, by which exam figures of earlier models are told apart."""

from __future__ import annotations

from pathlib import Path

from mlx_zh.errors import MlxZhError
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system.digests import known_digests, value_digest
from mlx_zh.system.json_text import read_object


def adapter_digest(folder: Path) -> str:
    """A digest of an adapter's files, 16 hex digits. Raises DataError."""
    files = [str(folder / name) for name in (CONFIG_FILE, ADAPTER_FILE)]
    digests = known_digests().digests(files)
    return value_digest([digests[file] for file in files])[:16]


def current_models(run: RunFolder, base: str | None = None) -> dict[str, dict[str, str]]:
    """For each model of the run (base, sft, dpo, fused): the digests that figures of this model carry.

    A digest that is not known is left out. `base` is the fingerprint of the base model, by default the one that
    training recorded.
    """
    base = base or recorded_base(run)
    current: dict[str, dict[str, str]] = {}
    for name in ("base", *TUNED):
        current[name] = {} if base is None else {"base": base}
        stage = run.stage(name)
        if name in TUNED and all((stage.adapter / file).is_file() for file in (CONFIG_FILE, ADAPTER_FILE)):
            current[name]["adapter"] = adapter_digest(stage.adapter)
    fused = _fused_fingerprint(run, current)
    current["fused"] = {} if fused is None else {"base": fused}
    return current


def _fused_fingerprint(run: RunFolder, current: dict[str, dict[str, str]]) -> str | None:
    """The fused model's fingerprint; "" if the adapter that it was made of has changed, None if not known."""
    from mlx_zh.models.identity import fingerprint_of
    from mlx_zh.models.load import resolve_model

    folder = run.fused_model()
    made_of = (read_object(run.fused_summary) or {}).get(folder.name)
    if isinstance(made_of, dict):
        adapter = current.get(str(made_of.get("stage")), {}).get("adapter")
        if adapter is not None and adapter != made_of.get("adapter"):
            return ""
    try:
        return fingerprint_of(resolve_model(str(folder))) if folder.is_dir() else None
    except MlxZhError:
        return None


def recorded_base(run: RunFolder) -> str | None:
    """The fingerprint of the base model in the run's manifest, None if there is none."""
    model = (read_object(run.manifest) or {}).get("model")
    fingerprint = model.get("fingerprint") if isinstance(model, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None
