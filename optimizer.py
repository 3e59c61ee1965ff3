"""Config -> optimizer: the parameter groups, layer-wise learning rates, and the weight decay of the query and key rows."""

import difflib
import logging
import re

import timm.optim
import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

NAMES = ("adamw", "sgd", "lamb", "muon", "fused_adam", "fused_lamb")
# Settings that a resumed run takes from its own config, not from the checkpoint (trap T11); the rest of a group is state.
FOLLOW_CONFIG = ("lr", "weight_decay", "betas", "eps", "momentum", "nesterov", "lr_scale", "group_name", "use_fallback", "fused", "foreach")


class OptimizerError(ValueError):
    """An optimizer that cannot be built or continued as asked: one line that says why and how to mend it."""


def build_optimizer(config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer named by TRAIN.OPTIMIZER.NAME over the groups of `parameter_groups`.

    A resumed optimizer keeps its moments and step counts, and takes learning rate, weight decay and the like from `config`.

    Args:
        config: reads TRAIN.{OPTIMIZER, WEIGHT_DECAY, LAYER_DECAY, QK_WEIGHT_DECAY}.
        model: on its device and not wrapped, so that parameter names are those of the state dict.
        lr: peak learning rate, already scaled by the batch size (`lr_scheduler.scaled_rates`).
    Raises: OptimizerError for unknown names and for combinations without an exact meaning.
    """
    train = config.TRAIN
    name = train.OPTIMIZER.NAME.lower()
    groups = parameter_groups(model, lr, train.WEIGHT_DECAY, train.LAYER_DECAY)
    optimizer = _create(name, model, groups, lr, train.OPTIMIZER)
    for group in optimizer.param_groups:
        group["optimizer"] = type(optimizer).__name__  # travels in the state dict, so that a changed optimizer is noticed
    optimizer.register_load_state_dict_pre_hook(_follow_config)
    if train.QK_WEIGHT_DECAY != 1:
        decay_query_key_rows(optimizer, query_key_weights(model), train.QK_WEIGHT_DECAY)
    return optimizer


# ---- parameter groups


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Trainable parameters in groups, ordered as in the reference: decayed, not decayed; with layer decay by first appearance.

    Not decayed: 1-D parameters, names ending in `.bias`, names in `model.no_weight_decay()`, and names that contain one of
    `model.no_weight_decay_keywords()`. Keywords are substrings of the full name. The reference's SimMIM wrapper prefixed
    them, so that none ever matched and its bias tables were decayed (trap T8): a wrapper here passes them on as they are.

    Layer decay multiplies `lr` once, by layer_decay ** (last layer - layer_id); a group's `lr_scale` repeats it for the reader.
    """
    decayed = decay_rule(model)
    depths = stage_depths(model) if layer_decay != 1 else []
    groups = {} if depths else {decay: _group(decay, lr, weight_decay) for decay in (True, False)}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = decayed(name, p)
        layer = layer_id(name, depths) if depths else None
        key = (layer, decay) if depths else decay
        if key not in groups:
            scale = layer_decay ** (sum(depths) + 1 - layer)
            label = f"layer_{layer}_{'decay' if decay else 'no_decay'}"
            groups[key] = {"group_name": label, **_group(decay, lr * scale, weight_decay), "lr_scale": scale}
        groups[key]["params"].append(p)
    return [group for group in groups.values() if group["params"]]


def _group(decay: bool, lr: float, weight_decay: float) -> dict:
    return {"params": [], "lr": lr, "weight_decay": weight_decay if decay else 0.0}


def decay_rule(model: nn.Module):
    """(name, parameter) -> whether weight decay applies, by what the model says of itself."""
    names = set(getattr(model, "no_weight_decay", set)())
    keywords = set(getattr(model, "no_weight_decay_keywords", set)())
    return lambda name, p: not (p.ndim == 1 or name.endswith(".bias") or name in names or any(k in name for k in keywords))


def stage_depths(model: nn.Module) -> list[int]:
    """Blocks of each stage, read off the parameter names `layers.I.blocks.J`."""
    names = (name for name, _ in model.named_parameters())
    blocks = {(int(m[1]), int(m[2])) for name in names if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
    if not blocks:
        raise OptimizerError(
            f"TRAIN.LAYER_DECAY: {type(model).__name__} has no parameters named layers.I.blocks.J, so its depth is unknown; set it to 1.0")
    return [sum(stage == i for stage, _ in blocks) for i in range(1 + max(stage for stage, _ in blocks))]


def layer_id(name: str, depths: list[int]) -> int:
    """Depth of a parameter: 0 the patch embedding, 1 + b block b counted over all stages, a downsampling as the block before it,
    and sum(depths) + 1 the rest: norm, head and, as in the reference, the absolute position embedding.

    This project's own: the pre-MLP of the stem counts as patch embedding, that of a stage as the stage's first block.
    """
    parts = name.split(".")
    if parts[0] in ("patch_embed", "mask_token", "pre_mlp"):
        return 0
    if parts[0] == "layers":
        stage = int(parts[1])
        within = {"blocks": lambda: 1 + int(parts[3]), "downsample": lambda: depths[stage], "pre_mlp": lambda: 1}
        if parts[2] in within:
            return sum(depths[:stage]) + within[parts[2]]()
    return sum(depths) + 1


# ---- creation


def _create(name: str, model: nn.Module, groups: list[dict], lr: float, settings) -> torch.optim.Optimizer:
    betas, eps, momentum = tuple(settings.BETAS), settings.EPS, settings.MOMENTUM
    if name in ("adamw", "fused_adam"):
        fused = name == "fused_adam" or next(model.parameters()).is_cuda  # one kernel for all parameters; the same update
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused or None)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if name in ("lamb", "fused_lamb"):
        return _create_timm("lamb", groups, lr, betas, eps, momentum)
    if name == "muon":
        return _create_timm("muon", muon_groups(model, groups), lr, betas, eps, momentum)
    if name.startswith("timm:"):
        return _create_timm(name.removeprefix("timm:"), groups, lr, betas, eps, momentum)
    raise OptimizerError(f"TRAIN.OPTIMIZER.NAME {name!r} is not known{_nearest(name, NAMES)}; allowed: {', '.join(NAMES)}, timm:<name>")


def _create_timm(name: str, groups: list[dict], lr: float, betas: tuple, eps: float, momentum: float) -> torch.optim.Optimizer:
    """timm's optimizer over finished groups, which timm passes on unread: it neither regroups nor rescales them."""
    known = timm.optim.list_optimizers()
    if name.startswith("lookahead_"):
        raise OptimizerError(f"TRAIN.OPTIMIZER.NAME timm:{name}: timm's lookahead wrapper cannot be saved and resumed exactly; "
                             f"use timm:{name.removeprefix('lookahead_')}")
    if name not in known:
        raise OptimizerError(f"TRAIN.OPTIMIZER.NAME: timm {timm.__version__} has no optimizer {name!r}{_nearest(name, known)}; "
                             "timm.optim.list_optimizers() lists them")
    info = timm.optim.get_optimizer_info(name)
    if info.second_order:
        raise OptimizerError(f"TRAIN.OPTIMIZER.NAME timm:{name} needs second derivatives, which this trainer does not form; use another")
    options = {"betas": betas} if info.has_betas and info.num_betas == 2 else {}
    try:
        return timm.optim.create_optimizer_v2(groups, name, lr=lr, momentum=momentum, eps=eps, **options)
    except (ImportError, AssertionError) as problem:  # timm asserts that apex, bitsandbytes or CUDA is there
        raise OptimizerError(f"TRAIN.OPTIMIZER.NAME timm:{name} cannot be built here: {problem}") from problem


def muon_groups(model: nn.Module, groups: list[dict]) -> list[dict]:
    """Splits each group: decayed matrices inside `layers.` or `blocks.` go to Muon, all else to the AdamW in the same object.

    Embedding, head, convolutions, tables and modifiers' parameters are no hidden linear maps, so orthogonal updates have no
    meaning for them. Muon's updates are scaled to AdamW's root mean square (timm's default), so one learning rate fits both.
    """
    decayed = decay_rule(model)
    hidden = {p for name, p in model.named_parameters() if p.ndim == 2 and _is_hidden(name) and decayed(name, p)}
    split = []
    for group in groups:
        for fallback in (False, True):
            params = [p for p in group["params"] if (p not in hidden) == fallback]
            split.append({**group, "params": params, "use_fallback": fallback, "nesterov": not fallback})
    return [group for group in split if group["params"]]


def _is_hidden(name: str) -> bool:
    parts = name.split(".")
    return ("layers" in parts or "blocks" in parts) and "modifiers" not in parts


def _nearest(name: str, known) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {found[0]})" if found else ""


