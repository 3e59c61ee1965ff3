"""Named parts, their options, and the nearest spelling."""

import math

import pytest

from registry import Interval, Registry, check_choice, nearest, parse_call
from settings.kinds import Choice


def typed(place, on: bool = False, count: "int" = 1, rate: float = 0.5, either: int | None = 1):
    """A part whose options are annotated."""
    return on, count, rate, either


@pytest.fixture
def parts() -> Registry:
    registry = Registry("part")
    registry.register("rod", lambda place, length=1, colour="red": (place, length, colour))
    registry.register("anything", lambda place, **options: (place, options))
    registry.register("typed", typed)
    return registry


def test_an_option_of_its_annotated_type_is_passed_on(parts):
    options = "typed(on=True, count=3, rate=1, either=none)"
    assert parts.create(options, "here") == (True, 3, 1, None)


def test_a_part_is_built_from_its_name_and_options(parts):
    assert parts.create("rod", "here") == ("here", 1, "red")
    assert parts.create("rod(length=3, colour=blue)", "here") == ("here", 3, "blue")
    assert parts.create("anything(whatever=None)", "here") == ("here", {"whatever": None})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rot", "there is no part 'rot'; available: anything, rod, typed; did you mean 'rod'?"),
        ("rod(lenght=3)", "has no option 'lenght'; its options are length, colour; did you mean"),
        ("rod(place=3)", "has no option 'place'"),
        ("rod(3)", "cannot read 'rod(3)'; write name or name(option=value, ...)"),
        ("rod(length=1, length=2)", "write name or name(option=value, ...), each option once"),
        ("anything(**{'a': 1})", "cannot read"),
        ("typed(on=maybe)", "part 'typed(on=maybe)': on is 'maybe'; allowed: True or False"),
        ("typed(on=1)", "on is 1; allowed: True or False"),
        ("typed(count=2.5)", "count is 2.5; allowed: a whole number"),
        ("typed(count=True)", "count is True; allowed: a whole number"),
        ("typed(rate=[1])", "rate is [1]; allowed: a number"),
    ],
)
def test_a_wrong_name_or_option_is_answered_with_what_there_is(parts, text, words):
    with pytest.raises(ValueError) as caught:
        parts.create(text, "here")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_is_taken_once(parts):
    with pytest.raises(ValueError, match="'rod' is registered twice"):
        parts.register("rod", print)


def test_values_are_literals_and_bare_words_are_text():
    assert parse_call("a(b=1e-4, c=word, d=True, e=none)") == (
        "a",
        {"b": 1e-4, "c": "word", "d": True, "e": None},
    )


def test_bare_words_are_text_in_lists_too():
    written = "a(b=[one, 'two', 3], c=(true, -1, none), d=[])"
    assert parse_call(written)[1] == {"b": ["one", "two", 3], "c": (True, -1, None), "d": []}


def test_the_nearest_spelling_ignores_the_case_and_distant_words():
    assert nearest("ROD", ["rod", "wheel"]) == "rod"
    assert nearest("xylophone", ["rod", "wheel"]) is None
    assert nearest("--amp", ["--zip", "--tag", "--eval"]) is None
    assert nearest("MODEL.FOO", ["MODEL.EMA", "MODEL.TYPE", "MODEL.VIT.POOL"]) is None
    assert nearest("TRAIN.EPOCH", ["TRAIN.KEEP", "TRAIN.EPOCHS"]) == "TRAIN.EPOCHS"
    with pytest.raises(ValueError, match="SIZE is 'larg'; allowed are small, large; did you mean"):
        check_choice("SIZE", "larg", ["small", "large"])


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "written"),
    [
        (Interval(0, 1), (0, 1), (-0.1, 1.1), "[0, 1]"),
        (Interval(0, 1, "[)"), (0, 0.99), (1,), "[0, 1)"),
        (Interval(0, ends="(]"), (1e-9, math.inf), (0,), "(0, inf]"),
    ],
)
def test_an_interval_holds_its_numbers(interval, inside, outside, written):
    assert all(interval.holds(value) for value in inside)
    assert not any(interval.holds(value) for value in outside)
    assert str(interval) == written


def test_a_choice_among_the_names_of_a_registry_sees_later_entries(parts):
    kind = Choice(parts)
    with pytest.raises(ValueError):
        kind.convert("wheel")
    parts.register("wheel", print)
    assert kind.convert("Wheel") == "wheel" and "wheel" in kind.allowed
