"""obstacles: what of an adapter's files a server for LoRA does not take, by the rules in `engines.py`."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from peftfn.core.numbers import checks_numbers
from peftfn.formats import peft
from peftfn.formats import peft_config as configs
from peftfn.formats.engines import CURES, ENGINES, RULES, Does, Seen
from peftfn.formats.facts import adapters_at, format_of
from peftfn.formats.files import read_json
from peftfn.formats.peft_keys import PREFIX
from peftfn.formats.tensor_files import opened


@dataclass(frozen=True)
class Obstacle:
    """One thing in an adapter's files that an engine does not take.

    Args:
        engine: "vllm" or "sglang".
        at: the key of the configuration, or the tensors.
        what: what is not accepted there.
        found: what the adapter has.
        does: "refuses", or "does not apply": the engine may serve the adapter without it, and give other answers.
        cure: what to do.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.DoRA(rank=2)})
        pf.save("dora", net, net.init(), format="peft")
        (obstacle,) = pf.obstacles("dora", "vllm")
        assert isinstance(obstacle, pf.Obstacle) and obstacle.does == "refuses"
    """

    engine: str
    at: str
    what: str
    found: str
    does: Does
    cure: str

    def __str__(self) -> str:
        title = f"{ENGINES[self.engine].title} {ENGINES[self.engine].version}"
        return f"{title} {self.does} {self.at}, {self.what}: {self.found}. Cure: {self.cure}"


@checks_numbers
def obstacles(path: str | PathLike[str], engine: str, *, max_rank: int | None = None) -> tuple[Obstacle, ...]:
    """Return what a server for LoRA would not take of an adapter's files, without a model and without the server.

    The rules were read from one release of the engine; docs/serving.md lists them. What depends on the served model
    is not looked at: whether it has these layers, and how it stores its experts and its vocabulary.

    Args:
        path: an adapter's folder or file, or a Hub repository "owner/name".
        engine: "vllm" or "sglang".
        max_rank: the `--max-lora-rank` that the server is started with. By default vLLM's own, 16; SGLang takes the
            largest of the adapters that it is started with.

    Returns:
        The obstacles; none if the engine accepts the adapter.

    Raises:
        FileNotFoundError: no adapter is there.
        ValueError: the file is broken, several adapters are there, or the engine is unknown or has no such max_rank.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(64, 32)), {"0.weight": pf.LoRA(rank=24)})
        pf.save("wide", net, net.init(), format="peft")
        (obstacle,) = pf.obstacles("wide", "vllm")
        assert "24" in obstacle.found and not pf.obstacles("wide", "vllm", max_rank=32)
    """
    check_engine(engine, max_rank)
    found = adapters_at(path)
    if len(found) > 1:
        raise ValueError(f"{path} holds several adapters, {', '.join(found)}: give the folder of one")
    (where,) = found.values()
    return obstacles_of(where, engine, max_rank)


def check_engine(engine: str, max_rank: int | None) -> None:
    """ValueError for an engine without rules, or a rank that it cannot be started with."""
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; there are rules for {', '.join(ENGINES)}")
    if max_rank is not None and (max_rank < 1 or (ENGINES[engine].ranks and max_rank not in ENGINES[engine].ranks)):
        given = ", ".join(map(str, ENGINES[engine].ranks)) or "a positive number"
        raise ValueError(f"max_rank is {max_rank}; {ENGINES[engine].title} starts with {given}")


def obstacles_of(where: Path, engine: str, max_rank: int | None = None) -> tuple[Obstacle, ...]:
    """The obstacles of one adapter, an engine's rules in their order."""
    seen = _seen(where, ENGINES[engine].rank if max_rank is None else max_rank)
    out = []
    for rule in RULES:
        if engine not in rule.does or not (found := list(rule.found(seen))):
            continue
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        first = found[0].removeprefix(PREFIX)
        out.append(Obstacle(engine, rule.at, rule.what, f"{first}{more}", rule.does[engine], CURES[rule.cure]))
        if rule.alone:
            break
    return tuple(out)


def _seen(where: Path, limit: int | None) -> Seen:
    format = str(format_of(where))
    if format != "peft":
        return Seen(format, {}, {}, limit)
    raw = read_json(where / peft.CONFIG)
    kind = configs.checked(raw, where / peft.CONFIG)["peft_type"]  # under its name of today
    with opened(where / peft.TENSORS) as file:
        return Seen(format, {**raw, "peft_type": kind}, dict(file.meta), limit)


def table() -> str:
    """The rules as the table in docs/serving.md."""
    lines = [f"| at | what | {' | '.join(f'{e.title} {e.version}' for e in ENGINES.values())} | cure |"]
    lines.append(f"|---|---|{'---|' * len(ENGINES)}---|")
    for r in RULES:
        lines.append(f"| {r.at} | {r.what} | {' | '.join(r.does.get(e, '') for e in ENGINES)} | {CURES[r.cure]} |")
    return "\n".join(lines) + "\n"
