// Fused attention on packed QKV for CLIP's short sequences (50, 77, 197, 257, 577 tokens; any up to
// 1024), head dimension 64, on sm_90a also 72, 80, 88 and 104, fp16 in, fp16 or E4M3 out, fp32
// softmax. Interface and layout: attention.h.
//
// Three kernels:
//   portable_kernel  mma.sync and cp.async, sm_80 and newer. One block takes 64 query rows of one
//                    (image, head) and walks over the keys in chunks of 64.
//   hopper_kernel    wgmma and tensor copies (TMA), sm_90a. One persistent block per
//                    multiprocessor: two threads keep copying the next heads' keys, values and
//                    queries into shared memory while up to four warpgroups compute, each on its
//                    own tile of 64 query rows.
//   short_kernel     mma.sync and tensor copies, sm_90a. Heads of up to 80 tokens, whole, in a
//                    ring; warps take tiles of 16 query rows in turn.
//
// The rings of the last two rest on one rule, which the launchers keep: a barrier tells its phases
// apart only by parity, so whoever waits on a stage must use every filling of that stage. All hold
// scores in registers and rescale the running output only when the row maximum has grown by more
// than 2^8 since the last rescale (exact in real arithmetic, and rarely needed). How each choice
// was reached: NOTES.md.

#include <cuda.h>
#include <cuda_fp16.h>

#include <atomic>
#include <type_traits>

#include "../e4m3.h"
#include "attention.h"
#include "wgmma.cuh"

namespace {

constexpr int kHeadDim = 64;              // of the kernels that have one
constexpr int kRowBytes = kHeadDim * 2;   // one head's row of q, k, v or out: 128 bytes
constexpr int kBiasBytes = kHeadDim * 4;  // one head's query bias, fp32
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kRescaleAbove = 8.0f;  // log2 of the largest probability weight kept unscaled

// A head of kDim columns in shared memory: padded to 16s, with zeros, and cut into parts of 64, 32
// and 16 columns, each at most once. A part's rows are as long as its swizzle, and follow each
// other.
template <int kDim>
struct Columns {
  static constexpr int padded = (kDim + 15) / 16 * 16;
  static_assert(kDim >= 64 && kDim % 8 == 0 && padded < 128, "head dimension");
  static constexpr int parts = 1 + (padded / 32 & 1) + (padded / 16 & 1);
  static constexpr int row_bytes = padded * 2;
  static constexpr int step = parts == 1 ? kDim : 1;  // of a head in the tensor maps' coordinates
  __host__ __device__ static constexpr int width(int part) {
    return part == 0 ? 64 : part == 1 && (padded & 32) ? 32 : 16;
  }
  __host__ __device__ static constexpr int first(int part) {
    return part == 0 ? 0 : first(part - 1) + width(part - 1);
  }
  // 1/sqrt(kDim), with exp(x) = exp2(x log2 e).
  static constexpr float scale = kLog2e * (kDim == 64   ? 0.125f
                                           : kDim == 72 ? 0.11785113019775793f
                                           : kDim == 80 ? 0.11180339887498949f
                                           : kDim == 88 ? 0.10660035817780521f
                                                        : 0.09805806756909202f);
  static_assert(kDim == 64 || kDim == 72 || kDim == 80 || kDim == 88 || kDim == 104, "its scale");
};

// ---------------------------------------------------------------------------------------------
// Pieces that all kernels use

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  __half2 packed = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&packed);
}

__device__ __forceinline__ uint32_t add_half2(uint32_t a, uint32_t b) {
  const __half2 sum =
      __hadd2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// The four lanes of a quad share a row of the accumulators.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Lane t of a quad holds word t of four 16-byte pieces and gets the whole of piece t.
__device__ __forceinline__ uint4 quad_transpose(uint32_t r0, uint32_t r1, uint32_t r2,
                                                uint32_t r3) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? r0 : r1, 1);
  const uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? r2 : r3, 1);
  const uint32_t low0 = odd ? a : r0, high0 = odd ? r1 : a;
  const uint32_t low1 = odd ? b : r2, high1 = odd ? r3 : b;
  const uint32_t c = __shfl_xor_sync(0xffffffffu, upper ? low0 : low1, 2);
  const uint32_t d = __shfl_xor_sync(0xffffffffu, upper ? high0 : high1, 2);
  return upper ? make_uint4(c, d, low1, high1) : make_uint4(low0, high0, c, d);
}

// Softmax state of one thread: two rows (r and r + 8 of a 16-row tile), and their output in the
// accumulator layout: o[4 j + e] is row r + 8 (e / 2), column 8 j + 2 (lane % 4) + e % 2.
template <int kDim>
struct Rows {
  static constexpr float scale = Columns<kDim>::scale;
  float o[Columns<kDim>::padded / 2];
  float maximum[2];  // of the raw scores; may lag by kRescaleAbove
  float sum[2];      // this thread's columns only, until the end
};

// Scores s[4 j + e] (layout as above) of N keys to probability weights in place; updates maximum
// and sum. Returns whether the output of earlier keys must shrink by `shrink`, the same for the
// whole warp. Every lane of the warp must call it.
template <int N, int kDim>
__device__ __forceinline__ bool softmax_weights(float (&s)[N / 2], Rows<kDim>& rows, bool first,
                                                float (&shrink)[2]) {
  constexpr float kScale = Rows<kDim>::scale;
  // Two chains per row, even and odd columns, in maximum and sum: half as many dependent steps.
  float even[2] = {s[0], s[2]}, odd[2] = {s[1], s[3]};
#pragma unroll
  for (int i = 4; i < N / 2; i += 2) {
    const int r = (i >> 1) & 1;
    even[r] = fmaxf(even[r], s[i]);
    odd[r] = fmaxf(odd[r], s[i + 1]);
  }
  const float top[2] = {quad_max(fmaxf(even[0], odd[0])), quad_max(fmaxf(even[1], odd[1]))};
  bool rescale = false;
  if (first) {
    rows.maximum[0] = top[0];
    rows.maximum[1] = top[1];
    rows.sum[0] = rows.sum[1] = 0.0f;
  } else {
    const bool grown = (top[0] - rows.maximum[0]) * kScale > kRescaleAbove ||
                       (top[1] - rows.maximum[1]) * kScale > kRescaleAbove;
    rescale = __any_sync(0xffffffffu, grown);
    if (rescale) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float maximum = fmaxf(rows.maximum[r], top[r]);
        shrink[r] = exp2_fast((rows.maximum[r] - maximum) * kScale);
        rows.maximum[r] = maximum;
        rows.sum[r] *= shrink[r];
      }
    }
  }
  const float shift[2] = {rows.maximum[0] * kScale, rows.maximum[1] * kScale};
  float odd_sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < N / 2; i += 2) {
    const int r = (i >> 1) & 1;
    s[i] = exp2_fast(fmaf(s[i], kScale, -shift[r]));
    s[i + 1] = exp2_fast(fmaf(s[i + 1], kScale, -shift[r]));
    rows.sum[r] += s[i];
    odd_sum[r] += s[i + 1];
  }
  rows.sum[0] += odd_sum[0];
  rows.sum[1] += odd_sum[1];
  return rescale;
}

template <int kDim>
__device__ __forceinline__ void shrink_output(Rows<kDim>& rows, const float (&shrink)[2]) {
#pragma unroll
  for (int i = 0; i < Columns<kDim>::padded / 2; ++i) rows.o[i] *= shrink[(i >> 1) & 1];
}

template <int N, int kDim>
__device__ __forceinline__ void softmax_step(float (&s)[N / 2], Rows<kDim>& rows, bool first) {
  float shrink[2];
  if (softmax_weights<N>(s, rows, first, shrink)) shrink_output(rows, shrink);
}

// Hides keys from `limit[r]` on, for the columns first_column .. N - 1 of a chunk that starts at
// key k0.
template <int N, int kFirstColumn>
__device__ __forceinline__ void mask_step(float (&s)[N / 2], int k0, const int (&limit)[2]) {
  const int column = k0 + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int i = kFirstColumn / 2; i < N / 2; ++i) {
    if (column + 8 * (i >> 2) + (i & 1) >= limit[(i >> 1) & 1]) s[i] = -INFINITY;
  }
}

// What the kernels' output holds, E4M3 as bytes.
using Half = __half;
using E4m3 = uint8_t;

