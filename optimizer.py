"""Config -> optimizer: the parameter groups, layer-wise learning rates, and the weight decay of the
query and key rows.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from registry import Registry, UserError, did_you_mean

_logger = logging.getLogger(__name__)

OPTIMIZERS = Registry("optimizer")
# Settings of a group that a resumed run takes from its own config, not from the checkpoint; the
# rest of a group is state.
FOLLOW_CONFIG = (
    "lr",
    "weight_decay",
    "betas",
    "eps",
    "momentum",
    "nesterov",
    "lr_scale",
    "group_name",
    "use_fallback",
    "fused",
    "foreach",
    "amsgrad",
    "maximize",
    "capturable",
    "differentiable",
    "dampening",
    "decoupled_weight_decay",
)


class OptimizerError(UserError, ValueError):
    """An optimizer that cannot be built or continued as asked: one line that says why and how to
    fix it.
    """


@dataclass(frozen=True)
class Request:
    """What an optimizer is built from: the groups of `parameter_groups`, each with its own lr and
    weight_decay, the model they belong to, and TRAIN.OPTIMIZER's settings.
    """

    model: nn.Module
    groups: list[dict]
    lr: float
    betas: tuple[float, float]
    eps: float
    momentum: float

    @property
    def device(self) -> str:
        """The type of the model's device."""
        return next(self.model.parameters()).device.type


# (weights, lr, weight_decay, multiplier, found_inf) -> None: see `decay_query_key_rows`
RowDecay = Callable[[list[nn.Parameter], float, float, float, Tensor | None], None]


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer.

    build: makes it.
    row_decay: the exact form of a weight decay per row, applied before each step; None where the
        optimizer mixes the decay into something non-linear, such as LAMB's trust ratio.
    """

    build: Callable[[Request], torch.optim.Optimizer]
    row_decay: RowDecay | None = None


def register_optimizer(name: str, row_decay: RowDecay | None = None) -> Callable:
    """Decorator of a function Request -> optimizer: registers it under `name`."""

    def register(build: Callable[[Request], torch.optim.Optimizer]) -> Callable:
        OPTIMIZERS.register(name, OptimizerEntry(build, row_decay))
        return build

    return register


def build_optimizer(config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer named by TRAIN.OPTIMIZER.NAME over the groups of `parameter_groups`.

    A resumed optimizer keeps its moments and step counts, and takes learning rate, weight decay and
    the like from `config`.

    Args:
        config: reads TRAIN.{OPTIMIZER, WEIGHT_DECAY, DECAY_ALL, LAYER_DECAY, QK_WEIGHT_DECAY}.
        model: on its device and not wrapped, so that parameter names are those of the state dict.
        lr: peak learning rate, already scaled by the batch size (`lr_scheduler.scaled_rates`).
    Raises: OptimizerError for unknown names and for combinations without an exact meaning.
    """
    train, settings = config.TRAIN, config.TRAIN.OPTIMIZER
    entry = check_optimizer(train)
    request = Request(
        model=model,
        groups=parameter_groups(model, lr, train.WEIGHT_DECAY, train.LAYER_DECAY, train.DECAY_ALL),
        lr=lr,
        betas=tuple(settings.BETAS),
        eps=settings.EPS,
        momentum=settings.MOMENTUM,
    )
    built = entry.build(request)
    for group in built.param_groups:
        # part of the state dict, so that a changed optimizer is noticed
        group["optimizer"] = type(built).__name__
    built.register_load_state_dict_pre_hook(_follow_config)
    if train.QK_WEIGHT_DECAY != 1:
        weights = query_key_weights(model)
        decay_query_key_rows(built, weights, train.QK_WEIGHT_DECAY, entry.row_decay)
    return built


def check_optimizer(train) -> OptimizerEntry:
    """The entry of TRAIN.OPTIMIZER.NAME, if it and TRAIN.QK_WEIGHT_DECAY go together.

    Raises: OptimizerError.
    """
    entry, multiplier = find_optimizer(train.OPTIMIZER.NAME), train.QK_WEIGHT_DECAY
    if multiplier < 0:
        raise OptimizerError(
            f"TRAIN.QK_WEIGHT_DECAY {multiplier} is negative; allowed: 0 (no decay of q and k) or"
            " more, 1.0 = off"
        )
    if multiplier != 1 and entry.row_decay is None:
        fitting = ", ".join(name for name in OPTIMIZERS if OPTIMIZERS[name].row_decay)
        raise OptimizerError(
            f"TRAIN.QK_WEIGHT_DECAY {multiplier}: {train.OPTIMIZER.NAME} has no exact form of a"
            f" decay per row; use {fitting}, or set it to 1.0"
        )
    return entry


