"""Content that no training writes: refused in one line, quickly and with little memory."""

import math
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch

from checkpoint import Checkpoint, CheckpointError, load_weights, peek_checkpoint, read_checkpoint
from checkpoint.plain import check_plain
from checkpoint.soundness import check_finite
from engine.resume import newest
from engine.state import CheckpointFolder
from tests.checkpoint.states import changed, training_state
from tests.engine.small import make_trainer
from tests.fuzz.test_checkpoints import deep, endless, shared_nest


def refusal(call, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def weights_with(value) -> dict:
    return torch.nn.Linear(3, 2).state_dict() | {"weight": value}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.ones(2, 3, device="meta"), "without numbers"),
        (torch.ones(2, 3).to_sparse(), "not dense"),
        (lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8), "quantised"),
        (torch.ones(1).expand(10**12), "made of fewer numbers"),
        (torch.ones(2, 3, dtype=torch.int64), "file int64, model float32"),
        (torch.ones(2, 3, dtype=torch.complex64), "file complex64, model float32"),
        (torch.ones(2, 3, dtype=torch.bool), "file bool, model float32"),
        (torch.full((2, 3), math.nan), "weight holds NaN or infinity"),
        (torch.full((2, 3), -math.inf), "weight holds NaN or infinity"),
    ],
    ids=str.split("meta sparse quantised expanded whole complex bool nan inf"),
)
@pytest.mark.parametrize("rule", ["exact", "finetune"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_are_no_weights_are_refused_by_name(value, says, rule):
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    state = weights_with(value() if callable(value) else value)
    message = refusal(lambda: load_weights(model, state, rule=rule))
    assert says in message and "weight" in message
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_real_numbers_of_another_width_load(dtype):
    model = torch.nn.Linear(3, 2)
    load_weights(model, weights_with(torch.ones(2, 3, dtype=dtype)), rule="exact")
    assert torch.equal(model.weight, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("optimizer.state.0", {}, "state.0. is empty"),
        ("optimizer.state.0.exp_avg", torch.ones(64, 32).long(), "a tensor of real numbers"),
        ("optimizer.state.0.exp_avg", torch.ones(64, 32).to_sparse(), "not dense"),
        ("optimizer.state.0.exp_avg_sq", torch.full((64, 32), math.nan), "exp_avg_sq holds NaN"),
        ("optimizer.state.0.step", 0.5, "expected a whole number"),
        ("model.w", torch.full((64, 32), math.nan), "model: w holds NaN"),
        ("ema.w", torch.full((64, 32), math.inf), "ema: w holds NaN"),
        ("model.w", torch.ones(64, 32, device="meta"), "without numbers"),
        ("progress.epoch", 10**30, "epoch is 10+, expected"),
        ("progress.best_epoch", 5, "best_epoch is 5, but progress.epoch 1"),
        ("progress.update", 2**2000, "2001 bits"),
        ("scaler", {"scale": -1.0}, "scaler.scale is -1.0, expected a number above 0"),
        ("config", {"MODEL": torch.ones(2)}, "expected a dict of plain data"),
        (
            "lr_scheduler",
            {"last_update": 1, "schedule": {"total": torch.ones(2)}},
            "expected a dict of plain data",
        ),
        ("ranks.0.tally", torch.ones(8).to_sparse(), "expected a tensor of"),
        ("class_names", [1, 2], "expected a list of strings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_training_state_of_odd_content_names_the_entry(place, value, says, tmp_path):
    state = training_state(ema=True) | {"class_names": ["a"]}
    torch.save({"format": 1, **changed(state, place, value)}, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(tmp_path / "last.pth").training_state()


def test_a_state_whose_values_are_not_numbers_is_passed_over(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path)
    folder.save(training_state(update=5))
    folder.keep_epoch(0)
    folder.save(changed(training_state(update=9), "model.b", torch.full((64,), math.nan)))
    assert newest(tmp_path).content["progress"]["update"] == 5
    assert "b holds NaN" in caplog.text


def test_whole_numbers_are_not_taken_for_weights_when_a_run_goes_on():
    trainer = make_trainer(ema=True)
    for entry in ("model", "ema"):
        saved = trainer.capture()
        saved[entry] = {name: tensor.long() for name, tensor in saved[entry].items()}
        with pytest.raises(CheckpointError, match="is of type int64, that of the model float32"):
            make_trainer(ema=True).restore(saved)


def test_what_no_run_could_print_is_refused_in_a_moment():
    start = time.perf_counter()
    assert "values written out" in refusal(check_plain, {"config": shared_nest()}, "a.pth")
    assert "contains itself" in refusal(check_plain, {"config": endless()}, "a.pth")
    assert "nested more than" in refusal(check_plain, {"config": deep()}, "a.pth")
    assert "values written out" in refusal(check_plain, ["x" * 10**6] * 10**5, "a.pth")
    shared = [1, 2]
    check_plain({"a": shared, "b": [shared, shared]}, "a.pth")
    assert time.perf_counter() - start < 2


def test_numbers_of_numpy_are_plain_numbers(tmp_path):
    values = [np.float64(81.25), np.float32(0.5), np.int64(-3), np.bool_(True), np.uint8(200)]
    torch.save({"model": {"w": torch.ones(1)}, "best": values}, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth").content["best"]
    assert found == [81.25, 0.5, -3, True, 200]
    assert [type(value) for value in found] == [float, float, int, bool, int]


class Call:
    """Pickles as a call."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("read", [read_checkpoint, peek_checkpoint])
@pytest.mark.parametrize("kind", [bytearray, torch.FloatTensor])
def test_a_pickle_that_takes_memory_by_its_word_is_refused(tmp_path, zipped, read, kind):
    content = {"model": {"w": torch.ones(1)}, "more": Call(kind, (10**11,))}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    if zipped or read is read_checkpoint:
        assert "any amount of memory" in refusal(read, tmp_path / "a.pth")


def test_an_archive_that_unpacks_out_of_all_proportion_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        with archive.open("a/data/0", "w") as record:
            for _ in range(24):
                record.write(bytes(1 << 20))
    assert "unpacks to" in refusal(read_checkpoint, tmp_path / "a.pth")


def test_settings_stored_in_a_file_may_be_anything(tmp_path):
    for odd in (7, {"ATTENTION": {"MODIFIERS": 3}}, {"ATTENTION": {"MODIFIERS": ["a(" * 500]}}):
        content = {"model": torch.nn.Linear(3, 2).state_dict(), "config": {"MODEL": odd}}
        weights = Checkpoint(content, "a.pth", tmp_path).weights()
        try:
            load_weights(torch.nn.Linear(3, 2), weights)
        except CheckpointError as error:
            assert "config stored in the file" in str(error)


def test_the_minus_infinity_of_a_mask_over_padding_is_sound():
    mask = torch.tensor([[0.0, -math.inf]])
    check_finite({"layers.0.blocks.1.attn_mask": mask}, "file")
    for name, tensor in (("w", mask), ("attn_mask", -mask), ("attn_mask", mask * math.nan)):
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
            check_finite({name: tensor}, "file")
