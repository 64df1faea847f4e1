"""The forward and backward pass of a batch as a CUDA graph: launched at once instead of kernel by kernel.

A step of a model of 24 layers has some ten thousand kernels, most of which take less time than their launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Backward = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""Adds a share of the gradients of inputs and targets; returns that of the loss, and the right answers."""


class CapturedBackward:
    """A :data:`Backward` that replays what it captured for inputs of the same shape.

    Args:
        backward: what to capture. Shapes and launches must not depend on values, and nothing may wait for
            the GPU.
        parameters: whose gradients it adds to; they get gradient tensors that stay in place.
    """

    def __init__(self, backward: Backward, parameters: Sequence[nn.Parameter]) -> None:
        self._backward = backward
        self._parameters = parameters
        self._gradients: list[Tensor] = []
        self._key: tuple[float, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, inputs: Tensor, targets: Tensor, share: float, version: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """As the captured function.

        Args:
            inputs, targets, share: its arguments.
            version: whatever else the launches depend on; another one is captured anew.
        """
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not gradient:
                # What other steps added, or nothing.
                gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
                parameter.grad = gradient
        key = (*inputs.shape, share, *version)
        if self._graph is None or key != self._key:
            self._capture(inputs, targets, share)
            self._key = key
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        assert self._graph is not None
        self._graph.replay()
        return self._results

    def _capture(self, inputs: Tensor, targets: Tensor, share: float) -> None:
        self._graph = None
        self._inputs, self._targets = inputs.clone(), targets.clone()
        # Once for nothing: kernels are compiled, constants sent and workspaces allocated in the first run.
        for parameter in self._parameters:
            parameter.grad = None
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        # Its random numbers are given back: a resumed run captures anew, and must draw the same ones.
        with torch.random.fork_rng([self._inputs.device]), torch.cuda.stream(stream):
            self._backward(self._inputs, self._targets, share)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        # What the eager run left in its pool is as much as the graph's own pool needs.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._results = self._backward(self._inputs, self._targets, share)
        self._graph = graph