// Divides by the sums and writes rows `row` and `row + 8` (this lane's) of one head as 16-byte
// pieces.
template <int kDim>
__device__ __forceinline__ void store_rows(const Rows<kDim>& rows, Half* head_out,
                                           int64_t row_stride, int row, int tokens, float) {
  constexpr int kPieces = kDim / 8, kFours = (kPieces + 3) / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float scale = 1.0f / quad_sum(rows.sum[r]);
    uint32_t packed[4 * kFours];
#pragma unroll
    for (int j = 0; j < 4 * kFours; ++j)
      packed[j] = j < kPieces
                      ? pack_half2(rows.o[4 * j + 2 * r] * scale, rows.o[4 * j + 2 * r + 1] * scale)
                      : 0;
    uint4 piece[kFours];
#pragma unroll
    for (int i = 0; i < kFours; ++i)
      piece[i] =
          quad_transpose(packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]);
    if (row + 8 * r < tokens) {
      uint4* target =
          reinterpret_cast<uint4*>(head_out + (row + 8 * r) * row_stride) + (threadIdx.x & 3);
#pragma unroll
      for (int i = 0; i < kFours; ++i)
        if (4 * i + 4 <= kPieces || (threadIdx.x & 3) < kPieces - 4 * i) target[4 * i] = piece[i];
    }
  }
}

// Times `inverse_scale` too. Pieces of 16 columns, four of which the quad's lanes take at once.
// Word j has two columns of each half of piece j, so that after the transposition a lane holds its
// piece with the halves' columns in turns. A row of a head is 64 bytes, or a number of 8s.
template <int kDim>
__device__ __forceinline__ void store_rows(const Rows<kDim>& rows, E4m3* head_out,
                                           int64_t row_stride, int row, int tokens,
                                           float inverse_scale) {
  constexpr int kPieces = Columns<kDim>::padded / 16;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float scale = inverse_scale / quad_sum(rows.sum[r]);
    E4m3* const target = head_out + (row + 8 * r) * row_stride;
#pragma unroll
    for (int four = 0; four < kPieces; four += 4) {
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const o = &rows.o[four + j < kPieces ? 8 * (four + j) + 2 * r : 0];
        packed[j] = e4m3::pack(o[0] * scale, o[1] * scale, o[4] * scale, o[5] * scale);
      }
      const uint4 piece = quad_transpose(packed[0], packed[1], packed[2], packed[3]);
      const uint2 left =
          make_uint2(__byte_perm(piece.x, piece.y, 0x5410), __byte_perm(piece.z, piece.w, 0x5410));
      const uint2 right =
          make_uint2(__byte_perm(piece.x, piece.y, 0x7632), __byte_perm(piece.z, piece.w, 0x7632));
      const int column = 16 * (four + (threadIdx.x & 3));
      if (row + 8 * r >= tokens) continue;
      if constexpr (kDim == 64) {
        *reinterpret_cast<uint4*>(target + column) = make_uint4(left.x, left.y, right.x, right.y);
      } else {
        if (column < kDim) *reinterpret_cast<uint2*>(target + column) = left;
        if (column + 8 < kDim) *reinterpret_cast<uint2*>(target + column + 8) = right;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Portable kernel: mma.sync, cp.async

__device__ __forceinline__ void copy_async_16(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;  // 0: the 16 bytes are filled with zeros, nothing is read
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void mma_16x8x16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A head's query bias, in global or shared memory, for this lane's A fragments: word 2 d + i is for
// words 2 i and 2 i + 1 of fragment d, which are columns 16 d + 8 i + 2 (lane % 4) and the next
// one, of two rows.
__device__ __forceinline__ void load_fragment_bias(uint32_t (&bias)[8], const float* head_bias) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 pair = reinterpret_cast<const float2*>(head_bias)[4 * j + (threadIdx.x & 3)];
    bias[j] = pack_half2(pair.x, pair.y);
  }
}

__device__ __forceinline__ void add_fragment_bias(uint32_t (&q)[4][4], const uint32_t (&bias)[8]) {
#pragma unroll
  for (int d = 0; d < 4; ++d)
#pragma unroll
    for (int i = 0; i < 4; ++i) q[d][i] = add_half2(q[d][i], bias[2 * d + (i >> 1)]);
}

// Rows of 128 bytes, their eight 16-byte pieces permuted by the row: eight rows of one column,
// which is what ldmatrix reads, then lie in different banks.
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return row * kRowBytes + ((piece ^ (row & 7)) << 4);
}

// Copies `count` rows from `first` on of one head's q, k or v to shared memory; rows from `tokens`
// on become zeros (a value row that is never written could hold NaN, and 0 * NaN is NaN).
template <int kThreads, int kCount>
__device__ __forceinline__ void copy_rows(uint32_t target, const __half* source, int64_t row_stride,
                                          int first, int tokens) {
#pragma unroll
  for (int i = 0; i < (kCount * 8 + kThreads - 1) / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x;
    const int row = index >> 3, piece = index & 7;
    if ((kCount * 8) % kThreads != 0 && row >= kCount) break;
    const bool valid = first + row < tokens;
    copy_async_16(target + swizzled(row, piece),
                  source + (valid ? (first + row) * row_stride : 0) + piece * 8, valid);
  }
}

// kWarps warps of kTiles 16-row tiles each; keys in chunks of kKeys, kStages chunks in flight.
template <int kWarps, int kTiles, int kKeys, int kStages, int kBlocks, class Out>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    portable_kernel(const __half* __restrict__ qkv, Out* __restrict__ out,
                    const float* __restrict__ query_bias, int64_t units, int row_blocks, int heads,
                    int tokens, int causal, float inverse_scale) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kQueryRows = kWarps * kTiles * 16;
  constexpr int kGroups = kKeys / 16;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t q_shared = shared_address(shared);
  const uint32_t ring = q_shared + kQueryRows * kRowBytes;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int width = heads * kHeadDim;
  const int64_t row_stride = 3 * static_cast<int64_t>(width);

  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int row_block = static_cast<int>(unit % row_blocks);
    const int64_t pair = unit / row_blocks;
    const int head = static_cast<int>(pair % heads);
    const int64_t image = pair / heads;
    const __half* q = qkv + image * tokens * row_stride + head * kHeadDim;
    const __half* k = q + width;
    const __half* v = k + width;
    const int q0 = row_block * kQueryRows;
    // Keys that any row of this block may see, and the chunks they fill.
    const int keys = causal ? min(tokens, q0 + kQueryRows) : tokens;
    const int chunks = (keys + kKeys - 1) / kKeys;

    // Each chunk is two groups of copies (k, then v); the queries travel with the first keys.
    copy_rows<kThreads, kQueryRows>(q_shared, q, row_stride, q0, tokens);
