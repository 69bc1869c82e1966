"""An adapter to the Hugging Face hub, as one commit of what `save` writes."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peftfn.formats import OWN, hub, save
from peftfn.formats.card import FILE as CARD
from peftfn.formats.card import write_card
from peftfn.formats.peft_extra import about
from peftfn.net.net import Adapted
from peftfn.tensors.tree import leaves


def push(
    repo: str,
    net: Adapted,
    adapter: Mapping[str, Any],
    *,
    format: str = "peft",
    subfolder: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    **options: Any,
) -> str:
    """Upload an adapter to a repository of the Hugging Face Hub, which is made if it is not there.

    It is one commit of the files that `save` writes, with a model card (README.md) unless the repository has one. A
    former adapter's files of another format go, as in a folder.

    Args:
        repo: the repository, "owner/name".
        net: the adapter's net.
        adapter: an adapter of it.
        format: as for `save`; here PEFT's, which most tools read, unless you ask for another.
        subfolder: where in the repository.
        revision: the branch to commit to; it must be there. None means the main one.
        message: of the commit.
        private: whether a repository that is made is private. None means what its owner's account says.
        create_pr: commit to a new pull request in place of the branch.
        token: of the Hub. None means the one that `hf auth login` or HF_TOKEN gave.
        endpoint: the Hub's address, where it is not the usual one.
        options: further options of `save`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: `repo` is not a repository name, or as for `save`; nothing has been sent then.
        ModuleNotFoundError: huggingface_hub is not installed.

    Example:
        import functools
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        share = functools.partial(pf.push, "owner/name", net)  # share(adapter) uploads it
    """
    if not isinstance(repo, str) or not hub.is_repository(repo):
        raise ValueError(f"push: {str(repo)[:80]!r} is not the name of a repository: give 'owner/name'")
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("push needs huggingface_hub: pip install huggingface_hub") from e
    names = {type(e.method).__name__ for e in net.plan.values()} if isinstance(net, Adapted) else ()
    with TemporaryDirectory() as folder:
        save(folder, net, adapter, format=format, **options)
        tensors = {str(i): t for i, t in enumerate(leaves(adapter))}
        write_card(Path(folder), about(net.model), tensors, net.plan, library="peftfn")  # unless the format did
        api = HfApi(endpoint=endpoint, token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        card = f"{subfolder}/{CARD}" if subfolder else CARD
        kept = api.file_exists(repo, card, revision=revision)
        written = {p.name for p in Path(folder).iterdir()}
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            path_in_repo=subfolder,
            revision=revision,
            commit_message=message or f"Adapter: {', '.join(sorted(names))}",
            create_pr=create_pr,
            ignore_patterns=[CARD] if kept else None,
            delete_patterns=sorted({f for files in OWN.values() for f in files} - written),
        )
    return str(done.pr_url or done.commit_url)
