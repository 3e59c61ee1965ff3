"""Released weights -> this model: read a file safely, convert its names, fit it, load it, say what
happened.

report = load_weights(model, read_weights("swin_tiny_patch4_window7_224.pth"))
"""

from .convert import (
    detect,
    from_identity,
    from_rpe_mlp,
    from_simmim,
    from_timm,
    from_torchvision,
    to_reference,
)
from .errors import CheckpointError
from .heads import map_22k_to_1k, synsets_22k
from .load import LoadReport, load_weights
from .read import Weights, read_weights, unwrap
from .residual import from_qk_residual, model_residual, to_qk_residual
from .save import save_weights, weights_metadata

__all__ = [
    "CheckpointError",
    "LoadReport",
    "Weights",
    "detect",
    "from_identity",
    "from_qk_residual",
    "from_rpe_mlp",
    "from_simmim",
    "from_timm",
    "from_torchvision",
    "load_weights",
    "map_22k_to_1k",
    "model_residual",
    "read_weights",
    "save_weights",
    "synsets_22k",
    "to_qk_residual",
    "to_reference",
    "unwrap",
    "weights_metadata",
]
