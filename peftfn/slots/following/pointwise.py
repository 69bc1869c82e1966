"""Functions position by position: all operands belong to the same rows."""

from typing import Any

from torch import Tensor

from peftfn.slots.following.table import rule
from peftfn.slots.tags import Lost, Unfollowed, joined, lifted
from peftfn.slots.track import Seen, Tags


@rule(
    "add sub mul div truediv floordiv floor_divide mod remainder fmod pow neg abs exp exp2 expm1 log log2 log10 "
    "log1p sqrt rsqrt square reciprocal sigmoid tanh sin cos relu relu6 silu gelu elu selu celu leaky_relu "
    "softplus softsign mish hardtanh hardswish hardsigmoid logsigmoid tanhshrink clamp clamp_min clamp_max clip "
    "where lerp addcmul addcdiv maximum minimum eq ne lt le gt ge logical_and logical_or logical_not logical_xor "
    "bitwise_and bitwise_or bitwise_not and or xor invert isnan isinf isfinite nan_to_num round floor ceil trunc "
    "sign erf erfc to float double half bfloat16 long int bool short byte type type_as cpu cuda contiguous clone "
    "detach dropout alpha_dropout feature_alpha_dropout native_dropout masked_fill requires_grad rsub true_divide "
    "multiply subtract divide negative greater less greater_equal less_equal not_equal zero fill bernoulli "
    "exponential normal uniform dropout1d dropout2d xlogy atan2 logaddexp threshold prelu lshift rshift positive "
    "real",
    attributes="real",
    in_place=True,
)
def pointwise(seen: Seen, out: Any) -> Tags:
    """All operands belong to the same rows. One whose rows are lost says nothing where another covers the output."""
    if not isinstance(out, Tensor):
        return None  # where(condition): indices
    tag, covers, lost = None, False, None
    for v in (*seen.args, *seen.kwargs.values()):
        found = seen.tags.get(id(v))
        if isinstance(found, Lost):
            lost = found
        elif found is not None:
            found = found if found.dim() == out.dim() else lifted(found, out.dim())
            if tag is not found:
                tag = found if tag is None else joined(tag, found)
            if tag is None:
                raise Unfollowed("its operands belong to different rows")
            covers = covers or v.shape == out.shape
    return lost if lost is not None and not covers else tag


@rule("copy", in_place=True)
def _copied(seen: Seen, out: Any) -> Tags:
    source = seen.arg(1, "src") if seen.name == "copy_" else seen.arg(0, "input")
    tag = seen.rows(source)
    return None if tag is None else lifted(tag, out.dim())
