"""Trials with their tensors: in a folder, a file each, written whole or not at all; or in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfn.formats.files import write
from peftfn.formats.tensor_files import opened
from peftfn.sweeps.trial import Trial
from peftfn.tensors.tree import mapped

Tree = dict[str, Any]


class Store:
    """Where a sweep keeps its trials.

    Args:
        folder: a folder, made if there is none; None: in memory.
    """

    def __init__(self, folder: Path | None):
        self.folder, self.held = folder, dict[str, Tree]()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, trial: Trial, tree: Tree, net: str) -> None:
        """Replace what is kept of a trial. A diverged one's tensors are not kept: they are no adapter."""
        tree = {} if trial.status == "diverged" else tree
        if self.folder is None:
            self.held[trial.name] = mapped(tree, lambda t: t.detach().clone())
        else:
            write(self._path(trial.name), _flat(tree), {"trial": trial.to_json(), "net": net})

    def trial(self, name: str, net: str) -> Trial | None:
        """What is kept of a trial, or None. ValueError if it was of another net."""
        if self.folder is None or not self._path(name).is_file():
            return None
        with opened(self._path(name)) as file:
            trial = Trial.from_json(file.metadata["trial"])
            if file.metadata["net"] != net:
                raise ValueError(
                    f"{self._path(name)}: {dict(trial.config)} was trained with {file.metadata['net']}, and is now "
                    f"{net}: give the sweep another folder"
                )
        return trial

    def tensors(self, trial: Trial, like: Tree) -> Tree:
        """The tensors of a trial. ValueError if they are not those of a tree of this structure."""
        if self.folder is None:
            return self.held[trial.name]
        with opened(self._path(trial.name)) as file:
            want = _flat(like)
            if file.meta.keys() != want.keys():
                odd = sorted(file.meta.keys() ^ want.keys())[0]
                raise ValueError(
                    f"{self._path(trial.name)}: {odd} is only in one of the file and this sweep: net or optimizer are "
                    "others; give the sweep another folder"
                )
            for key, t in want.items():
                file.check(key, t.shape, t.is_floating_point())
            return _filled(like, lambda key, t: file.tensor(key, t.device, exact=True))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


def _flat(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Keys are JSON lists, because names of sites may have any character."""
    out: dict[str, Tensor] = {}
    for k, v in tree.items():
        out |= _flat(v, (*above, k)) if isinstance(v, Mapping) else {json.dumps([*above, k]): v}
    return out


def _filled(tree: Mapping[str, Any], f: Any, above: tuple[str, ...] = ()) -> Tree:
    return {
        k: _filled(v, f, (*above, k)) if isinstance(v, Mapping) else f(json.dumps([*above, k]), v)
        for k, v in tree.items()
    }
