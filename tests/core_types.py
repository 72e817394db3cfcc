"""Run the numeric tests with every matrix kernel of OpenBLAS that this processor can run (`make test-cores`).

OpenBLAS reads its kernels' name from OPENBLAS_CORETYPE when it is loaded, so each set has a process of its own. The
kernels that OpenBLAS chooses itself run on two threads, which divide a matrix otherwise; `make test` has run them on
one. The others run on one, two at a time. `--every` runs each on one and on two (`make thorough`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# What the kernels of each name need, as Linux calls it (/proc/cpuinfo). Older ones are for processors without AVX.
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
NEEDS: dict[str, set[str]] = {
    "Sandybridge": {"avx"},
    "Haswell": {"avx2", "fma"},
    "Zen": {"avx2", "fma"},
    "SkylakeX": _AVX512,
    "Cooperlake": _AVX512 | {"avx512_bf16"},
    "SapphireRapids": _AVX512 | {"avx512_bf16", "amx_tile"},
}

# Prints the name of the kernels that OpenBLAS chose. A name that a build leaves out stands for the next older one.
_ASK = """
import ctypes, pathlib, scipy_openblas32
library = ctypes.CDLL(str(pathlib.Path(scipy_openblas32.__file__).parent / "lib" / "libscipy_openblas.so"))
library.scipy_openblas_get_corename.restype = ctypes.c_char_p
print(library.scipy_openblas_get_corename().decode())
"""


def processor_flags() -> set[str]:
    """What an x86 processor can do; elsewhere nothing is known."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def chosen(name: str | None = None) -> str | None:
    """The kernels that OpenBLAS takes where it is asked for those of `name`, or by itself; None where it fails."""
    environment = os.environ | ({"OPENBLAS_CORETYPE": name} if name else {})
    answer = subprocess.run([sys.executable, "-c", _ASK], env=environment, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def core_types() -> list[str | None]:
    """One name for each set of kernels, OpenBLAS's own choice first, which is None."""
    names: dict[str | None, str | None] = {chosen(): None}
    flags = processor_flags()
    for name in (name for name, needed in NEEDS.items() if needed <= flags):
        if (kernels := chosen(name)) is not None:
            names.setdefault(kernels, name)
    return list(names.values())


def numeric_files() -> list[str]:
    """The files with numeric tests: collecting all of the others would take longer than the tests."""
    folder = Path(__file__).parent
    files = sorted(folder.rglob("test_*.py"))
    return [str(file) for file in files if "pytest.mark.numeric" in file.read_text(encoding="utf-8")]


def runs(every: bool) -> list[tuple[str | None, int]]:
    """(name of the kernels, threads). OpenBLAS is only on Linux; elsewhere `make test` has run all there is."""
    if sys.platform != "linux":
        return []
    own, *others = core_types()
    fewest = [(own, 2), *((name, 1) for name in others)]
    return [*fewest, (own, 1), *((name, 2) for name in others)] if every else fewest


def status(name: str | None, threads: int, arguments: list[str]) -> int:
    """Run the tests, print what they print when they have ended; their exit status."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads)}
    if name:
        environment["OPENBLAS_CORETYPE"] = name
    command = [sys.executable, "-m", "pytest", "-m", "numeric", *arguments, *numeric_files()]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{label(name, threads)}:\n{done.stdout}", end="", flush=True)
    return done.returncode


def label(name: str | None, threads: int) -> str:
    return f"{name or 'own choice'}, {threads} thread{'s' * (threads > 1)}"


def main(arguments: list[str]) -> int:
    every = "--every" in arguments
    arguments = [argument for argument in arguments if argument != "--every"]
    asked = runs(every)
    # Threads that wait for a core that another process uses are up to 100 times slower than one thread.
    alone = [run for run in asked if run[1] > 1]
    side_by_side = [run for run in asked if run[1] == 1]
    statuses = {run: status(*run, arguments) for run in alone}
    with ThreadPoolExecutor(2) as pool:
        statuses |= zip(side_by_side, pool.map(lambda run: status(*run, arguments), side_by_side), strict=True)
    failed = [label(*run) for run in asked if statuses[run] != 0]
    print(f"failed: {'; '.join(failed)}" if failed else "every core type passes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
