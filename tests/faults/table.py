"""Rows for a published table of faults."""

import json
import os
import time
from contextlib import contextmanager

import pytest

BESIDE = ", saves written by a thread as on a GPU"  # in the name of a row


class Row:
    """
    Of one fault: trials injected, and of these survived to the last bit; or detected, that is refused with the exit
    code and the message that are documented; or harmless, where what was changed is not read or is as good as before.
    A trial that is none of these has failed, also where it ended the test.
    """

    def __init__(self, fault: str):
        self.test = int(os.environ.get("FAULTS_TEST", 0))  # its number, by which rows are put in order
        self.fault, self.injected, self.survived, self.detected, self.harmless = fault, 0, 0, 0, 0
        self.naive_tried, self.naive_failed, self.skipped, self.longest_s, self.measure = 0, 0, 0, 0.0, ""

    def measured(self, what: str):
        """Instead of a trial that survived or was detected, where the end is neither: stands beside the row's name."""
        self.measure, self.injected = what, self.injected - 1

    def took(self, seconds: float):
        """From a fault to the end of what it was to end."""
        self.longest_s = max(self.longest_s, seconds)

    def control(self, failed: bool):
        """One trial of the naive control: whether it failed."""
        self.naive_tried += 1
        self.naive_failed += failed


@contextmanager
def row(fault: str):
    """A Row to count on; at the end, whatever it is, a JSON line in the file that FAULTS_TABLE names, if it does."""
    counts, begun = Row(fault), time.time()
    try:
        yield counts
    except pytest.skip.Exception:
        counts.skipped += 1
        raise
    finally:
        if path := os.environ.get("FAULTS_TABLE"):
            with open(path, "a") as file:
                file.write(json.dumps(vars(counts) | {"seconds": time.time() - begun}) + "\n")
