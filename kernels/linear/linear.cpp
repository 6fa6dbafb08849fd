// Linear layers through cuBLASLt: finding the library, choosing an algorithm for a number of rows,
// launching, and measuring which algorithm is fastest. NOTES.md says what is known about it.
//
// cuBLASLt is column-major. out[rows, outputs] in rows is D[outputs, rows] in columns: D = A^T B
// with A = weight, which is [inputs, outputs] in columns, and B = x, which is [inputs, rows].
//
// E4M3 is the same with another type of A and B, and the scale as alpha.
//
// Algorithms that split the inner dimension may add their parts in fp32 in the workspace, in a step
// of its own. Adding them in the output, in fp16 and part after part, is excluded: it loses digits.

#include "linear.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "../e4m3.h"
#include "cublaslt.h"

namespace {

using namespace cublaslt;

constexpr uint32_t kAlignment = 16;       // of every pointer, and told to cuBLASLt
constexpr size_t kMaxChoices = 1024;      // that a layer remembers, then it begins again
constexpr int kSuggestions = 16;          // asked for when measuring
constexpr int64_t kColdBytes = 96 << 20;  // of weights between two uses of one, beyond the L2 cache
constexpr int kMaxLaunches = 64;          // in a measured graph
constexpr float kGraphUs = 400;           // of a measured graph at most, if it has several launches
constexpr float kNear = 1.15f;            // slower than this at first sight is not measured again
constexpr size_t kFinalists = 4;
constexpr int kRounds = 7;

int32_t from_cublas(cublasStatus_t status) { return -status; }
int32_t from_cuda(cudaError_t status) { return static_cast<int32_t>(status); }
constexpr int32_t kInvalid = cudaErrorInvalidValue;

#define RETURN_IF(status) \
  if (const int32_t failed_ = (status)) return failed_

// cuBLASLt of this process

template <class F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

bool find_all(void* library, Functions& f) {
#define FIND(name) find(library, #name, f.name)
  return FIND(cublasLtGetVersion) && FIND(cublasLtCreate) && FIND(cublasLtMatmulDescCreate) &&
         FIND(cublasLtMatmulDescDestroy) && FIND(cublasLtMatmulDescSetAttribute) &&
         FIND(cublasLtMatrixLayoutCreate) && FIND(cublasLtMatrixLayoutDestroy) &&
         FIND(cublasLtMatmulPreferenceCreate) && FIND(cublasLtMatmulPreferenceDestroy) &&
         FIND(cublasLtMatmulPreferenceSetAttribute) && FIND(cublasLtMatmulAlgoGetHeuristic) &&
         FIND(cublasLtMatmulAlgoCheck) && FIND(cublasLtMatmul);
#undef FIND
}

// The functions, or null; once for a process where it is there. RTLD_LOCAL: nobody else is to find
// them by these names.
const Functions* library() {
  static std::mutex mutex;
  static Functions functions = {};
  static bool found = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!found) {
    void* opened = dlopen("libcublasLt.so.13", RTLD_LAZY | RTLD_LOCAL);
    found = opened != nullptr && find_all(opened, functions);
    if (opened != nullptr && !found) dlclose(opened);
  }
  return found ? &functions : nullptr;
}

// The one handle of a device, made when it is first asked for; threads may share it.
int32_t handle_of(const Functions& lt, int device, cublasLtHandle_t& handle) {
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t> handles;
  const std::lock_guard<std::mutex> lock(mutex);
  cublasLtHandle_t& made = handles[device];
  if (made == nullptr) RETURN_IF(from_cublas(lt.cublasLtCreate(&made)));
  handle = made;
  return 0;
}

// One matrix product as cuBLASLt describes it.
class Product {
 public:
  Product(const Functions& lt, cublasLtHandle_t handle) : lt_(lt), handle_(handle) {}
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  ~Product() {
    if (operation_ != nullptr) lt_.cublasLtMatmulDescDestroy(operation_);
    for (cublasLtMatrixLayout_t layout : {weight_, x_, out_})
      if (layout != nullptr) lt_.cublasLtMatrixLayoutDestroy(layout);
  }

