"""The table of docs/models.md: what is computed for each family, against mlx-lm's own forward and gradient.

python benchmarks/families.py            # tiny random models of every family
python benchmarks/families.py MODEL…     # models on this disk or on a hub
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def compared(model: Any) -> str:
    """The differences by norm, with windows shortened to 5 tokens, so that segments are longer and shorter."""
    from mlx_zh.core.block_forms import short_windows
    from mlx_zh.core.proof import differences

    with short_windows(model, 5):
        found = differences(model)
    return "not finite" if found is None else f"{found[0]:.1e} | {found[1]:.1e}"


def described(model: Any) -> str:
    """What the description of the model has that Llama's has not."""
    from mlx_zh.core.block_forms import form_of

    form = form_of(model)
    blocks = form.blocks
    parts = {
        "norms after attention and MLP": any(block.after_attention for block in blocks),
        "norms of queries and keys": any(block.norms and not block.rotated_first for block in blocks),
        "norms of queries and keys after RoPE": any(block.rotated_first for block in blocks),
        "one product for queries, keys and values": any(block.fused for block in blocks),
        "windows": any(block.window for block in blocks),
        "scaled residuals": any(block.residual != 1 for block in blocks),
        "scaled embedding": form.embedding != 1,
        "scaled logits": form.logits != 1,
        "experts": any("switch_mlp" in layer.mlp for layer in model.layers),
    }
    return ", ".join(name for name, has in parts.items() if has) or "—"


def main() -> None:
    """Print the table."""
    print("| Family | Beside Llama's blocks | Logits | Gradient |\n| --- | --- | --- | --- |")
    if sys.argv[1:]:
        from mlx_zh.models.load import load_model

        models = ((name, load_model(name).model) for name in sys.argv[1:])
    else:
        from families import FAMILIES, family_model

        models = ((name, family_model(name)) for name in FAMILIES)
    for name, model in models:
        print(f"| `{name}` | {described(model)} | {compared(model)} |")


if __name__ == "__main__":
    main()
