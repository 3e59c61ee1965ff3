"""Cases of the CUDA kernels with a gradient of the log-sum-exp or an epilogue: for each the terms,
masks and shapes that take another way through a kernel.
"""

import torch

from .testing import CRPW_V2, TABLE, V2, Case, Drawn

F32, F16 = torch.float32, torch.float16

# A token alone in its window, the last of the grid or the first; and Swin's own shift.
LONE = [Case(missing=(6, 6)), Case(missing=(6, 6), shift=(1, 1), **TABLE)]
SHIFTED = Case(missing=(6, 6), shift=(3, 3))

# Windows of up to 64 tokens in 16 bits: lean kernels of both sizes, then general ones.
SMALL_BASES = [
    Case(),
    Case(dtype=F16, shift=(3, 3), **TABLE),
    Case(window=(8, 8), **V2, shift=(4, 4), missing=(1, 3)),
    Case(window=(8, 8), **CRPW_V2, windows=(1, 2)),
    Case(window=(3, 5), post=True, dropout=0.3, missing=(1, 2), shift=(1, 3)),
    Case(window=(7, 6), head_dim=64, dtype=F16, post=True, **V2),
    Case(window=(4, 4), head_dim=16, heads=3, **TABLE),
    Case(post=True, dropout=0.2, shift=(3, 3)),
    *LONE,
    SHIFTED,
]

# Larger windows, and float32.
TILED_BASES = [
    Case((8, 12), heads=3),
    Case((12, 12), (1, 2), missing=(0, 5), shift=(6, 6), dtype=F16, **TABLE),
    Case((9, 11), missing=(3, 4), shift=(4, 5), post=True, dropout=0.2, **TABLE),
    Case((12, 12), (2, 1), shift=(6, 0), batch=2, **V2),
    Case((16, 16), (1, 1), heads=1, head_dim=64, dtype=F16, **TABLE),
    Case((5, 24), (1, 1), head_dim=16, post=True, **V2),
    Case((7, 7), dtype=F32, shift=(3, 3), missing=(0, 2), **TABLE),
    Case((8, 8), dtype=F32, shift=(4, 4), head_dim=16, dropout=0.1, **V2),
    Case((12, 12), (1, 1), dtype=F32, head_dim=64, post=True),
    *(case.but(dtype=F32) for case in (*LONE, SHIFTED)),
]


def with_gradient_of_lse(bases: list[Case]) -> list[Case]:
    """The cases, each with a gradient of the log-sum-exp."""
    return [case.but(lse=True) for case in bases]


def with_epilogue(bases: list[Case]) -> list[Case]:
    """The cases with either epilogue; every other pair with values below the floor of the exclusive
    one and with a gradient of the log-sum-exp.
    """
    return [
        case.but(epilogue=kind, tiny_values=number % 2 > 0, lse=number % 2 > 0)
        for number, case in enumerate(bases)
        for kind in ("affine", "exclusive")
    ]


def neutral(case: Case, kind: str) -> tuple[Drawn, Drawn]:
    """The same inputs without an epilogue, and with one that changes nothing."""
    drawn = Drawn(case.but(epilogue=kind))
    if kind == "affine":
        drawn.alpha, drawn.beta = torch.zeros(case.heads), torch.ones(case.heads)
    else:
        drawn.exclusion = torch.zeros(case.heads)
    return Drawn(case), drawn
