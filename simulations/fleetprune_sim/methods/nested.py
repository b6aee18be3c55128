"""Ours: nested masks by importance, with self-distillation to one narrower class a step.

Every class's model lies within the next larger one's. A step trains the device's own model and
one narrower model inside it, each teaching the other; losses are adjusted by the device's label
frequencies; uploads are int4 with error feedback; BatchNorm statistics are exact sums over
devices, per class. docs/method.md holds what was measured; docs/decisions/0006 the recipe.
"""

from fleetprune_sim.methods.method import Method


class Nested(Method):
    """The coordinator's own way, with the settings of `fleet.toml`."""

    name = "nested"
    title = "Fleetprune"
    paper = "this project"
    tries = True
