"""A quantized model that keeps its tuning: against plain rounding, an independent GPTQ, and mlx-lm's loader."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import logits
from tuned import make_tuned

from mlx_zh.core.packing import pack_conversations
from mlx_zh.errors import ModelError
from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.export import bits, fidelity
from mlx_zh.models.export.folder_files import pack, packed_layout, unpack
from mlx_zh.models.export.folder_files import write_folder as write_fused
from mlx_zh.models.export.recover import Recovery, needed_bytes, rounding_errors
from mlx_zh.models.export.rounding import Grid, Inputs, compensated, packed_codes
from mlx_zh.models.load import load_model

FORM = {"group_size": 32, "bits": 4, "mode": "affine"}
LEAVES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
TARGETS = tuple(leaf.rpartition(".")[2] for leaf in LEAVES)


def text(seed: int, count: int):
    """Rows of random tokens, all scored."""
    rng = np.random.default_rng(seed)
    examples = [(rng.integers(3, 280, size=100).astype(np.int32), np.ones(100, bool)) for _ in range(count)]
    return tuple(pack_conversations([example]) for example in examples)


def inputs(seed: int = 0, columns: int = 64):
    """Correlated inputs (T, in) of the exact model and of the rounded one, as their layers before leave them."""
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(400, columns)) @ rng.normal(size=(columns, columns))
    actual = exact + 0.3 * rng.normal(size=exact.shape) @ rng.normal(size=(columns, columns))
    return (mx.array(x.astype(np.float32)) for x in (exact, actual))


def reference(weight, exact, actual, scales, biases, group, damping=0.01):
    """GPTQ as its paper derives it, in float64: the inverse is downdated after every column, no Cholesky factor."""
    squares = actual.T @ actual
    squares += damping * np.mean(np.diag(squares)) * np.eye(len(squares))
    inverse = np.linalg.inv(squares)
    weight = weight + weight @ ((exact - actual).T @ actual) @ inverse
    codes = np.zeros_like(weight)
    for column in range(weight.shape[1]):
        scale, bias = scales[:, column // group], biases[:, column // group]
        codes[:, column] = np.clip(np.round((weight[:, column] - bias) / scale), 0, 15)
        error = (weight[:, column] - (scale * codes[:, column] + bias)) / inverse[column, column]
        weight = weight - np.outer(error, inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


def test_codes_are_those_of_the_paper():
    exact, actual = inputs()
    weight = mx.random.normal((16, 64), key=mx.random.key(1))
    _, scales, biases = pack(weight, FORM, mx.float32)
    made = compensated(weight, Inputs.of([exact], [actual]), FORM, mx.float32, Grid(scales, biases))
    codes = mx.dequantize(made[0], mx.ones_like(scales), mx.zeros_like(biases), **FORM)
    wide = (np.array(a, dtype=np.float64) for a in (weight, exact, actual, scales, biases))
    expected = reference(*wide, 32)
    # In float32 a value may lie on the other side of a rounding boundary, and all columns after it follow.
    assert (np.array(codes) == expected).mean() > 0.98
    assert (made[1] == scales).all() and (made[2] == biases).all()


@pytest.mark.parametrize("number", [4, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(number):
    form = FORM | {"bits": number}
    packed, scales, biases = pack(mx.random.normal((8, 96)), form, mx.float32)
    codes = mx.dequantize(packed, mx.ones_like(scales), mx.zeros_like(biases), **form)
    assert float(codes.max()) == 2**number - 1 and float(codes.min()) == 0
    assert (packed_codes(codes, number) == packed).all()


def test_outputs_are_closer_than_after_plain_rounding():
    exact, actual = inputs()
    weight = mx.random.normal((16, 64), key=mx.random.key(1))
    made = compensated(weight, Inputs.of([exact], [actual]), FORM, mx.float32, None)

    def error(parts):
        return float(mx.square(actual @ unpack(parts, FORM).T - exact @ weight.T).sum())

    assert error(made) < 0.6 * error(pack(weight, FORM, mx.float32))


def test_equal_weights_and_unseen_inputs_do_not_break_it():
    weight = mx.concatenate([mx.zeros((4, 32)), mx.random.normal((4, 32), key=mx.random.key(1))], axis=1)
    seen = mx.concatenate([mx.random.normal((50, 32)), mx.zeros((50, 32))], axis=1)
    for x in (seen, mx.zeros((50, 64))):
        made = unpack(compensated(weight, Inputs.of([x], [x]), FORM, mx.float32, None), FORM)
        assert (made[:, :32] == 0).all()
        np.testing.assert_allclose(made[:, 32:], weight[:, 32:], atol=0.3)  # half a step of a 4-bit grid of 5 sigma


class Tuned:
    """A tuned model with a 4-bit base, and its predictions on text that no recovery sees."""

    def __init__(self, folder, family="llama", **options):
        options = {"size": 0.02, "hidden_size": 64, "intermediate_size": 128} | options
        made = make_tuned(folder, family, quantize=(4, 32), targets=TARGETS, **options)
        self.fusion, self.folder = made.fusion(quantize=(4, 32)), folder
        self.layout = packed_layout(self.fusion, 4, 32)
        self.held_out = fidelity.HeldOut(text(9, 4))
        loaded = load_model(str(made.base), quantize=(4, 32))
        load_adapter(loaded.model, made.adapter)
        loaded.model.eval()
        self.expected = self.held_out.predictions(loaded.model)

    def recovery(self, work="work"):
        return Recovery(self.layout, text(8, 30), self.folder / work)

    def written(self, name, layout):
        (self.folder / name).mkdir()
        write_fused(self.folder / name, layout, max_bytes=10**9, kind="mlx")
        return self.folder / name

    def kl(self, folder):
        found = self.held_out.predictions(load_model(str(folder)).model)
        return fidelity.distance(self.expected, found, self.held_out.targets).kl


@pytest.mark.parametrize(("family", "kind"), [("llama", "lora"), ("qwen3", "lora"), ("qwen2", "dora")])
def test_a_recovered_model_is_nearer_to_the_tuned_one(tmp_path, family, kind):
    tuned = Tuned(tmp_path, family, kind=kind)
    plain = tuned.kl(tuned.written("plain", tuned.layout))
    recovered = tuned.kl(tuned.written("recovered", tuned.recovery().run("a", lambda: None)))
    assert recovered < 0.5 * plain


def test_what_the_adapter_leaves_alone_keeps_its_codes_and_grids_stay(tmp_path):
    tuned = Tuned(tmp_path)
    folder = tuned.written("fused", tuned.recovery().run("a", lambda: None))
    written, base = mx.load(str(folder / "model.safetensors")), tuned.fusion.base.stored()
    for path in tuned.fusion.untouched:
        assert (written[f"{path}.weight"] == base[f"{path}.weight"]).all()
    assert len(tuned.fusion.untouched) == 2 * (7 - len(TARGETS)) + 2  # of two blocks, and both tables
    path = "model.layers.1.mlp.up_proj"
    assert (written[f"{path}.weight"] != base[f"{path}.weight"]).any()
    assert (written[f"{path}.scales"] == base[f"{path}.scales"].astype(mx.bfloat16)).all()


def test_mlx_lm_loads_it_and_predicts_the_same(tmp_path):
    from mlx_lm import load

    tuned = Tuned(tmp_path)
    folder = tuned.written("fused", tuned.recovery().run("a", lambda: None))
    theirs, _ = load(str(folder))
    np.testing.assert_allclose(logits(theirs), logits(load_model(str(folder), dtype="bfloat16").model), atol=1e-3)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("damaged", [False, True])
def test_after_a_kill_the_finished_blocks_are_taken_and_the_bytes_are_the_same(tmp_path, monkeypatch, damaged):
    tuned = Tuned(tmp_path)
    whole = tuned.written("whole", tuned.recovery("other").run("a", lambda: None))

    def killed():
        raise Killed

    with pytest.raises(Killed):
        tuned.recovery().run("a", killed)
    first = tmp_path / "work" / "block-000.safetensors"
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == [first.name, "key.json"]
    if damaged:
        first.write_bytes(first.read_bytes()[:200])
    rounded = []
    monkeypatch.setattr("mlx_zh.models.export.recover.compensated", lambda *a: rounded.append(1) or compensated(*a))
    again = tuned.written("again", tuned.recovery().run("a", lambda: None))
    assert len(rounded) == len(TARGETS) * (2 if damaged else 1)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    tuned.recovery().run("another adapter", lambda: None)
    assert len(rounded) == len(TARGETS) * (4 if damaged else 3)


def test_the_memory_for_an_8b_model_leaves_room_on_a_mac_of_16_gb():
    """Llama 3.1 8B: the inputs of `down_proj` in both models, 8192 x 14336 floats each, are the largest part."""
    shapes = {"model.embed_tokens.weight": (128256, 4096)}
    block = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
    shapes |= {f"model.layers.0.self_attn.{name}.weight": shape for name, shape in block.items()}
    shapes |= {f"model.layers.0.mlp.{name}_proj.weight": (14336, 4096) for name in ("gate", "up")}
    shapes["model.layers.0.mlp.down_proj.weight"] = (4096, 14336)
    needed = needed_bytes(shapes, [1024] * 8)
    assert 4 * 2 * 8192 * 14336 < needed < 3e9  # macOS lets MLX use two thirds of 16 GB


@pytest.mark.parametrize(("wide", "texts"), [(1536, 40), (256, 120)])
def test_the_memory_at_the_peak_is_what_the_formula_says(tmp_path, wide, texts):
    tuned = Tuned(tmp_path, hidden_size=256, intermediate_size=wide, num_hidden_layers=1, layers=1)
    recovery = Recovery(tuned.layout, text(8, texts), tmp_path / "work")
    needed = needed_bytes(tuned.fusion.source.outline.shapes, [100] * texts)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    recovery.run("a", lambda: None)
    used = mx.get_peak_memory() - before
    assert 0.7 * needed < used < needed


def test_mixed_bits_go_where_rounding_hurts_most_and_stay_within_the_size(tmp_path):
    tuned = Tuned(tmp_path)
    errors = rounding_errors(tuned.layout, text(8, 4), (4, 6, 8), lambda: None)
    assert set(errors) == {f"model.layers.{n}.{leaf}" for n in range(2) for leaf in LEAVES}
    for by_bits in errors.values():  # in the base's 4 bits only the small change is rounded away
        assert by_bits[4] > by_bits[6] > 4 * by_bits[8] > 0  # a quarter of the step, about a sixteenth of the square
    size = sum(entry.size for entry in tuned.layout.entries())
    assert bits.mixed_layout(tuned.layout, errors, size).packing == tuned.layout.packing
    shapes = tuned.fusion.source.outline.shapes

    def gain(path):  # for a byte
        return (errors[path][4] - errors[path][6]) / np.prod(shapes[f"{path}.weight"])

    worst = max(errors, key=gain)
    mixed = bits.mixed_layout(tuned.layout, errors, size + 2200)  # 64 x 128 values, two bits more: 2,048 bytes
    assert mixed.packing[worst]["bits"] > 4 and sum(entry.size for entry in mixed.entries()) <= size + 2200
    most = bits.mixed_layout(tuned.layout, errors, 10**9)
    assert {most.packing[path]["bits"] for path in errors} == {8}
    assert {most.packing[path]["bits"] for path in most.kept} == {4}
    plain, better = (tuned.kl(tuned.written(n, layout)) for n, layout in (("plain", tuned.layout), ("mixed", mixed)))
    assert better < plain


def test_mixed_and_recovered_at_once(tmp_path):
    tuned = Tuned(tmp_path)
    errors = rounding_errors(tuned.layout, text(8, 4), (4, 6, 8), lambda: None)
    size = sum(entry.size for entry in tuned.layout.entries())
    mixed = bits.mixed_layout(tuned.layout, errors, size + 6000)
    plain = tuned.kl(tuned.written("plain", mixed))
    recovery = Recovery(mixed, text(8, 30), tmp_path / "work")
    assert tuned.kl(tuned.written("recovered", recovery.run("a", lambda: None))) < 0.7 * plain


def test_trained_tables_get_eight_bits_and_every_matrix_its_own(tmp_path):
    """Plain rounding loses the change of a table, so recovered blocks alone would not help."""
    made = make_tuned(tmp_path, quantize=(6, 32), size=0.02, saved=("lm_head",), targets=TARGETS)
    fusion = made.fusion(quantize=(6, 32))
    path = "model.layers.0.mlp.up_proj"
    fusion.base.outline.packing[path] = {**FORM, "bits": 3}
    own = bits.own_layout(fusion, None)
    assert own.packing[path]["bits"] == 3 and bits.most_common(own.packing) == 6
    fine = bits.with_fine_tables(own)
    differing = {name: form["bits"] for name, form in fine.packing.items() if form["bits"] != 6}
    assert differing == {path: 3, "lm_head": 8}
    assert bits.most_common({}) == 16


def test_unusable_states_are_an_error_of_the_users(tmp_path):
    tuned = Tuned(tmp_path)
    name = "model.layers.0.mlp.up_proj.lora_b"
    tuned.fusion.adapter.weights[name] = tuned.fusion.adapter.weights[name] * float("nan")
    with pytest.raises(ModelError, match="computes NaN or infinity"):
        tuned.recovery().run("a", lambda: None)


def test_equal_columns_get_damping_enough_for_a_factor():
    """1e12 in every entry of the sum of x x^T: float32 leaves 1e5 of error, and the damping is 1e10."""
    x = mx.broadcast_to(mx.random.normal((400, 1), key=mx.random.key(0)) * 5e4, (400, 64))
    weight = mx.random.normal((16, 64), key=mx.random.key(1))
    for scale in (1, 1e-20, 1e12):
        made = compensated(weight, Inputs.of([x * scale], [x * scale]), FORM, mx.float32, None)
        assert mx.isfinite(unpack(made, FORM)).all()


@pytest.mark.parametrize("columns", [32, 512, 544, 1088])
def test_panels_do_not_change_the_result(columns, monkeypatch):
    exact, actual = inputs(columns=columns)
    weight = mx.random.normal((4, columns), key=mx.random.key(1))
    _, scales, biases = pack(weight, FORM, mx.float32)
    made = []
    for size in (32, 512):
        monkeypatch.setattr("mlx_zh.models.export.rounding.PANEL", size)
        made.append(compensated(weight, Inputs.of([exact], [actual]), FORM, mx.float32, Grid(scales, biases)))

    def error(parts):
        return float(mx.square(actual @ unpack(parts, FORM).T - exact @ weight.T).sum())

    # In float32 a few values lie on the other side of a rounding boundary, and all columns after them follow.
    np.testing.assert_allclose(error(made[0]), error(made[1]), rtol=0.02)
    assert (unpack(made[0], FORM) == unpack(made[1], FORM)).mean() > 0.9
