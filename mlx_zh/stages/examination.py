"""Ask the models of a run their exams. Questions whose answers the run folder holds are not asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from mlx_zh.core import numbers
from mlx_zh.corpus.render import Renderer
from mlx_zh.exams import answers as asking
from mlx_zh.exams import current, figures, statistics
from mlx_zh.exams.prompts import Prompter
from mlx_zh.exams.records import Records, are_to
from mlx_zh.language.notice import Notice
from mlx_zh.stages import setbacks
from mlx_zh.stages.current_models import current_models, recorded_base
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.stages.run_models import NAMES
from mlx_zh.system import console
from mlx_zh.system.digests import text_digest, value_digest

if TYPE_CHECKING:
    from mlx_zh.distributed.world import World
    from mlx_zh.exams.answers import Answer, Examinee
    from mlx_zh.exams.exam import Exam, Subject
    from mlx_zh.exams.protocols import Protocol
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.run_models import RunModels


class ProtocolName(TypedDict):
    """The protocol of an exam."""

    name: str
    version: int


class Numbers(TypedDict):
    """Beside `About`: which version of the log-probs decided. Results without it have version 1."""

    numbers: NotRequired[int]  # `core.numbers.version`


class About(Numbers):
    """Everything that can change a model's answers to an exam; the result file stores it."""

    asked: str  # digest of the questions and of how they are asked
    protocol: ProtocolName
    source: str  # the model's path or its name on a hub
    base: str  # fingerprint of the model's files
    adapter: str | None  # digest of the adapter; None for a model without one
    dtype: str
    quantize: tuple[int, int] | None  # bits and group size
    ends: list[int]  # the ids of tokens that end an answer
    rendering: str  # digest of the chat template's work, or of the tokenizer if the protocol uses no chat template


