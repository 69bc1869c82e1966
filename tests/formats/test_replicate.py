"""replicate: a deeper model of shared layers, as PEFT's layer_replication makes it."""

from pathlib import Path

import peft
import pytest
import torch
from models import by_name, tokens
from support import close, random

import peftfn as pf

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's own calls into transformers
SPANS = [[0, 2], [1, 2], [0, 1]]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_model_peft_makes_and_its_adapter_in_both_directions(name: str, tmp_path: Path) -> None:
    site = {"llama": "q_proj", "bert": "query"}[name]
    model = by_name[name].build()
    before = {k: p.data_ptr() for k, p in model.named_parameters()}
    deep = pf.replicate(model, SPANS)
    assert {p.data_ptr() for p in deep.parameters()} == set(before.values()), "nothing is stored twice"
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == before
    net = pf.adapt(deep, {site: pf.LoRA(2)})
    assert len(net.plan) == 4
    a = random(net)
    pf.save(tmp_path, net, a, format="peft")
    theirs = peft.PeftModel.from_pretrained(by_name[name].build(), tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).layer_replication == SPANS
    out, want = net.apply(a, tokens(2)), theirs(tokens(2))
    close(out[0], want[0])
    again, b = pf.load(tmp_path, by_name[name].build())
    assert torch.equal(again.apply(b, tokens(2))[0], out[0])


def test_what_is_no_span_and_what_has_no_layers() -> None:
    with pytest.raises(ValueError, match=r"replicate.*spans \[start, end\) of 2 layers"):
        pf.replicate(by_name["llama"].build(), [[0, 3]])
    with pytest.raises(ValueError, match="no layers"):
        pf.replicate(torch.nn.Linear(2, 2), [[0, 1]])
