"""Functions of images [n, channels, …], each of the n by itself."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.slots.following.table import RULES, rule
from peftfn.slots.tags import Unfollowed, alone, joined
from peftfn.slots.track import Seen, Tags


@rule(
    "group_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d "
    "max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d interpolate upsample batch_norm instance_norm pixel_shuffle "
    "pixel_unshuffle fold"
)
def _images(seen: Seen, out: Any) -> Tags:
    """[n, channels, …], each of the n by itself."""
    x = seen.arg(0, "input")
    tag = alone(seen.must(x), range(1, x.dim()))
    if not isinstance(out, Tensor) or out.shape[0] != x.shape[0]:
        raise Unfollowed("its output has another first dimension")
    return tag.reshape(-1, *[1] * (out.dim() - 1))


RULES[F.unfold] = RULES[torch._C._nn.im2col] = _images  # Tensor.unfold is another function of that name


@rule("grid_sample grid_sampler grid_sampler_2d grid_sampler_3d")
def _sampled(seen: Seen, out: Any) -> Tags:
    """[n, channels, …] at the places of a grid [n, …, 2]: a place is of the row of its image, and of who asks."""
    x, grid = seen.arg(0, "input"), seen.arg(1, "grid")
    of_image, of_place = seen.rows(x), seen.rows(grid)
    tag = None if of_image is None else alone(of_image, range(1, x.dim()))
    if of_place is not None:
        places = alone(of_place, [grid.dim() - 1]).movedim(-1, 1)
        tag = places if tag is None else joined(tag, places)
        if tag is None:
            raise Unfollowed("its images and its places belong to different rows")
    return tag
