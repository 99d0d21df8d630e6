"""What tests with vmjob's own apps share; and what explains a failure of one."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

from tests.e2e.project import Project

if TYPE_CHECKING:
    from vmjob.home import Home
    from vmjob.image.store import Image


@pytest.fixture(scope="session")
def app_image(default_image: Image) -> Image:
    """The image that app versions bring."""
    return default_image


@pytest.fixture(scope="session")
def shared_home(image_home: Home) -> Home:
    """The home whose templates all clients' projects use; see `lend_templates`."""
    return image_home


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
        item: pytest.Function,
        call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        found = [getattr(fixture, "project", fixture) for fixture in item.funcargs.values()]
        for project in {id(each): each for each in found if isinstance(each, Project)}.values():
            report.sections += list(project.explanation())
    return report
