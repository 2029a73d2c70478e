"""Optional packages."""

import json

import pytest

from optiq import extras
from optiq.errors import UsageError


def test_a_package_that_is_there():
    assert extras.load("json", extra="eval", purpose="x") is json


def test_a_package_that_is_missing_is_named_with_the_extra_that_has_it():
    with pytest.raises(UsageError, match=r"scoring needs .*'no_such_pkg'.*'mlx-optiq\[eval\]'"):
        extras.load("no_such_pkg.part", extra="eval", purpose="scoring")
