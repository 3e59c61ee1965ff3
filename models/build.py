"""Config node -> keyword arguments -> model."""

from torch import nn

from .attention import AttentionSpec
from .attention.mixed import refuse_softmax_options
from .cait import CaiT
from .pit import PiT
from .refined_vit import RefinedViT
from .sasa_resnet import SasaResNet
from .swiftformer import SwiftFormer
from .swin_mlp import SwinMLP
from .swin_transformer import SwinTransformer
from .swin_transformer_v2 import SwinTransformerV2
from .t2t import T2TViT
from .timm_models import timm_model
from .vit import VisionTransformer


class ModelError(ValueError):
    """A model that cannot be built as configured."""


def build_model(config, num_classes: int | None = None) -> nn.Module:
    """The model that MODEL describes, with `num_classes` outputs (default: MODEL.NUM_CLASSES), on
    the CPU, in training mode.

    Raises: ModelError with the reason.
    """
    kind = config.MODEL.TYPE
    if kind not in BUILDERS:
        raise ModelError(f"MODEL.TYPE is {kind!r}; allowed are {', '.join(BUILDERS)}")
    try:
        model = BUILDERS[kind](
            config, config.MODEL.NUM_CLASSES if num_classes is None else num_classes
        )
    except ValueError as error:
        raise ModelError(f"cannot build MODEL.NAME {config.MODEL.NAME}: {error}") from error
    if config.MODEL.BN_MOMENTUM is not None:
        set_batch_norm_momentum(model, config.MODEL.BN_MOMENTUM)
    return model


def set_batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """running <- (1 - momentum) running + momentum batch, in every BatchNorm of `model`.

    Raises: ModelError if it has none.
    """
    norms = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    if not norms:
        raise ModelError(
            f"MODEL.BN_MOMENTUM {momentum}: {type(model).__name__} has no BatchNorm; set it to None"
        )
    for norm in norms:
        norm.momentum = momentum


def attention_spec(config, own: str = "softmax") -> AttentionSpec:
    """MODEL.ATTENTION as plain values; mixer auto is the family's `own`."""
    node = config.MODEL.ATTENTION
    return AttentionSpec(
        tuple(node.MODIFIERS),
        node.DROP,
        node.LOGIT_SCALE_INIT,
        node.BIAS_SIGMOID,
        node.BACKEND,
        own if node.MIXER == "auto" else node.MIXER,
    )


def _size(value):
    return value if isinstance(value, int) else tuple(value)


def _shared(config, node, num_classes: int) -> dict:
    """The arguments of all families; `node` is MODEL.SWIN, MODEL.SWINV2 or MODEL.SWIN_MLP."""
    model = config.MODEL
    return dict(
        img_size=_size(config.DATA.IMG_SIZE),
        patch_size=_size(node.PATCH_SIZE),
        in_chans=node.IN_CHANS,
        num_classes=num_classes,
        embed_dim=node.EMBED_DIM,
        depths=list(node.DEPTHS),
        num_heads=list(node.NUM_HEADS),
        window_size=_size(node.WINDOW_SIZE),
        mlp_ratio=node.MLP_RATIO,
        drop_rate=model.DROP_RATE,
        drop_path_rate=model.DROP_PATH_RATE,
        ape=node.APE,
        patch_norm=node.PATCH_NORM,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        pre_mlp=model.PRE_MLP.WHERE,
        pre_mlp_ratio=model.PRE_MLP.RATIO,
        pre_mlp_drop_path=model.PRE_MLP.DROP_PATH,
        dynamic_img_size=model.DYNAMIC_IMG_SIZE,
    )


def _swin(config, num_classes: int) -> SwinTransformer:
    node = config.MODEL.SWIN
    return SwinTransformer(
        **_shared(config, node, num_classes),
        qkv_bias=node.QKV_BIAS,
        qk_scale=node.QK_SCALE,
        attention=attention_spec(config),
        sw_mlp=config.MODEL.SW_MLP,
    )


def _swinv2(config, num_classes: int) -> SwinTransformerV2:
    node = config.MODEL.SWINV2
    return SwinTransformerV2(
        **_shared(config, node, num_classes),
        qkv_bias=node.QKV_BIAS,
        attention=attention_spec(config),
        pretrained_window_sizes=list(node.PRETRAINED_WINDOW_SIZES),
        sw_mlp=config.MODEL.SW_MLP,
    )


