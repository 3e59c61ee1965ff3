"""Specs of modifiers, mixers and timm's models, "name(option=value)": every option is of its
annotated kind, and what is accepted is what was written.
"""

import inspect
import random
from functools import wraps
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from kernels.window_attention import window_layout
from models import timm_model
from models.attention import AttentionSpec, Geometry, WindowAttention
from models.attention.mixed import WindowMixer
from models.attention.mixers import MIXERS
from models.attention.modifiers import MODIFIERS
from registry import Option, option_annotations

GEOMETRY = Geometry(16, 2, (2, 3))
TAKEN = {MODIFIERS: 1, MIXERS: 2}  # parameters in front of the options
WRONG = object()  # what no option of a kind may be
ODD = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1e400",
    "1j",
    "b'1'",
    "...",
    "{}",
    "[1, [2]]",
    "''",
    "'\\n'",
]
WRITTEN: dict[Any, dict[str, Any]] = {  # by kind: how a value is written, and what it is
    bool: {
        **dict.fromkeys(["True", "true", "on", "yes", "'True'", "ON"], True),
        **dict.fromkeys(["False", "false", "off", "no", "'False'", "No"], False),
        **dict.fromkeys(["1", "0", "none", "maybe", "1.0", "[]", "(True,)", *ODD], WRONG),
    },
    int: {
        **{text: int(text) for text in ("1", "2", "3", "5", "64", "0", "-1", "9999999999999999")},
        **dict.fromkeys(["1.0", "True", "'2'", "off", "none", "2e0", *ODD], WRONG),
    },
    float: {
        **{text: float(text) for text in ("0", "1", "0.5", "1e-4", "-0.5", "2", "1e-320", "1e30")},
        **dict.fromkeys(["True", "'0.5'", "off", "none", "9" * 400, *ODD], WRONG),
    },
    str: {
        "none": "none",
        **dict.fromkeys(["1", "True", "0.5", "[1]", *ODD[:-2]], WRONG),
    },
}
WRITTEN[str] |= {text: text for text in ("nan", "inf")}  # bare words
WORDS = {  # that some part takes
    *("both", "pre", "post", "identity", "normal", "uniform", "mlp", "table", "add_to_scale"),
    *("one_plus", "sigmoid16", "logits", "probs", "zeros", "ones", "paper", "release", "relu6"),
    *("row", "raster", "key_grid", "query_grid", "include", "exclude", "preset", "qk", "q", "k"),
    *("l2", "softmax", "shared", "per_head", "mask", "zero", "sqrt_d", "other", "off"),
    *("dct", "random", "match", "qkv", "auto", "layer", "rms", "head", "element", "open"),
}


def written_as(annotation, rng) -> tuple[str, Any]:
    """A value for an option, as it is written and as it has to arrive."""
    known = {}
    for kind in (str, float, int, bool):  # the last that knows a spelling has it
        if kind in (annotation, *getattr(annotation, "__args__", ())):
            own = dict(WRITTEN[kind])
            if kind is str:
                own |= {word: word for word in WORDS}
            known |= {
                text: value
                for text, value in own.items()
                if value is not WRONG or text not in known
            }
    if type(None) in getattr(annotation, "__args__", ()):
        known["none"] = None
    words = words_of(annotation)
    known |= dict.fromkeys(["other", "1j"] if words else [], WRONG) | {word: word for word in words}
    text = rng.choice(sorted(known))
    return text, known[text]


def words_of(annotation) -> list[str]:
    """Those of a Literal, alone or beside other kinds."""
    members = (annotation, *getattr(annotation, "__args__", ()))
    return [
        word for member in members if get_origin(member) is Literal for word in get_args(member)
    ]


def random_spec(registry, rng) -> tuple[str, str, dict[str, Any]]:
    """A spec, its name, and the options that have to arrive (WRONG for those that may not)."""
    name = rng.choice(registry.names())
    options = option_annotations(registry[name], TAKEN[registry])
    chosen = rng.sample(sorted(options), min(len(options), rng.choice([0, 1, 1, 2, 2, 3])))
    wanted, texts = {}, []
    for option in chosen:
        text, wanted[option] = written_as(options[option], rng)
        texts.append(f"{option}={text}")
    fault = rng.random()
    if fault < 0.05 and texts:
        texts.append(texts[0])
        wanted["twice"] = WRONG
    elif fault < 0.1:
        texts.append("optoin=1")
        wanted["optoin"] = WRONG
    space = rng.choice(["", " "])
    return f"{name}{space}({f', {space}'.join(texts)})", name, wanted


def try_spec(registry, text):
    """Builds and runs what a spec describes."""
    spec = AttentionSpec((text,)) if registry is MODIFIERS else AttentionSpec(mixer=text)
    kind = WindowAttention if registry is MODIFIERS else WindowMixer
    module = kind(GEOMETRY, spec).eval()
    module.initialise_modifiers("fuzz") if registry is MODIFIERS else None
    with torch.no_grad():
        module(torch.randn(1, 4, 6, 16), window_layout((4, 6), (2, 3), (1, 1)))


