"""`peftfn extract`: a LoRA from a full fine-tune's files, one tensor at a time; neither model is built."""

from collections import Counter
from pathlib import Path

from peftfn.cli.base import load_base
from peftfn.cli.convert import free
from peftfn.formats import save
from peftfn.model.model import Model
from peftfn.tools.extract import extract as extracted


def extract(
    full: Path,
    base: Path,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    pattern: str = "",
    to: str = "peft",
) -> str:
    """Write what `full` changed of `base`, two folders of safetensors, to `out`; returns a line about it.

    Raises:
        FileExistsError: `out` is there, and no empty folder.
        FileNotFoundError: a folder is missing, or has no tensors.
        ValueError: as for `pf.extract`, or the format cannot express it (PEFT's cannot train one parameter of a layer
            and adapt another).
    """
    free(out)
    bases = [load_base(folder) for folder in (full, base)]
    for folder, found in zip((full, base), bases, strict=True):
        if found.hollow:
            raise FileNotFoundError(f"{folder} holds no *.safetensors")
    tuned, model = bases
    net, adapter = extracted(model.model, Model.of(tuned.model).parameters, rank=rank, energy=energy, pattern=pattern)
    extra = {"extra": {"base_model_name_or_path": str(base)}} if to == "peft" else {}
    save(out, net, adapter, format=to, **extra)  # type: ignore[arg-type]
    kinds = Counter(type(e.method).__name__ for e in net.plan.values())
    return f"wrote {out}: {', '.join(f'{k} at {n} sites' for k, n in kinds.items())}"
