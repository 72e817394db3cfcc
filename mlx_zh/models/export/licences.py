"""What the base's licence asks of a model made from it, as far as it can be told from the files."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.errors import UploadError
from mlx_zh.models.export.source import Source

_LLAMA3_VOCABULARY = 128256  # of every model with Llama 3's tokenizer, distilled ones included
_FILES = ("LICENSE*", "USE_POLICY*", "NOTICE*", "Notice*")

# Names that models are known by, for those whose files do not say.
_BY_NAME = (
    (r"smollm", "apache-2.0", "Apache 2.0"),
    (r"qwen2(\.5)?-?math", "apache-2.0", "Apache 2.0"),
    (r"qwen2\.5-?(3b|72b)", "other", "the Qwen licence"),
    (r"qwen(2\.5|2|3)", "apache-2.0", "Apache 2.0"),
    (r"mistral-(7b|nemo)", "apache-2.0", "Apache 2.0"),
)


@dataclass(frozen=True)
class Licence:
    """`tag` is the hub's name of it; `version` is Llama's, and None where the base is no Llama."""

    tag: str
    title: str
    version: str | None = None

    @property
    def notice(self) -> str | None:
        """The text file that must go with every copy, or None."""
        if self.version is None:
            return None
        return (
            f"Llama {self.version} is licensed under the Llama {self.version} Community License, Copyright © Meta "
            "Platforms, Inc. All Rights Reserved.\n"
        )


def find_licence(source: Source) -> Licence:
    """The base's licence by its name and its shape; "other" where neither says."""
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
    if found := re.search(r"llama[-_ ]?3[._-]([123])(?![0-9])", name):
        return f"3.{found[1]}"
    scaling = source.config.get("rope_scaling") or {}
    return "3.2" if scaling.get("factor") == 32.0 else "3.1" if scaling else "3"


def display_name(licence: Licence, wanted: str) -> str:
    """`wanted`, with "Llama" at its beginning where the licence demands that."""
    if licence.version is None or wanted.startswith("Llama"):
        return wanted
    if wanted.lower().startswith("llama"):
        return "Llama" + wanted[5:]
    return f"Llama-{licence.version}-{wanted}"


def check_repository(licence: Licence, repository: str) -> None:
    """Refuse a repository whose name breaks the licence. Raises UploadError."""
    owner, _, name = repository.rpartition("/")
    if display_name(licence, name) != name:
        better = "/".join(filter(None, (owner, display_name(licence, name))))
        raise UploadError(
            f"{repository}: the Llama {licence.version} Community License demands that the name of a model made from "
            f'it begins with "Llama". Choose for example {better}.'
        )


def write_licence_files(folder: Path, licence: Licence, base: Source) -> list[str]:
    """Copy the base's licence files and write the notice; returns what is still missing, in words."""
    copied = []
    if base.place.is_dir():
        for pattern in _FILES:
            for file in sorted(base.place.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
                    copied.append(file.name)
    if licence.notice is None:
        return []
    (folder / "NOTICE").write_text(licence.notice, encoding="utf-8")
    if any(name.upper().startswith("LICENSE") for name in copied):
        return []
    return [f"a copy of the Llama {licence.version} Community License (LICENSE) must go with the model"]
