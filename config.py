"""Every setting: its default, its meaning, what it may be; how YAML, --opts and flags are merged;
the frozen result.

Later wins: defaults, the YAML's BASE files (depth first, in list order), the YAML (--cfg), --opts,
named flags. After reading, OUTPUT is OUTPUT/MODEL.NAME/TAG, MODEL.NUM_CLASSES is that of a known
data set, LOCAL_RANK is the launcher's, and nothing may be written any more. The rates under TRAIN
hold for 512 images per update; the program scales its own copies, never these.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint.residual import SOURCES
from data.sets import DATASETS
from engine.clip import MODES
from engine.ema import DECAY
from engine.losses import SMOOTHING, Distillation
from engine.wandb_run import FORBIDDEN, LONGEST
from lr_scheduler import SHAPES
from models import BACKBONES
from optimizer import OPTIMIZERS
from settings.flags import FLAGS, add_flags, add_local_rank, build_parser, refuse_empty
from settings.inert import inert
from settings.kinds import (
    Choice,
    ConfigError,
    Key,
    choice,
    either,
    integer,
    number,
    optional,
    pair,
    sequence,
    size,
    specifications,
    switch,
    text,
)
from settings.reading import (
    CfgNode,
    Given,
    dump_config,
    log_note,
    look_up,
    sections_of,
    to_dict,
    tree,
)
from settings.rules import check_combinations, derive

__all__ = [
    "FLAGS",
    "KEYS",
    "SECTIONS",
    "ConfigError",
    "dump_config",
    "get_config",
    "load_config",
    "notes",
    "parse_args",
    "to_dict",
]

RATE = number(0, 1, "[)")  # a probability below 1
SHARE = number(0, 1)  # a probability
FROM_0 = number(0)
ABOVE_0 = number(0, ends="(]")
COUNT = integer(0)
AT_LEAST_1 = integer(1)
# Numbers above a limit are slips: no run could be served.
STEPS = integer(0, limit=10**12)
PIXELS = size(limit=2**15)
SIDE = integer(1, limit=2**15)
CHANNELS = integer(1, limit=2**16)
FEW = integer(1, limit=2**12)
BLOCKS = integer(1, limit=1000)
BLOCKS_OR_NONE = integer(0, limit=1000)
EXPANSION = number(0, ends="(]", limit=1000)
FOLDER = text(
    r"(?!/)(?!.*(^|/)\.\.?(/|$)).+", "text without a leading / and without ..", empty=None
)  # a part of the output path
POLICY = text(
    r"none|cifar10|svhn|imagenet|3a|(rand|augmix|originalr?|v0r?)(-[\w.]+)*",
    "'none', one of AutoAugment's own, cifar10, svhn, imagenet, or a policy of timm:"
    " rand-m9-mstd0.5-inc1 and the like, augmix-..., original, v0, 3a",
    empty="none",
)
NAME = text(r"\w+(\(.*\))?", "'name' or 'name(arg=value, ...)'")
OPTIMIZER = Choice(OPTIMIZERS, pattern=r"timm:\w+", also="timm:<name>")
NO_MOE = {"swin_moe": "mixture-of-experts models (Tutel) are not part of this project"}


def _backbone(name: str, heads_note: str = "", **more: Key) -> dict[str, Key]:
    """The keys of one family's section; `more` holds those that only this family has."""
    keys = {
        "PATCH_SIZE": Key(4, SIDE, "side of a patch, pixels"),
        "IN_CHANS": Key(3, FEW, "channels of an image"),
        "EMBED_DIM": Key(
            96, CHANNELS, "channels of the first stage; each later stage doubles them"
        ),
        "DEPTHS": Key([2, 2, 6, 2], sequence(BLOCKS_OR_NONE), "blocks per stage"),
        "NUM_HEADS": Key(
            [3, 6, 12, 24],
            sequence(FEW),
            "heads per stage; each divides its stage's channels" + heads_note,
        ),
        "WINDOW_SIZE": Key(
            7,
            size(limit=2**10),
            "side of a window, tokens, or (height, width); a smaller map makes the window smaller",
        ),
        "MLP_RATIO": Key(4.0, EXPANSION, "hidden channels of a block's MLP per channel"),
        "APE": Key(
            False, switch(), "add a learned absolute position embedding after the patch embedding"
        ),
        "PATCH_NORM": Key(True, switch(), "LayerNorm after the patch embedding"),
        **more,
    }
    return _section(name, **keys)


def _section(name: str, **keys: Key) -> dict[str, Key]:
    """The keys of the section MODEL.<name>."""
    return {f"MODEL.{name}.{leaf}": key for leaf, key in keys.items()}


