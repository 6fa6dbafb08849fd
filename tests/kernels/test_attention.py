"""The fused attention kernel: the interface, and the numbers it computes."""

import ctypes
import pathlib
import re

import pytest

import attention_checks as attention_bench
from clip_ttrt import kernels
import needs

ROOT = pathlib.Path(__file__).parents[2]
HEADER = ROOT / "kernels" / "attention" / "attention.h"
HOPPER, AMPERE, TURING = (9, 0), (8, 6), (7, 5)


# The interface


def test_ctypes_struct_agrees_with_the_header():
    body = re.search(r"typedef struct ClipAttentionParams \{(.*?)\}", HEADER.read_text(), re.DOTALL).group(1)
    fields = re.findall(r"^\s*(const void\*|void\*|int64_t|int32_t) (\w+);", body, re.MULTILINE)
    types = {
        "const void*": ctypes.c_void_p, "void*": ctypes.c_void_p,
        "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32,
    }  # fmt: skip
    assert [(name, types[kind]) for kind, name in fields] == list(attention_bench.Params._fields_)
    assert attention_bench.Params._fields_ == kernels.AttentionParams._fields_  # the bench runs without our package


@needs.built
def test_library_states_the_size_of_the_struct(library):
    # Three pointers, an int64 and four int32, without padding.
    assert library._library.clip_attention_params_size() == ctypes.sizeof(attention_bench.Params) == 3 * 8 + 8 + 4 * 4


@pytest.fixture
def library():
    return attention_bench.Library(kernels.find().path)


@needs.built
def test_every_length_has_a_variant_on_every_supported_gpu(library):
    for capability in (HOPPER, AMPERE):
        for tokens in range(1, 1025):
            for causal in (False, True):
                for batch in (1, 128):
                    chosen = library.choose(batch, 12, tokens, causal, capability, 132)
                    assert library.serves(chosen, tokens, causal, capability), (capability, tokens, causal)


@needs.built
def test_variants_stay_on_their_gpus(library):
    for variant, name in library.variants.items():
        on_ampere = any(library.serves(variant, t, c, AMPERE) for t in (1, 50, 77, 257, 577) for c in (False, True))
        assert on_ampere == name.startswith("portable"), name
        assert not library.serves(variant, 50, False, TURING)


@needs.built
@pytest.mark.parametrize("tokens, tail", [(50, 56), (197, 8), (257, 72), (577, 8)])
def test_clip_lengths_are_padded_by_less_than_eight_keys(library, tokens, tail):
    """The last chunk of keys is cut to size: 50 <= 56, 197 = 2 * 96 + 5, 257 = 2 * 96 + 65, 577 = 6 * 96 + 1."""
    name = library.variants[library.choose(128, 12, tokens, False, HOPPER, 132)]
    chunk, last = re.fullmatch(r"hopper (\d+)/(\d+)x\d", name).groups()
    assert int(last) == tail and 0 <= tail - tokens % int(chunk) < 8


@needs.built
def test_batch_and_length_choose_the_kernel(library):
    def name(batch, heads, tokens, causal=False):
        return library.variants[library.choose(batch, heads, tokens, causal, HOPPER, 132)]

    assert name(1, 12, 50).startswith("short") and name(128, 12, 50).startswith("hopper")
    assert name(128, 8, 77, True) == "short 80 9x2"
    assert name(32, 8, 20, True) == name(32, 8, 20) == "short 64 4x4"
    assert name(1, 16, 257) == "hopper 128/8x1" and name(32, 16, 257) == "hopper 96/72x4"


