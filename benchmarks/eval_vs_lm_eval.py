"""The lm-eval protocol here against EleutherAI's lm-evaluation-harness, question by question.

    pip install lm_eval accelerate torch
    python benchmarks/eval_vs_lm_eval.py --ceval DIR --cmmlu DIR [--ceval-limit 6] [--cmmlu-limit 5] [--shots 5]

DIR holds the benchmark's CSV files (`dev/` and `val/` or `test/`), whole or in part; the limits are questions a
subject. The harness runs its own task files (prompts, few-shot sampling, scoring) on its Hugging Face back end: a
PyTorch `LlamaForCausalLM` in float32 made of the same weights. Only the tokenizer's rules are shared. Prints how
many prompts are the same to the character, how many questions get the same choice, and how far the log-probs of the
letters are apart. `--prompts-only` stops after the first, which needs no model and takes seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; the harness would ask the hub about models unused here

# isort: split
import lm_eval
import mlx.core as mx
import numpy as np
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from mlx.utils import tree_flatten
from transformers import LlamaConfig, LlamaForCausalLM

from mlx_zh.exams.archives import open_exam
from mlx_zh.exams.csvfile import LETTERS
from mlx_zh.exams.exam import Exam
from mlx_zh.exams.prompts import Prompter
from mlx_zh.exams.protocols import protocols
from mlx_zh.exams.scorer import letter_logprobs
from mlx_zh.models.load import BUILT_IN, LoadedModel, load_model

TASKS = Path(lm_eval.__file__).parent / "tasks"
FILES = {"ceval": "ceval/ceval-valid_{}.yaml", "cmmlu": "cmmlu/cmmlu_{}.yaml"}


def in_torch(loaded: LoadedModel) -> LlamaForCausalLM:
    """The same weights in PyTorch, float32."""
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in loaded.config.items() if k != "architectures"}))
    arrays = {name: torch.tensor(np.array(array)) for name, array in tree_flatten(loaded.model.parameters())}
    missing, unexpected = model.load_state_dict(arrays, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.float().eval()


def harness_task(key: str, subject: str, source: Path, work: Path, limit: int) -> dict[str, Any]:
    """The harness's own task file, with local rows in place of the hub's; every value stays the text it is."""
    text = (TASKS / FILES[key].format(subject)).read_text(encoding="utf-8")
    own = yaml.safe_load(text)
    config = yaml.safe_load((TASKS / key / own.pop("include")).read_text(encoding="utf-8")) | own
    data_files = {}
    splits = {"dev": config["fewshot_split"], "asked": config.get("validation_split") or config["test_split"]}
    for part, split in splits.items():
        path = next(
            p for p in (source / split / f"{subject}_{split}.csv", source / split / f"{subject}.csv") if p.exists()
        )
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))[: limit if part == "asked" else None]
        target = work / f"{key}-{subject}-{split}.jsonl"
        target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data_files[split] = str(target)
    del config["dataset_name"]
    return config | {"dataset_path": "json", "dataset_kwargs": {"data_files": data_files}}


def samples_of(
    model: HFLM | str, exams: dict[str, tuple[Exam, Path, int]], shots: int
) -> dict[tuple[str, str], list[Any]]:
    """What the harness asked and heard, by benchmark and subject, in the order of the questions."""
    with tempfile.TemporaryDirectory() as work:
        tasks = [
            harness_task(key, subject.key, source, Path(work), limit)
            for key, (exam, source, limit) in exams.items()
            for subject in exam.subjects
        ]
        result = lm_eval.simple_evaluate(
            model=model, tasks=tasks, num_fewshot=shots, log_samples=True, bootstrap_iters=0, batch_size=1
        )
    found = {}
    for key, (exam, _, _) in exams.items():
        for subject in exam.subjects:
            task = f"ceval-valid_{subject.key}" if key == "ceval" else f"cmmlu_{subject.key}"
            found[key, subject.key] = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return found


def compare_prompts(exams: dict[str, tuple[Exam, Path, int]], shots: int) -> None:
    """Context and continuation of every request, as the harness makes them and as they are made here."""
    protocol = protocols()["lm-eval"]
    asked = samples_of("dummy", exams, shots)
    for key, (exam, _, _) in exams.items():
        same = count = 0
        for subject in exam.subjects:
            for question, sample in zip(subject.questions, asked[key, subject.key], strict=True):
                text = protocol.text(exam.form, subject.entry.name, subject.dev, question)
                mine = [(text, protocol.continuation.format(answer=letter)) for letter in LETTERS]
                theirs = [tuple(arguments) for arguments in sample["arguments"]]
                same += mine == theirs
                count += 1
        print(f"{key}: {same} of {count} prompts and continuations are the same to the character", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--ceval", type=Path)
    parser.add_argument("--cmmlu", type=Path)
    parser.add_argument("--ceval-limit", type=int, default=6)
    parser.add_argument("--cmmlu-limit", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--prompts-only", action="store_true")
    arguments = parser.parse_args()

    exams: dict[str, tuple[Exam, Path, int]] = {}
    for key, source, limit in (
        ("ceval", arguments.ceval, arguments.ceval_limit),
        ("cmmlu", arguments.cmmlu, arguments.cmmlu_limit),
    ):
        if source is not None:
            folders = {key: str(source)}
            exam = open_exam(key, folders=folders, hub="", split=None, shots=arguments.shots, limit=limit)
            exams[key] = exam, source, limit
    compare_prompts(exams, arguments.shots)
    if arguments.prompts_only:
        return

    mx.set_default_device(mx.cpu)  # where weights become plain float32, as PyTorch's are
    loaded = load_model(arguments.model)
    began = time.perf_counter()
    prompter = Prompter(protocols()["lm-eval"], loaded.tokenizer, None, loaded.config["max_position_embeddings"])
    ours = {
        (key, subject.key): letter_logprobs(loaded.model, prompter.subject(exam, subject), micro_tokens=2048)
        for key, (exam, _, _) in exams.items()
        for subject in exam.subjects
    }
    middle = time.perf_counter()
    print(f"here: {middle - began:.0f} s", flush=True)
    model = HFLM(in_torch(loaded), tokenizer=loaded.tokenizer, device="cpu")
    theirs = {
        place: [[float(logprob) for logprob, _ in sample["filtered_resps"]] for sample in samples]
        for place, samples in samples_of(model, exams, arguments.shots).items()
    }
    print(f"lm_eval {version('lm_eval')} on torch {torch.__version__}: {time.perf_counter() - middle:.0f} s")

    for key in exams:
        mine = np.concatenate([scores for (benchmark, _), scores in ours.items() if benchmark == key])
        other = np.concatenate([np.array(scores) for (benchmark, _), scores in theirs.items() if benchmark == key])
        same = int((mine.argmax(axis=1) == other.argmax(axis=1)).sum())
        gap = float(np.abs(mine - other).max())
        ordered = np.sort(mine, axis=1)
        closest = float((ordered[:, -1] - ordered[:, -2]).min())
        print(
            f"{key}: {same} of {len(mine)} questions get the same choice ({same / len(mine):.2%}); log-probs differ "
            f"by at most {gap:.1e}; the closest decision was by {closest:.1e}"
        )


if __name__ == "__main__":
    main()
