"""Imports ONNX Runtime with telemetry disabled; the only place that imports it.

Its official builds send events about the machine and the models to Microsoft, and write a machine
identifier into the user's cache directory, unless this variable is set before the library is
loaded. Set ORT_DISABLE_TELEMETRY=0 to allow it.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
