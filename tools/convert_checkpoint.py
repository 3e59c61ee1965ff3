"""Rewrites a weights file in this repository's names, plain or for a model with qk_residual.

    python tools/convert_checkpoint.py swin_t.pth swin_t_residual.safetensors --to qk_residual

Reads whatever main.py reads (.pth, .safetensors, https URL; timm, torchvision, SimMIM and the
original identity-sharpened names) and writes .safetensors or .pth. The output states in its
metadata which kind it is, so the loader need not guess.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere, without an installation

from checkpoint import (
    CheckpointError,
    names_as_metadata,
    read_weights,
    save_weights,
    stored_classes,
    to_reference,
)
from checkpoint.grids import FileGrids, stated_grids
from checkpoint.residual import SOURCES, file_residual, match_residual, side_named
from checkpoint.soundness import check_form


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="weights file or https URL")
    parser.add_argument("target", help="file to write: .safetensors, .pth or .pt")
    parser.add_argument(
        "--to",
        choices=("reference", "plain", "qk_residual"),
        default="reference",
        help=(
            "reference: only names change (default); plain: W + I if of a qk_residual model;"
            " qk_residual: W - I"
        ),
    )
    parser.add_argument(
        "--which",
        choices=("both", "q", "k"),
        default="both",
        help="the side of qk_residual to write",
    )
    parser.add_argument(
        "--source-residual",
        choices=SOURCES,
        default="auto",
        help=(
            "what the file holds, if it does not say (default: auto, taken as plain if nothing"
            " speaks against it)"
        ),
    )
    parser.add_argument(
        "--entry", help="part of a wrapped file, e.g. model_ema (default: model, state_dict, ...)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> str:
    """Does the work; returns one line that says what was done. Raises CheckpointError."""
    if Path(args.target).exists() and not args.force:
        raise CheckpointError(f"{args.target} exists; choose another name or add --force")
    weights = read_weights(args.source, args.entry)
    check_form(weights, args.source)
    state, steps = to_reference(weights)
    source = source_side(args, weights, [name for name, _ in steps])
    goal = {"reference": source, "plain": "none", "qk_residual": args.which}[args.to]
    state, note = match_residual(state, source, goal)
    said = names_as_metadata(stored_classes(weights) or ())
    said |= stated_grids(FileGrids(weights, state).of_state())
    save_weights(args.target, state, {"format": "pt", "qk_residual": goal, **said})
    done = [f"{name} names converted ({reason})" for name, reason in steps] + [note] * bool(note)
    return f"wrote {args.target}: {len(state)} tensors, qk_residual {goal}" + "".join(
        f"; {line}" for line in done
    )


def source_side(args: argparse.Namespace, weights, formats: list[str]) -> str:
    if args.source_residual != "auto":
        return side_named(args.source_residual)
    side, reason = file_residual(weights, formats, args.which)
    if side is None and "parameters of this project" in reason:
        raise CheckpointError(
            f"{args.source}: {reason}; add --source-residual plain or qk_residual"
        )
    return side or "none"


def main(argv=None) -> int:
    """Exit code 0, or 2 with one line on stderr."""
    try:
        print(convert(parse(argv)))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
