"""`python -m rnnfast`, and the `rnnfast` command: the command line, or why it can't start."""

from __future__ import annotations

import sys

# What the extra brings and the package itself does without.
EXTRA = ("typer", "rich", "safetensors")


def main() -> int:
    """Runs the command line and returns its exit status."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        print(
            f"rnnfast: the command line needs {package}: pip install 'rnnfast[cli]'",
            file=sys.stderr,
        )
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
