"""Many masks in one forward against each mask by itself."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.functions import Backends, masked_layers
from duo_id.attention.interface import bound, bound_functions
from duo_id.common.errors import UserError
from duo_id.data.samples import batch_of_one
from duo_id.methods.candidates import MaskLosses, prefix_tree
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.pattern import HeadMask
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import OBJECTIVES, Objective, make_objective
from tests.methods.conftest import WINDOW, gated_model_of
from tests.step.test_distillation import HYBRID, with_logits
from tests.support import families
from tests.support.dense import dense_attention, plain_outputs, slow_objective
from tests.support.planted import random_sample
from tests.support.tiny import FAMILIES, compute_all_logits, hooks_of

MakeModel = Callable[..., PreTrainedModel]
MODELS: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES} | {"gemma3_text": HYBRID}
SAMPLES = [random_sample(40, 1, 5), random_sample(31, 2, 3)]


def drawn(count: int, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Random masks, some of which agree on their first layers and some of which are equal."""
    masks = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks[1:4, 0] = masks[0, 0]
    masks[2, :-1] = masks[1, :-1]
    masks[-1] = masks[0]
    masks[-2], masks[-3] = True, False
    return masks


def one_by_one(gated_model: GatedModel, masks: Tensor, objective: Objective, tokens: str = "labelled") -> Tensor:
    """The mean loss over the samples, from the package's forward under one mask at a time."""
    distillation, losses = Distillation(gated_model, objective, tokens), []
    gated = [layer.index for layer in gated_model.layers]
    batches = [batch_of_one(sample, gated_model.device) for sample in SAMPLES]
    teachers = [distillation.teacher(batch) for batch in batches]
    for mask in masks:
        retrieval = torch.ones(gated_model.model.num_layers, gated_model.shape[1], dtype=torch.bool)
        retrieval[gated] = mask
        functions = masked_layers(
            gated_model.layers, HeadMask(retrieval, WINDOW.sink_size, WINDOW.recent_size, tuple(gated)), Backends()
        )
        total = torch.zeros(())
        for batch, teacher in zip(batches, teachers, strict=True):
            with torch.no_grad(), bound(gated_model.layers, functions):
                student = distillation.outputs(batch)
            student, full = (with_logits(distillation, part) for part in (student, teacher.outputs or student))
            total = total + (objective(student, full) * teacher.weights).sum()
        losses.append(total / len(SAMPLES))
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("family", "objective"), [(f, o) for f in MODELS for o in OBJECTIVES if f in ("llama", "gemma3_text") or o == "kl"]
)
def test_losses_equal_each_mask_alone(family: str, objective: str, make_model: MakeModel) -> None:
    """Every objective with layers that are alike and with those that are not; every family with its logits."""
    with gated_model_of(make_model(family, **MODELS[family])) as gated_model:
        masks = drawn(12, gated_model.shape)
        expected = one_by_one(gated_model, masks, OBJECTIVES[objective])
        distillation = Distillation(gated_model, OBJECTIVES[objective], "labelled")
        batches = [batch_of_one(sample, gated_model.device) for sample in SAMPLES]
        for batch_tokens in (10_000, 120, 1):  # all at once, three at a time, one at a time
            losses = MaskLosses(distillation, batches, batch_tokens)
            batched = losses(masks)
            torch.testing.assert_close(batched, expected, rtol=1e-4, atol=2e-6)
            assert (batched.dtype, batched.device.type, batched.shape) == (torch.float32, "cpu", (12,))
            assert batched[-1] == batched[0]
    assert expected.max() - expected.min() > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_equal_plain_forwards_with_dense_masks(objective: str, make_model: MakeModel) -> None:
    model = make_model("llama")
    masks, expected = drawn(7, (3, 2)), torch.zeros(7)
    for number, mask in enumerate(masks):
        for sample in SAMPLES:
            with dense_attention(model):
                teacher = plain_outputs(model, sample, [0, 1, 2])
            with dense_attention(model, WINDOW.sink_size, WINDOW.recent_size, dict(enumerate(mask.float()))):
                student = plain_outputs(model, sample, [0, 1, 2])
            expected[number] += slow_objective(objective, student, teacher).mean() / 2
    with gated_model_of(model) as gated_model:
        batches = [batch_of_one(sample, gated_model.device) for sample in SAMPLES]
        losses = MaskLosses(Distillation(gated_model, OBJECTIVES[objective], "labelled"), batches, 10_000)
        torch.testing.assert_close(losses(masks), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("objective", [{"kl": 0.5, "layer_l2": 2.0}, {"next_token": 1.0}], ids=str)
def test_mixtures_and_far_tokens(objective: dict[str, float], make_model: MakeModel) -> None:
    made = make_objective(objective)
    with gated_model_of(make_model("llama")) as gated_model:
        masks, batches = drawn(6, gated_model.shape), [batch_of_one(sample, gated_model.device) for sample in SAMPLES]
        for tokens in ("labelled", "far"):
            losses = MaskLosses(Distillation(gated_model, made, tokens), batches, 100)
            expected = one_by_one(gated_model, masks, made, tokens)
            torch.testing.assert_close(losses(masks), expected, rtol=1e-4, atol=2e-6)


def test_models_that_always_compute_all_logits(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated_model_of(make_model("llama")) as gated_model:
        masks, batches = drawn(6, gated_model.shape), [batch_of_one(sample, gated_model.device) for sample in SAMPLES]
        losses = MaskLosses(Distillation(gated_model, OBJECTIVES["kl"], "labelled"), batches, 10_000)
        expected = losses(masks)
        compute_all_logits(gated_model.model.model, monkeypatch)
        torch.testing.assert_close(losses(masks), expected)


def test_open_masks_cost_nothing(make_model: MakeModel) -> None:
    with gated_model_of(make_model("llama")) as gated_model:
        losses = MaskLosses(
            Distillation(gated_model, OBJECTIVES["kl"], "labelled"),
            [batch_of_one(SAMPLES[0], gated_model.device)],
            10_000,
        )
        masks = torch.ones(2, 3, 2, dtype=torch.bool)
        masks[1] = False
        open_loss, closed_loss = losses(masks).tolist()
    assert abs(open_loss) < 1e-6
    assert closed_loss > 1e-3


def test_prefixes_are_shared() -> None:
    """Four masks of three layers with one head each, layer by layer: 101, 100, 111, 101 again."""
    masks = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 1, 1], [1, 0, 1]]).bool()[..., None]
    tree = prefix_tree(masks)
    assert [layer.tolist() for layer in tree.masks] == [[[True]], [[False], [True]], [[False], [True], [True]]]
    assert [layer.tolist() for layer in tree.parents] == [[0], [0, 0], [0, 0, 1]]
    assert [layer.tolist() for layer in tree.rows] == [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 2, 1]]
    assert tree.size == 1 + 2 + 3


