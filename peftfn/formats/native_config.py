"""peftfn.json: an adapter's rules, methods and shapes, as text and as values."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftfn.core.method import Method, registry
from peftfn.formats import bases
from peftfn.formats.files import read_json
from peftfn.formats.peft_extra import checked

VERSION = 1


def read(where: Path) -> dict[str, Any]:
    """peftfn.json, its structure checked."""
    config = read_json(where)
    have = (config.get("format"), config.get("version")) if isinstance(config, dict) else (None, None)
    if have != ("peftfn", VERSION):
        raise ValueError(
            f"{where}: format {have[0]!r}, version {have[1]!r}; this release reads 'peftfn', version {VERSION}"
        )
    for key, kind in {"id": str, "rules": list, "constants": dict, "sites": dict}.items():
        if not isinstance(config.get(key), kind) or (not config[key] and key in ("rules", "sites")):
            raise ValueError(f"{where}: {key} is {str(config.get(key))[:80]}; it must be a {kind.__name__}, not empty")
    for rule in config["rules"]:
        if not (isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str)):
            raise ValueError(f"{where}: rules has {str(rule)[:80]}; it must be a pattern and a method")
    for name, site in config["sites"].items():
        if not (isinstance(site, dict) and site.keys() == {"shape", "rule"} and isinstance(site["rule"], str)):
            raise ValueError(f"{where}: sites: {name} is {str(site)[:80]}; it must have a shape and a rule")
    for name, keys in config["constants"].items():
        if not (isinstance(keys, dict) and all(isinstance(k, str) for k in keys.values())):
            raise ValueError(f"{where}: constants: {name} is {str(keys)[:80]}; it must be name → key")
    if len({p for p, _ in config["rules"]}) != len(config["rules"]):
        raise ValueError(f"{where}: rules: a pattern occurs twice")
    checked(config.get("extra", {}), where)
    bases.checked(config.get("base", {}), config["sites"], where)
    return config


def rules_of(config: Mapping[str, Any], where: Path) -> tuple[dict[str, Method], dict[str, str]]:
    """(pattern → method, site → pattern). ValueError for a rule without a site, or a site without a rule."""
    rules = {pattern: from_json(method, where) for pattern, method in config["rules"]}
    taken = {name: site["rule"] for name, site in config["sites"].items()}
    for name, rule in taken.items():
        if rule not in rules:
            raise ValueError(f"{where}: {name} has the rule {rule[:80]!r}, which has no method for it")
    if rules.keys() != set(taken.values()):
        raise ValueError(f"{where}: the rule {min(rules.keys() - set(taken.values()))[:80]!r} matches no site")
    return rules, taken


def meaning(method: Method) -> tuple[Any, ...]:
    """An identifier that is equal for two methods that do the same with one leaf: all but how they train and start, and
    the scale in place of what it is made of, for alpha=None and alpha=rank mean the same."""
    m = method.eval()
    names = {f.name for f in dataclasses.fields(m)} - {"dropout", "init_weights"}
    if "alpha" in names and hasattr(m, "scale"):
        names = names - {"alpha", "rslora"} | {"scale"}
    return type(m), *((k, getattr(m, k)) for k in sorted(names))


def to_json(method: Method) -> dict[str, Any]:
    """{"method": class name, field: value, …}; methods inside methods too."""

    def value(v: Any) -> Any:
        if isinstance(v, Method):
            return to_json(v)
        return [value(x) for x in v] if isinstance(v, list | tuple) else v

    return {"method": type(method).__name__} | {
        f.name: value(getattr(method, f.name))
        for f in dataclasses.fields(method)  # type: ignore[arg-type]
    }


def from_json(data: Any, where: Path) -> Method:
    """The method of `to_json`. ValueError for a method or field this release does not know."""

    def value(v: Any) -> Any:
        if isinstance(v, dict):
            return from_json(v, where)
        return tuple(value(x) for x in v) if isinstance(v, list) else v

    name = data.get("method") if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(name, str) or name not in registry:
        raise ValueError(
            f"{where}: unknown method {name!r}; known are {sorted(registry)}. Import the module that defines it."
        )
    cls = registry[name]
    try:
        return cls(**{k: value(v) for k, v in data.items() if k != "method"})
    except (ValueError, TypeError, AttributeError, ArithmeticError) as e:
        raise ValueError(f"{where}: {cls.__name__} does not accept the values in the file: {e}") from e
