"""Train one gate for each KV head of a frozen model: teacher pass, gated pass, loss."""

import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from duo_id.attention.blends import BLENDS
from duo_id.attention.functions import masked_layers
from duo_id.attention.interface import bound
from duo_id.common.config import plain, shown
from duo_id.common.errors import UserError, check, printable
from duo_id.common.mistakes import shell_quoted
from duo_id.data.samples import Batch, pad_batch, shared_weights, split_batch, with_scored
from duo_id.methods.gates import GATES
from duo_id.methods.penalties import PENALTIES, TargetSparsity
from duo_id.methods.settings import GateSettings, make_optimizer
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.patterns.pattern import HeadPattern, TieWarning
from duo_id.step.cuda_graphs import graphs_of
from duo_id.step.memory import Plan
from duo_id.step.paper_shape import SHAPES
from duo_id.step.prepare import ApplyPlan
from duo_id.step.settings import StepSettings
from duo_id.train.checkpoints import CHECKPOINT
from duo_id.train.restoring import keep_matching
from duo_id.train.scoring import Score, score

StepBatch = dict[str, Any]  # as `with_scored` returns it
IDENTITY_SETTINGS = (  # of the method: a resumed run must not change them
    "gate",
    "initial",
    "temperature",
    "budgets",
    "blend",
    "objective",
    "tokens",
    "penalty",
    "reg_weight",
    "sink_size",
    "recent_size",
)
MIN_SCORED = 512  # CUDA graphs need fixed numbers of scored tokens: this times a power of two


