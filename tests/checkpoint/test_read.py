"""Reading weights files: every layout in use, and one clear line for everything that is not a
weights file.
"""

import argparse
import hashlib
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import CheckpointError, load_weights, read_weights, save_weights
from checkpoint.weights import decode
from tests.helpers import GOLDEN, golden

STATE = {
    "patch_embed.proj.weight": torch.arange(12.0).reshape(3, 4),
    "layers.0.blocks.0.norm1.weight": torch.ones(2),
    "norm.bias": torch.zeros(5),
}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def refusal(path) -> str:
    """The message of the refused file, which is one line naming the path."""
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert "\n" not in message and Path(path).name in message
    return message


@pytest.mark.parametrize(
    "wrapped, entry",
    [
        (STATE, None),
        ({"model": STATE}, "model"),
        ({"state_dict": STATE, "epoch": 3}, "state_dict"),
        ({"model_ema": STATE}, "model_ema"),
        ({"model": {"state_dict": STATE}}, "model.state_dict"),
        ({"epoch": 3, "model": STATE, "model_ema": {"x": torch.ones(1)}}, "model"),
    ],
    ids=["bare", "model", "state_dict", "ema", "nested", "both"],
)
def test_bare_and_wrapped_dicts_give_the_same_tensors(tmp_path, wrapped, entry):
    torch.save(wrapped, tmp_path / "weights.pth")
    weights = read_weights(tmp_path / "weights.pth")
    assert same(weights, STATE) and weights.entry == entry


def test_the_entry_can_be_chosen(tmp_path):
    torch.save(
        {"model": STATE, "model_ema": {key: value + 1 for key, value in STATE.items()}},
        tmp_path / "weights.pth",
    )
    assert torch.equal(
        read_weights(tmp_path / "weights.pth", "model_ema")["norm.bias"], torch.ones(5)
    )
    with pytest.raises(CheckpointError, match="no entry 'ema'; it has model, model_ema"):
        read_weights(tmp_path / "weights.pth", "ema")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."]
)
def test_wrappers_prefixes_are_removed(tmp_path, prefix):
    torch.save(
        {"model": {prefix + key: value for key, value in STATE.items()}}, tmp_path / "weights.pth"
    )
    assert same(read_weights(tmp_path / "weights.pth"), STATE)


def test_prefixes_inside_keys_and_average_counters_are_removed(tmp_path):
    inside = {
        key.replace("layers.0.", "layers.0._orig_mod."): value for key, value in STATE.items()
    }
    torch.save(
        {
            "n_averaged": torch.tensor(3),
            **{f"module.{key}": value for key, value in inside.items()},
        },
        tmp_path / "weights.pth",
    )
    assert same(read_weights(tmp_path / "weights.pth"), STATE)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_the_content_decides_the_format_not_the_name(tmp_path, name):
    save_file(STATE, tmp_path / name, metadata={"qk_residual": "q"})
    weights = read_weights(tmp_path / name)
    assert same(weights, STATE) and weights.metadata["qk_residual"] == "q"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_saved_weights_keep_their_metadata(tmp_path, name):
    save_weights(tmp_path / name, STATE, {"qk_residual": "k"})
    weights = read_weights(tmp_path / name)
    assert (
        same(weights, STATE)
        and decode(weights.metadata.get("metadata", weights.metadata))["qk_residual"] == "k"
    )
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_file_without_a_checksum_loads_with_a_word(tmp_path, name):
    model = torch.nn.Linear(3, 2)
    save_weights(tmp_path / name, model.state_dict())
    assert "checksum" not in load_weights(model, read_weights(tmp_path / name)).text
    if name == "a.pth":  # as before torch 1.6
        torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=False)
    else:
        save_file(model.state_dict(), tmp_path / name)
    report = load_weights(model, read_weights(tmp_path / name))
    assert "carries no checksum" in report.text


def test_saving_in_another_format_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match=r"\.safetensors, \.pth or \.pt"):
        save_weights(tmp_path / "a.bin", STATE)
    assert not os.listdir(tmp_path)


def reference_checkpoint(path):
    """The seven entries of Swin's files, with the yacs node that torch.load refuses by default."""
    node = pytest.importorskip("yacs.config").CfgNode
    config = node(
        {"MODEL": node({"TYPE": "swin", "NUM_HEADS": [3, 6]}), "AUG": node({"CUTMIX_MINMAX": None})}
    )
    config.freeze()
    torch.save(
        {
            "model": STATE,
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
            "lr_scheduler": {"t": 1},
            "max_accuracy": 81.2,
            "scaler": {"scale": 65536.0},
            "epoch": 299,
            "config": config,
        },
        path,
    )


