"""``vmjob project``: the BOINC project's side."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmjob.cli.job import finding_as_dict, say_findings
from vmjob.cli.main import fail, plain, print_json
from vmjob.errors import JobFileInvalid, KeyFileInvalid, UsageError, VmjobError
from vmjob.home import Home, remove_tree
from vmjob.image.recipe import DEFAULT_NAME
from vmjob.image.store import ImageStore
from vmjob.project import names, planclass, signing, templates
from vmjob.project import package as packages

if TYPE_CHECKING:
    from vmjob.job.model import Job
    from vmjob.project.boinccmd import ClientTask
    from vmjob.project.devserver import DevServer, Result

__all__ = ["project"]

#: Seconds between checkpoints that a client asks for; a trial that is to show some is short.
CHECKPOINT_PERIOD, VOLUNTEERS_PERIOD = 60.0, 10.0
EXIT_JOBS_FAILED = 1
NO_IMAGE = "none"
KEPT = "vmjob: everything is in {}; remove it when you have seen it."
#: Seconds that a trial may take unless --deadline says another time.
DEADLINE = 3600.0

file_type = click.Path(path_type=Path)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
job_option = click.option("--job", "job_file", type=file_type, required=True, metavar="FILE",
                          help="The job file: vbox_job.xml, job.xml or TOML.")
inputs_option = click.option("--input", "inputs", multiple=True, metavar="LOGICAL",
                             help="A file that each workunit brings (repeatable).")


@click.group()
def project() -> None:
    """The BOINC project's side: packages, keys, templates, a server to try them on."""


@project.command()
@click.option("--app", required=True, metavar="A", help="The app's short name.")
@click.option("--version", "number", required=True, metavar="N.NN", help="As 1.00.")
@click.option("--platform", default=packages.PLATFORM, show_default=True, metavar="P")
@click.option("--plan-class", default=packages.PLAN_CLASS, show_default=True, metavar="C",
              help="'' for none; see `vmjob project plan-classes`.")
@job_option
@click.option("--image", default=DEFAULT_NAME, show_default=True, metavar="I",
              help=f"An image of `vmjob image list`; {NO_IMAGE!r}: none.")
@click.option("--wrapper", type=file_type, metavar="FILE",
              help="The program that volunteers' clients start; without it, this very Python.")
@click.option("--qemu", type=file_type, metavar="FILE", help="QEMU, as a tar.gz, to bring along.")
@click.option("--file", "files", multiple=True, metavar="LOGICAL=PATH",
              help="A further file of the app version (repeatable).")
@click.option("--copy", "copied", multiple=True, metavar="LOGICAL",
              help="Copy this one into each slot instead of linking it (repeatable).")
@inputs_option
@click.option("--file-prefix", default="", metavar="DIR",
              help="Directory of the slot that workunits' files are in, as `shared`.")
@click.option("--key", type=file_type, metavar="FILE", help="Sign with this private key.")
@click.option("--output", type=file_type, default=Path("apps"), show_default=True, metavar="DIR",
              help="Where APP/VERSION/PLATFORM__PLANCLASS goes.")
@as_json_option
def package(app: str, number: str, platform: str, plan_class: str, job_file: Path, image: str,
            wrapper: Path | None, qemu: Path | None, files: tuple[str, ...],
            copied: tuple[str, ...], inputs: tuple[str, ...], file_prefix: str, key: Path | None,
            output: Path, as_json: bool) -> None:
    """Make an app version: a directory for a project's apps/, or for serve-dev.

    The job file is checked first; with errors nothing is made.

    \b
    Example:
      vmjob project package --app worker --version 1.00 --job vbox_job.xml \\
          --file shared/boinc_app=boinc_app --input shared/in --key keys/code_sign_private
    """
    with _errors(as_json):
        names.check_app(app)
        private = _private_key(key) if key is not None else None
        more = _pairs("--file", files)
        found = None if image == NO_IMAGE else ImageStore(Home()).verified(image)
        made = packages.package(
            output, app=app, number=number, job=job_file, image=found, platform=platform,
            plan_class=plan_class, wrapper=wrapper, qemu=qemu, files=more,
            copied=copied, inputs=inputs, file_prefix=file_prefix, key=private)
    version = made.version
    limits = templates.bounds(made.job, image_bytes=found.manifest.total_size if found else 0)
    if as_json:
        print_json({"directory": str(version.directory), "app": version.app,
                    "version_num": version.version_num, "platform": version.platform,
                    "plan_class": version.plan_class,
                    "files": [{"physical_name": each.physical_name,
                               "logical_name": each.logical_name,
                               "main_program": each.main_program, "copy_file": each.copy_file,
                               "bytes": each.path.stat().st_size, "signed": bool(each.signature)}
                              for each in version.files],
                    "bounds": dataclasses.asdict(limits), "warnings": list(made.warnings),
                    "findings": list(map(finding_as_dict, made.findings))})
        return
    say_findings(job_file, made.findings, err=True)
    for each in made.warnings:
        click.echo(f"vmjob: warning: {each}", err=True)
    click.echo(f"{version.directory}")
    for file in version.files:
        size = file.path.stat().st_size
        click.echo(f"  {file.logical_name or '(main program)':28} {size / 1e6:9.3f} MB  "
                   f"{file.physical_name}{'  copied' if file.copy_file else ''}")


