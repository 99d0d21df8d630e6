"""A folder of a job, kept in step between host and guest: docs/explanation/folders.md."""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from vmjob.engine.agreement import Pair, Plan, make_plan, same_content
from vmjob.engine.folderside import (
    Journal,
    Outgoing,
    Sent,
    batches,
    link_target,
    make_directories,
    may_lead_to,
    pack,
    place,
    prepare,
    staging,
    would_replace,
)
from vmjob.errors import AgentProtocol, FolderFull, HostError, InputUnreadable
from vmjob.guest.agent.folders import CHANGING, DIRECTORY, Stamp, stamp
from vmjob.guest.agent.folders import Folder as Look
from vmjob.guest.agent.parcels import ANYTHING
from vmjob.guest.client import AgentClient
from vmjob.job.files import INIT_DATA, Folder

__all__ = ["Mirror"]

#: Answers that tell all of a folder, at most: a guest that always has more is a liar.
MAX_ANSWERS = 10_000
#: Seconds that the guest may look through a folder when nothing runs any more.
LOOK_DEADLINE = 600.0
#: Shortest and longest wait between two rounds, seconds.
SHORTEST, LONGEST = 0.1, 30.0
#: Seconds until the guest is given again what it refused, at first and at most.
RETRY, LONGEST_RETRY = 1.0, 600.0
NOTHING = Pair(None, None)
#: Errors of writing that no name or file of a job's can cause.
OF_THE_HOST = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO})
#: Longest link file, bytes.
MAX_LINK = 4096


