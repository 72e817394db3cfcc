"""The gated delta rule over a packed tree of segments: the recurrent layers of Qwen3.5 and Qwen3-Next.

A head keeps a matrix S, and each token changes it:

    S_t = g_t S_(t-1) + u_t k_t^T      with  u_t = beta_t (v_t - g_t S_(t-1) k_t)
    y_t = S_t q_t

Read token by token, a row of T tokens is T small products in sequence, and a gradient keeps T matrices. So tokens are
taken in chunks. Let G_i be the product of the gates from the start of the chunk to token i, S the matrix before the
chunk, and k_i.k_j a product of keys. Then the u of a chunk solve a triangular system:

    u_i + beta_i sum_(j<i) (G_i/G_j) (k_i.k_j) u_j = beta_i (v_i - G_i S k_i)

Its inverse depends on the chunk alone, so it is computed for all chunks at once. What is left in sequence is one step
a chunk. A segment begins with the matrix at the end of its parent; segments whose parents are done go on together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_zh.core.packing import Segment
from mlx_zh.core.splitting import split_at

CHUNKS = (16, 32, 64)  # tokens
_STEP = 8  # a step from chunk to chunk takes as long as so many tokens of one


def chunk_for(lengths: Sequence[int]) -> int:
    """The tokens of a chunk for segments of these lengths: long segments want few steps, short ones little filling.

    Measured with 16 heads of 128 on a CPU; time and memory go with the tokens of all chunks, filled ones included.
    """
    return min(CHUNKS, key=lambda chunk: sum(-(-length // chunk) for length in lengths) * (chunk + _STEP))


def gated_delta(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    log_gates: mx.array,
    betas: mx.array,
    segments: Sequence[Segment],
    *,
    before: mx.array | None = None,
    chunk: int | None = None,
) -> tuple[mx.array, list[mx.array]]:
    """The outputs (T, V, d) float32 of a row, and the matrix (V, d, c) at the end of each segment.

    `queries` and `keys` are (T, K, c), `values` (T, V, d), `log_gates` and `betas` (T, V), with V heads of values and
    K of keys, each for V/K of them. Roots begin with the matrices `before` (V, d, c), or with zeros. `chunk` is a
    power of two (default: `chunk_for`).
    """
    chunk = chunk or chunk_for([len(segment) for segment in segments])
    pieces = _pieces(segments, chunk)
    k, q = (_chunked(x, pieces, chunk) for x in (keys, queries))  # (N, K, C, c)
    v, beta, log_gate = (_chunked(x, pieces, chunk) for x in (values, betas[..., None], log_gates[..., None]))
    repeats = values.shape[1] // keys.shape[1]

    total = mx.cumsum(log_gate[..., 0], axis=-1)  # (N, V, C): log G
    causal = mx.tril(mx.ones((chunk, chunk), dtype=mx.bool_))
    decay = mx.exp(mx.where(causal, total[..., :, None] - total[..., None, :], -mx.inf))  # (N, V, C, C): G_i/G_j
    products = mx.repeat(k @ k.swapaxes(-1, -2), repeats, axis=1)  # (N, V, C, C)
    inverse = unit_triangular_inverse(mx.tril(beta * decay * products, -1))
    scores = mx.repeat(q @ k.swapaxes(-1, -2), repeats, axis=1) * decay  # (N, V, C, C)

    k, q = mx.repeat(k, repeats, axis=1), mx.repeat(q, repeats, axis=1)  # (N, V, C, c)
    gate = mx.exp(total)[..., None]
    own = inverse @ (beta * v)  # (N, V, C, d): u without what came before
    seen = inverse @ (beta * gate * k)  # (N, V, C, c): what u loses to S
    read = gate * q  # (N, V, C, c)
    kept = mx.exp(total[..., -1:] - total)[..., None] * k  # (N, V, C, c): k_j G_C/G_j
    faded = gate[..., -1:, :]  # (N, V, 1, 1): G_C

    outputs, ends = _waves(pieces, (own, seen, read, kept, faded, scores), before)
    return _joined(outputs, pieces), ends


class _Piece:
    """A chunk of a segment: row positions `start` to `stop`, and where its matrix comes from."""

    def __init__(self, start: int, stop: int, previous: int | None) -> None:
        self.start, self.stop = start, stop
        self.previous = previous  # index of the chunk before it; None for the first one of a root
        self.is_last = False  # of its segment


def _pieces(segments: Sequence[Segment], chunk: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    last: list[int] = []  # index of each segment's last chunk
    for segment in segments:
        previous = None if segment.parent is None else last[segment.parent]
        for start in range(segment.start, segment.stop, chunk):
            pieces.append(_Piece(start, min(start + chunk, segment.stop), previous))
            previous = len(pieces) - 1
        pieces[-1].is_last = True
        last.append(len(pieces) - 1)
    return pieces


def _chunked(values: mx.array, pieces: Sequence[_Piece], chunk: int) -> mx.array:
    """Cut (T, H, x) into chunks (N, H, C, x), float32. A chunk is filled up with zeros, which change no matrix."""
    parts = split_at(values.astype(mx.float32), [piece.start for piece in pieces[1:]], axis=0)
    return mx.stack([mx.pad(part, [(0, chunk - len(part)), (0, 0), (0, 0)]) for part in parts]).swapaxes(1, 2)


def _joined(outputs: mx.array, pieces: Sequence[_Piece]) -> mx.array:
    """The rows (T, V, d) of chunks (N, V, C, d)."""
    count, heads, chunk, size = outputs.shape
    rows = outputs.swapaxes(1, 2).reshape(count * chunk, heads, size)
    lengths = [piece.stop - piece.start for piece in pieces]
    if all(length == chunk for length in lengths):
        return rows
    return rows[mx.array([i * chunk + j for i, length in enumerate(lengths) for j in range(length)])]


Parts = tuple[mx.array, ...]  # own, seen, read, kept, faded, scores of each chunk


def _waves(pieces: Sequence[_Piece], parts: Parts, before: mx.array | None) -> tuple[mx.array, list[mx.array]]:
    """The outputs (N, V, C, d) of the chunks, and the matrix (V, d, c) at the end of each segment.

    The gradient is written out: MLX's own keeps several times as much.
    """
    heads, _, value_size = parts[0].shape[1:]
    first = mx.zeros((heads, value_size, parts[1].shape[-1])) if before is None else before.astype(mx.float32)

    @mx.custom_function
    def chain(first: mx.array, *parts: mx.array) -> tuple[mx.array, ...]:
        return _forward(pieces, parts, first)

    @chain.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        _, *parts = primals
        _, starts, _ = outputs
        return _backward(pieces, tuple(parts), starts, cotangents[0], cotangents[2])

    results: Any = chain(first, *parts)
    outputs, _, ends = results
    return outputs, [end[0] for end in split_at(ends, range(1, len(ends)), axis=0)]


def _order(pieces: Sequence[_Piece]) -> list[list[int]]:
    """The chunks in waves: those of a wave only need chunks of the waves before it."""
    depth: list[int] = []
    for piece in pieces:
        depth.append(0 if piece.previous is None else depth[piece.previous] + 1)
    return [[i for i, level in enumerate(depth) if level == wave] for wave in range(max(depth) + 1)]


def _taken(waves: Sequence[Sequence[int]], parts: Parts) -> list[list[mx.array]]:
    """Each part, cut into the chunks of each wave."""
    cuts = [sum(map(len, waves[:n])) for n in range(1, len(waves))]
    return [list(mx.split(_rearranged(part, _flat(waves)), cuts, axis=0)) for part in parts]


def _in_place(waves: Sequence[Sequence[int]], values: Sequence[mx.array]) -> mx.array:
    """The values of all waves in the order of the chunks."""
    order = _flat(waves)
    return _rearranged(mx.concatenate(list(values)), sorted(range(len(order)), key=order.__getitem__))


def _flat(waves: Sequence[Sequence[int]]) -> list[int]:
    return [i for wave in waves for i in wave]


def _rearranged(values: mx.array, order: list[int]) -> mx.array:
    return values if order == sorted(order) else values[mx.array(order)]


def _forward(pieces: Sequence[_Piece], parts: Parts, first: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Outputs (N, V, C, d) of the chunks, matrices (N, V, d, c) before each, and those at the ends of segments."""
    waves = _order(pieces)
    states: dict[int | None, mx.array] = {None: first}
    outputs, starts = list[mx.array](), list[mx.array]()
    for wave, own, seen, read, kept, faded, scores in zip(waves, *_taken(waves, parts), strict=True):
        state = mx.stack([states[pieces[i].previous] for i in wave])  # (n, V, d, c)
        turned = state.swapaxes(-1, -2)  # (n, V, c, d)
        u = own - seen @ turned  # (n, V, C, d)
        outputs.append(read @ turned + scores @ u)
        starts.append(state)
        after = faded * state + u.swapaxes(-1, -2) @ kept
        states.update({i: after[n] for n, i in enumerate(wave)})
    ends = mx.stack([states[i] for i, piece in enumerate(pieces) if piece.is_last])
    return _in_place(waves, outputs), _in_place(waves, starts), ends