def _swin_mlp(config, num_classes: int) -> SwinMLP:
    if config.MODEL.ATTENTION.MODIFIERS or config.MODEL.SW_MLP != "off":
        raise ValueError(
            "Swin-MLP has no attention: MODEL.ATTENTION.MODIFIERS must be [] and MODEL.SW_MLP off"
        )
    return SwinMLP(**_shared(config, config.MODEL.SWIN_MLP, num_classes))


def _no_window_options(config) -> None:
    """Refuses what only Swin and its relatives have."""
    model = config.MODEL
    for key, value, neutral in (
        ("PRE_MLP.WHERE", model.PRE_MLP.WHERE, "off"),
        ("SW_MLP", model.SW_MLP, "off"),
        ("DYNAMIC_IMG_SIZE", model.DYNAMIC_IMG_SIZE, False),
    ):
        if value != neutral:
            raise ValueError(
                f"MODEL.{key} {value} is for swin, swinv2 and swin_mlp; {model.TYPE} has no such"
                f" part: set it to {neutral}"
            )


def _global(config, node, num_classes: int) -> dict:
    """The arguments that the families of global attention share; `node` is MODEL.VIT, MODEL.CAIT,
    MODEL.PIT or MODEL.T2T.
    """
    _no_window_options(config)
    model = config.MODEL
    return dict(
        img_size=_size(config.DATA.IMG_SIZE),
        in_chans=node.IN_CHANS,
        num_classes=num_classes,
        embed_dim=node.EMBED_DIM,
        mlp_ratio=node.MLP_RATIO,
        qkv_bias=node.QKV_BIAS,
        norm_eps=node.NORM_EPS,
        drop_rate=model.DROP_RATE,
        drop_path_rate=model.DROP_PATH_RATE,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        attention=attention_spec(config),
    )


def _vit(config, num_classes: int) -> VisionTransformer:
    node = config.MODEL.VIT
    return VisionTransformer(
        **_global(config, node, num_classes),
        patch_size=_size(node.PATCH_SIZE),
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        head_dim=node.HEAD_DIM,
        class_token=node.CLASS_TOKEN,
        pool=node.POOL,
        layer_scale=node.LAYER_SCALE,
        drop_path_profile=config.MODEL.DROP_PATH_PROFILE,
    )


def _cait(config, num_classes: int) -> CaiT:
    node = config.MODEL.CAIT
    return CaiT(
        **_global(config, node, num_classes),
        patch_size=_size(node.PATCH_SIZE),
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        head_dim=node.HEAD_DIM,
        class_depth=node.CLASS_DEPTH,
        mixing=node.MIXING,
        mixing_bias=node.MIXING_BIAS,
        class_context=node.CLASS_CONTEXT,
        class_mixing=node.CLASS_MIXING,
        layer_scale=node.LAYER_SCALE,
        drop_path_profile=config.MODEL.DROP_PATH_PROFILE,
    )


def _pit(config, num_classes: int) -> PiT:
    node = config.MODEL.PIT
    return PiT(
        **_global(config, node, num_classes),
        patch_size=_size(node.PATCH_SIZE),
        depths=list(node.DEPTHS),
        num_heads=list(node.NUM_HEADS),
        stride=node.STRIDE,
        head_dim=node.HEAD_DIM,
        pointwise=node.POINTWISE,
        class_position=node.CLASS_POSITION,
        distilled=node.DISTILLED,
        drop_path_profile=config.MODEL.DROP_PATH_PROFILE,
    )


def _t2t(config, num_classes: int) -> T2TViT:
    node = config.MODEL.T2T
    return T2TViT(
        **_global(config, node, num_classes),
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        token_transformers=node.TOKEN_TRANSFORMERS,
        token_dim=node.TOKEN_DIM,
        preset=node.PRESET,
        modified=node.MODIFIED,
        drop_path_profile=config.MODEL.DROP_PATH_PROFILE,
    )


