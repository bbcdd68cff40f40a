// SALE's selection pass, for any instruction set: sparse_attn/reference/sale_estimate.py says what.
//
// Keys stand in lanes. A chunk of keys is unpacked to bytes once for a few query blocks; an engine
// multiplies four rows by 64 keys at a time, and only the largest integer of a row and group of
// keys becomes a float.
#pragma once
#include <cmath>
#include <cstring>

#include "sale_estimate.h"

namespace sparse_attn {
namespace {

using Params = SaleEstimateParams;

constexpr int kMaxQueries = 128;  // rows of a unit
constexpr int kSquare = 64;       // keys that an engine takes at once
constexpr float kBiasLimit = 0x1p30f;
constexpr float kTiny = 0x1p-126f;

// bytes of a row: both halves of the channels, each rounded up to whole words
inline int64_t half_bytes(const Params& p) { return round_up(p.D / 2, 4); }

// A query block, its rows ordered so that the pairs with a common step stand together:
// row of place 2 * i + e is 16 * (i / 8) + i % 8 + 8 * e.
struct UnitRows {
  uint8_t* codes;    // [kMaxQueries][2 * half_bytes], each code plus 8
  float* step;       // [kMaxQueries / 2] of each pair
  float* inverse;    // [kMaxQueries / 2]
  float* theta;      // [kMaxQueries]
  float* bias;       // [kChunkTokens] of the unit's head, divided by the steps of the keys
  int places;        // whole tiles of 16
  bool everything;   // a row has no bar
};

struct EstimateScratch {
  int8_t* keys;         // the engine's layout, [kChunkTokens][2 * half_bytes]
  int32_t* correction;  // [kChunkTokens]: -8 times the sum of a key's codes
  float* key_step;      // [kChunkTokens]
  float* key_inverse;   // [kChunkTokens]
  UnitRows rows[kMaxUnits];

