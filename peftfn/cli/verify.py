"""`peftfn verify`: an adapter and its base, run: is it applied, everywhere, and as PEFT applies it?"""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftfn.cli.base import opened_shard
from peftfn.formats import hub, load, peft
from peftfn.formats.files import read_json
from peftfn.tools import verify as tool
from peftfn.tools.verify import Verification

TOKENS = 2, 16
"""Rows and tokens of the batch that is made where none is given."""


def verify(
    adapter: str | Path,
    model: Path,
    against: Literal["peft", "merged"] | None = None,
    inputs: Path | None = None,
    *,
    tolerance: float = 0.05,
    effects: bool = True,
    any_base: bool = False,
) -> Verification:
    """`pf.verify` of an adapter's files on the model of a folder.

    Args:
        against: compare with the merged model or with PEFT alone; None: with both, PEFT where it is installed and the
            adapter is in its format.
        inputs: a safetensors file of the model's arguments by name; None: random token ids.
        tolerance, effects: as for `pf.verify`.
        any_base: whether the model may have other values than the one that the adapter was made on.

    Raises:
        FileNotFoundError: no adapter, no model or no inputs there.
        ValueError: the adapter does not fit; the model is none of transformers'; it takes no token ids, and there are
            no inputs; PEFT is not installed, or cannot read the adapter.
    """
    path = hub.find(adapter)
    base = model_in(model)
    batch = _batch(base, inputs)
    ours = peft.is_mine(path)
    if against == "peft" and not (ours and find_spec("peft")):
        why = "PEFT is not installed" if ours else f"{path} is not in PEFT's format; peftfn convert writes it"
        raise ValueError(f"--against peft: {why}")
    net, values = load(path, base, base="any" if any_base else None)
    others = {}
    if against != "merged" and ours and find_spec("peft"):
        others["PEFT"] = _by_peft(model, path, batch)
    found = tool.verify(net, values, batch, others=others, tolerance=tolerance, effects=effects)
    if against == "peft":
        problems = tuple(p for p in found.problems if not p.startswith(("merged ", "it cannot be merged")))
        found = replace(found, differs={"PEFT": found.differs["PEFT"]}, problems=problems)
    return found


def model_in(folder: Path) -> nn.Module:
    """The model of a folder, with its weights, in eval mode; no code from the folder runs."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a model of transformers")
    if not find_spec("transformers"):
        raise ValueError(f"{config}: this model needs transformers: pip install 'peftfn[hf]'")
    import transformers
    from transformers.utils import logging

    read = read_json(config)
    names = read.get("architectures") or [] if isinstance(read, dict) else []
    cls: Any = getattr(transformers, str(names[0]), None) if names else transformers.AutoModel
    if cls is None:
        raise ValueError(f"{config}: transformers {transformers.__version__} has no {names[0]}")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        made: nn.Module = cls.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    except (OSError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as e:
        raise ValueError(f"{folder}: transformers cannot load it: {e}") from e
    finally:
        if shown:
            logging.enable_progress_bar()
    return made


def arguments(path: Path) -> dict[str, Tensor]:
    """A model's arguments by name, from a safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with opened_shard(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - no mapping


def _batch(model: Any, inputs: Path | None) -> dict[str, Any]:
    if inputs is not None:
        return arguments(inputs)
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {getattr(model, 'main_input_name', 'no token ids')}: give its arguments in "
            "a file, --inputs FILE.safetensors"
        )
    config = model.config.get_text_config()
    ids = torch.randint(config.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def _by_peft(model: Path, adapter: Path, batch: Mapping[str, Any]) -> Any:
    """The output of PEFT's model, which changes the one it is given: so it gets one of its own."""
    from peft import PeftModel

    try:
        theirs = PeftModel.from_pretrained(model_in(model), str(adapter)).eval()
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"{adapter}: PEFT cannot read it: {e}") from e
    with torch.no_grad():
        return theirs(**batch)
