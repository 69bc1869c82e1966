"""docs/from_peft.md: every function of the installed PEFT is on a page, and what only PEFT has is as the page says."""

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import peft.optimizers
import peft.utils.hotswap
import pytest
import torch
from models import by_name, tokens
from support import ROOT
from torch import nn

import peftfn as pf
from peftfn.testing import close

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`", "ignore:The density"
)

INTERNAL = {
    *("bloom_model_postprocess_past_key_value", "shift_tokens_right"),  # of models, for PEFT's own use
    *("get_peft_config", "update_forward_signature", "update_generate_signature", "update_signature"),  # of its wrapper
    *("check_hotswap_configs_compatible", "hotswap_adapter_from_state_dict"),  # parts of hotswap_adapter
    "prepare_model_for_gradient_checkpointing",  # a part of prepare_model_for_kbit_training
}
"""Functions that PEFT exports and whose work no user does: parts of others, and of what wraps a model."""


def functions(module: Any) -> set[str]:
    """What a module of PEFT's defines or exports itself."""
    public = getattr(module, "__all__", None) or [
        n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and not n.startswith("_")
    ]
    return {n for n in public if inspect.isfunction(getattr(module, n, None))}


@pytest.mark.parametrize("module", [peft, peft.helpers, peft.optimizers, peft.utils.hotswap], ids=lambda m: m.__name__)
def test_every_function_of_peft_is_on_a_page(module: Any) -> None:
    pages = "\n".join(p.read_text() for p in (ROOT / "docs").glob("*.md"))
    found = functions(module)
    assert found and {n for n in found if n not in pages} - INTERNAL == set()


@torch.no_grad()
def test_the_sums_of_factors_that_only_peft_has_are_no_sums() -> None:
    """add_weighted_adapter without "_svd" merges the As and the Bs apart; "cat", which is here, is exact."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    layer: Any = model.base_model.model[0]
    want = layer.get_delta_weight("default") + layer.get_delta_weight("b")
    for form, exact in (("cat", True), ("linear", False), ("ties", False), ("dare_linear", False)):
        how = {} if form in ("cat", "linear") else {"density": 1.0}
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], form, combination_type=form, **how)
        error = float((layer.get_delta_weight(form) - want).norm() / want.norm())
        assert error < 1e-5 if exact else error > 0.1, form


def test_cartridges_that_peft_composed_load(tmp_path: Path) -> None:
    base = by_name["llama"].build()
    parts = []
    for i in range(2):
        torch.manual_seed(i)
        config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        made = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p.normal_()
        made.save_pretrained(tmp_path / str(i))
        parts.append(tmp_path / str(i))
    peft.compose_cartridge_adapters(parts, output_path=tmp_path / "both")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both").eval()
    net, a = pf.load(tmp_path / "both", base)
    x = tokens(2)
    got = net.apply(a, input_ids=x, use_cache=False).logits
    close(got, theirs(input_ids=x, use_cache=False).logits.detach(), "composed")
