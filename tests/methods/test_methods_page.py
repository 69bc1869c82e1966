"""docs/methods.md says what a run says."""

from pathlib import Path

from peftfn.testing.support import page


def test_the_page_is_what_a_run_gives() -> None:
    want = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    assert page() == want, "make it again: python -m peftfn.testing.support > docs/methods.md"
