"""The listening socket."""

import asyncio
import socket
from contextlib import closing

from omniserve.base.serving import ServerOptions
from omniserve.server.run import bind


def test_connections_send_small_pieces_at_once() -> None:
    """Without it a body waits 40 ms until the client acknowledges the header, on all requests but the first."""

    async def connect(listener: socket.socket) -> int:
        accepted = asyncio.get_running_loop().create_future()

        async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            made = writer.get_extra_info("socket")
            accepted.set_result(made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(note, sock=listener):
            with closing(socket.create_connection(listener.getsockname()[:2], timeout=10)):
                return int(await asyncio.wait_for(accepted, 10))

    with closing(bind(ServerOptions(port=0))) as listener:
        assert asyncio.run(connect(listener))
