"""What `pf.suggest` returns: rules for `adapt`, with the figures that speak for them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftfn.core.method import Method
from peftfn.tools.table import table


@dataclass(frozen=True)
class Suggested:
    """One site in a `Suggestion`.

    Args:
        name: the site.
        value: what was looked at: the condition number, or the share of the sum of squares that the rank holds. None
            for a weight that was too large to look at.
        rank: the rank that is suggested; None for a method without one, 0 for a site that is left out.
        chosen: whether the rules adapt the site.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        (site,) = pf.suggest.targets(model, pf.LoRA(rank=2)).sites
        assert site.chosen and site.rank == 2
    """

    name: str
    value: float | None
    rank: int | None
    chosen: bool


class Suggestion(Mapping[str, Method]):
    """Rules for `adapt`, and the figures behind them: a mapping of patterns to methods that prints as a table.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        found = pf.suggest.targets(model, pf.LoRA(rank=2), count=1)
        print(found)
        net = pf.adapt(model, found)
    """

    def __init__(self, what: str, sites: Sequence[Suggested], methods: Mapping[str, Method]):
        """Args:
        what: the heading of the values.
        sites: every site that was looked at.
        methods: {site: method} of those that are chosen, and of others that the rules adapt too.
        """
        self.what, self.sites = what, tuple(sites)
        self.methods = dict(methods)
        of: dict[Method, list[str]] = {}
        for name, method in methods.items():
            of.setdefault(method, []).append(re.escape(name))
        self._rules = {f"^({'|'.join(names)})$": m for m, names in of.items()}

    def __getitem__(self, pattern: str) -> Method:
        return self._rules[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __str__(self) -> str:
        rows = [("site", self.what, "rank", "chosen")]
        for s in self.sites:
            value = "too large" if s.value is None else f"{s.value:.3g}"
            rows.append((s.name, value, "" if s.rank is None else str(s.rank), "yes" if s.chosen else ""))
        return table(rows)

    __repr__ = __str__

    def peft(self) -> dict[str, Any]:
        """Return the same choice as arguments of PEFT's `LoraConfig`.

        Returns:
            target_modules, target_parameters (None if there are none), and, of methods with a rank, rank_pattern and
            alpha_pattern.

        Example:
            model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
            found = pf.suggest.targets(model, pf.LoRA(rank=2), count=1)
            assert found.peft()["target_modules"] in (["0"], ["1"])
        """
        layers = {n: n.removesuffix(".weight") for n in self.methods}
        ranks = {layers[n]: int(r) for n, m in self.methods.items() if (r := getattr(m, "rank", None)) is not None}
        alphas = {layers[n]: a for n, m in self.methods.items() if (a := getattr(m, "alpha", None)) is not None}
        return {
            "target_modules": [at for n, at in layers.items() if at != n],
            "target_parameters": [at for n, at in layers.items() if at == n] or None,
            "rank_pattern": ranks,
            "alpha_pattern": {**ranks, **alphas},
        }

    def json(self) -> dict[str, Any]:
        """Return plain values, for `json.dumps`.

        Returns:
            {"value": what was looked at, "sites": the fields of each, "peft": as `peft` returns}.

        Example:
            model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            found = pf.suggest.targets(model, pf.LoRA(rank=2)).json()
            assert found["sites"][0]["name"] == "0.weight"
        """
        return {"value": self.what, "sites": [asdict(s) for s in self.sites], "peft": self.peft()}
