"""python -m clip_ttrt.embed: files to features, by `clip_ttrt.pipeline.embed`."""
import sys

if __name__ == "__main__":
    from clip_ttrt.cli import main
    sys.exit(main(["embed", *sys.argv[1:]]))
