"""The pyramid that Swin, SwinV2 and Swin-MLP share: patch embedding, stages of blocks with patch
merging between them, a head.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn

from kernels.window_attention.layout import Size
from models.attention import AttentionSpec
from models.layers.drop_path import drop_path_rates, stochastic_depth
from models.layers.init import init_linear_and_norm, own_random_numbers, trunc_normal
from models.layers.patch_embed import PatchEmbed, PatchMerging, resize_positions
from models.layers.pre_mlp import PLACES, PreMlp
from registry import check_choice

from .attention_block import run_blocks
from .backbone import Backbone
from .options import DEPTH, PYRAMID, pixels


@dataclass
class PyramidOptions:
    """Arguments of the constructors of all three families; those without a default have it there.

    drop_path_profile: linear from 0 to drop_path_rate, or constant.
    pre_mlp: off, stem (once) or stage (before each), with its hidden ratio, and whether it has the
        stochastic depth of the stage's first block.
    sw_mlp: off, token_mix or shift.
    dynamic_img_size: accept other image sizes than img_size.
    extra: what a caller passed and nobody reads; named in a warning.
    """

    img_size: int | Size
    patch_size: int | Size
    in_chans: int
    num_classes: int
    embed_dim: int
    depths: Sequence[int]
    num_heads: Sequence[int]
    window_size: int | Size
    mlp_ratio: float
    drop_rate: float
    drop_path_rate: float
    norm_layer: type[nn.Module]
    ape: bool
    patch_norm: bool
    use_checkpoint: bool
    attention: AttentionSpec
    drop_path_profile: str = "linear"
    pre_mlp: str = "off"
    pre_mlp_ratio: float = 4.0
    pre_mlp_drop_path: bool = False
    sw_mlp: str = "off"
    dynamic_img_size: bool = False
    extra: dict = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError for lengths and words that cannot be; warns of arguments without
        effect.
        """
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths {list(self.depths)} and num_heads {list(self.num_heads)} must have one"
                " entry per stage each"
            )
        check_choice("pre_mlp", self.pre_mlp, PLACES)
        if self.extra:
            warnings.warn(
                f"these arguments have no effect here: {', '.join(sorted(self.extra))}",
                stacklevel=4,
            )


def pyramid_options(
    attention: AttentionSpec | None, attn_drop_rate: float, others: dict, **named
) -> PyramidOptions:
    """Options from a constructor's named arguments and its `others`, of which those that are no
    option end up in `extra`.
    """
    attention = attention or AttentionSpec()
    attention = replace(attention, drop=attn_drop_rate or attention.drop)
    known = {
        name: others[name]
        for name in others
        if name in {option.name for option in fields(PyramidOptions)} - {"extra"}
    }
    extra = {name: value for name, value in others.items() if name not in known}
    return PyramidOptions(**named, **known, attention=attention, extra=extra)


