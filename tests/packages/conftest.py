"""Tests of the callback in other packages: `make test-packages`, which has environments of its own for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import packages_page
import pytest

collect_ignore = [
    path.name for path in Path(__file__).parent.glob("test_*.py") if not find_spec(path.stem.removeprefix("test_"))
]


@pytest.fixture(scope="module")
def run_page(request, tmp_path_factory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs the code of the package's section, with the names that it takes as given, in a folder of the module's.

    ``folder`` is among the names that come back.
    """
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield lambda **given: packages_page.run(request.module.SECTION, folder=folder, **given)
