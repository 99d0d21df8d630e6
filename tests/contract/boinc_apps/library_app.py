"""The same app on BOINC's own library, by ctypes: what it does is the measure for ours."""

from __future__ import annotations

import ctypes
import os
import select
import time


class Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in (
        "normal_thread_priority", "main_program", "check_heartbeat", "handle_process_control",
        "send_status_msgs", "direct_process_action", "multi_thread", "multi_process")]


class State(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int) for name in (
        "no_heartbeat", "suspended", "quit_request", "reread_init_data_file", "abort_request")),
        ("working_set_size", ctypes.c_double), ("max_working_set_size", ctypes.c_double),
        ("network_suspended", ctypes.c_int)]


api = ctypes.CDLL("libboinc_api.so.7")
finish = api._Z20boinc_finish_messageiPKcb
finish.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_bool]
temporary_exit = api._Z20boinc_temporary_exitiPKcb
temporary_exit.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_bool]
api.boinc_report_app_status.argtypes = [ctypes.c_double] * 3
upload = api._Z17boinc_upload_fileRNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE


class CppString(ctypes.Structure):
    """A short std::string of the GNU library, whose characters lie in the object itself."""

    _fields_ = [("data", ctypes.c_void_p), ("length", ctypes.c_size_t),
                ("local", ctypes.c_char * 16)]

    def __init__(self, text: bytes) -> None:
        assert len(text) < 16
        super().__init__(0, len(text), text)
        self.data = ctypes.addressof(self) + CppString.local.offset


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main() -> None:
    api.boinc_init_options(ctypes.byref(Options(main_program=1, check_heartbeat=1,
                                                handle_process_control=1)))
    cpu = ctypes.c_double()
    api._Z17boinc_wu_cpu_timeRd(ctypes.byref(cpu))
    say(f"ready {cpu.value:g}")
    before = {"suspended": 0, "quit_request": 0, "abort_request": 0}
    status: tuple[float, float, float] | None = None
    sent = 0.0
    state = State()
    rest = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.05)
        lines: list[bytes] = []
        if ready:
            data = os.read(0, 4096)
            if not data:
                os._exit(0)
            *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            order, *words = line.decode().split()
            if order == "report":
                status = (float(words[0]), float(words[1]), float(words[2]))
                sent = 0.0
            elif order == "trickle":
                failed = api.boinc_send_trickle_up(words[0].encode(), " ".join(words[1:]).encode())
                say(f"trickle {int(not failed)}")
            elif order == "upload":
                upload(ctypes.byref(CppString(words[0].encode())))
            elif order == "web":
                api.boinc_web_graphics_url(words[0].encode())
            elif order == "desktop":
                api.boinc_remote_desktop_addr(words[0].encode())
            elif order == "finish":
                finish(int(words[0]), " ".join(words[2:]).encode() or None, words[1] == "1")
            elif order == "temporary":
                temporary_exit(int(words[0]), " ".join(words[2:]).encode(), words[1] == "1")
            elif order == "exit":
                os._exit(int(words[0]))
        if status is not None and time.monotonic() - sent >= 1.0 \
                and not api.boinc_report_app_status(*status):
            sent = time.monotonic()
        api.boinc_get_status(ctypes.byref(state))
        for name in before:
            now = int(bool(getattr(state, name)))
            if now != before[name]:
                before[name] = now
                say({"suspended": ("resumed", "suspended"), "quit_request": ("", "quit"),
                     "abort_request": ("", "abort")}[name][now])
        if state.reread_init_data_file:
            api.boinc_parse_init_data_file()
            state.reread_init_data_file = 0
            say("reread")


if __name__ == "__main__":
    main()
