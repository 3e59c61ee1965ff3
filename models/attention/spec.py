"""What a backbone hands down to its attention modules, unread."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Everything about attention that a config can switch.

    modifiers: "name" or "name(option=value)" in the order they apply; the names are those of
        models/attention/modifiers.
    drop: probability of dropping an entry of the softmaxed map while training.
    logit_scale_init: SwinV2's initial multiplier of the cosine (its logarithm is the parameter).
    bias_sigmoid: SwinV2's bias is 16 sigmoid(mlp) as published; False is the variant without
        squashing.
    backend: see kernels.window_attention.
    mixer: "softmax", or what replaces softmax attention, "name(option=value)"
        (models/attention/mixers).
    """

    modifiers: tuple[str, ...] = ()
    drop: float = 0.0
    logit_scale_init: float = 10.0
    bias_sigmoid: bool = True
    backend: str = "auto"
    mixer: str = "softmax"