  static int64_t layout(const Params& p, char* base, EstimateScratch* s) {
    char* at = base;
    const auto take = [&at](auto*& pointer, int64_t bytes) {
      pointer = reinterpret_cast<decltype(+pointer)>(at);
      at += round_up(bytes, 64);
    };
    EstimateScratch t;
    take(t.keys, kChunkTokens * 2 * half_bytes(p));
    take(t.correction, kChunkTokens * 4);
    take(t.key_step, kChunkTokens * 4);
    take(t.key_inverse, kChunkTokens * 4);
    for (UnitRows& rows : t.rows) {
      take(rows.codes, kMaxQueries * 2 * half_bytes(p));
      take(rows.step, kMaxQueries * 2);
      take(rows.inverse, kMaxQueries * 2);
      take(rows.theta, kMaxQueries * 4);
      take(rows.bias, kChunkTokens * 4);
    }
    if (s != nullptr) *s = t;
    return at - base;
  }
};

inline float inverse_of(float step) { return step == 0 ? 0.0f : 1 / step; }

// Unpacks a unit's queries. Rows past the last query repeat it: they decide what it decides.
inline void load_rows(const Params& p, const EstimateTask& task, const EstimateUnit& unit,
                      UnitRows& rows) {
  const int64_t start = unit.m * p.q_block, left = p.Tq - start;
  const int64_t real = left < p.q_block ? left : p.q_block, half = half_bytes(p);
  const int64_t head = task.batch * p.Hq + unit.head;
  rows.places = static_cast<int>(round_up(real, 16));
  rows.everything = false;
  std::memset(rows.codes, 8, rows.places * 2 * half);
  for (int place = 0; place < rows.places; ++place) {
    const int pair = place / 2;
    int64_t row = pair / 8 * 16 + pair % 8 + place % 2 * 8;
    if (row >= real) row = place % 2 == 1 && row - 8 < real ? row - 8 : real - 1;
    const uint8_t* from = p.query + task.batch * p.query_stride[0] +
                          unit.head * p.query_stride[1] + (start + row) * p.query_stride[2];
    uint8_t* to = rows.codes + place * 2 * half;
    for (int64_t i = 0; i < p.D / 2; ++i) {
      to[i] = (from[i] & 15) ^ 8;
      to[half + i] = from[i] >> 4 ^ 8;
    }
    const float theta = p.theta[head * p.Tq + start + row];
    rows.everything |= !(theta > -INFINITY);
    rows.theta[place] = std::fabs(theta) < kTiny ? 0 : theta;
    if (place % 2 == 1) continue;
    const int64_t token = start + row;
    const float step = p.query_step[(head * ((p.Tq + 15) / 16) + token / 16) * 8 + token % 8];
    rows.step[pair] = step;
    rows.inverse[pair] = inverse_of(step);
  }
}

// Steps of a chunk's keys, 0 past the last.
inline void load_steps(const Params& p, const EstimateTask& task, int64_t begin,
                       EstimateScratch& s) {
  const float* steps = p.key_step + (task.batch * p.Hkv + task.kv_head) * p.Nk * 4;
  for (int i = 0; i < kChunkTokens; ++i) {
    const int64_t t = begin + i;
    const float step = t < p.Tk ? steps[t / p.kv_block * 4 + t % 8 / 2] : 0;
    s.key_step[i] = step;
    s.key_inverse[i] = inverse_of(step);
  }
}

inline void load_bias(const Params& p, const EstimateTask& task, int64_t head, int64_t begin,
                      const EstimateScratch& s, float* bias) {
  const float* from = p.key_bias + (task.batch * p.Hq + head) * p.Tk;
  for (int i = 0; i < kChunkTokens; ++i)
    bias[i] = begin + i < p.Tk ? from[begin + i] * s.key_inverse[i] : 0;
}

// Which of a unit's blocks are kept, of a chunk's squares of 64 keys.
template <class Engine>
inline void mark(const Params& p, const EstimateUnit& unit, const UnitRows& rows,
                 const EstimateScratch& s, int64_t begin) {
  const int64_t square_blocks = kSquare / p.kv_block;
  for (int64_t key = 0; key < kChunkTokens; key += kSquare) {
    const int64_t block = (begin + key) / p.kv_block;
    const int64_t low = block < unit.first ? unit.first : block;
    const int64_t high = block + square_blocks < unit.end ? block + square_blocks : unit.end;
    if (low >= high) continue;
    // bit i: 16 keys from 16 * i on are in question
    const int64_t sixteenths = p.kv_block / 16;
    const unsigned wanted = ((1u << (high - low) * sixteenths) - 1) << (low - block) * sixteenths;
    const unsigned found = Engine::square(p, rows, s, static_cast<int>(key), wanted);
    for (int64_t b = low; b < high; ++b) {
      const unsigned bits = ((1u << sixteenths) - 1) << (b - block) * sixteenths;
      unit.kept[b] = (found & bits) != 0;
    }
  }
}

template <class Engine>
void run(const Params& p, const EstimateTask& task, void* scratch) {
  EstimateScratch s;
  EstimateScratch::layout(p, static_cast<char*>(scratch), &s);
  int64_t first = p.Nk, end = 0;
  for (int u = 0; u < task.n; ++u) {
    const EstimateUnit& unit = task.units[u];
    load_rows(p, task, unit, s.rows[u]);
    if (s.rows[u].everything) {
      std::memset(unit.kept + unit.first, 1, unit.end - unit.first);
    } else if (unit.first < unit.end) {
      first = unit.first < first ? unit.first : first;
      end = unit.end > end ? unit.end : end;
    }
  }
  const int64_t stop = end * p.kv_block;
  for (int64_t at = first * p.kv_block / kChunkTokens * kChunkTokens; at < stop;
       at += kChunkTokens) {
    load_steps(p, task, at, s);
    Engine::unpack(p, task, at, s);
    for (int u = 0; u < task.n; ++u) {
      if (s.rows[u].everything) continue;
      load_bias(p, task, task.units[u].head, at, s, s.rows[u].bias);
      mark<Engine>(p, task.units[u], s.rows[u], s, at);
    }
  }
}

int64_t scratch_bytes(const Params& p) { return EstimateScratch::layout(p, nullptr, nullptr); }

}  // namespace
}  // namespace sparse_attn
