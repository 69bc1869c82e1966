"""Rows followed through modules that move them: row i of a mixed batch is that row alone, or the site raises."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf
from support import close, random, state, trees_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

import peftfn as pf
from peftfn import IA3, DoRA, Full, LoHa, LoRA

INDEX = [2, -1, 0, 2, 1]
TEXT = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None},
}
EXPERTS = {r"experts": LoRA(2), r"gate\.weight|q_proj": LoRA(2)}
Inputs = dict[str, Tensor]


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(rows: int = 5, tokens: int = 7) -> Inputs:
    return {"input_ids": torch.randint(2, 60, (rows, tokens), generator=torch.Generator().manual_seed(1))}


def row(inputs: Inputs, i: int) -> Inputs:
    return {k: v[i : i + 1] for k, v in inputs.items()}


@dataclass(frozen=True)
class Case:
    """A model whose modules move rows, and how one calls it. how: what `mixed` takes beside the inputs."""

    name: str
    make: Callable[[], nn.Module]
    rules: dict[str, pf.Method]
    inputs: Inputs = field(default_factory=ids)
    row: Callable[[Inputs, int], Inputs] = row
    routed: list[str] | None = None
    how: dict[str, Any] = field(default_factory=dict)
    output: Callable[[Any], Tensor] = lambda y: y if isinstance(y, Tensor) else y.logits
    experts: tuple[str, ...] = ()
    generate: bool = True

    def net(self, experts: str = "") -> pf.Adapted:
        torch.manual_seed(0)
        model: Any = self.make().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.15 + (1.0 if p.dim() == 1 and p.mean() > 0.5 else 0.0))
        if experts:
            model.set_experts_implementation(experts)
        return pf.adapt(model, self.rules, routed=self.routed)

    def mixed(self, net: pf.Adapted, many: Any, index: Any = INDEX, **more: Any) -> Any:
        return net.mixed(many, index, **self.inputs, **self.how, **more)

    def alone(self, net: pf.Adapted, adapters: Any, i: int, **more: Any) -> Any:
        one, k = self.row(self.inputs, i), INDEX[i]
        if k >= 0:
            return net.apply(adapters[k], **one, **more)
        return getattr(net.model, more.pop("method", "forward"))(**one, **more)


def text(name: str, rules: dict[str, pf.Method], **config: Any) -> Case:
    """A language model of transformers, which runs experts in three ways."""
    kind = getattr(tf, f"{name}Config")
    known = {**TEXT, **config}
    ways = ("eager", "batched_mm", "grouped_mm")
    return Case(name, lambda: getattr(tf, f"{name}ForCausalLM")(kind(**known)), rules, experts=ways)


MOE = {"num_experts_per_tok": 2}
VISION = {
    **{"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    **{"temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3},
}
GRIDS = [(1, 4, 4), (1, 4, 8), (1, 8, 4), (1, 4, 4), (1, 4, 4)]
PATCHES = [t * h * w for t, h, w in GRIDS]


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    language = {**{k: v for k, v in TEXT.items() if not k.endswith("_id")}, "rope_parameters": rope}
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    c = tf.Qwen2VLConfig(vision_config=VISION, text_config=language, pad_token_id=0, eos_token_id=None, **tokens)
    return tf.Qwen2VLForConditionalGeneration(c)


def pictures() -> Inputs:
    """Five rows, each with an image of its own size: the patches of all are one after the other."""
    rows = []
    for i, n in enumerate(PATCHES):
        words = torch.randint(2, 59, (17 - n // 4,), generator=torch.Generator().manual_seed(i))
        rows.append(torch.cat([torch.tensor([5, 62]), torch.full((n // 4,), 60), torch.tensor([63]), words]))
    text = torch.stack(rows)
    return {
        **{"input_ids": text, "attention_mask": torch.ones_like(text), "mm_token_type_ids": (text == 60).long()},
        **{"pixel_values": noise(sum(PATCHES), 96), "image_grid_thw": torch.tensor(GRIDS)},
    }


def picture(inputs: Inputs, i: int) -> Inputs:
    out = row(inputs, i)
    out["pixel_values"] = inputs["pixel_values"].split(PATCHES)[i]
    return out


class Packed(nn.Module):
    """Sequences of several lengths in one line, attention within each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(12, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 6)

    def forward(self, patches: Tensor, lengths: Tensor) -> Tensor:
        x, sizes = self.embed(patches), lengths.tolist()
        parts = [part.split(sizes) for part in self.qkv(self.norm(x)).chunk(3, -1)]
        each = [F.scaled_dot_product_attention(*(t[None] for t in qkv))[0] for qkv in zip(*parts, strict=True)]
        x = x + self.proj(torch.cat(each))
        return self.head(torch.stack([p.mean(0) for p in x.split(sizes)]))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(16, 4), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return (x + self.down(self.up(x).relu())).transpose(0, 1)


