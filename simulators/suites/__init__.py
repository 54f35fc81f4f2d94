"""Suites of environments: one file each, registered by being here. See simulators/suite.py for what one defines."""
