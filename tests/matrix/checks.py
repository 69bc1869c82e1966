"""What is checked of a row: PEFT's file here, our file in PEFT, merging, mixed batches, half precision, `generate`."""

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import peftfn as pf

from .cases import Case

TOLERANCE, ROUGHLY = 1e-4, 0.1
REFUSALS = (ValueError, TypeError, KeyError, NotImplementedError)


class Outcome(NamedTuple):
    """status: holds, wrong, refused (an error of ours that names what is wrong), crash, or peft (PEFT itself fails)."""

    status: str
    detail: str = ""


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
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad and p.is_floating_point():
                        p += 0.1 * torch.randn(p.shape, generator=generator)
            model.eval().save_pretrained(str(self.folder / "peft"))
            return model

    @cached_property
    def want(self) -> Tensor:
        peft = self.peft
        with theirs(), torch.no_grad():
            return output(peft(**self.case.inputs))

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
    found = getattr(out, "logits", None)
    found = getattr(out, "last_hidden_state", out) if found is None else found
    assert isinstance(found, Tensor), type(found)
    return found


def same(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    if got.dim() == 3 and got.shape[1] < want.shape[1]:  # PEFT's logits of virtual tokens
        want = want[:, -got.shape[1] :]
    assert got.shape == want.shape, f"{list(got.shape)} instead of {list(want.shape)}"
    got, want = got.double(), want.double()
    if not want.isfinite().all():
        raise PeftFails("its output is not finite")
    error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()
    assert error < tolerance, f"off by {error:.1e}"


def agree(row: Row, got: Tensor) -> None:
    """It is PEFT's output, or what PEFT gives of each row alone: its Lily lets the rows of a batch see each other."""
    try:
        same(got, row.want)
    except AssertionError as e:
        with theirs(), torch.no_grad():
            singly = [
                output(row.peft(**{k: t[i : i + 1] for k, t in row.case.inputs.items()})) for i in range(len(got))
            ]
        try:
            same(got, torch.cat(singly))
        except AssertionError:
            raise e from None


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
    adapted, plain = list(range(0, count, 2)), list(range(1, count, 2))
    index = [0 if i in adapted else -1 for i in range(count)]
    with torch.no_grad():
        got = output(net.mixed(pf.stack([a]), index, **row.case.inputs))
        # a method may look at all rows that it is given: those of the adapter, not the others
        own = output(net.apply(a, **{k: t[adapted] for k, t in row.case.inputs.items()}))
        base = output(row.case.model()(**{k: t[plain] for k, t in row.case.inputs.items()}))
    if len(own) == count:  # a model that makes its own inputs
        own, base = own[adapted], base[plain]
    same(got[adapted], own)
    same(got[plain], base)


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
    if near(got, want) or near(got, exact):
        return
    if not near(want, exact):
        raise PeftFails("in bfloat16 it is far from what it computes in fp32")
    same(got, want, ROUGHLY)


def near(got: Tensor, want: Tensor) -> bool:
    try:
        same(got, want, ROUGHLY)
    except AssertionError:
        return False
    return True


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


def outcomes(case: Case) -> Iterator[tuple[str, Outcome]]:
    """(check, what became of it) for each check of a case."""
    with tempfile.TemporaryDirectory() as folder:
        row = Row(case, Path(folder))
        for check in CHECKS if case.generates else CHECKS[:-1]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield check.__name__, _outcome(check, row)


def _outcome(check: Callable[[Row], None], row: Row) -> Outcome:
    try:
        check(row)
    except PeftFails as e:
        return Outcome("peft", _short(e, row))
    except AssertionError as e:
        return Outcome("wrong", _short(e, row))
    except REFUSALS as e:
        return Outcome("refused", f"{type(e).__name__}: {_short(e, row)}")
    except Exception as e:
        return Outcome("crash", f"{type(e).__name__}: {_short(e, row)}")
    return Outcome("holds")


def _short(e: Exception, row: Row) -> str:
    return " ".join(str(e).replace(str(row.folder), "folder").split())[:300]
