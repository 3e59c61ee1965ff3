"""Small models whose every parameter matters, for the tests of checkpoints."""

import torch

SMALL = {"num_classes": 7, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, so that a wrong order, sign or missing term shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(
                noise * scale
                + ("norm" in name and name.endswith("weight"))
                + 2.0 * name.endswith("logit_scale")
            )
    return model.eval()
