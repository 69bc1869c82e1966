"""Rules: which of a model's sites a name pattern matches, and which rule takes each."""

import re
from collections.abc import Callable, Mapping

from peftfn.core.method import Method, named
from peftfn.model.model import Model
from peftfn.model.names import ends, matches, near
from peftfn.model.site import Site


def checked(rules: Mapping[str, Method]) -> Mapping[str, Method]:
    """Return the rules. Raise unless they are a dict of patterns and methods that a plan supports."""
    if isinstance(rules, Method):
        raise TypeError(
            f"rules is {rules}, a method; say which parameters it adapts: peftfn.adapt(model, {{'q_proj': "
            f"peftfn.{rules}}}), or peftfn.adapt(model, peftfn.targets(model, peftfn.{rules})) for PEFT's defaults"
        )
    if not isinstance(rules, Mapping) or not rules:
        what = "empty" if isinstance(rules, Mapping) else f"a {type(rules).__name__}"
        like = named(type(rules).__name__) or "LoRA"
        raise ValueError(f"rules is {what}; give a dict of name pattern → method, like {{'q_proj': peftfn.{like}()}}")
    for pattern, method in rules.items():
        if not isinstance(pattern, str):
            raise TypeError(f"rule {pattern!r}: a pattern is a string; for several names write r'(q|v)_proj'")
        if not isinstance(method, Method):
            theirs = named(type(method).__name__)  # a configuration
            has = f"a {type(method).__name__}, which is PEFT's" if theirs else repr(method)
            like = f"peftfn.{theirs}(…)" if theirs else "peftfn.LoRA(rank=8)"
            raise TypeError(f"rule {pattern!r} has {has}; it must have a method, like {like}")
    return dict(rules)


def offered(model: Model, method: Method) -> Mapping[str, Site]:
    """The sites that a method's rule may match, as its family says."""
    return _LISTINGS[method.adapts][0](model)


_LISTINGS: dict[str, tuple[Callable[[Model], Mapping[str, Site]], Callable[[str, str], bool], str]] = {
    "parameter": (lambda model: model.sites, matches, "parameters"),
    "module": (lambda model: model.places, ends, "modules"),
    "backbone": (lambda model: model.backbones, ends, "backbones"),
}
"""What methods adapt → (how the model lists it, how a pattern matches a name, what messages call several)."""


def match(rules: Mapping[str, Method], offers: Mapping[str, Mapping[str, Site]]) -> dict[str, str]:
    """Return site name → the rule that takes it: the first that matches and whose method supports the kind.

    offers: rule → the sites that it may match.
    """
    taken: dict[str, str] = {}
    for pattern, method in rules.items():
        found, (_, fits, kind) = offers[pattern], _LISTINGS[method.adapts]
        try:
            hits = [s for s in found.values() if any(fits(pattern, n) for n in (s.name, *s.aliases))]
        except re.error as e:
            raise ValueError(f"rule {pattern!r} is not a valid regular expression: {e}") from e
        accepted = [s for s in hits if s.kind in method.kinds]
        if not hits:
            part = next((n for n in found if pattern in n), None)
            cure = f"; for a part of a word, as in {part}, write a regular expression: r'{pattern}.*'" if part else ""
            if pattern in ("all-linear", "norms"):
                cure = f"; it is a word of peftfn.targets(model, method, {pattern!r}), which returns rules"
            else:
                cure = near(pattern, list(found)) + cure
            raise ValueError(f"rule {pattern!r} matches none of the model's {len(found)} {kind}{cure}")
        if not accepted:
            seen = ", ".join(f"{s.name} ({s.kind})" for s in hits[:3])
            raise ValueError(
                f"rule {pattern!r} matches {len(hits)} {kind}, {seen} first, but {type(method).__name__} does not "
                f"support their kinds: it supports {', '.join(sorted(method.kinds))}"
            )
        free = [s for s in accepted if s.name not in taken]
        if not free:
            raise ValueError(
                f"rule {pattern!r} never applies: earlier rules already take all of its {len(accepted)} sites, "
                f"{accepted[0].label} first. The first match wins: put the narrower rule first."
            )
        taken |= {s.name: pattern for s in free}
    return taken
