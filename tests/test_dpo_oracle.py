"""DPO and KTO against PyTorch: transformers' own Llama with the same LoRA, and TRL's trainers if it is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from oracles import distance
from tolerances import LOGPROBS

from mlx_zh.core.losses import LOSSES
from mlx_zh.corpus.rendered import RenderedAnswer, RenderedPair
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.recipe import Dpo
from mlx_zh.training.dpo_objective import DpoObjective
from mlx_zh.training.kto_objective import KtoObjective
from mlx_zh.training.mismatched import MismatchedAnswers
from mlx_zh.training.objective import Settings
from mlx_zh.training.reference import Reference, ReferenceStore
from mlx_zh.training.step import loss_and_gradients, set_weights

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # the peers' warnings are theirs
torch = pytest.importorskip("torch")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = [(9, 5, 12), (4, 8, 3), (14, 2, 2), (6, 10, 7)]  # prompt, chosen, rejected
SCALE, RANK = 2.0, 4


def randomly(weights: dict[str, mx.array], seed: int, scale: float = 0.05) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {name: mx.array(rng.normal(size=w.shape) * scale, mx.float32) for name, w in weights.items()}


def pairs_below(vocabulary: int, count: int) -> list[RenderedPair]:
    rng = np.random.default_rng(4)
    return [
        RenderedPair(*(rng.integers(3, vocabulary, size).astype(np.int32) for size in sizes))
        for sizes in SIZES[:count]
    ]


class Ours:
    """A policy that moved away from its start, which is the reference."""

    def __init__(self, model: Any, folder: Path, count: int = len(SIZES)) -> None:
        self.model = model
        add_adapter(model, AdapterSpec("lora", len(model.layers), rank=RANK, scale=SCALE), seed=0)
        self.start = randomly(trainable(model), seed=1)
        self.policy = {
            name: self.start[name] + step for name, step in randomly(self.start, seed=2, scale=0.02).items()
        }
        self.pairs = pairs_below(model.args.vocab_size, count)
        set_weights(model, self.start)
        reference = Reference(ReferenceStore(folder / "reference.txt"), self.pairs)
        list(reference.compute(model, row_tokens=40))
        self.reference, self.folder = reference.logprobs(self.pairs), folder
        set_weights(model, self.policy)

    def step(self, **section: Any) -> tuple[float, dict[str, float], dict[str, mx.array]]:
        objective = DpoObjective(self.pairs, self.reference, Dpo(**section), Settings(seed=0, micro_tokens=40))
        rows = objective.rows(np.arange(len(self.pairs)), 0)
        loss, sums, slopes = loss_and_gradients(self.model, objective, rows, self.policy)
        return float(loss), objective.metrics({name: float(value) for name, value in sums.items()}), slopes


def torch_model(model: Any) -> Any:
    """transformers' Llama with the same base weights, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args = model.args
    names = "hidden_size num_hidden_layers intermediate_size num_attention_heads num_key_value_heads rms_norm_eps"
    config = LlamaConfig(
        **{name: getattr(args, name) for name in names.split()},
        vocab_size=args.vocab_size,
        head_dim=args.head_dim,
        tie_word_embeddings=args.tie_word_embeddings,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        attn_implementation="eager",
    )
    found = LlamaForCausalLM(config).float().eval()
    state = {
        name.replace(".linear.", "."): torch.tensor(np.array(array))
        for name, array in tree_flatten(model.parameters())
        if not name.endswith(("lora_a", "lora_b"))
    }
    missing, unexpected = found.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    found.tie_weights()
    return found.requires_grad_(False)


@pytest.fixture
def ours(tiny_model: Callable[..., Any], tmp_path: Path) -> Ours:
    return Ours(tiny_model(), tmp_path)


def test_log_probs_loss_and_gradient_equal_those_of_transformers(ours: Ours) -> None:
    compare_with_transformers(ours, tolerance=LOGPROBS)


@pytest.mark.network
@pytest.mark.slow
def test_the_same_on_smollm2(smollm2_path: Path, tmp_path: Path) -> None:
    from mlx_zh.models.load import BUILT_IN, load_model

    compare_with_transformers(Ours(load_model(BUILT_IN).model, tmp_path, count=2), tolerance=1e-4)


