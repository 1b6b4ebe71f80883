// What the warps of a block of the Hopper forward kernel share.
#pragma once

#include <type_traits>

#include "../cache/copied.h"
#include "../kv.cuh"
#include "../mask.cuh"
#include "../score.cuh"
#include "../sm80/mma.cuh"
#include "../sm80/schedule.cuh"
#include "ptx.cuh"
#include "tiles.h"

namespace jax_fa {

template <int kHeadDim_, int kHeadDimV_, DType kDType_, FwdClass kClass_>
struct HopperTraits {
  static constexpr int kHeadDim = kHeadDim_;    // of queries and keys
  static constexpr int kHeadDimV = kHeadDimV_;  // of values and output
  static constexpr DType kDType = kDType_;
  static constexpr FwdClass kClass = kClass_;
  using Element = typename Mma<kDType>::Element;

  static constexpr HopperTile kTile = fwd_sm90_tile(kHeadDim, kHeadDimV, kClass);
  static constexpr int kBlockM = kTile.m;
  static constexpr int kBlockN = kTile.n;
  static constexpr int kStages = kTile.stages;
  static constexpr int kConsumers = kBlockM / 64;
  // Of queries, each with barriers of its own: without a second buffer, the place of a warpgroup's
  // is free, and filled again, before the next one's. H200, head_dim 256, B * T = 16384, N = 8: 3 %
  // faster at T = 512, 1 % at 1k causal, none from 2k on.
  static constexpr int kQueryParts = kTile.q_buffers > 1 ? 1 : kConsumers;
  static constexpr bool kQuantized = fwd_sm90_quantized(kClass);
  static constexpr bool kBytes = kClass == FwdClass::kBytes;
  static constexpr bool kCopies = kClass == FwdClass::kCopies;
  // Of probabilities and values: 8 bits become float16 at once.
  static constexpr DType kPvType = kBytes ? DType::kF16 : kDType;
  static constexpr int kDequantizers = kTile.dequantizers;
  static constexpr int kOthers =  // warpgroups before those of consumers
      1 + (kCopies ? 1 : kDequantizers);
  static constexpr int kThreads = 128 * (kConsumers + kOthers);
  static constexpr bool kMasked = kClass != FwdClass::kFull;
  static constexpr bool kDropout = kClass == FwdClass::kDropout;
  static constexpr bool kGeneral =
      kClass == FwdClass::kGeneral || kClass == FwdClass::kQuantizedGeneral || kDropout;
  // Whether a tile of keys can be past all that one warpgroup's queries see, and not another's.
  static constexpr bool kSkips = kBlockM > kBlockN;

  static constexpr int kPanel = kHeadDim % 64 == 0 ? 64 : 32;  // elements: see wgmma.cuh
  static constexpr int kPanels = kHeadDim / kPanel, kPanelsV = kHeadDimV / kPanel;
  // Whether boxes of keys may have all panels: general scores of wide heads have no register left,
  // and dropout and copies meet no pages.
  static constexpr bool kInGroups =
      !kQuantized && !kDropout && !kCopies && kPanels > 1 && !(kGeneral && kHeadDim > 192);
  static_assert(kHeadDimV % kPanel == 0 && kHeadDimV <= kHeadDim);  // the output's place: queries'

  // Products of p and v side by side: a launch of 512 threads has no register target for all 256.
  static constexpr int kOutputParts = (kQuantized || kCopies) && kHeadDimV > 192 ? 2 : 1;

  // All that an SM has, 64 K: consumers hold s, p and o.
  static constexpr int kProducerRegisters = kBytes || (kCopies && kHeadDim <= 192) ? 48  // copiers'
                                            : kConsumers == 2                      ? 40
                                                                                   : 32;
  static constexpr int kDequantizerRegisters = kBytes || kDequantizers == 2 ? 48 : 56;
  static constexpr int kConsumerRegisters = kDequantizers == 2 ? 168
                                            : kQuantized       ? 208
                                            : kCopies          ? (kHeadDim > 192 ? 216 : 208)
                                            : kConsumers == 2  ? 232
                                                               : 160;
  // Whether the maximum of a row is not looked for once there is one.
  static constexpr bool kFollowsMax = !(kGeneral && kHeadDim > 128);

