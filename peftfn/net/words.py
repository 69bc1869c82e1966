"""What to write in place of the methods that PEFT's model and torch's modules have and a net lacks."""

_MODULE = "peftfn.as_module(net, adapter) is an nn.Module"
_MODE = "net.model.train() and net.model.eval() set the mode, for the adapter too"
_MOVE = "move net.model, and then make adapters with net.init(), or map .to over the tensors of one"
_SAVE = "peftfn.save(path, net, adapter, format='peft')"
_CHOOSE = "an adapter is an argument of each call, net.apply(adapter, …)"
CURES = {
    "generate": "net.apply(adapter, …, method='generate')",
    "forward": "net.apply(adapter, …)",
    "parameters": f"peftfn.leaves(adapter) is what trains; {_MODULE}",
    "named_parameters": f"the adapter has its tensors by name; {_MODULE}",
    "state_dict": f"the adapter is a dict of tensors already; {_MODULE}",
    "load_state_dict": "net, adapter = peftfn.load(path, model)",
    "train": _MODE,
    "eval": _MODE,
    "to": _MOVE,
    "cuda": _MOVE,
    "half": _MOVE,
    "bfloat16": _MOVE,
    "save_pretrained": _SAVE,
    "push_to_hub": "peftfn.push('owner/name', net, adapter)",
    "from_pretrained": "net, adapter = peftfn.load(path, model)",
    "load_adapter": "net, adapter = peftfn.load(path, model)",
    "add_adapter": "net.init(seed=…) makes another adapter, peftfn.adapt(model, …) another net",
    "set_adapter": _CHOOSE,
    "delete_adapter": f"del adapter: {_CHOOSE}",
    "disable_adapter": "call net.model: it never changed",
    "unload": "net.model never changed",
    "get_base_model": "net.model",
    "merge_adapter": "net.merge(adapter) returns parameters",
    "merge_and_unload": "peftfn.merged_model(net, adapter) returns a plain model",
    "print_trainable_parameters": "print(peftfn.summary(net))",
}
"""A method of theirs → what to write instead."""


def unknown(word: str) -> str:
    """The message for an attribute that a net does not have."""
    cure = f": {CURES[word]}" if word in CURES else ""
    return f"a net has no {word}{cure}"
