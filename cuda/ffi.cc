// XLA FFI handlers: buffers and attributes in, launches out. Handler == FFI target == JAX
// primitive, all under one name. Shapes and dtypes were checked in Python; absent operands have
// shape [0].
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <xla/ffi/api/ffi.h>

#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "decode/splits.h"
#include "mask.cuh"
#include "params.h"
#include "philox.h"
#include "plan.h"
#include "sm90/tiles.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace jax_fa {

struct FwdAttrs {
  float scale, softcap;
  int32_t window_left, window_right;
  bool top_left;
  double dropout_rate;
  bool dropout_heads, exact;
  int32_t layout;
};

struct VarlenAttrs {
  int32_t max_len_q, max_len_kv;
  float scale, softcap;
  int32_t window_left, window_right;
  bool top_left;
  double dropout_rate;
  bool dropout_heads, exact;
};

struct FwdBwdAttrs : FwdAttrs {
  bool deterministic;
};

struct VarlenBwdAttrs : VarlenAttrs {
  bool deterministic;
};

struct DecodeAttrs {
  float scale, softcap;
  int32_t window_left, window_right;
  bool exact;
  int32_t layer_stride;
};

struct HybridAttrs {
  float scale, softcap;
  int32_t window_left, window_right;
  bool exact;
  int32_t layer_stride, split_size;
};

struct AppendAttrs {
  int32_t layer_stride, row_limit;
  bool interleaved, scale_given;
};

}  // namespace jax_fa

#define JAX_FA_MEMBER(type, name) ffi::StructMember<type>(#name)
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa::FwdAttrs, JAX_FA_MEMBER(float, scale), JAX_FA_MEMBER(float, softcap),
    JAX_FA_MEMBER(int32_t, window_left), JAX_FA_MEMBER(int32_t, window_right),
    JAX_FA_MEMBER(bool, top_left), JAX_FA_MEMBER(double, dropout_rate),
    JAX_FA_MEMBER(bool, dropout_heads), JAX_FA_MEMBER(bool, exact), JAX_FA_MEMBER(int32_t, layout));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa::VarlenAttrs, JAX_FA_MEMBER(int32_t, max_len_q), JAX_FA_MEMBER(int32_t, max_len_kv),
    JAX_FA_MEMBER(float, scale), JAX_FA_MEMBER(float, softcap), JAX_FA_MEMBER(int32_t, window_left),
    JAX_FA_MEMBER(int32_t, window_right), JAX_FA_MEMBER(bool, top_left),
    JAX_FA_MEMBER(double, dropout_rate), JAX_FA_MEMBER(bool, dropout_heads),
    JAX_FA_MEMBER(bool, exact));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa::FwdBwdAttrs, JAX_FA_MEMBER(float, scale), JAX_FA_MEMBER(float, softcap),
    JAX_FA_MEMBER(int32_t, window_left), JAX_FA_MEMBER(int32_t, window_right),
    JAX_FA_MEMBER(bool, top_left), JAX_FA_MEMBER(double, dropout_rate),
    JAX_FA_MEMBER(bool, dropout_heads), JAX_FA_MEMBER(bool, exact), JAX_FA_MEMBER(int32_t, layout),
    JAX_FA_MEMBER(bool, deterministic));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa::VarlenBwdAttrs, JAX_FA_MEMBER(int32_t, max_len_q), JAX_FA_MEMBER(int32_t, max_len_kv),
    JAX_FA_MEMBER(float, scale), JAX_FA_MEMBER(float, softcap), JAX_FA_MEMBER(int32_t, window_left),
    JAX_FA_MEMBER(int32_t, window_right), JAX_FA_MEMBER(bool, top_left),
    JAX_FA_MEMBER(double, dropout_rate), JAX_FA_MEMBER(bool, dropout_heads),
    JAX_FA_MEMBER(bool, exact), JAX_FA_MEMBER(bool, deterministic));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa::DecodeAttrs, JAX_FA_MEMBER(float, scale),
                                      JAX_FA_MEMBER(float, softcap),
                                      JAX_FA_MEMBER(int32_t, window_left),
                                      JAX_FA_MEMBER(int32_t, window_right),
                                      JAX_FA_MEMBER(bool, exact),
                                      JAX_FA_MEMBER(int32_t, layer_stride));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa::HybridAttrs, JAX_FA_MEMBER(float, scale),
                                      JAX_FA_MEMBER(float, softcap),
                                      JAX_FA_MEMBER(int32_t, window_left),
                                      JAX_FA_MEMBER(int32_t, window_right),
                                      JAX_FA_MEMBER(bool, exact),
                                      JAX_FA_MEMBER(int32_t, layer_stride),
                                      JAX_FA_MEMBER(int32_t, split_size));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa::AppendAttrs, JAX_FA_MEMBER(int32_t, layer_stride),
                                      JAX_FA_MEMBER(int32_t, row_limit),
                                      JAX_FA_MEMBER(bool, interleaved),
                                      JAX_FA_MEMBER(bool, scale_given));
