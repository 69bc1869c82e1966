"""Run a script, and end the process without taking the interpreter down.

torchrun --nproc-per-node 2 tests/workers/distributed_run.py SCRIPT [ARGUMENTS]

A thread of gloo frees a collective's tensors after the caller has gone on, and needs Python to do it. When the
interpreter is being taken down by then, C++ aborts the process: "terminate called without an active exception".
"""

import os
import runpy
import sys

del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
