"""Runs of main.py do what the settings say: each value where it belongs, unchanged."""

import os
import re
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open

from engine.progress import Progress
from settings import arguments
from tests.wiring.cases import config_of
from tests.wiring.runs import PLACE, attributes, metrics, payload, replaced, run
from utils import World

AVERAGED = {"MODEL.EMA.ENABLE": True, "MODEL.EMA.DECAY": 0.5}


@pytest.mark.parametrize(
    "settings, saves, updates",
    [({"TRAIN.MAX_STEPS": 1}, 2, [1]), ({"TRAIN.SAVE_STEPS": 1}, 3, [1, 2])],
)
def test_a_run_saves_and_stops_after_the_updates_it_is_told(settings, saves, updates, tmp_path):
    left = run(tmp_path, settings)
    assert replaced(left, "last.pth") == saves
    assert [entry["step"] for entry in metrics(tmp_path, "train")] == updates


@pytest.mark.parametrize(
    "settings, epochs",
    [
        ({"SAVE_FREQ": 2, "TRAIN.KEEP": 0}, {0, 2, 3}),
        ({"SAVE_FREQ": 1, "TRAIN.KEEP": 2}, {2, 3}),
        ({"SAVE_FREQ": 2, "TRAIN.KEEP": 1}, {3}),
    ],
)
def test_a_run_keeps_the_epochs_it_is_told(settings, epochs, tmp_path):
    run(tmp_path, settings | {"TRAIN.EPOCHS": 4, "TRAIN.START_EPOCH": 0})
    names = [path.name for path in (tmp_path / PLACE).glob("ckpt_epoch_*.pth")]
    assert {int(re.search(r"\d+", name)[0]) for name in names} == epochs


def test_a_run_begins_at_the_epoch_it_is_told(tmp_path):
    run(tmp_path, {"TRAIN.START_EPOCH": 1, "TRAIN.EPOCHS": 3, "TRAIN.COOLDOWN_EPOCHS": 1})
    assert {entry["epoch"] for entry in metrics(tmp_path, "train")} == {1, 2}


def test_what_is_asked_of_torch_is_what_is_configured(tmp_path):
    on = run(
        tmp_path / "on",
        {
            "TRAIN.THREADS": 3,
            "TRAIN.DETERMINISTIC": True,
            "MODEL.COMPILE": True,
            "LOG.TENSORBOARD": True,
            "LOG.PLOT": True,
        },
    )
    off = run(tmp_path / "off")
    calls = {call[0]: call[1] for call in on["asked"] if call[0] in ("threads", "deterministic")}
    assert calls == {"threads": [3], "deterministic": [True]}
    assert ["deterministic", [False], {}] in off["asked"]
    names = ("threads", "compile", "SummaryWriter")
    for left, expected in ((on, 1), (off, 0)):
        counts = [sum(call[0] == name for call in left["asked"]) for name in names]
        assert counts == [expected] * 3
    assert f"{PLACE}/curves.png" in on["files"] and f"{PLACE}/curves.png" not in off["files"]


def test_the_log_says_the_epochs_and_batches_of_this_run(tmp_path):
    said = run(tmp_path, {"TRAIN.EPOCHS": 2, "PRINT_FREQ": 2}, numbers=True)["log"]
    for words in ("small: number of params", "attention: ", "Max accuracy", "best accuracy"):
        assert any(line.startswith(words) for line in said), words
    assert " small] " in (tmp_path / PLACE / "log_rank0.txt").read_text()
    train = [line.split("\t")[0] for line in said if line.startswith("Train:")]
    assert train == ["Train: [0/2][0/2]", "Train: [1/2][0/2]"]
    assert sum(line.startswith("Test: ") for line in said) == 2  # the first batch of two, twice
    assert any("Test: [0/2]" in line for line in said)


@pytest.mark.parametrize("leads, kinds", [(True, (2, 2)), (False, (2, 0))])
def test_the_average_is_evaluated_and_exported_where_it_leads(leads, kinds, tmp_path):
    left = run(tmp_path, AVERAGED | {"MODEL.EMA.EVAL": leads, "TRAIN.EPOCHS": 2})
    for network, count in zip(("network", "averaged network"), kinds, strict=True):
        assert sum(f"Accuracy of the {network} " in line for line in left["log"]) == count
    assert (len(metrics(tmp_path, "val")), len(metrics(tmp_path, "val_ema"))) == kinds
    with safe_open(tmp_path / PLACE / "model.safetensors", "pt") as file:
        exported = {name: file.get_tensor(name) for name in file.keys()}
        assert file.metadata()["averaged"] == str(leads)
    best = payload(tmp_path, "best.pth")
    chosen = best["ema"] if leads else best["model"]
    assert all(torch.equal(exported[name], chosen[name]) for name in exported)


