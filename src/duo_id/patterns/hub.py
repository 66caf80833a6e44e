"""The model hub (huggingface.co or HF_ENDPOINT): fetching folders of patterns, with one-line errors."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from duo_id.common.errors import UserError, first_line

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def split_revision(source: str) -> tuple[str, str | None] | None:
    """Split `user/repo` or `user/repo@revision` into repo and revision; None if it cannot be the name of a repo."""
    repo, _, revision = source.partition("@")
    return (repo, revision or None) if REPO.fullmatch(repo) else None


def fetch(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """A local folder with the files of a repo; cached files are not fetched again and work offline.

    Args:
        repo: `user/repo`.
        revision: a branch, tag or commit; None: the main branch.
        files: patterns of the files to fetch.

    Raises:
        UserError: repo or revision do not exist or may not be read, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download  # takes half a second, and most patterns are local

    with readable_errors(repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))


@contextmanager
def readable_errors(repo: str, revision: str | None = None, local: bool = True) -> Iterator[None]:
    """Turn errors of the hub's client inside the block into a `UserError` that says what to do.

    Args:
        repo: the requested repo.
        revision: the requested revision.
        local: whether the name could also have been that of a local folder.
    """
    from huggingface_hub import errors

    name = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub's repo {repo} has no such branch, tag or commit") from None
    except errors.GatedRepoError:
        raise UserError(f"{name}: the repo is gated; request access on its page, then log in (hf auth login)") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name} is {'not a local folder, and ' if local else ''}not a repo on the hub that this login can read "
            "(hf auth login, or HF_TOKEN)"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{name} is not the name of a repo: {first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(f"{name}: the hub refuses this login (HTTP {status}): hf auth login, or HF_TOKEN") from None
        raise UserError(f"{name}: the hub returned an error ({first_line(error)})") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        advice = "copy the repo's folder and pass its path" if local else "upload the heads/ folder from elsewhere"
        raise UserError(
            f"{name}{' is not a local folder, and' if local else ':'} the hub cannot be reached "
            f"({first_line(error.__cause__ or error)}): check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or {advice}"
        ) from None
