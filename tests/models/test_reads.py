"""What modifiers may ask for besides their input."""

import pytest

from models.attention import AttentionSpec
from models.attention.modifiers import MODIFIERS, OutputModifier, TokenModifier
from tests.models.builders import small


@pytest.mark.parametrize(
    ("kind", "name", "allowed"),
    [
        (OutputModifier, "map", "lse, qkv, first_v, attend"),
        (TokenModifier, "lse", "first_v"),
    ],
)
def test_what_no_modifier_of_its_kind_is_given_is_refused(monkeypatch, kind, name, allowed):
    asking = type("Asking", (kind,), {"reads": (name,)})
    monkeypatch.setitem(MODIFIERS._entries, "asking", asking)
    with pytest.raises(ValueError, match=f"Asking.reads is '{name}'; allowed are {allowed}"):
        small("swin", attention=AttentionSpec(("asking",)))