def compare_with_transformers(ours: Ours, tolerance: float) -> None:
    """Each response by itself through a model whose linear layers have the LoRA term added by a hook."""
    model = torch_model(ours.model)
    modules = dict(model.named_modules())
    current: dict[str, Any] = {}

    def adapted(name: str) -> None:
        def hook(_module: Any, inputs: Any, output: Any) -> Any:
            a, b = current[f"{name}.lora_a"], current[f"{name}.lora_b"]
            return output + SCALE * (inputs[0] @ a) @ b

        modules[name].register_forward_hook(hook)

    for name in {name.rpartition(".")[0] for name in ours.policy}:
        adapted(name)

    def sums(weights: dict[str, mx.array], grad: bool) -> Any:
        current.update({n: torch.tensor(np.array(w), requires_grad=grad) for n, w in weights.items()})
        found = []
        for pair in ours.pairs:
            for response in (pair.chosen, pair.rejected):
                tokens = torch.tensor(np.concatenate([pair.prompt, response]).astype(np.int64))
                logprobs = torch.log_softmax(model(tokens[None]).logits[0, :-1], dim=-1)
                scored = logprobs.gather(1, tokens[1:, None])[len(pair.prompt) - 1 :]
                found.append(scored.sum())
        return torch.stack(found).reshape(-1, 2)

    with torch.no_grad():
        reference = sums(ours.start, grad=False)
    np.testing.assert_allclose(ours.reference[:, :2], reference.numpy(), rtol=tolerance)
    policy = sums(ours.policy, grad=True)
    margins = 0.1 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    value, figures, slopes = ours.step()
    assert figures["logps/chosen"] == pytest.approx(policy[:, 0].mean().item(), rel=tolerance)
    assert figures["rewards/margins"] == pytest.approx(margins.mean().item(), rel=20 * tolerance, abs=1e-4)
    assert value == pytest.approx(loss.item(), rel=tolerance)
    expected = {name: current[name].grad.numpy() for name in slopes}
    assert distance(slopes, expected) < 20 * tolerance


# TRL


@pytest.fixture
def trainer(ours: Ours, byte_tokenizer: Any, tmp_path: Path) -> Any:
    """A DPOTrainer whose "ref" adapter is our start, and whose trained one is our policy."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset

    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(torch_model(ours.model), config)
    put(model, ours.start)
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False
    )
    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    found = trl.DPOTrainer(model, args=arguments, train_dataset=texts, processing_class=byte_tokenizer)
    put(found.model, ours.policy)
    return found


def put(model: Any, weights: dict[str, mx.array]) -> None:
    """Our matrices are the transposes of PEFT's."""
    for name, parameter in peft_names(model, weights).items():
        parameter.data.copy_(torch.tensor(np.array(weights[name].T)))


def peft_names(model: Any, weights: dict[str, mx.array]) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    return {
        name: parameters[f"base_model.model.{name[:-7]}.lora_{name[-1].upper()}.default.weight"] for name in weights
    }


CASES = [
    *(
        (loss, {"label_smoothing": 0.1 if LOSSES[loss].smoothing else 0.0})
        for loss in LOSSES
        if LOSSES[loss].reference
    ),
    ("sigmoid", {"ld_alpha": 0.3}),
    ("ipo", {"ld_alpha": 0.3}),
    ("sigmoid", {"f_divergence": "forward_kl"}),
    ("ipo", {"f_divergence": "js"}),
    ("hinge", {"f_divergence": "alpha"}),
]


def test_losses_figures_and_gradients_equal_trls(ours: Ours, trainer: Any) -> None:
    """The same batch through `compute_loss`, for every loss that TRL has."""
    names = {"js": "js_divergence", "alpha": "alpha_divergence"}
    for loss, options in CASES:
        if loss == "sigmoid" and "label_smoothing" in options:
            options = {}  # TRL's sigmoid has no label smoothing any more
        trainer.loss_types, trainer.beta = [loss], 0.3
        trainer.label_smoothing = options.get("label_smoothing", 0.0)
        trainer.ld_alpha = options.get("ld_alpha")
        divergence = options.get("f_divergence", "reverse_kl")
        trainer.f_divergence_type = names.get(divergence, divergence)
        batch = trainer.data_collator(
            [
                {f"{name}_ids": getattr(pair, name).tolist() for name in ("prompt", "chosen", "rejected")}
                for pair in ours.pairs
            ]
        )
        trainer._metrics["train"].clear()
        trainer.model.train()
        trainer.model.zero_grad()
        expected = trainer.compute_loss(trainer.model, batch)
        expected.backward()
        value, figures, slopes = ours.step(loss=loss, beta=0.3, **options)
        assert value == pytest.approx(expected.item(), rel=1e-4), (loss, options)
        for name, logged in trainer._metrics["train"].items():
            if name in figures:
                assert figures[name] == pytest.approx(logged[-1], rel=1e-3, abs=1e-4), (loss, options, name)
        assert {"rewards/margins", "logps/rejected"} <= trainer._metrics["train"].keys()
        theirs = {n: p.grad.numpy().T for n, p in peft_names(trainer.model, ours.policy).items()}
        assert distance(slopes, theirs) < 2e-3, (loss, options)


