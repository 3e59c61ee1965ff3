"""The update: against Swin's vectors, against the formula written out, and its rules one by one."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from engine.clip import clip_gradients
from engine.guard import fused_step, masked_step
from engine.losses import make_criterion, with_distillation
from engine.state import Layout, TrainState
from engine.train import full_windows
from engine.trainer import Trainer
from lr_scheduler import LRScheduler, Schedule
from models import SasaResNet, SwinTransformer
from optimizer import parameter_groups
from tests.engine.runs import differences
from tests.engine.small import Loader, Net, evaluation, make_trainer, run_fit, weights
from tests.helpers import golden, subtree
from tests.models.builders import small
from utils import World


def golden_trainer(meta: dict, model: nn.Module) -> Trainer:
    optimizer = torch.optim.AdamW(
        parameter_groups(model, meta["base_lr"], meta["weight_decay"]),
        lr=meta["base_lr"],
        betas=meta["betas"],
        eps=meta["eps"],
    )
    updates = meta["updates_per_epoch"]
    schedule = Schedule(
        "cosine",
        meta["epochs"] * updates,
        meta["warmup_epochs"] * updates,
        meta["warmup_lr"],
        meta["min_lr"],
        warmup_prefix=meta["warmup_prefix"],
    )
    return Trainer(
        model,
        optimizer,
        LRScheduler(optimizer, schedule),
        with_distillation(make_criterion(True), None),
        world=World("cpu"),
        layout=Layout(meta["batch"], 1, 1),
        clip=meta["clip_grad"],
    )


def test_eight_updates_equal_swins():
    meta, tensors = golden("training_v1")
    model = SwinTransformer(**meta["config"])
    model.load_state_dict(subtree(tensors, "before"), strict=False)
    trainer, per_epoch = golden_trainer(meta, model), meta["updates_per_epoch"]
    for index in range(meta["updates"]):
        trainer.state.epoch, trainer.state.batch = divmod(index, per_epoch)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(
            meta["lrs"][index], rel=1e-12
        )
        trainer.update([(tensors["inputs"][index], tensors["targets"][index])])
        trainer.advance(per_epoch)
        read = trainer.statistics.read()
        assert read["loss"] == pytest.approx(meta["losses"][index], abs=2e-5)
        assert read["norm"] == pytest.approx(meta["grad_norms"][index], rel=2e-5)
    for name, after in subtree(tensors, "after").items():
        if name in model.state_dict() and "qkv.bias" not in name:
            torch.testing.assert_close(model.state_dict()[name], after, atol=1e-5, rtol=0, msg=name)
    logits = model.eval()(tensors["inputs"][0])
    torch.testing.assert_close(logits, tensors["final_logits_of_inputs_0"], atol=2e-5, rtol=0)


def test_updates_equal_the_loop_written_out():
    trainer, loader = make_trainer(clip=0.5), Loader()
    plain = make_trainer(clip=0.5).model
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    torch.manual_seed(7)
    for update, (images, targets) in enumerate(loader.epoch(0)):
        nn.functional.cross_entropy(plain(images), targets, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.01 * 0.9**update
    torch.manual_seed(7)
    for batch in loader.epoch(0):
        trainer.update([batch])
        trainer.advance(len(loader))
    for name, p in plain.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), p, atol=1e-6, rtol=0)


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulated_micro_batches_equal_one_big_batch(accumulation):
    batches = list(Loader(6).epoch(0))
    small, big = make_trainer(accumulation=accumulation, clip=1.0), make_trainer(clip=1.0)
    for trainer in (small, big):
        trainer.model.body[3].p = 0.0
    for window in full_windows(batches, accumulation):
        small.update(window)
        big.update([tuple(torch.cat(parts) for parts in zip(*window, strict=True))])
    assert small.statistics.read()["loss"] == pytest.approx(big.statistics.read()["loss"], rel=1e-5)
    for name, p in big.model.named_parameters():
        torch.testing.assert_close(small.model.get_parameter(name), p, atol=2e-6, rtol=1e-5)


def test_micro_batches_that_fill_no_window_are_not_run():
    assert [len(window) for window in full_windows(range(8), 3)] == [3, 3]
    trainer, report = run_fit(make_trainer(accumulation=4), Loader(6), epochs=2)
    assert report.updates == 2 and int(trainer.model.calls) == 8
    assert (trainer.state.epoch, trainer.state.batch, trainer.state.update) == (2, 0, 2)


def test_the_schedule_is_told_swins_index_with_a_remainder():
    meta, tensors = golden("lr_schedules")
    case = next(case for case in meta["cases"] if case["name"] == "cosine_prefix_accumulation")
    trainer = make_trainer(accumulation=case["accumulation_steps"])
    told, batches = [], case["iterations_per_epoch"]
    for epoch in range(5):
        trainer.state = TrainState(epoch=epoch)
        for _ in range(batches // 2):
            trainer.advance(batches)
            told.append(trainer.scheduler.position)
    assert told == tensors["cosine_prefix_accumulation/step_update_argument"].tolist()[:25]


def test_gradients_are_reduced_with_the_last_micro_batch_only():
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.silent, self.log = module, False, []

        def forward(self, x):
            self.log.append("silent" if self.silent else "reduced")
            return self.module(x)

        def no_sync(self):
            class Context:
                def __enter__(_):
                    self.silent = True

                def __exit__(_, *error):
                    self.silent = False

            return Context()

    trainer = make_trainer(accumulation=3)
    trainer.parallel = Parallel(trainer.model)
    trainer.update(list(Loader(3).epoch(0)))
    assert trainer.parallel.log == ["silent", "silent", "reduced"]


def nan_batch():
    images, targets = next(Loader().epoch(0))
    return torch.full_like(images, float("nan")), targets


def test_an_update_with_a_nan_gradient_changes_nothing_and_is_counted():
    trainer, batches = make_trainer(ema=True), list(Loader().epoch(0))
    trainer.update([batches[0]])
    before, state = weights(trainer), trainer.optimizer.state_dict()["state"]
    moments = [state[0]["exp_avg"].clone(), float(state[0]["step"])]
    trainer.update([nan_batch()])
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    after = trainer.optimizer.state_dict()["state"][0]
    assert torch.equal(after["exp_avg"], moments[0]) and float(after["step"]) == moments[1]
    assert trainer.statistics.read()["skipped"] == 1
    trainer.update([batches[1]])
    read = trainer.statistics.read()
    assert (read["skipped"], read["streak"], read["finite"]) == (1, 0, 2)
    # one bad update does not spoil the means
    assert math.isfinite(read["loss_mean"]) and math.isfinite(read["norm_mean"])
    assert all(torch.isfinite(p).all() for p in trainer.ema.module.parameters())


def adamw(parameters, **more):
    return torch.optim.AdamW(parameters, 0.1, **more)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True)


@pytest.mark.parametrize(
    "step, make",
    [(fused_step, partial(adamw, fused=True)), (masked_step, adamw), (masked_step, sgd)],
    ids=["fused adamw", "masked adamw", "masked sgd"],
)
def test_the_decision_on_the_device_skips_bad_steps_and_takes_good_ones(step, make):
    parameters = [nn.Parameter(torch.randn(5)) for _ in range(2)]
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer, plain = make(parameters), make(twins)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.full((5,), float("nan"))
    step(optimizer, torch.tensor(False))
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    for p, q in zip(parameters, twins, strict=True):
        p.grad, q.grad = torch.ones(5), torch.ones(5)
    step(optimizer, torch.tensor(True))
    plain.step()
    for p, q, old in zip(parameters, twins, before, strict=True):
        assert not torch.equal(p, old) and torch.isfinite(p).all()
        if make is not adamw:  # the masked AdamW has counted one step more
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_too_many_bad_updates_in_a_row_end_the_run_with_their_numbers():
    class Broken(Loader):
        def epoch(self, epoch, start_batch=0):
            return (
                nan_batch() if index > 1 else batch
                for index, batch in enumerate(super().epoch(epoch, start_batch))
            )

    with pytest.raises(
        RuntimeError,
        match=(
            r"not finite in the last 3 updates \(2 to 4, epoch 0; processes with a non-finite"
            r" loss: 0\)"
        ),
    ):
        run_fit(make_trainer(), Broken(), epochs=1, max_nonfinite=3)


def test_float16_scales_the_loss_and_halves_the_scale_after_an_overflow():
    trainer, batches = make_trainer(dtype=torch.float16), list(Loader().epoch(0))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    twin = make_trainer()
    torch.manual_seed(1)
    twin.update([batches[0]])
    torch.manual_seed(1)
    trainer.update([batches[0]])
    for name, p in twin.model.named_parameters():
        scaled = trainer.model.get_parameter(name)
        torch.testing.assert_close(scaled, p, atol=0.021, rtol=0)  # AdamW's first step is +-lr
    before = weights(trainer)
    trainer.update([nan_batch()])
    assert trainer.scaler.get_scale() == 128
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_formed_in_float32_under_autocast(dtype):
    seen = {}

    def loss(images, logits, targets):
        value = make_criterion(False)(logits, targets)
        seen.update(logits=logits.dtype, loss=value.dtype)
        return value

    trainer = make_trainer(dtype=dtype)
    trainer.loss = loss
    trainer.update(list(Loader(1).epoch(0)))
    assert seen == {"logits": dtype, "loss": torch.float32}


def test_the_adaptive_clip_leaves_the_classifier_alone():
    trainer = make_trainer(clip=1e-9, clip_mode="agc", optimizer=torch.optim.SGD)
    before = weights(trainer)
    trainer.update(list(Loader(1).epoch(0)))
    moved = {
        name
        for name, p in trainer.model.named_parameters()
        if not torch.allclose(p, before[name], atol=1e-7)
    }
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (lambda: small("refined_vit", aux_head=True), {"head", "aux_head"}),
        (lambda: small("pit", distilled=True), {"head", "head_dist"}),
        (lambda: SasaResNet(num_classes=3, width=16, depths=(1,)), {"fc"}),
        (lambda: small("timm"), {"head"}),
    ],
)
def test_the_adaptive_clip_is_told_of_every_classifier(build, heads):
    model = build()
    trainer = make_trainer(model=model)
    expected = {p for name in heads for p in model.get_submodule(name).parameters()}
    assert set(trainer.classifier) == expected


@pytest.mark.parametrize("step", range(1, 12))
def test_a_run_saved_after_any_update_and_restored_is_bit_identical(tmp_path, step):
    options = dict(accumulation=2, mix=True, ema=True, clip=1.0)
    whole, _ = run_fit(make_trainer(**options), Loader(9), epochs=3)
    run_fit(make_trainer(**options), Loader(9), epochs=3, folder=tmp_path, max_steps=step)
    again = make_trainer(seed=99, **options)
    again.restore(torch.load(tmp_path / "last.pth", weights_only=True))
    assert again.state.update == step
    run_fit(again, Loader(9), epochs=3)
    assert differences(again.capture(), whole.capture()) == []


def test_best_is_saved_after_validation_with_the_accuracy_it_has(tmp_path):
    accuracies = iter([10.0, 30.0, 20.0])
    run_fit(
        make_trainer(),
        Loader(2),
        epochs=3,
        folder=tmp_path,
        validate=lambda model: evaluation(next(accuracies)),
    )
    best = torch.load(tmp_path / "best.pth", weights_only=True)["progress"]
    last = torch.load(tmp_path / "last.pth", weights_only=True)["progress"]
    assert (best["best"], best["best_epoch"], best["epoch"]) == (30.0, 1, 2)
    assert (last["best"], last["best_epoch"], last["epoch"]) == (30.0, 1, 3)


def test_the_average_leads_only_where_it_is_asked_to(tmp_path):
    def accuracy(model):
        return evaluation(40.0 if model is trainer.model else 60.0)

    for leads, best in ((True, 60.0), (False, 40.0)):
        trainer = make_trainer(ema=True, ema_leads=leads)
        _, report = run_fit(trainer, Loader(2), epochs=1, validate=accuracy)
        assert trainer.state.best == best
        assert [kind for kind, *_ in report.validations] == ["val", "val_ema"] if leads else ["val"]


def test_a_compiled_or_wrapped_model_saves_its_own_names():
    trainer = make_trainer()
    assert list(trainer.capture()["model"]) == list(Net().state_dict())
    assert clip_gradients(trainer.parameters, None, "norm") == 0


def test_a_restored_trainer_goes_on_with_the_saved_loss_scale():
    first, second = (make_trainer(dtype=torch.float16) for _ in range(2))
    for trainer in (first, second):
        trainer.update(list(Loader(1).epoch(0)))
    first.scaler.update(new_scale=512.0)
    second.restore(first.capture())
    assert second.scaler.get_scale() == 512


def test_an_average_begins_with_the_restored_weights_where_the_checkpoint_has_none():
    first, second = make_trainer(seed=0), make_trainer(seed=1, ema=True)
    second.restore(first.capture())
    average = second.ema.state_dict()
    assert all(
        torch.equal(average[name], value) for name, value in first.model.state_dict().items()
    )


def test_random_states_are_restored_whatever_an_update_holds():
    saved = make_trainer().capture()
    other = make_trainer(accumulation=2)
    torch.manual_seed(9)
    other.restore(saved)
    assert torch.equal(torch.get_rng_state(), saved["ranks"][0]["rng"]["torch"])


def test_skipped_updates_are_those_of_the_run_and_means_those_of_the_epoch():
    statistics = make_trainer().statistics
    for loss in (2.0, math.nan):
        loss = torch.tensor(loss)
        statistics.add(loss, loss, torch.isfinite(loss))
    statistics.start_epoch()
    read = statistics.read()
    assert (read["skipped"], read["streak"], read["bad_losses"]) == (1, 1, 1)
    assert (read["finite"], read["loss_mean"], read["norm_mean"]) == (0, 0, 0)
