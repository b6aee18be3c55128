"""Who gets a certificate, for what, and what is refused."""

import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetprune.errors import ConfigError, TrustError
from fleetprune.join_token import Token
from fleetprune_coordinator.access import RENEWALS_A_DAY, DeniedError
from fleetprune_coordinator.authority import (
    Authority,
    Lives,
    init_authority,
    read_request,
)
from fleetprune_coordinator.road_access import may_read, smaller_classes
from tests.access_fleet import Key, admit, make_fleet, opened

DAY = 24 * 3600.0
INVALID = "^the token is not valid \\(any more\\): `fleetprune access token` makes a new one$"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authority") / "access"
    names = {"broker": ["broker.example.org", "192.0.2.1", "::1"], "join": ["join.example.org"]}
    init_authority(folder, "f1", names, datetime(2026, 1, 1, tzinfo=UTC), Lives())
    return Authority(folder)


@pytest.fixture
def fleet(tmp_path):
    return make_fleet(tmp_path)


class Clock:
    def __init__(self):
        self.now = datetime.now(UTC).timestamp()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def access(fleet, clock):
    access = opened(fleet, clock)
    yield access
    access.close()


def test_keys_are_private_and_never_overwritten(authority):
    folder = authority.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keys = sorted(folder.glob("*.key"))
    assert [k.name for k in keys] == [
        "blocks.key",
        "broker.key",
        "ca.key",
        "coordinator.key",
        "join.key",
    ]
    assert {stat.S_IMODE(k.stat().st_mode) for k in keys} == {0o600}
    before = {k.name: k.read_bytes() for k in keys}
    with pytest.raises(ConfigError) as e:
        init_authority(folder, "f1", {}, datetime.now(UTC), Lives())
    assert str(e.value) == (
        f"{folder} already holds keys or files, expected a new or empty folder: "
        "keys are never overwritten"
    )
    assert {k.name: k.read_bytes() for k in keys} == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["access"]


def test_certificates_say_what_they_are_for(authority):
    def read(name):
        return x509.load_pem_x509_certificate((authority.folder / f"{name}.crt").read_bytes())

    broker, coordinator = read("broker"), read("coordinator")
    assert authority.own_names("broker") == ["broker.example.org", "192.0.2.1", "::1"]
    assert coordinator.subject.rfc4514_string() == "CN=fleetprune-coordinator"
    assert read("blocks").subject.rfc4514_string() == "CN=fleetprune-blocks"
    usage = {
        c: list(c.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        for c in (broker, coordinator)
    }
    assert usage[broker] == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert usage[coordinator] == [ExtendedKeyUsageOID.CLIENT_AUTH]
    for certificate in (broker, coordinator):
        certificate.verify_directly_issued_by(authority.certificate)
    assert broker.not_valid_after_utc == datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=730)


def test_no_certificate_outlives_the_authority(authority):
    now = datetime(2045, 6, 1, tzinfo=UTC)
    asked = read_request(Key.new().request("d1"), "d1")
    made = authority.certify(asked, now, timedelta(days=3650))
    assert made.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_a_request_gives_its_key_and_nothing_else(authority):
    """Whatever it asks for: it may not become an authority or a server."""
    key = Key.new().key
    wishes = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "d1")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("broker")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    asked = read_request(wishes.public_bytes(Encoding.PEM).decode(), "d1")
    made = authority.certify(asked, datetime.now(UTC), timedelta(days=2))
    assert made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    with pytest.raises(x509.ExtensionNotFound):
        made.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert made.public_key() == key.public_key()


def csr(name_attributes, key=None):
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(name_attributes))
    key = key or ec.generate_private_key(ec.SECP256R1())
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


CN, OU = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME


@pytest.mark.parametrize(
    ("pem", "message"),
    [
        (
            csr([x509.NameAttribute(CN, "d2")]),
            "certificate request for 'CN=d2', expected 'CN=d1'",
        ),
        (
            csr([x509.NameAttribute(CN, "fleetprune-coordinator")]),
            "certificate request for 'CN=fleetprune-coordinator', expected 'CN=d1'",
        ),
        (
            csr([x509.NameAttribute(CN, "d1"), x509.NameAttribute(CN, "d2")]),
            "certificate request for 'CN=d2,CN=d1', expected 'CN=d1'",
        ),
        (
            csr([x509.NameAttribute(OU, "x"), x509.NameAttribute(CN, "d1")]),
            "certificate request for 'CN=d1,OU=x', expected 'CN=d1'",
        ),
        (
            csr([x509.NameAttribute(CN, "d1")], rsa.generate_private_key(65537, 2048)),
            "certificate request with a key that is neither P-256, P-384 nor Ed25519",
        ),
        ("x" * 9000, "certificate request of 9000 bytes, expected at most 8192"),
    ],
    ids=["other", "coordinator", "two names", "more", "rsa", "long"],
)
def test_requests_that_are_refused(pem, message):
    with pytest.raises(TrustError) as e:
        read_request(pem, "d1")
    assert str(e.value) == message