# ---- weight decay of the query and key rows


def query_key_weights(model: nn.Module) -> list[nn.Parameter]:
    """The trainable `attn.qkv.weight` (3C, C) of every block; rows [0:2C] make the queries and keys."""
    found = [p for name, p in model.named_parameters() if name.endswith("attn.qkv.weight") and p.requires_grad]
    if not found:
        raise OptimizerError(f"TRAIN.QK_WEIGHT_DECAY: {type(model).__name__} has no trainable attn.qkv.weight; set it to 1.0")
    return found


def decay_query_key_rows(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], multiplier: float) -> None:
    """Multiplies the weight decay of rows [0:2C] of each (3C, C) weight by `multiplier`, in every later step.

    A step hook that reads each group's present lr and weight_decay, so it holds under schedules and after a resume:

        AdamW, Muon (W <- (1 - lr wd) W - lr u):   W_qk <- W_qk (1 - lr wd m) / (1 - lr wd) before the step
        SGD (g <- g + wd W, then momentum):        g_qk <- g_qk + wd (m - 1) W_qk           before the step

    Raises: OptimizerError for optimizers that mix the decay into something non-linear, such as LAMB's trust ratio.
    """
    if multiplier < 0:
        raise OptimizerError(f"TRAIN.QK_WEIGHT_DECAY {multiplier} is negative; allowed: 0 (no decay of q and k) or more, 1.0 = off")
    apply = _row_decay_of(optimizer)
    if apply is None:
        raise OptimizerError(f"TRAIN.QK_WEIGHT_DECAY {multiplier}: {type(optimizer).__name__} has no exact form of a decay per row; "
                             "use adamw, fused_adam, muon or sgd, or set it to 1.0")
    chosen = set(weights)

    def before_step(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            params = [p for p in group["params"] if p in chosen and p.grad is not None]  # no gradient, no step, no decay
            if params and group["weight_decay"]:
                apply(params, group["lr"], group["weight_decay"], multiplier, getattr(optimizer, "found_inf", None))

    optimizer.register_step_pre_hook(before_step)


def _row_decay_of(optimizer):
    if isinstance(optimizer, (torch.optim.AdamW, timm.optim.Muon)):
        return _decay_decoupled
    return _decay_coupled if isinstance(optimizer, torch.optim.SGD) else None


@torch.no_grad()
def _decay_decoupled(params: list[Tensor], lr: float, weight_decay: float, multiplier: float, found_inf: Tensor | None) -> None:
    factor = (1 - lr * weight_decay * multiplier) / (1 - lr * weight_decay)
    if found_inf is not None:  # a fused optimizer decides on the device whether this step is skipped
        factor = torch.where(found_inf > 0, 1.0, factor)
    torch._foreach_mul_([_query_key_rows(p) for p in params], factor)


@torch.no_grad()
def _decay_coupled(params: list[Tensor], lr: float, weight_decay: float, multiplier: float, found_inf: Tensor | None) -> None:
    rows = [_query_key_rows(p) for p in params]
    torch._foreach_add_([_query_key_rows(p.grad) for p in params], rows, alpha=weight_decay * (multiplier - 1))


def _query_key_rows(weight: Tensor) -> Tensor:
    return weight[: 2 * (len(weight) // 3)]  # (3C, C) -> (2C, C), a view


# ---- resuming


def _follow_config(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Before loading: refuses another optimizer's state, and puts this run's settings in place of the stored ones."""
    stored, own = state["param_groups"], optimizer.param_groups
    kinds = {group.get("optimizer", own[0]["optimizer"]) for group in stored}
    if kinds != {own[0]["optimizer"]}:
        raise OptimizerError(f"the checkpoint holds the state of {', '.join(sorted(kinds))}, this run uses {own[0]['optimizer']}; "
                             "set TRAIN.OPTIMIZER.NAME to the stored one, or start from the weights alone with --pretrained")
    if [len(g["params"]) for g in stored] != [len(g["params"]) for g in own]:
        raise OptimizerError(f"the checkpoint's optimizer has parameter groups of {[len(g['params']) for g in stored]} tensors, "
                             f"this run's {[len(g['params']) for g in own]}; the model or TRAIN.LAYER_DECAY has changed")
    for setting, old, new in settings_changed(stored, own):
        _logger.warning("resuming: %s is %s in the checkpoint and %s in the config; the config is followed", setting, old, new)
    merged = [{**g, **{k: mine[k] for k in FOLLOW_CONFIG if k in mine}} for g, mine in zip(stored, own, strict=True)]
    return {**state, "param_groups": merged}


def settings_changed(stored: list[dict], own: list[dict]) -> list[tuple[str, object, object]]:
    """(setting, stored value, own value) where two lists of groups differ, once a setting; lr is left to the schedule's own report."""
    changed = {}
    for old, new in zip(stored, own, strict=True):
        for key in FOLLOW_CONFIG[1:]:
            if key in old and key in new and _plain(old[key]) != _plain(new[key]):
                changed.setdefault(key, (key, old[key], new[key]))
    return list(changed.values())


def _plain(value):
    return tuple(value) if isinstance(value, (list, tuple)) else value
