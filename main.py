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

import torch

import utils
from checkpoint import (
    read_checkpoint,
)
from config import dump_config, get_config, load_config, parse_args, to_dict
from data import build_data
from engine.console import lasting_streams, print_all
from engine.evaluate import EvalResult, evaluate, write_per_class
from engine.lock import FolderLock
from engine.report import describe_model
from engine.session import train
from engine.signals import Stopped, StopSignal, exit_status, stopped_at_once
from engine.throughput import describe, throughput
from engine.train import updates_follow
from kernels.linear import describe_products
from models.attention.report import describe_attention
from models.counting import count_macs
from processes import PeerError
from program.beginning import Beginning
from registry import UserError
from settings import arguments
from settings.checks import check_files, check_on_device, check_settings
from settings.continuing import describe_network
from utils import World


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


class Program(Beginning):
    """One call of main.py: the three things it can do."""

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
            attention = describe_attention(self.model)
        self.logger.info(attention)
        products = describe_products(self.dtype, self.world.device.type)
        if products:
            self.logger.info(products)
        self.compare_computation(f"{attention}; {products}")
        if self.config.EVAL_MODE:
            return self.evaluate()
        if not self.world.is_main:
            return self.train()
        with FolderLock(self.folder) as lock:
            return self.train(lock.check)

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
        self.compare_network(checkpoint)
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
            about=describe_network(plain),
            logged=self.logged,
            check=check,
            **plan,
        )


if __name__ == "__main__":
    sys.exit(main())