class ListOfExperts(nn.Module):
    """Experts that are layers: each gets the tokens that choose it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 3), nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            where, at = torch.where(chosen == e)
            out.index_add_(0, where, expert(flat[where]) * weights[where, at, None])
        return out.view_as(x)


LENGTHS = torch.tensor([3, 5, 2, 4, 1])
CASES = [
    text("Mixtral", {**EXPERTS, "norm": Full()}, num_local_experts=4, **MOE),
    text("Qwen3Moe", EXPERTS, num_experts=4, moe_intermediate_size=12, head_dim=8, **MOE),
    text(
        *("GptOss", {r"experts\.(gate_up|down)_proj$": DoRA(2), r"router\.weight|q_proj": LoRA(2)}),
        **{"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"], **MOE},
    ),
    text(
        *("DeepseekV3", {r"\.experts": LoRA(2), r"gate\.weight|shared_experts|o_proj": LoRA(2)}),
        **{"moe_intermediate_size": 12, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
        **{"first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, **MOE},
        **{"qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    text(
        *("Qwen2Moe", {r"\.experts": IA3(feedforward=True), r"gate\.weight|shared_expert": LoRA(2)}),
        **{"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, **MOE},
    ),
    text("GraniteMoe", {"experts": LoHa(2)}, num_local_experts=4, **MOE),
    Case(
        *("Llama4, all experts in one product", lambda: tf.Llama4ForCausalLM(llama4()), {"experts": LoRA(2)}),
    ),
    Case(
        *("OPT", lambda: tf.OPTForCausalLM(opt()), {"fc1|fc2|q_proj": LoRA(2), "fc1.bias": Full()}),
        routed=[r"layers\.\d+$"],
    ),
    Case(
        *(
            "Mixtral, the whole model",
            lambda: tf.MixtralForCausalLM(mixtral()),
            {"experts|embed_tokens|lm_head": LoRA(2)},
        ),
        routed=[""],
    ),
    Case(
        *("Qwen2-VL", qwen2_vl, {r"visual.*(qkv|proj|fc1|fc2|mlp).*weight|q_proj": LoRA(2)}, pictures(), picture),
        routed=["^model.visual$"],
        how={"owners": {"model.visual": torch.arange(5).repeat_interleave(torch.tensor(PATCHES))}},
    ),
    Case(
        *("Swin", lambda: tf.SwinForImageClassification(swin()), {"attention.*weight|mlp.*weight|classifier": LoRA(2)}),
        inputs={"pixel_values": noise(5, 3, 32, 32)},
        routed=[r"blocks\.\d+$"],
        generate=False,
    ),
    Case(
        *("packed", Packed, {"embed|qkv|proj|norm|head": LoRA(2)}, {"patches": noise(15, 12), "lengths": LENGTHS}),
        row=lambda inputs, i: {
            "patches": inputs["patches"].split(LENGTHS.tolist())[i],
            "lengths": inputs["lengths"][i : i + 1],
        },
        routed=[""],
        how={"owners": {"": torch.arange(5).repeat_interleave(LENGTHS)}},
        generate=False,
    ),
    Case(
        *("sequence first", SequenceFirst, {"attention|up|down": LoRA(2)}, {"x": noise(5, 7, 16)}),
        routed=[""],
        generate=False,
    ),
    Case("list of experts", ListOfExperts, {"experts|router": LoRA(2)}, {"x": noise(5, 7, 16)}, generate=False),
]


def mixtral(**more: Any) -> Any:
    return tf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2, **more)


def opt() -> Any:
    size = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return tf.OPTConfig(**size, max_position_embeddings=64, word_embed_proj_dim=16, **special)


def swin() -> Any:
    size = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4}
    return tf.SwinConfig(**size, num_labels=5, drop_path_rate=0.0)


def llama4() -> Any:
    more = {"intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}
    kinds = {"interleave_moe_layer_step": 1, "attn_temperature_tuning": False, "attention_chunk_size": 32}
    return tf.Llama4TextConfig(**TEXT, **more, **kinds)


WAYS = [(case, way) for case in CASES for way in case.experts or ("",)]


@pytest.mark.parametrize(("case", "way"), WAYS, ids=[f"{case.name} {way}".strip() for case, way in WAYS])
def test_a_row_of_a_mixed_batch_is_that_row_alone(case: Case, way: str) -> None:
    """Outputs, gradients of every leaf, and tokens that are generated."""
    net = case.net(way)
    adapters = [_leaf(random(net, s)) for s in range(3)]
    many = _leaf(pf.stack(adapters))
    got = case.output(case.mixed(net, many))
    singles = [case.output(case.alone(net, adapters, i)) for i in range(5)]
    close(got, torch.cat(singles), 2e-5)
    plain = torch.cat([case.output(net.model(**case.row(case.inputs, i))) for i in range(5)])
    assert (torch.cat(singles) - plain).abs().max() > 1e-3, "the adapters do nothing: this would be no check"
    weights = noise(*got.shape)
    (got * weights).sum().backward()
    (torch.cat(singles) * weights).sum().backward()
    for n, leaf in many.items():
        for key, t in leaf.items():
            want = torch.stack([_grad(a[n][key]) for a in adapters])
            close(_grad(t) / want.abs().max().clamp(min=1), want / want.abs().max().clamp(min=1), 1e-4)
    if case.generate:
        more = {"max_new_tokens": 3, "do_sample": False, "method": "generate"}
        with torch.no_grad():
            tokens = case.mixed(net, many, **more)
            assert torch.equal(tokens, torch.cat([case.alone(net, adapters, i, **more) for i in range(5)]))


def _leaf(a: Any) -> Any:
    return {n: {k: t.detach().clone().requires_grad_() for k, t in leaf.items()} for n, leaf in a.items()}


def _grad(t: Tensor) -> Tensor:
    return torch.zeros_like(t) if t.grad is None else t.grad


# Forwards that move positions in ways of their own: right, or an error; never another row's adapter.


class Strange(nn.Module):
    """`move` gives the site positions in another order or number, and what puts its outputs back."""

    def __init__(self, move: Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]):
        super().__init__()
        self.f, self.move = nn.Linear(8, 8), move

    def forward(self, x: Tensor) -> Tensor:
        moved, back = self.move(x.flatten(0, 1))
        return back(self.f(moved)).view_as(x)


def some_order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def by_argsort(x: Tensor) -> Any:
    order = x[:, 0].argsort()
    return x[order], lambda y: y[order.argsort()]


def back_by_writing(x: Tensor) -> Any:
    order = some_order(len(x))

    def back(y: Tensor) -> Tensor:
        out = torch.empty_like(y)
        out[order] = y
        return out

    return x[order], back


def by_writing(x: Tensor) -> Any:
    order, z = some_order(len(x)), torch.zeros_like(x)
    z[order] = x
    return z, lambda y: y[order]


def into_places(x: Tensor) -> Any:
    """Padded places for each of three experts."""
    n = torch.arange(len(x))
    z = x.new_zeros(3, (len(x) + 2) // 3, 8)
    z[n % 3, n // 3] = x
    return z, lambda y: y[n % 3, n // 3]


def by_one_hot(x: Tensor) -> Any:
    m = F.one_hot(some_order(len(x)), len(x)).to(x.dtype)
    return m @ x, lambda y: m.T @ y


def by_index_add(x: Tensor) -> Any:
    order = some_order(len(x))
    return torch.zeros_like(x).index_add(0, order, x), lambda y: y[order]


def sums_of_two(x: Tensor) -> Any:
    half = len(x) // 2
    z = torch.zeros(half, 8).index_add(0, torch.arange(len(x)) % half, x)
    return z, lambda y: y.repeat(2, 1)


def through_numpy(x: Tensor) -> Any:
    return torch.from_numpy(x.detach().flip(0).numpy()), lambda y: y.flip(0)


def into_numpy(x: Tensor) -> Any:
    z = x.detach().clone()
    z.numpy()[:] = x.detach().flip(0).clone().numpy()
    return z, lambda y: y.flip(0)


def without_a_rule(x: Tensor) -> Any:
    return torch.cdist(x, x)[:, :8], lambda y: y


def rolled(x: Tensor) -> Any:
    return x.roll(3, 0), lambda y: y.roll(-3, 0)


def by_mask(x: Tensor) -> Any:
    keep = torch.arange(len(x)) % 2 == 0

    def back(y: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[keep] = y
        return out

    return x[keep], back


def interleaved(x: Tensor) -> Any:
    return torch.cat([x[::2], x[1::2]]), lambda y: torch.stack(y.chunk(2), 1).flatten(0, 1)


def copied(x: Tensor) -> Any:
    order, z = some_order(len(x)), x.clone()
    z.copy_(x[order])
    return z, lambda y: y[order.argsort()]


def through_views(z: Tensor, x: Tensor) -> Any:
    half = len(x) // 2
    first, last = x[:half].clone(), x[half:].clone()
    z[:half].copy_(last)
    z[half:].copy_(first)
    return z, lambda y: torch.cat([y[half:], y[:half]])


def views_of_a_fresh_buffer(x: Tensor) -> Any:
    return through_views(torch.zeros_like(x), x)


def views_of_a_known_one(x: Tensor) -> Any:
    return through_views(x.clone(), x)


def through_a_kept_view(x: Tensor) -> Any:
    z = x.clone()
    z.detach().copy_(x.flip(0))
    return z, lambda y: y.flip(0)


def through_data(x: Tensor) -> Any:
    z = x.clone()
    z.data[:] = x.flip(0)
    return z, lambda y: y.flip(0)


def through_the_data_of_a_view(x: Tensor) -> Any:
    z = x.clone()
    z.view(2, -1, 8).data[:] = x.flip(0).view(2, -1, 8)
    return z, lambda y: y.flip(0)


def given_out(x: Tensor) -> Any:
    z = x.clone()
    torch.index_select(x.detach().flip(0), 0, torch.arange(len(x)), out=z.detach())
    return z, lambda y: y.flip(0)


def sorted_features(x: Tensor) -> Any:
    return x.sort(0).values, lambda y: y


def turned_in_place(x: Tensor) -> Any:
    z = x.clone().view(4, 6, 8)
    z.transpose_(0, 1)
    return z.reshape(-1, 8), lambda y: y.view(6, 4, 8).transpose(0, 1).flatten(0, 1)


def stacked_under_one_another(x: Tensor) -> Any:
    return x.unfold(0, 2, 2).mT.flatten(0, 1), lambda y: y


def besides_another_rows_token(x: Tensor) -> Any:
    """Each row gets the first token of what the model takes for its own, as TimeSformer does."""
    z = x.view(4, 6, 8)
    z = torch.cat([z.flatten(0, 1)[:4, None], z], 1)
    return z, lambda y: y[:, 1:].flatten(0, 1)


def with_other_strides(x: Tensor) -> Any:
    """Each position but the ends twice, as Longformer's chunks overlap."""
    z = x.clone().as_strided((4, 2, 5, 8), (48, 8, 8, 1))  # of six tokens, the first and the last five
    return z.reshape(-1, 8), lambda y: torch.cat([y.view(4, 2, 5, 8)[:, 0], y.view(4, 2, 5, 8)[:, 1, 4:]], 1)


