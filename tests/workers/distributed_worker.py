"""What test_distributed.py runs on two processes: every check, and a report of each from rank 0.

torchrun --nproc-per-node 2 tests/workers/distributed_worker.py REPORT
"""

import copy
import gc
import json
import logging
import re
import sys
import traceback
import warnings
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import peftfn as pf
from peftfn.core.method import registry
from peftfn.view.module import parameters_of

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
BLOCKS = dict(re.findall(r'^```python title="(.*?)"\n(.*?)^```', PAGE, flags=re.S | re.M))
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
METHODS = [pf.LoRA(rank=4), pf.DoRA(rank=4), pf.VeRA(rank=4), pf.OFT(block_size=4)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def model(blocks=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).eval()


def shaken(adapter):
    g = torch.Generator().manual_seed(1)
    return {
        n: {k: t + 0.05 * torch.randn(t.shape, generator=g) for k, t in leaf.items()} for n, leaf in adapter.items()
    }


def fresh(adapter):
    """The same values, as leaves of autograd."""
    return {n: {k: t.detach().clone().requires_grad_() for k, t in leaf.items()} for n, leaf in adapter.items()}


def gradients(adapter):
    return {n: {k: t.grad for k, t in leaf.items()} for n, leaf in adapter.items()}


def close(a, b, tol=1e-5):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), (a.keys(), b.keys())
        for k in a:
            close(a[k], b[k], tol)
        return
    a, b = a.detach(), b.detach()
    assert a.isfinite().all()
    assert a.shape == b.shape and (a - b).abs().max() <= tol * max(b.abs().max().item(), 1.0), (a - b).abs().max()


def loss(y):
    return y.square().mean()