  // scale: 0 where x and weight are fp16, else that of E4M3.
  int32_t describe(int64_t rows, int32_t inputs, int32_t outputs, const void* bias, float scale,
                   bool fast_accumulation = true) {
    const cudaDataType type = scale > 0 ? CUDA_R_8F_E4M3 : CUDA_R_16F;
    RETURN_IF(
        from_cublas(lt_.cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F)));
    RETURN_IF(set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t{CUBLAS_OP_T}));
    if (scale > 0) {
      scale_ = scale;
      RETURN_IF(set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{fast_accumulation}));
    }
    if (bias != nullptr) {
      RETURN_IF(set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{CUBLASLT_EPILOGUE_BIAS}));
      RETURN_IF(set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias));
    }
    RETURN_IF(from_cublas(lt_.cublasLtMatrixLayoutCreate(&weight_, type, inputs, outputs, inputs)));
    RETURN_IF(from_cublas(lt_.cublasLtMatrixLayoutCreate(&x_, type, inputs, rows, inputs)));
    return from_cublas(lt_.cublasLtMatrixLayoutCreate(&out_, CUDA_R_16F, outputs, rows, outputs));
  }

  // What cuBLASLt suggests, the best first by its own estimate; NOT_SUPPORTED where that is
  // nothing.
  int32_t suggest(int wanted, std::vector<cublasLtMatmulHeuristicResult_t>& results) const {
    cublasLtMatmulPreference_t preference = nullptr;
    RETURN_IF(from_cublas(lt_.cublasLtMatmulPreferenceCreate(&preference)));
    const auto prefer = [&](int attribute, auto value) {
      return from_cublas(
          lt_.cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)));
    };
    int32_t status =
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kClipLinearWorkspaceBytes});
    const uint32_t schemes =
        CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    if (status == 0) status = prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes);
    for (const int operand :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      if (status == 0) status = prefer(operand, kAlignment);
    int found = 0;
    results.resize(wanted);
    if (status == 0)
      status = from_cublas(lt_.cublasLtMatmulAlgoGetHeuristic(handle_, operation_, weight_, x_,
                                                              out_, out_, preference, wanted,
                                                              results.data(), &found));
    lt_.cublasLtMatmulPreferenceDestroy(preference);
    results.resize(status == 0 ? found : 0);
    const auto unusable = [](const cublasLtMatmulHeuristicResult_t& result) {
      return result.state != CUBLAS_STATUS_SUCCESS ||
             result.workspaceSize > kClipLinearWorkspaceBytes;
    };
    results.erase(std::remove_if(results.begin(), results.end(), unusable), results.end());
    return status == 0 && results.empty() ? from_cublas(CUBLAS_STATUS_NOT_SUPPORTED) : status;
  }

  // Whether cuBLASLt can run an algorithm for it within the workspace.
  bool accepts(const cublasLtMatmulAlgo_t& algorithm) const {
    cublasLtMatmulHeuristicResult_t result = {};
    return lt_.cublasLtMatmulAlgoCheck(handle_, operation_, weight_, x_, out_, out_, &algorithm,
                                       &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= kClipLinearWorkspaceBytes;
  }

  int32_t launch(const cublasLtMatmulAlgo_t& algorithm, const void* x, const void* weight,
                 void* out, void* workspace, cudaStream_t stream) const {
    static constexpr float kZero = 0;
    return from_cublas(lt_.cublasLtMatmul(handle_, operation_, &scale_, weight, weight_, x, x_,
                                          &kZero, out, out_, out, out_, &algorithm, workspace,
                                          kClipLinearWorkspaceBytes, stream));
  }

 private:
  template <class T>
  int32_t set(int attribute, const T& value) {
    return from_cublas(
        lt_.cublasLtMatmulDescSetAttribute(operation_, attribute, &value, sizeof(value)));
  }

  const Functions& lt_;
  const cublasLtHandle_t handle_;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t weight_ = nullptr, x_ = nullptr, out_ = nullptr;
  float scale_ = 1;
};

struct Choice {
  Choice(const Functions& lt, cublasLtHandle_t handle) : product(lt, handle) {}
  Product product;
  cublasLtMatmulAlgo_t algorithm = {};
};

bool aligned(const void* pointer) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0;
}

bool valid_sizes(int32_t inputs, int32_t outputs, bool quantized) {
  const int32_t inputs_step = quantized ? kClipLinearQuantizedStep : kClipLinearInputsStep;
  const int32_t outputs_step = quantized ? kClipLinearQuantizedStep : kClipLinearOutputsStep;
  return inputs > 0 && inputs <= kClipLinearMaxWidth && inputs % inputs_step == 0 && outputs > 0 &&
         outputs <= kClipLinearMaxWidth && outputs % outputs_step == 0;
}

