"""Which token comes next: the largest logit, or one drawn with the request's own generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NEUTRAL: dict[str, Any] = {
    **{"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0},
    **{"bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None, "begin_suppress_tokens": None},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None},
    **{"min_length": 0, "min_new_tokens": None, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0},
    **{"eta_cutoff": 0.0, "guidance_scale": None, "watermarking_config": None, "num_beams": 1},
}
"""Settings of a model's generation_config that change its answers, and that serve has no form of."""


@dataclass(frozen=True)
class Defaults:
    """What a model's own generation_config says.

    Args:
        ends: tokens that end an answer.
        temperature, top_p: where a request says nothing.
        top_k: 0 is all tokens.
        penalty: its repetition_penalty, also for greedy answers.
    """

    ends: frozenset[int] = frozenset()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    penalty: float = 1.0

    @staticmethod
    def of(model: Any) -> "Defaults":
        """Those of a model. ValueError where its generation_config asks for what serve does not do."""
        config = getattr(model, "generation_config", None)
        for name, neutral in _NEUTRAL.items():
            if (value := getattr(config, name, None)) not in (None, neutral):
                raise ValueError(
                    f"serve: the model's generation_config has {name}={value!r}, which serve does not do: take it out "
                    f"of generation_config.json, or answer one request at a time with net.apply(…, method='generate')"
                )
        ends = getattr(config, "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        given = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(config, name, None))}
        sampled = given if getattr(config, "do_sample", False) else {}  # else they stand there without a meaning
        penalty = getattr(config, "repetition_penalty", None)
        return Defaults(frozenset(map(int, ends)), **sampled, penalty=1.0 if penalty is None else penalty)


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. A temperature below 1e-4: the largest logit."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


def generator(how: Sampling) -> torch.Generator | None:
    """The source of random numbers of one answer, on the CPU; None for a greedy one."""
    if how.temperature < 1e-4:
        return None
    made = torch.Generator()
    made.seed() if how.seed is None else made.manual_seed(how.seed)
    return made


def choose(
    logits: Tensor,
    hows: Sequence[Sampling],
    sources: Sequence[torch.Generator | None],
    seen: Sequence[Sequence[int]],
    defaults: Defaults,
) -> list[int]:
    """The next token of each row.

    Args:
        logits: [rows, vocabulary], fp32.
        hows, sources: of each row.
        seen: the tokens of each row so far, prompt and answer; read where there is a penalty.
        defaults: of the model: top_k and penalty.
    """
    if defaults.penalty != 1.0:
        logits = torch.stack([_penalised(x, ids, defaults.penalty) for x, ids in zip(logits, seen, strict=True)])
    tokens: list[int] = logits.argmax(-1).tolist()
    for i, (how, source) in enumerate(zip(hows, sources, strict=True)):
        if source is not None:
            tokens[i] = _drawn(logits[i].cpu(), how, source, defaults.top_k)
    return tokens


def _penalised(x: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    at = torch.tensor(ids, device=x.device).unique()
    was = x[at]
    return x.index_put((at,), torch.where(was < 0, was * penalty, was / penalty))


def _drawn(x: Tensor, how: Sampling, source: torch.Generator, top_k: int) -> int:
    """A token by its probability, among the top_k largest and then the fewest that hold top_p of the rest."""
    p, order = torch.softmax(x / how.temperature, -1).sort(descending=True, stable=True)
    if 0 < top_k < len(p):
        p = p[:top_k] / p[:top_k].sum()
    if how.top_p < 1:
        before = p.cumsum(0) - p  # of all tokens in front: the first always stays
        p = torch.where(before < how.top_p, p, 0.0)
    return int(order[torch.multinomial(p, 1, generator=source)])
