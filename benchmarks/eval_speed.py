"""Questions a second: the tree here, one question at a time here, and mlx_lm.evaluate, on the same questions.

    pip install lm_eval
    python benchmarks/eval_speed.py --ceval DIR [--subjects law,logic] [--shots 5] [--repeats 1]

DIR holds C-Eval's CSV files (`dev/` and `val/`). All three score the lm-eval protocol with the same model in one
process, taking turns subject by subject, so that what else the machine does falls on all alike; processor time is
printed beside elapsed time for the same reason. mlx_lm.evaluate is called at its `loglikelihood`, with the
prompts that the harness would give it and its own tokenization, cache and scoring.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import measuring

# isort: split
import numpy as np
from lm_eval.api.instance import Instance
from mlx_lm import evaluate as peer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_zh.exams.archives import open_exam
from mlx_zh.exams.csvfile import LETTERS
from mlx_zh.exams.exam import Exam, Subject
from mlx_zh.exams.prompts import Prompter
from mlx_zh.exams.protocols import protocols
from mlx_zh.exams.scorer import letter_logprobs
from mlx_zh.models.load import LoadedModel

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


Way = Callable[[LoadedModel, Exam, Subject], Scores]
WAYS: dict[str, Way] = {
    "tree": by_tree,
    "one at a time": one_at_a_time,
    "mlx_lm.evaluate": by_mlx_lm,
}


def main() -> None:
    parser = measuring.parser(__doc__, repeats=1)
    parser.add_argument("--ceval", type=Path, required=True)
    parser.add_argument("--subjects", default="law,middle_school_biology", help="names, separated by commas")
    parser.add_argument("--limit", type=int, help="questions a subject")
    parser.add_argument("--shots", type=int, default=5)
    arguments = parser.parse_args()

    loaded = measuring.load(arguments)
    folders = {"ceval": str(arguments.ceval)}
    exam = open_exam("ceval", folders=folders, hub="", split="val", shots=arguments.shots, limit=arguments.limit)
    subjects = [subject for subject in exam.subjects if subject.key in arguments.subjects.split(",")]
    prompter = Prompter(PROTOCOL, loaded.tokenizer, None, loaded.config["max_position_embeddings"])
    lengths = [len(prompt.tokens) for subject in subjects for prompt in prompter.subject(exam, subject)]
    title = (
        f"{len(lengths)} questions of {', '.join(subject.key for subject in subjects)}, {arguments.shots} shots, "
        f"{np.mean(lengths):.0f} tokens a prompt; a subject in the median"
    )
    print(title, flush=True)
    by_tree(loaded, exam.limited(1), exam.limited(1).subjects[0])  # warm-up: nobody compiles here
    readings: dict[str, list[measuring.Reading]] = {name: [] for name in WAYS}
    scores: dict[str, Scores] = {}
    for subject in subjects * arguments.repeats:
        for name, way in WAYS.items():

            def score(name: str = name, way: Way = way, subject: Subject = subject) -> None:
                scores[name] = way(loaded, exam, subject)

            readings[name].append(measuring.read(score))
        for name, found in scores.items():
            assert (found.argmax(1) == scores["tree"].argmax(1)).all(), name
            assert np.abs(found - scores["tree"]).max() < 0.1, name
    figures = measuring.medians(readings, "mlx_lm.evaluate")
    measuring.show(title, figures, "mlx_lm.evaluate")
    questions = len(lengths) * arguments.repeats
    for name, found in readings.items():
        figures[name]["questions_per_second"] = questions / sum(reading.seconds for reading in found)
        print(f"  {name:28}{figures[name]['questions_per_second']:6.2f} questions/s")
    measuring.write(arguments.json, measuring.about(arguments, ("lm_eval",)), figures)


if __name__ == "__main__":
    main()