def find_optimizer(name: str) -> OptimizerEntry:
    """The entry of an optimizer, in any case, or timm's under timm:<name>.

    Raises: OptimizerError for a name that nobody knows and for optimizers of timm that this program
        cannot run.
    """
    name = name.lower()
    if name.startswith("timm:"):
        return _timm_entry(name.removeprefix("timm:"))
    if name not in OPTIMIZERS:
        raise OptimizerError(
            f"TRAIN.OPTIMIZER.NAME {name!r} is not known; allowed: {', '.join(OPTIMIZERS)},"
            f" timm:<name>{did_you_mean(name, OPTIMIZERS)}"
        )
    return OPTIMIZERS[name]


# ---- parameter groups


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    decay_all: bool = False,
) -> list[dict]:
    """Trainable parameters in groups, ordered as in Swin: decayed, not decayed; with layer
    decay by first appearance.

    Not decayed: 1-D parameters, names ending in `.bias`, names in `model.no_weight_decay()`, and
    names that contain one of `model.no_weight_decay_keywords()`. Keywords are substrings of the
    full name. Swin's SimMIM wrapper prefixed them, so that none ever matched and its bias tables
    were decayed: a wrapper here passes them on as they are. `decay_all` decays all
    of these too, as recipes that give the whole model to the optimizer do.

    Layer decay multiplies `lr` once, by layer_decay ** (last layer - layer_id); a group's
    `lr_scale` repeats it for the reader.
    """
    decayed = (lambda name, p: True) if decay_all else decay_rule(model)
    layers = LayerIds(model) if layer_decay != 1 else None
    groups = {} if layers else {decay: _group(decay, lr, weight_decay) for decay in (True, False)}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = decayed(name, p)
        layer = layers[name] if layers else None
        key = (layer, decay) if layers else decay
        if key not in groups:
            scale = layer_decay ** (layers.last - layer)
            label = f"layer_{layer}_{'decay' if decay else 'no_decay'}"
            groups[key] = {
                "group_name": label,
                **_group(decay, lr * scale, weight_decay),
                "lr_scale": scale,
            }
        groups[key]["params"].append(p)
    return [group for group in groups.values() if group["params"]]


def _group(decay: bool, lr: float, weight_decay: float) -> dict:
    return {"params": [], "lr": lr, "weight_decay": weight_decay if decay else 0.0}


def decay_rule(model: nn.Module):
    """(name, parameter) -> whether weight decay applies, by what the model says of itself."""
    names = set(getattr(model, "no_weight_decay", set)())
    keywords = set(getattr(model, "no_weight_decay_keywords", set)())
    return lambda name, p: (
        not (
            p.ndim == 1
            or name.endswith(".bias")
            or name in names
            or any(k in name for k in keywords)
        )
    )


class LayerIds:
    """How deep each parameter of a model lies: 0 what comes before the blocks, 1 + b block b, and
    `last` the rest, such as norm and head.

    Raises: OptimizerError for a model that does not say where its blocks are.
    """

    def __init__(self, model: nn.Module):
        groups = model.layer_groups() if hasattr(model, "layer_groups") else []
        if len(groups) < 2:
            raise OptimizerError(
                f"TRAIN.LAYER_DECAY: {type(model).__name__} names no blocks (layer_groups), so its"
                " depth is unknown; set it to 1.0"
            )
        self.last = len(groups)
        self._ids = {name: layer for layer, names in enumerate(groups) for name in names}

    def __getitem__(self, name: str) -> int:
        """The depth of the parameter `name`."""
        parts = name.split(".")
        paths = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self._ids[path] for path in paths if path in self._ids), self.last)


# ---- weight decay of the query and key rows


def query_key_weights(model: nn.Module) -> list[nn.Parameter]:
    """The trainable weights (3C, C) whose rows [0:2C] make queries and keys, as the model names
    them.
    """
    names = model.query_key_weights() if hasattr(model, "query_key_weights") else []
    weights = [model.get_parameter(name) for name in names]
    found = [weight for weight in weights if weight.requires_grad]
    if not found:
        raise OptimizerError(
            f"TRAIN.QK_WEIGHT_DECAY: {type(model).__name__} has no trainable qkv weights; set"
            " it to 1.0"
        )
    return found


