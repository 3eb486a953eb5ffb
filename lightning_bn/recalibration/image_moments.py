"""The moments of each image at each batch-norm layer of a model, read by hooks, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.layers.subclasses import input_and_mask
from lightning_bn.torch_internals import image_moments

Guard = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Wraps a hook, see `ErrorBoundary.guard`."""


class ImageMoments(NamedTuple):
    """Of what a layer gets, for each image and channel, over the image's positions, in at least float32."""

    mean: Tensor  # (N, C)
    var: Tensor  # (N, C), *biased*, within the image; 0 where it has one position

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None) -> ImageMoments:
        """Return those of `input`.

        Args:
            input: (N, C, *spatial).
            mask: boolean (N, *spatial), True where a position counts; None counts all. An image without any has NaN.
        """
        values = input.detach().to(torch.promote_types(input.dtype, torch.float32))
        if input.dim() == 2:
            return cls(values, torch.zeros_like(values))
        if mask is None and values.device.type == "cpu":
            mean, var = image_moments(values.contiguous())
            return cls(mean, var.to(mean))
        values = values.flatten(2)
        if mask is None:
            var, mean = torch.var_mean(values, 2, correction=0)
            return cls(mean, var)
        kept = mask.flatten(1).unsqueeze(1)
        count = kept.sum(2)
        mean = torch.where(kept, values, 0.0).sum(2) / count
        centred = torch.where(kept, values - mean.unsqueeze(2), 0.0)
        return cls(mean, centred.square().sum(2) / count)

    @classmethod
    def over_calls(cls, calls: Sequence[ImageMoments]) -> ImageMoments:
        """Return those of each image over all calls of the layer, which count alike."""
        if len(calls) == 1:
            return calls[0]
        between, mean = torch.var_mean(torch.stack([each.mean for each in calls]), 0, correction=0)
        return cls(mean, torch.stack([each.var for each in calls]).mean(0) + between)

    def standardised(self, running_mean: Tensor, running_var: Tensor, eps: Tensor | float) -> Tensor:
        """Return the image's mean and mean square of ``(x - running_mean) / sqrt(running_var + eps)``, (N, 2, C)."""
        scale = (running_var.to(self.var) + eps).rsqrt()
        mean = (self.mean - running_mean.to(self.mean)) * scale
        return torch.stack((mean, torch.addcmul(mean.square(), self.var, scale.square())), 1)


class ImageReader:
    """A context in which forwards in eval mode leave each image's moments at `layers`.

    Args:
        layers: those whose forward normalises its input as it comes.
        guard: wraps each hook.

    Attributes:
        listening: whether forwards are read.
    """

    def __init__(self, layers: Iterable[_BatchNorm], guard: Guard | None = None) -> None:
        self.listening = True
        self._layers = layers
        self._hook = self._read if guard is None else guard(self._read)
        self._stack = ExitStack()
        self._calls: dict[_BatchNorm, list[ImageMoments]] = {}

    def __enter__(self) -> ImageReader:
        for layer in self._layers:
            self._stack.callback(layer.register_forward_pre_hook(self._hook, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def forget(self) -> None:
        """Begin another forward."""
        self._calls = {}

    @property
    def ran(self) -> list[_BatchNorm]:
        """The layers that ran since `forget`, in the order of their first calls."""
        return list(self._calls)

    @property
    def images(self) -> int:
        """The number of images: the length of what the first layer got."""
        return next((len(calls[0].mean) for calls in self._calls.values()), 0)

    def calls(self, layer: _BatchNorm) -> int:
        """Return how often `layer` was called."""
        return len(self._calls.get(layer, ()))

    def at(self, layer: _BatchNorm, calls: int | None = None) -> ImageMoments | str:
        """Return the moments at a layer, or why there are none, as the end of a sentence.

        Args:
            layer: one of those.
            calls: how often it must have been called; None: at all.
        """
        found = self._calls.get(layer)
        if not found:
            return "it did not run"
        if any(len(each.mean) != self.images for each in found):
            return "what it gets is not one row for each image"
        if calls is not None and len(found) != calls:
            return f"it was called {len(found)} times for a batch, and {calls} times before"
        return ImageMoments.over_calls(found)

    def _read(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.listening and not layer.training and not torch.compiler.is_compiling():
            with torch.no_grad():
                moments = ImageMoments.of(*input_and_mask(layer, args, kwargs))
            self._calls.setdefault(layer, []).append(moments)
