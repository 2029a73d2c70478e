"""The command line over a stand-in pipeline."""

import sys

import pytest

import optiq
from tests.unit.cli.fakes import FakePipeline


@pytest.fixture
def pipeline(monkeypatch):
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "optiq.pipeline", fake)
    monkeypatch.setattr(optiq, "pipeline", fake, raising=False)
    return fake
