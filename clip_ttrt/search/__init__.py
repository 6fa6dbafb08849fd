"""Pictures and moments of videos by a text, a picture or sums of both: `clip-ttrt search`.

    clip_ttrt.search.index("library", ["pictures/", "films/"], artifact="artifacts/demo-fp16")
    clip_ttrt.search.Library("library").query("a red circle + 0.5*a star")["results"]
"""
from clip_ttrt.search.indexing import index
from clip_ttrt.search.library import Library

__all__ = ["Library", "index"]