class GateTraining(lightning.LightningModule):
    """DuoAttention's optimisation-based identification (section 2.2) with its parts chosen by name.

    Only the gates are registered with Lightning; the language model is not, so checkpoints hold none of its weights.
    """

    def __init__(
        self,
        gated_model: GatedModel,
        method: GateSettings,
        step: StepSettings,
        steps: int,
        sparsities: Sequence[float],
        seed: int = 0,
    ) -> None:
        """Create the gates.

        Args:
            gated_model: the frozen model.
            method: settings of the method.
            step: settings of a training step.
            steps: number of optimizer steps, for the learning rate schedule.
            sparsities: fractions of streaming heads at which validation binarises the gates.
            seed: of drawn gates.
        """
        super().__init__()
        check(
            method.gate != "nested" or math.prod(gated_model.shape) > 1,
            "method.gate=nested: the model has a single gated head, so there is nothing to order; use method=duo",
        )
        self.gated_model, self.method, self.step = gated_model, method, step
        self.steps, self.sparsities = steps, sparsities
        objective, blend = method.resolved_objective, BLENDS[method.blend]
        self.distillation = SHAPES[step.shape](gated_model, objective, method.tokens, blend)
        self.gates = GATES[method.gate](*gated_model.shape, method.initial, method.temperature, seed, method.budgets)
        self.penalties = torch.nn.ModuleDict({name: self._penalty(name) for name in method.penalties})
        self.graphs = graphs_of(self.distillation.loss, step.cuda_graphs, gated_model)
        self.apply_plan: ApplyPlan = lambda tokens: None  # sets what layers keep within the memory budget
        self.interrupted = 0  # the signal that ends training
        self._finite = torch.tensor(True)
        self._full_scores: dict[int, Score] = {}
        self._clock = time.perf_counter()

    @property
    def language_model(self) -> LanguageModel:
        """The frozen model; not registered as a submodule."""
        return self.gated_model.model

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The configured optimizer over the gates, with warm-up and decay of the learning rate."""
        optimizer = make_optimizer(self.method, self.gates.parameters())
        for penalty in self.penalties.values():
            if isinstance(penalty, TargetSparsity):  # its multipliers are maximised
                multipliers = {"lr": self.method.multiplier_lr, "weight_decay": 0.0, "maximize": True}
                optimizer.add_param_group({"params": penalty.parameters()} | multipliers)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.steps, self.method.warmup, self.method.floor)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move the language model to the gates' device; sharded weights are there already."""
        if not self.language_model.ranks.sharded:
            self.language_model.model.to(self.device)  # type: ignore[arg-type]  # its wrapper is untyped
        self._finite = self._finite.to(self.device)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> StepBatch:
        """Find the scored tokens while the batch is on the CPU, where that needs no synchronisation."""
        length, local, ranks = batch["input_ids"].shape[1], dict(batch), self.language_model.ranks
        graphed = self.graphs is not None and len(batch["input_ids"]) == 1
        if graphed and self.trainer.training:
            local = dict(pad_batch(batch, self.step.length_multiple, self.language_model.max_length or sys.maxsize))
        if ranks.group is not None:
            local = split_batch(batch, ranks.part, ranks.sequence)
        sample = {key: batch[key][0] for key in ("input_ids", "answers")}
        return with_scored(local, MIN_SCORED if graphed else 0) | {"length": length, "sample": sample}

    def on_after_batch_transfer(self, batch: StepBatch, dataloader_idx: int) -> StepBatch:
        """Weight every scored token of all ranks equally, however many a rank has."""
        return batch | {"weights": shared_weights(batch["weights"], self.language_model.ranks)}

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """Distillation loss plus the penalty on the gates; loss and gradient are averaged over ranks."""
        plan = self.apply_plan(batch["input_ids"].numel())
        alpha, openness = self.gates.alpha(), self.gates.openness()
        distill, penalty = self._distill(alpha, batch, plan), self.penalty(openness)
        loss = distill + self.method.reg_weight * penalty
        ranks = self.language_model.ranks
        means = ranks.mean(torch.stack([loss.detach(), distill.detach()]))
        self._finite &= torch.isfinite(means[0])
        now = time.perf_counter()
        metrics = {
            "loss": means[0],
            "distill": means[1],
            "length": float(batch["length"]),
            "tokens_per_s": batch["length"] * len(batch["input_ids"]) * ranks.data / (now - self._clock),
        }
        if self.method.reg_weight:
            metrics["penalty"] = penalty.detach()
        if self.gates.OPENNESS_IS_SHARE:
            metrics["mean_gate"] = openness.detach().mean()
        self._clock = now
        self.log_dict({f"train/{key}": value for key, value in metrics.items()}, prog_bar=True)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then project the gates."""
        super().optimizer_step(*args, **kwargs)
        self.gates.project_()

    def on_train_batch_end(self, outputs: Any, batch: StepBatch, batch_idx: int) -> None:
        """Check for non-finite values only as often as metrics are logged, since checking waits for the device."""
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set by Lightning
            self._stop_unless_finite()

    def on_train_end(self) -> None:
        """Check once more before the gates are exported."""
        self._stop_unless_finite()

    def teardown(self, stage: str) -> None:
        """Free CUDA graphs now: reference cycles between module and trainer delay garbage collection."""
        if self.graphs is not None:
            self.graphs.release()

    def on_validation_start(self) -> None:
        """Start timing validation, to exclude it from the tokens per second."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self) -> None:
        """Set the clock forward by the duration of validation."""
        self._clock += time.perf_counter() - self._validation_began

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Score a held-out sample under the current gates and under their masks at each sparsity."""
        ranks = self.language_model.ranks
        if self.interrupted and ranks.world == 1:  # other ranks would wait for this one
            return
        sample = batch["sample"]
        if batch_idx not in self._full_scores:
            self._full_scores[batch_idx] = score(self.language_model, sample)
        metrics: dict[str, Tensor | float] = {"distill": ranks.mean(self.distillation.loss(self.gates.alpha(), batch))}
        metrics |= _answer_metrics("0", self._full_scores[batch_idx])
        pattern = self.pattern()
        for sparsity in self.sparsities:
            with warnings.catch_warnings(action="ignore", category=TieWarning):  # early gates tie
                mask = pattern.binarize(sparsity=sparsity)
            layers = self.gated_model.layers
            with bound(layers, masked_layers(layers, mask, self.gated_model.backends)):
                metrics |= _answer_metrics(f"{100 * sparsity:g}", score(self.language_model, sample))
        self.log_dict({f"val/{key}": value for key, value in metrics.items()}, batch_size=1)

    def pattern(self, **provenance: Any) -> HeadPattern:
        """The current gates as a head pattern."""
        return self.gated_model.pattern(self.gates.scores(), **provenance)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the gates' model and settings; refuse to save gates that are not finite."""
        self._stop_unless_finite()
        checkpoint["duo_id"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, of more steps, or of another structure."""
        saved, current = checkpoint.get("duo_id"), self._identity()
        if not isinstance(saved, dict):
            raise UserError("resume: the checkpoint was not written by duo_id")
        differing = [key for key, value in current.items() if saved.get(key, value) != value]
        if differing:
            saved_values, own_values = ({key: values.get(key) for key in differing} for values in (saved, current))
            raise UserError(
                f"resume: the checkpoint was made with {_as_overrides(saved_values)}, this run has "
                f"{_as_overrides(own_values)}; leave out what changed that, or give the former again"
            )
        saved_steps = checkpoint.get("global_step", 0)
        if saved_steps > self.steps:
            raise UserError(
                f"resume: the checkpoint has reached trainer.max_steps={saved_steps}, this run has trainer.max_steps="
                f"{self.steps}: give at least as many"
            )
        if self._trainer is not None:
            keep_matching(checkpoint, self)

    def penalty(self, openness: Tensor) -> Tensor:
        """The weighted sum of the penalties on the gates' openness."""
        progress = self.global_step / self.steps
        weighted = [self.method.penalties[name] * part(openness, progress) for name, part in self.penalties.items()]
        return torch.stack(weighted).sum()

    def _distill(self, alpha: Tensor, batch: StepBatch, plan: Plan | None) -> Tensor:
        """The distillation loss, of one sample by its CUDA graph if there is one."""
        if self.graphs is None or len(batch["input_ids"]) > 1:
            return self.distillation.loss(alpha, batch)
        return self.graphs(alpha, batch, 0 if plan is None else plan.activations + plan.buffers)

    def _penalty(self, name: str) -> torch.nn.Module:
        if name == "target":
            assert self.method.target_sparsity is not None
            return TargetSparsity(self.method.target_sparsity, self.method.target_rise)
        return PENALTIES[name]()

    def _stop_unless_finite(self) -> None:
        if not bool(self._finite & self.gates.weight.isfinite().all()):
            run = Path(self.trainer.default_root_dir)
            advice = (
                f"; {shell_quoted(f'resume={run}')} continues from the last good checkpoint"
                if (run / CHECKPOINT).is_file()
                else ""
            )
            raise UserError(
                f"the loss or a gate is no longer finite at step {self.global_step}: lower "
                f"method.lr={self.method.lr} or compute in model.dtype=float32{advice}"
            )

    def _identity(self) -> dict[str, Any]:
        """The model and the settings that must not change when a run is resumed."""
        rows, columns = self.gates.weight.shape
        dtype = str(self.language_model.model.dtype).removeprefix("torch.")  # auto depends on the device
        model = {"model": self.language_model.id, "model.dtype": dtype, "layers": rows, "kv_heads": columns}
        method = plain(self.method)
        return model | {key: method[key] for key in IDENTITY_SETTINGS}


def learning_rate_factor(step: int, steps: int, warmup: float = 0.2, floor: float = 0.1) -> float:
    """The learning rate's factor at a step: linear warm-up, constant, linear decay.

    Source: DuoAttention's published training code.

    Args:
        step: optimizer step, from 0.
        steps: total number of steps.
        warmup: fraction of the steps of the warm-up, and of the decay.
        floor: lowest factor.
    """
    ramp = max(1, math.floor(steps * warmup))
    return min(1.0, max((step + 1) / ramp, floor), max((steps - step) / ramp, floor))


def _answer_metrics(name: str, result: Score) -> dict[str, float]:
    return {f"answer_loss_{name}": result.answer_loss, f"token_accuracy_{name}": result.token_accuracy}


def _as_overrides(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{'method.' if key in IDENTITY_SETTINGS else ''}{key}={printable(shown(value))}"
        for key, value in values.items()
    )