#pragma unroll
    for (int c = 0; c < kStages - 1; ++c) {
      const uint32_t stage = ring + c * kKeys * kRowBytes * 2;
      if (c < chunks) copy_rows<kThreads, kKeys>(stage, k, row_stride, c * kKeys, tokens);
      copy_async_commit();
      if (c < chunks)
        copy_rows<kThreads, kKeys>(stage + kKeys * kRowBytes, v, row_stride, c * kKeys, tokens);
      copy_async_commit();
    }

    const int tile0 = q0 + warp * kTiles * 16;
    const bool busy = tile0 < tokens;  // the same for the whole warp
    uint32_t q_fragments[kTiles][4][4];
    Rows<kHeadDim> rows[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 32; ++i) rows[t].o[i] = 0.0f;
      rows[t].maximum[0] = rows[t].maximum[1] = 0.0f;
      rows[t].sum[0] = rows[t].sum[1] = 0.0f;
    }

    for (int c = 0; c < chunks; ++c) {
      const int k0 = c * kKeys;
      const uint32_t k_shared = ring + (c % kStages) * kKeys * kRowBytes * 2;
      const uint32_t v_shared = k_shared + kKeys * kRowBytes;
      copy_async_wait<2 * (kStages - 1) - 1>();
      __syncthreads();  // this chunk's keys are there, and every warp has left the chunk before
      {
        const int next = c + kStages - 1;
        const uint32_t stage = ring + (next % kStages) * kKeys * kRowBytes * 2;
        if (next < chunks) copy_rows<kThreads, kKeys>(stage, k, row_stride, next * kKeys, tokens);
        copy_async_commit();
        if (next < chunks)
          copy_rows<kThreads, kKeys>(stage + kKeys * kRowBytes, v, row_stride, next * kKeys,
                                     tokens);
        copy_async_commit();
      }
      float s[kTiles][kKeys / 2];
      const int last_row = min(tile0 + kTiles * 16, tokens) - 1;
      const int visible = (causal ? min(keys, last_row + 1) : keys) - k0;  // for this warp
      const int groups = busy && visible > 0 ? min(kGroups, (visible + 15) / 16) : 0;
      if (c == 0) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int d = 0; d < 4; ++d)
            load_matrices(
                q_fragments[t][d],
                q_shared + swizzled((warp * kTiles + t) * 16 + (lane & 15), 2 * d + (lane >> 4)));
        if (query_bias != nullptr) {
          uint32_t bias[8];
          load_fragment_bias(bias, query_bias + head * kHeadDim);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) add_fragment_bias(q_fragments[t], bias);
        }
      }
      if (groups > 0) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int i = 0; i < 8; ++i) s[t][8 * g + i] = g < groups ? 0.0f : -INFINITY;
          if (g < groups) {
#pragma unroll
            for (int d = 0; d < 4; ++d) {
              uint32_t b[4];
              load_matrices(b, k_shared + swizzled(g * 16 + (lane & 7) + ((lane >> 4) << 3),
                                                   2 * d + ((lane >> 3) & 1)));
#pragma unroll
              for (int t = 0; t < kTiles; ++t) {
                mma_16x8x16(&s[t][8 * g], q_fragments[t][d], b[0], b[1]);
                mma_16x8x16(&s[t][8 * g + 4], q_fragments[t][d], b[2], b[3]);
              }
            }
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int row = tile0 + t * 16 + (lane >> 2);
          if (k0 + kKeys > tokens || (causal && k0 + kKeys > tile0 + t * 16)) {
            const int limit[2] = {causal ? min(tokens, row + 1) : tokens,
                                  causal ? min(tokens, row + 9) : tokens};
            mask_step<kKeys, 0>(s[t], k0, limit);
          }
          softmax_step<kKeys>(s[t], rows[t], c == 0);
        }
      }
      copy_async_wait<2 * (kStages - 1)>();
      __syncthreads();  // this chunk's values are there
      if (groups > 0) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          if (g < groups) {
            uint32_t p[kTiles][4];
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                p[t][i] = pack_half2(s[t][8 * g + 2 * i], s[t][8 * g + 2 * i + 1]);
#pragma unroll
            for (int d = 0; d < 4; ++d) {
              uint32_t b[4];
              load_matrices_transposed(
                  b, v_shared + swizzled(g * 16 + (lane & 15), 2 * d + (lane >> 4)));
#pragma unroll
              for (int t = 0; t < kTiles; ++t) {
                mma_16x8x16(&rows[t].o[8 * d], p[t], b[0], b[1]);
                mma_16x8x16(&rows[t].o[8 * d + 4], p[t], b[2], b[3]);
              }
            }
          }
        }
      }
    }
    if (busy) {
      Out* head_out = out + image * tokens * width + head * kHeadDim;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        store_rows(rows[t], head_out, width, tile0 + t * 16 + (lane >> 2), tokens, inverse_scale);
    }
    copy_async_wait<0>();
    __syncthreads();  // before the next unit's copies overwrite what a slower warp still reads
  }
}

// ---------------------------------------------------------------------------------------------
// Hopper kernel: wgmma, tensor copies

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Initialised barriers become visible to tensor copies. For shared memory only: the fence of all
// memory is a membar of the whole GPU.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Returns once the phase with this parity has completed (parity 1 on a fresh barrier: at once).
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A box of a [batch][tokens][heads][columns] tensor; rows past `tokens` arrive as zeros, and so do
// columns past a head's.
__device__ __forceinline__ void copy_tensor(uint32_t target, const CUtensorMap* map,
                                            uint32_t barrier, int column, int head, int row,
                                            int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(row), "r"(image)
      : "memory");
}

// The same of 64 columns of a [batch][tokens][columns] tensor.
__device__ __forceinline__ void copy_tensor(uint32_t target, const CUtensorMap* map,
                                            uint32_t barrier, int column, int row, int image) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(image)
      : "memory");
}

__device__ __forceinline__ void copy_bytes(uint32_t target, const void* source, int bytes,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

constexpr int kTileRows = 64;  // of a warpgroup
constexpr int kMaxStages = 24;
constexpr int kHopperSharedBytes = 227 * 1024;     // that a block may have on sm_90
constexpr int kHopperReservedBytes = 1024 + 1024;  // to align tiles; barriers

// Boxes of one number of rows, for each part of a head's columns.
template <int kDim>
struct Maps {
  CUtensorMap part[Columns<kDim>::parts];
};

// Copies rows of a head of q, k or v; head: its number in this order, times `step`.
template <int kDim>
__device__ __forceinline__ void copy_head(uint32_t target, int rows, const Maps<kDim>& maps,
                                          uint32_t barrier, int head, int row, int image) {
  if constexpr (kDim == 64) {
    copy_tensor(target, &maps.part[0], barrier, head, row, image);
  } else {
#pragma unroll
    for (int part = 0; part < Columns<kDim>::parts; ++part)
      copy_tensor(target + rows * 2 * Columns<kDim>::first(part), &maps.part[part], barrier,
                  Columns<kDim>::first(part), head, row, image);
  }
}

// Where one block's work lies. A unit is one (image, head) and up to tiles_per_unit of its tiles; a
// block takes units blockIdx.x, blockIdx.x + gridDim.x, ...
struct HopperPlan {
  int units;
  int heads;
  int tokens;
  int full_chunks;  // chunks of kKeys keys, before the last one of kTailKeys
  int units_per_head;
  int tiles_per_unit;
  int stages;  // of the ring, each one chunk of k and of v
  // gridDim.x as a step in the mixed radix (image, head, part of the head's tiles).
  int step_image, step_head, step_part;
};

// kKeys: keys of a chunk. kTailKeys: of a head's last chunk, whose first kTailSeen keys are real
// (the mask then skips them). kGroups: warpgroups that compute. kQueries: query tiles in flight for
// each.
template <int kDim, int kKeys, int kTailKeys, int kTailSeen, int kGroups, int kQueries,
          bool kCausal>
struct HopperShape {
  static constexpr int dim = kDim, keys = kKeys, tail_keys = kTailKeys, tail_seen = kTailSeen,
                       groups = kGroups, queries = kQueries;
  static constexpr bool causal = kCausal;
  static constexpr int row_bytes = Columns<kDim>::row_bytes;
  static constexpr int chunk_bytes = kKeys * row_bytes;  // of k, or of v
  static constexpr int tile_bytes = kTileRows * row_bytes;
  static constexpr int query_bytes = kGroups * kQueries * tile_bytes;
  static constexpr int head_bias_bytes = kDim * 4;
  static constexpr int bias_bytes = kGroups * kQueries * head_bias_bytes;
  // Many warpgroups need more registers each than an equal share: the copying warp then gets a
  // warpgroup of its own, which gives back most of what it had at launch.
  static constexpr bool moves_registers = kGroups >= 3;
  static constexpr int threads = kGroups * 128 + (moves_registers ? 128 : 64);
  static constexpr int launch_registers = 65536 / threads / 8 * 8;
  static constexpr int copy_registers = 32;
  static constexpr int compute_registers =
      (launch_registers * threads - copy_registers * 128) / (kGroups * 128) / 8 * 8;
  static_assert(kKeys % 16 == 0 && kTailKeys % 8 == 0 && kTailKeys <= kKeys &&
                    kTailSeen <= kTailKeys,
                "chunk shape");
  // Rows of k and v that the last chunk copies: what it multiplies, in steps of 16 values.
  static constexpr int tail_rows = (kTailKeys + 15) / 16 * 16;
  static constexpr int tail_bytes = tail_rows * row_bytes;
  // Stages of the ring that fit, beside alignment and barriers.
  static constexpr int max_stages_fit =
      (kHopperSharedBytes - kHopperReservedBytes - query_bytes - bias_bytes) / (2 * chunk_bytes);
  static constexpr int max_stages = max_stages_fit < kMaxStages ? max_stages_fit : kMaxStages;
  static_assert(!moves_registers || compute_registers <= 240, "registers");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Issues the scores of a tile against the first N keys of a chunk; they are there after a wait.
template <class Shape, int N, int kPart = 0>
__device__ __forceinline__ void issue_scores(float (&s)[N / 2], uint32_t q_shared,
                                             uint32_t k_shared) {
  using Head = Columns<Shape::dim>;
  constexpr int kWidth = Head::width(kPart), kFirst = Head::first(kPart);
  if (kPart == 0) wgmma::fence();
#pragma unroll
  for (int d = 0; d < kWidth / 16; ++d)  // 16 columns are 32 bytes: 2 in a descriptor's units of 16
    wgmma::Scores<N>::step(s, wgmma::descriptor<kWidth>(q_shared + kTileRows * 2 * kFirst, 2 * d),
                           wgmma::descriptor<kWidth>(k_shared + Shape::keys * 2 * kFirst, 2 * d),
                           kPart > 0 || d > 0);
  if constexpr (kPart + 1 < Head::parts)
    issue_scores<Shape, N, kPart + 1>(s, q_shared, k_shared);
  else
    wgmma::commit();
}

// Issues the product of N weights, rounded to fp16, with N values (N rounded up to 16: weights past
// N are zero, and the copy left no NaN in those rows of v). `first`: overwrites the output.
template <class Shape, int N, int kPart = 0>
__device__ __forceinline__ void issue_values(const uint32_t (&p)[(N + 15) / 16 * 4],
                                             Rows<Shape::dim>& rows, uint32_t v_shared,
                                             bool first) {
  using Head = Columns<Shape::dim>;
  constexpr int kWidth = Head::width(kPart), kFirst = Head::first(kPart);
  if (kPart == 0) wgmma::fence();
#pragma unroll
  for (int step = 0; step < (N + 15) / 16; ++step)  // 16 rows, in a descriptor's units of 16 bytes
    wgmma::Values<kWidth>::step(
        &rows.o[kFirst / 2], &p[4 * step],
        wgmma::descriptor<kWidth>(v_shared + Shape::keys * 2 * kFirst, step * 2 * kWidth),
        step > 0 || !first);
  if constexpr (kPart + 1 < Head::parts)
    issue_values<Shape, N, kPart + 1>(p, rows, v_shared, first);
  else
    wgmma::commit();
}

template <int N>
__device__ __forceinline__ void pack_weights(const float (&s)[N / 2],
                                             uint32_t (&p)[(N + 15) / 16 * 4]) {
#pragma unroll
  for (int i = 0; i < (N + 15) / 16 * 4; ++i)
    p[i] = 2 * i < N / 2 ? pack_half2(s[2 * i], s[2 * i + 1]) : 0;
}

// Adds a head's query bias, fp32 in shared memory, in place to a warp's 16 rows of a tile of
// queries, which wgmma reads there. Of the first 64 columns lane l takes piece l % 8 of rows l / 8,
// l / 8 + 4, ...: eight lanes share a row and no bank.
template <int kDim, int kPart = 0>
__device__ __forceinline__ void add_piece_bias(uint32_t tile, int first_row, uint32_t head_bias) {
  using Head = Columns<kDim>;
  constexpr int kPieces = Head::width(kPart) / 8, kFirst = Head::first(kPart);
  constexpr int kCount = kPieces / 2;  // of this lane: 16 rows of kPieces, over 32 lanes
  const int lane = threadIdx.x & 31, piece = lane % kPieces;
  if constexpr (kPart + 1 < Head::parts)
    add_piece_bias<kDim, kPart + 1>(tile, first_row, head_bias);
  if (kFirst + 8 * piece >= kDim) return;  // zeros stay, and there is no bias
  uint32_t q[kCount][4], bias[4];
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    float x[4];
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(head_bias + kFirst * 4 + piece * 32 + i * 8)
                 : "memory");
    bias[i] = pack_half2(x[0], x[1]);
    bias[i + 1] = pack_half2(x[2], x[3]);
  }
  // The swizzle: which of eight 128-byte lines a row lies in is added to its pieces' places.
  const uint32_t rows = tile + kTileRows * 2 * kFirst + first_row * 16 * kPieces;
  auto address = [&](int i) {
    const int row = lane / kPieces + 32 / kPieces * i;
    return rows + row * 16 * kPieces + ((piece ^ (row * kPieces / 8 % kPieces)) << 4);
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q[i][0]), "=r"(q[i][1]), "=r"(q[i][2]), "=r"(q[i][3])
                 : "r"(address(i))
                 : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) q[i][j] = add_half2(q[i][j], bias[j]);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address(i)), "r"(q[i][0]),
                 "r"(q[i][1]), "r"(q[i][2]), "r"(q[i][3])
                 : "memory");
  }
}