def _refined_vit(config, num_classes: int) -> RefinedViT:
    node = config.MODEL.REFINED_VIT
    return RefinedViT(
        **_global(config, node, num_classes),
        patch_size=_size(node.PATCH_SIZE),
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        stem=node.STEM,
        share_every=node.SHARE_EVERY,
        carry=node.CARRY,
        refine=node.REFINE,
        mlp_gain=node.MLP_GAIN,
        aux_head=node.AUX_HEAD,
        cos_reg=node.COS_REG,
        cos_pairs=node.COS_PAIRS,
        drop_path_profile=config.MODEL.DROP_PATH_PROFILE,
    )


def _map_based(config, node, own: str, num_classes: int) -> tuple[AttentionSpec, dict]:
    """What MODEL.ATTENTION says to a family that works on maps with BatchNorm, whose `own` mixer is
    no softmax attention, and the arguments that these families share; `node` is its section.
    """
    _no_window_options(config)
    model = config.MODEL
    if config.TRAIN.USE_CHECKPOINT:
        raise ValueError(
            f"TRAIN.USE_CHECKPOINT True: {model.TYPE} has BatchNorm, whose running statistics"
            " computing a block again would update twice; set it to False"
        )
    spec = attention_spec(config, own)
    if spec.mixer == "softmax":
        raise ValueError(
            f"MODEL.ATTENTION.MIXER softmax: {model.TYPE} attends on maps of up to a quarter of the"
            f" image's sides, too many tokens for N x N maps; leave it at auto, which is {own} here"
        )
    refuse_softmax_options(spec)
    return spec, dict(
        img_size=_size(config.DATA.IMG_SIZE),
        in_chans=node.IN_CHANS,
        num_classes=num_classes,
        depths=list(node.DEPTHS),
        drop_rate=model.DROP_RATE,
        drop_path_rate=model.DROP_PATH_RATE,
        drop_path_profile=model.DROP_PATH_PROFILE,
    )


def _swiftformer(config, num_classes: int) -> SwiftFormer:
    node = config.MODEL.SWIFTFORMER
    spec, shared = _map_based(config, node, "efficient_additive", num_classes)
    return SwiftFormer(
        **shared,
        embed_dims=list(node.EMBED_DIMS),
        mlp_ratio=node.MLP_RATIO,
        vit_num=node.VIT_NUM,
        attention=spec.mixer,
        num_heads=list(node.NUM_HEADS),
        layer_scale=node.LAYER_SCALE,
        distillation=node.DISTILL_HEAD,
    )


def _sasa_resnet(config, num_classes: int) -> SasaResNet:
    node = config.MODEL.SASA_RESNET
    spec, shared = _map_based(config, node, "local", num_classes)
    if spec.mixer != "local":
        raise ValueError(
            f"MODEL.ATTENTION.MIXER {spec.mixer}: sasa_resnet has local attention, whose options"
            " are keys of MODEL.SASA_RESNET; leave it at auto, or take MODEL.TYPE swin, vit or"
            " swiftformer"
        )
    return SasaResNet(
        **shared,
        width=node.WIDTH,
        stem=node.STEM,
        conv_groups=list(node.CONV_GROUPS),
        num_heads=node.NUM_HEADS,
        kernel_size=node.KERNEL_SIZE,
        rel=node.REL,
        pad=node.PAD,
        scale=node.SCALE,
        grouped=node.GROUPED,
        content=node.CONTENT,
        stem_heads=node.STEM_HEADS,
        mixtures=node.STEM_MIXTURES,
    )


def _timm(config, num_classes: int) -> nn.Module:
    _no_window_options(config)
    node, model = config.MODEL.TIMM, config.MODEL
    if model.DROP_PATH_PROFILE != "linear":
        raise ValueError(
            "MODEL.DROP_PATH_PROFILE constant: timm's models raise stochastic depth linearly; set"
            " it to linear"
        )
    return timm_model(
        node.MODEL or model.NAME,
        num_classes,
        _size(config.DATA.IMG_SIZE),
        node.IN_CHANS,
        drop_rate=model.DROP_RATE,
        drop_path_rate=model.DROP_PATH_RATE,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        pretrained=node.PRETRAINED,
        attention=attention_spec(config),
    )


BUILDERS = {
    "swin": _swin,
    "swinv2": _swinv2,
    "swin_mlp": _swin_mlp,
    "vit": _vit,
    "cait": _cait,
    "pit": _pit,
    "t2t": _t2t,
    "refined_vit": _refined_vit,
    "swiftformer": _swiftformer,
    "sasa_resnet": _sasa_resnet,
    "timm": _timm,
}
