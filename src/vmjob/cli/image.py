"""``vmjob image``: the images that machines boot from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import click
import msgspec

from vmjob.cli.main import print_json
from vmjob.engine.templates import Template, TemplateStore
from vmjob.errors import ImageCorrupt
from vmjob.home import Home
from vmjob.image.recipe import DEFAULT_NAME, Recipe
from vmjob.image.store import Image, ImageStore

__all__ = ["image"]

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
name_argument = click.argument("name", default=DEFAULT_NAME)


@click.group()
def image() -> None:
    """Build, list, check and remove the images that machines boot from."""


@image.command()
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="The image's name.")
@click.option("--package", "packages", multiple=True, metavar="P",
              help="Add a Debian package (P or P=VERSION).")
@click.option("--force", is_flag=True, help="Build even when the image is up to date.")
@as_json_option
def build(name: str, packages: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Build an image from Debian packages; root is not needed where user namespaces work.

    \b
    Example:
      vmjob image build --name science --package pari-gp --package bc
    """
    store = ImageStore(Home())
    recipe = Recipe(name, packages=packages)
    found = None if force else store.current(recipe)
    if found is None:
        with progress_bar(f"building {name}") as progress:
            found = store.build(recipe, progress)
    elif not as_json:
        click.echo(f"Image {name} is up to date.")
    if as_json:
        _show_json(found)
    else:
        _show(found)


@image.command(name="list")
@as_json_option
def list_images(as_json: bool) -> None:
    """List the images."""
    found = ImageStore(Home()).list()
    if as_json:
        print_json({"images": [_facts(each) for each in found]})
        return
    if not found:
        click.echo("There is no image yet; `vmjob image build` makes the default one.")
    for each in found:
        click.echo(f"{each.name:20} {each.manifest.total_size / 1e6:7.1f} MB  "
                   f"kernel {each.manifest.kernel_version}  "
                   f"{' '.join(each.manifest.requested) or '(base)'}")


@image.command()
@name_argument
@as_json_option
def inspect(name: str, as_json: bool) -> None:
    """Show what an image is made of."""
    home = Home()
    found = ImageStore(home).get(name)
    templates = TemplateStore(home).of_image(found.digest)
    if as_json:
        print_json({**_facts(found), "templates": [_template_facts(each) for each in templates]})
        return
    _show(found)
    for each in templates:
        facts = _template_facts(each)
        click.echo(f"  template {each.key}: {facts['memory_mb']} MB memory, {facts['cpus']} CPU, "
                   f"{facts['network']} network, {facts['cpu_model']}, {facts['accelerator']}; "
                   f"{each.disk_bytes / 1e6:.1f} MB")
    for package in found.manifest.packages:
        click.echo(f"  {package.name} {package.version}")


@image.command()
@name_argument
@as_json_option
def verify(name: str, as_json: bool) -> None:
    """Read an image's parts and compare their checksums."""
    found = ImageStore(Home()).verify(name)
    if as_json:
        print_json({"name": name, "intact": True})
    else:
        click.echo(f"Image {name} is intact ({found.manifest.total_size / 1e6:.1f} MB).")


@image.command()
@click.argument("name")
@as_json_option
def remove(name: str, as_json: bool) -> None:
    """Remove an image, and the machines frozen from it."""
    home = Home()
    store, templates = ImageStore(home), TemplateStore(home)
    with contextlib.suppress(ImageCorrupt):
        for each in templates.of_image(store.get(name).digest):
            templates.condemn(each.key)  # copies that run hold what they need
    store.remove(name)
    if as_json:
        print_json({"name": name, "removed": True})
    else:
        click.echo(f"Removed image {name}.")


def _facts(found: Image) -> dict[str, object]:
    return {"directory": str(found.directory), **msgspec.to_builtins(found.manifest)}


def _template_facts(template: Template) -> dict[str, object]:
    shape = template.manifest.shape
    return {"key": template.key, "bytes": template.disk_bytes, "used": template.used,
            "created": template.manifest.created, "seconds": template.manifest.seconds, **shape}


def _show_json(found: Image) -> None:
    print_json(_facts(found))


def _show(found: Image) -> None:
    made = found.manifest
    click.echo(f"Image {found.name}: {made.total_size / 1e6:.1f} MB in {found.directory}")
    click.echo(f"  Debian {made.suite}, kernel {made.kernel_version}, "
               f"{len(made.packages)} packages, agent protocol {made.agent_protocol}, "
               f"built {made.created}")
    for name, part in made.parts.items():
        click.echo(f"  {name:8} {part.size / 1e6:6.1f} MB  sha256 {part.sha256[:16]}…")


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr when that is a terminal, else a line per step."""
    if not sys.stderr.isatty():
        said: set[str] = set()

        def line(fraction: float, text: str) -> None:
            if text not in said:
                said.add(text)
                click.echo(f"vmjob: {title}: {text}", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=1.0)
        yield lambda fraction, text: bars.update(task, completed=fraction,
                                                 description=f"{title}: {text}")
