"""peftfn.kernels: each op equals its plain-torch reference, forward, backward and twice backward, at odd sizes."""

import pytest
import torch
from torch import Tensor

from peftfn.kernels.lora_linear import lora_linear, reference
from peftfn.testing import close


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 13, 5, 3), (33, 17, 31, 16), (64, 8, 40, 9)])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_lora_linear_is_its_reference(shape: tuple[int, int, int, int], lead: tuple[int, ...]) -> None:
    m, k, n, r = shape
    g = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64).requires_grad_()

    x, w, a, b = leaf(*lead, m, k), leaf(n, k), leaf(r, k), leaf(n, r)
    v = torch.randn((*lead, m, n), generator=g, dtype=torch.float64)
    got, want = (f(x, w, a, b, 0.7) for f in (lora_linear, reference))
    close(got.detach(), want.detach(), "forward", 1e-12)
    inputs = [x, w, a, b]
    first = [torch.autograd.grad((y * v).sum(), inputs, create_graph=True) for y in (got, want)]
    for name, p, q in zip("xwab", *first, strict=True):
        close(p.detach(), q.detach(), f"d{name}", 1e-12)
    second = [torch.autograd.grad(sum((t * t).sum() for t in grads), inputs) for grads in first]  # type: ignore[arg-type]
    for name, p, q in zip("xwab", *second, strict=True):
        close(p, q, f"second derivative in {name}", 1e-12)


def test_lora_linear_keeps_no_full_size_tensor() -> None:
    """Backward needs x, the weights and S [m, r]; not the dense product of A and B, and no copy of x."""
    x, w, a, b = torch.randn(50, 40), torch.randn(30, 40), torch.randn(4, 40), torch.randn(30, 4)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, w, a.requires_grad_(), b.requires_grad_())
    own = [t for t in saved if all(t.data_ptr() != p.data_ptr() for p in (x, w, a, b))]
    assert [t.shape for t in own] == [(50, 4)]


def test_lora_linear_without_gradients_saves_nothing() -> None:
    x, w, a, b = torch.randn(5, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    with torch.no_grad():
        y = lora_linear(x, w, a.requires_grad_(), b, 2.0)
    assert y.grad_fn is None
    close(y, reference(x, w, a.detach(), b, 2.0), "no_grad", 1e-5)
