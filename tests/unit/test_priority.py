"""Manners: threads that take only what is left."""

from __future__ import annotations

import os
import threading

from vmjob.host.priority import lower_disk_priority, set_processor_priority


def test_a_thread_becomes_idle_and_comes_back_without_privileges() -> None:
    ready, over = threading.Event(), threading.Event()
    number = 0

    def work() -> None:
        nonlocal number
        number = threading.get_native_id()
        ready.set()
        over.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(10)
    try:
        set_processor_priority([number], low=True)
        assert os.sched_getscheduler(number) == os.SCHED_IDLE
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        set_processor_priority([number], low=False)
        assert os.sched_getscheduler(number) == os.SCHED_OTHER
    finally:
        over.set()
        thread.join()
    set_processor_priority([number], low=True)  # one that is gone is no error


def test_the_disk_priority_of_one_thread_is_its_own() -> None:
    import ctypes

    found: list[int] = []

    def work() -> None:
        lower_disk_priority()
        found.append(ctypes.CDLL(None).syscall(252, 1, 0))  # ioprio_get of x86-64

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if os.uname().machine == "x86_64":
        assert found[0] >> 13 == 3
        assert ctypes.CDLL(None).syscall(252, 1, 0) >> 13 != 3
