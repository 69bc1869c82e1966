"""Every use a forward pass makes of a parameter sees the adapted weight, as in the merged model."""

import copy
import operator
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import Functions, by_name, noise, tokens
from support import Net, call, close, random, same_state, state, trees_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves, tree_map

import peftfn as pf
from peftfn import IA3, OFT, DoRA, Full, LoHa, LoRA, VeRA


class Round(torch.autograd.Function):
    """Straight-through: rounding, with the identity as its gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return (w * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


def set_rows(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(9, 8)
    y[1:] = m.f.weight
    y[0] = m.f.bias
    return x @ y.T


def fill(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(3, 8).copy_(m.f.bias.expand(3, 8))
    y += m.f.weight[:3]
    return x[:3] * y


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bilinear": lambda m, x: F.bilinear(x, x, m.f.weight[None]),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.f.weight),
    "weight * x": lambda m, x: (m.f.weight * x[:, None]).sum(-1),
    "x * weight": lambda m, x: (x[:, None] * m.f.weight).sum(-1),
    "weight.T": lambda m, x: x @ m.f.weight.T,
    "weight.t()": lambda m, x: torch.mm(x, m.f.weight.t()),
    "weight @": lambda m, x: (m.f.weight @ x.T).T,
    "x @ weight": lambda m, x: x @ m.f.weight,
    "torch.matmul": lambda m, x: torch.matmul(m.f.weight, x[0]),
    "Tensor.matmul": lambda m, x: x.matmul(m.f.weight),
    "addmm": lambda m, x: torch.addmm(m.f.bias, x, m.f.weight, beta=0.5, alpha=2),
    "bmm": lambda m, x: torch.bmm(x[None], m.f.weight[None]),
    "weight[...]": lambda m, x: x * m.f.weight[2] + m.f.weight[:, 1] + m.f.weight[x[:, 0].argmax()],
    "weight[tensor]": lambda m, x: m.f.weight[torch.tensor([0, 2, 1])] + x[:3],
    "rows in a for": lambda m, x: torch.stack([x @ row for row in m.f.weight]),
    "unpacked": lambda m, x: x * [*m.f.weight][-1],
    "normalize": lambda m, x: F.linear(x, F.normalize(m.f.weight, dim=1)),
    "norm": lambda m, x: x * m.f.weight.norm() + torch.linalg.vector_norm(m.f.weight),
    "cosine": lambda m, x: F.cosine_similarity(x[:, None], m.f.weight, dim=-1),
    "cat": lambda m, x: F.linear(x, torch.cat([m.f.weight, m.g.weight], dim=0)),
    "stack and chunk": lambda m, x: F.linear(x, torch.stack([m.f.weight, m.g.weight]).flatten(0, 1).chunk(2)[0]),
    "to": lambda m, x: F.linear(x.double(), m.f.weight.double(), m.f.bias.to(torch.float64)),
    "negated": lambda m, x: -m.f.bias - x / (1 + m.f.bias**2) + abs(m.f.bias) % 3 + 2**m.f.bias,
    "compared": lambda m, x: torch.where(m.f.bias > 0, m.f(x), 2 * x) + (m.f.weight <= 0)[:3],
    "in place": fill,
    "set": set_rows,
    "aten": lambda m, x: torch.ops.aten.mm.default(x, m.f.weight),
    "vmap": lambda m, x: vmap(torch.dot, (0, None))(m.f.weight, x[0]),
    "grad": lambda m, x: grad(lambda w: F.linear(x, w).square().sum())(m.f.weight),
    "straight-through": lambda m, x: F.linear(x, Round.apply(m.f.weight)),
    "as_tensor": lambda m, x: F.linear(x, torch.as_tensor(m.f.weight)),
    "returned": lambda m, x: m.f.weight,
    "a bias elsewhere": lambda m, x: F.linear(x, m.g.weight, m.f.bias) + F.layer_norm(x, (8,), m.f.bias),
    "conv of a linear": lambda m, x: F.conv1d(x[:, :, None], m.f.weight[..., None], m.f.bias)[..., 0],
    "linear as embedding": lambda m, x: F.embedding((x[:, 0] > 0).long(), m.f.weight),
    "embedding bag": lambda m, x: F.embedding_bag((x[:, :2] > 0).long(), m.f.weight),
    "attention": lambda m, x: F.scaled_dot_product_attention(x[None], m.f.weight[None], m.f.weight[None]),
    "functional mha": lambda m, x: F.multi_head_attention_forward(
        *[x[:, None]] * 3, 8, 2, torch.cat([m.f.weight] * 3), *[None] * 3, False, 0.0, m.f.weight, m.f.bias
    )[0],
    "module": lambda m, x: torch.func.functional_call(m.g, {"weight": m.f.weight}, (x,)),
    "scalar": lambda m, x: x * float(m.f.weight.detach()[0, 0]) + m.f.bias.detach()[0].item() + m.f.bias.sum(),
    "linear": lambda m, x: m.f(x[0]) + m.f(x[:, None])[:, 0],
    "no rows": lambda m, x: torch.cat([m.f(x[:0]), m.f(x)]),
}


# What only a tensor can do: torch refuses these of an adapted matrix, or we do, and never give another result.
REFUSED = {
    "vmap": "non-Tensor",
    "grad": "must be Tensor",
    "straight-through": r"f\.weight: passed to a torch.autograd.Function",
    "as_tensor": "converted to Python scalars",
    "module": "not an instance of torch.Tensor",
}


@pytest.mark.parametrize("method", [LoRA(2), DoRA(2), Full()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("use", USES)
def test_every_function_sees_the_adapted_weight(use: str, method: pf.Method) -> None:
    model = Net(USES[use])
    net = pf.adapt(model, {r"f\.bias": Full(), r"f\.weight": method})
    a, x = random(net), noise(3, 8)
    if use in REFUSED:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=REFUSED[use]):
            net.apply(a, x)
        close(call(model, net.merge(a), (x,), {}), call(model, net.merge(a), (x,), {}))  # the cure: merged parameters
        return
    got = net.apply(a, x)
    assert type(got) is Tensor
    close(got, call(model, net.merge(a), (x,), {}))
    leaf = tree_map(lambda t: t.clone().requires_grad_(), a)
    again = copy.deepcopy(leaf)
    net.apply(leaf, x).square().sum().backward()
    if isinstance(method, DoRA):
        again = {n: {k: t.detach().requires_grad_(k != "m") for k, t in p.items()} for n, p in again.items()}
        return
    call(model, net.merge(again), (x,), {}).square().sum().backward()
    for got, want in zip(tree_leaves(leaf), tree_leaves(again), strict=True):
        close(*(torch.zeros_like(t) if t.grad is None else t.grad for t in (got, want)))


def weight_norm(m: nn.Module) -> None:
    parametrizations.weight_norm(m.f)


def spectral_norm(m: nn.Module) -> None:
    parametrizations.spectral_norm(m.f, n_power_iterations=2)


def orthogonal(m: nn.Module) -> None:
    parametrizations.orthogonal(m.f, use_trivialization=False)


def old_spectral_norm(m: nn.Module) -> None:
    torch.nn.utils.spectral_norm(m.f)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(spectral|weight)_norm. is deprecated")
@pytest.mark.parametrize("dress", [weight_norm, spectral_norm, orthogonal, old_spectral_norm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("train", [True, False])
def test_a_parametrized_base(dress: Callable[[nn.Module], None], train: bool) -> None:
    model = Net(lambda m, x: m.f(x))
    dress(model)
    model.train(train)
    net = pf.adapt(model, {r"f\..*(original|orig)": Full()})
    a, x, before = random(net), noise(3, 8), state(model)
    got = net.apply(a, x)
    assert torch.equal(net.apply(a, x), got)
    assert same_state(before, state(model))
    close(got, call(copy.deepcopy(model), net.merge(a), (x,), {}))
    assert (got - copy.deepcopy(model)(x)).abs().max() > 1e-3
    close(net.apply(net.init(), x), copy.deepcopy(model)(x))


@pytest.mark.parametrize(
    "options", [{"padding_idx": 1}, {"max_norm": 0.5}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str
)
@pytest.mark.parametrize("method", [LoRA(2), Full(), IA3()], ids=lambda m: type(m).__name__)
def test_embeddings_with_options(options: dict[str, Any], method: pf.Method) -> None:
    model = nn.Sequential(nn.Embedding(6, 8, **options))
    net = pf.adapt(model, {"0": method})
    a, ids, before = random(net, scale=0.5), torch.tensor([[1, 2, 2], [0, 1, 5]]), state(model)
    leaf = tree_map(lambda t: t.requires_grad_(), a)
    got = net.apply(leaf, ids)
    merged = {n: t.clone() for n, t in net.merge(a).items()}
    close(got, F.embedding(ids, merged["0.weight"].detach(), **{k: v for k, v in options.items() if k != "sparse"}))
    got.square().sum().backward()
    assert same_state(before, state(model))
    plain = tree_map(lambda t: t.detach().clone().requires_grad_(), a)
    weight = net.merge(plain)["0.weight"]
    quiet = {k: v for k, v in options.items() if k not in ("sparse", "max_norm")}
    if "max_norm" not in options:
        F.embedding(ids, weight, **quiet).square().sum().backward()
        for t, want in zip(tree_leaves(leaf), tree_leaves(plain), strict=True):
            close(t.grad.to_dense(), want.grad)


@pytest.mark.parametrize("name", ["mlp", "bert", "convs", "attention"])
@pytest.mark.parametrize("method", [LoRA(2), DoRA(2), Full(), LoHa(2)], ids=lambda m: type(m).__name__)
def test_autocast(name: str, method: pf.Method) -> None:
    case = by_name[name]
    model = case.build()
    net = pf.adapt(model, {case.linear: method})
    a, (args, kwargs) = random(net), case.inputs(2)
    exact, merged, ready = case.output(net.apply(a, *args, **kwargs)), net.merge(a), net.prepare(a)
    merged = {n: t.detach().requires_grad_() for n, t in merged.items()}  # keeps torch off its fused path, in bf16
    with torch.autocast("cpu", torch.bfloat16):
        got, want = case.output(net.apply(a, *args, **kwargs)), case.output(call(model, merged, args, kwargs))
        inside, prepared = net.merge(a), net.prepare(a)
        delta = net.delta(a)
    assert got.dtype == want.dtype
    close(got.float(), exact, 0.05)
    [close(inside[n], t) for n, t in merged.items()]  # a merge is fp32 wherever it is called
    [close(delta[n], net.delta(a)[n]) for n in delta]
    trees_close(prepared, ready)


# The rest.


def test_a_mixed_batch_whose_size_is_another_size_too() -> None:
    """Eight rows where features are eight: what has eight entries is not therefore the rows."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Linear(8, 8)).eval()
    [p.data.copy_(noise(*p.shape, seed=i)) for i, p in enumerate(model.parameters())]
    x, index = noise(8, 8), [0, 1, -1, 1, 0, 2, -1, 0]
    for rules in ({"bias": Full()}, {r"^[12]\.weight": Full()}, {".*": Full()}, {"weight": LoRA(2), "bias": Full()}):
        net = pf.adapt(model, rules)
        many = [random(net, s) for s in range(3)]
        want = [net.apply(many[k] if k >= 0 else pf.scale(many[0], 0.0), x[i : i + 1]) for i, k in enumerate(index)]
        close(net.mixed(pf.stack(many), index, x), torch.cat(want))


