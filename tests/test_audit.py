"""The audit in CI: fails on what is known, says aloud what could not be looked up."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parent.parent / ".ci" / "audit.py"
CLEAN = {"name": "clean", "version": "1", "vulns": []}
FLAWED = {"name": "flawed", "version": "2", "vulns": [{"id": "PYSEC-2020-1", "fix_versions": ["2.1"]}]}
SKIPPED = {"name": "unknown", "skip_reason": "not on the index"}


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ([CLEAN], 0, ["0 known vulnerabilities in 1 packages"]),
        ([CLEAN, FLAWED], 1, ["1 known", "flawed 2: PYSEC-2020-1, mended in ['2.1']"]),
        ([CLEAN, SKIPPED], 0, ["NOT AUDITED: 1 of 2 packages"]),
    ],
)
def test_verdicts(found, status, words):
    code, said = runpy.run_path(str(AUDIT))["verdict"]({"dependencies": found})
    assert code == status and all(word in said for word in words)
