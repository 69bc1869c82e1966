"""PEFT's files of Poly, live: several tasks are a stack, and one is an adapter."""

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
TASKS = torch.tensor([2, 0, 1])
BASE = by_name["llama"].build().eval().requires_grad_(False)
Q = "model.layers.0.self_attn.q_proj.weight"


def theirs(tasks: int = 3, **options: Any) -> Any:
    config = peft.PolyConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["q_proj", "v_proj"],
        n_tasks=tasks,
        n_skills=4,
        n_splits=2,
        init_weights=False,
        **options,
    )
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(copy.deepcopy(BASE), config).eval()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, task_ids=TASKS).logits
    return out


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_file_of_pefts_is_a_stack_of_its_tasks(options: dict[str, Any], tmp_path: Path) -> None:
    model = theirs(**options)
    model.save_pretrained(tmp_path)
    net, tasks = pf.load(tmp_path, BASE)
    assert pf.inspect(tmp_path)[""]["methods"] == {"POLY": 4}
    torch.testing.assert_close(net.mixed(tasks, TASKS, IDS).logits, logits(model), rtol=1e-4, atol=1e-5)
    a = tasks[Q]["a"]
    assert a.shape[0] == 3 and a.stride(0) == 0, "the tasks have the skills several times in memory"
    run: Any = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = net.mixed(tasks, TASKS, IDS, method="generate", **run)
    assert torch.equal(got, model.generate(input_ids=IDS, task_ids=TASKS, **run))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_what_is_written_is_read_by_peft(tmp_path: Path) -> None:
    theirs(modules_to_save=["lm_head"]).save_pretrained(tmp_path / "theirs")
    net, tasks = loaded = pf.load(tmp_path / "theirs", BASE)
    pf.save(tmp_path / "ours", net, tasks, format="peft", tasks=True, extra=loaded.extra)  # with task_type
    again = peft.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), net.mixed(tasks, TASKS, IDS).logits, rtol=1e-4, atol=1e-5)
    for kept in ("theirs", "ours"):
        assert json.loads((tmp_path / kept / "adapter_config.json").read_text())["n_tasks"] == 3
    one, other = (load_file(tmp_path / kept / "adapter_model.safetensors") for kept in ("theirs", "ours"))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=0, atol=1e-7 if "lm_head" in key else 0)


def test_gradients_of_skills_and_routers_are_pefts(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    net, tasks = pf.load(tmp_path, BASE)
    model(input_ids=IDS, task_ids=TASKS).logits.square().mean().backward()
    shared = {n: {k: t if k == "z" else t[0] for k, t in leaf.items()} for n, leaf in tasks.items()}

    def loss(shared: Any) -> Tensor:
        stack = {
            n: {k: t if k == "z" else t.expand(3, *t.shape) for k, t in leaf.items()} for n, leaf in shared.items()
        }
        return net.mixed(stack, TASKS, IDS).logits.square().mean()

    got = grad(loss)(shared)
    for name, leaf in got.items():
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        want = {
            "a": layer.poly_lora_A["default"].grad,
            "b": layer.poly_lora_B["default"].grad,
            "z": layer.poly_router["default"].module_logits.grad,
        }
        for k, g in want.items():
            torch.testing.assert_close(leaf[k], g, rtol=1e-4, atol=1e-6, msg=f"{name} {k}")
            assert g.abs().max() > 0


def test_one_task_is_an_adapter(tmp_path: Path) -> None:
    model = theirs(tasks=1)
    model.save_pretrained(tmp_path / "theirs")
    net, a = pf.load(tmp_path / "theirs", BASE)
    with torch.no_grad():
        want = model(input_ids=IDS, task_ids=torch.zeros(3, dtype=torch.int64)).logits
    torch.testing.assert_close(net.apply(a, IDS).logits, want, rtol=1e-4, atol=1e-5)
    pf.save(tmp_path / "ours", net, a, format="peft")
    one, other = (load_file(tmp_path / kept / "adapter_model.safetensors") for kept in ("theirs", "ours"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_what_pefts_tasks_cannot_differ_in_is_an_error(tmp_path: Path) -> None:
    net = pf.adapt(BASE, {"q_proj": pf.Poly(rank=2, skills=2)})
    with pytest.raises(ValueError, match=f"{Q}: PEFT's tasks share all but .* here a differs"):
        pf.save(tmp_path, net, pf.stack([net.init(0), net.init(1)]), format="peft", tasks=True)
    lora = pf.adapt(BASE, {"q_proj": pf.LoRA(rank=2)})
    two = pf.stack([lora.init(0), lora.init(1)])
    with pytest.raises(ValueError, match="tasks=True is for multitask prompts and for Poly"):
        pf.save(tmp_path, lora, two, format="peft", tasks=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_tasks": 2}, "has shape .* and n_tasks is 2"),
        ({"n_tasks": 0}, "n_tasks is 0; it must be a positive integer"),
        ({"n_tasks": 1.5}, "n_tasks is 1.5"),
        ({"n_splits": 1}, "has shape"),
        ({"poly_type": "mhr"}, "no method for PEFT's POLY"),
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=says) as e:
        pf.load(tmp_path, BASE)
    assert str(tmp_path) in str(e.value)


def test_a_nan_of_any_task_is_an_error(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "module_logits" in k)
    tensors[key][2, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{key} contains 1 NaN"):
        pf.load(tmp_path, BASE)