#endif

// A walk over a block's list of tiles: those of unit blockIdx.x, then of unit blockIdx.x +
// gridDim.x, ... Steps are additions with carry, since a division per tile would cost as much as a
// chunk's softmax.
struct Cursor {
  int unit, image, head, part;
  int tile;          // in the unit
  int stage, phase;  // of the ring, for the unit's first chunk

  __device__ __forceinline__ explicit Cursor(const HopperPlan& plan)
      : unit(blockIdx.x), part(unit % plan.units_per_head), tile(0), stage(0), phase(0) {
    const int pair = unit / plan.units_per_head;
    image = pair / plan.heads;
    head = pair % plan.heads;
  }

  __device__ __forceinline__ void next_unit(const HopperPlan& plan) {
    unit += gridDim.x;
    image += plan.step_image;
    head += plan.step_head;
    part += plan.step_part;
    if (part >= plan.units_per_head) {
      part -= plan.units_per_head;
      ++head;
    }
    if (head >= plan.heads) {
      head -= plan.heads;
      ++image;
    }
    stage += plan.full_chunks + 1;
    while (stage >= plan.stages) {
      stage -= plan.stages;
      phase ^= 1;
    }
  }

  __device__ __forceinline__ void skip_tiles(const HopperPlan& plan, int count) {
    tile += count;
    while (tile >= plan.tiles_per_unit) {
      tile -= plan.tiles_per_unit;
      next_unit(plan);
    }
  }
};

template <class Shape, class Out>
__global__ void __launch_bounds__(Shape::threads, 1)
    hopper_kernel(const __grid_constant__ Maps<Shape::dim> query_maps,
                  const __grid_constant__ Maps<Shape::dim> key_maps,
                  const __grid_constant__ Maps<Shape::dim> tail_maps, Out* __restrict__ out,
                  const float* __restrict__ query_bias, const HopperPlan plan,
                  const float inverse_scale) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  constexpr int kBuffers = Shape::groups * Shape::queries;
  __shared__ __align__(8) uint64_t barriers[3 * kMaxStages + 2 * kBuffers];
  // The swizzle is a function of the address, so tiles start at multiples of 1024.
  const uint32_t queries = (shared_address(shared) + 1023) & ~1023u;
  const uint32_t ring = queries + Shape::query_bytes;
  const uint32_t biases =
      ring + plan.stages * 2 * Shape::chunk_bytes;  // one for each tile of queries
  const uint32_t k_full = shared_address(barriers);
  const uint32_t v_full = k_full + 8 * kMaxStages;
  const uint32_t empty = v_full + 8 * kMaxStages;
  const uint32_t q_full = empty + 8 * kMaxStages;
  const uint32_t q_empty = q_full + 8 * kBuffers;
  const int chunks = plan.full_chunks + 1;

  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.stages; ++i) {
      barrier_init(k_full + 8 * i, 1);
      barrier_init(v_full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4 * plan.tiles_per_unit);  // one arrival per warp and tile
    }
    for (int i = 0; i < kBuffers; ++i) {
      barrier_init(q_full + 8 * i, 1);
      barrier_init(q_empty + 8 * i, 4);
    }
    barriers_ready();
  }
  __syncthreads();

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);  // known uniform to the compiler
  const int lane = threadIdx.x & 31;
  Cursor at(plan);
  if (warp >= 4 * Shape::groups) {
    // The copying warpgroup, of which two threads work.
    if (Shape::moves_registers)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::copy_registers));
    if (warp == 4 * Shape::groups && lane == 0) {
      // Keys and values of every unit, in order.
      int stage = 0, phase = 0;
      for (; at.unit < plan.units; at.next_unit(plan)) {
        constexpr int kStep = Columns<Shape::dim>::step;
        const int k_head = (plan.heads + at.head) * kStep, v_head = k_head + plan.heads * kStep;
        auto copy_chunk = [&](const Maps<Shape::dim>& maps, int bytes, int c) {
          const uint32_t k_shared = ring + stage * 2 * Shape::chunk_bytes;
          barrier_wait(empty + 8 * stage, phase ^ 1);
          barrier_expect(k_full + 8 * stage, bytes);
          copy_head<Shape::dim>(k_shared, Shape::keys, maps, k_full + 8 * stage, k_head,
                                c * Shape::keys, at.image);
          barrier_expect(v_full + 8 * stage, bytes);
          copy_head<Shape::dim>(k_shared + Shape::chunk_bytes, Shape::keys, maps,
                                v_full + 8 * stage, v_head, c * Shape::keys, at.image);
          if (++stage == plan.stages) {
            stage = 0;
            phase ^= 1;
          }
        };
        for (int c = 0; c < plan.full_chunks; ++c) copy_chunk(key_maps, Shape::chunk_bytes, c);
        copy_chunk(tail_maps, Shape::tail_bytes, plan.full_chunks);
      }
    } else if (warp == 4 * Shape::groups + 1 && lane == 0) {
      // Queries of every tile, in order: item i of the block's list goes to warpgroup i % kGroups.
      int group = 0, buffer = 0, phase = 0;
      for (; at.unit < plan.units; at.skip_tiles(plan, 1)) {
        const int which = group * Shape::queries + buffer;
        barrier_wait(q_empty + 8 * which, phase ^ 1);
        barrier_expect(q_full + 8 * which,
                       Shape::tile_bytes + (query_bias != nullptr ? Shape::head_bias_bytes : 0));
        copy_head<Shape::dim>(queries + which * Shape::tile_bytes, kTileRows, query_maps,
                              q_full + 8 * which, at.head * Columns<Shape::dim>::step,
                              (at.part * plan.tiles_per_unit + at.tile) * kTileRows, at.image);
        if (query_bias != nullptr)
          copy_bytes(biases + which * Shape::head_bias_bytes, query_bias + at.head * Shape::dim,
                     Shape::head_bias_bytes, q_full + 8 * which);
        if (++group == Shape::groups) {
          group = 0;
          if (++buffer == Shape::queries) {
            buffer = 0;
            phase ^= 1;
          }
        }
      }
    }
    return;
  }
  if (Shape::moves_registers)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::compute_registers));

  // A computing warpgroup: tiles group, group + kGroups, ... of this block's list of tiles.
  const int group = warp >> 2, group_warp = warp & 3;
  Rows<Shape::dim> rows;
