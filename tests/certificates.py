"""Certificates for tests, made by openssl; one CA per folder."""

import subprocess
from pathlib import Path


def certify(folder: Path, name: str, *, ca: str = "ca", san: str = "") -> None:
    """`name`.crt and .key, signed by `ca` (itself, if that is its name)."""
    run = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    run += ["-nodes", "-days", "2", "-subj", f"/CN={name}"]
    run += ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.crt")]
    if name != ca:
        run += ["-CA", str(folder / f"{ca}.crt"), "-CAkey", str(folder / f"{ca}.key")]
    if san:
        run += ["-addext", f"subjectAltName={san}"]
    subprocess.run(run, check=True, capture_output=True)
