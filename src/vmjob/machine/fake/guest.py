"""The guest of a simulated machine: the real agent, with programs that are no processes.

All of it runs on this process's event loop (`GuestLoop`), except transfers of files, which the
agent serves in a process of their own and this in a thread (`FileServer`). Both stand still and go
on when they are told to, and everything that the guest knows can be taken out and put in again.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import socket
import tarfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vmjob.guest.agent import wire
from vmjob.guest.agent.channel import Channel
from vmjob.guest.agent.data import DataServer
from vmjob.guest.agent.identity import SEED_LENGTH
from vmjob.guest.agent.lane import Lane
from vmjob.guest.agent.loop import READ, WRITE, Loop
from vmjob.guest.agent.place import Place
from vmjob.guest.agent.request import Request
from vmjob.guest.agent.server import Agent
from vmjob.guest.agent.spawn import CannotStart
from vmjob.guest.agent.tasks import RUSAGE_FIELDS, Task, TaskTable
from vmjob.machine.fake.programs import LONGEST_LINE, PROGRAMS, World

__all__ = ["Guest", "unpack_files"]

#: Hears what the guest's agent died of.
Failed = Callable[[BaseException], None]


class GuestLoop(Loop):
    """The agent's loop on asyncio's: readiness and moments that can stand still."""

    def __init__(self, failed: Failed) -> None:
        super().__init__()
        self._asyncio = asyncio.get_running_loop()
        self._failed = failed
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        #: By key: seconds left when the guest stands still, else the timer; and what to call.
        self._timers: dict[object, asyncio.TimerHandle] = {}
        self._calls: dict[object, tuple[float, Callable[[], None]]] = {}
        self._still = False

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        self._disarm(fd)
        self._watched[fd] = (events, callback)
        self._arm(fd)

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None):
            self._disarm(fd)

    def later(self, key: object, seconds: float, callback: Callable[[], None]) -> None:
        self.forget(key)
        self._calls[key] = (self._now() + seconds, callback)
        self._start(key)

    def sooner(self, key: object, seconds: float) -> None:
        moment, callback = self._calls[key]
        self.later(key, min(moment - self._now(), seconds), callback)

    def forget(self, key: object) -> None:
        self._calls.pop(key, None)
        if timer := self._timers.pop(key, None):
            timer.cancel()

    def run(self) -> None:
        """Nothing: asyncio's loop runs already."""

    def stand_still(self) -> None:
        """Call nobody until `go_on`; time passes for nobody."""
        if self._still:
            return
        self._stopped_at = self._now()
        self._still = True
        for fd in self._watched:
            self._disarm(fd)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def go_on(self) -> None:
        if not self._still:
            return
        self._still = False
        lost = self._asyncio.time() - self._stopped_at
        self._calls = {key: (moment + lost, call) for key, (moment, call) in self._calls.items()}
        for fd in self._watched:
            self._arm(fd)
        for key in self._calls:
            self._start(key)

    def close(self) -> None:
        self.stand_still()
        self._watched.clear()
        self._calls.clear()

    def _now(self) -> float:
        return self._stopped_at if self._still else self._asyncio.time()

    def _start(self, key: object) -> None:
        if not self._still:
            self._timers[key] = self._asyncio.call_at(self._calls[key][0], self._come, key)

    def _come(self, key: object) -> None:
        self._timers.pop(key, None)
        _, call = self._calls.pop(key)
        self._guard(call)

    def _arm(self, fd: int) -> None:
        if self._still:
            return
        events, _ = self._watched[fd]
        if events & READ:
            self._asyncio.add_reader(fd, self._ready, fd, READ)
        if events & WRITE:
            self._asyncio.add_writer(fd, self._ready, fd, WRITE)

    def _disarm(self, fd: int) -> None:
        self._asyncio.remove_reader(fd)
        self._asyncio.remove_writer(fd)

    def _ready(self, fd: int, event: int) -> None:
        # What was called before may have taken either away.
        events, callback = self._watched.get(fd, (0, None))
        if callback and events & event and not self._still:
            self._guard(lambda: callback(event))

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever the agent dies of, its machine ends
            self._failed(error)


