"""X-LoRA's folders, live: PEFT's experts and classifier here, and ours in PEFT."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import by_name
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import grad

import peftfn as pf

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [3, 3, 1, 5, 2]])
RUN: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CLASSIFIER = "internal_xlora_classifier"


def base() -> Any:
    model = by_name["llama"].build().eval().requires_grad_(False)
    model.config.use_cache = False  # PEFT's X-LoRA wants it
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three experts that PEFT wrote, of different layers, ranks and scales."""
    root = tmp_path_factory.mktemp("experts")
    targets: list[tuple[list[str], int, int]] = [
        (["q_proj", "v_proj"], 2, 3),
        (["k_proj", "v_proj"], 3, 3),
        (["v_proj", "q_proj"], 2, 5),
    ]
    for j, (names, r, alpha) in enumerate(targets):
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=names, init_lora_weights=False)
        torch.manual_seed(10 + j)
        peft.get_peft_model(base(), config).save_pretrained(root / f"of_task_{j}")
    return [str(root / f"of_task_{j}") for j in range(3)]


def theirs(folders: list[str], folder: Path | None = None, names: Any = None, **options: Any) -> Any:
    """PEFT's X-LoRA, and in the folder what its save_pretrained writes, with the classifier that it leaves out."""
    named = dict(zip(names or map(str, range(len(folders))), folders, strict=True))
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, xlora_size=8, adapters=named, **options)
    model = peft.get_peft_model(base(), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if CLASSIFIER in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.5)
    if folder is not None:
        model.save_pretrained(folder)
        assert not load_file(folder / "adapter_model.safetensors"), "PEFT writes its classifier: mend the docs"
        save_file(
            {k: v for k, v in model.state_dict().items() if CLASSIFIER in k}, folder / "adapter_model.safetensors"
        )
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


OPTIONS: list[dict[str, Any]] = [
    {},
    {"xlora_depth": 3, "layerwise_scalings": True, "global_scaling_weight": 0.7},
    {"xlora_depth": 2, "xlora_dropout_p": 0.0, "top_k_lora": 2, "softmax_temperature": 0.5},
    {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "defaults")
def test_both_ways_token_for_token(options: dict[str, Any], folders: list[str], tmp_path: Path) -> None:
    model = theirs(folders, tmp_path / "theirs", **options) if "xlora_depth" not in options else None
    if model is None:  # PEFT's file then has a part of the classifier
        model = theirs(folders, **options)
        model.save_pretrained(tmp_path / "theirs")
        state = {k: v for k, v in model.state_dict().items() if CLASSIFIER in k}
        save_file(state, tmp_path / "theirs" / "adapter_model.safetensors")
    mixture, a = pf.XLoRA.load(tmp_path / "theirs", base())
    want = logits(model)
    torch.testing.assert_close(logits(lambda **k: mixture.apply(a, **k)), want, rtol=1e-4, atol=1e-5)
    assert (want - logits(base())).abs().max() > 1e-3
    got = mixture.apply(a, IDS, method="generate", use_cache=False, **RUN)
    assert torch.equal(got, model.generate(input_ids=IDS, **RUN))

    mixture.save(tmp_path / "ours", a, extra={"task_type": "CAUSAL_LM"})
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-5)
    (tmp_path / "ours").rename(tmp_path / "moved")  # its experts are found beside it
    moved, b = pf.XLoRA.load(tmp_path / "moved", base())
    assert torch.equal(logits(lambda **k: moved.apply(b, **k)), logits(lambda **k: mixture.apply(a, **k)))


