"""python -m kernels.window_attention: builds the fused kernel unless it is there, and says in one
line what this machine has.
"""

import torch

from kernels.library import loader


def main() -> None:
    """Never fails: without the kernel PyTorch's own operations do the work."""
    path, reason = loader.load(quiet=True)
    if path is None:
        print(f"window_attention: no fused kernel ({reason}); PyTorch's own operations are used")
        return
    devices = [name for name in ("cpu", "cuda") if loader.missing(name) is None]
    print(
        f"window_attention: fused kernel for {' and '.join(devices)} ready, PyTorch"
        f" {torch.__version__}: {path}"
    )


if __name__ == "__main__":
    main()
