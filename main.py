"""Trains, evaluates or times a model.

    python main.py --cfg configs/digits/digits_tiny.yaml               one process, any device
    torchrun --nproc-per-node=8 main.py --cfg ... --data-path DIR      one process a GPU
    python main.py --cfg ... --eval --resume CHECKPOINT                or --pretrained WEIGHTS
    python main.py --cfg ... --throughput                              images/s; needs no data

The same command, run again, resumes a training. Exit status: 0 done; 2 something the user can fix,
reported in one line on stderr; 143 stopped by SIGTERM (130: by Ctrl-C, 138: SIGUSR1, 129: SIGHUP)
with the state saved.
"""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

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
from config import KEYS, dump_config, get_config, load_config, parse_args, to_dict
from data import build_data
from engine.agreement import agree, checksums, describe_code, tell_differences
from engine.console import lasting_streams, print_all
from engine.evaluate import EvalResult, evaluate, write_per_class
from engine.lock import FolderLock
from engine.losses import Distillation, make_criterion
from engine.repair import repair
from engine.report import describe_model
from engine.resume import choose, resume
from engine.session import make_trainer, train
from engine.signals import Stopped, StopSignal, exit_status, stopped_at_once
from engine.state import CheckpointFolder, Layout, TrainState
from engine.teacher import timm_teacher
from engine.throughput import describe, throughput
from engine.train import updates_follow
from engine.trainer import Trainer
from kernels.linear import describe_products
from lr_scheduler import build_scheduler, scaled_rates
from models import build_model
from models.attention.report import describe_attention
from models.counting import count_macs
from optimizer import build_optimizer
from processes import PeerError
from registry import UserError
from settings import arguments
from settings.checks import check_files, check_on_device, check_settings
from settings.continuing import Run, check_continuing
from settings.rules import is_yaml
from utils import World

SAME_FILES = (
    "give all of them the same files, in MODEL.PRETRAINED, MODEL.RESUME or the output folder"
)


