"""A frozen base in few bits: its linear layers keep their weights as int8 or as NF4.

``int8`` divides each row of a weight by its largest magnitude over 127 and rounds. ``nf4`` divides blocks of 64 weights
by their largest magnitude and takes the nearest of sixteen values, the quantiles of a normal distribution; its codes
are bitsandbytes'. Activations are never rounded. A layer makes its weight again in the forward and again in the
backward, so that at any time the weight of one layer at most exists in full.

What runs is our own layer and not ``Linear4bit`` or ``Linear8bitLt``: on CPUs with AVX512-BF16 the former computes in
bfloat16 once it was evaluated, and from then on without a gradient (bitsandbytes 0.50); the latter rounds activations.

Source:
    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314 (NF4).
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.models.lm import LanguageModel
from rwkv_train.ops.registration import without_autocast

Kind = Literal["int8", "nf4"]

NF4_BLOCK = 64
"""Weights of one row that share a scale."""

_LIBRARY = torch.library.Library("rwkv_train", "FRAGMENT")  # type: ignore[no-untyped-call]


class QuantizedSummary(NamedTuple):
    """What was quantized."""

    kind: Kind
    n_layers: int
    """Linear layers."""
    n_weights: int
    """Numbers in their weights."""
    n_bytes: int
    """Bytes that codes and scales take; the same weights in float32 take ``4 * n_weights``."""


class QuantizedLinear(nn.Linear):
    """A linear layer without bias whose weight never learns and exists in full only while it is used.

    It has no parameters, and its buffers are in no state dict: they are made from the weights of the base.
    ``weight`` is ``None``; where ``qweight`` lies peft puts an adapter.

    Args:
        weight: ``[out, in]``, finite, of any floating dtype; where it lies the layer lies.
        kind: ``"int8"``, or ``"nf4"``, for which ``in`` must be a multiple of 64.
    """

    qweight: Tensor
    """Codes: int8 ``[out, in]``; or uint8 ``[out, in / 2]``, two in a byte, the first in its upper half."""
    scales: Tensor
    """Float32, ``[out, 1]``; or ``[out, in / 64]``."""

    def __init__(self, weight: Tensor, kind: Kind) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = None  # type: ignore[assignment]
        self.kind = kind
        codes, scales = _FORMATS[kind].quantize(weight.detach().float())
        self.register_buffer("qweight", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``, ``[..., out]`` in the dtype of ``x`` ``[..., in]``, or in that of autocast."""
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device_type))
        y: Tensor = torch.ops.rwkv_train.quantized_linear(x, self.qweight, self.scales, self.kind, False)
        return y

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the layer stands for, ``[out, in]``."""
        return _FORMATS[self.kind].dequantize(self.qweight, self.scales, dtype)

    def extra_repr(self) -> str:
        """Return what the layer's text shows."""
        return f"{super().extra_repr()}, kind={self.kind!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != torch.float32:  # the model was cast; its codes still mean what they meant
            self.scales = scales.to(self.scales.device)
        return self


def require_bitsandbytes() -> None:
    """Refuse at once where the library that NF4 needs is not installed.

    Raises:
        ConfigError: it is not; with the command that installs it.
    """
    # It misses, loudly, a kernel for inference that we do not call.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401, PLC0415 - an extra, wanted only here
    except ImportError as error:
        raise ConfigError(
            "finetune.quantize 'nf4' needs bitsandbytes: pip install 'rwkv-train[quantize]'"
        ) from error


def quantize_linears(model: LanguageModel, kind: Kind, device: torch.device | str) -> QuantizedSummary:
    """Replace the linear layers of a model's blocks by quantized ones, one at a time.

    Embedding, head, norms and the small matrices that are parameters of their own stay as they are. Call it when the
    weights are loaded and before an adapter is put in. The same weights give the same codes on the same device.

    Args:
        model: the model; changed in place.
        kind: what the weights are kept in.
        device: where they are quantized and stay; the rest of the model does not move.

    Raises:
        ConfigError: bitsandbytes is missing, or a layer has sizes that NF4 cannot keep.
        CheckpointError: a weight is not finite.
    """
    return _replace(model, kind, device, lambda _, layer: layer.weight)


