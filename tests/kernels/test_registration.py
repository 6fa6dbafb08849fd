"""The plugins' creators in TensorRT itself; test_plugins.py has the same through a stand-in."""

import subprocess
import sys

import one_layer
import pytest

from clip_ttrt import kernels, linear

pytestmark = pytest.mark.gpu

FIELDS = {
    kernels.ATTENTION: {"heads": 12, "tokens": 77, "causal": 1, "query_bias": 1},
    kernels.BIAS_QUICK_GELU: {},
    kernels.RESIDUAL_LAYER_NORM: {"residual": 1, "epsilon": 1e-5},
    kernels.EXTRACT_PATCHES: {"patch_size": 14},
    kernels.EMBED_IMAGE: {"tokens": 50, "epsilon_pre": 1e-5, "epsilon_1": 1e-6},
    kernels.LINEAR: {"table": linear.pack(64, 128, False)},
}
REGISTER = """
import tensorrt as trt
class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []
    def log(self, severity, text):
        if severity <= trt.ILogger.ERROR:
            self.errors.append(text)
log = Log()
runtime = trt.Runtime(log)
from clip_ttrt import kernels
kernels.load(kernels.version())
kernels.load(kernels.version())
names = [getattr(one, "name", "") for one in trt.get_plugin_registry().all_creators]
print(sorted(one for one in names if one.startswith("Clip") and one != "Clip_TRT"))
print(log.errors)
"""


@pytest.fixture(scope="module")
def trt():
    return one_layer.tensorrt()


def test_registration_logs_no_error(trt):
    """Also a second one; in a process of its own, where TensorRT does not know them yet."""
    done = subprocess.run(
        [sys.executable, "-c", REGISTER], cwd=kernels.PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [str(sorted(FIELDS)), "[]"]
    assert " plugin: " not in done.stderr  # how ours begin a line


@pytest.mark.parametrize("name", FIELDS)
def test_creators_have_the_librarys_version_and_name_their_fields(trt, name):
    creator = one_layer.creator(trt, name)
    assert creator.plugin_version == kernels.version()
    assert [one.name for one in creator.field_names] == list(FIELDS[name])
    assert one_layer.create(trt, name, FIELDS[name]) is not None


def wrong_fields(trt, name):
    """(what is wrong, fields), with a null, a wrong and a missing one for each field."""
    good = {key: one_layer.field(trt, key, value) for key, value in FIELDS[name].items()}
    yield "unknown", [*good.values(), one_layer.field(trt, "other", 1)]
    for key, one in good.items():
        others = [field for other, field in good.items() if other != key]
        null = trt.PluginField(key)
        null.type, null.size = one.type, one.size
        yield f"null {key}", [*others, null]
        kind = "text" if isinstance(FIELDS[name][key], float) else 0.5
        wrong = one_layer.field(trt, key, kind.encode() if isinstance(kind, str) else kind)
        yield f"{key} of another type", [*others, wrong]
        yield f"{key} missing", others
        yield f"{key} twice", [*good.values(), one]


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_fields_are_refused_in_one_line(trt, name, capfd):
    for what, fields in wrong_fields(trt, name):
        capfd.readouterr()
        assert one_layer.create(trt, name, fields) is None, what
        [line] = [one for one in capfd.readouterr().err.splitlines() if "plugin:" in one]
        assert line.startswith(f"{name} plugin: "), what