// A table of bytes as its parts; false where it is none.
bool read_table(const void* bytes, int64_t size, ClipLinearTable& about,
                std::vector<ClipLinearEntry>& entries) {
  if (bytes == nullptr || size < static_cast<int64_t>(sizeof(about))) return false;
  std::memcpy(&about, bytes, sizeof(about));
  if (!e4m3::valid_scale(about.scale) ||
      !valid_sizes(about.inputs, about.outputs, about.scale > 0) ||
      (about.bias != 0 && about.bias != 1) || about.count < 0 ||
      about.count > kClipLinearMaxEntries ||
      size != static_cast<int64_t>(sizeof(about) + about.count * sizeof(ClipLinearEntry)))
    return false;
  entries.resize(about.count);
  if (about.count > 0)
    std::memcpy(entries.data(), static_cast<const char*>(bytes) + sizeof(about),
                about.count * sizeof(ClipLinearEntry));
  return std::all_of(entries.begin(), entries.end(), [](const ClipLinearEntry& entry) {
    return entry.rows >= 1 && entry.rows <= kClipLinearMaxRows;
  });
}

// Runs what returns a status; an exception, which can only be of memory, becomes one.
template <class Function>
int32_t guarded(Function function) {
  try {
    return function();
  } catch (const std::exception&) {
    return from_cuda(cudaErrorMemoryAllocation);
  }
}

}  // namespace

struct ClipLinear {
  const Functions& lt;
  const ClipLinearTable about;
  const std::vector<ClipLinearEntry> entries;
  std::mutex mutex;
  // The address of the bias is part of a product's description.
  std::map<std::tuple<int, int64_t, const void*>, std::shared_ptr<const Choice>> choices;

  int32_t choice_for(int64_t rows, const void* bias, std::shared_ptr<const Choice>& chosen) {
    int device = 0;
    RETURN_IF(from_cuda(cudaGetDevice(&device)));
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(device, rows, bias);
    const auto known = choices.find(key);
    if (known != choices.end()) {
      chosen = known->second;
      return 0;
    }
    RETURN_IF(choose(device, rows, bias, chosen));
    if (choices.size() >= kMaxChoices) choices.clear();
    choices.emplace(key, chosen);
    return 0;
  }

 private:
  int32_t choose(int device, int64_t rows, const void* bias,
                 std::shared_ptr<const Choice>& chosen) const {
    cublasLtHandle_t handle = nullptr;
    RETURN_IF(handle_of(lt, device, handle));
    if (!entries.empty() && about.version == lt.cublasLtGetVersion()) {
      const ClipLinearEntry& entry = *std::min_element(
          entries.begin(), entries.end(), [&](const ClipLinearEntry& a, const ClipLinearEntry& b) {
            return ratio(a.rows, rows) < ratio(b.rows, rows);
          });
      auto measured = std::make_shared<Choice>(lt, handle);
      static_assert(sizeof(measured->algorithm) == sizeof(entry.algorithm),
                    "an algorithm is 64 bytes");
      std::memcpy(&measured->algorithm, entry.algorithm, sizeof(entry.algorithm));
      RETURN_IF(measured->product.describe(rows, about.inputs, about.outputs, bias, about.scale));
      if (measured->product.accepts(measured->algorithm)) {
        chosen = measured;
        return 0;
      }
    }
    auto suggested = std::make_shared<Choice>(lt, handle);
    RETURN_IF(suggested->product.describe(rows, about.inputs, about.outputs, bias, about.scale));
    std::vector<cublasLtMatmulHeuristicResult_t> results;
    RETURN_IF(suggested->product.suggest(1, results));
    suggested->algorithm = results[0].algo;
    chosen = suggested;
    return 0;
  }

  static double ratio(int64_t a, int64_t b) {
    return static_cast<double>(std::max(a, b)) / std::min(a, b);
  }
};

namespace {

// Measuring

struct Stream {
  cudaStream_t stream = nullptr;
  ~Stream() {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
};

struct Event {
  cudaEvent_t event = nullptr;
  ~Event() {
    if (event != nullptr) cudaEventDestroy(event);
  }
};

// An algorithm and a graph of several launches of it.
struct Candidate {
  cublasLtMatmulAlgo_t algorithm;
  cudaGraphExec_t graph = nullptr;
  float us = 0;

  explicit Candidate(const cublasLtMatmulAlgo_t& algorithm) : algorithm(algorithm) {}
  Candidate(const Candidate&) = delete;
  ~Candidate() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
};

class Measurement {
 public:
  Measurement(const ClipLinearTuneParams& params, const Product& product)
      : params_(params), product_(product) {}

  int32_t begin() {
    RETURN_IF(from_cuda(cudaStreamCreateWithFlags(&stream_.stream, cudaStreamNonBlocking)));
    RETURN_IF(from_cuda(cudaEventCreate(&started_.event)));
    return from_cuda(cudaEventCreate(&ended_.event));
  }

