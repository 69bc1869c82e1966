"""Which of its own parameters a layer's forward writes to, as layers do that keep their weights in bounds.

In a call the base lends its parameters as tensors that notice a write (`tensors.lent.Lent`). A module of `as_module`,
whose parameters are real ones, and compiled code cannot have these, so there such a parameter is copied beforehand. We
know it by the text of the forward: a statement that writes to `self.<name>`, or to a view of it. What we take for a
write and is none costs a copy; what we miss (code without a source, or an odder way to write) reaches the base.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn


def written_by(module: nn.Module) -> set[str]:
    """The names of the module's own parameters that its forward writes to."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return {"weight"}
    names = {k for k, p in module._parameters.items() if p is not None}
    cls: Any = type(module)
    return names & _written(cls) if names else names


@cache
def _written(cls: Any) -> frozenset[str]:
    """The attributes that the forward of a class, and the methods of its own that this names, write to."""
    out: set[str] = set()
    todo, seen = ["forward"], {"forward"}
    while todo:
        for function in _definitions(cls, todo.pop()):
            tree = _tree(function)
            out |= _written_in(tree, function)
            fresh = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and hasattr(cls, n.attr)} - seen
            seen |= fresh
            todo += fresh
    return frozenset(out)


def _definitions(cls: type, name: str) -> Iterator[FunctionType]:
    """The functions of this name of a class and its bases, but torch's, which write to no parameter."""
    for owner in cls.__mro__:
        value = vars(owner).get(name)
        function = inspect.unwrap(value) if callable(value) else None
        if owner.__module__.partition(".")[0] != "torch" and isinstance(function, FunctionType):
            yield function


def _tree(function: Callable[..., Any]) -> ast.AST:
    """The function's text, parsed; an empty one where there is none (code made by a program, part of a line)."""
    try:
        source = inspect.getsource(function)
        return ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _written_in(tree: ast.AST, function: FunctionType) -> set[str]:
    """The attributes of its first argument that a function writes to."""
    me = function.__code__.co_varnames[:1]
    local: dict[str, str] = {}  # a variable → the attribute that it is, or is a view of: w = self.weight.data
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if attribute := _attribute(value, me, local):
                local[name] = attribute
    return {a for node in ast.walk(tree) for target in _targets(node) if (a := _attribute(target, me, local))}


def _targets(node: ast.AST) -> list[ast.expr]:
    """What a piece of code writes to."""
    match node:
        case ast.Call(func=ast.Attribute(value=owner, attr=name), args=args) if _in_place(name):
            return [owner, *args[:1]]  # w.zero_(), init.zeros_(w)
        case ast.Call(func=ast.Name(id=name), args=args) if _in_place(name):
            return args[:1]  # zeros_(w)
        case ast.Call(keywords=keywords):
            return [k.value for k in keywords if k.arg == "out"]  # torch.add(…, out=w)
        case ast.Subscript(value=owner, ctx=ast.Store()) | ast.Attribute(value=owner, attr="data", ctx=ast.Store()):
            return [owner]  # w[i] = …, w.data = …
        case ast.AugAssign(target=target):
            return [target]  # w += …
    return []


def _attribute(value: ast.expr, me: tuple[str, ...], local: dict[str, str]) -> str | None:
    """The attribute of `me` that an expression is, or may be a view of."""
    while True:
        match value:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in me:
                return attribute
            case ast.Name(id=name):
                return local.get(name)
            case ast.Subscript(value=inner):
                value = inner
            case ast.Attribute(value=inner, attr=name) if name in _VIEWS:
                value = inner
            case ast.Call(func=ast.Attribute(value=inner, attr=name)) if name in _VIEWS or _in_place(name):
                value = inner
            case _:
                return None


_VIEWS = frozenset(
    "data detach T mT t transpose view reshape flatten squeeze unsqueeze select narrow permute".split()  # noqa: SIM905
)


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
