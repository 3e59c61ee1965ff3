"""The benchmark of arms: what it keeps, what it refuses, and which arms it knows."""

import json

import pytest

from benchmarks import family_cost
from models.attention.modifiers import MODIFIERS
from registry import parse_call
from tests.models.builders import EVERYWHERE


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(family_cost, "seconds", lambda step: step())
    built = []

    def training_step(arm, batch, dtype):
        built.append(arm)
        return (lambda: 1.0 if arm == "plain" else 1.25), 10 + len(arm)

    monkeypatch.setattr(family_cost, "training_step", training_step)

    def call(*words):
        built.clear()
        monkeypatch.setattr("sys.argv", ["family_cost.py", "--json", str(tmp_path / "a"), *words])
        family_cost.main()
        return built[1:], json.loads((tmp_path / "a").read_text())

    return call


def test_a_repeated_run_measures_what_is_missing_and_keeps_the_rest(run, monkeypatch, capsys):
    assert run("--arms", "sink", "gate", "--rounds", "2")[0] == ["sink", "gate"]
    built, found = run("--arms", "sink", "gate", "gpsa", "--rounds", "2")
    assert built == ["gpsa"]
    assert {name: len(arm["pairs"]) for name, arm in found["arms"].items()} == {
        "sink": 2,
        "gate": 2,
        "gpsa": 2,
    }
    with pytest.raises(SystemExit, match="float32"):
        run("--arms", "sink", "--dtype", "bfloat16")
    capsys.readouterr()
    run("--arms", "sink", "--rounds", "3")
    assert "sink: 1.250 (1.250 to 1.250)" in capsys.readouterr().out


def test_a_table_has_every_arm_with_its_parameters(run, tmp_path):
    run("--arms", "sink", "plain", "--rounds", "3")
    lines = family_cost.table([tmp_path / "a"]).splitlines()
    assert lines[2:4] == [
        "| plain | 0 | 1.000 (1.000 to 1.000) |",
        "| sink | -1 | 1.250 (1.250 to 1.250) |",
    ]
    assert "float32: batch 8, 3 rounds" in lines[-1]


def test_every_arm_is_measured():
    specs = [
        parse_call(text)[0]
        for arm in family_cost.all_arms()
        for text in family_cost.settings(arm).MODEL.ATTENTION.MODIFIERS
    ]
    assert set(specs) == set(MODIFIERS.names()) - set(EVERYWHERE)