@project.command()
@click.argument("directory", type=file_type, default=Path("keys"))
@as_json_option
def keys(directory: Path, as_json: bool) -> None:
    """Make a code signing key: code_sign_private and code_sign_public in DIRECTORY.

    Keep the private one on a computer that is not on the network: whoever has it can run programs
    on all the project's volunteers' computers.
    """
    with _errors(as_json):
        private, public = signing.write_keys(directory, signing.generate())
    if as_json:
        print_json({"private": str(private), "public": str(public)})
    else:
        click.echo(f"{private}\n{public}")
        click.echo("Keep the private one off the network: the project's server needs only the "
                   "public one.", err=True)


@project.command(name="templates")
@click.option("--app", required=True, metavar="A", help="The app's short name.")
@job_option
@inputs_option
@click.option("--output", "outputs", multiple=True, metavar="LOGICAL",
              help="A file that the job makes (repeatable).")
@click.option("--copy", "copied", multiple=True, metavar="LOGICAL",
              help="An input or output that is copied instead of linked (repeatable).")
@click.option("--file", "files", multiple=True, metavar="LOGICAL=PATH",
              help="A file of the app version (repeatable); the check of the job looks for it.")
@click.option("--command-line", default="", metavar="ARGS", help="The wrapper's arguments.")
@click.option("--max-nbytes", type=click.IntRange(min=1), default=templates.OUTPUT,
              show_default=True, metavar="N", help="Largest size of one output, bytes.")
@click.option("--image", default=DEFAULT_NAME, show_default=True, metavar="I",
              help=f"The image of the app version; {NO_IMAGE!r}: none.")
@click.option("--directory", type=file_type, default=Path("templates"), show_default=True,
              help="Where A_in and A_out go.")
@as_json_option
def templates_command(app: str, job_file: Path, inputs: tuple[str, ...],
                      outputs: tuple[str, ...], copied: tuple[str, ...], files: tuple[str, ...],
                      command_line: str, max_nbytes: int, image: str, directory: Path,
                      as_json: bool) -> None:
    """Write the input and output template of an app, with bounds that fit its machine."""
    with _errors(as_json):
        found = _job_of(job_file, _pairs("--file", files), inputs)
        size = 0 if image == NO_IMAGE else ImageStore(Home()).get(image).manifest.total_size
        limits = templates.bounds(found, image_bytes=size, outputs=len(outputs),
                                  output_bytes=max_nbytes)
        if strange := set(copied) - {*inputs, *outputs}:
            raise UsageError(f"{min(strange)!r} is neither an input nor an output")
        texts = {"in": templates.input_template(
                     inputs, limits, copied=[each for each in copied if each in inputs],
                     command_line=command_line),
                 "out": templates.output_template(
                     outputs, max_nbytes=max_nbytes,
                     copied=[each for each in copied if each in outputs])}
        paths = _write(directory, {f"{names.check_app(app)}_{kind}": text
                                   for kind, text in texts.items()})
    if as_json:
        print_json({"files": list(map(str, paths)), "bounds": dataclasses.asdict(limits)})
        return
    for path in paths:
        click.echo(path)
    click.echo(f"Bounds: {limits.disk / 1e9:.1f} GB of disk (the job's disk_gb counts twice), "
               f"{limits.memory / 1e6:.0f} MB of memory, {limits.delay / 86400:.0f} days.",
               err=True)


@project.command(name="plan-classes")
@click.option("--output", type=file_type, metavar="FILE",
              help="Write this file instead of stdout; one that is there is not replaced.")
def plan_classes(output: Path | None) -> None:
    """Show plan_class_spec.xml for vmjob's app versions, to be merged into a project's own."""
    text = planclass.spec()
    if output is None:
        click.echo(text, nl=False)
    else:
        _write(output.parent, {output.name: text})


