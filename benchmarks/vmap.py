"""Many adapters in one pass: `vmap` over a stack of 64 against 64 calls, forward and gradient."""

import torch
from torch import Tensor
from torch.func import grad, vmap

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, Target, row
from benchmarks.llama import loss_of
from benchmarks.models import RULE, agree, llama

ADAPTERS = 64


def run(options: Options) -> list[Json]:
    rows = []
    torch.manual_seed(0)
    return rows
