"""The modules of duo_id.peers, loaded without kvpress: a press of the tests' own stands for all of its presses."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel


@dataclass
class LatestPress:
    """Keeps the latest tokens of a context, as many as the ratio leaves."""

    compression_ratio: Any = 0.0
    on_the_fly_scoring: bool = False

    def kept(self, layer: int, entries: int) -> int:
        """How many of its entries a layer keeps."""
        return int(entries * (1 - self.compression_ratio))

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        def trim(module: object, given: tuple, options: dict[str, Any], output: object) -> None:
            for index, layer in enumerate(options["past_key_values"].layers):
                kept = self.kept(index, layer.keys.shape[2])
                layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]

        hook = model.model.register_forward_hook(trim, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


class StubKvpress(ModuleType):
    """Has every press under the sun."""

    def __getattr__(self, name: str) -> type:
        if name.endswith("Press"):
            return LatestPress
        raise AttributeError(name)


@contextmanager
def loaded_scripts() -> Iterator[SimpleNamespace]:
    """The modules that need kvpress, with `press` for all of its presses."""
    stubs = {name: StubKvpress(name) for name in ("kvpress", "kvpress.presses", "kvpress.presses.base_press")}
    stubs["kvpress.presses"].duo_attention_press = ModuleType("duo_attention_press")
    names = ("answers", "variants", "presses", "reading", "heads", "run")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        for name in names[1:]:
            patch.delitem(sys.modules, f"duo_id.peers.{name}", raising=False)
        loaded = {name: import_module(f"duo_id.peers.{name}") for name in names}
        for name in ("run", "heads"):
            patch.setattr(loaded[name], "version", lambda package: "0")
        yield SimpleNamespace(**loaded, press=LatestPress)
    for name in names[1:]:
        sys.modules.pop(f"duo_id.peers.{name}", None)


def ask(scripts: SimpleNamespace, run: Path, *presses: str, **options: Any) -> int:
    """Run the worker as the command does; returns its exit status."""
    return scripts.run.main(json.dumps({"folder": str(run), "presses": presses, "device": "cpu"} | options))


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules of duo_id.peers, loaded."""
    with loaded_scripts() as loaded:
        yield loaded
