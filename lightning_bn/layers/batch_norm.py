"""Batch normalization layers whose running statistics are an average of the user's choice."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import has_torch_function_unary

from lightning_bn.averaging import Averaging, Batch, Exponential, check_averaging
from lightning_bn.averaging.base import apply_to_statistics
from lightning_bn.buffers import next_step, running_statistics
from lightning_bn.layers.masks import check_mask, masked_batch_norm
from lightning_bn.layers.settlement import (
    LISTENERS,
    SCRATCH,
    SYNCHRONISED,
    ScratchRows,
    advance,
    batch_moments,
    count_like,
    exclusive,
    is_deferred,
    is_finite,
    is_stopped,
    is_synchronised,
    kernel_momentum,
    notify,
    rule_of,
    scratch_of,
    write,
)
from lightning_bn.moments import Moments
from lightning_bn.torch_internals import (
    affine,
    backward_task,
    cudnn_enabled,
    in_backward,
    innermost_transform,
    is_exporting,
    is_tracing,
)


class AveragedBatchNorm(_BatchNorm):
    """What `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` share: torch's layer, with a choice of running statistics.

    ``output = (input - mean) / sqrt(var + eps) * weight + bias``, per channel. In training, and where the layer has no
    running statistics, mean and *biased* variance are the batch's. In eval they are the running statistics, which
    `averaging` makes of the batches' means and *unbiased* variances. Outputs and gradients in training are torch's,
    with every average.

    Args:
        num_features: number of channels C.
        eps: added to the variance, in its units.
        momentum: weight of the new batch, for ``averaging=None``; None makes the average cumulative. Where `averaging`
            is an `Exponential`, this attribute reads and writes that one's momentum.
        affine: whether there are a learned weight and bias per channel.
        track_running_stats: whether there are running statistics at all.
        device: of parameters, buffers and the averaging's state.
        dtype: of parameters and buffers. With an averaging the running statistics are float32 at least, and stay so
            when the model is cast to 16 bits: an average kept in bfloat16 stalls long before it arrives.
        averaging: how batches become running statistics; the layer keeps its own copy. None: torch's rule, by
            `momentum`, and the layer is then bit-identical to torch's.
        skip_nonfinite: whether a batch whose mean or variance is NaN or infinite leaves the running statistics as they
            are. The device decides; the host does not wait for it.

    ``num_batches_tracked`` counts the batches that went into the statistics. They stand still in eval, inside
    `paused_statistics`, for a non-finite batch, and in the recomputation of activation checkpointing.

    Raises:
        TypeError: averaging is not an `Averaging`.
        ValueError: an averaging with ``track_running_stats=False``.

    References:
        Ioffe & Szegedy 2015, "Batch normalization: accelerating deep network training by reducing internal covariate
        shift", algorithms 1 and 2.
    """

    averaging: Averaging | None
    skip_nonfinite: bool
    takes_mask = True
    can_defer = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        averaging: Averaging | None = None,
        skip_nonfinite: bool = True,
        **torch_options: Any,  # `bias=`, which torch's layers take since 2.13
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **torch_options)
        self.skip_nonfinite = skip_nonfinite
        if averaging is not None:
            check_averaging(averaging, f"{type(self).__name__}({num_features}, averaging={averaging!r})")
            if self.running_mean is None:
                raise ValueError(
                    f"{type(self).__name__}({num_features}, track_running_stats=False, averaging={averaging!r}): there "
                    "are no running statistics to average. Leave out track_running_stats=False, or averaging."
                )
        self.adopt(averaging)

    def adopt(self, averaging: Averaging | None) -> None:
        """Keep the running statistics with a fresh copy of `averaging` from now on; None is torch's rule, by
        ``momentum``."""
        self._modules.pop("averaging", None)  # a module assigned None would stay in the repr
        if averaging is not None:
            for buffer in map(self.get_buffer, ("running_mean", "running_var")):
                buffer.data = buffer.data.to(torch.promote_types(buffer.dtype, torch.float32))
        self.averaging = None if averaging is None else averaging.for_layer(self.get_buffer("running_mean"))
        # An exponential averaging's, for whoever reads the instance's __dict__, as torch's repr does.
        self.momentum = self.momentum

    # The value lives in __dict__, where torch's repr, pickle and a change of class find it. The property reads a second
    # copy: torch.compile before 2.12 takes __dict__["momentum"] for the property itself, and does not come to an end.
    @property
    def momentum(self) -> float | None:
        """Weight of the new batch, None for a cumulative average: the exponential averaging's own where the layer has
        one."""
        averaging = self.__dict__.get("_modules", {}).get("averaging")
        if isinstance(averaging, Exponential):
            return averaging.momentum
        momentum: float | None = self.__dict__["_momentum" if "_momentum" in self.__dict__ else "momentum"]
        return momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self.__dict__["momentum"] = self.__dict__["_momentum"] = value
        averaging = self.__dict__.get("_modules", {}).get("averaging")
        if isinstance(averaging, Exponential):
            averaging.momentum = value

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise `input`, and while training let the averaging take the batch's moments.

        Args:
            input: (N, C, *spatial).
            mask: boolean (N, *spatial), True where a position is valid. Statistics are those of the valid positions
                alone, and the others come out as zero. A masked batch with fewer than two valid positions leaves the
                statistics as they are.

        Returns:
            Shape and dtype of `input`.

        Raises:
            ValueError: wrong number of dimensions; one value per channel in training; a mask of another shape.
            TypeError: a mask that is not boolean.
        """
        if mask is None and not is_dynamo_compiling():
            # The straight way, which costs less than torch's: nothing is new since the last forward, so that the rows
            # are there and everything has been checked. Whatever this misses is what the rest of the method is for.
            attributes = self.__dict__
            scratch: ScratchRows | None = attributes.get(SCRATCH)
            if (
                scratch is not None
                and (updates := scratch.updates).round not in (0, scratch.round)
                and input.shape == scratch.shape
                and attributes["training"]
                and attributes["track_running_stats"]
                and attributes["momentum"] is scratch.layer_momentum
                and (scratch.momentum is None or LISTENERS not in attributes)
                and updates.thread == get_ident()
                and backward_task() == -1
                and innermost_transform() is None
                and not has_torch_function_unary(input)
            ):
                (weight, bias), mean, is_running = affine(self), scratch.mean, False
                try:
                    updates.frame.clear()
                except RuntimeError:  # as `OutermostForward.is_running` has it
                    is_running = True
                if (
                    is_running
                    and (weight is None or weight.dtype is mean.dtype)
                    and (bias is None or bias.dtype is mean.dtype)
                ):
                    momentum = 1.0 if scratch.momentum is None else scratch.momentum
                    output = torch.batch_norm(
                        input, weight, bias, mean, scratch.var, True, momentum, self.eps, cudnn_enabled()
                    )
                    scratch.round = updates.round
                    return output
        if not isinstance(self, AveragedBatchNorm):
            # A bound method that somebody took, as accelerate's hooks do, before `to_torch` changed the class.
            return type(self).forward(self, input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if mask is not None:
            check_mask(input, mask)
        elif not is_compiling() and self._tracks() and (scratch := scratch_of(self)) is not None:
            return self._forward_deferred(input, scratch)
        batch_statistics = self.training or self._buffers["running_mean"] is None
        if batch_statistics:
            self._check_values(input)
        if mask is not None:
            return self._masked_forward(input, mask, batch_statistics)
        if not batch_statistics:
            return self._normalise_with_running(input)
        if not self._tracks():
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return self._training_forward(input)

    def _check_values(self, input: Tensor) -> None:
        if input.numel() == input.shape[1] and not is_synchronised(self):
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {input.shape}. "
                f"{type(self).__name__} can't take a variance from one value: call it with a batch of at least 2 "
                "(DataLoader(..., drop_last=True) drops a last batch of 1), or put it in eval mode with .eval()."
            )

    def _tracks(self) -> bool:
        tracks = self.training and self.track_running_stats and self._buffers["running_mean"] is not None
        return tracks and not is_stopped(self)

    def _normalise_with_running(self, input: Tensor) -> Tensor:
        mean, var = running_statistics(self)
        if torch.is_grad_enabled() and not is_tracing():
            # Backward needs these very values, and a training batch may come before it and write into the buffers. A
            # trace has no backward, and its check runs without grad and takes a copy for another program.
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(input, mean, var, *self._affine(mean.dtype), False, 0.0, self.eps)

    def _training_forward(self, input: Tensor) -> Tensor:
        """Settle at once: there is no scratch that this call may use."""
        momentum = kernel_momentum(self)
        if momentum is None and is_exporting():
            # A program that leaves has no place for a history: it averages as torch's layer does.
            momentum = self.momentum
        if momentum is None or (not is_compiling() and is_deferred(self) and not in_backward()):
            return self._forward_at_once(input)
        with exclusive():
            return self._forward_in_kernel(input, momentum)

    def _forward_deferred(self, input: Tensor, scratch: ScratchRows) -> Tensor:
        """Let the kernel write the scratch rows, which are settled when the model's forward ends."""
        synchronised, momentum = is_synchronised(self), scratch.momentum
        if synchronised:
            scratch.copy_rows()
        mean, var = scratch.mean, scratch.var
        weight, bias = self._affine(mean.dtype)
        try:
            output = F.batch_norm(input, mean, var, weight, bias, True, 1.0 if momentum is None else momentum, self.eps)
        except ValueError:
            self._check_values(input)  # says more than torch does
            raise
        count = self._values_per_channel(input) if synchronised else input.numel() // input.shape[1]
        if momentum is not None and LISTENERS in self.__dict__:
            scratch.batch = batch_moments(self, input, output)
        if synchronised or count or momentum is not None:
            scratch.report(count)
            if not synchronised and count:
                scratch.shape = input.shape
        return output

    def _forward_at_once(self, input: Tensor) -> Tensor:
        """Let the kernel leave the batch's mean and unbiased variance in scratch buffers, which with momentum 1 costs
        nothing, and settle at once. They start as zeros: a NaN in fresh memory would survive being multiplied by 0."""
        mean, var = map(torch.zeros_like, running_statistics(self))
        output = F.batch_norm(input, mean, var, *self._affine(mean.dtype), True, 1.0, self.eps)
        count = self._values_per_channel(input)
        if (isinstance(count, Tensor) or count > 0) and not in_backward():
            valid = is_finite(var) if self.skip_nonfinite else None
            advance(self, rule_of(self), Batch(mean, var, count_like(count, mean), next_step(self), valid))
        return output

    def _forward_in_kernel(self, input: Tensor, momentum: float) -> Tensor:
        """Torch's own training forward, on copies that are kept only where the batch was finite and is not a
        recomputation.

        A recomputation has to run the same kernel on the same kinds of tensors: checkpointing compares what either pass
        saves.
        """
        again = in_backward()
        mean, var = running_statistics(self)
        if self.skip_nonfinite or again or LISTENERS in self.__dict__:
            mean, var = mean.clone(), var.clone()
        output = F.batch_norm(input, mean, var, *self._affine(mean.dtype), True, momentum, self.eps)
        if again:
            return output
        with torch.no_grad():
            if LISTENERS in self.__dict__:
                values = count_like(self._values_per_channel(input), mean)
                batch = Batch(*batch_moments(self, input, output), values, next_step(self), None)
                notify(self, batch, running_statistics(self))
            if mean is not self.running_mean:
                write(self, mean, var, is_finite(var) if self.skip_nonfinite else None)
            elif self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return output

    def _values_per_channel(self, input: Tensor) -> int | Tensor:
        """Values per channel in this batch, of all ranks where the layer is synchronised."""
        count: int | Tensor = input.numel() // input.shape[1]
        return self.__dict__[SYNCHRONISED].count if is_synchronised(self) else count

    def _masked_forward(self, input: Tensor, mask: Tensor, batch_statistics: bool) -> Tensor:
        if not batch_statistics:
            kept = mask.unsqueeze(1)
            return torch.where(kept, self._normalise_with_running(torch.where(kept, input, 0.0)), 0.0)
        output, moments = masked_batch_norm(input, mask, self.weight, self.bias, self.eps)
        if self._tracks() and not in_backward():
            self._take_masked(moments.detach())
        return output

    @torch.no_grad()
    def _take_masked(self, moments: Moments) -> None:
        var = moments.variance(unbiased=True)
        valid = (moments.count > 1) & is_finite(var) if self.skip_nonfinite else moments.count > 1
        batch = Batch(moments.mean, var, moments.count, next_step(self), valid)
        scratch = None if is_compiling() else scratch_of(self)
        if scratch is not None:
            scratch.report_moments(batch, running_statistics(self))
        else:
            advance(self, rule_of(self), batch)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AveragedBatchNorm:
        # What .to(), .half() and Lightning's bf16-true call; torch's own modules override it too. An average in
        # bfloat16 stalls: at momentum 0.01, on the way from 0 to 5, at 3.34.
        wide = running_statistics(self) if self.averaging is not None else ()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in zip(("running_mean", "running_var"), wide, strict=False):
            self._buffers[name] = apply_to_statistics(fn, buffer)
        return self

    def _affine(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias in the dtype of the statistics that the kernel gets beside them: it takes no others."""
        weight, bias = affine(self)
        if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
            return weight, bias
        return None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)

    def __prepare_scriptable__(self) -> nn.Module:
        """``torch.jit.script`` asks for it, and would fail in words of its own."""
        call = "torch.jit.script(to_torch(copy.deepcopy(model)))"
        raise TypeError(f"torch.jit.script can't compile a {type(self).__name__} of lightning_bn. Call {call}.")

    def reset_running_stats(self) -> None:
        """Put mean 0, variance 1 and no batches tracked into the buffers, and empty the averaging."""
        super().reset_running_stats()
        averaging = self._modules.get("averaging")  # torch's __init__ calls this before there is one
        if isinstance(averaging, Averaging):
            averaging.clear()

    def extra_repr(self) -> str:
        shown = str(super().extra_repr())  # type: ignore[no-untyped-call]
        shown += ", skip_nonfinite=False" * (not self.skip_nonfinite)
        # With an averaging, the momentum is that one's, or is not used.
        return shown if self.averaging is None else shown.replace(f", momentum={self.__dict__['momentum']}", "")


class BatchNorm1d(AveragedBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` of (N, C) or (N, C, L) with a choice of running statistics; see `AveragedBatchNorm`.

    Example:
        >>> from lightning_bn import BatchNorm1d, Window
        >>> layer = BatchNorm1d(3, averaging=Window(20))
        >>> tokens, valid = torch.randn(8, 3, 5), torch.arange(5) < torch.tensor([[5]] * 6 + [[2]] * 2)
        >>> layer(tokens, mask=valid).shape
        torch.Size([8, 3, 5])
    """

    __module__ = "lightning_bn"


class BatchNorm2d(AveragedBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` of (N, C, H, W) with a choice of running statistics; see `AveragedBatchNorm`.

    Example:
        >>> from lightning_bn import BatchNorm2d, Window
        >>> layer = BatchNorm2d(3, averaging=Window(20))
        >>> layer(torch.randn(8, 3, 4, 4)).shape, layer.num_batches_tracked.item()
        (torch.Size([8, 3, 4, 4]), 1)
    """

    __module__ = "lightning_bn"


class BatchNorm3d(AveragedBatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` of (N, C, D, H, W) with a choice of running statistics; see `AveragedBatchNorm`.

    Example:
        >>> from lightning_bn import BatchNorm3d, Exponential
        >>> layer = BatchNorm3d(3, averaging=Exponential(0.1, debias=True))
        >>> layer(torch.randn(8, 3, 2, 4, 4)).shape
        torch.Size([8, 3, 2, 4, 4])
    """

    __module__ = "lightning_bn"