# TRL's KTO


LABELS = (True, False, False, True)


@pytest.fixture
def kto_trainer(ours: Ours, byte_tokenizer: Any, tmp_path: Path) -> Any:
    """A KTOTrainer whose "ref" adapter is our start, and whose trained one is our policy."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset

    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(torch_model(ours.model), config)
    put(model, ours.start)
    arguments = trl.KTOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
    )
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    found = trl.KTOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer
    )
    put(found.model, ours.policy)
    return found


KTO_CASES = [
    ("kto", LABELS, {}),
    ("kto", LABELS, {"desirable_weight": 1.5, "undesirable_weight": 0.7}),
    ("kto", (True,) * 4, {}),
    ("kto", (False,) * 4, {}),
    ("apo_zero_unpaired", LABELS, {"desirable_weight": 1.5}),
]


# The mean log-ratio of the mismatched answers is -0.02 in the first case, so that the KL term is 0.
@pytest.mark.parametrize(("further", "kl"), [(1.0, 0.0), (6.0, 0.1808)])
def test_kto_equals_trls_in_value_gradient_kl_and_figures(
    ours: Ours, kto_trainer: Any, further: float, kl: float
) -> None:
    """The same answers and the same mismatched ones through `compute_loss`."""
    policy = {name: ours.start[name] + further * (w - ours.start[name]) for name, w in ours.policy.items()}
    set_weights(ours.model, policy)
    put(kto_trainer.model, policy)
    for loss, labels, options in KTO_CASES:
        answers = [RenderedAnswer(p.prompt, p.chosen, label) for p, label in zip(ours.pairs, labels, strict=True)]
        others = np.roll(np.arange(len(answers)), 1)  # as TRL moves them within a batch
        mismatched = MismatchedAnswers(answers, others, 512)
        set_weights(ours.model, ours.start)
        reference = Reference(ReferenceStore(ours.folder / "kto.txt"), mismatched)
        list(reference.compute(ours.model, row_tokens=40))
        set_weights(ours.model, policy)
        section = Dpo(loss=loss, beta=0.3, **options)
        objective = KtoObjective(
            mismatched, reference.logprobs(mismatched), section, Settings(seed=0, micro_tokens=40)
        )
        value, sums, slopes = loss_and_gradients(ours.model, objective, objective.rows(np.arange(4), 0), policy)
        figures = objective.metrics({name: float(total) for name, total in sums.items()})

        kto_trainer.loss_type, kto_trainer.beta = loss, 0.3
        kto_trainer.desirable_weight = options.get("desirable_weight", 1.0)
        kto_trainer.undesirable_weight = options.get("undesirable_weight", 1.0)
        kto_trainer.calculate_KL = loss == "kto"
        rows = [
            {
                "prompt_ids": answer.prompt.tolist(),
                "completion_ids": answer.response.tolist(),
                "KL_completion_ids": answers[other].response.tolist(),
                "label": answer.label,
            }
            for answer, other in zip(answers, others, strict=True)
        ]
        kto_trainer._metrics["train"].clear()
        kto_trainer.model.train()
        kto_trainer.model.zero_grad()
        expected = kto_trainer.compute_loss(kto_trainer.model, kto_trainer.data_collator(rows))
        expected.backward()
        logged = kto_trainer._metrics["train"]
        assert float(value) == pytest.approx(expected.item(), rel=1e-4), (loss, options)
        for name in (
            "kl",
            "rewards/margins",
            *(f"{a}/{b}" for a in ("rewards", "logps") for b in ("chosen", "rejected")),
        ):
            assert (name in figures) == (name in logged), name
            if name in figures:
                assert figures[name] == pytest.approx(logged[name][-1], rel=1e-3, abs=1e-4), (loss, options, name)
        theirs = {n: p.grad.numpy().T for n, p in peft_names(kto_trainer.model, policy).items()}
        assert distance(slopes, theirs) < 2e-3, (loss, options)
        assert figures["kl"] == pytest.approx(kl if loss == "kto" else 0.0, abs=1e-4)