class Mirror:
    """One folder. `fill` it before the first task (or give it what was ``known``), then `step`
    again and again while tasks run, and `collect` after the last.

    ``redact`` is given the content of every ``init_data.xml`` and returns what the guest may see of
    it. ``warn`` hears what is left out. ``known``: what `known` returned when the machine's
    checkpoint was made. ``journal``: a file of the slot that tells what came from the guest, over
    the ends of processes; without it, files that came after a checkpoint count as the host's own
    once the machine went back to it. ``base``: the directory that BOINC's links are relative to;
    the folder itself by default.

    Every method may raise what a lost machine raises; `HostDiskFull`; `FolderFull` when all that
    fits was done.
    """

    def __init__(self, folder: Folder, client: AgentClient, *, redact: Callable[[bytes], bytes],
                 warn: Callable[[str], None], known: Mapping[str, Any] | None = None,
                 journal: Path | None = None, base: Path | None = None) -> None:
        self.folder = folder
        self._client = client
        self._redact = redact
        self._warn = warn
        self._base = base or folder.source
        self._journal = Journal(journal)
        self._agreed: dict[str, Pair] = {}
        self._guest: dict[str, Stamp] = {}
        self._host: dict[str, Stamp] = {}
        self._look = Look(str(folder.source), folder.without, folder.max_files + 1)
        #: What could not be written on the host, and was not the job's fault.
        self._unwritten: str | None = None
        #: Names that stand for files elsewhere; whether the guest may write those.
        self._links: dict[str, tuple[Path, bool]] = {}
        self._no_links: dict[str, Stamp] = {}
        #: What `prepare` has put there: no links, whatever they hold.
        self._put: set[str] = set()
        self._seen = 0
        self._listed = False
        self._over = False
        #: Put into the guest, but not known to have got there.
        self._putting: dict[str, Stamp] = {}
        #: What could not be put where it belongs: what it was, when to try again, after what wait.
        self._refused: dict[str, tuple[Stamp, float, float]] = {}
        self._again = SHORTEST
        self._hear_due = 0.0
        #: The state of both sides at which there was nothing to do.
        self._rested: object = None
        self._looking = False
        self._lock = anyio.Lock()
        self._warned: set[str] = set()
        self._continued = known is not None
        if known is not None:
            self._continue(known)

    # -- what others need ----------------------------------------------------------------------

    def known(self) -> dict[str, Any]:
        """What both sides agreed on, JSON-compatible: it belongs to the machine's checkpoint."""
        return {"agreed": {name: list(pair) for name, pair in self._agreed.items()},
                "links": {name: [str(path), mine] for name, (path, mine) in self._links.items()},
                "putting": dict(self._putting), "put": sorted(self._put)}

    def version(self, name: str) -> Pair | None:
        """Which file both sides have under a name; None while not both have one and the same."""
        pair = self._agreed.get(name)
        if pair is None or pair.host is None or pair.guest is None or pair.host[0] != "f":
            return None
        return pair

    def came(self) -> list[Path]:
        """Files of the host that came from the guest, over all processes that had a journal."""
        return [self._links[name][0] if name in self._links else self.folder.source / name
                for name, became in self._journal.came.items() if became is not None]

    @property
    def pause(self) -> float:
        """Seconds until the next `step` may find something, as far as both sides are looked at."""
        heard = self._hear_due - time.monotonic()
        return max(SHORTEST, min(heard, self._look.wait(), LONGEST))

    # -- its life ------------------------------------------------------------------------------

    async def fill(self) -> None:
        """Before the first task: bring everything into the guest."""
        async with self._lock:
            self._put = await anyio.to_thread.run_sync(prepare, self.folder, self._base,
                                                       self._redact)
            await self._look_at_host(at_once=True)
            self._check_own()
            if self.folder.destination:
                await self._client.mkdir(self.folder.destination)
            await self._push(list(self._host), strict=False, anything=True)
            await self._hear_all()
            # What was in the guest before is no change.
            self._agreed = {name: Pair(self._agreed.get(name, NOTHING).host, found)
                            for name, found in self._guest.items()}

    async def step(self) -> bool:
        """One round in both directions; whether anything was done."""
        if not self.folder.live:
            return False
        async with self._lock:
            await self._look_at_host()
            if time.monotonic() >= self._hear_due and not await self._hear():
                return False
            if not self._listed:
                return False
            self._take_up()
            now = (self._look.version, self._seen, self._over,
                   [self._host.get(name) for name in self._links])
            if now == self._rested:
                return False
            plan = self._plan(into_guest=True)
            self._rested = now if plan == Plan() and not self._over else None
            return await self._carry_out(plan)

    async def keep(self) -> None:
        """`step` for ever, as often as it makes sense."""
        while True:
            await self.step()
            await anyio.sleep(self.pause)

    async def collect(self) -> None:
        """After the last task: fetch what changed in the guest and did not come yet.

        Raises `HostError` for what this computer did not let be written: a job whose results are
        not all there has not succeeded.
        """
        async with self._lock:
            await self._look_at_host(at_once=True)
            await self._hear_all()
            self._refused.clear()  # it is tried once more: there is no later
            self._unwritten = None
            self._take_up()
            await self._carry_out(self._plan(into_guest=False))
            if self._unwritten is not None:
                raise HostError(self._unwritten, advice="Let this user write there, then run it "
                                                        "again.")

    async def remove(self, name: str, version: Pair) -> bool:
        """Delete a file on both sides, if it is this one; whether it was.

        A newer one of that name is not touched: it comes with the next round.
        """
        async with self._lock:
            if self._agreed.get(name) != version or version.guest is None or version.host is None:
                return False
            self._rested = None
            kept = await self._client.folder_remove(
                self.folder.destination, {name: version.guest}, without=self.folder.without,
                most=self._most)
            await anyio.to_thread.run_sync(self._drop_host, name, version.host)
            if kept:  # written anew: that one is to come
                self._agreed[name] = Pair(None, version.guest)
            else:
                self._agreed.pop(name)
                self._guest.pop(name, None)
            return True

    # -- looking at both sides -----------------------------------------------------------------

    @property
    def _most(self) -> int:
        return self.folder.max_files + 1

    def _continue(self, known: Mapping[str, Any]) -> None:
        try:
            self._agreed = msgspec.convert(known["agreed"], dict[str, Pair])
            self._links = {name: (Path(path), mine) for name, (path, mine) in
                           msgspec.convert(known["links"], dict[str, tuple[str, bool]]).items()}
            self._putting = msgspec.convert(known["putting"], dict[str, Stamp])
            self._put = msgspec.convert(known.get("put", []), set[str])
        except (KeyError, msgspec.ValidationError) as error:
            raise ValueError(f"not what was known of a folder: {error}") from error

    async def _look_at_host(self, *, at_once: bool = False) -> None:
        """Bring `_host` up to date, if it is time for it."""
        await anyio.to_thread.run_sync(self._look_through, at_once or self._continued)

    def _take_up(self) -> None:
        """The guest went back: tell what it did since, and may do again, from the host's doings."""
        if not self._continued:
            return
        self._continued = False
        for name, came in self._journal.came.items():
            before, theirs = self._agreed.get(name, NOTHING), self._guest.get(name)
            if theirs != before.guest and same_content(theirs, came):
                # It had come already; what the host made of it afterwards is newer.
                before = Pair(came, theirs)
            if self._host.get(name) == came:
                before = Pair(came, before.guest)
            self._agreed[name] = before

    def _look_through(self, at_once: bool) -> None:
        if not self.folder.source.is_dir():  # not the same as empty: a disk that went away
            raise HostError(f"there is no {self.folder.source} any more")
        if at_once:
            self._look.begin(at_once=True)
        self._look.work(float("inf"))
        found = {name: each for name, (each, _) in self._look.known.items()}
        if self.folder.links:
            self._find_links(found)
            for name, (path, _) in self._links.items():
                now = _stamp_of(path)
                found.pop(name, None)
                if now is not None and now[0] == "f":
                    found[name] = now
        self._host = found

    def _find_links(self, found: Mapping[str, Stamp]) -> None:
        links = dict(self._links)
        files = [name for name, each in found.items()
                 if each[0] == "f" and each[1] <= MAX_LINK and name not in self._links
                 and name not in self._put and self._no_links.get(name) != each]
        for name in [*files, *(self._look.links - self._links.keys())]:
            target = link_target(self.folder.source / name, self._base)
            if target is not None and not may_lead_to(self.folder, target):
                self._warn_once(f"{self.folder.name}: {name!r} is a link out of the slot and its "
                                "project, and stands for nothing")
                target = None
            if target is None:
                if name in found:
                    self._no_links[name] = found[name]
                continue
            # One that is not there yet, or came from the guest of an earlier run, is an output.
            now = _stamp_of(target)
            mine = now is None or self._journal.came.get(name) == now
            links[name] = (target, mine)
        self._links = links  # at once: `known` may be called meanwhile

    async def _hear(self, *, begin: bool = False) -> bool:
        """Bring `_guest` up to date; whether it is known what is there at all."""
        for _ in range(MAX_ANSWERS):
            news = await self._client.folder(self.folder.destination, self._seen,
                                             without=self.folder.without, most=self._most,
                                             begin=begin)
            begin = False
            if news.since == 0:
                self._guest.clear()
                self._listed = False
            for name in news.gone:
                self._guest.pop(name, None)
            for name, found in news.entries.items():
                self._guest[name] = found
                self._believe_put(name, found)
            if len(self._guest) > 2 * self._most + MAX_ANSWERS:
                raise AgentProtocol("the agent tells of more files than it was asked for")
            self._seen, self._over, self._again = news.version, news.over, news.again
            self._looking = news.looking
            self._hear_due = time.monotonic() + news.again
            if news.left_out:
                self._warn_once(f"{self.folder.name}: links, devices and files with odd names "
                                "in the machine are left out")
            if not news.more:
                self._listed = self._listed or news.looks > 0
                return self._listed
        raise AgentProtocol("the agent has news of a folder without end")

    async def _hear_all(self) -> None:
        """The same, of everything that is there now; nothing runs in the guest."""
        deadline = time.monotonic() + LOOK_DEADLINE
        self._looking = True
        begin = True
        while self._looking:
            if time.monotonic() > deadline:
                raise AgentProtocol("the agent looks at a folder without end")
            await self._hear(begin=begin)
            begin = False
            if self._looking:
                await anyio.sleep(min(self._again, SHORTEST))

    def _believe_put(self, name: str, found: Stamp) -> None:
        """Recognize what we had put when the checkpoint was made that we continue from."""
        put = self._putting.pop(name, None)
        if put is not None and put[:4] == found[:4]:
            before = self._agreed.get(name, NOTHING)
            self._agreed[name] = Pair(before.host, found)

    def _plan(self, *, into_guest: bool) -> Plan:
        changing = {name for name, found in self._guest.items() if found == CHANGING}
        return make_plan(
            self._agreed, {name: each for name, each in self._host.items() if each != CHANGING},
            {name: each for name, each in self._guest.items() if each != CHANGING},
            into_guest=into_guest, into_host=self._may_come,
            changing_host={name for name, each in self._host.items() if each == CHANGING},
            changing_guest=changing)

    def _may_come(self, name: str) -> bool:
        if not self.folder.writable or self._look.leaves_out(name):  # which no honest agent tells
            return False
        if would_replace(name, self._links, self._host,
                         directory=self._guest.get(name) == DIRECTORY):
            return False
        link = self._links.get(name)
        return link is None or link[1] or (
            self._guest.get(name) is not None and self._refuse_linked(name))

    def _refuse_linked(self, name: str) -> bool:
        before, now = self._agreed.get(name), self._guest[name]
        known = before.guest if before is not None else None
        # Another mode alone is nobody's loss: that of a program is lost on a project's server, and
        # each job gives its own back.
        if known is None or (*known[:2], *known[3:]) != (*now[:2], *now[3:]):
            self._warn_once(f"{self.folder.name}: {name!r} is a link to a file that was there "
                            "before the job, and is left as it is")
        return False

    # -- doing it ------------------------------------------------------------------------------

    async def _carry_out(self, plan: Plan) -> bool:
        """Do what was planned; whether there was anything. Raises `FolderFull` at its end."""
        self._agreed.update(plan.agree)
        for name in plan.forget:
            self._agreed.pop(name, None)
        done = False
        for name in plan.drop_host:
            done = self._forget_host(name) or done
        if plan.drop_guest:
            done = await self._drop_guest(plan.drop_guest) or done
        fetch, excess = self._fitting(
            name for name in plan.fetch if not self._must_wait(name, self._guest[name]))
        if fetch:
            done = await self._fetch(fetch) or done
        push = [name for name in plan.push if not self._must_wait(name, self._host[name])]
        if push:
            done = await self._push(push, strict=True) or done
        if excess or self._over:
            raise FolderFull(
                f"the folder {self.folder.name!r} may hold {self.folder.max_files} files and "
                f"{self.folder.max_bytes} bytes; the job has written more",
                folder=self.folder.name, left_out=len(excess))
        return done

    def _fitting(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Which of the guest's files may come, and which are too much."""
        count = len(self._host)
        size = sum(each[1] for each in self._host.values())
        fitting, excess = [], []
        for name in names:
            before = self._host.get(name)
            grows = self._guest[name][1] - (before[1] if before else 0)
            more = 0 if before else 1
            if ((more and count >= self.folder.max_files)
                    or (grows > 0 and size + grows > self.folder.max_bytes)):
                excess.append(name)
                continue
            fitting.append(name)
            count += more
            size += grows
        return fitting, excess

    def _check_own(self) -> None:
        size = sum(each[1] for each in self._host.values())
        if len(self._host) > self.folder.max_files or size > self.folder.max_bytes:
            raise FolderFull(
                f"{self.folder.source} has {len(self._host)} files and {size} bytes; the folder "
                f"{self.folder.name!r} may hold {self.folder.max_files} files and "
                f"{self.folder.max_bytes} bytes", advice="Take some away, or raise its limits.")

    async def _fetch(self, names: list[str]) -> bool:
        """Bring files and directories out of the guest; whether any came."""
        directories = [name for name in names if self._guest[name] == DIRECTORY]
        done = await self._make_directories(directories) if directories else False
        files = [name for name in names if self._guest[name] != DIRECTORY]
        for batch in batches(files, self._guest):
            there = {name: self._guest[name] for name in batch}
            with staging(self.folder.source) as (parent, staged):
                wanted = [(name, found[1], *found[3:]) for name, found in there.items()]
                changed = await self._client.get_parcel(
                    self.folder.destination, wanted, parent, staged,
                    sum(found[1] for found in there.values()))
                became = await anyio.to_thread.run_sync(self._take, parent, staged, there, changed)
            for name, found in became.items():
                self._is_on_host(name, found, there[name])
                done = True
        return done

    def _take(self, parent: int, staged: str, there: Mapping[str, Stamp],
              changed: Collection[int]) -> dict[str, Stamp]:
        """Give staged files their names; what they are on the host then."""
        became = {}
        for number, (name, found) in enumerate(there.items()):
            if number in changed:
                continue
            try:
                now = place(parent, staged, number, name, found[1],
                            self._links[name][0] if name in self._links else None,
                            functools.partial(self._journal.note, name),
                            no_soft_link=self.folder.links)
            except OSError as error:
                self._not_written(f"{self.folder.name}: {name!r} cannot be written: "
                                  f"{error.strerror}", error)
                self._refuse(name, found)
                continue
            if now is not None:
                became[name] = now
                self._refused.pop(name, None)
        return became

    def _is_on_host(self, name: str, found: Stamp, there: Stamp) -> None:
        """A file or directory of the guest has come, with those above it."""
        self._agreed[name] = Pair(found, there)
        self._host[name] = found
        if name not in self._links:
            self._no_links[name] = found
            self._look.note(name, found)
        above = name.rpartition("/")[0]
        if above and self._host.get(above) != DIRECTORY:
            self._is_on_host(above, DIRECTORY, DIRECTORY)

    async def _make_directories(self, names: list[str]) -> bool:
        done = False
        fd = os.open(self.folder.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in names:
                try:
                    os.close(make_directories(fd, name))
                except OSError as error:
                    self._not_written(f"{self.folder.name}: {name!r} cannot be made: "
                                      f"{error.strerror}", error)
                    self._refuse(name, DIRECTORY)
                    continue
                self._journal.note(name, DIRECTORY)
                self._is_on_host(name, DIRECTORY, DIRECTORY)
                done = True
        finally:
            os.close(fd)
        return done

    def _forget_host(self, name: str) -> bool:
        """The guest has removed it; whether it could be removed here. One of a link's stays."""
        gone = False
        if name not in self._links:
            self._journal.note(name, None)
            gone = self._drop_host(name, self._host[name])
            if not gone:
                self._journal.came.pop(name, None)
        if name in self._links:
            self._agreed[name] = Pair(self._host[name], None)
        else:
            self._agreed.pop(name, None)
        return gone

    def _drop_host(self, name: str, found: Stamp) -> bool:
        if name in self._links:
            return False
        try:
            gone = self._look.remove(name, found)
        except OSError as error:
            self._warn_once(f"{self.folder.name}: {name!r} cannot be removed: {error.strerror}")
            return False
        if gone:
            self._host.pop(name, None)
        return gone

    async def _drop_guest(self, names: list[str]) -> bool:
        stamps = {name: self._guest[name] for name in names}
        kept = await self._client.folder_remove(self.folder.destination, stamps,
                                                without=self.folder.without, most=self._most)
        for name in names:
            if name not in kept:
                self._guest.pop(name, None)
                self._agreed.pop(name, None)
        return len(kept) < len(names)

    async def _push(self, names: list[str], *, strict: bool, anything: bool = False) -> bool:
        """Bring files and directories into the guest; whether any went."""
        done = False
        for batch in batches(names, self._host):
            outgoing = [Outgoing(
                name, ANYTHING if anything or not self._may_come(name) else self._guest.get(name),
                self._links[name][0] if name in self._links else None,
                self._redact if self._is_secret(name) else None) for name in batch]
            sent: list[Sent] = []
            for name in batch:
                self._putting[name] = self._host[name]
            try:
                inodes = await self._client.put_parcel(
                    pack(self.folder.source, outgoing, sent, strict=strict),
                    self.folder.destination)
            except InputUnreadable:
                if not strict:
                    raise
                continue  # it changed while it was read: next time
            if len(inodes) != len(sent):
                raise AgentProtocol("an answer about other files than were put")
            put: dict[str, Stamp] = {}
            for each, inode in zip(sent, inodes, strict=True):
                if not inode:
                    self._refuse(each.name, each.host)
                    continue
                self._refused.pop(each.name, None)
                there = each.guest if each.guest == DIRECTORY else (*each.guest[:4], inode)
                if each.guest != DIRECTORY or self._guest.get(each.name) != DIRECTORY:
                    put[each.name] = there
                self._guest[each.name] = there
                self._agreed[each.name] = Pair(each.host, there)
                done = True
            for name in batch:
                self._putting.pop(name, None)
            await self._client.folder_note(self.folder.destination, put,
                                           without=self.folder.without, most=self._most)
        return done

    def _refuse(self, name: str, found: Stamp) -> None:
        before = self._refused.get(name)
        wait = RETRY if before is None else min(2 * before[2], LONGEST_RETRY)
        self._refused[name] = (found, time.monotonic() + wait, wait)

    def _must_wait(self, name: str, found: Stamp) -> bool:
        """Whether a file found no place, and is not to be copied again yet."""
        refused = self._refused.get(name)
        return refused is not None and refused[0] == found and time.monotonic() < refused[1]

    def _is_secret(self, name: str) -> bool:
        link = self._links.get(name)
        return name.rpartition("/")[2] == INIT_DATA or (
            link is not None and link[0].name == INIT_DATA)

    def _not_written(self, text: str, error: OSError) -> None:
        self._warn_once(text)
        if error.errno in OF_THE_HOST:
            self._unwritten = text

    def _warn_once(self, text: str) -> None:
        if text not in self._warned and len(self._warned) < 100:
            self._warned.add(text)
            self._warn(text)


def _stamp_of(path: Path) -> Stamp | None:
    try:
        return stamp(path.stat())
    except OSError:
        return None
