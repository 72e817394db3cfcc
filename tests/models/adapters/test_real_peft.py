"""Adapters that PEFT itself trained and saved: each is read and gives PEFT's logits, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_models import TEXT_IDS, logits
from tuned import make_tuned

from mlx_zh.errors import AdapterError
from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.load import load_model

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),
]
TARGETS = ["q_proj", "v_proj", "down_proj"]
# float32 on both sides: some 1e-5 at logits of about 10. Each adapter moves the logits by more than 1.
LIMIT = 2e-4


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


class Lab:
    """A tiny base in PyTorch and in MLX."""

    def __init__(self, folder: Any) -> None:
        self.torch, self.peft = pytest.importorskip("torch"), pytest.importorskip("peft")
        self.folder, self.base = folder / "peft", make_tuned(folder).base
        self.tokens = self.torch.tensor([TEXT_IDS])

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base, dtype=self.torch.float32)

    def config(self, **settings: Any) -> Any:
        return self.peft.LoraConfig(
            **({"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings)
        )

    def part(self, name: str, **settings: Any) -> Any:
        """One of the objects that LoraConfig holds."""
        from importlib import import_module

        return getattr(import_module("peft.tuners.lora.config"), name)(**settings)

    def train(self, model: Any) -> np.ndarray:
        """Three steps; returns the logits after them."""
        optimizer = self.torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            model(self.tokens, labels=self.tokens).loss.backward()
            optimizer.step()
        model.eval()
        with self.torch.no_grad():
            return model(self.tokens).logits[0].numpy()

    def saved(self, config: Any, prepare: Callable[[Any], None] = lambda model: None) -> np.ndarray:
        """Train a new adapter and save it in `folder`; returns the logits of base + adapter."""
        self.torch.manual_seed(0)
        model = self.peft.get_peft_model(self.model(), config)
        prepare(model)
        expected = self.train(model)
        model.save_pretrained(self.folder)
        return expected

    def read(self) -> np.ndarray:
        """The logits of the base with the folder that PEFT saved."""
        loaded = load_model(str(self.base))
        before = logits(loaded.model)
        load_adapter(loaded.model, self.folder)
        loaded.model.eval()
        after = logits(loaded.model)
        assert np.abs(after - before).max() > 1
        return after


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {
            "rank_pattern": {r"layers\.0.*q_proj": 2, "down_proj": 6, "^q_proj": 3},
            "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3, "^v_proj": 90, ".*down_proj": 5},
        },
        {"init_lora_weights": "gaussian", "fan_in_fan_out": True, "layers_to_transform": [1]},
        {"init_lora_weights": "orthogonal", "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"init_lora_weights": "mica"},
        {"target_modules": [*TARGETS, "lm_head"], "rank_pattern": {"lm_head": 2}},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_what_is_lora_or_dora_is_read(lab, settings):
    expected = lab.saved(lab.config(**settings))
    np.testing.assert_allclose(lab.read(), expected, atol=LIMIT)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_eva_leaves_the_base_as_it_is(lab, settings):
    """EVA sets A to directions of the inputs and B to zero, and gives each module a rank: all of that is saved."""

    def prepare(model: Any) -> None:
        rows = [{"input_ids": lab.tokens[0], "attention_mask": lab.torch.ones_like(lab.tokens[0])}] * 8
        loader = lab.torch.utils.data.DataLoader(rows, batch_size=2)
        lab.peft.initialize_lora_eva_weights(model, loader, show_progress_bar=False)

    config = lab.config(init_lora_weights="eva", eva_config=lab.peft.EvaConfig(rho=2.0), **settings)
    expected = lab.saved(config, prepare)
    np.testing.assert_allclose(lab.read(), expected, atol=LIMIT)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_an_initialisation_that_changes_the_base_is_read_once_it_is_converted(lab, start, settings):
    model = lab.peft.get_peft_model(lab.model(), lab.config(init_lora_weights=start, **settings))
    config = model.peft_config["default"]
    config.init_lora_weights = True  # as PEFT's documentation tells users to save the state before training
    untrained = lab.folder.parent / "untrained"
    model.save_pretrained(untrained)
    config.init_lora_weights = start
    expected = lab.train(model)
    model.save_pretrained(lab.folder)
    with pytest.raises(AdapterError, match=f"init_lora_weights '{start}'.*path_initial_model_for_weight_conversion"):
        lab.read()
    model.save_pretrained(lab.folder, path_initial_model_for_weight_conversion=str(untrained))
    np.testing.assert_allclose(lab.read(), expected, atol=LIMIT)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alora_invocation_tokens": [40, 41]}, "alora_invocation_tokens"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"),
        ({"trainable_token_indices": [3, 7]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
        ({"velora_config": ("VeloraConfig", {})}, "velora_config"),
        ({"monteclora_config": ("MontecloraConfig", {})}, "monteclora_config"),
        ({"kasa_config": ("KasaConfig", {})}, "kasa_config"),
        ({"use_bdlora": ("BdLoraConfig", {"target_modules_bd_a": ["q_proj"], "match_strict": False})}, "use_bdlora"),
    ],
)
def test_every_other_lora_is_refused_by_name(lab, settings, named):
    """The object of a configuration is built here, because the module is imported only if PEFT is there."""
    made = {key: lab.part(*v[:1], **v[1]) if isinstance(v, tuple) else v for key, v in settings.items()}
    lab.saved(lab.config(**made))
    with pytest.raises(AdapterError, match=rf"\b{named}\b.*[mM]erge"):
        lab.read()


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("IA3Config", {"target_modules": TARGETS, "feedforward_modules": ["down_proj"]}, "IA3"),
        ("VeraConfig", {"target_modules": ["q_proj"], "r": 4}, "VERA"),
        ("LoHaConfig", {"target_modules": TARGETS, "r": 4}, "LOHA"),
        ("PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}, "PREFIX_TUNING"),
    ],
)
def test_other_methods_are_refused_by_name(lab, name, settings, kind):
    lab.saved(getattr(lab.peft, name)(**settings))
    with pytest.raises(AdapterError, match=f"peft_type '{kind}' cannot be read"):
        lab.read()
