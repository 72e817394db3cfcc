"""Where a model's arrays are: the same arrays as MLX's own trees of parameters, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from families import family_model
from mlx.utils import tree_flatten

from mlx_zh.core.places import place_of, put, trained_places
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec

Make = Callable[..., Any]


class Nested(nn.Module):
    """Arrays in lists and dicts, a frozen one, one with a private name, and no array at all."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = [nn.Linear(2, 2), mx.zeros(1), {"deep": mx.zeros(2), "none": None}]
        self.named = {"one": nn.Linear(2, 3, bias=False), "two": [mx.zeros(3)]}
        self.frozen, self._private, self.plain = mx.zeros(4), mx.zeros(5), 3
        self.freeze(keys=["frozen"], recurse=False)


def models() -> dict[str, Callable[[], Any]]:
    def adapted(family: str, kind: str, layers: int = 3, saved: tuple[str, ...] = (), **form: Any) -> Any:
        model = family_model(family, **form)
        add_adapter(model, AdapterSpec(kind, num_layers=layers, rank=2, saved=saved), seed=0)
        return model

    return {
        "nested": Nested,
        "lora": lambda: adapted("llama", "lora", quantized=4),
        "dora on the last block": lambda: adapted("qwen2", "dora", layers=1),
        "tables": lambda: adapted("llama", "lora", saved=("embed_tokens", "lm_head")),
        "full": lambda: adapted("qwen3", "full"),
        "experts": lambda: adapted("qwen3_moe", "lora"),
        "a gated delta net": lambda: adapted("qwen3_5", "full"),
    }


@pytest.mark.parametrize("name", models())
def test_trained_places_are_those_of_the_trainable_parameters(name: str) -> None:
    model = models()[name]()
    arrays = [array for _, array in tree_flatten(model.trainable_parameters()) if isinstance(array, mx.array)]
    found = [holder[key] for holder, key in trained_places(model)]
    assert found and [id(array) for array in found] == [id(array) for array in arrays]


@pytest.mark.parametrize("name", models())
def test_arrays_are_put_where_their_names_say(name: str) -> None:
    """MLX's own `parameters` then has them."""
    model = models()[name]()
    new = {name: array + 1 for name, array in trainable(model).items() if isinstance(array, mx.array)}
    put([place_of(model, name) for name in new], list(new.values()))
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is array for name, array in new.items())


@pytest.mark.parametrize("name", ["model.layers.0.mlp.none", "model.layers.9.mlp.up_proj.weight", "model.layers"])
def test_a_name_that_the_model_does_not_have_is_refused(tiny_model: Make, name: str) -> None:
    with pytest.raises((KeyError, IndexError)):
        place_of(tiny_model("llama"), name)
