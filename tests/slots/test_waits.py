"""What a mixed batch through experts looks at on the host. Each such look waits for the device, where there is one."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as tf
from support import random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peftfn as pf
from peftfn import LoRA

LOOKS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
INDEX = [2, -1, 0, 2, 1]


def where() -> str:
    """The function of peftfn that looks, or "model"."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/transformers/" in name:
            return "model"
        if "/peftfn/" in name and frame.f_code.co_name != "__torch_function__":
            return f"{name.rpartition('/')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "the test"


class Looks(TorchDispatchMode):
    """Counts what needs values on the host: numbers, lists, shapes that depend on values, indexing with masks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        for name in ("tolist", "numpy", "cpu"):  # of which a CPU's dispatcher is not told
            monkeypatch.setattr(Tensor, name, self._counting(getattr(Tensor, name)))

    def _counting(self, f: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counted[where()] += 1
            return f(*args, **kwargs)

        return call

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f.__name__.split(".")[0]
        masks = args[1] if name in ("index", "index_put", "index_put_") else []
        masked = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in masks)
        sizes = f is torch.ops.aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if name in LOOKS or masked or sizes:
            self.counted[where()] += 1
        return f(*args, **(kwargs or {}))


MODULE = {"tags.py:alike": 3, "routed.py:_check_rows": 1}
"""Looks of each routed module. alike: whether two ways by which rows went agree (a token's and its weight's), and
whether what is summed is of one row: nothing is guessed. _check_rows: whether the module gives each row its own."""
SORTED = {**MODULE, "experts.py:_experts": 2}
"""Besides, at which expert each position has, once a product: they are sorted by it."""
WAITS = [("grouped_mm", False, MODULE), ("grouped_mm", True, SORTED), ("batched_mm", False, SORTED)]


@pytest.mark.parametrize(("way", "gradient", "expected"), WAITS, ids=["grouped", "grouped, gradient", "batched"])
@pytest.mark.parametrize("layers", [1, 3])
def test_each_look_at_values_is_known_and_has_a_reason(
    way: str, gradient: bool, expected: dict[str, int], layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of the call is a list: it is on the host. The model's own looks are as many as without adapters."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": layers}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**size, **more)).eval()
    model.set_experts_implementation(way)
    net = pf.adapt(model, {"experts": LoRA(4), "gate|q_proj": LoRA(4)})
    many, ids = pf.stack([random(net, s) for s in range(3)]), torch.randint(2, 60, (5, 7))
    counts = []
    with torch.set_grad_enabled(gradient):
        net.mixed(many, INDEX, ids, use_cache=False)
        for call in (lambda: model(ids, use_cache=False), lambda: net.mixed(many, INDEX, ids, use_cache=False)):
            with monkeypatch.context() as patch, Looks(patch) as looks:
                call()
            counts.append(looks.counted)
    base, mixed = counts
    assert mixed.pop("model", 0) == base.pop("model", 0)
    assert not base
    mixed.pop("gates.py:of", 0)  # a list of the caller's, on the host
    assert dict(mixed) == {k: n * layers for k, n in expected.items()}
