"""Rows for a published table of faults."""

import json
import os


def record(fault: str, injected: int, survived: int, detected: int, naive_failed: int, naive_tried: int,
           seconds: float):
    """A JSON line in the file that FAULTS_TABLE names, if it names one: how often, and what came of it."""
    row = locals()
    if path := os.environ.get("FAULTS_TABLE"):
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