  // Of probabilities, see OnlineSoftmax: float16 holds less than 2^16. H200, head_dim 128: checking
  // that costs up to 2 %, and doing tiles again instead, where logits have a deviation of 2.5 to 4,
  // 15 to 77 %.
  static constexpr bool kShrinks = kPvType == DType::kF16;
  static constexpr int kSlackLog2 = 63, kLimitLog2 = 15;

  // Whether scores become probabilities while p V still runs: for that registers have to suffice,
  // more of them where scores are changed before.
  static constexpr int kSpareRegisters = kConsumerRegisters - kBlockN * 3 / 4 - kHeadDimV / 2;
  static constexpr bool kSoftmaxUnderPv =
      kSpareRegisters >= (kGeneral ? 72 : 32) && kHeadDimV <= 128;
};

// Where a key's scale lies among those of a tile: a lane of a product has keys 2 l, 2 l + 1 of
// every 8, and reads those of 16 at once.
__device__ constexpr int scale_place(int key) {
  return key / 16 * 16 + key % 8 / 2 * 4 + key / 8 % 2 * 2 + key % 2;
}

// 2^e, as far as there are normal floats.
__device__ inline float power_of_two(int e) {
  return __int_as_float((min(max(e, -126), 127) + 127) << 23);
}

// What producers tell consumers of a tile.
struct WorkTile {
  QueryTile q = {};  // q.rows 0: there are no more
  IntervalMask mask = {0, 0, 0, 0};
  int begin = 0, end = 0;  // tiles of keys that some query sees: at least one
  bool exact = false;      // the softmax looks for the maximum of every tile of keys
  // Where its keys lie: head, rows and the first token, of paged keys the layer's first pages.
  int head_kv = 0, k_row = 0, v_row = 0, start = 0;
  float slope = 0.f;  // of ALiBi, in the unit of scores
};

// Where a key of the tile's row lies, its row or first page being `row`.
__device__ inline KvSlot kv_slot(const KvIndex& kv, const WorkTile& tile, int row, int key) {
  if (!kv.page_table) return {row, int64_t(tile.start) + key};
  const int* const pages = kv.page_table + int64_t(tile.q.b) * kv.max_pages;
  return {int64_t(row) + pages[key / kv.page_size], key % kv.page_size};
}

// A unit of copying (cache/copied.h) that a warp has taken.
struct alignas(16) CopyUnit {
  uint4* gWide;              // where its copy begins
  int byte_step, wide_step;  // from a token to the next, in shared memory and of gWide
  int lanes;                 // that have elements of it
  int tokens;                // of the row from its first one on
  DType format;
  int index;
  int row, head0, token0;
  bool values;
  const float* gScale[32];  // of each lane's first scale, or null: it has none; no register is left
};

// Of a warp that copies keys and values from 8 bits.
struct CopyStorage {
  static constexpr int kTokens = kCopiedTokens;  // of a step
  static constexpr int kStages = 2;

  alignas(128) uint8_t bytes[kStages][kTokens * CopyUnits::kDims];
  alignas(16) float scale[kStages][CopyUnits::kScales + 1][kTokens];  // the last row: ones
  CopyUnit unit[2];
  // Which row of scales a lane's elements have, of keys and of values.
  int scale_row[2][32];
  // Of the 32 rows from row0 on, whose units come now: the first chunk that is read, and how many
  // units come until the row's last; until the last row's.
  int row_chunk[32], row_end[32];
  int row0, end;
  ptx::Barrier full[kStages];

