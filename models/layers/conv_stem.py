"""Image to tokens through a few convolutions instead of one."""

from torch import nn

from kernels.window_attention.layout import Size

from .patch_embed import PatchEmbed

WIDTHS = (32, 64, 128)


class ConvStem(PatchEmbed):
    """7 x 7 of stride 2, two 3 x 3 (each with a batch norm and a ReLU, without bias), then patches
    of half the side on what is left.

    patch_size: pixels of the image, even. Shapes: (B, in_chans, H, W) -> (B, L, embed_dim), as
        PatchEmbed.
    Raises: ValueError for an odd patch or image side.
    Source: the stem of github.com/zhoudaquan/Refiner_ViT; its widths are fixed.
    """

    def __init__(self, img_size: int | Size, patch_size: int | Size, in_chans: int, embed_dim: int):
        super().__init__(img_size, patch_size, in_chans, embed_dim, None)
        if any(side % 2 for side in (*self.img_size, *self.patch_size)):
            raise ValueError(
                f"stem conv halves the image: sides of image {self.img_size} and patch"
                f" {self.patch_size} must be even; change them, or take STEM linear"
            )
        first, second, last = WIDTHS
        half = (self.patch_size[0] // 2, self.patch_size[1] // 2)
        self.proj = nn.Sequential(
            *_unit(in_chans, first, 7, 2),
            *_unit(first, second, 3),
            *_unit(second, last, 3),
            nn.Conv2d(last, embed_dim, half, half),
        )

    def flops(self) -> int:
        """Multiply-accumulates of the convolutions for one image of `img_size`."""
        pixels = self.img_size[0] * self.img_size[1] // 4
        *stem, patches = (
            layer.weight.numel() for layer in self.proj if isinstance(layer, nn.Conv2d)
        )
        return pixels * sum(stem) + self.num_patches * patches


def _unit(dim: int, out_dim: int, kernel: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_dim),
        nn.ReLU(),
    )


def patch_embedding(
    stem: str, img_size: int | Size, patch_size: int | Size, in_chans: int, embed_dim: int
) -> PatchEmbed:
    """stem: "conv" or "linear", one convolution whose kernel is the patch."""
    return (
        ConvStem(img_size, patch_size, in_chans, embed_dim)
        if stem == "conv"
        else PatchEmbed(img_size, patch_size, in_chans, embed_dim, None)
    )