def test_equal_layers_after_different_ones_are_not_shared() -> None:
    tree = prefix_tree(torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()[..., None])
    assert [len(layer) for layer in tree.masks] == [2, 2, 2]


def test_every_mask_can_be_traced_through_the_tree() -> None:
    masks = drawn(40, (5, 3))
    tree = prefix_tree(masks)
    for number, mask in enumerate(masks):
        for layer in range(5):
            row = int(tree.rows[layer][number])
            assert torch.equal(tree.masks[layer][row], mask[layer])
            parent = int(tree.rows[layer - 1][number]) if layer else 0
            assert int(tree.parents[layer][row]) == parent
        prefixes = [{tuple(other[: layer + 1].flatten().tolist()) for other in masks} for layer in range(5)]
    assert [len(layer) for layer in tree.masks] == [len(prefix) for prefix in prefixes]


def test_forwards_are_counted(make_model: MakeModel) -> None:
    """One row of one layer of three is a third."""
    closing_one = torch.ones(6, 6, dtype=torch.bool)
    closing_one[range(6), range(6)] = False
    masks = closing_one.view(6, 3, 2)  # layer 0: 3 rows; layer 1: those and 2; layer 2: one for each mask
    with gated_model_of(make_model("llama")) as gated_model:
        batches = [batch_of_one(sample, gated_model.device) for sample in SAMPLES]
        losses = MaskLosses(Distillation(gated_model, OBJECTIVES["hidden_l2"], "labelled"), batches, 10_000)
        assert losses.forwards == 0, "the teacher's are not counted"
        losses(masks)
        assert losses.forwards == pytest.approx(2 * (3 + 5 + 6) / 3)
        forwards = losses.forwards
        losses(torch.cat([masks, masks, masks]))
        assert losses.forwards == pytest.approx(2 * forwards), "equal masks are computed once"
        losses(masks[:1])
        assert losses.forwards == pytest.approx(2 * forwards + 2)
        separate = MaskLosses(losses.distillation, batches, 1)
        separate(masks)
        assert separate.forwards == pytest.approx(2 * 6), "one by one, nothing is shared"


