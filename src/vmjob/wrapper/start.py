"""The first and the last steps of what the client starts, and its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from pathlib import Path

from vmjob.errors import VmjobError
from vmjob.grid.boinc import (
    ChannelsUnusable,
    Runtime,
    SlotTaken,
    SlotUnusable,
    clean_environment,
    close_inherited,
)
from vmjob.grid.boinc.exitcodes import (
    EXIT_ABORTED_BY_CLIENT,
    EXIT_CHILD_FAILED,
    EXIT_INIT_FAILURE,
)
from vmjob.grid.boinc.files import write_temporary_exit
from vmjob.home import remove_tree
from vmjob.wrapper import contents, report
from vmjob.wrapper.carrying import FAILED, QUIT_DEADLINE, SLOT, Carrier, Left
from vmjob.wrapper.log import Log
from vmjob.wrapper.options import Options
from vmjob.wrapper.outcome import FIRST, Finish, Outcome, Postpone, delay

__all__ = ["wrap"]

#: Seconds in which everything is cleared up when the job is given up or the client has gone; what
#: is not done by then ends with the process. The client wants an aborted job gone in 2.
AT_ONCE = 1.5
#: The same for a last checkpoint; the client kills after 60.
IN_TIME = QUIT_DEADLINE + 7.0
#: How often, without a checkpoint in between, an unexpected error is taken for an accident.
MOST_ACCIDENTS = 3
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def wrap(options: Options) -> int:
    """Carry the job of the slot that is the current directory; the exit code for the client.

    Never raises. With `Left.SIGNAL` the process ends by that signal here.
    """
    close_inherited()
    environment = clean_environment(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    directory = Path.cwd()
    log = Log()
    try:
        with Runtime.open(directory) as runtime:
            return asyncio.run(_Process(runtime, directory, options, log).run())
    except SlotTaken as error:
        log.line(f"{error}")
        with contextlib.suppress(OSError):
            write_temporary_exit(directory, FIRST, "another instance holds the slot")
        return 0
    except ChannelsUnusable as error:  # the application version's fault, on every computer
        log.line(f"the slot cannot be used: {error}")
        return EXIT_INIT_FAILURE
    except (SlotUnusable, OSError) as error:
        log.line(f"the slot cannot be used: {error}")
        try:
            write_temporary_exit(directory, FIRST, f"the slot cannot be used: {error}")
        except OSError:
            return EXIT_INIT_FAILURE
        return 0


class _Process:
    """One process of ours, from the slot's being ours to the exit code."""

    def __init__(self, runtime: Runtime, directory: Path, options: Options, log: Log) -> None:
        self._runtime = runtime
        self._directory = directory
        self._options = options
        self._log = log
        self._signal: int | None = None
        self._carrier: Carrier | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        carrier = Carrier(self._runtime, self._directory, self._options, self._log, self._in_time)
        self._carrier = carrier
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signalled, carrier, number)
        outcome: Outcome | None
        try:
            outcome = await carrier.carry()
        except Exception as error:  # noqa: BLE001 - the client must be told something
            outcome = self._accident(carrier, error)
        return self._end(carrier, outcome)

    def _end(self, carrier: Carrier, outcome: Outcome | None) -> int:
        """Tell the client; returns the exit code."""
        if outcome is None:
            return self._left(carrier)
        try:
            self._conclude(carrier, outcome)
        except Exception as error:  # noqa: BLE001 - no report is worth the result of a job
            self._log.line(f"there is no report: {type(error).__name__}: {error}")
        try:
            if isinstance(outcome, Finish):
                self._runtime.finish(outcome.code, outcome.message, outcome.notice)
                return outcome.code
            assert isinstance(outcome, Postpone)
            self._runtime.temporary_exit(outcome.seconds, outcome.reason, outcome.notice)
        except OSError as error:  # without that file, 0 would mean "start me again at once"
            self._log.line(f"the client cannot be told: {error.strerror}")
            return outcome.code if isinstance(outcome, Finish) and outcome.code else (
                EXIT_CHILD_FAILED)
        return 0

    def _conclude(self, carrier: Carrier, outcome: Outcome) -> None:
        """Write the report for the project's scientists."""
        if isinstance(outcome, Finish) and outcome.code == 0 and not self._runtime.standalone:
            for name in contents.missing_outputs(carrier.ground.where):
                self._log.line(f"warning: the job made no {name!r}; if the project wants it, the "
                               "client fails the job")
        failed = not isinstance(outcome, Finish) or outcome.code != 0
        console = report.console_of(carrier.slot / FAILED) if failed else ""
        remove_tree(carrier.slot / FAILED)
        self._log.conclude(report.sections(
            outcome, carrier.record, carrier.error, carrier.grid.failed_in, carrier.accounts.kept,
            carrier.streams(), console, carrier.facts))

    def _left(self, carrier: Carrier) -> int:
        match carrier.left:
            case Left.ABORT:
                remove_tree(carrier.slot)
                return EXIT_ABORTED_BY_CLIENT
            case Left.SIGNAL if self._signal is not None:
                # By the signal: the client starts us again and counts nothing against the job.
                self._runtime.close()
                asyncio.get_running_loop().remove_signal_handler(self._signal)
                signal.signal(self._signal, signal.SIG_DFL)
                signal.raise_signal(self._signal)
        return 0

    def _signalled(self, carrier: Carrier, number: int) -> None:
        self._signal = self._signal or number
        carrier.leave(Left.SIGNAL)

    def _accident(self, carrier: Carrier, error: Exception) -> Outcome:
        """Something that nobody has thought of: say where, and try again, but not for ever."""
        import traceback

        place = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" ({Path(place[0].filename).name}:{place[0].lineno})" if place else ""
        unexpected = VmjobError(f"unexpected: {type(error).__name__}: {error}{where}",
                                advice="This is a bug of vmjob: please report it.")
        carrier.error = unexpected.as_dict()
        before = carrier.accounts.fault(unexpected.code)
        if before >= MOST_ACCIDENTS:
            return Finish(EXIT_CHILD_FAILED)
        return Postpone(delay(before), unexpected.message)

    def _in_time(self, why: Left) -> None:
        """End the process in time, whatever its loop and its threads wait for."""
        def leave() -> None:
            if self._carrier is not None:
                self._carrier.accounts.save()
            if why is Left.ABORT:
                remove_tree(self._directory / SLOT)
            os._exit(EXIT_ABORTED_BY_CLIENT if why is Left.ABORT else 0)

        timer = threading.Timer(AT_ONCE if why in (Left.ABORT, Left.CLIENT_GONE) else IN_TIME,
                                leave)
        timer.daemon = True
        timer.start()
