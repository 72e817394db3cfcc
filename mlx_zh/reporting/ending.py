"""What a finished run says at the end: a verdict, the answers and exams before and after, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_zh.language.catalogue import Language, fill
from mlx_zh.reporting.exam_results import ExamResult
from mlx_zh.reporting.findings import Findings, is_finite
from mlx_zh.reporting.words import mark

_PROMPTS = 5  # prompts shown


@dataclass(frozen=True, slots=True)
class Shown:
    """A line of a list: its label, whether it is right (None where that is not known), and its text."""

    label: str
    right: bool | None
    text: str

    @property
    def cells(self) -> tuple[str, str, str]:
        """Label, mark and text."""
        return self.label, "" if self.right is None else mark(self.right), self.text


class Ending:
    """The parts of the last screen, in one language. A part for which the run has nothing is empty."""

    def __init__(self, findings: Findings, language: Language) -> None:
        self._findings, self._language = findings, language
        stages = list(findings.answers)
        self._compared = (stages[0], stages[-1]) if len(stages) > 1 and stages[0] == "base" else None

    def verdict(self) -> list[str]:
        """What the run achieved: a line on the answers, and one on each exam or else on the validation loss."""
        lines = [*self._answers_verdict(), *(line for exam in self._findings.exams for line in self._exam(exam))]
        sft = self._findings.training.get("sft")
        if not lines and sft is not None:
            before, after = (sft.summary.get(f"eval_loss_{side}") for side in ("before", "after"))
            if is_finite(before) and is_finite(after):
                lines.append(self._say("ending-loss", before=before, after=after))
        return lines

    def answers(self) -> list[tuple[str, list[Shown]]]:
        """The first prompts, each with the first and the last model's answers."""
        if self._compared is None:
            return []
        findings, names = self._findings, ("ending-before", "ending-after")
        return [
            (
                prompt,
                [
                    Shown(self._say(name), findings.is_right(stage, number), " ".join(answers[number].split()))
                    for name, stage in zip(names, self._compared, strict=True)
                    if number < len(answers := findings.answers[stage])
                ],
            )
            for number, prompt in enumerate(findings.prompts[:_PROMPTS])
        ]

    def style(self) -> list[tuple[str, str, str]]:
        """A table: mean length and share of Chinese of each model's answers."""
        answered = {stage: [text for text in texts if text] for stage, texts in self._findings.answers.items()}
        if self._compared is None or not all(answered.values()):
            return []
        rows = [("", self._say("ending-length"), self._say("ending-chinese"))]
        for stage, texts in answered.items():
            mean = sum(map(len, texts)) / len(texts)
            rows.append((self._say(stage), f"{mean:.0f}", f"{chinese_share(texts):.0%}"))
        return rows

    def commands(self, chat: str, page: str, own: str) -> list[tuple[str, str]]:
        """What to do next: the commands to chat and to start with own data, and the path of the report."""
        return [(self._say("ending-chat"), chat), (self._say("ending-report"), page), (self._say("ending-own"), own)]

    def _answers_verdict(self) -> list[str]:
        if self._compared is None:
            return []
        (before, _), (after, count) = (self._findings.right_answers(stage) for stage in self._compared)
        return [self._say("ending-answers", before=before, after=after, count=count)] if count else []

    def _exam(self, exam: ExamResult) -> list[str]:
        change = exam.rows[0].change if exam.rows else None
        if exam.compared is None or change is None:
            return []
        before, after = (100 * exam.rows[0].cells[stage].macro for stage in exam.compared)
        kind = "noise" if change.noise or change.difference == 0 else "better" if change.difference > 0 else "worse"
        p = "–" if change.p is None else "< 0.001" if change.p < 0.001 else f"= {change.p:.3f}"
        values = {"title": exam.title, "before": before, "after": after, "questions": exam.questions, "p": p}
        return [self._say(f"ending-exam-{kind}", **values)]

    def _say(self, code: str, **values: object) -> str:
        return fill(code, values, self._language)


def chinese_share(texts: Sequence[str]) -> float:
    """The share of Chinese characters among the letters of the texts; 0 where they have no letter."""
    letters = [character for text in texts for character in text if character.isalpha()]
    chinese = sum("\u4e00" <= character <= "\u9fff" for character in letters)
    return chinese / len(letters) if letters else 0.0
