"""SwinV2's position bias in another window: its MLP was learned for coordinates that are normalised
to the window of pre-training, and gives other values for others.
"""

from collections.abc import Mapping

from torch import Tensor

from .errors import list_keys

TABLE = "relative_coords_table"  # (1, 2 rows - 1, 2 columns - 1, 2): log-spaced coordinates
KEY = "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES"


def stretched(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Which stages of a model normalise their coordinates to another window than the file does, and
    how to set that right; "" where all agree, or the file does not say.
    """
    stages = {}
    for key in state.keys() & wanted.keys():
        theirs, ours = state[key], wanted[key]
        if not key.endswith(TABLE) or theirs.dim() != 4 or ours.is_meta:
            continue
        pairs = zip(windows(theirs), windows(ours), strict=True)
        if any(their and own and abs(their - own) > 0.1 for their, own in pairs):
            stages[key.partition(".blocks.")[0].replace("layers.", "stage ")] = windows(theirs)
    if not stages:
        return ""
    said = [f"{stage} to {max(filter(None, sizes)):.0f}" for stage, sizes in sorted(stages.items())]
    return (
        f"the file's position bias was learned for coordinates normalised to windows ({KEY}) of"
        f" {list_keys(said, limit=8)}, other than the model's"
    )


def windows(table: Tensor) -> list[float | None]:
    """The windows, over rows and over columns, that a table's coordinates are normalised to; None
    along an axis of a single offset.

    An offset of 1 lies at log2(1 + 8 / (window - 1)) / log2(8).
    """
    rows, columns = table.shape[1] // 2, table.shape[2] // 2
    steps = [
        float(table[0, rows + 1, columns, 0]) if rows else 0.0,
        float(table[0, rows, columns + 1, 1]) if columns else 0.0,
    ]
    return [1 + 8 / (8**step - 1) if step > 0 else None for step in steps]
