"""The fused log-probs against float64, their gradient, their memory, and the check for families that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding
from mlx_lm.tuner.lora import LoRALinear as TheirLoRALinear
from oracles import distance, gradients, log_softmax, own_logprobs, random_tokens
from tolerances import LOGPROBS, product

from mlx_zh.core.logprobs import output_head, sequence_logprobs, token_logprobs
from mlx_zh.core.packing import pack_conversations
from mlx_zh.core.proof import SUPPORTED, check_supported
from mlx_zh.errors import ModelError

VOCABULARY, WIDTH, COUNT = 200, 64, 23
HEAD = 4 * product(WIDTH)  # logits are about 1 and at most about 4, and a log-prob is off as they are


def head_of(kind: str) -> Any:
    """A frozen head of each kind that a model can have, and of each that training can make of it."""
    mx.random.seed(4)
    if "embedding" in kind:
        head: Any = nn.Embedding(VOCABULARY, WIDTH)
    else:
        head = nn.Linear(WIDTH, VOCABULARY, bias="bias" in kind)
        if "bias" in kind:
            head.bias = mx.random.normal((VOCABULARY,))
    if "bit" in kind:
        bits, group = int(kind[kind.index("bit") - 1]), int(kind.rsplit("g", 1)[1])
        head = head.to_quantized(group_size=group, bits=bits)
    head.freeze()
    if kind.startswith("lora"):
        head = (LoRAEmbedding if "embedding" in kind else TheirLoRALinear).from_base(head, r=4, scale=3.0)
        head.lora_b = mx.random.normal(head.lora_b.shape) * 0.2
    if kind.startswith("trained"):
        head.unfreeze()
    mx.eval(head.parameters())
    return head


FROZEN = [
    "linear",
    "linear bias",
    "linear 4bit g32",
    "linear 4bit g64",
    "linear 8bit g32",
    "linear bias 8bit g64",
    "embedding",
    "embedding 4bit g32",
    "embedding 8bit g64",
]
TRAINED = ["trained linear", "trained linear bias", "trained embedding", "lora linear", "lora linear 4bit g32"]
TRAINED += ["lora embedding"]


def inputs(dtype: mx.Dtype = mx.float32, count: int = COUNT) -> tuple[mx.array, mx.array]:
    mx.random.seed(9)
    hidden = mx.random.normal((count, WIDTH)).astype(dtype)
    return hidden, mx.array(random_tokens(count, seed=8, vocabulary=VOCABULARY))


def weight_of(head: Any) -> np.ndarray:
    """The head as one float64 matrix (D, V), found by projecting the unit vectors; less its bias."""
    project = getattr(head, "as_linear", head)
    at_zero = np.array(project(mx.zeros((1, WIDTH))), dtype=np.float64)
    return np.array(project(mx.eye(WIDTH)), dtype=np.float64) - at_zero


def expected_of(head: Any, hidden: mx.array, targets: mx.array, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs (S,) and the gradient of their weighted sum (S, D), by the textbook, in float64.

    d log p_t / d h = W_t - sum_v p_v W_v.
    """
    project = getattr(head, "as_linear", head)
    bias = np.array(project(mx.zeros((1, WIDTH))), dtype=np.float64)
    weight = weight_of(head)
    wide = np.array(hidden.astype(mx.float32), dtype=np.float64)
    logprobs = log_softmax(wide @ weight + bias)
    onehot = np.eye(VOCABULARY)[np.array(targets)]
    gradient = factors[:, None] * ((onehot - np.exp(logprobs)) @ weight.T)
    return logprobs[np.arange(len(wide)), np.array(targets)], gradient