def main(argv: list[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    with lasting_streams():
        try:
            with stopped_at_once():
                return act(argv)
        except PeerError as error:
            utils.print_error(error)
            return 1
        except (UserError, MemoryError, RuntimeError) as error:
            if not isinstance(error, UserError) and not utils.out_of_memory(error):
                raise
            utils.print_error(error)
            return 2
        except Stopped as stop:
            utils.LOGGER.warning("stopped by signal %d: nothing had to be saved", stop.number)
            return exit_status(stop.number)
        except KeyboardInterrupt:
            utils.LOGGER.warning("interrupted: what came after the last checkpoint is lost")
            return exit_status(signal.SIGINT)


def act(argv: list[str] | None) -> int:
    """Reads and checks the settings, then prints them or runs."""
    args = parse_args(argv)
    config = get_config(args)
    if not args.print_config:
        check_files(config, load_config)
    check_settings(config)
    if args.print_config:
        print_all(dump_config(config))
        return 0
    with World(config.DEVICE, config.LOCAL_RANK, config.TRAIN.GROUP_TIMEOUT) as world:
        return Program(config, world).run()


class Program:
    """One call of main.py: what its parts share, and the three things it can do."""

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

    def run(self) -> int:
        self.compare_programs()
        if self.config.THROUGHPUT_MODE:
            return self.time()
        self.data = build_data(
            self.config,
            rank=self.world.rank,
            world_size=self.world.size,
            train=not self.config.EVAL_MODE,
        )
        try:
            self.compare_data()
            return self.use_data()
        finally:
            self.data.close()

    def use_data(self) -> int:
        self.model = self.build_model(self.data.num_classes)
        self.logger.info(describe_model(self.model, self.config.MODEL.NAME))
        with self.autocast():
            check_on_device(self.model)
            self.logger.info(describe_attention(self.model))
        products = describe_products(self.dtype, self.world.device.type)
        if products:
            self.logger.info(products)
        self.compare_computation(products)
        if self.config.EVAL_MODE:
            return self.evaluate()
        if not self.world.is_main:
            return self.train()
        with FolderLock(self.folder) as lock:
            return self.train(lock.check)

    def compare_programs(self) -> None:
        settings = arguments.shared(self.config, KEYS) | {"precision": str(self.dtype)}
        agree(self.world, "the settings", settings, "give all of them the same command")
        agree(self.world, "the code", describe_code(), "install the same on all machines")

    def compare_data(self) -> None:
        images = {f"{split} images": text for split, text in self.data.fingerprints.items()}
        facts = {**images, "classes": self.data.class_names}
        agree(self.world, "the data", facts, "copy the same files to all machines")

    def compare_computation(self, products: str) -> None:
        if self.world.control is not None:
            with self.autocast():
                attention = describe_attention(self.model)
            tell_differences(self.world, "what computes the model", f"{attention}; {products}")

    def build_model(self, num_classes: int | None = None) -> torch.nn.Module:
        order = utils.memory_format(self.config.MODEL.CHANNELS_LAST)
        return build_model(self.config, num_classes).to(self.world.device, memory_format=order)

    def time(self) -> int:
        model = self.build_model()
        with self.autocast():
            check_on_device(model)
        if self.config.MODEL.COMPILE:
            model = torch.compile(model)
        result = throughput(
            model,
            device=self.world.device,
            autocast=self.autocast,
            count=count_macs,
            **arguments.throughput(self.config),
        )
        self.logger.info(describe(result))
        return 0

    def evaluate(self) -> int:
        model = self.config.MODEL
        checkpoint = read_checkpoint(model.RESUME or model.PRETRAINED)
        networks = {None: "network"}
        if model.EMA.ENABLE and model.EMA.EVAL and model.RESUME and checkpoint.has_average:
            networks["ema"] = "averaged network"
        if model.ENTRY:
            networks = {model.ENTRY: f"network '{model.ENTRY}'"}
        for entry, name in networks.items():
            self.load_weights(checkpoint, entry)
            self.compare_weights()
            result = self.test(self.model, averaged=entry == "ema")
            self.logger.info(
                "Accuracy of the %s on the %d test images: %.1f%%", name, result.count, result.acc1
            )
        return 0

    def test(
        self, network: torch.nn.Module, averaged: bool = False, stop: StopSignal | None = None
    ) -> EvalResult | None:
        test, data = self.config.TEST, self.data
        logger = self.logger if self.config.EVAL_MODE else utils.behind_bar(self.logger)
        result = evaluate(
            network,
            data.val_loader,
            device=self.world.device,
            num_classes=data.num_classes,
            autocast=self.autocast,
            reduce=not test.SEQUENTIAL,
            per_class=test.PER_CLASS,
            print_freq=self.config.PRINT_FREQ,
            logger=logger,
            stop=stop,
        )
        if result and test.PER_CLASS and self.world.is_main:
            files = write_per_class(result, self.folder, data.class_names, averaged)
            logger.info("per class: %s", ", ".join(map(str, files)))
        return result

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

    def train(self, check: Callable[[], None] = lambda: None) -> int:
        """Trains. check: raises where the output folder is no longer this run's."""
        plain = to_dict(self.config)
        trainer, fresh, loaded = self.begin(plain)
        plan = arguments.training(self.config)
        written = utils.has_config(self.folder) and not updates_follow(plan["plan"], trainer.state)
        if self.world.is_main and not written:
            utils.write_config(self.folder, plain, dump_config(self.config), self.data.class_names)
        return train(
            trainer,
            self.data.train_loader,
            self.test,
            self.folder,
            fresh=fresh,
            validate_first=loaded,
            training_loss=arguments.loss_in_words(self.config, mixing=self.data.mixup is not None),
            config=plain,
            images=self.data.fingerprints,
            classes=self.data.classes,
            logged=self.logged,
            check=check,
            **plan,
        )

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
        self.logged = {} if fresh else checkpoint.training_state().get("logs", {})
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


if __name__ == "__main__":
    sys.exit(main())
