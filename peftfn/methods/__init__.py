"""The methods, one a file."""

from peftfn.methods.parts.longlora import longlora
from peftfn.methods.weights.adalora import AdaLoRA
from peftfn.methods.weights.adamss import AdaMSS
from peftfn.methods.weights.bdlora import BDLoRA
from peftfn.methods.weights.beft import BEFT
from peftfn.methods.weights.boft import BOFT
from peftfn.methods.weights.c3a import C3A
from peftfn.methods.weights.deft import DEFT
from peftfn.methods.weights.delora import DeLoRA
from peftfn.methods.weights.diag_oft import DiagOFT
from peftfn.methods.weights.dora import DoRA
from peftfn.methods.weights.dylora import DyLoRA
from peftfn.methods.weights.fourierft import FourierFT
from peftfn.methods.weights.frod import FRoD
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.glora import GLoRA
from peftfn.methods.weights.glora_lycoris import GLoRALycoris
from peftfn.methods.weights.gralora import GraLoRA
from peftfn.methods.weights.hira import HiRA
from peftfn.methods.weights.hra import HRA
from peftfn.methods.weights.ia3 import IA3
from peftfn.methods.weights.input_dora import InputDoRA
from peftfn.methods.weights.kasa import KaSA
from peftfn.methods.weights.lily import Lily
from peftfn.methods.weights.loha import LoHa
from peftfn.methods.weights.lokr import LoKr
from peftfn.methods.weights.lora import LoRA
from peftfn.methods.weights.mica import MiCA
from peftfn.methods.weights.miss import MiSS
from peftfn.methods.weights.missbat import MiSSBat
from peftfn.methods.weights.monteclora import MonteCLoRA
from peftfn.methods.weights.oft import OFT
from peftfn.methods.weights.olora import OLoRA
from peftfn.methods.weights.osf import OSF
from peftfn.methods.weights.peanut import PEANuT
from peftfn.methods.weights.pissa import PiSSA
from peftfn.methods.weights.psoft import PSOFT
from peftfn.methods.weights.pvera import PVeRA
from peftfn.methods.weights.qalora import QALoRA
from peftfn.methods.weights.randlora import RandLoRA
from peftfn.methods.weights.road import RoAd
from peftfn.methods.weights.shira import SHiRA
from peftfn.methods.weights.supertuning import SuperTuning
from peftfn.methods.weights.tiedtokens import TiedTokens
from peftfn.methods.weights.tinylora import TinyLoRA
from peftfn.methods.weights.tlora import TLoRA
from peftfn.methods.weights.trainabletokens import TrainableTokens
from peftfn.methods.weights.unilora import UniLoRA
from peftfn.methods.weights.vblora import VBLoRA
from peftfn.methods.weights.velora import VeLoRA
from peftfn.methods.weights.vera import VeRA
from peftfn.methods.weights.waveft import WaveFT

__all__ = [
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "HRA",
    "IA3",
    "OFT",
    "OSF",
    "PSOFT",
    "AdaLoRA",
    "AdaMSS",
    "BDLoRA",
    "DeLoRA",
    "DiagOFT",
    "DoRA",
    "DyLoRA",
    "FRoD",
    "FourierFT",
    "Full",
    "GLoRA",
    "GLoRALycoris",
    "GraLoRA",
    "HiRA",
    "InputDoRA",
    "KaSA",
    "Lily",
    "LoHa",
    "LoKr",
    "LoRA",
    "MiCA",
    "MiSS",
    "MiSSBat",
    "MonteCLoRA",
    "OLoRA",
    "PEANuT",
    "PVeRA",
    "PiSSA",
    "QALoRA",
    "RandLoRA",
    "RoAd",
    "SHiRA",
    "SuperTuning",
    "TLoRA",
    "TiedTokens",
    "TinyLoRA",
    "TrainableTokens",
    "UniLoRA",
    "VBLoRA",
    "VeLoRA",
    "VeRA",
    "WaveFT",
    "longlora",
]
