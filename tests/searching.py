"""What the tests of search find things in: pictures and videos of the embedded model's scenes."""
from fractions import Fraction
from functools import lru_cache

from clip_ttrt.demo import scenes
from clip_ttrt.search import index

CAPTIONS = scenes.held_out_classes()
EVIL = '81 <img src=x onerror="window.hit = 1">.png'
TWIN = "9 again.png"
PICTURES = (0, 9, 18, 27, 36, 45, 54, 63, 72, 81)  # classes that are pictures
VIDEOS = {  # codec, frames per second (None: varying), classes in turn
    "ntsc.mp4": ("libx264", Fraction(30000, 1001), (1, 50, 71)),
    "film.mp4": ("libx264", Fraction(24000, 1001), (113, 4, 60)),
    "fast.mp4": ("libx264", Fraction(60000, 1001), (94, 30, 13)),
    "varying.mkv": ("mpeg4", None, (76, 22, 100)),
    "play.webm": ("libvpx", Fraction(25), (104, 40, 88)),
}
TURN = 2  # seconds of a class


@lru_cache
def pixels():
    return scenes.held_out_set(per_class=1)[0].permute(0, 2, 3, 1).numpy()


def write_video(path, codec, rate, classes, turn=TURN):
    """Each class is shown for so many seconds."""
    import av

    tick = 1 / Fraction(rate) if rate else Fraction(1, 1000)
    times = range(int(len(classes) * turn * rate)) if rate else [
        60 * n + 37 * (n % 7) for n in range(len(classes) * turn * 1000 // 60 - 4)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate or 30)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 112, 112, "yuv420p", 400_000
        stream.time_base = stream.codec_context.time_base = tick
        for time in sorted(times):
            shown = pixels()[classes[int(time * tick / turn)]]
            frame = av.VideoFrame.from_ndarray(shown.copy(), format="rgb24")
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_files(folder):
    """All of PICTURES and VIDEOS, a near-duplicate, and three files that are none."""
    drawn = scenes.held_out_set(per_class=1)[0]
    for number in PICTURES:
        scenes.to_image(drawn[number]).save(folder / (f"{number}.png" if number != 81 else EVIL))
    scenes.to_image(drawn[9] & 254).save(folder / TWIN)
    for name, video in VIDEOS.items():
        write_video(folder / name, *video)
    (folder / "empty.mp4").touch()
    (folder / "broken.webm").write_bytes(b"broken" * 100)
    (folder / "page.jpg").write_bytes(b"<html>not found</html>")
    (folder / "notes.txt").write_text("nobody looks into this")


MADE = {}


def made_once(factory, artifact):
    """Folders of the files, and of a library of them, for tests that change neither."""
    if artifact not in MADE:
        files, library = factory.mktemp("files"), factory.mktemp("libraries") / "library"
        write_files(files)
        MADE[artifact] = files, library, index(library, [files], artifact)
    return MADE[artifact]
