"""Run under torchrun with two processes by test_grid.py: trains every configuration named on the
command line for a few updates.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import load_config  # noqa: E402
from main import Program  # noqa: E402
from utils import World  # noqa: E402


def main(output: str, options: list[str], paths: list[str]) -> None:
    with World("cpu") as world:
        for path in paths:
            config = load_config(path, ["OUTPUT", output, *options])
            assert Program(config, world).run() == 0, path
            if world.is_main:
                print("TRAINED", path)


if __name__ == "__main__":
    split = sys.argv.index("--")
    main(sys.argv[1], sys.argv[2:split], sys.argv[split + 1 :])