def test_gradients_of_classifier_and_experts_are_pefts(folders: list[str], tmp_path: Path) -> None:
    folders = [folders[0], folders[1]]
    model = theirs(folders, tmp_path, use_trainable_adapters=True)
    model(input_ids=IDS).logits.square().mean().backward()
    mixture, a = pf.XLoRA.load(tmp_path, base())
    got = grad(lambda a: mixture.apply(a, IDS).logits.square().mean())(a)
    layer = model.base_model.internal_xlora_classifier.layers[0]
    torch.testing.assert_close(got["router"]["0.weight"], layer.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got["router"]["0.bias"], layer.bias.grad, rtol=1e-4, atol=1e-6)
    assert layer.weight.grad.abs().max() > 0
    for site, leaf in got["experts"].items():
        module = model.base_model.lora_model.model.get_submodule(site.removesuffix(".weight"))
        for j in range(2):
            if str(j) not in module.lora_A:
                assert not leaf["a"][j].any() and not leaf["b"][j].any()
                continue
            r = module.r[str(j)]
            scale = module.scaling[str(j)] / mixture.net.plan[site].method.scale  # what conform folds into b
            torch.testing.assert_close(
                leaf["b"][j][:, :r] * scale, module.lora_B[str(j)].weight.grad, rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(leaf["a"][j][:r], module.lora_A[str(j)].weight.grad, rtol=1e-4, atol=1e-6)


def test_the_order_of_experts_is_pefts(folders: list[str], tmp_path: Path) -> None:
    """PEFT loads the i-th of `adapters` as i, and gives the classifier's outputs the order of their names."""
    model = theirs(folders, tmp_path, names=["2", "0", "1"])
    file = tmp_path / "adapter_config.json"
    named = dict(zip(["2", "0", "1"], folders, strict=True))  # save_pretrained sorts them, which is another mixture
    file.write_text(json.dumps({**json.loads(file.read_text()), "adapters": named}))
    mixture, a = pf.XLoRA.load(tmp_path, base())
    torch.testing.assert_close(logits(lambda **k: mixture.apply(a, **k)), logits(model), rtol=1e-4, atol=1e-5)


def test_dropout_is_the_classifiers_in_train_mode(folders: list[str]) -> None:
    model = base()
    mixture = pf.XLoRA(pf.adapt(model, {"q_proj": pf.LoRA(2, init_weights="random")}), 2, depth=2, size=8, dropout=0.5)
    a = mixture.init(seed=0)
    assert torch.equal(mixture.apply(a, IDS).logits, mixture.apply(a, IDS).logits)
    model.train()
    assert not torch.equal(mixture.apply(a, IDS).logits, mixture.apply(a, IDS).logits)
    assert all(torch.equal(a["router"][k], t) for k, t in mixture.init(seed=0)["router"].items())


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapters": {"math": "x"}}, r"adapters are called 'math', .* experts=\[…\]"),
        ({"adapters": {}}, "adapters is {}; it must have the path of each expert"),
        ({"adapters": {"0": 3}}, "it must have the path"),
        ({"adapters": {"0": "ä" * 300}}, "it must have the path"),
        ({"adapters": {"0": "a\0b"}}, "it must have the path"),
        ({"adapters": {"0": "../../none"}}, "does not exist"),
        ({"scaling_pass_value": 0.5}, "scaling_pass_value is 0.5: PEFT's classifier sees"),
        ({"scaling_pass_value": None}, "scaling_pass_value is None"),
        ({"xlora_depth": 2}, "it has 2 tensors, and a classifier of xlora_depth 2 has 4"),
        ({"xlora_depth": 10**9}, "xlora_depth is 1000000000; it must be from 1 to"),
        ({"hidden_size": 32}, r"the classifier's 0.weight is \[3, 16\], .* need \[3, 32\]"),
        ({"layerwise_scalings": True}, "3 experts at 6 sites need"),
        ({"top_k_lora": 4}, "k is 4, and there are 3 experts"),
        ({"softmax_temperature": 0}, "temperature=0"),
        ({"new_option": 3}, "new_option is 3, which X-LoRA does not have"),
        ({"peft_type": "LORA"}, "peft_type is 'LORA', not XLORA"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_an_error(
    changes: dict[str, Any], says: str, folders: list[str], tmp_path: Path
) -> None:
    theirs(folders, tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        pf.XLoRA.load(tmp_path, base())


def test_pefts_own_folder_lacks_its_classifier_and_the_error_says_so(folders: list[str], tmp_path: Path) -> None:
    theirs(folders).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"write them yourself, .*internal_xlora_classifier"):
        pf.XLoRA.load(tmp_path, base())
    with pytest.raises(ValueError, match=r"peftfn\.XLoRA\.load\(path, model\)"):
        pf.load(tmp_path, base())


def test_experts_that_peft_does_not_weigh_are_errors(folders: list[str], tmp_path: Path) -> None:
    net = pf.adapt(base(), {"q_proj": pf.DoRA(rank=2)})
    pf.save(tmp_path / "dora", net, net.init(), format="peft")
    theirs(folders, tmp_path / "x")
    with pytest.raises(ValueError, match=r"q_proj\.weight: X-LoRA's experts are LoRAs without a bias"):
        pf.XLoRA.load(tmp_path / "x", base(), experts=[*folders[:2], tmp_path / "dora"])
    mixture = pf.XLoRA(net, 2)
    with pytest.raises(ValueError, match="X-LoRA's experts are LoRAs"):
        mixture.save(tmp_path / "y", mixture.init())
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    "given",
    [{"depth": 0}, {"size": 0}, {"hidden": 0}, {"k": 3}, {"k": 0}, {"dropout": 1.0}, {"temperature": 0.0}],
    ids=str,
)
def test_numbers_out_of_range_are_errors(given: dict[str, Any]) -> None:
    net = pf.adapt(base(), {"q_proj": pf.LoRA(rank=2)})
    with pytest.raises(ValueError, match="XLoRA: "):
        pf.XLoRA(net, 2, **given)
    mixture = pf.XLoRA(net, 2)
    with pytest.raises(KeyError, match="not a classifier of the shapes"):
        mixture.apply({**mixture.init(), "router": {}}, IDS)


def test_the_base_is_not_changed(folders: list[str], tmp_path: Path) -> None:
    theirs(folders, tmp_path)
    model = base()
    before = copy.deepcopy(model.state_dict())
    mixture, a = pf.XLoRA.load(tmp_path, model)
    mixture.apply(a, IDS)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
