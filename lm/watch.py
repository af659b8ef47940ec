"""The watch over a run's processes: when one dies, the others end too and say which it was.

Every process starts this file as a child, by its path: it needs the standard library alone, and
outlives its parent, whatever that dies of (a signal, memory, an abort within a library), by long
enough to tell. The watches are a star around process 0's; parents and watches exchange words, a
line of JSON each. ``lm.hosts`` is the parent's side.

    hello    a watch to another      who it is, and of how many
    ready    a watch to all          all processes are there
    here     a parent to process 0   it waits for all others, and what it says
    agreed   process 0 to all        a value that all go on with
    failed   a parent to all         its exit code and reason: all shall end
    left     a parent to all         it has done its part
    end      a watch to its parent   exit with this code; the reason is on standard error too
"""

import asyncio
import json
import os
import signal
import socket
import sys

JOINING_SECONDS = 300.0  # hosts start at different times
PING_SECONDS, SILENCE_SECONDS = 5.0, 30.0  # a host without power closes no connection
GRACE_SECONDS = 2.0  # another's death can break a process before the news of it is here
PATIENCE_SECONDS = 5.0  # with a parent that shall end
LONGEST_WORD = 2**24


class Watch:
    """Of process ``index`` of ``n``; the watches meet at ``host``:``port``, process 0's."""

    def __init__(self, index: int, n: int, host: str, port: int):
        self.index, self.n, self.host, self.port = index, n, host, port
        self.name = f"process {index} ({socket.gethostname()})"
        self.parent, self.parent_ended = os.getppid(), asyncio.Event()
        self.others: dict[int, asyncio.StreamWriter] = {}
        self.left: set[int] = set()
        self.ready, self.ending = asyncio.Event(), False

    async def run(self) -> None:
        """Watches; ends this process."""
        watching = [asyncio.create_task(self.hear_parent()), asyncio.create_task(self.ping())]
        try:
            async with asyncio.timeout(JOINING_SECONDS):
                await (self.join() if self.index else self.gather())
                await self.ready.wait()
        except TimeoutError:
            absent = [str(i) for i in range(1, self.n) if i not in self.others]
            told = "not all" if self.index else f"not process {', '.join(absent)}"
            await self.end(1, f"{told} of {self.n} processes came to {self.host}:{self.port}")
        await asyncio.gather(*watching)

    async def gather(self) -> None:
        """Process 0 lets the others come."""
        try:
            here = "localhost" if self.host == "localhost" else None  # None: all of its addresses
            await asyncio.start_server(self.meet, here, self.port, limit=LONGEST_WORD)
        except OSError as error:
            await self.end(1, f"{self.name} cannot listen on port {self.port}: {error.strerror}")

    async def join(self) -> None:
        """Any other comes to process 0, which may not be there yet."""
        while not self.others:
            try:
                streams = await asyncio.open_connection(self.host, self.port, limit=LONGEST_WORD)
            except OSError:
                await asyncio.sleep(0.2)
            else:
                streams[1].write(self.hello())
                self.meeting = asyncio.create_task(self.meet(*streams))
                await asyncio.wait((self.meeting,), timeout=1)

    def hello(self) -> bytes:
        """This watch's first word."""
        return _line({"hello": [self.index, self.name, self.n]})

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hears another, from its first word on."""
        try:
            index, name, n = json.loads(await reader.readline())["hello"]
        except (ValueError, LookupError, TypeError, OSError):
            return writer.close()  # no process of this run
        if not self.index:
            writer.write(self.hello())
        if n != self.n:
            await self.end(1, f"{self.name} is one of {self.n} processes, but {name} one of {n}")
        if index in self.others or index == self.index:
            await self.end(1, f"{name}: another process has that number too")
        self.others[index] = writer
        if not self.index and len(self.others) == self.n - 1:
            self.tell({"ready": True})
            self.to_parent({"ready": True})
            self.ready.set()
        await self.hear(reader, index, name)

    async def hear(self, reader: asyncio.StreamReader, index: int, name: str) -> None:
        """Acts on the words of another until it has left or is gone."""
        while index not in self.left:
            try:
                line = await asyncio.wait_for(reader.readline(), SILENCE_SECONDS)
            except TimeoutError:
                await self.end(1, f"{name} was silent for {SILENCE_SECONDS:.0f} s: lost")
            except OSError:
                line = b""
            if not line:
                await self.end(1, f"{name} died")
            word = json.loads(line)
            if "failed" in word:
                await self.end(*word["failed"])
            elif "left" in word:
                self.left.add(index)
                del self.others[index]
            elif word.keys() & {"ready", "here", "agreed"}:
                self.to_parent(word)
                self.ready.set()

    async def hear_parent(self) -> None:
        """Acts on the parent's words until it has left or is gone."""
        reader = asyncio.StreamReader(limit=LONGEST_WORD)
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        while line := await reader.readline():
            word = json.loads(line)
            if "left" in word:
                self.tell(word)
                await self.sent()
                os._exit(0)
            elif "failed" in word:
                asyncio.create_task(self.end(*word["failed"], own=True))
            else:
                self.tell(word)
        self.parent_ended.set()
        if self.index:
            await asyncio.sleep(GRACE_SECONDS)
        await self.end(1, f"{self.name} died")

    async def ping(self) -> None:
        """Lets the others know that this host is there."""
        while True:
            self.tell({})
            await asyncio.sleep(PING_SECONDS)

    async def end(self, code: int, reason: str, own: bool = False) -> None:
        """Tells all, ends the parent, and then this process; the first call alone does."""
        if self.ending:
            await asyncio.Event().wait()
        self.ending = True
        self.tell({"failed": [code, reason]})
        if not own:
            print(f"error: {reason}", file=sys.stderr, flush=True)
        self.to_parent({"end": code, "reason": reason})
        await self.sent()
        try:
            await asyncio.wait_for(self.parent_ended.wait(), PATIENCE_SECONDS)
        except TimeoutError:
            if os.getppid() == self.parent:
                os.kill(self.parent, signal.SIGKILL)
        os._exit(0)

    def tell(self, word: dict) -> None:
        """To all others."""
        for writer in self.others.values():
            writer.write(_line(word))

    async def sent(self) -> None:
        """Waits for what was told to be on its way."""
        drains = [asyncio.create_task(writer.drain()) for writer in self.others.values()]
        if drains:
            await asyncio.wait(drains, timeout=PATIENCE_SECONDS)

    def to_parent(self, word: dict) -> None:
        """To the parent, if it lives."""
        try:
            print(json.dumps(word), flush=True)
        except BrokenPipeError:
            self.parent_ended.set()


def _line(word: dict) -> bytes:
    return json.dumps(word).encode() + b"\n"


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when its parent has
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(Watch(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])).run())
