"""`peftfn serve`: a model and a directory of adapters, behind OpenAI's routes."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftfn.formats import hub
from peftfn.serving.adapters import Adapters, directory

_NEEDED = ("transformers", "fastapi", "uvicorn", "prometheus_client")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CONTEXT = 4096
"""Tokens of prompt and answer, where neither the model nor its user says how many."""


def serve(
    model: str,
    adapters: Path | None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    resident: int = 64,
    plans: int = 4,
    aliases: int = 1000,
    rows: int = 16,
    queue: int = 256,
    max_tokens: int = 1024,
    context: int | None = None,
    max_body: int = 1 << 20,
    grace: int = 30,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until a signal says to stop; then finish what runs, for `grace` seconds at most.

    Args:
        model: the base's folder, or the hub's owner/name.
        adapters: a folder whose sub-folders are adapters; None: the base alone.
        host, port: where to listen; port 0: any that is free.
        name: of the base in requests; None: the name of its folder, or owner/name.
        device, dtype: of the base; None: the accelerator, if there is one; "auto": the file's dtype.
        resident, plans, aliases: as for `Adapters`.
        rows, queue: as for `Engine`.
        max_tokens, context, max_body: as for `Limits`; context None: the model's own.
        say: is told the address.

    Raises:
        ValueError: the extra is not installed; transformers cannot load the model; or it cannot be served.
        FileNotFoundError, NotADirectoryError, PermissionError: of the model or the adapters.
        OSError: the port is in use, or is not allowed.
    """
    if absent := [n for n in _NEEDED if not find_spec(n)]:
        raise ValueError(f"it needs {', '.join(absent)}: pip install 'peftfn[serve]'")
    if adapters is not None:
        directory(adapters)
    with _listening(host, port) as sock:
        folder = hub.find(model, more=hub.TOKENIZER)
        base = _model(folder, device, dtype)
        _run(
            base,
            _tokenizer(folder),
            Adapters(base, adapters, slots=resident, plans=plans, aliases=aliases),
            name or (folder.resolve().name if Path(model).exists() else model),
            sock,
            {"rows": rows, "queue": queue},
            {"tokens": max_tokens, "body": max_body, "context": _context(base, context)},
            grace,
            say,
        )


def _run(
    base: nn.Module,
    tokenizer: Any,
    adapters: Adapters,
    name: str,
    sock: socket.socket,
    sizes: dict[str, int],
    limits: dict[str, int],
    grace: int,
    say: Callable[[str], None],
) -> None:
    import uvicorn

    from peftfn.serving.app import app
    from peftfn.serving.asked import Limits
    from peftfn.serving.engine import Engine

    engine = Engine(base, adapters, tokenizer, **sizes)
    try:
        config = uvicorn.Config(
            app(engine, name, Limits(**limits)),
            log_level="warning",
            lifespan="on",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=grace,
        )
        host, port = sock.getsockname()[:2]
        text = "" if tokenizer is not None else ", no tokenizer: prompts are token ids"
        say(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1, {len(adapters.names)} adapters{text}")
        with _signals_end_quietly():
            uvicorn.Server(config).run(sockets=[sock])
    finally:
        engine.close()


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens: whether a port is free is known before a model is loaded."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port is {port}; give one from 0 to {(1 << 16) - 1}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family)
    except OSError as e:
        raise OSError(f"it cannot listen at port {port} of {host}: {e.strerror or e}") from e
    with sock:
        yield sock


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal that stopped it again, when it has stopped: nothing is left to be done then."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    former = {kind: signal.signal(kind, lambda *_: None) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in former.items():
            signal.signal(kind, handler)


def _model(folder: Path, device: str | None, dtype: str) -> nn.Module:
    """The causal language model of a folder, in eval mode; no code from the folder runs."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a model of transformers")
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        made: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=False
        )
    except (OSError, KeyError, TypeError, RuntimeError, ValueError) as e:
        raise ValueError(f"{folder}: transformers cannot load it as a causal language model: {e}") from e
    found = torch.accelerator.current_accelerator() if device is None else device
    try:
        return made.eval() if found is None else made.eval().to(found)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {found}: {str(e).splitlines()[0]}") from e


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or None where it has none."""
    if not any((folder / n).is_file() for n in _TOKENIZERS):
        return None
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, KeyError, TypeError, RuntimeError, ValueError) as e:
        raise ValueError(f"{folder}: transformers cannot load its tokenizer: {e}") from e


def _context(base: Any, given: int | None) -> int:
    """Tokens of prompt and answer together. ValueError where the model has not so many positions."""
    own = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if given is not None and own is not None and given > own:
        raise ValueError(f"--context is {given}, and the model has {own} positions")
    return given or own or _CONTEXT
