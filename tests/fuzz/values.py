"""Settings as people, scripts and accidents write them, and what they mean."""

from __future__ import annotations

import ast
import math
from random import Random
from typing import Any

from config import FLAGS, KEYS

NUMBERS = (
    "0 1 2 3 4 7 8 16 32 100 -1 -3 0.0 0.5 0.1 0.9 1.0 1.5 -0.5 .5 1. 1e-3 1e-8 1.0e-05 1E3 1e400"
    " 1e-400 -0.0 nan .nan inf .inf -.inf 007 010 0x10 0b11 0o17 1_000 1__0 1:30 1:30.5 1e 1.2.3"
    " +5 +.5 --1 1e308 9007199254740993 2147483648 9223372036854775808 1000001 99999999999999999999"
).split()
WORDS = (
    "true false True FALSE yes no on off Off null None ~ none auto y n default x"
    " 2020-13-45 2020-12-24 12:00:61 a.b /tmp ../x ~nouser/x https://[::1 s3://x"
    " run_100% %s {} ${HOME} name(a=1) name(a=1 name() a,b"
    " [1] (2,2) '' \"\" ' \" [ ] { } : - # & * !"
    " !!int !!binary &a *a <<: @x `x`"
).split()
LISTS = (
    "[] [1] [2,2] [1,2,3,4] [0.1,0.9] [0.9,0.1] (0.5,0.5) [[1]] [null] [true] ['a'] [a,b] [1,] [,]"
    " {a:1} {} [1,2 [nan,nan] [1e400,1] [-1,-1] () (1) (1,) [qk_residual] [crpw] [crpw,crpw]"
).split()
ODD = "\0 \x1b[31m a\nb \ud800 \udcff 😀 é ａ１ \u202e x\u00a0y \u2028 \ufeff a\tb \r".split(
    " "
) + ["", " ", "x" * 300, "9" * 5000, "[" * 500, "(" * 300 + ")" * 300, "1" + "0" * 400]
TAGS = ("!!int", "!!float", "!!bool", "!!str", "!!null", "!!timestamp", "!!binary", "!!set", "!x")


def one_of(random: Random, *pools: Any) -> str:
    """An element of one of the pools."""
    return random.choice(random.choice(pools))


def a_value(random: Random, key: str) -> str:
    """Text for a key: often near what it takes, often not."""
    kind, default = KEYS[key].kind, KEYS[key].default
    near = random.random()
    if near < 0.25 and kind.choices:
        return misspelt(random, random.choice(kind.choices))
    if near < 0.6 and isinstance(default, (int, float)) and not isinstance(default, bool):
        return str(random.choice([default, default * 2, default + 1, -default, default / 3]))
    if near < 0.6 and isinstance(default, (list, tuple)) and default:
        items = [random.choice([item, item, item * 2]) for item in default]
        return str(random.choice([list, tuple])(items[: random.randint(1, len(items))]))
    if near < 0.6 and isinstance(default, bool):
        return random.choice(WORDS[:9])
    return one_of(random, NUMBERS, WORDS, LISTS, ODD)


def misspelt(random: Random, word: str) -> str:
    """The word, or something close to it."""
    place = random.randrange(len(word) + 1)
    return random.choice(
        [
            word,
            word,
            word.upper(),
            f" {word}",
            word[:place] + word[place + 1 :],
            word[:place] + random.choice("aeinst_. ") + word[place:],
        ]
    )


def a_key(random: Random) -> str:
    """A key, or something close to one."""
    key = random.choice(list(KEYS))
    return key if random.random() < 0.9 else misspelt(random, key)


def a_flag(random: Random) -> list[str]:
    """A flag with a value, if it takes one, or something close to it."""
    flag = random.choice(FLAGS)
    name = random.choice(flag.names)
    if random.random() < 0.1:
        name = misspelt(random, name)
    if flag.sets is not None:
        return [name]
    value = a_value(random, flag.key)
    return (
        [f"{name}={value}"]
        if random.random() < 0.3
        else [name, value][: random.choice([2, 2, 2, 1])]
    )


def means(text: str, read: Any) -> bool:
    """Whether `read` is what somebody means who writes `text`."""
    bare = text.strip()
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\"":
        bare = bare[1:-1]
    word = bare.lower()
    if read is None:
        return word in ("none", "null", "~", "")
    if isinstance(read, bool):
        return word in (("true", "yes", "on") if read else ("false", "no", "off"))
    if isinstance(read, (int, float)):
        number = as_number(bare)
        if number is None or not math.isfinite(read):
            return False
        return (float(number) if isinstance(read, float) else number) == read
    if isinstance(read, str):
        absent = read in ("", "none", "off", "no") and word in NOTHING
        return read in (text, bare) or read.lower() == word or absent
    return items_mean(bare, read)


NOTHING = ("none", "null", "~", "", "false", "no", "off")


def as_number(text: str) -> float | int | None:
    """The number that Python reads in it, as (1) too."""
    for reader in (int, float, ast.literal_eval):
        try:
            number = reader(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return number if isinstance(number, (int, float)) else None
    return None


def items_mean(text: str, read: Any) -> bool:
    """The same for a list, written with brackets, parentheses or commas alone."""
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        items = [part for part in text.strip("[]()").split(",") if part.strip()]
    items = list(items) if isinstance(items, (list, tuple)) else [items]
    return len(items) == len(read) and all(
        means(str(item), value) for item, value in zip(items, read, strict=True)
    )
