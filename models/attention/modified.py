"""What holds attention modifiers: makes them from the config's words, and lets each draw its
initial values.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kernels.modes import is_fake
from models.layers.init import own_random_numbers
from registry import parse_call

from .geometry import Geometry
from .modifiers import MODIFIERS
from .modifiers.base import Modifier


class Modified(nn.Module):
    """Base of modules with modifiers, which stand in `modifiers` by name; the backbone initialises
    them, see Backbone.
    """

    built_in_kinds: tuple[type[Modifier], ...] = ()  # what each of `built_in` is

    def add_modifiers(self, texts: Iterable[str], geometry: Geometry) -> None:
        """Makes the modifiers, each "name" or "name(option=value)". Raises: ValueError for a name
        that comes twice.
        """
        self.modifiers = nn.ModuleDict()
        for text in texts:
            with own_random_numbers(text):
                modifier = MODIFIERS.create(text, geometry)
            name, _ = parse_call(text)
            if name in self.modifiers:
                raise ValueError(f"attention modifier {name!r} is listed twice in {list(texts)}")
            modifier.written = text.strip()[len(name) :].strip()[1:-1]
            self.modifiers[name] = modifier

    def initialise_modifiers(self, name: str) -> None:
        """Lets each modifier draw its initial values; `name` tells the layers of a model apart.

        Afterwards `overwriting` names those that changed the module's own parameters.
        """
        self.place = name
        self.overwriting: list[str] = []
        for key in self.modifiers:
            before = self._own_values()
            self._initialise(key)
            if any(map(_changed, self._own_parameters(), before)):
                self.overwriting.append(key)

    def overwrite(self) -> None:
        """Lets those modifiers set the module's own parameters once more, to the same values."""
        for key in self.overwriting:
            self._initialise(key)

    def built_in(self) -> tuple[Modifier, ...]:
        """What a form of attention always does to logits and map, before any modifier of the
        config; by default nothing.
        """
        return ()

    def names_of(self, kind: type[Modifier]) -> list[str]:
        """The config's modifiers that consist of, or contain, one of this kind."""
        return [
            name
            for name, modifier in self.modifiers.items()
            if any(isinstance(part, kind) for part in _members(modifier))
        ]

    def _stage(self, kind: type[Modifier]) -> list[Modifier]:
        built_in = zip(self.built_in(), self.built_in_kinds, strict=False)
        return [part for part, its in built_in if issubclass(its, kind)] + self._configured(kind)

    def _configured(self, kind: type[Modifier]) -> list[Modifier]:
        parts = []
        for modifier in self.modifiers.values():
            parts += [part for part in _members(modifier) if isinstance(part, kind)]
        return parts

    def _initialise(self, key: str) -> None:
        with own_random_numbers(f"{self.place}.{key}"):
            self.modifiers[key].initialise(self)

    def _own_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("modifiers.")]

    def _own_values(self) -> list[tuple[int, Tensor]]:
        return [(_version(p), p.detach().clone()) for p in self._own_parameters()]


def _members(modifier: nn.Module) -> tuple[Modifier, ...]:
    """Raises: ValueError for a module in place of a modifier that does not say what it changes."""
    members = modifier.members() if hasattr(modifier, "members") else (modifier,)
    for member in members:
        if not isinstance(member, Modifier):
            raise ValueError(
                f"{type(member).__name__} in place of an attention modifier does not say what it"
                " changes; derive it from ProjectionModifier, TokenModifier, TermModifier,"
                " LogitMixer, MapModifier, OutputModifier or BranchModifier"
            )
    return members


def _version(parameter: Tensor) -> int:
    """How often it was written; the one thing that tells on the meta device."""
    return 0 if parameter.is_inference() else parameter._version


def _changed(parameter: Tensor, before: tuple[int, Tensor]) -> bool:
    version, values = before
    if _version(parameter) != version:
        return True
    if parameter.is_meta or is_fake(parameter):
        return False
    return not torch.equal(parameter, values)
