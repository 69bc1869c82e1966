"""Layers of a cache that belong to an adapter, behind those of the model: they grow, and move with its rows."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

OWNER = "peftfn_block"
"""Attribute of a layer of a cache: whose it is, where it is not the model's."""


class OwnLayers:
    """The layers of one owner in a cache of transformers', where several adapters may each have some of the rows.

    Args:
        owner: whose they are.
        cache: the model's cache; None: nothing is kept.
        rows: of the batch.
    """

    def __init__(self, owner: str, cache: Any, rows: int):
        self.owner, self.cache, self.size = owner, cache, rows
        self.made: list[tuple[Tensor | None, list[Any]]] = []
        if cache is None:
            return
        if not isinstance(getattr(cache, "layers", None), list) or getattr(cache, "is_compileable", True):
            raise ValueError(
                f"{owner}: an adapter needs layers of its own in the cache, and a {type(cache).__name__} has no room "
                "for them: give a DynamicCache, or use_cache=False"
            )
        self.stored = [layer for layer in cache.layers if getattr(layer, OWNER, None) == owner]
        had, before = (self.stored[0].get_seq_length() if self.stored else 0), cache.get_seq_length()
        if had != before:
            raise ValueError(
                f"{owner}: the cache has {before} earlier positions, and the adapter has seen {had} of them: begin "
                "with an empty cache (without a prefix in it), or give use_cache=False"
            )

    def of(self, rows: Tensor | None) -> Callable[[Any], Any]:
        """configuration ↦ a cache of these rows (None: of all), which the adapter's network goes on with."""

        def make(config: Any) -> Any:
            if self.cache is None:
                return None
            from transformers import DynamicCache

            mine = DynamicCache(config=config)
            if self.stored:
                mine.layers = [_chosen(copy.copy(layer), rows) for layer in self.stored]
            self.made.append((rows, mine.layers))
            return mine

        return make

    def close(self) -> None:
        """Put the layers of all rows into the model's cache, in place of the former ones."""
        if not self.made:
            return
        others = [layer for layer in self.cache.layers if getattr(layer, OWNER, None) != self.owner]
        new = [self._whole([layers[j] for _, layers in self.made]) for j in range(len(self.made[0][1]))]
        self.cache.layers[:] = others + new

    def _whole(self, layers: list[Any]) -> Any:
        """One layer of all rows, from those of some rows each. Rows of no adapter have zeros."""
        out = copy.copy(layers[0])
        setattr(out, OWNER, self.owner)
        if self.made[0][0] is not None:
            for k in ("keys", "values"):
                first = getattr(layers[0], k)
                every = first.new_zeros(self.size, *first.shape[1:])
                for (rows, _), layer in zip(self.made, layers, strict=True):
                    every = every.index_copy(0, rows, getattr(layer, k))  # type: ignore[arg-type]
                setattr(out, k, every)
        return out


def _chosen(layer: Any, rows: Tensor | None) -> Any:
    if rows is not None:
        layer.batch_select_indices(rows)
    return layer
