"""What all of our Flower grids share: nodes are devices, and there is no SuperLink."""

from collections.abc import Callable, Mapping

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fleetprune.errors import UsageError
from fleetprune_coordinator.flower_messages import ensure_identity


class TaskGrid(Grid):
    """A grid whose instructions are tasks for named devices."""

    def __init__(self, nodes: Callable[[], Mapping[str, int]]) -> None:
        """`nodes` gives node ids by device name."""
        ensure_identity()
        self._nodes = nodes
        self._run = Run.create_empty(run_id=1)

    def set_run(self, run: Run) -> None:
        """Kept for whoever asks."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that was set; an empty one before that."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As Flower's own grids do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Node ids of the fleet's devices."""
        return list(self._nodes().values())

    def get_nodes(self) -> list[NodeInfo]:
        """Node ids with the devices' names."""
        return [NodeInfo(node_id=node, name=device) for device, node in self._nodes().items()]

    def _check_node(self, device: str, message: Message) -> None:
        node = self._nodes().get(device)
        if node != message.metadata.dst_node_id:
            raise UsageError(
                f"task for device {device} (node {node}) is addressed to node "
                f"{message.metadata.dst_node_id}"
            )
