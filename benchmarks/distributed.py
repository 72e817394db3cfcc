"""One, two and three ranks on this machine: that results do not depend on their number, what a step takes, and what
happens when one is killed.

    python benchmarks/distributed.py [--ranks 1 2 3] [--steps 6] [--recipe recipes/quickstart.yaml]

Each number of ranks runs SFT, DPO (from its own SFT adapter, with its reference pass) and the exam, each rank with
one BLAS thread, joined by MLX's ring over loopback, started without `mlx.launch`, which keeps a core busy.
Differences are against the run of one rank; times are medians of the steps but the first. Then one of two ranks is
killed in a step of SFT, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import numpy as np

from mlx_zh.models.adapters.files import read_adapter

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"


def run(stage: str, ranks: int, arguments: list[str], folder: Path) -> None:
    """A stage on that many ranks of this machine, to its end."""
    if any([process.wait() for process in start(stage, ranks, arguments, folder)]):
        sys.exit(f"{stage} failed on {ranks} ranks")


def start(
    stage: str, ranks: int, arguments: list[str], folder: Path, errors: IO[str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """A stage on that many ranks, by rank."""
    variables = {"OPENBLAS_NUM_THREADS": "1"}
    if ranks > 1:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(ranks)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            addresses = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
        variables["MLX_HOSTFILE"] = str(folder / "ring.json")
        (folder / "ring.json").write_text(json.dumps(addresses))
    command = [sys.executable, "-m", f"mlx_zh.{stage}", *arguments]
    return [
        subprocess.Popen(
            command,
            env=os.environ | variables | ({"MLX_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        for rank in range(ranks)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def difference(found: Path, expected: Path) -> tuple[float, float]:
    """Largest relative difference of a loss, and the relative distance of the adapters (Euclidean)."""
    losses = [
        [
            value
            for line in lines(run / "metrics.jsonl")
            for key, value in line.items()
            if key in ("loss", "eval_loss")
        ]
        for run in (found, expected)
    ]
    apart = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(*losses, strict=True))
    ours, theirs = (read_adapter(run / "adapters")[1] for run in (found, expected))
    off = sum(mx.square(array - theirs[name]).sum().item() for name, array in ours.items())
    return apart, (off / sum(mx.square(array).sum().item() for array in theirs.values())) ** 0.5


def timing(folder: Path) -> dict[str, float]:
    """Medians over the steps but the first: seconds, and the shares of communication and of waiting."""
    steps = [line for line in lines(folder / "metrics.jsonl") if "loss" in line][1:]
    found = {"seconds": statistics.median(line["tokens"] / line["tokens_per_second"] for line in steps)}
    return found | {
        name: statistics.median(line.get(f"{name}_share", 0.0) for line in steps)
        for name in ("communication", "waiting")
    }


def killed(common: list[str], runs: Path, steps: int) -> dict[str, Any]:
    """Kill rank 1 of 2 half a step after the middle one: what rank 0 says, when, and where the command gets to."""
    command = [*common, "name=killed", "checkpoint.every_steps=1"]
    metrics = runs / "killed" / "sft" / "metrics.jsonl"
    with open(runs / "errors", "w+", encoding="utf-8") as errors:
        first, second = start("sft", 2, command, runs, errors)
        while not metrics.exists() or sum("loss" in line for line in lines(metrics)) < steps // 2:
            if first.poll() is not None:
                sys.exit("the run ended before it could be disturbed")
            time.sleep(0.05)
        time.sleep(timing(runs / "ranks2" / "sft")["seconds"] / 2)
        second.kill()
        gone = time.monotonic()
        status = first.wait()
        seconds = time.monotonic() - gone
        errors.seek(0)
        told = [line.strip() for line in errors if line.startswith("error:")]
    run("sft", 2, command, runs)
    adapters = [read_adapter(runs / name / "sft" / "adapters")[1] for name in ("killed", "ranks2")]
    same = all(mx.array_equal(array, adapters[1][name]).item() for name, array in adapters[0].items())
    return {"status": status, "seconds": seconds, "told": told, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit", type=int, default=8, help="exam questions a subject")
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()

    figures: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary)
        for ranks in dict.fromkeys([1, *arguments.ranks]):
            common = [arguments.recipe, f"runs={runs}", f"name=ranks{ranks}", "evaluate.prompts=[]"]
            common += ["data.sft.validation=[]", "data.dpo.validation=[]", "data.validation_fraction=0"]
            common += [f"sft.max_steps={arguments.steps}", f"dpo.max_steps={arguments.steps}"]
            for stage in ("sft", "dpo"):
                run(stage, ranks, common, runs)
            run("eval", ranks, [*common, f"evaluate.limit={arguments.limit}", "--stage", "dpo"], runs)
            figures[ranks] = compare(runs / f"ranks{ranks}", runs / "ranks1")
        end = killed(common, runs, arguments.steps) if 2 in figures else None

    print("Difference from one rank: largest of a loss (relative), adapter (relative distance); exam answers alike")
    print(
        f"{'ranks':>5}{'SFT loss':>12}{'adapter':>10}{'DPO loss':>12}{'adapter':>10}{'answers':>12}{'log-probs':>12}"
    )
    for ranks, found in figures.items():
        cells = [f"{value:.1e}" for stage in ("sft", "dpo") for value in found[stage]["difference"]]
        print(f"{ranks:5}{cells[0]:>12}{cells[1]:>10}{cells[2]:>12}{cells[3]:>10}", end="")
        print(f"{found['alike']:>8}/{found['questions']}{found['logprobs']:>12.1e}")
    print("\nA step: seconds, speed-up over one rank, share of communication, share of waiting for the slowest rank")
    for stage in ("sft", "dpo"):
        for ranks, found in figures.items():
            time, alone = found[stage]["timing"], figures[1][stage]["timing"]
            shares = f"{time['communication']:9.1%}{time['waiting']:9.1%}"
            print(f"{stage:4}{ranks:3}{time['seconds']:9.2f} s{alone['seconds'] / time['seconds']:8.2f}x{shares}")
    if end is not None:
        print("\nRank 1 of 2 killed in a step of SFT. Rank 0 ended", end=" ")
        print(f"with status {end['status']} {end['seconds']:.1f} s later:")
        print("\n".join(f"  {line}" for line in end["told"]))
        print(
            f"  The same command went on; its adapter is {'' if end['same'] else 'NOT '}that of the undisturbed run."
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"ranks": figures, "killed": end}, indent=2) + "\n")


def compare(found: Path, alone: Path) -> dict[str, Any]:
    """What a run differs in from the one of one rank, and what its steps took."""
    stages = {
        stage: {"difference": difference(found / stage, alone / stage), "timing": timing(found / stage)}
        for stage in ("sft", "dpo")
    }
    (answers,) = (found / "eval").glob("dpo-*.jsonl")
    ours, theirs = (lines(run / "eval" / answers.name) for run in (found, alone))
    alike = sum(a["choice"] == b["choice"] for a, b in zip(ours, theirs, strict=True))
    apart = np.abs(np.array([a["logprobs"] for a in ours]) - [b["logprobs"] for b in theirs]).max()
    return stages | {"alike": alike, "questions": len(ours), "logprobs": float(apart)}


if __name__ == "__main__":
    main()
