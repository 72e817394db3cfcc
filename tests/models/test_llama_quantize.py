"""The program `llama-quantize`, as a stand-in that takes its documented command line.

Usage: llama-quantize [--imatrix file_name] ... model-f32.gguf [model-quant.gguf] type [nthreads]
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from tuned import make_tuned

from mlx_zh.errors import ModelError
from mlx_zh.models.export import in_llama_cpp, llama_quantizer
from mlx_zh.models.export.gguf_file import plan_gguf
from mlx_zh.models.export.importance import read_importance
from mlx_zh.models.export.llama_types import LLAMA_TYPES

# It copies the file, notes what it was given, and refuses what llama.cpp's parser refuses.
PROGRAM = """#!{python}
import json, shutil, sys
from pathlib import Path
words, options = sys.argv[1:], {{}}
while words and words[0].startswith("--"):
    if words[0] != "--imatrix":
        sys.exit("usage: llama-quantize [--imatrix FILE] model-f32.gguf [model-quant.gguf] type [nthreads]")
    options[words[0]], words = words[1], words[2:]
if len(words) != 3 or not words[1].endswith(".gguf") or words[2] not in {types}:
    sys.exit("usage: llama-quantize [--imatrix FILE] model-f32.gguf [model-quant.gguf] type [nthreads]")
if {fails}:
    print("tensor 'x' has invalid data\\nfailed to quantize: quantized data validation failed", file=sys.stderr)
    sys.exit(1)
shutil.copyfile(words[0], words[1])
matrix = options.get("--imatrix")
noted = {{"words": words, "matrix": matrix and list(Path(matrix).read_bytes())}}
Path({note!r}).write_text(json.dumps(noted))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    def install(fails: bool = False) -> Path:
        note, path = tmp_path / "note.json", tmp_path / "bin" / "llama-quantize"
        path.parent.mkdir()
        types = [kind.upper() for kind in LLAMA_TYPES]
        path.write_text(PROGRAM.format(python=sys.executable, types=types, fails=fails, note=str(note)), "utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return note

    monkeypatch.setattr(in_llama_cpp, "is_installed", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return install


@pytest.mark.skipif(sys.platform == "win32", reason="a script with #! is no program on Windows")
@pytest.mark.parametrize("kind", list(LLAMA_TYPES))
@pytest.mark.parametrize("weighed", [False, True])
def test_the_program_gets_its_documented_words(tmp_path, program, kind, weighed):
    note = program()
    folder = tmp_path / "my models 模型"
    folder.mkdir()
    path, table = folder / "m.gguf", {"blk.0.attn_q.weight": np.array([1.0, 2.5], np.float32)}
    llama_quantizer.check(kind)
    plan = plan_gguf(make_tuned(tmp_path).fusion(), "f16", "Tiny")
    left = llama_quantizer.quantize(path, plan, kind, table if weighed else None, step=lambda: None)
    assert len(left) == 14 and all(one.kept == pytest.approx(1, abs=0.01) for one in left)
    noted = json.loads(note.read_text("utf-8"))
    assert noted["words"][1:] == [str(path), kind.upper()]
    assert [file.name for file in folder.iterdir()] == ["m.gguf"]
    if weighed:
        matrix = tmp_path / "given.dat"
        matrix.write_bytes(bytes(noted["matrix"]))
        assert {name: list(values) for name, values in read_importance(matrix).items()} == {
            "blk.0.attn_q.weight": [1.0, 2.5]
        }
    else:
        assert noted["matrix"] is None


@pytest.mark.skipif(sys.platform == "win32", reason="a script with #! is no program on Windows")
def test_what_the_program_says_is_passed_on(tmp_path, program):
    program(fails=True)
    plan = plan_gguf(make_tuned(tmp_path).fusion(), "f16", "Tiny")
    with pytest.raises(ModelError, match=r"status 1\): .*quantized data validation failed. Choose q4_1"):
        llama_quantizer.quantize(tmp_path / "m.gguf", plan, "q4_k_m", None, step=lambda: None)
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "m.gguf").exists()
