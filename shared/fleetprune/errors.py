"""Every error that Fleetprune raises on purpose.

    FleetpruneError
    ├── UsageError            the caller's or the operator's input is wrong: fix it and call again
    │   ├── ConfigError       a configuration file or option
    │   ├── DataError         a device's data source
    │   ├── TraceError        a model that cannot be traced into groups
    │   ├── BudgetError       a keep count or a budget that cannot be met
    │   └── MissingExtraError a command whose optional dependencies are not installed
    ├── HostileInputError     bytes from the network that must not be used, whoever sent them
    │   ├── WireError         a frame, block or update that does not decode or does not fit its task
    │   ├── MessageError      a task, result or other JSON message that is malformed
    │   └── TrustError        a signature, version, expiry, hash or class that does not hold
    ├── GraphError            an ONNX graph that cannot be made, loaded or trusted on this machine
    ├── TransportError        the broker or the peer cannot be reached or does not answer
    ├── InstallError          a release could not be staged, checked or switched to
    ├── RegistryError         the coordinator's database refuses what was asked
    └── RolloutError          a release was stopped on its way, or its rollout cannot be changed so

A message names what was got, what was expected and what to do, in one line.
"""


class FleetpruneError(Exception):
    """Root of all errors raised on purpose."""


class UsageError(FleetpruneError):
    """The caller's or the operator's input is wrong."""


class ConfigError(UsageError):
    """A configuration file or option is wrong."""


class DataError(UsageError):
    """A device's data source holds nothing usable."""


class TraceError(UsageError):
    """A model cannot be traced into groups of coupled units."""


class BudgetError(UsageError):
    """A keep count is out of range, or no keep counts meet a budget."""


class MissingExtraError(UsageError):
    """A command needs an optional set of dependencies that is not installed."""


class HostileInputError(FleetpruneError):
    """Bytes from the network are not to be used."""


class WireError(HostileInputError):
    """A frame, block or update does not decode, or does not fit what was asked for."""


class MessageError(HostileInputError):
    """A JSON message is malformed."""


class TrustError(HostileInputError):
    """A signature, version, expiry, hash or device class does not hold."""


class GraphError(FleetpruneError):
    """An ONNX graph cannot be made, loaded or trusted on this machine."""


class TransportError(FleetpruneError):
    """The broker or the peer cannot be reached or does not answer."""


class InstallError(FleetpruneError):
    """A release could not be staged, checked or switched to."""


class RegistryError(FleetpruneError):
    """The coordinator's database refuses what was asked."""


class RolloutError(FleetpruneError):
    """A release was stopped on its way to devices, or its rollout cannot be changed like this."""
