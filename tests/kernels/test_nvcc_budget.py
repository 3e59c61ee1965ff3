"""What nvcc makes of the CUDA kernels for each architecture, without a GPU: no warning, no spill,
registers within budgets.json.
"""

import json
import re
import subprocess

import pytest

from tests.kernels import nvcc

# which instructions a kernel of this name must have; SASS names: HMMA tensor core product, LDSM
# ldmatrix, LDGSTS cp.async
TENSOR_CORE = {"HMMA", "LDSM", "LDGSTS"}

pytestmark = pytest.mark.slow


@pytest.fixture(params=nvcc.ARCHITECTURES, ids=lambda number: f"sm_{number}")
def architecture(request):
    if nvcc.tool("nvcc") is None:
        pytest.skip("no nvcc to compile the CUDA kernels with")
    return request.param


@pytest.fixture(params=[path.name for path in nvcc.sources()])
def compiled(request, architecture):
    source = next(path for path in nvcc.sources() if path.name == request.param)
    try:
        return nvcc.compile_for(source, architecture)
    except subprocess.CalledProcessError as error:
        if (
            "Unsupported gpu architecture" in error.stdout
            or "is not defined for option 'gpu-architecture'" in error.stdout
        ):
            pytest.skip(f"this nvcc does not know sm_{architecture}")
        pytest.fail(f"{source.name} for sm_{architecture}:\n{error.stdout[-3000:]}")


def test_kernels_compile_without_a_warning_and_keep_to_their_budgets(compiled):
    budgets = json.loads(nvcc.BUDGETS.read_text())
    for name, used in nvcc.resources(compiled[1]).items():
        assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0, (
            f"{name} spills: {used}"
        )
        assert name in budgets, (
            f"{name} has no budget; python -m tests.kernels.nvcc writes the file anew"
        )
        assert used["registers"] <= budgets[name]["registers"], (
            f"{name}: {used}, allowed {budgets[name]}"
        )
        assert used["shared"] <= budgets[name]["shared"], f"{name}: {used}, allowed {budgets[name]}"


def test_machine_code_has_the_instructions_it_was_written_for(compiled):
    found = nvcc.instructions(compiled[0])
    if found is None:
        pytest.skip("no cuobjdump and nvdisasm to read machine code with")
    for name, counts in found.items():
        stems = {stem.partition(".")[0] for stem in counts}
        assert not stems & {"LDL", "STL"}, f"{name} uses local memory"
        assert not any(stem.startswith(("ATOM", "RED.")) for stem in counts), f"{name} uses atomics"
        if not re.search(r"forward|query|key|backward", name):
            continue  # sums of tables
        assert any(re.fullmatch(r"STG\.E.*\.128", full) for full in counts), (
            f"{name} stores less than 16 bytes at a time"
        )
        wanted = {"LDGSTS"} if "float" in name else TENSOR_CORE
        assert wanted <= stems, f"{name} lacks {wanted - stems}"


def test_budgets_name_no_kernel_that_is_gone():
    if nvcc.tool("nvcc") is None:
        pytest.skip("no nvcc to compile the CUDA kernels with")
    assert set(json.loads(nvcc.BUDGETS.read_text())) == set(nvcc.measure(90))
