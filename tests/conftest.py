"""For all tests: no network, one torch thread for each of pytest-xdist's workers, and torch's generator seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, so before anything else

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What PEFT and models draw must not depend on which tests this worker ran before: a nearly singular P made the
    gradient of DEFT's QR differ from PEFT's in one run of many."""
    torch.manual_seed(0)