def decay_query_key_rows(
    optimizer: torch.optim.Optimizer,
    weights: list[nn.Parameter],
    multiplier: float,
    row_decay: RowDecay,
) -> None:
    """Multiplies the weight decay of rows [0:2C] of each (3C, C) weight by `multiplier`, in every
    later step.

    A hook before the step that reads each group's present lr and weight_decay, so it holds under
    schedules and after a resume:

        AdamW, Muon (W <- (1 - lr wd) W - lr u):  W_qk <- W_qk (1 - lr wd m) / (1 - lr wd)
        SGD (g <- g + wd W, then momentum):       g_qk <- g_qk + wd (m - 1) W_qk
    """
    chosen = set(weights)

    def before_step(optimizer, args, kwargs):
        found_inf = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            # no gradient, no step, no decay
            params = [p for p in group["params"] if p in chosen and p.grad is not None]
            if params and group["weight_decay"]:
                row_decay(params, group["lr"], group["weight_decay"], multiplier, found_inf)

    optimizer.register_step_pre_hook(before_step)


@torch.no_grad()
def decay_decoupled(
    params: list[Tensor],
    lr: float,
    weight_decay: float,
    multiplier: float,
    found_inf: Tensor | None,
) -> None:
    """For optimizers with W <- (1 - lr wd) W - lr u, whatever the update u."""
    factor = (1 - lr * weight_decay * multiplier) / (1 - lr * weight_decay)
    if found_inf is not None:  # a fused optimizer decides on the device whether to skip this step
        factor = torch.where(found_inf > 0, 1.0, factor)
    torch._foreach_mul_([_query_key_rows(p) for p in params], factor)


@torch.no_grad()
def decay_coupled(
    params: list[Tensor],
    lr: float,
    weight_decay: float,
    multiplier: float,
    found_inf: Tensor | None,
) -> None:
    """For optimizers with g <- g + wd W."""
    gradients = [_query_key_rows(p.grad) for p in params]
    rows = [_query_key_rows(p) for p in params]
    torch._foreach_add_(gradients, rows, alpha=weight_decay * (multiplier - 1))


