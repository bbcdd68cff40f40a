// AMX tile configuration. Internal linkage: only units compiled for AMX include this.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace sparse_attn {
namespace {

// Eight tiles of 16 rows x 64 bytes for as long as the object lives. Configured per use because
// other libraries in the process configure the same registers.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config;
    std::memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    // gcc takes the intrinsic to read only its first bytes and drops the other stores
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// gcc does not know that a tile load reads memory: earlier stores must not sink below it
inline void tile_fence() { asm volatile("" : : : "memory"); }

}  // namespace
}  // namespace sparse_attn