def test_the_average_follows_its_decay(tmp_path):
    run(tmp_path, AVERAGED | {"MODEL.EMA.DECAY": 0.0})
    saved = payload(tmp_path)
    assert all(torch.equal(saved["ema"][name], value) for name, value in saved["model"].items())


def first_weights(left: dict) -> str:
    """The digest of a convolution's weights in the first batch."""
    return next(call[-1] for call in left["asked"] if call[0] == "training")


def test_processes_begin_with_the_same_weights_and_draw_numbers_of_their_own(tmp_path):
    settings = {"SEED": 7, "MODEL.DROP_RATE": 0.5, "TEST.PER_CLASS": True}
    alone = run(tmp_path / "alone", settings)
    with patch("utils.launched", return_value=(1, 1)):
        second = run(tmp_path / "second", settings)
    for left, seed in ((alone, 7), (second, 8)):
        assert {call[1] for call in left["asked"] if call[0] == "seed"} == {seed}
    assert first_weights(alone) == first_weights(second)
    assert first_weights(alone) != first_weights(run(tmp_path / "other", {"SEED": 8}))
    # one process writes for all
    assert second["files"].keys() == {f"{PLACE}/log_rank1.txt"}


@pytest.mark.parametrize("sequential", [False, True])
def test_only_shared_evaluations_are_added_up_over_processes(sequential, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with patch("torch.distributed.all_reduce", wraps=dist.all_reduce) as added:
            left = run(tmp_path, {"TEST.SEQUENTIAL": sequential})
    finally:
        dist.destroy_process_group()
    assert left["status"] == [0] and added.call_count == (0 if sequential else 1)


def test_a_process_evaluates_its_share_of_the_images(tmp_path):
    """Without a group of processes, so that nothing is added up."""
    run(tmp_path / "train")
    words = ("--eval", "--resume", str(tmp_path / "train" / PLACE / "last.pth"))
    found = []
    for rank in (0, 1):
        launched = patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": "2"})
        with launched, patch.object(World, "_join", lambda world: None):
            left = run(tmp_path / str(rank), words=words, numbers=True)
        assert any("on the 5 test images" in line for line in left["log"])
        found += [line.split("Loss")[1] for line in left["log"] if line.startswith("Test: [0/1]")]
    assert len(set(found)) == 2


def test_channels_last_reaches_weights_and_images(tmp_path):
    for wanted in (True, False):
        left = run(tmp_path / str(wanted), {"MODEL.CHANNELS_LAST": wanted})
        _, _, images, weight, *_ = next(call for call in left["asked"] if call[0] == "training")
        assert (images[1] == 1, weight[1] == 1) == (wanted, wanted)


def test_autocast_reaches_training_evaluation_and_timing(tmp_path):
    low = {"AMP_DTYPE": "bfloat16"}
    trained = run(tmp_path / "train", low)["asked"]
    last = str(tmp_path / "train" / PLACE / "last.pth")
    tested = run(tmp_path / "test", low | {"MODEL.RESUME": last}, ("--eval",))["asked"]
    timed = run(tmp_path / "time", low, ("--throughput",))["asked"]
    for asked, kinds in ((trained, {"training", "evaluation"}), (tested, {"evaluation"})):
        calls = [call for call in asked if call[0] in ("training", "evaluation")]
        assert {call[0] for call in calls} == kinds
        assert {call[-2] for call in calls} == {"torch.bfloat16"}
    assert "torch.bfloat16" in {call[-2] for call in timed if call[0] == "evaluation"}


def test_the_log_describes_products_and_attention_in_the_precision_of_the_run(tmp_path):
    def attention(_):
        return f"attention in {torch.get_autocast_dtype('cpu')}"

    with (
        patch("main.describe_products", return_value="products in float32") as products,
        patch("main.describe_attention", attention),
    ):
        left = run(tmp_path, {"AMP_DTYPE": "float16"}, numbers=True)
    products.assert_called_once_with(torch.float16, "cpu")
    assert {"products in float32", "attention in torch.float16"} <= set(left["log"])


def test_timing_takes_batch_size_and_channels_of_the_settings(tmp_path):
    settings = {"DATA.BATCH_SIZE": 6, "DATA.IMG_SIZE": "(16, 24)", "MODEL.VIT.IN_CHANS": 1}
    left = run(tmp_path, settings, ("--throughput",), numbers=True)
    words = ("batch_size 6 ", "image 16x24", "attention products")
    assert any(all(word in line for word in words) for line in left["log"])
    timed = [call for call in left["asked"] if call[0] == "evaluation"]
    assert timed[0][1:3] == [6, (384, 384, 24, 1)]
    counts = {}
    for classes in (10, 13):
        more = settings | {"DATA.DATASET": "folder", "AUG.AFFINE": False}
        more |= {"MODEL.NUM_CLASSES": classes}
        said = str(run(tmp_path / str(classes), more, ("--throughput",), numbers=True)["log"])
        counts[classes] = int(re.search(r"params (\d+)", said)[1])
    assert counts[13] - counts[10] == 3 * (8 + 1)  # the head's


def test_the_classes_and_their_accuracy_are_written_where_asked_for(tmp_path):
    run(tmp_path, {"TEST.PER_CLASS": True})
    rows = (tmp_path / PLACE / "per_class.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [[str(digit), "1"] for digit in range(10)]


def test_a_checkpoint_holds_the_settings_and_says_what_its_weights_are(tmp_path):
    run(tmp_path, {"MODEL.ATTENTION.MODIFIERS": "['qk_residual']", "TRAIN.KEEP": 5})
    saved = payload(tmp_path)
    assert saved["config"]["TRAIN"]["KEEP"] == 5
    assert saved["metadata"]["qk_residual"] != "none"
    with safe_open(tmp_path / PLACE / "model.safetensors", "pt") as file:
        assert file.metadata()["qk_residual"] == saved["metadata"]["qk_residual"]
    for name in ("config.json", "config.yaml"):  # JSON is YAML
        written = yaml.safe_load((tmp_path / PLACE / name).read_text())
        assert written["TRAIN"]["KEEP"] == 5, name


def test_the_end_of_the_run_is_reckoned_from_its_settings(tmp_path):
    made = []
    build = Progress.__init__

    def record(progress, layout, **options):
        made.append((layout, options))
        build(progress, layout, **options)

    settings = {"TRAIN.EPOCHS": 3, "TRAIN.MAX_STEPS": 2, "TRAIN.ACCUMULATION_STEPS": 2}
    with patch.object(Progress, "__init__", record):
        run(tmp_path, settings)
    [(layout, options)] = made
    assert (layout.batch_size, layout.world_size, layout.accumulation) == (8, 1, 2)
    assert attributes(SimpleNamespace(**options), ("epochs", "batches", "max_steps")) == {
        "epochs": 3,
        "batches": 2,
        "max_steps": 2,
    }


def test_a_progress_bar_replaces_the_lines_of_training_and_of_its_evaluations(tmp_path):
    left = run(tmp_path / "train")
    assert {line.split(" ")[0] for line in left["behind_bar"]} >= {"Train:", "Test:", "EPOCH"}
    words = ("--eval", "--resume", str(tmp_path / "train" / PLACE / "last.pth"))
    assert run(tmp_path / "test", words=words)["behind_bar"] == []


def test_the_bar_of_a_continued_epoch_begins_where_the_run_stands(tmp_path):
    with (
        patch("engine.report.on_terminal", return_value=True),
        patch("engine.report.tqdm") as bar,
    ):
        for updates in (1, 2):
            run(tmp_path, {"TRAIN.MAX_STEPS": updates})
    bars = [call.kwargs for call in bar.call_args_list]
    assert [(each["initial"], each["total"]) for each in bars] == [(0, 2), (1, 2)]


def test_what_is_resumed_has_to_fit_exactly_even_beside_weights_to_start_from():
    both = {"MODEL.RESUME": "last.pth", "MODEL.PRETRAINED": "other.pth"}
    assert arguments.loading(config_of(both))["rule"] == "exact"


def test_what_sets_the_training_loss_apart_is_said_in_words():
    smooth, plain = {"MODEL.LABEL_SMOOTHING": 0.1}, {"MODEL.LABEL_SMOOTHING": 0.0}
    taught = plain | {"TRAIN.DISTILL.KIND": "soft", "TRAIN.DISTILL.TEACHER": "resnet18"}
    said = [
        arguments.loss_in_words(config_of(settings), mixing)
        for settings, mixing in ((plain, False), (smooth, False), (plain, True), (taught, False))
    ]
    assert len(set(said)) == 4


@pytest.mark.parametrize(
    "settings, words",
    [({}, set()), ({"MODEL.LABEL_SMOOTHING": 0.2}, {"smoothing"}), ({"AUG.MIXUP": 0.8}, {"mixup"})],
)
def test_the_picture_says_what_the_training_loss_is(settings, words, tmp_path):
    legends = []

    def look(figure, *_, **__):
        legends.extend(axes.get_legend_handles_labels()[1] for axes in figure.axes)

    with patch("matplotlib.figure.Figure.savefig", look):
        run(tmp_path, {"LOG.PLOT": True, "MODEL.LABEL_SMOOTHING": 0.0} | settings)
    texts = str(legends)
    assert "train" in texts
    assert {word for word in ("smoothing", "mixup") if word in texts} == words


def test_an_epochs_means_are_those_of_its_own_updates(tmp_path):
    run(tmp_path, {"TRAIN.EPOCHS": 3})
    for epoch, means in enumerate(metrics(tmp_path, "epoch")):
        updates = [entry for entry in metrics(tmp_path, "train") if entry["epoch"] == epoch]
        for mean, name in (("train_loss", "loss"), ("grad_norm", "grad_norm")):
            each = [entry[name] for entry in updates]
            assert means[mean] == pytest.approx(sum(each) / len(each), rel=1e-6)


def test_loading_processes_end_with_the_run_however_it_ends(tmp_path):
    for rate, status in ((0.1, 0), (1e38, 2)):
        settings = {"TRAIN.BASE_LR": rate, "TRAIN.CLIP_GRAD": 0, "TRAIN.MAX_NONFINITE": 1}
        with patch("data.loader.Loader.close", autospec=True) as closed:
            left = run(tmp_path / str(rate), settings)
        assert left["status"] == [status] and closed.call_count == 2


ERRORS = {
    "an unknown key": ({"TRAIN.NO_SUCH": 1}, "TRAIN.NO_SUCH"),
    "heads that do not divide": ({"MODEL.VIT.NUM_HEADS": 3}, "3"),
    "no data": ({"DATA.DATASET": "folder", "AUG.AFFINE": False}, "DATA.DATA_PATH"),
    "no weights": ({"MODEL.PRETRAINED": "/no/such/file.pth"}, "/no/such/file.pth"),
    "no exact decay": (
        {"TRAIN.OPTIMIZER.NAME": "lamb", "TRAIN.QK_WEIGHT_DECAY": 0.5},
        "TRAIN.QK_WEIGHT_DECAY",
    ),
    "no update": ({"TRAIN.ACCUMULATION_STEPS": 3}, "TRAIN.ACCUMULATION_STEPS"),
    "no log": ({"LOG.WANDB": True}, "LOG.WANDB"),
    "no weights to evaluate": ({"EVAL_MODE": True}, "--resume"),
}


@pytest.mark.parametrize("settings, words", ERRORS.values(), ids=ERRORS)
def test_what_a_user_can_mend_is_told_in_one_line(settings, words, tmp_path):
    left = run(tmp_path, settings)
    assert left["status"] == [2]
    assert left["errors"].startswith("main.py: error") and words in left["errors"]
    assert left["errors"].count("\n") == 1


def test_weights_and_biases_is_told_the_name_and_the_settings(tmp_path):
    told = Mock()
    places = {
        "LOG.WANDB_PROJECT": "p",
        "LOG.WANDB_ENTITY": "e",
        "LOG.WANDB_GROUP": "g",
        "LOG.WANDB_TAGS": ["t"],
    }
    run(tmp_path, {"LOG.WANDB": True, "TRAIN.KEEP": 5} | places, wandb=told)
    options = told.init.call_args.kwargs
    assert [options[name] for name in ("project", "entity", "group", "tags")] == [
        "p",
        "e",
        "g",
        ["t"],
    ]
    assert payload(tmp_path)["logs"] == {"wandb": {"id": options["id"], "name": "small/default"}}
    assert options["name"] == "small/default" and options["config"]["TRAIN"]["KEEP"] == 5
    assert [call.kwargs["step"] for call in told.init.return_value.log.call_args_list] == [
        1,
        2,
        2,
        2,
    ]
