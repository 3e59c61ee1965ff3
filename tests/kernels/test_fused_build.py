"""Building, finding and doing without the compiled library."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from kernels.library import build, compilers, loader
from tests.helpers import ROOT

BINDING = (
    '#include "args.h"\nextern "C" int wa_cpu_number();\nextern "C" int wa_number() { return NUMBER'
    " + wa_cpu_number(); }\n"
)
PLAIN = """extern "C" int wa_cpu_number() {
#ifdef WA_HAVE_TWO
    return 2;
#else
    return 1;
#endif
}
"""
TRAIN = """
import torch
from kernels.window_attention import OffsetTerms, explain, window_attention, window_layout
torch.manual_seed(0)
qkv, weight = torch.randn(2, 8, 8, 96, requires_grad=True), torch.rand(49, 2, requires_grad=True)
terms, layout = OffsetTerms((4, 4), weight), window_layout((8, 8), (4, 4))
for _ in range(2):
    y = window_attention(qkv, terms, layout, 2)
y.sum().backward()
torch.testing.assert_close(y, window_attention(qkv, terms, layout, 2, backend="reference"))
print(*explain(qkv, terms), sep=": ")
"""


def compiler():
    try:
        build.torch_folder()
        return compilers.find_compilers(cuda=False)
    except compilers.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def sources(tmp_path):
    """A kernel of two small files."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "args.h").write_text("#define NUMBER 40\n")
    (folder / "binding.cpp").write_text(BINDING)
    (folder / "cpu" / "plain.cpp").write_text(PLAIN)
    (folder / "cpu" / "two.cpp").write_text(
        "// a processor of no name\n// build[none]: -mnothing\n#error not for this machine\n"
    )
    return folder


def number(path):
    import ctypes

    return ctypes.CDLL(str(path)).wa_number()


def python(code, **environment):
    keep = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CXX", "CUDA_HOME", "CUDA_PATH", "LOCAL_RANK", build.CACHE)
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**keep, "OMP_NUM_THREADS": "1", **environment},
        text=True,
        capture_output=True,
        timeout=300,
        check=True,
    )


