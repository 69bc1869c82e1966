"""What each function of torch does to the rows of its inputs: one rule a function, in a table.

A rule is a pure function: (a call, what it gave) ↦ the tag of that. A tag says whose position it is, not what flowed
in: attention's output belongs to its query, a @ b to a's row. Functions that only move positions need no arithmetic:
the same function of the tag, expanded in the dimensions that the function looks at, is the tag. What has no rule loses
the rows, so a rule that is left out is an error somewhere, never a wrong value.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.slots.tags import Lost, Unfollowed, alike, constant, full, joined, lifted, reshaped, small
from peftfn.slots.track import Followed, Rule, Seen, Tags, Tracking
from peftfn.tensors.arguments import batched

RULES: dict[Any, Rule] = {}
_SPACES = (torch, Tensor, torch._C.TensorBase, F, torch._C._nn, torch.special, torch.linalg)


def _forms(names: str, in_place: bool) -> Iterator[Any]:
    """The functions of these names: of torch and of tensors, as operators, and those that write to their input."""
    for n in names.split():
        forms = [n, f"__{n}__", f"__r{n}__", *([f"{n}_", f"__i{n}__"] if in_place else [])]
        for space in _SPACES:
            for form in forms:
                f = getattr(space, form, None)
                if callable(f) and not isinstance(f, type):
                    yield f


def rule(names: str, *, attributes: str = "", in_place: bool = False) -> Callable[[Rule], Rule]:
    def register(r: Rule) -> Rule:
        for f in _forms(names, in_place):
            RULES.setdefault(f, r)
        for n in attributes.split():
            RULES[getattr(Tensor, n).__get__] = r
        return r

    return register


_READ = "shape dtype device ndim requires_grad is_cuda layout grad_fn is_leaf is_sparse is_quantized is_meta is_nested "
_READ += "grad _version _base itemsize nbytes"
_NO_ROWS = """
size dim numel stride is_floating_point is_contiguous tolist item __len__ __bool__ __int__ __index__ __hash__ __repr__
__format__ data_ptr storage_offset get_device element_size is_complex __float__ is_inference __contains__ nonzero histc
bincount zeros_like ones_like empty_like full_like rand_like randn_like equal allclose new_zeros new_empty new_ones
new_full new_tensor unique unique_consecutive _assert_async _assert is_tensor argwhere
"""
SILENT = frozenset([getattr(Tensor, n).__get__ for n in _READ.split()]) | frozenset(_forms(_NO_ROWS, False))
"""What tells of a tensor, or makes one whose positions are nobody's: that of `empty_like` is yet to be filled."""
LEAKS = frozenset(
    [Tensor.data.__get__, Tensor.untyped_storage, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__]  # type: ignore[attr-defined]
)
"""What hands out the memory of a tensor, to be written to unseen."""


def tracking(call: Followed) -> Tracking:
    return Tracking(call, RULES, SILENT, LEAKS)


# Position by position.


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
def _pointwise(seen: Seen, out: Any) -> Tags:
    """All operands belong to the same rows. One whose rows are lost says nothing where another covers the output."""
    if not isinstance(out, Tensor):
        return None  # where(condition): indices
    tag, covers, lost = None, False, None
    for v in (*seen.args, *seen.kwargs.values()):
        found = seen.tags.get(id(v))
        if isinstance(found, Lost):
            lost = found
        elif found is not None:
            found = lifted(found, out.dim())
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


