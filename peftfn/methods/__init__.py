"""The methods, one a file."""

from peftfn.methods.delora import DeLoRA
from peftfn.methods.dora import DoRA
from peftfn.methods.full import Full
from peftfn.methods.ia3 import IA3
from peftfn.methods.loha import LoHa
from peftfn.methods.lokr import LoKr
from peftfn.methods.lora import LoRA
from peftfn.methods.oft import OFT
from peftfn.methods.randlora import RandLoRA
from peftfn.methods.vblora import VBLoRA
from peftfn.methods.vera import VeRA

__all__ = ["IA3", "OFT", "DeLoRA", "DoRA", "Full", "LoHa", "LoKr", "LoRA", "RandLoRA", "VBLoRA", "VeRA"]
