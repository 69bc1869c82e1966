"""AdapterHub's folders (the `adapters` package), to read: bottlenecks, prefixes, LoRA and ReFT, and heads beside them.

`adapter_config.json` has the architecture under "config"; keys are the places of a model that the package has changed:
`encoder.layer.0.output.adapters.NAME.adapter_down.0.weight`.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peftfn.core.method import Method
from peftfn.formats.adapterhub_head import fitted
from peftfn.formats.adapterhub_read import Reader
from peftfn.formats.binding import exactly, planned, whole
from peftfn.formats.files import Loaded, Options, mismatch, read_json
from peftfn.formats.tensor_files import Tensors as File
from peftfn.formats.tensor_files import opened, unpickled
from peftfn.methods.weights.full import Full
from peftfn.model.model import Model
from peftfn.net.net import Adapted

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"


def is_mine(path: Path) -> bool:
    return (path / CONFIG).is_file() and any((path / f).is_file() for f in (TENSORS, PICKLE))


def save(folder: Path, net: Adapted, adapter: Mapping[str, Any], **options: Any) -> None:
    raise ValueError("save: AdapterHub's format is read, not written: use format='native'")


def load(folder: Path, model: Model, options: Options, method: Method | None = None) -> Loaded:
    """The adapter in the folder, with the head beside it if the model has such a head. ValueError for what its
    architecture would mean and the model's, or this release's, cannot.

    method: which ReFT it is; its fields are the file's.
    """
    where = folder / CONFIG
    options.only(where)
    described = read_json(where)
    config = described.get("config") if isinstance(described, dict) else None
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{where}: it has no architecture under 'config'")
    config = dict(config)
    if "version" not in described and config.get("non_linearity") == "gelu":
        config["non_linearity"] = "gelu_new"  # as its first versions called it
    with ExitStack() as files:
        file = _file(files, folder, (TENSORS, PICKLE), options)
        if file is None:
            raise FileNotFoundError(f"{folder} has no {TENSORS}")
        read = Reader(where, described, config, model, method)
        try:
            read.all(file)
        except (KeyError, TypeError) as e:
            raise ValueError(f"{where}: it does not have what its architecture has: {type(e).__name__}: {e}") from e
        except ValueError as e:  # a method's own does not know the file
            raise e if str(folder) in str(e) else ValueError(f"{where}: {e}") from e
        stray = list(read.stray)
        head = _file(files, folder, (HEAD, HEAD_PICKLE), options)
        heads = {} if head is None else fitted(head, folder / HEAD_CONFIG, model, options.strict)
        if head is not None:
            stray += sorted(head.meta.keys() - heads.values())
        if options.strict and stray:
            raise mismatch(file.where, (), stray)
        sites: dict[Method, list[str]] = {}  # those of one method share what it shares
        for n, m in read.methods.items():
            sites.setdefault(m, []).append(n)
        rules: dict[str, Method] = {exactly(*names): m for m, names in sites.items()}
        net = Adapted(model.root, planned(model, rules | {exactly(n): Full() for n in heads}, where))
        devices = {n: w.device for n in read.leaves if (w := model.weights.get(n)) is not None}  # others': `on_devices`
        adapter: dict[str, Any] = {
            n: {k: f().to(devices.get(n, "cpu")) for k, f in leaf.items()} for n, leaf in read.leaves.items()
        }
        wanted: dict[str, Any] = {n: e.spec for n, e in net.plan.items()}
        for name, bank in net.plan.banks.items():
            adapter[name], wanted[name] = {"rule": read.bank["phm_rule"]()}, bank
        for name, leaf in adapter.items():
            for k, t in leaf.items():
                if t.shape != wanted[name][k]:
                    raise ValueError(
                        f"{file.where}: {k} at {name} has shape {list(t.shape)}, not {list(wanted[name][k])}"
                    )
        adapter |= {} if head is None else whole(head, heads, model)
    base = described.get("model_name")
    extra = {"base_model_name_or_path": base} if isinstance(base, str) and base else {}
    return Loaded(net, {n: adapter[n] for n in (*net.plan.banks, *net.plan)}, unexpected=tuple(stray), extra=extra)


def _file(files: ExitStack, folder: Path, names: tuple[str, str], options: Options) -> File | None:
    safe, pickle = (folder / n for n in names)
    if safe.is_file():
        return files.enter_context(opened(safe))
    if not pickle.is_file():
        return None
    if not options.pickled:
        raise ValueError(f"{pickle} is a pickle: load(…, pickled=True) reads its tensors, and runs no code")
    return unpickled(pickle)
