"""`peftfn suggest`: which layers of a model to adapt, and with which ranks, from its files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from peftfn.cli.base import load_base
from peftfn.cli.verify import arguments, model_in
from peftfn.core.method import Method, registry
from peftfn.methods.parts.lowrank import Ranked
from peftfn.model.model import Model
from peftfn.net.net import adapt
from peftfn.tools import suggest as tool
from peftfn.tools.suggestion import Suggestion
from peftfn.tools.targets import targets

By = Literal["condition", "weight", "change", "gradient"]


def suggest(
    model: Path,
    by: By = "condition",
    *,
    method: str = "LoRA",
    rank: int | None = None,
    modules: list[str] | None = None,
    full: Path | None = None,
    inputs: Sequence[Path] | None = None,
    **how: Any,
) -> Suggestion:
    """`pf.suggest` on the model of a folder, which is run for "gradient" alone; else its weights are read one by one.

    Args:
        by: "condition" chooses layers by `pf.suggest.targets`; the others choose ranks.
        method: of the rules: the name of a method with default fields; for ranks, LoRA or a variant of it.
        rank: of the method, where it has one; for ranks, what it is on average without a budget.
        modules: names of layers to choose from, or ["all-linear"]; None: all linear ones for "condition", else those
            that PEFT adapts by default.
        full: for "change": the fine-tuned model's folder.
        inputs: for "gradient": safetensors files of the model's arguments by name, with labels; each is a batch.
        how: the function's own options.

    Raises:
        FileNotFoundError: a folder or file is missing, or has no tensors.
        ValueError: as for the function; an option that the way has not, or lacks.
    """
    for name, value, owner in (("full", full, "change"), ("inputs", inputs, "gradient")):
        if (value is not None) != (by == owner):
            raise ValueError(f"--by {by} {'needs' if by == owner else 'has no'} --{name}")
    made = _method(method, rank)
    if by == "gradient":
        base: Any = model_in(model)
    else:
        read = load_base(model)
        if read.hollow:
            raise FileNotFoundError(f"{model} holds no *.safetensors")
        base = read.model
    chosen: Any = modules[0] if modules == ["all-linear"] else modules
    if by == "condition":
        return tool.targets(base, made, chosen, **how)
    if not isinstance(made, Ranked):
        raise ValueError(f"--method {method}: it has no rank to choose; give LoRA or a variant of it")
    net = adapt(base, targets(base, made, chosen))
    if by == "weight":
        return tool.weight_ranks(net, **how)
    if full is not None:
        return tool.change_ranks(net, _weights(full), **how)
    return tool.gradient_ranks(net, _batches(inputs or ()), **how)


def _method(name: str, rank: int | None) -> Method:
    if name not in registry.keys() - {"Chain", "ModuleChain"}:
        raise ValueError(f"--method {name}: peftfn has no method of this name; LoRA is one, the reference lists all")
    cls: Any = registry[name]
    try:
        made: Method = cls() if rank is None else cls(rank=rank)
    except TypeError as e:
        raise ValueError(f"--method {name}: {e}") from e
    return made


def _weights(folder: Path) -> Mapping[str, Tensor]:
    found = load_base(folder)
    if found.hollow:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    return Model.of(found.model).parameters


def _batches(paths: Sequence[Path]) -> Iterator[dict[str, Tensor]]:
    """Each file's tensors, read when it is its turn."""
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} does not exist")
    return (arguments(path) for path in paths)