@needs.built
def test_short_kernel_serves_heads_that_fit_with_a_warp_for_each_tile(library):
    for variant, name in library.variants.items():
        if not name.startswith("short"):
            continue
        rows, warps = map(int, re.fullmatch(r"short (\d+) (\d+)x\d+", name).groups())
        served = [t for t in range(1, 1025) if library.serves(variant, t, True, HOPPER)]
        assert served == [t for t in range(1, rows + 1) if -(-t // 16) <= warps]


@needs.built
def test_every_warpgroup_uses_every_filling_of_the_stages_it_waits_on(library):
    """A barrier knows its phases by parity alone, so waiting for filling n is only safe after using n - 1."""
    ring_stages = library._library.clip_attention_ring_stages
    fitted = 0
    for groups in (1, 2, 3, 4):
        for tiles_per_unit in range(1, 17):
            for chunks in range(1, 12):
                for most in range(1, 25):
                    stages = ring_stages(most, chunks, groups, tiles_per_unit)
                    assert 0 <= stages <= most
                    if stages == 0:
                        assert tiles_per_unit < groups
                        continue
                    fitted += 1
                    for group in range(groups):
                        # Tile j of a block belongs to warpgroup j % groups and to unit j // tiles_per_unit.
                        units = {j // tiles_per_unit for j in range(group, 30 * tiles_per_unit, groups)}
                        used = {unit * chunks + chunk for unit in units for chunk in range(chunks)}
                        assert all(i < stages or i - stages in used for i in used)
    assert fitted > 1000


@needs.built
@pytest.mark.parametrize(
    "changed", [{"heads": 0}, {"heads": 41}, {"tokens": 0}, {"tokens": 1025}, {"batch": 0}, {"head_dim": 80}, {"major": 7}]
)  # fmt: skip
def test_sizes_outside_the_contract_are_refused(library, changed):
    sizes = {"batch": 1, "heads": 12, "tokens": 50, "head_dim": 64, "major": 9} | changed
    supported = library._library.clip_attention_supported
    supported.argtypes = [ctypes.c_int64] + [ctypes.c_int32] * 5
    assert supported(70000, 40, 1024, 64, 8, 0) == 1
    assert supported(*(sizes[k] for k in ("batch", "heads", "tokens", "head_dim", "major")), 0) == 0


@pytest.mark.parametrize("bias", [("half", 64), ("float", 63), ("float", 128)])
def test_a_bias_of_another_kind_is_refused(bias):
    torch = pytest.importorskip("torch")
    kind, size = bias
    with pytest.raises(ValueError, match=r"fp32 \[64\]"):
        kernels.attention(torch.zeros(1, 2, 192).half(), 1, False, torch.zeros(size, dtype=getattr(torch, kind)))


@needs.built
@pytest.mark.gpu
@needs.ampere
def test_tensors_of_any_layout_and_alignment():
    import torch

    torch.manual_seed(0)
    qkv, bias = torch.randn(2, 50, 3 * 128, device="cuda").half(), torch.randn(128, device="cuda")
    expected = kernels.attention(qkv, 2, False, bias)
    shifted = torch.cat([qkv.flatten()[:1], qkv.flatten()])[1:].view_as(qkv)
    shifted_bias = torch.cat([bias[:1], bias])[1:]
    assert shifted.is_contiguous() and shifted.data_ptr() % 16 and shifted_bias.data_ptr() % 16
    assert torch.equal(kernels.attention(shifted, 2, False, shifted_bias), expected)
    turned = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    assert torch.equal(kernels.attention(turned, 2, False, bias), expected)


# The numbers


@needs.built
@pytest.mark.gpu
@needs.ampere
@pytest.mark.parametrize("tokens", attention_bench.CHECK_TOKENS)
def test_error_is_at_most_twice_that_of_pytorch(library, tokens):
    """With and without a query bias. Also: every element written, nothing beside them, the same bits twice."""
    import torch

    cases = [case for case in attention_bench.check_shapes(full=True) if case[0].tokens == tokens]
    assert len(cases) == 2 * 3 * 5 * 3
    assert attention_bench.check(torch, library, cases, [0], seconds=600) == {0: 0}


@needs.built
@pytest.mark.gpu
@needs.ampere
@pytest.mark.parametrize("tokens", [1, 17, 50, 77, 197, 257, 577, 1024])
def test_portable_kernel_on_any_gpu(library, tokens):
    import torch

    portable = [id for id, name in library.variants.items() if name.startswith("portable")]
    cases = [case for case in attention_bench.check_shapes(full=False) if case[0].tokens == tokens]
    assert set(attention_bench.check(torch, library, cases, portable, seconds=600).values()) == {0}


@needs.built
@pytest.mark.gpu
@needs.ampere
def test_batches_beyond_the_grid_limits_of_y_and_z(library):
    import torch

    cases = [(attention_bench.Shape(70000, 1, 2, False), 1.0), (attention_bench.Shape(66000, 2, 17, True), 1.0)]
    assert attention_bench.check(torch, library, cases, [0], seconds=600) == {0: 0}


@needs.built
@pytest.mark.gpu
@needs.ampere
@pytest.mark.parametrize("tokens", attention_bench.SKIPPING_TOKENS)
def test_many_heads_with_fewer_tiles_than_workers(library, tokens):
    """Warps and warpgroups then skip heads: the ring of copies must not confuse two fillings of a stage."""
    import torch

    cases = [(attention_bench.Shape(700, 8, tokens, causal), 1.0) for causal in (False, True)]
    assert attention_bench.check(torch, library, cases, [0], seconds=600) == {0: 0}
