"""`pip install ./kernels` compiles the library ahead of time: with nvcc for CUDA and the CPU,
without for the CPU alone.

It becomes the package `window_attention_kernels`, which holds the shared library and nothing else:
the Python code stays in this repository, finds the library there, and takes it only if it was made
from the same sources (the hash is in the file's name). Without a compiler, or without PyTorch
beside this Python, the package is installed all the same and its docstring says why it is empty.
"""

import atexit
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from library import build  # kernels/library without kernels, which need not be the folder's name
from library.compilers import BuildError

PACKAGE = "window_attention_kernels"


class BuildLibrary(build_py):
    """Puts the compiled library and a docstring into the package."""

    def run(self) -> None:
        folder = Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        contents = compile_into(folder)
        print(f"{PACKAGE}: {contents}")
        (folder / "__init__.py").write_text(f'"""{contents}"""\n')


def compile_into(folder: Path) -> str:
    """Compiles what this machine can; returns one line that says what that was."""
    reasons = []
    for kind in ("cuda", "cpu"):
        try:
            if kind == "cuda" and not build.has_cuda_sources():
                raise BuildError("no CUDA sources")
            library = build.build(kind, folder, say=print)
            return f"{library.name}" + "".join(f"; without {reason}" for reason in reasons)
        except BuildError as error:
            for log in folder.glob("*.log"):
                print(log.read_text())
            reasons.append(f"{kind}: {str(error).partition(';')[0]}")
        finally:
            for leftover in (*folder.glob("*.log"), *folder.glob("*.lock")):
                leftover.unlink()
    return "empty: " + "; ".join(reasons)


class WithLibrary(Distribution):
    """Says that what is installed is for one platform."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """For any Python 3: the library does not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    scratch = tempfile.mkdtemp(prefix="window_attention_")  # nothing is left in the source tree
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    setup(
        packages=[PACKAGE],
        package_dir={PACKAGE: scratch},
        distclass=WithLibrary,
        cmdclass={"build_py": BuildLibrary, "bdist_wheel": PlatformWheel},
        options={"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}},
    )
