// Driver: cuts the call into tiles, deals them to threads, joins what was split over keys.
#include <tuple>

#include "block_sparse_attention_call.h"
#include "block_sparse_attention_parts.h"

namespace sparse_attn {
namespace {

using Params = BlockSparseAttentionParams;

// The packed values of every (batch, KV head); empty where packing would not pay.
struct Packed {
  Buffer buffer;
  int64_t bytes;

  void* of(int64_t batch_head) const {
    return buffer == nullptr ? nullptr : buffer.get() + batch_head * bytes;
  }
};

// Values are packed once where more than one tile reads the average key.
Packed pack_values(const Params& p, const Sequences& sequences, const Kernels& kernels,
                   const std::vector<Work>& tiles) {
  const AttentionKernel& kernel = *kernels.prefill;
  Params longest = p;
  longest.Tk = sequences.longest();
  const int64_t bytes = kernel.packed_bytes(longest);
  int64_t reads = 0;
  for (const Work& w : tiles)
    if (w.tile.rows() > kernels.decode_rows) reads += w.tokens;
  if (bytes == 0 || reads < 2 * sequences.keys() * p.Hkv) return {nullptr, 0};
  Packed packed{allocate(bytes * p.B * p.Hkv), bytes};
  const auto groups_of = [](const Params& s) { return (s.Tk + kGroupKeys - 1) / kGroupKeys; };
  const int64_t piece = 64, pieces = (groups_of(longest) + piece - 1) / piece;
  deal(pieces * p.B * p.Hkv, [] { return 0; }, [&](int64_t i, int) {
    const int64_t bh = i / pieces, begin = i % pieces * piece;
    const Params& s = sequences[bh / p.Hkv];
    kernel.pack(s, bh / p.Hkv, bh % p.Hkv, begin, std::min(groups_of(s), begin + piece),
                packed.of(bh));
  });
  return packed;
}

struct State {
  Buffer scratch;
  KeyGroups groups;
};

void run(const Params& p) {
  const Kernels kernels = choose_kernels(p);
  const Sequences sequences(p);
  const std::vector<Work> tiles = make_tiles(p, sequences);
  const auto n_tiles = static_cast<int64_t>(tiles.size());
  const Packed packed = pack_values(p, sequences, kernels, tiles);
  const int64_t scratch =
      std::max(kernels.prefill->scratch_bytes(p), kernels.decode->scratch_bytes(p));

  const auto run_tile = [&](const QueryTile& t, const KeyGroup* groups, int64_t n, void* buffer,
                            float* partial) {
    const bool few = t.rows() <= kernels.decode_rows;
    (few ? kernels.decode : kernels.prefill)
        ->tile(sequences[t.batch], t, groups, n, packed.of(t.batch * p.Hkv + t.kv_head), buffer,
               partial);
  };

  if (n_tiles >= kSplitBelow) {
    deal(n_tiles, [&] { return State{allocate(scratch), {}}; }, [&](int64_t i, State& state) {
      state.groups.build(sequences[tiles[i].tile.batch], tiles[i].tile);
      run_tile(tiles[i].tile, state.groups.data(), state.groups.size(), state.scratch.get(),
               nullptr);
    });
    return;
  }

  // few tiles: split each over its keys. The splits depend on the call alone, so the result
  // does not change with the number of threads.
  struct Piece {
    int64_t tile, begin, end;
  };
  std::vector<KeyGroups> groups(n_tiles);
  deal(n_tiles, [] { return 0; }, [&](int64_t i, int) {
    groups[i].build(sequences[tiles[i].tile.batch], tiles[i].tile);
  });
  std::vector<Piece> pieces;
  std::vector<int64_t> first_piece(n_tiles + 1), row_base(n_tiles + 1);
  for (int64_t i = 0; i < n_tiles; ++i) {
    const int64_t n = groups[i].size(), splits = std::max<int64_t>(1, n / kSplitGroups);
    for (int64_t s = 0; s < splits; ++s) pieces.push_back({i, n * s / splits, n * (s + 1) / splits});
    first_piece[i + 1] = static_cast<int64_t>(pieces.size());
    row_base[i + 1] = row_base[i] + (splits > 1 ? splits * tiles[i].tile.rows() : 0);
  }
  const int64_t row_floats = p.Dv + 2;
  const Buffer partials = allocate(row_base[n_tiles] * row_floats * sizeof(float));
  auto* const base = reinterpret_cast<float*>(partials.get());
  const auto partial_of = [&](int64_t tile, int64_t split) {
    return base + (row_base[tile] + split * tiles[tile].tile.rows()) * row_floats;
  };
  deal(static_cast<int64_t>(pieces.size()), [&] { return allocate(scratch); },
       [&](int64_t i, const Buffer& buffer) {
         const Piece& piece = pieces[i];
         const bool whole = first_piece[piece.tile + 1] - first_piece[piece.tile] == 1;
         run_tile(tiles[piece.tile].tile, groups[piece.tile].data() + piece.begin,
                  piece.end - piece.begin, buffer.get(),
                  whole ? nullptr : partial_of(piece.tile, i - first_piece[piece.tile]));
       });
  deal(n_tiles, [&] { return std::vector<float>(p.Dv); }, [&](int64_t i, std::vector<float>& sum) {
    const QueryTile& t = tiles[i].tile;
    const int64_t splits = first_piece[i + 1] - first_piece[i];
    if (splits == 1) return;
    std::vector<const float*> parts(splits);
    for (int64_t r = 0; r < t.rows(); ++r) {
      for (int64_t s = 0; s < splits; ++s) parts[s] = partial_of(i, s) + r * row_floats;
      combine_row(p, parts.data(), splits, t.batch, t.head + r / t.queries,
                  t.query + r % t.queries, sum.data());
    }
  });
}

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor query, Tensor key, Tensor value,
                                                  Tensor indices, Tensor counts, int64_t q_block,
                                                  int64_t kv_block, bool causal, int64_t sink,
                                                  int64_t window, std::optional<double> scale,
                                                  std::optional<Tensor> block_table,
                                                  std::optional<Tensor> kv_lengths) {
  KeyCache cache{block_table, kv_lengths};
  check_cpu_call(query, key, value, indices, counts, q_block, kv_block, sink, window, scale, cache);
  cache = readable(cache);
  query = last_dim_contiguous(query), key = last_dim_contiguous(key);
  value = last_dim_contiguous(value), indices = last_dim_contiguous(indices);
  Params p = make_params(query, key, value, indices, counts, q_block, kv_block, causal, sink,
                         window, scale, cache);
  Tensor out = torch::stable::new_empty(query, {p.B, p.Hq, p.Tq, p.Dv});
  Tensor lse = torch::stable::new_empty(query, {p.B, p.Hq, p.Tq}, ScalarType::Float);
  set_results(p, out, lse);
  check_index(p);
  check_cache_contents(p);
  prefer_huge_pages(p.out, p.B * p.out_stride[0] * element_bytes(p.dtype));
  run(p);
  return {out, lse};
}

}  // namespace

SA_LIBRARY_IMPL(CPU, m) {
  m.impl("block_sparse_attention.cpp", TORCH_BOX(&block_sparse_attention));
}

}  // namespace sparse_attn
