"""Says in one line what an environment lacks of a requirements file.

    python tools/check_environment.py requirements.txt

Exit code 0: everything is there, or 2: something is missing or too old. Needs nothing but Python.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

OLDEST_PYTHON = (3, 10)
REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?$")
SAME = {
    "opencv-python-headless": (
        "opencv-python",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    ),
    "pillow": ("pillow-simd",),
}


def requirements(path: Path) -> list[tuple[str, str]]:
    """(name, lowest version or '') for each line of a requirements file, those of files it includes
    with -r too.
    """
    found = []
    for line in (
        line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()
    ):
        if line.startswith("-r"):
            found += requirements(path.parent / line[2:].strip())
        elif line:
            found.append((REQUIREMENT.match(line)[1], REQUIREMENT.match(line)[2] or ""))
    return found


def numbers(version: str) -> tuple[int, ...]:
    """'2.15.0+cu130' -> (2, 15, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def installed(name: str) -> str | None:
    """The version of a package, or of one that replaces it; None without either."""
    for candidate in (name, *SAME.get(name, ())):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def problems(path: Path) -> list[str]:
    """What is missing or too old, in a few words each."""
    found = []
    for name, lowest in requirements(path):
        version = installed(name)
        if version is None:
            found.append(f"{name} is missing")
        elif lowest and numbers(version) < numbers(lowest):
            found.append(f"{name} is {version}, needed is {lowest}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Prints nothing where all is well."""
    path = Path((argv or sys.argv[1:])[0])
    found = (
        [f"Python is {sys.version.split()[0]}, needed is 3.10"]
        if sys.version_info < OLDEST_PYTHON
        else problems(path)
    )
    if found:
        print(
            f"error: the environment of {sys.executable} is not complete: {', '.join(found)};"
            f" install with: {sys.executable} -m pip install -r {path}",
            file=sys.stderr,
        )
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
