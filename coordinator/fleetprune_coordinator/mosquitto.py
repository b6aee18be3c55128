"""What mosquitto must be told about a fleet: configuration, access list, revocation list.

Pure text, checked with mosquitto 2.0. `deploy/mosquitto` holds this module's output for an example
fleet, with the reason for each line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from fleetprune.topics import Topics
from fleetprune_coordinator.authority import BLOCKS, COORDINATOR

CONFIG: Final = "fleetprune.conf"
ACCESS_LIST: Final = "fleetprune.acl"
REVOKED: Final = "revoked.crl"
CERTIFICATES: Final = ("ca.crt", "broker.crt", "broker.key")
DATA: Final = PurePosixPath("/var/lib/mosquitto")  # where Debian's package keeps it
_HEADER: Final = "# Made by `fleetprune deploy mosquitto`: change fleet.toml, not this file.\n"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a broker finds its files."""

    folder: PurePosixPath
    """Of all files named above."""
    data: PurePosixPath
    """Where it keeps what it remembers."""


def configuration(port: int, place: Place) -> str:
    """mosquitto.conf of a broker for one fleet.

    Args:
        port: Of its one listener.
        place: Its files.
    """
    return f"""\
{_HEADER}# The whole configuration: mosquitto refuses settings that stand twice, so a distribution's
# mosquitto.conf gives way to the one line "include_dir {place.folder}".

# --- Who may come in -----------------------------------------------------------------------------
# One listener, TLS with certificates on both sides. There is no plain listener, not even on
# loopback: whoever can run a process on the broker's machine would be every device.
listener {port}
cafile {place.folder}/ca.crt
certfile {place.folder}/broker.crt
keyfile {place.folder}/broker.key
tls_version tlsv1.2
# (the lowest version that is accepted)

# A device proves who it is by a certificate of our authority, whose common name is the device's
# name. That name becomes the user name (%u in the access list), so a device cannot choose whom it
# speaks for.
require_certificate true
use_identity_as_username true
allow_anonymous false
# Certificates that are shut out. Read at SIGHUP, like the access list, for new connections; those
# that are open stay, and are silenced by a line in the access list.
crlfile {place.folder}/{REVOKED}

# --- What they may do ----------------------------------------------------------------------------
acl_file {place.folder}/{ACCESS_LIST}

# --- Limits: one device must not be able to fill the broker ---------------------------------------
# The largest legitimate message is one block: 64 KiB, at most 96 KiB, plus header and topic.
max_packet_size 131072
# Blocks under way per client (the default of 20 would do; a window is 8).
max_inflight_messages 20
# What may wait for a client that reads slowly. More is dropped, silently, and asked for again by
# whoever misses it. Bytes, because a thousand messages may be 64 kB or 64 MB.
max_queued_messages 200
max_queued_bytes 16777216
# A ceiling for the whole process in bytes; mosquitto refuses what exceeds it.
memory_limit 536870912
max_connections 20000
# A client's keepalive is at most so many seconds, or the broker would not notice that it is gone
# (MQTT 5 clients are told; older ones with more are refused).
max_keepalive 3600
# Small requests and acknowledgements go out at once instead of waiting 40 ms for company.
set_tcp_nodelay true

# --- What it remembers ---------------------------------------------------------------------------
# Little of value: presence and one announcement are retained and are published anew at every
# reconnect; tasks and results live in the coordinator's registry and the devices' outboxes.
# Persistence makes a restart smoother, nothing depends on it. Without the two autosave lines a
# kill or a power cut would lose whatever came since the last half hour.
persistence true
persistence_location {place.data}/
autosave_on_changes true
autosave_interval 1
# Our clients use clean sessions; this ends those that other clients left behind.
persistent_client_expiration 14d

# --- Log -----------------------------------------------------------------------------------------
log_dest syslog
log_type error
log_type warning
log_type notice
connection_messages true
"""


def access_list(fleet: str, shut_out: Sequence[str] = ()) -> str:
    """The access list of one fleet.

    Args:
        fleet: Its name. A wildcard in its place would let a device write into every fleet.
        shut_out: Devices that must not be heard any more, although connected.
    """
    topics = Topics(fleet)
    whole = topics.release.rpartition("/")[0]
    text = f"""\
{_HEADER}# %u is the user name, which is the common name of the client's certificate
# (use_identity_as_username). What is not allowed here is denied. No name of a device or a fleet has
# "+", "#" or "/" in it.

# A device writes below its own name and reads below its own name, and nothing else: it can neither
# speak for another device nor see what another one is sent.
pattern write {topics.up("%u", "#")}
pattern read {topics.down("%u", "#")}

# Everybody may hear that there is a release (an unsigned hint) and whether the coordinator is up.
pattern read {topics.release}
pattern read {topics.coordinator}

# The coordinator. The authority gives no device a name that begins with "fleetprune-".
user {COORDINATOR}
topic read {whole}/up/#
topic write {whole}/down/#
topic write {topics.release}
topic write {topics.coordinator}
topic read {whole}/blocks/+

# Block servers: they answer requests for releases, and say that they are there. A request reaches
# one of them, through a shared subscription, to which the same line applies.
user {BLOCKS}
topic read {topics.up("+", "get")}
topic write {topics.down("+", "block")}
topic write {whole}/blocks/+
topic read {topics.coordinator}
topic read {topics.release}
"""
    if shut_out:
        text += "\n# Revoked: the broker reads this at SIGHUP, and open connections fall silent.\n"
        for device in shut_out:
            text += f"user {device}\ntopic deny {whole}/#\n"
    return text
