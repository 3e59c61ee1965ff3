"""Any transformer of timm whose attention modules are known here: they are exchanged for this
project's, under the same keys.
"""

import logging
from functools import cache

import torch
from torch import nn

from checkpoint import check_initial, loses_bias, model_residual, to_qk_residual
from kernels.window_attention.layout import Size, to_pair
from models.attention import AttentionSpec
from models.attention.softmax import SoftmaxAttention
from models.attention.timm_attention import full_name, replacement
from models.base.backbone import BACKBONES, Backbone, attention_spec
from models.base.options import SOFTMAX, pixels
from registry import did_you_mean, option_annotations, parse_call, read_options

from .counting import count_macs

_logger = logging.getLogger(__name__)

# One of each kind that fits; not every vit_* does.
FITTING = (
    "vit_small_patch16_224",
    "deit_small_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "cait_xxs24_224",
)
INSTEAD = {
    "swinv2": "swinv2",
    "swin": "swin",
    "swiftformer": "swiftformer",
    "pit": "pit",
    "resnet": "sasa_resnet",
}  # MODEL.TYPE by name

# Blocks that add what their attention gives, scaled by channel or not, to the residual stream.
PRE_NORM_BLOCKS = (
    "timm.models.vision_transformer.Block",
    "timm.models.beit.Block",
    "timm.models.cait.LayerScaleBlock",
)
SETTINGS = {  # options of timm's constructors that have a key of their own
    "num_classes": "MODEL.NUM_CLASSES",
    "in_chans": "MODEL.TIMM.IN_CHANS",
    "img_size": "DATA.IMG_SIZE",
}


@BACKBONES.register("timm")
class TimmBackbone(Backbone):
    """What a timm model is to this program beside its own class: mixed in front of it, so that its
    parameters keep their names.

    timm's layers, initial values and forward stay; its `forward_features` returns tokens, not
    pooled features.
    """

    input_shape: tuple[int, int, int]
    optional_settings = SOFTMAX | {"TRAIN.USE_CHECKPOINT"}

    @classmethod
    def from_config(cls, config, num_classes: int) -> nn.Module:
        """See the base."""
        model, node = config.MODEL, config.MODEL.TIMM
        return timm_model(
            node.MODEL or model.NAME,
            num_classes,
            pixels(config.DATA.IMG_SIZE),
            node.IN_CHANS,
            drop_rate=model.DROP_RATE,
            drop_path_rate=model.DROP_PATH_RATE,
            use_checkpoint=config.TRAIN.USE_CHECKPOINT,
            pretrained=node.PRETRAINED,
            head_reset=model.HEAD_RESET,
            # a run that goes on, or is evaluated, loads the weights of its own later
            init_over=model.INIT_OVER_PRETRAINED or config.EVAL_MODE or bool(model.RESUME),
            attention=attention_spec(config),
        )

    def initialise_weights(self) -> None:
        """Nothing: timm has drawn its own."""

    def layer_groups(self) -> list[list[str]]:
        """See the base; timm registers what comes before the blocks in front of them."""
        tops = list(dict.fromkeys(name.partition(".")[0] for name, _ in self.named_parameters()))
        groups = [tops[: tops.index("blocks")]]
        for name in ("blocks", "blocks_token_only"):
            groups += [[f"{name}.{index}"] for index in range(len(getattr(self, name, ())))]
        return groups

    @property
    def head_names(self) -> tuple[str, ...]:
        """What timm calls the classifier, one name or several."""
        names = self.pretrained_cfg.get("classifier") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    def classifiers(self) -> list[str]:
        """See the base; timm's names may have several parts."""
        return [name for name in self.head_names if isinstance(self.get_submodule(name), nn.Linear)]

    def position_names(self) -> set[str]:
        """What timm does not decay."""
        theirs = getattr(super(Backbone, self), "no_weight_decay", set)
        return set(theirs())

    def flops(self) -> int:
        """Multiply-accumulates for one image, attention products included, counted by running
        it.
        """
        like = next(self.parameters())
        return count_macs(
            self, torch.zeros(1, *self.input_shape, device=like.device, dtype=like.dtype)
        ).with_attention


def timm_model(
    text: str,
    num_classes: int = 1000,
    img_size: int | Size = 224,
    in_chans: int = 3,
    *,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    use_checkpoint: bool = False,
    pretrained: bool = False,
    head_reset: bool = False,
    init_over: bool = False,
    attention: AttentionSpec | None = None,
) -> nn.Module:
    """A timm model with its attention modules exchanged.

    Args:
        text: timm's name, or "name(option=value, ...)" with options of the model's constructor.
        drop_rate: dropout after the embedding, the attention's projection and in the MLPs (timm's
            pos_drop_rate and proj_drop_rate).
        pretrained: start from timm's released weights, which it fetches; with `qk_residual` they
            become the residual, so that the model starts as the released function.
        head_reset: with `pretrained`, start the head at zero.
        init_over: modifiers that only set initial values (init_identity) set them over the released
            weights; False refuses both together.
        attention: what is modified.
    Shapes: (B, in_chans, H, W) -> (B, num_classes). State-dict keys are timm's; modifiers' come
        under attn.modifiers.<name>.
    Raises: ValueError for a name or an option that timm does not know, and for a model whose
        attention cannot be exchanged.
    """
    spec, size = attention or AttentionSpec(), to_pair(img_size)
    if spec.mixer != "softmax":
        raise ValueError(
            f"timm: mixer {spec.mixer} has other parameters than the attention it would replace, so"
            " timm's weights could not load; set MODEL.ATTENTION.MIXER softmax, or take"
            " MODEL.TYPE vit"
        )
    drops = {"pos_drop_rate": drop_rate, "proj_drop_rate": drop_rate} if drop_rate else {}
    without_numbers = torch.get_default_device().type == "meta"  # nothing to load into
    net, problem = _create(
        text,
        pretrained and not without_numbers,
        dict(num_classes=num_classes, in_chans=in_chans),
        dict(img_size=size, drop_path_rate=drop_path_rate, **drops),
    )
    exchange_attention(net, text, spec)
    if problem:  # built without the image size and the rates, which would quietly be others
        raise ValueError(f"timm cannot build {text}: {problem}")
    net.__class__ = _mixed(type(net))
    net.input_shape = (in_chans, *size)
    if use_checkpoint:
        net.set_grad_checkpointing(True)
    if pretrained:
        _keep_function(net, head_reset)
    net.initialise()
    if pretrained:
        check_initial(net, init_over, "MODEL.TIMM.PRETRAINED True")
    return net


