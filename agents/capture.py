"""Updates captured as CUDA graphs: what the host would launch kernel by kernel is launched at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from envs.api import UserError

WARM_UPS = 3
LARGEST = 32  # graphs of one function, each with memory of its own

Function = Callable[[Any], dict[str, Tensor]]
Replay = Callable[[], dict[str, Tensor]]


class _Graph(NamedTuple):
    """One recorded shape: the tensors that it reads, and what replays it."""

    inputs: list[Tensor]
    replay: Replay


class Captured:
    """`function` of a tree of tensors, recorded once for each of the tree's shapes and replayed from then on.

    The function may change tensors of its own in place, such as parameters; it may not look at the values of tensors, nor depend on numbers
    of the host that change from call to call, other than those in the tree. The first `WARM_UPS` calls of a shape are for real, since
    libraries need some to settle; then it is recorded. Beyond `LARGEST` shapes all calls are for real.

    What a call returns is overwritten by the next call of the same shape.

    Args:
        function: of one tree (lists, dicts and named tuples of tensors on one device, and of hashable values), to named tensors.
        record: makes what replays a function of a tree whose tensors stay where they are; `cuda_graph` but in tests.
    """

    def __init__(self, function: Function, record: Callable[[Function, Any], Replay] | None = None) -> None:
        self._function, self._record = function, record or cuda_graph
        self._calls: dict[Any, int] = {}
        self._graphs: dict[Any, _Graph] = {}

    def __len__(self) -> int:
        """How many shapes are recorded."""
        return len(self._graphs)

    def __call__(self, tree: Any) -> dict[str, Tensor]:
        leaves, shape = pytree.tree_flatten(tree)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        signature = (shape, *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        graph = self._graphs.get(signature)
        if graph is None:
            calls = self._calls[signature] = self._calls.get(signature, 0) + 1
            if calls <= WARM_UPS or len(self._graphs) == LARGEST:
                return _aside(self._function, tree, tensors[0].device)
            kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            replay = self._record(self._function, pytree.tree_unflatten(kept, shape))
            graph = self._graphs[signature] = _Graph([leaf for leaf in kept if isinstance(leaf, Tensor)], replay)
        torch._foreach_copy_(graph.inputs, tensors)
        return graph.replay()


def captured(function: Function, capture: bool, device: torch.device) -> Function:
    """`function`, captured where that is asked for. UserError where the device has no graphs."""
    if capture and device.type != "cuda":
        raise UserError(f"agent.capture=true records CUDA graphs and needs device=cuda, got {device.type}")
    return Captured(function) if capture else function


def cuda_graph(function: Function, tree: Any) -> Replay:
    """Records `function(tree)` on the GPU, without running it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(tree)

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return found

    return replay


def _aside(function: Function, tree: Any, device: torch.device) -> dict[str, Tensor]:
    """A warm-up: on a GPU on a stream of its own, as graphs are recorded."""
    if device.type != "cuda":
        return function(tree)
    here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        found = function(tree)
    here.wait_stream(aside)
    return found
