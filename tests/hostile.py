"""Measures what files of at most 1 MB cost that were made to cost much.

    python tests/hostile.py [PART OF A NAME …]      prints the table of docs/reliability.md

Each file is opened in a process of its own with a limit on processor time and memory, so one without a bound ends.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import hostile_models  # noqa: F401  (adds its cases to those of hostile_data)
from hostile_data import CASES

SECONDS, MEGABYTES = 60, 6000  # where a case is ended
IMPORTED = (  # before the processes are made, because these imports take longer than most files
    "mlx_lm.models.llama",
    "pyarrow.parquet",
    "python_calamine",
    "transformers",
    "mlx_zh.corpus.render",
    "mlx_zh.corpus.sources",
    "mlx_zh.exams.archives",
    "mlx_zh.models.adapters.files",
    "mlx_zh.models.gguf",
    "mlx_zh.models.load",
)
# Only the script measures these: they take a second or more to write or read, and others test the same bounds.
LONG = (
    "JSON: combining marks in turn",
    "JSON: 330,000 empty rows",
    "CSV: 240,000 short rows",
    "Excel: 100 MB of one text",
    "Parquet: 100 MB in a row",
    "Chat: 32,000 messages, no limit",
    "Chat: numbered rounds",
    "Template: searches",
    "Exam: 20 members of 8 MB",
)
# What an error says, for the files that are refused. All others are read.
REFUSED = {
    "JSON: nested 500,000 deep": "maximum recursion depth exceeded",
    "JSON: a row nested 500,000 deep": "the JSON is nested too deeply",
    "JSON: a number of 1,000,000 digits": "broken JSON: a number of",
    "JSON: a column's name of 1 MB": "no known format has the columns a.a.a",
    "JSON: 80,000 columns": "no known format has the columns 0, 1, 2",
    "JSON: an open string": "Unterminated string",
    **{
        f"{packing}: {name}": said
        for packing in ("gzip", "bzip2", "xz", "Zstandard", "Zip")
        for name, said in (
            ("60 MB of blanks", " MB, and few data sets of texts do so"),
            ("7,000,000 empty rows", "bytes unpack to more than "),
            ("blank lines", " lines, and few data sets of texts do so"),
            ("100,000 rows, 30 MB", "bytes unpack to more than "),
        )
    },
    "gzip: 230,000 rows and noise": "bytes unpack to more than 138,",
    "JSON: 60,000 rows by number": "no known format has the columns (none)",
    "JSON: a table with 60,000 columns": "no known format has the columns columns, data",
    "JSON: an object of one open list": "Unterminated string",
    "CSV: 1 MB of Korean": "as GB18030 it is hardly Chinese",
    "CSV: an open quotation mark": "Is a quotation mark left open?",
    "CSV: 120,000 columns": "no known format has the columns 0, 1, 2",
    "CSV: blank lines": "the file holds no rows",
    "Excel: two cells far apart": "row 1048576 and column 16384, too far apart",
    "Excel: one column 16,384 wide": "row 12999 and column 1260, too far apart",
    "Excel: 100 MB of one text": "a text of more than 262,144 bytes",
    "Excel: 20,000 rows share a text of 1 MB": "a text of more than 262,144 bytes",
    "Parquet: 20,000 rows share a text of 10 kB": "bytes unpack to 20,000 rows",
    "Parquet: 100 MB in a row": "bytes unpack to 1 rows of 100,000,104 bytes",
    "Parquet: 5,000,000 empty rows": "bytes unpack to 5,000,000 rows",
    "Parquet: damaged footer": "Couldn't deserialize thrift",
    "Template: width": "the result of ljust is too large",
    "Template: format": "the result of format is too large",
    "Template: tabs": "the result of expandtabs is too large",
    "Template: replace": "the result of replace is too large",
    "Template: join": "the result of the list is too large",
    "Template: batch": "the result of batch is too large",
    "Template: indent": "the result of tojson is too large",
    "Template: square": "the result of * is too large",
    "Template: doubled text": "the result of the text is too large",
    "Template: doubled list": "it loops and calls far more often",
    "Template: loops": "it loops and calls far more often",
    "Template: macros": "it loops and calls far more often",
    "Template: searches": "it loops and calls far more often",
    "Template: 1 MB": "980,000 characters, more than 131,072",
    "Template: error of 800 kB": "refuses the roles user, assistant: a.a.a",
    "Model: 14,000 empty tensors, 14,000 layers": "14,000 layers, but there are only 14000 tensors",
    "Model: 14,000 tensors of layers": "14,000 layers, but there are only 14000 tensors",
    "Model: a width of 100 million": "do not fit its config",
    "Model: 10 million heads": "do not fit its config",
    "Model: a shape of 300,000 dimensions": "do not fit its config",
    "GGUF: 4 million tensors": "4,194,304 tensors",
    "GGUF: an array of 4 million numbers": "its header needs byte 16,777,265",
    "Adapter: 20,000 regular expressions": "is too complex",
    "Tokenizer: text that doubles 40 times": "its replacements could make a text more than 64 times as long",
    **{
        f"{kind}: {name}": said
        for kind in ("Recipe", "Registry")
        for name, said in (
            ("aliases of aliases", "more than 100,000 values"),
            ("merges of merges", "more than 100,000 values"),
            ("nested 190,000 deep", "nested too deeply"),
            ("80,000 keys", "788,889 characters, more than 200,000"),
            ("a number of 1 MB", "990,006 characters, more than 200,000"),
        )
    },
    "Recipe: 20,000 keys": "model is missing",
    "Registry: 20,000 keys": "k0 must be a section with keys of its own",
    "Exam: a member of 100 MB": "larger than any file of the benchmark",
    "Exam: 20 members of 8 MB": "val/a16_val.csv is larger than any file of the benchmark",
    "Exam: 8,000 members": "holds more files than the benchmark has",
}


def peak() -> float:
    """The largest resident memory of this process so far, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Open one file in this process: processor seconds, MB above the start, and "read" or what was refused."""
    if (writer := os.fork()) == 0:  # the memory that it takes to write the file does not count
        CASES[name](folder)
        os._exit(0)
    os.waitpid(writer, 0)
    opened = CASES[name](folder)
    for kind, limit in (
        (resource.RLIMIT_CPU, SECONDS + int(time.process_time())),
        (resource.RLIMIT_AS, MEGABYTES << 20),
    ):
        with suppress(OSError, ValueError):  # macOS has no limit on the address space
            resource.setrlimit(kind, (limit, limit))
    from mlx_zh.errors import MlxZhError

    before, start = peak(), time.process_time()
    try:
        opened()
        end = "read"
    except MlxZhError as error:
        end = str(error)
    return {"seconds": time.process_time() - start, "megabytes": peak() - before, "end": end}


def measure_in_child(name: str) -> dict[str, Any]:
    """Measure one case in a child of this process."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        if (child := os.fork()) == 0:
            try:
                answer.write_text(json.dumps(measure(name, Path(folder))))
            except BaseException as error:
                answer.write_text(json.dumps({"seconds": 0, "megabytes": 0, "end": f"crash: {error!r}"}))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not answer.exists():
            return {"seconds": SECONDS, "megabytes": MEGABYTES, "end": f"ended by signal {status & 127}"}
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def serve() -> None:
    """Answer each case that is named in a line of standard input, with a line of JSON."""
    for module in IMPORTED:
        import_module(module)
    for line in sys.stdin:
        print(json.dumps(measure_in_child(line.strip())), flush=True)


def is_expected(name: str, end: str) -> bool:
    """Whether a case ended as it should: read, or refused for what makes it cost much."""
    return REFUSED[name] in end if name in REFUSED else end == "read"


class Measurer:
    """Measures cases by a process that has its imports done."""

    def __enter__(self) -> Measurer:
        command = [sys.executable, __file__, "--serve"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()

    def measure(self, name: str) -> dict[str, Any]:
        """Processor seconds, MB, and "read" or the error's message."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(name + "\n")
        self._server.stdin.flush()
        result: dict[str, Any] = json.loads(self._server.stdout.readline())
        return result


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        serve()
        return
    print("| File of at most 1 MB | Seconds | MB | What it is refused for |\n| --- | ---: | ---: | --- |")
    with Measurer() as measurer:
        for name in CASES:
            if len(sys.argv) < 2 or any(part in name for part in sys.argv[1:]):
                result = measurer.measure(name)
                said = REFUSED.get(name, "")
                end = said if is_expected(name, result["end"]) else f"NOT AS EXPECTED: {result['end'][:200]}"
                print(f"| {name} | {result['seconds']:.2f} | {result['megabytes']:.0f} | {end} |", flush=True)


if __name__ == "__main__":
    main()
