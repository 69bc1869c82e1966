"""docs/methods.md says what a run says, and docs/adding_a_method.md names the whole contract."""

import inspect
import re

from support import ROOT

import peftfn.methods  # noqa: F401 - which registers them
from peftfn.core.method import registry
from peftfn.testing.support import page


def test_the_page_is_what_a_run_gives() -> None:
    want = (ROOT / "docs" / "methods.md").read_text()
    assert page() == want, "make it again: python -m peftfn.testing.support > docs/methods.md"


def test_the_page_for_authors_names_every_member_of_the_contract() -> None:
    """A family's public members are what a method may define or read; one that the page lacks is found by no author."""
    text = (ROOT / "docs" / "adding_a_method.md").read_text()
    named = set(re.findall(r"`(\w+)[(`]", text))
    families = {c for method in registry.values() for c in method.__mro__ if vars(c).get("_family")}
    assert {c.__name__ for c in families} >= {"Method", "Weight", "ModuleMethod", "Tokens", "Prefix", "Along"}
    lacks = {
        f"{family.__name__}.{name}"
        for family in families
        for name in [*vars(family), *inspect.get_annotations(family)]
        if not name.startswith("_") and name not in named
    }
    assert not lacks
