"""A server reads adapters all day: what a read leaves behind adds up."""

import gc
import sys
from pathlib import Path

import torch
from mutations import MODEL
from safetensors.torch import save_file

import peftfn as pf
from peftfn.formats.tensor_files import opened

TENSORS = {
    "matrix": torch.randn(3, 5),
    "none": torch.zeros(0, 3),
    "number": torch.tensor(3.0),
    "odd": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(3).half(),
    "yes": torch.tensor([True, False]),
}


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    with opened(tmp_path / "a.safetensors") as file:
        for k, t in TENSORS.items():
            got = file.tensor(k, exact=True)
            assert got.dtype == t.dtype and torch.equal(got, t), k


def test_reading_an_adapter_leaves_nothing_behind(tmp_path: Path) -> None:
    """safetensors' `get_tensor` loses two integers a tensor, which are 2 · 3 · 20 a turn here.

    A few hundred objects more are nothing: Python keeps the last names of attributes that it looked up."""
    net = pf.adapt(MODEL, {"[qk]_proj|mlp": pf.LoRA(2)})
    pf.save(tmp_path / "a", net, net.init())
    bank = pf.Bank([net], capacity=1)

    def read() -> None:
        pf.load(tmp_path / "a", MODEL)
        bank.put("a", net, tmp_path / "a")
        assert not bank.fetch(["a"])

    for _ in range(10):
        read()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(100):
        read()
    gc.collect()
    assert sys.getallocatedblocks() - before < 2000
