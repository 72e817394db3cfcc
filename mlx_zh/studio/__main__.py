"""`python -m mlx_zh.studio [FOLDER …]`."""

from __future__ import annotations

from mlx_zh.studio import main
from mlx_zh.system.entry import entry

if __name__ == "__main__":
    entry(main)
