"""``init_data.xml``: what the client tells an app about its job, its user and its computer.

The client writes it line by line without much care (user names are escaped, paths are not; raw
preferences stand between other elements), and its form has grown since 2005. So nothing here asks
for well-formed XML, or for any element but the root: what is missing or nonsense has its default.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from vmjob.grid.boinc.errors import InitDataInvalid
from vmjob.grid.boinc.leaves import Leaves

__all__ = ["GlobalPreferences", "Host", "InitData", "Proxy", "parse", "read"]

FILE = "init_data.xml"
#: Bytes of the longest file that is read; real ones have 5 to 40 KiB.
MAX_BYTES = 1 << 20
#: Seconds between checkpoints when the client gives 0, as BOINC's own library has it.
CHECKPOINT_PERIOD = 300.0
#: ``<app_file>`` elements that are read; an app version has a handful of files.
MAX_APP_FILES = 1000

_ROOT = "app_init_data"
#: Elements that hold others; what is in them must not be taken for the job's own.
_BLOCKS = ("host_info", "proxy_info", "global_preferences")
_MAX_PID = (1 << 31) - 1


@dataclass(frozen=True)
class GlobalPreferences:
    """What the volunteer allows; 0 where no limit is meant, but for the percentages: 100."""

    cpu_usage_limit: float = 100.0
    """Percent of the time that an app may compute, while the computer is in use."""
    niu_cpu_usage_limit: float = 100.0
    """The same while it is not in use; clients before 8.0 know only `cpu_usage_limit`."""
    max_ncpus_pct: float = 100.0
    max_bytes_sec_up: float = 0.0
    max_bytes_sec_down: float = 0.0
    daily_xfer_limit_mb: float = 0.0
    daily_xfer_period_days: int = 0
    disk_interval: float = 0.0
    """Seconds between writes to the disk."""
    net_start_hour: float = 0.0
    """With `net_end_hour`: when the network may be used; the same hour twice means always."""
    net_end_hour: float = 0.0
    ram_max_used_busy_pct: float = 100.0
    ram_max_used_idle_pct: float = 100.0
    vm_max_used_pct: float = 100.0
    leave_apps_in_memory: bool = False
    disk_max_used_gb: float = 0.0
    disk_max_used_pct: float = 100.0
    disk_min_free_gb: float = 0.0
    network_wifi_only: bool = False


@dataclass(frozen=True)
class Host:
    """The computer as its client sees it; sizes in bytes."""

    p_ncpus: int = 1
    p_vendor: str = ""
    p_model: str = ""
    p_features: str = ""
    p_fpops: float = 0.0
    p_vm_extensions_disabled: bool = False
    m_nbytes: float = 0.0
    m_swap: float = 0.0
    d_total: float = 0.0
    d_free: float = 0.0
    os_name: str = ""
    os_version: str = ""
    product_name: str = ""
    virtualbox_version: str = ""
    docker_version: str = ""


@dataclass(frozen=True)
class Proxy:
    """How this computer reaches the network; never printed."""

    use_http_proxy: bool = False
    http_server_name: str = field(default="", repr=False)
    http_server_port: int = field(default=0, repr=False)
    http_user_name: str = field(default="", repr=False)
    http_user_passwd: str = field(default="", repr=False)
    use_socks_proxy: bool = False
    socks_server_name: str = field(default="", repr=False)
    socks_server_port: int = field(default=0, repr=False)
    socks5_user_name: str = field(default="", repr=False)
    socks5_user_passwd: str = field(default="", repr=False)
    no_proxy: str = field(default="", repr=False)


@dataclass(frozen=True)
class InitData:
    """One ``init_data.xml``. Times in seconds, sizes in bytes.

    Its `repr` shows neither the account's authenticator nor a proxy. A guest must see neither.
    """

    app_name: str = ""
    app_version: int = 0
    plan_class: str = ""
    result_name: str = ""
    wu_name: str = ""
    client_version: tuple[int, int, int] = (0, 0, 0)
    project_dir: Path = Path()
    """``Path()`` where the file has none."""
    boinc_dir: Path = Path()
    authenticator: str = field(default="", repr=False)
    slot: int = 0
    client_pid: int = 0
    """0: not known."""
    shm_key: int = -1
    """-1: the channels are in ``boinc_mmap_file``."""
    comm_obj_name: str = ""
    """Of the channels, on Windows."""
    wu_cpu_time: float = 0.0
    """CPU time of the job at its last checkpoint that the client read."""
    starting_elapsed_time: float = 0.0
    checkpoint_period: float = CHECKPOINT_PERIOD
    ncpus: float = 1.0
    rsc_fpops_est: float = 0.0
    rsc_fpops_bound: float = 0.0
    rsc_memory_bound: float = 0.0
    rsc_disk_bound: float = 0.0
    computation_deadline: float = 0.0
    """Seconds since 1970."""
    fraction_done_start: float = 0.0
    fraction_done_end: float = 1.0
    vbox_window: bool = False
    vm_extensions_disabled: bool = False
    using_sandbox: bool = False
    no_priority_change: bool = False
    process_priority: int = -1
    """-1: not set; 0 lowest to 4 highest, 5 real time."""
    process_priority_special: int = -1
    user_name: str = ""
    team_name: str = ""
    userid: int = 0
    teamid: int = 0
    hostid: int = 0
    user_total_credit: float = 0.0
    host_total_credit: float = 0.0
    project_preferences: str = field(default="", repr=False)
    """Raw, as the project's web site wrote it: not checked, not bounded but by the file."""
    global_preferences: GlobalPreferences = GlobalPreferences()
    host: Host = Host()
    app_files: tuple[str, ...] = ()
    proxy: Proxy = field(default=Proxy(), repr=False)


