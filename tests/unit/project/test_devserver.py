"""The development server, asked as the client asks, and as nobody should."""

from __future__ import annotations

import hashlib
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmjob.cli import project
from vmjob.cli.main import cli
from vmjob.errors import (
    InputMissing,
    PackageInvalid,
    PortTaken,
    ResultOverdue,
    SignatureInvalid,
    UsageError,
)
from vmjob.job.markup import Element, parse
from vmjob.project import signing
from vmjob.project.devserver import DevServer
from vmjob.project.devserver import request as requests
from vmjob.project.devserver.uploads import MAX_HEADER
from vmjob.project.version import AppVersion, Source, build

PLATFORM = "x86_64-pc-linux-gnu"
DATA = bytes(range(256)) * 100
KEY = signing.generate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DevServer]:
    with DevServer(tmp_path / "server", key=KEY) as running:
        yield running


def a_version(root: Path, number: str = "1.00", plan_class: str = "vmjob",
              key: signing.PrivateKey | None = None, platform: str = PLATFORM) -> AppVersion:
    return build(root / "apps", [
        Source("", "main", ".sh", content=f"#!/bin/sh\n# {number}\n".encode(), main_program=True),
        Source("data", "data", content=DATA, copy_file=True)],
        app="lab", version=number, platform=platform, plan_class=plan_class, key=key)


def offered(server: DevServer, root: Path, **options: str) -> AppVersion:
    made = a_version(root, **options)  # type: ignore[arg-type]
    assert made.directory is not None
    return server.add_version(made.directory)


