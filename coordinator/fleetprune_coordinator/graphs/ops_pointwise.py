"""Operators that treat every element alike: arithmetic, comparisons, activations."""
# ruff: noqa: PLR0917  (a rule takes the operator's arguments in the order of its schema)

from collections.abc import Callable

from fleetprune_coordinator.graphs.lowering import Call, Lowering, lowers, result_type
from fleetprune_coordinator.graphs.values import Value

Operand = Value | float | bool

UNARY = {
    "abs": "Abs",
    "ceil": "Ceil",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "neg": "Neg",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "sgn": "Sign",
    "sign": "Sign",
    "sin": "Sin",
    "tanh": "Tanh",
    "sqrt": "Sqrt",
    "logical_not": "Not",
    "bitwise_not": "Not",
}
UNARY_POLE = {"log": "Log", "reciprocal": "Reciprocal"}
"""Not finite at zero."""

BINARY = {"maximum": "Max", "minimum": "Min"}
LOGICAL = {
    "logical_and": "And",
    "logical_or": "Or",
    "logical_xor": "Xor",
    "bitwise_and": "And",
    "bitwise_or": "Or",
}
COMPARISONS = {
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "lt": "Less",
}


@lowers("aten.ne")
def ne(low: Lowering, call: Call, x: Operand, y: Operand) -> Value:
    """Whether x and y differ."""
    compute = result_type(x, y)
    compute = "int64" if compute == "bool" else compute
    return low.pointwise(
        call, lambda a, b: low.op("Not", low.op("Equal", a, b)), x, y, compute=compute
    )


def _register_unary(target: str, op_type: str, zero_safe: bool) -> None:
    @lowers(target)
    def unary(low: Lowering, call: Call, x: Value) -> Value:
        fused = low.memo.get(("activated", call.node))
        if isinstance(fused, Value):
            return fused  # BatchNorm has applied it already
        return low.pointwise(call, lambda a: low.op(op_type, a), x, zero_safe=zero_safe)


def _register_binary(target: str, op_type: str) -> None:
    @lowers(target)
    def binary(low: Lowering, call: Call, x: Operand, y: Operand) -> Value:
        return low.pointwise(call, lambda a, b: low.op(op_type, a, b), x, y)


def _register_comparison(target: str, op_type: str) -> None:
    @lowers(target)
    def comparison(low: Lowering, call: Call, x: Operand, y: Operand) -> Value:
        compute = result_type(x, y)
        compute = "int64" if compute == "bool" else compute
        return low.pointwise(call, lambda a, b: low.op(op_type, a, b), x, y, compute=compute)


for _name, _op in UNARY.items():
    _register_unary(f"aten.{_name}", _op, zero_safe=True)
for _name, _op in UNARY_POLE.items():
    _register_unary(f"aten.{_name}", _op, zero_safe=False)
for _name, _op in (BINARY | LOGICAL).items():
    _register_binary(f"aten.{_name}", _op)
for _name, _op in COMPARISONS.items():
    _register_comparison(f"aten.{_name}", _op)


def _scaled(low: Lowering, name: str, alpha: float, dtype: str) -> str:
    return name if alpha == 1 else low.op("Mul", name, low.scalar(alpha, dtype))


@lowers("aten.add")
def add(low: Lowering, call: Call, x: Value, y: Operand, alpha: float) -> Value:
    """X + alpha*y."""
    return low.pointwise(
        call, lambda a, b: low.op("Add", a, _scaled(low, b, alpha, call.dtype)), x, y
    )


@lowers("aten.sub")
def sub(low: Lowering, call: Call, x: Value, y: Operand, alpha: float) -> Value:
    """X - alpha*y."""
    return low.pointwise(
        call, lambda a, b: low.op("Sub", a, _scaled(low, b, alpha, call.dtype)), x, y
    )


@lowers("aten.rsub")
def rsub(low: Lowering, call: Call, x: Value, y: Operand, alpha: float) -> Value:
    """Y - alpha*x."""
    return low.pointwise(
        call, lambda a, b: low.op("Sub", b, _scaled(low, a, alpha, call.dtype)), x, y
    )


@lowers("aten.mul")
def mul(low: Lowering, call: Call, x: Value, y: Operand) -> Value:
    """x*y; of two truth values: both."""
    op_type = "And" if call.dtype == "bool" else "Mul"
    return low.pointwise(call, lambda a, b: low.op(op_type, a, b), x, y)


