"""Known vulnerabilities in the versions that constraints.txt pins, by pip-audit: `python .ci/audit.py`.

Fails where there are any. Where the advisories cannot be had it says so and does not fail: a build must not depend
on somebody else's server.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ["-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip"]


def verdict(report: dict[str, Any]) -> tuple[int, str]:
    """Exit status and what to say of pip-audit's JSON report."""
    found = report["dependencies"]
    known = [
        f"{entry['name']} {entry['version']}: {flaw['id']}, mended in {flaw['fix_versions'] or 'no version'}"
        for entry in found
        for flaw in entry.get("vulns", ())
    ]
    skipped = [entry["name"] for entry in found if "skip_reason" in entry]
    lines = [f"pip-audit: {len(known)} known vulnerabilities in {len(found) - len(skipped)} packages", *known]
    if skipped:
        lines.append(f"NOT AUDITED: {len(skipped)} of {len(found)} packages, of which this index tells no advisories")
    return (1 if known else 0), "\n".join(lines)


def main() -> int:
    """Run pip-audit and say what it found."""
    command = [sys.executable, *COMMAND, "--format", "json", "--progress-spinner", "off", "--timeout", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"NOT AUDITED: pip-audit could not look for vulnerabilities: {reason[:300]}")
        return 0
    status, said = verdict(report)
    print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