# fmt: off
KEYS: dict[str, Key] = {
    # data
    "DATA.BATCH_SIZE": Key(128, AT_LEAST_1,
        "images per process and step, in training and validation"),
    "DATA.DATA_PATH": Key("", text(), "root of the data set; digits needs none"),
    "DATA.DATASET": Key("imagenet", Choice(DATASETS),
        "a file of data/sets: imagenet: DATA_PATH/{train,val}/<class>/*; folder: the same, any "
        "classes; imagenet22K: JSON lists; digits: part of scikit-learn; the others through "
        "torchvision or in their published layout"),
    "DATA.DOWNLOAD": Key(False, switch(), "let torchvision fetch its data sets into DATA_PATH"),
    "DATA.IMG_SIZE": Key(224, PIXELS, "side of the model's input, pixels, or (height, width)"),
    "DATA.INTERPOLATION": Key("bicubic",
        choice("random", "bilinear", "bicubic", "lanczos", "hamming"),
        "resampling of images; random: drawn per image in training, bilinear in validation"),
    "DATA.CROP_RATIO": Key(0.875, number(0, 1, "(]"),
        "share of the resized validation image's side that TEST.CROP keeps (224 of 256)"),
    "DATA.MEAN": Key((), sequence(number(), tuple),
        "mean per channel, of pixels in [0, 1]; () = the data set's own"),
    "DATA.STD": Key((), sequence(ABOVE_0, tuple),
        "standard deviation per channel, of pixels in [0, 1]; () = the data set's own"),
    "DATA.ZIP_MODE": Key(False, switch(),
        "read DATA_PATH/{train,val}.zip, labelled by {train,val}_map.txt or by the class folders "
        "inside; imagenet and folder"),
    "DATA.CACHE_MODE": Key("part", choice("no", "full", "part"),
        "zip mode, images in memory: none; all; this process' share"),
    "DATA.PIN_MEMORY": Key(True, switch(), "page-locked host memory, for faster copies to a GPU"),
    "DATA.NUM_WORKERS": Key(8, integer(0, limit=256),
        "loading processes per process; 0 = load in the training process"),
    "DATA.TIMEOUT": Key(1800.0, FROM_0,
        "seconds to wait for a batch before giving up, with or without loading processes; 0 = for "
        "ever. After 300 s a warning shows where the program waits"),
    "DATA.REPEATED_AUG": Key(1, AT_LEAST_1,
        "differently augmented views of each sampled training image (repeated augmentation); 1 = "
        "off"),
    "DATA.CORRUPT_LIMIT": Key(10, COUNT,
        "unreadable training images replaced before the run stops; in validation none is "
        "tolerated"),
    # model
    "MODEL.TYPE": Key("swin", Choice(BACKBONES, refused=NO_MOE),
        "family; its own section below describes the network"),
    "MODEL.NAME": Key("swin_tiny_patch4_window7_224", FOLDER,
        "names the output folder and the logger, nothing else"),
    "MODEL.PRETRAINED": Key("", text(), "weights to start from: file or https URL; '' = none"),
    "MODEL.RESUME": Key("", text(),
        "training checkpoint to continue or evaluate: file or https URL; '' = none"),
    "MODEL.HEAD_RESET": Key(False, switch(),
        "start the head anew with pretrained weights, even where its shape agrees"),
    "MODEL.PARTIAL_LOAD": Key(False, switch(),
        "accept MODEL.PRETRAINED weights that do not cover the whole model"),
    "MODEL.ENTRY": Key("", text(),
        "which weights of MODEL.PRETRAINED, or of MODEL.RESUME in an evaluation, where a file has "
        "several: model_ema, teacher, state_dict.student; '' = the trained ones"),
    "MODEL.INIT_OVER_PRETRAINED": Key(False, switch(),
        "modifiers that only set initial values (init_identity) set them over pretrained weights, "
        "MODEL.PRETRAINED's or timm's; False refuses both together"),
    "MODEL.MATCH_CLASSES": Key(True, switch(),
        "compare the class names in a file with the data's and put its head into their order; "
        "False = classes by position"),
    "MODEL.SOURCE": Key("auto", choice(*SOURCES),
        "which qkv weights a file holds; auto = as the file says. plain and residual ones are "
        "converted (W - I, W + I)"),
    "MODEL.NUM_CLASSES": Key(1000, COUNT,
        "outputs; if not given, the data set's; 0 = inferred from the class folders (folder only)"),
    "MODEL.DROP_RATE": Key(0.0, RATE,
        "dropout after the embedding, the attention's projection and in the MLPs"),
    "MODEL.DROP_PATH_RATE": Key(0.1, RATE,
        "stochastic depth of the last block; DROP_PATH_PROFILE says that of the others"),
    "MODEL.DROP_PATH_PROFILE": Key("linear", choice("linear", "constant"),
        "linear: from 0 at the first block; constant: DROP_PATH_RATE in every block (not timm)"),
    "MODEL.LABEL_SMOOTHING": Key(0.1, number(*SMOOTHING),
        "share of the target spread over all classes, with and without mixup"),
    "MODEL.BN_MOMENTUM": Key(None, optional(number(0, 1, "(]")),
        "share of the newest batch in the running statistics of every BatchNorm (a decay of "
        "0.9999 is 1e-4); None = each layer's own"),
    "MODEL.DYNAMIC_IMG_SIZE": Key(False, switch(),
        "accept inputs of any size, not DATA.IMG_SIZE alone"),
    "MODEL.CHANNELS_LAST": Key(False, switch(),
        "images and convolutions in channels-last memory order"),
    "MODEL.COMPILE": Key(False, switch(), "torch.compile the model"),
    # model: identity sharpening; everything is off by default
    "MODEL.ATTENTION.MODIFIERS": Key([], specifications(),
        "in the order they apply; files of models/attention/modifiers"),
    "MODEL.ATTENTION.DROP": Key(0.0, RATE,
        "dropout of the softmaxed map while training; above 0, training takes the open path"),
    "MODEL.ATTENTION.LOGIT_SCALE_INIT": Key(10.0, number(0, 100, "(]"),
        "swinv2: initial scale of the cosines; Swin's is 10"),
    "MODEL.ATTENTION.BIAS_SIGMOID": Key(True, switch(),
        "swinv2: bias = 16 sigmoid(MLP), as released; False = the MLP itself"),
    "MODEL.ATTENTION.BACKEND": Key("auto", choice("auto", "reference", "eager", "sdpa", "fused"),
                                   "how attention is computed; auto = the fastest that applies"),
    "MODEL.ATTENTION.MIXER": Key("auto", NAME,
        "auto: the family's own (softmax; swiftformer: efficient_additive; sasa_resnet: local); "
        "softmax, or what replaces it, with projections of its own: efficient_additive, "
        "separable, local (models/attention/mixers)"),
    "MODEL.PRE_MLP.WHERE": Key("off", choice("off", "stem", "stage"),
        "an MLP before attention: after the embedding, or before each stage"),
    "MODEL.PRE_MLP.RATIO": Key(4.0, EXPANSION, "hidden channels of the pre-MLP per channel"),
    "MODEL.PRE_MLP.DROP_PATH": Key(False, switch(),
        "stochastic depth on the pre-MLP, at the rate of the stage's first block"),
    "MODEL.SW_MLP": Key("off", choice("off", "token_mix", "shift"),
        "experimental sliding-window MLP per block; our reading of the idea"),
    # model: parameter averaging
    "MODEL.EMA.ENABLE": Key(False, switch(),
        "keep an exponential moving average of the parameters"),
    "MODEL.EMA.DECAY": Key(0.9999, number(*DECAY), "of the average, per update"),
    "MODEL.EMA.EVAL": Key(True, switch(),
        "evaluate the average too; the best checkpoint is chosen by it"),
    # model: families
    **_backbone("SWIN",
                QKV_BIAS=Key(True, switch(), "bias of the query, key and value projection"),
                QK_SCALE=Key(None, optional(ABOVE_0),
                    "scale of the logits; None = 1 / sqrt(channels per head)")),
    **_backbone("SWINV2",
                QKV_BIAS=Key(True, switch(),
                    "bias of the query and value projections (the key has none)"),
                PRETRAINED_WINDOW_SIZES=Key([0, 0, 0, 0], sequence(COUNT),
                    "window per stage, tokens, of the weights loaded, to which the bias' "
                    "coordinates are normalised; 0 = this model's own")),
    **_backbone("SWIN_MLP", heads_note="; here: groups of the spatial MLP"),
    **_section("VIT", **{
        "PATCH_SIZE": Key(16, PIXELS, "side of a patch, pixels, or (height, width)"),
        "IN_CHANS": Key(3, FEW, "channels of an image"),
        "EMBED_DIM": Key(384, CHANNELS, "channels"),
        "DEPTH": Key(12, BLOCKS, "blocks"),
        "NUM_HEADS": Key(6, FEW, "heads"),
        "HEAD_DIM": Key(None, optional(CHANNELS),
            "channels of a head; None = EMBED_DIM / NUM_HEADS"),
        "MLP_RATIO": Key(4.0, EXPANSION, "hidden channels of a block's MLP per channel"),
        "QKV_BIAS": Key(True, switch(), "bias of the query, key and value projection"),
        "CLASS_TOKEN": Key(True, switch(), "a learned token in front of the patches"),
        "POOL": Key("token", choice("token", "mean"),
            "what the head sees: the class token, or the mean of the patches"),
        "NORM_EPS": Key(1e-6, ABOVE_0, "added to the variance in every LayerNorm"),
        "LAYER_SCALE": Key(None, optional(ABOVE_0),
            "initial factor of both branches of every block; None = no factors"),
        "REGISTERS": Key(0, integer(0, limit=2**12),
            "learned tokens behind the class token, without a position, dropped at the end"),
    }),
    **_section("CAIT", **{
        "PATCH_SIZE": Key(16, PIXELS, "side of a patch, pixels, or (height, width)"),
        "IN_CHANS": Key(3, FEW, "channels of an image"),
        "EMBED_DIM": Key(192, CHANNELS, "channels"),
        "DEPTH": Key(24, BLOCKS, "blocks of talking heads over the patches"),
        "CLASS_DEPTH": Key(2, BLOCKS, "blocks in which the class token asks the patches"),
        "NUM_HEADS": Key(4, FEW, "heads"),
        "HEAD_DIM": Key(None, optional(CHANNELS),
            "channels of a head; None = EMBED_DIM / NUM_HEADS"),
        "MLP_RATIO": Key(4.0, EXPANSION, "hidden channels of a block's MLP per channel"),
        "QKV_BIAS": Key(True, switch(), "bias of the query, key and value projection"),
        "MIXING": Key("small", choice("small", "normal", "identity"),
            "initial head mixings: N(0, 0.02^2) as released, N(0, 1), identity"),
        "MIXING_BIAS": Key(True, switch(),
            "head mixings have a bias, as released; that before the softmax has no effect"),
        "CLASS_CONTEXT": Key("all", choice("all", "patches"),
            "the class token attends to itself and the patches, normed together, or, as in the "
            "small-image form, to the patches alone, as they are"),
        "CLASS_MIXING": Key(False, switch(),
            "heads mix in the class blocks too, as in the small-image form"),
        "NORM_EPS": Key(1e-6, ABOVE_0, "added to the variance in every LayerNorm"),
        "LAYER_SCALE": Key(1e-5, either(ABOVE_0, choice("depth")),
            "initial factor of all branches; depth: 0.1 up to block 18, 1e-5 up to 24, 1e-6 "
            "beyond"),
    }),
    **_section("PIT", **{
        "PATCH_SIZE": Key(16, PIXELS, "side of a patch, pixels, or (height, width)"),
        "STRIDE": Key(None, optional(SIDE),
            "pixels between two patches; None = PATCH_SIZE; the ImageNet models' is 8"),
        "IN_CHANS": Key(3, FEW, "channels of an image"),
        "EMBED_DIM": Key(144, CHANNELS,
            "channels of the first stage; each later stage doubles them"),
        "DEPTHS": Key([2, 6, 4], sequence(BLOCKS_OR_NONE), "blocks per stage"),
        "NUM_HEADS": Key([3, 6, 12], sequence(FEW), "heads per stage"),
        "HEAD_DIM": Key(None, optional(CHANNELS),
            "channels of a head; None = a stage's channels / its heads"),
        "MLP_RATIO": Key(4.0, EXPANSION, "hidden channels of a block's MLP per channel"),
        "QKV_BIAS": Key(True, switch(), "bias of the query, key and value projection"),
        "POINTWISE": Key(False, switch(),
            "a 1 x 1 convolution after the pooling's depthwise one, as in the small-image form"),
        "CLASS_POSITION": Key(False, switch(),
            "the class token has a position embedding, as in the small-image form"),
        "DISTILLED": Key(False, switch(),
            "a second class token with a head of its own; logits are the mean of both"),
        "NORM_EPS": Key(1e-6, ABOVE_0, "added to the variance in every LayerNorm"),
    }),
    **_section("T2T", **{
        "TOKEN_TRANSFORMERS": Key(1, BLOCKS_OR_NONE,
            "attention between soft splits; the tokens' grid is 2^-(1 + this) of the image"),
        "TOKEN_DIM": Key(64, CHANNELS, "channels of the token transformers"),
        "IN_CHANS": Key(3, FEW, "channels of an image"),
        "EMBED_DIM": Key(256, CHANNELS, "channels of the blocks"),
        "DEPTH": Key(12, BLOCKS, "blocks"),
        "NUM_HEADS": Key(4, FEW, "heads of a block; a token transformer has one"),
        "MLP_RATIO": Key(2.0, EXPANSION, "hidden channels of a block's MLP per channel"),
        "QKV_BIAS": Key(False, switch(), "bias of the query, key and value projection"),
        "PRESET": Key("paper", choice("paper", "release"),
            "release: with the oddities of the published small-image code (models/t2t.py)"),
        "MODIFIED": Key("all", choice("all", "blocks"),
            "what MODEL.ATTENTION.MODIFIERS reach: token transformers and blocks, or blocks"),
        "NORM_EPS": Key(1e-5, ABOVE_0, "added to the variance in every LayerNorm"),
    }),
    **_section("REFINED_VIT", **{
        "PATCH_SIZE": Key(16, PIXELS, "side of a patch, pixels, or (height, width)"),
        "IN_CHANS": Key(3, FEW, "channels of an image"),
        "EMBED_DIM": Key(384, CHANNELS, "channels"),
        "DEPTH": Key(16, BLOCKS, "blocks"),
        "NUM_HEADS": Key(12, FEW, "heads"),
        "MLP_RATIO": Key(3.0, EXPANSION, "hidden channels of a block's MLP per channel"),
        "QKV_BIAS": Key(True, switch(), "bias of the query, key and value projection"),
        "STEM": Key("conv", choice("conv", "linear"),
            "three convolutions in front of the patches, or none"),
        "SHARE_EVERY": Key(2, AT_LEAST_1,
            "blocks in a row that share an attention map: the first forms it, the others refine "
            "and use it; 1 = each forms its own, 2 as released"),
        "CARRY": Key(True, switch(),
            "a block that forms a map adds the last one formed, / sqrt(channels per head)"),
        "REFINE": Key("refiner(preset=release, rescale=True)", NAME,
            "what a block does to the map that it shares: a modifier of maps"),
        "MLP_GAIN": Key(1e-5, ABOVE_0, "initial factor, per channel, of every MLP's branch"),
        "AUX_HEAD": Key(False, switch(),
            "a second head on every patch; half its largest logits are added"),
        "COS_REG": Key(0.0, FROM_0,
            "weight, in training, of the cosines over heads of neighbouring blocks' maps; "
            "released S and M: 0.1"),
        "COS_PAIRS": Key(12, AT_LEAST_1,
            "pairs of neighbouring blocks, from the first on, over which COS_REG takes the mean"),
        "NORM_EPS": Key(1e-6, ABOVE_0, "added to the variance in every LayerNorm"),
    }),
    **_section("SWIFTFORMER", **{
        "IN_CHANS": Key(3, FEW, "channels of an image"),
        "EMBED_DIMS": Key([48, 56, 112, 220], sequence(CHANNELS), "channels per stage"),
        "DEPTHS": Key([3, 3, 6, 4], sequence(BLOCKS), "blocks per stage"),
        "MLP_RATIO": Key(4.0, EXPANSION, "hidden channels of a block's MLP per channel"),
        "VIT_NUM": Key(1, BLOCKS_OR_NONE,
            "blocks with attention, at the end of each stage; the others are convolution encoders"),
        "NUM_HEADS": Key([], sequence(FEW),
            "heads per stage, for MODEL.ATTENTION.MIXER local; [] = one each"),
        "LAYER_SCALE": Key(1e-5, optional(ABOVE_0),
            "initial factor of attention and MLP; None = no factors anywhere"),
        "DISTILL_HEAD": Key(True, switch(),
            "a second head, which learns from the teacher if there is one; logits are the mean of "
            "both"),
    }),
    **_section("SASA_RESNET", **{
        "IN_CHANS": Key(3, FEW, "channels of an image"),
        "WIDTH": Key(64, CHANNELS,
            "channels of the 3 x 3 layers, or of attention, in the first group; each later group "
            "doubles them"),
        "DEPTHS": Key([3, 4, 6, 3], sequence(BLOCKS),
            "blocks per group; ResNet-26: [1, 2, 4, 1], ResNet-38: [2, 3, 5, 2]"),
        "STEM": Key("conv", choice("conv", "attention", "small"),
            "7 x 7 convolution and pooling; attention in blocks of 4 x 4 pixels; 3 x 3 "
            "convolution without pooling, for small images"),
        "CONV_GROUPS": Key([], sequence(AT_LEAST_1),
            "groups, from 1, that keep convolutions; [1, 2, 3, 4] = ResNet itself"),
        "NUM_HEADS": Key(8, FEW, "heads of local attention"),
        "KERNEL_SIZE": Key(7, integer(1, limit=2**10), "side of the neighbourhood, pixels, odd"),
        "REL": Key("shared", choice("shared", "per_head", "none"),
            "position embeddings: the same for all heads, each its own, none"),
        "PAD": Key("mask", choice("mask", "zero"),
            "pixels outside the map: left out of the softmax, or zeros"),
        "SCALE": Key("none", choice("none", "sqrt_d"),
            "sqrt_d: logits divided by sqrt(channels per head); the paper's are not"),
        "GROUPED": Key(False, switch(), "each head projects its own channels alone"),
        "CONTENT": Key(True, switch(),
            "False: no keys, the logits are those of query and position alone"),
        "STEM_HEADS": Key(4, FEW, "heads of the attention stem"),
        "STEM_MIXTURES": Key(4, FEW,
            "value matrices of the attention stem, mixed by the place; the paper does not say how "
            "many"),
    }),
    **_section("TIMM", **{
        "MODEL": Key("",
            text(r"[\w.]+(\(.*\))?", "'name' or 'name(option=value, ...)', a model of timm, or ''"),
            "timm's name of the model, with options of its constructor; '' = MODEL.NAME"),
        "IN_CHANS": Key(3, FEW, "channels of an image"),
        "PRETRAINED": Key(False, switch(),
            "start from the weights that timm has released for the name; they are fetched from "
            "the network"),
    }),
    # training
    "TRAIN.START_EPOCH": Key(0, COUNT,
        "first epoch, counted from 0; a resumed run continues at its own"),
    "TRAIN.EPOCHS": Key(300, AT_LEAST_1, "epochs in all, the warm-up included"),
    "TRAIN.WARMUP_EPOCHS": Key(20, COUNT,
        "epochs over which the rate rises linearly from WARMUP_LR to BASE_LR"),
    "TRAIN.COOLDOWN_EPOCHS": Key(0, COUNT,
        "cosine, linear: last epochs of TRAIN.EPOCHS, which run at the rate that the schedule "
        "ends at"),
    "TRAIN.WEIGHT_DECAY": Key(0.05, FROM_0,
        "decoupled in AdamW; none on biases, norms and position parameters"),
    "TRAIN.DECAY_ALL": Key(False, switch(),
        "decay every parameter: biases, norms, position parameters and what modifiers exempt, too"),
    "TRAIN.QK_WEIGHT_DECAY": Key(1.0, FROM_0,
        "factor of WEIGHT_DECAY on the query and key rows of every qkv weight"),
    "TRAIN.LAYER_DECAY": Key(1.0, number(0, 1, "(]"),
        "factor of the rate per layer, counted from the head towards the input; 1 = off"),
    "TRAIN.BASE_LR": Key(5e-4, FROM_0,
        "peak rate per 512 images of an update: BASE_LR * batch * processes * accumulation / 512"),
    "TRAIN.WARMUP_LR": Key(5e-7, FROM_0, "rate at update 0, per 512 images"),
    "TRAIN.MIN_LR": Key(5e-6, FROM_0, "rate the cosine ends at, per 512 images"),
    "TRAIN.CLIP_GRAD": Key(5.0, optional(FROM_0), "gradient clipping threshold; 0 and None = off"),
    "TRAIN.CLIP_MODE": Key("norm", choice(*MODES),
        "clip the global norm, each entry, or by the parameter's norm"),
    "TRAIN.AUTO_RESUME": Key(True, switch(),
        "continue from the newest valid checkpoint of the output folder; never in evaluation"),
    "TRAIN.RESUME_CHANGED": Key(False, switch(),
        "go on from a checkpoint, or evaluate it, although the network, the images or, in the "
        "run's own folder, any setting that counts is another one"),
    "TRAIN.ACCUMULATION_STEPS": Key(1, AT_LEAST_1, "batches per update"),
    "TRAIN.USE_CHECKPOINT": Key(False, switch(),
        "recompute activations in the backward pass: less memory, more time"),
    "TRAIN.LR_SCHEDULER.NAME": Key("cosine", Choice(SHAPES),
        "after the warm-up; linear: to 0.01 BASE_LR"),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Key(30, AT_LEAST_1, "step: epochs between two falls"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Key(0.1, ABOVE_0, "step: factor per fall"),
    "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": Key(True, switch(),
        "cosine begins after the warm-up; False: spans it, as for released weights"),
    "TRAIN.LR_SCHEDULER.GAMMA": Key(0.1, ABOVE_0, "multistep: factor per fall"),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": Key([], sequence(COUNT, ascending=True),
        "multistep: epochs of the falls"),
    "TRAIN.OPTIMIZER.NAME": Key("adamw", OPTIMIZER,
        "sgd is Nesterov's; fused_adam = torch's fused adamw; fused_lamb = lamb"),
    "TRAIN.OPTIMIZER.EPS": Key(1e-8, ABOVE_0, "added to the denominator"),
    "TRAIN.OPTIMIZER.BETAS": Key((0.9, 0.999), pair(RATE), "decay of the first and second moment"),
    "TRAIN.OPTIMIZER.MOMENTUM": Key(0.9, RATE, "of sgd"),
    "TRAIN.DISTILL.KIND": Key("none", choice(*Distillation.KINDS),
        "learn from a teacher's decision (hard) or distribution (soft)"),
    "TRAIN.DISTILL.TEACHER": Key("", text(),
        "a model of timm by name, or a YAML of this repository"),
    "TRAIN.DISTILL.TEACHER_WEIGHTS": Key("", text(),
        "the teacher's weights: file or https URL; '' = timm's released ones"),
    "TRAIN.DISTILL.ALPHA": Key(0.5, number(*Distillation.ALPHA), "share of the distillation loss"),
    "TRAIN.DISTILL.TAU": Key(1.0, number(*Distillation.TAU), "soft: temperature"),
    "TRAIN.DETERMINISTIC": Key(False, switch(),
        "deterministic kernels only, slower; errors where there is none"),
    "TRAIN.MAX_NONFINITE": Key(20, AT_LEAST_1,
        "consecutive updates skipped for non-finite gradients before the run stops"),
    "TRAIN.SAVE_STEPS": Key(0, STEPS, "updates between two checkpoints inside an epoch; 0 = none"),
    "TRAIN.KEEP": Key(3, COUNT, "epoch checkpoints kept, besides last and best; 0 = all"),
    "TRAIN.MAX_STEPS": Key(0, STEPS, "stop after this many updates in all; 0 = no limit"),
    "TRAIN.GROUP_TIMEOUT": Key(1800.0, number(1, 86400, "[]"),
        "seconds that a process waits for the others in an exchange; not for one that begins "
        "slowly, saves or downloads, as long as it lives"),
    "TRAIN.CHECK_RANKS": Key(100, STEPS,
        "updates between two comparisons of the weights of all processes, which also come before "
        "each checkpoint; 0 = none"),
    "TRAIN.THREADS": Key(0, integer(0, limit=1024),
        "CPU threads of torch per process; 0 = torch's choice"),
    # augmentation, in training
    "AUG.COLOR_JITTER": Key(0.4, FROM_0,
        "strength of brightness, contrast and saturation jitter; acts only where AUTO_AUGMENT is "
        "'none'"),
    "AUG.AUTO_AUGMENT": Key("rand-m9-mstd0.5-inc1", POLICY,
        "policy: cifar10, svhn and imagenet are torchvision's AutoAugment, the others timm's; "
        "'none' = off"),
    "AUG.SCALE": Key((0.08, 1.0), pair(number(0, 1, "(]"), ascending=True),
        "share of the image's area that a random crop takes"),
    "AUG.RATIO": Key((0.75, 1.3333), pair(ABOVE_0, ascending=True),
        "width / height of a random crop"),
    "AUG.RANDOM_CROP_PADDING": Key(-1, integer(-1, limit=2**10),
        "pixels of padding around a same-size random crop, instead of the resized crop; -1 = 4 "
        "for images of at most 32 pixels, else resized crop"),
    "AUG.HFLIP": Key(0.5, SHARE, "probability of a horizontal flip"),
    "AUG.AFFINE": Key(False, switch(),
        "random small rotation, scale, shear and shift (for digits)"),
    "AUG.REPROB": Key(0.25, SHARE, "probability of random erasing"),
    "AUG.REMODE": Key("pixel", choice("pixel", "rand", "const"),
        "fill of an erased region: noise per pixel, one random colour, zeros"),
    "AUG.REAREA": Key((0.02, 0.3333), pair(number(0, 1, "(]"), ascending=True),
        "share of the image's area that an erased region takes; its height / width lies in [0.3, "
        "3.33]"),
    "AUG.RECOUNT": Key(1, integer(1, limit=1000), "most regions erased per image"),
    "AUG.MIXUP": Key(0.8, FROM_0, "alpha of the Beta distribution of mixup; 0 = off"),
    "AUG.CUTMIX": Key(1.0, FROM_0, "alpha of the Beta distribution of cutmix; 0 = off"),
    "AUG.CUTMIX_MINMAX": Key(None, optional(pair(SHARE, ascending=True)),
        "bounds of the cut's share of the side; replaces CUTMIX"),
    "AUG.MIXUP_PROB": Key(1.0, SHARE, "probability that a batch (pair, image) is mixed at all"),
    "AUG.MIXUP_SWITCH_PROB": Key(0.5, SHARE, "probability of cutmix where both are on"),
    "AUG.MIXUP_MODE": Key("batch", choice("batch", "pair", "elem"),
        "one mixing weight per batch, pair or image"),
    # evaluation
    "TEST.CROP": Key(True, switch(),
        "resize, then cut the centre (CROP_RATIO); False = resize to IMG_SIZE, squashing"),
    "TEST.SEQUENTIAL": Key(False, switch(), "every process evaluates the whole set"),
    "TEST.SHUFFLE": Key(False, switch(),
        "validation images in random order; the result is the same"),
    "TEST.PER_CLASS": Key(False, switch(), "write accuracy per class and the confusion matrix"),
    # logging
    "LOG.TENSORBOARD": Key(True, switch(),
        "write TensorBoard events beside metrics.jsonl, where it is installed"),
    "LOG.WANDB": Key(False, switch(),
        "report to Weights & Biases, as MODEL.NAME/TAG; offline where there is no account or "
        "network"),
    "LOG.WANDB_PROJECT": Key("", text(rf"[^{re.escape(FORBIDDEN)}]{{1,{LONGEST}}}",
        f"up to {LONGEST} characters, none of {FORBIDDEN}"),
        "W&B project; '' = the first part of MODEL.NAME"),
    "LOG.WANDB_ENTITY": Key("", text(rf".{{1,{LONGEST}}}", f"up to {LONGEST} characters"),
        "W&B user or team; '' = the account's own"),
    "LOG.WANDB_GROUP": Key("", text(rf".{{1,{LONGEST}}}", f"up to {LONGEST} characters"),
        "W&B group, such as the seeds of one setting; '' = none"),
    "LOG.WANDB_TAGS": Key([], sequence(text(".{1,64}", "text of up to 64 characters", empty=None)),
        "W&B tags"),
    "LOG.PLOT": Key(True, switch(), "plot the curves after training"),
    # the run
    "OUTPUT": Key("output", text(), "folder of all runs; once read, OUTPUT/MODEL.NAME/TAG"),
    "TAG": Key("default", FOLDER, "names the run within OUTPUT/MODEL.NAME"),
    "SEED": Key(0, integer(0, 2**31 - 1), "of every random choice; the process' rank is added"),
    "SAVE_FREQ": Key(1, AT_LEAST_1, "epochs between two checkpoints"),
    "PRINT_FREQ": Key(10, AT_LEAST_1, "steps between two log lines"),
    "DEVICE": Key("auto", choice("auto", "cuda", "mps", "cpu"),
        "auto = the first of cuda, mps, cpu that is there"),
    "AMP_ENABLE": Key(True, switch(), "mixed precision"),
    "AMP_DTYPE": Key("auto", choice("auto", "bfloat16", "float16", "float32"),
        "auto = bfloat16 on GPUs fast in it, float16 on older ones, float32 on CPU and MPS"),
    "EVAL_MODE": Key(False, switch(), "evaluate only"),
    "THROUGHPUT_MODE": Key(False, switch(), "measure images per second only"),
    "LOCAL_RANK": Key(0, COUNT,
        "this process on its machine; from the launcher (environment or --local-rank), never from "
        "a file"),
    # known to Swin, without effect here: SUPERSEDED says why
    "DATA.MASK_PATCH_SIZE": Key(32, AT_LEAST_1, "SimMIM: unit of the mask, pixels"),
    "DATA.MASK_RATIO": Key(0.6, SHARE, "SimMIM: masked share"),
    "MODEL.SIMMIM.NORM_TARGET.ENABLE": Key(False, switch(), "SimMIM: normalise the target locally"),
    "MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE": Key(47, AT_LEAST_1,
        "SimMIM: side of that neighbourhood, pixels"),
    "ENABLE_AMP": Key(False, switch(), "SimMIM: mixed precision"),
    "AMP_OPT_LEVEL": Key("", choice("", "O0", "O1", "O2"), "apex' level of mixed precision"),
    "FUSED_WINDOW_PROCESS": Key(False, switch(),
        "Swin's CUDA kernel for window partition"),
    "FUSED_LAYERNORM": Key(False, switch(), "apex' LayerNorm"),
}
# fmt: on
SECTIONS = sections_of(KEYS)

