"""The grids of tokens that tensors lie on. A position embedding or a table over offsets has as
many rows on 8 x 12 tokens as on 12 x 8: what is stored beside it tells them apart, not its shape.

A place is a position embedding by its key, an attention module or a block by its name.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .resize import index_extent
from .weights import Weights, decode

Grid = tuple[int, int]
POSITIONS = ("absolute_pos_embed", "pos_embed")
TABLE = re.compile(r"^(.*\.attn)\.(relative_position_bias_table|modifiers\.\w+\.table)$")
PAIRS = re.compile(r"^(.*\.attn)\.modifiers\.\w+\.mask$")  # (N, N) over the pairs of tokens
MIXES = re.compile(r"^(.*)\.(sw_mlp|spatial_mlp)\.(weight|bias)$")  # over the tokens of a window


def place_of(key: str) -> str | None:
    """Where a tensor lies; None for one that knows no grid."""
    if key in POSITIONS:
        return key
    found = TABLE.match(key) or PAIRS.match(key) or MIXES.match(key)
    return found[1] if found else None


def model_grids(model: nn.Module) -> dict[str, Grid]:
    """(rows, columns) of tokens at every place of a model: of the patches, of an attention module's
    window, of a block's.
    """
    grids = {}
    embed = getattr(model, "patch_embed", None)
    # timm calls it grid_size
    patches = getattr(embed, "patches_resolution", None) or getattr(embed, "grid_size", None)
    if patches:
        grids = {key: tuple(patches) for key in POSITIONS if hasattr(model, key)}
    for name, module in model.named_modules():
        geometry = getattr(module, "geometry", None)
        window = getattr(geometry, "window", None) or getattr(module, "window", None)
        if isinstance(window, tuple):
            grids[name] = window
    return grids


def stated_grids(grids: Mapping[str, Grid | None]) -> dict[str, str]:
    """What weights files say of the places whose grid is known, square ones too: as many tokens may
    lie otherwise in the model; {} where none is.
    """
    known = {place: grid for place, grid in grids.items() if grid}
    return {"grids": json.dumps(known)} if known else {}


class FileGrids:
    """The grids of a file, as far as it knows them: what it states, the position index beside a
    table, or the image size in the config that is stored with it.

    Args:
        weights: what the file says of itself.
        state: its tensors under this project's names.
    """

    def __init__(self, weights: Weights, state: Mapping[str, Tensor]):
        self.state = state
        self.stated = _stated(weights.metadata.get("grids"), weights.metadata.get("metadata"))
        config = decode(weights.metadata.get("config"))
        self.config = config if isinstance(config, Mapping) else {}
        self.image = _pair(_look_up(self.config, "DATA", "IMG_SIZE"))
        family = _look_up(self.config, "MODEL", "TYPE")
        self.section = _look_up(self.config, "MODEL", str(family).upper())

    def __getitem__(self, place: str) -> Grid | None:
        """The grid at a place, or None."""
        if place in self.stated:
            return self.stated[place]
        index = self.state.get(f"{place}.relative_position_index")
        if index is not None and (extent := _safe_extent(index)):
            return (extent[0] + 1) // 2, (extent[1] + 1) // 2
        return self._by_image(place)

    def of_state(self) -> dict[str, Grid | None]:
        """The grids of all places of the file."""
        places = {place_of(key) for key in self.state} - {None}
        return {place: self[place] for place in sorted(places)}

    def _by_image(self, place: str) -> Grid | None:
        early = re.match(r"patch_embed\.attention(\d+)\.attn$", place)
        if early:  # tokens-to-token halves the image before each of its attentions
            return self.image and halved(self.image, int(early[1]))
        patches = self._patches()
        stage = re.match(r"(layers|transformers)\.(\d+)\.", place)
        if patches is None or not stage:
            return patches
        grid = halved(patches, int(stage[2]))
        return grid if stage[1] == "transformers" else self._window(grid)

    def _patches(self) -> Grid | None:
        """The grid of the patches."""
        embedded = self.state.get("pos_embed")
        if embedded is not None and embedded.dim() == 4:  # PiT's knows its sides
            return tuple(embedded.shape[2:])
        if not self.image:
            return None
        if "patch_embed.project.weight" in self.state:  # tokens-to-token
            found = (re.match(r"patch_embed\.attention(\d+)\.", key) for key in self.state)
            return halved(self.image, 1 + len({match[1] for match in found if match}))
        kernel = self.state.get("patch_embed.proj.weight")
        patch = _pair(_look_up(self.section, "PATCH_SIZE"))
        if patch is None and kernel is not None and kernel.dim() == 4:
            patch = tuple(kernel.shape[2:])
        return patch and (self.image[0] // patch[0], self.image[1] // patch[1])

    def _window(self, grid: Grid) -> Grid | None:
        """Swin's window on a map: one number is cut to its shorter side, a pair side by side."""
        size = _look_up(self.section, "WINDOW_SIZE")
        if isinstance(size, int):
            return (min(size, *grid),) * 2
        pair = _pair(size)
        return pair and tuple(min(side, length) for side, length in zip(pair, grid, strict=True))


def halved(grid: Grid, times: int) -> Grid:
    """A grid halved so many times, rounded up."""
    return -(-grid[0] // 2**times), -(-grid[1] // 2**times)


def _look_up(node: Any, *path: str) -> Any:
    for name in path:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _pair(value: Any) -> Grid | None:
    """A side or two as (rows, columns); None for anything else."""
    value = decode(value)
    if type(value) is int and value > 0:
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return tuple(value) if all(type(side) is int and side > 0 for side in value) else None
    return None


def _stated(*said: Any) -> dict[str, Grid]:
    """The grids that a file states, by place; from the first that states any."""
    for value in said:
        if isinstance(value, Mapping):
            value = value.get("grids")
        value = decode(value)
        if isinstance(value, Mapping):
            pairs = {str(place): _pair(grid) for place, grid in value.items()}
            return {place: grid for place, grid in pairs.items() if grid}
    return {}


def _safe_extent(index: Tensor) -> Grid | None:
    """`index_extent` of an index that is one."""
    tokens = math.isqrt(index.numel())
    if tokens < 1 or tokens**2 != index.numel():
        return None
    extent = index_extent(index)
    area = (extent[0] + 1) // 2 * ((extent[1] + 1) // 2)
    return extent if area == tokens else None


def same_count(key: str, one: Grid, other: Grid) -> bool:
    """Whether a tensor has as many rows on one grid as on the other."""
    if TABLE.match(key):
        one, other = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (one, other))
    return one[0] * one[1] == other[0] * other[1]


def compare_grids(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    own: Mapping[str, Grid],
    grids: FileGrids,
) -> tuple[dict[str, str], list[str]]:
    """Tensors of the model's shape, but laid over other tokens.

    Returns: what to say of those that lie on another grid in the file, by key; and the keys of
        those of which the file does not say, where the model's rows and columns differ.
    """
    scrambled, unsure = {}, []
    for key in state.keys() & wanted.keys():
        place = place_of(key)
        target = own.get(place)
        if target is None or state[key].shape != wanted[key].shape or state[key].dim() == 4:
            continue
        source = grids[place]
        if source is None or not same_count(key, source, target):
            unsure += [key] if target[0] != target[1] else []
        elif source != target:
            sides = ("x".join(map(str, grid)) for grid in (source, target))
            scrambled[key] = " (file {} tokens, model {})".format(*sides)
    return scrambled, sorted(unsure)
