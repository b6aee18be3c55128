"""The agent: one process that learns, installs and reports, and survives being killed.

    dispatcher (of the connection)   notes messages, feeds blocks to the transfers
    this thread                      enrols, acknowledges, keeps the timers
    `jobs`                           one job at a time: a task, an installation, a measurement
    `courier`                        answers and reports to the coordinator

Training and installation never run at the same time, because each alone may need most of a small
device's memory. All that must outlive the process lies below `config.state`:

    tasks/       accepted, not answered          answers.bin   answers and residual (`feedback`)
    outbox/      answers not confirmed           graphs/       verified by hash, reusable
    trust/       signed metadata                 slots/        installed models
    parts/       interrupted transfers           incoming/     on its way to one of the above
    last.json    the last report, for `status`
"""

import fcntl
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from fleetprune.errors import ConfigError, FleetpruneError, MessageError, TransportError
from fleetprune.files import storage_errors, write_atomic
from fleetprune.messages import Enrol, Enrolled, Progress, Task, TaskAck
from fleetprune.mqtt import Connection
from fleetprune.outbox import Kind, Outbox
from fleetprune.retry import Backoff
from fleetprune.topics import Topics
from fleetprune_agent.config import AgentConfig
from fleetprune_agent.courier import Courier
from fleetprune_agent.data import Split, split
from fleetprune_agent.feedback import OnDisk
from fleetprune_agent.inbox import TaskInbox
from fleetprune_agent.jobs import Jobs
from fleetprune_agent.memory import quiet_malloc, rss_mb, trim
from fleetprune_agent.readers import load_samples
from fleetprune_agent.sessions import Graphs
from fleetprune_agent.slots import Slots
from fleetprune_agent.sources import DeviceSource
from fleetprune_agent.telemetry import Measured, Traffic, measure, one_line, report
from fleetprune_agent.transfer import KINDS, BlobClient
from fleetprune_agent.trust import TrustedRepository
from fleetprune_agent.worker import Worker, WorkerSettings
