"""How curved a loss is around an adapter, by curvlinops as it is: a Hessian that is only multiplied with.

curvlinops wants a module and its parameters. An adapter is the parameters of a module view, and nothing else is.
"""

import torch
from curvlinops import HessianLinearOperator
from digits import t, trained, turned, x
from optree.integrations.torch import tree_ravel
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import hessian

import peftfn as pf

model = trained(x, t).double()
net = pf.adapt(model, {"0|2": pf.IA3(), "4": pf.Full()})
a = net.init(seed=0, dtype=torch.float64)
inputs, targets, loss = turned(x[:200]).double(), t[:200], nn.CrossEntropyLoss()

m = pf.as_module(net, a)
parts = (inputs[:100], targets[:100]), (inputs[100:], targets[100:])  # a Hessian of all data is the mean of its parts'
operator = HessianLinearOperator(m, loss, [p for p in m.parameters() if p.requires_grad], parts)
found = eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)

flat, tree_of = tree_ravel(a)  # the same by torch.func, all 778 × 778 of it
exact = torch.linalg.eigvalsh(hessian(lambda v: loss(net.apply(tree_of(v), inputs), targets))(flat))
print(f"largest eigenvalues of the Hessian: {', '.join(f'{v:.4f}' for v in found)}")
print(f"a step of gradient descent is stable below {2 / found[-1]:.1f}")
assert torch.allclose(torch.from_numpy(found), exact[-3:])
