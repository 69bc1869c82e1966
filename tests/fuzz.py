"""What a reader makes of one mutated file, and a run over many of them.

make fuzz                                        100,000 mutations over all readers, in about half an hour
make fuzz FUZZ="100000 200000"                   those of other seeds
PYTHONPATH=tests python -m fuzz 21825 21826      one again
"""

import json
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from models import by_name, tokens
from mutations import MODEL, PICKLED, PYREFT, XLORA, good_files, mutated
from safetensors.torch import load_file
from workers import small_readers

import peftfn as pf
from peftfn.formats.kohya import FILE as KOHYA

SECONDS = 5.0
"""A load of the tiny model may take this long, on a busy machine; a good one takes some milliseconds."""


class Hang(BaseException):
    """Not an Exception, so that nothing on the way can catch it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang after so many seconds."""

    def hang(*_: Any) -> None:
        raise Hang(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def outputs(net: pf.Adapted, adapter: Any) -> torch.Tensor:
    with torch.no_grad():
        return net.apply(adapter, tokens(2)).logits


def as_the_file_says(path: Path, net: pf.Adapted, adapter: Any) -> None:
    """An oracle of its own: the tensors of a native file, by name; PEFT itself for a file of PEFT's; and for those of
    kohya and ms-swift readers of a few lines."""
    if (path / "peftfn.json").exists():
        given = load_file(path / "adapter.safetensors")
        for site, leaf in adapter.items():
            for k, t in leaf.items():
                assert t.numpy().tobytes() == given[f"adapter/{site}/{k}"].numpy().tobytes(), (site, k)
    elif (path / "adapter_config.json").exists() and not (path / "adapters.safetensors").exists():
        config = json.loads((path / "adapter_config.json").read_text())
        if "num_virtual_tokens" in config and config.get("task_type") != "CAUSAL_LM":
            return  # PEFT runs the base alone then; here the model's class says the task
        try:
            with limited(SECONDS), warnings.catch_warnings(record=True) as said, torch.no_grad():
                warnings.simplefilter("always")
                theirs = peft.PeftModel.from_pretrained(by_name["llama"].build(), path).eval()
                want = theirs(tokens(2)).logits
        except (Exception, Hang):  # what PEFT refuses, in whatever way, says nothing about us
            return
        if any("missing adapter keys" in str(w.message) for w in said):
            return  # it took other layers, by default, and left them as they start
        got = outputs(net, adapter)
        want = want[:, -got.shape[1] :]  # PEFT returns virtual tokens too, in front
        scale = want.nan_to_num(0, 0, 0).abs().max().clamp(min=1)
        assert torch.allclose(got, want, rtol=1e-4, atol=float(1e-4 * scale), equal_nan=True), (
            "other outputs than PEFT's"
        )
    else:
        file = path / KOHYA
        if path.suffix == ".gguf":
            want = small_readers.gguf(path, MODEL)
        elif file.exists():
            want = small_readers.kohya(file, MODEL)
        elif (path / "adapters.safetensors").exists():
            want = small_readers.mlx(path, MODEL)
        elif isinstance(net, pf.XLoRA) or net.plan.places:  # PEFT reads no classifier, and its own library the others
            assert outputs(net, adapter).shape[0] == 2
            return
        else:
            want = small_readers.swift(path / "default", MODEL)
        got = net.merge(adapter)
        for name, value in (want or {}).items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
        changed = {n for n, p in MODEL.named_parameters() if n in net.plan}
        assert want is None or changed == want.keys()


@cache
def served() -> pf.Adapted:
    """The net that the bank's file was saved with."""
    with tempfile.TemporaryDirectory() as root:
        for file, content in good_files()["native, served"].items():
            (Path(root) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / file).write_bytes(content)
        return pf.load(Path(root) / "native, served", MODEL).net


def banked(path: Path, loaded: Any) -> None:
    """A bank reads the file as `load` does, or refuses it; what `load` refuses it refuses too."""
    bank = pf.Bank([served()], capacity=1)
    try:
        with limited(SECONDS):
            bank.put("a", served(), path)
            got = bank.apply(["a", "a"], tokens(2)).logits
    except (ValueError, FileNotFoundError) as e:
        assert str(path) in str(e), f"an error that names no file: {e!r}"
        return
    assert loaded is not None, "the bank reads what load refuses"
    want = outputs(*loaded)
    scale = want.nan_to_num(0, 0, 0).abs().max().clamp(min=1)
    assert torch.allclose(got, want, rtol=1e-4, atol=float(1e-4 * scale), equal_nan=True), "other outputs than load's"


def read(name: str, path: Path) -> Any:
    """(net, adapter) of a file; (mixture, its tree) of an X-LoRA's."""
    if name == XLORA:
        return pf.XLoRA.load(path, MODEL)
    more: dict[str, Any] = {"pickled": True} if name in (PICKLED, PYREFT) else {}
    return pf.load(path, MODEL, **more, **({"method": pf.DiReFT(first=1)} if name == PYREFT else {}))


def one(root: Path, seed: int) -> str:
    """What `load` made of one mutated file: "loaded" or "refused"; AssertionError for anything else."""
    rng = random.Random(seed)
    name = rng.choice(sorted(good_files()))
    files = good_files()[name]
    victim = rng.choice(sorted(files))
    changed = mutated(victim, files[victim], rng)
    for file, content in {**files, victim: changed}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    path = root / name
    before = {n: (p, p._version, p.data_ptr()) for n, p in MODEL.named_parameters()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with limited(SECONDS):
            loaded = read(name, path)
    except (ValueError, FileNotFoundError) as e:
        assert str(root) in str(e) and len(str(e)) < 3000, f"an error that names no file: {e!r}"
        loaded = None
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 1 << 19, f"{grown} KiB for a tiny file"
    assert {n: (p, p._version, p.data_ptr()) for n, p in MODEL.named_parameters()} == before, "the model was changed"
    if name == "native, served":
        banked(path, loaded)
    if loaded is not None and changed != files[victim]:
        as_the_file_says(path, *loaded)
    return "refused" if loaded is None else "loaded"


def main(first: int, last: int) -> int:
    """Mutate with each seed from first to below last; print what fails, and how much of what there was. 0 if none."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seen = Counter[str]()
    for seed in range(first, last):
        with tempfile.TemporaryDirectory() as root:
            try:
                seen[one(Path(root), seed)] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as e:  # whatever it is, it is what is looked for
                seen["failed"] += 1
                print(f"seed {seed}: {type(e).__name__}: {str(e)[:500]}", flush=True)
        if (seed - first) % 5000 == 4999:
            print(f"{seed - first + 1:,} mutations: {dict(seen)}", flush=True)
    print(f"seeds {first:,} to {last - 1:,}: {dict(seen)}")
    return int(seen["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(*(int(a) for a in sys.argv[1:3])))
