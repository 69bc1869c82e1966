"""Starting points for LoRA: pure functions of a net, and of data or a quantiser, that leave the base as it is.

Each takes a net of LoRAs and returns a net on the same model and an adapter of it to train. Where the papers subtract
the start s·B₀A₀ from the weight, the net's method is an `OffsetLoRA`, whose constants are A₀ and B₀: so a start is the
identity, and `to_lora` converts the trained adapter to a LoRA of twice the rank, exactly. (PiSSA and OLoRA, which need
no data, are the methods `pf.PiSSA` and `pf.OLoRA`.)

    function       B A at the start, and what it is made of
    orthogonal     0, of two factors that are not zero
    eva            0: A has the principal directions of the layers' inputs, and the ranks go where they explain most
    corda          components of W C, C the covariance of the layers' inputs; an offset
    lora_ga        singular vectors of the loss's gradient; an offset
    lora_one       −G's largest components: the first step of gradient descent, which is no identity
    loftq          what a quantiser takes from the weight
    sparse         0, for SHiRA: at places of your own
"""

from peftfn.tools.start_gradients import lora_ga, lora_one
from peftfn.tools.start_inputs import corda, eva
from peftfn.tools.start_weights import loftq, orthogonal, sparse

__all__ = ["corda", "eva", "loftq", "lora_ga", "lora_one", "orthogonal", "sparse"]
