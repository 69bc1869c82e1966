"""What to write here in place of names of PEFT's, JAX's and optax's."""

from collections.abc import Iterable

from peftfn.core.method import named
from peftfn.model.names import near

ADAPT = "net = peftfn.adapt(model, {'q_proj': peftfn.LoRA(rank=8)}); adapter = net.init()"
CURES = {
    "get_peft_model": ADAPT,
    "inject_adapter_in_model": ADAPT,
    "PeftModel": f"{ADAPT}. For an nn.Module, peftfn.as_module(net, adapter); for a checkpoint, "
    "net, adapter = peftfn.load(path, model)",
    "PeftConfig": "a method is its own configuration, like peftfn.LoRA(rank=8)",
    "get_peft_model_state_dict": "an adapter is a dict of tensors already; peftfn.save(path, net, adapter, "
    "format='peft') writes PEFT's files",
    "set_peft_model_state_dict": "net, adapter = peftfn.load(path, model)",
    "prepare_model_for_kbit_training": "nothing: the base is never trained, and peftfn.adapt takes a quantised model",
    "TaskType": "peftfn.targets(model, method, task='SEQ_CLS'), or a rule for the head, {'score': peftfn.Full()}",
}
"""PEFT's name → what to write instead."""
JAX = {
    "grad": "torch.func.grad",
    "value_and_grad": "torch.func.grad_and_value, which returns the gradient first",
    "vmap": "torch.func.vmap",
    "jvp": "torch.func.jvp",
    "vjp": "torch.func.vjp",
    "jit": "torch.compile(f, fullgraph=True)",
    "tree_map": "optree.tree_map, or torch.utils._pytree.tree_map",
    "tree_leaves": "peftfn.leaves(adapter)",
    "partition": "peftfn.adapt(model, rules): the adapter is what is trained, the base is constant",
    "combine": "net.merge(adapter), whose parameters torch.func.functional_call takes",
    "apply_updates": "peftfn.steps.apply(adapter, updates)",
}
"""A name of JAX, equinox or optax → what to write instead."""
OPTAX = {
    "adam": "adamw(lr, weight_decay=0.0)",
    "apply_updates": "apply(adapter, updates)",
    "clip_by_global_norm": "clip(max_norm)",
    "cosine_decay_schedule": "scheduled(cosine(total)), after the optimizer",
    "linear_schedule": "scheduled(linear(total)), after the optimizer",
    "warmup_cosine_decay_schedule": "scheduled(cosine(total, warmup=…)), after the optimizer",
    "inject_hyperparams": "stacked(adamw, lr=[…]), for a stack of adapters",
}
"""optax's name → what `steps` has."""


def unknown_step(name: str, known: Iterable[str]) -> str:
    """The message for a name that `peftfn.steps` does not have. known: the names there are."""
    head = f"module 'peftfn.steps' has no attribute {name!r}"
    return f"{head}, which is optax's. Write {OPTAX[name]}" if name in OPTAX else head + near(name, list(known))


def unknown(name: str, known: Iterable[str]) -> str:
    """The message for a name that peftfn does not have.

    Args:
        name: what was asked for.
        known: the names there are.
    """
    head = f"module 'peftfn' has no attribute {name!r}"
    method = named(name)
    if name in CURES:
        return f"{head}, which is PEFT's. Write {CURES[name]}"
    if name in JAX:
        return f"{head}, which is JAX's. Write {JAX[name]}"
    if name.startswith(("PeftModelFor", "PeftMixedModel", "AutoPeftModel")):
        return f"{head}, which is PEFT's. Write {CURES['PeftModel']}"
    if name.endswith("Config") and method:
        return f"{head}, which is PEFT's. Write the method, peftfn.{method}(…), in the rules of peftfn.adapt"
    if name.startswith("_"):
        return head
    return f"{head}; did you mean {method!r}?" if method else head + near(name, list(known))
