"""Fine-tune a 4-bit Llama into a Chinese assistant on a MacBook."""

from mlx_zh.system.blas import preload_blas

__version__ = "0.2.0"

preload_blas()  # must run before anything imports mlx.core
