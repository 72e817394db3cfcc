"""How far two float32 computations of one number may lie apart, derived and not fitted to a processor.

Sums are rounded in an order that the BLAS kernels, their threads and the shapes of the matrices decide. The bounds
here hold for all orders, and `make test-cores` tries those that this processor has. The largest share of a bound that
was seen is a quarter, with OpenBLAS's kernels for Prescott, Nehalem, Sandybridge, Haswell and SkylakeX, the latter
three also on two threads. Real faults lie above: one scored token of 34 too many changes a loss by some percent.
"""

from __future__ import annotations

from math import log, pi, sqrt

UNIT = 2.0**-24  # one float32 operation is off by at most this share of its result

# The largest of 10,000 normal errors is about sqrt(2 log 10,000) = 4.3 standard deviations.
LARGEST = sqrt(2 * log(10_000))

# Both sides of a comparison are rounded, independently.
BOTH = sqrt(2)


def rounding(terms: int) -> float:
    """Standard deviation of a float32 sum of products, as a share of its typical size.

    After k of n terms of size s and either sign the partial sum is about sqrt(k) s; its rounding is uniform within
    UNIT of that, so of variance k s^2 UNIT^2 / 3. Over all k that adds up to n^2 s^2 UNIT^2 / 6, and the result is
    about sqrt(n) s. A blocked sum is rounded less.
    """
    return sqrt(terms / 6) * UNIT


def product(terms: int) -> float:
    """The largest difference in a matrix product over `terms` terms, as a share of its entries' typical size."""
    return LARGEST * BOTH * rounding(terms)


# The tiny model of conftest.py: blocks of width 64, MLPs of width 96.
WIDEST = 96
# Operations in a row through one block: norm, queries, scores, mean of values, output, norm, up, down.
IN_A_ROW = 8


def hidden(layers: int = 3) -> float:
    """The largest difference of hidden states after `layers` blocks; the last norm makes them about 1 in size.

    Independent errors of the operations in a row add up as squares. What follows an error makes it 3 sqrt(layers)
    times as large: a relative change of 0.001 in the embeddings changes the last hidden states by 0.0030, 0.0045 and
    0.0056 of their size after 1, 2 and 3 blocks (families llama, qwen2 and mistral; qwen3 less).
    """
    return product(WIDEST) * sqrt(IN_A_ROW * layers) * 3 * sqrt(layers)


def gradient(layers: int = 3) -> float:
    """The largest difference of a gradient, as a share of its array's largest entry (`oracles.distance`).

    The backward pass has as many operations in a row as the forward pass. Here the largest entry's factor was
    measured, so that `LARGEST` is in it: a relative change of 0.0001 in the embeddings changes the gradients by up
    to 0.0010, 0.0018 and 0.0028 of their largest entries with 1, 2 and 3 blocks, so it is about 10 times `layers`.
    """
    return BOTH * rounding(WIDEST) * sqrt(2 * IN_A_ROW * layers) * 10 * layers


HIDDEN = hidden()  # 4e-5
GRADIENT = gradient()  # 7e-5

# A logit is the product of a hidden state and a row of the head, whose length is 1.5.
LOGITS = 1.5 * HIDDEN  # 6e-5

# A log-prob moves by (row of the target - mean of the rows) times the change of a hidden state; the difference of two
# rows is sqrt(2) times as long as one.
ONE_LOGPROB = sqrt(2) * LOGITS  # 8e-5

# Sums and means of log-probs, as a share: one is -log 300 = -5.7 or less on average, the vocabulary being 300 words.
LOGPROBS = ONE_LOGPROB / log(300)  # 1.4e-5

# A mean over n independent tokens is sqrt(n) times better; every loss that is compared with this has at least 12.
LOSS = LOGPROBS / sqrt(12)  # 4e-6

# Weights after Adam's steps, by norm, as a share of the norm of what they moved. Adam divides each entry's gradient g
# by its own size, so an error e moves the entry by min(2, e / |g|) learning rates more or less: near g = 0 the sign
# is rounding. With |g| of density p at 0, the mean square of that is 2 p e from |g| < e / 2, and as much from the
# rest. In units of an array's largest entry, at `LARGEST` standard deviations, p is LARGEST * sqrt(2 / pi), and a
# typical error is GRADIENT / LARGEST.
MOVED = sqrt(4 * sqrt(2 / pi) * GRADIENT)  # 1.5e-2


def later_loss(rate: float, weights: int, steps: int) -> float:
    """The difference of the losses, and of the gradient norms, after Adam's steps, as a share.

    An error e in the gradient g moves an entry by rate * e / |g|, and that moves the loss by |g| times as much: the
    division cancels. All entries at once move it by at most rate * sqrt(weights) * (norm of the errors), and that
    norm is GRADIENT times the gradient's, which is clipped to 1. Steps are independent, and a loss is about log 300.
    """
    return rate * sqrt(weights * steps) * GRADIENT / log(300)
