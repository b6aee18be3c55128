"""The user's model as plain data, as budgets count it."""

from torch import Tensor, nn

from fleetprune.errors import ConfigError, GraphError, TraceError
from fleetprune.layout import Architecture
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.int8 import planned
from fleetprune_coordinator.onnx_costs import overhead_bytes
from fleetprune_coordinator.supported import untraceable
from fleetprune_coordinator.tracing import trace


def describe(model: nn.Module, example: Tensor, config: FleetConfig) -> Architecture:
    """Trace a fleet's model, and measure the file's overhead on the dense export.

    Args:
        model: The dense model; it is not changed.
        example: (1, *shape).
        config: The fleet.

    Raises:
        TraceError: The model cannot be pruned, names the layer; or it has another number of
            outputs than the fleet has labels.
    """
    architecture = trace(model, example, untraceable(model, config.pruning.exclude))
    if architecture.classes != config.model.outputs:
        raise TraceError(
            f"the model has {architecture.classes} outputs, "
            f"but fleet.toml names {config.model.outputs} classes"
        )
    overhead = overhead_bytes(model, architecture, example, lambda m, x: export_infer(m, x).onnx)
    return architecture.model_copy(update={"overhead_bytes": overhead})


def counted(model: nn.Module, architecture: Architecture, config: FleetConfig) -> Architecture:
    """Whose costs budgets are held against: the files' as they are, or quantised.

    Args:
        model: The dense model.
        architecture: Its description.
        config: The fleet.

    Raises:
        ConfigError: Quantised files are asked for, but the model has none.
    """
    if config.pruning.int8 is not True:
        return architecture
    try:
        return planned(model, architecture)
    except GraphError as e:
        raise ConfigError(
            f"pruning.int8 is true, but the model cannot be quantised: {e}; "
            'set it to "auto" or false'
        ) from e
