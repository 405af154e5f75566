"""An empty gRPC echo on grpc.aio, in one or several processes on one port.

    python -m benchmarks.serving_load_echo --workers 1

Prints its port, answers any unary call with the empty message, and stops when its input ends. It
is the floor under every Python gRPC service: nothing is decoded, nothing computed.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
from typing import Any

import grpc

METHOD = "/hiertcn.v1.Echo/Echo"


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(_empty)


async def _empty(request: bytes, context: Any) -> bytes:
    return b""


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    workers = parser.parse_args().workers
    # Holds the port without listening, so that every worker can be told one number.
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        children = []
        for _ in range(workers):
            child = os.fork()
            if child == 0:
                asyncio.run(_serve(port))
                os._exit(0)
            children.append(child)
        print(port, flush=True)
        sys.stdin.read()
        for child in children:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)


async def _serve(port: int) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    server.add_generic_rpc_handlers((_Echo(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    await server.stop(0)


if __name__ == "__main__":
    main()
