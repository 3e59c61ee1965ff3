"""What holds for every registered name and for the whole tree, so that a new file cannot forget
it.
"""

import functools
import inspect

import pytest
import torch

from models.attention.modifiers import MODIFIERS
from tests.helpers import ROOT, imported_packages
from tests.models.builders import (
    ATTENTION_FAMILIES,
    EVERYWHERE,
    NO_GRADIENT,
    modified,
    randomise,
)

# What a package may import of this repository; main.py may import everything, and nothing may
# import main.py.
MAY_IMPORT = {
    "registry": set(),
    "kernels": set(),
    "checkpoint": {"registry"},
    "models": {"registry", "kernels", "checkpoint"},
    "data": {"registry"},
    "engine": {"registry", "checkpoint", "kernels", "processes", "utils"},
    "processes": {"registry"},
    "optimizer": {"registry"},
    "lr_scheduler": {"registry"},
    "utils": {"registry", "processes"},
    "settings": {
        "registry",
        "checkpoint",
        "data",
        "engine",
        "lr_scheduler",
        "models",
        "optimizer",
    },
    "config": {
        "registry",
        "checkpoint",
        "data",
        "engine",
        "lr_scheduler",
        "models",
        "optimizer",
        "settings",
    },
    "program": {
        "registry",
        "checkpoint",
        "config",
        "engine",
        "lr_scheduler",
        "models",
        "optimizer",
        "settings",
        "utils",
    },
}
OUTSIDE = {"matplotlib": {"engine/curves.py"}, "yacs": {"settings/reading.py"}}
OWN = {*MAY_IMPORT, "main", "tests", "tools", "benchmarks"}
MODIFIER_NAMES = MODIFIERS.names()  # before any test registers its own
COMPILED = ("swin",)  # by default; the others compile too, but take minutes together
# What a family has no place for, with words of the reason that its users read.
REFUSED: dict[tuple[str, str], str] = {
    ("vit", "gpsa"): "class token",
    ("pit", "gpsa"): "class token",
    ("refined_vit", "gpsa"): "class token",
    ("timm", "orthogonal_update"): "edits what a block adds",
    ("timm", "value_residual"): "handed no values",
    ("timm", "neutreno"): "handed no values",
    ("swinv2", "qk_norm"): "divides q and k by their norms",
    ("timm", "qk_norm"): "norms q and k already",
    ("swinv2", "impulse_bias"): "by an MLP",
    **{
        (family, "impulse_bias"): "no position bias"
        for family in ("vit", "cait", "pit", "t2t", "refined_vit", "timm")
    },
}
# Arms that another family than Swin tries by default.
HOME: dict[str, str] = {}
# Pairs whose results are compared with each other, or whose parts meet in one place.
PAIRS = [
    ("qk_residual", "exclusive"),
    ("qk_residual", "qk_norm"),
    ("crpw", "self_weight", "head_temperature"),
    ("elementwise_mask", "head_temperature"),
    ("exclusive", "branch_gain"),
    ("self_mask", "sink"),
]


def library_files():
    modules = [ROOT / f"{name}.py" for name in MAY_IMPORT if (ROOT / f"{name}.py").exists()]
    return modules + [path for name in MAY_IMPORT for path in (ROOT / name).rglob("*.py")]


def test_imports_point_one_way():
    for path in library_files():
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        wrong = (imported_packages(path) & OWN) - MAY_IMPORT[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("library", OUTSIDE)
def test_one_file_alone_imports(library):
    assert {
        str(path.relative_to(ROOT))
        for path in library_files()
        if library in imported_packages(path)
    } == OUTSIDE[library]


@functools.cache
def text_of(folder: str, pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / folder).rglob(pattern)))


def products(arms_by_default: bool = True, compiled: bool = False) -> list:
    """(modifier, family) for all that a family takes; by default the first ones on every family and
    the arms on one, the rest in `make test-long`.
    """
    found = []
    for name in MODIFIER_NAMES:
        for family in ATTENTION_FAMILIES:
            everywhere = name in EVERYWHERE
            marks = () if everywhere or family == HOME.get(name, "swin") else pytest.mark.long
            quick = family in COMPILED or not compiled if everywhere else arms_by_default
            if not marks and not quick:
                marks = pytest.mark.slow
            if (family, name) not in REFUSED:
                found.append(pytest.param(name, family, marks=marks))
    return found


each_product = pytest.mark.parametrize(("name", "family"), products())


def train(model: torch.nn.Module, steps: int) -> set[str]:
    """Trains a model of `small` and asserts finite losses; returns the parameters that got a
    gradient.
    """
    optimizer, touched = torch.optim.AdamW(model.parameters(), lr=1e-2), set()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4))
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        touched |= {
            key
            for key, p in model.named_parameters()
            if p.grad is not None and p.grad.abs().max() > 0
        }
        optimizer.step()
        assert loss.isfinite()
    return touched


class TestEveryModifier:
    """Runs for each file of models/attention/modifiers."""

    @pytest.mark.parametrize("name", MODIFIER_NAMES)
    def test_has_a_yaml_a_test_and_a_docstring_with_shapes(self, name):
        assert name in text_of("configs", "*.yaml"), "no YAML switches it on"
        assert f'"{name}' in text_of("tests", "test_*.py"), "no test names it"
        assert "Shapes:" in inspect.getdoc(MODIFIERS[name])

    @each_product
    def test_trains_every_parameter_within_three_steps(self, name, family):
        torch.manual_seed(0)
        model = modified(family, name)
        silent = NO_GRADIENT.get((family, name), "none")
        assert train(model, 3) == {
            key for key, _ in model.named_parameters() if not key.startswith(silent)
        }

    @each_product
    def test_is_finite_and_close_in_bfloat16_autocast(self, name, family):
        model = randomise(modified(family, name), std=0.1)
        images = torch.randn(2, 3, 16, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(images)
            low.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        torch.testing.assert_close(low.float(), model(images), rtol=0.05, atol=0.05)

    @pytest.mark.parametrize(("name", "family"), products(arms_by_default=False))
    def test_its_state_dict_brings_the_same_logits_to_another_model(self, name, family):
        model, images = randomise(modified(family, name), std=0.1).eval(), torch.randn(2, 3, 16, 16)
        other = randomise(modified(family, name), seed=1).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images), model(images))

    @pytest.mark.parametrize(("name", "family"), products(arms_by_default=False, compiled=True))
    def test_compiles_to_one_graph_with_the_same_result(self, name, family):
        # else the names before this one count as recompilations of the same code
        torch.compiler.reset()
        model = randomise(modified(family, name))
        images = torch.randn(2, 3, 16, 16)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
        compiled(images).sum().backward()
        ours = {key: p.grad.clone() for key, p in model.named_parameters()}
        model.zero_grad()
        model(images).sum().backward()
        for key, p in model.named_parameters():
            torch.testing.assert_close(ours[key], p.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_a_family_has_no_place_for_is_refused_in_one_line(family, name):
    with pytest.raises(ValueError, match=REFUSED[family, name]) as caught:
        modified(family, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_modifiers_that_are_compared_work_together(pair):
    torch.manual_seed(0)
    train(modified("swin", *pair), 1)


@pytest.mark.long
@pytest.mark.parametrize("name", MODIFIER_NAMES)
def test_every_pair_trains(name):
    for other in MODIFIER_NAMES:
        if other != name:
            torch.manual_seed(0)
            train(modified("swin", name, other), 1)
