"""Stands in for hypothesis on a machine without it, such as one lent for its GPU: the tests of properties are skipped.

`make gpu` puts this folder on the path there.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest

HealthCheck = strategies = MagicMock()


def given(*_: Any, **__: Any) -> pytest.MarkDecorator:
    return pytest.mark.skip(reason="hypothesis is not installed")


def settings(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda test: test
