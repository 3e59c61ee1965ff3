"""Where the arms of the near-identity family run: on the fused kernel, or not at all."""

import pytest
import torch

from config import load_config
from kernels.window_attention.fused import missing
from models import build_model
from models.attention.modifiers import MODIFIERS
from models.attention.report import why_not_fused
from tests.models.builders import EVERYWHERE, modified
from tests.test_contracts import REFUSED

ARMS = sorted(set(MODIFIERS.names()) - set(EVERYWHERE))
ONE_STAGE = {
    "swin": {"depths": (2,), "num_heads": (2,)},
    "swinv2": {"depths": (2,), "num_heads": (2,), "pretrained_window_sizes": (0,)},
    "vit": {"depth": 2, "class_token": False, "pool": "mean"},  # the kernel takes no class token
}
# Forms that change other parts than an arm's default.
FORMS = ["exclusive(a=learned)", "self_mask(temperature=False)", "sink(learned=False)"]
FORMS += ["gate(kind=element)", "value_residual(preset=svformer)", "branch_gain(kind=channel)"]


@pytest.mark.parametrize(
    "family", ["swin", *(pytest.param(name, marks=pytest.mark.slow) for name in ("swinv2", "vit"))]
)
def test_no_arm_leaves_the_fused_kernel(family):
    if reason := missing(torch.device("cpu")):
        pytest.skip(reason)
    for arm in [*ARMS, *FORMS]:
        if (family, arm) not in REFUSED or (family, arm) == ("vit", "gpsa"):
            model = modified(family, arm, embed_dim=16, **ONE_STAGE[family])
            for dtype in (torch.float32, torch.bfloat16):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    assert set(why_not_fused(model).values()) == {None}, (arm, dtype)


@pytest.mark.parametrize("arm", ["self_mix", "self_bias", "mimetic", "qk_norm", "branch_gain"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["MODEL.TYPE", "swin_mlp"], "swin_mlp has no such part"),
        (["MODEL.TYPE", "swiftformer"], "swiftformer has no such part"),
        (["MODEL.TYPE", "sasa_resnet"], "sasa_resnet has no such part"),
        (["MODEL.ATTENTION.MIXER", "separable"], "mixer separable does not form"),
        (["MODEL.TYPE", "vit", "MODEL.ATTENTION.MIXER", "local"], "mixer local does not form"),
    ],
    ids=str,
)
def test_without_softmax_attention_an_arm_is_refused_by_name(options, reason, arm):
    config = load_config(None, [*options, "MODEL.ATTENTION.MODIFIERS", [arm]])
    with torch.device("meta"), pytest.raises(ValueError, match=reason) as caught:
        build_model(config)
    assert f"['{arm}']" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arm", ["self_mix", "exclusive", "gate", "sink", "high_pass", "attn_scale", "affine"]
)
def test_an_edit_of_the_output_is_refused_where_the_number_of_heads_changes(arm):
    with pytest.raises(ValueError, match="reduce=True"):
        modified("swin", "refiner(expand=2, reduce=False)", arm)
