"""Bytes of a model's tensors in the file that is shipped."""

from collections import Counter

from torch import nn

from fleetprune_coordinator.recording import FLOAT_BYTES, Recording


def artifact_bytes(model: nn.Module, dense: Recording) -> dict[str, int]:
    """Bytes per element of the tensors that export does not ship as they are.

    A BatchNorm that is folded into the layer before it leaves nothing but that layer's bias, which
    is counted with the norm if the layer has none. A layer that runs several times is shipped once
    per norm that it is folded with.
    """
    calls, folded = dense.calls(), dense.folded()
    norms = Counter(dense.operators[i].layer for i in folded)
    products = Counter((op.weight, op.bias) for op in folded.values())
    shipped: dict[str, int] = {}
    for norm, count in norms.items():
        leaves = ("weight", "bias", "running_mean", "running_var")
        shipped |= {f"{norm}.{leaf}": FLOAT_BYTES * (calls[norm] > count) for leaf in leaves}
    for (weight, bias), count in products.items():
        copies = count + (calls[weight] > count)
        shipped |= {name: FLOAT_BYTES * copies for name in (weight, bias) if name}
    for i, product in folded.items():
        if not product.bias:
            norm = dense.operators[i].layer
            has_bias = model.get_submodule(norm).bias is not None
            shipped[f"{norm}.{'bias' if has_bias else 'running_mean'}"] += FLOAT_BYTES
    return shipped
