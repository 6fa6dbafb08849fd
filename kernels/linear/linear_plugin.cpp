// The TensorRT plugin around the launcher of linear.h.
//
//   ClipLinear     table int8, as many as it has bytes: a ClipLinearTable and its entries
//     in    x fp16 [.., inputs], rank 2 or more; weight fp16, outputs * inputs elements, in any
//           shape: a row for each output; with table.bias 1 a bias fp16, outputs elements
//     out   fp16 [.., outputs]: x weight^T + bias
//   With table.scale above 0 x and weight are E4M3, fp16 of half the width as plugin.h says: x
//   [.., inputs / 2], weight outputs * inputs / 2 elements; their product is multiplied by the
//   scale.
//
// The algorithm is chosen for the number of rows that a launch has, from the table; where another
// cuBLASLt runs than the one that the table is of, from cuBLASLt's own suggestions.

#include <atomic>
#include <memory>

#include "../plugin.h"
#include "linear.h"

namespace {

using namespace clip;

constexpr char kNoLibrary[] = "there is no cuBLASLt: libcublasLt.so.13 is not found";

// Copies share the layer, and with it the algorithms that it remembers.
struct LinearData {
  Bytes table;
  ClipLinearTable about;  // the table's first bytes
  std::shared_ptr<ClipLinear> layer;
};

class Linear final : public Plugin<Linear, LinearData> {
 public:
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipLinear";
  static constexpr std::tuple kFields{Field{"table", &Data::table}};

  static const char* complete(Data& data) {
    ClipLinear* made = nullptr;
    const int64_t bytes = static_cast<int64_t>(data.table.size());
    const int32_t status = clip_linear_create(data.table.data(), bytes, &made);
    if (status == kClipLinearNoLibrary) return kNoLibrary;
    if (status == cudaErrorMemoryAllocation) return "out of memory";
    if (status != 0)
      return "the table is not one of this version: sizes, a count, a scale and entries, as in "
             "linear.h";
    data.layer.reset(made, clip_linear_destroy);
    std::memcpy(&data.about, data.table.data(), sizeof(data.about));
    static std::atomic<bool> told{false};
    if (data.about.count > 0 && data.about.version != clip_linear_version() && !told.exchange(true))
      report(kName, "its algorithms are of another cuBLASLt; this one's suggestions replace them");
    return nullptr;
  }

  int32_t inputs() const { return 2 + data_.about.bias; }
  int32_t outputs() const { return 1; }
  int32_t halves() const { return inputs(); }
  const char* wrong_shapes(const Dims* in) const {
    const int64_t inputs = data_.about.inputs / (data_.about.scale > 0 ? 2 : 1);
    if (in[0].nbDims < 2 || !agrees(width_of(in[0]), inputs))
      return "x is not [.., inputs] of the layer, in rank 2 or more";
    if (!agrees(volume(in[1]), inputs * data_.about.outputs))
      return "the weight has not as many elements as inputs times outputs of the layer";
    if (data_.about.bias != 0 && !agrees(volume(in[2]), data_.about.outputs))
      return "the bias has not one element for each output of the layer";
    return nullptr;
  }
  void shape(const DimsExprs* in, int32_t, DimsExprs& out, IExprBuilder& builder) const {
    out.d[in[0].nbDims - 1] = builder.constant(data_.about.outputs);
  }
  size_t workspace() const { return kClipLinearWorkspaceBytes; }
  int32_t prepare() const { return clip_linear_prepare(); }

  int32_t launch(const Call& call) const {
    const void* bias = data_.about.bias != 0 ? call.x[2] : nullptr;
    const ClipLinearParams params = {data_.layer.get(), call.x[0],      call.x[1],          bias,
                                     call.y[0],         call.workspace, rows_of(call.in[0])};
    return clip_linear_launch(&params, call.stream);
  }

  static std::string explain(int32_t status) {
    if (status == kClipLinearNoLibrary) return kNoLibrary;
    if (status > 0) return Plugin::explain(status);
    return "cuBLASLt answers with status " + std::to_string(-status);
  }
};

}  // namespace

std::vector<IPluginCreatorV3One*> clip::linear_creators() {
  static Creator<Linear> linear;
  return {&linear};
}
