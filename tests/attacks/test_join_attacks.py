"""Somebody between a device that joins and its fleet."""

import hashlib
import ssl
from http import HTTPStatus

import pytest

from fleetprune.errors import ConfigError, TrustError
from fleetprune_agent.join import join
from fleetprune_coordinator import join_server
from tests.access_fleet import join_site, make_fleet, opened

END = b"-----END CERTIFICATE-----"


def padded_authority(folder):
    """An authority whose certificate ends in padding, after which Base64 decoders stop."""
    for i in range(100):
        access = opened(make_fleet(folder / str(i)))
        if b"=\n-----END" in access.authority.pem:
            return access
        access.close()
    raise AssertionError("two of three certificates end in padding")


def test_an_empty_file_of_the_authority_is_not_everybodys(tmp_path):
    """Nobody is trusted by it, least of all whom the device's system trusts."""
    (tmp_path / "ca.pem").touch()
    with join_site(tmp_path / "f") as (access, url, _):
        token = access.make_token("d1", "phone", 60.0)
        with pytest.raises(ConfigError, match="the authority's file holds no certificate"):
            join(url, token, tmp_path / "d1", ca_file=tmp_path / "ca.pem", fingerprint=None)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("appended", "names 2 authorities"),
        ("prepended", "names 2 authorities"),
        ("renamed", "fleet's authority"),
        ("other", "has fingerprint"),
    ],
)
def test_somebody_in_between_names_an_authority(tmp_path, monkeypatch, how, message):
    """The token goes to nobody but who has the key of the authority that was named."""
    honest = padded_authority(tmp_path / "honest")
    told, stolen = honest.authority.fingerprint, []
    token = honest.make_token("d1", "phone", 60.0)
    with join_site(tmp_path / "evil") as (evil, url, _):
        one, two = honest.authority.pem, evil.authority.pem
        sent = {
            "appended": one + two,
            "prepended": two + one,
            "renamed": one + two.replace(b" CERTIFICATE", b" X509 CERTIFICATE") + END,
            "other": two,
        }[how]
        monkeypatch.setattr(join_server._Answers, "ca", lambda _: (HTTPStatus.OK, sent))
        monkeypatch.setattr(
            join_server._Answers, "join", lambda *a: stolen.append(a) or (HTTPStatus.OK, b"{}")
        )
        with pytest.raises(TrustError, match=message):
            join(url, token, tmp_path / "d1", ca_file=None, fingerprint=told)
    assert stolen == []
    honest.close()
    if how in {"appended", "renamed"}:  # an attack: the decoder sees one, TLS believes both
        seen = ssl.PEM_cert_to_DER_cert(sent.decode())
        assert hashlib.sha256(seen).hexdigest() == told
        context = ssl.create_default_context(cadata=sent.decode())
        assert context.cert_store_stats()["x509_ca"] >= 2
