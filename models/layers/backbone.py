"""What every backbone does about its attention modules: initial values and the weight decay of what
modifiers add.
"""

from torch import nn

from models.attention.local import LocalAttention
from models.attention.local_stem import AttentionStem
from models.attention.modified import Modified

from .init import init_linear_and_norm
from .pre_mlp import PreMlp


class Backbone(nn.Module):
    """Base of the image classifiers. A subclass builds its modules, then calls `initialise`.

    Attributes every backbone has: num_classes, num_features (channels of the pooled features), and
        `forward_features`, `forward`, `flops`.
    """

    def initialise(self) -> None:
        """Initial values: `initialise_weights`, then each modifier draws its own, whatever else the
        model holds.
        """
        self.initialise_weights()
        for name, module in self.named_modules():
            if isinstance(module, Modified):
                module.initialise_modifiers(name)

    def initialise_weights(self) -> None:
        """The reference's rule for all but modifiers and pre-MLPs, which have drawn their own
        already.
        """
        own = [
            name
            for name, module in self.named_modules()
            if isinstance(module, PreMlp) or name.endswith(".modifiers")
        ]
        for name, module in self.named_modules():
            if not any(name.startswith(prefix) for prefix in own):
                init_linear_and_norm(module)

    def position_names(self) -> set[str]:
        """Names of position embeddings and tokens, which are not decayed."""
        return set()

    def no_weight_decay(self) -> set[str]:
        """Full names of parameters without weight decay: `position_names`, and what attention
        modifiers and local attention name.
        """
        names = self.position_names()
        for module_name, module in self.named_modules():
            if isinstance(module, Modified):
                for key, modifier in module.modifiers.items():
                    names |= {
                        f"{module_name}.modifiers.{key}.{own}" for own in modifier.no_weight_decay()
                    }
            if isinstance(module, (LocalAttention, AttentionStem)):
                names |= {f"{module_name}.{own}" for own in module.no_weight_decay()}
        return names

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names without weight decay."""
        return set()
