"""What an optimizer is as pure functions, and the tree of pairs (A, B) that rules for LoRA walk over."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfn.core.numbers import at_least_zero
from peftfn.core.plan import Entry
from peftfn.methods.parts.lowrank import Ranked
from peftfn.net.net import Adapted

Tree = dict[str, Any]


class Step(NamedTuple):
    """An optimizer, or a part of one, as two pure functions of trees.

    init: adapter ↦ state. update: (gradients, state, adapter) ↦ (updates, state); `apply` adds the updates. Both run
    under `vmap`, over adapters and over whatever number the rule was made with.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        a, x = net.init(), torch.randn(3, 8)
        step = pf.steps.adamw(1e-2)
        state = step.init(a)
        g = torch.func.grad(lambda a: net.apply(a, x).square().sum())(a)
        updates, state = step.update(g, state, a)
    """

    init: Callable[[Mapping[str, Any]], Tree]
    update: Callable[[Mapping[str, Any], Tree, Mapping[str, Any]], tuple[Tree, Tree]]


def pairs(where: str, net: Adapted) -> dict[str, float]:
    """site → s, of the sites whose leaf is a B [out, r] and an A [r, in] of a change s·B A. ValueError for none."""
    found = {name: entry.method.scale for name, entry in net.plan.items() if _is_pair(entry)}  # type: ignore[attr-defined]
    if not found:
        raise ValueError(f"{where}: the net has no LoRA, so there is no A and B to treat as a pair")
    return found


def _is_pair(entry: Entry) -> bool:
    return isinstance(entry.method, Ranked) and {"a", "b"} <= entry.spec.keys()


def each(tree: Mapping[str, Any], f: Callable[..., Any], *others: Mapping[str, Any], at: str = "") -> Tree:
    """f of the tensors at each place of trees of one structure. KeyError for a place that one of them lacks."""
    out: Tree = {}
    for k, t in tree.items():
        rest = [part(o, k, at) for o in others]
        out[k] = each(t, f, *rest, at=f"{at}{k}: ") if isinstance(t, Mapping) else f(t, *rest)
    return out


def part(tree: Mapping[str, Any], k: str, at: str = "") -> Any:
    """What a tree has under a name. KeyError that says whose it must be, TypeError for what is no tree."""
    if not isinstance(tree, Mapping):
        what = f"a {type(tree).__name__}" + (": `update` returns (updates, state)" if isinstance(tree, tuple) else "")
        raise TypeError(f"{at}a tree of a step is a dict, like the adapter, not {what}")
    if k not in tree:
        raise KeyError(
            f"{at}{k} is missing in a tree of a step, which has {', '.join(map(repr, list(tree)[:4])) or 'nothing'}: "
            "give gradients and a state of the same adapter, one of the net that the step was made with"
        )
    return tree[k]


def leaf_in(tree: Mapping[str, Any], site: str) -> Mapping[str, Any]:
    """The A and B at a site of gradients or of an adapter. KeyError if there are none."""
    leaf: Mapping[str, Any] = part(tree, site)
    for k in "ab":
        part(leaf, k, f"{site}: ")
    return leaf


def checked(where: str, betas: tuple[float, ...] = (), **values: float | Tensor) -> None:
    """ValueError for a rate or the like that is no finite number of at least 0, or for a decay outside [0, 1);
    TypeError for what is no number."""
    for name, value in values.items():
        number(where, name, value)
        if not isinstance(value, Tensor):
            at_least_zero(where, **{name: value})
    name, decay = "beta" if len(betas) == 1 else "betas", f"{where}: the moments' decay is {betas}"
    if not all(isinstance(b, Real) for b in betas):
        raise TypeError(f"{decay}; give numbers as {name}")
    if not all(0 <= b < 1 for b in betas):
        raise ValueError(f"{decay}; give numbers in [0, 1) as {name}")


def number(where: str, name: str, value: Any) -> None:
    """TypeError unless it is a number or a tensor."""
    if not isinstance(value, Real | Tensor):
        has = f"{where}: {name} is {value!r}; give a number or a tensor"
        if callable(value):
            has = f"{where}: {name} is a function; give a number; a schedule follows: chain({where}(…), scheduled(f))"
        raise TypeError(has)


def wide(*ts: Tensor) -> tuple[Tensor, ...]:
    """Tensors in fp32 or wider."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in ts)


def damped(gram: Tensor, damping: float) -> Tensor:
    """(G + damping·I)⁺ of a symmetric [..., r, r]."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.pinv(gram + damping * eye, hermitian=True)


class Eigen(NamedTuple):
    """The eigenvalues and vectors of a symmetric matrix that has no negative ones."""

    values: Tensor
    vectors: Tensor

    @staticmethod
    def of(gram: Tensor) -> "Eigen":
        values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
        return Eigen(values.clamp(min=0), vectors)

    def power(self, p: float) -> Tensor:
        """The matrix to a negative power, with 0 for eigenvalues that are 0 up to rounding."""
        eps = torch.finfo(self.values.dtype).eps * self.values.shape[-1]
        some = self.values > eps * self.values[..., -1:]
        powers = torch.where(some, torch.where(some, self.values, 1.0) ** p, 0.0)
        return (self.vectors * powers[..., None, :]) @ self.vectors.mT


def sign(x: Tensor) -> Tensor:
    """U Vᵀ of x = U S Vᵀ, a matrix of at most as many columns as rows; 0 where S is 0."""
    return x @ Eigen.of(x.mT @ x).power(-0.5)