@lowers("aten.div")
def div(low: Lowering, call: Call, x: Value, y: Operand, *rounding: str | None) -> Value:
    """x/y."""
    if any(mode is not None for mode in rounding):
        raise call.unsupported(f"is not supported with rounding_mode={rounding[0]!r}")
    if not isinstance(y, Value):
        return low.pointwise(call, lambda a, b: low.op("Mul", a, b), x, 1.0 / y)
    return low.pointwise(call, lambda a, b: low.op("Div", a, b), x, y, zero_safe=False)


@lowers("aten.pow")
def power(low: Lowering, call: Call, x: Value, exponent: Operand) -> Value:
    """x**exponent."""
    if exponent == 1:
        return x
    if exponent == 2:
        return low.pointwise(call, lambda a: low.op("Mul", a, a), x)
    return low.pointwise(call, lambda a, b: low.op("Pow", a, b), x, exponent, zero_safe=False)


@lowers("aten.rsqrt")
def rsqrt(low: Lowering, call: Call, x: Value) -> Value:
    """1/sqrt(x)."""
    return low.pointwise(
        call, lambda a: low.op("Reciprocal", low.op("Sqrt", a)), x, zero_safe=False
    )


@lowers("aten.expm1")
def expm1(low: Lowering, call: Call, x: Value) -> Value:
    """exp(x) - 1 = tanh(x/2) * (exp(x) + 1), which keeps its digits near zero."""
    return low.pointwise(
        call,
        lambda a, half, one: low.op(
            "Mul", low.op("Tanh", low.op("Mul", a, half)), low.op("Add", low.op("Exp", a), one)
        ),
        x,
        0.5,
        1.0,
    )


@lowers("aten.log1p")
def log1p(low: Lowering, call: Call, x: Value) -> Value:
    """log(1 + x)."""
    return low.pointwise(call, lambda a, one: low.op("Log", low.op("Add", a, one)), x, 1.0)


@lowers("aten.clamp")
def clamp(
    low: Lowering, call: Call, x: Value, lowest: float | None, highest: float | None
) -> Value:
    """min(max(x, lowest), highest)."""

    def clip(a: str) -> str:
        bounds = ("" if b is None else low.scalar(b, call.dtype) for b in (lowest, highest))
        return low.op("Clip", a, *bounds)

    return low.pointwise(call, clip, x)


@lowers("aten.hardtanh")
def hardtanh(low: Lowering, call: Call, x: Value, lowest: float, highest: float) -> Value:
    """ReLU6 and its kind."""
    fused = low.memo.get(("activated", call.node))
    if isinstance(fused, Value):
        return fused
    return clamp(low, call, x, lowest, highest)


@lowers("aten.leaky_relu")
def leaky_relu(low: Lowering, call: Call, x: Value, slope: float) -> Value:
    """X where x > 0, else slope*x."""
    return low.pointwise(call, lambda a: low.op("LeakyRelu", a, alpha=float(slope)), x)


@lowers("aten.hardswish")
def hardswish(low: Lowering, call: Call, x: Value) -> Value:
    """X * clip(x/6 + 1/2, 0, 1)."""
    return low.pointwise(call, lambda a: low.op("Mul", a, _hard_sigmoid(low, a)), x)


@lowers("aten.hardsigmoid")
def hardsigmoid(low: Lowering, call: Call, x: Value) -> Value:
    """clip(x/6 + 1/2, 0, 1)."""
    return low.pointwise(call, lambda a: _hard_sigmoid(low, a), x)


@lowers("aten.where")
def where(low: Lowering, call: Call, condition: Value, x: Operand, y: Operand) -> Value:
    """X where the condition holds, else y."""

    def select(c: str, a: str, b: str) -> str:
        return low.op("Where", low.cast(c, "bool"), a, b)

    return low.pointwise(call, select, condition, x, y)


@lowers("aten.masked_fill")
def masked_fill(low: Lowering, call: Call, x: Value, mask: Value, value: Operand) -> Value:
    """The value where the mask is set, else x."""
    return where(low, call, mask, value, x)


# Gradients. g is the gradient of the output.


def _hard_sigmoid(low: Lowering, name: str) -> str:
    return low.op("HardSigmoid", name, alpha=1.0 / 6.0, beta=0.5)