@torch.no_grad()
def _keep_function(net: nn.Module, head_reset: bool) -> None:
    """Turns released weights into those with which the modified model is the same function."""
    side = model_residual(net)
    released = {key: value for key, value in net.state_dict().items() if key.endswith("qkv.weight")}
    net.load_state_dict(to_qk_residual(released, side), strict=False)
    if side != "none" and loses_bias(net):
        _logger.warning(
            "qk_residual(drop_bias=True) ignores q and k biases that timm's weights use: the"
            " function is not the same"
        )
    for name in net.classifiers() if head_reset else ():
        for parameter in net.get_submodule(name).parameters():
            parameter.zero_()


def _create(
    text: str, pretrained: bool, always: dict, transformer: dict
) -> tuple[nn.Module, Exception | None]:
    """timm's model; one that does not take the arguments `transformer` is built without them, to be
    refused by name: then with what timm said.
    """
    import timm  # here: it takes seconds

    name, _, rest = text.partition("(")
    options = parse_call("options(" + rest)[1] if rest else {}
    if not timm.is_model(name):
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r} (MODEL.TIMM.MODEL, or MODEL.NAME where"
            f" that is empty){did_you_mean(name, timm.list_models())}"
        )
    try:
        options = _read_options(name, options, always | transformer)
    except ValueError as error:
        raise ValueError(f"timm cannot build {text}: {error}") from error
    problem = None
    for arguments in (always | transformer, always):
        try:
            net = timm.create_model(name, pretrained=pretrained, **(arguments | options))
            return net, problem
        except TypeError as error:
            problem = error
        except (RuntimeError, AssertionError, OSError) as error:
            raise ValueError(f"timm cannot build {text}: {error}") from error
    raise ValueError(f"timm cannot build {text}: {problem}") from problem


def _read_options(name: str, options: dict, arguments: dict) -> dict:
    """Options of a spec as the constructor of timm's class takes them. Raises: ValueError for what
    it does not take, and for a contradiction to the settings.
    """
    import timm  # here: it takes seconds

    if not options:
        return options
    known: dict = {}
    with torch.device("meta"):
        cls = type(timm.create_model(name))
    for part in cls.__mro__:
        own = option_annotations(part.__init__, 1)
        known = (own or {}) | known
        if own is not None:  # else it hands its options on to the class behind it
            break
    for machine in ("device", "dtype"):
        known.pop(machine, None)
    read = read_options("the model", options, known)
    for option, key in SETTINGS.items():
        given, asked = read.get(option), arguments[option]
        if given is not None and given != asked and (given, given) != asked:
            raise ValueError(f"{option} is {given}, {key} says {asked}; leave the option out")
    return read


def exchange_attention(net: nn.Module, name: str, spec: AttentionSpec) -> None:
    """Replaces timm's attention by this project's, in place.

    Raises: ValueError for a model without attention of a known class, or without a fixed grid of
        patches.
    """
    found = {path: module for path, module in net.named_modules() if replacement(module)}
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if not found or grid is None:
        raise ValueError(
            f"timm model {name} ({type(net).__name__}) {_why(net, bool(found))}; those that fit"
            " have timm's Attention on one grid of patches, such as"
            f" {', '.join(FITTING)}{_similar(name)}"
        )
    if not isinstance(getattr(net, "patch_drop", None), (nn.Identity, type(None))):
        raise ValueError(
            f"timm model {name}: patch_drop_rate drops tokens in training, which leaves no grid;"
            " set it to 0"
        )
    for path, module in found.items():
        parent, _, leaf = path.rpartition(".")
        block = net.get_submodule(parent)
        prefix = getattr(net, "num_prefix_tokens", 0)
        attention = replacement(module)(module, tuple(grid), prefix, spec)
        if isinstance(attention, SoftmaxAttention) and full_name(block) in PRE_NORM_BLOCKS:
            attention.ends_branch = not attention.reads_stream()
        setattr(block, leaf, attention)


def _similar(name: str) -> str:
    """The end of a refusal: a family of this project that does what the model does."""
    kind = next((kind for part, kind in INSTEAD.items() if name.startswith(part)), None)
    return f"; MODEL.TYPE {kind} is similar" if kind else ""


def _why(net: nn.Module, found: bool) -> str:
    if found:
        return "has no fixed grid of patches (patch_embed.grid_size)"
    others = sorted(
        {type(module).__name__ for module in net.modules() if "Att" in type(module).__name__}
    )
    return "has no attention module of a known class" + (
        f", but {', '.join(others)}" if others else ""
    )


@cache
def _mixed(cls: type) -> type:
    """One class per timm class, so that types of equal models are equal."""
    return type(cls.__name__, (TimmBackbone, cls), {"__module__": __name__, "__doc__": cls.__doc__})
