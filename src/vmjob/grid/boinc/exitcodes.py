"""The exit codes by which BOINC's clients and wrappers tell why a job ended.

They begin at 192: below lie the operating system's own, and 128 + N for signals. The client reports
any exit code but 0 as a failed job, with that code as its ``exit_status``.
"""

from __future__ import annotations

from typing import Final

EXIT_STATEFILE_WRITE: Final = 192
EXIT_SIGNAL: Final = 193
EXIT_ABORTED_BY_CLIENT: Final = 194
EXIT_CHILD_FAILED: Final = 195
EXIT_DISK_LIMIT_EXCEEDED: Final = 196
EXIT_TIME_LIMIT_EXCEEDED: Final = 197
EXIT_MEM_LIMIT_EXCEEDED: Final = 198
EXIT_CLIENT_EXITING: Final = 199
EXIT_UNSTARTED_LATE: Final = 200
EXIT_MISSING_COPROC: Final = 201
EXIT_ABORTED_BY_PROJECT: Final = 202
EXIT_ABORTED_VIA_GUI: Final = 203
EXIT_UNKNOWN: Final = 204
EXIT_OUT_OF_MEMORY: Final = 205
EXIT_INIT_FAILURE: Final = 206
EXIT_NO_SUB_TASKS: Final = 207
EXIT_SUB_TASK_FAILURE: Final = 208
EXIT_OVERDUE_EXCEEDED: Final = 209

#: Code -> name, for messages.
NAMES: Final[dict[int, str]] = {
    code: name for name, code in list(globals().items()) if name.startswith("EXIT_")}