def _query_key_rows(weight: Tensor) -> Tensor:
    return weight[: 2 * (len(weight) // 3)]  # (3C, C) -> (2C, C), a view


# ---- the optimizers


@register_optimizer("adamw", row_decay=decay_decoupled)
def _adamw(request: Request) -> torch.optim.Optimizer:
    """One kernel does the whole update where there is one; the numbers are the same."""
    fused = True if request.device in ("cpu", "cuda") else None
    return _torch_adamw(request, fused)


@register_optimizer("fused_adam", row_decay=decay_decoupled)
def _fused_adam(request: Request) -> torch.optim.Optimizer:
    """AdamW, refused by torch where there is no fused kernel."""
    return _torch_adamw(request, fused=True)


def _torch_adamw(request: Request, fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        request.groups,
        lr=request.lr,
        betas=request.betas,
        eps=request.eps,
        fused=fused,
    )


@register_optimizer("sgd", row_decay=decay_coupled)
def _sgd(request: Request) -> torch.optim.Optimizer:
    """With Nesterov's momentum."""
    return torch.optim.SGD(
        request.groups,
        lr=request.lr,
        momentum=request.momentum,
        nesterov=request.momentum > 0,
    )


@register_optimizer("lamb")
@register_optimizer("fused_lamb")
def _lamb(request: Request) -> torch.optim.Optimizer:
    return _create_timm("lamb", request, request.groups)


@register_optimizer("muon", row_decay=decay_decoupled)
def _muon(request: Request) -> torch.optim.Optimizer:
    """Muon for the hidden matrices, AdamW for all else, in one object."""
    return _create_timm("muon", request, muon_groups(request.model, request.groups))


def _timm_entry(name: str) -> OptimizerEntry:
    """timm's optimizer of that name. Raises: OptimizerError for those that cannot be used."""
    import timm.optim  # here: importing timm takes seconds

    known = timm.optim.list_optimizers()
    if name.startswith("lookahead_"):
        raise OptimizerError(
            f"TRAIN.OPTIMIZER.NAME timm:{name}: timm's lookahead wrapper cannot be saved and"
            f" resumed exactly; use timm:{name.removeprefix('lookahead_')}"
        )
    if name not in known:
        raise OptimizerError(
            f"TRAIN.OPTIMIZER.NAME: timm {timm.__version__} has no optimizer {name!r};"
            f" timm.optim.list_optimizers() lists them{did_you_mean(name, known)}"
        )
    info = timm.optim.get_optimizer_info(name)
    if info.second_order:
        raise OptimizerError(
            f"TRAIN.OPTIMIZER.NAME timm:{name} needs second derivatives, which this trainer does"
            " not form; use another"
        )
    same_update = {
        torch.optim.AdamW: decay_decoupled,
        timm.optim.Muon: decay_decoupled,
        torch.optim.SGD: decay_coupled,
    }
    if not isinstance(info.opt_class, type):  # named by its path in a package of its own
        row_decay = None
    else:
        row_decay = next(
            (decay for kind, decay in same_update.items() if issubclass(info.opt_class, kind)),
            None,
        )
    return OptimizerEntry(lambda request: _create_timm(name, request, request.groups), row_decay)


def _create_timm(name: str, request: Request, groups: list[dict]) -> torch.optim.Optimizer:
    """timm's optimizer over finished groups, which timm passes on unread: it neither regroups nor
    rescales them.
    """
    import timm.optim  # here: importing timm takes seconds

    info = timm.optim.get_optimizer_info(name)
    options = {"betas": request.betas} if info.has_betas and info.num_betas == 2 else {}
    try:
        return timm.optim.create_optimizer_v2(
            groups,
            name,
            lr=request.lr,
            momentum=request.momentum,
            eps=request.eps,
            **options,
        )
    except (ImportError, AssertionError) as problem:
        # timm asserts that apex, bitsandbytes or CUDA is there
        raise OptimizerError(
            f"TRAIN.OPTIMIZER.NAME timm:{name} cannot be built here: {problem}"
        ) from problem


def muon_groups(model: nn.Module, groups: list[dict]) -> list[dict]:
    """Splits each group: decayed matrices of the parts that `model.hidden_names` lists go to Muon,
    all else to the AdamW in the same object.

    Embedding, head, convolutions, tables and modifiers' parameters are no hidden linear maps, so
    orthogonal updates have no meaning for them. Muon's updates are scaled to AdamW's root mean
    square (timm's default), so one learning rate fits both.
    """
    decayed = decay_rule(model)
    parts = model.hidden_names() if hasattr(model, "hidden_names") else []
    inside = tuple(f"{part}." for part in parts)
    hidden = {
        p
        for name, p in model.named_parameters()
        if p.ndim == 2
        and name.startswith(inside)
        and ".modifiers." not in name
        and decayed(name, p)
    }
    split = []
    for group in groups:
        for fallback in (False, True):
            params = [p for p in group["params"] if (p not in hidden) == fallback]
            split.append(
                {**group, "params": params, "use_fallback": fallback, "nesterov": not fallback}
            )
    return [group for group in split if group["params"]]


# ---- resuming


def _follow_config(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Before loading: refuses another optimizer's state, and puts this run's settings in place of
    the stored ones.
    """
    stored, own = state["param_groups"], optimizer.param_groups
    kinds = {group.get("optimizer", own[0]["optimizer"]) for group in stored}
    if kinds != {own[0]["optimizer"]}:
        raise OptimizerError(
            f"the checkpoint holds the state of {', '.join(sorted(kinds))}, this run uses"
            f" {own[0]['optimizer']}; set TRAIN.OPTIMIZER.NAME to the stored one, or start from the"
            " weights alone with --pretrained"
        )
    if [len(g["params"]) for g in stored] != [len(g["params"]) for g in own]:
        raise OptimizerError(
            "the checkpoint's optimizer has parameter groups of"
            f" {[len(g['params']) for g in stored]} tensors, this run's"
            f" {[len(g['params']) for g in own]}; the model or TRAIN.LAYER_DECAY has changed"
        )
    for setting, old, new in settings_changed(stored, own):
        _logger.warning(
            "resuming: %s is %s in the checkpoint and %s in the config; the config is followed",
            setting,
            old,
            new,
        )
    merged = [
        {**g, **{k: mine[k] for k in FOLLOW_CONFIG if k in mine}}
        for g, mine in zip(stored, own, strict=True)
    ]
    return {**state, "param_groups": merged}


def settings_changed(stored: list[dict], own: list[dict]) -> list[tuple[str, object, object]]:
    """(setting, stored value, own value) where two lists of groups differ, once a setting; lr is
    left to the schedule's own report.
    """
    changed = {}
    for old, new in zip(stored, own, strict=True):
        for key in FOLLOW_CONFIG[1:]:
            if key in old and key in new and _plain(old[key]) != _plain(new[key]):
                changed.setdefault(key, (key, old[key], new[key]))
    return list(changed.values())


def _plain(value):
    return tuple(value) if isinstance(value, (list, tuple)) else value
