"""X-LoRA as one value: its experts, the classifier that weighs them, and PEFT's files of both."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch import nn as torch_nn
from torch.nn import functional as F

from peftfn.core.rng import Rng
from peftfn.formats import hub, load, peft_xlora, save
from peftfn.formats.peft import CONFIG, TENSORS
from peftfn.formats.several import FOLDER_FILES
from peftfn.many.conform import conform
from peftfn.many.routed import Routed
from peftfn.many.routing import xlora
from peftfn.many.stack import stack, unstack
from peftfn.net.net import Adapted, adapt
from peftfn.slots.routes import PerForward


class XLoRA(Routed):
    """X-LoRA: a classifier of the base's last hidden states weighs LoRA experts, for each token.

    A function of one tree, {"experts": stack, "router": {"0.weight": …, "0.bias": …, "1.weight": …}}, whose router is
    the classifier: linear layers with ReLUs between them. `pf.routing.xlora` are its gates, for classifiers and experts
    of other kinds. In `generate`, give `use_cache=False`, as in PEFT.

    Args:
        net: the net of the experts.
        experts: how many.
        depth: linear layers of the classifier.
        size: of its inner layers.
        hidden: of the model's hidden states; None takes the `hidden_size` of the model's configuration.
        layerwise: each site has weights of its own.
        k: only the k largest gates stay.
        softmax, softmax_top_k, temperature, weight: as for `pf.routing.xlora`.
        dropout: after the classifier's ReLUs, while the model is in train mode.

    Raises:
        ValueError: a number is out of range, or the model has no `hidden_size`.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))
        mixture = pf.XLoRA(pf.adapt(model, {"q_proj": pf.LoRA(rank=2)}), experts=2)
        logits = mixture.apply(mixture.init(seed=0), input_ids=torch.tensor([[1, 2, 3]])).logits
        mixture.save("mixture", mixture.init(seed=0))
        mixture, a = pf.XLoRA.load("mixture", model)
    """

    def __init__(
        self,
        net: Adapted,
        experts: int,
        *,
        depth: int = 1,
        size: int = 2048,
        hidden: int | None = None,
        layerwise: bool = False,
        k: int | None = None,
        softmax: bool = True,
        softmax_top_k: bool = False,
        temperature: float = 1.0,
        weight: float = 1.0,
        dropout: float = 0.2,
    ):
        super().__init__(net, experts, self._per_site, self._fresh)
        if hidden is None:
            hidden = getattr(getattr(net.model, "config", None), "hidden_size", None)
        for name, value in {"depth": depth, "size": size, "hidden": hidden, "k": experts if k is None else k}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"XLoRA: {name} is {value!r}; give a positive integer")
        if k is not None and k > experts:
            raise ValueError(f"XLoRA: k is {k}, and there are {experts} experts: give at most as many")
        if not 0 <= dropout < 1 or not temperature > 0:
            raise ValueError(f"XLoRA: dropout={dropout} and temperature={temperature}; give [0, 1), and above 0")
        self.options: dict[str, Any] = {
            "layerwise": layerwise,
            "k": k,
            "softmax": softmax,
            "softmax_top_k": softmax_top_k,
            "temperature": temperature,
            "weight": weight,
        }
        self.classifier: dict[str, Any] = {"depth": depth, "size": size, "hidden": hidden, "dropout": dropout}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the classifier's tensors, in their order."""
        c = self.classifier
        out = self.experts * (len(self.net.plan) if self.options["layerwise"] else 1)
        sizes = [c["hidden"], *[c["size"]] * (c["depth"] - 1), out]
        pairs = list(enumerate(pairwise(sizes)))
        return {name: s for i, (n, m) in pairs for name, s in ((f"{i}.weight", (m, n)), (f"{i}.bias", (m,)))}

    def gates(self, router: Any) -> PerForward:
        """Return the gates that a classifier's tensors make, for `net.gated`.

        Args:
            router: the classifier's tensors.

        Returns:
            Gates that are made anew for each forward pass.

        Raises:
            KeyError: `router` has other tensors.
        """
        if not isinstance(router, Mapping) or {k: tuple(t.shape) for k, t in router.items()} != self._shapes():
            raise KeyError(f"XLoRA: the router is not a classifier of the shapes {self._shapes()}")
        return xlora(self.net, partial(self._scores, router), **self.options)

    def _scores(self, router: Mapping[str, Tensor], h: Tensor) -> Tensor:
        depth, rate = self.classifier["depth"], self.classifier["dropout"]
        for i in range(depth):
            h = F.linear(h, router[f"{i}.weight"].to(h), router[f"{i}.bias"].to(h))
            if i < depth - 1:
                h = F.dropout(torch.relu(h), rate, training=self.net.model.training)
        return h

    def _fresh(self, seed: int) -> dict[str, Tensor]:
        device = next((p.device for p in self.net.model.parameters()), torch.device("cpu"))
        out = {}
        for name, shape in self._shapes().items():
            bound = self._shapes()[f"{name.partition('.')[0]}.weight"][1] ** -0.5  # as nn.Linear starts
            out[name] = Rng(seed, f"classifier.{name}").uniform(*shape, bound=bound).to(device)
        return out

    def _per_site(self, router: Any, site: str, x: Tensor) -> Tensor:
        raise NotImplementedError("X-LoRA's gates are made of the whole forward pass: use gates(router)")

    # PEFT's files.

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: torch_nn.Module,
        experts: Sequence[str | PathLike[str]] | None = None,
        *,
        revision: str | None = None,
        hub_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Self, dict[str, Any]]:
        """Read PEFT's folder of an X-LoRA, and the experts that its configuration names.

        Experts of different layers, ranks and scales become those of one net, as `conform` makes them.

        Args:
            path: the folder, or a Hub repository "owner/name".
            model: the base.
            experts: the experts' folders or repositories, in the order of the classifier's outputs; None: those that
                the configuration names, or that are beside the classifier, if it was moved.
            revision, hub_options: as for `load`, of `path` alone.
            options: further options of `load`, for each expert.

        Returns:
            (the mixture, its tree).

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: as for `load`; or an expert is no plain LoRA, or PEFT wrote the folder without its classifier
                (it names the cure).
        """
        where = hub.find_all(path, FOLDER_FILES, revision=revision, options=hub_options)
        saved = peft_xlora.read(where, None if experts is None else [str(e) for e in experts])
        try:
            each = [load(e, model, **options) for e in saved.experts]
        except FileNotFoundError as lost:
            raise FileNotFoundError(f"{where / CONFIG}: an expert is not there: {lost}") from lost
        for e, loaded in zip(saved.experts, each, strict=True):
            peft_xlora.check_expert(loaded.net.plan, e)
        net = _union([loaded.net for loaded in each])
        made = [_conformed(loaded.net, loaded.adapter, net) for loaded in each]
        try:
            mixture = cls(net, len(each), **saved.fields)
            want, have = mixture._shapes(), {k: tuple(t.shape) for k, t in saved.classifier.items()}
        except (ValueError, TypeError) as e:
            raise ValueError(f"{where / CONFIG}: {e}") from e
        if odd := [k for k in want if have[k] != want[k]]:
            raise ValueError(
                f"{where / TENSORS}: the classifier's {odd[0]} is {list(have[odd[0]])}, and {len(each)} "
                f"experts at {len(net.plan)} sites need {list(want[odd[0]])}"
            )
        device = next(iter(net.weights.values())).device
        return mixture, {"experts": stack(made), "router": {k: t.to(device) for k, t in saved.classifier.items()}}

    def save(
        self, path: str | PathLike[str], adapter: Mapping[str, Any], *, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Write PEFT's folder: the classifier, and each expert in a folder below.

        PEFT reads it by `PeftModel.from_pretrained(model, path)`, from the same working directory if `path` is
        relative, and wants a base whose `config.use_cache` is False.

        Args:
            path: a folder.
            adapter: a tree like that of `init`.
            extra: what is not about the method, under PEFT's keys: `task_type`, …

        Raises:
            ValueError: the experts are no plain LoRAs; it names the site. Nothing has been written.
            KeyError: `adapter` is no tree of `init`.
        """
        self._check(adapter)
        self.gates(adapter["router"])
        folder = Path(path)
        peft_xlora.check_expert(self.net.plan, "save")
        peft_xlora.check_extra(extra or {})
        paths = [folder / f"expert_{j}" for j in range(self.experts)]
        for one, expert in zip(paths, unstack(adapter["experts"]), strict=True):
            save(one, self.net, expert, format="peft", extra=extra)
        fields = {**self.classifier, **self.options}
        peft_xlora.save(folder, self.net, fields, [str(p) for p in paths], adapter["router"], extra)


def _union(nets: Sequence[Adapted]) -> Adapted:
    """A net of all their sites, each with the method of the largest rank there."""
    chosen: dict[str, Any] = {}
    for net in nets:
        for name, e in net.plan.items():
            if name not in chosen or e.method.rank > chosen[name].rank:
                chosen[name] = e.method
    groups: dict[Any, list[str]] = {}
    for name, method in chosen.items():
        groups.setdefault(method, []).append(name)
    rules = {f"^({'|'.join(n.replace('.', chr(92) + '.') for n in names)})$": m for m, names in groups.items()}
    return adapt(nets[0].model, rules)


def _conformed(net: Adapted, adapter: Any, union: Adapted) -> dict[str, Any]:
    """The expert on the net of all sites. Where it has none of its own, zeros: neither values nor gradients."""
    out = conform(adapter, net, union)
    return {
        name: leaf if name in net.plan else {k: torch.zeros_like(t) for k, t in leaf.items()}
        for name, leaf in out.items()
    }
