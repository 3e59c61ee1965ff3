"""What holds for every registered name and for the whole tree, so that a new file cannot forget
it.
"""

import inspect

import pytest
import torch

from models.attention.modifiers import MODIFIERS
from tests.helpers import ROOT, imported_packages
from tests.models.builders import ATTENTION_FAMILIES, NO_GRADIENT, modified, randomise

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
# The others compile too, but take minutes together.
COMPILED = [
    name if name in ("swin", "swinv2", "vit") else pytest.param(name, marks=pytest.mark.slow)
    for name in ATTENTION_FAMILIES
]
MODIFIER_NAMES = MODIFIERS.names()  # before any test registers its own


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


@pytest.mark.parametrize("name", MODIFIER_NAMES)
class TestEveryModifier:
    """Runs for each file of models/attention/modifiers."""

    def test_has_a_yaml_a_test_and_a_docstring_with_shapes(self, name):
        assert any(name in path.read_text() for path in (ROOT / "configs").rglob("*.yaml")), (
            "no YAML switches it on"
        )
        assert any(
            f'"{name}' in path.read_text() for path in (ROOT / "tests").rglob("test_*.py")
        ), "no test names it"
        assert "Shapes:" in inspect.getdoc(MODIFIERS[name])

    @pytest.mark.parametrize("family", ATTENTION_FAMILIES)
    def test_trains_every_parameter_within_three_steps(self, name, family):
        torch.manual_seed(0)
        model = modified(family, name)
        optimizer, touched = torch.optim.AdamW(model.parameters(), lr=1e-2), set()
        for _ in range(3):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                model(torch.randn(4, 3, 16, 16)), torch.arange(4)
            )
            loss.backward()
            touched |= {
                key
                for key, p in model.named_parameters()
                if p.grad is not None and p.grad.abs().max() > 0
            }
            optimizer.step()
            assert loss.isfinite()
        silent = NO_GRADIENT.get((family, name), "none")
        assert touched == {key for key, _ in model.named_parameters() if not key.startswith(silent)}

    @pytest.mark.parametrize("family", ATTENTION_FAMILIES)
    def test_is_finite_and_close_in_bfloat16_autocast(self, name, family):
        model = randomise(modified(family, name), std=0.1)
        images = torch.randn(2, 3, 16, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(images)
            low.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        torch.testing.assert_close(low.float(), model(images), rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("family", ATTENTION_FAMILIES)
    def test_its_state_dict_brings_the_same_logits_to_another_model(self, name, family):
        model, images = randomise(modified(family, name), std=0.1).eval(), torch.randn(2, 3, 16, 16)
        other = randomise(modified(family, name), seed=1).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images), model(images))

    @pytest.mark.parametrize("family", COMPILED)
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