class Gate:
    """Lets a thread run only while the machine does: it holds a lock whenever it does not wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()

    def enter(self) -> None:
        """In the thread: run, as soon as the gate is open."""
        while True:
            self._open.wait()
            self._lock.acquire()
            if self._open.is_set():
                return
            self._lock.release()

    def leave(self) -> None:
        """In the thread: wait for something else."""
        self._lock.release()

    def close(self) -> None:
        """Returns when the thread runs no more: it passes the gate with every piece."""
        self._open.clear()
        with self._lock:
            pass

    def open(self) -> None:
        self._open.set()


class GatedChannel(Channel):
    """A channel of a thread that a gate stops: before each piece, and while it waits."""

    def __init__(self, fd: int, gate: Gate) -> None:
        super().__init__(fd, wire.MAX_REQUEST_PIECE, interruptible=True)
        self._gate = gate

    def _fill(self, wait: float | None) -> None:
        self._pass()
        super()._fill(wait)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._pass()
        super().write(data)

    def _wait(self, events: int, seconds: float | None) -> int:
        self._gate.leave()
        try:
            return super()._wait(events, seconds)
        finally:
            self._gate.enter()

    def _pass(self) -> None:
        self._gate.leave()
        self._gate.enter()


class FileServer:
    """The agent's data lane, in a thread; it ends when the lane is shut."""

    def __init__(self, place: Place, lane: socket.socket) -> None:
        self.gate = Gate()
        self._place = place
        self._lane = lane
        self._thread = threading.Thread(target=self._serve, name="simulated data lane", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Shut the lane; the thread then ends by itself (`join`)."""
        with contextlib.suppress(OSError):
            self._lane.shutdown(socket.SHUT_RDWR)
        self.gate.open()

    def join(self) -> None:
        self._thread.join()

    def _serve(self) -> None:
        with self._lane:
            self.gate.enter()
            try:
                DataServer(self._place).answer(GatedChannel(self._lane.fileno(), self.gate))
            finally:
                self.gate.leave()


class SimulatedPlace(Place):
    """Directories of the simulated machine; nothing of this process is changed for them."""

    def prepare(self) -> None:
        Path(self.workdir).mkdir(exist_ok=True)
        Path(self.run).mkdir(exist_ok=True)
        os.mkfifo(self.to_host, 0o600)
        os.close(os.open(self.from_host, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


class SimulatedTask(Task):
    """One run of a program; ``began`` in ticks."""

    def __init__(self, number: int, argv: list[str], began: int) -> None:
        super().__init__(number, None, None)
        self.pid = 1000 + number
        self.argv = argv
        self.began = began
        self.state: dict[str, Any] = {}


class Programs(TaskTable):
    """The agent's task table with programs in place of processes; time passes in ticks.

    In each tick of ``tick`` seconds every program makes ``steps`` steps, as long as its output is
    taken. While none runs no tick passes. ``ticked(count)`` says whether the machine goes on.
    """

    def __init__(self, place: Place, loop: Loop, changed: Callable[[], None], world: World,
                 tick: float, steps: int, ticked: Callable[[int], bool]) -> None:
        super().__init__(place, loop, changed)
        self.ticks = 0
        self._world = world
        self._tick = tick
        self._steps = steps
        self._ticked = ticked

    def start(self, asked: dict[str, Any]) -> Task:
        argv = asked["argv"]
        if argv[0] not in PROGRAMS:
            raise CannotStart("not-found", f"there is no program {argv[0]!r} in the machine")
        self.epoch += 1
        task = SimulatedTask(self.epoch, argv, self.ticks)
        if asked.get("stdin") == "stream":
            task.stdin = 0  # open; there is no descriptor
        elif argv[0] == "cat":
            task.argv = ["true"]
        self.tasks[task.id] = task
        self._changed()
        self.go_on()
        return task

    def signal(self, task: Task, number: int, why: str | None = None) -> None:
        """Every signal that says anything ends a program."""
        if task.exit is None and number not in (0, signal.SIGCONT):
            task.ended_by = task.ended_by or why
            self._end(task, None, number)
            self._changed()

    def tidy(self) -> None:
        for task in list(self.tasks.values()):
            self.forget(task)

    def write_stdin(self, task: Task, offset: int, data: bytes) -> int:
        if offset > task.stdin_taken:
            raise ValueError("input with a gap")
        rest = data[task.stdin_taken - offset:]
        assert isinstance(task, SimulatedTask)
        if task.stdin is not None and rest and task.argv[0] != "cat":
            self.close_stdin(task)
        elif task.stdin is not None:
            window = task.windows["stdout"]
            taken = rest[:max(0, window.room)]
            window.append(taken)
            task.stdin_taken += len(taken)
            self._changed()
        return task.stdin_taken

    def when_writable(self, task: Task, call: Callable[[], None]) -> None:
        if task.stdin is None:
            call()
        else:
            task.on_room = call

    def stop_waiting(self, task: Task) -> None:
        task.on_room = None

    def close_stdin(self, task: Task) -> None:
        if task.stdin is None:
            return
        task.stdin = None
        self._room(task)
        assert isinstance(task, SimulatedTask)
        if task.argv[0] == "cat" and task.exit is None:
            self._end(task, 0, None)
            self._changed()

    def acknowledge(self, task: Task, stream: str, offset: int) -> None:
        window = task.windows[stream]
        window.acknowledge(offset)
        if window.room > 0:
            self._room(task)

    def go_on(self) -> None:
        """Let ticks pass while a program runs."""
        if any(task.exit is None for task in self.tasks.values()):
            self._loop.later("tick", self._tick, self._pass_tick)

    def _pass_tick(self) -> None:
        self.ticks += 1
        if not self._ticked(self.ticks):
            return
        news = False
        for task in list(self.tasks.values()):
            if task.exit is None and isinstance(task, SimulatedTask):
                news = self._run(task) or news
        self.go_on()
        if news:
            self._changed()

    def _run(self, task: SimulatedTask) -> bool:
        """Some steps of one program; whether there is anything to tell."""
        window = task.windows["stdout"]
        before = window.end
        for _ in range(self._steps):
            if window.room < LONGEST_LINE:
                break
            try:
                output, code = PROGRAMS[task.argv[0]](task.argv[1:], task.state, self._world)
            except (ValueError, IndexError) as error:
                task.windows["stderr"].append(f"{task.argv[0]}: {error}\n".encode())
                output, code = b"", 2
            window.append(output)
            if code is not None:
                self._end(task, code, None)
                return True
        return window.end > before

    def _end(self, task: Task, code: int | None, number: int | None) -> None:
        assert isinstance(task, SimulatedTask)
        task.exit = {"exit_code": code, "signal": number,
                     "wall_seconds": (self.ticks - task.began) * self._tick,
                     "rusage": dict.fromkeys(RUSAGE_FIELDS, 0.0)}
        task.end = {**task.exit, "oom_kills": 0, "cpu_seconds": None, "memory_peak_bytes": None,
                    "ended_by": task.ended_by}
        self.close_stdin(task)
        if task.id in self.abandoned:
            self.abandoned.discard(task.id)
            self.forget(task)

    def saved(self) -> dict[str, Any]:
        tasks = [{
            "id": task.id, "argv": task.argv, "began": task.began, "state": dict(task.state),
            "stdin": task.stdin, "stdin_taken": task.stdin_taken, "exit": task.exit,
            "end": task.end, "ended_by": task.ended_by,
            "windows": {stream: [window.base, window.read(window.base, wire.STREAM_WINDOW * 2)[1]]
                        for stream, window in task.windows.items()}}
            for task in self.tasks.values() if isinstance(task, SimulatedTask)]
        return {"epoch": self.epoch, "abandoned": sorted(self.abandoned), "ticks": self.ticks,
                "tasks": tasks}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.epoch, self.ticks = saved["epoch"], saved["ticks"]
        self.abandoned = set(saved["abandoned"])
        for each in saved["tasks"]:
            task = SimulatedTask(each["id"], each["argv"], each["began"])
            for key in ("state", "stdin", "stdin_taken", "exit", "end", "ended_by"):
                setattr(task, key, each[key])
            for stream, (base, held) in each["windows"].items():
                task.windows[stream].base = base
                task.windows[stream].append(held)
            self.tasks[task.id] = task
        self.go_on()


class Guest(Agent):
    """The agent in a simulated machine, and all else that is in there."""

    def __init__(self, workdir: str, run: str, lanes: Mapping[str, socket.socket], *, tick: float,
                 steps: int, ticked: Callable[[int], bool], failed: Failed,
                 over: Callable[[], None]) -> None:
        super().__init__(SimulatedPlace(workdir, run, None, None))
        self._over = over
        self.loop = GuestLoop(failed)
        world = World(workdir, self._say)
        self.programs = Programs(self.place, self.loop, self._tell, world, tick, steps, ticked)
        self.table = self.programs
        self.loop.watch(self.messages.fd, READ, self._heard)
        #: Every seed that the host gave when the machine continued.
        self.seeds: list[bytes] = []
        self._sockets = [lanes[name] for name in wire.LANES[:3]]
        control, output, stdin = (sock.fileno() for sock in self._sockets)
        self.serve(control, output, stdin)
        self._files = FileServer(self.place, lanes[wire.LANES[3]])

    # -- standing still ------------------------------------------------------------------------

    def stand_still(self) -> None:
        self._real_loop.stand_still()
        self._files.gate.close()

    def go_on(self) -> None:
        self._files.gate.open()
        self._real_loop.go_on()

    def close(self) -> None:
        """The guest's end, at once; `join` waits for its thread."""
        self._real_loop.close()
        self._files.close()
        for sock in self._sockets:
            sock.close()
        os.close(self.messages.fd)

    def join(self) -> None:
        self._files.join()

    # -- all of it -----------------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """All that the guest knows, but its files; plain values. It stands still meanwhile."""
        while self.messages.take():
            pass
        messages = self.messages
        heard = Path(self.place.from_host).read_bytes()
        return {
            "generation": self.generation, "asleep": self._asleep,
            "heard_before": self._heard_before, "inbox": heard,
            "messages": [messages._kept, messages._count, messages._partial],  # noqa: SLF001
            "starting": self._starting.id if self._starting else None,
            "waiting": self._waiting.body if self._waiting else None,
            "lanes": [_saved_lane(lane) for lane in self._lanes],
            "programs": self.programs.saved()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Become what `saved` was taken of."""
        self.generation, self._asleep = saved["generation"], saved["asleep"]
        self._heard_before = saved["heard_before"]
        Path(self.place.from_host).write_bytes(saved["inbox"])
        kept, count, partial = saved["messages"]
        self.messages._kept = [(number, text) for number, text in kept]  # noqa: SLF001
        self.messages._count, self.messages._partial = count, partial  # noqa: SLF001
        self.programs.restore(saved["programs"])
        self._starting = self.table.tasks.get(saved["starting"])
        if self._starting is not None:
            self.loop.later("start", 0.0, self._give_up_starting)
        if saved["waiting"] is not None:
            self._waiting = Request("POST", "/v1/output", {}, saved["waiting"])
        for lane, before in zip(self._lanes, saved["lanes"], strict=True):
            _restore_lane(lane, before)

    def files(self) -> bytes:
        """All that is in the machine's directory; the same bytes for the same content."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(self.place.workdir, ".")
        return packed.getvalue()

    # -- the agent's, otherwise ----------------------------------------------------------------

    def _closed(self) -> None:
        super()._closed()
        if self.loop.stopped:  # the host has closed all lanes
            self._over()

    def _handlers(self) -> dict[tuple[str, str], Callable[[Request], dict[str, Any]]]:
        return {**super()._handlers(), ("POST", "clock"): self._wake}

    def _wake(self, request: Request) -> dict[str, Any]:
        asked = request.json()
        float(asked["time"])
        seed = bytes.fromhex(asked.get("seed") or "")
        if len(seed) not in (0, SEED_LENGTH):
            raise ValueError("a seed of another length")
        if seed:
            self.seeds.append(seed)
        return {}

    def _say(self, text: str) -> None:
        """A message of a program's, through the agent's own pipe."""
        os.write(self.messages.fd, f"{text}\n".encode())
        if self.messages.take():
            self.loop.later("said", 0.0, self._tell)

    @property
    def _real_loop(self) -> GuestLoop:
        assert isinstance(self.loop, GuestLoop)
        return self.loop


def unpack_files(packed: bytes, workdir: str) -> None:
    """The reverse of `Guest.files`; what a transfer had half-made is left out."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(workdir, filter="fully_trusted", members=[  # noqa: S202 - it is our own
            each for each in archive if "/.vmjob-" not in f"/{each.name}"])


def _saved_lane(lane: Lane) -> list[Any]:
    parser = lane._parser  # noqa: SLF001 - the agent does not know that it is being kept
    return [bytes(parser._buffer), parser._lost,  # noqa: SLF001
            bytes(lane._out), lane._answering]  # noqa: SLF001


def _restore_lane(lane: Lane, saved: list[Any]) -> None:
    buffer, lost, out, answering = saved
    lane._parser._buffer += buffer  # noqa: SLF001
    lane._parser._lost = lost  # noqa: SLF001
    lane._answering = answering  # noqa: SLF001
    lane._out += out  # noqa: SLF001
    lane._flush()  # noqa: SLF001

