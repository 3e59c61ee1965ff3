"""Where a training begins: from nothing, from weights, or from a checkpoint."""

from collections.abc import Mapping

import torch

import utils
from checkpoint import (
    TRAINING,
    Checkpoint,
    check_same_classes,
    load_weights,
    read_checkpoint,
    read_weights,
    stored_classes,
)
from config import KEYS, load_config, to_dict
from engine.agreement import agree, checksums
from engine.losses import Distillation, make_criterion
from engine.repair import repair
from engine.resume import choose, earlier_runs, resume
from engine.session import make_trainer
from engine.state import CheckpointFolder, Layout, TrainState
from engine.teacher import timm_teacher
from engine.train import updates_follow
from engine.trainer import Trainer
from lr_scheduler import build_scheduler, scaled_rates
from models import build_model
from optimizer import build_optimizer
from program.setup import SAME_FILES, Setup
from settings import arguments
from settings.continuing import Run, check_continuing, check_evaluated, network_in
from settings.rules import is_yaml

SAME_TEACHER = "give all of them the same TRAIN.DISTILL.TEACHER and TEACHER_WEIGHTS"


class Beginning(Setup):
    """Builds what trains, and puts it where the run stands."""

    def begin(self, plain: dict) -> tuple[Trainer, bool, bool]:
        """The trainer where the run stands; whether its training begins here; whether weights
        were loaded for that. The checkpoint read for it is dropped.
        """
        model = self.config.MODEL
        checkpoint = choose(self.folder, model.RESUME, self.config.TRAIN.AUTO_RESUME, self.world)
        fresh = checkpoint is None or checkpoint.kind != TRAINING
        loaded = fresh and bool(checkpoint or model.PRETRAINED)
        if loaded:
            entry = None if checkpoint else model.ENTRY or None
            self.load_weights(checkpoint or read_checkpoint(model.PRETRAINED), entry)
        changes = [] if fresh else self.changes_since(checkpoint, plain)
        if fresh:
            self.logged = {"run": earlier_runs(self.folder) if self.world.is_main else 0}
        else:
            self.logged = checkpoint.training_state().get("logs", {})
        self.compare_weights()
        trainer = self.build_trainer()
        if checkpoint:
            resume(trainer, checkpoint, changes, len(self.data.train_loader))
            self.repair(trainer, checkpoint)
        trainer.compare_processes("what to begin with", SAME_FILES)
        return trainer, fresh, loaded

    def repair(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        """Writes files of the run again that are missing."""
        if not self.world.is_main:
            return
        options = arguments.training(self.config)
        folder = CheckpointFolder(self.folder, options["save_freq"], options["keep"])
        averaged = trainer.leader is not trainer.model
        repair(folder, checkpoint, trainer.state, options["plan"].epochs, averaged)

    def compare_network(self, checkpoint: Checkpoint) -> None:
        """Refuses to evaluate by --resume what was trained as another network; by --pretrained, a
        warning.
        """
        model = self.config.MODEL
        if checkpoint.kind == TRAINING:
            trained_as = checkpoint.content.get("config")
        else:
            trained_as = network_in(checkpoint.weights(model.ENTRY or None).metadata)
        changed = check_evaluated(
            trained_as if isinstance(trained_as, Mapping) else {},
            to_dict(self.config),
            source=checkpoint.source,
            consent=self.config.TRAIN.RESUME_CHANGED or not model.RESUME,
            defaults={key: entry.default for key, entry in KEYS.items()},
        )
        for change in changed:
            self.logger.warning("evaluated with another setting: %s", change)

    def changes_since(self, checkpoint: Checkpoint, plain: dict) -> list[str]:
        """What the run of a training state had otherwise, in words; refuses what was not meant."""
        saved = checkpoint.training_state()
        check_same_classes(
            saved.get("class_names"),
            self.classes_to_match,
            checkpoint.source,
            remedy="go on with the data of the run, or set MODEL.MATCH_CLASSES False",
        )
        layout = Layout(**saved["layout"])
        plan = arguments.training(self.config)["plan"]
        return check_continuing(
            Run(saved.get("config", {}), saved.get("images", {}), layout),
            Run(plain, self.data.fingerprints, self.layout()),
            folder=self.folder,
            source=checkpoint.path,
            finished=not updates_follow(plan, TrainState(**saved["progress"])),
            consent=self.config.TRAIN.RESUME_CHANGED,
            defaults={key: entry.default for key, entry in KEYS.items()},
        )

    def layout(self) -> Layout:
        config = self.config
        return Layout(config.DATA.BATCH_SIZE, self.world.size, config.TRAIN.ACCUMULATION_STEPS)

    def build_trainer(self) -> Trainer:
        config = self.config
        layout = self.layout()
        updates = layout.updates(self.data.train_loader)
        rates = scaled_rates(config, self.world.size)
        optimizer = build_optimizer(config, self.model, rates.base)
        trainer = make_trainer(
            self.model,
            optimizer,
            build_scheduler(config, optimizer, updates, rates),
            make_criterion(self.data.soft_targets, config.MODEL.LABEL_SMOOTHING),
            distillation=self.build_distillation(),
            world=self.world,
            layout=layout,
            dtype=self.dtype,
            mixup=self.data.mixup,
            **arguments.trainer(config),
        )
        utils.seed_everything(config.SEED + self.world.rank)  # each process draws its own numbers
        return trainer

    def build_distillation(self) -> Distillation | None:
        node = self.config.TRAIN.DISTILL
        if node.KIND == "none":
            return None
        teacher = self.build_teacher(node.TEACHER, node.TEACHER_WEIGHTS).to(self.world.device)
        tensors = checksums(teacher.state_dict())
        agree(self.world, "the teacher's weights", tensors, SAME_TEACHER, shown=False)
        return Distillation(teacher, node.KIND, alpha=node.ALPHA, tau=node.TAU)

    def build_teacher(self, name: str, weights: str) -> torch.nn.Module:
        wanted = self.classes_to_match
        if not is_yaml(name):
            if weights:
                given = stored_classes(read_weights(weights))
                check_same_classes(given, wanted, weights, "give a teacher of these data")
            return timm_teacher(name, weights, self.data.num_classes)
        teacher = build_model(load_config(name), self.data.num_classes)
        load_weights(
            teacher, read_weights(weights), rule="exact", logger=self.logger, classes=wanted
        )
        return teacher
