"""Config node -> keyword arguments -> model."""

from torch import nn

from .attention import AttentionSpec
from .swin_mlp import SwinMLP
from .swin_transformer import SwinTransformer
from .swin_transformer_v2 import SwinTransformerV2


class ModelError(ValueError):
    """A model that cannot be built as configured."""


def build_model(config, num_classes: int | None = None) -> nn.Module:
    """The model that MODEL describes, with `num_classes` outputs (default: MODEL.NUM_CLASSES), on the CPU, in training mode.

    Raises: ModelError with the reason.
    """
    builders = {"swin": _swin, "swinv2": _swinv2, "swin_mlp": _swin_mlp}
    kind = config.MODEL.TYPE
    if kind not in builders:
        raise ModelError(f"MODEL.TYPE is {kind!r}; allowed are {', '.join(builders)}")
    try:
        return builders[kind](config, config.MODEL.NUM_CLASSES if num_classes is None else num_classes)
    except ValueError as error:
        raise ModelError(f"cannot build MODEL.NAME {config.MODEL.NAME}: {error}") from error


def attention_spec(config) -> AttentionSpec:
    """MODEL.ATTENTION as plain values."""
    node = config.MODEL.ATTENTION
    return AttentionSpec(tuple(node.MODIFIERS), node.DROP, node.LOGIT_SCALE_INIT, node.BIAS_SIGMOID, node.BACKEND)


def _size(value):
    return value if isinstance(value, int) else tuple(value)


def _shared(config, node, num_classes: int) -> dict:
    """The arguments of all families; `node` is MODEL.SWIN, MODEL.SWINV2 or MODEL.SWIN_MLP."""
    model = config.MODEL
    return dict(
        img_size=_size(config.DATA.IMG_SIZE), patch_size=_size(node.PATCH_SIZE), in_chans=node.IN_CHANS, num_classes=num_classes,
        embed_dim=node.EMBED_DIM, depths=list(node.DEPTHS), num_heads=list(node.NUM_HEADS), window_size=_size(node.WINDOW_SIZE),
        mlp_ratio=node.MLP_RATIO, drop_rate=model.DROP_RATE, drop_path_rate=model.DROP_PATH_RATE, ape=node.APE, patch_norm=node.PATCH_NORM,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT, pre_mlp=model.PRE_MLP.WHERE, pre_mlp_ratio=model.PRE_MLP.RATIO,
        pre_mlp_drop_path=model.PRE_MLP.DROP_PATH, dynamic_img_size=model.DYNAMIC_IMG_SIZE)


def _swin(config, num_classes: int) -> SwinTransformer:
    node = config.MODEL.SWIN
    return SwinTransformer(**_shared(config, node, num_classes), qkv_bias=node.QKV_BIAS, qk_scale=node.QK_SCALE,
                           attention=attention_spec(config), sw_mlp=config.MODEL.SW_MLP)


def _swinv2(config, num_classes: int) -> SwinTransformerV2:
    node = config.MODEL.SWINV2
    return SwinTransformerV2(**_shared(config, node, num_classes), qkv_bias=node.QKV_BIAS, attention=attention_spec(config),
                             pretrained_window_sizes=list(node.PRETRAINED_WINDOW_SIZES), sw_mlp=config.MODEL.SW_MLP)


def _swin_mlp(config, num_classes: int) -> SwinMLP:
    if config.MODEL.ATTENTION.MODIFIERS or config.MODEL.SW_MLP != "off":
        raise ValueError("Swin-MLP has no attention: MODEL.ATTENTION.MODIFIERS must be [] and MODEL.SW_MLP off")
    return SwinMLP(**_shared(config, config.MODEL.SWIN_MLP, num_classes))