def test_a_request_is_signed_by_its_own_key():
    """A public key that somebody has seen is not one that he has."""
    mine, other = csr([x509.NameAttribute(CN, "d1")]), csr([x509.NameAttribute(CN, "d1")])
    request = x509.load_pem_x509_csr(mine.encode())
    foreign = x509.load_pem_x509_csr(other.encode())
    der = request.public_bytes(Encoding.DER)
    info, theirs = request.tbs_certrequest_bytes, foreign.tbs_certrequest_bytes
    if len(info) != len(theirs):
        pytest.fail("the two requests differ in length")
    forged = der.replace(info, theirs)
    pem = x509.load_der_x509_csr(forged).public_bytes(Encoding.PEM).decode()
    with pytest.raises(TrustError, match=r"^certificate request is not signed with its own key$"):
        read_request(pem, "d1")


@pytest.mark.parametrize("cut", range(0, 340, 23))
def test_a_request_that_was_cut_is_refused(cut):
    with pytest.raises(TrustError, match=r"^certificate request cannot be read: "):
        read_request(Key.new().request("d1")[:cut], "d1")


# ---- tokens


def test_a_token_is_kept_as_a_salted_hash_only(access, fleet):
    token = Token.parse(access.make_token("d1", "phone", DAY))
    assert token is not None
    assert token.device == "d1"
    assert repr(token) == f"Token(id='{token.id}', device='d1')"
    files = [p for p in fleet.state.rglob("*") if p.is_file()]
    assert any(token.id.encode() in p.read_bytes() for p in files)
    assert not any(token.secret.encode() in p.read_bytes() for p in files)


def test_a_token_lets_one_key_in(access):
    key, other = Key.new(), Key.new()
    token = access.make_token("d1", "phone", DAY)
    first = access.join(token, key.request("d1"))
    assert (first.device, first.device_class) == ("d1", "phone")
    again = access.join(token, key.request("d1"))  # the answer was lost
    assert again == first
    with pytest.raises(DeniedError) as e:
        access.join(token, other.request("d1"))
    assert str(e.value) == ("the token has been used by another key: if that was not d1, revoke it")
    assert access.gate.refusal("d1") is None
    assert access.gate.device_class("d1") == "phone"


def test_two_at_once_with_one_token(fleet):
    """Two processes' worth of connections: exactly one of ten keys wins, again and again."""
    books = [opened(fleet) for _ in range(10)]
    token = books[0].make_token("d1", "phone", DAY)
    start, won, lost = threading.Barrier(10), [], []

    def run(access):
        key = Key.new()
        start.wait()
        try:
            won.append(access.join(token, key.request("d1")))
        except DeniedError as e:
            lost.append(str(e))

    threads = [threading.Thread(target=run, args=(a,)) for a in books]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 9)
    for access in books:
        access.close()


def test_tokens_that_do_not_hold(access, clock):
    key = Key.new()
    token = access.make_token("d1", "phone", DAY)
    id_, secret, _ = token.split(".")
    for wrong in (
        "",
        "x",
        f"{id_}.{secret[:-1]}{'A' if secret[-1] != 'A' else 'B'}.d1",
        f"{'0' * 12}.{secret}.d1",
        f"{id_}.{secret}.d2",
    ):
        with pytest.raises(DeniedError, match=INVALID):
            access.join(wrong, key.request("d1"))
    with pytest.raises(TrustError, match=r"^certificate request for 'CN=d2', expected 'CN=d1'$"):
        access.join(token, key.request("d2"))
    assert access.devices() == []  # nothing was used up
    clock.now += DAY
    with pytest.raises(DeniedError, match=INVALID):
        access.join(token, key.request("d1"))


def test_a_new_token_voids_the_earlier_one(access):
    first = access.make_token("d1", "phone", DAY)
    second = access.make_token("d1", "tablet", DAY)
    with pytest.raises(DeniedError, match=INVALID):
        access.join(first, Key.new().request("d1"))
    assert access.join(second, Key.new().request("d1")).device_class == "tablet"


@pytest.mark.parametrize("name", ["+", "#", "a/b", "a+", "", "-a", "a b", "x" * 65, "ä", "$SYS"])
def test_names_that_would_break_an_access_list(access, name):
    with pytest.raises(ConfigError) as e:
        access.make_token(name, "phone", DAY)
    assert str(e.value) == (
        f"device name {name!r}, expected at most 64 letters, digits, '.', '_' and '-'"
    )


@pytest.mark.parametrize("name", ["fleetprune-coordinator", "fleetprune-x", "Fleetprune-blocks"])
def test_our_own_names_are_not_for_devices(access, name):
    with pytest.raises(ConfigError) as e:
        access.make_token(name, "phone", DAY)
    assert str(e.value) == f"device name {name!r}: names that begin with fleetprune- are ours"


# ---- renewal and revocation


