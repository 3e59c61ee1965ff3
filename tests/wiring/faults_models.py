"""Faults on the way from settings to models."""

from tests.wiring.faults import ARGUMENT, MODEL, ON_MODELS, dropped, mutants

PRE_MLP = ON_MODELS.format("a_pre_mlp_has_dropout_and_the_stochastic_depth_of_the_block_behind_it")
HIDDEN = ON_MODELS.format("muon_takes_the_matrices_of_all_blocks_and_no_others[{}]")

MODEL_MUTANTS = [
    *dropped("models/vit.py", ARGUMENT.format("vit"), "layer_scale=node.LAYER_SCALE"),
    *dropped("models/vit.py", ARGUMENT.format("vit"), "registers=node.REGISTERS"),
    *dropped("models/vit.py", ARGUMENT.format("vit"), "pool=node.POOL", "head_dim=node.HEAD_DIM"),
    *dropped(
        "models/base/tokens.py",
        ARGUMENT.format("vit"),
        "drop_path_profile=model.DROP_PATH_PROFILE",
        "norm_eps=node.NORM_EPS",
        "qkv_bias=node.QKV_BIAS",
    ),
    *dropped(
        "models/base/pyramid.py",
        ARGUMENT.format("swin"),
        "pre_mlp_drop_path=model.PRE_MLP.DROP_PATH",
        "pre_mlp_ratio=model.PRE_MLP.RATIO",
        "patch_norm=node.PATCH_NORM",
        "dynamic_img_size=model.DYNAMIC_IMG_SIZE",
        "use_checkpoint=config.TRAIN.USE_CHECKPOINT",
        "drop_path_profile=model.DROP_PATH_PROFILE",
    ),
    *dropped("models/swin_transformer.py", ARGUMENT.format("swin"), "qk_scale=node.QK_SCALE"),
    *dropped("models/cait.py", MODEL.format("cait"), "class_mixing=node.CLASS_MIXING"),
    *dropped("models/pit.py", MODEL.format("pit"), "class_position=node.CLASS_POSITION"),
    *dropped("models/t2t.py", MODEL.format("t2t"), "modified=node.MODIFIED"),
    *dropped(
        "models/refined_vit.py",
        ARGUMENT.format("refined_vit"),
        "cos_pairs=node.COS_PAIRS",
        "mlp_gain=node.MLP_GAIN",
    ),
    *dropped("models/swiftformer.py", ARGUMENT.format("swiftformer"), "vit_num=node.VIT_NUM"),
    *dropped("models/sasa_resnet.py", ARGUMENT.format("sasa_resnet"), "content=node.CONTENT"),
    *dropped(
        "models/timm_models.py",
        "tests/test_arrival.py::test_released_weights_are_asked_for_by_name",
        "pretrained=node.PRETRAINED",
    ),
    *dropped("models/base/backbone.py", MODEL.format("vit"), "drop=node.DROP"),
    *dropped("models/base/backbone.py", MODEL.format("swinv2"), "bias_sigmoid=node.BIAS_SIGMOID"),
    *mutants(
        "models/base/pyramid.py",
        (
            "pre_mlp_without_its_drop_path",
            "rate = drop_path if options.pre_mlp_drop_path else 0.0",
            "rate = 0.0",
            MODEL.format("swin"),
        ),
        (
            "blocks_without_dropout",
            "            drop=options.drop_rate,\n",
            "\n",
            ON_MODELS.format("rates_reach_every_block"),
        ),
    ),
    *mutants(
        "models/build.py",
        (
            "batch_norms_keep_their_momentum",
            "        norm.momentum = momentum",
            "        norm.momentum = norm.momentum",
            MODEL.format("sasa_resnet"),
        ),
        (
            "classes_of_the_settings_not_of_the_data",
            "    if num_classes is None:",
            "    if True:",
            ARGUMENT.format("vit"),
        ),
    ),
    *mutants(
        "models/base/pyramid.py",
        (
            "a_stem_with_stochastic_depth",
            '"stem", options, self.embed_dim, 0.0)',
            '"stem", options, self.embed_dim, options.drop_path_rate)',
            PRE_MLP,
        ),
        (
            "a_pre_mlp_as_deep_as_its_stage",
            "first = paths[0] if paths",
            "first = paths[-1] if paths",
            PRE_MLP,
        ),
        (
            "a_pre_mlp_without_dropout",
            "options.pre_mlp_ratio, options.drop_rate, rate)",
            "options.pre_mlp_ratio, 0.0, rate)",
            PRE_MLP,
        ),
        ("no_stage_is_hidden", 'return ["layers"]', "return []", HIDDEN.format("swin")),
    ),
    *mutants(
        "models/pit.py",
        (
            "a_second_head_is_no_classifier",
            'head_names = ("head", "head_dist")',
            'head_names = ("head",)',
            ON_MODELS.format("a_backbone_names_every_layer_to_the_classes[pit]"),
        ),
        (
            "poolings_are_hidden",
            ' if not name.endswith(".pool")',
            "",
            HIDDEN.format("pit"),
        ),
    ),
    *mutants(
        "models/vit.py",
        (
            "pooled_patches_have_the_usual_epsilon",
            'nn.LayerNorm(embed_dim, norm_eps) if pool == "mean"',
            'nn.LayerNorm(embed_dim) if pool == "mean"',
            ON_MODELS.format("the_norm_of_pooled_patches_has_the_epsilon_of_the_settings"),
        ),
    ),
    *mutants(
        "models/refined_vit.py",
        (
            "a_class_token_decays",
            'return {"pos_embed", "cls_token"}',
            'return {"pos_embed"}',
            ON_MODELS.format("position_embeddings_and_tokens_are_not_decayed[refined_vit]"),
        ),
        (
            "an_auxiliary_head_is_no_classifier",
            'head_names = ("head", "aux_head")',
            'head_names = ("head",)',
            ON_MODELS.format("a_backbone_names_every_layer_to_the_classes[refined_vit]"),
        ),
    ),
    *mutants(
        "models/base/backbone.py",
        (
            "parts_are_not_asked_what_decays",
            'names |= {f"{path}.{own}" for own in module.no_weight_decay()}',
            "pass",
            ON_MODELS.format("a_part_says_which_of_its_own_parameters_are_not_decayed"),
        ),
    ),
]
