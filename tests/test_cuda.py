"""What only a GPU can show; skipped without one. The kernels' arithmetic is compared by
benchmarks/gpu_kernels.py as well.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from kernels.library import build, loader
from kernels.window_attention import OffsetTerms, window_attention, window_layout
from models import SwinTransformer, SwinTransformerV2
from models.attention import AttentionSpec
from tests.engine.runs import arguments, assert_same_run, run, train
from tests.helpers import run_main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
SHARPENED = AttentionSpec(("qk_residual", "crpw"))


@pytest.fixture(autouse=True)
def kernel():
    reason = loader.missing("cuda")
    if reason and build.find_compilers().nvcc:
        pytest.fail(f"there is nvcc, and yet no CUDA kernel: {reason}")
    if reason:
        pytest.skip(f"no CUDA kernel: {reason}")
    torch.manual_seed(0)


def draw(window, grid, shift, dtype):
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    layout = window_layout(grid, window, shift, device=torch.device("cuda"))
    qkv = torch.randn(2, *grid, 3 * 64, device="cuda", dtype=dtype)
    scale, bias = (torch.randn(rows, 2, device="cuda") * 0.3 for _ in range(2))
    return layout, [t.requires_grad_() for t in (qkv, scale, bias)]


def attend(layout, qkv, scale, bias, backend="fused", dropout=0.0):
    return window_attention(
        qkv, OffsetTerms(layout.window, scale, bias), layout, 2, False, dropout, backend
    )


def gradients(y, leaves):
    torch.manual_seed(1)
    return torch.autograd.grad(y, leaves, torch.randn(y.shape, device="cuda").to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "window, grid, shift",
    [
        ((7, 7), (17, 21), (3, 3)),
        ((8, 8), (16, 16), (0, 0)),
        ((16, 16), (32, 32), (8, 8)),
        ((12, 9), (20, 18), (6, 4)),
    ],
)
def test_the_operation_and_its_gradients_are_the_specification_s(window, grid, shift, dtype):
    layout, leaves = draw(window, grid, shift, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def outcome(backend, inputs):
        y = attend(layout, *inputs, backend=backend)
        return [y.detach().double(), *(gradient.double() for gradient in gradients(y, inputs))]

    exact = outcome("reference", wide)
    for name, right, plain, ours in zip(
        ("y", "qkv", "scale", "bias"),
        exact,
        outcome("reference", leaves),
        outcome("fused", leaves),
        strict=True,
    ):
        assert (ours - right).norm() <= 2 * (plain - right).norm() + 1e-6 * right.norm(), name


@pytest.mark.parametrize("window", [(7, 7), (16, 16)])
def test_pytorch_s_checks_of_an_operation(window):
    layout, (qkv, scale, bias) = draw(window, (2 * window[0], 2 * window[1]), (0, 0), torch.float16)
    arguments = (
        qkv,
        scale,
        bias,
        *(None,) * 5,  # no post, no epilogue, no seed
        layout.window,
        layout.shift,
        2,
        False,
        layout.mask_value,
        0.0,
        True,
    )
    assert set(opcheck(torch.ops.idsw.window_attention_forward.default, arguments).values()) == {
        "SUCCESS"
    }


def test_a_compiled_graph_gives_the_bits_of_the_eager_call():
    layout, leaves = draw((7, 7), (14, 14), (3, 3), torch.bfloat16)

    def function(*inputs):
        return attend(layout, *inputs) * 2

    eager, compiled = function(*leaves), torch.compile(function, fullgraph=True)(*leaves)
    assert torch.equal(eager, compiled)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(eager, leaves), gradients(compiled, leaves), strict=True)
    )


def test_an_activation_checkpoint_drops_the_same_entries_again():
    layout, leaves = draw((7, 7), (14, 14), (3, 3), torch.bfloat16)
    found = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(3)
        y = wrap(lambda *x: attend(layout, *x, dropout=0.3), *leaves)
        found.append([y, *gradients(y, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "family, size, window",
    [(SwinTransformer, 56, 7), (SwinTransformerV2, 64, 8), (SwinTransformerV2, 128, 16)],
)
def test_a_training_step_never_waits_for_the_device(family, size, window):
    model = family(
        size,
        4,
        num_classes=5,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=window,
        attention=SHARPENED,
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    images, targets = (
        torch.randn(2, 3, size, size, device="cuda"),
        torch.tensor([0, 1], device="cuda"),
    )

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # first uses compile, check and fill caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "family, size, window", [(SwinTransformer, 56, 7), (SwinTransformerV2, 64, 8)]
)
def test_a_model_s_gradients_are_those_of_the_cpu_in_double_precision(family, size, window):
    kwargs = {
        "num_classes": 5,
        "embed_dim": 32,
        "depths": (2,),
        "num_heads": (1,),
        "drop_path_rate": 0.0,
        "attention": SHARPENED,
    }
    model = family(size, 4, window_size=window, **kwargs).eval()
    images = torch.randn(2, 3, size, size)
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        copied = copy.deepcopy(model).to(device, dtype)
        copied(images.to(device, dtype)).square().sum().backward()
        found.append({name: p.grad.cpu().double() for name, p in copied.named_parameters()})
    for name, exact in found[0].items():
        assert (found[1][name] - exact).norm() <= 1e-3 * exact.norm() + 1e-6, name


def test_evaluation_after_a_fused_step_sees_the_new_parameters():
    model = SwinTransformer(
        56, 4, num_classes=5, embed_dim=32, depths=(2,), num_heads=(1,), attention=SHARPENED
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    images = torch.randn(2, 3, 56, 56, device="cuda")
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            before = model.eval()(images)
        model.train()(images).square().sum().backward()
        optimizer.step()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            after = model.eval()(images)
            assert torch.equal(after, copy.deepcopy(model)(images)) and not torch.equal(
                after, before
            )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_digits_are_learnt(dtype, tmp_path):
    done = run_main(
        "--cfg",
        "configs/digits/digits_tiny.yaml",
        "--device",
        "cuda",
        "--output",
        tmp_path,
        "--epochs",
        "15",
        "--opts",
        "AMP_DTYPE",
        dtype,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "digits_tiny" / "default" / "metrics.jsonl").read_text().splitlines()
    scores = [entry["acc1"] for entry in map(json.loads, lines) if entry["kind"] == "val"]
    assert max(scores) > 90, scores


def test_a_deterministic_run_that_is_killed_and_resumed_ends_bit_identical(tmp_path):
    settings = {"DEVICE": "cuda", "TRAIN__DETERMINISTIC": True}
    whole = train(tmp_path / "whole", **settings)
    killed = run(
        "tests/engine/killer.py", "update", "17", "0", *arguments(tmp_path / "parts", **settings)
    )
    assert killed.returncode not in (0, 2), killed.stdout + killed.stderr
    assert_same_run(train(tmp_path / "parts", **settings), whole)
