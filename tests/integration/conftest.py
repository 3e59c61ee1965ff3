"""With REQUIRE_INTEGRATION=1, as in `make test-integration`, a skipped test is a failure: the
packages of requirements-integration.txt are there, so nothing is left out unnoticed.
"""

import os

import pytest

REQUIRED = os.environ.get("REQUIRE_INTEGRATION") == "1"


def _must_run(report):
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} must not be skipped (REQUIRE_INTEGRATION=1): {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """A test that skips itself."""
    return _must_run((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    """A file that skips itself, by pytest.importorskip."""
    return _must_run((yield))
