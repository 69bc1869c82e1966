"""MonteCLoRA: W + s·B A, with noise of a learned size on A in training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lgamma

import torch
from torch import Tensor

from peftfn.core.fields import Positive, PositiveInt
from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import LORA
from peftfn.methods.parts.sites import Planned, sites_of
from peftfn.methods.parts.variant import Drawn

_SAMPLER = "lora_monteclora_sampler"


def _leaf_to(m: "MonteCLoRA", p: Leaf) -> Leaf:
    last = {"gaussian_var_prior": torch.eye(m.rank), "expert_weights": torch.full_like(p["mix"], 1 / m.samples)}
    return m.peft.named(p) | {f"{_SAMPLER}.{k}": t.to(p["a"]) for k, t in last.items()}


@dataclass(frozen=True)
class MonteCLoRA(Drawn):
    """W + s·B A; in train mode, A becomes Σ_n π_n (A + noise·diag(σ) z_n) with z_n [rank, in] normal,
    σ² = exp(2·std)·χ²(rank) and π [samples] about Dirichlet(exp(mix)), and std [rank], mix [samples] are trained too.

    Sengupta et al., "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
    Adaptation", 2024, arXiv:2411.04358. Add `penalty(adapter)` to the loss. As Σ π_n = 1, the sum is drawn as A + ‖π‖
    noise·diag(σ) z with one z, which has the same law. The penalty has the Dirichlet divergence with all signs as they
    should be, unlike PEFT's.

    Trainable parameters per site: rank·(in + out + 1) + samples. Use it for robust training and calibrated outputs.

    Args:
        rank, alpha, rslora, dropout, init_weights: as for `LoRA`; std and mix start uniform in [0, 1).
        samples: number of z_n; more means less noise.
        noise: size of the noise.
        prior: concentration of the Dirichlet prior of π.
        kl: weight of the divergences in the penalty.
        entropy: add Σ π² to the penalty, so that no single sample takes over.
        random: draw in train mode.

    Example:
        from peftfn.methods.weights.monteclora import penalty
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.MonteCLoRA(rank=4)})
        term = penalty(net, net.init(seed=0))  # for the loss
    """

    cases = (
        {"rank": 2, "alpha": 3.0, "samples": 3, "random": False},
        {"rank": 3, "rslora": True, "samples": 1, "random": False, "init_weights": "gaussian"},
    )

    in_eval = (("dropout", 0.0), ("random", False))
    outside = frozenset({"kl", "entropy", "prior"})
    peft = replace(
        LORA,
        keys={**LORA.keys, **{"std": f"{_SAMPLER}.std_prior", "mix": f"{_SAMPLER}.expert_weights_prior"}},
        fields={
            **LORA.fields,
            "samples": "monteclora_config.num_samples",
            "noise": "monteclora_config.sample_scaler",
            "prior": "monteclora_config.dirichlet_prior",
            "kl": "monteclora_config.kl_loss_weight",
            "entropy": "monteclora_config.use_entropy",
        },
        fixed={"monteclora_config": ...},
        leaf_to=_leaf_to,
    )

    samples: PositiveInt = 8
    noise: float = 1e-4
    prior: Positive = 0.1
    kl: float = 1e-5
    entropy: bool = False
    random: bool = True

    @property
    def exact_gradient(self) -> bool:
        return not self.random

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        start = {k: rng.uniform(n, bound=0.5) + 0.5 for k, n in (("std", self.rank), ("mix", self.samples))}
        return super().init(rng, w) | start

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        up = p["b"]
        if torch.is_grad_enabled():  # a gradient of zero, not none, where nothing is drawn
            up = up + up.new_zeros(()) * (p["std"].sum() + p["mix"].sum())  # a float times these: tangents in fp64
        return {"down": p["a"], "up": up, "std": p["std"], "mix": p["mix"]}

    def _draw(self, p: Leaf) -> tuple[Tensor, Tensor]:
        """σ² [rank] and π [samples]."""
        n, r, inverse = self.samples, self.rank, torch.exp(-p["mix"])
        chi2 = torch.randn(r, r, dtype=p["std"].dtype, device=p["std"].device).square().sum(-1)
        spread = inverse * (1 - 2 / n) + inverse.sum() / n**2  # Dirichlet(α) is about the softmax of a normal
        logits = p["mix"] - p["mix"].mean() + spread.clamp(min=1e-6).sqrt() * torch.randn_like(spread)
        return (torch.exp(2 * p["std"]) * chi2).clamp(min=1e-3), torch.softmax(logits, -1)

    def drawn(self, p: Leaf) -> Leaf:
        if not self.random or "std" not in p:  # a sum of adapters has none
            return p
        square, pi = self._draw(p)
        size = self.noise * torch.linalg.vector_norm(pi) * square.sqrt()
        return p | {"down": p["down"] + size[:, None] * torch.randn_like(p["down"])}

    def divergence(self, p: Leaf) -> Tensor:
        """kl times what separates π, σ and z of a leaf from their priors."""
        (square, pi), n, r, c = self._draw(p), self.samples, self.rank, self.prior
        alpha = torch.exp(p["mix"])
        total = alpha.sum()
        dirichlet = torch.lgamma(total) - torch.lgamma(alpha).sum() - lgamma(n * c) + n * lgamma(c)
        dirichlet = dirichlet + ((alpha - c) * (torch.digamma(alpha) - torch.digamma(total))).sum()
        wishart = r * (torch.exp(2 * p["std"]).sum() - 2 * p["std"].sum() - r) / 2
        normal = n * (square.sum() - square.log().sum() - r) / 2
        return self.kl * (dirichlet + wishart + normal) + (pi.square().sum() if self.entropy else 0.0)


def penalty(net: Planned, adapter: Mapping[str, Leaf]) -> Tensor:
    """The mean of `divergence` over the net's MonteCLoRA sites: a term for the loss."""
    return torch.stack([m.divergence(adapter[site]) for site, m in sites_of(net, MonteCLoRA).items()]).mean()
