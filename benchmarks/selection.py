"""Which rows are worth learning: the methods of `data.sft.select` with equal numbers of trained tokens.

    python benchmarks/selection.py prepare OUT.json [--data FOLDER] [--model smollm2-135m-instruct] [--limit ROWS]
    python benchmarks/selection.py train OUT.json MODEL [--device gpu] [--tokens 150000] [--seeds 3] [--json FILE]

`prepare` reads FOLDER/*.json, which are not part of this project, holds back a tenth of the prompts of every source
as the validation mixture, and writes everything as tokens, with the clusters of the rows. `train` needs neither text
nor tokenizer: MODEL is a folder or a .gguf file of the same model. It computes the IFD of every row, and keeps it in
OUT.ifd.txt for a second call, and then, for each seed, tunes the model on the rows that each method selects. A seed's
rows are a random four fifths of all, so that intervals hold what depends on the data. Each source keeps its share of
the trained tokens. A method's steps, and the trained tokens of each step, are those of all others. Every run is
printed as soon as it is done; then a table of the validation loss with 95 % intervals (Student's t) over the seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.rendered import Rendered
from mlx_zh.corpus.selecting import Candidates, ordered
from mlx_zh.models.adapters.layers import add_adapter, remove_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.training.ifd import WIDTH, IfdScores, Replies
from mlx_zh.training.objective import Settings
from mlx_zh.training.optimizer import GroupedAdamW, learning_rate
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import evaluate, train_step
from mlx_zh.training.stored_values import StoredValues

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT.parent / "shared" / "data" / "sft"
METHODS = {
    "random": ("random",),
    "longest": ("longest",),
    "diverse": ("diverse",),
    "ifd": ("ifd",),
    "diverse+ifd": ("diverse", "ifd"),
}
RANK, SCALE = 16, 2.0
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # of Student's t, by number of values
Indices = npt.NDArray[np.int64]


# ---- prepare


def prepare(arguments: argparse.Namespace) -> None:
    """Write candidates and validation rows as tokens."""
    from mlx_zh.corpus.clusters import clusters
    from mlx_zh.corpus.formats import load_conversations
    from mlx_zh.corpus.mixing import is_validation
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.models.load import load_tokenizer, resolve_model
    from mlx_zh.system.digests import text_digest

    files = sorted(arguments.data.glob("*.json"))
    if not files:
        print(f"skipped: {arguments.data} holds no *.json; name the folder of the samples with --data")
        return
    renderer = Renderer(load_tokenizer(resolve_model(arguments.model)))
    rows: list[dict[str, Any]] = []
    sides: list[tuple[str, str]] = []
    seen: set[str] = set()
    for source, file in enumerate(files):
        conversations = load_conversations(file, on_invalid="skip")[0][: arguments.limit]
        rendered = renderer.conversations(conversations, max_length=arguments.max_length, on_overflow="drop")
        for conversation, example in zip(conversations, rendered, strict=True):
            asked, said = (
                "".join(m.content for m in conversation.messages if m.role == role) for role in ("user", "assistant")
            )
            digest = text_digest(f"{asked}\x1f{said}")
            if example is None or digest in seen:
                continue
            seen.add(digest)
            prompt = text_digest("".join(conversation.messages[0].content.split()))
            edges = np.flatnonzero(np.diff(example.trained.astype(np.int8), prepend=0, append=0))
            rows.append(
                {
                    "source": source,
                    "tokens": example.tokens.tolist(),
                    "spans": edges.tolist(),
                    "hash": int(digest[:16], 16),
                    "held_back": bool(is_validation(np.array([int(prompt[:16], 16)], np.uint64), 0.1)[0]),
                }
            )
            sides.append((asked, said))
    candidates = [i for i, row in enumerate(rows) if not row["held_back"]]
    hashes = np.array([rows[i]["hash"] for i in candidates], np.uint64)
    for i, cluster in zip(candidates, clusters(hashes, [[sides[i] for i in candidates]]), strict=True):
        rows[i]["cluster"] = int(cluster)
    names = [file.stem for file in files]
    arguments.out.write_text(json.dumps({"sources": names, "opening": renderer.opening(), "rows": rows}))
    for source, name in enumerate(names):
        held_back = [row["held_back"] for row in rows if row["source"] == source]
        print(f"{name}: {len(held_back) - sum(held_back)} candidates, {sum(held_back)} held back")
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")


# ---- train


def open_model(path: Path, dtype: str) -> Any:
    """The model alone, without its tokenizer."""
    from mlx_zh.models import folder, gguf, gguf_model
    from mlx_zh.models.build import build_model

    if path.is_file():
        file = gguf.read_gguf(path)
        config, weights = gguf_model.gguf_config(file), gguf_model.gguf_weights(file, gguf_model.gguf_config(file))
    else:
        config, weights = folder.folder_config(path), folder.folder_weights(path)
    model = build_model(config, weights, str(path), dtype=getattr(mx, dtype), keep_quantized=False, quantize=None)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


def examples_of(rows: Sequence[dict[str, Any]]) -> list[Rendered]:
    """Rows as training takes them."""
    examples = []
    for row in rows:
        trained = np.zeros(len(row["tokens"]), dtype=bool)
        for start, stop in np.array(row["spans"]).reshape(-1, 2):
            trained[start:stop] = True
        examples.append(Rendered(np.array(row["tokens"], np.int32), trained, False))
    return examples


def scores_of(model: Any, examples: Sequence[Rendered], opening: Sequence[int], path: Path) -> npt.NDArray[Any]:
    """The IFD of every example, computed unless it is in the file."""
    scores = IfdScores(StoredValues(path, WIDTH))
    rows = [Replies.of(example.tokens, example.trained, opening) for example in examples]
    missing, begun, done, told = scores.missing(rows), time.perf_counter(), 0, time.perf_counter()
    total = sum(row.size for row in missing)
    for tokens in scores.compute(model, missing, row_tokens=4096):
        done += tokens
        if time.perf_counter() - told > 15:
            told = time.perf_counter()
            print(f"ifd: {done:,} of {total:,} tokens, {done / (told - begun):,.0f} tokens/s", flush=True)
    return scores.ifd(rows)


def select(
    candidates: Candidates,
    pool: Indices,
    sources: Indices,
    trained: Indices,
    methods: Sequence[str],
    budget: int,
    seed: int,
) -> Indices:
    """Rows of `pool` with about `budget` trained tokens, in which each source has its share of the pool's."""
    total = trained[pool].sum()
    kept = []
    for source in np.unique(sources[pool]):
        group = pool[sources[pool] == source]
        wanted = budget * trained[group].sum() / total
        order = ordered(candidates, group, methods, seed)
        reached = np.cumsum(trained[order])
        count = int(np.searchsorted(reached, wanted))
        # The row that crosses the border is taken if the sum is nearer to it with the row than without.
        if count < len(order) and reached[count] - wanted < wanted - (reached[count - 1] if count else 0):
            count += 1
        kept.append(order[:count])
    return np.concatenate(kept)


