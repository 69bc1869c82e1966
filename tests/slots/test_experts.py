"""Experts that use their weights in ways of their own: a row of a mixed batch is that row alone, or the site raises."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support import close, random, trees_close
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import peftfn as pf
from peftfn import DoRA, Full, LoRA

INDEX = [2, -1, 0, 2, 1]
E, N, D = 3, 6, 8
Form = Callable[[nn.Module, Tensor], Tensor]


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one(f: Callable[[Tensor, Tensor, int], Tensor]) -> Form:
    """f(w, x [n, in], e): one expert's product with the positions that chose it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weights, chosen = m.router(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), N)
        for e in range(E):
            (at,) = torch.where(chosen == e)
            out = out.index_add(0, at, f(m.w, x[at], e) * weights[at, None])
        return out

    return forward


def chosen(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Form:
    """f(w, x [n, in], ids [n]): the product of each position with the expert that it chose."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weights, ids = m.router(x).softmax(-1).max(-1)
        return f(m.w, x, ids) * weights[:, None]

    return forward


def every(f: Callable[[Tensor, Tensor], Tensor]) -> Form:
    """f(w, x [n, in]) → [n, experts, out]: the products of each position with all experts."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return (f(m.w, x) * m.router(x).softmax(-1)[..., None]).sum(1)

    return forward


STACKS: dict[str, Form] = {  # w: [experts, out, in]
    "w[e].T": one(lambda w, x, e: x @ w[e].T),
    "w[e].mT, slices": one(lambda w, x, e: torch.cat([x @ w[e].mT[:, :2], F.linear(x, w[e][2:])], -1)),
    "w[e].t(), addmm": one(lambda w, x, e: torch.addmm(torch.zeros(N), x, w[e].t())),
    "w[e] on the left": one(lambda w, x, e: (w[e] @ x.T).T),
    "w[e].as_strided": one(lambda w, x, e: F.linear(x, w[e].as_strided((N, D), (D, 1)))),
    "w.as_strided": one(lambda w, x, e: F.linear(x, torch.as_strided(w, (N, D), (D, 1), e * N * D))),
    "w[e : e + 1]": one(lambda w, x, e: F.linear(x, w[e : e + 1].squeeze(0))),
    "list(w)": one(lambda w, x, e: F.linear(x, list(w)[e])),
    "w.unbind, w.select": one(lambda w, x, e: F.linear(x, w.unbind(0)[e] + w.select(0, e))),
    "w.view": one(lambda w, x, e: F.linear(x, w.view(E * N, D)[e * N : (e + 1) * N].clone())),
    "F.normalize(w[e])": one(lambda w, x, e: F.linear(x, F.normalize(w[e], dim=-1))),
    "bmm(w[ids], x)": chosen(lambda w, x, ids: torch.bmm(w[ids], x[..., None])[..., 0]),
    "x @ w[ids].mT": chosen(lambda w, x, ids: (x[:, None] @ w[ids].mT)[:, 0]),
    "einsum(w[ids])": chosen(lambda w, x, ids: torch.einsum("nd,nod->no", x, w[ids])),
    "w[ids] * x": chosen(lambda w, x, ids: (w[ids] * x[:, None]).sum(-1)),
    "w.index_select": chosen(lambda w, x, ids: torch.bmm(w.index_select(0, ids), x[..., None])[..., 0]),
    "einsum(w)": every(lambda w, x: torch.einsum("nd,eod->neo", x, w)),
    "bmm(x, w)": every(lambda w, x: torch.bmm(x.expand(E, *x.shape), w.mT).transpose(0, 1)),
    "baddbmm(x, w)": every(
        lambda w, x: torch.baddbmm(torch.zeros(E, 1, N), x.expand(E, *x.shape), w.mT).transpose(0, 1)
    ),
    "x @ w": every(lambda w, x: (x @ w.mT).transpose(0, 1)),
    "w @ x": every(lambda w, x: torch.matmul(w, x[:, None, :, None])[..., 0]),
    "w.permute": every(lambda w, x: (x @ w.permute(2, 0, 1).reshape(D, -1)).view(-1, E, N)),
    "tensordot(w)": every(lambda w, x: torch.tensordot(x, w, dims=([1], [2]))),
}
MATRICES: dict[str, Form] = {  # w: [experts · out, in], as DBRX has it
    "w.view": one(lambda w, x, e: F.linear(x, w.view(E, N, D)[e])),
    "w.view, turned": one(lambda w, x, e: x @ w.unflatten(0, (E, N))[e].mT.contiguous()),
    "w[e·out : …].T": one(lambda w, x, e: x @ w[e * N : (e + 1) * N].T),
    "w.narrow, w.chunk": one(lambda w, x, e: F.linear(x, w.narrow(0, e * N, N) + w.chunk(E)[e])),
    "w.as_strided": one(lambda w, x, e: F.linear(x, w.as_strided((N, D), (D, 1), e * N * D))),
    "on the left": one(lambda w, x, e: (w.view(E, N, D)[e] @ x.T).T),
    "bmm": chosen(lambda w, x, ids: torch.bmm(w.view(E, N, D)[ids], x[..., None])[..., 0]),
    "all of it": every(lambda w, x: F.linear(x, w).view(-1, E, N)),
    "all of it, turned": every(lambda w, x: (x @ w.T).view(-1, E, N)),
}
RAISES: dict[str, Form] = {
    "w.data": one(lambda w, x, e: F.linear(x, w.data[e])),
    "w.add_": one(lambda w, x, e: F.linear(x, w.add_(1)[e])),
    "out=": one(lambda w, x, e: torch.matmul(x, w[e].T, out=torch.empty(len(x), N))),
    "out= of a product": one(lambda w, x, e: torch.mm(w[e], x.mT, out=torch.empty(N, len(x))).mT),
    "out= of all": every(
        lambda w, x: torch.bmm(x.expand(E, *x.shape), w.mT, out=torch.empty(E, len(x), N)).transpose(0, 1)
    ),
}


class Experts(nn.Module):
    def __init__(self, form: Form, *shape: int):
        super().__init__()
        self.router, self.w, self.form = nn.Linear(D, E), nn.Parameter(0.5 * noise(*shape, seed=3)), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


class Block(nn.Module):
    def __init__(self, form: Form, *shape: int):
        super().__init__()
        self.experts = Experts(form, *shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x.flatten(0, 1)).view(*x.shape[:2], -1)


def check(net: pf.Adapted, rows: list[Any], batch: Any, output: Callable[[Any], Tensor] = lambda y: y) -> None:
    """Outputs, and the gradient of every leaf, are those of each row alone."""
    adapters = [random(net, s) for s in range(3)]
    many = pf.stack(adapters)

    def together(many: Any) -> tuple[Tensor, Tensor]:
        y = output(net.mixed(many, INDEX, batch))
        return (y * noise(*y.shape)).sum(), y

    def alone(many: Any) -> tuple[Tensor, Tensor]:
        each = [{n: {k: t[i] for k, t in leaf.items()} for n, leaf in many.items()} for i in range(3)]
        ys = [net.apply(each[k], x) if k >= 0 else net.model(x) for k, x in zip(INDEX, rows, strict=True)]
        y = torch.cat([output(y) for y in ys])
        return (y * noise(*y.shape)).sum(), y

    got, y = grad(together, has_aux=True)(many)
    want, z = grad(alone, has_aux=True)(many)
    assert (z - torch.cat([output(net.model(x)) for x in rows])).abs().max() > 1e-2, "this would be no check"
    close(y, z, 2e-5)
    trees_close(got, want)


FORMS = [("stack", k, f) for k, f in STACKS.items()] + [("matrix", k, f) for k, f in MATRICES.items()]


@pytest.mark.parametrize(("kind", "form"), [(k, f) for k, _, f in FORMS], ids=[f"{k}: {name}" for k, name, _ in FORMS])
def test_whatever_a_model_does_with_the_weight_of_its_experts(kind: str, form: Form) -> None:
    """Seven tokens a row, and two, so that there are as many positions as features somewhere."""
    torch.manual_seed(0)
    model = Block(form, E, N, D) if kind == "stack" else Block(form, E * N, D)
    for method, tokens in ((LoRA(2), 7), (DoRA(2), 2)):
        x = noise(5, tokens, D)
        check(pf.adapt(model, {"w$": method}), [x[i : i + 1] for i in range(5)], x)


@pytest.mark.parametrize("form", RAISES.values(), ids=RAISES)
def test_what_cannot_be_told_names_the_site(form: Form) -> None:
    net = pf.adapt(Block(form, E, N, D), {"w$": LoRA(2)})
    with pytest.raises((ValueError, RuntimeError), match=r"experts\.w: "), torch.no_grad():
        net.mixed(pf.stack([random(net, s) for s in range(3)]), INDEX, noise(5, 7, D))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_as_many_positions_as_features_are_no_rows(tokens: int) -> None:
    """A table of each row's own meets rows in a product: its first dimension is summed over, whatever its size."""
    d = 5 * tokens

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(noise(2, d, N))

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(0, 1) @ self.w[0] + self.w[1].mT @ torch.ones(d)).view(*x.shape[:2], N)

    net, x = pf.adapt(Turned(), {"w": Full()}, routed=[""]), noise(5, tokens, d)
    check(net, [x[i : i + 1] for i in range(5)], x)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.f = nn.Parameter(noise(5, 5)), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            table = self.f(self.table)
            return x @ table if tokens < 3 else x @ table[0]

    net = pf.adapt(Plain(), {"f.weight": LoRA(2)}, routed=[])
    with pytest.raises(ValueError, match=r"f\.weight: all rows have its input in common"):
        net.mixed(pf.stack([random(net, s) for s in range(3)]), INDEX, noise(5, 5))


