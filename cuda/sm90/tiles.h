// Tiles and order of work of the Hopper forward kernel. Plain C++: the kernel is built from it and
// the planner explains it.
#pragma once

#include <numeric>

#include "../sm80/tiles.h"

namespace jax_fa {

// What an instance of the kernel can do: every key up to a row's length, any interval of keys, that
// and any score, the last two over keys and values of 8 bits, or any score and dropout. kBytes is
// kQuantized where products take keys as they are stored, kCopies is kMasked over copies of 8-bit
// keys and values that are made meanwhile.
enum class FwdClass {
  kFull,
  kMasked,
  kGeneral,
  kQuantized,
  kQuantizedGeneral,
  kDropout,
  kBytes,
  kCopies
};

constexpr bool fwd_sm90_quantized(FwdClass kind) {
  return kind == FwdClass::kQuantized || kind == FwdClass::kQuantizedGeneral ||
         kind == FwdClass::kBytes;
}

struct HopperTile {
  int m, n;              // queries (64 for each warpgroup of consumers) and keys of a tile
  int stages;            // buffers of keys, and of values
  int q_buffers;         // of queries: with two, those of the next tile load while this one runs
  int byte_stages = 0;   // of quantized keys and values as they are stored
  int dequantizers = 0;  // warpgroups that widen them
};

// Registers are what limits them: s, p and o of a warpgroup take n / 2 + n / 4 + head_dim_v / 2 of
// a thread's 232 (two warpgroups of consumers) or 160 (three). Shared memory holds two buffers each
// of keys and values, and two of queries where that leaves keys their width.
//
// H200, bf16, B * T = 16384, N * H = 2048, TFLOP/s at T = 512, 2k, 16k and how other tiles do
// against them, while each tile of keys was searched for maxima. head_dim 64: 363, 481, 559; two
// warpgroups 0.98, 0.88, 0.82; n = 96 0.91, 0.99, 1.01. head_dim 128: 544 (rows do not fill n =
// 160), 708, 775; n = 128 1.00, 0.98, 0.96; n = 160 with one buffer of queries 0.95, 0.94, 0.93;
// causal 338, 594, 734; n = 160 0.85, 0.94, 0.99. head_dim 256: 532, 756, 836; n = 64 0.96, 0.86,
// 0.75. As they are now, at head_dim 128: 534, 753, 817; n = 128 1.00, 0.99, 0.98; three warpgroups
// with n = 80 0.94, 0.99, 0.99; causal 345, 640, 810; n = 160 0.85, 0.93, 0.98; the three 0.99,
// 0.98, 1.02; head_dim 256 at T = 512, 2k, 8k: 567 (rows do not fill n = 80), 770, 824; n = 64
// 1.02, 1.01, 1.00; causal 344, 622, 772; n = 64 1.01, 1.02, 1.00. head_dim 192 with values of 128,
// N = 16, at 1k, 4k, 16k: 564, 716, 747; on the tile of 192 values 0.88, 0.92, 0.95; n = 112 0.93,
// 0.97, 1.00; n = 96 with two buffers of queries 0.98, 1.00, 0.98; three warpgroups with n = 80
// 0.91, 1.00, 1.07; causal 367, 603, 711; the tile of 192 values 0.91, 0.89, 0.89; the other three
// 0.96 to 1.01. Its general scores spill with n = 112.
//
// Of 8-bit keys the limit is shared memory, which their elements pass three times beside what
// products read, and then the dequantizers' instructions: two warpgroups of them, where tiles of
// keys that leave them the registers are not too narrow. H200, head_dim 128, e4m3 without scales,
// 512 queries over 8704 keys, B = 8, 32 heads over 8, time against 16-bit keys: bfloat16 queries
// 1.29, float16 ones 1.16; of these, dequantizers that only signal 1.03, that only load 1.13, that
// load and store without arithmetic 1.22; with one warpgroup of them and n = 128: 1.20, 1.05, 1.05
// and 1.19.
//
// Keys of fp8 that products take as they are (kBytes) leave dequantizers the values, as halves:
// the same without scales 1.09 (1.29 on the tile of kQuantized), with those of rows 1.31 (1.48).
// One buffer of queries and four of bytes: 1.10 and 1.32. What is left is a warpgroup's own chain
// from scores to probabilities, at whose side dequantizers issue: products of two parts of 8 bits
// take no longer than those of 16. (All of these while tiles of keys were searched for maxima. Not
// to, over 2 rows of 8192 keys of 4 heads, takes 0.89 of e4m3's time without scales, 0.92 with
// those of rows, 0.94 of e5m2's and int8's.)
constexpr HopperTile fwd_sm90_tile(int head_dim_tile, int head_dim_v_tile, FwdClass kind) {
  if (kind == FwdClass::kBytes) return {128, 128, 2, 2, 2, 1};
  if (fwd_sm90_quantized(kind)) {
    if (head_dim_tile <= 96) return {128, 128, 2, 2, 4, head_dim_tile <= 64 ? 2 : 1};
    if (head_dim_tile <= 128) return {128, 96, 2, 2, 4, 2};
    return {128, 64, 2, 1, head_dim_tile <= 192 ? 4 : 2, 1};
  }
  const bool full = kind == FwdClass::kFull;
  const bool general = kind == FwdClass::kGeneral || kind == FwdClass::kDropout;
  if (head_dim_tile <= 64) return {192, 128, 2, 2};
  if (head_dim_tile <= 96) return {128, 128, 2, 2};
  if (head_dim_tile <= 128) return {128, full ? 160 : 128, 2, 2};
  if (kind == FwdClass::kDropout) return {128, 64, 2, 1};  // it is drawn for 64 keys at a time
  if (head_dim_v_tile <= 128) return {128, general ? 96 : 128, 2, 1};
  if (head_dim_tile <= 192) return {128, full ? 112 : 96, 2, 1};
  return {128, full ? 80 : 64, 2, 1};
}

// The order of tiles. Pairs of a batch row and a head (heads, where queries are packed) go section
// by section, a section being as many as fit L2 with their keys and values. Within a section the
// last query tiles of all pairs come first where masks make them the longest; else pair by pair.
struct HopperOrder {
  int tiles;  // of a pair
  int pairs;
  int section;  // pairs of a section
  int total;    // tiles of all pairs
  bool longest_first;