def read(path: Path) -> InitData:
    """Read a file; raises `InitDataInvalid`, and `OSError` when it cannot be read.

    No symbolic link is followed: the client makes a regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) \
        | getattr(os, "O_NONBLOCK", 0)  # else a pipe of that name would hold us
    fd = os.open(path, flags)
    with open(fd, "rb") as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InitDataInvalid(f"{path} is not a regular file")
        data = file.read(MAX_BYTES + 1)
    return parse(data)


def parse(data: bytes) -> InitData:
    """Raises `InitDataInvalid` for what has no ``<app_init_data>``, or is longer than 1 MiB."""
    if len(data) > MAX_BYTES:
        raise InitDataInvalid(f"this is no {FILE}: it has more than {MAX_BYTES} bytes")
    # Paths may hold any bytes, and must lead to the same file afterwards.
    text = data.decode("utf-8", "surrogateescape")
    start = re.search(rf"<{_ROOT}\s*/?>", text)
    if start is None:
        raise InitDataInvalid(f"this is no {FILE}: it has no <{_ROOT}>")
    text = text[start.end():]
    end = text.rfind(f"</{_ROOT}>")
    text = text if end < 0 else text[:end]
    # First of all: what a web form wrote could hold any element.
    text, preferences = _cut(text, "project_preferences")
    blocks = {}
    for name in _BLOCKS:
        text, inside = _cut(text, name)
        blocks[name] = Leaves(inside)
    return _init_data(Leaves(text), blocks, preferences)


def _init_data(top: Leaves, blocks: dict[str, Leaves], preferences: str) -> InitData:
    start = top.real("fraction_done_start", 0.0, most=1.0)
    end = top.real("fraction_done_end", 1.0, most=1.0)
    if end <= start:
        start, end = 0.0, 1.0
    return InitData(
        app_name=top.text("app_name"), app_version=top.whole("app_version"),
        plan_class=top.text("plan_class"), result_name=top.text("result_name"),
        wu_name=top.text("wu_name"),
        client_version=(top.whole("major_version"), top.whole("minor_version"),
                        top.whole("release")),
        project_dir=top.path("project_dir"), boinc_dir=top.path("boinc_dir"),
        authenticator=top.text("authenticator"), slot=top.whole("slot", least=0),
        client_pid=top.whole("client_pid", least=0, most=_MAX_PID),
        shm_key=top.whole("shm_key", -1), comm_obj_name=top.text("comm_obj_name"),
        wu_cpu_time=top.real("wu_cpu_time"),
        starting_elapsed_time=top.real("starting_elapsed_time"),
        checkpoint_period=top.real("checkpoint_period") or CHECKPOINT_PERIOD,
        ncpus=top.real("ncpus") or 1.0,
        rsc_fpops_est=top.real("rsc_fpops_est"), rsc_fpops_bound=top.real("rsc_fpops_bound"),
        rsc_memory_bound=top.real("rsc_memory_bound"), rsc_disk_bound=top.real("rsc_disk_bound"),
        computation_deadline=top.real("computation_deadline"),
        fraction_done_start=start, fraction_done_end=end,
        vbox_window=top.flag("vbox_window"),
        vm_extensions_disabled=top.flag("vm_extensions_disabled"),
        using_sandbox=top.flag("using_sandbox"),
        no_priority_change=top.flag("no_priority_change"),
        process_priority=top.whole("process_priority", -1, least=-1, most=5),
        process_priority_special=top.whole("process_priority_special", -1, least=-1, most=5),
        user_name=top.text("user_name"), team_name=top.text("team_name"),
        userid=top.whole("userid"), teamid=top.whole("teamid"), hostid=top.whole("hostid"),
        user_total_credit=top.real("user_total_credit"),
        host_total_credit=top.real("host_total_credit"),
        project_preferences=preferences.encode("utf-8", "surrogateescape").decode(
            "utf-8", "replace"),
        global_preferences=_preferences(blocks["global_preferences"]),
        host=_host(blocks["host_info"]), proxy=_proxy(blocks["proxy_info"]),
        app_files=top.every("app_file")[:MAX_APP_FILES])


def _preferences(found: Leaves) -> GlobalPreferences:
    def percent(name: str, default: float = 100.0) -> float:
        return found.real(name, default, most=100.0) or default  # 0 is how "not set" is written

    in_use = percent("cpu_usage_limit")
    return GlobalPreferences(
        cpu_usage_limit=in_use, niu_cpu_usage_limit=percent("niu_cpu_usage_limit", in_use),
        max_ncpus_pct=percent("max_ncpus_pct"),
        max_bytes_sec_up=found.real("max_bytes_sec_up"),
        max_bytes_sec_down=found.real("max_bytes_sec_down"),
        daily_xfer_limit_mb=found.real("daily_xfer_limit_mb"),
        daily_xfer_period_days=found.whole("daily_xfer_period_days", least=0),
        disk_interval=found.real("disk_interval"),
        net_start_hour=found.real("net_start_hour", most=24.0),
        net_end_hour=found.real("net_end_hour", most=24.0),
        ram_max_used_busy_pct=percent("ram_max_used_busy_pct"),
        ram_max_used_idle_pct=percent("ram_max_used_idle_pct"),
        vm_max_used_pct=percent("vm_max_used_pct"),
        leave_apps_in_memory=found.flag("leave_apps_in_memory"),
        disk_max_used_gb=found.real("disk_max_used_gb"),
        disk_max_used_pct=percent("disk_max_used_pct"),
        disk_min_free_gb=found.real("disk_min_free_gb"),
        network_wifi_only=found.flag("network_wifi_only"))


def _host(found: Leaves) -> Host:
    return Host(
        p_ncpus=found.whole("p_ncpus", 1, least=1, most=1 << 20),
        p_vendor=found.text("p_vendor"), p_model=found.text("p_model"),
        p_features=found.text("p_features"), p_fpops=found.real("p_fpops"),
        p_vm_extensions_disabled=found.flag("p_vm_extensions_disabled"),
        m_nbytes=found.real("m_nbytes"), m_swap=found.real("m_swap"),
        d_total=found.real("d_total"), d_free=found.real("d_free"),
        os_name=found.text("os_name", first=True), os_version=found.text("os_version", first=True),
        product_name=found.text("product_name"),
        virtualbox_version=found.text("virtualbox_version"),
        docker_version=found.text("docker_version", first=True))


def _proxy(found: Leaves) -> Proxy:
    def port(name: str) -> int:
        return found.whole(name, least=0, most=65535)

    return Proxy(
        use_http_proxy=found.flag("use_http_proxy"),
        http_server_name=found.text("http_server_name"), http_server_port=port("http_server_port"),
        http_user_name=found.text("http_user_name"),
        http_user_passwd=found.text("http_user_passwd"),
        use_socks_proxy=found.flag("use_socks_proxy"),
        socks_server_name=found.text("socks_server_name"),
        socks_server_port=port("socks_server_port"),
        socks5_user_name=found.text("socks5_user_name"),
        socks5_user_passwd=found.text("socks5_user_passwd"), no_proxy=found.text("no_proxy"))


def _cut(text: str, name: str) -> tuple[str, str]:
    """``text`` without the first ``<name>...</name>``, and what was in it.

    Without an end it holds nothing, and what follows counts as if its begin were not there.
    """
    start = text.find(f"<{name}>")
    end = text.find(f"</{name}>", start)
    if start < 0 or end < 0:
        return text, ""
    return text[:start] + text[end + len(name) + 3:], text[start + len(name) + 2:end]
