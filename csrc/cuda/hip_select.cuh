// hip_select: sparse_attn/reference/hip_select.py says what.
//
// A block of threads searches the tree of one block of queries. Its nodes, the scores of their
// children and the histogram of the choice stay in shared memory; nothing but the result is
// written. A round finds the children whose representative is not yet scored, gathers its keys,
// keeps the best by radix select and lists them in their order.
#pragma once
#include "hip_keys.cuh"

namespace sparse_attn {

// The list of nodes, before and after a round; blocks [start, start + length).
struct TreeNodes {
  int *start, *length;
};

struct HipSelectShared {
  int* node_memory;
  int n_nodes;
  int* node_scores;   // of the representatives
  int* scores;        // of the children
  uint16_t* missing;  // children without a score
  int* limits;
  TopKShared* top;
  unsigned char *rows, *rings;

  __device__ __forceinline__ HipSelectShared(unsigned char* memory, const HipSelectCudaParams& p,
                                             int row_bytes) {
    const int n_rows = static_cast<int>(p.rows);
    n_nodes = static_cast<int>(p.nodes);
    rows = memory, rings = rows + n_rows * row_bytes;
    const int warps = blockDim.x / 32;
    limits = reinterpret_cast<int*>(rings + warps * kHipTiles * kHipTileKeys * row_bytes);
    top = reinterpret_cast<TopKShared*>(limits + n_rows);
    node_memory = reinterpret_cast<int*>(top + 1);
    node_scores = node_memory + 4 * n_nodes;
    scores = node_scores + n_nodes;
    missing = reinterpret_cast<uint16_t*>(scores + n_nodes * p.branch);
  }
  __device__ __forceinline__ TreeNodes nodes(int buffer) const {
    int* const start = node_memory + 2 * buffer * n_nodes;
    return {start, start + n_nodes};
  }
};

struct Tree {
  int log2_branch, begin, count;  // blocks that may be chosen
  bool centre;

