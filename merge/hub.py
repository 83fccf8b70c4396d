"""Puts a merged checkpoint on the hub."""

import os
from pathlib import Path
from typing import Any

from merge.card import render_card
from merge.errors import MergeError
from merge.verify import read_record, verify_folder


def push_folder(folder: str | Path, repository: str, *, private: bool) -> str:
    """Uploads a merged folder, merge.json included, after checking every byte of it.

    The card is written again: it names the repository, from which the model is then loaded.

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
    card = render_card(read_record(folder), repository)
    (folder / "README.md").write_text(card, encoding="utf-8")
    api: Any = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message="Merged checkpoint"
        )
    # The client lets errors of its transport through, which have no class in common.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise MergeError(
            f"--push-to-hub {repository}: the hub refuses ({type(error).__name__}: {reason}); "
            f"check the name, `hf auth login` and the network; {folder} is whole, push it again "
            f"with `hf upload {repository} {folder}`"
        ) from error
    return str(commit.commit_url)