@pytest.mark.parametrize(
    ("registry", "count"),
    [
        pytest.param(registry, count, marks=mark, id=f"{registry.kind} {count}")
        for mark, counts in ((pytest.mark.slow, (150, 45)), (pytest.mark.long, (1500, 450)))
        for registry, count in zip((MODIFIERS, MIXERS), counts, strict=True)
    ],
)
def test_what_is_accepted_arrives_as_written_and_all_else_is_one_line(registry, count, monkeypatch):
    rng = random.Random(f"{registry.kind} {count}")
    arrived = {}
    for name in registry.names():
        monkeypatch.setattr(registry[name], "__init__", spied(registry[name].__init__, arrived))
    accepted = 0
    for _ in range(count):
        text, name, wanted = random_spec(registry, rng)
        arrived.clear()
        try:
            try_spec(registry, text)
        except ValueError as error:
            assert "\n" not in str(error) and 10 < len(str(error)) < 900, text
            continue
        accepted += 1
        assert WRONG not in wanted.values(), text
        got = arrived[registry[name]]
        for option, value in wanted.items():
            assert type(got[option]) is type(value) and got[option] == value, (text, option)
    assert count / 10 < accepted < count * 0.9


def spied(init, arrived):
    """A constructor that notes its options under its class, from the outermost call on."""

    @wraps(init)
    def noting(self, *args, **options):
        arrived.setdefault(type(self), options)
        init(self, *args, **options)

    return noting


@pytest.mark.parametrize("registry", [MODIFIERS, MIXERS], ids=lambda registry: registry.kind)
def test_every_option_of_every_part_has_an_annotation_that_can_be_checked(registry):
    for name in registry.names():
        options = option_annotations(registry[name], TAKEN[registry])
        assert options is not None, f"{name} takes any option"
        for option, annotation in options.items():
            assert annotation is not inspect.Parameter.empty, (name, option)
            assert Option.ANY not in Option(annotation).types, (name, option)


@pytest.mark.parametrize("text", ["off", "no", "False", "false", "'False'"])
def test_no_spelling_of_false_means_true(text):
    mixing = MODIFIERS.create(f"talking_heads(bias={text})", GEOMETRY)
    assert mixing.pre.bias is None
    refiner = MODIFIERS.create(f"refiner(preset=release, bn={text}, residual={text})", GEOMETRY)
    assert not refiner.norms and refiner.residual is False
    model = timm_model(f"vit_tiny_patch16_224(depth=1, embed_dim=6, qkv_bias={text})", 5, 32)
    assert model.blocks[0].attn.qkv.bias is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("qkv_bias=maybe", "qkv_bias is 'maybe'; allowed: True or False"),
        ("depth=1.0", "depth is 1.0; allowed: a whole number"),
        ("mlp_ratio=1e400", "mlp_ratio is inf; allowed: a number"),
        ("depht=1", "has no option 'depht'; its options are img_size,.* did you mean 'depth'"),
        ("global_pool=tokne", "global_pool is 'tokne'; allowed: .*avg.* did you mean 'token'"),
        ("patch_size=(4, 4, 4)", "patch_size is .4, 4, 4.; allowed: a whole number, or a list"),
        ("num_classes=7", "num_classes is 7, MODEL.NUM_CLASSES says 5; leave the option out"),
        ("img_size=64", "img_size is 64, DATA.IMG_SIZE says"),
        ("depth=1, depth=2", "each option once"),
        ("device=meta", "has no option 'device'"),
    ],
)
def test_an_option_that_timms_model_does_not_take_is_one_line(text, words):
    with pytest.raises(ValueError, match=words) as error:
        timm_model(f"vit_tiny_patch16_224({text})", 5, 32)
    assert "\n" not in str(error.value)


def test_options_of_timms_models_arrive_as_written():
    options = (
        "img_size=(32, 32), patch_size=(8, 16), embed_dim=6, depth=1, init_values=1, class_token=no"
    )
    model = timm_model(
        f"deit_tiny_distilled_patch16_224({options.replace(', class_token=no', '')})", 5, 32
    )
    assert model.patch_embed.grid_size == (4, 2) and len(model.blocks) == 1
    model = timm_model(f"vit_tiny_patch16_224({options}, global_pool=avg, fc_norm=none)", 5, 32)
    assert model.cls_token is None and model.blocks[0].ls1.gamma.mean() == 1


def test_a_mixer_keeps_the_width_of_the_tokens():
    with pytest.raises(ValueError, match="makes 8 channels of 16; leave out_dim out"):
        WindowMixer(GEOMETRY, AttentionSpec(mixer="efficient_additive(out_dim=8)"))
