"""Tensors that lie on a grid of tokens: another grid with as many tokens is another grid. Every
family's are resized by the grid that the file knows, or refused, never scrambled.
"""

import logging

import pytest
import torch

from checkpoint import CheckpointError, load_weights, read_weights, save_weights, weights_metadata
from checkpoint.grids import MIXES, PAIRS, POSITIONS, TABLE, FileGrids, model_grids, place_of
from checkpoint.weights import Weights
from config import load_config, to_dict
from models import build_model
from tools.convert_checkpoint import main as convert

SWIN = {"PATCH_SIZE": 4, "EMBED_DIM": 8, "DEPTHS": [1, 1], "NUM_HEADS": [1, 2], "APE": True}
SWIN |= {"WINDOW_SIZE": (2, 4)}
TOKENS = {"PATCH_SIZE": 4, "EMBED_DIM": 8, "DEPTH": 1, "NUM_HEADS": 2}
TABLES = ["crpw(source=table)", "elementwise_mask"]
FAMILIES = {
    "swin": (SWIN, TABLES),
    "swinv2": (SWIN, TABLES),
    "swin_mlp": (SWIN, []),
    "vit": (TOKENS, TABLES),
    "cait": (TOKENS, TABLES),
    "refined_vit": (TOKENS | {"SHARE_EVERY": 1, "CARRY": False}, TABLES),
    "pit": (
        {"PATCH_SIZE": 4, "EMBED_DIM": 8, "DEPTHS": [1, 1], "NUM_HEADS": [1, 2]},
        TABLES,
    ),
    "t2t": (
        {"TOKEN_TRANSFORMERS": 2, "TOKEN_DIM": 8, "EMBED_DIM": 8, "DEPTH": 1, "NUM_HEADS": 2},
        ["crpw(source=table)"],
    ),
    "timm": (
        {"MODEL": "vit_tiny_patch16_224(patch_size=4, embed_dim=8, depth=1, num_heads=2)"},
        TABLES,
    ),
    "timm beit": (
        {"MODEL": "beit_base_patch16_224(patch_size=4, embed_dim=8, depth=1, num_heads=2)"},
        [],
    ),
}
# the file's image and the model's; with patches of 4: 4 x 16 into 8 x 8, 4 x 6 into 6 x 4 ...
IMAGES = [((16, 64), (32, 32)), ((16, 24), (24, 16)), ((16, 24), (16, 16)), ((16, 16), (16, 64))]


def configured(family, image, window=None):
    section, modifiers = FAMILIES[family]
    kind = family.split()[0]
    settings = {"TYPE": kind, "NUM_CLASSES": 5, "ATTENTION.MODIFIERS": modifiers}
    settings |= {f"{kind.upper()}.{key}": value for key, value in section.items()}
    if window:
        settings[f"{kind.upper()}.WINDOW_SIZE"] = window
    words = ["DATA.IMG_SIZE", image, "DATA.DATASET", "folder"]
    for key, value in settings.items():
        words += [f"MODEL.{key}", value]
    config = load_config(None, words)
    with torch.random.fork_rng():
        return build_model(config), to_dict(config)


def rows_only(key, value, grid):
    """What a tensor on `grid` would be that depends on rows alone: 1, 2, 3 ... from the top."""
    rows, columns = grid
    if key in POSITIONS and value.dim() == 4:
        return torch.arange(1.0, rows + 1)[:, None].expand(value.shape).clone()
    if PAIRS.match(key):
        row = torch.arange(1.0, rows + 1).repeat_interleave(columns)
        return row[:, None] + 100 * row
    if TABLE.match(key):
        rows, columns = 2 * rows - 1, 2 * columns - 1
    tokens = value.shape[0] if TABLE.match(key) else value.shape[1]
    lead = tokens - rows * columns
    line = torch.cat([-torch.ones(lead), torch.arange(1.0, rows + 1).repeat_interleave(columns)])
    if TABLE.match(key) and lead:  # timm's BEiT has the rows of its class token behind
        line = line.roll(-lead)
    return line[:, None].expand(value.shape).clone()


def striped(model):
    """The state of a model whose tensors on grids depend on rows alone."""
    own = model_grids(model)
    return {
        key: rows_only(key, value, own[place_of(key)])
        if place_of(key) and not MIXES.match(key)
        else value
        for key, value in model.state_dict().items()
    }


def assert_striped(model):
    """Still: the same along columns, other from row to row."""
    own, seen = model_grids(model), 0
    for key, value in model.state_dict().items():
        if not place_of(key) or MIXES.match(key):
            continue
        rows, columns = own[place_of(key)]
        if PAIRS.match(key):
            value, seen = value.diagonal()[None, :, None], seen + 1
        if TABLE.match(key):
            value, rows, columns = value[None], 2 * rows - 1, 2 * columns - 1
            value = value[:, : rows * columns]
        if value.dim() == 4:
            grid = value
        else:
            grid = value[:, value.shape[1] - rows * columns :].unflatten(1, (rows, columns))
            grid = grid.movedim(3, 1)
        first = grid[..., :1]
        torch.testing.assert_close(grid, first.expand_as(grid), rtol=1e-3, atol=1e-2)
        assert (first.diff(dim=-2) > 0).all(), key
        seen += 1
    assert seen


RESIZED = [family for family in FAMILIES if family != "swin_mlp"]