  __device__ void init_barriers() {
    for (ptx::Barrier& barrier : full) ptx::barrier_init(barrier, 1);
  }
};

template <class Traits>
struct HopperStorage {
  using Element = typename Traits::Element;
  template <int kPanels, int kRows>
  using Tile = Element[kPanels][kRows][Traits::kPanel];
  using Queries = Tile<Traits::kPanels, Traits::kBlockM>;
  using Keys = std::conditional_t<Traits::kBytes, uint8_t[1][Traits::kBlockN][Traits::kHeadDim],
                                  Tile<Traits::kPanels, Traits::kBlockN>>;
  using Values = Tile<Traits::kPanelsV, Traits::kBlockN>;
  static constexpr bool kStagesOutput = Traits::kTile.q_buffers > 1;
  static constexpr int kTiles = 4;  // more than products, copies and epilogue can be apart
  // Of tiles that are taken in no fixed turn, under a mask and without one: others could run what a
  // block takes early, but where they are short their copies start late. H200, bf16, B * T = 65536,
  // time of three over that of two, head_dim 64, 128, 256: causal, T = 2k 1.00, 1.00, 1.03; full,
  // T = 128 0.91, 1.00, 0.98.
  static constexpr int kMaskedTilesTaken = 2, kTilesTaken = 3;

  alignas(1024) Queries q[Traits::kTile.q_buffers];
  alignas(1024) Keys k[Traits::kStages];
  alignas(1024) Values v[Traits::kStages];
  // Of quantized keys and values, which take turns, with the scales of their rows; kBytes: of
  // values alone.
  static constexpr int kByteStages = Traits::kTile.byte_stages;
  alignas(128) uint8_t bytes[kByteStages][Traits::kBlockN][Traits::kHeadDim];
  uint32_t scale[kByteStages][Traits::kBlockN];  // as Widen prepares them
  // kBytes: scales of keys, where scale_place says; log2 of the unit of values, of bytes and wide.
  static constexpr int kByteKeyStages = Traits::kBytes ? Traits::kStages : 0;
  alignas(16) float k_scale[kByteKeyStages][Traits::kBlockN];
  int byte_unit[kByteStages], v_unit[kByteKeyStages];
  alignas(16) char tiles[kTiles][sizeof(WorkTile)];
  bool outgrown[kTiles];  // a score has outgrown the maximum that was not looked for
  // Of warp 0 of the producers: tiles of a pair, blocks that take tiles, whether in a fixed turn.
  int pair_tiles, blocks;
  bool in_turn;
  ptx::Barrier tile_full[kTiles], tile_empty[kTiles];
  ptx::Barrier tile_judged[kTiles];  // consumers to warp 0: whether it has outgrown is known
  ptx::Barrier q_full[Traits::kTile.q_buffers][Traits::kQueryParts];
  ptx::Barrier q_empty[Traits::kTile.q_buffers][Traits::kQueryParts];
  ptx::Barrier k_full[Traits::kStages], k_empty[Traits::kStages];
  ptx::Barrier v_full[Traits::kStages], v_empty[Traits::kStages];
  ptx::Barrier v_uncleared[Traits::kStages];  // warp 3 to warp 2: landed, with values to clear
  ptx::Barrier bytes_full[kByteStages], bytes_empty[kByteStages];
  CopyStorage copies[Traits::kCopies ? 4 : 0];

  __device__ WorkTile& tile(int i) { return reinterpret_cast<WorkTile&>(tiles[i]); }

