"""For all tests: no network, and one torch thread for each of pytest-xdist's workers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, so before anything else

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
