"""Models: loading, LoRA, export."""

import os

# transformers regrets at import that PyTorch is missing, which is as it should be here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
