"""Whether exam figures are of a model as it is now."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_zh.language.notice import Notice


def is_current(about: object, current: Mapping[str, str]) -> bool:
    """Whether a report's `about` is of a model with these digests; what it does not state is not compared."""
    return not isinstance(about, Mapping) or all(about.get(key, digest) == digest for key, digest in current.items())


def outdated(stage: str, exam: str) -> Notice:
    """The notice that a model's figures are left out because they are of an earlier model."""
    if stage == "fused":
        return Notice("exam-of-an-earlier-fused-model", stage=stage, exam=exam)
    return Notice("exam-of-an-earlier-model", stage=stage, exam=exam)
