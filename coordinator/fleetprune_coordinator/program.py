"""One inference of a torch model as the list of ATen operators that ran.

For one sample, in evaluation mode. On shapes alone (meta tensors) a branch on values cannot hide,
because there are none; with values the same takes a third of the time.
"""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fleetprune.errors import TraceError
from fleetprune_coordinator.graphs.trace import torch_alike

VIEWS_OF_WEIGHTS = frozenset({
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select",
    "split", "split_with_sizes", "unsafe_split", "unbind", "squeeze", "unsqueeze", "detach",
    "alias", "clone", "contiguous", "_to_copy",
})  # fmt: skip
"""Operators whose result holds elements of their first input and nothing else."""


PRODUCTS = {
    "mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"), "mv": ("self", "vec"), "addmv": ("mat", "vec"),
    "dot": ("self", "tensor"), "convolution": ("input", "weight"),
}  # fmt: skip
"""Operators that multiply, and the names of their factors."""


@dataclass(frozen=True, eq=False, slots=True)
class Ref:
    """A tensor of the inference."""

    number: int
    """In the order in which tensors were first seen; 0 is the model's input."""
    shape: tuple[int, ...]
    name: str = ""
    """Of the parameter or buffer that it is."""
    weight: str = ""
    """Name of the parameter whose elements it holds, whole or in part."""
    whole: bool = False
    """Whether it is that parameter, or it transposed by `t`."""
    turned: bool = False
    """Whether its two axes are the parameter's in the other order."""
    depends: bool = False
    """Whether it was computed from the model's input."""
    real: bool = True
    """Whether its elements are floating-point numbers."""
    item_bytes: int = 4


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """One executed operator."""

    name: str
    """Such as "relu", also where it worked in place."""
    layer: str
    """Path of the innermost module that ran it."""
    arguments: Mapping[str, Any]
    """By the schema's names, in its order, defaults filled in, tensors as `Ref`."""
    outputs: tuple[Ref, ...]
    pointwise: bool
    """Whether torch says that it treats every element alike."""

    @property
    def inputs(self) -> tuple[Ref, ...]:
        """All tensors that it reads."""
        return tuple(x for x in tree_leaves(list(self.arguments.values())) if isinstance(x, Ref))

    @property
    def factors(self) -> tuple[Ref, ...]:
        """The two that a product multiplies; of other operators none."""
        return tuple(self.arguments[name] for name in PRODUCTS.get(self.name, ()))

    @property
    def weight(self) -> str:
        """Name of the parameter that a product multiplies with; "" if there is none."""
        return next((ref.weight for ref in self.factors if ref.weight), "")

    @property
    def macs(self) -> int:
        """Multiplications of a product."""
        if not self.factors:
            return 0
        a, b = self.factors
        if self.name != "convolution":
            return prod(a.shape) * (b.shape[-1] if len(b.shape) > 1 else 1)
        walked = a if self.arguments["transposed"] else self.outputs[0]
        return prod(b.shape[1:]) * prod(walked.shape)


