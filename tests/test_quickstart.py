"""The quickstart as a newcomer runs it."""

import json

import pytest

from tests.helpers import run_main


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_ends_with_98_percent_a_checkpoint_and_a_picture(seed, tmp_path):
    run = run_main(
        "--cfg",
        "configs/digits/digits_tiny.yaml",
        "--seed",
        seed,
        "--output",
        tmp_path,
        timeout=800,
    )
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "digits_tiny" / "default"
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [entry for entry in entries if entry["kind"] == "val"][-1]
    assert last["acc1"] >= 98
    assert f"checkpoint {folder / 'best.pth'}" in run.stdout
    assert f"curves {folder / 'curves.png'}" in run.stdout
    assert (folder / "best.pth").stat().st_size > 0
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
