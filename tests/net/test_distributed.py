"""Several processes on this machine: docs/distributed.md, and that nothing differs from one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import ROOT
from torch import nn

import peftfn as pf

WORKERS = ROOT / "tests" / "workers"
PAGE = (ROOT / "docs" / "distributed.md").read_text()
TRAIN = re.search(r'^```python title="train.py"\n(.*?)^```', PAGE, flags=re.S | re.M)[1]
CHECKS = re.findall(r"^def check_(\w+)", (WORKERS / "distributed_worker.py").read_text(), flags=re.M)


def torchrun(processes: int, *args: object, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, **settings, "RUN_FOLDER": str(folder)}
    command.append(str(WORKERS / "distributed_run.py"))
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What each check of distributed_worker.py says on two processes: "" or what went wrong."""
    folder = tmp_path_factory.mktemp("two")
    ran = torchrun(2, WORKERS / "distributed_worker.py", folder / "report.json", folder=folder)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(check, report):
    assert report[check] == "", report[check]


class Runs:
    """train.py on two processes, of which one dies; then on three, which go on."""

    def __init__(self, folder: Path):
        self.run = folder / "run"
        script = folder / "train.py"
        script.write_text(TRAIN)
        self.died = torchrun(2, WORKERS / "distributed_crash.py", script, folder=self.run)
        self.left = sorted(p.name for p in self.run.iterdir())
        self.resumed = torchrun(3, script, folder=self.run)
        self.page = {"__name__": "train"}
        exec(compile(TRAIN, "train.py", "exec"), self.page)
        self.whole, self.history = self._alone()

    def _alone(self):
        """The same training on one process, and the adapter after each step."""
        net = pf.adapt(self.page["build"](), self.page["RULES"])
        a = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in net.init(seed=0).items()}
        optimizer = torch.optim.AdamW([t for leaf in a.values() for t in leaf.values()], lr=1e-2)
        history = []
        for step in range(self.page["STEPS"]):
            x, y = self.page["batch"](step)
            (net.apply(a, x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append({n: {k: t.detach().clone() for k, t in leaf.items()} for n, leaf in a.items()})
        return net, history


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def close(a, b):
    assert a.keys() == b.keys()
    for n in a:
        for k in a[n]:
            torch.testing.assert_close(a[n][k], b[n][k], rtol=1e-4, atol=1e-5)


def test_a_rank_that_dies_ends_the_others_and_is_named(runs):
    assert runs.died.returncode != 0
    assert re.search(r"rank\s*: 1 ", runs.died.stderr), runs.died.stderr[-3000:]
    assert "RuntimeError: out of luck" in runs.died.stderr
    assert runs.left == ["2", "4"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it is meant to be, here
def test_its_checkpoint_loads_on_one_process(runs):
    saved = {"adapter": runs.whole.init(seed=7), "step": 0}
    dcp.load(saved, checkpoint_id=runs.run / "4", no_dist=True)
    assert saved["step"] == 4
    close(saved["adapter"], runs.history[3])


def test_three_processes_go_on_from_it_as_if_nothing_had_happened(runs):
    assert runs.resumed.returncode == 0, runs.resumed.stderr[-3000:]
    net, a = pf.load(runs.run / "adapter", runs.page["build"]())
    close(a, runs.history[-1])
    x, y = runs.page["batch"](0)
    error = nn.functional.mse_loss(net.apply(a, x), y)
    assert error < nn.functional.mse_loss(net.model(x), y)
