"""Puts a merged checkpoint on the hub."""

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.card import public_name, render_card
from merge.errors import MergeError
from merge.output import RECORD_NAME
from merge.verify import read_record, verify_folder


def push_folder(folder: str | Path, repository: str, *, private: bool) -> str:
    """Uploads a merged folder, merge.json included, after checking every byte of it.

    The card is written again: it names the repository, from which the model is then loaded. What
    is uploaded names local folders by their last part alone; the folder itself keeps their paths,
    which `obm merge verify` and `algorithm.anchor` follow.

    Args:
        folder: What `obm merge` wrote.
        repository: `owner/name`; made when it is not there.
        private: Whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        MergeError: The folder is damaged, or the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi

    folder = Path(os.path.expanduser(folder))
    verify_folder(folder)
    record = read_record(folder)
    card = render_card(record, repository)
    (folder / "README.md").write_text(card, encoding="utf-8")
    api: Any = HfApi()
    try:
        with tempfile.TemporaryDirectory() as public:
            _link_files(folder, Path(public))
            text = json.dumps(public_record(record), indent=2) + "\n"
            (Path(public) / RECORD_NAME).write_text(text, encoding="utf-8")
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=public, commit_message="Merged checkpoint"
            )
    # The client lets errors of its transport through, which have no class in common.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise MergeError(
            f"--push-to-hub {repository}: the hub refuses ({type(error).__name__}: {reason}); "
            f"check the name, `hf auth login` and the network; {folder} is whole, push it again "
            f"with `hf upload {repository} {folder}`, whose {RECORD_NAME} names local paths"
        ) from error
    return str(commit.commit_url)


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """merge.json without the paths of the machine that merged.

    Args:
        record: Content of merge.json, of a merged adapter too; stays as it is.
    """
    public = copy.deepcopy(dict(record))
    public["published"] = True
    for parent in public["parents"].values():
        parent["source"] = public_name(parent["source"])
    for statistics in public.get("stats", {}).values():
        statistics["source"] = Path(statistics["source"]).name
    if "adapter" in public:
        adapter, base = public["adapter"], "base_model_name_or_path"
        adapter["source"] = Path(adapter["source"]).name
        if adapter["settings"].get(base):  # an empty name would be the folder that we are in
            adapter["settings"][base] = public_name(adapter["settings"][base])
    return public


def _link_files(folder: Path, place: Path) -> None:
    """Links every file of the folder but merge.json, however large, into an empty place."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and str(name) != RECORD_NAME:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).symlink_to(path.resolve())