  // A first launch, which may load the kernel, and then a graph of several. How many is found out
  // with the first candidate.
  int32_t capture(Candidate& candidate) {
    RETURN_IF(launch(candidate, 0));
    RETURN_IF(from_cuda(cudaStreamSynchronize(stream_.stream)));
    if (launches_ == 0) {
      float us = 0;
      RETURN_IF(time([&] { return launch(candidate, 1); }, us));
      const int64_t bytes = weight_bytes();
      const int64_t cold = std::clamp<int64_t>((kColdBytes + bytes - 1) / bytes, 4, kMaxLaunches);
      launches_ = static_cast<int>(
          std::clamp<int64_t>(static_cast<int64_t>(kGraphUs / std::max(us, 1.0f)), 1, cold));
    }
    RETURN_IF(from_cuda(cudaStreamBeginCapture(stream_.stream, cudaStreamCaptureModeThreadLocal)));
    int32_t status = 0;
    for (int i = 0; i < launches_ && status == 0; ++i) status = launch(candidate, i);
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream_.stream, &graph);
    if (status == 0) status = from_cuda(ended);
    if (status == 0) status = from_cuda(cudaGraphInstantiateWithFlags(&candidate.graph, graph, 0));
    if (graph != nullptr) cudaGraphDestroy(graph);
    RETURN_IF(status);
    return replay(candidate, candidate.us);
  }

  // Microseconds of a launch, the average over one replay.
  int32_t replay(const Candidate& candidate, float& us) {
    RETURN_IF(
        time([&] { return from_cuda(cudaGraphLaunch(candidate.graph, stream_.stream)); }, us));
    us /= launches_;
    return 0;
  }

 private:
  int64_t weight_bytes() const {
    return int64_t{params_.quantized ? 1 : 2} * params_.inputs * params_.outputs;
  }

  int32_t launch(const Candidate& candidate, int i) const {
    const char* weight =
        static_cast<const char*>(params_.weight) + i % params_.weights * weight_bytes();
    return product_.launch(candidate.algorithm, params_.x, weight, params_.out, params_.workspace,
                           stream_.stream);
  }

  template <class Work>
  int32_t time(Work work, float& us) {
    RETURN_IF(from_cuda(cudaEventRecord(started_.event, stream_.stream)));
    RETURN_IF(work());
    RETURN_IF(from_cuda(cudaEventRecord(ended_.event, stream_.stream)));
    RETURN_IF(from_cuda(cudaEventSynchronize(ended_.event)));
    RETURN_IF(from_cuda(cudaEventElapsedTime(&us, started_.event, ended_.event)));
    us *= 1000;
    return 0;
  }

  const ClipLinearTuneParams params_;
  const Product& product_;
  Stream stream_;
  Event started_, ended_;
  int launches_ = 0;
};

bool faster(const std::unique_ptr<Candidate>& a, const std::unique_ptr<Candidate>& b) {
  return a->us < b->us;
}

// The nearest to the fastest, fastest first.
void keep_finalists(std::vector<std::unique_ptr<Candidate>>& candidates) {
  std::sort(candidates.begin(), candidates.end(), faster);
  while (candidates.size() > 1 &&
         (candidates.size() > kFinalists || candidates.back()->us > kNear * candidates.front()->us))
    candidates.pop_back();
}

int32_t tune(const ClipLinearTuneParams& params, ClipLinearEntry& best, float& microseconds) {
  const Functions* lt = library();
  if (lt == nullptr) return kClipLinearNoLibrary;
  int device = 0;
  cublasLtHandle_t handle = nullptr;
  RETURN_IF(from_cuda(cudaGetDevice(&device)));
  RETURN_IF(handle_of(*lt, device, handle));

  Product product(*lt, handle);
  RETURN_IF(product.describe(params.rows, params.inputs, params.outputs, params.bias,
                             params.quantized ? 1 : 0, params.fast_accumulation != 0));
  std::vector<cublasLtMatmulHeuristicResult_t> suggestions;
  RETURN_IF(product.suggest(kSuggestions, suggestions));

  // The candidates must go before the measurement's stream.
  Measurement measurement(params, product);
  RETURN_IF(measurement.begin());
  std::vector<std::unique_ptr<Candidate>> candidates;
  int32_t status = 0;
  const auto began = std::chrono::steady_clock::now();
  for (const cublasLtMatmulHeuristicResult_t& suggestion : suggestions) {
    const std::chrono::duration<float, std::milli> spent = std::chrono::steady_clock::now() - began;
    if (spent.count() > params.milliseconds && !candidates.empty()) break;
    auto candidate = std::make_unique<Candidate>(suggestion.algo);
    status = measurement.capture(*candidate);
    if (status > 0) return status;  // an error of CUDA is one of everything after it
    if (status == 0) candidates.push_back(std::move(candidate));
  }
  if (candidates.empty()) return status;

  keep_finalists(candidates);
  std::vector<std::vector<float>> times(candidates.size());
  for (int round = 0; round < kRounds; ++round)  // in turns: clocks change with time
    for (size_t i = 0; i < candidates.size(); ++i) {
      float us = 0;
      RETURN_IF(measurement.replay(*candidates[i], us));
      times[i].push_back(us);
    }
  for (size_t i = 0; i < candidates.size(); ++i) {
    std::nth_element(times[i].begin(), times[i].begin() + kRounds / 2, times[i].end());
    candidates[i]->us = times[i][kRounds / 2];
  }
  const Candidate* winner = std::min_element(candidates.begin(), candidates.end(), faster)->get();
  best = {params.rows, {}};
  std::memcpy(best.algorithm, &winner->algorithm, sizeof(best.algorithm));
  microseconds = winner->us;
  return 0;
}

}  // namespace

