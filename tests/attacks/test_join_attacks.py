"""Somebody between a device that joins and its fleet."""

import hashlib
import ssl
from http import HTTPStatus

import pytest

from fleetprune.errors import ConfigError, TrustError
from fleetprune_agent.join import join
from fleetprune_coordinator import join_server
from tests.access_fleet import join_site, make_fleet, opened


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


@pytest.mark.parametrize("how", ["appended", "prepended", "other"])
def test_a_second_authority_behind_the_one_with_the_fingerprint(tmp_path, monkeypatch, how):
    """The token goes to nobody but who has the key of the authority that was named."""
    honest = padded_authority(tmp_path / "honest")
    told, stolen = honest.authority.fingerprint, []
    token = honest.make_token("d1", "phone", 60.0)
    with join_site(tmp_path / "evil") as (evil, url, _):
        one, two = honest.authority.pem, evil.authority.pem
        sent = {"appended": one + two, "prepended": two + one, "other": two}[how]
        monkeypatch.setattr(join_server._Answers, "ca", lambda _: (HTTPStatus.OK, sent))
        monkeypatch.setattr(
            join_server._Answers, "join", lambda *a: stolen.append(a) or (HTTPStatus.OK, b"{}")
        )
        with pytest.raises(TrustError, match=r"fleet's authority|somebody may be in between"):
            join(url, token, tmp_path / "d1", ca_file=None, fingerprint=told)
    assert stolen == []
    honest.close()
    if how == "appended":  # what makes this an attack: the decoder sees one, TLS believes both
        seen = ssl.PEM_cert_to_DER_cert(sent.decode())
        assert hashlib.sha256(seen).hexdigest() == told
        context = ssl.create_default_context(cadata=sent.decode())
        assert context.cert_store_stats()["x509_ca"] >= 2