SIZE = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0, "eos_token_id": None}
WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 64}


def gpt_oss(way: str) -> Any:
    c = tf.GptOssConfig(
        **SIZE, **WIDTH, num_local_experts=4, head_dim=8, layer_types=["full_attention"], num_experts_per_tok=2
    )
    model = tf.GptOssForCausalLM(c)
    model.set_experts_implementation(way)
    return model


def dbrx(_: str) -> Any:
    experts = {"ffn_hidden_size": 24, "hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}
    c = tf.DbrxConfig(
        **{"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 64, "max_seq_len": 64, "pad_token_id": 0},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config=experts | {"moe_jitter_eps": None, "ffn_act_fn": {"name": "silu"}},
    )
    return tf.DbrxForCausalLM(c)


MODELS: list[tuple[Callable[[str], Any], str, dict[str, pf.Method]]] = [
    *((gpt_oss, way, {r"experts.*proj$": LoRA(2), r"experts.*bias": Full()}) for way in ("eager", "grouped_mm")),
    (gpt_oss, "batched_mm", {r"experts.*bias": LoRA(2)}),
    (dbrx, "eager", {r"experts.*[vw]\d$": LoRA(2), "router": LoRA(2)}),
]


@pytest.mark.parametrize(("make", "way", "rules"), MODELS, ids=[f"{f.__name__} {way}" for f, way, _ in MODELS])
def test_biases_and_matrices_of_experts_in_real_models(make: Any, way: str, rules: dict[str, pf.Method]) -> None:
    torch.manual_seed(0)
    model = make(way).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.15 * torch.randn_like(p) + (p.dim() == 1))
    ids = torch.randint(2, 60, (5, 7), generator=torch.Generator().manual_seed(1))
    net = pf.adapt(model, rules)
    check(net, [ids[i : i + 1] for i in range(5)], ids, lambda y: y.logits)
    by_token = torch.tensor(INDEX)[:, None].expand(5, 7).clone()
    by_token[0, 0] = 0
    with pytest.raises(ValueError, match=r"experts.*: the model computes with the weight itself"), torch.no_grad():
        net.mixed(pf.stack([random(net, s) for s in range(3)]), by_token, ids)


PRODUCTS = {k: STACKS[k] for k in ("w[e].T", "bmm(w[ids], x)", "bmm(x, w)")} | {
    "linear": one(lambda w, x, e: F.linear(x, w[e])),
}


@pytest.mark.parametrize("method", [LoRA(2), DoRA(2), Full()], ids=str)
@pytest.mark.parametrize("form", PRODUCTS.values(), ids=PRODUCTS)
def test_gates_and_an_index_of_tokens_through_experts(form: Form, method: pf.Method) -> None:
    """This model is linear in what its experts give, so each token is the sum that gates mean."""
    torch.manual_seed(0)
    net, x = pf.adapt(Block(form, E, N, D), {"w$": method}), noise(5, 7, D)
    adapters = [random(net, s) for s in range(3)]
    many, base = pf.stack(adapters), net.model(x)
    change = torch.stack([net.apply(a, x) - base for a in adapters], -1)  # [rows, tokens, out, adapters]
    by_token, by_row = noise(5, 7, 3, seed=3), noise(5, 3, seed=4)
    close(net.gated(many, by_token, x), base + (by_token[:, :, None] * change).sum(-1))
    close(net.gated(many, by_row, x), base + (by_row[:, None, None] * change).sum(-1))
    index = torch.randint(-1, 3, (5, 7), generator=torch.Generator().manual_seed(5))
    own = F.one_hot(index + 1, 4)[..., 1:].to(x.dtype)
    want = base + (own[:, :, None] * change).sum(-1)
    close(net.mixed(many, index, x), want)
    packed = net.mixed(many, index.view(1, 35), x.view(1, 35, D))  # all rows in one
    close(packed, want.view(1, 35, N))
    bank = pf.bank({str(k): (net, a) for k, a in enumerate(adapters)})
    with torch.no_grad():
        names = [["__base__", "0", "1", "2"][k + 1] for k in INDEX]
        close(bank.apply(names, x), net.mixed(many, INDEX, x))


class Ops(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[f.__name__.split(".")[0]] += 1
        return f(*args, **(kwargs or {}))


class Grouped(nn.Module):
    """transformers' way to run experts by `grouped_mm`, which wants positions sorted by expert."""

    def __init__(self, d: int = 8, out: int = 8):
        super().__init__()
        self.experts = nn.Module()
        self.router, self.experts.w = nn.Linear(d, E), nn.Parameter(0.5 * noise(E, out, d, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, ids = self.router(flat).softmax(-1).max(-1)
        order = ids.argsort()
        offs = F.one_hot(ids, E).sum(0).cumsum(0).int()
        y = F.grouped_mm(flat[order], self.experts.w.to(flat.dtype).transpose(-2, -1), offs=offs)
        return (y[order.argsort()] * weights[:, None]).view(*x.shape[:2], -1)


GROUPED: dict[str, tuple[list[dict[str, pf.Method]], torch.dtype, bool]] = {
    "one method": ([{"w$": LoRA(4)}], torch.float32, True),
    "several nets": ([{"w$": LoRA(4)}, {"w$": LoRA(8, alpha=3)}], torch.float32, True),
    "bfloat16": ([{"w$": LoRA(8)}], torch.bfloat16, True),
    "vectors of no whole 16 bytes": ([{"w$": LoRA(1)}], torch.float32, False),
    "fp32 on bfloat16": ([{"w$": LoRA(8)}], torch.bfloat16, False),
    "a gain": ([{"w$": DoRA(4)}], torch.float32, False),
    "no factors": ([{"w$": LoRA(4)}, {"w$": Full()}], torch.float32, False),
    "more factors than are worth it": ([{"w$": LoRA(400)}], torch.float32, False),
}


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_grouped_product_is_one_of_all_experts_and_adapters(case: str, mode: Any) -> None:
    """It is what each row's own adapter gives, and so is what runs in its place where it cannot be used. As grouped
    products: of the base, and two for the adapters of each net."""
    plans, dtype, fast = GROUPED[case]
    torch.manual_seed(0)
    model = Grouped(16, 16).to(dtype).requires_grad_(False)
    nets = [pf.adapt(model, rules) for rules in plans]
    nets = [net.in_fp32() for net in nets] if case.startswith("fp32") else nets
    stacks = [pf.stack([random(net, 3 * i + s, scale=0.3) for s in range(2)]) for i, net in enumerate(nets)]
    index, x = [1, -1, 0, 2 * len(nets) - 1, 1], noise(5, 6, 16).to(dtype)
    ops = Ops()
    with mode():
        with ops:
            got = pf.Nets(nets).mixed(stacks, index, x)
        adapters = [
            {n: {j: t[i] for j, t in leaf.items()} for n, leaf in stack.items()} for stack in stacks for i in range(2)
        ]
        rows = zip(index, x.split(1), strict=True)
        each = [nets[k // 2].apply(adapters[k], row) if k >= 0 else model(row) for k, row in rows]
        close(got.float(), torch.cat(each).float(), 1e-5 if dtype == torch.float32 else 2e-2)
    assert ops.names["_grouped_mm"] == (1 + 2 * len(nets) if fast else 0)
    by_token = torch.tensor(index)[:, None].expand(5, 6).clone()
    with mode():
        close(pf.Nets(nets).mixed(stacks, by_token, x).float(), got.float(), 1e-5 if dtype == torch.float32 else 2e-2)


def test_apply_compiles_through_experts() -> None:
    """Nothing is followed there, and the net has routed modules all the same."""
    net, x = pf.adapt(Block(STACKS["bmm(x, w)"], E, N, D), {"w$": LoRA(2)}), noise(5, 7, D)
    a = random(net)
    close(torch.compile(net.apply, backend="eager", fullgraph=True)(a, x), net.apply(a, x))
