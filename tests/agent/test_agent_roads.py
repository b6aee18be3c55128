"""The whole agent where its broker cannot be reached."""

import shutil
import threading
from datetime import UTC, datetime

import numpy as np
import pytest
from https_server import HttpsServer, files
from hub import FLEET, wait_until
from models import INPUTS, gemm
from repositories import MemoryRepository

from fleetprune.blocks import NotFoundError
from fleetprune.local_port import free_port
from fleetprune.messages import Telemetry
from fleetprune.mqtt import BrokerSettings
from fleetprune_agent import agent as agent_module
from fleetprune_agent.agent import STOPPED, Agent
from fleetprune_agent.config import AgentConfig, NpzData
from fleetprune_agent.http_source import HttpsSettings
from tests.certificates import certify


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_release_is_installed_over_https_while_there_is_no_broker(tmp_path, monkeypatch):
    monkeypatch.setattr(agent_module, "LOOK_S", 0.1)
    certify(tmp_path, "ca")
    certify(tmp_path, "server", san="IP:127.0.0.1")
    repository = MemoryRepository(datetime.now(UTC))
    manifest = repository.release(1, model=gemm(1), fields={"input_shape": (INPUTS,)})

    class Public(dict):
        def get(self, name):
            try:
                return repository.read(name, 2**20)
            except NotFoundError:
                return None

    server = HttpsServer(tmp_path, files(Public()))
    nobody = free_port()
    (tmp_path / "root.json").write_bytes(repository.bootstrap)
    np.savez(tmp_path / "samples.npz", x=np.array([[1.0], [0.0]]), y=np.array([0, 1]))
    config = AgentConfig(
        device="d1",
        device_class="phone",
        fleet=FLEET,
        broker=BrokerSettings(port=nobody),
        https=HttpsSettings(url=server.url, ca_file=tmp_path / "ca.crt"),
        root=tmp_path / "root.json",
        state=tmp_path / "state",
        data=NpzData(kind="npz", path=tmp_path / "samples.npz", held_out=0),
    )
    stop, codes = threading.Event(), []
    agent = threading.Thread(target=lambda: codes.append(Agent(config).run(stop)))
    agent.start()
    try:
        last = config.state / "last.json"
        wait_until(
            lambda: last.exists() and Telemetry.from_bytes(last.read_bytes()).release == 1,
            "the release",
        )
        told = Telemetry.from_bytes(last.read_bytes())
        assert told.sha256 == manifest.sha256
        assert manifest.size < told.bytes_down <= server.sent
        assert 0 < told.bytes_up <= server.received
    finally:
        stop.set()
        agent.join(30)
        server.close()
    assert codes == [STOPPED]