def get(server: DevServer, path: str, **headers: str) -> tuple[int, bytes]:
    asked = urllib.request.Request(server.url + path.lstrip("/"), headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def post(server: DevServer, path: str, body: bytes) -> Element:
    asked = urllib.request.Request(server.url + path, data=body)
    with urllib.request.urlopen(asked, timeout=10) as answer:
        data = answer.read()
    containers = {"scheduler_reply", "file_info", "file_ref", "app_version", "workunit", "result",
                  "result_ack", "result_abort", "trickle_down", "app"}
    return parse(data, frozenset(containers)).roots[0]


def ask(server: DevServer, *, results: str = "", wanted: float = 100, held: tuple[str, ...] = (),
        platform: str = PLATFORM, more: str = "", host: int = 1, key: str = "x",
        authenticator: str | None = None) -> Element:
    others = "".join(f"<other_result>\n<name>{each}</name>\n</other_result>\n" for each in held)
    return post(server, "cgi", (
        "<scheduler_request>\n"
        f"<authenticator>{authenticator or server.authenticator}</authenticator>\n"
        f"<hostid>{host}</hostid>\n<rpc_seqno>1</rpc_seqno>\n"
        f"<work_req_seconds>{wanted}</work_req_seconds>\n<platform_name>{platform}</platform_name>\n"
        f"<code_sign_key>\n{key}</code_sign_key>\n{results}"
        f"<app_versions>\n</app_versions>\n<other_results>\n{others}</other_results>\n{more}"
        "</scheduler_request>\n").encode())


def report(name: str, exit_status: int = 0, state: int = 5, stderr: str = "") -> str:
    return (f"<result>\n<name>{name}</name>\n<final_cpu_time>1.5</final_cpu_time>\n"
            f"<final_elapsed_time>2.5</final_elapsed_time>\n<exit_status>{exit_status}"
            f"</exit_status>\n<state>{state}</state>\n<version_num>100</version_num>\n"
            f"<plan_class>vmjob</plan_class>\n<stderr_out>\n<![CDATA[\n{stderr}]]>\n"
            "</stderr_out>\n</result>\n")


def upload(server: DevServer, name: str, data: bytes, *, offset: int = 0, nbytes: int | None = None,
           md5: str = "") -> int:
    head = (f"<data_server_request>\n<file_upload>\n<file_info>\n<name>{name}</name>\n"
            "<xml_signature>\n.\n</xml_signature>\n</file_info>\n"
            f"<nbytes>{len(data) if nbytes is None else nbytes}</nbytes>\n"
            f"<md5_cksum>{md5 or hashlib.md5(data).hexdigest()}</md5_cksum>\n"
            f"<offset>{offset}</offset>\n<data>\n")
    answer = post(server, "file_upload_handler", head.encode() + data[offset:])
    return int(value(answer, "status"))


def value(element: Element, name: str) -> str:
    return next((each.text for each in element.children if each.name == name), "")


def named(element: Element, kind: str) -> list[str]:
    return [value(each, "name") for each in element.children if each.name == kind]


def a_job(server: DevServer, root: Path, **options: object) -> str:
    (root / "in").write_bytes(DATA)
    return server.add_job(app="lab", inputs={"in": root / "in"}, outputs=["out"],
                          **options)  # type: ignore[arg-type]


def test_a_client_finds_the_scheduler_on_lines_that_it_can_read(server: DevServer) -> None:
    page = get(server, "/")[1].decode()
    assert f"<scheduler>{server.url}cgi</scheduler>\n" in page
    assert max(map(len, page.splitlines())) < 256


def test_a_login_gives_the_account_and_a_wrong_one_does_not(server: DevServer) -> None:
    right = hashlib.md5((server.password + server.email).encode()).hexdigest()
    for page in ("lookup_account.php", "create_account.php"):
        found = get(server, f"{page}?email_addr={server.email}&passwd_hash={right}")[1]
        assert server.authenticator.encode() in found
    for query in ("", "?email_addr=x&passwd_hash=y", f"?email_addr={server.email}&passwd_hash=x"):
        found = get(server, f"lookup_account.php{query}")[1]
        assert server.authenticator.encode() not in found
        assert b"<error_num>" in found


def test_a_job_comes_with_its_app_version_files_and_signatures(server: DevServer,
                                                               tmp_path: Path) -> None:
    version = offered(server, tmp_path)
    name = a_job(server, tmp_path, command_line="--x '<a b>'", disk_bound=5e9)
    reply = ask(server, host=0, key="")
    assert value(reply, "hostid") == "1"
    key_text = value(reply, "code_sign_key")
    (tmp_path / "key").write_text(f"{key_text}\n")
    key = signing.read_key(tmp_path / "key")
    assert isinstance(key, signing.PublicKey)
    files = {value(each, "name"): each for each in reply.children if each.name == "file_info"}
    for each in version.files:
        sent = files[each.physical_name]
        assert key.verifies(signing.md5_of(each.path), value(sent, "file_signature"))
        assert get(server, value(sent, "url").removeprefix(server.url))[1] == each.path.read_bytes()
    unit = next(each for each in reply.children if each.name == "workunit")
    assert value(unit, "command_line") == "--x '<a b>'"
    assert value(unit, "rsc_disk_bound") == "5000000000"
    app = next(each for each in reply.children if each.name == "app_version")
    assert (value(app, "api_version"), value(app, "is_wrapper")) == ("7.5.0", "1")
    assert named(reply, "result") == [name]


def test_a_known_client_gets_neither_key_nor_number_again(server: DevServer) -> None:
    reply = ask(server, host=7)
    assert {"hostid", "code_sign_key"}.isdisjoint(each.name for each in reply.children)


def test_a_stranger_gets_nothing(server: DevServer, tmp_path: Path) -> None:
    offered(server, tmp_path)
    name = a_job(server, tmp_path)
    reply = ask(server, authenticator="0" * 32, results=report(name))
    assert named(reply, "result") == []
    assert server.results == {}
    assert "account key" in value(reply, "message")


def test_a_job_is_given_once_and_again_only_when_it_was_lost(server: DevServer,
                                                             tmp_path: Path) -> None:
    offered(server, tmp_path)
    name = a_job(server, tmp_path)
    assert named(ask(server, wanted=0), "result") == []
    assert named(ask(server), "result") == [name]
    assert named(ask(server, held=(name,)), "result") == []
    assert named(ask(server), "result") == [name]
    ask(server, results=report(name), wanted=0)
    assert named(ask(server), "result") == []


def test_of_several_versions_the_newest_that_fits_is_given(server: DevServer,
                                                           tmp_path: Path) -> None:
    for number, plan_class, platform in (("1.00", "a", PLATFORM), ("2.00", "b", PLATFORM),
                                         ("3.00", "c", "windows_x86_64")):
        offered(server, tmp_path, number=number, plan_class=plan_class, platform=platform)
    a_job(server, tmp_path)
    a_job(server, tmp_path, plan_class="a")
    reply = ask(server)
    assert [value(each, "version_num") for each in reply.children if each.name == "result"] == [
        "200", "100"]
    assert server.platforms == ["windows_x86_64", PLATFORM]


def test_an_anonymous_platform_gets_a_job_for_what_it_has(server: DevServer,
                                                         tmp_path: Path) -> None:
    offered(server, tmp_path)
    name = a_job(server, tmp_path)
    held = ("<app_versions>\n<app_version>\n<app_name>lab</app_name>\n"
            f"<version_num>42</version_num>\n<platform>{PLATFORM}</platform>\n</app_version>\n</app_versions>\n")
    assert named(ask(server, platform="anonymous"), "result") == []
    reply = ask(server, platform="anonymous", results=held)
    assert named(reply, "result") == [name]
    assert "app_version" not in {each.name for each in reply.children}
    sent = next(each for each in reply.children if each.name == "result")
    assert value(sent, "version_num") == "42"


def test_a_report_becomes_a_result_with_its_outputs(server: DevServer, tmp_path: Path) -> None:
    offered(server, tmp_path)
    name = a_job(server, tmp_path)
    ask(server)
    assert upload(server, f"{name}_0", DATA) == 0
    stderr = "<message>\nprocess exited\n</message>\n<stderr_txt>\nwords\nmore\n\n</stderr_txt>\n"
    reply = ask(server, results=report(name, 7, 3, stderr))
    assert named(reply, "result_ack") == [name]
    result = server.wait_result(name, 5)
    assert (result.exit_status, result.state, result.succeeded) == (7, 3, False)
    assert (result.cpu_time, result.elapsed, result.version_num) == (1.5, 2.5, 100)
    assert (result.stderr_out, result.message) == ("words\nmore", "process exited")
    assert result.outputs["out"].read_bytes() == DATA


def test_what_the_client_says_after_the_jobs_words_is_its_message(server: DevServer,
                                                                  tmp_path: Path) -> None:
    """So it tells of outputs that are missing; a job cannot speak for it."""
    offered(server, tmp_path)
    name = a_job(server, tmp_path)
    ask(server)
    lie = "<message>\nall is well\n</message>"
    ask(server, results=report(name, 0, 3, (
        f"<stderr_txt>\n{lie}</stderr_txt>{lie}\n</stderr_txt>\n<message>\nupload failure: "
        "<file_xfer_error>\n<error_code>-161</error_code>\n</file_xfer_error>\n</message>\n")))
    result = server.wait_result(name, 5)
    assert result.message == ("upload failure: <file_xfer_error>\n<error_code>-161</error_code>\n"
                              "</file_xfer_error>")
    assert result.stderr_out == f"{lie}</stderr_txt>{lie}"


def test_who_waits_is_woken_by_the_report(server: DevServer, tmp_path: Path) -> None:
    offered(server, tmp_path)
    name = a_job(server, tmp_path)
    ask(server)
    found: list[bool] = []
    waiting = threading.Thread(
        target=lambda: found.append(server.wait_result(name, 20).succeeded))
    waiting.start()
    ask(server, results=report(name))
    waiting.join(20)
    assert found == [True]


def test_a_job_cannot_report_for_itself_or_another(server: DevServer, tmp_path: Path) -> None:
    """What a job writes on stderr stands inside the report."""
    offered(server, tmp_path)
    first, second, unsent = (a_job(server, tmp_path) for _ in range(3))
    server.abort(unsent)
    ask(server)
    forged = f"</stderr_txt></stderr_out></result>{report(second)}{report(unsent)}"
    ask(server, results=report(first, 1, 3, f"<stderr_txt>\n{forged}\n</stderr_txt>\n").replace(
        "]]>\n</stderr_out>\n</result>\n<result>", "</stderr_out>\n</result>\n<result>"))
    assert server.results.keys() == {first}
    assert server.results[first].exit_status == 1
    ask(server, results=report(first, 0, 5) + report("stranger"))
    assert server.results[first].exit_status == 1


def test_a_trickle_reports_nothing_and_hides_nothing(server: DevServer, tmp_path: Path) -> None:
    offered(server, tmp_path)
    first, second = a_job(server, tmp_path), a_job(server, tmp_path)
    ask(server)
    for text in (report(first), f"</msg_from_host>{report(first)}", "<![CDATA[", "<app_versions>"):
        reply = ask(server, held=(first, second), results=(
            f"<msg_from_host>\n<result_name>{second}</result_name>\n<time>1</time>\n"
            f"<variety>x</variety>\n{text}\n</msg_from_host>\n"))
        assert named(reply, "result_ack") == named(reply, "result") == []
    assert server.results == {}
    assert {each.result for each in server.trickles} == {second}


def test_trickles_go_up_and_down_and_aborts_and_messages_once(server: DevServer,
                                                             tmp_path: Path) -> None:
    offered(server, tmp_path)
    name = a_job(server, tmp_path)
    ask(server)
    server.send_trickle_down(name, "<go/>")
    server.abort(name)
    server.message("look\nhere", "notice")
    reply = ask(server, held=(name,), more=(
        f"<msg_from_host>\n<result_name>{name}</result_name>\n<time>12</time>\n"
        "<variety>state</variety>\n<text>half</text>\n</msg_from_host>\n"))
    assert [(each.result, each.time, each.variety, each.text) for each in server.trickles] == [
        (name, 12, "state", "<text>half</text>")]
    kinds = [each.name for each in reply.children]
    assert kinds.count("message_ack") == kinds.count("trickle_down") == 1
    assert named(reply, "result_abort") == [name]
    assert value(reply, "message") == "look here"
    again = [each.name for each in ask(server, held=(name,)).children]
    assert {"message_ack", "trickle_down", "result_abort", "message"}.isdisjoint(again)


def test_a_trickle_that_the_client_cannot_read_is_refused(server: DevServer,
                                                          tmp_path: Path) -> None:
    name = a_job(server, tmp_path)
    for text in ("x" * 251, "</trickle_down>"):
        with pytest.raises(UsageError):
            server.send_trickle_down(name, text)
    for call in (server.abort, lambda each: server.send_trickle_down(each, "x")):
        with pytest.raises(UsageError, match="no result"):
            call("nobody")


def test_a_download_resumes_where_it_stopped(server: DevServer, tmp_path: Path) -> None:
    data = offered(server, tmp_path).files[1]
    path = f"download/{data.physical_name}"
    assert get(server, path) == (200, DATA)
    assert get(server, path, Range="bytes=100-") == (206, DATA[100:])
    assert get(server, path, Range=f"bytes={len(DATA)}-")[0] == 416


@pytest.mark.parametrize("path", [
    "download/", "download/nothing", "download/../keys/code_sign_private", "download/%2e%2e/keys",
    "keys/code_sign_private", "../keys/code_sign_private", "upload/", "cgi", "etc/passwd",
    "download//etc/passwd"])
def test_nothing_but_what_is_offered_can_be_fetched(server: DevServer, path: str) -> None:
    assert get(server, path)[0] == 404


def test_an_upload_is_resumed_and_checked(server: DevServer, tmp_path: Path) -> None:
    name = f"{a_job(server, tmp_path)}_0"
    md5 = hashlib.md5(DATA).hexdigest()
    assert upload(server, name, DATA[:100], nbytes=len(DATA), md5=md5) == 1
    size = post(server, "file_upload_handler",
                f"<data_server_request>\n<get_file_size>{name}</get_file_size>\n".encode())
    assert value(size, "file_size") == "100"
    assert upload(server, name, DATA, offset=200) == 1
    assert upload(server, name, DATA, offset=100) == 0
    assert (server.root / "upload" / name).read_bytes() == DATA
    assert upload(server, name, DATA, md5="0" * 32) == 1
    assert not (server.root / "upload" / name).exists()


def test_an_upload_is_bounded_and_of_a_known_name(server: DevServer, tmp_path: Path) -> None:
    job = a_job(server, tmp_path, max_nbytes=10)
    assert upload(server, f"{job}_0", DATA) == -1
    assert upload(server, f"{job}_0", b"0123456789rest", nbytes=10,
                  md5=hashlib.md5(b"0123456789").hexdigest()) == 0
    assert (server.root / "upload" / f"{job}_0").read_bytes() == b"0123456789"
    for name in (f"{job}_1", f"{job}_00", "../x", "x", "", f"{job}_0/x", job):
        assert upload(server, name, b"x") == -1
    assert sorted(each.name for each in (server.root / "upload").iterdir()) == [f"{job}_0"]


def test_a_link_in_the_uploads_is_not_followed(server: DevServer, tmp_path: Path) -> None:
    name = f"{a_job(server, tmp_path)}_0"
    (server.root / "upload" / name).symlink_to(tmp_path / "victim")
    assert upload(server, name, b"x") == 1
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("body", [
    b"", b"\0", b"<data>\n", b"<name>x</name>\n<nbytes>-1</nbytes>\n<data>\n",
    b"x" * MAX_HEADER * 2,
    b"<name>x</name>\n<nbytes>1e999</nbytes><offset>0</offset><md5_cksum>x</md5_cksum>\n<data>\n"])
def test_an_upload_without_sense_is_refused(server: DevServer, body: bytes) -> None:
    assert value(post(server, "file_upload_handler", body), "status") == "-1"


def test_uploads_can_be_made_to_fail(server: DevServer, tmp_path: Path) -> None:
    name = f"{a_job(server, tmp_path)}_0"
    server.fail_uploads(1)
    assert upload(server, name, DATA) == 1
    assert upload(server, name, DATA) == 0


@pytest.mark.parametrize("head", [
    b"POST /cgi HTTP/1.1\r\n\r\n", b"POST /cgi HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /cgi HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    b"POST /else HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", b"\0\r\n\r\n", b"GET\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n"])
def test_a_request_that_is_none_is_answered_with_an_error(server: DevServer, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(head)
        raw.shutdown(socket.SHUT_WR)
        answer = raw.makefile("rb").read(4096)
    assert b" 200 " not in answer.partition(b"\r\n")[0]
    assert get(server, "/")[0] == 200


def test_any_bytes_are_read_as_a_request_without_an_error() -> None:
    for data in (b"", b"\xff\0", b"<result>" * 10_000, b"<![CDATA[" * 10_000, b"<hostid>x</hostid>",
                 b"<hostid>1e400</hostid><work_req_seconds>nan</work_req_seconds>"):
        found = requests.parse(data)
        assert (found.results, found.wanted) == ((), 0.0)


def test_only_loopback_is_listened_on(server: DevServer) -> None:
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", server.port), timeout=5):
        pass


def test_a_port_that_is_taken_is_an_error_with_advice(server: DevServer, tmp_path: Path) -> None:
    with pytest.raises(PortTaken):
        DevServer(tmp_path / "other", port=server.port)


def test_signatures_of_another_key_are_noticed(server: DevServer, tmp_path: Path) -> None:
    version = a_version(tmp_path, key=signing.generate())
    assert version.directory is not None
    with pytest.raises(SignatureInvalid):
        server.add_version(version.directory)
    server.add_version(version.directory, signatures="ignore")


def test_a_public_key_suffices_where_all_is_signed(tmp_path: Path) -> None:
    key = signing.generate()
    signed, unsigned = a_version(tmp_path, key=key), a_version(tmp_path, "2.00")
    assert signed.directory is not None
    assert unsigned.directory is not None
    with DevServer(tmp_path / "server", key=key.public) as server:
        server.add_version(signed.directory)
        with pytest.raises(SignatureInvalid, match="public key only"):
            server.add_version(unsigned.directory)


def test_a_name_never_gets_another_content(server: DevServer, tmp_path: Path) -> None:
    version = offered(server, tmp_path)
    assert version.directory is not None
    other = tmp_path / "b" / "lab" / "1.01" / version.directory.name
    other.mkdir(parents=True)
    (other / version.main_program.physical_name).write_text("another")
    with pytest.raises(PackageInvalid, match="content"):
        server.add_version(other)


def test_what_cannot_be_a_job_is_refused(server: DevServer, tmp_path: Path) -> None:
    for options in ({"app": "../x"}, {"outputs": ["../x"]}, {"inputs": {"/x": tmp_path}},
                    {"command_line": "a\nb"}):
        with pytest.raises(UsageError):
            server.add_job(**{"app": "lab", **options})  # type: ignore[arg-type]
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputMissing):
            server.add_job(app="lab", inputs={"in": path})


def test_a_wait_has_an_end(server: DevServer) -> None:
    with pytest.raises(ResultOverdue):
        server.wait_result("nobody", 0.01)
    with pytest.raises(ResultOverdue):
        server.wait_event("report", 0.01)
    get(server, "download/x")
    assert server.wait_event("download", 5, name="x").facts["found"] is False


def test_a_server_keeps_its_key_between_its_lives(tmp_path: Path) -> None:
    with DevServer(tmp_path) as first, DevServer(tmp_path) as second:
        assert first.state.key == second.state.key
        assert first.authenticator != second.authenticator


@pytest.mark.parametrize("comes", [True, False])
def test_what_clients_have_uploaded_is_not_lost_with_the_command(
        comes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = []

    def serve(server: DevServer, *, as_json: bool) -> None:
        roots.append(server.root)
        (job,) = server.state.jobs
        if comes:
            assert upload(server, f"{job}_0", DATA) == 0
        raise KeyboardInterrupt

    monkeypatch.setattr(project, "_serve", serve)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = a_version(tmp_path)
    run = CliRunner().invoke(cli, ["project", "serve-dev", str(made.directory), "--output", "out"])
    (root,) = roots
    assert root.is_relative_to(tmp_path)
    assert (str(root) in run.stderr) == comes
    assert [each.read_bytes() for each in root.glob("upload/*")] == [DATA] * comes
    assert root.exists() == comes
