"""The methods, one a file. A new one needs its file and one line here: the rest is read from the registry.

"as" says to type checkers that a name is meant to be used from here.
"""

from peftfn.methods.weights.adalora import AdaLoRA as AdaLoRA
from peftfn.methods.weights.adamss import AdaMSS as AdaMSS
from peftfn.methods.weights.alora import ALoRA as ALoRA
from peftfn.methods.weights.bdlora import BDLoRA as BDLoRA
from peftfn.methods.weights.beft import BEFT as BEFT
from peftfn.methods.weights.boft import BOFT as BOFT
from peftfn.methods.weights.c3a import C3A as C3A
from peftfn.methods.weights.deft import DEFT as DEFT
from peftfn.methods.weights.delora import DeLoRA as DeLoRA
from peftfn.methods.weights.diag_oft import DiagOFT as DiagOFT
from peftfn.methods.weights.dora import DoRA as DoRA
from peftfn.methods.weights.dylora import DyLoRA as DyLoRA
from peftfn.methods.weights.fourierft import FourierFT as FourierFT
from peftfn.methods.weights.frod import FRoD as FRoD
from peftfn.methods.weights.full import Full as Full
from peftfn.methods.weights.glora import GLoRA as GLoRA
from peftfn.methods.weights.glora_lycoris import GLoRALycoris as GLoRALycoris
from peftfn.methods.weights.gralora import GraLoRA as GraLoRA
from peftfn.methods.weights.hira import HiRA as HiRA
from peftfn.methods.weights.hra import HRA as HRA
from peftfn.methods.weights.ia3 import IA3 as IA3
from peftfn.methods.weights.input_dora import InputDoRA as InputDoRA
from peftfn.methods.weights.kasa import KaSA as KaSA
from peftfn.methods.weights.lily import Lily as Lily
from peftfn.methods.weights.loha import LoHa as LoHa
from peftfn.methods.weights.lokr import LoKr as LoKr
from peftfn.methods.weights.lora import LoRA as LoRA
from peftfn.methods.weights.mica import MiCA as MiCA
from peftfn.methods.weights.miss import MiSS as MiSS
from peftfn.methods.weights.missbat import MiSSBat as MiSSBat
from peftfn.methods.weights.monteclora import MonteCLoRA as MonteCLoRA
from peftfn.methods.weights.offset_lora import OffsetLoRA as OffsetLoRA
from peftfn.methods.weights.oft import OFT as OFT
from peftfn.methods.weights.olora import OLoRA as OLoRA
from peftfn.methods.weights.osf import OSF as OSF
from peftfn.methods.weights.peanut import PEANuT as PEANuT
from peftfn.methods.weights.pissa import PiSSA as PiSSA
from peftfn.methods.weights.psoft import PSOFT as PSOFT
from peftfn.methods.weights.pvera import PVeRA as PVeRA
from peftfn.methods.weights.qalora import QALoRA as QALoRA
from peftfn.methods.weights.randlora import RandLoRA as RandLoRA
from peftfn.methods.weights.road import RoAd as RoAd
from peftfn.methods.weights.shira import SHiRA as SHiRA
from peftfn.methods.weights.supertuning import SuperTuning as SuperTuning
from peftfn.methods.weights.tiedtokens import TiedTokens as TiedTokens
from peftfn.methods.weights.tinylora import TinyLoRA as TinyLoRA
from peftfn.methods.weights.tlora import TLoRA as TLoRA
from peftfn.methods.weights.trainabletokens import TrainableTokens as TrainableTokens
from peftfn.methods.weights.unilora import UniLoRA as UniLoRA
from peftfn.methods.weights.vblora import VBLoRA as VBLoRA
from peftfn.methods.weights.velora import VeLoRA as VeLoRA
from peftfn.methods.weights.vera import VeRA as VeRA
from peftfn.methods.weights.waveft import WaveFT as WaveFT
