"""What is a row, and what is not: sizes that agree by chance, functions over all rows, no rows at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Net, close, random, trees_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from transformers import DebertaV2Config, DebertaV2Model

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


@pytest.mark.parametrize("case", ["a buffer", "a parameter"])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_models_own_tables_are_known_to_have_no_rows(case: str, tokens: int) -> None:
    """Whatever their size, which may be the batch's by chance."""
    net, many = positions(case)
    ids, s = torch.arange(3 * tokens).view(3, tokens), pf.stack(many)
    want = one_by_one(net, many, ids)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            close(net.mixed(s, INDEX, ids), want)
            close(net.gated(s, torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), ids), want)


def test_positions_are_never_taken_for_rows() -> None:
    """With as many tokens as rows, positions that the model counts have the shape of rows."""
    net, many = positions("counted")
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


@pytest.mark.parametrize("common", [None, []])
@pytest.mark.parametrize("how", ["mixed", "gated"])
def test_rows_packed_into_one_sequence_are_followed_or_refused(how: str, common: Any) -> None:
    """[1, rows · tokens, …] is not one input for all rows."""

    def packed(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.f(x.reshape(1, -1, 4))[0].view_as(x)
        return out

    net, many = setting(packed, {"f": LoRA(2)}, f=nn.Linear(4, 4))
    way = INDEX if how == "mixed" else torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    want = one_by_one(net, many, noise(3, 2, 4))
    close(getattr(net, how)(pf.stack(many), way, noise(3, 2, 4), common=common), want)
    fixed = pf.adapt(net.model, {"f": LoRA(2)}, routed=[])
    with pytest.raises(ValueError, match=r"f\.weight: its input has shape \[1, 6, 4\].*3 rows"):
        getattr(fixed, how)(pf.stack(many), way, noise(3, 2, 4), common=common)


def test_a_common_input_with_a_first_dimension_of_one() -> None:
    net, many = setting(
        lambda m, ids: m.tokens(ids) + m.places(torch.arange(ids.shape[1])[None]),
        {"places": LoRA(2)},
        tokens=nn.Embedding(9, 4),
        places=nn.Embedding(9, 4),
    )
    ids, s = torch.arange(6).view(3, 2), pf.stack(many)
    with pytest.raises(ValueError, match=r"places\.weight: its input has shape \[1, 2\].*common=\[…\]"):
        pf.adapt(net.model, {"places": LoRA(2)}, routed=[]).mixed(s, INDEX, ids)
    want = one_by_one(net, many, ids)
    close(net.mixed(s, INDEX, ids, common=["places"]), want)
    close(net.mixed(s, INDEX, ids), want)  # followed, positions have no rows
    compiled = torch.compile(lambda i: net.mixed(s, i, ids, common=["places"]), backend="eager", fullgraph=True)
    close(compiled(torch.tensor(INDEX)), want)


def test_a_table_that_rows_were_written_to_is_no_table() -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        t = m.table.clone()
        t[1:] += x[:, 0]  # through a view
        out: Tensor = m.f(t[1:]) + 0 * x[:, 0]
        return out

    net, many = setting(written, {r"f\.": LoRA(2)}, f=nn.Linear(4, 4), table=nn.Parameter(noise(4, 4)))
    x, s = noise(3, 2, 4), pf.stack(many)
    got = net.mixed(s, INDEX, x)
    every = [net.apply(a, x) for a in many]
    close(got, torch.stack([net.model(x)[i] if k < 0 else every[k][i] for i, k in enumerate(INDEX)]))
    with torch.inference_mode(), pytest.raises(ValueError, match="writes rows of the batch into a table"):
        net.mixed(s, INDEX, x)


def test_what_a_site_makes_of_a_table_meets_rows_or_is_refused() -> None:
    parts = {"f": nn.Linear(4, 4), "table": nn.Parameter(noise(2, 4))}
    bodies: dict[str, Callable[..., Tensor]] = {
        "added": lambda m, x: x + m.f(m.table).tanh() * 2,
        "a product": lambda m, x: x @ m.f(m.table).mT,
        "another table": lambda m, x: x * m.f(m.f(m.table) + m.table).sum(0),
        "indexed by rows": lambda m, x: m.f(m.table)[(x[:, :, 0] > 0).long()],
        "returned": lambda m, x: m.f(m.table),
    }
    for what, body in bodies.items():
        net, many = setting(body, {r"f\.": LoRA(2)}, **parts)
        x, s = noise(3, 2, 4), pf.stack(many)
        fixed = pf.adapt(net.model, {r"f\.": LoRA(2)}, routed=[])
        if what in ("indexed by rows", "returned"):
            with pytest.raises(ValueError, match=r"f\.weight: .*(cannot tell the rows|another for each row)"):
                fixed.mixed(s, INDEX, x)
        if what == "returned":
            with pytest.raises(ValueError, match=r"f\.weight: .*another for each row"):
                net.mixed(s, INDEX, x)
        else:
            close(net.mixed(s, INDEX, x), one_by_one(net, many, x))


@pytest.mark.parametrize("shared", [True, False])
def test_deberta_with_the_sites_that_peft_adapts(shared: bool) -> None:
    """Its relative positions are a parameter that goes through a norm and the projections of queries and keys."""
    zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = DebertaV2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        type_vocab_size=0, max_position_embeddings=16, relative_attention=True, pos_att_type=["p2c", "c2p"],
        share_att_key=shared, position_buckets=4, norm_rel_ebd="layer_norm", **zero,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DebertaV2Model(config).eval()
    more: dict[str, pf.Method] = {} if shared else {"pos_.*proj": LoRA(2)}
    net = pf.adapt(model, pf.targets(model, LoRA(2)) | more)
    many, ids = [random(net, i, scale=0.3) for i in range(2)], torch.randint(0, 32, (3, 7))
    weights = noise(16)

    def rows(s: Any) -> Tensor:
        out: Tensor = net.mixed(s, INDEX, ids).last_hidden_state
        return out

    def alone(s: Any) -> Tensor:
        each = zip(INDEX, ids.split(1), strict=True)
        return torch.cat([(net.apply(pf.unstack(s)[k], i) if k >= 0 else model(i)).last_hidden_state for k, i in each])

    s = pf.stack(many)
    assert (alone(s) - model(ids).last_hidden_state).abs().amax((1, 2))[[0, 2]].min() > 1e-2
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            close(rows(s), alone(s))
    close(vmap(rows)(pf.stack([s, s])), torch.stack([alone(s)] * 2))
    got, want = (grad(lambda s, f=f: (f(s) @ weights).square().mean())(s) for f in (rows, alone))
    trees_close(got, want, 1e-3)


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
    s, index, x = pf.stack(many), [1, -1, 0, 0], noise(4, 2, 4)
    with pytest.raises(ValueError, match=r"f\.weight: matmul"):
        pf.adapt(net.model, {r"f\.weight": LoRA(2)}, routed=[]).mixed(s, index, x)
    close(net.mixed(s, index, x), one_by_one(net, many, x, index=index))


@pytest.mark.parametrize("method", [LoRA(2), OFT(2)], ids=str)
def test_a_vector_of_features_is_no_batch(method: pf.Method) -> None:
    linear, many = setting(lambda m, x: m.f(x), {r"f\.weight": method}, f=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"f\.weight: its input has shape \[4\].*rows"):
        linear.mixed(pf.stack(many), [1, -1, 0, 0], noise(4))
    conv, many = setting(lambda m, x: m.f(x), {r"f\.weight": LoRA(2)}, f=nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match=r"f\.weight: its input has shape \[3, 5\].*rows"):
        conv.mixed(pf.stack(many), INDEX, noise(3, 5))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["a function", "a method", "a layer"])
def test_a_write_to_what_a_site_makes_of_a_table_reaches_that_of_every_row(how: str, mode: Any) -> None:
    """Or raises, where writes are not counted."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.f(m.table)
        if how == "a method":
            y.relu_()
        y = F.relu(y, inplace=True) if how == "a function" else m.act(y) if how == "a layer" else y
        return x + y

    parts = {"f": nn.Linear(4, 4), "table": nn.Parameter(noise(2, 4)), "act": nn.ReLU(inplace=True)}
    net, many = setting(forward, {r"f\.weight": LoRA(2)}, **parts)
    s, x = pf.stack(many), noise(3, 2, 4)
    with mode():
        if mode is torch.inference_mode:
            with pytest.raises(ValueError, match=r"f\.weight: .*writes to it in place"):
                net.mixed(s, INDEX, x)
        else:
            close(net.mixed(s, INDEX, x), one_by_one(net, many, x))


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
