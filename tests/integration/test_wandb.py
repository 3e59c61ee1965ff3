"""LOG.WANDB with the package itself, offline."""

import pytest
import torch

from engine.logs import MetricLog, read_metrics
from engine.wandb_run import WandbOptions
from tests.wiring.runs import PLACE, run

wandb = pytest.importorskip("wandb", minversion="0.31")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No account and no server."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def kept(folder) -> set[str]:
    """The ids of the runs kept for `wandb sync`, offline-run-TIME-ID or, for a second one within a
    second, offline-run-TIME-ID-1.
    """
    return {path.name.split("-")[3] for path in folder.glob("wandb/offline-run-*")}


def test_a_run_and_its_continuation_are_one_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"LOG.WANDB": True, "LOG.WANDB_TAGS": ["a"], "LOG.WANDB_GROUP": "g"}
    for epochs in (1, 2):
        left = run(tmp_path, options | {"TRAIN.EPOCHS": epochs}, wandb=wandb)
        assert left["status"] == [0]
    folder = tmp_path / PLACE
    mark = torch.load(folder / "last.pth", weights_only=True)["logs"]["wandb"]
    assert kept(folder) == {mark["id"]} and mark["name"] == "small/default"
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 2
    assert all(file.stat().st_size > 500 for file in folder.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("server", [None, "http://127.0.0.1:9"])
def test_without_an_account_or_a_network_the_numbers_are_kept(server, tmp_path, monkeypatch):
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    with MetricLog(tmp_path, tensorboard=False, wandb=WandbOptions(), name="a/b") as log:
        log.write(1, 0, "train", loss=1.0)
        mark = log.mark
    assert kept(tmp_path) == {mark["wandb"]["id"]}
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
