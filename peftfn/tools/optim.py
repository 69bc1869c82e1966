"""Optimizers for adapters: parameter groups for LoRA+ and for weight decay, LoRA-FA and Riemannian preconditioning.

Each takes the module that `as_module` returned, or a plain adapter whose tensors require gradients. A plain adapter
does not know its methods; where they matter, pass its net too.
"""

from peftfn.tools.groups import decay, lora_plus, vb_lora
from peftfn.tools.paired import LoRAFA, Riemannian, lora_fa

__all__ = ["LoRAFA", "Riemannian", "decay", "lora_fa", "lora_plus", "vb_lora"]
