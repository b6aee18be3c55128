"""Traces torch functions to graphs of ATen operators."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fleetprune.errors import GraphError
from fleetprune_coordinator.attention import with_cuttable_heads
from fleetprune_coordinator.graphs.lowering import NotLoweredError

_aten = torch.ops.aten

TAKEN_APART = (
    _aten.addcdiv,
    _aten.addcmul,
    _aten.binary_cross_entropy,
    _aten.binary_cross_entropy_backward,
    _aten.binary_cross_entropy_with_logits,
    _aten.channel_shuffle,
    _aten.elu,
    _aten.elu_backward,
    _aten.gelu,
    _aten.gelu_backward,
    _aten.glu,
    _aten.glu_backward,
    _aten.huber_loss,
    _aten.huber_loss_backward,
    _aten.linalg_vector_norm,
    _aten.log_sigmoid_forward,
    _aten.log_sigmoid_backward,
    _aten.logsumexp,
    _aten.mish,
    _aten.mish_backward,
    _aten.mse_loss,
    _aten.mse_loss_backward,
    _aten.native_group_norm,
    _aten.native_group_norm_backward,
    _aten.native_layer_norm,
    _aten.native_layer_norm_backward,
    _aten.nll_loss_backward,
    _aten.nll_loss_forward,
    _aten.pixel_shuffle,
    _aten.pixel_unshuffle,
    _aten.smooth_l1_loss,
    _aten.smooth_l1_loss_backward,
    _aten.softplus,
    _aten.softplus_backward,
    _aten.std,
    _aten.var,
    _aten._prelu_kernel,
    _aten._prelu_kernel_backward,
)
"""Operators that torch decomposes into simpler ones before the rules see them.

All others stay whole, so that an error names the operator that the user's layer calls.
"""

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module normalises over the batch."""
    return isinstance(module, _BATCH_NORM)


def prepare(model: nn.Module) -> nn.Module:
    """A copy that can be traced: nothing in place, no step counters.

    Its attention is that of cut models, so that the graphs of a dense one differ in sizes alone.
    """
    clone = with_cuttable_heads(copy.deepcopy(model))
    for name, module in clone.named_modules():
        if isinstance(module, _BATCH_NORM):
            if module.track_running_stats and module.momentum is None:
                raise GraphError(
                    f"layer '{name}' ({type(module).__name__}): momentum=None (a cumulative "
                    "average) is not supported; give a number"
                )
            module.num_batches_tracked = None
        if hasattr(module, "inplace"):
            module.inplace = False
    return clone


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """BatchNorm's running means and variances, in `named_buffers()` order."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


def _decompositions() -> Any:
    return get_decompositions(TAKEN_APART)


def trace(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    """The ATen operators that `function` calls on tensors like `inputs`."""
    with torch_alike():
        graph = make_fx(
            function,
            decomposition_table=_decompositions(),
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )(*inputs)
    graph.graph.eliminate_dead_code(
        is_impure_node=lambda n: n.op in ("placeholder", "output") or "batch_norm" in str(n.target)
    )
    return graph


@contextmanager
def torch_alike() -> Iterator[None]:
    """Attention and convolution by their plain operators, not by fused ones."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _Callers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which modules call each ATen operator, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[tuple[str, nn.Module]] = []
        self.calls: dict[str, list[tuple[str, nn.Module]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.replace("::", ".").removesuffix("_")
        if self.stack:
            self.calls.setdefault(name, []).append(self.stack[-1])
        return func(*args, **(kwargs or {}))

    def watch(self, model: nn.Module) -> None:
        """Keep `stack` at the modules that are running."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, _, name=name: self.stack.append((name, m)))
            module.register_forward_hook(lambda *_: self.stack.pop() and None)


def explain(error: NotLoweredError, model: nn.Module, x: torch.Tensor) -> GraphError:
    """The error for the user: which layer calls the operator that cannot be lowered."""
    callers = _Callers()
    clone = copy.deepcopy(model)
    callers.watch(clone)
    with torch.no_grad(), torch_alike(), callers:
        clone(x)
    calls = callers.calls.get(error.target.removesuffix("_backward"), [])
    if error.occurrence >= len(calls):
        return GraphError(f"{error}; remove or replace the layer that calls it")
    if error.target.endswith("_backward"):
        calls.reverse()  # gradients are computed from the last layer to the first
    path, module = calls[error.occurrence]
    where = f"layer '{path}'" if path else "the model itself"
    return GraphError(f"{where} ({type(module).__name__}): {error}; remove or replace that layer")