@dataclass
class Program:
    """Every operator of one inference of one sample."""

    calls: list[Call] = field(default_factory=list)
    tensors: dict[str, Ref] = field(default_factory=dict)
    """Parameters and buffers that were read, by name, in the order of their first use."""
    input: Ref = field(default_factory=lambda: Ref(0, ()))
    output: Ref = field(default_factory=lambda: Ref(0, ()))
    batches: dict[str, set[int]] = field(default_factory=dict)
    """Per layer that was called, the lengths of its first input's first axis."""

    def used(self) -> "Program":
        """Without calls on which the output does not depend; export leaves them out too."""
        wanted, used = {self.output.number}, []
        for call in reversed(self.calls):
            if any(ref.number in wanted for ref in call.outputs):
                wanted |= {ref.number for ref in call.inputs}
                used.append(call)
        tensors = {name: ref for name, ref in self.tensors.items() if ref.number in wanted}
        return replace(self, calls=used[::-1], tensors=tensors)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operator."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.program = Program()
        self.stack: list[str] = [""]
        self._names = {id(t): n for n, t in model.named_buffers()}
        self._names |= {id(t): n for n, t in model.named_parameters()}
        self._parameters = {n for n, _ in model.named_parameters()}
        self._refs: dict[int, Ref] = {}
        self._overwritten: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice
        self.program.input = self._new(example, depends=True)

    def _new(
        self,
        tensor: Tensor,
        *,
        weight: str = "",
        whole: bool = False,
        turned: bool = False,
        depends: bool = False,
    ) -> Ref:
        name = self._names.get(id(tensor), "")
        if name in self._parameters:
            weight, whole = name, True
        shape = tuple(tensor.shape)
        real = tensor.is_floating_point()
        number, size = len(self._alive), tensor.element_size()
        ref = Ref(number, shape, name, weight, whole, turned, depends, real, size)
        self._alive.append(tensor)
        self._refs[id(tensor)] = ref
        if name:
            self.program.tensors[name] = ref
        return ref

    def ref(self, tensor: Tensor) -> Ref:
        """The number of a tensor, new if it was not seen before.

        Raises:
            TraceError: Another tensor that shares a part of its memory was written to.
        """
        if writer := self._overwritten.get(id(tensor)):
            raise TraceError(f"{writer} writes into a part of a tensor, {NO_PARTS}")
        return self._refs.get(id(tensor)) or self._new(tensor)

    def _write(self, tensor: Tensor, name: str) -> None:
        """Note that an operator overwrites a tensor: others may hold parts of it."""
        first, last = _span(tensor)
        storage = tensor.untyped_storage()._cdata
        for other in self._alive:
            if id(other) != id(tensor) and other.untyped_storage()._cdata == storage:
                start, end = _span(other)
                whole = other.numel() == tensor.numel() and self._refs[id(other)].depends
                if start <= last and first <= end and not whole:
                    self._overwritten[id(other)] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        arguments = {}
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else given.get(argument.name, argument.default_value)
            arguments[argument.name] = tree_map(
                lambda x: self.ref(x) if isinstance(x, Tensor) else x, value
            )
        result = func(*args, **given)
        for i, argument in enumerate(func._schema.arguments):
            written = args[i] if i < len(args) else given.get(argument.name)
            if func._schema.is_mutable and argument.is_write and isinstance(written, Tensor):
                self._write(written, func.overloadpacket.__name__)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        read = [x for x in tree_leaves(list(arguments.values())) if isinstance(x, Ref)]
        weight = read[0].weight if read and name in VIEWS_OF_WEIGHTS else ""
        whole = name == "t" and read[0].whole
        turned = bool(weight) and read[0].turned != (name in ("t", "transpose", "permute"))
        depends = any(ref.depends for ref in read)
        outputs = tuple(
            self._new(x, weight=weight, whole=whole, turned=turned, depends=depends) for x in made
        )
        pointwise = torch.Tag.pointwise in func.tags
        self.program.calls.append(Call(name, self.stack[-1], arguments, outputs, pointwise))
        return result

    def enter(self, path: str, args: tuple[Any, ...]) -> None:
        """A layer begins."""
        self.stack.append(path)
        lengths = self.program.batches.setdefault(path, set())
        lengths |= {x.shape[0] for x in args[:1] if isinstance(x, Tensor) and x.dim()}

    def leave(self) -> None:
        """A layer ends."""
        self.stack.pop()


NO_PARTS = "expected one that is made at once (torch.cat, torch.where)"


def _span(tensor: Tensor) -> tuple[int, int]:
    """Places in memory of a tensor's first and last element."""
    first = tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(first), int(first) + sum((n - 1) * int(step) for n, step in steps)


def describe(path: str, layer: nn.Module) -> str:
    """A layer as error messages name it."""
    return f"{path or 'the model'} ({type(layer).__name__})"


def on_shapes(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes but no values."""
    return copy.deepcopy(model).eval().to("meta")


def _circumstances(example: Tensor, reason: str) -> str:
    """On what a model does not run, for which reason."""
    if not example.is_meta:
        return ""
    if "meta" not in reason:  # it is not about values that are not there
        return f" on an input of shape {tuple(example.shape)}"
    return " on shapes alone, expected no branch on values (compute both, choose with torch.where)"


def run_program(model: nn.Module, example: Tensor) -> Program:
    """Write down one inference, as far as its output depends on it.

    Args:
        model: In evaluation mode; with values or on shapes alone (see `on_shapes`).
        example: (1, ...) on the model's device.

    Raises:
        TraceError: The model does not run, or its output is no (1, classes) tensor that is
            computed from the input; names the layer.
    """
    example = example.detach().clone()  # the model may work in place
    recorder = _Recorder(model, example)
    layers = dict(model.named_modules())
    hooks = [
        hook
        for path, layer in layers.items()
        for hook in (
            layer.register_forward_pre_hook(lambda _, args, path=path: recorder.enter(path, args)),
            layer.register_forward_hook(lambda *_: recorder.leave()),
        )
    ]
    try:
        made = torch.device("meta") if example.is_meta else nullcontext()
        with torch.no_grad(), torch_alike(), made, recorder:
            out = model(example)
    except Exception as error:
        path = recorder.stack[-1]
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, TraceError):
            reason = f"does not run{_circumstances(example, reason)}: {reason}"
        raise TraceError(f"{describe(path, layers[path])}: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
    ref = recorder.ref(out) if isinstance(out, Tensor) else None
    if ref is None or not ref.depends or len(ref.shape) != 2 or ref.shape[0] != 1:
        got = ref.shape if ref is not None else type(out).__name__
        raise TraceError(
            f"{describe('', model)}: output {got}, expected a tensor (1, classes) that is "
            f"computed from the input"
        )
    recorder.program.output = ref
    return recorder.program.used()