  struct Node {
    int start, length;
  };
  // Child i of a node: what lies between cuts i * length // branch.
  __device__ __forceinline__ Node child(int start, int length, int i) const {
    const int whole = length >> log2_branch, part = length & (1 << log2_branch) - 1;
    const int from = i * whole + (i * part >> log2_branch);
    const int to = (i + 1) * whole + ((i + 1) * part >> log2_branch);
    return {start + from, to - from};
  }
  __device__ __forceinline__ Node child(const TreeNodes& nodes, int i) const {
    const int parent = i >> log2_branch;
    return child(nodes.start[parent], nodes.length[parent], i & (1 << log2_branch) - 1);
  }
  __device__ __forceinline__ int representative(const Node& node) const {
    return centre ? node.start + node.length / 2 : node.start;
  }
};

// Lists the children that need a score; the others have that of their parent, or are empty.
__device__ __forceinline__ int list_missing(const Tree& tree, const TreeNodes& nodes, int n,
                                            bool scored, const HipSelectShared& s) {
  int count = 0;
  for (int begin = 0; begin < n; begin += blockDim.x) {
    const int i = begin + static_cast<int>(threadIdx.x);
    bool misses = false;
    if (i < n) {
      const int parent = i >> tree.log2_branch;
      const Tree::Node whole{nodes.start[parent], nodes.length[parent]};
      const Tree::Node child = tree.child(nodes, i);
      misses = child.length > 0 &&
               !(scored && tree.representative(child) == tree.representative(whole));
      s.scores[i] = child.length == 0 ? kNoCandidate
                    : misses          ? ordered(-kInfinity)
                                      : s.node_scores[parent];
    }
    uint32_t total;
    const uint32_t rank = rank_two(misses, false, s.top->counts, total);
    if (misses) s.missing[count + rank] = static_cast<uint16_t>(i);
    count += static_cast<int>(total);
  }
  __syncthreads();
  return count;
}

// Descends from `keep` chunks to as many blocks; returns the buffer that holds them.
template <class T, int kDim>
__device__ __forceinline__ int search_tree(const HipSelectCudaParams& p, const Tree& tree,
                                           const KeyRows<T>& keys, QueryRows<T, kDim>& query,
                                           const SampledRows& sampled, int64_t batch, int64_t head,
                                           HipSelectShared& s) {
  const int keep = static_cast<int>(p.keep), children = keep * static_cast<int>(p.branch);
  const int samples = static_cast<int>(p.samples), block = static_cast<int>(p.kv_block);
  const int heads = static_cast<int>(p.Hq / p.H), total_rows = heads * sampled.n;
  const bool once = total_rows <= p.rows;  // the rows stay in shared memory
  int long_ones = 0;
  const int whole = tree.count / keep, part = tree.count % keep;
  const auto cut = [&](int j) { return j * whole + j * part / keep; };  // j * count // keep
  for (int j = threadIdx.x; j < keep; j += blockDim.x) {
    const int from = cut(j), to = cut(j + 1);
    s.nodes(0).start[j] = tree.begin + from, s.nodes(0).length[j] = to - from;
    long_ones |= to - from > 1;
  }
  if (once) query.load(p, batch, head, heads, sampled, 0);
  int buffer = 0;
  for (bool scored = false; __syncthreads_or(long_ones); scored = true, buffer ^= 1) {
    const TreeNodes nodes = s.nodes(buffer), next = s.nodes(buffer ^ 1);
    const int missing = list_missing(tree, nodes, children, scored, s);
    const auto block_of = [&](int i) {
      return tree.representative(tree.child(nodes, s.missing[i / samples]));
    };
    const auto token_of = [&](int i) {
      return block_of(i) * block + i % samples * static_cast<int>(p.key_step);
    };
    const auto bound_of = [&](int i) { return block_of(i) * block + block - 1; };
    for (int first = 0; first < total_rows; first += static_cast<int>(p.rows)) {
      if (!once) {
        __syncthreads();
        query.load(p, batch, head, heads, sampled, first);
      }
      score_tokens(keys, query, static_cast<int>(p.D), s.rings, missing * samples, token_of,
                   bound_of, [&](int i, float score) {
                     atomicMax(&s.scores[s.missing[i / samples]], ordered(score));
                   });
    }
    const TopK top = find_top(s.scores, children, keep, *s.top);
    long_ones = 0;
    compact(s.scores, children, top, *s.top, [&](int i) { return tree.child(nodes, i); },
            [&](int place, const Tree::Node& node, int score) {
              next.start[place] = node.start, next.length[place] = node.length;
              s.node_scores[place] = score;
              long_ones |= node.length > 1;
            });
  }
  return buffer;
}

template <class T, int kDim>
__global__ void __launch_bounds__(32 * kHipMostWarps, 1)
    hip_select_kernel(const __grid_constant__ HipSelectCudaParams p) {
  SA_SHARED_MEMORY(memory);
  // heads that share keys run side by side, for the sake of the second-level cache
  const int64_t side = p.H / p.Hkv;
  const int64_t block = blockIdx.x / side % p.Mq, kv = blockIdx.x / side / p.Mq;
  const int64_t batch = kv / p.Hkv, kv_head = kv % p.Hkv;
  const int64_t list = kv_head * side + blockIdx.x % side;
  const KeyRows<T> keys(p, batch, kv_head);
  const SampledRows sampled(p, block, p.q_stride, keys.n);
  const int64_t begin = p.sink / p.kv_block, end = (sampled.limit + p.kv_block) / p.kv_block;
  const Tree tree{p.branch == 4 ? 2 : 1, static_cast<int>(begin),
                  static_cast<int>(max(end - begin, int64_t{0})), p.centre};
  const int count = static_cast<int>(min(int64_t{tree.count}, p.keep));
  const int64_t out = (batch * p.H + list) * p.Mq + block;
  int32_t* const indices = p.indices + out * p.K;
  if (tree.count <= p.keep) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) indices[i] = tree.begin + i;
  } else {
    HipSelectShared s(memory, p, SharedTile<kDim>::kRowBytes);
    QueryRows<T, kDim> query(p, s.rows, s.limits, p.rows);
    const int found = search_tree(p, tree, keys, query, sampled, batch, list * (p.Hq / p.H), s);
    for (int i = threadIdx.x; i < count; i += blockDim.x) indices[i] = s.nodes(found).start[i];
  }
  for (int i = count + threadIdx.x; i < p.K; i += blockDim.x) indices[i] = 0;
  if (threadIdx.x == 0) p.counts[out] = count;
}

}  // namespace sparse_attn
