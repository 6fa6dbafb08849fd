"""`clip-ttrt`, also where it is not installed: `python -m clip_ttrt COMMAND ...`."""
import sys

from clip_ttrt.cli import main

if __name__ == "__main__":
    sys.exit(main())
