"""An index of tokens: token j of row i uses adapter index[i, j]."""

from typing import Any

import pytest
import torch
from support import close, random
from torch import Tensor, nn

import peftfn as pf
from peftfn import IA3, OFT, DoRA, Full, LoHa, LoRA


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


class Words(nn.Module):
    """Each token by itself: so a token's output says which adapter it had."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.up, self.norm, self.down = (
            nn.Embedding(9, 8),
            nn.Linear(8, 12),
            nn.LayerNorm(12),
            nn.Linear(12, 4),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(self.norm(self.up(self.tokens(ids))).tanh())


INDEX = torch.tensor([[0, 1, -1, 2], [2, 2, 0, -1], [1, 0, 0, 2]])
RULES: list[dict[str, pf.Method]] = [{"weight": m, "bias": Full()} for m in (LoRA(2), DoRA(2), LoHa(2), Full())]
RULES += [{"up|down": m} for m in (IA3(), OFT(2), pf.LoRA(2, lora_bias=True))]


@pytest.mark.parametrize("routed", [None, [""]], ids=["sites", "routed"])
@pytest.mark.parametrize("rules", RULES, ids=lambda r: str(next(iter(r.values()))))
def test_each_token_has_the_adapter_of_its_index(rules: Any, routed: Any) -> None:
    net = pf.adapt(Words(), rules, routed=routed)
    adapters, ids = [random(net, s) for s in range(3)], torch.arange(12).view(3, 4) % 9
    each = torch.stack([net.model(ids), *(net.apply(a, ids) for a in adapters)])
    want = each[INDEX + 1, torch.arange(3)[:, None], torch.arange(4)]
    many = pf.stack(adapters)
    close(net.mixed(many, INDEX, ids), want)
    close(net.mixed(many, INDEX.tolist(), ids), want)
    close(net.mixed(many, INDEX.view(1, 12), ids.view(1, 12)), want.view(1, 12, 4))
    close(pf.Nets([net]).mixed([many], INDEX, ids), want)
    close(net.mixed(many, torch.full((3, 4), 1), ids), each[2])


def test_later_tokens_of_generate_use_the_index_of_the_last_one() -> None:
    from models import CASES

    case = next(c for c in CASES if c.name == "llama")
    net = pf.adapt(case.build(), {case.linear: LoRA(2)})
    many = [random(net, s) for s in range(2)]
    ids, how = (
        torch.tensor([[4, 5, 6, 7], [7, 6, 5, 4]]),
        {"max_new_tokens": 4, "do_sample": False, "method": "generate"},
    )
    index = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    want = net.mixed(pf.stack(many), [1, 0], ids, **how)
    assert torch.equal(net.mixed(pf.stack(many), index, ids, **how), want)
    with pytest.raises(ValueError, match=r"generate makes 2 sequences of each row.*one integer a row"):
        net.mixed(pf.stack(many), index, ids, **how, num_beams=2)


def test_an_index_of_tokens_that_does_not_fit() -> None:
    net = pf.adapt(Words(), {"up": LoRA(2)})
    many, ids = pf.stack([net.init(s) for s in range(3)]), torch.arange(12).view(3, 4) % 9
    with pytest.raises(ValueError, match=r"index has shape \[3, 5\], and none of the inputs has as many.*\[3, 4\]"):
        net.mixed(many, torch.zeros(3, 5, dtype=torch.long), ids)
    with pytest.raises(ValueError, match=r"asks for adapter 3; the stack has 3"):
        net.mixed(many, INDEX + 1, ids)
    with pytest.raises(ValueError, match=r"each as many integers"):
        net.mixed(many, [[0, 1], [2]], ids)
    with pytest.raises(ValueError, match=r"\[rows\], or a token, \[rows, tokens\]"):
        net.mixed(many, torch.zeros(3, 4, 1, dtype=torch.long), ids)
    pooled = nn.Sequential(Words(), nn.Flatten(), nn.Linear(16, 2))
    net = pf.adapt(pooled, {r"^2\.": LoRA(2)})
    with pytest.raises(ValueError, match=r"2\.weight: its input has shape \[3, 16\].*rows and tokens in the first two"):
        net.mixed(pf.stack([net.init(s) for s in range(3)]), INDEX, ids)
    routed = pf.adapt(Words(), {"up": LoRA(2)}, routed=[""])
    with pytest.raises(ValueError, match=r"owners: they name rows, and the gates are of tokens"):
        routed.mixed(many, INDEX, ids, owners={"": [0] * 12})
