"""A server that speaks S3, on this machine, for as long as the tests of a file run."""

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


class S3Server(NamedTuple):
    """A running server; keys and addresses are in the environment."""

    endpoint: str
    log: Path

    def make_bucket(self, name: str) -> str:
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")).close()
        return f"s3://{name}"


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Moto's; it may be installed in any environment whose ``bin`` is on the path."""
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip(
            "moto_server is not on the path: pip install 'moto[server]', in an environment of its own if need be"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("s3") / "server.log"
    environ = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "a-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret-word",
        "AWS_REGION": "us-east-1",
    }
    with log.open("w") as told, pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)], stdout=told, stderr=told, env=os.environ
        )
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(endpoint).close()
                    break
                except urllib.error.HTTPError:
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, "moto_server does not answer"
                    time.sleep(0.2)
            yield S3Server(endpoint, log)
        finally:
            process.kill()
            process.wait()
