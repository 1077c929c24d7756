"""What models that read images have in common: how they are called, and what is asked of an image.

Shapes: B images of C channels, H × W pixels.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from .model import PretrainedModel


class ImageModel(PretrainedModel):
    """A model whose `hidden` takes images (B, C, H, W), and whose `pool` gives what the head reads of its states."""

    reads_images = True
    objectives: ClassVar = {"classify": "classify-images"}

    config: Any  # with `n_channels`
    pool: Callable[..., Tensor]  # of an image, which has neither ids, mask nor bounds

    def check_images(self, pixel_values: Tensor) -> None:
        """ValueError for what isn't images (B, C, H, W) of the model's channels."""
        n_channels = self.config.n_channels
        if pixel_values.dim() != 4 or pixel_values.shape[1] != n_channels:
            raise ValueError(f"expected images (B, {n_channels}, H, W), got {tuple(pixel_values.shape)}")

    # Called as transformers' models of images are, by another argument than those of texts.
    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        """image-classification gives (B, n_labels); embedding (B, D). Images are (B, C, H, W)."""
        return self.head(self.pool(self.hidden(pixel_values)))
