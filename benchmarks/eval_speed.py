"""Questions a second: the tree here, one question at a time here, and mlx_lm.evaluate, on the same questions.

    pip install lm_eval
    python benchmarks/eval_speed.py --ceval DIR [--subjects law,logic] [--shots 5] [--repeats 1]

DIR holds C-Eval's CSV files (`dev/` and `val/`). All three score the lm-eval protocol with the same float32 model in
one process, taking turns subject by subject, so that what else the machine does falls on all alike; processor time
is printed beside elapsed time for the same reason. mlx_lm.evaluate is called at its `loglikelihood`, with the
prompts that the harness would give it and its own tokenization, cache and scoring.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import numpy as np
from lm_eval.api.instance import Instance
from mlx_lm import evaluate as peer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_zh.benchmarks.csvfile import LETTERS
from mlx_zh.benchmarks.exam import Exam, Subject
from mlx_zh.benchmarks.prompts import Prompter
from mlx_zh.benchmarks.protocols import protocols
from mlx_zh.benchmarks.scorer import letter_logprobs
from mlx_zh.benchmarks.sources import open_exam
from mlx_zh.models.load import BUILT_IN, LoadedModel, load_model

PROTOCOL = protocols()["lm-eval"]
Scores = np.ndarray  # (questions, 4)


def by_tree(loaded: LoadedModel, exam: Exam, subject: Subject) -> Scores:
    """All questions of a subject at once, their common beginning computed once."""
    prompter = Prompter(PROTOCOL, loaded.tokenizer, None, loaded.config["max_position_embeddings"])
    return letter_logprobs(loaded.model, prompter.subject(exam, subject), micro_tokens=2048)


def one_at_a_time(loaded: LoadedModel, exam: Exam, subject: Subject) -> Scores:
    """The same code, a question by itself."""
    prompter = Prompter(PROTOCOL, loaded.tokenizer, None, loaded.config["max_position_embeddings"])
    prompts = prompter.subject(exam, subject)
    return np.concatenate([letter_logprobs(loaded.model, [prompt], micro_tokens=2048) for prompt in prompts])


def by_mlx_lm(loaded: LoadedModel, exam: Exam, subject: Subject) -> Scores:
    """mlx_lm.evaluate's scoring of the harness's requests."""
    model = object.__new__(peer.MLXLM)  # its __init__ only loads
    model._model, model.tokenizer = loaded.model, TokenizerWrapper(loaded.tokenizer)
    model._max_tokens, model._batch_size, model.use_chat_template = None, 8, False
    requests = []
    for number, question in enumerate(subject.questions):
        text = PROTOCOL.text(exam.form, subject.entry.name, subject.dev, question)
        for letter in LETTERS:
            requests.append(Instance("loglikelihood", {}, (text, f" {letter}"), number))
    return np.array([score for score, _ in model.loglikelihood(requests)]).reshape(-1, 4)


WAYS: dict[str, Callable[[LoadedModel, Exam, Subject], Scores]] = {
    "tree": by_tree,
    "one at a time": one_at_a_time,
    "mlx_lm.evaluate": by_mlx_lm,
}


def measure(loaded: LoadedModel, exam: Exam, subjects: Sequence[Subject], repeats: int) -> None:
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    busy: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        totals = {way: [0.0, 0.0] for way in WAYS}
        for subject in subjects:
            scores = {}
            for way, score in WAYS.items():
                mx.clear_cache()
                began, used = time.perf_counter(), processor()
                scores[way] = score(loaded, exam, subject)
                totals[way][0] += time.perf_counter() - began
                totals[way][1] += processor() - used
            for way, found in scores.items():
                assert (found.argmax(1) == scores["tree"].argmax(1)).all(), way
                assert np.abs(found - scores["tree"]).max() < 1e-2, way
        for way, (seconds, cpu) in totals.items():
            wall[way].append(seconds)
            busy[way].append(cpu)
    count = sum(len(subject.questions) for subject in subjects)
    for way in WAYS:
        seconds, cpu = median(wall[way]), median(busy[way])
        times = median(w / t for w, t in zip(wall[way], wall["tree"], strict=True))
        times_cpu = median(w / t for w, t in zip(busy[way], busy["tree"], strict=True))
        print(
            f"{way:<16} {count / seconds:7.2f} questions/s  {count / cpu:7.2f} a processor-second  "
            f"the tree is {times:.1f}x as fast ({times_cpu:.1f}x in processor time)"
        )


def processor() -> float:
    """Seconds of processor time used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--ceval", type=Path, required=True)
    parser.add_argument("--subjects", default="law,middle_school_biology", help="names, separated by commas")
    parser.add_argument("--limit", type=int, help="questions a subject")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()

    loaded = load_model(arguments.model, dtype="float32")
    folders = {"ceval": str(arguments.ceval)}
    exam = open_exam("ceval", folders=folders, hub="", split="val", shots=arguments.shots, limit=arguments.limit)
    subjects = [subject for subject in exam.subjects if subject.key in arguments.subjects.split(",")]
    prompter = Prompter(PROTOCOL, loaded.tokenizer, None, loaded.config["max_position_embeddings"])
    lengths = [len(prompt.tokens) for subject in subjects for prompt in prompter.subject(exam, subject)]
    print(
        f"{len(lengths)} questions of {', '.join(subject.key for subject in subjects)}, {arguments.shots} shots, "
        f"{np.mean(lengths):.0f} tokens a prompt; mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
    )
    by_tree(loaded, exam.limited(1), exam.limited(1).subjects[0])  # warm-up
    measure(loaded, exam, subjects, arguments.repeats)


if __name__ == "__main__":
    main()
