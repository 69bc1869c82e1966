"""The page's train.py, in which rank 1 dies at its fifth step.

torchrun --nproc-per-node 2 tests/workers/distributed_crash.py TRAIN
"""

import os
import runpy
import sys

import torch


class Dying(torch.optim.AdamW):
    steps = 0

    def step(self, *args, **kwargs):
        Dying.steps += 1
        if Dying.steps == 5 and os.environ["RANK"] == "1":
            raise RuntimeError("out of luck")
        return super().step(*args, **kwargs)


torch.optim.AdamW = Dying
runpy.run_path(sys.argv[1], run_name="__main__")