_SIMMIM = "SimMIM pre-training is not part of this program"
# Accepted, so that Swin's files and commands work; a note says that they do nothing.
SUPERSEDED = {
    **{
        key: _SIMMIM
        for key in KEYS
        if key.startswith(("DATA.MASK_", "MODEL.SIMMIM.")) or key == "ENABLE_AMP"
    },
    "AMP_OPT_LEVEL": "deprecated in Swin too; use AMP_ENABLE and AMP_DTYPE",
    "FUSED_WINDOW_PROCESS": "superseded by MODEL.ATTENTION.BACKEND",
    "FUSED_LAYERNORM": "superseded by torch's own fused LayerNorm, which is always on",
}
DROPPED = {"MODEL.SWIN_MOE.": NO_MOE["swin_moe"], "TRAIN.MOE.": NO_MOE["swin_moe"]}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line (sys.argv if `argv` is None). Flags that are not given are None, so
    that none overrides a YAML by accident.

    An unknown flag ends the program with status 2 and one line that names the nearest flag.
    """
    return build_parser(KEYS).parse_args(argv)


def get_config(args: Any) -> CfgNode:
    """Merges defaults, files, --opts and flags into the frozen configuration.

    Args:
        args: what `parse_args` returns, or any object with some of its attributes (cfg, opts,
            batch_size, ...); a missing one says nothing.
    Raises: ConfigError, one line, for anything that cannot be used.
    """
    given = Given(KEYS, DROPPED)
    if getattr(args, "cfg", None) is not None:
        refuse_empty("--cfg", args.cfg)
        given.add_file(Path(args.cfg), "--cfg")
    given.add_options(getattr(args, "opts", None) or [])
    add_flags(given, args)
    add_local_rank(given, args)
    values = derive(given.complete(), given.values)
    cfg = tree(values)
    check_combinations(cfg)
    written = {key: values[key] for key in KEYS if key in given.written}
    defaults = {key: entry.default for key, entry in KEYS.items()}
    for note in [*notes(cfg), *inert(written, values, defaults)]:
        log_note(note)
    cfg.freeze()
    return cfg


def load_config(path: str | os.PathLike | None, opts: Sequence[Any] = ()) -> CfgNode:
    """The frozen configuration of a YAML file (None: the defaults) with `opts`, a flat list of keys
    and values.
    """
    return get_config(argparse.Namespace(cfg=path, opts=list(opts)))


def notes(cfg: CfgNode) -> list[str]:
    """One line for each setting that is accepted for Swin's sake and does nothing, for rates that
    look like a slip, and for an initial value that pretrained weights replace.
    """
    found = []
    for key, reason in SUPERSEDED.items():
        value = look_up(cfg, key)
        if value != KEYS[key].default:
            found.append(f"{key} {value!r} has no effect: {reason}")
    train = cfg.TRAIN
    if train.LR_SCHEDULER.NAME == "cosine" and train.MIN_LR > train.BASE_LR:
        found.append(
            f"TRAIN.MIN_LR {train.MIN_LR:g} is above TRAIN.BASE_LR {train.BASE_LR:g}: the rate will"
            " rise"
        )
    model = cfg.MODEL
    start = model.ATTENTION.LOGIT_SCALE_INIT
    if model.PRETRAINED and start != KEYS["MODEL.ATTENTION.LOGIT_SCALE_INIT"].default:
        found.append(
            f"MODEL.ATTENTION.LOGIT_SCALE_INIT {start:g} has no effect on scales that"
            " MODEL.PRETRAINED brings"
        )
    return found
