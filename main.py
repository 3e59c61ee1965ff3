"""Trains, evaluates or times a model.

    python main.py --cfg YAML                               train; one process, on any device
    torchrun --nproc-per-node=8 main.py --cfg YAML --data-path DIR        the same on eight GPUs
    python main.py --cfg YAML --eval --resume CHECKPOINT    evaluate; also --pretrained WEIGHTS
    python main.py --cfg YAML --throughput                  time; needs no data

Run again with the same command, a training goes on where it was. Exit status: 0 done; 2 something
the user can mend, told in one line on stderr; 143 stopped by SIGTERM (130: by Ctrl-C) with the
state saved.
"""

import sys
from contextlib import nullcontext

import torch

import utils
from checkpoint import (
    TRAINING,
    Checkpoint,
    CheckpointError,
    load_weights,
    locate,
    read_checkpoint,
    read_weights,
    weights_metadata,
)
from config import ConfigError, dump_config, get_config, load_config, parse_args, to_dict
from data import DataError, build_data
from engine.ema import ParameterEma
from engine.evaluate import EvalResult, evaluate, write_per_class
from engine.lock import FolderLock
from engine.logs import LogError, MetricLog
from engine.losses import Distillation, describe_loss, make_criterion, with_distillation
from engine.report import Report, describe_model
from engine.resume import choose, resume
from engine.signals import StopSignal
from engine.state import CheckpointFolder, Layout
from engine.teacher import timm_teacher
from engine.throughput import describe, throughput
from engine.train import Plan, fit, validate
from engine.trainer import Trainer
from kernels.linear import describe_products
from lr_scheduler import ScheduleError, build_scheduler, scaled_rates
from models import build_model
from models.attention.report import describe_attention
from models.build import ModelError
from models.counting import count_macs
from optimizer import OptimizerError, build_optimizer
from utils import RunError, World

USER_ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    LogError,
    ModelError,
    OptimizerError,
    RunError,
    ScheduleError,
)