#pragma unroll
  for (int i = 0; i < Columns<Shape::dim>::padded / 2; ++i) rows.o[i] = 0.0f;

  int buffer = 0, buffer_phase = 0;
  for (at.skip_tiles(plan, group); at.unit < plan.units; at.skip_tiles(plan, Shape::groups)) {
    const int tile = at.part * plan.tiles_per_unit + at.tile;
    const int row0 = tile * kTileRows + group_warp * 16;
    const int row = row0 + (lane >> 2);
    const bool busy = row0 < plan.tokens;  // the same for the whole warp
    const int limit[2] = {Shape::causal ? min(plan.tokens, row + 1) : plan.tokens,
                          Shape::causal ? min(plan.tokens, row + 9) : plan.tokens};
    // Chunks that hold a key some row of the tile may see; none for a tile past the last row, which
    // exists only to keep the number of arrivals on `empty` the same for every unit.
    const int keys = Shape::causal ? min(plan.tokens, (tile + 1) * kTileRows) : plan.tokens;
    const int visible = tile * kTileRows >= plan.tokens ? 0
                        : Shape::causal ? min(chunks, (keys + Shape::keys - 1) / Shape::keys)
                                        : chunks;
    int stage = at.stage, phase = at.phase;
    auto k_shared = [&] { return ring + stage * 2 * Shape::chunk_bytes; };
    auto v_shared = [&] { return k_shared() + Shape::chunk_bytes; };
    auto wait_keys = [&] { barrier_wait(k_full + 8 * stage, phase); };
    auto wait_values = [&] { barrier_wait(v_full + 8 * stage, phase); };
    auto next_stage = [&] {
      if (++stage == plan.stages) {
        stage = 0;
        phase ^= 1;
      }
    };
    auto release_stage = [&](int which) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * which);
    };
    const int which = group * Shape::queries + buffer;
    const uint32_t q_shared = queries + which * Shape::tile_bytes;
    auto release_queries = [&] {
      __syncwarp();
      if (lane == 0) barrier_arrive(q_empty + 8 * which);
    };
    barrier_wait(q_full + 8 * which, buffer_phase);
    if (query_bias != nullptr) {
      add_piece_bias<Shape::dim>(q_shared, group_warp * 16,
                                 biases + which * Shape::head_bias_bytes);
      // wgmma reads through the async proxy, and all warps' rows.
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
    }
    int c = 0;
    for (; c < min(visible, plan.full_chunks); ++c) {
      float s[Shape::keys / 2];
      uint32_t p[Shape::keys / 4];
      wait_keys();
      issue_scores<Shape, Shape::keys>(s, q_shared, k_shared());
      wgmma::wait<0>();
      wgmma::settle(s);
      if (Shape::causal && c == visible - 1) release_queries();
      if (busy) {  // the same for the whole warp
        if (Shape::causal && (c + 1) * Shape::keys > row0)
          mask_step<Shape::keys, 0>(s, c * Shape::keys, limit);
        softmax_step<Shape::keys>(s, rows, c == 0);
      }
      pack_weights<Shape::keys>(s, p);
      wait_values();
      issue_values<Shape, Shape::keys>(p, rows, v_shared(), c == 0);
      wgmma::wait<0>();
      wgmma::settle(rows.o);
      release_stage(stage);
      next_stage();
    }
    if (c < visible) {
      float s[Shape::tail_keys / 2];
      uint32_t p[(Shape::tail_keys + 15) / 16 * 4];
      wait_keys();
      issue_scores<Shape, Shape::tail_keys>(s, q_shared, k_shared());
      wgmma::wait<0>();
      wgmma::settle(s);
      release_queries();
      if (busy) {
        mask_step<Shape::tail_keys, Shape::causal ? 0 : Shape::tail_seen>(s, c * Shape::keys,
                                                                          limit);
        softmax_step<Shape::tail_keys>(s, rows, c == 0);
      }
      pack_weights<Shape::tail_keys>(s, p);
      wait_values();
      issue_values<Shape, Shape::tail_keys>(p, rows, v_shared(), c == 0);
      wgmma::wait<0>();
      wgmma::settle(rows.o);
      release_stage(stage);
      next_stage();
      ++c;
    }
    if (visible == 0) release_queries();
    for (; c < chunks; ++c) {
      // Both copies must have landed before the stage may be filled again.
      wait_keys();
      wait_values();
      release_stage(stage);
      next_stage();
    }
    if (visible > 0 && busy) {
      const int width = plan.heads * Shape::dim;
      store_rows(rows,
                 out + static_cast<int64_t>(at.image) * plan.tokens * width + at.head * Shape::dim,
                 width, row, plan.tokens, inverse_scale);
    }
    if (++buffer == Shape::queries) {
      buffer = 0;
      buffer_phase ^= 1;
    }
  }
#endif
}

// ---------------------------------------------------------------------------------------------
// Short kernel: mma.sync, tensor copies; for heads that are a single chunk of keys

struct ShortPlan {
  int pairs;  // (image, head)
  int heads;
  int tokens;
  int tiles;                  // of 16 rows, per head
  int stages;                 // of the ring, each q, k and v of one head
  int step_image, step_head;  // gridDim.x as a step in (image, head)
};

