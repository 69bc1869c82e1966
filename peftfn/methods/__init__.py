"""The methods, one a file."""

from peftfn.methods.adalora import AdaLoRA
from peftfn.methods.adamss import AdaMSS
from peftfn.methods.bdlora import BDLoRA
from peftfn.methods.beft import BEFT
from peftfn.methods.boft import BOFT
from peftfn.methods.c3a import C3A
from peftfn.methods.deft import DEFT
from peftfn.methods.delora import DeLoRA
from peftfn.methods.diag_oft import DiagOFT
from peftfn.methods.dora import DoRA
from peftfn.methods.dylora import DyLoRA
from peftfn.methods.fourierft import FourierFT
from peftfn.methods.frod import FRoD
from peftfn.methods.full import Full
from peftfn.methods.glora import GLoRA
from peftfn.methods.glora_lycoris import GLoRALycoris
from peftfn.methods.gralora import GraLoRA
from peftfn.methods.hira import HiRA
from peftfn.methods.hra import HRA
from peftfn.methods.ia3 import IA3
from peftfn.methods.input_dora import InputDoRA
from peftfn.methods.kasa import KaSA
from peftfn.methods.lily import Lily
from peftfn.methods.loha import LoHa
from peftfn.methods.lokr import LoKr
from peftfn.methods.longlora import longlora
from peftfn.methods.lora import LoRA
from peftfn.methods.mica import MiCA
from peftfn.methods.miss import MiSS
from peftfn.methods.missbat import MiSSBat
from peftfn.methods.monteclora import MonteCLoRA
from peftfn.methods.oft import OFT
from peftfn.methods.olora import OLoRA
from peftfn.methods.osf import OSF
from peftfn.methods.peanut import PEANuT
from peftfn.methods.pissa import PiSSA
from peftfn.methods.psoft import PSOFT
from peftfn.methods.pvera import PVeRA
from peftfn.methods.qalora import QALoRA
from peftfn.methods.randlora import RandLoRA
from peftfn.methods.road import RoAd
from peftfn.methods.shira import SHiRA
from peftfn.methods.supertuning import SuperTuning
from peftfn.methods.tiedtokens import TiedTokens
from peftfn.methods.tinylora import TinyLoRA
from peftfn.methods.tlora import TLoRA
from peftfn.methods.trainabletokens import TrainableTokens
from peftfn.methods.unilora import UniLoRA
from peftfn.methods.vblora import VBLoRA
from peftfn.methods.velora import VeLoRA
from peftfn.methods.vera import VeRA
from peftfn.methods.waveft import WaveFT

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
