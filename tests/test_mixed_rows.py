"""What is a row, and what is not: sizes that agree by chance, functions over all rows, no rows at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_facts import Net
from test_models import close, random
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

import peftfn as pf
from peftfn import IA3, OFT, DoRA, Full, LoHa, LoRA

INDEX = [1, -1, 0]
METHODS = [LoRA(2), DoRA(2), IA3(), OFT(2), LoHa(2), Full()]


def setting(body: Callable[..., Tensor], rules: dict[str, pf.Method], **parts: Any) -> tuple[pf.Adapted, list[Any]]:
    net = pf.adapt(Net(body, **parts).eval(), rules)
    return net, [random(net, i) for i in range(2)]


def one_by_one(net: pf.Adapted, many: list[Any], *inputs: Tensor, index: list[int] = INDEX) -> Tensor:
    rows = ([x[i : i + 1] for x in inputs] for i in range(len(index)))
    calls = zip(index, rows, strict=True)
    return torch.cat([net.apply(many[k], *row) if k >= 0 else net.model(*row) for k, row in calls])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


# An input that is none of rows, and has as many entries.


def counted(m: Any, ids: Tensor) -> Tensor:
    out: Tensor = m.tokens(ids) + m.places(torch.arange(ids.shape[1]))
    return out


def tabled(m: Any, ids: Tensor) -> Tensor:
    out: Tensor = m.tokens(ids) + m.places(m.table[: ids.shape[1]])
    return out


def positions(case: str) -> tuple[pf.Adapted, list[Any]]:
    tokens, body = nn.Embedding(9, 4), counted if case == "counted" else tabled
    table = {"counted": None, "a buffer": torch.arange(9), "a parameter": nn.Parameter(noise(9, 4))}[case]
    places = nn.Linear(4, 4) if case == "a parameter" else nn.Embedding(9, 4)
    return setting(body, {"places": DoRA(2)}, tokens=tokens, places=places, table=table)


@pytest.mark.parametrize("case", ["counted", "a buffer", "a parameter"])
def test_positions_are_never_taken_for_rows(case: str) -> None:
    """With as many tokens as rows, a table of positions has the shape of rows."""
    net, many = positions(case)
    ids = torch.arange(9).view(3, 3)
    with pytest.raises(ValueError, match=r"places\.weight: .*3 entries are not the batch's 3 rows.*common"):
        net.mixed(pf.stack(many), INDEX, ids)
    with pytest.raises(ValueError, match=r"places\.weight: .*rows"):
        net.gated(pf.stack(many), torch.rand(3, 2), ids)


@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("case", ["counted", "a buffer", "a parameter"])
def test_a_site_with_an_input_that_all_rows_have_in_common(case: str, tokens: int) -> None:
    net, many = positions(case)
    nets, s, ids = pf.Nets([net]), [pf.stack(many)], torch.arange(3 * tokens).view(3, tokens)
    want = one_by_one(net, many, ids)
    close(nets.mixed(s, INDEX, ids, common=["places"]), want)
    g = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    close(nets.gated(s, g, ids, common="places"), want)
    half = (net.model(ids) + one_by_one(net, many, ids, index=[0, 0, 0])) / 2
    close(nets.gated(s, torch.tensor([[0.5, 0.0]] * 3), ids, common=["places"]), half)
    bank = pf.Bank([net], 2)
    bank.put("0", net, many[0])
    bank.put("1", net, many[1])
    close(bank.apply(["1", "__base__", "0"], ids, common=["places"]), want)
    with pytest.raises(ValueError, match=r"common: 'placed' matches none of the 1 sites; near: places"):
        nets.mixed(s, INDEX, ids, common=["placed"])


def test_common_inputs_compile() -> None:
    net, many = positions("counted")
    nets, s, ids = pf.Nets([net]), [pf.stack(many)], torch.arange(9).view(3, 3)
    compiled = torch.compile(lambda i: nets.mixed(s, i, ids, common=["places"]), backend="eager", fullgraph=True)
    close(compiled(torch.tensor(INDEX)), one_by_one(net, many, ids))


def test_rows_that_the_model_made_itself_are_rows_if_it_is_said_so() -> None:
    net, many = setting(lambda m, x: m.classes(x.argmax(-1)), {"classes": LoRA(2)}, classes=nn.Embedding(9, 4))
    x = noise(3, 9)
    with pytest.raises(ValueError, match=r"classes\.weight: .*common=\[\] if"):
        net.mixed(pf.stack(many), INDEX, x)
    close(pf.Nets([net]).mixed([pf.stack(many)], INDEX, x, common=[]), one_by_one(net, many, x))


def test_a_view_of_another_weight_has_no_rows() -> None:
    parts = {"f": nn.Linear(4, 4), "g": nn.Linear(4, 4)}
    net, many = setting(lambda m, x: x @ (m.g.weight.T @ m.f.weight), {r"f\.weight": LoRA(2)}, **parts)
    with pytest.raises(ValueError, match=r"f\.weight: matmul"):
        net.mixed(pf.stack(many), [1, -1, 0, 0], noise(4, 2, 4))


@pytest.mark.parametrize("method", [LoRA(2), OFT(2)], ids=str)
def test_a_vector_of_features_is_no_batch(method: pf.Method) -> None:
    linear, many = setting(lambda m, x: m.f(x), {r"f\.weight": method}, f=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"f\.weight: its input has shape \[4\].*rows"):
        linear.mixed(pf.stack(many), [1, -1, 0, 0], noise(4))
    conv, many = setting(lambda m, x: m.f(x), {r"f\.weight": LoRA(2)}, f=nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match=r"f\.weight: its input has shape \[3, 5\].*rows"):
        conv.mixed(pf.stack(many), INDEX, noise(3, 5))


# Functions over all rows.


def test_batchnorm_in_training_has_the_statistics_of_all_rows() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    net = pf.adapt(model, {r"^1\.": Full()})
    many, x, index = [random(net, i) for i in range(2)], noise(5, 4), [1, -1, 0, 1, 0]
    before = [b.clone() for b in model.buffers()]
    whole = [net.apply(a, x) for a in [*many, pf.scale(many[0], 0.0)]]
    close(net.mixed(pf.stack(many), index, x), torch.stack([whole[k][i] for i, k in enumerate(index)]))
    g = torch.tensor([[0.5, 0.0], [0.0, 0.0], [1.0, 0.0], [0.3, 0.3], [0.0, 2.0]])
    want = whole[2] + sum(g[:, k : k + 1] * (whole[k] - whole[2]) for k in range(2))
    close(net.gated(pf.stack(many), g, x), want)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_bags_cut_from_one_line_are_refused() -> None:
    net, many = setting(lambda m, ids: m.f(ids, torch.arange(3)), {"f": LoRA(2)}, f=nn.EmbeddingBag(9, 4))
    with pytest.raises(ValueError, match=r"f\.weight: embedding_bag"):
        net.mixed(pf.stack(many), INDEX, torch.arange(3))
    net, many = setting(lambda m, ids: m.f(ids), {"f": LoRA(2)}, f=nn.EmbeddingBag(9, 4))
    ids = torch.arange(6).view(3, 2)
    close(net.mixed(pf.stack(many), INDEX, ids), one_by_one(net, many, ids))


# Indices.


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_batch_without_rows_or_without_tokens(method: pf.Method) -> None:
    parts = {"f": nn.Linear(4, 6), "norm": nn.LayerNorm(6)}
    net, many = setting(lambda m, x: m.norm(m.f(x)), {"f": method, "norm": Full()}, **parts)
    s = pf.stack(many)
    for index in ([], torch.empty(0, dtype=torch.long)):
        assert net.mixed(s, index, noise(0, 4)).shape == (0, 6)
        assert net.mixed(s, index, noise(0, 3, 4)).shape == (0, 3, 6)
    assert net.mixed(s, [1, -1], noise(2, 0, 4)).shape == (2, 0, 6)
    assert net.gated(s, torch.empty(0, 2), noise(0, 4)).shape == (0, 6)
    assert net.gated(s, [0.5, 0.5], noise(0, 4)).shape == (0, 6)
    assert net.gated(s, torch.rand(2, 2), noise(2, 0, 4)).shape == (2, 0, 6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_every_integer_type_is_an_index(dtype: torch.dtype) -> None:
    """A uint8 tensor would select as a mask does."""
    net, many = setting(lambda m, x: m.norm(m.f(x)), {".*": Full()}, f=nn.Linear(4, 4), norm=nn.LayerNorm(4))
    x, index = noise(3, 4), torch.tensor([1, 0, 1], dtype=dtype)
    want = one_by_one(net, many, x, index=[1, 0, 1])
    close(net.mixed(pf.stack(many), index, x), want)
    compiled = torch.compile(lambda s, i, x: net.mixed(s, i, x), backend="eager", fullgraph=True)
    close(compiled(pf.stack(many), index, x), want)


def test_an_index_out_of_range_is_never_the_base() -> None:
    """Also where nobody can look at it beforehand: compiled, and under a vmap over the index."""
    net, many = setting(lambda m, x: m.f(x), {"f": LoRA(2)}, f=nn.Linear(4, 4))
    s, x = pf.stack(many), noise(3, 4)
    compiled = torch.compile(lambda i: net.mixed(s, i, x), backend="eager", fullgraph=True)
    close(compiled(torch.tensor(INDEX)), one_by_one(net, many, x))
    for bad in ([1, 2, 0], [1, -2, 0]):
        for call in (compiled, lambda i: vmap(lambda i: net.mixed(s, i, x))(i[None])):
            with pytest.raises(IndexError, match="out of bounds"):
                call(torch.tensor(bad))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_vmap_over_indices_and_gates_is_a_loop(method: pf.Method) -> None:
    parts = {"f": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    net, many = setting(lambda m, x: m.norm(F.silu(m.f(x))), {"f": method, "norm": Full()}, **parts)
    s, x, indices, gates = pf.stack(many), noise(3, 4), torch.tensor([INDEX, [0, 0, 1]]), noise(2, 3, 2)
    got = vmap(lambda i: net.mixed(s, i, x))(indices)
    close(got, torch.stack([one_by_one(net, many, x, index=i) for i in indices.tolist()]))
    close(vmap(lambda g: net.gated(s, g, x))(gates), torch.stack([net.gated(s, g, x) for g in gates]))
    both = vmap(vmap(lambda i, s: net.mixed(s, i, x), (0, None)), (None, 0))(indices, pf.stack([s, s]))
    close(both, torch.stack([got, got]))
