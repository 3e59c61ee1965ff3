"""YAML values, --opts and flags: printed back as they were meant, or refused in one line."""

import logging
import os
from random import Random

import pytest
import yaml

from config import FLAGS, KEYS, load_config
from settings.reading import look_up
from tests.fuzz import call_main, cases, refusal
from tests.fuzz.values import TAGS, a_flag, a_key, a_value, means
from tests.wiring.cases import FAMILIES, SECTIONS
from tests.wiring.models import model_settings
from tests.wiring.runs import SETTINGS, nested


@pytest.fixture(autouse=True)
def quiet_and_alone(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A small configuration of each family, by the beginning of its keys; "" for all others."""
    folder = tmp_path_factory.mktemp("bases")
    found = {"": SETTINGS}
    for family in FAMILIES:
        plain = {"AUG.AUTO_AUGMENT": "none", "DATA.BATCH_SIZE": 4}
        found[SECTIONS[family]] = plain | model_settings(family)
    for number, (start, settings) in enumerate(found.items()):
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump(nested(settings)))
        found[start] = path
    return found


def base_of(bases, key: str):
    return next(
        (path for start, path in bases.items() if start and key.startswith(start)), bases[""]
    )


def printed(folder, text: str):
    """The configuration that --print-config has printed, which prints itself again."""
    path = folder / "printed.yaml"
    path.write_text(text)
    config = load_config(path)
    for key, entry in KEYS.items():
        if key not in ("OUTPUT", "LOCAL_RANK"):  # made from others
            value = look_up(config, key)
            again = entry.kind.convert(value)
            assert again == value and type(again) is type(value), key
    return config


def check(folder, argv: list, written: dict[str, str]) -> bool:
    """Whether the command is taken; what is written has to be what is read then."""
    status, out, _ = call_main(*argv, "--print-config")
    assert status in (0, 2), argv
    if status:
        return False
    config = printed(folder, out)
    for key, text in written.items():
        read = look_up(config, key)
        if key == "OUTPUT":
            read = read.removesuffix(f"{config.MODEL.NAME}/{config.TAG}").rstrip("/")
            text = os.path.expanduser(text.rstrip("/"))
        if key.endswith("PRETRAINED_WINDOW_SIZES") and not any(read):
            continue  # none, for any number of stages
        assert means(text, read), (key, text, read)
    return True


@cases(3000)
def test_yaml_values(count, bases, tmp_path):
    random, taken = Random(11), 0
    path = tmp_path / "fuzzed.yaml"
    for _ in range(count):
        key = random.choice(list(KEYS))
        text = a_value(random, key)
        tag = f"{random.choice(TAGS)} " if random.random() < 0.05 else ""
        *parents, leaf = key.split(".")
        lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(parents)]
        lines.append(f"{'  ' * len(parents)}{leaf}: {tag}{text}")
        content = "\n".join([f"BASE: ['{base_of(bases, key)}']", *lines]) + "\n"
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        # comments, tags, anchors and second lines are YAML's own and mean what it says
        own = text.lstrip().startswith(("#", "!", "&"))
        own = own or "\n" in text or text.strip("\r \ufeff") != text
        plain = {} if own or tag or key == "LOCAL_RANK" else {key: text}
        taken += check(tmp_path, ["--cfg", path], plain)
    assert taken > count / 5


@cases(1500)
def test_option_lines(count, bases, tmp_path):
    random, taken = Random(12), 0
    for _ in range(count):
        keys = [a_key(random) for _ in range(random.choice([1, 1, 2, 3]))]
        pairs = [(key, a_value(random, key if key in KEYS else "TAG")) for key in keys]
        words = [word for pair in pairs for word in pair]
        if random.random() < 0.03:
            words.pop()
        written = {key: text for key, text in pairs if key != "LOCAL_RANK"}
        taken += check(tmp_path, ["--cfg", base_of(bases, keys[0]), "--opts", *words], written)
    assert taken > count / 10


@cases(500)
def test_flag_lines(count, bases, tmp_path):
    random, taken = Random(13), 0
    keys = {name: flag for flag in FLAGS for name in flag.names}
    for _ in range(count):
        flags = [a_flag(random) for _ in range(random.choice([1, 1, 2, 4]))]
        written = {}
        for words in flags:
            name, _, value = words[0].partition("=")
            if name in keys:
                given = value if "=" in words[0] else words[-1]
                written[keys[name].key] = given if keys[name].sets is None else str(keys[name].sets)
        argv = ["--cfg", bases[""], *(word for words in flags for word in words)]
        taken += check(tmp_path, argv, written)
    assert taken > count / 10


def test_what_a_value_means_is_told_from_what_it_does_not():
    assert means("1e-3", 0.001) and means("[1, 2]", (1, 2)) and means("OFF", "off")
    assert not means("010", 8) and not means("1:30", 90) and not means("no", True)
    assert not means("[1, 2]", [1]) and not means("x", "y") and not means("3", None)


def test_the_helpers_tell_lines_from_tracebacks(capsys):
    assert refusal(lambda: load_config(None, ["TRAIN.EPOCHS", 0])) is not None
    assert refusal(lambda: load_config(None, ["TRAIN.EPOCHS", 30])) is None
    with pytest.raises(ZeroDivisionError):
        refusal(lambda: 1 / 0)
