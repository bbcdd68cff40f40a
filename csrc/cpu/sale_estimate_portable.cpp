// SALE's selection pass on any CPU: plain loops over four rows by 64 keys.
#include "sale_estimate_tile.h"

namespace sparse_attn {
namespace {

constexpr int kRows = 4;   // two pairs
constexpr int kCycle = 8;  // key j of a block has the step of key j % 8

inline int8_t signed_code(int nibble) { return static_cast<int8_t>((nibble ^ 8) - 8); }

class PlainEngine {
 public:
  // keys: [chunk / 64][words][64 keys][4 channels]
  static void unpack(const Params& p, const EstimateTask& task, int64_t begin,
                     EstimateScratch& s) {
    const int64_t half = half_bytes(p), words = half / 2;
    std::memset(s.keys, 0, kChunkTokens * 2 * half);
    for (int64_t k = 0; k < kChunkTokens; ++k) {
      s.correction[k] = 0;
      if (begin + k >= p.Tk) continue;
      const uint8_t* from = p.key + task.batch * p.key_stride[0] +
                            task.kv_head * p.key_stride[1] + (begin + k) * p.key_stride[2];
      int8_t* to = s.keys + k / kSquare * kSquare * 2 * half + k % kSquare * 4;
      int32_t sum = 0;
      for (int64_t d = 0; d < p.D / 2; ++d) {
        const int8_t low = signed_code(from[d] & 15), high = signed_code(from[d] >> 4);
        to[d / 4 * kSquare * 4 + d % 4] = low;
        to[(words / 2 + d / 4) * kSquare * 4 + d % 4] = high;
        sum += low + high;
      }
      s.correction[k] = -8 * sum;
    }
  }

  static unsigned square(const Params& p, const UnitRows& rows, const EstimateScratch& s, int key,
                         unsigned wanted) {
    const int64_t half = half_bytes(p), words = half / 2, block = p.kv_block;
    const unsigned bits = (1u << block / 16) - 1;
    unsigned found = 0;
    for (int place = 0; place < rows.places && (found & wanted) != wanted; place += kRows) {
      int32_t c[kRows][kSquare];
      multiply(rows.codes + place * 2 * half, 2 * half, s.keys + key * 2 * half, words, c);
      for (int pair = 0; pair < kRows / 2; ++pair) {
        const float inverse = rows.inverse[place / 2 + pair];
        for (int j = 0; j < kSquare; ++j) {
          float t = rows.bias[key + j] * inverse;
          t = t < kBiasLimit ? t : kBiasLimit;  // NaN too
          t = t > -kBiasLimit ? t : -kBiasLimit;
          const int32_t start = static_cast<int32_t>(std::nearbyintf(t)) + s.correction[key + j];
          c[2 * pair][j] += start;
          c[2 * pair + 1][j] += start;
        }
      }
      for (int64_t j = 0; j < kSquare; j += block)
        if (exceeds(rows, s, place, static_cast<int>(key + j), c, j, block)) found |= bits << j / 16;
    }
    return found & wanted;
  }

 private:
  // c = rows of codes plus 8 times keys
  static void multiply(const uint8_t* q, int64_t row_bytes, const int8_t* keys, int64_t words,
                       int32_t (&c)[kRows][kSquare]) {
    std::memset(c, 0, sizeof c);
    for (int64_t w = 0; w < words; ++w) {
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* x = q + r * row_bytes + w * 4;
        const int8_t* k = keys + w * kSquare * 4;
        for (int j = 0; j < kSquare; ++j)
          c[r][j] += x[0] * k[4 * j] + x[1] * k[4 * j + 1] + x[2] * k[4 * j + 2] +
                     x[3] * k[4 * j + 3];
      }
    }
  }

  static bool exceeds(const UnitRows& rows, const EstimateScratch& s, int place, int key,
                      const int32_t (&c)[kRows][kSquare], int64_t begin, int64_t block) {
    bool kept = false;
    for (int r = 0; r < kRows; ++r) {
      int32_t top[kCycle];
      for (int i = 0; i < kCycle; ++i) top[i] = c[r][begin + i];
      for (int64_t j = kCycle; j < block; j += kCycle)
        for (int i = 0; i < kCycle; ++i)
          top[i] = c[r][begin + j + i] > top[i] ? c[r][begin + j + i] : top[i];
      for (int i = 0; i < kCycle; ++i) {
        const float unit = rows.step[(place + r) / 2] * s.key_step[key + i];
        const float x = unit * static_cast<float>(top[i]);
        kept |= !(x <= rows.theta[place + r]);  // NaN is kept
      }
    }
    return kept;
  }
};

}  // namespace

const EstimateKernel kEstimatePortable = {scratch_bytes, run<PlainEngine>};

}  // namespace sparse_attn
