"""What gpu_kernels.py times of whole models: the project's with each backend, and timm's."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import interleaved, peak, relative_speed
from kernels.window_attention.interface import ENVIRONMENT


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """All window attention by one backend."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = name
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT)
        if before is not None:
            os.environ[ENVIRONMENT] = before


class Family(NamedTuple):
    """A model of the project (a function of its attention), on images of side x side, and timm's
    name for its counterpart.
    """

    side: int
    batch: int
    make: Callable
    counterpart: str | None


def families(quick: bool) -> dict[str, Family]:
    """What is timed as whole models."""
    from models import SwinTransformer, SwinTransformerV2

    if quick:
        small = {
            "embed_dim": 32,
            "depths": (2,),
            "num_heads": (1,),
            "num_classes": 10,
            "drop_path_rate": 0.0,
        }
        return {
            "one stage, w7": Family(56, 2, functools.partial(SwinTransformer, 56, **small), None)
        }
    base = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    v2 = functools.partial(SwinTransformerV2, 256, drop_path_rate=0.0)
    return {
        "Swin-T": Family(
            224,
            128,
            functools.partial(SwinTransformer, drop_path_rate=0.0),
            "swin_tiny_patch4_window7_224",
        ),
        "SwinV2-T w8": Family(
            256, 128, functools.partial(v2, window_size=8), "swinv2_tiny_window8_256"
        ),
        "SwinV2-B w16": Family(
            256, 64, functools.partial(v2, window_size=16, **base), "swinv2_base_window16_256"
        ),
    }


def steps_of(
    model: torch.nn.Module, images: Tensor, how: str | None = None, compiled: bool = False
) -> dict[str, Callable]:
    """Inference and a training step (AdamW) under bfloat16 autocast; how: the backend of the
    project's models.
    """
    kind = images.device.type
    targets = torch.arange(len(images), device=images.device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=kind == "cuda" or None)
    choice = contextlib.nullcontext if how is None else functools.partial(forced, how)
    call = torch.compile(model, dynamic=False) if compiled else model

    def infer() -> None:
        model.eval()
        with choice(), torch.no_grad(), torch.autocast(kind, torch.bfloat16):
            call(images)

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        with choice(), torch.autocast(kind, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(call(images), targets)
        with choice():
            loss.backward()
        optimizer.step()

    return {"inference": infer, "training step": train}


@contextlib.contextmanager
def fused_attention(on: bool) -> Iterator[None]:
    """timm models built inside use PyTorch's fused attention, also where timm calls that
    experimental, as in Swin; or nowhere.
    """
    import timm

    before = timm.layers.use_fused_attn(), timm.layers.use_fused_attn(experimental=True)
    timm.layers.set_fused_attn(on, experimental=True)
    try:
        yield
    finally:
        timm.layers.set_fused_attn(*before)


def timm_models(family: Family, device: torch.device) -> dict[str, torch.nn.Module]:
    """timm's counterpart with each kind of attention that it has, named by what it uses."""
    import timm

    found = {}
    for on, name in ((False, "timm, unfused attention"), (True, "timm, fused attention")):
        with fused_attention(on):
            model = timm.create_model(family.counterpart, drop_path_rate=0.0).to(device)
        if on == any(getattr(module, "fused_attn", False) for module in model.modules()):
            found[name] = model
    return found


def rivals(family: Family, images: Tensor) -> dict[str, dict[str, Callable]]:
    """Each model run eagerly: {who: {kind: step}}."""
    from models.attention import AttentionSpec

    device = images.device
    own = family.make().to(device)
    found = {how: steps_of(own, images, how) for how in ("fused", "reference", "eager")}
    sharpened = AttentionSpec(("qk_residual", "crpw"))
    found["fused, QK residual + CRPW"] = steps_of(
        family.make(attention=sharpened).to(device), images, "fused"
    )
    if family.counterpart:
        for name, model in timm_models(family, device).items():
            found[name] = steps_of(model, images)
    return found


def compiled_rivals(family: Family, images: Tensor) -> dict[str, dict[str, Callable]]:
    """Each model through torch.compile, and the project's without it."""
    device = images.device
    found = {
        "fused": steps_of(family.make().to(device), images),
        "fused, compiled": steps_of(family.make().to(device), images, compiled=True),
    }
    if family.counterpart:
        for name, model in timm_models(family, device).items():
            found[f"{name}, compiled"] = steps_of(model, images, compiled=True)
    return found


def time_models(
    device: str,
    rounds: int,
    quick: bool,
    time_is_up: Callable[[], bool],
    entrants: Callable = rivals,
) -> Iterator[dict]:
    """One row a model, kind and entrant."""
    for name, family in families(quick).items():
        if time_is_up():
            yield {"model": name, "failed": "no time left"}
            continue
        images = torch.randn(family.batch, 3, family.side, family.side, device=device)
        steps = entrants(family, images)
        for kind in ("inference", "training step"):
            found = interleaved(
                {who: step[kind] for who, step in steps.items()}, rounds, device, warm_up=2
            )
            for who, row in found.items():
                memory = peak(steps[who][kind], device) if "ms" in row else None
                yield {
                    "model": name,
                    "batch": family.batch,
                    "kind": kind,
                    "by": who,
                    **row,
                    "speed relative to fused": relative_speed(found, row),
                    "peak MiB": memory,
                }
        del steps
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