  struct Place {
    int pair, tile;
  };

  __host__ __device__ Place operator()(int i) const {
    if (!longest_first) return {i / tiles, i % tiles};
    const int first = i / (section * tiles) * section;
    const int size = pairs - first < section ? pairs - first : section;
    const int rest = i - first * tiles;
    return {first + rest % size, tiles - 1 - rest / size};
  }
};

// A prefill launch of `tiles` on `share` of the multiprocessors beside a decode launch that has the
// others, and those too when it is done: when both have ended. `prefill` and `decode` are the times
// that each would take on all of them; half of them read as fast as all.
__host__ __device__ constexpr float hybrid_time(int sms, int tiles, float prefill, float decode,
                                                int share) {
  const float prefill_end = (tiles + share - 1) / share * (prefill * sms / tiles);
  const float rate = 2.f * (sms - share) / sms;
  const float rest = decode - (rate < 1 ? rate : 1) * prefill_end;
  return prefill_end + (rest > 0 ? rest : 0);
}

// A share that makes it shortest, each multiprocessor of which runs as many tiles, rounded to
// either side. A short prefill has a third of them: more slow the decode down, and on fewer the
// last tiles, which wait for memory longer than alone, may end late. H200, 128 rows of 8192 keys
// beside 2048 queries on 4096 keys, of 32 heads over 8: on 32, 44, 56, 66 and 88 multiprocessors
// 1314, 1100, 1085, 1122 and 1151 us.
__host__ __device__ constexpr int prefill_share(int sms, int tiles, float prefill, float decode) {
  if (tiles == 0) return 0;
  if (decode <= 0) return sms;
  const float even = prefill <= decode / 3   ? 0.35f
                     : prefill <= decode / 2 ? 0.5f
                                             : 2 * prefill / (2 * prefill + decode);
  const int rounds = int(tiles / (even * sms));
  int best = sms;
  for (int i = rounds < 1 ? 1 : rounds; i <= rounds + 1; ++i) {
    const int share = (tiles + i - 1) / i;
    if (share < sms && hybrid_time(sms, tiles, prefill, decode, share) <
                           hybrid_time(sms, tiles, prefill, decode, best)) {
      best = share;
    }
  }
  return best;
}

// Whether queries of a row see unequal numbers of keys.
inline bool fwd_sm90_windowed(const AttentionParams& p) {
  return p.window_left >= 0 || p.window_right >= 0;
}

// Whether scores are more than products with a positive scale.
inline bool fwd_sm90_general(const AttentionParams& p) {
  return p.scale <= 0 || p.softcap != 0 || p.alibi_slopes;
}

// Values of up to 128 dims beside keys of up to 192, as in multi-head latent attention, have a tile
// of their own: half of the output's registers go to wider tiles of keys.
constexpr int kFwdDimOfNarrowValues = 192, kFwdNarrowValues = 128;

// The tile of values and output beside that of queries and keys.
inline int fwd_sm90_dim_v(const AttentionParams& p, int head_dim_tile) {
  const bool narrow = head_dim_tile == kFwdDimOfNarrowValues && p.head_dim_v <= kFwdNarrowValues;
  return narrow && !fwd_sm80_quantized(p) ? kFwdNarrowValues : head_dim_tile;
}

// Whether products take keys as they are, at the one width that this is compiled for. Queries
// become sums of two numbers of e4m3, which hold the digits of bfloat16. Scales must be those of
// whole rows, and values times them halves.
constexpr int kFwdDimOfBytes = 128;

inline bool fwd_sm90_multiplies_bytes(const AttentionParams& p, int head_dim_tile) {
  return head_dim_tile == kFwdDimOfBytes && p.dtype == DType::kBF16 &&
         (p.k.dtype == DType::kE4M3 || p.k.dtype == DType::kE5M2) && p.k.groups <= 1 &&
         p.v.groups <= 1;
}

inline FwdClass fwd_sm90_class(const AttentionParams& p, int head_dim_tile, int head_dim_v_tile) {
  const bool general = fwd_sm90_general(p);
  if (p.seeds) return FwdClass::kDropout;
  if (fwd_sm80_quantized(p)) {
    if (general) return FwdClass::kQuantizedGeneral;
    return fwd_sm90_multiplies_bytes(p, head_dim_tile) ? FwdClass::kBytes : FwdClass::kQuantized;
  }
  if (general) return FwdClass::kGeneral;
  if (fwd_sm90_windowed(p)) return FwdClass::kMasked;
  // Wide tiles of keys are the better ones where rows come near to filling them.
  const auto padded = [&](FwdClass kind) {
    const int n = fwd_sm90_tile(head_dim_tile, head_dim_v_tile, kind).n;
    return (int64_t(p.kv.len_kv) + n - 1) / n * n;
  };
  const bool fills = padded(FwdClass::kFull) * 25 <= padded(FwdClass::kMasked) * 26;
  return fills ? FwdClass::kFull : FwdClass::kMasked;
}

// Whether bulk copies can bring keys or values of 8 bits, and 16 adjacent elements share a scale.
inline bool fwd_sm90_widens(const KvTensor& x, int dim) {
  return element_size(x.dtype) == 1 && dim % 16 == 0 && dim / std::max(x.groups, 1) % 16 == 0;
}

// Whether there is an instance that copies keys and values from 8 bits meanwhile: three warpgroups
// of consumers, and scores beyond a scale, leave its warps no registers, and the tile of narrow
// values no shared memory.
constexpr bool fwd_sm90_has_copies(int head_dim_tile, int head_dim_v_tile) {
  return head_dim_tile == head_dim_v_tile && head_dim_tile > 64;
}

// Whether it can run a call, whose keys and values are the copies.
inline bool fwd_sm90_copies(const AttentionParams& p, int head_dim_tile, int head_dim_v_tile) {
  return fwd_sm90_has_copies(head_dim_tile, head_dim_v_tile) && !fwd_sm90_general(p) && !p.seeds;
}

// What is drawn is compared as float16, where infinity is the last that a limit can be. Rates past
// 0.96875 are left to the portable kernels.
inline bool sm90_covers_rate(const AttentionParams& p) { return p.dropout_limit <= 0x7c00; }

// Whether the kernel can run a call.
inline bool fwd_sm90_covers(const AttentionParams& p, int head_dim_tile) {
  if (p.dtype == DType::kF32 || p.bias || head_dim_tile > kMostHeadDim) return false;
  if (p.seeds && !sm90_covers_rate(p)) return false;
  if (fwd_sm80_quantized(p) &&
      !(fwd_sm90_widens(p.k, p.head_dim) && fwd_sm90_widens(p.v, p.head_dim_v))) {
    return false;
  }
  return !p.kv.page_table || p.kv.page_size % 8 == 0;
}

// Tokens of a box of keys, as one bulk copy brings it: of paged keys those within one page.
inline int fwd_sm90_box(const AttentionParams& p, int tile_n) {
  return p.kv.page_table ? std::gcd(p.kv.page_size, tile_n) : tile_n;
}

// Whether a box of keys has whole heads: of pages, several panels of one, which it could not fill
// up with zeros where a head ends within one. Pages of a pool follow each other.
inline bool fwd_sm90_in_groups(const AttentionParams& p, int panel) {
  const auto whole = [&](const KvTensor& x, int dim) {
    return dim % panel == 0 && x.row_stride == x.tokens * x.token_stride;
  };
  return p.kv.page_table && whole(p.k, p.head_dim) && whole(p.v, p.head_dim_v);
}

// With fewer tiles of a row, their differences even out among the many that each block runs.
constexpr int kTilesWorthTaking = 8;

// Nor do packed rows differ much over so few keys.
constexpr int kAlikeKeys = 512;

// Whether blocks take the next tile when they are ready for it, not in fixed turn.
//
// Masks make tiles differ, which evens out unless a turn of all blocks spans several lengths of a
// section's tiles: then a block can meet the same ones again and again. Without a mask that goes
// for the last tiles of rows that do not fill them: H200, bf16, tiles of 192 queries of head_dim
// 64, B * T = 16384, T = 256, 512, 1k, 4k: 1.16, 1.07, 1.08, 1.03 times as fast as in turn, with up
// to six turns 1.00. Rows of one tile wait for memory, which is faster where blocks are abreast of
// each other: head_dim 128, 128 keys, 16 and 62 turns 1.02 and 1.04 (256: 0.99 and 1.02).
inline bool worth_taking(const AttentionParams& p, const HopperOrder& order, int tile_m,
                         int64_t blocks) {
  if (p.q_start) return p.kv.len_kv > kAlikeKeys;
  const int64_t turns = order.total / blocks;
  if (order.tiles == 1) return turns >= 12;
  if (!order.longest_first) return p.len_q % tile_m != 0 && turns >= 5;
  return order.tiles >= kTilesWorthTaking || order.section * 8 < blocks * 7;
}

// Pairs of a section, whose keys and values fill L2 if they are not too few or too many for that:
// with few pairs, blocks read a key far apart in time. H200, bf16, causal, B * T = 16384, N * H =
// 2048, times with 4, 8, 16, 32, 64 and 128 pairs. head_dim 64, T = 1k: 211, 212, 211, 208, 206,
// 213 us; 4k: 589, 573, 562, 557, 563, 583. head_dim 128, 1k: 150, 148, 145, 144, 146, 165; 4k:
// 430, 415, 409, 419, 447; 16k: 1506, 1497, 1512. head_dim 256, 1k: 149, 146, 140, 135, 156, 195;
// 4k: 422, 394, 382, 392; 16k: 1383, 1365 (2 pairs, which would fit L2: 1433).
constexpr int kFewestPairs = 8;
constexpr int kMostPairs = 32, kMostNarrowPairs = 64;  // past and up to head_dim 64

inline HopperOrder fwd_sm90_order(const AttentionParams& p, const HopperTile& tile) {
  const int tiles = fwd_tiles(p, tile.m);
  const int64_t pairs = fwd_pairs(p);
  const int dim = std::max(p.head_dim, p.head_dim_v);
  const int64_t fitting = fwd_section_heads(p) * (dim > 192 ? 2 : 1);
  const int64_t wanted =
      std::clamp<int64_t>(fitting, kFewestPairs, dim > 64 ? kMostPairs : kMostNarrowPairs);
  const int64_t section = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(pairs, 1));
  return {tiles, int(pairs), int(section), int(tiles * pairs), fwd_sm90_windowed(p)};
}

}  // namespace jax_fa
