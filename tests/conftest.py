"""What all tests share."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _imported_libraries_are_no_garbage():
    # A million objects, through which each `gc.collect` of a search's trial would go.
    gc.freeze()
