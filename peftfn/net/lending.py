"""What a call has of the base where no rule adapts: parameters that it may write to, and copies of buffers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.net.loading import Spot
from peftfn.net.released import Waiting
from peftfn.tensors.lent import Lent, beneath, lend
from peftfn.tensors.transform import lasting


class Lending:
    """Fills the slots of one skeleton that hold the base's own tensors.

    parameters: where they stand. written: those among them that their own layer writes to in its forward. buffers:
    where they stand. embeddings: the copy's.
    """

    def __init__(
        self,
        parameters: Sequence[Spot],
        written: Sequence[Spot],
        buffers: Sequence[Spot],
        embeddings: Sequence[nn.Embedding | nn.EmbeddingBag],
    ):
        self.parameters, self.written, self.buffers, self.embeddings = parameters, written, buffers, embeddings
        self.clones: list[tuple[Any, ...]] = [(None, 0, None, 0)] * len(buffers)

    def fill_parameters(self) -> None:
        """A call may write to what it has there. Tied slots hold one tensor."""
        lent: dict[int, Any] = {}
        for theirs, _, k in self.written:
            p = theirs[k]
            lent[id(p)] = None if p is None else p.detach().clone()
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # a tracer has plain tensors
            for theirs, ours, k in self.parameters:
                p = theirs[k]
                ours[k] = lent[id(p)] if id(p) in lent else constant(p)
            return
        parameter, kind, others = nn.Parameter, Lent, []
        with beneath():
            for theirs, ours, k in self.parameters:
                p = theirs[k]
                held = lent.get(id(p))
                if held is not None:
                    ours[k] = held
                elif type(p) is parameter:
                    ours[k] = lent[id(p)] = lend(kind, p)
                else:
                    others.append((ours, k, p))
        for ours, k, p in others:
            ours[k] = constant(p)

    def fill_tables(self) -> None:
        """Copies of tables whose rows `F.embedding` would renormalise in place."""
        for embedding in self.embeddings:
            if embedding.max_norm is not None and not isinstance(embedding.weight, Waiting):
                embedding._parameters["weight"] = embedding._parameters["weight"].clone()  # type: ignore[union-attr, assignment]

    def fill_buffers(self) -> None:
        """A copy of each buffer. One of integers (a mask, positions) is copied again only when it was written to; for
        the others versions tell nothing, since BatchNorm's kernel writes its statistics without counting."""
        for i, (theirs, ours, k) in enumerate(self.buffers):
            t = theirs[k]
            if t is None:
                ours[k] = None
            elif torch.compiler.is_compiling() or t.is_inference() or t.is_floating_point():
                ours[k] = t.detach().clone()
            elif not _same(self.clones[i], t, ours[k]):
                with lasting():
                    ours[k] = t.clone()
                self.clones[i] = (t, t._version, ours[k], ours[k]._version)


def constant(p: Any) -> Any:
    """p without its gradient: the base is no input of a call."""
    return p.detach() if p is not None and p.requires_grad else p


def _same(clone: tuple[Any, ...], theirs: Tensor, ours: Tensor) -> bool:
    return clone[0] is theirs and clone[1] == theirs._version and clone[2] is ours and clone[3] == ours._version