  __device__ void init_barriers() {
    constexpr int kConsumerWarps = Traits::kConsumers * 4;
    constexpr int kDequantizerWarps = Traits::kQuantized ? 4 : 0;
    constexpr int kFillers = Traits::kQuantized ? kDequantizerWarps : 1;  // of a tile of keys
    for (int i = 0; i < kTiles; ++i) {
      ptx::barrier_init(tile_full[i], 1);
      // and warps 1 to 3 of the producers
      ptx::barrier_init(tile_empty[i], kConsumerWarps + 3 + 4 * Traits::kDequantizers);
      ptx::barrier_init(tile_judged[i], kConsumerWarps);
      outgrown[i] = false;
    }
    for (int i = 0; i < Traits::kTile.q_buffers; ++i) {
      for (int part = 0; part < Traits::kQueryParts; ++part) {
        ptx::barrier_init(q_full[i][part], 1);
        ptx::barrier_init(q_empty[i][part], kConsumerWarps / Traits::kQueryParts);
      }
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::barrier_init(k_full[i], Traits::kBytes ? 2 : kFillers);  // warp 1, and 2 with scales
      ptx::barrier_init(v_full[i], kFillers);
      ptx::barrier_init(v_uncleared[i], 1);
      ptx::barrier_init(k_empty[i], kConsumerWarps);
      ptx::barrier_init(v_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kByteStages; ++i) {
      ptx::barrier_init(bytes_full[i], 2);  // warp 1, and the one that stages their scales
      ptx::barrier_init(bytes_empty[i], kDequantizerWarps);
    }
    for (CopyStorage& copier : copies) copier.init_barriers();
    ptx::fence_barrier_init();
  }
};

// A position in a ring of kSize buffers, and the parity of the round.
template <int kSize>
struct Ring {
  static_assert((kSize & (kSize - 1)) == 0, "cheap remainders");
  unsigned count = 0;

  __device__ int at() const { return count % kSize; }
  __device__ int parity() const { return count / kSize & 1; }
  __device__ void advance() { ++count; }
};

// What the rows of a hybrid batch cost, in any unit of time: a pair of a query and a key that it
// sees, and a tile, of rows of this launch; a key of the others.
struct HybridCosts {
  float pair, tile, key;
};

// Tiles of keys or values lie in shared memory panel by panel, or, where one box brings all panels
// of its rows, in groups of eight rows. Bytes from a panel, and from eight rows, to the next.
//
// H200, bf16, 4 x 2048 queries on 8192 keys, causal, 32 heads over 8 of 128 (16 over 8 of 256),
// speed against contiguous keys with pages of 8, 16, 64: 0.93, 0.96, 0.97 (0.98, 0.98, 0.98); with
// boxes of one panel 0.52, 0.78, 0.96 (0.51, 0.78, 0.77), all started by one warp.
struct PanelStrides {
  uint32_t panel, group;

  template <class Traits>
  __host__ __device__ static constexpr PanelStrides of(bool in_groups, int panels) {
    constexpr uint32_t kGroup = 8 * Traits::kPanel * 2;
    if (in_groups) return {kGroup, panels * kGroup};
    return {Traits::kBlockN * Traits::kPanel * 2, kGroup};
  }
};

struct HopperParams {
  AttentionParams attention;
  CUtensorMap q, k, v, o;  // k and v in boxes of box_tokens tokens, o of 16
  HopperOrder order;       // of packed queries before their tiles are counted: at most so many
  HybridCosts costs;
  ScoreUnits units;
  int box_tokens;
  bool in_groups;  // whether boxes of k and v have all panels
  PanelStrides k_strides, v_strides;
  CopiedCache copied;              // kCopies
  CUtensorMap narrow_k, narrow_v;  // of that, in boxes of a step's tokens
  int* next_tile;  // tiles beyond the first of each block that have been taken; null: in fixed turn
};

// Values at or past a row's length may hold anything, and 0 times it must be 0. Bulk copies clear
// what lies past the end of the array, not what lies past the end of a row or in the rest of a
// page.
template <class Traits>
__device__ bool must_clear(const AttentionParams& p, const WorkTile& tile) {
  const bool ends_array = !p.kv.page_table && tile.start + tile.mask.len_kv == p.v.tokens;
  return tile.end * Traits::kBlockN > tile.mask.len_kv && !ends_array;
}

}  // namespace jax_fa