def rows_computed(gated_model: GatedModel, run: Callable[[], Any]) -> list[int]:
    """The number of rows that went through each transformer block."""
    rows = [0] * gated_model.model.num_layers
    blocks: Any = gated_model.model.model.base_model.layers

    def counting(index: int) -> Callable[..., None]:
        return lambda module, args, output: rows.__setitem__(index, rows[index] + len(output))

    hooks = [block.mlp.register_forward_hook(counting(index)) for index, block in enumerate(blocks)]
    run()
    for hook in hooks:
        hook.remove()
    return rows


@pytest.mark.parametrize(
    ("family", "changes", "rows"), [("llama", {}, [3, 5, 6]), ("gemma3_text", HYBRID, [3, 3, 4, 4])]
)
def test_the_forward_has_no_more_rows_than_the_tree(
    family: str, changes: dict[str, Any], rows: list[int], make_model: MakeModel
) -> None:
    with gated_model_of(make_model(family, **changes)) as gated_model:
        heads = gated_model.shape[0] * gated_model.shape[1]
        masks = ~torch.eye(heads, dtype=torch.bool).view(heads, *gated_model.shape)
        losses = MaskLosses(
            Distillation(gated_model, OBJECTIVES["kl"], "labelled"),
            [batch_of_one(SAMPLES[0], gated_model.device)],
            10_000,
        )
        assert rows_computed(gated_model, lambda: losses(masks)) == rows


def test_no_forward_exceeds_batch_tokens(make_model: MakeModel) -> None:
    with gated_model_of(make_model("llama")) as gated_model:
        losses = MaskLosses(
            Distillation(gated_model, OBJECTIVES["kl"], "labelled"), [batch_of_one(SAMPLES[0], gated_model.device)], 130
        )
        rows: list[int] = []
        last = gated_model.model.model.base_model.layers[-1]
        hook = last.register_forward_hook(lambda *args: rows.append(len(args[-1])))
        losses(drawn(12, gated_model.shape, seed=4))
        hook.remove()
    assert sum(rows) == len(torch.unique(drawn(12, (3, 2), seed=4).flatten(1), dim=0))
    assert max(rows) == 3


def test_running_out_of_memory_is_a_user_error_and_leaves_nothing_hooked_or_bound(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gated_model_of(make_model("llama")) as gated_model:
        distillation = Distillation(gated_model, OBJECTIVES["layer_l2"], "labelled")
        losses, functions = (
            MaskLosses(distillation, [batch_of_one(SAMPLES[0], gated_model.device)], 200),
            bound_functions(gated_model.layers),
        )
        hooks = hooks_of(gated_model.model.model)

        def fails(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory,\nas it says in many lines")

        hook = gated_model.model.model.model.layers[2].mlp.register_forward_pre_hook(fails)
        with pytest.raises(UserError, match=r"5 candidates of 40 tokens.*method\.batch_tokens=200$") as error:
            losses(drawn(12, gated_model.shape))
        assert "\n" not in str(error.value)
        hook.remove()
        assert bound_functions(gated_model.layers) == functions
        assert hooks_of(gated_model.model.model) == hooks
        losses(drawn(3 + 4, gated_model.shape))
        assert bound_functions(gated_model.layers) == functions


SHARED = ["llama", "qwen3_next"]
UNSPLIT = ["gemma3n_text", "gpt_bigcode", "zaya"]  # residual streams, a view of the input, earlier routing


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family",
    [name if name in SHARED + UNSPLIT else pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES],
)
def test_losses_of_any_family_equal_each_mask_alone(family: str) -> None:
    model = families.runnable_model(family)
    with ExitStack() as stack:
        try:
            gated_model = stack.enter_context(gated_model_of(model))
        except UserError as error:
            pytest.skip(str(error))
        masks = drawn(7, gated_model.shape)
        batches = [batch_of_one(sample, gated_model.device) for sample in SAMPLES]
        losses = MaskLosses(Distillation(gated_model, OBJECTIVES["kl"], "labelled"), batches, 1000)
        expected = one_by_one(gated_model, masks, OBJECTIVES["kl"])
        torch.testing.assert_close(losses(masks), expected, rtol=1e-3, atol=1e-6)
    assert losses.splits == (family not in UNSPLIT)
    assert losses.splits or losses.forwards == len(SAMPLES) * len(masks.unique(dim=0))


def test_a_model_whose_rows_cannot_be_split_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    with gated_model_of(families.runnable_model("gpt_bigcode")) as gated_model:
        batches = [batch_of_one(sample, gated_model.device) for sample in SAMPLES]
        losses = MaskLosses(Distillation(gated_model, OBJECTIVES["kl"], "labelled"), batches, 1000)
        recwarn.clear()
        for _ in range(3):
            losses(drawn(5, gated_model.shape))
    (warning,) = [record for record in recwarn if "one by one" in str(record.message)]
    assert "\n" not in str(warning.message)
