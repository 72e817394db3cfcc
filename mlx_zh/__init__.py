"""Fine-tune a 4-bit Llama into a Chinese assistant on a MacBook."""

from mlx_zh.system import device as device

__version__ = "0.1.0"

device.preload_blas()  # must run before anything imports mlx.core
