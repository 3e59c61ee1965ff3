"""What loading did, parameter by parameter, and how it is said."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from .errors import list_keys

# A part of a parameter's name that one version of Swin alone has.
FAMILIES = {
    "relative_position_bias_table": "Swin",
    "logit_scale": "SwinV2",
    "spatial_mlp": "Swin-MLP",
}


@dataclass
class LoadReport:
    """What became of each parameter.

    Attributes:
        loaded: keys that came from the file, resized ones included.
        missing: keys of the model that the file lacks or holds in a wrong shape.
        unexpected: keys of the file that the model lacks.
        resized: keys whose shape was fitted.
        fresh: keys that keep their initial value, or zero, by a rule (a new head, a modifier's own
            parameters); not counted in the coverage.
        unsure: keys taken as the model's grid of tokens, of which the file does not say.
        by_position: classes whose names could not be compared were taken in the file's order.
        notes: conversions and rules that applied, one line each.
        shapes: of misfits, " (file ..., model ...)".
        coverage: loaded elements / (all elements - fresh ones), in [0, 1].
        format: the implementations whose names the file used, or "reference".
        text: all of it in one paragraph, for the log.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    by_position: bool = False
    notes: list[str] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    coverage: float = 0.0
    format: str = "reference"
    text: str = ""


def describe(wanted: Mapping[str, Tensor], report: LoadReport) -> str:
    """The report in one paragraph. wanted: the model's parameters and buffers that count."""

    def count(keys: Iterable[str]) -> int:
        return sum(wanted[key].numel() for key in keys)

    total = count(report.loaded) + count(report.missing)
    lines = [
        f"loaded {count(report.loaded):,} of {total:,} parameters ({percent(report.coverage)})"
    ]
    if report.fresh:
        lines.append(f"{count(report.fresh):,} more are new to the file: {list_keys(report.fresh)}")
    if report.resized:
        lines.append(f"resized {list_keys(report.resized)}")
    if report.missing:
        lines.append(f"missing: {list_keys(report.missing)}")
    if report.unexpected:
        lines.append(f"unexpected: {list_keys(report.unexpected)}")
    return "; ".join(lines + report.notes)


def percent(share: float) -> str:
    """Never 100 % unless it is all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9999):.4f} %"


def reasons(model: nn.Module, report: LoadReport, rule: str) -> list[str]:
    """Why weights are refused and what would help, in the order a reader needs it."""
    if not report.loaded:
        return ["no key is one of this model's", f"it holds {list_keys(report.unexpected)}"]
    lines = []
    file, own = family(report.unexpected + report.loaded), family(model.state_dict())
    if file and own and file != own:
        lines.append(f"it holds {file}, the model is {own}")
    lines.append(f"{percent(report.coverage)} of the parameters would be loaded")
    if report.missing:
        misfits = [key + report.shapes.get(key, "") for key in report.missing]
        lines.append(f"missing or of another shape: {list_keys(misfits)}")
    if report.unexpected:
        lines.append(f"unexpected: {list_keys(report.unexpected)}")
    advice = "set MODEL.PARTIAL_LOAD True to load what fits"
    if rule == "exact":
        advice += ", or give it as MODEL.PRETRAINED, which fits sizes"
    return [*lines, advice]


def family(keys: Iterable[str]) -> str | None:
    """The version of Swin that some of the keys belong to, None if none does."""
    keys = list(keys)
    stages = [key for key in keys if key.startswith("layers.")]  # BEiT has such tables too
    return next((FAMILIES[part] for part in FAMILIES if any(part in key for key in stages)), None)
