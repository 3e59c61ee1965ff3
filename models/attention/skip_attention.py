"""Global attention with a skip of its own behind the projection, as in T2T-ViT."""

from torch import Tensor

from registry import check_choice

from .geometry import Geometry
from .global_attention import GlobalAttention
from .spec import AttentionSpec


class SkipAttention(GlobalAttention):
    """proj(softmax(..) v), plus v ("value") or the module's input ("input"), or nothing more
    ("none").

    With "value" the result is as wide as v, whatever the input: attention can so change the number
    of channels.
    Shapes: (B, N, C) -> (B, N, heads * D) with "value", else (B, N, C). State dict: qkv, proj.
    Raises: ValueError for another word, and for a mixer in the place of softmax attention, which
        has no v to add.
    Source: Tokens-to-Token ViT, arXiv:2101.11986, and its released code.
    """

    def __init__(
        self,
        geometry: Geometry,
        spec: AttentionSpec,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        skip: str = "value",
    ):
        if spec.mixer != "softmax":
            raise ValueError(
                f"t2t: mixer {spec.mixer} does not fit, as the token transformers change the width"
                " and skip by v; set MODEL.ATTENTION.MIXER softmax, or take MODEL.TYPE vit"
            )
        check_choice("t2t: skip", skip, ("none", "value", "input"))
        super().__init__(
            geometry,
            spec,
            qkv_bias,
            qk_scale,
            proj_drop,
            geometry.inner if skip == "value" else geometry.dim,
        )
        self.skip = skip

    def finish(self, y: Tensor, x: Tensor, qkv: Tensor) -> Tensor:
        """The result of the projection with the skip."""
        added = {"none": None, "value": qkv[..., 2 * self.geometry.inner :], "input": x}[self.skip]
        return y if added is None else y + added
