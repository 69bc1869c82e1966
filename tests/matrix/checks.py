"""What is checked of a row: PEFT's file here, our file in PEFT, merging, mixed batches, half precision, `generate`."""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import peftfn as pf

from .cases import Case

TOLERANCE, ROUGHLY = 1e-4, 0.1


class PeftFails(Exception):
    """PEFT does not do this itself."""


class Row:
    """One case, made once: PEFT's trained model, its file, and what we load of it."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.folder = case, folder

    @cached_property
    def peft(self) -> PeftModel:
        with theirs():
            torch.manual_seed(1)
            model = get_peft_model(self.case.model(), self.case.config())
            perturb_(model, 2)
            model.eval().save_pretrained(str(self.folder / "peft"))
            return model

    @cached_property
    def want(self) -> Tensor:
        peft = self.peft
        with theirs(), torch.no_grad():
            want = output(peft(**self.case.inputs))
            again = output(peft(**self.case.inputs))
        if not torch.equal(want, again):
            raise PeftFails("its output is drawn anew in each call")
        return want

    @cached_property
    def merged(self) -> Tensor:
        """What PEFT's own merged model computes."""
        self.want  # noqa: B018
        with theirs(), torch.no_grad():
            return output(copy.deepcopy(self.peft).merge_and_unload()(**self.case.inputs))

    @cached_property
    def loaded(self) -> tuple[pf.Adapted, pf.Adapter]:
        self.want  # noqa: B018  (that PEFT runs comes first)
        return read(self.folder / "peft", self.case.model())

    def ours(self, *given: Any, **options: Any) -> Tensor:
        net, a = self.loaded
        with torch.no_grad():
            return output(net.apply(a, *given, **(self.case.inputs | options)))


@contextlib.contextmanager
def theirs() -> Iterator[None]:
    """PEFT's own work: what it raises is no fault of ours, and what it prints is noise."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as e:
        raise PeftFails(f"{type(e).__name__}: {e}") from e


def perturb_(model: nn.Module, seed: int) -> None:
    """Move all that trains, in place of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p += 0.1 * torch.randn(p.shape, generator=generator)


def read(folder: Path, model: nn.Module) -> tuple[pf.Adapted, pf.Adapter]:
    net, a = pf.load(folder, model)
    return net, a


def in_half(case: Case) -> nn.Module:
    model = case.model().bfloat16()
    if isinstance(getattr(model, "dtype", None), torch.dtype) and not hasattr(model, "config"):
        model.dtype = torch.bfloat16  # what PEFT's own models cast their inputs to
    return model


def output(out: Any) -> Tensor:
    """A model's logits, hidden states or plain output."""
    out = out[0] if isinstance(out, tuple) else out
    found = getattr(out, "logits", None)
    found = getattr(out, "last_hidden_state", out) if found is None else found
    assert isinstance(found, Tensor), type(found)
    return found