class Examination:
    """The answers by exam and stage. Rank 0 stores them in `runs/NAME/eval`."""

    def __init__(self, recipe: Recipe, protocol: Protocol, candidates: RunModels, world: World) -> None:
        self._recipe, self._protocol, self._candidates, self._world = recipe, protocol, candidates, world
        self._run = RunFolder.of(recipe)
        self._answers: dict[tuple[str, str], tuple[Mapping[str, object], list[Answer]]] = {}  # by exam and stage
        self._base: str | None = None  # the base's fingerprint
        self._micro_tokens = recipe.memory.micro_tokens  # smaller after work that was given up

    def ask(self, name: str, exam: Exam) -> None:
        """Let the model called `name` answer `exam`; subjects finished earlier are read from the run folder.

        Raises DistributedError if the ranks have different questions or models.
        """
        world, first = self._world, self._world.first
        loaded = self._candidates.take(name)
        if name != "fused":
            self._base = loaded.fingerprint
        recorded = recorded_base(self._run)
        if first and (recorded is None or self._base not in (None, recorded)):
            self._run.write_manifest(self._recipe, loaded, {})
        renderer = self._renderer(loaded)
        examinee = self._examinee(loaded, renderer)
        about = world.broadcast_result(lambda: self._about(name, exam, loaded, renderer))
        read = {f"the questions of {exam.title}": self._questions_digest(exam, exam.subjects)}
        read |= {"the base model's files": loaded.fingerprint}
        world.agree(read, _changed, "Give every machine the same recipe, exam files and model files.")
        records = Records(self._run.exams, name, exam.key)
        keys = {
            s.key: value_digest({**about, "asked": self._questions_digest(exam, [s])})[:16] for s in exam.subjects
        }
        answered = {
            subject.key: stored
            for subject in exam.subjects
            if first and (stored := records.load_subject(subject, keys[subject.key])) is not None
        }
        unanswered = world.broadcast_result(
            lambda: [index for index, s in enumerate(exam.subjects) if s.key not in answered]
        )
        bar = console.CountBar(f"{name} {exam.title}", len(exam), "question")
        try:
            bar.update(sum(map(len, answered.values())))
            for subjects in world.rounds([exam.subjects[index] for index in unanswered]):
                for subject, answers in self._answered(examinee, exam, subjects, bar.update):
                    answered[subject.key] = answers
                    if first:
                        records.save_subject(subject.key, keys[subject.key], answers)
        finally:
            bar.close()
        if first:
            answers = [answer for key in keys for answer in answered[key]]
            self._answers[exam.key, name] = about, answers
            records.save_exam(answers, self._figures(exam, name), labelled=exam.labelled)

    def _answered(
        self, examinee: Examinee, exam: Exam, subjects: Sequence[Subject], report: Callable[[int], None]
    ) -> Iterator[tuple[Subject, list[Answer]]]:
        """Share the subjects among the ranks by length, and yield each subject with its answers, on every rank.

        `report` is called with a number of questions that have just been answered.
        """
        world = self._world
        share = world.share([subject.characters for subject in subjects])
        local = [(index, self._ask(examinee, exam, subjects[index], report)) for index in share]
        for part in world.collect(local):
            for index, answers in part:
                if index not in share:
                    report(len(answers))
                yield subjects[index], [asking.Answer.of(fields) for fields in answers]

    def _ask(
        self, examinee: Examinee, exam: Exam, subject: Subject, report: Callable[[int], None]
    ) -> list[dict[str, object]]:
        """The answers to one subject, asked again in smaller pieces when the accelerator gives it up."""
        reported = 0

        def ask(micro_tokens: int) -> list[Answer]:
            done = 0

            def count(questions: int) -> None:
                nonlocal done, reported
                done += questions
                if done > reported:  # not those that were counted before the work was given up
                    report(done - reported)
                    reported = done

            return replace(examinee, micro_tokens=micro_tokens).answer(exam, subject, count)

        what = Notice("during-exam", exam=exam.title)
        answers, self._micro_tokens = setbacks.persistent(ask, what, self._micro_tokens)
        return [answer.as_dict() for answer in answers]

    def side_by_side(self, exam: Exam) -> dict[str, figures.ExamReport]:
        """The metrics of each stage, in the order of a run, also of stages that answered the same exam earlier."""
        for name in NAMES:
            if (exam.key, name) not in self._answers:
                self._recall(exam, name)
        return {name: self._figures(exam, name) for name in NAMES if (exam.key, name) in self._answers}

    def compare(self, exam: Exam, before: str, after: str) -> statistics.Comparison:
        """Compare stage `after` with stage `before` on the same questions."""
        first, second = (figures.by_subject(self._answers[exam.key, name][1]) for name in (before, after))
        return statistics.compare(first, second, self._recipe.evaluate.bootstrap, self._recipe.seed)

    def write(self, exam: Exam) -> list[Path]:
        """Write the files of every stage again, with the comparisons; returns their paths."""
        paths: list[Path] = []
        stages = self.side_by_side(exam)
        for name, report in stages.items():
            others = [other for other in stages if other != name] if exam.labelled else []
            against = {other: self.compare(exam, other, name).as_dict() for other in others}
            compared: figures.ComparedReport = {**report, "against": against}
            answers = self._answers[exam.key, name][1]
            paths += Records(self._run.exams, name, exam.key).save_exam(answers, compared, labelled=exam.labelled)
        return paths

    def _figures(self, exam: Exam, name: str) -> figures.ExamReport:
        about, answers = self._answers[exam.key, name]
        samples = self._recipe.evaluate.bootstrap
        measured = figures.exam_figures(exam, answers, samples=samples, seed=self._recipe.seed)
        return {"benchmark": exam.title, "split": exam.split, "stage": name, "about": about, **measured}

    def _recall(self, exam: Exam, name: str) -> None:
        """Load a stage's stored answers if they belong to the same questions, asked in the same way."""
        stored = Records(self._run.exams, name, exam.key).load_exam()
        if stored is None:
            return
        about, answers = stored[0].get("about"), stored[1]
        if not isinstance(about, Mapping):  # missing, or written by another version
            return
        same = about.get("asked") == self._questions_digest(exam, exam.subjects)
        if same and not current.is_current(about, current_models(self._run, self._base)[name]):
            console.warn(current.outdated(name, exam.title), keep=False)
            return
        same = same and about.get("numbers") == self._numbers().get("numbers")
        if same and are_to(answers, exam.subjects):
            self._answers[exam.key, name] = about, answers

    def _about(self, name: str, exam: Exam, loaded: LoadedModel, renderer: Renderer | None) -> About:
        """Everything that can change an answer; memory settings are not part of it."""
        model = self._recipe.model
        tokenizer = loaded.tokenizer.backend_tokenizer.to_str()
        about: About = {
            "asked": self._questions_digest(exam, exam.subjects),
            "protocol": {"name": self._protocol.name, "version": self._protocol.version},
            "source": loaded.source,
            "base": loaded.fingerprint,
            "adapter": self._candidates.adapter_digest(name),
            "dtype": model.dtype,
            "quantize": None if name == "fused" else model.quantization,
            "ends": list(loaded.eos_token_ids),
            "rendering": renderer.fingerprint if renderer else text_digest(tokenizer),
        }
        return {**about, **self._numbers()}

    def _numbers(self) -> Numbers:
        """The version of the numbers. A free answer has none: it is the most likely token, whatever the sum is."""
        version = numbers.version()
        return {"numbers": version} if version > 1 and self._protocol.reply != "free" else {}

    def _questions_digest(self, exam: Exam, subjects: Sequence[Subject]) -> str:
        """A digest of the questions and of how they are asked."""
        settings = self._recipe.evaluate
        fingerprints = [subject.fingerprint() for subject in subjects]
        answer = settings.max_new_tokens if self._protocol.reply == "free" else None
        protocol = self._protocol.fingerprint()
        made_of = [asking.VERSION, exam.form, fingerprints, protocol, settings.max_length, answer]
        return value_digest(made_of)[:16]

    def _renderer(self, loaded: LoadedModel) -> Renderer | None:
        if self._protocol.style != "chat":
            return None
        recipe = self._recipe
        return Renderer(loaded.tokenizer, date_string=recipe.data.date_string, thinking=recipe.model.thinking)

    def _examinee(self, loaded: LoadedModel, renderer: Renderer | None) -> Examinee:
        settings = self._recipe.evaluate
        window = int(loaded.config.get("max_position_embeddings") or 2**31)
        longest = min(window, settings.max_length or window)
        if self._protocol.reply == "free":
            longest -= settings.max_new_tokens
        return asking.Examinee(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            eos_token_ids=loaded.eos_token_ids,
            protocol=self._protocol,
            prompter=Prompter(self._protocol, loaded.tokenizer, renderer, longest),
            micro_tokens=self._micro_tokens,
            max_new_tokens=settings.max_new_tokens,
        )


def _changed(first: Mapping[str, object], other: Mapping[str, object]) -> str:
    """The names of the values that differ."""
    return "; ".join(name for name in first if first[name] != other.get(name))
