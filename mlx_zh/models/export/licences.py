"""What the base's licence demands of a model made from it, as far as its name and files show."""

from __future__ import annotations

import filecmp
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.errors import ModelError, UploadError
from mlx_zh.models.export.source import Source
from mlx_zh.system.links import check_file, copy_file
from mlx_zh.system.storage import visible

_LLAMA3_VOCABULARY = 128256  # the same for every model with Llama 3's tokenizer, also for distilled ones
_LONGEST = 1_000_000  # bytes of a licence file that is put into other files
_FILES = ("LICENSE*", "USE_POLICY*", "NOTICE*", "Notice*")

# Patterns of model names, because the files of these models do not name the licence.
_BY_NAME = (
    (r"smollm", "apache-2.0", "Apache 2.0"),
    (r"qwen2(\.5)?-?math", "apache-2.0", "Apache 2.0"),
    (r"qwen2\.5-?(3b|72b)", "other", "the Qwen licence"),
    (r"qwen(2\.5|2|3)", "apache-2.0", "Apache 2.0"),
    (r"mistral-(7b|nemo)", "apache-2.0", "Apache 2.0"),
)


@dataclass(frozen=True)
class Licence:
    """A licence."""

    tag: str  # its name on the hub
    title: str
    version: str | None = None  # Llama's version, e.g. 3.1; None for other models

    @property
    def notice(self) -> str | None:
        """The text of the NOTICE file that must be in every copy, or None."""
        if self.version is None:
            return None
        return (
            f"Llama {self.version} is licensed under the Llama {self.version} Community License, Copyright © Meta "
            "Platforms, Inc. All Rights Reserved.\n"
        )


def find_licence(source: Source) -> Licence:
    """The base's licence, from its name and the size of its vocabulary; "other" if these do not show it."""
    name = source.name.lower()
    vocabulary = source.outline.shapes["model.embed_tokens.weight"][0]
    if re.search(r"(meta-)?llama[-_ ]?3", name) or (
        source.config["model_type"] == "llama" and vocabulary == _LLAMA3_VOCABULARY
    ):
        version = _llama_version(name, source)
        return Licence(f"llama{version}", f"the Llama {version} Community License", version)
    for pattern, tag, title in _BY_NAME:
        if re.search(pattern, name):
            return Licence(tag, title)
    return Licence("other", "its base's licence")


def _llama_version(name: str, source: Source) -> str:
    if match := re.search(r"llama[-_ ]?3[._-]([123])(?![0-9])", name):
        return f"3.{match[1]}"
    scaling = source.config.get("rope_scaling") or {}
    return "3.2" if scaling.get("factor") == 32.0 else "3.1" if scaling else "3"


def display_name(licence: Licence, wanted: str) -> str:
    """The name `wanted`, with "Llama" at its start if the licence demands it."""
    if licence.version is None or wanted.startswith("Llama"):
        return wanted
    if wanted.lower().startswith("llama"):
        return "Llama" + wanted[5:]
    return f"Llama-{licence.version}-{wanted}"


def check_repository(licence: Licence, repository: str) -> None:
    """Raise UploadError if the licence does not allow the repository's name ("OWNER/NAME")."""
    owner, _, name = repository.rpartition("/")
    if display_name(licence, name) != name:
        better = "/".join(filter(None, (owner, display_name(licence, name))))
        raise UploadError(
            f"{repository}: the Llama {licence.version} Community License demands that the name of a model made from "
            f'Llama begins with "Llama". Choose for example {better}.'
        )


def write_licence_files(folder: Path, licence: Licence, base: Source, original: Source | None = None) -> list[str]:
    """Copy the licence files of the base and of its original, and write NOTICE.

    Returns sentences on what is still missing. Raises ModelError for a link that leads out of a model's folder.
    """
    copied: list[str] = []
    for source in (base, original):
        if source is not None and source.path.is_dir():
            copied += [_copy_licence(source.path, file, folder) for file in _licence_files(source.path)]
    if licence.notice is None:
        return []
    notice = folder / "NOTICE"
    present = notice.read_bytes() if notice.is_file() else b""
    if licence.notice.strip().encode() not in present:
        notice.write_bytes(licence.notice.encode() + (b"\n" + present if present else b""))
    if any(name.upper().startswith("LICENSE") for name in copied):
        return []
    return [f"a copy of the Llama {licence.version} Community License (LICENSE) must go with the model"]


def licence_texts(licence: Licence, base: Source, original: Source | None = None) -> list[str]:
    """The texts of the licence files that `write_licence_files` copies, each once."""
    sources = [source.path for source in (base, original) if source is not None and source.path.is_dir()]
    files = [(folder, file) for folder in sources for file in _licence_files(folder)]
    texts = []
    for folder, file in files:
        check_file(folder, file, ModelError)
        if file.stat().st_size <= _LONGEST:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
    if licence.notice is not None and not any(licence.notice.strip() in text for text in texts):
        texts.append(licence.notice)
    return list(dict.fromkeys(texts))


def _licence_files(folder: Path) -> list[Path]:
    return visible({file for pattern in _FILES for file in folder.glob(pattern) if file.is_file()})


def _copy_licence(source: Path, file: Path, folder: Path) -> str:
    """Copy a licence file; beside another one of the same name it gets a name of its own. Returns the name."""
    check_file(source, file, ModelError)
    target = folder / file.name
    if target.exists() and not filecmp.cmp(file, target, shallow=False):
        target = folder / f"{file.stem}-original{file.suffix}"
    copy_file(source, file, target, ModelError)
    return target.name