def test_a_device_renews_with_a_new_key(access, clock):
    admit(access, "d1")
    clock.now += 130 * DAY
    key = Key.new()
    made = access.renew("d1", key.request("d1"))
    assert access.renew("d1", key.request("d1")) == made  # the answer was lost
    ends = x509.load_pem_x509_certificate(made.encode()).not_valid_after_utc
    assert ends.timestamp() == pytest.approx(clock.now + 180 * DAY, abs=2)
    assert access.devices()[0].not_after == pytest.approx(clock.now + 180 * DAY, abs=2)


def test_who_may_not_renew(access):
    with pytest.raises(DeniedError) as e:
        access.renew("d1", Key.new().request("d1"))
    assert str(e.value) == (
        "device d1 has not joined this fleet: `fleetprune access token` lets it in"
    )
    key, _ = admit(access, "d1")
    admit(access, "d2")
    with pytest.raises(TrustError, match=r"^certificate request for 'CN=d2', expected 'CN=d1'$"):
        access.renew("d1", Key.new().request("d2"))
    with pytest.raises(DeniedError, match=r"^this key was revoked or is another device's: "):
        access.renew("d2", key.request("d2"))
    for _ in range(RENEWALS_A_DAY - 1):  # joining was one
        access.renew("d1", Key.new().request("d1"))
    with pytest.raises(DeniedError, match=r"^more than 8 certificates a day for d1$"):
        access.renew("d1", Key.new().request("d1"))


def test_a_revoked_device_is_out_until_a_new_token(access, fleet):
    key, pem = admit(access, "d1")
    admit(access, "d2")
    unused = access.make_token("d1", "phone", DAY)
    watcher = opened(fleet)  # as another process would
    assert watcher.gate.refusal("d1") is None
    access.revoke("d1", "stolen")
    for either in (access, watcher):
        assert either.gate.refusal("d1") == "device d1 is revoked: stolen"
        assert either.gate.refusal("d2") is None
    with pytest.raises(DeniedError, match=r"^device d1 is revoked: stolen$"):
        watcher.renew("d1", Key.new().request("d1"))
    with pytest.raises(DeniedError, match=INVALID):
        watcher.join(unused, Key.new().request("d1"))
    crl = x509.load_pem_x509_crl(access.revocations())
    serial = x509.load_pem_x509_certificate(pem.encode()).serial_number
    assert [r.serial_number for r in crl] == [serial]
    assert crl.is_signature_valid(access.authority.certificate.public_key())
    assert crl.next_update_utc == access.authority.certificate.not_valid_after_utc
    assert access.shut_out() == ["d1"]

    token = access.make_token("d1", "phone", DAY)
    assert access.shut_out() == []  # so that it can be heard when it has joined
    assert watcher.gate.refusal("d1") == "device d1 is revoked: stolen"
    with pytest.raises(DeniedError, match=r"^this key was revoked or is another device's: "):
        access.join(token, key.request("d1"))
    access.join(token, Key.new().request("d1"))
    assert watcher.gate.refusal("d1") is None
    assert len(list(x509.load_pem_x509_crl(access.revocations()))) == 1  # the old one stays out
    watcher.close()


def test_revoking_nobody(access):
    with pytest.raises(ConfigError, match=r"^no device d9 has joined: `fleetprune access list`$"):
        access.revoke("d9", "")


# ---- what of the road a device may read

H = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("metadata/timestamp.json", True),
        ("metadata/1.root.json", True),
        ("metadata/", False),
        ("metadata/.x", False),
        ("metadata/a/b", False),
        (f"targets/graphs/{H}.{H}.onnx", True),
        ("targets/graphs/x.onnx", False),
        (f"targets/rollouts/{H}.phone.json", True),
        (f"targets/rollouts/{H}.tablet.json", False),
        (f"targets/rollouts/{H}.tablet.phone.json", False),
        ("targets/rollouts/phone.json", False),
        (f"targets/releases/phone/3/{H}.model.onnx", True),
        (f"targets/releases/watch/3/{H}.manifest.json", True),
        (f"targets/releases/tablet/3/{H}.model.onnx", False),
        (f"targets/releases/phone/x/{H}.model.onnx", False),
        (f"targets/releases/phone/../tablet/3/{H}.model.onnx", False),
        (f"targets/releases/phone/{H}.model.onnx", False),
        (f"blobs/{'a' * 64}", True),
        (f"blobs/{'b' * 64}", False),
        ("blobs/../keys", False),
        ("keys/root.pem", False),
        ("", False),
        ("/etc/passwd", False),
    ],
)
def test_a_device_reads_its_own_class_s_road(name, allowed):
    assert may_read(name, "phone", lambda: {"watch"}, lambda sha: sha == "a" * 64) is allowed


def test_smaller_classes_one_after_the_other():
    chain = {"tablet": "phone", "phone": "watch", "loop": "loop2", "loop2": "loop"}
    assert smaller_classes("tablet", chain.get) == {"phone", "watch"}
    assert smaller_classes("watch", chain.get) == set()
    assert smaller_classes("loop", chain.get) == {"loop2"}