@pytest.mark.parametrize("rows", [3, 5])
def test_a_mixed_batch_through_something_that_is_not_a_row(rows: int) -> None:
    """T5's relative positions are [queries, keys]; and nn.MultiheadAttention without batch_first is [length, batch],
    in which rows may be followed."""
    case = by_name["t5"]
    net = pf.adapt(case.build(), {"relative_attention_bias": Full()})
    sequence = nn.MultiheadAttention(8, 2)
    other = pf.adapt(sequence, {"weight": Full()})
    many, x = [random(net, s) for s in (1, 2)], noise(5, rows, 8)
    index = [i % 2 for i in range(rows)]
    ids = {"input_ids": tokens(rows), "decoder_input_ids": tokens(rows, 5), "use_cache": False}
    want = [
        net.apply(many[k], **{n: v[i : i + 1] if v is not False else v for n, v in ids.items()})
        for i, k in enumerate(index)
    ]
    with nullcontext() if rows != 5 else wrong_or_raises():
        close(net.mixed(pf.stack(many), index, **ids).logits, torch.cat([w.logits for w in want]))
    many = [random(other, s) for s in (1, 2)]
    with wrong_or_raises():
        got = other.mixed(pf.stack(many), index, x, x, x)[0]
        want = [other.apply(many[k], *[x[:, i : i + 1]] * 3)[0] for i, k in enumerate(index)]
        close(got, torch.cat(want, 1))