def test_a_build_is_announced_once_and_then_kept(sources, tmp_path):
    compiler()
    said = []
    first = build.build("cpu", tmp_path / "cache", sources, say=said.append)
    assert number(first) == 41
    assert build.build("cpu", tmp_path / "cache", sources, say=said.append) == first
    assert len(said) == 1 and "compiling" in said[0] and "\n" not in said[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_files_for_this_processor_are_compiled_with_their_flags_and_announced_to_the_others(
    sources, tmp_path
):
    compiler()
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(
        build.platform.machine(), build.platform.machine()
    )
    (sources / "cpu" / "two.cpp").write_text(
        f"// build[{machine}]: -DTWO=2\n// build[none]: -mnothing\nstatic_assert(TWO == 2);\n"
    )
    assert number(build.build("cpu", tmp_path / "cache", sources)) == 42


def test_files_whose_flags_the_compiler_refuses_are_left_out(sources, tmp_path):
    compiler()
    (sources / "cpu" / "two.cpp").write_text(
        f"// build[{build.platform.machine()}]: -mno-such-processor\n"
    )
    assert number(build.build("cpu", tmp_path / "cache", sources)) == 41


@pytest.mark.parametrize("name", ["args.h", "binding.cpp", "cpu/plain.cpp", "cpu/new.h"])
def test_any_change_of_the_sources_is_another_library(sources, name):
    before = build.library_name("cpu", sources), build.library_name("cuda-90", sources)
    (sources / name).write_text("// changed\n")
    assert not {build.library_name("cpu", sources), build.library_name("cuda-90", sources)} & set(
        before
    )


def test_a_change_of_the_cuda_sources_leaves_the_library_for_the_cpu(sources):
    before = build.library_name("cpu", sources), build.library_name("cuda-90", sources)
    (sources / "cuda").mkdir()
    (sources / "cuda" / "launch.cu").write_text("// new\n")
    after = build.library_name("cpu", sources), build.library_name("cuda-90", sources)
    assert after[0] == before[0] and after[1] != before[1]
    assert build.has_cuda_sources(sources)


def test_several_processes_compile_once(sources, tmp_path):
    compiler()
    code = (
        "import pathlib\n"
        "from kernels.library import build\n"
        f"cache, csrc = pathlib.Path({str(tmp_path / 'cache')!r}), pathlib.Path({str(sources)!r})\n"
        "build.build('cpu', cache, csrc, say=print)\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert sum("compiling" in text for text in said) == 1


def test_a_failed_build_names_its_log_and_is_not_repeated_until_that_is_deleted(sources, tmp_path):
    compiler()
    (sources / "cpu" / "plain.cpp").write_text("this is no C++\n")
    said = []
    for expected in ("the compiler failed; its log is", "it failed before"):
        with pytest.raises(compilers.BuildError, match=expected) as error:
            build.build("cpu", tmp_path / "cache", sources, say=said.append)
    log = next((tmp_path / "cache").glob("*.log"))
    assert str(log) in str(error.value) and "plain.cpp" in log.read_text()
    assert len(said) == 1
    log.unlink()
    (sources / "cpu" / "plain.cpp").write_text('extern "C" int wa_cpu_number() { return 1; }\n')
    assert number(build.build("cpu", tmp_path / "cache", sources)) == 41


def test_architectures_become_flags_of_nvcc_and_unknown_ones_are_left_out():
    known = "sm_80\nsm_90\nsm_100\n"
    assert compilers.gencode("80;90;100;120+PTX", known) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    assert compilers.gencode("90", known) == ["-gencode=arch=compute_90,code=sm_90"]
    with pytest.raises(compilers.BuildError, match=compilers.ARCHITECTURES):
        compilers.gencode("70", known)


def installed_package(folder, name, monkeypatch):
    (folder / loader.INSTALLED).mkdir()
    (folder / loader.INSTALLED / "__init__.py").write_text("")
    path = folder / loader.INSTALLED / name
    path.write_bytes(b"")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return path


@pytest.fixture
def no_build(monkeypatch, tmp_path):
    monkeypatch.setenv(loader.BUILD, "0")
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(loader, "device_reason", lambda: "there is no CUDA device")


def test_an_installed_library_of_these_sources_is_taken_before_anything_is_built(
    sources, tmp_path, monkeypatch, no_build, capfd
):
    path = installed_package(tmp_path, build.library_name("cpu", sources), monkeypatch)
    assert loader.find(sources) == (path, None)
    assert capfd.readouterr().err == ""


def test_an_installed_library_of_other_sources_is_not_used_and_said_so(
    sources, tmp_path, monkeypatch, no_build, capfd
):
    installed_package(tmp_path, build.library_name("cpu", sources), monkeypatch)
    (sources / "args.h").write_text("#define NUMBER 41\n")
    path, reason = loader.find(sources)
    assert path is None and "WINDOW_ATTENTION_BUILD is off" in reason
    assert "of other sources" in capfd.readouterr().err


def test_with_building_off_an_earlier_build_is_still_used(sources, tmp_path, monkeypatch, no_build):
    compiler()
    assert loader.find(sources)[0] is None
    built = build.build("cpu", tmp_path / "cache", sources)
    assert loader.find(sources) == (built, None)


@pytest.mark.parametrize(
    ("environment", "lines"), [({}, 1), ({"LOCAL_RANK": "1"}, 0), ({loader.BUILD: "0"}, 0)]
)
def test_a_missing_kernel_is_said_once_by_one_process_of_a_machine(
    monkeypatch, capfd, environment, lines
):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv(loader.BUILD, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loader, "_loaded", None)
    monkeypatch.setattr(loader, "_reason", None)
    monkeypatch.setattr(loader, "find", lambda: (None, "the compiler failed; its log is somewhere"))
    assert [loader.missing("cpu") for _ in range(3)] == [
        "the compiler failed; its log is somewhere"
    ] * 3
    assert capfd.readouterr().err.count("the compiler failed") == lines


def test_a_compiler_that_is_not_there_is_the_reason(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "device_reason", lambda: "there is no CUDA device")
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert loader.find(sources) == (None, "no C++ compiler (no-such-compiler) found")


def test_a_library_that_cannot_be_loaded_is_a_reason_and_no_error(tmp_path, monkeypatch):
    broken = tmp_path / "broken.so"
    broken.write_text("this is no library")
    for name, value in (("_loaded", None), ("_reason", None), ("find", lambda: (broken, None))):
        monkeypatch.setattr(loader, name, value)
    assert "broken.so cannot be loaded" in loader.missing("cpu")


def test_a_machine_without_a_compiler_trains_and_says_why_in_one_line(tmp_path):
    done = python(TRAIN, PATH="", WINDOW_ATTENTION_CACHE=str(tmp_path), WINDOW_ATTENTION_BUILD="1")
    if "installed" in done.stderr or done.stdout.startswith("fused"):
        pytest.skip("the library is installed here")
    assert done.stdout.startswith("eager: not fused (no C++ compiler")
    assert done.stderr.count("window_attention: ") == done.stderr.count("\n") == 1


def test_building_can_be_turned_off_without_a_word(tmp_path):
    done = python(TRAIN, WINDOW_ATTENTION_CACHE=str(tmp_path), WINDOW_ATTENTION_BUILD="0")
    if done.stdout.startswith("fused"):
        pytest.skip("the library is installed here")
    assert "WINDOW_ATTENTION_BUILD is off" in done.stdout and done.stderr == ""
    assert not list(tmp_path.iterdir())


def pip_wheel(folder, **environment):
    """The wheel of ./kernels, for the CPU alone, installed in folder/installed; returns its name
    and the package's docstring.
    """
    for needed in ("pip", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    environment = {**os.environ, compilers.ARCHITECTURES: "none", **environment}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for words in (
        ["wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), "./kernels"],
        [
            "install",
            "--no-deps",
            "--no-index",
            "--target",
            str(folder / "installed"),
            "--find-links",
            str(folder),
            "window-attention-kernels",
        ],
    ):
        done = subprocess.run(
            [*pip, *words], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel.name, (folder / "installed" / loader.INSTALLED / "__init__.py").read_text()


@pytest.mark.slow
def test_pip_installs_a_library_for_any_python_3_that_is_used_without_building(tmp_path):
    compiler()
    before = set(ROOT.joinpath("kernels").iterdir())
    name, contents = pip_wheel(tmp_path)
    assert "-py3-none-" in name and "-any" not in name
    assert build.library_name("cpu") in contents and "empty" not in contents
    done = python(
        TRAIN,
        PYTHONPATH=str(tmp_path / "installed"),
        WINDOW_ATTENTION_CACHE=str(tmp_path / "cache"),
        WINDOW_ATTENTION_BUILD="0",
    )
    assert done.stdout.startswith("fused") and done.stderr == ""
    assert set(ROOT.joinpath("kernels").iterdir()) == before


@pytest.mark.slow
def test_pip_without_a_compiler_installs_an_empty_package_that_says_why(tmp_path):
    _, contents = pip_wheel(tmp_path, CXX="no-such-compiler")
    assert "empty" in contents and "no C++ compiler (no-such-compiler) found" in contents


def test_other_devices_have_no_kernel():
    assert loader.missing("mps") == "there is no kernel for mps"
    if not torch.cuda.is_available():
        assert loader.missing("cuda") == "there is no CUDA device"
