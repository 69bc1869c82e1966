"""Laws of what is stored: an adapter's file, the indices in it, and a method as a value. Each is of one `Case`."""

import json
import pickle
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import peftfn as pf
from peftfn.formats.indices import expected, wrong_indices
from peftfn.formats.native_config import from_json, to_json
from peftfn.testing.case import Case, close, refused


def round_trip(c: Case) -> None:
    """save and load give the same bits and the same outputs."""
    a = c.adapter()
    with tempfile.TemporaryDirectory() as folder:
        pf.save(folder, c.net, a)
        net, b = pf.load(folder, c.model)
        assert [f.name for f in sorted(Path(folder).iterdir())] == ["adapter.safetensors", "peftfn.json"]
    close(b, a, "loaded adapter", 0)
    assert torch.equal(net.apply(b, c.x), c.net.apply(a, c.x)), "the loaded adapter gives another output"
    assert net.plan.rules == c.net.plan.rules


def indices(c: Case) -> None:
    """A method says what its integer constants may have, and a file with anything else is refused."""
    found = {n: [k for k, t in e.frozen.items() if not t.is_floating_point()] for n, e in c.net.plan.items()}
    if not any(found.values()):
        return
    for name, names in found.items():
        assert expected(c.net.plan, name).keys() == set(names), "indices(p, w) has an entry for each integer constant"
    assert not list(wrong_indices(c.net.plan)), "its own constants are not what its indices(p, w) allows"
    with tempfile.TemporaryDirectory() as folder:
        pf.save(folder, c.net, c.adapter())
        file = Path(folder) / "adapter.safetensors"
        with safe_open(file, framework="pt") as good:
            tensors, metadata = {k: good.get_tensor(k) for k in good.keys()}, good.metadata()  # noqa: SIM118 - no mapping
        for key, t in tensors.items():
            for wrong in _wrong(t) if key.startswith("frozen/") and not t.is_floating_point() else ():
                save_file({**tensors, key: wrong}, file, metadata)
                refused(pf.load, folder, c.model, naming=str(file))


def _wrong(t: Tensor) -> list[Tensor]:
    """An index below what any table has, one beyond, and another dtype."""
    low, high = t.clone(), t.clone()
    low.view(-1)[0], high.view(-1)[-1] = -9, 10**9
    return [low, high, t.int(), t.bool()]


def values(c: Case) -> None:
    """A method compares, hashes, prints, pickles and serialises by its fields."""
    m = c.method
    if any("ClassVar" not in str(t) for t in vars(type(m)).get("__annotations__", {}).values()):
        assert "__dataclass_fields__" in vars(type(m)), "it declares fields, and lacks @dataclass(frozen=True)"
    assert replace(m) == m and hash(replace(m)) == hash(m)  # type: ignore[type-var]
    assert repr(m).startswith(f"{type(m).__name__}(")
    assert pickle.loads(pickle.dumps(m)) == m
    assert from_json(json.loads(json.dumps(to_json(m))), Path()) == m
    family = type(m).family
    assert {f.name for f in fields(m)}.isdisjoint(vars(family)), f"a field hides one of {family.__name__}'s functions"  # type: ignore[arg-type]
