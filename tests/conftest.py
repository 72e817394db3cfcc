"""Shared fixtures: tiny random models and the places of the real samples."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ["MLX_ZH_LANG"] = "en"  # a test of another language says so
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network says so with a marker
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tiny matrices: on a busy machine threads mostly wait

import mlx_zh  # noqa: F401  (loads the fast BLAS before anything imports mlx)
from mlx_zh.system.entry import entry

# The same examples every time, and few: a build must not fail today for what passed yesterday. To look for more:
# HYPOTHESIS_PROFILE=search.
hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("search", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

ROOT = Path(__file__).resolve().parent.parent

# A shell that starts tests in the background, or nohup, has signals ignored; some tests send them.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for an accelerator that a test only pretends to have."""
    from mlx_zh.system import accelerator

    monkeypatch.setattr(accelerator, "PAUSE", 0.0)


@pytest.fixture(autouse=True)
def tokenizers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, which has Transformers, makes the snapshots of tokenizers; two of their own take four seconds."""
    from mlx_zh.stages import tokenizer_cache

    monkeypatch.setattr(tokenizer_cache, "_in_a_process", lambda *words: tokenizer_cache.main(list(words)))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium, see `chromium.Browser`. Skips where there is none."""
    from chromium import Browser

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end: the garbage collector need not look through it again."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `metal` unless MLX computes on an Apple GPU, and give PyTorch one thread, as MLX has."""
    import mlx.core as mx

    if "torch" in sys.modules:  # with more, its threads wait for the core of the other test process
        sys.modules["torch"].set_num_threads(1)
    if mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu):
        return
    for item in items:
        if item.get_closest_marker("metal"):
            item.add_marker(pytest.mark.skip(reason=f"MLX computes on {mx.default_device()}, not on an Apple GPU"))


@pytest.fixture(scope="session")
def samples() -> Path:
    """Real samples of public data sets; they lie beside the checkout where the project is developed."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real samples are not here (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The small real model, obtained as a user obtains it. Use with the marker `network`."""
    from mlx_zh.errors import DownloadError
    from mlx_zh.models.load import BUILT_IN, resolve_model

    try:
        return resolve_model(BUILT_IN)
    except DownloadError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def told() -> Callable[[Callable[[], object]], str | None]:
    """Does something as a stage does it. None where that worked, else the error: a paragraph, and status 2."""

    def run(action: Callable[[], object]) -> str | None:
        def stage(_arguments: list[str] | None) -> int:
            action()
            return 0

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            entry(stage, [])
        said = err.getvalue()
        if stop.value.code == 0:
            assert said == ""
            return None
        assert stop.value.code == 2
        assert said.startswith("error: ") and said.endswith("\n")
        message = said.removeprefix("error: ").removesuffix("\n")
        assert message.strip() and "\n\n" not in message and "Traceback" not in message, message
        assert len(message) < 20_000, "nobody reads so much"
        return message

    return run


@pytest.fixture
def run_stage():
    """Call a stage's `main` and return its exit status, whether it returns or exits."""

    def run(main, *argv: object) -> int:
        try:
            status = main([str(a) for a in argv])
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
        return 0 if status is None else int(status)

    return run


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Makes mlx-lm's own model of a family, small and random: norms and biases too, or their faults were hidden."""
    from families import FAMILIES, own_class, randomized

    def make(
        family: str = "llama",
        *,
        tied: bool = False,
        quantized: int | None = None,
        rope_scaling: dict[str, Any] | None = None,
        layers: int = 3,
        vocabulary: int = 300,
        dtype: str = "float32",
        seed: int = 0,
        **changes: Any,
    ) -> Any:
        config = {
            "model_type": family,
            "hidden_size": 64,
            "num_hidden_layers": layers,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "vocab_size": vocabulary,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "rope_scaling": rope_scaling,
            "tie_word_embeddings": tied,
            "head_dim": 32 if family == "qwen3" else 16,  # heads need not add up to hidden_size
        }
        if family not in ("llama", "mistral", "qwen2", "qwen3"):
            config |= FAMILIES.get(family, {})
        return randomized(own_class(config | changes), quantized=quantized, dtype=dtype, seed=seed)

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A token a byte, then ChatML's two marks and its template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def model_folder(
    tiny_model: Callable[..., Any], byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Writes a tiny model as it lies on a hub; the arguments are those of `tiny_model`. One of a kind is shared."""
    import dataclasses
    import functools
    import json

    import mlx.core as mx
    from mlx.utils import tree_flatten

    @functools.cache
    def write(family: str = "llama", **changes: Any) -> Path:
        model = tiny_model(family, **changes)
        config = {name: value for name, value in dataclasses.asdict(model.args).items() if value is not None}
        config["tie_word_embeddings"] = "lm_head" not in model
        if changes.get("quantized"):
            config["quantization"] = {"group_size": 32, "bits": changes["quantized"]}
        folder = tmp_path_factory.mktemp("models") / family
        byte_tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": byte_tokenizer.eos_token_id}))
        mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
        return folder

    return write


@pytest.fixture
def metal() -> Iterator[Any]:
    """MLX's CPU back end as Metal: refuses what Metal refuses, and records the calls (watchman.py)."""
    from watchman import simulated_metal

    with simulated_metal() as watchman:
        yield watchman


@pytest.fixture(scope="session")
def run_wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test run share; what they make there is made under a lock."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "run-wide"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The snapshots of tokenizers, kept from test to test: two processes make one, and take five seconds."""
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture
def project(
    model_folder: Callable[..., Path],
    snapshots: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """An empty folder to be in, with a recipe, data and a tiny model."""
    from project import Project

    from mlx_zh.system import storage

    cache = tmp_path / "cache"  # what an earlier run prepared must not show
    cache.mkdir()
    (cache / "blas").symlink_to(storage.cache_folder() / "blas")
    (cache / "tokenizers").symlink_to(snapshots)
    monkeypatch.setenv("MLX_ZH_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return Project(model_folder(), capsys)