def _backward(
    pieces: Sequence[_Piece], parts: Parts, starts: mx.array, of_outputs: mx.array, of_ends: mx.array
) -> tuple[mx.array, ...]:
    """The gradients of the first matrix and of each part, from those of outputs and last matrices.

    `starts` are the matrices before each chunk. Only what goes from chunk to chunk is computed wave by wave.
    """
    own, seen, read, kept, faded, scores = parts
    waves = _order(pieces)
    through_scores = scores.swapaxes(-1, -2) @ of_outputs  # (N, V, C, d)
    through_read = of_outputs.swapaxes(-1, -2) @ read  # (N, V, d, c)
    cut = _taken(waves, (through_scores, through_read, seen, kept, faded))
    last = [i for i, piece in enumerate(pieces) if piece.is_last]
    # Gradients of a chunk's last matrix: of the segment's end, and from the chunks that follow it.
    later: dict[int | None, list[mx.array]] = {i: [of_ends[n]] for n, i in enumerate(last)}
    of_u, of_states = list[mx.array](), list[mx.array]()
    for n in reversed(range(len(waves))):
        by_scores, by_read, wave_seen, wave_kept, wave_faded = (part[n] for part in cut)
        of_state = mx.stack([_sum(later.pop(i)) for i in waves[n]])  # (n, V, d, c)
        of_states.append(of_state)
        of_u.append(by_scores + wave_kept @ of_state.swapaxes(-1, -2))
        of_start = wave_faded * of_state + by_read - of_u[-1].swapaxes(-1, -2) @ wave_seen
        for m, i in enumerate(waves[n]):
            later.setdefault(pieces[i].previous, []).append(of_start[m])
    change = _in_place(waves, of_u[::-1])  # (N, V, C, d)
    after = _in_place(waves, of_states[::-1])  # (N, V, d, c)
    u = own - seen @ starts.swapaxes(-1, -2)
    of_faded = (after * starts).sum(axis=(-1, -2), keepdims=True)
    of_scores = of_outputs @ u.swapaxes(-1, -2)
    return _sum(later[None]), change, -(change @ starts), of_outputs @ starts, u @ after, of_faded, of_scores


