"""status: what a module holds, as records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from peftfn.tensors.tree import leaves
from peftfn.view.module import _view, parameters_of


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter of a module."""

    name: str
    active: bool  # in this thread
    trainable: bool | None  # None: some leaves are, some not
    sites: int
    parameters: int  # in all its leaves
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    offloaded: bool
    methods: tuple[str, ...]
    weight: float = 1.0  # what `use` multiplies its change by, where it is active


@dataclass(frozen=True)
class SiteStatus:
    """One adapter of a module at one site, or its tensors that several sites share."""

    site: str  # or the name that the adapter has for what is shared
    adapter: str
    method: str
    active: bool  # in this thread
    requires_grad: bool | None  # None: some tensors do, some not
    parameters: int
    device: str  # several with "/" between them
    dtype: str


@dataclass(frozen=True)
class Status:
    """What a module holds; prints as a table."""

    model: str
    base: int  # parameters of the base
    base_trainable: int
    adapters: tuple[AdapterStatus, ...]
    by_site: tuple[SiteStatus, ...] = field(repr=False)  # a row for each adapter at each site

    def __str__(self) -> str:
        lines = [f"{self.model}: base of {self.base:,} parameters, {self.base_trainable:,} of them trainable"]
        for a in self.adapters:
            marks = [
                {True: "trainable", False: "frozen", None: "partly trainable"}[a.trainable],
                *([f"active × {a.weight:g}" if a.weight != 1 else "active"] if a.active else []),
                *(["offloaded"] if a.offloaded else []),
            ]
            lines.append(
                f"  {a.name}: {', '.join(marks)}; {a.parameters:,} parameters at {a.sites} sites, "
                f"{'/'.join(a.dtypes)} on {'/'.join(a.devices)}; {', '.join(a.methods)}"
            )
        return "\n".join(lines)


def status(module: nn.Module) -> Status:
    """Return which adapters a module holds, which is active in this thread, which train, and where they are.

    Args:
        module: what `as_module` returned, or a wrapper around it.

    Returns:
        A `Status`, which prints as a table; `status(m).adapters` has a row for each adapter, and `status(m).by_site`
        one for each adapter at each site. `pandas.DataFrame(status(m).by_site)` is a table of the latter.

    Raises:
        ValueError: there is no module view in `module`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init())
        assert pf.status(m).adapters[0].parameters == 2 * 8 + 4 * 2
        assert pf.status(m).by_site[0].site == "0.weight"
    """
    view, _ = _view(module, None, any_name=True)
    state = view._peftfn
    rows, ours = [], set()
    by_site: list[SiteStatus] = []
    for name, plan in state.plans.items():
        active, tree = name in state.choice.active.names, parameters_of(view, name)
        of_bank = {bank: next(e for e in plan.values() if e.bank == bank) for bank in plan.banks}
        for at, leaf in tree.items():
            here = _Tensors.of(leaf)
            method = str((plan.get(at) or of_bank[at]).method)
            where = "/".join(here.devices), "/".join(here.dtypes)
            by_site.append(SiteStatus(at, name, method, active, here.trains, here.parameters, *where))
        every = _Tensors.of(tree)
        ours |= {id(t) for t in leaves(tree)}
        rows.append(
            AdapterStatus(
                name=name,
                active=active,
                trainable=every.trains,
                sites=len(plan),
                parameters=every.parameters,
                devices=every.devices,
                dtypes=every.dtypes,
                offloaded=name in state.offloaded,
                methods=tuple(dict.fromkeys(str(e.method) for e in plan.values())),
                weight=state.choice.active.weight(name) if active else 1.0,
            )
        )
    base = [p for p in view.parameters() if id(p) not in ours]
    trainable = sum(p.numel() for p in base if p.requires_grad)
    return Status(type(view).__name__, sum(p.numel() for p in base), trainable, tuple(rows), tuple(by_site))


class _Tensors(NamedTuple):
    """What the parameters in a tree are."""

    trains: bool | None  # None: some do, some not
    parameters: int
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "_Tensors":
        ts = [t for t in leaves(tree) if isinstance(t, nn.Parameter)]
        flags = {t.requires_grad for t in ts}
        devices, dtypes = ({str(getattr(t, k)).removeprefix("torch.") for t in ts} for k in ("device", "dtype"))
        trains = flags.pop() if len(flags) == 1 else None
        return cls(trains, sum(t.numel() for t in ts), tuple(sorted(devices)), tuple(sorted(dtypes)))
