"""What an earlier release wrote still loads, to the outputs that it had: stored files, which no test writes anew."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peftfn as pf
from peftfn.formats.files import read_json

STORED = Path(__file__).parent / "stored"
sys.path.insert(0, str(STORED))
from make import RULES, Many, Small, inputs  # noqa: E402

CASES = [(p.parent.name, name) for p in sorted(STORED.glob("*/outputs.safetensors")) for name in load_file(p)]


def test_every_release_has_its_files() -> None:
    assert pf.__version__ in {release for release, _ in CASES}
    for release in {release for release, _ in CASES}:
        names = {name.removesuffix(".safetensors") for r, name in CASES if r == release}
        assert names >= {f"{format}/{name}" for format, named in RULES.items() for name in named}


@pytest.mark.parametrize(("release", "name"), CASES)
def test_what_a_release_wrote_loads_to_the_same_outputs(release: str, name: str) -> None:
    model: Any = Small()
    if name == "native/methods":
        sites = read_json(STORED / release / name / "peftfn.json")["sites"]
        model = Many([site.split(".")[1] for site in sites])
    net, a = pf.load(STORED / release / name, model.eval())
    want = load_file(STORED / release / "outputs.safetensors")[name]
    x = inputs(model)
    with torch.no_grad():
        if isinstance(model, Many):  # rows are tokens here, as ALoRA asks on which tokens it acts: on all, when stored
            got = net.gated(pf.stack([a]), torch.ones(1, len(x), 1), x[None])[:, 0]
        else:
            got = net.apply(a, x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x), want, atol=1e-2), "it changes something"