extern "C" int32_t clip_linear_create(const void* table, int64_t bytes, ClipLinear** made) {
  return guarded([&] {
    ClipLinearTable about = {};
    std::vector<ClipLinearEntry> entries;
    if (made == nullptr || !read_table(table, bytes, about, entries)) return kInvalid;
    const Functions* lt = library();
    if (lt == nullptr) return int32_t{kClipLinearNoLibrary};
    *made = new ClipLinear{*lt, about, std::move(entries), {}, {}};
    return 0;
  });
}

extern "C" void clip_linear_destroy(ClipLinear* layer) { delete layer; }

extern "C" int32_t clip_linear_prepare(void) {
  return guarded([] {
    const Functions* lt = library();
    if (lt == nullptr) return int32_t{kClipLinearNoLibrary};
    int device = 0;
    cublasLtHandle_t handle = nullptr;
    RETURN_IF(from_cuda(cudaGetDevice(&device)));
    return handle_of(*lt, device, handle);
  });
}

extern "C" int32_t clip_linear_launch(const ClipLinearParams* params, cudaStream_t stream) {
  if (params == nullptr || params->layer == nullptr || params->rows < 0 ||
      params->rows > kClipLinearMaxRows)
    return kInvalid;
  if (params->rows == 0) return 0;
  const bool has_bias = params->layer->about.bias != 0;
  if (!aligned(params->x) || !aligned(params->weight) || !aligned(params->out) ||
      !aligned(params->workspace) || (has_bias ? !aligned(params->bias) : params->bias != nullptr))
    return kInvalid;
  return guarded([&] {
    std::shared_ptr<const Choice> choice;
    RETURN_IF(params->layer->choice_for(params->rows, params->bias, choice));
    return choice->product.launch(choice->algorithm, params->x, params->weight, params->out,
                                  params->workspace, stream);
  });
}

extern "C" int32_t clip_linear_tune(const ClipLinearTuneParams* params, ClipLinearEntry* best,
                                    float* microseconds) {
  if (params == nullptr || best == nullptr || (params->quantized | 1) != 1 ||
      (params->fast_accumulation | 1) != 1 ||
      !valid_sizes(params->inputs, params->outputs, params->quantized != 0) || params->rows < 1 ||
      params->rows > kClipLinearMaxRows || params->weights < 1 || !(params->milliseconds >= 0) ||
      !aligned(params->x) || !aligned(params->weight) || !aligned(params->out) ||
      !aligned(params->workspace) || (params->bias != nullptr && !aligned(params->bias)))
    return kInvalid;
  float us = 0;
  const int32_t status = guarded([&] { return tune(*params, *best, us); });
  if (microseconds != nullptr) *microseconds = us;
  return status;
}

extern "C" uint64_t clip_linear_version(void) {
  const Functions* lt = library();
  return lt == nullptr ? 0 : lt->cublasLtGetVersion();
}

extern "C" int32_t clip_linear_params_size(void) { return sizeof(ClipLinearParams); }
extern "C" int32_t clip_linear_tune_params_size(void) { return sizeof(ClipLinearTuneParams); }
extern "C" int32_t clip_linear_table_size(void) { return sizeof(ClipLinearTable); }
extern "C" int32_t clip_linear_entry_size(void) { return sizeof(ClipLinearEntry); }
