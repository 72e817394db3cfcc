"""Whole stages on a simulated Metal: no call that Metal refuses is made."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import metal_calls
import mlx.core as mx
import numpy as np
import pytest
from metal_rules import FLOATS, RULES, Call, check
from project import Project, Result, message
from watchman import Watchman, simulated_metal

from mlx_zh import chat, dpo, eval, fuse, plan
from mlx_zh.core import frozen_products, product_speed, proof
from mlx_zh.core.losses import LOSSES, UNPAIRED
from mlx_zh.planning import speed
from mlx_zh.stages import device_check
from mlx_zh.system import device
from mlx_zh.training import self_check
from mlx_zh.training.check_cases import Case

REFUSED = "the vector kernels do not produce a logsumexp"
LETTERS = "abcdefghi"


def write_pairs(name: str, answers: list[tuple[str, str]]) -> None:
    rows = [
        {
            "prompt": [message("user", f"问{n}")],
            "chosen": [message("assistant", c)],
            "rejected": [message("assistant", r)],
        }
        for n, (c, r) in enumerate(answers)
    ]
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_exam(folder: Path) -> None:
    for key in ("law", "music"):
        for part in ("dev", "test"):
            lines = [f"{n},第{n}题是什么？,{n}甲,乙,{n + 1}丙,丁,{'ABCD'[n % 4]}" for n in range(4)]
            path = folder / part / f"{key}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(["id,question,A,B,C,D,answer", *lines]) + "\n", encoding="utf-8")


@pytest.fixture
def on_metal(project: Project, model_folder: Any, metal: Watchman, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A model whose heads have Metal's kernels, and pairs with branches of 1 to 9 tokens, one pair a length.

    The comparison on loading is left out: it would be among the recorded calls. It has a test of its own.
    """
    monkeypatch.setattr(proof, "differences", lambda *_, **__: (0.0, 0.0))
    project.recipe["model"]["path"] = str(model_folder(head_dim=64))
    write_pairs("pairs.jsonl", [(LETTERS[:n], LETTERS[:n][::-1].upper()) for n in range(1, 9)] + [("a", "ab")])
    write_pairs("pairs-validation.jsonl", [("ab", "no"), ("c", "nono")])
    project.recipe["sft"]["max_steps"] = 2
    project.recipe["data"]["dpo"] = {"train": ["pairs.jsonl"], "validation": ["pairs-validation.jsonl"]}
    project.recipe["dpo"] = {"batch_size": 9, "max_steps": 2, "learning_rate": 1e-2}
    write_exam(Path("exam"))
    project.recipe["evaluate"] = {"benchmarks": ["exam"], "shots": 1, "bootstrap": 50, "max_new_tokens": 3}
    project.write_recipe()
    return project


def well(result: Result) -> str:
    assert (result.status, result.err) == (0, ""), result
    return result.out


def queries(metal: Watchman) -> set[int]:
    """The different numbers of queries of attention with a gradient."""
    return {call.shapes[0][2] for call in metal.of("attention", gradient=True)}


# Whole stages


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, ["evaluate.prompts=[你好]"]),
        ({"quantized": 4}, []),
        ({}, ["lora.type=dora", "lora.dropout=0.1", "memory.checkpoint_layers=true", "memory.micro_tokens=60"]),
        ({}, ["model.dtype=bfloat16", "sft.neftune_alpha=5"]),
        ({}, ["model.dtype=float16", "memory.checkpoint_layers=true"]),
        ({"family": "qwen3", "tied": True}, []),
        ({}, ["lora.modules_to_save=[embed_tokens, lm_head]", "memory.checkpoint_layers=true"]),
    ],
    ids=["answers", "4-bit", "dora", "bfloat16", "float16", "qwen3", "tables"],
)
def test_sft(
    on_metal: Project, metal: Watchman, model_folder: Any, model: dict[str, Any], settings: list[str]
) -> None:
    well(on_metal.sft(f"model.path={model_folder(head_dim=64, **model)}", *settings))
    assert metal.of("rope", gradient=True) and min(queries(metal)) > 8  # whole conversations
    assert metal.of("attention", gradient=False)  # validation
    products = {call["transpose"] for call in metal.of("quantized_matmul")}
    assert products == ({True, False} if "quantized" in model else set())  # forward, and the head's backward
    halves = {dtype for call in metal.of("attention") for dtype in call.dtypes}
    half = next((setting for setting in settings if setting.startswith("model.dtype=")), "model.dtype=float32")
    assert halves == {half.removeprefix("model.dtype=")}
    assert 0 < metal.most_alive < metal.most_evaluated


