import stat
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from deployments.hosting.tls import CertificateExists, CertificateMissing, TlsFiles, write_certificate
from engines.errors import ReelrayError

FALS = ["fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media", "falrun.com", "queue.falrun.com"]


def is_trusted(files: TlsFiles, host: str) -> bool:
    """Whether a client that trusts the CA takes the certificate for this host's."""
    ca, certificate = (x509.load_pem_x509_certificate(file.read_bytes()) for file in (files.ca, files.chain))
    name = x509.IPAddress(ip_address(host)) if host[0].isdigit() or ":" in host else x509.DNSName(host)
    try:
        PolicyBuilder().store(Store([ca])).build_server_verifier(name).verify(certificate, [])
    except VerificationError:
        return False
    return True


@pytest.mark.parametrize("host", [*FALS, "localhost", "127.0.0.1", "::1", "gpu.example", "10.0.0.7"])
def test_clients_that_trust_the_ca_take_the_certificate_for_every_name(tmp_path: Path, host: str) -> None:
    assert is_trusted(write_certificate(tmp_path, ("gpu.example", "10.0.0.7")), host)


@pytest.mark.parametrize("host", ["fal.ai", "example.com", "127.0.0.2"])
def test_it_is_for_no_other_name(tmp_path: Path, host: str) -> None:
    assert not is_trusted(write_certificate(tmp_path), host)


def test_the_ca_is_good_for_our_names_only_and_its_key_is_nowhere(tmp_path: Path) -> None:
    files = write_certificate(tmp_path)
    ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
    constraints = ca.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical
    permitted = constraints.value.permitted_subtrees or []
    assert {name.value for name in permitted if isinstance(name, x509.DNSName)} == {*FALS, "localhost"}
    assert sum(file.read_text().count("PRIVATE KEY-----") for file in tmp_path.iterdir()) == 2, (
        "of the certificate, both its lines"
    )


def test_only_this_user_reads_the_key(tmp_path: Path) -> None:
    assert stat.S_IMODE(write_certificate(tmp_path / "new").key.stat().st_mode) == 0o600


def test_a_ca_that_clients_trust_is_not_replaced_by_accident(tmp_path: Path) -> None:
    before = write_certificate(tmp_path).ca.read_bytes()
    with pytest.raises(CertificateExists):
        write_certificate(tmp_path)
    assert TlsFiles.existing(tmp_path).ca.read_bytes() == before
    assert write_certificate(tmp_path, replaces=True).ca.read_bytes() != before


def test_the_bundle_is_our_ca_and_the_public_ones(tmp_path: Path) -> None:
    files = write_certificate(tmp_path)
    bundle = files.bundle.read_bytes()
    assert bundle.startswith(files.ca.read_bytes())
    assert bundle.count(b"BEGIN CERTIFICATE") > 50


def test_a_folder_without_a_certificate_is_told(tmp_path: Path) -> None:
    with pytest.raises(CertificateMissing, match="reelray tls"):
        TlsFiles.existing(tmp_path)


def test_what_is_no_host_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReelrayError, match="neither a host name nor an address"):
        write_certificate(tmp_path, ("a" * 70,))
