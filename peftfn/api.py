"""Every public name of peftfn. `peftfn` itself imports this file when a name is first asked for."""

from functools import partial

from peftfn import routing
from peftfn.core.chain import Chain, chain
from peftfn.core.combine import scale
from peftfn.core.method import Method, Weight, registry
from peftfn.core.modulechain import ModuleChain
from peftfn.core.modules import Along, ModuleMethod, Prefix, Tokens
from peftfn.core.plan import Adapter
from peftfn.core.rng import Rng
from peftfn.formats import load, save
from peftfn.formats.facts import inspect
from peftfn.formats.files import Loaded
from peftfn.formats.memory import from_state_dict, state_dict
from peftfn.formats.obstacles import Obstacle, obstacles
from peftfn.formats.peft_extra import replicate
from peftfn.formats.push import push
from peftfn.formats.several import load_all, save_view
from peftfn.formats.whole_model import load_model
from peftfn.many.alora import alora_gates
from peftfn.many.bank import Bank
from peftfn.many.conform import conform
from peftfn.many.continuous import Continuous, continuous
from peftfn.many.fitted import bank
from peftfn.many.nets import Nets
from peftfn.many.residents import BankBusy
from peftfn.many.routed import Routed
from peftfn.many.stack import stack, unstack
from peftfn.many.sums import add
from peftfn.many.xlora import XLoRA
from peftfn.methods import *  # noqa: F403
from peftfn.methods.parts.longlora import longlora
from peftfn.model.model import places, sites
from peftfn.model.place import Place
from peftfn.model.site import Site
from peftfn.net.distributed import distribute, gather
from peftfn.net.net import Adapted, adapt
from peftfn.slots.routes import PerForward
from peftfn.sweeps.sweep import sweep
from peftfn.sweeps.swept import Swept
from peftfn.sweeps.trial import Trial, behind, grid, patience
from peftfn.tensors.tree import leaves
from peftfn.tools import merging, optim, starts, steps, suggest
from peftfn.tools.check import Finding, check
from peftfn.tools.convert import to_lora
from peftfn.tools.describe import Described, Description, describe
from peftfn.tools.extract import extract
from peftfn.tools.intruders import intruders, reduce_intruders
from peftfn.tools.report import MergedSite, MergeReport, merge_report
from peftfn.tools.spectrum import SpectrumReport, SpectrumSite, spectrum
from peftfn.tools.summary import summary
from peftfn.tools.targets import targets
from peftfn.tools.verify import Verification, VerifiedSite, verify
from peftfn.view.active import View
from peftfn.view.change import attach_, detach_
from peftfn.view.make import as_module
from peftfn.view.merged import merged, merged_model
from peftfn.view.module import adapter_of, base_of, buffers_of
from peftfn.view.reset import reset_
from peftfn.view.saving import save_pretrained
from peftfn.view.status import status
from peftfn.view.write import copy_, offload_, onload_, trainable_

View.saver = partial(save_pretrained, write=save_view)  # two rooms that do not know each other
__all__ = [
    "Adapted",
    "Adapter",
    "Along",
    "Bank",
    "BankBusy",
    "Chain",
    "Continuous",
    "Described",
    "Description",
    "Finding",
    "Loaded",
    "MergeReport",
    "MergedSite",
    "Method",
    "ModuleChain",
    "ModuleMethod",
    "Nets",
    "Obstacle",
    "PerForward",
    "Place",
    "Prefix",
    "Rng",
    "Routed",
    "Site",
    "SpectrumReport",
    "SpectrumSite",
    "Swept",
    "Tokens",
    "Trial",
    "Verification",
    "VerifiedSite",
    "Weight",
    "XLoRA",
    "adapt",
    "adapter_of",
    "add",
    "alora_gates",
    "as_module",
    "attach_",
    "bank",
    "base_of",
    "behind",
    "buffers_of",
    "chain",
    "check",
    "conform",
    "continuous",
    "copy_",
    "describe",
    "detach_",
    "distribute",
    "extract",
    "from_state_dict",
    "gather",
    "inspect",
    "grid",
    "intruders",
    "leaves",
    "load",
    "load_all",
    "load_model",
    "longlora",
    "merge_report",
    "merged",
    "merged_model",
    "merging",
    "obstacles",
    "offload_",
    "onload_",
    "optim",
    "patience",
    "places",
    "push",
    "reduce_intruders",
    "replicate",
    "reset_",
    "routing",
    "save",
    "scale",
    "sites",
    "spectrum",
    "stack",
    "starts",
    "state_dict",
    "status",
    "steps",
    "suggest",
    "summary",
    "sweep",
    "targets",
    "to_lora",
    "trainable_",
    "unstack",
    "verify",
    *sorted(registry.keys() - {"Chain", "ModuleChain"}),
]
