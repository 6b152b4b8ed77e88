"""What a method makes of a model, on tensors that hold no data."""

from typing import NamedTuple

from rwkv_train.checkpoints.training_state import checkpoint_bytes
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.methods import FreezeMethod, FullMethod, LoraMethod
from rwkv_train.finetuning.adapters import require_peft
from rwkv_train.finetuning.freezing import require_learning
from rwkv_train.finetuning.method import apply_method, keeps_base, own_shapes_of
from rwkv_train.finetuning.quantized import QuantizedLinear, quantize_linears
from rwkv_train.finetuning.targets import find_targets
from rwkv_train.models.lm import LanguageModel
from rwkv_train.models.registry import build_model, count_parameters
from rwkv_train.planning.problems import Problems
from rwkv_train.tokenizers import Tokenizer


class Learning(NamedTuple):
    """What of a model learns."""

    n_parameters: int
    """Of the base."""
    n_trained: int
    """The base's own, or those beside them."""
    n_adapted: int
    """Linear layers that have an adapter; 0 for other methods than "lora"."""
    n_quantized: int
    """Linear layers that are quantized."""
    saved_bytes: int
    """What these take less than in float32."""
    checkpoint_bytes: int
    """Most that a checkpoint takes."""


def apply_to_shapes(
    config: FinetuneConfig, tokenizer: Tokenizer | None, wkv_backend: str, problems: Problems
) -> LanguageModel | None:
    """Return the model that learns, on the device "meta".

    Args:
        config: the settings of the run.
        tokenizer: the model's; ``None``: it cannot be read.
        wkv_backend: backend of the recurrence.
        problems: where it is noted what does not fit.

    Returns:
        ``None`` where something does not fit.
    """
    method = config.finetune
    quantize = "none" if isinstance(method, FullMethod | FreezeMethod) else method.quantize
    model = build_model(config.model, wkv_backend=wkv_backend, device="meta")
    # Each by itself first: the method would end at the first one.
    fits = []
    if quantize != "none":
        fits.append(problems.passes(quantize_linears, model, quantize, "meta"))
    if isinstance(method, LoraMethod):
        fits += [problems.passes(require_peft), problems.passes(find_targets, model, method)]
    if not all(fits):
        return None
    encode = _no_tokens if tokenizer is None else tokenizer.encode
    if not problems.passes(apply_method, model, method, encode, config.trainer.seed):
        return None
    if not problems.passes(require_learning, "finetune.lr_factors", config.lr_factors, model):
        return None
    return model


def describe_learning(config: FinetuneConfig, model: LanguageModel) -> Learning:
    """Count what of a model learns.

    Args:
        config: the settings of the run.
        model: the model with the method applied.
    """
    method = config.finetune
    plain = build_model(config.model, device="meta")
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return Learning(
        n_parameters=count_parameters(config.model),
        n_trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        n_adapted=len(find_targets(plain, method)) if isinstance(method, LoraMethod) else 0,
        n_quantized=len(quantized),
        saved_bytes=sum(
            4 * layer.in_features * layer.out_features - layer.qweight.nbytes - layer.scales.nbytes
            for layer in quantized
        ),
        checkpoint_bytes=checkpoint_bytes(config.model, own_shapes_of(model) if keeps_base(method) else None),
    )


def _no_tokens(text: str) -> list[int]:
    """Stand in for a tokenizer that cannot be read: any token."""
    return [0]
