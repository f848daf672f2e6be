"""From pictures as they are stored to what a backbone takes."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn


class Normalizes(nn.Module):
    """Base of modules that take uint8 pictures.

    Args:
        mean, std: of each channel, of pixels in [0, 1].
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self._mean_and_std = (mean, std)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.empty(len(mean), 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(len(std), 1, 1), persistent=False)
        self.begin_buffers()

    def begin_buffers(self) -> None:
        """Set what no file of weights holds; again after the module was built on the meta device."""
        for buffer, values in zip((self.mean, self.std), self._mean_and_std, strict=True):
            buffer.copy_(torch.tensor(values).view(-1, 1, 1))

    def normalized(self, pixels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Zero mean and unit variance, in float32."""
        return (pixels.float() / 255 - self.mean.float()) / self.std.float()
