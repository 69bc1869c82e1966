"""The adapters of a server: names and paths are untrusted, plans bounded; what cannot go step by step is refused."""

from pathlib import Path

import pytest
import torch
from served import folders, model
from support import close, random

import peftfn as pf
from peftfn.serving.adapters import Adapters


@pytest.mark.parametrize(
    "name", ["", "..", ".", "../x", "a/b", "a\\b", ".hidden", "a\nb", "a\x00", "x" * 200, "c:", "__base__"]
)
def test_names_that_could_be_paths_are_refused(name: str, tmp_path: Path) -> None:
    folders(tmp_path / "a", base := model(), 1)
    adapters = Adapters(base, tmp_path / "a")
    for call in (adapters.acquire, adapters.put, adapters.remove, lambda n: adapters.put(n, "user0")):
        with pytest.raises(ValueError, match="cannot name an adapter"):
            call(name)
    assert adapters.names == ["user0"]


@pytest.mark.parametrize(
    "path", ["..", "../b", ".", "", "/etc", "user0/../../b", "link", "linked", "user0\x00", "~", "no"]
)
def test_paths_that_lead_out_of_the_directory_are_refused(path: str, tmp_path: Path) -> None:
    base = model()
    folders(tmp_path / "a", base, 1)
    folders(tmp_path / "b", base, 1)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "user0", target_is_directory=True)
    (tmp_path / "a" / "linked").mkdir()
    for file in (tmp_path / "b" / "user0").iterdir():
        (tmp_path / "a" / "linked" / file.name).symlink_to(file)
    adapters = Adapters(base, tmp_path / "a")
    with pytest.raises((ValueError, KeyError), match=r"leads out of|NUL|has no folder") as why:
        adapters.put("x", path)
    assert str(tmp_path) not in str(why.value)
    if path.startswith("link"):
        with pytest.raises(ValueError, match="leads out of"):
            adapters.acquire(path)
    assert adapters.registered == 0
    (tmp_path / "a" / "inside").symlink_to(tmp_path / "a" / "user0", target_is_directory=True)
    adapters.put("x", "inside")


def test_a_broken_folder_is_said_without_the_servers_paths(tmp_path: Path) -> None:
    base = model()
    folders(tmp_path / "a", base, 2)
    (tmp_path / "a" / "empty").mkdir()
    (tmp_path / "a" / "user1" / "adapter_config.json").write_text("{")
    adapters = Adapters(base, tmp_path / "a")
    for name in ("empty", "user1"):
        with pytest.raises(ValueError, match=name) as why:
            adapters.acquire(name)
        assert str(tmp_path) not in str(why.value)
    with pytest.raises(NotADirectoryError, match="is no folder"):
        Adapters(base, tmp_path / "none")
    with pytest.raises(KeyError, match="the base alone"):
        Adapters(base, None).acquire("user0")


def test_plans_are_bounded_and_a_wider_one_takes_the_place_of_a_narrow_one(tmp_path: Path) -> None:
    base, root = model(), tmp_path / "a"
    for name, rules in {
        "narrow": {"q_proj": pf.LoRA(2)},
        "wide": {"q_proj": pf.LoRA(4)},
        "widest": {"q_proj": pf.LoRA(64)},
        "other": {"mlp": pf.IA3()},
    }.items():
        net = pf.adapt(base, rules)
        pf.save(root / name, net, random(net, 1))
    adapters = Adapters(base, root, slots=2, plans=2)
    adapters.put("alias", "narrow")
    for name, plans in {"narrow": 1, "wide": 1, "widest": 2}.items():
        adapters.release(adapters.acquire(name))
        assert adapters.bank is not None and len(adapters.bank.nets.nets) == plans
    adapters.release(adapters.acquire("narrow"))
    with pytest.raises(ValueError, match=r"'other': it fits none of the 2 plans .*--plans"):
        adapters.acquire("other")
    for name in ("wide", "alias"):  # a name that was given to a folder outlives the plan that it had
        adapters.release(adapters.acquire(name))
    adapters.remove("alias")
    with pytest.raises(KeyError, match="no folder 'alias'"):
        adapters.acquire("alias")


def test_a_new_plan_leaves_resident_what_is(tmp_path: Path) -> None:
    """So no file is read again, whether the plan is one more or a wider form of one that there is."""
    base, root = model(), tmp_path / "a"
    rules = {"a": pf.LoRA(2), "b": pf.LoRA(1, alpha=3), "c": pf.LoRA(2), "wide": pf.LoRA(3), "other": pf.IA3()}
    made = {}
    for i, (name, method) in enumerate(rules.items()):
        net = pf.adapt(base, {"mlp" if name == "other" else "q_proj": method})
        pf.save(root / name, *(made.setdefault(name, (net, random(net, i)))))
    adapters = Adapters(base, root, slots=3)
    x, keys = torch.tensor([[5, 6, 7]]), {}
    for name in "abc":
        keys[name] = adapters.acquire(name)
        adapters.release(keys[name])
    assert adapters.bank is not None and adapters.fetch(list(keys.values())) == {} and adapters.resident == 3
    root.rename(tmp_path / "away")
    root.mkdir()
    for n, name in enumerate(("other", "wide"), 1):
        (tmp_path / "away" / name).rename(root / name)
        adapters.release(adapters.acquire(name))
        assert adapters.resident == 3 and adapters.registered == 3 + n and len(adapters.bank.nets.nets) == 2
        for known, key in keys.items():
            close(adapters.bank.apply([key], x).logits, made[known][0].apply(made[known][1], x).logits)
    assert adapters.acquire("a") == keys["a"]


def test_names_that_were_given_to_folders_are_bounded(tmp_path: Path) -> None:
    folders(tmp_path, base := model(), 2)
    adapters = Adapters(base, tmp_path, aliases=2)
    for i in range(5):  # one that is removed leaves nothing
        adapters.put(f"once{i}", "user0")
        adapters.remove(f"once{i}")
    assert not adapters._gone
    adapters.put("x", "user0"), adapters.put("y", "user1")
    for name, path in (("z", "user0"), ("user0", "user1")):
        with pytest.raises(ValueError, match=rf"'{name}': 2 names were given .* DELETE one, or .* more --aliases"):
            adapters.put(name, path)
    (
        adapters.put("x", "user1"),
        adapters.put("user0", "user0"),
        adapters.put("user1"),
    )  # these are no more than there were
    adapters.remove("y")
    adapters.put("z", "user0")
    assert adapters.names == ["user0", "user1", "x", "z"]


def test_adapters_that_count_the_tokens_of_a_call_are_refused(tmp_path: Path) -> None:
    base = model()
    for name, rules in {
        "prompt": {"model": pf.PromptTuning(n=3)},
        "reft": {"layers.1": pf.LoReFT(rank=2, first=1)},
    }.items():
        net = pf.adapt(base, rules)
        pf.save(tmp_path / name, net, random(net, 1))
        with pytest.raises(ValueError, match=f"'{name}'.* counts the tokens of a whole call"):
            Adapters(base, tmp_path).acquire(name)
