"""Checkpoint files, in one place: read once and safely, say what they are, fit a model, be written.

    checkpoint = read_checkpoint("last.pth")              # a training state, Swin's, or weights
    report = load_weights(model, checkpoint.weights())    # names converted, sizes fitted

Knows state dicts and torch modules, but no model, no trainer and no config.
"""

from .classes import check_same_classes, names_as_metadata, stored_classes
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
from .files import locate
from .heads import map_22k_to_1k, synsets_22k
from .huggingface import from_huggingface
from .initial import check_initial
from .load import LoadReport, load_weights
from .openmmlab import from_openmmlab
from .reader import (
    SWIN,
    TRAINING,
    Checkpoint,
    check_file,
    peek_checkpoint,
    read_checkpoint,
    read_weights,
)
from .residual import from_qk_residual, loses_bias, model_residual, to_qk_residual
from .save import save_weights, weights_metadata
from .schema import FORMAT
from .weights import Weights, unwrap

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "FORMAT",
    "LoadReport",
    "SWIN",
    "TRAINING",
    "Weights",
    "check_file",
    "check_initial",
    "check_same_classes",
    "detect",
    "from_huggingface",
    "from_identity",
    "from_openmmlab",
    "from_qk_residual",
    "from_rpe_mlp",
    "from_simmim",
    "from_timm",
    "from_torchvision",
    "load_weights",
    "locate",
    "map_22k_to_1k",
    "loses_bias",
    "model_residual",
    "names_as_metadata",
    "peek_checkpoint",
    "read_checkpoint",
    "read_weights",
    "save_weights",
    "stored_classes",
    "synsets_22k",
    "to_qk_residual",
    "to_reference",
    "unwrap",
    "weights_metadata",
]