@rule("layer_norm rms_norm")
def _normed(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    return _alone(seen.must(x), range(x.dim() - len(seen.arg(1, "normalized_shape")), x.dim()))


def _alone(tag: Tensor, dims: Any) -> Tensor:
    """The tag, of one row along `dims`, over which the function joins values."""
    tag_or_none = constant(tag, dims)
    if tag_or_none is None:
        raise Unfollowed("it joins positions of different rows")
    return tag_or_none


@rule(
    "group_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d "
    "max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d interpolate upsample batch_norm instance_norm pixel_shuffle "
    "pixel_unshuffle fold"
)
def _images(seen: Seen, out: Any) -> Tags:
    """[n, channels, …], each of the n by itself."""
    x = seen.arg(0, "input")
    tag = _alone(seen.must(x), range(1, x.dim()))
    if not isinstance(out, Tensor) or out.shape[0] != x.shape[0]:
        raise Unfollowed("its output has another first dimension")
    return tag.reshape(-1, *[1] * (out.dim() - 1))


# Along a dimension.

_DIM = dict.fromkeys(
    [
        "sum",
        "mean",
        "prod",
        "amax",
        "amin",
        "max",
        "min",
        "argmax",
        "argmin",
        "std",
        "var",
        "any",
        "all",
        "logsumexp",
        "cumsum",
        "cumprod",
        "softmax",
        "log_softmax",
        "sort",
        "argsort",
        "count_nonzero",
        "median",
        "var_mean",
        "std_mean",
        "nanmean",
        "nansum",
        "softmin",
        "glu",
        "logcumsumexp",
        "cummax",
        "cummin",
    ],
    1,
) | dict.fromkeys(["norm", "vector_norm", "topk", "kthvalue", "normalize"], 2)
"""Function → where `dim` stands among its arguments."""
_USUAL = {"topk": -1, "sort": -1, "argsort": -1, "kthvalue": -1, "normalize": 1, "glu": -1}


@rule(" ".join(_DIM))
def _along(seen: Seen, out: Any) -> Tags:
    name = seen.name.removeprefix("linalg_")
    x, at = seen.arg(0, "input"), _DIM[name]
    if name in ("max", "min") and isinstance(seen.arg(1, "other"), Tensor):
        return _pointwise(seen, out)
    dim = seen.kwargs.get("dim", seen.kwargs.get("axis", seen.args[at] if len(seen.args) > at else _USUAL.get(name)))
    if isinstance(dim, bool | torch.dtype):
        dim = None
    dims = [d % x.dim() for d in (range(x.dim()) if dim is None else dim if isinstance(dim, list | tuple) else [dim])]
    tag = small(seen.must(x))
    if name in ("topk", "sort") and tag.shape[dims[0]] != 1:
        return _sorted(x, tag, dims[0], out[1])
    tag = _alone(tag, dims)
    first = out[0] if isinstance(out, tuple) else out
    if first.dim() == x.dim():
        return tag
    if first.dim() != x.dim() - len(dims):
        raise Unfollowed("its output has another number of dimensions")
    return tag.squeeze(dims)


def _sorted(x: Tensor, tag: Tensor, dim: int, index: Tensor) -> Tensor:
    """Positions that were moved by their values."""
    if any(n != 1 for n in tag.shape[dim + 1 :]):
        raise Unfollowed("it sorts positions of different rows")
    if any(n != 1 for n in x.shape[dim + 1 :]):
        raise Unfollowed("it sorts each feature by itself")
    return full(tag, x.shape, dim + 1).gather(dim, index)


# Products: what the left operand's position is.


@rule("linear")
def _linear(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    if id(seen.arg(1, "weight")) in seen.tags:
        raise Unfollowed("its weight has rows")
    return _alone(seen.must(x), [x.dim() - 1])


@rule("matmul mm bmm mv addmm baddbmm grouped_mm _grouped_mm", in_place=True)
def _product(seen: Seen, out: Any) -> Tags:
    start = 1 if seen.name.strip("_") in ("addmm", "baddbmm") else 0
    a, b = seen.args[start : start + 2] if len(seen.args) > start + 1 else (None, None)
    if seen.name == "__rmatmul__":
        a, b = b, a
    if not isinstance(out, Tensor) or a is None:
        raise Unfollowed("its operands are named")
    ta = seen.rows(a)
    tb = seen.rows(b) if ta is None else seen.maybe(b)
    if start and id(seen.args[0]) in seen.tags and ta is None:
        raise Unfollowed("what it adds to has rows")
    if not isinstance(b, Tensor) or a.dim() < 2 or b.dim() < 2 or "grouped" in seen.name:
        if ta is None or tb is not None or out.dim() != a.dim():
            raise Unfollowed("its right operand has rows, or is a vector")
        return _alone(ta, [a.dim() - 1])
    left = None if ta is None else lifted(_alone(ta, [a.dim() - 1]), out.dim())
    right = None if tb is None else constant(tb, [b.dim() - 2])
    if left is None:
        if right is None:
            raise Unfollowed("it sums over positions of different rows")
        return lifted(right, out.dim())
    if tb is not None:
        _meets(left, None if right is None else lifted(right, out.dim()), out.dim())
    return left


def _meets(left: Tensor, right: Tensor | None, dims: int) -> None:
    """Where the positions of the left operand are all of one row, so are those that they are multiplied with."""
    mine = constant(left, [dims - 2])
    theirs = None if right is None else constant(right, [dims - 1])
    if mine is not None and theirs is not None and joined(mine, theirs) is None:
        raise Unfollowed("its operands belong to different rows")


@rule("scaled_dot_product_attention")
def _attention(seen: Seen, out: Any) -> Tags:
    q, k, v = (seen.arg(i, n) for i, n in enumerate(("query", "key", "value")))
    tag = seen.rows(q)
    if tag is None:  # queries that are nobody's, such as learned ones, are of the row of their keys
        return _alone(seen.must(k), [k.dim() - 2, k.dim() - 1])
    tag = _alone(tag, [q.dim() - 1])
    mine = constant(tag, [q.dim() - 2])
    for other in (k, v):
        theirs = seen.maybe(other)
        theirs = None if theirs is None else constant(theirs, [other.dim() - 2, other.dim() - 1])
        if mine is not None and theirs is not None and joined(mine, theirs) is None:
            raise Unfollowed("queries and keys belong to different rows")
    return tag


@rule("multi_head_attention_forward")
def _heads(seen: Seen, out: Any) -> Tags:
    """[tokens, rows, d], and the scores [rows, …]."""
    q, k = seen.args[:2]
    tag = _alone(seen.must(q if seen.rows(q) is not None else k), (0, 2))
    scores = out[1]
    return [tag, None if scores is None else tag.view(-1, *[1] * (scores.dim() - 1))]


@rule("embedding")
def _embedded(seen: Seen, out: Any) -> Tags:
    first = seen.arg(0, "input")
    ids = first if isinstance(first, Tensor) and not first.is_floating_point() else seen.arg(1, "weight")
    return seen.must(ids).unsqueeze(-1)


@rule("one_hot")
def _one_hot(seen: Seen, out: Any) -> Tags:
    return seen.must(seen.arg(0, "tensor")).unsqueeze(-1)


@rule("einsum")
def _einsum(seen: Seen, out: Any) -> Tags:
    equation, *operands = seen.args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if "." in equation or "->" not in equation:
        raise Unfollowed("its equation has an ellipsis, or no arrow")
    left, right = equation.replace(" ", "").split("->")
    result = None
    for letters, x in zip(left.split(","), operands, strict=True):
        tag = seen.rows(x)
        if tag is None:
            continue
        if len(set(letters)) < len(letters):
            raise Unfollowed("its equation has a letter twice")
        gone = [d for d, c in enumerate(letters) if c not in right]
        kept = [c for c in letters if c in right]
        tag = _alone(tag, gone).squeeze(gone).permute([kept.index(c) for c in right if c in kept])
        for d, c in enumerate(right):
            if c not in kept:
                tag = tag.unsqueeze(d)
        if result is not None and not alike(result, tag):
            raise Unfollowed("its operands belong to different rows")
        result = tag
    return result


# Movements.


@rule("view reshape flatten unflatten view_as reshape_as")
def _reshape(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    tag = seen.must(x)
    if out.numel() != x.numel():
        raise Unfollowed("it changes the dtype")
    key, made = (id(tag), x.shape, out.shape), seen.tracking.made
    if key not in made:
        made[key] = tag, reshaped(tag, x.shape, out.shape)
    return made[key][1]  # type: ignore[no-any-return]


@rule(
    "permute transpose swapaxes swapdims movedim moveaxis t unsqueeze flip roll adjoint rot90 fliplr flipud",
    attributes="T mT H mH",
)
def _moved(seen: Seen, out: Any) -> Tags:
    """What treats a dimension of size 1 as one of any other size."""
    tag = seen.must(seen.arg(0, "input"))
    if seen.name in ("roll", "rot90") and seen.arg(2, "dims", None) is None:
        raise Unfollowed("it names no dimension")
    moved: Tensor = seen.f(tag, *seen.args[1:], **_without_input(seen))
    return moved


def _without_input(seen: Seen) -> dict[str, Any]:
    return {k: v for k, v in seen.kwargs.items() if k != "input"}


@rule("squeeze")
def _squeeze(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    dim = seen.arg(1, "dim")
    dims = range(x.dim()) if dim is None else dim if isinstance(dim, list | tuple) else [dim]
    return seen.must(x).squeeze([d for d in dims if x.shape[d] == 1])


@rule("expand expand_as broadcast_to")
def _expand(seen: Seen, out: Any) -> Tags:
    return lifted(seen.must(seen.arg(0, "input")), out.dim())


@rule("repeat tile")
def _repeat(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    tag = lifted(seen.must(x), out.dim())
    shape = (1,) * (out.dim() - x.dim()) + tuple(x.shape)
    times = [n // s if s else 1 for n, s in zip(out.shape, shape, strict=True)]
    return tag.repeat([n if tag.shape[d] > 1 else 1 for d, n in enumerate(times)])


@rule(
    "select narrow index_select split split_with_sizes chunk tensor_split unbind unfold repeat_interleave diagonal "
    "hsplit vsplit dsplit narrow_copy masked_select"
)
def _taken(seen: Seen, out: Any) -> Tags:
    """The same function of the tag, expanded in the dimensions that the function looks at."""
    x = seen.arg(0, "input")
    tag, last, rest = seen.rows(x), x.dim(), _without_input(seen)
    if tag is None:
        return None  # only its indices have rows
    if seen.name in ("index_select", "narrow", "select", "repeat_interleave", "unfold"):
        dim = seen.arg(2 if seen.name == "repeat_interleave" else 1, "dim" if seen.name != "unfold" else "dimension")
        last = x.dim() if dim is None else dim % x.dim() + 1
        rest.pop("output_size", None)
    elif seen.name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        dim = seen.arg(2, "dim", 0)
        if tag.shape[dim] == 1:
            return [tag] * len(out)
    new = seen.f(full(small(tag), x.shape, last), *seen.args[1:], **rest)
    return small(new) if isinstance(out, Tensor) else [small(n) for n in new]


@rule("gather take_along_dim")
def _gathered(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    tag, at = seen.rows(x), ("dim", 1) if seen.name == "gather" else ("dim", 2)
    if tag is None:
        return None
    dim = seen.arg(at[1], at[0])
    tag = small(tag)
    same = zip(tag.shape, x.shape, out.shape, strict=True) if out.dim() == x.dim() else []
    if dim is not None and tag.shape[dim] == 1 and same and all(n == 1 or n == m == o for n, m, o in same):
        return tag
    found: Tensor = seen.f(tag.expand(x.shape), *seen.args[1:], **_without_input(seen))
    return found


def looked_at(x: Tensor, index: Any) -> int:
    """How many leading dimensions of x an index looks at."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        return x.dim()
    masks = (torch.bool, torch.uint8)
    return sum(0 if i is None else i.dim() if isinstance(i, Tensor) and i.dtype in masks else 1 for i in index)


@rule("getitem")
def _getitem(seen: Seen, out: Any) -> Tags:
    x, index = seen.args
    tag, made = seen.rows(x), seen.tracking.made
    if tag is None:
        return None  # only its index has rows
    one = isinstance(index, Tensor) and not index.is_inference()
    key = ("item", id(tag), id(index), x.shape, index._version) if one else None
    if key is None or key not in made:
        found = small(full(small(tag), x.shape, looked_at(x, index))[index])
        if key is None:
            return found
        made[key] = tag, index, found
    return made[key][2]  # type: ignore[no-any-return]


@rule("cat concat concatenate stack")
def _cat(seen: Seen, out: Any) -> Tags:
    pieces, stacks = seen.arg(0, "tensors"), seen.name == "stack"
    dim = seen.arg(1, "dim", 0) % out.dim()
    known = [(p, tag) for p in pieces if (tag := seen.rows(p)) is not None]
    if not known:
        raise Unfollowed("none of its pieces has rows")
    tags = [tag.unsqueeze(dim) if stacks else tag for _, tag in known]
    thin = [constant(tag, [dim]) for tag in tags]
    first = thin[0]
    if any(t is not None and t.numel() > 1 for t in thin) and all(t is not None for t in thin):
        for t in thin[1:]:  # side by side, and yet of different rows: a model that takes one row's for another's
            if first is not None and t is not None and joined(first, t) is None:
                raise Unfollowed("it puts positions of different rows side by side")
    aligned = len(known) == len(pieces) or (first is not None and small(first).numel() > 1) or out.shape[0] == 1
    if aligned and first is not None and all(t is not None and alike(first, t) for t in thin[1:]):
        return first
    if len(known) < len(pieces):
        raise Unfollowed("some of its pieces have no rows")
    parts = [
        small(tag.expand((p.unsqueeze(dim) if stacks else p).shape)) for tag, (p, _) in zip(tags, known, strict=True)
    ]
    varies = [any(tag.shape[d] > 1 for tag in parts) for d in range(out.dim())]
    sizes = [[out.shape[d] if varies[d] else 1 for d in range(out.dim())] for _ in parts]
    for size, (p, _) in zip(sizes, known, strict=True):
        size[dim] = 1 if stacks else p.shape[dim]
    return torch.cat([tag.expand(size) for tag, size in zip(parts, sizes, strict=True)], dim)


@rule("pad")
def _pad(seen: Seen, out: Any) -> Tags:
    x, widths = seen.arg(0, "input"), seen.arg(1, "pad")
    tag, n = small(seen.must(x)), len(widths) // 2
    if all(tag.shape[x.dim() - 1 - i] == 1 for i in range(n) if widths[2 * i] or widths[2 * i + 1]):
        return tag
    if seen.arg(2, "mode", "constant") != "constant":
        raise Unfollowed("it pads with positions of several rows")
    first = x.dim() - n
    return F.pad(tag.expand(*tag.shape[:first], *x.shape[first:]), widths, value=-1)


# Writes: the positions written to belong to the rows of what is written.


def _blank(x: Tensor, before: Tensor | None, upto: int, like: Tensor) -> Tensor:
    """A tag of x to write into, as it was before."""
    if before is not None:
        return full(before, x.shape, upto).clone()
    return torch.full((*x.shape[:upto], *[1] * (x.dim() - upto)), -1, device=like.device)


@rule("setitem")
def _setitem(seen: Seen, out: Any) -> Tags:
    x, index, value = seen.args
    before, tag = seen.rows(x), seen.rows(value)
    if tag is None:
        return before
    n = looked_at(x, index)
    if before is not None and any(s > 1 for s in before.shape[n:]):
        raise Unfollowed("it writes across positions of different rows")
    target = torch.empty((*x.shape[:n], *[1] * (x.dim() - n)), device=tag.device)[index]
    tag = _alone(lifted(tag, target.dim()), range(target.dim() - (x.dim() - n), target.dim()))
    new = _blank(x, before, n, tag)
    if batched(tag) or any(
        batched(i) for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, Tensor)
    ):
        raise Unfollowed("a vmap is over where it writes")
    new[index] = tag
    if bool((new[index] != tag).any()):
        raise Unfollowed("positions of different rows are written to one place")
    return new


@rule("index_add index_copy", in_place=True)
def _index_add(seen: Seen, out: Any) -> Tags:
    x, dim, index, source = (seen.arg(i, n) for i, n in enumerate(("input", "dim", "index", "source")))
    before, tag = seen.rows(x), seen.rows(source)
    if tag is None:
        return before
    dim %= x.dim()
    tag = full(small(tag), source.shape, dim + 1)
    if any(n > 1 for n in tag.shape[dim + 1 :]):
        raise Unfollowed("positions of different rows in later dimensions")
    if batched(tag) or batched(index):
        raise Unfollowed("a vmap is over where it writes")
    new = _blank(x, before, dim + 1, tag)
    return _checked(new.index_copy(dim, index, tag), new, lambda t: t.index_select(dim, index), tag)


def _checked(new: Tensor, old: Tensor, read: Callable[[Tensor], Tensor], tag: Tensor) -> Tensor:
    """The new tag, if what was written is there, and nothing of another row was there before."""
    same = read(new) == tag
    if not bool(same.all()) or not bool(((old == new) | (old < 0)).all()):
        raise Unfollowed("positions of different rows are written to one place")
    return new


@rule("scatter scatter_add scatter_reduce", in_place=True)
def _scatter(seen: Seen, out: Any) -> Tags:
    x, dim, index = (seen.arg(i, n) for i, n in enumerate(("input", "dim", "index")))
    src = seen.arg(3, "src", seen.kwargs.get("value"))
    before, tag, dim = seen.rows(x), seen.rows(src), dim % x.dim()
    if tag is None:
        rows = seen.rows(index)
        if before is not None or rows is None:
            return before
        mine = constant(rows, [dim])  # constants where indices say that have rows: a mask of chosen experts
        fits = all(a == b for d, (a, b) in enumerate(zip(index.shape, x.shape, strict=True)) if d != dim)
        return mine if fits else Lost("scatter writes to some of its positions")
    if batched(tag) or batched(index):
        raise Unfollowed("a vmap is over where it writes")
    tag = tag.expand(src.shape)[tuple(slice(0, n) for n in index.shape)]
    new = _blank(x, before, x.dim(), tag)
    new = _checked(new.scatter(dim, index, tag), new, lambda t: t.gather(dim, index), tag)
    return new if (one := constant(new, [x.dim() - 1])) is None else one


@rule("masked_scatter", in_place=True)
def _masked_scatter(seen: Seen, out: Any) -> Tags:
    """Values that are put into places of x, which are x's rows' places: features of images among those of tokens."""
    return seen.must(seen.arg(0, "input"))
