"""What holds attention modifiers: makes them from the config's words, and lets each draw its
initial values.
"""

from collections.abc import Iterable

from torch import nn

from models.layers.init import own_random_numbers

from .geometry import Geometry
from .modifiers import MODIFIERS


class Modified(nn.Module):
    """Base of modules with modifiers, which stand in `modifiers` by name; the backbone initialises
    them, see Backbone.
    """

    def add_modifiers(self, texts: Iterable[str], geometry: Geometry) -> None:
        """Makes the modifiers, each "name" or "name(option=value)". Raises: ValueError for a name
        that comes twice.
        """
        self.modifiers = nn.ModuleDict()
        for text in texts:
            with own_random_numbers(text):
                modifier = MODIFIERS.create(text, geometry)
            name = text.partition("(")[0].strip()
            if name in self.modifiers:
                raise ValueError(f"attention modifier {name!r} is listed twice in {list(texts)}")
            self.modifiers[name] = modifier

    def initialise_modifiers(self, name: str) -> None:
        """Lets each modifier draw its initial values; `name` tells the layers of a model apart."""
        for key, modifier in self.modifiers.items():
            with own_random_numbers(f"{name}.{key}"):
                modifier.initialise(self)