// kRows: rows of q, k and v that are copied, at least the tokens. kWarps: warps that compute, each
// on its own tile of 16 rows, beside the one that copies.
template <int kRows, int kWarps, int kBlocks, class Out>
__global__ void __launch_bounds__(kWarps * 32 + 32, kBlocks)
    short_kernel(const __grid_constant__ CUtensorMap map, Out* __restrict__ out,
                 const float* __restrict__ query_bias, const ShortPlan plan, const int causal,
                 const float inverse_scale) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kPartBytes = kRows * kRowBytes;  // q, k or v of a head
  constexpr int kGroups = kRows / 16;
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) uint64_t barriers[2 * kMaxStages];
  const uint32_t ring = (shared_address(shared) + 1023) & ~1023u;
  const uint32_t biases = ring + 3 * plan.stages * kPartBytes;  // one for each stage
  const uint32_t full = shared_address(barriers);
  const uint32_t empty = full + 8 * kMaxStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.stages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kWarps);
    }
    barriers_ready();
  }
  __syncthreads();

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  int pair = blockIdx.x, image = pair / plan.heads, head = pair % plan.heads, stage = 0, phase = 0;
  auto next_pair = [&] {
    pair += gridDim.x;
    image += plan.step_image;
    head += plan.step_head;
    if (head >= plan.heads) {
      head -= plan.heads;
      ++image;
    }
    if (++stage == plan.stages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (warp == kWarps) {
    if (lane == 0) {
      for (; pair < plan.pairs; next_pair()) {
        barrier_wait(empty + 8 * stage, phase ^ 1);
        barrier_expect(full + 8 * stage, 3 * kPartBytes + (query_bias != nullptr ? kBiasBytes : 0));
#pragma unroll
        for (int part = 0; part < 3; ++part)
          copy_tensor(ring + (3 * stage + part) * kPartBytes, &map, full + 8 * stage,
                      (part * plan.heads + head) * kHeadDim, 0, image);
        if (query_bias != nullptr)
          copy_bytes(biases + stage * kBiasBytes, query_bias + head * kHeadDim, kBiasBytes,
                     full + 8 * stage);
      }
    }
    return;
  }

  const int width = plan.heads * kHeadDim;
  // Tiles go to the warps in turn, over the heads' ends; this warp's next one is `tile`, of this
  // head or a later one. A warp with no tile in a head still waits for it and releases it: a
  // barrier tells its phases apart by parity, so a warp that left a filling out could take the next
  // one for it.
  int tile = warp;
  for (; pair < plan.pairs; next_pair(), tile -= plan.tiles) {
    barrier_wait(full + 8 * stage, phase);
    if (tile >= plan.tiles) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
      continue;
    }
    const uint32_t q_shared = ring + 3 * stage * kPartBytes;
    const uint32_t k_shared = q_shared + kPartBytes, v_shared = k_shared + kPartBytes;
    const int row = tile * 16 + (lane >> 2);
    // The last group of 16 keys that this tile sees, the only one that needs a mask.
    const int last = causal ? tile : (plan.tokens - 1) / 16;
    const int limit[2] = {causal ? row + 1 : plan.tokens, causal ? row + 9 : plan.tokens};

    uint32_t q[4][4];
#pragma unroll
    for (int d = 0; d < 4; ++d)
      load_matrices(q[d], q_shared + swizzled(tile * 16 + (lane & 15), 2 * d + (lane >> 4)));
    if (query_bias != nullptr) {
      uint32_t bias[8];
      load_fragment_bias(bias,
                         reinterpret_cast<const float*>(shared + (biases - shared_address(shared)) +
                                                        stage * kBiasBytes));
      add_fragment_bias(q, bias);
    }
    Rows<kHeadDim> rows;
    float s[kRows / 2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float (&part)[8] = *reinterpret_cast<float (*)[8]>(&s[8 * g]);
#pragma unroll
      for (int i = 0; i < 8; ++i) part[i] = g <= last ? 0.0f : -INFINITY;
      if (g <= last) {
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          uint32_t b[4];
          load_matrices(b, k_shared + swizzled(g * 16 + (lane & 7) + ((lane >> 4) << 3),
                                               2 * d + ((lane >> 3) & 1)));
          mma_16x8x16(&part[0], q[d], b[0], b[1]);
          mma_16x8x16(&part[4], q[d], b[2], b[3]);
        }
        if (g == last) mask_step<16, 0>(part, g * 16, limit);
      }
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) rows.o[i] = 0.0f;
    softmax_step<kRows>(s, rows, true);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g <= last) {
        uint32_t p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = pack_half2(s[8 * g + 2 * i], s[8 * g + 2 * i + 1]);
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          uint32_t b[4];
          load_matrices_transposed(b,
                                   v_shared + swizzled(g * 16 + (lane & 15), 2 * d + (lane >> 4)));
          mma_16x8x16(&rows.o[8 * d], p, b[0], b[1]);
          mma_16x8x16(&rows.o[8 * d + 4], p, b[2], b[3]);
        }
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * stage);
    store_rows(rows, out + static_cast<int64_t>(image) * plan.tokens * width + head * kHeadDim,
               width, row, plan.tokens, inverse_scale);
    tile += kWarps;
  }
#endif
}

// ---------------------------------------------------------------------------------------------
// Launchers

struct Device {
  int sm_major, sm_minor, sm_count, shared_bytes;
};

cudaError_t current_device(Device& device) {
  int id = 0;
  cudaError_t status = cudaGetDevice(&id);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&device.sm_major, cudaDevAttrComputeCapabilityMajor, id);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&device.sm_minor, cudaDevAttrComputeCapabilityMinor, id);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, id);
  if (status == cudaSuccess)
    status =
        cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  return status;
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Calls `with` with the output as what it holds.
template <class With>
cudaError_t with_output(const ClipAttentionParams& params, With with) {
  return params.out_scale > 0 ? with(static_cast<E4m3*>(params.out))
                              : with(static_cast<Half*>(params.out));
}

template <int kWarps, int kTiles, int kKeys, int kStages, int kBlocks>
cudaError_t launch_portable(const ClipAttentionParams& params, const Device&, cudaStream_t stream) {
  constexpr int kQueryRows = kWarps * kTiles * 16;
  const int row_blocks = ceil_div(params.tokens, kQueryRows);
  const int stages =
      ceil_div(params.tokens, kKeys) < kStages ? ceil_div(params.tokens, kKeys) : kStages;
  const int shared = (kQueryRows + stages * kKeys * 2) * kRowBytes;
  const int64_t units = params.batch * params.heads * row_blocks;
  const int64_t blocks = units < (int64_t(1) << 30) ? units : int64_t(1) << 30;
  return with_output(params, [&](auto* out) {
    auto kernel = portable_kernel<kWarps, kTiles, kKeys, kStages, kBlocks,
                                  std::remove_pointer_t<decltype(out)>>;
    cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
    kernel<<<static_cast<unsigned>(blocks), kWarps * 32, shared, stream>>>(
        static_cast<const __half*>(params.qkv), out, static_cast<const float*>(params.query_bias),
        units, row_blocks, params.heads, params.tokens, params.causal,
        e4m3::reciprocal(params.out_scale));
    return cudaGetLastError();
  });
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time so that the library needs no libcuda at link time.
cudaError_t find_encode_tiled(EncodeTiled& encode) {
  static std::atomic<EncodeTiled> known{nullptr};
  EncodeTiled found = known.load(std::memory_order_acquire);
  if (found == nullptr) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                          cudaEnableDefault, &result);
#else
    cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess) return status;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    found = reinterpret_cast<EncodeTiled>(entry);
    known.store(found, std::memory_order_release);
  }
  encode = found;
  return cudaSuccess;
}