def over_the_end(x: Tensor) -> Any:
    z = torch.cat([x, torch.zeros(4, 8)])[: len(x)]
    return z.as_strided(x.shape, x.stride(), 16), lambda y: y


def as_columns(x: Tensor) -> Any:
    z = F.unfold(x.view(4, 2, 4, 6), (2, 3), stride=(2, 3))  # [4, 12, 4]
    return z.mT.reshape(24, 8), lambda y: y


def from_a_table_of_places(x: Tensor) -> Any:
    grid = (x.view(4, 6, 1, 8)[..., :2]).tanh()
    z = F.grid_sample(noise(4, 8, 3, 3), grid, align_corners=False)  # [4, 8, 6, 1]
    return z.squeeze(-1).mT.reshape(24, 8), lambda y: y


RIGHT = [by_argsort, back_by_writing, by_writing, into_places, by_index_add, rolled, by_mask, interleaved, copied]
RIGHT += [with_other_strides, as_columns, from_a_table_of_places]
LOST = [
    *(by_one_hot, sums_of_two, into_numpy, without_a_rule, given_out, over_the_end),
    *(views_of_a_known_one, through_a_kept_view, through_data, through_the_data_of_a_view, sorted_features),
    *(turned_in_place, besides_another_rows_token),
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("move", [*RIGHT, stacked_under_one_another, *LOST], ids=lambda f: f.__name__)
def test_positions_that_are_moved_in_strange_ways(move: Any, mode: Any) -> None:
    """Each of `RIGHT` gives every row its own adapter; each of `LOST` raises at the site, which it names."""
    torch.manual_seed(0)
    net = pf.adapt(Strange(move), {"f": LoRA(2)}, routed=[""])
    adapters, x, index = [random(net, s) for s in range(2)], noise(4, 6, 8), [1, -1, 0, 1]
    with mode():
        if move in LOST:
            with pytest.raises(ValueError, match=r"f\.weight: the rows of its input \[.*\] are not known"):
                net.mixed(pf.stack(adapters), index, x)
            return
        each = [net.model(x), *(net.apply(a, x) for a in adapters)]
        close(net.mixed(pf.stack(adapters), index, x), torch.stack([each[k + 1][i] for i, k in enumerate(index)]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("move", [through_numpy, views_of_a_fresh_buffer], ids=lambda f: f.__name__)
def test_positions_that_are_nobodys_are_computed_for_each_row(move: Any, mode: Any) -> None:
    """Where they meet a row again, it is told which of them it gets; as an output, it is not."""
    torch.manual_seed(0)
    with mode():
        for again in (False, True):

            def moved(x: Tensor, again: bool = again) -> Any:
                z, back = move(x)
                return z, lambda y: 0.5 * x + back(y) if again else back(y)

            net = pf.adapt(Strange(moved), {"f": LoRA(2)}, routed=[""])
            adapters, x, index = [random(net, s) for s in range(2)], noise(4, 6, 8), [1, -1, 0, 1]
            if not again:
                with pytest.raises(ValueError, match=r"f\.weight: the model returns what this site gives"):
                    net.mixed(pf.stack(adapters), index, x)
                continue
            each = [net.model(x), *(net.apply(a, x) for a in adapters)]
            close(net.mixed(pf.stack(adapters), index, x), torch.stack([each[k + 1][i] for i, k in enumerate(index)]))


class Pictures(nn.Module):
    """The patches of all rows' pictures are one line, which nothing says whose they are, until they are put among
    tokens. generate's way: `get_image_features` comes before any forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.norm, self.f = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def get_image_features(self, patches: Tensor) -> Tensor:
        return self.tower(self.norm(patches) if patches.dim() == 2 else self.norm(patches.flatten(0, 1))).relu_()

    def forward(self, x: Tensor, patches: Tensor, places: Tensor) -> Tensor:
        return self.f(x.masked_scatter(places[..., None], self.get_image_features(patches))).tanh()

    def ahead(self, x: Tensor, patches: Tensor, places: Tensor) -> Tensor:
        return self.get_image_features(patches).view(len(x), -1, 8).sum(1) + self(x, patches, places).sum(1)


@pytest.mark.parametrize("rules", [{"tower|f": LoRA(2)}, {"tower|f": DoRA(2), "norm|bias": Full()}], ids=str)
def test_patches_in_one_line_need_no_owners(rules: dict[str, pf.Method]) -> None:
    """Right without them, forward and backward; owners say the same, and compute each patch once."""
    torch.manual_seed(0)
    net = pf.adapt(Pictures(), rules)
    adapters, index = [random(net, s) for s in range(2)], [1, -1, 0]
    x, patches = noise(3, 4, 8), noise(6, 8, seed=1)
    places = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    many = _leaf(pf.stack(adapters))
    got = net.mixed(many, index, x, patches, places)
    rows = [(x[i : i + 1], patches[2 * i : 2 * i + 2], places[i : i + 1]) for i in range(3)]
    a = [_leaf(b) for b in adapters]
    want = torch.cat([net.apply(a[k], *row) if k >= 0 else net.model(*row) for k, row in zip(index, rows, strict=True)])
    close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    trees_close(
        {n: {k: _grad(t) for k, t in leaf.items()} for n, leaf in many.items()},
        {n: {k: torch.stack([_grad(b[n][k]) for b in a]) for k in leaf} for n, leaf in many.items()},
    )
    with torch.no_grad():
        owners = {"tower": torch.arange(3).repeat_interleave(2)}
        if "norm|bias" not in rules:
            close(net.mixed(many, index, x, patches, places, owners=owners), want)
        many_patches = patches.view(3, 2, 8)
        got = net.mixed(many, index, x, many_patches, places, method="ahead")
        each = [
            net.apply(a[k], *row, method="ahead") if k >= 0 else net.model.ahead(*row)
            for k, row in zip(index, ((p, q, r) for p, q, r in rows), strict=True)
        ]
        close(got, torch.cat(each))


TABLES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "in place": (lambda y, x: x + y.relu_(), ""),
    "an item": (lambda y, x: x * y.sum().item(), "reads its values"),
    "a condition that all meet": (lambda y, x: x * y.sum() if y.square().sum() > 0 else x, ""),
    "into a buffer": (lambda y, x: x + torch.zeros(3, 8).index_copy_(0, torch.arange(3), y), "into another tensor"),
    "by a number": (lambda y, x: x * y.sum(), ""),
    "seen before": (lambda y, x: (y.view(-1), y.add_(x), x * y)[2], "writes to it in place"),
    "at the ends": (lambda y, x: torch.cat([x, y.expand(4, 3, 8)], 1), ""),
}


@pytest.mark.parametrize("case", TABLES)
def test_what_a_site_makes_of_an_input_of_all_rows_is_each_rows_own(case: str) -> None:
    """Right, or an error: never the first row's for all."""
    use, why = TABLES[case]

    class Common(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return use(self.f(noise(3, 8, seed=2)), x)

    torch.manual_seed(0)
    net = pf.adapt(Common(), {"f": LoRA(2)}, routed=[""])
    adapters, x, index = [random(net, s) for s in range(2)], noise(4, 3, 8), [1, -1, 0, 1]
    if why:
        with pytest.raises(ValueError, match=rf"f\.weight: all rows have its input in common.*{why}"):
            net.mixed(pf.stack(adapters), index, x)
        return
    each = [net.model(x), *(net.apply(a, x) for a in adapters)]
    close(net.mixed(pf.stack(adapters), index, x), torch.stack([each[k + 1][i] for i, k in enumerate(index)]))


WEIGHTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "transposed": lambda m, x: x @ m.f.weight.T + x @ m.f.weight.t().mT.transpose(0, 1),
    "normalised": lambda m, x: x @ F.normalize(m.f.weight).T + m.f.weight.square().sum(),
    "in groups": lambda m, x: (
        torch.bmm(x.reshape(-1, 2, 4).transpose(0, 1), m.f.weight.view(2, 8, 4).transpose(1, 2))
        .transpose(0, 1)
        .reshape(*x.shape[:2], 16)
    ),
    "indexed": lambda m, x: m.f.weight[x[..., 0].gt(0).long()] + m.f.weight.T[x[..., :1].lt(0).long(), :8].squeeze(2),
    "on the left": lambda m, x: (m.f.weight @ x.mT).mT,
    "scaled by one": lambda m, x: m.f.weight.div_(1) is None or m.f(x),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_functions_of_the_weight_itself(case: str) -> None:
    """Each row has those of its own weight."""

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return WEIGHTS[case](self, x)

    torch.manual_seed(0)
    net = pf.adapt(Uses(), {"f.weight": LoRA(2)})
    adapters, x, index = [random(net, s) for s in range(2)], noise(3, 5, 8), [1, -1, 0]
    zero = pf.scale(adapters[0], 0.0)
    want = torch.cat([net.apply(adapters[k] if k >= 0 else zero, x[i : i + 1]) for i, k in enumerate(index)])
    close(net.mixed(pf.stack(adapters), index, x), want)


def test_a_weight_that_the_model_scales_is_refused() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            assert not hasattr(self.f.weight, "SCB")
            self.f.weight.div_(2)
            return self.f(x)

    net = pf.adapt(Scales(), {"f.weight": LoRA(2)})
    with pytest.raises(ValueError, match=r"f\.weight: the model scales the weight in place, by 2"):
        net.mixed(pf.stack([random(net, s) for s in range(2)]), [0, 1, -1], noise(3, 8))
    with pytest.raises(RuntimeError, match=r"f\.weight: scaling it in place by 2 would write"):
        net.apply(random(net), noise(3, 8))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], first: bool):
        super().__init__()
        self.rnn, self.first = kind(8, 6, 2, bidirectional=True, batch_first=first), first

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x if self.first else x.transpose(0, 1))
        y, h = y if self.first else y.transpose(0, 1), state[0] if isinstance(state, tuple) else state
        return torch.cat([y.flatten(1), h.transpose(0, 1).flatten(1)], 1)


@pytest.mark.parametrize("first", [True, False], ids=["rows first", "sequence first"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase], first: bool) -> None:
    torch.manual_seed(0)
    net = pf.adapt(Recurrent(kind, first), {r"weight_.h_l\d": LoRA(2)})
    adapters, x, index = [random(net, s) for s in range(2)], noise(4, 5, 8), [1, -1, 0, 1]
    many = _leaf(pf.stack(adapters))
    got = net.mixed(many, index, x)
    a = [_leaf(b) for b in adapters]
    rows = [x[i : i + 1] for i in range(4)]
    want = torch.cat([net.apply(a[k], row) if k >= 0 else net.model(row) for k, row in zip(index, rows, strict=True)])
    close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for n, leaf in many.items():
        for k, t in leaf.items():
            close(_grad(t), torch.stack([_grad(b[n][k]) for b in a]))


def test_the_error_says_which_function_lost_the_rows_and_what_to_do() -> None:
    net = pf.adapt(Strange(without_a_rule), {"f": LoRA(2)}, routed=[""])
    many = pf.stack([net.init(s) for s in range(2)])
    with pytest.raises(ValueError, match=r"f\.weight: .*cdist has no rule.*Call net\.apply.*leave this site out"):
        net.mixed(many, [1, 0, 0, 1], noise(4, 6, 8))
    with pytest.raises(ValueError, match=r"f\.weight: its input has shape \[24, 8\].*adapt\(…, routed=\[…\]\)"):
        pf.adapt(net.model, {"f": LoRA(2)}, routed=[]).mixed(many, [1, 0, 0, 1], noise(4, 6, 8))
    with pytest.raises(ValueError, match=r"f\.weight: its input has shape \[24, 8\].*whole model.*cdist has no rule"):
        pf.adapt(net.model, {"f": LoRA(2)}).mixed(many, [1, 0, 0, 1], noise(4, 6, 8))


class Keeps(list[Any]):
    """A cache, say."""


class Shuffled(nn.Module):
    """Drops values and moves its tokens. before: what it does with its inputs first."""

    def __init__(self, before: Callable[..., Any]):
        super().__init__()
        self.f, self.before = nn.Linear(8, 8), before

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        self.before(x, *more)
        order = some_order(x.shape[0] * x.shape[1])
        return self.f(F.dropout(x).flatten(0, 1)[order])[order.argsort()].view_as(x)


def shuffled(before: Callable[..., Any]) -> tuple[pf.Adapted, Any]:
    net = pf.adapt(Shuffled(before), {"f": LoRA(2)})
    return net, pf.stack([random(net, s) for s in range(2)])


def test_a_net_that_loses_rows_follows_them_through_the_whole_model_from_then_on() -> None:
    """The call that finds out has the random numbers of any other call, and later ones run once."""
    calls: list[Tensor] = []
    net, many = shuffled(calls.append)
    x, index, outputs = noise(4, 6, 8), [1, -1, 0, 1], []
    for runs in (2, 1):
        torch.manual_seed(3)
        calls.clear()
        outputs.append(net.mixed(many, index, x))
        assert len(calls) == runs
    assert torch.equal(*outputs)
    torch.manual_seed(3)
    close(outputs[0], pf.adapt(net.model, {"f": LoRA(2)}, routed=[""]).mixed(many, index, x))
    a = {n: {k: t[1] for k, t in leaf.items()} for n, leaf in many.items()}
    torch.manual_seed(3)
    close(outputs[0][[0, 3]], net.apply(a, x)[[0, 3]])
    several = pf.Nets([pf.adapt(net.model, {"f": LoRA(2)})])
    torch.manual_seed(3)
    assert torch.equal(several.mixed([many], index, x), outputs[0])
    with torch.no_grad():
        two = {n: {k: torch.stack([t, 2 * t]) for k, t in leaf.items()} for n, leaf in many.items()}
        fresh = pf.adapt(net.model, {"f": LoRA(2)})
        torch.manual_seed(3)
        got = vmap(lambda m: fresh.mixed(m, index, x), randomness="same")(two)
        close(got[0], outputs[0])


def test_a_call_that_cannot_start_anew_says_so_and_names_the_cure() -> None:
    """It has written to its input, or has an object among its arguments that may keep what it has seen."""
    x, index = noise(4, 6, 8), [1, -1, 0, 1]
    kept = Keeps()
    for how, more in ((lambda x: x.mul_(2), ()), (lambda x, seen: seen.append(x), (kept,))):
        net, many = shuffled(how)
        with pytest.raises(
            ValueError, match=r"f\.weight: its input has shape \[24, 8\].*the whole model, in adapt\(…, routed=\[…\]\)"
        ):
            net.mixed(many, index, x.clone(), *more)
    assert len(kept) == 1


# What surrounds a call.


@pytest.fixture(scope="module")
def moe() -> tuple[pf.Adapted, list[pf.Adapter]]:
    net = CASES[0].net()
    return net, [random(net, s) for s in range(3)]


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_vmap_over_stacks_and_their_gradients(moe: Any, way: str) -> None:
    net, adapters = moe
    net.model.set_attn_implementation("eager")
    net.model.set_experts_implementation(way)
    many, inputs = pf.stack(adapters), ids()

    def loss(many: Any) -> Tensor:
        return net.mixed(many, INDEX, **inputs, use_cache=False).logits.square().mean()

    two = {n: {k: torch.stack([t, 0.5 * t]) for k, t in leaf.items()} for n, leaf in many.items()}
    each = [{n: {k: t[i] for k, t in leaf.items()} for n, leaf in two.items()} for i in range(2)]
    close(vmap(loss)(two), torch.stack([loss(m) for m in each]))
    got, want = vmap(grad(loss))(two), [grad(loss)(m) for m in each]
    trees_close(got, {n: {k: torch.stack([w[n][k] for w in want]) for k in leaf} for n, leaf in two.items()})
    net.model.set_experts_implementation("eager")


def test_gradient_checkpointing_and_gates(moe: Any) -> None:
    net, adapters = moe
    many, inputs = pf.stack(adapters), ids()
    own = F.one_hot(torch.tensor(INDEX) + 1, 4)[:, 1:].float()
    halves = net.gated(many, 0.5 * own, **inputs).logits
    close(net.gated(many, 0.5 * own[:, None].expand(5, 7, 3).clone(), **inputs).logits, halves)
    close(halves[0:1], net.gated(many, torch.tensor([0.0, 0.0, 0.5]), **{k: v[:1] for k, v in inputs.items()}).logits)
    made = pf.adapt(net.model, EXPERTS)  # of each site's input: there is nothing to follow
    third = {n: many[n] for n in made.plan}
    got = made.gated(third, lambda _, x: x.new_tensor([0.0, 0.0, 1.0]).expand(len(x), 3), **inputs).logits
    close(got[:1], made.mixed(third, INDEX, **inputs).logits[:1])
    for routed in (None, [""]):
        model = CASES[0].net().model.train()
        again = pf.adapt(model, CASES[0].rules, routed=routed)
        plain = _leaf(many)
        again.mixed(plain, INDEX, **inputs).logits.square().mean().backward()
        model.activation_checkpointing_enable()
        less = _leaf(many)
        pf.adapt(model, CASES[0].rules, routed=routed).mixed(less, INDEX, **inputs).logits.square().mean().backward()
        trees_close(*({n: {k: _grad(t) for k, t in leaf.items()} for n, leaf in a.items()} for a in (less, plain)))


def test_a_compiled_mixed_batch_runs_as_it_is_and_fullgraph_names_the_routed_modules(moe: Any) -> None:
    """What is around the call is compiled. Neither leaves a lock or a full slot behind: another thread runs it too."""
    net, adapters = moe
    many, given, before = pf.stack(adapters), ids()["input_ids"], state(net.model)
    want = net.mixed(many, INDEX, given).logits
    run = lambda many, given: net.mixed(many, INDEX, given).logits * 2  # noqa: E731
    for fullgraph in (False, True, False):
        torch._dynamo.reset()  # what was compiled for this code before is not used again
        compiled = torch.compile(run, backend="eager", fullgraph=fullgraph)
        if fullgraph:
            with pytest.raises(
                torch._dynamo.exc.Unsupported,
                match=r"rows through the routed modules model\.layers\.0\.mlp, .*Leave out fullgraph=True",
            ):
                compiled(many, given)
        else:
            close(compiled(many, given), 2 * want)
        with ThreadPoolExecutor(1) as pool:
            close(pool.submit(lambda: net.mixed(many, INDEX, given).logits).result(timeout=60), want)
    got, wanted = (grad(lambda many, f=f: f(many, given).square().mean())(many) for f in (compiled, run))
    trees_close(got, wanted)
    assert len(net._runner._idle) == 1
    assert str(state(net.model)) == str(before)
    toy = pf.adapt(ListOfExperts(), {"experts|router": LoRA(2)})  # its forward looks at no value if no row differs
    with pytest.raises(torch._dynamo.exc.Unsupported, match="rows through the routed modules the model, "):
        torch.compile(toy.mixed, backend="eager", fullgraph=True)(
            pf.stack([toy.init(s) for s in range(2)]), [0, 1], noise(2, 7, 16)
        )


@pytest.mark.parametrize("method", [DoRA(2), IA3(), LoHa(2), Full()], ids=str)
def test_every_kind_of_method_at_experts(method: pf.Method) -> None:
    case = Case("", CASES[0].make, {r"experts\.\w+_proj": method})
    for way in ("eager", "grouped_mm"):
        net = case.net(way)
        adapters = [random(net, s) for s in range(3)]
        with torch.no_grad():
            got = case.output(case.mixed(net, pf.stack(adapters)))
            close(got, torch.cat([case.output(case.alone(net, adapters, i)) for i in range(5)]))


def test_experts_in_a_bank_and_in_several_nets(moe: Any) -> None:
    net, adapters = moe
    other = pf.adapt(net.model, {r"gate_up_proj": DoRA(3), "o_proj": IA3()})
    b = random(other)
    bank = pf.bank({"a": (net, adapters[0]), "b": (other, b)})
    with torch.no_grad():
        got = bank.apply(["b", "__base__", "a", "b", "a"], **ids()).logits
        rows = [row(ids(), i) for i in range(5)]
        runs = [other.apply(b, **rows[0]), net.model(**rows[1]), net.apply(adapters[0], **rows[2])]
        runs += [other.apply(b, **rows[3]), net.apply(adapters[0], **rows[4])]
        close(got, torch.cat([y.logits for y in runs]))


def test_a_net_without_routed_modules_pays_nothing() -> None:
    """Counted in Python calls: not one is made of the files that follow rows."""
    import sys

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))
    net = pf.adapt(model, {"0|3": LoRA(2), "2": Full()})
    many, seen = pf.stack([net.init(s) for s in range(2)]), []

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call" and "peftfn/slots" in frame.f_code.co_filename:
            seen.append((frame.f_code.co_filename.rpartition("/slots/")[2], frame.f_code.co_name))

    sys.setprofile(count)
    try:
        net.mixed(many, [1, -1, 0], noise(3, 8))
    finally:
        sys.setprofile(None)
    following = ("track.py", "following/", "tags.py", "routed.py", "experts.py")
    assert seen
    assert not [call for call in seen if call[0].startswith(following)]