@project.command(name="serve-dev")
@click.argument("versions", nargs=-1, required=True, type=file_type, metavar="APPDIR...")
@click.option("--input", "inputs", multiple=True, metavar="LOGICAL=FILE",
              help="An input of each job (repeatable).")
@click.option("--output", "outputs", multiple=True, metavar="LOGICAL",
              help="An output of each job (repeatable).")
@click.option("--jobs", type=click.IntRange(1, 1000), default=1, show_default=True, metavar="N")
@click.option("--command-line", default="", metavar="ARGS", help="The wrapper's arguments.")
@click.option("--copy-outputs", is_flag=True, help="The job writes outputs in its slot.")
@click.option("--disk", "disk_gb", type=click.FloatRange(min=0.001), default=10.0,
              show_default=True, metavar="GB", help="What a job may take of the disk.")
@click.option("--memory", "memory_mb", type=click.FloatRange(min=1), default=1000.0,
              show_default=True, metavar="MB", help="What a job may take of memory.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="P",
              help="Of 127.0.0.1; 0: any that is free.")
@click.option("--root", type=file_type, metavar="DIR",
              help="Keep the server's files here (default: a temporary folder, gone at the end "
                   "unless a client has computed something).")
@click.option("--key", type=file_type, metavar="FILE",
              help="The project's key, to check signatures with; without it all is signed anew.")
@click.option("--with-client", is_flag=True,
              help="Start the real BOINC client, compute all jobs, and end.")
@click.option("--like-a-volunteer", is_flag=True,
              help="With --with-client: suspend the first job, and restart the client, meanwhile.")
@click.option("--timeline", type=file_type, metavar="FILE.svg",
              help="With --with-client: draw the life of the jobs.")
@click.option("--deadline", type=click.FloatRange(min=1), default=DEADLINE, show_default=True,
              metavar="S", help="With --with-client: the most that all may take.")
@as_json_option
def serve_dev(versions: tuple[Path, ...], inputs: tuple[str, ...], outputs: tuple[str, ...],
              jobs: int, command_line: str, copy_outputs: bool, disk_gb: float, memory_mb: float,
              port: int, root: Path | None, key: Path | None, with_client: bool,
              like_a_volunteer: bool, timeline: Path | None, deadline: float,
              as_json: bool) -> None:
    """Serve app versions on this computer, for trials: a project that a real client attaches to.

    With --with-client, exit code 0 only when all jobs have succeeded. Else it serves until Ctrl-C.

    \b
    Example:
      vmjob project serve-dev apps/worker/1.00/* --input shared/in=in.dat \\
          --output shared/out --with-client
    """
    from vmjob.project.devserver import DevServer

    with _errors(as_json), contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        if with_client:
            from vmjob.project.devclient import programs

            programs()
        if root is None:
            root = Path(tempfile.mkdtemp(prefix="vmjob-dev-"))
            # Kept once there are outputs in it, or a client's messages that tell what went wrong.
            stack.callback(_remove_unless_used, root, say=not with_client)
        server = stack.enter_context(DevServer(
            root, port=port, key=signing.read_key(key) if key is not None else None))
        apps = {}
        for directory in versions:
            version = server.add_version(directory, signatures="check" if key else "ignore")
            apps[version.app] = version
        if len(apps) != 1:
            raise UsageError(f"these are versions of several apps: {', '.join(sorted(apps))}",
                             advice="Give the versions of one app.")
        wanted = [server.add_job(app=next(iter(apps)), inputs=_pairs("--input", inputs),
                                outputs=outputs, command_line=command_line,
                                disk_bound=disk_gb * 1e9, memory_bound=memory_mb * 1e6,
                                copy_outputs=copy_outputs) for _ in range(jobs)]
        if with_client:
            results = _compute(server, root, wanted, deadline, timeline,
                               volunteer=like_a_volunteer, as_json=as_json)
            _show(results, root, as_json=as_json)
            sys.exit(0 if all(each.succeeded for each in results) else EXIT_JOBS_FAILED)
        _serve(server, as_json=as_json)


# -- inside ------------------------------------------------------------------------------------


def _remove_unless_used(root: Path, *, say: bool) -> None:
    """``say``: where what is kept is; else whoever shows the results does."""
    uploads = root / "upload"
    if not (root / "client").exists() and not (uploads.is_dir() and any(uploads.iterdir())):
        remove_tree(root)
    elif say:
        click.echo(KEPT.format(root), err=True)


