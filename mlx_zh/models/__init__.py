"""Models: loading, LoRA, export."""

import os

# At import transformers warns that PyTorch is missing, which is intended here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