// Boxes of 64 columns and `rows` rows of qkv, in the layout that wgmma::descriptor describes.
cudaError_t encode_map(CUtensorMap& map, const ClipAttentionParams& params, int rows) {
  EncodeTiled encode;
  cudaError_t status = find_encode_tiled(encode);
  if (status != cudaSuccess) return status;
  const cuuint64_t columns = 3 * static_cast<cuuint64_t>(params.heads) * kHeadDim;
  const cuuint64_t sizes[3] = {columns, static_cast<cuuint64_t>(params.tokens),
                               static_cast<cuuint64_t>(params.batch)};
  const cuuint64_t strides[2] = {columns * 2, columns * 2 * params.tokens};
  const cuuint32_t box[3] = {kHeadDim, static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  const CUresult result = encode(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<void*>(params.qkv), sizes, strides, box,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Boxes of `rows` rows of qkv for each part of a head, in the layouts that wgmma::descriptor
// describes. Only where a head has several is it a dimension: past its end are zeros, and not the
// next head.
template <int kDim>
cudaError_t encode_maps(Maps<kDim>& maps, const ClipAttentionParams& params, int rows) {
  if constexpr (kDim == 64) return encode_map(maps.part[0], params, rows);
  EncodeTiled encode;
  cudaError_t status = find_encode_tiled(encode);
  if (status != cudaSuccess) return status;
  const cuuint64_t heads = 3 * static_cast<cuuint64_t>(params.heads), row_bytes = heads * kDim * 2;
  const cuuint64_t sizes[4] = {kDim, heads, static_cast<cuuint64_t>(params.tokens),
                               static_cast<cuuint64_t>(params.batch)};
  const cuuint64_t strides[3] = {kDim * 2, row_bytes, row_bytes * params.tokens};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  for (int part = 0; part < Columns<kDim>::parts; ++part) {
    const int width = Columns<kDim>::width(part);
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(width), 1, static_cast<cuuint32_t>(rows), 1};
    const CUresult result =
        encode(&maps.part[part], CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(params.qkv),
               sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
               width == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
               : width == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                             : CU_TENSOR_MAP_SWIZZLE_32B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

constexpr int hopper_full_chunks(int tokens, int keys, int tail_keys) {
  return tokens > tail_keys ? ceil_div(tokens - tail_keys, keys) : 0;
}

template <class Shape>
bool hopper_serves(int tokens, int causal) {
  const int full_chunks = hopper_full_chunks(tokens, Shape::keys, Shape::tail_keys);
  const int tail = tokens - full_chunks * Shape::keys;
  return tail >= 1 && tail >= Shape::tail_seen && (causal != 0) == Shape::causal;
}

// How many tiles of a head one block takes at a time. A larger unit loads keys and values less
// often, a smaller one spreads a small batch over the chip: the cost of a unit is taken as its
// tiles plus one for its keys and values, and the cost of the launch as that of the units of the
// busiest block.
int choose_tiles_per_unit(int64_t pairs, int tiles, int sm_count) {
  int best = tiles;
  int64_t best_cost = INT64_MAX;
  for (int size = tiles; size >= 1; --size) {
    const int64_t units = pairs * ceil_div(tiles, size);
    const int64_t cost = (units + sm_count - 1) / sm_count * (size + 1);
    if (cost < best_cost) {
      best_cost = cost;
      best = size;
    }
  }
  return best;
}

constexpr int greatest_common_divisor(int a, int b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

// Stages of the ring so that every warpgroup uses every filling of each stage that it waits on.
// With a tile of every unit for every warpgroup any number will do. With fewer tiles, the
// warpgroups that a unit occupies repeat after groups / gcd(groups, tiles) units, so the ring must
// hold a multiple of the chunks of so many. 0: no such number fits.
constexpr int ring_stages(int most, int chunks, int groups, int tiles_per_unit) {
  if (tiles_per_unit >= groups) return most;
  const int period = chunks * (groups / greatest_common_divisor(groups, tiles_per_unit));
  return most / period * period;
}

template <class Shape>
cudaError_t launch_hopper(const ClipAttentionParams& params, const Device& device,
                          cudaStream_t stream) {
  HopperPlan plan;
  plan.heads = params.heads;
  plan.tokens = params.tokens;
  plan.full_chunks = hopper_full_chunks(params.tokens, Shape::keys, Shape::tail_keys);
  const int chunks = plan.full_chunks + 1;
  plan.stages = Shape::max_stages;
  const int tiles = ceil_div(params.tokens, kTileRows);
  const int64_t pairs = params.batch * params.heads;
  plan.tiles_per_unit = choose_tiles_per_unit(pairs, tiles, device.sm_count);
  // A warpgroup that meets a unit again for another tile starts over at the unit's first chunk,
  // which must then still be there. (With one unit per block no stage is filled twice, and any
  // number will do.)
  if (plan.stages < chunks && plan.tiles_per_unit > Shape::groups)
    plan.tiles_per_unit = Shape::groups;
  if (pairs * ceil_div(tiles, plan.tiles_per_unit) >
      device.sm_count) {  // blocks with several units
    const int stages = ring_stages(plan.stages, chunks, Shape::groups, plan.tiles_per_unit);
    if (stages > 0)
      plan.stages = stages;
    else
      plan.tiles_per_unit = Shape::groups;  // some of them past the last row, if need be
  }
  plan.units_per_head = ceil_div(tiles, plan.tiles_per_unit);
  const int64_t units = pairs * plan.units_per_head;
  if (units > INT32_MAX / 2) return cudaErrorInvalidValue;  // a qkv of more than 400 GB
  plan.units = static_cast<int>(units);
  const int grid = plan.units < device.sm_count ? plan.units : device.sm_count;
  const int turns = ceil_div(plan.units, grid);
  plan.step_part = grid % plan.units_per_head;
  plan.step_head = grid / plan.units_per_head % params.heads;
  plan.step_image = grid / plan.units_per_head / params.heads;
  if (plan.stages > turns * chunks) plan.stages = turns * chunks;
  const int shared =
      1024 + Shape::query_bytes + plan.stages * 2 * Shape::chunk_bytes + Shape::bias_bytes;
  Maps<Shape::dim> query_maps, key_maps, tail_maps;
  cudaError_t status = encode_maps(query_maps, params, kTileRows);
  if (status == cudaSuccess) status = encode_maps(key_maps, params, Shape::keys);
  if (status == cudaSuccess) status = encode_maps(tail_maps, params, Shape::tail_rows);
  if (status != cudaSuccess) return status;
  return with_output(params, [&](auto* out) {
    auto kernel = hopper_kernel<Shape, std::remove_pointer_t<decltype(out)>>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
    kernel<<<grid, Shape::threads, shared, stream>>>(query_maps, key_maps, tail_maps, out,
                                                     static_cast<const float*>(params.query_bias),
                                                     plan, e4m3::reciprocal(params.out_scale));
    return cudaGetLastError();
  });
}

template <int kRows, int kWarps, int kBlocks>
cudaError_t launch_short(const ClipAttentionParams& params, const Device& device,
                         cudaStream_t stream) {
  constexpr int kStageBytes = 3 * kRows * kRowBytes + kBiasBytes;
  const int64_t pairs = params.batch * params.heads;
  if (pairs > INT32_MAX / 2) return cudaErrorInvalidValue;  // a qkv of more than 400 GB
  ShortPlan plan;
  plan.pairs = static_cast<int>(pairs);
  plan.heads = params.heads;
  plan.tokens = params.tokens;
  plan.tiles = ceil_div(params.tokens, 16);
  const int resident = device.sm_count * kBlocks;
  const int grid = plan.pairs < resident ? plan.pairs : resident;
  plan.step_head = grid % params.heads;
  plan.step_image = grid / params.heads;
  // Each block of a multiprocessor also takes 1 KiB that the system keeps.
  plan.stages = ((kHopperSharedBytes + 1024) / kBlocks - 1024 - kHopperReservedBytes) / kStageBytes;
  if (plan.stages > kMaxStages) plan.stages = kMaxStages;
  if (plan.stages > ceil_div(plan.pairs, grid)) plan.stages = ceil_div(plan.pairs, grid);
  const int shared = 1024 + plan.stages * kStageBytes;
  CUtensorMap map;
  cudaError_t status = encode_map(map, params, kRows);
  if (status != cudaSuccess) return status;
  return with_output(params, [&](auto* out) {
    auto kernel = short_kernel<kRows, kWarps, kBlocks, std::remove_pointer_t<decltype(out)>>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status != cudaSuccess) return status;
    kernel<<<grid, kWarps * 32 + 32, shared, stream>>>(
        map, out, static_cast<const float*>(params.query_bias), plan, params.causal,
        e4m3::reciprocal(params.out_scale));
    return cudaGetLastError();
  });
}

// ---------------------------------------------------------------------------------------------
// Variants, and the choice among them

using Launch = cudaError_t (*)(const ClipAttentionParams&, const Device&, cudaStream_t);
using Serves = bool (*)(int tokens, int causal);

struct Variant {
  int id;
  const char* name;
  bool hopper;
  int head_dim;
  Launch launch;
  Serves serves;
};

bool serves_all(int, int) { return true; }

template <int kWarps, int kTiles, int kKeys, int kStages, int kBlocks>
constexpr Variant portable(int id, const char* name) {
  return {
      id,        name, false, kHeadDim, launch_portable<kWarps, kTiles, kKeys, kStages, kBlocks>,
      serves_all};
}

template <int kKeys, int kTailKeys, int kTailSeen, int kGroups, int kQueries, bool kCausal,
          int kDim = kHeadDim>
constexpr Variant hopper(int id, const char* name) {
  using Shape = HopperShape<kDim, kKeys, kTailKeys, kTailSeen, kGroups, kQueries, kCausal>;
  return {id, name, true, kDim, launch_hopper<Shape>, hopper_serves<Shape>};
}

template <int kRows, int kWarps, int kBlocks>
constexpr Variant short_variant(int id, const char* name) {
  return {id, name, true, kHeadDim, launch_short<kRows, kWarps, kBlocks>,
          // No warp has two tiles of a head.
          [](int tokens, int) { return tokens <= kRows && ceil_div(tokens, 16) <= kWarps; }};
}

// Names: warps x tiles x keys x stages; rows, warps x blocks; keys/tail keys x warpgroups, and the
// head dimension where that is not 64.
enum VariantId {
  kPortable = 1,
  kShort64 = 10,
  kShort80 = 11,
  kShort80Warps9 = 12,
  kShort16 = 13,
  kShort32 = 14,
  kShort48 = 15,
  kHopper64Tail56 = 20,
  kHopper64 = 21,
  kHopper64Causal = 28,
  kHopper96Tail8 = 22,
  kHopper96Tail72 = 23,
  kHopper96 = 24,
  kHopper96Causal = 25,
  kHopper128Tail8 = 26,
  kHopper128Tail72 = 27,
  kWide = 100,  // plus three times the head dimension's number among kWideDims, plus 0, 1 or 2
};

constexpr int kWideDims[] = {72, 80, 88, 104};

const Variant kVariants[] = {
    portable<4, 1, 64, 3, 4>(kPortable, "portable 4x1x64x3"),
    short_variant<16, 4, 4>(kShort16, "short 16 4x4"),
    short_variant<32, 4, 4>(kShort32, "short 32 4x4"),
    short_variant<48, 6, 2>(kShort48, "short 48 6x2"),
    short_variant<64, 4, 4>(kShort64, "short 64 4x4"),
    short_variant<80, 5, 3>(kShort80, "short 80 5x3"),
    short_variant<80, 9, 2>(kShort80Warps9, "short 80 9x2"),
    hopper<64, 56, 49, 4, 2, false>(kHopper64Tail56, "hopper 64/56x4"),
    hopper<64, 64, 1, 4, 2, false>(kHopper64, "hopper 64/64x4"),
    hopper<64, 64, 1, 4, 2, true>(kHopper64Causal, "hopper 64/64x4 causal"),
    hopper<96, 8, 1, 4, 1, false>(kHopper96Tail8, "hopper 96/8x4"),
    hopper<96, 72, 65, 4, 1, false>(kHopper96Tail72, "hopper 96/72x4"),
    hopper<96, 96, 1, 4, 1, false>(kHopper96, "hopper 96/96x4"),
    hopper<96, 96, 1, 4, 1, true>(kHopper96Causal, "hopper 96/96x4 causal"),
    hopper<128, 8, 1, 1, 1, false>(kHopper128Tail8, "hopper 128/8x1"),
    hopper<128, 72, 65, 3, 1, false>(kHopper128Tail72, "hopper 128/72x3"),
    hopper<96, 72, 65, 3, 1, false, 72>(kWide, "hopper 96/72x3 of 72"),
    hopper<96, 96, 1, 3, 1, false, 72>(kWide + 1, "hopper 96/96x3 of 72"),
    hopper<96, 96, 1, 3, 1, true, 72>(kWide + 2, "hopper 96/96x3 causal of 72"),
    hopper<96, 72, 65, 3, 1, false, 80>(kWide + 3, "hopper 96/72x3 of 80"),
    hopper<96, 96, 1, 3, 1, false, 80>(kWide + 4, "hopper 96/96x3 of 80"),
    hopper<96, 96, 1, 3, 1, true, 80>(kWide + 5, "hopper 96/96x3 causal of 80"),
    hopper<96, 72, 65, 3, 1, false, 88>(kWide + 6, "hopper 96/72x3 of 88"),
    hopper<96, 96, 1, 3, 1, false, 88>(kWide + 7, "hopper 96/96x3 of 88"),
    hopper<96, 96, 1, 3, 1, true, 88>(kWide + 8, "hopper 96/96x3 causal of 88"),
    hopper<96, 72, 65, 3, 1, false, 104>(kWide + 9, "hopper 96/72x3 of 104"),
    hopper<96, 96, 1, 3, 1, false, 104>(kWide + 10, "hopper 96/96x3 of 104"),
    hopper<96, 96, 1, 3, 1, true, 104>(kWide + 11, "hopper 96/96x3 causal of 104"),
};

const Variant* find_variant(int id) {
  for (const Variant& variant : kVariants)
    if (variant.id == id) return &variant;
  return nullptr;
}

bool variant_serves(const Variant& variant, int tokens, int head_dim, int causal, int sm_major,
                    int sm_minor) {
  if (sm_major < 8 || variant.head_dim != head_dim) return false;
  if (variant.hopper && !(sm_major == 9 && sm_minor == 0)) return false;
  return variant.serves(tokens, causal);
}

// The first of three variants for a head dimension above 64; 0: there is none.
int wide_variant(int head_dim) {
  for (int i = 0; i < 4; ++i)
    if (kWideDims[i] == head_dim) return kWide + 3 * i;
  return 0;
}

}  // namespace

extern "C" int32_t clip_attention_params_size(void) { return sizeof(ClipAttentionParams); }

extern "C" int32_t clip_attention_supported(int64_t batch, int32_t heads, int32_t tokens,
                                            int32_t head_dim, int32_t sm_major, int32_t sm_minor) {
  return batch >= 1 && heads >= 1 && heads <= kClipAttentionMaxHeads && tokens >= 1 &&
         tokens <= kClipAttentionMaxTokens &&
         (head_dim == kHeadDim ? sm_major >= 8
                               : wide_variant(head_dim) != 0 && sm_major == 9 && sm_minor == 0);
}

extern "C" const char* clip_attention_variant(int32_t index, int32_t* id) {
  if (index < 0 || index >= static_cast<int32_t>(sizeof(kVariants) / sizeof(kVariants[0])))
    return nullptr;
  if (id != nullptr) *id = kVariants[index].id;
  return kVariants[index].name;
}

extern "C" int32_t clip_attention_variant_serves(int32_t variant, int32_t tokens, int32_t head_dim,
                                                 int32_t causal, int32_t sm_major,
                                                 int32_t sm_minor) {
  const Variant* found = find_variant(variant);
  return found != nullptr && variant_serves(*found, tokens, head_dim, causal, sm_major, sm_minor);
}

// The measurements behind this are in NOTES.md. CLIP's lengths are 50, 77 (and shorter prompts),
// 197, 257 and 577; other lengths take what serves them with the least padding.
extern "C" int32_t clip_attention_choose(int64_t batch, int32_t heads, int32_t tokens,
                                         int32_t head_dim, int32_t causal, int32_t sm_major,
                                         int32_t sm_minor, int32_t sm_count) {
  if (const int wide = wide_variant(head_dim)) {
    if (causal) return wide + 2;
    return find_variant(wide)->serves(tokens, causal) ? wide : wide + 1;
  }
  if (sm_major != 9 || sm_minor != 0) return kPortable;
  const int64_t pairs = batch * heads;
  const auto serves = [&](int id) { return find_variant(id)->serves(tokens, causal); };
  if (tokens <= 16) return kShort16;
  if (tokens <= 32) return kShort32;
  if (tokens <= 48) return kShort48;
  if (tokens <= 64) {
    // Tiles of 64 rows need several heads in flight per multiprocessor.
    if (causal || pairs <= sm_count) return kShort64;
    return serves(kHopper64Tail56) ? kHopper64Tail56 : kHopper64;
  }
  if (tokens <= 80) return kShort80Warps9;
  if (causal) return kHopper96Causal;
  // One tile per multiprocessor: few long steps beat many warpgroups.
  if (pairs * ceil_div(tokens, kTileRows) <= sm_count) {
    if (serves(kHopper128Tail8)) return kHopper128Tail8;
    if (serves(kHopper128Tail72)) return kHopper128Tail72;
  }
  if (serves(kHopper96Tail8)) return kHopper96Tail8;
  if (serves(kHopper96Tail72)) return kHopper96Tail72;
  return kHopper96;
}

extern "C" cudaError_t clip_attention_launch(const ClipAttentionParams* params,
                                             cudaStream_t stream) {
  if (params == nullptr || params->qkv == nullptr || params->out == nullptr)
    return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(params->qkv) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(params->out) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(params->query_bias) % 16 != 0 ||
      !e4m3::valid_scale(params->out_scale))
    return cudaErrorInvalidValue;
  Device device;
  cudaError_t status = current_device(device);
  if (status != cudaSuccess) return status;
  if (device.sm_major < 8) return cudaErrorNoKernelImageForDevice;
  if (!clip_attention_supported(params->batch, params->heads, params->tokens, params->head_dim,
                                device.sm_major, device.sm_minor))
    return cudaErrorInvalidValue;
  const int id = params->variant != 0
                     ? params->variant
                     : clip_attention_choose(params->batch, params->heads, params->tokens,
                                             params->head_dim, params->causal, device.sm_major,
                                             device.sm_minor, device.sm_count);
  const Variant* variant = find_variant(id);
  if (variant == nullptr || !variant_serves(*variant, params->tokens, params->head_dim,
                                            params->causal, device.sm_major, device.sm_minor))
    return cudaErrorInvalidValue;
  status = e4m3::supported(params->out_scale);
  if (status != cudaSuccess) return status;
  return variant->launch(*params, device, stream);
}
