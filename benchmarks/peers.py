"""The programs that are compared with, each started with keys and configuration of its own, on loopback only.

A peer is left out when it is not installed (`install-peers.sh`). Commands copy a file or the contents of a folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.demo.free_port import free_port

CIPHER = "aes128-gcm@openssh.com"


@dataclass(frozen=True)
class Peer:
    """How to copy with it: shell commands for one file and for a folder (None: it cannot), and what protects both."""

    name: str
    wire: str
    file: Callable[[Path, Path], str] | None = None
    folder: Callable[[Path, Path], str] | None = None


def program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


@contextmanager
def running(command: list[str], port: int, **options: Any) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def peers(directory: Path, source: Path) -> Iterator[list[Peer]]:
    """Every peer that is installed, ready to serve what is below ``source``."""
    directory.mkdir(parents=True)
    certificate, key = directory / "tls.pem", directory / "tls.key"
    with ExitStack() as stack:
        found: list[Peer] = [Peer("cp", "local", lambda a, b: f"cp {a} {b}", lambda a, b: f"cp -a {a}/. {b}/")]
        if program("openssl"):
            subprocess.run(
                f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost "
                f"-addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}",
                shell=True,
                check=True,
                stderr=subprocess.DEVNULL,
            )
            if program("nginx") and program("curl"):
                found.append(_nginx(stack, directory, source, certificate, key))
            if program("socat") and program("tar"):
                found.append(_tar_over_tls(certificate, key))
        if program("sshd") and program("ssh-keygen"):
            found += _over_ssh(stack, directory)
        if program("rsync"):
            found.append(_rsync_daemon(stack, directory, source))
        if program("globus-gridftp-server") and program("globus-url-copy"):
            found += _gridftp(stack, directory)
        yield found


def _nginx(stack: ExitStack, directory: Path, source: Path, certificate: Path, key: Path) -> Peer:
    port = free_port()
    config = directory / "nginx.conf"
    config.write_text(
        f"daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log; user root;\n"
        "events {}\nhttp { access_log off; sendfile on; server {\n"
        f"listen 127.0.0.1:{port} ssl; ssl_certificate {certificate}; ssl_certificate_key {key};\n"
        f"ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256; root {source};\n"
        f"client_body_temp_path {directory}/n1; proxy_temp_path {directory}/n2; fastcgi_temp_path {directory}/n3;\n"
        f"uwsgi_temp_path {directory}/n4; scgi_temp_path {directory}/n5; }} }}\n"
    )
    stack.enter_context(running([program("nginx") or "nginx", "-c", str(config)], port))
    return Peer(
        "curl from nginx",
        "TLS 1.3",
        lambda a, b: f"curl -sf --cacert {certificate} -o {b} https://localhost:{port}/{a.relative_to(source)}",
    )


def _tar_over_tls(certificate: Path, key: Path) -> Peer:
    def folder(a: Path, b: Path) -> str:
        port = free_port()
        listen = f"openssl-listen:{port},bind=127.0.0.1,cert={certificate},key={key},verify=0"
        connect = f"openssl-connect:localhost:{port},cafile={certificate},retry=50,interval=0.02"
        return f"socat -u {listen} - | tar xf - -C {b} & tar cf - -C {a} . | socat -u - {connect}; wait"

    return Peer("tar over TLS (socat)", "TLS 1.3", None, folder)


def _over_ssh(stack: ExitStack, directory: Path) -> list[Peer]:
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    port = free_port()
    config = directory / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\nUseDNS no\n"
        "Subsystem sftp internal-sftp\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    stack.enter_context(running([program("sshd") or "sshd", "-D", "-f", str(config)], port))
    options = f"-i {directory}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    options += f" -c {CIPHER}"
    found = [
        Peer(
            "scp",
            "ssh",
            lambda a, b: f"scp -q -P {port} {options} 127.0.0.1:{a} {b}",
            lambda a, b: f"scp -q -r -p -P {port} {options} 127.0.0.1:{a}/. {b}",
        ),
    ]
    if program("rsync"):
        shell = f"ssh -p {port} {options}"
        found.append(
            Peer(
                "rsync over ssh",
                "ssh",
                lambda a, b: f"rsync -a -e '{shell}' 127.0.0.1:{a} {b}",
                lambda a, b: f"rsync -a -e '{shell}' 127.0.0.1:{a}/ {b}/",
            )
        )
    return found


def _rsync_daemon(stack: ExitStack, directory: Path, source: Path) -> Peer:
    port = free_port()
    config = directory / "rsyncd.conf"
    config.write_text(
        f"port = {port}\naddress = 127.0.0.1\nuse chroot = no\nuid = {os.getuid()}\ngid = {os.getgid()}\n"
        f"[source]\npath = {source}\nread only = yes\n"
    )
    stack.enter_context(running(["rsync", "--daemon", "--no-detach", f"--config={config}"], port))
    at = f"rsync://127.0.0.1:{port}/source"
    return Peer(
        "rsync daemon",
        "clear",
        lambda a, b: f"rsync -a {at}/{a.relative_to(source)} {b}",
        lambda a, b: f"rsync -a {at}/{a.relative_to(source)}/ {b}/",
    )


def _gridftp(stack: ExitStack, directory: Path) -> list[Peer]:
    """GridFTP with a certification authority of its own (GSI; the server trusts and maps one user)."""
    place = directory / "gsi"
    trusted = place / "ca"
    trusted.mkdir(parents=True)
    script = f"""set -e
    cd {place}
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj '/O=Bench/CN=CA' -keyout ca.key -out ca.pem
    h=$(openssl x509 -in ca.pem -noout -hash); cp ca.pem ca/$h.0
    printf "access_id_CA X509 '/O=Bench/CN=CA'\\npos_rights globus CA:sign\\n" > ca/$h.signing_policy
    printf "cond_subjects globus '\\"/O=Bench/*\\"'\\n" >> ca/$h.signing_policy
    for n in user localhost; do
      openssl req -newkey rsa:2048 -nodes -subj /O=Bench/CN=$n -keyout $n.key -out $n.csr
      openssl x509 -req -in $n.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out $n.pem
      chmod 600 $n.key
    done"""
    subprocess.run(["sh", "-c", script], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    (place / "gridmap").write_text(f'"/O=Bench/CN=user" {user}\n"/O=Bench/CN=localhost" {user}\n')
    common = {**os.environ, "X509_CERT_DIR": str(trusted), "GRIDMAP": str(place / "gridmap")}
    server = {**common, "X509_USER_CERT": f"{place}/localhost.pem", "X509_USER_KEY": f"{place}/localhost.key"}
    port = free_port()
    command = [program("globus-gridftp-server") or "", "-p", str(port), "-s", "-allow-root"]
    command += ["-control-interface", "127.0.0.1", "-data-interface", "127.0.0.1", "-log-level", "ERROR"]
    stack.enter_context(running([*command, "-logfile", f"{place}/log"], port, env=server))
    client = f"X509_CERT_DIR={trusted} X509_USER_CERT={place}/user.pem X509_USER_KEY={place}/user.key globus-url-copy"
    to = f"gsiftp://localhost:{port}"
    return [
        Peer(
            "GridFTP private",
            "GSI (TLS)",
            lambda a, b: f"{client} -dcpriv file://{a} {to}{b}",
            lambda a, b: f"{client} -r -cd -cc 4 -pp -dcpriv file://{a}/ {to}{b}/",
        ),
        Peer(
            "GridFTP private, checksum",
            "GSI (TLS)",
            lambda a, b: f"{client} -dcpriv -verify-checksum -checksum-alg md5 file://{a} {to}{b}",
        ),
    ]