def load_quantized(
    model: LanguageModel, tensors: Mapping[str, Tensor], kind: Kind, device: torch.device | str
) -> QuantizedSummary:
    """Give a model its weights, of which the linear layers' are quantized as they are read.

    So a base is loaded that would not fit into memory in full.

    Args:
        model: built with ``device="meta"``; changed in place.
        tensors: official name -> tensor, those of :class:`rwkv_train.checkpoints.weights.Weights`.
        kind: what the weights of linear layers are kept in.
        device: where the model comes to lie; what is not quantized is float32.

    Raises:
        ConfigError, CheckpointError: as in :func:`quantize_linears`.
    """
    summary = _replace(model, kind, device, lambda name, _: tensors[f"{name}.weight"])
    # Copies: memory of the usual alignment, which stays if the file is overwritten.
    rest = {name: tensors[name].to(device, torch.float32, copy=True) for name in model.state_dict()}
    model.load_state_dict(rest, assign=True)
    return summary


def _replace(
    model: LanguageModel,
    kind: Kind,
    device: torch.device | str,
    weight_of: Callable[[str, nn.Linear], Tensor],
) -> QuantizedSummary:
    if kind == "nf4":
        require_bitsandbytes()
    linears = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.startswith("blocks.")
    }
    if any(type(part) is not nn.Linear for part in linears.values()):
        raise ValueError("the model is quantized already")
    if kind == "nf4":
        for name, layer in linears.items():  # before any is changed
            if layer.in_features % NF4_BLOCK:
                raise ConfigError(
                    f"finetune.quantize 'nf4' needs layers with a multiple of {NF4_BLOCK} inputs, {name} has "
                    f"{layer.in_features}; set it to 'int8' or 'none'"
                )
    n_weights = n_bytes = 0
    for name, layer in linears.items():
        weight = weight_of(name, layer).detach().to(device)
        if not weight.is_meta and not weight.isfinite().all():
            raise CheckpointError(f"{name}.weight holds infinities or NaN, which cannot be quantized")
        quantized = QuantizedLinear(weight, kind).train(layer.training)
        n_weights += weight.numel()
        n_bytes += quantized.qweight.nbytes + quantized.scales.nbytes
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized)
        del weight, layer  # the full weight, before there is the next
        linears[name] = quantized
    return QuantizedSummary(kind, len(linears), n_weights, n_bytes)


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    scales = torch.where(scales > 0, scales, 1.0)  # a row of zeros
    return (weight / scales).round_().to(torch.int8), scales


def _dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.float().mul_(scales).to(dtype)


def _quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit  # noqa: PLC0415

    codes, state = quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return codes.view(weight.shape[0], -1), state.absmax.view(weight.shape[0], -1)


def _dequantize_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit  # noqa: PLC0415

    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    made_in = torch.float32 if dtype == torch.float64 else dtype
    state = QuantState(  # type: ignore[no-untyped-call]
        scales.flatten(), shape=shape, dtype=made_in, blocksize=NF4_BLOCK, quant_type="nf4"
    )
    weight: Tensor = dequantize_4bit(codes.view(-1, 1), state)
    return weight.to(dtype)


class _Format(NamedTuple):
    """How weights are kept."""

    weights_per_code: int
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Float32 weight -> codes, scales."""
    dequantize: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    """Codes, scales, dtype -> weight."""


_FORMATS: Mapping[str, _Format] = {
    "int8": _Format(1, _quantize_int8, _dequantize_int8),
    "nf4": _Format(2, _quantize_nf4, _dequantize_nf4),
}


def _product(x: Tensor, codes: Tensor, scales: Tensor, kind: str, transposed: bool) -> Tensor:
    """``x @ weight.T``, or ``x @ weight`` where ``transposed``: each is the other's gradient."""
    weight = _FORMATS[kind].dequantize(codes, scales, x.dtype)
    return torch.matmul(x, weight if transposed else weight.T)


def _product_shape(x: Tensor, codes: Tensor, scales: Tensor, kind: str, transposed: bool) -> Tensor:
    out_features, n_codes = codes.shape
    width = n_codes * _FORMATS[kind].weights_per_code if transposed else out_features
    return x.new_empty(*x.shape[:-1], width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, codes, scales, ctx.kind, ctx.transposed = inputs
    ctx.save_for_backward(codes, scales)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales = ctx.saved_tensors
    d_x = torch.ops.rwkv_train.quantized_linear(dy, codes, scales, ctx.kind, not ctx.transposed)
    return d_x, None, None, None, None


def _register() -> None:
    # An operator, which compilation never looks into: it would keep the weight of the forward for the backward.
    schema = "quantized_linear(Tensor x, Tensor codes, Tensor scales, str kind, bool transposed) -> Tensor"
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl("quantized_linear", without_autocast(_product), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    name = "rwkv_train::quantized_linear"
    torch.library.register_fake(name, _product_shape, lib=_LIBRARY)
    torch.library.register_autograd(name, _differentiate, setup_context=_save, lib=_LIBRARY)


_register()
