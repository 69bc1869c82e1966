"""docs/methods.md says what a run says."""

from support import ROOT

from peftfn.testing.support import page


def test_the_page_is_what_a_run_gives() -> None:
    want = (ROOT / "docs" / "methods.md").read_text()
    assert page() == want, "make it again: python -m peftfn.testing.support > docs/methods.md"