class wrong_or_raises:
    """The rows may be followed or refused; a wrong result is neither."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, value: Any, trace: Any) -> bool:
        return kind is ValueError and "rows" in str(value)


def test_methods_compare_pickle_and_copy() -> None:
    for m in (
        LoRA(4, alpha=8.0),
        DoRA(2, attached=True),
        IA3(),
        VeRA(3),
        OFT(2),
        LoHa(2),
        Full(),
        pf.chain(LoRA(2), OFT(2)),
    ):
        assert pickle.loads(pickle.dumps(m)) == copy.deepcopy(m) == m
        assert hash(copy.deepcopy(m)) == hash(m)
        assert eval(repr(m), vars(pf) | {"Chain": type(pf.chain(LoRA(), OFT()))}) == m


def test_import_is_light() -> None:
    code = (
        "import time, sys; a = time.process_time(); import torch; b = time.process_time(); import peftfn;"
        "t = time.process_time() - b; heavy = ('transformers', 'peft', 'triton', 'matplotlib', 'numpy.testing');"
        "print(t / (b - a), [m for m in heavy if m in sys.modules], torch.cuda.is_initialized())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "123"
    ]
    assert all(r.strip().endswith("[] False") for r in runs), runs
    assert min(float(r.split()[0]) for r in runs) < 0.5, runs  # of what torch takes, so that the machine cancels


def test_leaves_used_twice_in_functions_get_the_sum_of_their_gradients() -> None:
    model = by_name["functions"].build()
    assert isinstance(model, Functions)
    net = pf.adapt(model, {"^w$": LoRA(2)})
    a, x = random(net), noise(3, 8)
    want = grad(lambda a: call(model, net.merge(a), (x,), {}).sum())(a)
    trees_close(grad(lambda a: net.apply(a, x).sum())(a), want)
    assert operator.attrgetter("w")(model).grad is None


# A merged model whose weights are tied.


@pytest.mark.parametrize(
    "rules", [{r"c_attn|c_fc": LoRA(2)}, {"c_attn": LoRA(2), "wte|lm_head": pf.TiedTokens((1, 3))}], ids=str
)
def test_functional_call_on_a_tied_model(rules: Any) -> None:
    """All names of one tied tensor have one merged tensor, also where both are adapted and come out alike."""
    model, ids = by_name["gpt2"].build(), tokens(2)
    net = pf.adapt(model, rules)
    a = random(net)
    merged = net.merge(a)
    assert merged["lm_head.weight"] is merged["transformer.wte.weight"]
    close(torch.func.functional_call(model, merged, (ids,)).logits, net.apply(a, ids).logits)


def test_a_tied_weight_that_is_adapted_in_one_place() -> None:
    model, ids = by_name["gpt2"].build(), tokens(2)
    net = pf.adapt(model, {"lm_head": LoRA(2)})
    a = random(net)
    with pytest.raises(ValueError, match=r"lm_head\.weight: it is tied to transformer\.wte\.weight.*untied=True"):
        net.merge(a)
    merged = net.merge(a, untied=True)
    got = torch.func.functional_call(model, merged, (ids,), tie_weights=False).logits
    close(got, net.apply(a, ids).logits)


# A layer's own autograd.Function, which hides the weight's gradient.


READS: dict[str, Callable[[Any], Tensor]] = {
    "w.t()": lambda w: w.t(),
    "w.T": lambda w: w.T,
    "w[:]": lambda w: w[:],
    "w[0]": lambda w: w[0],
    "rows of w": lambda w: torch.stack(list(w)),
    "w.to()": lambda w: w.to(torch.float32),
    "w.data": lambda w: w.data,
    "w * 1": lambda w: w * 1,
    "F.linear": lambda w: F.linear(torch.eye(w.shape[1]), w),
}


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Any, read: Any) -> Tensor:
        ctx.seen = read(w)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g, None, None


class HiddenLinear(nn.Linear):
    read: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Hidden.apply(x, self.weight, self.read)  # type: ignore[no-untyped-call]
        return out


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("use", ["apply", "mixed", "as_module"])
def test_no_reading_of_a_weight_hides_its_gradient(name: str, use: str) -> None:
    """Inside an autograd.Function nothing is recorded, so every reading of the weight there is an error."""
    model = nn.Sequential(HiddenLinear(4, 4), nn.Linear(4, 4))
    model[0].read = READS[name]
    net = pf.adapt(model, {r"0\.weight": LoRA(2)})
    a, x = random(net), noise(3, 4)
    call = {
        "apply": lambda: net.apply(a, x),
        "mixed": lambda: net.mixed(pf.stack([a, a]), [0, 1, -1], x),
        "as_module": lambda: pf.as_module(net, a)(x),
    }[use]
    with pytest.raises(
        (RuntimeError, ValueError), match=r"0\.weight: (passed to a torch\.autograd\.Function|.*mixed batch)"
    ):
        call()
