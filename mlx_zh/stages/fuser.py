"""Merge a run's adapter into its base, write each format that the recipe asks for, and measure what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from os.path import expanduser
from pathlib import Path

import mlx.core as mx

from mlx_zh.errors import AdapterError
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters import peft
from mlx_zh.models.catalog import packing_on_loading
from mlx_zh.models.export import bits, card, fidelity, licences, llama_quantizer, ollama
from mlx_zh.models.export.folder_files import (
    Layout,
    full_layout,
    generation_config,
    packed_layout,
    write_folder,
    write_tokenizer,
)
from mlx_zh.models.export.gguf_file import About, GGUFOutcome, GGUFPlan, plan_gguf, write_gguf
from mlx_zh.models.export.gguf_lora import write_gguf_lora
from mlx_zh.models.export.llama_types import LLAMA_TYPES
from mlx_zh.models.export.merge import Fusion, open_adapter, summarize
from mlx_zh.models.export.mlx_adapter import write_mlx_adapter
from mlx_zh.models.export.source import open_source
from mlx_zh.models.family_configs import expert_names
from mlx_zh.models.identity import is_foreign
from mlx_zh.models.load import hub_name, load_config, resolve_model
from mlx_zh.recipe import ADAPTER_FORMATS, Recipe
from mlx_zh.stages.current_models import adapter_digest
from mlx_zh.stages.export_check import check_formats, recovers
from mlx_zh.stages.few_bits import mixed_layout, recovered_layout, recovery_fits
from mlx_zh.stages.importance import measured_importance
from mlx_zh.stages.model_facts import run_facts
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.stages.written import Assessment, Result, Written
from mlx_zh.stages.yardstick import Yardstick
from mlx_zh.system import console, device
from mlx_zh.system.storage import empty, folder_whole, need_space, write_text

_MIXED = 6  # stands for the bits of a model with several
_GGUF_BITS = {"f16": 16, "bf16": 16, "q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}
_CONFIGS = 40_000_000  # bytes; an upper estimate for the tokenizer and other small files


def newest_adapter(recipe: Recipe) -> Path:
    """DPO's adapter if there is one, else SFT's. Raises AdapterError if there is neither."""
    run = RunFolder.of(recipe)
    if (adapter := run.newest_adapter()) is None:
        stage = next((name for name in TUNED if recipe.data.split(name).train), None)
        if stage is None:
            raise AdapterError(
                f"{run.path} has no adapter, and the recipe has no data to train one: give one with --adapter DIR."
            )
        raise AdapterError(
            f"{run.path} has no adapter yet. Run `mlx-zh {stage} {recipe.words}` first, or give an adapter with "
            "--adapter DIR."
        )
    return adapter


class Fuser:
    """A run's base and adapter, ready to be written in several formats.

    The constructor opens both and raises ModelError or AdapterError if they cannot be used or do not fit together.
    """

    def __init__(self, recipe: Recipe, adapter: Path, original: str | None) -> None:
        self.recipe, self.export = recipe, recipe.export
        model = recipe.model
        bar = console.DownloadBar()
        path = resolve_model(model.path, hub=model.hub, revision=model.revision, progress=bar)
        quantize = model.quantization or packing_on_loading(model.path, load_config(path))
        base = open_source(path, model.path, quantize=quantize, reading=console.say_reading)
        # The path of a model that is quantized on load holds its full-precision original.
        named = original or (model.path if quantize else None)
        full = None
        if named is not None:
            full = open_source(resolve_model(named, hub=model.hub, progress=bar), named)
        self.fusion = Fusion(base, open_adapter(adapter, base), full)
        self.fusion.check_original()
        self.asked_for_original = original is not None
        self.licence = licences.find_licence(base)
        if self.licence.tag == "other" and full is not None:
            self.licence = licences.find_licence(full)
        self.wanted_name = self.export.name or recipe.name
        self.title = licences.display_name(self.licence, self.wanted_name)
        self.run = RunFolder.of(recipe)
        self.folder = self.run.fused

    @property
    def adapter_is_foreign(self) -> bool:
        """Whether the adapter says that it was trained on another model than the recipe's."""
        base = self.fusion.base
        return is_foreign(self.fusion.adapter.folder, base.path, base.fingerprint)

    @property
    def made_of(self) -> dict[str, str | None]:
        """The adapter that is merged, for summary.json: its stage if it is the run's own, and its digest."""
        folder = self.fusion.adapter.folder.resolve()
        stage = next((name for name in TUNED if self.run.stage(name).adapter.resolve() == folder), None)
        return {"stage": stage, "adapter": None if stage is None else adapter_digest(folder)}

    def choose_q4_1(self, *, for_program: bool) -> bool:
        """Write GGUF as q4_1 that keeps the tuning if the recipe leaves the type open; returns whether it is so.

        So it is where `recover` asks for it, and for a program if the base has 4 bits and a recovery can be done.
        """
        export = self.export
        given = export.model_fields_set
        if "gguf" not in export.formats or "mlx" in export.formats or "gguf_type" in given:
            return False
        if not export.recover:
            small = for_program and "recover" not in given and bits.base_bits(self.fusion) <= min(bits.CHOICES)
            if not small or not recovery_fits(self.recipe, self.fusion):
                return False
        self.export = export.model_copy(update={"gguf_type": "q4_1", "recover": True})
        self.recipe = self.recipe.model_copy(update={"export": self.export})
        return True

    # What will be written -------------------------------------------------------------------------------------

    @property
    def mlx_fusion(self) -> Fusion:
        """What `mlx` is made of. A recovered model follows base + adapter, so its source is the base.

        Only `--from` merges into another model. A base that is quantized on load has an original without it.
        """
        if self.export.recover and not self.asked_for_original:
            return replace(self.fusion, original=None)
        return self.fusion

    @cached_property
    def mlx_layouts(self) -> list[tuple[Layout, int]]:
        """The layouts of `mlx` (and q4_1) to try in turn, with their bits; several only if `bits` is auto."""
        group, fusion = self.export.group_size, self.mlx_fusion
        chosen = self.export.bits
        if self.export.recover and chosen != "mixed":
            if chosen == "auto" and "mlx" not in self.export.formats:
                chosen = 4  # of q4_1
            layout = bits.own_layout(fusion, group) if chosen == "auto" else packed_layout(fusion, chosen, group)
            return [(bits.with_fine_tables(layout), bits.most_common(layout.packing))]
        if chosen == "mixed":
            return [(mixed_layout(self.recipe, fusion, _CONFIGS), _MIXED)]
        if not isinstance(chosen, int):
            return bits.candidate_layouts(fusion, group)
        if chosen == 16:
            return [(full_layout(fusion, fusion.source.dtype), 16)]
        return [(packed_layout(fusion, chosen, group), chosen)]

    @cached_property
    def recovered(self) -> tuple[Layout, card.Recovered]:
        """The layout of `mlx` and q4_1 with codes that keep the tuning; the first call computes them, with a bar.

        Raises DataError without text, DeviceError without memory, StorageError.
        """
        return recovered_layout(self.recipe, self.mlx_layouts[0][0], self.run.recovering)

    @cached_property
    def hf_layout(self) -> Layout:
        """The layout of `hf`."""
        return replace(full_layout(self.fusion, mx.bfloat16), apart=True)

    @cached_property
    def gguf_plan(self) -> GGUFPlan:
        """The GGUF file's metadata and tensor list, without the weights; f16 if llama.cpp quantizes that file."""
        kind = self.export.gguf_type
        return plan_gguf(self.fusion, "f16" if kind in LLAMA_TYPES else kind, self.title, self._about)

    @property
    def _about(self) -> About:
        """What a GGUF file says about the model."""
        name = hub_name(self.fusion.base.name)
        owner, _, base = name.rpartition("/")
        on_hub = bool(owner) and not Path(expanduser(self.fusion.base.name)).exists()
        return About(
            base=Path(base).name,
            owner=owner if on_hub else None,
            licence=None if self.licence.tag == "other" else self.licence.tag,
            tags=("mlx-zh", "chat", "text-generation"),
            languages=("zh", "en"),
        )

    def size(self, kind: str) -> int:
        """The bytes that a format takes on disk."""
        if kind in ADAPTER_FORMATS:
            return sum(a.nbytes for a in self.fusion.adapter.weights.values()) + _CONFIGS
        if kind == "gguf":
            llama = LLAMA_TYPES.get(self.export.gguf_type)  # then the plan's file is there for a while too
            quantized = 0 if llama is None else int(self.fusion.source.parameters * llama.most_bits / 8)
            return self.gguf_plan.size + quantized + _CONFIGS
        layout = self.mlx_layouts[-1][0] if kind == "mlx" else self.hf_layout
        return sum(entry.size for entry in layout.entries()) + _CONFIGS

    def check(self) -> None:
        """Check before writing.

        Raises AdapterError if a format cannot hold the adapter, RecipeError if there is nothing to recover,
        StorageError for no room.
        """
        check_formats(self.export, self.fusion, lambda: self.mlx_layouts[0][1])
        sizes = [self.size(kind) for kind in self.export.formats]
        if self.export.recover:
            sizes.append(self.size("mlx"))  # of the finished blocks
        need_space(self.folder, sum(sizes), "the fused model")

    def recovers(self, kind: str) -> bool:
        """Whether a format is written with codes that keep the tuning."""
        return recovers(self.export, kind)

    def steps(self, kind: str) -> int:
        """How many times `write` calls `step` for a format."""
        if kind == "gguf-lora":
            return len(self.fusion.adapter.tensors)
        return 1 if kind in ADAPTER_FORMATS else len(self.fusion.source.outline.shapes)

    def _too_large(self, size: int) -> Notice | None:
        needed = self.fusion.source.parameters * 4 if device.is_cpu() else size
        mx.clear_cache()
        free = device.free_bytes()
        if needed > free:
            return Notice("fused-too-large", needed=needed / 1e9, free=free / 1e9)
        return None

    # Writing --------------------------------------------------------------------------------------------------

    def write(self, kind: str, yardstick: Yardstick | None, step: Callable[[], None]) -> Written:
        """Write one format atomically, with its measurement and model card; `step` is called after each tensor.

        `mlx` with `bits: auto` is written again with more bits while the measurement gives warnings.
        """
        with folder_whole(self.folder / kind) as folder:
            result = _WRITERS[kind](self, folder, step)
            assessment = self._assess(folder, result, yardstick)
            while kind == "mlx" and assessment.warnings and len(self.mlx_layouts) > 1:
                del self.mlx_layouts[0]
                empty(folder)
                result = self._write_mlx(folder, step)
                assessment = self._assess(folder, result, yardstick)
            written = Written(kind, self.folder / kind, result, assessment)
            missing = licences.write_licence_files(folder, self.licence, self.fusion.base, self.fusion.original)
            facts = run_facts(self.recipe, self.fusion, self.title, self.licence, missing)
            write_text(folder / "README.md", card.model_card(facts, written.format_facts))
        return written

    def _assess(self, folder: Path, result: Result, yardstick: Yardstick | None) -> Assessment:
        """Measure what was written; its fidelity only with a yardstick, and if the model fits into memory."""
        left, size = summarize(result.survivals), sum(file.stat().st_size for file in folder.iterdir())
        measured, reason, in_llama_cpp = None, None, None
        warnings = list(result.warnings)
        if result.model is not None and yardstick is not None:
            reason = self._too_large(size)
            if reason is None:
                measured, differing = yardstick.measure(result.model)
                warnings += differing
                if result.model.suffix == ".gguf":
                    in_llama_cpp = yardstick.measure_in_llama_cpp(result.model)
        warnings += fidelity.shortcomings(measured, left, in_llama_cpp)
        return Assessment(size, left, measured, reason, warnings, in_llama_cpp)

    def _write_mlx(self, folder: Path, step: Callable[[], None]) -> Result:
        layout, number = self.mlx_layouts[0]
        detail = f"{number}-bit" if number < 16 else _type_name(layout.dtype)
        if self.export.bits == "mixed":
            detail = f"mixed, {bits.mean_bits(layout):.1f}-bit"
        recovered = None
        if self.export.recover:
            layout, recovered = self.recovered
            detail = f"{detail}, recovered"
        survivals = write_folder(folder, layout, max_bytes=self._max_bytes, kind="mlx", step=step)
        return Result(detail, number, survivals, folder, recovered=recovered)

    def _write_hf(self, folder: Path, step: Callable[[], None]) -> Result:
        survivals = write_folder(folder, self.hf_layout, max_bytes=self._max_bytes, kind="pt", step=step)
        return Result(_type_name(self.hf_layout.dtype), 16, survivals, folder)

    def _write_gguf(self, folder: Path, step: Callable[[], None]) -> Result:
        kind = self.export.gguf_type
        path = folder / f"{self.title}-{kind.upper()}.gguf"
        recovered = self.recovered[1] if self.recovers("gguf") else None
        if kind in LLAMA_TYPES:
            importance = measured_importance(self.recipe, self.fusion.adapter.folder) if self.export.imatrix else None
            left = llama_quantizer.quantize(path, self.gguf_plan, kind, importance, step=step)
            outcome, number = GGUFOutcome(left), LLAMA_TYPES[kind].bits
        else:
            outcome, number = write_gguf(path, self._final_plan(), step=step), _GGUF_BITS[kind]
        warnings = self._write_modelfile(folder, path.name)
        if outcome.rounded:
            values = {"rounded": outcome.rounded, "kept": outcome.kept, "error": outcome.error}
            warnings += (Notice("gguf-scales-rounded", **values),)
        detail = f"{kind.upper()}, recovered" if recovered else kind.upper()
        return Result(detail, number, outcome.survivals, path, warnings, path.name, recovered)

    def _final_plan(self) -> GGUFPlan:
        """The plan to write: q4_1 has the weights of the `mlx` folder if that is written too, with 4 bits."""
        if self.export.gguf_type != "q4_1":
            return self.gguf_plan
        layout = None
        if self.recovers("gguf"):
            layout = self.recovered[0]
        elif "mlx" in self.export.formats and self.mlx_layouts[0][1] == 4:
            layout = self.mlx_layouts[0][0]
        return self.gguf_plan if layout is None else replace(self.gguf_plan, fusion=layout.fusion, layout=layout)

    def _write_modelfile(self, folder: Path, file: str, base: str | None = None) -> tuple[Notice, ...]:
        """Write the Modelfile of `file`, with `base` of an adapter; returns what it lacks."""
        source, note = self.fusion.base, f"ollama create {ollama.ollama_name(self.title)} -f Modelfile"
        notes = [f"{self.title}, written by mlx-zh. {note}"]
        if base is not None:
            notes.append(f"FROM: write the name in Ollama of {Path(source.name).name}, or the path of its GGUF file.")
        written = ollama.modelfile(
            file,
            source.tokenizer,
            self.recipe.data.date_string,
            system=self.recipe.system_message(),
            context=int(source.config.get("max_position_embeddings", 2048)),
            base=base,
            parameters=ollama.parameters(generation_config(source)),
            licences=licences.licence_texts(self.licence, source, self.fusion.original),
            notes=notes,
        )
        write_text(folder / "Modelfile", written.text)
        return (Notice("modelfile-without-system"),) if written.lacks_system else ()

    def _write_gguf_lora(self, folder: Path, step: Callable[[], None]) -> Result:
        path, base = folder / f"{self.title}-LoRA.gguf", self.fusion.base
        survivals = write_gguf_lora(path, self.fusion, self.title, step=step)
        named = base.path.name if base.path.is_file() else f"{Path(base.name).name}.gguf"
        warnings = self._write_modelfile(folder, path.name, f"./{named}")
        return Result("adapter", None, survivals, None, warnings, path.name)

    def _write_mlx_adapter(self, folder: Path, step: Callable[[], None]) -> Result:
        write_mlx_adapter(folder, self.fusion)
        step()
        return Result("adapter", None, [], None)

    def _write_peft(self, folder: Path, step: Callable[[], None]) -> Result:
        adapter, base = self.fusion.adapter, self.fusion.source
        tied = "lm_head.weight" not in base.outline.shapes
        counts = {path: base.outline.shapes[f"{path}.weight"][0] for path in base.outline.matrices}
        matrices = [name for path, count in counts.items() for name in expert_names(path, count)]
        peft.write_peft(folder, adapter.spec, adapter.weights, base=hub_name(base.name), matrices=matrices, tied=tied)
        write_tokenizer(folder, self.fusion.base)
        step()
        return Result("adapter", None, [], None)

    @property
    def _max_bytes(self) -> int:
        return int(self.export.max_shard_gb * 1e9)


_WRITERS: dict[str, Callable[[Fuser, Path, Callable[[], None]], Result]] = {
    "mlx": Fuser._write_mlx,
    "hf": Fuser._write_hf,
    "gguf": Fuser._write_gguf,
    "peft": Fuser._write_peft,
    "gguf-lora": Fuser._write_gguf_lora,
    "mlx-adapter": Fuser._write_mlx_adapter,
}


def _type_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
