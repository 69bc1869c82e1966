"""docs/reproductions.md from the records. The words stand here and in the claims; every figure comes from a record."""

from collections.abc import Mapping

from benchmarks.reproductions.claim import Claim, Json, table, wrapped

HEAD = """\
# Reproductions

Made by `python -m benchmarks.reproductions` from `benchmarks/reproductions/records`; do not edit. Claims of papers,
tried at a scale that a small machine can do in minutes: small models, few steps, data that packages ship. What holds
here need not hold elsewhere, and a claim that does not reproduce here is not refuted: each section says what differs
from the paper. The verdicts follow from the figures by rules in the code; each section says whose their thresholds are,
and whether they stood before the figures.

Where many configurations are tried, they train in one [sweep](sweep.md): a grid is one `vmap` over a stack of adapters.
`python -m benchmarks.reproductions NAME` runs one, and `--quick` shows in seconds that it runs.
"""


def page(claims: Mapping[str, Claim], records: Mapping[str, Json]) -> str:
    """Markdown of the claims that have records."""
    there = {name: claim for name, claim in claims.items() if name in records}
    verdicts = {name: claim.found(records[name]["figures"])[0] for name, claim in there.items()}
    rows = [
        ["" if i else f"[{claim.title}](#{anchor(claim.title)})", what, verdict]
        for name, claim in there.items()
        for i, (what, verdict) in enumerate(verdicts[name].items())
    ]
    sections = [section(name, claim, records[name]) for name, claim in there.items()]
    return "\n".join([HEAD, table(["", "claim", "here"], rows), *sections])


def section(name: str, claim: Claim, record: Json) -> str:
    verdicts, found = claim.found(record["figures"])
    e = record["environment"]
    below = (
        f"`{name}`: {record['seconds']} s on a machine with a load average of {e['load_average']} ({e['threads']} "
        f"thread{'s' * (e['threads'] > 1)} of {e['machine']} with {e['cpu_capability']}), "
        f"{e['date']}, torch {e['torch']}."
    )
    parts = [
        f"## {claim.title}\n",
        wrapped(f"**Claim.** {claim.says} ({claim.paper})"),
        wrapped(f"**Here.** {claim.ours}"),
        found.strip() + "\n",
        "\n".join(f"* {what}: **{verdict}**." for what, verdict in verdicts.items()) + "\n",
        wrapped(f"**Rules.** {claim.rules}"),
    ]
    if claim.draw is not None:
        parts.append(f"![{claim.title}]({picture(name)})\n")
    return "\n".join([*parts, wrapped(below)])


def picture(name: str) -> str:
    return f"reproductions_{name}.png"


def anchor(title: str) -> str:
    """As the site and code hosts make them."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
