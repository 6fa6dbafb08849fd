"""python -m clip_ttrt.search: `clip-ttrt search`."""
import sys

if __name__ == "__main__":
    from clip_ttrt.cli import main
    sys.exit(main(["search", *sys.argv[1:]]))