@pytest.mark.numeric
@pytest.mark.parametrize("chunk", [None, 7, 1, COUNT])
@pytest.mark.parametrize("kind", FROZEN + TRAINED)
def test_value_and_gradient_equal_log_softmax(kind: str, chunk: int | None) -> None:
    """Chunks of 7 do not divide 23; the weights of the sum differ, so that no row stands in for another."""
    head = head_of(kind)
    hidden, targets = inputs()
    factors = np.random.default_rng(1).normal(size=COUNT)

    def total(hidden: mx.array) -> tuple[mx.array, mx.array]:
        logprobs = token_logprobs(hidden, head, targets, chunk=chunk)
        return (logprobs * mx.array(factors.astype(np.float32))).sum(), logprobs

    (_, logprobs), gradient = mx.value_and_grad(total)(hidden)
    expected, expected_gradient = expected_of(head, hidden, targets, factors)
    assert logprobs.dtype == mx.float32
    np.testing.assert_allclose(np.array(logprobs), expected, rtol=0, atol=HEAD)
    np.testing.assert_allclose(np.array(gradient), expected_gradient, rtol=0, atol=HEAD)
    silent = token_logprobs(hidden, head, targets, chunk=chunk, grad=False)
    np.testing.assert_allclose(np.array(silent), expected, rtol=0, atol=HEAD)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", TRAINED)
def test_a_trained_head_gets_its_gradient(kind: str) -> None:
    """The head's own arrays, against MLX's automatic gradient of log-softmax over all rows at once."""
    head = head_of(kind)
    hidden, targets = inputs()
    factors = mx.array(np.random.default_rng(1).normal(size=COUNT).astype(np.float32))

    def plain() -> mx.array:
        logits = getattr(head, "as_linear", head)(hidden)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
        return (picked * factors).sum()

    _, expected = gradients(head, plain)
    _, found = gradients(head, lambda: (token_logprobs(hidden, head, targets, chunk=5) * factors).sum())
    assert len(found) == len(tree_flatten(head.trainable_parameters())) >= 1
    assert distance(found, expected) < HEAD


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["linear bias", "trained linear", "embedding 4bit g32"])
def test_value_and_gradient_equal_pytorch(kind: str) -> None:
    """Against torch.nn.functional.cross_entropy in float64."""
    torch = pytest.importorskip("torch")
    head = head_of(kind)
    hidden, targets = inputs()
    weight = torch.tensor(weight_of(head).T, requires_grad=True)
    bias = torch.tensor(np.array(getattr(head, "as_linear", head)(mx.zeros((1, WIDTH)))[0], dtype=np.float64))
    theirs = torch.tensor(np.array(hidden, dtype=np.float64), requires_grad=True)
    logits = torch.nn.functional.linear(theirs, weight, bias)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(np.array(targets)).long())
    loss.backward()
    loss = loss.detach()

    value, gradient = mx.value_and_grad(lambda h: -token_logprobs(h, head, targets, chunk=6).mean())(hidden)
    assert float(value) == pytest.approx(float(loss), abs=HEAD)
    np.testing.assert_allclose(np.array(gradient), theirs.grad.numpy(), rtol=0, atol=HEAD / COUNT)
    if kind == "trained linear":
        _, found = gradients(head, lambda: -token_logprobs(hidden, head, targets, chunk=6).mean())
        np.testing.assert_allclose(found["weight"], weight.grad.numpy(), rtol=0, atol=HEAD / COUNT)


