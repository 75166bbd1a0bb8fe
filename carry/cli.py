"""The console script `carry`."""

from __future__ import annotations

import os

from carry.own_packages import load_own_packages

# Pydantic would look for plugins, of which none is used, in the metadata of all installed packages.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
# Worker processes import this module first too, since it is the main module's.
load_own_packages("models", "service")

from service.commands.cli import main as run  # noqa: E402


def main() -> None:
    """Run a command; its processes ignore modules of the working directory."""
    os.environ["PYTHONSAFEPATH"] = "1"
    # TensorFlow logs its start to stderr from C++; errors are still logged
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    run()


if __name__ == "__main__":
    main()