def main(argv: list[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    try:
        args = parse_args(argv)
        config = get_config(args)
        if args.print_config:
            print(dump_config(config), end="")
            return 0
        with World(config.DEVICE, config.LOCAL_RANK) as world:
            return Program(config, world).run()
    except (*USER_ERRORS, torch.OutOfMemoryError) as error:
        utils.print_error(error)
        return 2


class Program:
    """One call of main.py: what its parts share, and the three things it can do."""

    def __init__(self, config, world: World) -> None:
        self.config, self.world = config, world
        self.folder = utils.prepare_folder(config.OUTPUT)
        self.logger = utils.create_logger(self.folder, config.MODEL.NAME, world.rank)
        self.dtype = utils.choose_precision(world.device, config.AMP_DTYPE, config.AMP_ENABLE)
        self.autocast = utils.autocast_factory(world.device, self.dtype)
        utils.prepare_device(world.device, config.TRAIN.THREADS, config.TRAIN.DETERMINISTIC)
        utils.seed_everything(config.SEED)  # alike on all processes: so are the initial weights

    def run(self) -> int:
        if self.config.THROUGHPUT_MODE:
            return self.time()
        self.data = build_data(
            self.config,
            rank=self.world.rank,
            world_size=self.world.size,
            train=not self.config.EVAL_MODE,
        )
        try:
            return self.use_data()
        finally:
            self.data.close()

    def use_data(self) -> int:
        self.model = self.build_model(self.data.num_classes)
        self.logger.info(describe_model(self.model, self.config.MODEL.NAME))
        with self.autocast():
            self.logger.info(describe_attention(self.model))
        if words := describe_products(self.dtype, self.world.device.type):
            self.logger.info(words)
        if self.config.EVAL_MODE:
            return self.evaluate()
        with FolderLock(self.folder) if self.world.is_main else nullcontext():
            return self.train()

    def build_model(self, num_classes: int | None = None) -> torch.nn.Module:
        order = utils.memory_format(self.config.MODEL.CHANNELS_LAST)
        return build_model(self.config, num_classes).to(self.world.device, memory_format=order)

    def time(self) -> int:
        model, data, kind = self.build_model(), self.config.DATA, self.config.MODEL.TYPE.upper()
        network = torch.compile(model) if self.config.MODEL.COMPILE else model
        result = throughput(
            network,
            data.BATCH_SIZE,
            data.IMG_SIZE,
            self.config.MODEL[kind].IN_CHANS,
            self.world.device,
            self.autocast,
            count=count_macs,
        )
        self.logger.info(describe(result))
        return 0

    def evaluate(self) -> int:
        model = self.config.MODEL
        if not (model.RESUME or model.PRETRAINED):
            raise RunError(
                "--eval needs weights: give --resume CHECKPOINT (such as"
                f" {self.folder / 'best.pth'}) or --pretrained WEIGHTS"
            )
        checkpoint = read_checkpoint(model.RESUME or model.PRETRAINED)
        networks = {None: "network"}
        if model.EMA.ENABLE and model.EMA.EVAL and model.RESUME and checkpoint.has_average:
            networks["ema"] = "averaged network"
        for entry, name in networks.items():
            self.load_weights(checkpoint, entry)
            result = self.test(self.model)
            self.logger.info(
                "Accuracy of the %s on the %d test images: %.1f%%", name, result.count, result.acc1
            )
        return 0

    def test(self, network: torch.nn.Module) -> EvalResult:
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
        )
        if test.PER_CLASS and self.world.is_main:
            write_per_class(result, self.folder, data.class_names)
        return result

    def load_weights(self, checkpoint: Checkpoint, entry: str | None = None) -> None:
        model, rule = self.config.MODEL, "exact" if self.config.MODEL.RESUME else "finetune"
        head = "evaluate" if self.config.EVAL_MODE else "reset" if model.HEAD_RESET else "auto"
        load_weights(
            self.model,
            checkpoint.weights(entry),
            rule=rule,
            head=head,
            allow_partial=model.PARTIAL_LOAD,
            source_residual=model.SOURCE,
            logger=self.logger,
        )

    def train(self) -> int:
        config, world, settings, plain = (
            self.config,
            self.world,
            self.config.TRAIN,
            to_dict(self.config),
        )
        pretrained = config.MODEL.PRETRAINED
        if pretrained:
            locate(pretrained)  # a missing file is an error even where the run goes on without it
        checkpoint = choose(self.folder, config.MODEL.RESUME, settings.AUTO_RESUME, world)
        # no training state of this program to go on from, only weights at most
        fresh = checkpoint is None or checkpoint.kind != TRAINING
        loaded = fresh and bool(checkpoint or pretrained)
        if loaded:
            self.load_weights(checkpoint or read_checkpoint(pretrained))
        trainer = self.build_trainer()
        if checkpoint:
            resume(trainer, checkpoint, plain, len(self.data.train_loader))
        checkpoint = None  # its tensors are no longer needed
        with (
            MetricLog(
                self.folder if world.is_main else None,
                resume_step=-1 if fresh else trainer.state.update,
                name=config.MODEL.NAME,
                tensorboard=config.LOG.TENSORBOARD,
                wandb=config.LOG.WANDB,
                config=plain,
            ) as metrics,
            StopSignal(world) as stop,
        ):
            report = Report(
                world,
                metrics,
                layout=trainer.layout,
                batches=len(self.data.train_loader),
                epochs=settings.EPOCHS,
                max_steps=settings.MAX_STEPS,
                print_freq=config.PRINT_FREQ,
                training_loss=describe_loss(
                    mixing=self.data.mixup is not None,
                    smoothing=config.MODEL.LABEL_SMOOTHING,
                    distillation=settings.DISTILL.KIND,
                ),
            )
            if world.is_main:
                utils.write_config(self.folder, plain, dump_config(config))
            if loaded:
                validate(trainer, self.test, report)
            plan = Plan(
                settings.EPOCHS, settings.SAVE_STEPS, settings.MAX_STEPS, settings.MAX_NONFINITE
            )
            folder = CheckpointFolder(self.folder, config.SAVE_FREQ, settings.KEEP)
            signal = fit(
                trainer,
                self.data.train_loader,
                self.test,
                plan=plan,
                folder=folder,
                report=report,
                stop=stop,
                extra={"config": plain, "metadata": weights_metadata(self.model)},
            )
        report.finish(trainer.state, folder, signal, plot=config.LOG.PLOT)
        return 128 + signal if signal else 0

    def build_trainer(self) -> Trainer:
        config, settings, data, model, world = (
            self.config,
            self.config.TRAIN,
            self.data,
            self.model,
            self.world,
        )
        rates, layout = (
            scaled_rates(config, world.size),
            Layout(config.DATA.BATCH_SIZE, world.size, settings.ACCUMULATION_STEPS),
        )
        optimizer = build_optimizer(config, model, rates.base)
        scheduler = build_scheduler(config, optimizer, layout.updates(data.train_loader), rates)
        distillation = self.build_distillation(settings.DISTILL)
        loss = with_distillation(
            make_criterion(data.soft_targets, config.MODEL.LABEL_SMOOTHING), distillation
        )
        trainer = Trainer(
            model,
            optimizer,
            scheduler,
            loss,
            world=world,
            layout=layout,
            dtype=self.dtype,
            clip=settings.CLIP_GRAD,
            clip_mode=settings.CLIP_MODE,
            mixup=data.mixup,
            compile=config.MODEL.COMPILE,
            ema_leads=config.MODEL.EMA.EVAL,
            ema=ParameterEma(model, config.MODEL.EMA.DECAY) if config.MODEL.EMA.ENABLE else None,
            channels_last=config.MODEL.CHANNELS_LAST,
            two_heads=distillation is not None and model.has_two_heads(),
        )
        trainer.state.epoch = settings.START_EPOCH
        utils.seed_everything(
            config.SEED + world.rank
        )  # from here on each process draws its own numbers
        return trainer

    def build_distillation(self, node) -> Distillation | None:
        if node.KIND == "none":
            return None
        if node.TEACHER.endswith((".yaml", ".yml")):
            teacher = build_model(load_config(node.TEACHER), self.data.num_classes)
            load_weights(
                teacher, read_weights(node.TEACHER_WEIGHTS), rule="exact", logger=self.logger
            )
        else:
            teacher = timm_teacher(node.TEACHER, node.TEACHER_WEIGHTS, self.data.num_classes)
        return Distillation(teacher.to(self.world.device), node.KIND, node.ALPHA, node.TAU)


if __name__ == "__main__":
    sys.exit(main())