def mine(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def single(net, a):
    """(output, loss, gradients) of one process on all rows."""
    a = fresh(a)
    y = net.apply(a, X)
    loss(y).backward()
    return y.detach(), loss(y).detach(), gradients(a)


def mean(t):
    t = t.detach().clone()
    dist.all_reduce(t)
    return t / dist.get_world_size()


def check_ddp():
    for method in METHODS:
        net = pf.adapt(model(), {"up|down": method})
        a = shaken(net.init())
        _, error, g = single(net, a)
        m = DistributedDataParallel(pf.as_module(net, a))
        here = loss(m(mine(X)))
        here.backward()
        close(mean(here), error)
        close(gradients(parameters_of(m)), g)


def check_functional_data_parallel():
    net = pf.adapt(model(), {"up|down": pf.LoRA(rank=4)})
    adapter = shaken(net.init())
    names = {"torch": torch, "dist": dist, "adapter": adapter, "my_rows": mine(X)}
    space = names | {"loss": lambda a, x: loss(net.apply(a, x))}
    exec(BLOCKS["functional.py"], space)
    n = dist.get_world_size()  # gloo gives the sum
    close({k: {i: t / n for i, t in v.items()} for k, v in space["gradient"].items()}, single(net, adapter)[2])


def check_fsdp2():
    for method in METHODS:
        base = model()
        net = pf.adapt(base, {"up|down": method})
        a = shaken(net.init())
        y, error, g = single(net, a)
        want = net.merge(a)
        m = pf.as_module(net, a)
        whole = sum(p.numel() for p in m.parameters())
        for block in m:
            fully_shard(block)
        fully_shard(m)
        held = sum(p.to_local().numel() for p in m.parameters())
        assert held <= whole / dist.get_world_size() + 8 * len(list(m.parameters())), (held, whole)  # a row to spare
        gone = [weakref.ref(base), weakref.ref(base[0].up.weight)]
        del net, base
        gc.collect()
        assert not any(r() for r in gone), "the whole weights are still held"
        out = m(mine(X))
        close(out, mine(y))
        here = loss(out)
        here.backward()
        close(mean(here), error)
        close(pf.gather(gradients(parameters_of(m))), g)
        close(pf.gather(pf.adapter_of(m)), a)
        space = {"pf": pf, "m": m}
        exec(BLOCKS["merge.py"], space)
        close(space["whole"], want if dist.get_rank() == 0 else {})


def check_a_model_that_starts_on_meta():
    """No rank ever holds more than its part; constants and leaves get the values they have without sharding."""
    real = model()
    for method in [*METHODS, pf.PiSSA(rank=2), pf.FRoD(density=0.1), pf.VBLoRA(rank=2, vectors=5, length=2)]:
        rules, space = {r"up\.weight": method}, {"torch": torch, "pf": pf, "fully_shard": fully_shard, "build": model}
        one = pf.adapt(real, rules)
        space |= {"RULES": rules, "checkpoint": dict(real.state_dict())}
        exec(BLOCKS["meta.py"], space)
        m = space["m"]
        assert all(p.device.type == "cpu" for p in m.parameters())
        close(pf.gather(pf.base_of(m)), dict(real.state_dict()), 0.0)
        close(pf.gather(pf.adapter_of(m)), one.init(seed=0), 1e-6)
        a = shaken(one.init(1))
        y, error, g = single(one, a)
        pf.copy_(m, a)
        with torch.no_grad():
            close(m(mine(X)), mine(y))
        pf.copy_(m, shaken(one.init(2)))  # after a forward pass without backward the root holds whole parameters
        pf.copy_(m, a)
        here = loss(m(mine(X)))
        here.backward()
        close(mean(here), error)
        close(pf.gather(gradients(parameters_of(m))), g)
        close(pf.gather(pf.adapter_of(m)), a)


def check_values_that_are_missing_or_do_not_fit():
    with torch.device("meta"):
        m = pf.as_module(net := pf.adapt(model(), {"up": pf.LoRA(rank=4)}), net.init())
    plain = pf.as_module(net := pf.adapt(model(), {"up": pf.LoRA(rank=4)}), net.init())
    sharded = pf.as_module(net, net.init())
    fully_shard(sharded)
    for run, words in [
        (lambda: pf.reset_(m), "0.up.weight: no data (it is on meta); call m.to_empty"),
        (lambda: pf.copy_(m, net.init()), "0.up.weight/a: no data (it is on meta)"),
        (lambda: pf.copy_(plain, pf.adapter_of(sharded)), "0.up.weight/a: the source is sharded"),
    ]:
        try:
            run()
        except ValueError as e:
            assert words in str(e), e
        else:
            raise AssertionError("no error")


def check_two_dimensions():
    """FSDP2 over tensor parallelism, both ways that two processes allow."""
    block, n = model(1)[0], dist.get_world_size()
    for method in METHODS:
        one = pf.adapt(block, {"up|down": method})
        a = shaken(one.init())
        y, error, g = single(one, a)
        for shape in ((1, n), (n, 1)):
            space = {"torch": torch, "pf": pf, "fully_shard": fully_shard, "parallelize_module": parallelize_module}
            space |= {"ColwiseParallel": ColwiseParallel, "RowwiseParallel": RowwiseParallel}
            space |= {"model": copy.deepcopy(block), "shape": shape, "RULES": {"up|down": method}}
            exec(BLOCKS["two_dimensions.py"], space)
            m, mesh = space["m"], space["mesh"]
            pf.copy_(m, a)
            rows = X.chunk(shape[0])[mesh.get_local_rank("data")]
            with implicit_replication():
                here = loss(m(rows))
                here.backward()
                close(mean(here), error)
                close(pf.gather(gradients(parameters_of(m))), g)
                close(pf.gather(pf.adapter_of(m)), a)
            close(pf.gather(pf.merged(m)), one.merge(a))
            with implicit_replication():  # nor does merged turn off what its caller has turned on
                close(pf.gather(pf.merged(m)), one.merge(a))
                close(m(rows), y.chunk(shape[0])[mesh.get_local_rank("data")])


def check_fsdp1():
    """Frozen and trained parameters flattened together, and apart; and a policy that takes an adapter for a layer."""
    for method in METHODS:
        net = pf.adapt(model(), {"up|down": method})
        a = shaken(net.init())
        y, _, g = single(net, a)
        for together in (True, False):
            m = pf.as_module(net, a)
            space = {"torch": torch, "dist": dist, "m": m, "Block": Block, "ModuleWrapPolicy": ModuleWrapPolicy}
            space |= {"FullyShardedDataParallel": FullyShardedDataParallel}
            exec(BLOCKS["fsdp1.py" if together else "fsdp1_apart.py"], space)
            sharded = space["sharded"]
            out = sharded(mine(X))
            close(out, mine(y))
            loss(out).backward()
            with FullyShardedDataParallel.summon_full_params(sharded, with_grads=together):
                close(gradients(parameters_of(sharded)), g)
                close(pf.adapter_of(sharded), a)
    odd = FullyShardedDataParallel(
        pf.as_module(net, a),
        auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or type(module).__name__ == "Leaf",
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    try:
        odd(mine(X))
    except RuntimeError as e:
        assert str(e).startswith("0.up.weight: ") and "ModuleWrapPolicy" in str(e), e
    else:
        raise AssertionError("no error")


def llama():
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**size, num_attention_heads=4, attn_implementation="eager")
    return transformers.LlamaForCausalLM(config).eval()


def llama_in_parts():
    plan, base = {}, llama()
    for i, _ in enumerate(base.model.layers):
        layer = f"model.layers.{i}"
        plan |= {f"{layer}.self_attn.{k}_proj": ColwiseParallel() for k in "qkv"}
        plan |= {f"{layer}.mlp.{k}_proj": ColwiseParallel() for k in ("gate", "up")}
        plan |= {f"{layer}.self_attn.o_proj": RowwiseParallel(), f"{layer}.mlp.down_proj": RowwiseParallel()}
    return parallelize_module(base, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def check_methods_at_modules_and_inputs():
    """Bottlenecks, interventions, prompts and prefixes: DDP, FSDP1, FSDP2 and tensor parallelism."""
    ids = torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(0))
    for rules in (
        {"q_proj": pf.LoRA(2), "mlp": pf.Bottleneck(4), ".*": pf.PromptTuning(n=2)},
        {"mlp": pf.LoReFT(rank=2), ".*": pf.PTuning(n=3)},
        {".*": pf.PrefixTuning(n=3)},
        {"self_attn": pf.LlamaAdapter(n=3)},
    ):
        net = pf.adapt(llama(), rules)
        a = shaken(net.init())
        f = fresh(a)
        y = net.apply(f, ids).logits
        loss(y).backward()
        for wrap in (ddp, fsdp1, fsdp2):
            m = wrap(pf.as_module(net, a))
            out = m(mine(ids)).logits
            close(out, mine(y), 1e-4)
            loss(out).backward()
            if wrap is fsdp1:
                with FullyShardedDataParallel.summon_full_params(m, with_grads=True):
                    close(gradients(parameters_of(m)), gradients(f), 1e-4)
            else:
                close(pf.gather(gradients(parameters_of(m))), gradients(f), 1e-4)
        base = llama_in_parts()
        if not {pf.PrefixTuning, pf.LlamaAdapter}.isdisjoint(map(type, rules.values())):
            try:
                pf.adapt(base, rules)
            except ValueError as e:
                assert "under tensor parallelism each process has some of them" in str(e), e
                continue
            raise AssertionError("no error")
        other = pf.adapt(base, rules)
        close(pf.gather(other.init()), net.init())
        b = fresh(pf.distribute(other, a))
        out = other.apply(b, ids).logits
        close(out, y, 1e-4)
        loss(out).backward()
        close(pf.gather(gradients(b)), gradients(f), 1e-4)


def ddp(m):
    return DistributedDataParallel(m)


def fsdp1(m):
    policy = ModuleWrapPolicy({type(m.model.layers[0])})
    return FullyShardedDataParallel(m, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(m):
    for layer in m.model.layers:
        fully_shard(layer)
    return fully_shard(m)


def check_fsdp2_of_four_bits():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    base = nn.Sequential(bnb.nn.Linear4bit(16, 128, quant_type="nf4"), nn.Tanh(), nn.Linear(128, 16)).to("cpu").eval()
    for method in (pf.LoRA(rank=4), pf.DoRA(rank=4)):
        net = pf.adapt(base, {"weight": method})
        a = shaken(net.init())
        y, error, g = single(net, a)
        m = pf.as_module(net, a)
        fully_shard(m)
        packed = m[0].parametrizations.weight.original
        assert packed.dtype == torch.uint8 and packed.to_local().numel() * dist.get_world_size() == packed.numel()
        with torch.no_grad():
            close(m(mine(X)), mine(y))  # bitsandbytes' own forward would pack the weight anew here, on some CPUs
        here = loss(m(mine(X)))
        here.backward()
        close(mean(here), error)
        close(pf.gather(gradients(parameters_of(m))), g)
        close(pf.gather(pf.adapter_of(m)), a)
        try:
            pf.gather(pf.merged(m))
        except ValueError as e:
            assert str(e).startswith("0.weight: its weight is quantised and sharded") and "net.merge" in str(e), e
        else:
            raise AssertionError("no error")


def check_tensor_parallel_page():
    base = model(1)[0]
    x, want = X, pf.adapt(copy.deepcopy(base), {"up|down": pf.LoRA(rank=4)})
    names = {"torch": torch, "pf": pf, "model": base, "x": x, "parallelize_module": parallelize_module}
    space = names | {"ColwiseParallel": ColwiseParallel, "RowwiseParallel": RowwiseParallel}
    exec(BLOCKS["tensor_parallel.py"], space)
    close(space["whole"], want.init())
    close(space["y"], want.apply(want.init(), x))
    placements = {f"{n}/{k}": str(t.placements[0]) for n, v in space["adapter"].items() for k, t in v.items()}
    assert placements == {
        "up.weight/a": "R", "up.weight/b": "S(0)", "down.weight/a": "S(1)", "down.weight/b": "R",
    }, placements  # fmt: skip


def parallel(block):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(copy.deepcopy(block), mesh, plan)


def check_tensor_parallel_training():
    block = model(1)[0]
    for method in (pf.LoRA(rank=4), pf.DoRA(rank=4), pf.IA3()):
        nets = [pf.adapt(m, {"up|down": method}) for m in (block, parallel(block))]
        adapters = [fresh(net.init(3)) for net in nets]
        close(pf.gather(adapters[1]), adapters[0])
        losses = [[], []]
        for net, a, history in zip(nets, adapters, losses, strict=True):
            optimizer = torch.optim.AdamW([t for v in a.values() for t in v.values()], lr=1e-2)
            for _ in range(4):
                optimizer.zero_grad()
                error = loss(net.apply(a, X))
                error.backward()
                optimizer.step()
                history.append(error.detach())
        close(torch.stack([torch.as_tensor(t) for t in losses[1]]), torch.stack(losses[0]))
        assert losses[0][-1] < losses[0][0]
        close(pf.gather(adapters[1]), adapters[0], 1e-4)


def check_every_method_under_tensor_parallelism():
    """Outputs, gradients, merged weights and fresh values, of a column-wise and a row-wise layer."""
    block = model(1)[0]
    sharded = parallel(block)
    found = []
    for cls in registry.values():
        if not cls.__module__.startswith("peftfn.methods") or "linear" not in cls.kinds:
            continue
        method = cls(**cls.cases[0])
        if method.eval() != method or cls.overrides("acts_on"):  # here are no token ids for it to act on
            continue
        for site in ("up", "down") if not cls.overrides("shared") else ("up",):
            try:
                one = pf.adapt(block, {rf"{site}\.weight": method})
            except ValueError as e:
                assert "divide" in str(e)  # RoAd's groups of six
                continue
            try:
                two = pf.adapt(sharded, {rf"{site}\.weight": method})
                close(pf.gather(two.init(2)), one.init(2), 1e-4)
                a = fresh(shaken(one.init(2)))
                b = fresh(pf.distribute(two, a))
                loss(one.apply(a, X)).backward()
                loss(two.apply(b, X)).backward()
                close(two.apply(b, X), one.apply(a, X))
                close(pf.gather(gradients(b)), gradients(a), 1e-4)
                if method.mergeable:
                    close(pf.gather(two.merge(b)), one.merge(a), 1e-4)
            except Exception as e:
                found.append(f"{cls.__name__} {site}: {type(e).__name__}: {str(e)[:160]}")
    assert not found, "\n".join(found)


def check_mixed_batches_under_tensor_parallelism():
    """Rows and gates are plain tensors: an error says what they need, and then outputs and gradients are right."""
    block = model(1)[0]
    sharded, index, gates = parallel(block), [0, 1, -1, 0], [0.3, 0.7]
    for method in [*METHODS, pf.IA3()]:
        one, two = (pf.adapt(m, {"up|down": method}) for m in (block, sharded))
        each = [shaken(one.init(i)) for i in range(2)]
        a, b = fresh(pf.stack(each)), fresh(pf.stack([pf.distribute(two, x) for x in each]))
        try:
            two.mixed(b, index, X)
        except ValueError as e:
            assert "up.weight is sharded" in str(e) and "implicit_replication" in str(e), e
        else:
            raise AssertionError("no error")
        loss(one.mixed(a, index, X)).backward()
        with implicit_replication():
            loss(two.mixed(b, index, X)).backward()
            close(two.mixed(b, index, X), one.mixed(a, index, X))
            close(two.gated(b, gates, X), one.gated(a, gates, X))
        close(pf.gather(gradients(b)), gradients(a), 1e-4)


def check_files_under_tensor_parallelism():
    block = model(1)[0]
    sharded, folder = parallel(block), Path(sys.argv[1]).parent
    for method in (pf.LoRA(rank=4), pf.PiSSA(rank=4)):
        plain = pf.adapt(block, {"up|down": method})
        a = shaken(plain.init())
        if dist.get_rank() == 0:
            pf.save(folder / "adapter", plain, a)
        dist.barrier()
        net, b = pf.load(folder / "adapter", sharded)
        close(net.apply(b, X), plain.apply(a, X))
        for adapter, words in [(b, "peftfn.gather"), (pf.gather(b), "without sharding")]:
            if method == pf.LoRA(rank=4) and adapter is not b:
                continue  # it has no constants
            try:
                pf.save(folder / "other", net, adapter)
            except ValueError as e:
                assert ".weight: its " in str(e) and words in str(e), e
            else:
                raise AssertionError("no error")


def check_errors():
    block = model(1)[0]
    plain, sharded = (pf.adapt(m, {"up": pf.LoRA(rank=4)}) for m in (block, parallel(block)))
    for net, other, words in [(sharded, plain, "peftfn.distribute"), (plain, sharded, "peftfn.gather")]:
        try:
            net.apply(other.init(), X)
        except ValueError as e:
            assert str(e).startswith("up.weight: the weight is ") and words in str(e), e
        else:
            raise AssertionError("no error")
    try:
        torch.func.vmap(sharded.apply, (0, None))(pf.stack([sharded.init()] * 2), X)
    except ValueError as e:
        assert str(e).startswith("up.weight: ") and "do not run under torch.func" in str(e), e
    else:
        raise AssertionError("no error")
    fully_shard(block)
    try:
        pf.adapt(block, {"up": pf.LoRA()})
    except TypeError as e:
        assert "fully_shard(m)" in str(e), e
    else:
        raise AssertionError("no error")


def main() -> None:
    dist.init_process_group("gloo")
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # of what a gather in two dimensions costs
    warnings.simplefilter("ignore")  # from DTensor, about constants of one number
    report = {}
    for name, check in [(n, f) for n, f in globals().items() if n.startswith("check_")]:
        problem = ""
        try:
            with implicit_replication() if "every_method" in name else warnings.catch_warnings():
                check()
        except Exception:
            problem = traceback.format_exc()
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        report[name.removeprefix("check_")] = "\n".join(p for p in problems if p)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
