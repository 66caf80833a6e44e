"""lm-eval's Hugging Face model under a head mask, so that any of its tasks can be scored with one."""

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import truncate_tokens
from omegaconf import OmegaConf
from torch import Tensor

from duo_id.attention.choices import KV_FORMATS
from duo_id.common.config import conf_dir, parse
from duo_id.common.errors import UserError, check
from duo_id.common.foreign import describe_model, describe_weights, model_of
from duo_id.deploy.install import dual_cache, install
from duo_id.deploy.prefill import logits_in_groups
from duo_id.models.loading import load_model
from duo_id.models.quantised import weights_of
from duo_id.models.settings import ModelSettings
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.tables import as_float

log = logging.getLogger(__name__)
NAME = "duo_id"  # of the class in lm-eval
DTYPES = get_args(ModelSettings.__annotations__["dtype"])
Request = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation) as text, and the tokens of each


class DuoLM(HFLM):
    """lm-eval's HFLM with every forward pass under a head mask.

    For log-likelihoods as for generation, whole requests are read under the mask. lm-eval pads log-likelihood requests
    on the right, where padding does not affect the tokens before it, and prompts to generate from on the left, with an
    attention mask; the sink starts after the padding.

    A request that is read at once sees no codes. So where retrieval heads keep codes, those of log-likelihoods are read
    in groups of tokens, each of which then sees what a decode step in its place would see.
    """

    def __init__(
        self,
        heads: str | None = None,
        sparsity: float = 0.5,
        model: str | None = None,
        pretrained: str | None = None,
        dtype: str = "auto",
        weights: str | None = None,
        kv: str = "exact",
        device: str | None = None,
        truncation_side: str = "left",
        **options: Any,
    ) -> None:
        """Load the model and install the mask.

        Args:
            heads: a run folder, its heads/ folder or a shipped name.
            sparsity: fraction of KV heads that stream; 0 is full attention.
            model: a name in conf/model/, loaded as in the other commands. By default the pattern's own model.
            pretrained: instead of `model`, a hub id or local folder that HFLM loads with all its options.
            dtype: of the weights; auto: with `model` float32 on the CPU, else bfloat16, with `pretrained` as stored.
            weights: int8 or int4, of a `model` whose linear layers are quantised when it is loaded; by default as those
                were that the pattern was found on.
            kv: what retrieval heads keep: exact, int8, k8v4 or int4; see `DualCache`.
            device: by default cuda if it is available.
            truncation_side: what is cut from a prompt that is too long for the model. left: its beginning, as in HFLM;
                middle: its middle, as LongBench's authors do (Bai et al. 2023, arXiv 2308.14508, section 4.1).
            options: HFLM's own, such as batch_size and max_length; those for loading require `pretrained`.

        Raises:
            UserError: the arguments do not fit each other, the pattern or the model.
        """
        if heads is None:
            raise UserError("--model_args heads=... is missing: a run folder or a shipped name")
        if model is not None and pretrained is not None:
            raise UserError(f"--model_args model={model},pretrained={pretrained}: give one of them")
        pattern = load_pattern(heads)
        fraction = math.nan if isinstance(sparsity, bool) else as_float(sparsity)
        if math.isnan(fraction):
            raise UserError(f"--model_args sparsity={sparsity} is not a number")
        mask = pattern.binarize(sparsity=fraction)
        _check_options(options, pretrained)
        argument = f"--model_args truncation_side={truncation_side}"
        check(truncation_side in ("left", "middle"), f"{argument}: choose left or middle")
        both = truncation_side != "left" and options.get("truncation")
        check(not both, f"{argument},truncation=True: give one of them")
        self.truncation_side = truncation_side
        check(kv in KV_FORMATS, f"--model_args kv={kv}: choose {', '.join(KV_FORMATS)}")
        if dtype not in DTYPES and pretrained is None:
            raise UserError(f"--model_args dtype={dtype}: choose {', '.join(DTYPES)}")
        if device is None or (str(device).startswith("cuda") and not torch.cuda.is_available()):  # as HFLM does
            device = "cuda" if torch.cuda.is_available() else "cpu"
        check(
            weights is None or pretrained is None,
            f"--model_args pretrained={pretrained},weights={weights}: only model=NAME is quantised when it is loaded",
        )
        if pretrained is None:
            loaded = load_model(_settings(model, pattern, dtype, weights), device)
            super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, **options)
        else:
            try:
                super().__init__(pretrained=pretrained, dtype=dtype, device=device, **options)
            except (OSError, ValueError, TypeError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"--model_args pretrained={pretrained}: lm-eval cannot load it: {reason}") from error
        if line := describe_weights(pattern.provenance, weights_of(self.model), "the heads"):
            print(line)
        install(self.model, mask, kv=kv)
        self.kv = kv
        sizes = {"sink_size": mask.sink_size, "recent_size": mask.recent_size}
        self.mask_info: dict[str, Any] = {"heads": heads, "sparsity": mask.sparsity, **sizes}
        self.mask_info |= {"kv": kv, "truncation_side": truncation_side}

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> "DuoLM":
        """The model for `--model_args`; an argument that was also given as an option of lm-eval is refused."""
        for key, value in arg_dict.items():
            if (additional_config or {}).get(key) is not None:
                raise UserError(f"--model_args {key}={value}: give --{key} instead")
        return super().create_from_arg_obj(arg_dict, additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval records about the model, and the mask."""
        return super().get_model_info() | self.mask_info

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask of prompts to generate from, (prompts, tokens); see HFLM for the arguments."""
        if self.truncation_side == "left" or left_truncate_len is None:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        prompts = [self._without_middle(self.tok_encode(text), left_truncate_len) for text in strings]
        batch = self.tokenizer.pad({"input_ids": prompts}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.kv == "exact":
            return super()._model_call(inps, *args, **options)
        device, dtype = self.device.type, self.mixed_precision_dtype
        with torch.autocast(device, dtype, enabled=dtype is not None):
            return torch.cat(list(logits_in_groups(self.model, inps, dual_cache(self.model))), 1)

    def _loglikelihood_tokens(self, requests: list[Request], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        if self.truncation_side == "middle":
            limit = self.max_length + 1  # the last token is predicted, not read
            requests = [
                (text, self._without_middle(context, limit - len(continuation)), continuation)
                for text, context, continuation in requests
            ]
        return super()._loglikelihood_tokens(requests, *args, **options)

    @staticmethod
    def _without_middle(tokens: list[int], limit: int) -> list[int]:
        """The two ends of a prompt of more than `limit` tokens, else all of it."""
        if len(tokens) <= limit:
            return tokens
        log.warning("the middle of a prompt of %d tokens is cut: the model takes %d", len(tokens), limit)
        return truncate_tokens(tokens, limit, side="middle")


def register() -> None:
    """Register `DuoLM` with lm-eval; may be called repeatedly."""
    model_registry.register(NAME, target=DuoLM)


def _check_options(options: Mapping[str, Any], pretrained: str | None) -> None:
    """Refuse options that HFLM fails on, and options for loading, which it ignores without `pretrained`."""
    precision = options.get("mixed_precision_dtype")
    if isinstance(precision, str) and not isinstance(getattr(torch, precision, None), torch.dtype):
        raise UserError(f"--model_args mixed_precision_dtype={precision}: choose bfloat16 or float16")
    max_length = options.get("max_length")
    if max_length is not None and (not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1):
        raise UserError(f"--model_args max_length={max_length} must be a whole number of tokens, at least 1")
    if pretrained is not None:
        return
    accepted, loading = (inspect.signature(call).parameters for call in (HFLM.__init__, HFLM._create_model))
    for name, value in options.items():
        # lm-eval passes its --trust_remote_code, which is for data sets too, to every model.
        ignored = name != "trust_remote_code" and (name in loading or name not in accepted)
        if ignored and value != getattr(accepted.get(name), "default", None):
            raise UserError(f"--model_args {name}={value} is about loading a model with HFLM: add pretrained=MODEL")


def _settings(model: str | None, pattern: HeadPattern, dtype: str, weights: str | None = None) -> ModelSettings:
    """The settings of a model in conf/model/, or of the model that the pattern was found on."""
    folder = conf_dir() / "model"
    if model is None:
        values: Any = model_of(pattern.provenance, "--model_args heads")
        if values is None:
            raise UserError("the pattern does not say how to load its model: add --model_args pretrained=MODEL")
        print(describe_model(pattern.provenance, "--model_args heads", "model=NAME"))
    elif (file := folder / f"{model}.yaml").is_file() and model != "hub":
        values = OmegaConf.to_container(OmegaConf.load(file))
    else:
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "hub"))
        raise UserError(f"--model_args model={model}: choose among {names}, or give pretrained=HUB_ID_OR_FOLDER")
    overrides = ({} if dtype == "auto" else {"dtype": dtype}) | ({} if weights is None else {"weights": weights})
    return parse(ModelSettings, OmegaConf.create({**values, **overrides}))
