"""Put a finished export where a program looks for its models: Ollama's store, or LM Studio's folder."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_zh.errors import PlacingError
from mlx_zh.models.export.ollama import ollama_name
from mlx_zh.system import console
from mlx_zh.system.json_text import read_object
from mlx_zh.system.storage import folder_whole, need_space, storage_errors, visible

PROGRAMS = ("ollama", "lmstudio")
PUBLISHER = "mlx-zh"  # the first of the two levels in LM Studio's list
_ANSWER = 60  # seconds that Ollama may take to list its models
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # colours and movements of the cursor


@dataclass(frozen=True)
class Place:
    """Where a run's model goes."""

    program: str  # one of PROGRAMS
    title: str
    replace: bool  # whether a model of the same name may be replaced

    @property
    def name(self) -> str:
        """The model's name in the program."""
        return ollama_name(self.title) if self.program == "ollama" else self.title

    @property
    def target(self) -> Path | None:
        """The folder in LM Studio's models; None if LM Studio is not there, or for Ollama."""
        models = lmstudio_models() if self.program == "lmstudio" else None
        return None if models is None else models / PUBLISHER / self.title

    @property
    def installed(self) -> bool:
        """Whether the program is on this machine."""
        return shutil.which("ollama") is not None if self.program == "ollama" else self.target is not None

    @property
    def readable(self) -> tuple[str, ...]:
        """The formats that the program reads on this machine, the best one first."""
        if self.program == "ollama":
            return ("gguf",)  # many versions run no adapters
        return ("mlx", "gguf") if platform.system() == "Darwin" else ("gguf",)

    def formats(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """The formats `wanted`, with one that the program reads added if there is none."""
        return wanted if set(wanted) & set(self.readable) else (*wanted, self.readable[0])

    def check(self) -> None:
        """Check before the export. Raises PlacingError if the program does not answer or has such a model."""
        if self.program == "ollama" and self.installed:
            present = self.name in _ollama_models()
        else:
            present = self.target is not None and os.path.lexists(self.target)
        if present and not self.replace:
            where = "Ollama" if self.program == "ollama" else f"LM Studio ({self.target})"
            raise PlacingError(
                f"{where} already has a model named {self.name}. Give this one another name with export.name=NAME, "
                "or add --replace to put it in the other one's place."
            )

    def steps(self, folder: Path) -> list[str]:
        """The commands that place the export in `folder`, and start it where a command does."""
        if self.program == "ollama":
            create = f"cd {shlex.quote(str(folder))} && ollama create {self.name} -f Modelfile"
            return [create, f"ollama run {self.name}"]
        place = f"~/.lmstudio/models/{PUBLISHER}/{shlex.quote(self.title)}"
        return [f"mkdir -p {place}", f"cp -R {shlex.quote(f'{folder}/.')} {place}/"]

    def put(self, fused: Path, formats: tuple[str, ...]) -> None:
        """Place the export in `fused`/FORMAT, and say how to use it. Raises PlacingError or StorageError."""
        kind = next(kind for kind in self.readable if kind in formats)
        folder = fused / kind
        if self.program == "ollama":
            self._create(folder)
        else:
            self._copy(folder, kind)

    def _create(self, folder: Path) -> None:
        words, _ = self.steps(folder)
        if not self.installed:
            console.say(
                "Ollama is not installed here, so nothing was placed. Install it from ollama.com, start it, then "
                f"run:\n  {words}\n  ollama run {self.name}"
            )
            return
        try:
            self.check()  # another program may have come first while this one worked
        except PlacingError as error:
            raise PlacingError(f"{error} The model is whole in {folder}: `{words}` is left to do.") from error
        console.say(f"Ollama is reading the model; if you stop it, `{words}` goes on later.")
        try:
            status = subprocess.run(["ollama", "create", self.name, "-f", "Modelfile"], cwd=folder, check=False)
        except OSError as error:
            raise PlacingError(f"ollama could not be run: {error.strerror}. The model is in {folder}.") from error
        if status.returncode:
            raise PlacingError(
                f"`ollama create` ended with status {status.returncode}; its words are above. The model is whole in "
                f"{folder}. When the reason is out of the way, run `{words}`."
            )
        console.say(f"In Ollama: ollama run {self.name}")

    def _copy(self, folder: Path, kind: str) -> None:
        target = self.target
        if target is None:
            words = "\n  ".join(self.steps(folder))
            console.say(
                "LM Studio is not installed here, so nothing was placed. Install it from lmstudio.ai, start it once, "
                f"then run:\n  {words}"
            )
            return
        files = visible(folder.iterdir()) if kind == "mlx" else visible(folder.glob("*.gguf"))
        if not _links_work(folder, target):
            need_space(target, sum(_size(path) for path in files), "the copy for LM Studio")
        self._make_way(target)
        with folder_whole(target) as new:
            for path in files:
                _link_or_copy(path, new / path.name)
        console.say(f"In LM Studio: {PUBLISHER}/{self.title} ({target})")

    def _make_way(self, target: Path) -> None:
        """Check again that nothing is replaced; another program may have come first while this one worked."""
        self.check()
        if target.is_symlink() or target.is_file():
            with storage_errors(target):
                target.unlink()


def _ollama_models() -> set[str]:
    """The names of Ollama's models, those with the tag `latest` also without it. Raises PlacingError."""
    try:
        done = subprocess.run(
            ["ollama", "list"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_ANSWER,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PlacingError(
            f"`ollama list` gave no answer in {_ANSWER} seconds. Start Ollama again, then run this again."
        ) from error
    except OSError as error:
        raise PlacingError(
            f"`ollama list` could not be run ({error.strerror}). Install Ollama again, or leave out --to ollama."
        ) from error
    if done.returncode:
        lines = [line.strip() for line in _ANSI.sub("", done.stderr).splitlines() if line.strip()]
        reason = lines[-1] if lines else "no reason given"
        raise PlacingError(f"Ollama does not answer ({reason}). Start it (`ollama serve`), then run this again.")
    names = [line.split()[0].lower() for line in done.stdout.splitlines()[1:] if line.split()]
    return {short for name in names for short in (name, name.removesuffix(":latest"))}


def lmstudio_models() -> Path | None:
    """LM Studio's models folder; None if LM Studio has not been started here yet."""
    user = Path.home()
    homes = [user / ".lmstudio", user / ".cache" / "lm-studio"]
    with suppress(OSError, ValueError):
        homes.insert(0, Path(os.path.expanduser((user / ".lmstudio-home-pointer").read_text("utf-8").strip())))
    home = next((path for path in homes if os.path.isabs(path) and os.path.isdir(path)), None)
    if home is None:
        return None
    chosen = (read_object(home / "settings.json") or {}).get("downloadsFolder")
    if isinstance(chosen, str) and os.path.isabs(chosen) and os.path.isdir(chosen):
        return Path(chosen)
    return home / "models"


def _links_work(folder: Path, target: Path) -> bool:
    """Whether both are on one volume, so that a hard link needs no space."""
    existing = next(path for path in target.parents if path.exists())
    return folder.stat().st_dev == existing.stat().st_dev


def _link_or_copy(path: Path, target: Path) -> None:
    if path.is_dir():
        target.mkdir()
        for inner in visible(path.iterdir()):
            _link_or_copy(inner, target / inner.name)
        return
    try:
        os.link(path, target)
    except OSError:  # another volume, or one without links
        shutil.copyfile(path, target)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