def same(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    if got.dim() == 3 and got.shape[1] < want.shape[1]:  # PEFT's logits of virtual tokens
        want = want[:, -got.shape[1] :]
    assert got.shape == want.shape, f"{list(got.shape)} instead of {list(want.shape)}"
    tolerance = max(tolerance, 4 * torch.finfo(want.dtype).eps)  # of a model in half precision
    got, want = got.double(), want.double()
    if not want.isfinite().all():
        raise PeftFails("its output is not finite")
    error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()
    assert error < tolerance, f"off by {error:.1e}"


def agree(row: Row, got: Tensor) -> None:
    """It is PEFT's output, or what PEFT gives of each row alone: its Lily lets the rows of a batch see each other.

    Where PEFT's forward is not its own merge (a linear layer with trainable tokens loses its bias), we mean the merge.
    """
    try:
        same(got, row.want)
    except AssertionError as e:
        if holds(got, lambda: torch.cat(singly(row.peft, row.case.inputs, len(got)))):
            return
        if holds(got, lambda: row.merged):
            raise PeftFails("its forward is not its own merge, which this is") from e
        raise


def singly(model: nn.Module, inputs: dict[str, Tensor], count: int) -> list[Tensor]:
    """Each row's output alone."""
    with theirs(), torch.no_grad():
        return [output(model(**{k: t[i : i + 1] for k, t in inputs.items()})) for i in range(count)]


def holds(got: Tensor, want: Callable[[], Tensor], tolerance: float = TOLERANCE) -> bool:
    try:
        same(got, want(), tolerance)
    except (AssertionError, PeftFails):
        return False
    return True


def load(row: Row) -> None:
    """PEFT's file, loaded here, computes what PEFT computes."""
    agree(row, row.ours())


def save(row: Row) -> None:
    """What we write of it, PEFT loads to the same output."""
    net, a = row.loaded
    pf.save(row.folder / "ours", net, a, format="peft")
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(row.case.model(), str(row.folder / "ours")).eval()
        same(output(again(**row.case.inputs)), row.want)


def native(row: Row) -> None:
    """Our own file is the same adapter again."""
    net, a = row.loaded
    pf.save(row.folder / "native", net, a)
    net, a = read(row.folder / "native", row.case.model())
    with torch.no_grad():
        agree(row, output(net.apply(a, **row.case.inputs)))


def merge(row: Row) -> None:
    """The merged model computes what the adapted one does. What PEFT cannot merge either is no refusal of ours."""
    net, a = row.loaded
    try:
        model = pf.merged_model(net, a)
    except ValueError:
        with theirs():
            copy.deepcopy(row.peft).merge_and_unload()
        raise
    with torch.no_grad():
        agree(row, output(model(**row.case.inputs)))


def mixed(row: Row) -> None:
    """In a mixed batch, each row has the adapter or the base."""
    net, a = row.loaded
    count = len(next(iter(row.case.inputs.values())))
    if count == 1:
        row = Row(replace(row.case, inputs={k: torch.cat([t, t]) for k, t in row.case.inputs.items()}), row.folder)
        count = 2
    adapted, plain = list(range(0, count, 2)), list(range(1, count, 2))
    index = [0 if i in adapted else -1 for i in range(count)]
    with torch.no_grad():
        got = output(net.mixed(pf.stack([a]), index, **row.case.inputs))
        # a method may look at all rows that it is given: those of the adapter, not the others
        own = output(net.apply(a, **{k: t[adapted] for k, t in row.case.inputs.items()}))
        base = output(row.case.model()(**{k: t[plain] for k, t in row.case.inputs.items()}))
    if len(own) == count:  # a model that makes its own inputs
        own, base = own[adapted], base[plain]
    got, own, base = by_row(got, count), by_row(own, len(adapted)), by_row(base, len(plain))
    same(got[adapted], own)
    same(got[plain], base)


def by_row(out: Tensor, rows: int) -> Tensor:
    """What belongs to each row of the batch, where a model makes several of one."""
    return out.reshape(rows, -1) if len(out) > rows and len(out) % rows == 0 else out


def half(row: Row) -> None:
    """On a base in bfloat16, what PEFT computes there; or what it computes in fp32. Where PEFT itself is far from that
    in bfloat16 (FRoD of a weight of low rank), nobody can say what is right."""
    exact = row.want
    with theirs(), torch.no_grad():
        peft = PeftModel.from_pretrained(in_half(row.case), str(row.folder / "peft")).eval()
        want = output(peft(**row.case.inputs))
    net, a = read(row.folder / "peft", in_half(row.case))
    with torch.no_grad():
        got = output(net.apply(a, **row.case.inputs))
    if holds(got, lambda: want, ROUGHLY) or holds(got, lambda: exact, ROUGHLY):
        return
    if holds(got, lambda: row.merged, ROUGHLY):
        raise PeftFails("its forward is not its own merge, which this is")
    if not holds(want, lambda: exact, ROUGHLY):
        raise PeftFails("in bfloat16 it is far from what it computes in fp32")
    same(got, want, ROUGHLY)


def generate(row: Row) -> None:
    """Greedy tokens are PEFT's, one for one."""
    net, a = row.loaded
    inputs = {k: v for k, v in row.case.inputs.items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with theirs(), torch.no_grad():
        want = row.peft.generate(**inputs, **options)
    with torch.no_grad():
        got = net.apply(a, **inputs, **options, method="generate")
    assert torch.equal(got[:, -4:], want[:, -4:]), f"{got.tolist()} instead of {want.tolist()}"


CHECKS: tuple[Callable[[Row], None], ...] = (load, save, native, merge, mixed, half, generate)