#undef JAX_FA_MEMBER

namespace jax_fa {
namespace {

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

enum Layout { kSeparate, kKvPacked, kQkvPacked };  // in the order of _lowering.py

bool absent(const In& x) { return x.dimensions().size() == 1 && x.dimensions()[0] == 0; }

template <typename T>
const T* optional(const In& x) {
  return absent(x) ? nullptr : reinterpret_cast<const T*>(x.untyped_data());
}

DType dtype_of(const In& x) {
  switch (x.element_type()) {
    case ffi::F16:
      return DType::kF16;
    case ffi::BF16:
      return DType::kBF16;
    case ffi::S8:
      return DType::kInt8;
    case ffi::F8E4M3FN:
      return DType::kE4M3;
    case ffi::F8E5M2:
      return DType::kE5M2;
    default:
      return DType::kF32;
  }
}

int64_t element_bytes(const In& x) { return ffi::ByteWidth(x.element_type()); }

// Part `part` of `parts` arrays in one buffer [rows, tokens, (parts,) heads, dim].
KvTensor dense_keys(const In& x, const In& scale, int part, int parts) {
  const auto dims = x.dimensions();
  const int64_t heads = dims[dims.size() - 2], dim = dims.back();
  KvTensor out{};
  out.data = static_cast<const char*>(x.untyped_data()) + part * heads * dim * element_bytes(x);
  out.token_stride = parts * heads * dim;
  out.row_stride = dims[1] * out.token_stride;
  out.head_stride = dim;
  out.rows = int(dims[0]);
  out.tokens = int(dims[1]);
  out.dtype = dtype_of(x);
  if (!absent(scale)) {
    const auto s = scale.dimensions();  // [rows | 1, heads | 1, tokens | 1, groups]
    out.scale = reinterpret_cast<const float*>(scale.untyped_data());
    out.groups = int(s[3]);
    out.scale_token_stride = s[2] == 1 ? 0 : s[3];
    out.scale_head_stride = s[1] == 1 ? 0 : s[2] * s[3];
    out.scale_row_stride = s[0] == 1 ? 0 : s[1] * s[2] * s[3];
  }
  return out;
}

// Packed keys [total, heads, dim] with scales [heads | 1, total | 1, groups]: one row of tokens.
KvTensor packed_keys(const In& x, const In& scale) {
  const auto dims = x.dimensions();
  KvTensor out{};
  out.data = x.untyped_data();
  out.token_stride = dims[1] * dims[2];
  out.head_stride = dims[2];
  out.rows = 1;
  out.tokens = int(dims[0]);
  out.dtype = dtype_of(x);
  if (!absent(scale)) {
    const auto s = scale.dimensions();
    out.scale = reinterpret_cast<const float*>(scale.untyped_data());
    out.groups = int(s[2]);
    out.scale_token_stride = s[1] == 1 ? 0 : s[2];
    out.scale_head_stride = s[0] == 1 ? 0 : s[1] * s[2];
  }
  return out;
}

// Where a cache [rows, tokens, heads, dim] or pool [pages, page, heads, dim] is read or written.
KvIndex cache_index(const In& cache, const In& lengths, const In& rows, const In& page_table,
                    const In& layer, int layer_stride) {
  KvIndex out{};
  out.length = optional<int>(lengths);
  out.rows = optional<int>(rows);
  out.page_table = optional<int>(page_table);
  out.layer = optional<int>(layer);
  out.layers = out.layer ? int(layer.dimensions()[0]) : 1;
  out.layer_stride = layer_stride;
  out.page_size = int(cache.dimensions()[1]);
  out.max_pages = out.page_table ? int(page_table.dimensions()[1]) : 1;
  out.len_kv = out.max_pages * out.page_size;
  return out;
}

// What every attention call sets: dense queries [batch, len_q, (3,) heads, dim] or packed ones
// [total_q, heads, dim].
template <typename Attrs>
AttentionParams attention(const In& q, const In& v, const In& o, const In& lse, const In& slopes,
                          const In& sinks, bool packed, const Attrs& attrs) {
  const auto dims = q.dimensions();
  AttentionParams p{};
  p.q = q.untyped_data();
  p.o = o.untyped_data();
  p.lse = reinterpret_cast<float*>(lse.untyped_data());
  p.heads_q = int(dims[dims.size() - 2]);
  p.head_dim = int(dims.back());
  p.head_dim_v = int(v.dimensions().back());
  p.q_head_stride = p.head_dim;
  p.q_token_stride = int64_t(p.heads_q) * p.head_dim;
  p.total_q = int(packed ? dims[0] : dims[0] * dims[1]);
  p.len_q = int(packed ? dims[0] : dims[1]);
  p.max_len_q = p.len_q;
  p.lse_head_stride = p.len_q;
  p.lse_row_stride = packed ? 0 : int64_t(p.heads_q) * p.len_q;
  p.alibi_slopes = optional<float>(slopes);
  p.sinks = optional<float>(sinks);
  p.scale = attrs.scale;
  p.softcap = attrs.softcap;
  p.window_left = attrs.window_left;
  p.window_right = attrs.window_right;
  p.exact = attrs.exact;
  p.dtype = dtype_of(q);
  return p;
}

void set_bias(AttentionParams& p, const In& bias) {
  if (absent(bias)) return;
  const auto d = bias.dimensions();
  p.bias = bias.untyped_data();
  p.bias_dtype = dtype_of(bias);
  p.bias_rows = int(d[0]);
  p.bias_key_stride = d[3] == 1 ? 0 : 1;
  p.bias_query_stride = d[2] == 1 ? 0 : d[3];
  p.bias_head_stride = d[1] == 1 ? 0 : d[2] * d[3];
  p.bias_row_stride = d[0] == 1 ? 0 : d[1] * d[2] * d[3];
}

template <typename Attrs>
void set_dropout(AttentionParams& p, const In& seeds, const Attrs& attrs) {
  if (attrs.dropout_rate == 0) return;
  p.seeds = optional<uint32_t>(seeds);
  p.dropout_limit = dropout_limit(attrs.dropout_rate);
  p.dropout_heads = attrs.dropout_heads;
  p.dropout_scale = float(1 / (1 - attrs.dropout_rate));
  p.dropout_kept = float(1 - attrs.dropout_rate);
}

ffi::Error to_error(cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_fa: ") + cudaGetErrorString(status));
}

AttentionParams dense(const In& q, const In& k, const In& v, const In& k_scale, const In& v_scale,
                      const In& slopes, const In& sinks, const In& bias, const In& q_lengths,
                      const In& kv_lengths, const In& seeds, const In& o, const In& lse,
                      const FwdAttrs& attrs) {
  AttentionParams p = attention(q, v, o, lse, slopes, sinks, /*packed=*/false, attrs);
  const int parts = attrs.layout == kQkvPacked ? 3 : attrs.layout == kKvPacked ? 2 : 1;
  p.batch = int(q.dimensions()[0]);
  if (attrs.layout == kQkvPacked) p.q_token_stride *= 3;
  p.q_length = optional<int>(q_lengths);
  p.k = dense_keys(k, k_scale, parts == 3 ? 1 : 0, parts);
  p.v = dense_keys(v, v_scale, parts - 1, parts);
  p.heads_kv = int(k.dimensions()[k.dimensions().size() - 2]);
  p.kv.length = optional<int>(kv_lengths);
  p.kv.layers = 1;
  p.kv.len_kv = int(k.dimensions()[1]);
  p.top_left = attrs.top_left;
  set_bias(p, bias);
  set_dropout(p, seeds, attrs);
  return p;
}

AttentionParams varlen(const In& q, const In& k, const In& v, const In& k_scale, const In& v_scale,
                       const In& slopes, const In& sinks, const In& seeds, const In& q_start,
                       const In& q_length, const In& k_start, const In& k_length, const In& o,
                       const In& lse, const VarlenAttrs& attrs) {
  AttentionParams p = attention(q, v, o, lse, slopes, sinks, /*packed=*/true, attrs);
  p.batch = int(q_start.dimensions()[0]);
  p.max_len_q = attrs.max_len_q;
  p.q_start = optional<int>(q_start);
  p.q_length = optional<int>(q_length);
  p.k = packed_keys(k, k_scale);
  p.v = packed_keys(v, v_scale);
  p.heads_kv = int(k.dimensions()[1]);
  p.kv.start = optional<int>(k_start);
  p.kv.length = optional<int>(k_length);
  p.kv.layers = 1;
  p.kv.len_kv = attrs.max_len_kv;
  p.top_left = attrs.top_left;
  set_dropout(p, seeds, attrs);
  return p;
}

ffi::Error fwd(cudaStream_t stream, In q, In k, In v, In k_scale, In v_scale, In slopes, In sinks,
               In bias, In q_lengths, In kv_lengths, In seeds, Out o, Out lse, Out next_tile,
               Out wide_k, Out wide_v, FwdAttrs attrs) {
  AttentionParams p = dense(q, k, v, k_scale, v_scale, slopes, sinks, bias, q_lengths, kv_lengths,
                            seeds, *o, *lse, attrs);
  p.next_tile = reinterpret_cast<int*>(next_tile->untyped_data());
  if (!absent(*wide_k)) {
    return to_error(run_copied(p, wide_k->untyped_data(), wide_v->untyped_data(), stream));
  }
  return to_error(run_attention(Operation::kPrefill, p, {}, stream));
}

ffi::Error varlen_fwd(cudaStream_t stream, In q, In k, In v, In k_scale, In v_scale, In slopes,
                      In sinks, In seeds, In q_start, In q_length, In k_start, In k_length, Out o,
                      Out lse, Out next_tile, VarlenAttrs attrs) {
  AttentionParams p = varlen(q, k, v, k_scale, v_scale, slopes, sinks, seeds, q_start, q_length,
                             k_start, k_length, *o, *lse, attrs);
  p.next_tile = reinterpret_cast<int*>(next_tile->untyped_data());
  return to_error(run_attention(Operation::kPrefill, p, {}, stream));
}

// What both backward calls set: gradients that lie as their operands do, apart from the batch rows
// of keys, which are those of the queries.
BackwardParams gradients(const AttentionParams& fwd, const In& dout, const In& dlse, Out& dq,
                         Out& dk, Out& dv, Out& dsinks, Out& rows, Out& dq_sum,
                         bool deterministic) {
  BackwardParams p{};
  p.fwd = fwd;
  p.dout = dout.untyped_data();
  p.dlse = optional<float>(dlse);
  p.dq = dq->untyped_data();
  p.dk = dk->untyped_data();
  p.dv = dv->untyped_data();
  p.dq_token_stride = fwd.q_token_stride;
  p.dk_token_stride = fwd.k.token_stride;
  p.dk_row_stride = fwd.k.row_stride;
  p.dv_token_stride = fwd.v.token_stride;
  p.dv_row_stride = fwd.v.row_stride;
  p.dsinks = const_cast<float*>(optional<float>(*dsinks));
  p.deterministic = deterministic;
  p.rows = reinterpret_cast<float2*>(rows->untyped_data());
  p.dq_sum = const_cast<float*>(optional<float>(*dq_sum));
  return p;
}

ffi::Error fwd_bwd(cudaStream_t stream, In q, In k, In v, In k_scale, In v_scale, In slopes,
                   In sinks, In bias, In q_lengths, In kv_lengths, In seeds, In o, In lse, In dout,
                   In dlse, Out dq, Out dk, Out dv, Out dsinks, Out dbias, Out rows, Out dq_sum,
                   FwdBwdAttrs attrs) {
  const AttentionParams fwd = dense(q, k, v, k_scale, v_scale, slopes, sinks, bias, q_lengths,
                                    kv_lengths, seeds, o, lse, attrs);
  BackwardParams p =
      gradients(fwd, dout, dlse, dq, dk, dv, dsinks, rows, dq_sum, attrs.deterministic);
  // Those that share a buffer follow one another in each of its tokens; only the first is a result.
  const int64_t part = int64_t(fwd.heads_kv) * fwd.head_dim * element_bytes(q);
  if (attrs.layout == kQkvPacked) p.dk = static_cast<char*>(p.dq) + part;
  if (attrs.layout != kSeparate) p.dv = static_cast<char*>(p.dk) + part;
  if (!absent(bias)) {
    const auto dims = bias.dimensions();
    p.dbias = dbias->untyped_data();
    p.dbias_heads = int(dims[1]);
    p.dbias_queries = int(dims[2]);
    p.dbias_keys = int(dims[3]);
  }
  return to_error(run_backward(p, stream));
}

ffi::Error varlen_bwd(cudaStream_t stream, In q, In k, In v, In k_scale, In v_scale, In slopes,
                      In sinks, In seeds, In q_start, In q_length, In k_start, In k_length, In o,
                      In lse, In dout, In dlse, Out dq, Out dk, Out dv, Out dsinks, Out rows,
                      Out dq_sum, VarlenBwdAttrs attrs) {
  const AttentionParams fwd = varlen(q, k, v, k_scale, v_scale, slopes, sinks, seeds, q_start,
                                     q_length, k_start, k_length, o, lse, attrs);
  BackwardParams p =
      gradients(fwd, dout, dlse, dq, dk, dv, dsinks, rows, dq_sum, attrs.deterministic);
  p.total_k = int(k.dimensions()[0]);
  return to_error(run_backward(p, stream));
}

template <typename Attrs>
void set_cache(AttentionParams& p, const In& k, const In& v, const In& k_scale, const In& v_scale,
               const In& kv_lengths, const In& rows, const In& page_table, const In& layer,
               const Attrs& attrs) {
  p.batch = int(kv_lengths.dimensions()[0]);
  p.k = dense_keys(k, k_scale, 0, 1);
  p.v = dense_keys(v, v_scale, 0, 1);
  p.k.rows = p.v.rows = attrs.layer_stride;
  p.heads_kv = int(k.dimensions()[2]);
  p.kv = cache_index(k, kv_lengths, rows, page_table, layer, attrs.layer_stride);
}

ffi::Error decode(cudaStream_t stream, In q, In k, In v, In k_scale, In v_scale, In slopes,
                  In sinks, In kv_lengths, In rows, In page_table, In layer, Out o, Out lse,
                  Out split_o, Out split_lse, DecodeAttrs attrs) {
  AttentionParams p = attention(q, v, *o, *lse, slopes, sinks, /*packed=*/false, attrs);
  set_cache(p, k, v, k_scale, v_scale, kv_lengths, rows, page_table, layer, attrs);
  const auto split_dims = split_lse->dimensions();
  SplitScratch scratch{};
  scratch.o = reinterpret_cast<float*>(split_o->untyped_data());
  scratch.lse = reinterpret_cast<float*>(split_lse->untyped_data());
  scratch.splits = split_dims.size() == 1 ? 1 : int(split_dims[0]);
  return to_error(run_attention(Operation::kDecode, p, scratch, stream));
}

ffi::Error hybrid(cudaStream_t stream, In q, In k, In v, In k_scale, In v_scale, In slopes,
                  In sinks, In q_start, In q_length, In kv_lengths, In rows, In page_table,
                  In layer, Out o, Out lse, Out next_tile, Out part_o, Out part_lse, Out part_rows,
                  HybridAttrs attrs) {
  AttentionParams p = attention(q, v, *o, *lse, slopes, sinks, /*packed=*/true, attrs);
  set_cache(p, k, v, k_scale, v_scale, kv_lengths, rows, page_table, layer, attrs);
  p.q_start = optional<int>(q_start);
  p.q_length = optional<int>(q_length);
  p.next_tile = reinterpret_cast<int*>(next_tile->untyped_data());
  SplitScratch scratch{};
  scratch.o = reinterpret_cast<float*>(part_o->untyped_data());
  scratch.lse = reinterpret_cast<float*>(part_lse->untyped_data());
  scratch.rows = reinterpret_cast<int2*>(part_rows->untyped_data());
  scratch.columns = int(part_lse->dimensions()[0]);
  scratch.part_keys = scratch_of_hybrid(p.batch, p.heads_q, p.heads_kv, p.head_dim, p.head_dim_v,
                                        p.kv.len_kv, attrs.split_size)
                          .part_keys;
  return to_error(run_attention(Operation::kHybrid, p, scratch, stream));
}

ffi::Error append(cudaStream_t stream, In, In, In, In, In k_new, In v_new, In new_start, In counts,
                  In lengths, In rows, In page_table, In layer, In cos, In sin, Out k, Out v,
                  Out k_scale, Out v_scale, AppendAttrs attrs) {
  const KvTensor k_cache = dense_keys(*k, *k_scale, 0, 1), v_cache = dense_keys(*v, *v_scale, 0, 1);
  const auto new_dims = k_new.dimensions();
  AppendParams p{};
  p.k_new = k_new.untyped_data();
  p.v_new = v_new.untyped_data();
  p.k = k->untyped_data();
  p.v = v->untyped_data();
  p.k_scale = const_cast<float*>(k_cache.scale);
  p.v_scale = const_cast<float*>(v_cache.scale);
  p.new_start = optional<int>(new_start);
  p.counts = optional<int>(counts);
  p.lengths = optional<int>(lengths);
  p.cos = optional<float>(cos);
  p.sin = optional<float>(sin);
  p.index = cache_index(*k, lengths, rows, page_table, layer, attrs.layer_stride);
  p.row_limit = attrs.row_limit;
  p.batch = int(lengths.dimensions()[0]);
  p.total_new = int(new_dims[0]);
  p.len_new = p.new_start ? p.total_new : p.total_new / p.batch;
  p.heads_kv = int(new_dims[1]);
  p.k_dim = int(new_dims[2]);
  p.v_dim = int(v_new.dimensions()[2]);
  if (p.cos) {
    p.max_position = int(cos.dimensions()[0]);
    p.rotary_dim = int(cos.dimensions()[1]) * 2;
  }
  p.capacity = p.index.len_kv;
  p.k_groups = k_cache.groups;
  p.v_groups = v_cache.groups;
  p.k_scale_row_stride = k_cache.scale_row_stride;
  p.k_scale_head_stride = k_cache.scale_head_stride;
  p.k_scale_token_stride = k_cache.scale_token_stride;
  p.v_scale_row_stride = v_cache.scale_row_stride;
  p.v_scale_head_stride = v_cache.scale_head_stride;
  p.v_scale_token_stride = v_cache.scale_token_stride;
  p.scale_given = attrs.scale_given;
  p.interleaved = attrs.interleaved;
  p.dtype = dtype_of(k_new);
  p.k_dtype = k_cache.dtype;
  p.v_dtype = v_cache.dtype;
  return to_error(launch_append(p, stream));
}

// Every handler launches the same kernels whenever its operands have the same shapes.
constexpr auto kTraits = {ffi::Traits::kCmdBufferCompatible};

// So many more operands and results. A binding cannot be moved, only extended.
template <int kOperands, int kResults, typename Binding>
auto with(Binding&& binding) {
  if constexpr (kOperands + kResults > 1) {
    constexpr bool kLastIsResult = kResults > 0;
    return with<kLastIsResult ? 0 : 1, kLastIsResult ? 1 : 0>(
        with<kOperands - !kLastIsResult, kResults - kLastIsResult>(std::move(binding)));
  } else if constexpr (kOperands == 1) {
    return std::move(binding).template Arg<In>();
  } else {
    return std::move(binding).template Ret<In>();
  }
}

auto on_stream() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

// q, k, v, k_scale, v_scale, slopes, sinks
auto attention_operands() { return with<7, 0>(on_stream()); }

// bias, q_lengths, kv_lengths, seeds
auto dense_operands() { return with<4, 0>(attention_operands()); }

// seeds, q_start, q_length, k_start, k_length
auto varlen_operands() { return with<5, 0>(attention_operands()); }

// o, lse, next_tile, wide_k, wide_v
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa_fwd, fwd, (with<0, 5>(dense_operands()).Attrs<FwdAttrs>()),
                              kTraits);

// o, lse, next_tile
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa_varlen_fwd, varlen_fwd,
                              (with<0, 3>(varlen_operands()).Attrs<VarlenAttrs>()), kTraits);

