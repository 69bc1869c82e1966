"""The adapters of a server: names to folders of one directory, and a bank in which those that are used are resident."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor, nn

from peftfn.formats import load
from peftfn.many.bank import Bank
from peftfn.many.homes import fits, size
from peftfn.many.residents import BASE
from peftfn.many.stack import stack
from peftfn.net.net import Adapted
from peftfn.serving.batch import Stepper

_LONGEST = 128
_INSTEAD = "answer it with net.apply(…, method='generate')"


class Adapters:
    """Adapters by name, loaded from the folders of one directory when they are first asked for.

    Args:
        model: the base.
        root: the directory; None: only the base is served. No other file is ever read.
        slots: adapters of one plan that are resident at once.
        plans: of how many plans adapters may be. An adapter that fits into a plan exactly needs none of its own; a
            wider one of at most twice the size takes the plan's place.
        aliases: names that `put` may give to folders of other names: they are kept until they are removed.

    Raises:
        TypeError, ValueError: as for `Stepper`.
        NotADirectoryError: the root is none.
        PermissionError: it cannot be read.
    """

    def __init__(self, model: nn.Module, root: Path | None, *, slots: int = 64, plans: int = 4, aliases: int = 1000):
        self.model, self.root = model, None if root is None else directory(root)
        self.slots, self.plans, self.aliases, self.stepper = slots, plans, aliases, Stepper(model)
        self.bank: Bank | None = None
        self._lock, self._loading = Lock(), Lock()  # of the tables; of what is slow: one adapter at a time
        self._keys: dict[str, str] = {}  # name → its name in the bank, another one after each registration
        self._users: dict[str, int] = {}  # name in the bank → requests that run and wait
        self._given: dict[str, str] = {}  # alias → path
        self._gone: set[str] = set()  # taken away: not found again until put
        self._count = 0

    def acquire(self, name: str) -> str:
        """Return the adapter's name in the bank, which stays there until `release`: also if it is removed or replaced.

        Raises:
            KeyError: there is no adapter of this name.
            ValueError: the name or the file is not valid, or needs a plan too many.
        """
        with self._lock:
            if (key := self._taken(name)) is not None:
                return key
        with self._loading:
            with self._lock:
                if (key := self._taken(name)) is not None:
                    return key
                if name in self._gone:
                    raise KeyError(f"there is no adapter {name!r}: it was removed")
            self._put(name, self._folder(name, self._given.get(name)))
            with self._lock:
                key = self._taken(name)
                assert key is not None
                return key

    def release(self, key: str) -> None:
        """End one use of an adapter; the last one of an adapter that was removed or replaced frees it."""
        with self._lock:
            self._users[key] -= 1
            self._forget(key)

    def fetch(self, keys: Sequence[str]) -> dict[str, str]:
        """Write adapters into slots; {name in the bank: what is wrong} of those whose files cannot be read any more."""
        return {} if self.bank is None else {key: self._said(e) for key, e in self.bank.fetch(keys).items()}

    def put(self, name: str, path: str | None = None) -> None:
        """Register an adapter, or replace it: requests that run and wait finish with the old one.

        Args:
            name: what requests call it.
            path: of its folder, relative to the directory; None: the folder of its name.

        Raises:
            KeyError: there is no folder.
            ValueError: as for `acquire`; the path leads out of the directory; or it would be an alias too many.
        """
        with self._loading:
            folder = self._folder(name, path)
            alias = path is not None and folder != self._folder_of(name)
            if alias and name not in self._given and len(self._given) >= self.aliases:
                raise ValueError(
                    f"{name!r}: {len(self._given)} names were given to folders of other names, and the server keeps no "
                    "more of them: DELETE one, or start it with more --aliases"
                )
            self._put(name, folder)
            with self._lock:
                self._gone.discard(name)
                self._given.update({name: path}) if alias and path is not None else self._given.pop(name, None)

    def remove(self, name: str) -> None:
        """Take an adapter away; its files stay. Requests that run and wait finish with it.

        Raises:
            KeyError: there is no adapter of this name.
        """
        with self._loading:
            if name not in self._keys and name not in self._given:
                self._folder(name)  # or there is none
            with self._lock:
                if name in self._gone:
                    raise KeyError(f"there is no adapter {name!r}: it was removed already")
                if (own := self._folder_of(name)) is not None and own.is_dir():  # else it is not found again anyway
                    self._gone.add(name)
                self._given.pop(name, None)
                if (key := self._keys.pop(name, None)) is not None:
                    self._forget(key)

    @property
    def names(self) -> list[str]:
        """Every name that a request may give: what is registered, and the folders of the directory."""
        with self._lock:
            known, gone = {*self._keys, *self._given}, set(self._gone)
        found = set() if self.root is None else {e.name for e in os.scandir(self.root) if e.is_dir()}
        return sorted((known | {name for name in found if _odd(name) is None}) - gone)

    @property
    def resident(self) -> int:
        """How many are in slots."""
        return 0 if self.bank is None else len(self.bank.resident)

    @property
    def registered(self) -> int:
        """How many names were loaded and not removed."""
        with self._lock:
            return len(self._keys)

    # Under the lock of the tables.

    def _taken(self, name: str) -> str | None:
        key = self._keys.get(name)
        if key is not None:
            self._users[key] = self._users.get(key, 0) + 1
        return key

    def _forget(self, key: str) -> None:
        if not self._users.get(key) and self._keys.get(key.rpartition("#")[0]) != key:
            self._users.pop(key, None)
            if self.bank is not None and key in self.bank:
                self.bank.remove(key)

    def _said(self, why: Exception) -> str:
        """What an error says, without the place of the directory, which is nobody's business."""
        return str(why).replace(f"{self.root}{os.sep}", "")

    # Under the lock of what is slow.

    def _folder_of(self, name: str) -> Path | None:
        """Where the folder of an adapter's own name is, or would be. The name was checked."""
        return None if self.root is None else (self.root / name).resolve()

    def _folder(self, name: str, path: str | None = None) -> Path:
        """The folder of an adapter, with every file of it in the directory."""
        if (odd := _odd(name)) is not None:
            raise ValueError(f"{name!r:.200} cannot name an adapter: {odd}")
        if self.root is None:
            raise KeyError(f"there is no adapter {name!r}: the server has the base alone, no --adapters")
        given = name if path is None else path
        if "\0" in given:
            raise ValueError(f"path {given!r:.200} has a NUL character")
        folder = (self.root / given).resolve()
        if folder == self.root or not folder.is_relative_to(self.root):
            raise ValueError(f"path {given!r:.200} leads out of the adapters' directory, or is the directory itself")
        if not folder.is_dir():
            raise KeyError(f"there is no adapter {name!r}: the directory has no folder {given!r:.200}")
        for at, folders, files in os.walk(folder):
            for entry in (Path(at, n) for n in folders + files):
                if not entry.resolve().is_relative_to(self.root):
                    raise ValueError(f"{name!r}: {entry.name} is a link that leads out of the adapters' directory")
        return folder

    def _put(self, name: str, folder: Path) -> None:
        key = f"{name}#{self._count}"
        self._count += 1
        try:
            self._into_bank(key, folder)
        except (ValueError, OSError) as e:
            raise ValueError(f"{name!r}: {self._said(e)}") from e
        with self._lock:
            old = self._keys.get(name)
            self._keys[name] = key
            if old is not None:
                self._forget(old)

    def _into_bank(self, key: str, folder: Path) -> None:
        if self.bank is not None:
            try:
                self.bank.put(key, folder)
                return
            except ValueError:  # a broken file, which loading says again, or one that fits no plan
                pass
        net, adapter = load(folder, self.model)
        self._stepwise(net, adapter)
        self.bank = self._with_room(net)
        self.bank.put(key, folder)

    def _stepwise(self, net: Adapted, adapter: Mapping[str, Any]) -> None:
        """ValueError where an adapter needs more than its rows' keys and values from one step to the next."""
        for name, entry in net.plan.items():
            method = entry.method
            if method.adapts == "backbone" or getattr(method, "sees_mask", False):
                raise ValueError(
                    f"{name or 'the model'}: {type(method).__name__} counts the tokens of a whole call, which a row "
                    f"that goes on step by step has not: {_INSTEAD}"
                )

        def run(input_ids: Tensor, **inputs: Any) -> Any:
            return net.mixed(stack([adapter]), [0] * len(input_ids), input_ids=input_ids, **inputs)

        try:
            agrees = self.stepper.agrees(run)
        except (ValueError, RuntimeError) as e:
            raise ValueError(f"it cannot go on step by step in a batch ({e}): {_INSTEAD}") from e
        if not agrees:
            raise ValueError(f"step by step in a batch it gets other logits than in one pass: {_INSTEAD}")

    def _with_room(self, net: Adapted) -> Bank:
        """The bank, with slots of one more net. What is resident stays so; a wider net takes it over."""
        nets = () if self.bank is None else self.bank.nets.nets
        instead = [other for other in nets if size(net) <= 2 * size(other) and fits(other, net)]
        if len(nets) - len(instead) >= self.plans:
            raise ValueError(
                f"it fits none of the {self.plans} plans (methods, ranks and targets) that the server has slots for: "
                "start it with more --plans"
            )
        if self.bank is None:
            return Bank([net], self.slots)
        self.bank.grow(net, self.slots, instead=instead)
        return self.bank


def directory(root: Path) -> Path:
    """The directory without links. NotADirectoryError where there is none, PermissionError where it cannot be read."""
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder; give one whose sub-folders are adapters")
    os.listdir(root)
    return root.resolve()


def _odd(name: object) -> str | None:
    """What is wrong with the name of an adapter."""
    if not isinstance(name, str) or not name or len(name) > _LONGEST:
        return f"give a text of 1 to {_LONGEST} characters"
    if name.startswith(".") or name == BASE:
        return f"it must not begin with a dot, nor be {BASE}"
    if any(c in "/\\:#" or not c.isprintable() for c in name):
        return "it must have no path separator, colon, number sign, or character that cannot be printed"
    return None
