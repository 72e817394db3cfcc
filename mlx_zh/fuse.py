"""Merge an adapter into its base and export it: `python -m mlx_zh.fuse RECIPE [--adapter DIR] [KEY=VALUE ...]`."""

from __future__ import annotations

import argparse
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.language.notice import Notice
from mlx_zh.language.reader import reader_language
from mlx_zh.language.translation import as_sentence, in_readers_language
from mlx_zh.stages import command
from mlx_zh.system.arguments import Parser

if TYPE_CHECKING:
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.fuser import Fuser
    from mlx_zh.stages.written import Written
    from mlx_zh.stages.yardstick import Yardstick


def main(argv: list[str] | None = None) -> int:
    """Write `runs/NAME/fused/FORMAT/` for each format in the recipe; returns the exit status. Raises MlxZhError."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.replace and arguments.to not in ("ollama", "lmstudio"):
        parser.error("--replace is for --to ollama and --to lmstudio")
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh.stages.budgeting import decided
    from mlx_zh.stages.run_folder import RunFolder

    recipe = decided(recipe)
    if arguments.recover:
        recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"recover": True})})
    with RunFolder.of(recipe).at_work("fuse"):
        _fuse(recipe, arguments)
    return 0


def _fuse(recipe: Recipe, arguments: argparse.Namespace) -> None:
    from mlx_zh.models.export import licences, upload
    from mlx_zh.stages import placing
    from mlx_zh.stages.fuser import Fuser, newest_adapter
    from mlx_zh.system import console

    to = arguments.to
    program = to if to in placing.PROGRAMS else None
    if program is not None:
        wanted = recipe.export.name or recipe.name
        chosen = recipe.export.formats if "formats" in recipe.export.model_fields_set else ()
        formats = placing.Place(program, wanted, False).formats(chosen)
        recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"formats": formats})})
    adapter = Path(expanduser(arguments.adapter)) if arguments.adapter else newest_adapter(recipe)
    fuser = Fuser(recipe, adapter, arguments.original or recipe.export.original)
    if fuser.choose_q4_1(for_program=program is not None):
        console.say(
            "The GGUF file gets 4 bits (q4_1) and keeps the tuning (--recover). For a file of nearly twice the size, "
            "written in less time, add export.gguf_type=q8_0 export.recover=false."
        )
    fuser.check()
    place = None if program is None else placing.Place(program, fuser.title, arguments.replace)
    if place is not None:
        place.check()
    hub = arguments.hub or (recipe.model.hub if recipe.model.hub != "auto" else "huggingface")
    push_to = arguments.push_to_hub or (upload.own_repository(fuser.title, hub) if to == "hub" else None)
    for repository in _repositories(push_to, recipe.export.formats).values():
        licences.check_repository(fuser.licence, repository)
        upload.check(repository, hub)
    if fuser.title != fuser.wanted_name:
        console.say(f'The licence of the base requires a name that begins with "Llama": {fuser.title}.')
    if fuser.adapter_is_foreign:
        console.warn(Notice("adapter-of-another-model", adapter=str(adapter), model=recipe.model.path))

    written = _write_all(fuser, measured=not arguments.no_measure)
    _conclude(fuser, written)
    if place is not None:
        place.put(fuser.folder, recipe.export.formats)
    for kind, repository in _repositories(push_to, recipe.export.formats).items():
        console.say(f"Uploading {kind} to {repository} ...")
        console.say(upload.push(fuser.folder / kind, repository, hub, public=arguments.public))


def _parser() -> Parser:
    parser = command.parser(
        "fuse", "Merge an adapter into its base, and write it for mlx-lm, transformers, llama.cpp or PEFT."
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="folder of an mlx-lm or PEFT adapter (default: the run's DPO adapter, else SFT's)",
    )
    parser.add_argument(
        "--from",
        dest="original",
        metavar="MODEL",
        help="full-precision original of a quantized base: merge into it, then quantize once (default: export.from)",
    )
    parser.add_argument(
        "--recover",
        action="store_true",
        help="mlx, or gguf of the type q4_1: round so that the tuning is kept, which takes minutes "
        "(= export.recover=true)",
    )
    parser.add_argument("--no-measure", action="store_true", help="do not compare the result with base + adapter")
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload; with several formats, each name ends in its format"
    )
    parser.add_argument(
        "--hub",
        choices=("huggingface", "modelscope"),
        help="hub to upload to (default: model.hub, else huggingface)",
    )
    parser.add_argument(
        "--to",
        choices=("ollama", "lmstudio", "hub"),
        help="place the model in this program, or upload it; a format that it reads is added if export.formats has "
        "none",
    )
    parser.add_argument(
        "--replace", action="store_true", help="with --to: replace a model of the same name that is there"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    return parser


def _repositories(name: str | None, formats: tuple[str, ...]) -> dict[str, str]:
    if name is None:
        return {}
    return {kind: name if len(formats) == 1 else f"{name}-{kind}" for kind in formats}


def _write_all(fuser: Fuser, *, measured: bool) -> list[Written]:
    from mlx_zh.recipe import ADAPTER_FORMATS
    from mlx_zh.stages.yardstick import measure_tuned
    from mlx_zh.system import console
    from mlx_zh.system.storage import remove, write_json

    # `mlx` comes first: a GGUF file of the type q4_1 is written with the bits that it ends with.
    formats = sorted(dict.fromkeys(fuser.export.formats), key=lambda kind: kind != "mlx")
    yardstick: Yardstick | None = None
    if measured and set(formats) - set(ADAPTER_FORMATS):
        console.say("Running the base and base + adapter over held-out text ...")
        yardstick = measure_tuned(fuser.recipe, fuser.fusion.adapter.folder)
    written = []
    for kind in formats:
        if fuser.recovers(kind):
            _ = fuser.recovered  # with a bar of its own
        total = fuser.steps(kind)
        bar = console.CountBar(kind, total, "tensor")
        try:
            written.append(fuser.write(kind, yardstick, partial(bar.update, 1)))
        finally:
            bar.close()
    write_json(fuser.run.fused_summary, {w.kind: w.as_dict() | fuser.made_of for w in written})
    if any(w.result.recovered for w in written):
        remove(fuser.run.recovering)
    return written


def _conclude(fuser: Fuser, written: list[Written]) -> None:
    from mlx_zh.system import console

    rows = [("format", "", "GB", "KL", "top-1", "perplexity", "change kept", "folder")]
    for w in written:
        f, left = w.assessment.fidelity, w.assessment.left
        measured = (f"{f.kl:.4f}", f"{f.top1:.1%}", f"{f.fused_perplexity:.3f}") if f else ("-", "-", "-")
        kept = f"{left.kept_mean:.0%}" if left else "-"
        rows.append((w.kind, w.result.detail, f"{w.assessment.size / 1e9:.2f}", *measured, kept, f"{w.folder}/"))
    console.say()
    console.say(console.table(rows))
    if fidelity := next((w.assessment.fidelity for w in written if w.assessment.fidelity), None):
        console.say(
            f"\nbase + adapter: perplexity {fidelity.perplexity:.3f} on {fidelity.tokens} held-out tokens. KL is "
            f"measured from it, in nats per token; tuning moved the base by {fidelity.moved:.4f}."
        )
    if recovered := next((w.result.recovered for w in written if w.result.recovered), None):
        console.say(
            f"Recovered in {recovered.seconds / 60:.1f} minutes over {recovered.tokens} tokens, with "
            f"{recovered.memory_gb:.1f} GB of MLX's memory at the peak."
        )
    for w in written:
        _say_llama_cpp(w)
        if w.assessment.unmeasured:
            console.warn(Notice("fused-not-compared", format=w.kind, reason=w.assessment.unmeasured))
        for warning in w.assessment.warnings:
            console.warn(_with_remedies(warning, fuser, w))


def _say_llama_cpp(written: Written) -> None:
    """What the fidelity of a GGUF file's weights does not show: how llama.cpp computes with them."""
    from mlx_zh.models.export.in_llama_cpp import USUAL_KL
    from mlx_zh.system import console

    if measured := written.assessment.llama_cpp:
        console.say(
            f"{written.kind}, {written.result.detail}, as llama.cpp computes it: KL {measured.kl:.4f}, top-1 "
            f"{measured.top1:.1%}, perplexity {measured.perplexity:.3f}."
        )
    elif written.assessment.fidelity and written.kind == "gguf" and (written.result.bits or 16) < 16:
        console.say(
            f"gguf, {written.result.detail}: the table shows the fidelity of the weights alone. On a CPU and with "
            "CUDA, llama.cpp also "
            f"rounds the activations to 8 bits, which moves the predictions by a KL of about {USUAL_KL}. With the "
            "package llama-cpp-python installed, fuse measures it."
        )


def _with_remedies(warning: Notice, fuser: Fuser, written: Written) -> str:
    """A warning of a format with what to do about it, in the reader's language."""
    detail = in_readers_language(written.result.detail)
    sentences = [as_sentence(warning), *map(in_readers_language, _remedies(fuser, written))]
    if reader_language() == "zh":
        return f"{written.kind}，{detail}：{''.join(sentences)}"
    return f"{written.kind}, {detail}: {' '.join(sentences)}"


def _remedies(fuser: Fuser, written: Written) -> list[str]:
    if written.kind == "gguf" and (written.result.bits or 16) < 8 and not written.result.recovered:
        return ["In 4 bits, export.gguf_type=q4_1 with export.recover=true keeps the tuning; q8_0 does too."]
    if written.kind != "mlx" or written.result.bits is None or written.result.bits >= 16:
        return []
    bits = next(b for b in (6, 8, 16) if b > (written.result.bits or 0))
    remedies = [f"Write it with export.bits={bits}; base and adapter used side by side lose nothing."]
    if not fuser.fusion.original:
        remedies.append("Or merge into the full-precision original with --from MODEL.")
    if not fuser.export.recover:
        remedies.append("With export.recover=true, few bits keep the tuning.")
    return remedies


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
