"""LLaMA-Adapter: attention(x) + O(g·softmax(q Kᵀ/√h) V), K and V the attention's own projections of trained tokens."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import Companion, ModuleMethod
from peftfn.core.rng import Rng
from peftfn.methods.parts.cache import refuse_sharded_heads
from peftfn.model.place import Place
from peftfn.tensors.states import states_in, states_out

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")
GPT2 = ("c_attn", "split_size", "head_dim")
"""What an attention of a kind has."""


@dataclass(frozen=True)
class LlamaAdapter(ModuleMethod):
    """attention(x) + O(g·softmax(q Kᵀ/√h) V) with K, V the attention's own projections of n trained tokens P [n, d].

    q are the attention's own queries, rotated to their positions; the tokens have no positions. g is one number, which
    starts at 0, and h the size of a head. All projections are those of the call, adapted where the net adapts them. At
    GPT-2's attention, whose c_attn makes all three, nothing is rotated, and there is no O, as in PEFT.

    Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", 2023,
    arXiv:2303.16199.

    Trainable parameters per site: n·d + 1. Use it at the attention of the last layers of a model made as Llama
    or GPT-2 is.

    Args:
        n: trained tokens.

    Example:
        import transformers as tf
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {"self_attn": pf.LlamaAdapter(n=3)})
        y = net.apply(net.init(seed=0), torch.tensor([[1, 2, 3]])).logits
    """

    cases: ClassVar[Cases] = ({"n": 3},)

    n: PositiveInt = 10

    def init(self, rng: Rng, m: Place) -> Leaf:
        lacking = [k for k in LLAMA if not hasattr(m.module, k)]
        if lacking and not gpt2(m.module):
            raise ValueError(
                f"a {type(m.module).__name__} has no {', '.join(lacking)}: name an attention made as Llama's is, with "
                "q_proj, k_proj, v_proj and o_proj, or as GPT-2's with c_attn; its usual name is self_attn, or attn"
            )
        return {"prompt": rng.normal(self.n, m.width), "gate": rng.zeros(1)}

    def companions(self, m: Place, model: Any) -> tuple[Companion, ...]:
        refuse_sharded_heads(m, "its gate and prompt act on every head")
        return super().companions(m, model)

    def leave(self, p: Leaf, m: Place, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        a: Any = m.module  # its projections are those of this call
        (x, _), (y, put) = states_in(args, kwargs), states_out(out)
        given = {**dict(zip(m.arguments, args, strict=False)), **kwargs}
        h = a.head_dim
        prompt = p["prompt"].to(y.dtype)[None]
        if gpt2(a):
            (q, _, _), (_, k, v) = (a.c_attn(t).split(a.split_size, -1) for t in (x, prompt))
        else:
            q, k, v = a.q_proj(x), a.k_proj(prompt), a.v_proj(prompt)
        q, k, v = (heads(t, h) for t in (q, k, v))
        q = q if gpt2(a) else rotated(q, *given["position_embeddings"])
        groups = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
        weights = torch.softmax(q @ k.mT / h**0.5, -1, dtype=torch.float32).to(q.dtype)
        mixed = ((p["gate"].to(q.dtype) * weights) @ v).transpose(-3, -2).flatten(-2)
        return put(y + (mixed if gpt2(a) else a.o_proj(mixed)).to(y.dtype))


def gpt2(attention: Any) -> bool:
    """Whether an attention is made as GPT-2's is; one of cross attention is not."""
    return all(hasattr(attention, k) for k in GPT2) and not getattr(attention, "is_cross_attention", False)


def heads(t: Tensor, size: int) -> Tensor:
    """[…, tokens, heads·size] ↦ […, heads, tokens, size]"""
    return t.unflatten(-1, (-1, size)).transpose(-3, -2)


def rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries […, heads, tokens, size] at the positions that cos and sin […, tokens, size] are of."""
    half = q.shape[-1] // 2
    turned = torch.cat([-q[..., half:], q[..., :half]], -1)
    return q * cos.unsqueeze(-3) + turned * sin.unsqueeze(-3)