// o, lse, dout, dlse; dq, dk, dv, dsinks, dbias, rows, dq_sum
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa_fwd_bwd, fwd_bwd,
                              (with<4, 7>(dense_operands()).Attrs<FwdBwdAttrs>()), kTraits);

// o, lse, dout, dlse; dq, dk, dv, dsinks, rows, dq_sum
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa_varlen_bwd, varlen_bwd,
                              (with<4, 6>(varlen_operands()).Attrs<VarlenBwdAttrs>()), kTraits);

// kv_lengths, rows, page_table, layer; o, lse, split_o, split_lse
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa_decode, decode,
                              (with<4, 4>(attention_operands()).Attrs<DecodeAttrs>()), kTraits);

// q_start, q_length, kv_lengths, rows, page_table, layer; o, lse, next_tile, part_o, part_lse,
// part_rows
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa_hybrid, hybrid,
                              (with<6, 6>(attention_operands()).Attrs<HybridAttrs>()), kTraits);

// k, v, k_scale, v_scale (aliased by the results), k_new, v_new, new_start, counts, lengths, rows,
// page_table, layer, cos, sin; k, v, k_scale, v_scale
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa_append, append,
                              (with<14, 4>(on_stream()).Attrs<AppendAttrs>()), kTraits);

nb::dict to_dict(const Plan& plan) {
  nb::dict out;
  out["kernel"] = plan.kernel;
  out["tile"] = nb::make_tuple(plan.tile_q, plan.tile_kv, plan.tile_dim);
  out["warps"] = plan.warps;
  out["splits"] = plan.splits;
  out["blocks"] = plan.blocks;
  return out;
}

}  // namespace
}  // namespace jax_fa

