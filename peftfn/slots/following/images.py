"""Functions of images [n, channels, …], each of the n by itself."""

from typing import Any

from torch import Tensor

from peftfn.slots.following.table import rule
from peftfn.slots.tags import Unfollowed, alone
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
