"""TLS as a client: whom we believe, who we are, and what went wrong in words."""

import socket
import ssl
import stat
from pathlib import Path

from fleetprune.errors import ConfigError


def client_context(
    ca_file: Path | None, cert_file: Path | None = None, key_file: Path | None = None
) -> ssl.SSLContext:
    """Verifies the server's certificate and name; TLS 1.2 or newer.

    Args:
        ca_file: Certificates to verify with; None: those that the system believes.
        cert_file: Our own certificate, where the server wants one.
        key_file: Its key.

    Raises:
        ConfigError: A file cannot be loaded.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(f"certificates {ca_file} cannot be loaded: {e.strerror or e}") from e
    if cert_file is not None:
        load_certificate(context, cert_file, key_file or cert_file)
    return context


def load_certificate(context: ssl.SSLContext, cert_file: Path, key_file: Path) -> None:
    """Show a certificate from the next connection on.

    Args:
        context: Of a client.
        cert_file: The certificate (PEM).
        key_file: Its key; may be the same file.

    Raises:
        ConfigError: They cannot be loaded, or everybody on this machine can read the key.
    """
    check_private(key_file)
    try:
        context.load_cert_chain(cert_file, key_file)
    except (OSError, ssl.SSLError) as e:
        files = ", ".join(dict.fromkeys((str(cert_file), str(key_file))))
        raise ConfigError(f"certificates {files} cannot be loaded: {e.strerror or e}") from e


def check_private(file: Path) -> None:
    """ConfigError if everybody on this machine can read or replace a secret."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return  # whoever reads it says so
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(f"{file} can be read by everybody on this machine: chmod 600 it")


def explain(error: Exception, timeout_s: float) -> str:
    """Why a connection failed, for people.

    Args:
        error: What was raised.
        timeout_s: How long an answer was waited for.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate does not verify: {error.verify_message}; check ca_file and host"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}; check the port and the certificates"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused; is it running?"
    if isinstance(error, socket.gaierror):
        return "its name is not known; check the host"
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s; is a firewall in between?"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error)