@pytest.mark.parametrize("kind", ["linear", "trained linear"])
@pytest.mark.parametrize("grad", [True, False])
def test_extreme_logits(kind: str, grad: bool) -> None:
    """By hand, hidden (1, 0) and logits h_0 w_v with w = (0, 1, -1, 0.999) times the size a.

    a = 200: log p of token 2 is -200 - log(e^0 ...) relative to the maximum at token 1: -400 - log(1 + e^-0.2 + ...).
    a = 1e4: token 1 takes everything: log p = (-1e4, 0, -2e4, -10), and the gradient of token 1 is 0.
    """
    head = nn.Linear(2, 4, bias=False)
    column = np.array([0.0, 1.0, -1.0, 0.999], dtype=np.float32)
    head.weight = mx.array(np.stack([column, np.zeros(4, np.float32)], axis=1))
    if kind == "linear":
        head.freeze()
    targets = mx.arange(4)
    for size in (200.0, 1e4):
        hidden = mx.array([[size, 0.0]] * 4)
        found = token_logprobs(hidden, head, targets, chunk=3, grad=grad)
        expected = log_softmax(size * column[None])[0]
        assert np.isfinite(np.array(found)).all()
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-6, atol=2e-3 if size == 1e4 else 3e-5)
    if not grad:
        return
    gradient = mx.grad(lambda h: token_logprobs(h, head, targets, chunk=3).sum())(mx.array([[1e4, 0.0]] * 4))
    # d log p_t / d h_0 = w_t - w_1 where token 1 has all the probability but e^-10
    rest = np.exp(-10.0)
    mean = (1.0 + 0.999 * rest) / (1 + rest)
    np.testing.assert_allclose(np.array(gradient)[:, 0], column - mean, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_a_probability_below_float32_is_exact(grad: bool) -> None:
    """e^-200 is 0 in float32; its logarithm must still be right to the seventh digit.

    Logits (0, -200): log p of token 1 is -200 - log(1 + e^-200) = -200, and the gradient of it w_1 - w_0 = (-1, 1).
    """
    head = nn.Linear(2, 2, bias=False)
    head.weight = mx.eye(2)
    head.freeze()
    hidden, targets = mx.array([[0.0, -200.0]]), mx.array([1])
    assert token_logprobs(hidden, head, targets, grad=grad).tolist() == [-200.0]
    if grad:
        found = mx.grad(lambda h: token_logprobs(h, head, targets).sum())(hidden)
        assert found.tolist() == [[-1.0, 1.0]]


def test_a_wide_vocabulary_of_equal_logits() -> None:
    """128,256 equal logits: log p = -ln 128256 = -11.7618...; float32 sums of so many terms must not drift."""
    head = nn.Linear(4, 128_256, bias=False)
    head.weight = mx.zeros((128_256, 4))
    head.freeze()
    for grad in (True, False):
        found = token_logprobs(mx.ones((2, 4)), head, mx.array([0, 128_255]), grad=grad)
        np.testing.assert_allclose(np.array(found), -np.log(128_256), rtol=1e-6)


def test_bfloat16_hidden_states_keep_a_float32_log_sum_exp() -> None:
    """The only rounding is that of the logits: each has 8 bits, so it is off by at most 2^-9 of its size.

    A log-prob is a logit less a mean of logits' shifts, so it is off by at most twice the largest such error. A
    bfloat16 log-sum-exp of about 6 would itself be off by up to 2^-7 and make all tokens' errors common.
    """
    head = head_of("linear")
    head.weight = head.weight.astype(mx.bfloat16) * 4
    hidden, targets = inputs(mx.bfloat16)
    logits = np.array((hidden @ head.weight.T).astype(mx.float32))  # as the head rounds them
    expected = log_softmax(logits)[np.arange(COUNT), np.array(targets)]
    exact = log_softmax(
        np.array(hidden.astype(mx.float32), dtype=np.float64) @ np.array(head.weight.astype(mx.float32)).T
    )[np.arange(COUNT), np.array(targets)]
    for grad in (True, False):
        found = token_logprobs(hidden, head, targets, chunk=7, grad=grad)
        assert found.dtype == mx.float32
        np.testing.assert_allclose(np.array(found), expected, rtol=2e-6, atol=5e-6)
        assert np.abs(np.array(found) - exact).max() < 2 * np.abs(logits).max() * 2**-8


def test_bfloat16_gradient_is_within_its_rounding() -> None:
    """Against float64 from the same bfloat16 numbers: within 2 % of the gradient's size, and in its own type."""
    head = head_of("linear")
    head.weight = head.weight.astype(mx.bfloat16)
    hidden, targets = inputs(mx.bfloat16)
    found = mx.grad(lambda h: token_logprobs(h, head, targets, chunk=7).sum())(hidden)
    weight = np.array(head.weight.astype(mx.float32), dtype=np.float64)
    probabilities = np.exp(log_softmax(np.array(hidden.astype(mx.float32), dtype=np.float64) @ weight.T))
    expected = weight[np.array(targets)] - probabilities @ weight
    assert found.dtype == mx.bfloat16
    assert np.abs(np.array(found.astype(mx.float32)) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["linear", "trained linear", "embedding 4bit g32"])
@pytest.mark.parametrize("grad", [True, False])
def test_no_scored_tokens(kind: str, grad: bool) -> None:
    """A row whose prompt fills it scores nothing: no log-probs, and a gradient of 0, not an error."""
    head = head_of(kind)
    none = mx.zeros((0,), dtype=mx.int32)
    assert token_logprobs(mx.zeros((0, WIDTH)), head, none, grad=grad).tolist() == []
    hidden = mx.ones((3, WIDTH))
    found = mx.grad(lambda h: token_logprobs(h[none], head, none, grad=grad).sum() + (h * 0).sum())(hidden)
    assert np.array(found).tolist() == np.zeros((3, WIDTH)).tolist()


def test_one_scored_token() -> None:
    """S = 1 through the model: the log-prob that its own forward gives."""
    head = head_of("linear")
    hidden, targets = inputs(count=1)
    expected, _ = expected_of(head, hidden, targets, np.ones(1))
    np.testing.assert_allclose(np.array(token_logprobs(hidden, head, targets, chunk=16)), expected, rtol=0, atol=HEAD)


def peak_of(count: int, chunk: int, head: Any, vocabulary: int, grad: bool) -> int:
    """Bytes alive at most while log-probs and gradient of `count` rows are computed, beyond the inputs."""
    mx.random.seed(0)
    hidden = mx.random.normal((count, 64))
    targets = mx.random.randint(0, vocabulary, (count,))
    mx.eval(hidden, targets, head.parameters())
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    if grad:
        mx.eval(mx.value_and_grad(lambda h: token_logprobs(h, head, targets, chunk=chunk).sum())(hidden))
    else:
        mx.eval(token_logprobs(hidden, head, targets, chunk=chunk, grad=False))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("grad", [True, False])
def test_memory_does_not_grow_with_the_scored_tokens(grad: bool) -> None:
    """Four times the rows may cost what rows cost (their gradient and cotangent), and no more logits.

    Without the chain MLX computes all chunks side by side: 32 chunks of 4 MB would show as 128 MB, 24 more than
    the 8 of the small case; without the pause between them a dozen arrays of 4 MB are alive. How far ahead MLX
    allocates varies with the machine's load, by a chunk or two.
    """
    vocabulary, chunk = 32_000, 32
    head = nn.Linear(64, vocabulary, bias=False)
    head.freeze()
    one_chunk = chunk * vocabulary * 4
    few, many = (peak_of(count, chunk, head, vocabulary, grad) for count in (256, 1024))
    rows = 1024 * 64 * 4
    assert few > one_chunk  # the meter works
    assert many - few < 6 * rows + 3 * one_chunk
    assert many < 8 * one_chunk


def test_a_frozen_head_has_no_cotangent() -> None:
    """With a wide vocabulary and one row at a time, a (V, D) cotangent would be larger than all else together."""
    vocabulary = 32_000
    head = nn.Linear(64, vocabulary, bias=False)
    head.freeze()
    assert peak_of(4, 1, head, vocabulary, grad=True) < vocabulary * 64 * 4 / 2
    head.unfreeze()

    def total(weight: mx.array, hidden: mx.array) -> mx.array:
        head.weight = weight
        return token_logprobs(hidden, head, mx.array([3]), chunk=1).sum()

    weight = head.weight
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(total)(weight, mx.ones((1, 64))))
    assert mx.get_peak_memory() - before >= vocabulary * 64 * 4  # where it is asked for, it exists


