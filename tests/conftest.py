"""What all tests share."""

import signal

import pytest
from hypothesis import settings

# a busy machine is no failure: no test asserts a time
settings.register_profile("gristmill", deadline=None)
settings.load_profile("gristmill")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_children() -> None:
    """A shell that runs the tests in the background makes them ignore Ctrl-C, and their child processes with them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
