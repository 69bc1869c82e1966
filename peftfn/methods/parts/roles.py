"""A layer's role and number by its name, as PEFT tells them for FRoD."""


def role(module: str) -> str:
    """What layers of one task have in common: the last two parts of their names, or the one after a number."""
    parts = module.split(".")
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"  # BERT's, which is no role of the MLP's "output_dense"
    return parts[-1] if len(parts) == 1 or parts[-2].isdigit() else "_".join(parts[-2:])


def number(site: str, otherwise: int) -> int:
    """The number of a site's layer: the one after "layers", else the first in its name."""
    _, _, after = f".{site}".partition(".layers.")
    return next((int(part) for part in (after.split(".")[0], *site.split(".")) if part.isdigit()), otherwise)
