"""Refuse models that hold adapters already."""

from peftfn.model.model import Model
from peftfn.model.site import of_peft


def refuse_adapters(model: Model) -> None:
    """Raise ValueError, naming the first layer, if the model holds adapters: of PEFT, or of `as_module`."""
    peft = any(c.__name__ == "PeftModel" for c in type(model.root).__mro__)
    first = next((n for n, m in model.distinct.items() if of_peft(m)), "" if peft else None)
    if first is not None:
        what = f"{first or 'the model'} is a {type(model.modules[first]).__name__} that PEFT put there"
        cure = (
            "Take them out first: model = model.unload(), or merge_and_unload(), which keeps what they do, for "
            "get_peft_model's; a new from_pretrained for add_adapter's; unload_lora_weights() for diffusers'"
        )
    else:
        ours = (n for n, m in model.distinct.items() if type(m).__module__.startswith("peftfn.view."))
        first = next(ours, None)
        if first is None:
            return
        layer = f".{first}".partition(".parametrizations.")[0].partition(".peftfn_call")[0].removeprefix(".")
        what = f"{layer or 'the model'} holds an adapter of peftfn.as_module"
        cure = "Give the model that as_module was made of, which stayed as it was: net.model"
    raise ValueError(f"load: {what}, and an adapter on disk fits only a model without adapters. {cure}.")
