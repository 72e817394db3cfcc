"""How far a step is from the bare matrix products in it, and what the rest of its time goes to.

    python benchmarks/limit.py [--batch-size 8] [--checkpoint] [--repeats 5] [--model random-128k] [--device gpu]

Takes one SFT step as training does it, then each kind of work in it by itself with the same shapes, in turns: the
products of frozen layers, of LoRA, of attention and of the head, forward and backward as the step needs them; then
attention, activations, norms and the head whole, and the optimizer. What a kind takes beyond its own products is
element-wise work and copies. A kind by itself finds its inputs in the processor's caches more often than in a step,
so the sum is less than the step; the difference is told too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import measuring
from measuring import RANK, ROOT
from sft_step import our_step

# isort: split
import mlx.core as mx

from mlx_zh.core.blocks import attention_output
from mlx_zh.core.feed_forward import swiglu
from mlx_zh.core.logprobs import chunk_rows, decoder, output_head, token_logprobs
from mlx_zh.core.packing import PackedBatch, pack_conversations
from mlx_zh.models.load import LoadedModel
from mlx_zh.planning.shapes import LINEAR, ModelShape, model_shape
from mlx_zh.training.optimizer import GroupedAdamW

Work = Callable[[], Any]


class _Bare(dict[str, Any]):
    """A module with other parts."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Kinds:
    """The kinds of work of a step over `row`; each returns lazy arrays that stand for one layer, or for the head."""

    def __init__(self, loaded: LoadedModel, row: PackedBatch, *, checkpoint: bool) -> None:
        self.model, self.row = loaded.model, row
        self.shape: ModelShape = model_shape(loaded.config)
        self.layer: Any = decoder(loaded.model).layers[0]
        self.forwards = 2 if checkpoint else 1
        self.dtype = decoder(loaded.model).norm.weight.dtype
        self.tokens = int(row.tokens.size)
        self.chunk = chunk_rows(self.shape.vocabulary)

    def of_a_layer(self) -> dict[str, Work]:
        return {
            "products: frozen layers": self._frozen(),
            "products: LoRA": self._lora(),
            "products: attention": self._attention_products(),
            "attention": self._attention(),
            "activation": self._activation(),
            "norms and sums": self._norms(),
        }

    def once(self) -> dict[str, Work]:
        return {"products: head": self._head_products(), "head": self._head(), "optimizer": self._optimizer()}

    def _random(self, *shape: int) -> mx.array:
        array = mx.random.normal(shape).astype(self.dtype)
        mx.eval(array)
        return array

    def _linear(self, name: str) -> Any:
        return getattr(self.layer.self_attn if name[0] in "qkvo" else self.layer.mlp, name)

    def _frozen(self) -> Work:
        inputs = {name: self._random(self.tokens, self.shape.matrix(name)[0]) for name in LINEAR}
        errors = {name: self._random(self.tokens, self.shape.matrix(name)[1]) for name in LINEAR}

        def work() -> Any:
            forward = [self._linear(n)(inputs[n]) for n in LINEAR for _ in range(self.forwards)]
            return forward, [mx.vjp(self._linear(n), [inputs[n]], [errors[n]])[1] for n in LINEAR]

        return work

    def _lora(self) -> Work:
        sizes = [self.shape.matrix(name) for name in LINEAR]
        given = [
            (
                self._random(self.tokens, n),
                self._random(n, RANK),
                self._random(RANK, m),
                self._random(self.tokens, m),
                self._random(self.tokens, RANK),
            )
            for n, m in sizes
        ]

        def work() -> Any:
            return [
                ([(x @ a, low @ b) for _ in range(self.forwards)], error @ b.T, low.T @ error, x.T @ low, low @ a.T)
                for x, a, b, error, low in given
            ]

        return work

    def _attention_products(self) -> Work:
        """Of each segment, queries, keys (one for each query head) and scores; no conversation has branches."""
        heads, size = self.shape.heads, self.shape.queries // self.shape.heads
        given = [
            (self._random(1, heads, n, size), self._random(1, heads, n, size), self._random(1, heads, n, n))
            for n in map(len, self.row.segments)
        ]

        def work() -> Any:
            return [
                (
                    [(q @ k.swapaxes(2, 3), p @ k) for _ in range(self.forwards)],
                    (p.swapaxes(2, 3) @ q, q @ k.swapaxes(2, 3), p @ k, p.swapaxes(2, 3) @ q),
                )
                for q, k, p in given
            ]

        return work

    def _attention(self) -> Work:
        """As in training, without the four projections."""
        own = self.layer.self_attn

        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            projected = {"q_proj": lambda _: q, "k_proj": lambda _: k, "v_proj": lambda _: v, "o_proj": lambda x: x}
            heads = {"n_heads": own.n_heads, "n_kv_heads": own.n_kv_heads, "scale": own.scale, "rope": own.rope}
            # mlx modules are dictionaries: of q_norm and k_norm, where there are such
            return attention_output(_Bare(dict(own) | projected | heads), q, self.row)

        sizes = (self.shape.queries, self.shape.keys, self.shape.keys)
        return self._forward_and_backward(attend, [tuple(self._random(self.tokens, size) for size in sizes)])

    def _activation(self) -> Work:
        pair = tuple(self._random(self.tokens, self.shape.intermediate) for _ in range(2))
        return self._forward_and_backward(swiglu, [pair])

    def _norms(self) -> Work:
        def both(x: mx.array, y: mx.array) -> mx.array:
            return self.layer.input_layernorm(x) + self.layer.post_attention_layernorm(x + y) + y

        return self._forward_and_backward(both, [tuple(self._random(self.tokens, self.shape.hidden) for _ in "xy")])

    def _forward_and_backward(self, call: Callable[..., mx.array], given: list[Any]) -> Work:
        outputs = [call(*arrays) for arrays in given]
        mx.eval(outputs)

        def work() -> Any:
            again = [call(*arrays) for arrays in given for _ in range(self.forwards - 1)]
            found = [mx.vjp(call, arrays, [out]) for arrays, out in zip(given, outputs, strict=True)]
            return again, found

        return work

    def _scored(self) -> mx.array:
        return self._random(int(self.row.targets.size), self.shape.hidden)

    def _head_products(self) -> Work:
        hidden, head = self._scored(), output_head(self.model)
        project = getattr(head, "as_linear", head)
        logits = self._random(self.chunk, self.shape.vocabulary)

        def work() -> Any:
            found = []
            for start in range(0, hidden.shape[0], self.chunk):
                piece = hidden[start : start + self.chunk]
                found.append((project(piece), mx.vjp(project, [piece], [logits[: len(piece)]])[1]))
                mx.eval(found[-1])  # as in training, one chunk is alive at a time
            return []

        return work

    def _head(self) -> Work:
        hidden, head = self._scored(), output_head(self.model)
        value_and_grad: Any = mx.value_and_grad(lambda h: token_logprobs(h, head, self.row.targets).sum())
        return lambda: value_and_grad(hidden)

    def _optimizer(self) -> Work:
        sizes = [self.shape.matrix(name) for name in LINEAR] * self.shape.layers
        weights = {}
        for number, (inputs, outputs) in enumerate(sizes):
            weights |= {f"{number}.lora_a": mx.zeros((inputs, RANK)), f"{number}.lora_b": mx.zeros((RANK, outputs))}
        gradients = {name: mx.ones_like(array) for name, array in weights.items()}
        mx.eval(weights, gradients)
        optimizer = GroupedAdamW(weights, weight_decay=0.0, betas=(0.9, 0.999))
        return lambda: (optimizer.update(weights, dict(gradients), 1e-4), optimizer.arrays())


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--checkpoint", action="store_true")
    arguments = parser.parse_args()
    loaded = measuring.load(arguments)
    examples = measuring.conversations(loaded, ROOT / "data" / "quickstart" / "sft-train.jsonl", 1024)
    (members,) = measuring.batches(len(examples), arguments.batch_size, 1)
    row = pack_conversations((examples[m].tokens, examples[m].trained) for m in members)
    kinds = Kinds(loaded, row, checkpoint=arguments.checkpoint)
    layers = kinds.shape.layers
    step = our_step(loaded, examples, arguments.checkpoint, micro_tokens=int(row.tokens.size))

    works: dict[str, tuple[Work, int]] = {name: (work, layers) for name, work in kinds.of_a_layer().items()}
    works |= {name: (work, 1) for name, work in kinds.once().items()}
    sides: dict[str, Callable[[int], object]] = {"step": lambda _: step(members)}
    sides |= {name: (lambda _, work=work: mx.eval(work())) for name, (work, _) in works.items()}
    readings = measuring.take_turns(sides, range(arguments.repeats), keep_cache=True)
    seconds = {
        name: statistics.median(reading.seconds for reading in found) * works.get(name, (None, 1))[1]
        for name, found in readings.items()
    }
    tell(seconds, f"{arguments.model}, {arguments.batch_size} conversations, {row.tokens.size} tokens")
    measuring.write(arguments.json, measuring.about(arguments), seconds)


def tell(seconds: dict[str, float], title: str) -> None:
    """Each kind's share of the step."""
    step = seconds["step"]
    bare = sum(value for name, value in seconds.items() if name.startswith("products"))
    rows = {name: value for name, value in seconds.items() if name.startswith("products")}
    rows["attention beyond its products"] = seconds["attention"] - seconds["products: attention"]
    rows["head beyond its products"] = seconds["head"] - seconds["products: head"]
    rows |= {name: seconds[name] for name in ("activation", "norms and sums", "optimizer")}
    rows["LoRA's sums, caches, what is left"] = step - sum(rows.values())
    print(f"{title}: a step takes {step:.3f} s")
    for name, value in rows.items():
        print(f"  {name:36}{value:8.3f} s{value / step:8.1%}")
    print(f"step over its bare matrix products: {step / bare:.2f}x")


if __name__ == "__main__":
    main()