def step(low: Lowering, name: str) -> str:
    """1 where the tensor is above 0, else 0, in one pass.

    A hard sigmoid of almost infinite slope: clip(3e38*x, 0, 1). It is ten times as fast as
    onnxruntime's Where, and needs no boolean tensor as Greater and Cast do.
    """
    return low.op("HardSigmoid", name, alpha=3e38, beta=0.0)


def _inside(low: Lowering, name: str, bound: str) -> str:
    """1 where |x| < bound, else 0."""
    return low.cast(low.op("Less", low.op("Abs", name), bound), "float32")


def _gradient(
    low: Lowering, call: Call, derivative: Callable[..., str], g: Value, *rest: Operand
) -> Value:
    """G * derivative(*rest)."""
    return low.pointwise(call, lambda a, *names: low.op("Mul", a, derivative(*names)), g, *rest)


@lowers("aten.threshold_backward")
def threshold_backward(low: Lowering, call: Call, g: Value, x: Value, threshold: float) -> Value:
    """G where x > threshold, else 0."""
    if threshold == 0:
        return _gradient(low, call, lambda a: step(low, a), g, x)
    return _gradient(
        low, call, lambda a, b: low.cast(low.op("Greater", a, b), "float32"), g, x, threshold
    )


@lowers("aten.leaky_relu_backward")
def leaky_relu_backward(
    low: Lowering, call: Call, g: Value, x: Value, slope: float, _is_result: bool
) -> Value:
    """G where x > 0, else slope*g."""

    def derivative(a: str, rise: str, base: str) -> str:
        return low.op("Add", low.op("Mul", step(low, a), rise), base)

    return _gradient(low, call, derivative, g, x, 1.0 - slope, slope)


@lowers("aten.hardtanh_backward")
def hardtanh_backward(
    low: Lowering, call: Call, g: Value, x: Value, lowest: float, highest: float
) -> Value:
    """G where lowest < x < highest, else 0."""

    def derivative(a: str, lo: str, hi: str) -> str:
        inside = low.op("And", low.op("Greater", a, lo), low.op("Less", a, hi))
        return low.cast(inside, "float32")

    return _gradient(low, call, derivative, g, x, lowest, highest)


@lowers("aten.hardswish_backward")
def hardswish_backward(low: Lowering, call: Call, g: Value, x: Value) -> Value:
    """G * (0 below -3, x/3 + 1/2 inside, 1 above 3) = g * (hardsigmoid(x) + x/6 * [|x| < 3])."""

    def derivative(a: str, sixth: str, bound: str) -> str:
        inner = low.op("Mul", low.op("Mul", a, sixth), _inside(low, a, bound))
        return low.op("Add", _hard_sigmoid(low, a), inner)

    return _gradient(low, call, derivative, g, x, 1.0 / 6.0, 3.0)


@lowers("aten.hardsigmoid_backward")
def hardsigmoid_backward(low: Lowering, call: Call, g: Value, x: Value) -> Value:
    """g/6 where |x| < 3, else 0."""

    def derivative(a: str, sixth: str, bound: str) -> str:
        return low.op("Mul", _inside(low, a, bound), sixth)

    return _gradient(low, call, derivative, g, x, 1.0 / 6.0, 3.0)


@lowers("aten.sigmoid_backward")
def sigmoid_backward(low: Lowering, call: Call, g: Value, y: Value) -> Value:
    """G * y*(1 - y)."""
    return _gradient(low, call, lambda a, one: low.op("Mul", a, low.op("Sub", one, a)), g, y, 1.0)


@lowers("aten.tanh_backward")
def tanh_backward(low: Lowering, call: Call, g: Value, y: Value) -> Value:
    """G * (1 - y*y)."""
    return _gradient(low, call, lambda a, one: low.op("Sub", one, low.op("Mul", a, a)), g, y, 1.0)


@lowers("aten.silu_backward")
def silu_backward(low: Lowering, call: Call, g: Value, x: Value) -> Value:
    """G * s*(1 + x*(1 - s)) with s = sigmoid(x)."""

    def derivative(a: str, one: str) -> str:
        s = low.op("Sigmoid", a)
        inner = low.op("Mul", a, low.op("Sub", one, s))
        return low.op("Mul", s, low.op("Add", one, inner))

    return _gradient(low, call, derivative, g, x, 1.0)


@lowers("aten.silu")
def silu(low: Lowering, call: Call, x: Value) -> Value:
    """X * sigmoid(x)."""
    return low.pointwise(call, lambda a: low.op("Mul", a, low.op("Sigmoid", a)), x)
