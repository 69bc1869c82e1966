"""Influence functions (arXiv 1703.04730): how much the loss of a test sample grows if training sample i is left out.

influence(i) = ∇loss_testᵀ H⁻¹ ∇loss_i / N, with H⁻¹ by conjugate gradients on Hessian-vector products.
"""

import torch
from digits import t, t_test, trained, turned, x, x_test
from optree.integrations.torch import tree_ravel
from scipy.sparse.linalg import LinearOperator, cg
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import peftfn as pf

model = trained(x, t).double()
net = pf.adapt(model, {"4": pf.Full()})  # the last layer: the loss is convex, so its minimum is one
inputs, targets, decay, number = turned(x[:200]).double(), t[:200], 0.05, 200
start, tree_of = tree_ravel(net.init(seed=0, dtype=torch.float64))


def loss(flat, x, t):
    return F.cross_entropy(net.apply(tree_of(flat), x), t)


def objective(flat, kept):
    each = F.cross_entropy(net.apply(tree_of(flat), inputs), targets, reduction="none")
    return (kept * each).sum() / number + decay / 2 * flat.square().sum()


def minimum(kept):
    flat = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([flat], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        value = objective(flat, kept)
        value.backward()
        return value

    optimizer.step(step)
    return flat.detach()


def product(v):
    return jvp(grad(lambda flat: objective(flat, everyone)), (best,), (torch.from_numpy(v),))[1].numpy()


everyone = torch.ones(number, dtype=torch.float64)
best = minimum(everyone)
test = turned(x_test[:1]).double(), t_test[:1]
each = vmap(grad(loss), (None, 0, 0))(best, inputs, targets)  # [N, numbers]
operator = LinearOperator((len(best), len(best)), matvec=product, dtype="f8")
solved, failed = cg(operator, grad(loss)(best, *test).numpy(), rtol=1e-8)
influence = each @ torch.from_numpy(solved) / number  # [N]

tried = influence.abs().argsort(descending=True)[:8].tolist()  # the truth, for a few: leave them out and train again
truth = torch.stack([loss(minimum(everyone.index_fill(0, torch.tensor([i]), 0)), *test) for i in tried])
likeness = torch.corrcoef(torch.stack([truth, influence[tried]]))[0, 1].item()
print(f"correlation with training again without each of {len(tried)} samples: {likeness:.4f}")
assert failed == 0 and likeness > 0.95