def _sum(arrays: Sequence[mx.array]) -> mx.array:
    return sum(arrays[1:], arrays[0])


def unit_triangular_inverse(lower: mx.array) -> mx.array:
    """The inverse of I + `lower` (…, C, C), whose entries on and above the diagonal are zero; C is a power of two.

    Blocks are inverted in pairs, from single numbers up, which is substitution and as stable: no power of `lower` is
    formed, whose entries can grow beyond float32.
    """

    @mx.custom_function
    def inverse(lower: mx.array) -> mx.array:
        return _inverse(lower)

    @inverse.vjp
    def vjp(lower: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        turned = output.swapaxes(-1, -2)
        return mx.tril(-(turned @ cotangent @ turned), -1)

    result: Any = inverse(lower)
    return result


def _inverse(lower: mx.array) -> mx.array:
    *batch, size, _ = lower.shape
    result = mx.broadcast_to(mx.eye(size), lower.shape)
    width = 1
    while width < size:
        # The diagonal blocks of twice this width: [[A, 0], [B, D]] has the inverse [[A', 0], [-D' B A', D']].
        pairs = size // (2 * width)

        def blocks(x: mx.array, row: int, column: int, width: int = width, pairs: int = pairs) -> mx.array:
            """The blocks (…, pairs, width, width) at this place of each pair."""
            cut = x.reshape(*batch, pairs, 2, width, pairs, 2, width)[..., row, :, :, column, :]
            return mx.diagonal(cut, axis1=-4, axis2=-2).moveaxis(-1, -3)

        first, second = blocks(result, 0, 0), blocks(result, 1, 1)
        corner = -(second @ blocks(lower, 1, 0) @ first)
        top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        pair = mx.concatenate([top, mx.concatenate([corner, second], axis=-1)], axis=-2)  # (…, pairs, 2w, 2w)
        width *= 2
        placed = pair[..., :, :, None, :] * mx.eye(pairs)[:, None, :, None]  # (…, pairs, 2w, pairs, 2w)
        result = placed.reshape(*batch, size, size)
    return result


def convolved(
    inputs: mx.array, weight: mx.array, segments: Sequence[Segment], tail: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """The causal convolution (T, E) of each channel of `inputs` (T, E) with `weight` (E, W, 1), along each path.

    A segment sees the last W - 1 inputs of its ancestors; a root those of `tail` (W - 1, E), or zeros. The second
    result is such a tail at the end of the last segment.
    """
    size, width = inputs.shape[1], weight.shape[1]
    parts = split_at(inputs, [segment.start for segment in segments[1:]], axis=0)
    start = mx.zeros((width - 1, size), dtype=inputs.dtype) if tail is None else tail
    tails: list[mx.array] = []
    extended: list[mx.array] = []  # each segment after the W - 1 inputs before it
    for segment, part in zip(segments, parts, strict=True):
        head = start if segment.parent is None else tails[segment.parent]
        extended += [head, part]
        tails.append(mx.concatenate([head, part])[len(segment) :])
    outputs = _depthwise(mx.concatenate(extended), weight)  # (T + n (W - 1) - (W - 1), E)
    bounds = [length for segment in segments for length in (len(segment), width - 1)]
    cuts = [sum(bounds[: i + 1]) for i in range(len(bounds) - 2)]
    return mx.concatenate(split_at(outputs, cuts, axis=0)[::2]), tails[-1]


def _depthwise(inputs: mx.array, weight: mx.array) -> mx.array:
    """The sums (T - W + 1, E) over i of inputs[t + i] * weight[:, i], of `inputs` (T, E) and `weight` (E, W, 1).

    MLX's convolution with a group for each channel takes ten times as long on a CPU.
    """

    @mx.custom_function
    def convolution(inputs: mx.array, weight: mx.array) -> mx.array:
        return _weighted(inputs, weight)

    @convolution.vjp
    def vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        inputs, weight = primals
        width, count = weight.shape[1], cotangent.shape[0]
        padded = mx.pad(cotangent, [(width - 1, width - 1), (0, 0)])
        products = [(cotangent * inputs[i : i + count]).sum(axis=0) for i in range(width)]
        return _weighted(padded, weight[:, ::-1]), mx.stack(products, axis=1)[..., None]

    result: Any = convolution(inputs, weight)
    return result


def _weighted(inputs: mx.array, weight: mx.array) -> mx.array:
    width = weight.shape[1]
    count = inputs.shape[0] - width + 1
    columns = [weight[:, i, 0] for i in range(width)]
    return _sum_of_products([inputs[i : i + count] for i in range(width)], columns)


@partial(mx.compile, shapeless=True)
def _sum_of_products(rows: list[mx.array], columns: list[mx.array]) -> mx.array:
    total = mx.zeros((), dtype=mx.float32)
    for row, column in zip(rows, columns, strict=True):
        total = total + row.astype(mx.float32) * column.astype(mx.float32)
    return total.astype(rows[0].dtype)