NB_MODULE(_jax_fa, m) {
  using namespace jax_fa;
  m.attr("head_dims") = nb::make_tuple(JAX_FA_HEAD_DIMS);
  m.attr("taken_counts") = kTakenCounts;  // ints of scratch of any prefill call
  m.def("handlers", [] {
    nb::dict handlers;
    const auto add = [&](const char* name, auto* handler) {
      handlers[name] = nb::capsule(reinterpret_cast<void*>(handler));
    };
    add("jax_fa_fwd", jax_fa_fwd);
    add("jax_fa_varlen_fwd", jax_fa_varlen_fwd);
    add("jax_fa_fwd_bwd", jax_fa_fwd_bwd);
    add("jax_fa_varlen_bwd", jax_fa_varlen_bwd);
    add("jax_fa_decode", jax_fa_decode);
    add("jax_fa_hybrid", jax_fa_hybrid);
    add("jax_fa_append", jax_fa_append);
    return handlers;
  });
  m.def("decode_splits", &splits_of_decode, nb::arg("batch"), nb::arg("len_q"), nb::arg("heads_q"),
        nb::arg("heads_kv"), nb::arg("head_dim"), nb::arg("head_dim_v"), nb::arg("max_len_kv"),
        nb::arg("key_bytes") = 2, nb::arg("grouped") = false);
  m.def(
      "packed_scratch",
      [](int batch, int heads_q, int heads_kv, int head_dim, int head_dim_v, int64_t max_len_kv,
         int split_size) {
        const PackedScratch scratch = scratch_of_hybrid(batch, heads_q, heads_kv, head_dim,
                                                        head_dim_v, max_len_kv, split_size);
        return nb::make_tuple(scratch.columns, scratch.part_keys);
      },
      nb::arg("batch"), nb::arg("heads_q"), nb::arg("heads_kv"), nb::arg("head_dim"),
      nb::arg("head_dim_v"), nb::arg("max_len_kv"), nb::arg("split_size"));
  m.def("runs_hopper", &runs_hopper, nb::arg("capability"));
  // The largest head dim of kernels for queries of so many bytes an element.
  m.def("max_head_dim", &max_head_dim, nb::arg("element_bytes"), nb::arg("backward"));
  // Floats of scratch in which a backward call sums dq.
  m.def("dq_sum_size", &dq_sum_size, nb::arg("batch"), nb::arg("len_q"), nb::arg("total_q"),
        nb::arg("heads_q"), nb::arg("head_dim"), nb::arg("head_dim_v"), nb::arg("element_bytes"),
        nb::arg("deterministic"));
  // Whether Hopper multiplies fp8 keys of these head dims as they are stored.
  m.def("multiplies_bytes", &multiplies_bytes, nb::arg("head_dim"), nb::arg("head_dim_v"));
  // Of a prefill that copies keys and values of 8 bits: ints of scratch, tokens of a row's copy.
  m.def(
      "copy_scratch",
      [](int rows, int tokens, int heads_kv, int head_dim, int head_dim_v) {
        const CopyScratch scratch = copy_scratch(rows, tokens, heads_kv, head_dim, head_dim_v);
        return nb::make_tuple(scratch.ints, scratch.tokens);
      },
      nb::arg("rows"), nb::arg("tokens"), nb::arg("heads_kv"), nb::arg("head_dim"),
      nb::arg("head_dim_v"));
  // What kernels compute on the device, for tests on the host.
  m.def(
      "visible_keys",
      [](int query, int len_q, int len_kv, int window_left, int window_right, bool top_left) {
        const IntervalMask mask(len_q, len_kv, window_left, window_right, top_left);
        return nb::make_tuple(mask.lo(query), mask.hi(query));
      },
      nb::arg("query"), nb::arg("len_q"), nb::arg("len_kv"), nb::arg("window_left"),
      nb::arg("window_right"), nb::arg("top_left"));
  m.def(
      "seeing_queries",
      [](int key0, int key1, int len_q, int len_kv, int window_left, int window_right,
         bool top_left) {
        const IntervalMask mask(len_q, len_kv, window_left, window_right, top_left);
        const Interval seeing = mask.rows_seeing(key0, key1, len_q);
        return nb::make_tuple(seeing.lo, seeing.hi);
      },
      nb::arg("key0"), nb::arg("key1"), nb::arg("len_q"), nb::arg("len_kv"), nb::arg("window_left"),
      nb::arg("window_right"), nb::arg("top_left"));
  m.def(
      "parts_of_row",
      [](int steps, int part_steps) {
        nb::list out;
        const int parts = parts_of(steps, part_steps);
        for (int i = 0; i <= parts; ++i) out.append(part_begin(steps, i, parts));
        return out;
      },
      nb::arg("steps"), nb::arg("part_steps"));
  m.def(
      "philox",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        uint4 x[1] = {{counter[0], counter[1], counter[2], counter[3]}};
        philox(x, uint2{key[0], key[1]});
        return std::array{x[0].x, x[0].y, x[0].z, x[0].w};
      },
      nb::arg("counter"), nb::arg("key"));
  m.def("prefill_share", &prefill_share, nb::arg("sms"), nb::arg("tiles"), nb::arg("prefill"),
        nb::arg("decode"));
  m.def("part_candidate", &part_candidate, nb::arg("i"));
  m.def("decode_max_len_q", &decode_max_len_q, nb::arg("heads_group"));
  m.def(
      "hopper_place",
      [](int i, int tiles, int pairs, int section, bool longest_first) {
        const HopperOrder order{tiles, pairs, section, tiles * pairs, longest_first};
        const HopperOrder::Place place = order(i);
        return nb::make_tuple(place.pair, place.tile);
      },
      nb::arg("i"), nb::arg("tiles"), nb::arg("pairs"), nb::arg("section"),
      nb::arg("longest_first"));
  m.def(
      "classify_tile",
      [](int query0, int query1, int key0, int key1, int len_q, int len_kv, int window_left,
         int window_right) {
        constexpr const char* kNames[] = {"skip", "partial", "full"};
        const IntervalMask mask(len_q, len_kv, window_left, window_right);
        return kNames[static_cast<int>(mask.classify(query0, query1, key0, key1))];
      },
      nb::arg("query0"), nb::arg("query1"), nb::arg("key0"), nb::arg("key1"), nb::arg("len_q"),
      nb::arg("len_kv"), nb::arg("window_left"), nb::arg("window_right"));
  m.def(
      "plan",
      [](const std::string& operation, int batch, int len_q, int total_q, int max_len_kv,
         int heads_q, int heads_kv, int head_dim, int head_dim_v, int element_bytes, int kv_bytes,
         bool general, bool bias, bool masked, double dropout_rate, bool grouped, bool fp8_keys,
         bool copied, int page_size, int capability, int sms, bool exact, int shared_kb) {
        return to_dict(plan_of(operation, batch, len_q, total_q, max_len_kv, heads_q, heads_kv,
                               head_dim, head_dim_v, element_bytes, kv_bytes,
                               {general, bias, masked, dropout_rate, grouped, fp8_keys, copied,
                                page_size, capability, sms, exact, shared_kb}));
      },
      nb::arg("operation"), nb::kw_only(), nb::arg("batch"), nb::arg("len_q"), nb::arg("total_q"),
      nb::arg("max_len_kv"), nb::arg("heads_q"), nb::arg("heads_kv"), nb::arg("head_dim"),
      nb::arg("head_dim_v"), nb::arg("element_bytes"), nb::arg("kv_bytes"), nb::arg("general"),
      nb::arg("bias"), nb::arg("masked"), nb::arg("dropout_rate"), nb::arg("grouped"),
      nb::arg("fp8_keys"), nb::arg("copied"), nb::arg("page_size"), nb::arg("capability"),
      nb::arg("sms"), nb::arg("exact"), nb::arg("shared_kb"));
  m.def(
      "plan_backward",
      [](int batch, int len_q, int total_q, int len_kv, int heads_q, int heads_kv, int head_dim,
         int head_dim_v, int element_bytes, bool deterministic, bool general, bool bias,
         bool masked, double dropout_rate, int capability, int sms, bool exact, int shared_kb) {
        return to_dict(plan_of_backward(batch, len_q, total_q, len_kv, heads_q, heads_kv, head_dim,
                                        head_dim_v, element_bytes, deterministic,
                                        {general, bias, masked, dropout_rate, false, false, false,
                                         0, capability, sms, exact, shared_kb}));
      },
      nb::kw_only(), nb::arg("batch"), nb::arg("len_q"), nb::arg("total_q"), nb::arg("len_kv"),
      nb::arg("heads_q"), nb::arg("heads_kv"), nb::arg("head_dim"), nb::arg("head_dim_v"),
      nb::arg("element_bytes"), nb::arg("deterministic"), nb::arg("general"), nb::arg("bias"),
      nb::arg("masked"), nb::arg("dropout_rate"), nb::arg("capability"), nb::arg("sms"),
      nb::arg("exact"), nb::arg("shared_kb"));
}