def test_the_references_own_seven_entry_files_load_and_keep_their_config_as_plain_data(tmp_path):
    reference_checkpoint(tmp_path / "ckpt_epoch_299.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "ckpt_epoch_299.pth", weights_only=True)
    weights = read_weights(tmp_path / "ckpt_epoch_299.pth")
    assert same(weights, STATE) and weights.metadata["epoch"] == 299
    assert weights.metadata["config"]["MODEL"] == {"TYPE": "swin", "NUM_HEADS": [3, 6]}
    assert not hasattr(weights.metadata["config"], "freeze")


def test_a_pickled_argparse_namespace_is_plain_data(tmp_path):
    torch.save({"model": STATE, "args": argparse.Namespace(lr=0.5)}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").metadata["args"] == {"lr": 0.5}


def test_reading_leaves_no_class_on_torchs_allow_list(tmp_path):
    reference_checkpoint(tmp_path / "a.pth")
    before = set(torch.serialization.get_safe_globals())
    read_weights(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before


class Touch:
    """Runs code when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["model", "config"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, zipped, place):
    torch.save(
        {"model": STATE, place: Touch(tmp_path / "executed")},
        tmp_path / "bad.pth",
        _use_new_zipfile_serialization=zipped,
    )
    assert "could run code" in refusal(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


def test_a_pickled_model_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_line(tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    save_weights(path, {"a.weight": torch.randn(100, 100)})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert ("empty" if share == 0 else "fetch or write it again") in refusal(path)


def test_every_truncation_of_a_small_file_is_refused(tmp_path):
    path = tmp_path / "cut.pth"
    save_weights(path, {"a.weight": torch.randn(3)})
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        refusal(path)


def test_a_flipped_bit_in_a_pth_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "flip.pth"
    save_weights(path, {"a.weight": torch.randn(100, 100)})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = next(r for r in archive.infolist() if "/data/" in r.filename)
    data[record.header_offset + 1000] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch does not notice
    assert "checksum" in refusal(path)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs"),
        (b"not weights at all", "not a weights file"),
        (bytes(range(256)) * 4, "not a weights file"),
        (b"PK\x03\x04 broken zip", "truncated or corrupt"),
        (b"\xff\x00\x00\x00\x00\x00\x00\x00{no json}", "damaged safetensors"),
    ],
)
def test_other_files_are_told_apart(tmp_path, content, says):
    (tmp_path / "file.pth").write_bytes(content)
    assert says in refusal(tmp_path / "file.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_bytes_never_escape_as_another_exception(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        noise = bytes(torch.randint(256, (64,), generator=generator).tolist())
        (tmp_path / "noise.pth").write_bytes(b"\x80\x02" + noise)
        refusal(tmp_path / "noise.pth")


def test_a_wrong_path_names_what_is_there(tmp_path):
    save_weights(tmp_path / "right.pth", STATE)
    assert "right.pth" in refusal(tmp_path / "wrong.pth")
    assert "folder" in refusal(tmp_path) and "right.pth" in refusal(tmp_path)
    assert f"{tmp_path} holds right.pth" in refusal(tmp_path / "none" / "wrong.pth")
    (tmp_path / "right.pth").unlink()
    assert f"nearest existing folder is {tmp_path}" in refusal(tmp_path / "none" / "wrong.pth")


@pytest.mark.parametrize(
    "content, says",
    [
        ({"epoch": 3}, "holds epoch"),
        ([1, 2], "holds a list"),
        ({}, "holds nothing"),
        (torch.ones(2), "Tensor"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(tmp_path, content, says):
    torch.save(content, tmp_path / "a.pth")
    assert says in refusal(tmp_path / "a.pth")


def serve(monkeypatch, tmp_path, source):
    """Stands in for the network: counts the downloads and keeps torch's check of the hash."""
    calls = []

    def fake(url, target, digest, progress):
        calls.append(url)
        if digest and not hashlib.sha256(source.read_bytes()).hexdigest().startswith(digest):
            raise RuntimeError(f"invalid hash value (expected {digest})")
        shutil.copy(source, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return calls


def test_a_url_is_fetched_once_and_its_hash_is_checked(tmp_path, monkeypatch):
    source = save_weights(tmp_path / "source.pth", STATE)
    calls = serve(monkeypatch, tmp_path, source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    good = f"https://example.org/swin-{digest}.pth"
    assert same(read_weights(good), STATE) and same(read_weights(good), STATE) and len(calls) == 1
    assert "invalid hash" in refusal("https://example.org/swin-00000000.pth")


def test_two_sites_with_one_file_name_do_not_share_a_cache_entry(tmp_path, monkeypatch):
    calls = serve(monkeypatch, tmp_path, save_weights(tmp_path / "source.pth", STATE))
    read_weights("https://a.org/model.pth"), read_weights("https://b.org/model.pth?download=1")
    assert len(calls) == 2


def test_only_https_is_fetched_and_a_failure_names_the_url(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "only https" in refusal("http://example.org/a.pth")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert "no route to host" in refusal("https://example.org/a.pth")


def test_the_golden_checkpoint_file_reads_as_released_ones_do():
    meta, _ = golden("checkpoint_file_v1")
    weights = read_weights(GOLDEN / meta["file"])
    assert weights.entry == "model" and "layers.0.blocks.0.attn.relative_position_index" in weights
