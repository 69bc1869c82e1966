"""A model's cache of keys and values: what models call it, and layers in it that belong to an adapter, behind those of
the model: they grow, and move with its rows."""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

OWNER, PREFIX = "peftfn_block", "peftfn_prefix"
"""Attribute of a layer of a cache: whose it is, where it is not the model's. Attribute of a cache: the prefix in it."""


class Prefixed(NamedTuple):
    """The first positions of a cache that are a prefix, which the model's own layers alone have."""

    size: int = 0
    shift: Tensor | int = 0  # by how much it moves the positions of each row's tokens [rows, 1]


def prefix_in(cache: Any) -> Prefixed:
    return getattr(cache, PREFIX, None) or Prefixed()


def is_cache(v: Any) -> bool:
    """Whether an argument is a cache of transformers'."""
    return hasattr(v, "get_seq_length") and hasattr(v, "update")


def grows(cache: Any) -> bool:
    """Whether a cache of transformers' has room for more positions than it was made for. (An empty one is of none.)"""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    return isinstance(layers, list) and not (layers and getattr(cache, "is_compileable", True))


def cache_name(names: Collection[str]) -> str:
    """What a module with arguments of these names calls its cache. (transformers renamed it in release 5.24.)"""
    return "cache" if "cache" in names and "past_key_values" not in names else "past_key_values"


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache in a module's arguments by name, or in its output; None if there is none. A call may use the old name
    where the module has the new one."""
    return own if is_cache(own := given.get("cache")) else given.get("past_key_values")


class OwnLayers:
    """The layers of one owner in a cache of transformers', where several adapters may each have some of the rows.

    Args:
        owner: whose they are.
        cache: the model's cache; None: nothing is kept.
        rows: of the batch.
        before: positions that the cache had before this step; None: those that it has now.
    """

    def __init__(self, owner: str, cache: Any, rows: int, before: int | None = None):
        self.owner, self.cache, self.size = owner, cache, rows
        self.made: list[tuple[Tensor | None, list[Any]]] = []
        if cache is None:
            return
        if not grows(cache):
            raise ValueError(
                f"{owner}: an adapter needs layers of its own in the cache, and a {type(cache).__name__} has no room "
                "for them: give a DynamicCache, or use_cache=False"
            )
        self.stored = [layer for layer in cache.layers if getattr(layer, OWNER, None) == owner]
        had = self.stored[0].get_seq_length() if self.stored else 0
        before = (cache.get_seq_length() if before is None else before) - prefix_in(cache).size
        if had != before:
            raise ValueError(
                f"{owner}: the cache has {before} earlier positions, and the adapter has seen {had} of them: begin "
                "with an empty cache, go on with the adapters that it began with, or give use_cache=False"
            )

    def of(self, rows: Tensor | None) -> Callable[[Any], Any]:
        """configuration ↦ a cache of these rows (None: of all), which the adapter's network goes on with."""

        def make(config: Any) -> Any:
            if self.cache is None:
                return None
            from transformers import DynamicCache

            mine = DynamicCache(config=config)
            mine.layers = self._begun(rows, mine.layers)
            return mine

        return make

    def one(self, rows: Tensor | None, like: Any) -> Any:
        """The only layer of these rows (None: of all), of the kind of a layer of the model."""
        sizes = {"sliding_window": like.sliding_window} if hasattr(like, "sliding_window") else {}
        return self._begun(rows, [type(like)(**sizes)])[0]

    def _begun(self, rows: Tensor | None, fresh: list[Any]) -> list[Any]:
        """The layers of these rows, which the adapter fills now: those that it had, or fresh ones."""
        layers = [_chosen(copy.copy(layer), rows) for layer in self.stored] or fresh
        self.made.append((rows, layers))
        return layers

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


class Shared:
    """The model's cache at one module of a batch: each adapter sees its rows of what the module's adapters add to it.

    Args:
        cache: the model's cache.
        rows: of the batch.
        apart: whether several adapters may act on one row, so that each has layers of its own for all rows.
    """

    def __init__(self, cache: Any, rows: int, apart: bool):
        self.cache, self.rows, self.apart = cache, rows, apart
        self.own: dict[str, OwnLayers] = {}

    def of(self, k: int, rows: Tensor) -> "Seen":
        """What adapter k sees of it, on these rows."""
        return Seen(self, f" (adapter {k} of the batch)" if self.apart else "", rows)

    def close(self) -> None:
        for own in self.own.values():
            own.close()


class Seen:
    """A `Shared` cache as one of its adapters sees it; in all else the model's cache."""

    def __init__(self, shared: Shared, suffix: str, rows: Tensor):
        self._shared, self._suffix = shared, suffix
        self._rows = None if len(rows) == shared.rows else rows  # they are in their order

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared.cache, name)

    def layer(self, owner: str, before: int, like: Any) -> Any:
        owner, shared = f"{owner}{self._suffix}", self._shared
        if owner not in shared.own:
            shared.own[owner] = OwnLayers(owner, shared.cache, shared.rows, before)
        return shared.own[owner].one(self._rows, like)


def own_layer(cache: Any, owner: str, rows: int, before: int, like: Any) -> tuple[Any, Callable[[], None]]:
    """(the layer of its own that an adapter at a module has in the cache, what puts it back when it is filled).

    before, like: as of `OwnLayers`.
    """
    if isinstance(cache, Seen):
        return cache.layer(owner, before, like), lambda: None  # with those of the other adapters
    own = OwnLayers(owner, cache, rows, before)
    return own.one(None, like), own.close


def _chosen(layer: Any, rows: Tensor | None) -> Any:
    if rows is not None:
        layer.batch_select_indices(rows)
    return layer
