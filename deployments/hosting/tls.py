"""Development certificates: fal's clients insist on https, and trust what a CA of ours has signed if they are told to.

The CA signs one certificate and its key is then forgotten, so nobody can sign another. Its certificate also says that it is only
good for our names: whoever trusts it does not trust it for the rest of the web.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Self

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deployments.ingress.target_routing import PREFIXES
from engines.errors import ReelrayError

LIFETIME = timedelta(days=365)
OWN_HOSTS = ("localhost", "127.0.0.1", "::1")


class CertificateExists(ReelrayError):
    """There is a certificate already."""


class CertificateMissing(ReelrayError):
    """There is no certificate."""


@dataclass(frozen=True)
class TlsFiles:
    """ca: for clients to trust. bundle: the CA and the public ones, for clients that trust one file. chain, key: for servers."""

    ca: Path
    bundle: Path
    chain: Path
    key: Path

    @classmethod
    def existing(cls, folder: Path) -> Self:
        """The same, if a server can use them. Raises `CertificateMissing`."""
        files = cls.within(folder)
        if not (files.chain.is_file() and files.key.is_file()):
            raise CertificateMissing(f"{folder} has no {files.chain.name} and {files.key.name}: write them with `reelray tls`.")
        return files

    @classmethod
    def within(cls, folder: Path) -> Self:
        """The files in a folder, by the names under which `write_certificate` writes them."""
        folder = folder.absolute()
        return cls(folder / "ca.pem", folder / "bundle.pem", folder / "certificate.pem", folder / "key.pem")


def write_certificate(folder: Path, more_hosts: tuple[str, ...] = (), *, replaces: bool = False) -> TlsFiles:
    """A CA and a certificate of it for this machine, fal's hosts and `more_hosts`. Raises `CertificateExists`, `ReelrayError`."""
    files = TlsFiles.within(folder)
    if files.key.exists() and not replaces:
        raise CertificateExists(f"{folder} has a certificate already. Clients trust its CA: replace it only if you mean to.")
    names = [_general_name(host) for host in dict.fromkeys((*OWN_HOSTS, *PREFIXES, *more_hosts))]
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _ca(ca_key, names)
    chain = _certificate(key, ca, ca_key, names)
    folder.mkdir(parents=True, exist_ok=True)
    files.key.touch(mode=0o600)
    files.key.chmod(0o600)  # of a key that is replaced
    files.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    files.chain.write_bytes(_pem(chain))
    files.ca.write_bytes(_pem(ca))
    files.bundle.write_bytes(_pem(ca) + Path(certifi.where()).read_bytes())
    return files


def _ca(key: ec.EllipticCurvePrivateKey, names: list[x509.GeneralName]) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Reelray development CA")])
    good_for = x509.NameConstraints(permitted_subtrees=[_subtree(name) for name in names], excluded_subtrees=None)
    return (
        _builder(subject, subject, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(good_for, critical=True)
        .sign(key, hashes.SHA256())
    )


def _certificate(
    key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, names: list[x509.GeneralName]
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Reelray")])
    return (
        _builder(subject, ca.subject, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # a client's clock may be behind
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode())
    except ValueError as exc:
        raise ReelrayError(f"{host} is neither a host name nor an address.") from exc


def _subtree(name: x509.GeneralName) -> x509.GeneralName:
    return x509.IPAddress(ip_network(name.value)) if isinstance(name, x509.IPAddress) else name


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
