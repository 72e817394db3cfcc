"""Whether exam figures are of a model as it is now."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_zh.language.notice import Notice


def is_current(about: object, current: Mapping[str, str]) -> bool:
    """Whether a report's `about` is of a model with these digests; what it does not state is not compared.

    Nor is a digest of another length: an earlier version wrote it, and the report says so.
    """
    if not isinstance(about, Mapping):
        return True
    stated = {key: str(about.get(key, digest)) for key, digest in current.items()}
    return all(stated[key] == digest for key, digest in current.items() if len(stated[key]) == len(digest))


def outdated(stage: str, exam: str) -> Notice:
    """The notice that a model's figures are left out because they are of an earlier model."""
    if stage == "fused":
        return Notice("exam-of-an-earlier-fused-model", stage=stage, exam=exam)
    return Notice("exam-of-an-earlier-model", stage=stage, exam=exam)
