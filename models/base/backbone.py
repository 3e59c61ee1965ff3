"""What every backbone is to the rest of the program: its registry, how a config builds one, initial
values, and what it says of its parameters.
"""

from torch import nn

from models.attention import AttentionSpec
from models.attention.modified import Modified
from models.attention.softmax import SoftmaxAttention
from models.layers.init import init_linear_and_norm
from models.layers.pre_mlp import PreMlp
from registry import Registry

from .attention_block import check_blocks

BACKBONES = Registry("backbone")


def attention_spec(config, own: str = "softmax") -> AttentionSpec:
    """MODEL.ATTENTION as plain values; mixer auto is the family's `own`."""
    node = config.MODEL.ATTENTION
    return AttentionSpec(
        modifiers=tuple(node.MODIFIERS),
        drop=node.DROP,
        logit_scale_init=node.LOGIT_SCALE_INIT,
        bias_sigmoid=node.BIAS_SIGMOID,
        backend=node.BACKEND,
        mixer=own if node.MIXER == "auto" else node.MIXER,
    )


class Backbone(nn.Module):
    """Base of the image classifiers. A subclass builds its modules, then calls `initialise`.

    Attributes every backbone has: num_classes, num_features (channels of the pooled features), and
        `forward_features`, `forward`, `flops`.
    optional_settings: the settings of models.base.options.NEUTRAL that `from_config` reads; a
        config that changes another one is refused.
    head_names: attributes that are linear layers to the classes, or None or Identity where the
        model has none.
    """

    optional_settings: frozenset[str] = frozenset()
    head_names: tuple[str, ...] = ("head",)

    @classmethod
    def from_config(cls, config, num_classes: int) -> nn.Module:
        """The model that the family's section of MODEL describes.

        Raises: ValueError with the reason where there is no such model.
        """
        raise NotImplementedError

    def initialise(self) -> None:
        """Initial values: `initialise_weights`, then each modifier draws its own, whatever else the
        model holds.

        Raises: ValueError for modifiers that no block would call.
        """
        check_blocks(self)
        self.initialise_weights()
        for name, module in self.named_modules():
            if isinstance(module, Modified):
                module.initialise_modifiers(name)

    def initialise_weights(self) -> None:
        """Swin's rule for all but modifiers and pre-MLPs, which have drawn their own already."""
        own = [
            name
            for name, module in self.named_modules()
            if isinstance(module, PreMlp) or name.endswith(".modifiers")
        ]
        for name, module in self.named_modules():
            if not any(name.startswith(prefix) for prefix in own):
                init_linear_and_norm(module)

    def layer_groups(self) -> list[list[str]]:
        """Names of parameters, or of modules with all they hold, by depth: first what comes before
        the blocks, then one list a block in the order of the forward pass. What is in none of them
        comes after the blocks.

        A block's list has everything that is as deep: a downsampling behind the block, and the
        pre-MLP in front of it. By default no blocks are known: [].
        """
        return []

    def hidden_names(self) -> list[str]:
        """Names of the parts whose matrices are hidden linear maps, not embeddings or heads: the
        blocks, and what counts with them.
        """
        return [name for group in self.layer_groups()[1:] for name in group]

    def classifiers(self) -> list[str]:
        """Names of the linear layers to the classes, as far as the model has them."""
        return [name for name in self.head_names if isinstance(getattr(self, name), nn.Linear)]

    def has_two_heads(self) -> bool:
        """Whether `forward_heads` gives logits of a class head and of a distillation head."""
        return False

    def query_key_weights(self) -> list[str]:
        """Names of the weights (3C, C) whose rows [0:2C] make queries and keys."""
        return [
            f"{name}.qkv.weight"
            for name, module in self.named_modules()
            if isinstance(module, SoftmaxAttention)
        ]

    def position_names(self) -> set[str]:
        """Names of position embeddings and tokens, which are not decayed."""
        return set()

    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay: `position_names`, and those that a part of
        the model names in a `no_weight_decay` of its own.
        """
        names = self.position_names()
        for path, module in self.named_modules():
            if path and hasattr(module, "no_weight_decay"):
                names |= {f"{path}.{own}" for own in module.no_weight_decay()}
        return names

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names without weight decay."""
        return set()