@pytest.mark.parametrize("tied", [True, False])
def test_output_head(tiny_model: Callable[..., Any], tied: bool) -> None:
    """Projecting the model's last hidden states with the head gives the model's own logits."""
    model = tiny_model("qwen2", tied=tied)
    tokens = mx.array(random_tokens(9, 1))[None]
    head = output_head(model)
    logits = getattr(head, "as_linear", head)(model.model(tokens))
    np.testing.assert_array_equal(np.array(logits), np.array(model(tokens)))


@pytest.mark.numeric
def test_sequence_logprobs_of_conversations(tiny_model: Callable[..., Any]) -> None:
    """Only the trained tokens of each conversation count, each once, for its own sequence."""
    model = tiny_model(tied=True)
    rng = np.random.default_rng(2)
    examples = [(random_tokens(n, n), rng.random(n) < 0.5) for n in (12, 5, 30)]
    expected = [own_logprobs(model, tokens)[trained].sum() for tokens, trained in examples]
    found = np.array(sequence_logprobs(model, pack_conversations(examples), chunk=4))
    np.testing.assert_allclose(found, expected, rtol=LOGPROBS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_supported_families_pass_the_check(tiny_model: Callable[..., Any], family: str, dtype: str) -> None:
    check_supported(tiny_model(family, dtype=dtype), {"model_type": family})
    if dtype == "float32":
        check_supported(tiny_model(family, quantized=4, tied=True), {"model_type": family})


def scaled_residual(block: Any) -> None:
    """Make a block add half of what it adds."""
    own = type(block).__call__

    class Scaled(type(block)):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            return x + 0.5 * (own(self, x, mask, cache) - x)

    block.__class__ = Scaled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", [300, 20_000])
def test_a_changed_block_is_refused(tiny_model: Callable[..., Any], dtype: str, vocabulary: int) -> None:
    """A block with Granite's scaled residual has every module that Llama's has, and other numbers.

    A wide vocabulary spreads the probability thin; the difference must show there too.
    """
    model = tiny_model(dtype=dtype, vocabulary=vocabulary)
    check_supported(model, {"model_type": "llama"})
    for layer in model.layers:
        scaled_residual(layer)
    with pytest.raises(ModelError) as error:
        check_supported(model, {"model_type": "granite-like"})
    assert "'granite-like'" in str(error.value)
    for family in SUPPORTED:
        assert family in str(error.value)


def test_a_scaled_head_is_refused(tiny_model: Callable[..., Any]) -> None:
    """Logits divided by a constant, as Cohere's and Granite's are, are outside of what the fused head computes."""
    model = tiny_model(dtype="bfloat16")
    own = type(model).__call__

    class Scaled(type(model)):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **named: Any) -> mx.array:
            return own(self, *arguments, **named) / 1.5

    model.__class__ = Scaled
    with pytest.raises(ModelError, match=r"logits differ from its own by 0.5 of"):
        check_supported(model, {"model_type": "cohere-like"})


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("cohere", {"layer_norm_eps": 1e-5, "logit_scale": 0.06}),
        (
            "gpt2",
            {
                "n_ctx": 64,
                "n_embd": 64,
                "n_head": 4,
                "n_layer": 2,
                "n_positions": 64,
                "layer_norm_epsilon": 1e-5,
            },
        ),
    ],
)
def test_other_families_are_refused(tiny_model: Callable[..., Any], family: str, changes: dict[str, Any]) -> None:
    """mlx-lm's own classes of families whose blocks are shaped otherwise."""
    model = tiny_model(family, **changes)
    with pytest.raises(ModelError, match=f"'{family}' cannot be trained here.*{', '.join(SUPPORTED)}"):
        check_supported(model, {"model_type": family})


@pytest.mark.parametrize("family", ["gemma", "olmo2"])
def test_families_that_no_list_names_pass(tiny_model: Callable[..., Any], family: str) -> None:
    """Gemma scales its embeddings; OLMo 2 has its norms after attention and MLP, and those of all heads at once."""
    assert family not in SUPPORTED
    check_supported(tiny_model(family), {"model_type": family})


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_dynamic_rope_is_refused_by_its_name_and_the_way_out_works(tiny_model: Callable[..., Any], key: str) -> None:
    scaling = {key: "dynamic", "factor": 4.0}
    model = tiny_model(rope_scaling=scaling)
    config = {"model_type": "llama", "rope_scaling": scaling, "max_position_embeddings": 512}
    with pytest.raises(ModelError, match=r"'dynamic' in config\.json cannot .* \(512 tokens\) it changes"):
        check_supported(model, config)
    plain = tiny_model()
    check_supported(plain, config | {"rope_scaling": None})
    tokens = mx.arange(40)[None]
    assert mx.array_equal(model(tokens), plain(tokens))