def validation_loss(model: Any, objective: SftObjective) -> float:
    """Mean over all scored tokens of the validation mixture."""
    return sum(loss for loss, _ in evaluate(model, objective, objective.rows(np.arange(objective.size), None)))


def tune(model: Any, examples: Sequence[Rendered], chosen: Indices, seed: int, options: argparse.Namespace) -> None:
    """One epoch in `steps` steps of about equally many trained tokens, with a new adapter."""
    spec = AdapterSpec("lora", len(model.layers), rank=RANK, scale=SCALE)
    add_adapter(model, spec, seed=seed)
    objective = SftObjective(examples, Settings(seed=seed, micro_tokens=options.micro_tokens))
    weights = trainable(model)
    optimizer = GroupedAdamW(weights, weight_decay=0.0, betas=(0.9, 0.999))
    for epoch in range(options.epochs):
        order = np.random.default_rng((seed, epoch)).permutation(chosen)
        scored = np.array([examples[i].trained[1:].sum() for i in order])
        middle = np.cumsum(scored) - scored / 2
        step_of = np.minimum((middle / scored.sum() * options.steps).astype(int), options.steps - 1)
        for step in range(options.steps):
            members = order[step_of == step]
            if not len(members):
                continue
            number, total = epoch * options.steps + step, options.epochs * options.steps
            rate = learning_rate(number, total, peak=options.rate, kind="cosine", warmup=max(total // 20, 1))
            rows = objective.rows(members, number)
            _, weights = train_step(model, objective, rows, weights, optimizer, learning_rate=rate, max_grad_norm=1.0)


def train(arguments: argparse.Namespace) -> None:
    """Tune and measure every method with every seed."""
    if arguments.device == "gpu" and not mx.is_available(mx.gpu):
        sys.exit("MLX finds no GPU here: on Linux it needs `pip install 'mlx[cuda13]'`; or take --device cpu.")
    mx.set_default_device(mx.Device(mx.gpu if arguments.device == "gpu" else mx.cpu))
    data = json.loads(arguments.out.read_text())
    rows = [row for row in data["rows"] if not row["held_back"]]
    model = open_model(arguments.model, arguments.dtype)
    examples = examples_of(rows)
    by_method = {}
    if any("ifd" in METHODS[name] for name in arguments.methods):
        by_method["ifd"] = scores_of(model, examples, data["opening"], arguments.out.with_suffix(".ifd.txt"))
        finite = by_method["ifd"][np.isfinite(by_method["ifd"])]
        print(f"IFD: 1 or more {np.mean(finite >= 1):.1%}, quartiles {np.percentile(finite, [25, 50, 75]).round(3)}")
    trained = np.array([example.trained[1:].sum() for example in examples])
    hashes = np.array([row["hash"] for row in rows], np.uint64)
    clusters = np.array([row["cluster"] for row in rows])
    sources = np.array([row["source"] for row in rows])
    held_back = [row for row in data["rows"] if row["held_back"]]
    if not rows or not held_back:
        sys.exit(f"{arguments.out} has {len(rows)} candidates and {len(held_back)} rows held back; prepare more rows")
    held_back = held_back[:: max(len(held_back) // (arguments.validation or len(held_back)), 1)]
    validation = SftObjective(examples_of(held_back), Settings(seed=0, micro_tokens=arguments.micro_tokens))
    first = validation_loss(model, validation)
    print(f"{len(rows)} candidates with {trained.sum():,} trained tokens; validation loss before: {first:.4f}")
    results: dict[str, list[float]] = {name: [] for name in arguments.methods}
    for seed in range(arguments.seeds):
        pool = np.sort(np.random.default_rng(seed).permutation(len(rows))[: len(rows) * 4 // 5])
        for name in arguments.methods:
            begun, methods = time.perf_counter(), METHODS[name]
            scores = {"longest": trained.astype(np.float32)} | by_method
            own = Candidates(hashes, clusters, {key: scores[key] for key in methods if key in scores})
            chosen = select(own, pool, sources, trained, methods, arguments.tokens, seed)
            if not len(chosen):
                sys.exit(f"--tokens {arguments.tokens} selects no row of any source; give more")
            tune(model, examples, chosen, seed, arguments)
            loss = validation_loss(model, validation)
            remove_adapter(model)
            results[name].append(loss)
            seconds = time.perf_counter() - begun
            counts = f"{len(chosen)} rows, {trained[chosen].sum():,} tokens"
            print(f"seed {seed} {name:12} {loss:.4f}  ({counts}, {seconds:.0f} s)", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps({"before": first, "results": results}))
    table(results)


def table(results: dict[str, list[float]]) -> None:
    """Mean validation loss of each method, and its paired difference to `random`, with 95 % intervals."""
    print(f"\n{'method':14}{'validation loss':>22}{'against random':>24}")
    for name, losses in results.items():
        line = f"{name:14}{interval(np.array(losses)):>22}"
        if name != "random" and "random" in results:
            line += f"{interval(np.array(losses) - np.array(results['random']), sign='+'):>24}"
        print(line)


def interval(values: npt.NDArray[np.float64], sign: str = "") -> str:
    """Mean and half-width of the 95 % interval over seeds."""
    if len(values) not in T95:
        return f"{values.mean():{sign}.4f}"
    return f"{values.mean():{sign}.4f} ± {T95[len(values)] * values.std(ddof=1) / len(values) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("prepare")
    first.add_argument("out", type=Path)
    first.add_argument("--data", type=Path, default=SAMPLES)
    first.add_argument("--model", default="smollm2-135m-instruct")
    first.add_argument("--max-length", type=int, default=1024)
    first.add_argument("--limit", type=int, help="rows of each source at most")
    first.set_defaults(call=prepare)
    second = commands.add_parser("train")
    second.add_argument("out", type=Path)
    second.add_argument("model", type=Path)
    second.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if mx.is_available(mx.gpu) else "cpu")
    second.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    second.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    second.add_argument("--tokens", type=int, default=150_000, help="trained tokens of a run, in one epoch")
    second.add_argument("--epochs", type=int, default=1)
    second.add_argument("--steps", type=int, default=60, help="optimizer steps of an epoch")
    second.add_argument("--seeds", type=int, default=3)
    second.add_argument("--rate", type=float, default=5e-4)
    second.add_argument("--micro-tokens", type=int, default=4096)
    second.add_argument("--validation", type=int, help="rows of the validation mixture at most")
    second.add_argument("--json", type=Path, help="write the figures here too, after every run")
    second.set_defaults(call=train)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