@pytest.mark.parametrize(
    ("f", "most"),
    [(lambda x: x + x, 9), (lambda x: x.reshape(-1, 8), 11), (lambda x: x[0], 13), (lambda x: x.shape, 1)],
)
def test_what_it_costs_to_follow_a_function(f: Callable[[Tensor], Any], most: int) -> None:
    """In Python calls of ours, which no other work on the machine changes."""
    import sys

    class Many(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.layer, self.times = nn.Linear(8, 8), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                f(x)
            return self.layer(x)

    counts = []
    for times in (0, 100):
        net = pf.adapt(Many(times), {"layer": LoRA(2)}, routed=[""])
        many, x, seen = pf.stack([net.init(s) for s in range(2)]), noise(4, 6, 8), [0]

        def count(frame: Any, event: str, _: Any, seen: list[int] = seen) -> None:
            seen[0] += event == "call" and "/peftfn/" in frame.f_code.co_filename

        with torch.no_grad():
            net.mixed(many, [1, -1, 0, 1], x)
            sys.setprofile(count)
            try:
                net.mixed(many, [1, -1, 0, 1], x)
            finally:
                sys.setprofile(None)
        counts += seen
    assert 0 < (counts[1] - counts[0]) / 100 <= most


# Bad input.


def test_bad_owners_and_patterns_are_told_before_any_work() -> None:
    model = Packed()
    with pytest.raises(ValueError, match=r"routed: 'blocks' finds none of the 6 modules"):
        pf.adapt(model, {"qkv": LoRA(2)}, routed=["blocks"])
    net = pf.adapt(model, {"qkv": LoRA(2)}, routed=[""])
    many, x = pf.stack([net.init(s) for s in range(3)]), noise(15, 12)

    def mixed(owners: Any, of: pf.Adapted = net) -> Any:
        return of.mixed(many, INDEX, x, LENGTHS, owners=owners)

    with pytest.raises(ValueError, match=r"owners: the model gets inputs of shapes \[\[15, 12\], \[5\]\].*\[14\]"):
        mixed({"": torch.zeros(14, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"owners: '' names row 7, and the batch has 5 rows"):
        mixed({"": torch.arange(15) // 2})
    with pytest.raises(ValueError, match=r"owners: 'embed' is no routed module.*routed=\[…\]"):
        mixed({"embed": torch.zeros(15, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"owners: '' has a torch.float32 tensor"):
        mixed({"": torch.zeros(15)})
    with pytest.raises(ValueError, match=r"owners: '' is no routed module.*routed=\[…\]"):
        mixed({"": torch.zeros(15, dtype=torch.long)}, pf.adapt(model, {"qkv": LoRA(2)}, routed=[]))
    with pytest.raises(ValueError, match=r"owners: 'embedding' is no routed module"):
        mixed({"embedding": torch.zeros(15, dtype=torch.long)}, pf.adapt(model, {"qkv": LoRA(2)}))