QUICK = {(family, IMAGES[1]) for family in RESIZED} | {
    (family, IMAGES[0]) for family in ("vit", "pit")
}
CASES = [
    pytest.param(family, images, marks=[] if (family, images) in QUICK else pytest.mark.slow)
    for family in RESIZED
    for images in IMAGES
]


@pytest.mark.parametrize(("family", "images"), CASES, ids=str)
def test_rows_stay_rows_by_the_image_size_of_the_file(family, images):
    source, config = configured(family, images[0])
    model, _ = configured(family, images[1])
    state = {k: v for k, v in striped(source).items() if not k.endswith("position_index")}
    report = load_weights(model, {"model": state, "config": config})
    assert report.coverage == 1 and not report.unsure
    assert_striped(model)


@pytest.mark.parametrize("family", ["vit", "swin", "pit"])
def test_a_file_of_weights_states_its_grids(family, tmp_path):
    source, _ = configured(family, (16, 24))
    model, _ = configured(family, (24, 16))
    said = weights_metadata(source)
    for name in ("a.safetensors", "a.pth"):
        weights = read_weights(save_weights(tmp_path / name, striped(source), said))
        load_weights(model, weights)
        assert_striped(model)
        if family != "pit":  # its positions have another shape
            fresh, _ = configured(family, (24, 16))
            with pytest.raises(CheckpointError, match=r"\(file \d+x\d+ tokens, model \d+x\d+\)"):
                load_weights(fresh, weights, rule="exact")


@pytest.mark.parametrize("family", ["vit", "swin", "cait"])
def test_a_file_of_weights_states_square_grids_too(family, tmp_path):
    source, _ = configured(family, (32, 32))
    path = save_weights(tmp_path / "a.safetensors", striped(source), weights_metadata(source))
    model, fresh = (configured(family, (16, 64))[0] for _ in range(2))  # as many tokens
    report = load_weights(model, read_weights(path))
    assert not report.unsure
    assert_striped(model)
    with pytest.raises(CheckpointError, match=r"\(file (\d+)x\1 tokens, model \d+x\d+\)"):
        load_weights(fresh, read_weights(path), rule="exact")


def test_a_converted_file_states_the_grids_that_its_source_knew(tmp_path):
    source, config = configured("vit", (16, 24))
    model, _ = configured("vit", (24, 16))
    torch.save({"model": striped(source), "config": config}, tmp_path / "a.pth")
    target = tmp_path / "a.safetensors"
    assert convert([str(tmp_path / "a.pth"), str(target)]) == 0
    load_weights(model, read_weights(target))
    assert_striped(model)


@pytest.mark.parametrize(
    "images", [[(20, 12)], pytest.param([(8, 32), (24, 16)], marks=pytest.mark.slow)]
)
def test_the_grids_of_a_config_are_those_of_the_model_it_builds(images):
    for family in FAMILIES:
        for image in images:
            model, config = configured(family, image)
            grids = FileGrids(Weights(model.state_dict(), metadata={"config": config}), {})
            bare = {k: v for k, v in model.state_dict().items() if "position_index" not in k}
            grids.state = bare
            own = model_grids(model)
            found = {place: own[place] for place in grids.of_state()}
            assert grids.of_state() == found and found, (family, image)


@pytest.mark.parametrize("window", [(4, 2), 4])
def test_maps_over_the_tokens_of_another_window_are_refused(window):
    """The grouped linear maps of Swin-MLP have no rule for another window of as many tokens."""
    source, config = configured("swin_mlp", (16, 16))
    model, _ = configured("swin_mlp", (16, 16), window=window)
    with pytest.raises(CheckpointError, match="spatial_mlp.*file "):
        load_weights(model, {"model": source.state_dict(), "config": config})


@pytest.mark.parametrize("rule", ["finetune", "exact"])
def test_a_state_dict_that_says_nothing_is_taken_as_the_models_with_a_word(rule, caplog):
    model, _ = configured("vit", (16, 24))
    with caplog.at_level(logging.WARNING):
        report = load_weights(
            model, model.state_dict(), rule=rule, logger=logging.getLogger("grids")
        )
    assert "pos_embed" in report.unsure and "the file does not say how many rows" in caplog.text
    square, _ = configured("vit", (16, 16))
    assert not load_weights(square, square.state_dict(), rule=rule).unsure


def test_positions_of_no_known_grid_are_refused():
    source, _ = configured("vit", (16, 24))
    model, _ = configured("vit", (16, 16))
    with pytest.raises(CheckpointError, match="pos_embed|77 rows is not square"):
        load_weights(model, source.state_dict())


@pytest.mark.parametrize(
    "said",
    [
        {"config": {"DATA": {"IMG_SIZE": [64, 8]}, "MODEL": {"TYPE": "vit"}}},
        {"config": {"DATA": {"IMG_SIZE": "x"}, "MODEL": 3}},
        {"config": {"DATA": {"IMG_SIZE": [0, 0]}}},
        {"metadata": {"grids": "{not json"}},
        {"metadata": {"grids": '{"pos_embed": [1, 2, 3]}'}},
        {"metadata": {"grids": '{"pos_embed": [true, "a"]}'}},
    ],
)
def test_what_a_file_says_of_its_grids_is_not_trusted_where_it_cannot_be(said):
    model, _ = configured("vit", (16, 16))
    report = load_weights(model, {"model": model.state_dict(), **said})
    assert report.coverage == 1 and not report.resized
