"""The hub: what it knows of licenses, and the commit that a push is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from alignment.errors import UserError
from alignment.publishing.contents import CARD, RECIPE, Upload, may_go

log = logging.getLogger(__name__)

_TIMEOUT = 5  # seconds
_BEGUN = {".gitattributes", CARD}
"""What the hub itself may have put into an empty repository."""


def check_name(repo: str) -> None:
    """Refuse a name that the hub does not take.

    Raises:
        UserError: what is wrong with it.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"'{repo}' is no name for the hub: {' '.join(str(error).split()).rstrip('.')}.") from None
    if repo.count("/") != 1:
        raise UserError(
            f"'{repo}' is no name for the hub: give your name or that of a group before it, as in me/{repo}."
        )


def license_of(name: str, kind: str) -> str | None:
    """The license that the page of a model or a data set states; None where it states none, or cannot be read.

    Args:
        kind: "model" or "dataset".
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        api = HfApi()
        data = (api.model_info if kind == "model" else api.dataset_info)(name, timeout=_TIMEOUT).card_data
    except Exception as error:  # whatever the HTTP library calls a dead network
        log.info("The license of %s is not known: the hub does not tell (%s).", name, type(error).__name__)
        return None
    found = None if data is None else data.get("license")
    return ", ".join(found) if isinstance(found, list) else found


def send(repo: str, uploads: Sequence[Upload], public: bool) -> str:
    """Make the repository if there is none, and send everything as one commit; returns the address of the commit.

    Until the commit nobody sees a file of it. Weights that have arrived stay with the hub, so a push that was cut off
    sends the others alone when it is given again. Files of an earlier push that this one has no more are removed.

    Raises:
        UserError: the hub refuses, cannot be reached, or has another repository under the name.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be sent: unset it.")
    if get_token() is None:
        raise UserError("You are not logged in to the hub: hf auth login, with a token that may write.")
    api = HfApi(library_name="alignment")
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        found = api.model_info(repo)
        there = {file.rfilename for file in found.siblings or []}
        _require_ours(repo, there, found.private, public)
        gone = [name for name in sorted(there - {upload.name for upload in uploads}) if may_go(name)]
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(upload.name, upload.content) for upload in uploads),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message="Push a run of alignment",
        )
    except UserError:
        raise
    except Exception as error:
        if (sentence := _sentence(repo, error)) is None:
            raise
        raise UserError(sentence) from error
    return str(done.commit_url)


def _require_ours(repo: str, there: set[str], is_private: bool | None, public: bool) -> None:
    """Refuse to write over what is no push, and to publish by way of a repository that is public already."""
    if there - _BEGUN and RECIPE not in there:
        raise UserError(f"{repo} holds something else that a push would write over: choose another name.")
    if not is_private and not public:
        raise UserError(f"{repo} is public, so everybody would see the run: add --public if you mean that.")


def _sentence(repo: str, error: BaseException) -> str | None:
    """What an error of the hub, or on the way to it, means; None for any other error."""
    chain: list[Any] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    again = "; what has arrived stays there, so give the same command again"
    response = next((found for e in chain if (found := getattr(e, "response", None)) is not None), None)
    status = getattr(response, "status_code", None)
    if status == 401 or any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return f"The hub does not take your token for {repo}: hf auth login, with a token that may write there."
    if status == 403:
        return f"Your token may not write to {repo}: choose a name of your own, or a token that may write there."
    if status == 409:
        return f"{repo} has changed, or is being made, at the same time: give the same command again."
    if status == 429:
        return f"The hub asks you to wait (status 429){again} in some minutes."
    if status is not None and status >= 500:
        return f"The hub has failed (status {status}){again} later."
    if status is not None and status >= 400:
        return f"The hub refuses {repo} (status {status}): {_said(chain)}."
    if any("README.md" in str(e) and isinstance(e, ValueError) for e in chain):
        return f"The hub does not take the card's metadata: {_said(chain)}."
    if any(isinstance(e, OSError) or type(e).__module__.split(".")[0] in ("httpx", "httpx2", "hf_xet") for e in chain):
        return f"The hub cannot be reached, or the connection was cut ({type(chain[-1]).__name__}){again}."
    return None


def _said(chain: Sequence[BaseException]) -> str:
    return " ".join(str(chain[0]).split()).rstrip(".")[:300]
