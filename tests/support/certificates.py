"""Certificates for the tests of TLS, made by the openssl program."""

import subprocess


def openssl(*args):
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)


class Authority:
    """A certificate authority of its own, in a directory of its own."""

    def __init__(self, directory, name="epserve test authority"):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.key = directory / "ca.key"
        self.cert = directory / "ca.pem"
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", self.key, "-out", self.cert, "-days", "2", "-subj", f"/CN={name}"),
        )

    def issue(self, name, *roles, days=1):
        """Identity of `name` with the given roles, good for localhost too; days < 0: expired."""
        key = self.directory / f"{name}.key"
        request = self.directory / f"{name}.csr"
        cert = self.directory / f"{name}.pem"
        extensions = self.directory / f"{name}.ext"
        names = ["DNS:localhost", "IP:127.0.0.1"]
        names += [f"URI:spiffe://tests/epserve/{role}" for role in roles]
        extensions.write_text(f"subjectAltName={','.join(names)}\n")
        openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", key, "-out", request, "-subj", f"/CN={name}"),
        )
        openssl(
            *("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key),
            *("-CAcreateserial", "-out", cert, "-extfile", extensions, "-days", days),
        )
        return Identity(cert, key, self.cert)


class Identity:
    def __init__(self, cert, key, ca):
        self.cert, self.key, self.ca = cert, key, ca

    @property
    def flags(self):
        return [f"--tls-cert={self.cert}", f"--tls-key={self.key}", f"--tls-ca={self.ca}"]
