"""The device's private key, made here, and what proves to the authority that we have it.

Neither needs to stay in memory: both are done by a process that ends. That is `openssl` where it
is installed, as on nearly every device that speaks TLS; otherwise this module in an interpreter of
its own, with the package `cryptography` (`fleetprune[agent-join]`), which would cost the agent
18 MB. Keys go through pipes, never through arguments or files of ours.
"""

import shutil
import subprocess
import sys
from typing import Final, NoReturn

from fleetprune.errors import InstallError, MissingExtraError

WAIT_S: Final = 60.0  # a slow device that has just been started may wait for random numbers


def make_key() -> bytes:
    """A new P-256 key, PEM."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return _child("key", b"")
    arguments = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    return _run([openssl, "genpkey", *arguments], b"")


def make_request(key: bytes, device: str) -> bytes:
    """A certificate request (PKCS #10, PEM) for a name, signed with the key.

    Args:
        key: As `make_key` gave it.
        device: A message `Name`.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        return _child("request", key, device)
    arguments = ["-new", "-key", "/dev/stdin", "-subj", f"/CN={device}", "-config", "/dev/null"]
    return _run([openssl, "req", *arguments], key)


def _child(*arguments: bytes | str) -> bytes:
    what, given, *names = arguments
    command = [
        sys.executable,
        "-P",
        "-m",
        "fleetprune_agent.device_key",
        str(what),
        *map(str, names),
    ]
    return _run(command, given if isinstance(given, bytes) else given.encode())


def _run(command: list[str], given: bytes) -> bytes:
    """Standard output of a command.

    Raises:
        MissingExtraError: There is nothing that could do it.
        InstallError: It failed.
    """
    try:
        done = subprocess.run(  # noqa: S603  (no shell; a name has no special characters)
            command, input=given, capture_output=True, timeout=WAIT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as e:
        raise InstallError(f"{command[0]} cannot make the device's key: {e}") from e
    if b"No module named 'cryptography'" in done.stderr:
        raise MissingExtraError(
            "the device's key needs openssl, which is not installed here: install it, or "
            "pip install 'fleetprune[agent-join]'"
        )
    if done.returncode or b"-----BEGIN " not in done.stdout:
        words = " ".join(done.stderr.decode(errors="replace").split())[-200:]
        raise InstallError(f"{command[0]} cannot make the device's key: {words}")
    return done.stdout


def main() -> NoReturn:
    """What the interpreter of its own does: `key`, or `request NAME` with the key on stdin."""
    from cryptography import x509  # noqa: PLC0415  (only here)
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )

    if sys.argv[1] == "key":
        made = ec.generate_private_key(ec.SECP256R1())
        data = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    else:
        key = load_pem_private_key(sys.stdin.buffer.read(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            sys.exit("not an elliptic curve's key")
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, sys.argv[2])])
        builder = x509.CertificateSigningRequestBuilder().subject_name(name)
        data = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    sys.stdout.buffer.write(data)
    sys.exit(0)


if __name__ == "__main__":
    main()
