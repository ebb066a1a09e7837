"""Errors a user can mend, and the exit code each one ends a command with."""

from __future__ import annotations


class GenforceError(Exception):
    """An expected failure: its text names the thing at fault and the remedy in one line."""

    exit_code = 1


class ConfigError(GenforceError):
    """A cell, sensor or plan file is malformed; the text names file, key and allowed values."""

    exit_code = 2


class DeviceError(GenforceError):
    """A device is missing, unreachable, busy or does not answer as its protocol says."""

    exit_code = 3


class SafetyError(GenforceError):
    """A limit was or would be exceeded; motion was stopped or refused."""

    exit_code = 4


class DataError(GenforceError):
    """A bag, data set or bundle is damaged or does not fit; the text names the file."""

    exit_code = 5
