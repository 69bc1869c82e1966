"""Rules: which of a model's sites a name pattern matches, and which rule takes each."""

import re
from collections.abc import Mapping

from peftfn.core.method import Method, Weight
from peftfn.model.names import matches, near
from peftfn.model.site import Site


def checked(rules: Mapping[str, Method]) -> Mapping[str, Weight]:
    """Return the rules. Raise unless they are a dict of patterns and methods that a plan supports."""
    if isinstance(rules, Method):
        raise TypeError(
            f"rules is {rules}, a method; say which parameters it adapts: peftfn.adapt(model, {{'q_proj': "
            f"peftfn.{rules}}}), or peftfn.adapt(model, peftfn.targets(model, peftfn.{rules})) for PEFT's defaults"
        )
    if not isinstance(rules, Mapping) or not rules:
        what = "empty" if isinstance(rules, Mapping) else f"a {type(rules).__name__}"
        raise ValueError(f"rules is {what}; give a dict of name pattern → method, like {{'q_proj': peftfn.LoRA()}}")
    for pattern, method in rules.items():
        if not isinstance(pattern, str):
            raise TypeError(f"rule {pattern!r}: a pattern is a string; for several names write r'(q|v)_proj'")
        if not isinstance(method, Weight):
            raise TypeError(f"rule {pattern!r} has {method!r}; it must have a method, like peftfn.LoRA(rank=8)")
    return {pattern: method for pattern, method in rules.items() if isinstance(method, Weight)}


def match(rules: Mapping[str, Weight], found: Mapping[str, Site]) -> dict[str, str]:
    """Return site name → the rule that takes it: the first that matches and whose method supports the kind."""
    taken: dict[str, str] = {}
    for pattern, method in rules.items():
        try:
            hits = [s for s in found.values() if any(matches(pattern, n) for n in (s.name, *s.aliases))]
        except re.error as e:
            raise ValueError(f"rule {pattern!r} is not a valid regular expression: {e}") from e
        accepted = [s for s in hits if s.kind in method.kinds]
        if not hits:
            part = next((n for n in found if pattern in n), None)
            cure = f"; for a part of a word, as in {part}, write a regular expression: r'{pattern}.*'" if part else ""
            cure = near(pattern, list(found)) + cure
            raise ValueError(f"rule {pattern!r} matches none of the model's {len(found)} parameters{cure}")
        if not accepted:
            seen = ", ".join(f"{s.name} ({s.kind})" for s in hits[:3])
            raise ValueError(
                f"rule {pattern!r} matches {len(hits)} parameters, {seen} first, but {type(method).__name__} does not "
                f"support their kinds: it supports {', '.join(sorted(method.kinds))}"
            )
        free = [s for s in accepted if s.name not in taken]
        if not free:
            raise ValueError(
                f"rule {pattern!r} never applies: earlier rules already take all of its {len(accepted)} sites, "
                f"{accepted[0].name} first. The first match wins: put the narrower rule first."
            )
        taken |= {s.name: pattern for s in free}
    return {name: taken[name] for name in found if name in taken}
