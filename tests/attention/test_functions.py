"""What heads do inside whole models, against the untouched model and a brute-force dense mask."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from duo_id.attention import functions
from duo_id.attention.blends import BLENDS
from duo_id.attention.functions import Backends, gated_heads, masked_layers, recording_heads
from duo_id.attention.interface import attached, bound
from duo_id.attention.layers import AttentionLayer
from duo_id.attention.window import Window
from duo_id.patterns.pattern import HeadMask
from duo_id.patterns.spans import HeadSpans
from tests.attention.conftest import TOKENS
from tests.support.tiny import FAMILIES

WINDOW = Window(3, 8)
MakeModel = Callable[..., PreTrainedModel]


def gates(layers: list[AttentionLayer], alpha: Tensor, blend: str = "student", teacher: dict | None = None) -> dict:
    teacher = teacher or {}
    return {
        layer.index: gated_heads(row, WINDOW, BLENDS[blend], Backends(), teacher.get(layer.index))
        for layer, row in zip(layers, alpha, strict=True)
    }


def dense_reference(model: PreTrainedModel, ids: Tensor, retrieval: Tensor, spans: Tensor | None = None) -> Tensor:
    """Logits under a hard mask, by a dense attention that shares no code with the package.

    Streaming heads see the window's recent tokens, or as many as `spans` (layers, KV heads) says. Each sample is run on
    its own real tokens, so no padding is involved.
    """
    recent = torch.full(retrieval.shape, WINDOW.recent_size) if spans is None else spans

    def attend(module, query, key, value, attention_mask, scaling=None, **unused):
        group, tokens = query.shape[1] // key.shape[1], query.shape[2]
        i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
        near = (j < WINDOW.sink_size) | (i - j < recent[module.layer_idx].repeat_interleave(group)[:, None, None])
        rows = retrieval[module.layer_idx].repeat_interleave(group)[:, None, None]
        seen = (j <= i) & (near | rows)
        scores = query @ key.repeat_interleave(group, 1).mT * scaling
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(group, 1)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("dense_reference", attend)
    AttentionMaskInterface.register("dense_reference", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("dense_reference")
    try:
        return model(ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_one_is_the_untouched_model(family: str, make_model: MakeModel, ids: Tensor) -> None:
    model = make_model(family)
    expected = model(ids, use_cache=False).logits
    with attached(model) as layers:
        assert [layer.index for layer in layers] == [0, 1, 2]
        with bound(layers, gates(layers, torch.ones(3, layers[0].kv_heads))):
            assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_gates_and_hard_masks_equal_a_dense_mask(family: str, make_model: MakeModel, ids: Tensor) -> None:
    model = make_model(family)
    with attached(model) as layers:
        shape = (3, layers[0].kv_heads)
        retrieval = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
        expected = dense_reference(model, ids, retrieval)
        with bound(layers, gates(layers, retrieval.float())):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=2e-5, rtol=1e-4)
        mask = HeadMask(retrieval, WINDOW.sink_size, WINDOW.recent_size)
        with bound(layers, masked_layers(layers, mask, Backends())):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=2e-5, rtol=1e-4)
        flipped = dense_reference(model, ids, ~retrieval)
    assert (flipped - expected).abs().max() > 1e-2, "the reference does not tell masks apart"


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_equal_a_dense_mask(family: str, make_model: MakeModel, ids: Tensor) -> None:
    model = make_model(family)
    with attached(model) as layers:
        choices = torch.tensor([-1, 1, 2, 8, 20, 66, 67, 500])  # the last two leave no gap
        drawn = torch.randint(8, (3, layers[0].kv_heads), generator=torch.Generator().manual_seed(5))
        spans = choices[drawn]
        expected = dense_reference(model, ids, spans < 0, spans)
        with bound(layers, masked_layers(layers, HeadSpans(spans, WINDOW.sink_size), Backends())):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_exact(alpha: float, make_model: MakeModel, ids: Tensor) -> None:
    model = make_model("llama")
    with attached(model) as layers:
        retrieval = torch.full((3, 2), bool(alpha))
        with bound(
            layers, masked_layers(layers, HeadMask(retrieval, WINDOW.sink_size, WINDOW.recent_size), Backends())
        ):
            expected = model(ids, use_cache=False).logits
        with bound(layers, gates(layers, retrieval.float())):
            assert torch.equal(model(ids, use_cache=False).logits, expected)


# LayerNorm models: RMSNorm computes in float32 even in a float64 model, which differences cannot look through.
@pytest.mark.parametrize("family", ["stablelm", "gpt_neox"])
@pytest.mark.parametrize("blend", BLENDS)
def test_gate_gradients_equal_finite_differences(family: str, blend: str, make_model: MakeModel, ids: Tensor) -> None:
    model = make_model(family).double()
    weights = torch.randn(2, TOKENS, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with attached(model) as layers:
        recorded: dict[int, Tensor] = {}
        with bound(layers, {layer.index: recording_heads(recorded, layer.index, Backends()) for layer in layers}):
            model(ids, use_cache=False)

        def loss(alpha: Tensor) -> Tensor:
            with bound(layers, gates(layers, alpha, blend, recorded)):
                return (model(ids, use_cache=False).logits * weights).sum()

        alpha = torch.linspace(0.2, 0.9, 3 * layers[0].kv_heads, dtype=torch.float64).view(3, -1).requires_grad_()
        (found,) = torch.autograd.grad(loss(alpha), alpha)
        expected = torch.zeros_like(found)
        for index in range(alpha.numel()):
            step = torch.zeros(alpha.numel(), dtype=torch.float64)
            step[index] = 1e-5
            with torch.no_grad():
                difference = loss(alpha + step.view_as(alpha)) - loss(alpha - step.view_as(alpha))
            expected.view(-1)[index] = difference / 2e-5
    if blend == "detached":  # what reaches earlier layers through full attention is left out
        found, expected = found[-1], expected[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_blends_differ_once_lower_layers_stream(make_model: MakeModel, ids: Tensor) -> None:
    model = make_model("llama")
    alpha = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    with attached(model) as layers:
        recorded: dict[int, Tensor] = {}
        with bound(layers, {layer.index: recording_heads(recorded, layer.index, Backends()) for layer in layers}):
            model(ids, use_cache=False)
        with bound(layers, gates(layers, alpha, "student")):
            student = model(ids, use_cache=False).logits
        with bound(layers, gates(layers, alpha, "teacher", recorded)):
            teacher = model(ids, use_cache=False).logits
    assert (student - teacher).abs().max() > 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("streaming", ["blocked", "flex"])
def test_hard_masks_on_a_device_equal_a_dense_mask(
    streaming: str, device: str, make_model: MakeModel, ids: Tensor
) -> None:
    model = make_model("llama")
    retrieval = torch.tensor([[True, False], [False, False], [True, True]])
    expected = dense_reference(model, ids, retrieval)
    model.to(device)
    backends = Backends(streaming=streaming)
    with attached(model, backends) as layers:
        mask = HeadMask(retrieval, WINDOW.sink_size, WINDOW.recent_size)
        with bound(layers, masked_layers(layers, mask, backends)):
            found = model(ids.to(device), use_cache=False).logits.cpu()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize(("dtype", "gate_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("chunk", [1, 400, 2**22])
def test_blends_in_parts_are_blends(
    chunk: int,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    wanted: tuple[bool, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One head at a time, some, the last of them fewer, or all; what is not summed is the same to the bit."""
    monkeypatch.setattr(functions, "BLEND_CHUNK", chunk)
    random = torch.Generator().manual_seed(0)
    shapes = [torch.Size(shape) for shape in ((5, 1, 1), (2, 5, 19, 8), (2, 5, 19, 8))]
    values = [torch.rand(shape, generator=random, dtype=torch.float64) - 0.2 for shape in shapes]
    above = torch.rand(shapes[1], generator=random).to(dtype)
    results = []
    for function in (functions._BlendInParts.apply, functions._blend):
        given = [
            value.to(kind).requires_grad_(wants)
            for value, kind, wants in zip(values, (gate_dtype, dtype, dtype), wanted, strict=True)
        ]
        out = function(*given)
        out.backward(above)
        results.append([out, *(one.grad for one in given)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            summed = 1e-7 * shapes[1].numel() if ours.dim() == 3 else 0  # in another order
            torch.testing.assert_close(ours, theirs, rtol=0, atol=summed)
    with torch.no_grad():
        assert functions._BlendInParts.apply(*given).equal(results[1][0])


def test_blends_hold_no_float32_copy_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "BLEND_CHUNK", 4 * 64 * 8)
    largest = 0

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    gate = torch.rand(32, 1, 1, requires_grad=True)
    full, streaming = (torch.rand(1, 32, 64, 8).bfloat16().requires_grad_() for _ in range(2))
    with Watching():
        functions._BlendInParts.apply(gate, full, streaming).sum().backward()
    assert largest == 4 * 64 * 8