def test_unpacked_weights(
    on_metal: Project, metal: Watchman, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products with 4-bit weights from unpacked ones, in bfloat16 as on a GPU: of blocks, adapters and the head."""
    monkeypatch.setattr(product_speed, "ROWS", (8,))
    model = model_folder(head_dim=64, quantized=4, tied=True)
    settings = ["memory.dense_products=true", "model.dtype=bfloat16", "lora.dropout=0.1"]
    out = well(on_metal.sft(f"model.path={model}", *settings, "memory.checkpoint_layers=true"))
    assert "Quantized weights are unpacked for rows of 8 tokens and more." in out
    assert not metal.of("quantized_matmul", gradient=True)  # the comparison on loading, and answers, have few rows
    frozen_products.use({})


@pytest.mark.parametrize("loss", LOSSES)
def test_every_preference_loss(on_metal: Project, metal: Watchman, loss: str) -> None:
    settings = [f"dpo.loss={loss}", *(["dpo.label_smoothing=0.1"] if loss in ("robust", "exo_pair") else [])]
    well(on_metal.run(dpo.main, "dpo.start=base", "memory.micro_tokens=60", *settings))
    assert set(range(1, 10)) <= queries(metal)
    assert metal.fewest_queries() == {"bool": 1, "causal": 9}


@pytest.mark.parametrize("loss", UNPAIRED)
@pytest.mark.parametrize(
    "settings", [[], ["memory.checkpoint_layers=true", "lora.dropout=0.1", "dpo.sft_weight=0.5"]]
)
def test_every_loss_of_single_answers(on_metal: Project, metal: Watchman, loss: str, settings: list[str]) -> None:
    well(on_metal.run(dpo.main, "dpo.start=base", "memory.micro_tokens=60", f"dpo.loss={loss}", *settings))
    assert metal.of("attention", gradient=True) and metal.of("attention", gradient=False)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"quantized": 4}, ["memory.checkpoint_layers=true"]),
        ({"quantized": 4}, ["lora.type=dora", "lora.dropout=0.1", "dpo.loss=aot", "memory.micro_tokens=60"]),
        ({"family": "qwen3"}, ["dpo.ld_alpha=0.5", "dpo.sft_weight=0.5", "dpo.neftune_alpha=5"]),
        ({}, ["model.dtype=bfloat16", "memory.checkpoint_layers=true", "lora.dropout=0.1"]),
    ],
    ids=["4-bit checkpointed", "4-bit dora coupled", "weighted", "bfloat16 checkpointed"],
)
def test_dpo(
    on_metal: Project, metal: Watchman, model_folder: Any, model: dict[str, Any], settings: list[str]
) -> None:
    path = f"model.path={model_folder(head_dim=64, **model)}"
    well(on_metal.run(dpo.main, path, "dpo.start=base", "evaluate.prompts=[你好]", *settings))
    assert set(range(1, 10)) <= queries(metal)
    assert metal.fewest_queries() == {"bool": 1, "causal": 9}
    assert metal.of("attention", gradient=False)  # the reference and the answer


def test_what_measures_this_machine(on_metal: Project, metal: Watchman, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget takes a few real steps before the first one, and `plan` times one block: both with a gradient."""
    well(on_metal.sft("--budget", "3m", "sft.max_steps=null", "sft.epochs=1"))
    assert metal.of("attention", gradient=True)
    metal.calls.clear()
    measure = speed.measure
    monkeypatch.setattr(speed, "measure", lambda *a, **k: measure(*a, **k | {"length": 5, "seconds": 0.2}))
    well(on_metal.run(plan.main))
    assert queries(metal) == {5} and metal.fewest_queries() == {"bool": 5}


@pytest.mark.parametrize("protocol", ["official", "chat", "generate", "cloze"])
def test_exams(on_metal: Project, metal: Watchman, protocol: str) -> None:
    well(on_metal.run(eval.main, f"evaluate.protocol={protocol}", "--stage", "base"))
    assert metal.of("attention", gradient=False) and not metal.of("attention", gradient=True)
    longer = [c for c in metal.of("attention") if c.shapes[1][2] > c.shapes[0][2] > 8]
    assert longer or protocol == "generate"  # questions after the prefix that they share


def test_fuse_and_chat(on_metal: Project, metal: Watchman, monkeypatch: pytest.MonkeyPatch) -> None:
    well(on_metal.sft())
    metal.calls.clear()
    well(on_metal.run(fuse.main, "export.formats=[mlx, hf, peft]"))
    assert metal.of("attention")  # the fused model is compared with the one that was trained
    metal.calls.clear()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好".encode())))
    result = on_metal.run(chat.main, "--max-tokens", "3", "--seed", "3")  # of some seeds, white space
    assert result.status == 0 and result.out.strip() and len(result.err.splitlines()) == 1  # which model answers
    assert metal.fewest_queries(gradient=False)["none"] == 1  # token by token


def test_few_bits_that_keep_the_tuning(on_metal: Project, metal: Watchman) -> None:
    well(on_metal.sft())
    metal.calls.clear()
    result = well(on_metal.run(fuse.main, "export.formats=[mlx]", "export.bits=mixed", "--recover", "--no-measure"))
    assert "Recovered in" in result and metal.of("attention")


# The simulation refuses


def test_without_the_rule_dpo_stops_at_its_first_step(on_metal: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "max_masked_queries", lambda: 0)
    result = on_metal.run(dpo.main, "dpo.start=base")
    assert result.status == 70 and REFUSED in result.err
    assert not Path("runs/tiny/dpo/adapters").exists()


def test_without_the_rule_the_self_check_finds_another_way(
    on_metal: Project, metal: Watchman, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a later MLX refused what this program does not know of."""
    monkeypatch.setattr(device, "_MASKED_QUERIES", ())
    monkeypatch.setattr(device_check, "check", self_check.check)
    shown = well(on_metal.run(dpo.main, "dpo.start=base"))
    assert shown.count("warning: fused attention fails the self-check on this device") == 1
    assert "(roots of 1-8 tokens, branches of 1-8 tokens: MLX reports" in shown and REFUSED in shown


@pytest.mark.parametrize(
    "case",
    [
        Case("float32", 64, width=128),
        Case("float32", 128, "dora", bits=4, width=128, lengths=tuple(range(1, 10))),
        Case("float32", 64, width=128, checkpoint=True),
    ],
    ids=str,
)
def test_the_self_check_asks_nothing_that_metal_refuses(metal: Watchman, case: Case) -> None:
    outcome = self_check.check(case)
    assert outcome.passed, outcome.problem
    assert set(case.lengths) <= queries(metal)


def attention(queries: int, keys: int, *, head: int = 64, heads: int = 4, mask: Any = None, **options: Any) -> Any:
    """A function of the queries, and queries for it."""
    shapes = ((1, heads, queries, head), (1, 2, keys, head), (1, 2, keys, head))
    q, k, v = (mx.random.normal(shape) for shape in shapes)
    return lambda q: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask, **options).sum(), q


@pytest.mark.parametrize(
    "arguments",
    [
        {"queries": 1, "keys": 20},
        {"queries": 8, "keys": 8, "mask": "causal"},
        {"queries": 8, "keys": 20, "heads": 8},  # 8 queries x 4 heads for each head of keys = 32
        {"queries": 4, "keys": 20, "head": 128, "mask": "causal"},
    ],
)
def test_few_queries_with_a_gradient_are_refused_as_metal_refuses_them(
    metal: Watchman, arguments: dict[str, Any]
) -> None:
    call, q = attention(**arguments)
    mx.eval(call(q))  # without a gradient, it is taken
    for gradient in (mx.grad(call), mx.grad(mx.checkpoint(call)), lambda q: mx.vjp(call, [q], [mx.array(1.0)])):
        with pytest.raises(RuntimeError, match=REFUSED):
            gradient(q)


@pytest.mark.parametrize(
    "arguments",
    [
        {"queries": 9, "keys": 20, "mask": "causal"},
        {"queries": 8, "keys": 20, "mask": mx.ones((8, 20), dtype=mx.bool_)},
        {"queries": 8, "keys": 20, "head": 80},  # no vector kernel has such heads, so it is not fused
        {"queries": 8, "keys": 20, "heads": 10},  # 40 queries for each head of keys
        {"queries": 8, "keys": 4},
    ],
)
def test_what_metal_takes_is_taken(metal: Watchman, arguments: dict[str, Any]) -> None:
    call, q = attention(**arguments)
    mx.eval(mx.grad(call)(q))
    assert [c.gradient for c in metal.of("attention")] == [True]


def test_other_refusals(metal: Watchman) -> None:
    with pytest.raises(RuntimeError, match="NYI: attention sinks"):
        call, q = attention(9, 20, sinks=mx.zeros(4))
        mx.grad(call)(q)
    with pytest.raises(ValueError, match="float64 is not supported on the GPU"):
        mx.zeros(3, dtype=mx.float64)
    with pytest.raises(ValueError, match=r"\[linalg::svd\] This op is not yet supported on the GPU"):
        mx.linalg.svd(mx.eye(3))
    mx.eval(mx.linalg.svd(mx.eye(3), stream=mx.cpu))
    with pytest.raises(ValueError, match=r"\[ScatterAxis::eval_gpu\] Does not support int64"):
        mx.put_along_axis(mx.zeros((2, 2), dtype=mx.int64), mx.array([[0]]), mx.array(1), axis=1)
    with pytest.raises(RuntimeError, match=r"Attempting to allocate 8590065664 bytes .* buffer size of 8589934592"):
        mx.zeros((2**15, 2**16 + 1))  # is not computed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alive": 499_001, "index_arrays": 0, "compiled_arguments": 0}, "Resource limit (499000) exceeded"),
        ({"alive": 1, "index_arrays": 21, "compiled_arguments": 0}, "more than 20 index arrays"),
        ({"alive": 1, "index_arrays": 0, "compiled_arguments": 27}, "Too many inputs/outputs"),
        ({"alive": 499_000, "index_arrays": 20, "compiled_arguments": 26}, None),
    ],
)
def test_limits_of_an_evaluation(options: dict[str, int], message: str | None) -> None:
    call = Call("evaluation", options=tuple(options.items()))
    if message is None:
        check(call)
        return
    with pytest.raises(RuntimeError, match=re.escape(message)):
        check(call)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("group", "bits", "taken"), [(32, 4, True), (64, 8, True), (128, 2, True), (16, 4, False), (64, 7, False)]
)
def test_quantized_products_need_a_kernel(dtype: str, group: int, bits: int, taken: bool) -> None:
    options = {"mode": "affine", "group_size": group, "bits": bits, "transpose": False}
    call = Call("quantized_matmul", ((1, 64), (64, 8)), (dtype, "uint32"), options=tuple(options.items()))
    if taken:
        check(call)
        return
    with pytest.raises(RuntimeError, match=f"Unable to load kernel affine_qmm_n_{dtype}_gs_{group}_b_{bits}"):
        check(call)


# The record


def test_arrays_of_an_evaluation(metal: Watchman) -> None:
    """a * b, its exponential, and their sum through a view: 2 given arrays and 4 made ones.

    The most are alive when `a * b + exp` is computed: a, b, a * b, exp(a * b) and the sum. `reshape` makes none.
    """
    a, b = mx.random.normal((4, 4)), mx.random.normal((4, 4))
    mx.eval(a, b)
    product = a * b
    total = product + mx.exp(product)
    metal.most_alive = metal.most_evaluated = 0
    mx.eval(mx.abs(total.reshape(2, 8)))
    assert (metal.most_evaluated, metal.most_alive) == (6, 5)


def test_the_record_of_a_call(metal: Watchman) -> None:
    x = mx.random.normal((5, 4, 1, 64))
    mx.fast.rope(x, 64, traditional=False, base=1e4, scale=1.0, offset=mx.arange(5))
    mx.concatenate(mx.split(x, [1, 3], axis=0), axis=0)
    assert set(metal.calls) == {
        Call("rope", ((5, 4, 1, 64), (5,)), ("float32", "int32"), options=(("offset", "array"),)),
        Call("split", ((5, 4, 1, 64),), ("float32",), options=(("parts", 3),)),
        Call("concatenate", options=(("parts", 3),)),
    }
    assert (metal.largest.nbytes, metal.largest.shape) == (5 * 4 * 64 * 4, (5, 4, 1, 64))


def test_outputs_of_a_custom_function_share_its_inner_arrays(metal: Watchman) -> None:
    """x, its exponential, its absolute value and their sum."""
    both = mx.custom_function(lambda x: (mx.exp(x), mx.abs(x)))
    both.vjp(lambda primals, cotangents, outputs: cotangents[0])
    x = mx.random.normal((4,))
    mx.eval(x)
    metal.most_alive = metal.most_evaluated = 0
    exponential, absolute = both(x)
    mx.eval(exponential + absolute)
    assert (metal.most_evaluated, metal.most_alive) == (4, 4)


def test_everything_is_back_after_it() -> None:
    before = [mx.eval, mx.value_and_grad, mx.fast.rope, mx.concatenate, mx.device_info, np.array]
    with simulated_metal():
        assert device.max_masked_queries() == 8 and not device.is_cpu()
    assert before == [mx.eval, mx.value_and_grad, mx.fast.rope, mx.concatenate, mx.device_info, np.array]
    assert device.max_masked_queries() == 0 or mx.metal.is_available()


def test_the_table_of_a_run(project: Project, model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of a recipe without pairs and exams, then `fuse` and `chat`."""
    monkeypatch.setattr("sys.stdin", sys.stdin)  # the chat replaces it
    overrides = ["sft.max_steps=1", f"model.path={model_folder(head_dim=64, quantized=4)}"]
    with simulated_metal(fast_products=True) as watchman:
        metal_calls.run_recipe("recipe.yaml", overrides, "folder")
    called = {kind: gradient for kind, gradient, _ in metal_calls.call_rows(watchman)}
    assert called["attention, mask causal, head 64, float32"] == "12"  # 3 layers, 4 conversations
    assert called["quantized product, transposed, 4 bits, groups of 32, float32"] != "0"
    extremes = {row[0]: row[1:] for row in metal_calls.extreme_rows(watchman)}
    assert extremes["fewest queries without a gradient, mask none"] == ("1", "none")
    assert extremes["most arrays alive"] == (f"{watchman.most_alive:,}", "499,000")


def test_every_rule_names_its_source() -> None:
    assert all(rule.demand and ("0.32.4" in rule.source or "846d176" in rule.source) for rule in RULES)