def _serve(server: DevServer, *, as_json: bool) -> None:
    """Say how to attach, then every report, until somebody ends us."""
    attach = ["boinccmd", "--project_attach", server.url, server.authenticator]
    if as_json:
        print_json({"url": server.url, "authenticator": server.authenticator})
    else:
        click.echo(f"Serving {server.url} until Ctrl-C. A client attaches with:\n"
                   f"  {shlex.join(attach)}")
    sys.stdout.flush()
    said: set[str] = set()
    while True:
        # A bounded wait: Python hears a signal only between two of them.
        server.wait(lambda: bool(server.state.results.keys() - said), 1.0)
        for name, result in server.results.items():
            if name not in said:
                said.add(name)
                click.echo(_line(result), err=as_json)


def _compute(server: DevServer, root: Path, wanted: list[str], deadline: float,
             picture: Path | None, *, volunteer: bool, as_json: bool) -> list[Result]:
    from vmjob.project.devclient import DevClient
    from vmjob.project.timeline import Timeline
    from vmjob.project.trial import Volunteer, compute

    shown: dict[str, str] = {}
    life = Timeline()

    def acted(what: str) -> None:
        life.mark(time.time(), what)
        click.echo(f"vmjob: {what}", err=True)

    def progress(tasks: list[ClientTask]) -> None:
        life.add(time.time(), tasks)
        if person is not None:
            person.act(tasks)
        for task in () if as_json else tasks:
            line = f"{task.active or task.state}, {100 * task.fraction_done:.0f} % done"
            if shown.get(task.name) != line:
                shown[task.name] = line
                click.echo(f"vmjob: {task.name}: {line}, {task.cpu_time:.1f} s of CPU time",
                           err=True)

    click.echo(f"vmjob: starting the BOINC client in {root / 'client'}", err=True)
    client = DevClient(root / "client", url=server.url, authenticator=server.authenticator,
                       checkpoint_period=VOLUNTEERS_PERIOD if volunteer else CHECKPOINT_PERIOD)
    person = Volunteer(client, acted) if volunteer else None
    try:
        with client:
            found = compute(server, client, wanted, deadline, progress)
    finally:
        if picture is not None:
            life.mark(time.time(), "the end")
            picture.write_text(life.svg(), encoding="utf-8")
        for left in client.leftovers:
            click.echo(f"vmjob: warning: a task left a process behind, which was killed: "
                       f"{left.command}", err=True)
    return list(found.values())


def _show(results: list[Result], root: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"root": str(root), "results": [
            {**dataclasses.asdict(each), "succeeded": each.succeeded,
             "outputs": {name: str(path) for name, path in each.outputs.items()}}
            for each in results]})
        return
    for each in results:
        click.echo(_line(each))
        if each.message:
            click.echo("  the client says: " + " ".join(map(plain, each.message.splitlines())))
        for text in each.stderr_out.splitlines():
            click.echo(f"  | {plain(text)}")
        for name, path in each.outputs.items():
            click.echo(f"  {name}: {path} ({path.stat().st_size} bytes)")
    click.echo(KEPT.format(root), err=True)


def _line(result: Result) -> str:
    verdict = "succeeded" if result.succeeded else "failed"
    return (f"{result.name}: {verdict}, exit status {result.exit_status}, "
            f"{result.elapsed:.1f} s, {result.cpu_time:.1f} s of CPU time")


def _pairs(option: str, given: Iterable[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for each in given:
        logical, equals, path = each.partition("=")
        if not equals or not path:
            raise UsageError(f"{option} {each!r} is not LOGICAL=PATH")
        if logical in found:
            raise UsageError(f"{option} {logical!r} is given twice")
        found[logical] = Path(path)
    return found


def _private_key(path: Path) -> signing.PrivateKey:
    key = signing.read_key(path)
    if not isinstance(key, signing.PrivateKey):
        raise KeyFileInvalid(f"{str(path)!r} is a public key, which signs nothing",
                             advice="Give the private one.")
    return key


def _job_of(file: Path, files: dict[str, Path], inputs: Iterable[str]) -> Job:
    reading = packages.check_job(file, {**files, **dict.fromkeys(inputs)})
    if reading.job is None:
        raise JobFileInvalid(f"{file} holds no job")
    return reading.job


def _write(directory: Path, texts: dict[str, str]) -> list[Path]:
    paths = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            path = directory / name
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            paths.append(path)
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}",
                         advice="Give the name of a file that is not there yet.") from None
    return paths


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends us as Ctrl-C does: the client, and files that nobody wants, go with us."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    try:
        yield
    except VmjobError as error:
        if not as_json:
            raise
        fail(error, as_json=True)
