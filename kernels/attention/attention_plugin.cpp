// The TensorRT plugin around clip_attention_launch (attention.h).
//
//   ClipAttention     int32 heads, tokens (0: as the shape says), head_dim (D), causal (0 or 1),
//   query_bias (0 or 1); float32 out_scale
//     in    qkv fp16 [batch * tokens, 3 * heads * D] or [batch, tokens, 3 * heads * D];
//           with query_bias 1 a bias fp32 [heads * D], which is added to q
//     out   fp16, qkv's shape with heads * D as its last dimension; with an out_scale above 0 it
//           is E4M3, divided by out_scale, as plugin.h says
//
// Rank 2 is what matrix products give and take without a copy; the number of tokens, which the
// shape then does not show, is a field. With 0 in it qkv has rank 3, and launches differ in tokens.

#include "../plugin.h"
#include "attention.h"

namespace {

using namespace clip;

struct AttentionData {
  int32_t heads, tokens, head_dim, causal, query_bias;
  float out_scale;
};

class Attention final : public Plugin<Attention, AttentionData> {
 public:
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipAttention";
  static constexpr std::tuple kFields{
      Field{"heads", &Data::heads},           Field{"tokens", &Data::tokens},
      Field{"head_dim", &Data::head_dim},     Field{"causal", &Data::causal},
      Field{"query_bias", &Data::query_bias}, Field{"out_scale", &Data::out_scale}};

  static const char* complete(Data& data) {
    if (!e4m3::valid_scale(data.out_scale)) return kWrongOutScale;
    const bool valid = data.heads >= 1 && data.heads <= kClipAttentionMaxHeads &&
                       data.tokens >= 0 && data.tokens <= kClipAttentionMaxTokens &&
                       data.head_dim >= 8 && data.head_dim <= kClipAttentionMaxHeadDim &&
                       data.head_dim % 8 == 0 && (data.causal | 1) == 1 &&
                       (data.query_bias | 1) == 1;
    return valid ? nullptr
                 : "heads must be 1 to 40, tokens 0 to 1024, head_dim a multiple of 8 up to 104, "
                   "causal and query_bias 0 or 1";
  }

  int32_t inputs() const { return 1 + data_.query_bias; }
  int32_t outputs() const { return 1; }
  int32_t halves() const { return 1; }

  const char* wrong_shapes(const Dims* in) const {
    const bool flat = in[0].nbDims == 2;
    const bool any = data_.tokens == 0;
    const bool fits = flat ? !any : in[0].nbDims == 3 && (any || agrees(in[0].d[1], data_.tokens));
    if (!fits || !agrees(width_of(in[0]), 3 * width()))
      return "qkv is neither [batch * tokens, 3 * heads * head_dim] nor [batch, tokens, "
             "3 * heads * head_dim] for the sizes that it was built with";
    if (flat && !multiple(in[0].d[0], data_.tokens))
      return "the number of rows is not a multiple of the tokens that it was built with";
    if (data_.query_bias != 0 && (in[1].nbDims != 1 || !agrees(in[1].d[0], width())))
      return "query_bias is not [heads * head_dim] for the sizes that it was built with";
    return nullptr;
  }

  void shape(const DimsExprs* in, int32_t, DimsExprs& out, IExprBuilder& builder) const {
    out.d[in[0].nbDims - 1] = builder.constant(width());
    if (data_.out_scale > 0) halve_width(out, builder);
  }

  int32_t launch(const Call& call) const {
    const Dims& qkv = call.in[0];
    const bool flat = qkv.nbDims == 2;
    const int32_t tokens = flat ? data_.tokens : narrow(qkv.d[1]);
    const int64_t batch = flat ? qkv.d[0] / tokens : qkv.d[0];
    const void* query_bias = data_.query_bias != 0 ? call.x[1] : nullptr;
    const ClipAttentionParams params = {call.x[0],     call.y[0],      query_bias,     batch,
                                        data_.heads,   tokens,         data_.head_dim, data_.causal,
                                        /*variant=*/0, data_.out_scale};
    return batch == 0 ? 0 : clip_attention_launch(&params, call.stream);
  }

 private:
  int32_t width() const { return data_.heads * data_.head_dim; }
};

}  // namespace

std::vector<IPluginCreatorV3One*> clip::attention_creators() {
  static Creator<Attention> attention;
  return {&attention};
}
