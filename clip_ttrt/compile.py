"""python -m clip_ttrt.compile.  Imported, this is the function `clip_ttrt.compile`."""
import sys

import clip_ttrt

if __name__ == "__main__":
    from clip_ttrt.cli import main
    sys.exit(main(["compile", *sys.argv[1:]]))
sys.modules[__name__] = clip_ttrt.compile  # so that the import binds it to the package's name
