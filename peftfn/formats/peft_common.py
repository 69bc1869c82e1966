"""One configuration of PEFT's for all sites: patterns where they differ, names of the targets, and a check that what is
written means the same when it is read."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from peftfn.core.method import Method
from peftfn.core.plan import Entry
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_table as table
from peftfn.formats.peft_keys import PeftNames, Place
from peftfn.formats.peft_limits import some
from peftfn.tensors.precision import wide


def common(
    kind: str, each: Mapping[str, dict[str, Any]], modules: Mapping[str, str], model: PeftNames
) -> dict[str, Any]:
    """One configuration for all sites: where they differ, patterns for those that have one."""
    out: dict[str, Any] = {}
    patterns = {} if kind in table.UNPATTERNED else table.PATTERNS
    fields = {key: pattern for pattern, names in patterns.items() for key in names}
    for key in dict.fromkeys(k for c in each.values() for k in c):
        values = {n: c.get(key) for n, c in each.items()}
        out[key] = Counter(map(repr, values.values())).most_common(1)[0][0]
        out[key] = next(v for v in values.values() if repr(v) == out[key])
        others = {n: v for n, v in values.items() if v != out[key]}
        if others and key == "feedforward_modules":
            continue
        if others and key == "use_bdlora" and (both := _sides(values, modules)):
            out[key] = both
            continue
        if others and key not in fields:
            raise ValueError(
                f"PEFT's {kind} has one {key} for all layers; here it is {out[key]!r}, and "
                f"{next(iter(others.values()))!r} at {some(list(others))}"
            )
        if others:
            legacy = kind in table.LEGACY
            out[fields[key]] = {modules[n] if legacy else f"^{re.escape(modules[n])}": v for n, v in others.items()}
    return out


def _sides(values: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any] | None:
    """BD-LoRA on both sides, which PEFT distinguishes by parts of the layers' last names; None where it cannot."""
    values = {n: v if v and v["nblocks"] > 1 else None for n, v in values.items()}  # one block is a plain LoRA
    blocks = {v["nblocks"] for v in values.values() if v}
    if len(blocks) != 1:
        return None
    out: dict[str, Any] = {"nblocks": min(blocks), "match_strict": None not in values.values()}
    last = {n: m.rpartition(".")[2] for n, m in modules.items()}
    for side in ("target_modules_bd_a", "target_modules_bd_b"):
        mine = {n for n, v in values.items() if v and v[side]}
        out[side] = sorted({last[n] for n in mine})
        if any(any(part in name for part in out[side]) != (n in mine) for n, name in last.items()):
            return None
    return out


def same(
    config: dict[str, Any],
    main: Mapping[str, Entry],
    places: Mapping[str, Place],
    adapter: Mapping[str, Any],
    model: PeftNames,
) -> None:
    """ValueError unless what was written means, read again, the same change of the weight."""
    seen: set[tuple[Method, str]] = set()
    for n, e in main.items():
        if (e.method, e.site.kind) in seen or not e.method.mergeable:
            continue
        seen.add((e.method, e.site.kind))
        again = configs.method(
            {**table.DEFAULTS.get(config["peft_type"], {}), **config},
            places[n].module,
            e.site.kind,
            Path("(written)"),
        )
        again, mine, w = again.eval(), e.method.eval(), e.site.canonical(model.weights[n])
        if w.is_meta or again == mine:
            continue
        p = {k: wide(t) for k, t in {**e.frozen, **(adapter[e.bank] if e.bank else {}), **adapter[n]}.items()}
        if e.site.stacked:
            p, w = {k: t if k in e.common else t[0] for k, t in p.items()}, w[0]
        w = wide(w)
        a, b = (m.delta(m.prepare(p, w), w) for m in (mine, again))
        if not torch.equal(a, b):
            raise ValueError(f"{n}: PEFT cannot express {e.method}; the nearest it has is {again}")


def chosen_targets(
    kind: str, main: Mapping[str, Entry], names: Mapping[str, str], modules: list[str], model: PeftNames
) -> list[str] | str:
    """`target_modules`: where PEFT shares tensors by what is in it, so that those of a rule share."""
    plain = targets(modules, model.modules)
    if not all(e.method.peft and e.method.peft.per_target for e in main.values()):
        return plain
    for given in (plain, modules, "|".join(map(re.escape, modules))):
        if isinstance(given, list) and len(given) >= table.MANY:
            continue
        pairs = {(configs.family(given, names[n]), e.site.shape, e.rule) for n, e in main.items()}
        if len(pairs) == len({pair[:2] for pair in pairs}) == len({rule for *_, rule in pairs}):
            return given
    raise ValueError(
        f"PEFT's {kind} shares among the layers of one shape that one name in target_modules matches, and no "
        f"target_modules says what the rules {sorted({e.rule for e in main.values()})} do: use one rule for each such "
        "name and shape, or save in the native format"
    )


def targets(modules: Iterable[str], known: Iterable[str]) -> list[str] | str:
    """`target_modules` for exactly these modules: last names if these match no other, else full names, else a regex."""
    wanted = set(modules)
    for names in (dict.fromkeys(m.rpartition(".")[2] for m in wanted), dict.fromkeys(modules)):
        if {k for k in known if any(k == n or k.endswith(f".{n}") for n in names)} == wanted:
            return sorted(names)
    return "|".join(re.escape(m) for m in sorted(wanted))


def two_targets(modules: list[str], ahead: set[str], model: PeftNames) -> tuple[list[str] | str, list[str] | str]:
    """(target_modules, feedforward_modules), the second a part of the first."""
    first, second = targets(modules, model.modules), targets([m for m in modules if m in ahead], model.modules)
    caught = {m for m in modules if isinstance(second, list) and any(m.endswith(n) for n in second)}
    if isinstance(first, list) and isinstance(second, list) and caught == ahead and set(second) <= set(first):
        return first, second
    return "|".join(re.escape(m) for m in sorted(modules)), "|".join(re.escape(m) for m in sorted(ahead))
