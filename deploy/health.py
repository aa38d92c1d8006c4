"""Ask lp-serve's health service once: exit code 0 = it serves, 1 = it loads, drains or does not answer.

For HEALTHCHECK and similar supervisors, which configure by environment::

    LP_SERVE_HEALTH       address, default 127.0.0.1:50051
    LP_SERVE_HEALTH_CA    PEM file with the CA of the server's certificate; set = TLS
    LP_SERVE_HEALTH_NAME  name in that certificate, default localhost
    LP_SERVE_HEALTH_CERT, LP_SERVE_HEALTH_KEY   the probe's own certificate and key, for mutual TLS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def _file(name: str) -> bytes | None:
    path = os.environ.get(f"LP_SERVE_HEALTH_{name}")
    return Path(path).read_bytes() if path else None


def main() -> int:
    """Ask, print the answer, return the exit code."""
    target = os.environ.get("LP_SERVE_HEALTH", "127.0.0.1:50051")
    try:
        root, key, certificate = (_file(name) for name in ("CA", "KEY", "CERT"))
    except OSError as error:
        print(f"{target}: {error.filename} cannot be read ({error.strerror})")
        return 1
    if root is None:
        channel = grpc.insecure_channel(target)
    else:
        name = os.environ.get("LP_SERVE_HEALTH_NAME", "localhost")
        credentials = grpc.ssl_channel_credentials(root, key, certificate)
        channel = grpc.secure_channel(target, credentials, [("grpc.ssl_target_name_override", name)])
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=4)
        except grpc.RpcError as error:
            print(f"{target}: {error.code().name}")
            return 1
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    print(f"{target}: {'serving' if serving else 'not serving'}")
    return 0 if serving else 1


if __name__ == "__main__":
    sys.exit(main())
