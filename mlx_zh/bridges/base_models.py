"""The base model of another program's project: its short name here, 4 bits for a Mac, and what cannot be trained."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mlx_zh.bridges.draft import Draft
from mlx_zh.core.families import FAMILIES
from mlx_zh.language.reader import say
from mlx_zh.models.catalog import HUB_ID, catalog
from mlx_zh.system.json_text import parse_json

_REPEATS = ("-unsloth-bnb-4bit", "-bnb-4bit")  # the original in bitsandbytes' form
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z])")
_SMALL = 3.0  # billions of parameters below which 16-bit weights are small
_LARGEST_CONFIG = 1_000_000  # bytes


class Kind(NamedTuple):
    """What a model is, by its name or its config.json."""

    type: str
    title: str
    sight: bool = False


@cache
def tables() -> dict[str, Any]:
    """`models.yaml` of this package."""
    text = files(__package__).joinpath("models.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def convert_model(draft: Draft, name: str, bits: int | None, *, whole: bool, proposed: str | None) -> None:
    """The base model. `name` is their setting, `whole` whether all weights are trained.

    `proposed` is a model of the command line, which goes before theirs.
    """
    theirs = draft.text(name)
    if proposed is not None:
        draft.put("model.path", proposed, name, note=say("import-model-given"))
        return
    if theirs is None:
        draft.refuse(say("import-no-model", key=name))
        return
    local = _local(draft, theirs)
    if local is None and theirs.startswith((".", "/", "~")) and not Path(theirs).expanduser().exists():
        draft.put("model.path", theirs, name, note=say("import-model-missing"), level="differs")
        return
    model = theirs if local is None else local
    kind = _kind_of(Path(theirs).expanduser() if local is None else Path(draft.settings.folder, local), theirs)
    if kind is not None and kind.type not in FAMILIES:
        code = "import-model-sight" if kind.sight else "import-family"
        draft.refuse(say(code, model=theirs, family=kind.title, families=", ".join(FAMILIES)))
        return
    plain = _original(theirs)
    if plain is None:
        draft.refuse(say("import-model-rounded", model=theirs))
        return
    if plain != theirs and local is None:
        bits = bits or 4
    short = short_name(plain) if local is None else None
    if short is not None and not whole and bits in (None, 4):
        own = bits is None and _stored_in_bits(plain, local=False)  # already a copy for MLX
        note = "" if own else say("import-model-short" if bits == 4 else "import-model-proposed", original=plain)
        draft.put("model.path", short, name, note=note)
        return
    draft.put("model.path", plain if local is None else model, name)
    _bits(draft, plain, bits, whole=whole, stored=_stored_in_bits(plain, local is not None))


def _bits(draft: Draft, model: str, bits: int | None, *, whole: bool, stored: bool) -> None:
    if stored or (bits is None and (whole or _size(model) < _SMALL)):
        return
    if whole:
        draft.refuse(say("import-whole-bits", bits=bits))
    elif bits is not None and bits not in (2, 3, 4, 5, 6, 8):
        draft.refuse(say("import-bits", bits=bits))
    else:
        names = [n for n in ("quantization_bit", "load_in_4bit", "load_in_8bit") if draft.given(n)]
        draft.put("model.quantize.bits", bits or 4, *names[:1], note="" if bits else say("import-bits-proposed"))


def _stored_in_bits(model: str, local: bool) -> bool:
    return not local and bool(re.search(r"-(?:\d|mx\w+)-?bits?\b|-bf16$|-fp16$|-mxfp4|mlx-community/", model.lower()))


def _size(model: str) -> float:
    """Billions of parameters that a name says; 0 if it says none."""
    sizes = [float(size) for size in _SIZE.findall(model.rsplit("/", 1)[-1].lower())]
    return max(sizes, default=0.0)


def _local(draft: Draft, name: str) -> str | None:
    """The folder or file of a model on this disk, as the recipe names it; None if there is none."""
    try:
        path = Path(name).expanduser()
        if path.exists():
            return str(path.absolute())
        beside = draft.settings.folder / name
        return str(beside.absolute()) if beside.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _kind_of(path: Path, name: str) -> Kind | None:
    """What the config.json of a folder says, else what the name says; None if neither tells."""
    try:
        file = path / "config.json"
        if file.is_file() and file.stat().st_size < _LARGEST_CONFIG:
            config = parse_json(file.read_text(encoding="utf-8"))
            kind = str(config.get("model_type", ""))
            return Kind(kind, kind, "vision_config" in config) if kind else None
    except (OSError, ValueError, AttributeError):
        pass
    return kind_of_name(name)


def kind_of_name(name: str) -> Kind | None:
    """What a model's name says it is; None for a name that tells nothing."""
    last = re.sub(r"^meta-llama-3", "llama-3", name.rstrip("/").rsplit("/", 1)[-1].lower())
    for entry in tables()["families"]:
        if any(last.startswith(str(start).removeprefix("meta-")) for start in entry["names"]):
            return Kind(entry["type"], entry["title"], entry.get("sight", False))
    return None


def _original(name: str) -> str | None:
    """The model of which a copy is in another form; None if its weights cannot be read here."""
    lower = name.lower()
    for suffix in _REPEATS:
        if lower.endswith(suffix):
            return name[: -len(suffix)]
    last = lower.rsplit("/", 1)[-1]
    if any(last.endswith(end) or f"{end}-" in last for end in tables()["rounded"]) and not _is_gguf(name):
        return None
    return name


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def short_name(model: str) -> str | None:
    """The short name of a model with this id; None if there is none."""
    for name, entry in catalog().items():
        if model == name or model in entry.ids.values():
            return name
    owner, slash, last = model.lower().rpartition("/")
    if slash and owner not in tables()["owners"]:
        return None
    if slash and not HUB_ID.fullmatch(model):
        return None
    return tables()["short"].get(re.sub(r"-4bit$", "", last)) if slash else None


def template_fits(template: str, model: str) -> bool:
    """Whether a template of LLaMA-Factory is that of a model; true where it is not known."""
    types, kind = tables()["templates"].get(template), kind_of_name(model)
    return types is None or kind is None or kind.type in types


def template_known(template: str) -> bool:
    """Whether a template is a model's own one."""
    return template in tables()["templates"]
