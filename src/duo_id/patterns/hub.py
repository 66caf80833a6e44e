"""The model hub (huggingface.co or HF_ENDPOINT): folders of patterns fetched, and what went wrong in one line."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from duo_id.common.errors import UserError, first_line

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def split_revision(source: str) -> tuple[str, str | None] | None:
    """`user/repo` or `user/repo@revision` as repo and revision; None if this cannot be the name of a repo."""
    repo, _, revision = source.partition("@")
    return (repo, revision or None) if REPO.fullmatch(repo) else None


def fetch(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """A local folder with the files of a repo; what the cache holds is not fetched again, and serves without network.

    Args:
        repo: `user/repo`.
        revision: a branch, tag or commit; None: the main branch.
        files: patterns of the files that are wanted.

    Raises:
        UserError: repo or revision do not exist, may not be read, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download  # half a second, and most patterns are local

    with told(repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))


@contextmanager
def told(repo: str, revision: str | None = None, here: bool = True) -> Iterator[None]:
    """What the hub's client raises within the block becomes a `UserError` that says what to do.

    Args:
        repo: that was asked for.
        revision: likewise.
        here: whether the name could have been a folder's.
    """
    from huggingface_hub import errors

    place = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.RevisionNotFoundError:
        raise UserError(f"{place}: the hub's repo {repo} has no such branch, tag or commit") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{place}: access is granted on the repo's page; ask there, then log in (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{place} is {'no folder here and ' if here else ''}no repo on the hub that this login may use "
            "(hf auth login, or HF_TOKEN)"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{place} is no name of a repo: {first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{place}: the hub refuses this login (HTTP {status}): hf auth login, or HF_TOKEN"
            ) from None
        raise UserError(f"{place}: the hub answers with an error ({first_line(error)})") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        advice = "copy the repo's folder here and give its path" if here else "upload the folder heads/ from elsewhere"
        raise UserError(
            f"{place}{' is no folder here, and' if here else ':'} the hub cannot be reached "
            f"({first_line(error.__cause__ or error)}): check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or {advice}"
        ) from None
