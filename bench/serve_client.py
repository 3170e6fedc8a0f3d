"""The client of bench/serve.py, in a process of its own: raw sockets, so that it takes little from the server's cores.

Reads one JSON job a line, {"port", "path", "bodies", "watch"}, sends all bodies at once and reads the event streams to
their ends. Answers {"seconds", "first", "cpu_seconds", "events", "tails"}: from the first byte sent to the last [DONE];
to the first event with text, with `watch` alone; the processor time of this process; the number of events; the end of
each stream. Without `watch` it looks at its sockets every 10 ms only: a client that wakes up for every token would run
on another machine.
"""

import json
import selectors
import socket
import sys
import time
from typing import Any

PAUSE = 0.01


def run(port: int, path: str, bodies: list[dict[str, Any]], watch: bool) -> dict[str, Any]:
    """One job."""
    requests = []
    for body in bodies:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
        requests.append(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in bodies]
    received = dict.fromkeys(sockets, b"")
    selector = selectors.DefaultSelector()
    for each in sockets:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        each.setblocking(False)
        selector.register(each, selectors.EVENT_READ)
    first, used = None, time.process_time()
    started = time.perf_counter()
    for each, request in zip(sockets, requests, strict=True):
        each.sendall(request)
    while selector.get_map():
        for key, _ in selector.select():
            reader: Any = key.fileobj
            part = reader.recv(1 << 20)
            received[reader] += part
            if first is None and b'"content":"' in received[reader].replace(b'"content":""', b""):
                first = time.perf_counter() - started
            if not part or received[reader].endswith(b"0\r\n\r\n"):
                selector.unregister(reader)
                reader.close()
        if not watch:
            time.sleep(PAUSE)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    events = sum(content.count(b"data: ") for content in received.values())
    tails = [content[-400:].decode(errors="replace") for content in received.values()]
    first = first if watch else None
    return {"seconds": seconds, "first": first, "cpu_seconds": used, "events": events, "tails": tails}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
