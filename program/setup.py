"""What training, evaluation and timing share: folder, log, precision, model, and that all processes
have the same.
"""

from pathlib import Path

import torch

import utils
from checkpoint import Checkpoint, load_weights
from config import KEYS
from engine.agreement import agree, checksums, describe_code, tell_differences
from models import build_model
from registry import UserError
from settings import arguments
from utils import World

SAME_FILES = (
    "give all of them the same files, in MODEL.PRETRAINED, MODEL.RESUME or the output folder"
)


class Setup:
    """The state of one call of main.py.

    Attributes:
        config, world: the settings, and the processes that have them.
        folder: where the run writes; None where nothing can be written.
        logger: to the terminal and the folder.
        dtype, autocast: the precision.
        data: `data.build.Data`, once it is built; model: likewise.
    """

    def __init__(self, config, world: World) -> None:
        self.config = config
        self.world = world
        self.folder = self.open_folder()
        self.logger = utils.create_logger(self.folder, config.MODEL.NAME, world.rank)
        if self.folder is None:
            self.logger.warning("no log file: %s cannot be written to", config.OUTPUT)
        self.dtype = utils.choose_precision(world.device, config.AMP_DTYPE, config.AMP_ENABLE)
        self.autocast = utils.autocast_factory(world.device, self.dtype)
        utils.prepare_device(world.device, config.TRAIN.THREADS, config.TRAIN.DETERMINISTIC)
        utils.seed_everything(config.SEED)  # the same initial weights on all processes

    def open_folder(self) -> Path | None:
        """The output folder; None where it cannot be written to and nothing but the log would be
        there.
        """
        config = self.config
        try:
            return utils.prepare_folder(config.OUTPUT)
        except UserError:
            if config.THROUGHPUT_MODE or (config.EVAL_MODE and not config.TEST.PER_CLASS):
                return None
            raise

    def compare_programs(self) -> None:
        settings = arguments.shared(self.config, KEYS) | {"precision": str(self.dtype)}
        agree(self.world, "the settings", settings, "give all of them the same command")
        agree(self.world, "the code", describe_code(), "install the same on all machines")

    def compare_data(self) -> None:
        images = {f"{split} images": text for split, text in self.data.fingerprints.items()}
        facts = {**images, "classes": self.data.class_names}
        agree(self.world, "the data", facts, "copy the same files to all machines")

    def compare_computation(self, what: str) -> None:
        tell_differences(self.world, "what computes the model", what)

    def build_model(self, num_classes: int | None = None) -> torch.nn.Module:
        order = utils.memory_format(self.config.MODEL.CHANNELS_LAST)
        return build_model(self.config, num_classes).to(self.world.device, memory_format=order)

    def load_weights(self, checkpoint: Checkpoint, entry: str | None = None) -> None:
        weights = checkpoint.weights(entry)
        options = arguments.loading(self.config) | {"classes": self.classes_to_match}
        load_weights(self.model, weights, logger=self.logger, **options)

    @property
    def classes_to_match(self) -> list[str] | None:
        """The names that a file's classes must be; None where they go by position."""
        return self.data.classes if self.config.MODEL.MATCH_CLASSES else None

    def compare_weights(self) -> None:
        tensors = self.model.state_dict().items()
        agree(self.world, "the weights", checksums(dict(tensors)), SAME_FILES, shown=False)