class Stage(nn.Module):
    """An optional pre-MLP, some blocks, and patch merging after all but the last stage.

    Shapes: (B, L, C) on a grid -> (B, L, C), or (B, L/4, 2C) after merging.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        downsample: nn.Module | None,
        pre_mlp: PreMlp | None,
        input_resolution: Size,
        dim: int,
        use_checkpoint: bool,
    ):
        super().__init__()
        self.dim = dim
        self.input_resolution = input_resolution
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.depth = len(self.blocks)
        self.downsample = downsample
        self.pre_mlp = pre_mlp

    def forward_blocks(self, x: Tensor, grid: Size) -> Tensor:
        """Everything before the merging: (B, L, C) -> (B, L, C)."""
        if self.pre_mlp is not None:
            x = self.pre_mlp(x)
        return run_blocks(self.blocks, x, grid, again=self.use_checkpoint)

    def forward(self, x: Tensor, grid: Size | None = None) -> Tensor:
        """x: (B, L, C) on `grid` (default: the resolution it was built for)."""
        grid = grid or self.input_resolution
        x = self.forward_blocks(x, grid)
        return x if self.downsample is None else self.downsample(x, grid)

    def next_grid(self, grid: Size) -> Size:
        """The grid after this stage."""
        return grid if self.downsample is None else PatchMerging.merged(grid)

    def flops(self) -> float:
        """Multiply-accumulates for one image."""
        macs = sum(block.flops() for block in self.blocks)
        if self.downsample is not None:
            macs += self.downsample.flops()
        if self.pre_mlp is not None:
            macs += self.pre_mlp.flops(self.input_resolution[0] * self.input_resolution[1])
        return macs


class PyramidTransformer(Backbone):
    """Base of the three families. A subclass sets `norm_first` and gives `make_block`.

    Shapes: (B, in_chans, H, W) -> logits (B, num_classes), or pooled features (B, 8 embed_dim)
        where num_classes is 0.
    """

    norm_first = True  # where the norm of the patch merging stands
    optional_settings = DEPTH | PYRAMID
    section: str  # of MODEL

    @classmethod
    def from_config(cls, config, num_classes: int, **own) -> "PyramidTransformer":
        """See the base; `own` are the arguments of one family."""
        model, node = config.MODEL, config.MODEL[cls.section]
        return cls(
            img_size=pixels(config.DATA.IMG_SIZE),
            patch_size=pixels(node.PATCH_SIZE),
            in_chans=node.IN_CHANS,
            num_classes=num_classes,
            embed_dim=node.EMBED_DIM,
            depths=list(node.DEPTHS),
            num_heads=list(node.NUM_HEADS),
            window_size=pixels(node.WINDOW_SIZE),
            mlp_ratio=node.MLP_RATIO,
            drop_rate=model.DROP_RATE,
            drop_path_rate=model.DROP_PATH_RATE,
            drop_path_profile=model.DROP_PATH_PROFILE,
            ape=node.APE,
            patch_norm=node.PATCH_NORM,
            use_checkpoint=config.TRAIN.USE_CHECKPOINT,
            pre_mlp=model.PRE_MLP.WHERE,
            pre_mlp_ratio=model.PRE_MLP.RATIO,
            pre_mlp_drop_path=model.PRE_MLP.DROP_PATH,
            dynamic_img_size=model.DYNAMIC_IMG_SIZE,
            **own,
        )

    def __init__(self, options: PyramidOptions):
        super().__init__()
        options.check()
        self.num_classes = options.num_classes
        self.embed_dim = options.embed_dim
        self.ape = options.ape
        self.patch_norm = options.patch_norm
        self.num_layers = len(options.depths)
        self.mlp_ratio = options.mlp_ratio
        self.num_features = options.embed_dim * 2 ** (self.num_layers - 1)
        patch_norm = options.norm_layer if options.patch_norm else None
        self.patch_embed = PatchEmbed(
            options.img_size,
            options.patch_size,
            options.in_chans,
            options.embed_dim,
            patch_norm,
            options.dynamic_img_size,
        )
        self.patches_resolution = self.patch_embed.patches_resolution
        if options.ape:
            self.absolute_pos_embed = nn.Parameter(
                trunc_normal(torch.empty(1, self.patch_embed.num_patches, options.embed_dim), 0.02)
            )
        self.pos_drop = nn.Dropout(options.drop_rate)
        self.layers = nn.ModuleList(self._make_stages(options))
        self.norm = options.norm_layer(self.num_features)
        classes = options.num_classes
        self.head = nn.Linear(self.num_features, classes) if classes else nn.Identity()
        self.pre_mlp = self._make_pre_mlp("stem", options, self.embed_dim, 0.0)
        self.initialise()

    def make_block(
        self,
        options: PyramidOptions,
        dim: int,
        resolution: Size,
        stage: int,
        block: int,
        drop_path: nn.Module,
    ) -> nn.Module:
        """Block number `block` of stage number `stage`, both from 0."""
        raise NotImplementedError

    def block_arguments(
        self,
        options: PyramidOptions,
        dim: int,
        resolution: Size,
        stage: int,
        block: int,
        drop_path: nn.Module,
    ) -> dict:
        """What the blocks of Swin and SwinV2 take alike; odd blocks are shifted."""
        return dict(
            dim=dim,
            input_resolution=resolution,
            num_heads=options.num_heads[stage],
            window_size=options.window_size,
            shifted=block % 2 == 1,
            number=block,
            mlp_ratio=options.mlp_ratio,
            drop=options.drop_rate,
            drop_path=drop_path,
            norm_layer=options.norm_layer,
            sw_mlp=options.sw_mlp,
            attention=options.attention,
        )

    def _make_stages(self, options: PyramidOptions) -> Iterable[Stage]:
        depth = sum(options.depths)
        rates = iter(drop_path_rates(options.drop_path_rate, depth, options.drop_path_profile))
        resolution = self.patches_resolution
        for stage, depth in enumerate(options.depths):
            dim = options.embed_dim * 2**stage
            paths = [next(rates) for _ in range(depth)]
            blocks = [
                self.make_block(options, dim, resolution, stage, block, stochastic_depth(path))
                for block, path in enumerate(paths)
            ]
            merging = None
            if stage < self.num_layers - 1:
                merging = PatchMerging(resolution, dim, self.norm_first, options.norm_layer)
            first = paths[0] if paths else 0.0
            pre_mlp = self._make_pre_mlp("stage", options, dim, first)
            yield Stage(blocks, merging, pre_mlp, resolution, dim, options.use_checkpoint)
            resolution = PatchMerging.merged(resolution)

    @staticmethod
    def _make_pre_mlp(
        place: str, options: PyramidOptions, dim: int, drop_path: float
    ) -> PreMlp | None:
        if options.pre_mlp != place:
            return None
        rate = drop_path if options.pre_mlp_drop_path else 0.0
        with own_random_numbers(f"pre_mlp {dim}"):
            pre_mlp = PreMlp(dim, options.pre_mlp_ratio, options.drop_rate, rate)
            return pre_mlp.apply(init_linear_and_norm)

    def _embed(self, x: Tensor) -> tuple[Tensor, Size]:
        """(B, in_chans, H, W) -> tokens (B, L, embed_dim) and their grid."""
        grid = self.patch_embed.grid(tuple(x.shape[-2:]))
        x = self.patch_embed(x)
        if self.ape:
            x = x + resize_positions(self.absolute_pos_embed, self.patches_resolution, grid)
        x = self.pos_drop(x)
        if self.pre_mlp is not None:
            x = self.pre_mlp(x)
        return x, grid

    def forward_features(self, x: Tensor, return_stages: bool = False) -> Tensor | list[Tensor]:
        """(B, in_chans, H, W) -> pooled features (B, num_features).

        With `return_stages`: the map of each stage before its merging, (B, embed_dim * 2^stage, H /
        (patch * 2^stage), W / ...), the last one normalised; for detection and segmentation heads.
        """
        x, grid = self._embed(x)
        if return_stages:
            return self._stage_maps(x, grid)
        for layer in self.layers:
            x = layer(x, grid)
            grid = layer.next_grid(grid)
        return self.norm(x).mean(1)

    def _stage_maps(self, x: Tensor, grid: Size) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            x = layer.forward_blocks(x, grid)
            last = layer.downsample is None
            y = self.norm(x) if last else x
            maps.append(y.transpose(1, 2).unflatten(2, grid))
            if not last:
                x = layer.downsample(x, grid)
            grid = layer.next_grid(grid)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.head(self.forward_features(x))

    def flops(self) -> float:
        """Multiply-accumulates for one image by Swin's count, whose last norm is counted
        on L / 2^stages tokens.
        """
        tokens = self.patches_resolution[0] * self.patches_resolution[1]
        macs = self.patch_embed.flops() + sum(layer.flops() for layer in self.layers)
        macs += (
            self.num_features * tokens // 2**self.num_layers + self.num_features * self.num_classes
        )
        return macs + (0 if self.pre_mlp is None else self.pre_mlp.flops(tokens))

    def layer_groups(self) -> list[list[str]]:
        """See the base. Swin itself counts the absolute position embedding with the head."""
        groups, before = [["patch_embed", "absolute_pos_embed", "pre_mlp"]], []
        for stage, layer in enumerate(self.layers):
            before.append(f"layers.{stage}.pre_mlp")
            for block in range(layer.depth):
                groups.append([f"layers.{stage}.blocks.{block}", *before])
                before = []
            groups[-1].append(f"layers.{stage}.downsample")
        return groups

    def hidden_names(self) -> list[str]:
        """All stages."""
        return ["layers"]

    def position_names(self) -> set[str]:
        """The absolute position embedding."""
        return {"absolute_pos_embed"}

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names without weight decay."""
        return {"relative_position_bias_table"}
