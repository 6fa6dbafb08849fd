"""The edge to the command line: errors become one sentence and an exit code."""
import sys
from typing import Callable, Optional

import torch

from clip_ttrt.errors import UserError, VerificationError

VERIFICATION_FAILED = 1
BAD_INPUT = 2


def run(main: Callable[[Optional[list[str]]], int], arguments: Optional[list[str]] = None) -> int:
    """Call a program's main and return its exit code: 1 for a failed verification, 2 for bad input.

    Anything else that goes wrong is a defect of ours and keeps its traceback.
    """
    try:
        return main(arguments)
    except VerificationError as problem:
        return fail(problem, VERIFICATION_FAILED)
    except UserError as problem:
        return fail(problem, BAD_INPUT)
    except torch.cuda.OutOfMemoryError:
        return fail("out of GPU memory; use a smaller batch or free the GPU", BAD_INPUT)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", BAD_INPUT)


def fail(message: object, code: int) -> int:
    """Print one sentence to standard error; returns the code."""
    print(f"clip_ttrt: {message}", file=sys.stderr)
    return code
