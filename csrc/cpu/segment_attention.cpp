// Blocks of kBlock frames, in panels of kPanel lanes. A panel is transposed once; rows of the other side are
// read as they are:
//   scores   tile[row][lane] = rows[row] . panel[lane]
//   sums     sums[lane] += tile[row][lane] * rows[row]
// For the result and for dq, lanes are queries and rows are keys; for dk and dv the reverse.
#include "mmkernels/segment_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/activation.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace mmk::cpu {
namespace {

constexpr int64_t kBlock = kAttentionBlock;
constexpr int kGroup = 4;  // rows, or lanes, whose sums stay in registers, for two vectors of columns
template <class A>
constexpr int64_t kPanel = 2 * kLanes<A>;
template <class A>
constexpr int64_t kPanels = kBlock / kPanel<A>;

// Frames [first, last).
struct Range {
  int64_t first, last;
};

MMK_INLINE Range both(Range a, Range b) {
  return {std::max(a.first, b.first), std::min(a.last, b.last)};
}

template <class T>
struct View {
  const T* data;
  int64_t stride;

  MMK_INLINE const T* row(int64_t frame) const { return data + frame * stride; }
};

template <class T>
MMK_INLINE View<T> view(const HeadRows& rows, int64_t row, int64_t head) {
  return {at<T>(rows.data, row * rows.batch_stride + head * rows.head_stride), rows.frame_stride};
}

// Rows in the accumulation type: the rows themselves, or a copy of the range converted into `buffer`.
template <class T>
MMK_INLINE View<acc_t<T>> widened(View<T> rows, Range range, int64_t size, acc_t<T>* buffer) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return rows;
  } else {
    for (int64_t frame = range.first; frame < range.last; ++frame) {
      const T* from = rows.row(frame);
      acc_t<T>* to = buffer + (frame - range.first) * size;
      for (int64_t c = 0; c < size; c += kLanes<acc_t<T>>) store(to + c, load(from + c));
    }
    return {buffer - range.first * size, size};
  }
}

// The frames that each lane of a panel sees, first to last inclusive, and the ranges that groups of lanes and
// all lanes see. For a lane that sees nothing first is kNothing.
constexpr int32_t kNothing = std::numeric_limits<int32_t>::max();

template <class A>
struct Seen {
  int32_t first[kPanel<A>];
  int32_t last[kPanel<A>];
  Range group[kPanel<A> / kGroup];
  Range all;
  Range whole;  // the frames that every lane sees

  MMK_INLINE void finish() {
    all = {kNothing, 0};
    whole = {0, kNothing};
    for (int64_t g = 0; g < kPanel<A> / kGroup; ++g) {
      group[g] = {kNothing, 0};
      for (int64_t l = g * kGroup; l < (g + 1) * kGroup; ++l) {
        whole = both(whole, {first[l], last[l] + 1});
        if (first[l] == kNothing) continue;
        group[g] = {std::min<int64_t>(group[g].first, first[l]),
                    std::max<int64_t>(group[g].last, last[l] + 1)};
      }
      if (group[g].last == 0) group[g].first = 0;
      if (group[g].last == 0) continue;
      all = {std::min(all.first, group[g].first), std::max(all.last, group[g].last)};
    }
    if (all.last == 0) all.first = 0;
  }
};

// The halves of a0 b0 a1 b1 ...
template <class A>
MMK_INLINE void interleave(vec_t<A> a, vec_t<A> b, vec_t<A>& low, vec_t<A>& high) {
  if constexpr (sizeof(A) == 4) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  }
}

// rows[i][j] = rows[j][i]
template <class A>
MMK_INLINE void transpose(vec_t<A> (&rows)[kLanes<A>]) {
  constexpr int64_t kHalf = kLanes<A> / 2;
#pragma GCC unroll 3
  for (int64_t round = 1; round < kLanes<A>; round *= 2) {
    vec_t<A> mixed[kLanes<A>];
#pragma GCC unroll 4
    for (int64_t i = 0; i < kHalf; ++i) {
      interleave<A>(rows[i], rows[i + kHalf], mixed[2 * i], mixed[2 * i + 1]);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes<A>; ++i) rows[i] = mixed[i];
  }
}

// packed[c][lane] = factor * rows[frame + lane][c], zero for lanes that see nothing, which may hold NaN.
template <class T>
MMK_INLINE void pack_panel(View<T> rows, int64_t frame, const Seen<acc_t<T>>& seen, int64_t size,
                           acc_t<T> factor, acc_t<T>* packed) {
  using A = acc_t<T>;
  for (int64_t first = 0; first < kPanel<A>; first += kLanes<A>) {
    // Lanes that see something come first.
    int64_t count = 0;
    while (count < kLanes<A> && seen.first[first + count] != kNothing) ++count;
    for (int64_t c = 0; c < size; c += kLanes<A>) {
      vec_t<A> values[kLanes<A>] = {};
      if (count == kLanes<A>) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kLanes<A>; ++i) values[i] = load(rows.row(frame + first + i) + c) * factor;
      } else {
        for (int64_t i = 0; i < count; ++i) values[i] = load(rows.row(frame + first + i) + c) * factor;
      }
      transpose<A>(values);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kLanes<A>; ++i) store(packed + (c + i) * kPanel<A> + first, values[i]);
    }
  }
}

// tile[row - range.first][lane] = rows[row] . panel[lane]; the tile has room for whole groups of rows.
template <class A>
MMK_INLINE void score(View<A> rows, Range range, const A* packed, int64_t size, A* tile) {
  for (int64_t first = range.first; first < range.last; first += kGroup, tile += kGroup * kPanel<A>) {
    const auto row = [&](int64_t i) MMK_LAMBDA { return rows.row(std::min(first + i, range.last - 1)); };
    const A *a0 = row(0), *a1 = row(1), *a2 = row(2), *a3 = row(3);
    vec_t<A> s00 = {}, s01 = {}, s10 = {}, s11 = {}, s20 = {}, s21 = {}, s30 = {}, s31 = {};
#pragma GCC unroll 4
    for (int64_t c = 0; c < size; ++c) {
      const vec_t<A> b0 = load(packed + c * kPanel<A>), b1 = load(packed + c * kPanel<A> + kLanes<A>);
      s00 += a0[c] * b0;
      s01 += a0[c] * b1;
      s10 += a1[c] * b0;
      s11 += a1[c] * b1;
      s20 += a2[c] * b0;
      s21 += a2[c] * b1;
      s30 += a3[c] * b0;
      s31 += a3[c] * b1;
    }
    const vec_t<A> sums[2 * kGroup] = {s00, s01, s10, s11, s20, s21, s30, s31};
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kGroup; ++i) store(tile + i * kLanes<A>, sums[i]);
  }
}

// One group of lanes and kVectors vectors of columns of add_rows.
template <class A, int kVectors>
MMK_INLINE void add_columns(A* sums, int64_t size, View<A> rows, Range range, const A* tile) {
  vec_t<A> s[kGroup][kVectors];
#pragma GCC unroll 4
  for (int l = 0; l < kGroup; ++l) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) s[l][i] = load(sums + l * size + i * kLanes<A>);
  }
  for (int64_t frame = range.first; frame < range.last; ++frame, tile += kPanel<A>) {
    const A* row = rows.row(frame);
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
      const vec_t<A> values = load(row + i * kLanes<A>);
#pragma GCC unroll 4
      for (int l = 0; l < kGroup; ++l) s[l][i] += tile[l] * values;
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < kGroup; ++l) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) store(sums + l * size + i * kLanes<A>, s[l][i]);
  }
}

// sums[lane] += tile[row - first][lane] * rows[row] for the rows of the range that the lane's group sees.
template <class A>
MMK_INLINE void add_rows(A* sums, int64_t size, View<A> rows, Range range, const Seen<A>& seen,
                         const A* tile) {
  for (int64_t g = 0; g < kPanel<A> / kGroup; ++g) {
    const Range of_group = both(range, seen.group[g]);
    if (of_group.first >= of_group.last) continue;
    A* of_lanes = sums + g * kGroup * size;
    const A* weights = tile + (of_group.first - range.first) * kPanel<A> + g * kGroup;
    int64_t c = 0;
    for (; c + 2 * kLanes<A> <= size; c += 2 * kLanes<A>) {
      add_columns<A, 2>(of_lanes + c, size, {rows.data + c, rows.stride}, of_group, weights);
    }
    if (c < size) add_columns<A, 1>(of_lanes + c, size, {rows.data + c, rows.stride}, of_group, weights);
  }
}

// Calls body(frame, cells, sees) for each row of a tile; sees(lane): whether frame and lane see each other.
template <class A, class Body>
MMK_INLINE void for_rows(A* tile, Range range, const Seen<A>& seen, Body&& body) {
  for (int64_t frame = range.first; frame < range.last; ++frame, tile += kPanel<A>) {
    const int32_t at = static_cast<int32_t>(frame);
    body(frame, tile,
         [&](int64_t lane) MMK_LAMBDA { return (seen.first[lane] <= at) & (at <= seen.last[lane]); });
  }
}

// Scratch memory of a thread.
template <class A>
struct Scratch {
  std::vector<A> memory;
  A *packed, *other_packed;  // [panels][size][kPanel]
  A *sums, *other_sums;      // [kBlock][size]
  A *rows, *other_rows;      // [kBlock][size]
  A *tile, *other_tile;      // [kBlock][kPanel]
  Seen<A> seen[kPanels<A>];

  explicit Scratch(int64_t size) : memory(static_cast<size_t>(kBlock * (6 * size + 2 * kPanel<A>)+kAlign)) {
    A* next = memory.data();
    while (reinterpret_cast<uintptr_t>(next) % 64 != 0) ++next;
    for (A** part : {&packed, &other_packed, &sums, &other_sums, &rows, &other_rows}) {
      *part = next;
      next += kBlock * size;
    }
    tile = next;
    other_tile = next + kBlock * kPanel<A>;
  }

  static constexpr int64_t kAlign = 64 / sizeof(A);
};

struct Block {
  int64_t row, head, first, frames;  // frames in segments
};

MMK_INLINE int64_t blocks_of(int64_t frames) {
  return (frames + kBlock - 1) / kBlock;
}

// The first frame that a block of queries sees, and the end of the queries that see a block of keys.
MMK_INLINE int64_t first_key(const int32_t* extents, int64_t first) {
  return std::clamp<int64_t>(extents[first], 0, first);
}
MMK_INLINE int64_t query_stop(const int32_t* extents, int64_t frames, int64_t last) {
  return std::clamp<int64_t>(extents[frames + last], last + 1, frames);
}

// Frames of a block that are in segments: those come first.
MMK_INLINE int64_t covered(const int32_t* extents, int64_t frames, int64_t first) {
  int64_t count = 0;
  while (count < kBlock && first + count < frames && extents[first + count] < frames) ++count;
  return count;
}

MMK_INLINE Block block_at(const SegmentAttentionShape& shape, const int32_t* extents, int64_t heads,
                          int64_t index) {
  const int64_t blocks = blocks_of(shape.frames);
  const int64_t head = index / blocks;
  const int64_t first = index % blocks * kBlock;
  const int64_t row = head / heads;
  return {row, head % heads, first, covered(extents + row * 2 * shape.frames, shape.frames, first)};
}

template <bool kQueries>
MMK_INLINE AttentionPlan plan(const SegmentAttentionShape& shape, const int32_t* extents) {
  AttentionPlan result;
  const int64_t blocks = blocks_of(shape.frames);
  const int64_t heads = kQueries ? shape.heads : shape.key_heads;
  const int64_t sharing = kQueries || shape.key_heads == 0 ? 1 : shape.heads / shape.key_heads;
  result.begin.reserve(static_cast<size_t>(shape.batch * heads * blocks + 1));
  int64_t work = 0;
  for (int64_t row = 0; row < shape.batch; ++row) {
    const int32_t* of_row = extents + row * 2 * shape.frames;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t first = 0; first < shape.frames; first += kBlock) {
        result.begin.push_back(work);
        const int64_t count = covered(of_row, shape.frames, first);
        int64_t others = 0;
        if (count > 0) {
          others = kQueries ? first + count - first_key(of_row, first)
                            : query_stop(of_row, shape.frames, first + count - 1) - first;
        }
        work += kBlock / 4 + sharing * others;
      }
    }
  }
  result.begin.push_back(work);
  return result;
}

// Lanes are the queries of a block, which see keys.
template <class A>
MMK_INLINE void see_keys(Scratch<A>& scratch, const Block& block, const int32_t* extents) {
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    Seen<A>& seen = scratch.seen[lane / kPanel<A>];
    const int64_t query = block.first + lane;
    const bool sees = lane < block.frames;
    seen.first[lane % kPanel<A>] =
        sees ? static_cast<int32_t>(std::clamp<int64_t>(extents[query], 0, query)) : kNothing;
    seen.last[lane % kPanel<A>] = sees ? static_cast<int32_t>(query) : -1;
  }
  for (Seen<A>& seen : scratch.seen) seen.finish();
}

// Lanes are the keys of a block, which queries see.
template <class A>
MMK_INLINE void see_queries(Scratch<A>& scratch, const Block& block, const int32_t* extents, int64_t frames) {
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    Seen<A>& seen = scratch.seen[lane / kPanel<A>];
    const int64_t key = block.first + lane;
    const bool sees = lane < block.frames;
    seen.first[lane % kPanel<A>] = sees ? static_cast<int32_t>(key) : kNothing;
    seen.last[lane % kPanel<A>] = sees ? static_cast<int32_t>(query_stop(extents, frames, key) - 1) : -1;
  }
  for (Seen<A>& seen : scratch.seen) seen.finish();
}

// Calls body(range) for pieces of [first, last) inside blocks of kBlock frames.
template <class Body>
MMK_INLINE void for_pieces(int64_t first, int64_t last, Body&& body) {
  while (first < last) {
    const int64_t next = std::min((first / kBlock + 1) * kBlock, last);
    body(Range{first, next});
    first = next;
  }
}

// The online softmax of a panel of queries.
template <class A>
struct Softmax {
  A largest[kPanel<A>];
  A total[kPanel<A>];

  MMK_INLINE void start() {
    std::fill_n(largest, kPanel<A>, -std::numeric_limits<A>::infinity());
    std::fill_n(total, kPanel<A>, A(0));
  }

  // Replaces scores by their exponentials, and rescales the sums so far. While all scores of a lane are -inf,
  // their exponentials are 0.
  MMK_INLINE void add(A* tile, Range range, const Seen<A>& seen, A* sums, int64_t size) {
    constexpr A kLowest = -std::numeric_limits<A>::infinity();
    const bool masked = range.first < seen.whole.first || range.last > seen.whole.last;
    A before[kPanel<A>], shift[kPanel<A>], factor[kPanel<A>];
    for (int64_t l = 0; l < kPanel<A>; ++l) before[l] = largest[l];
    for_rows(tile, range, seen, [&](int64_t, A* cells, auto&& sees) MMK_LAMBDA {
      if (masked) {
        for (int64_t l = 0; l < kPanel<A>; ++l) cells[l] = sees(l) ? cells[l] : kLowest;
      }
      for (int64_t l = 0; l < kPanel<A>; ++l) largest[l] = cells[l] > largest[l] ? cells[l] : largest[l];
    });
    for (int64_t l = 0; l < kPanel<A>; ++l) shift[l] = largest[l] == kLowest ? A(0) : largest[l];
    for (int64_t l = 0; l < kPanel<A>; ++l) factor[l] = exponential(before[l] - shift[l]);
    for (int64_t l = 0; l < kPanel<A>; ++l) total[l] *= factor[l];
    for_rows(tile, range, seen, [&](int64_t, A* cells, auto&&) MMK_LAMBDA {
      for (int64_t l = 0; l < kPanel<A>; ++l) cells[l] = exponential(cells[l] - shift[l]);
      for (int64_t l = 0; l < kPanel<A>; ++l) total[l] += cells[l];
    });
    for (int64_t l = 0; l < kPanel<A>; ++l) {
      if (factor[l] == A(1) || before[l] == kLowest) continue;  // no sums yet: they are 0
      A* of_lane = sums + l * size;
      for (int64_t c = 0; c < size; c += kLanes<A>) store(of_lane + c, load(of_lane + c) * factor[l]);
    }
  }
};

// Writes factor * sums, in the order of memory [frame][head].
template <class T>
MMK_INLINE void write(void* out, const SegmentAttentionShape& shape, int64_t heads, const Block& block,
                      int64_t lane, const acc_t<T>* sums, acc_t<T> factor) {
  using A = acc_t<T>;
  const int64_t frame = block.first + lane;
  if (frame >= shape.frames) return;
  T* to = at<T>(out, ((block.row * shape.frames + frame) * heads + block.head) * shape.size);
  const A* from = sums + lane * shape.size;
  if (lane >= block.frames) {
    std::fill_n(to, shape.size, T{});
  } else if (shape.size * static_cast<int64_t>(sizeof(T)) % 64 == 0 &&
             reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    // Whole cache lines need not be read before they are written.
    for (int64_t c = 0; c < shape.size; c += kLanes<A>) store_streaming(to + c, load(from + c) * factor);
  } else {
    for (int64_t c = 0; c < shape.size; c += kLanes<A>) store(to + c, load(from + c) * factor);
  }
}

template <class T>
MMK_INLINE void forward_block(const SegmentAttentionForward& args, Scratch<acc_t<T>>& scratch,
                              int64_t index) {
  using A = acc_t<T>;
  const SegmentAttentionShape& shape = args.shape;
  const int64_t size = shape.size;
  const Block block = block_at(shape, args.extents, shape.heads, index);
  const int32_t* extents = args.extents + block.row * 2 * shape.frames;
  const int64_t key_head = block.head / (shape.heads / shape.key_heads);
  const View<T> q = view<T>(args.q, block.row, block.head);
  const View<T> k = view<T>(args.k, block.row, key_head), v = view<T>(args.v, block.row, key_head);
  Softmax<A> softmax[kPanels<A>];
  const int64_t panels = (block.frames + kPanel<A> - 1) / kPanel<A>;
  if (block.frames > 0) {
    see_keys(scratch, block, extents);
    for (int64_t p = 0; p < panels; ++p) {
      pack_panel(q, block.first + p * kPanel<A>, scratch.seen[p], size, static_cast<A>(args.scale),
                 scratch.packed + p * kPanel<A> * size);
      softmax[p].start();
    }
    std::fill_n(scratch.sums, panels * kPanel<A> * size, A(0));
    for_pieces(first_key(extents, block.first), block.first + block.frames, [&](Range piece) MMK_LAMBDA {
      const View<A> keys = widened(k, piece, size, scratch.rows);
      const View<A> values = widened(v, piece, size, scratch.other_rows);
      for (int64_t p = 0; p < panels; ++p) {
        const Seen<A>& seen = scratch.seen[p];
        const Range range = both(piece, seen.all);
        if (range.first >= range.last) continue;
        A* sums = scratch.sums + p * kPanel<A> * size;
        score(keys, range, scratch.packed + p * kPanel<A> * size, size, scratch.tile);
        softmax[p].add(scratch.tile, range, seen, sums, size);
        add_rows(sums, size, values, range, seen, scratch.tile);
      }
    });
  }
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    const Softmax<A>& of_lane = softmax[lane / kPanel<A>];
    const bool empty = lane >= block.frames;
    const A total = empty ? A(1) : of_lane.total[lane % kPanel<A>];
    write<T>(args.out, shape, shape.heads, block, lane, scratch.sums, A(1) / total);
    if (args.lse != nullptr && block.first + lane < shape.frames) {
      A* lse = at<A>(args.lse, (block.row * shape.heads + block.head) * shape.frames + block.first + lane);
      *lse = empty ? A(0) : of_lane.largest[lane % kPanel<A>] + std::log(total);
    }
  }
}

// Replaces scores by probabilities, and the products of gradients and values by the gradients of the scores.
// lse(row, lane) and dot(row, lane) are those of the query of the pair.
template <class A, class Lse, class Dot>
MMK_INLINE void differentiate(A* tile, A* other, Range range, const Seen<A>& seen, Lse&& lse, Dot&& dot) {
  for_rows(tile, range, seen, [&](int64_t frame, A* cells, auto&& sees) MMK_LAMBDA {
    A* products = other + (cells - tile);
    for (int64_t l = 0; l < kPanel<A>; ++l) {
      const A p = exponential(cells[l] - lse(frame, l));
      cells[l] = sees(l) ? p : A(0);
      const A gradient = p * (products[l] - dot(frame, l));
      products[l] = sees(l) ? gradient : A(0);
    }
  });
}

// dots[lane] = a[lane] . b[lane] of packed panels, in the order in which score() adds: for a query that sees
// one key the gradient of its score, a product minus its dot, is then exactly 0.
template <class A>
MMK_INLINE void dot_panels(const A* a, const A* b, int64_t size, A* dots) {
  vec_t<A> low = {}, high = {};
  for (int64_t c = 0; c < size; ++c, a += kPanel<A>, b += kPanel<A>) {
    low += load(a) * load(b);
    high += load(a + kLanes<A>) * load(b + kLanes<A>);
  }
  store(dots, low);
  store(dots + kLanes<A>, high);
}

// As differentiate, for a tile with all rows that its lanes see: also computes dots, as sums of the tile.
// They have the rounding errors of its products, which then cancel where few keys are seen.
template <class A>
MMK_INLINE void differentiate_whole(A* tile, A* other, Range range, const Seen<A>& seen, const A* lse,
                                    A* dots) {
  A total[kPanel<A>] = {};
  std::fill_n(dots, kPanel<A>, A(0));
  for_rows(tile, range, seen, [&](int64_t, A* cells, auto&& sees) MMK_LAMBDA {
    const A* products = other + (cells - tile);
    for (int64_t l = 0; l < kPanel<A>; ++l) {
      const A p = exponential(cells[l] - lse[l]);
      cells[l] = sees(l) ? p : A(0);
      total[l] += cells[l];
      dots[l] += sees(l) ? p * products[l] : A(0);
    }
  });
  for (int64_t l = 0; l < kPanel<A>; ++l) dots[l] /= total[l] == A(0) ? A(1) : total[l];
  for_rows(tile, range, seen, [&](int64_t, A* cells, auto&& sees) MMK_LAMBDA {
    A* products = other + (cells - tile);
    for (int64_t l = 0; l < kPanel<A>; ++l) {
      products[l] = sees(l) ? cells[l] * (products[l] - dots[l]) : A(0);
    }
  });
}

template <class T>
MMK_INLINE void query_block(const SegmentAttentionBackward& args, Scratch<acc_t<T>>& scratch, int64_t index) {
  using A = acc_t<T>;
  const SegmentAttentionShape& shape = args.shape;
  const int64_t size = shape.size;
  const Block block = block_at(shape, args.extents, shape.heads, index);
  const int32_t* extents = args.extents + block.row * 2 * shape.frames;
  const int64_t key_head = block.head / (shape.heads / shape.key_heads);
  const View<T> q = view<T>(args.q, block.row, block.head), grad = view<T>(args.grad, block.row, block.head);
  const View<T> k = view<T>(args.k, block.row, key_head), v = view<T>(args.v, block.row, key_head);
  const View<T> out = view<T>(args.out, block.row, block.head);
  const int64_t place = (block.row * shape.heads + block.head) * shape.frames + block.first;
  A lse[kBlock] = {}, dots[kBlock] = {};
  bool whole[kPanels<A>] = {};  // panels whose keys fit one tile
  std::copy_n(at<A>(args.lse, place), block.frames, lse);
  const int64_t panels = (block.frames + kPanel<A> - 1) / kPanel<A>;
  if (block.frames > 0) {
    see_keys(scratch, block, extents);
    for (int64_t p = 0; p < panels; ++p) {
      const Seen<A>& seen = scratch.seen[p];
      const int64_t first = block.first + p * kPanel<A>, at = p * kPanel<A> * size;
      A *sums = scratch.sums + at, *of_dots = dots + p * kPanel<A>;
      pack_panel(grad, first, seen, size, A(1), scratch.other_packed + at);
      pack_panel(q, first, seen, size, static_cast<A>(args.scale), scratch.packed + at);
      if constexpr (sizeof(T) == sizeof(A)) {
        whole[p] = seen.all.last - seen.all.first <= kBlock;
        if (whole[p]) {
          score(k, seen.all, scratch.packed + at, size, scratch.tile);
          score(v, seen.all, scratch.other_packed + at, size, scratch.other_tile);
          differentiate_whole(scratch.tile, scratch.other_tile, seen.all, seen, lse + p * kPanel<A>, of_dots);
          std::fill_n(sums, kPanel<A> * size, A(0));
          if (args.dq != nullptr) add_rows(sums, size, k, seen.all, seen, scratch.other_tile);
          continue;
        }
      }
      pack_panel(out, first, seen, size, A(1), sums);
      dot_panels(scratch.other_packed + at, sums, size, of_dots);
      std::fill_n(sums, kPanel<A> * size, A(0));
    }
  }
  std::copy_n(dots, block.frames, at<A>(args.dots, place));
  if (args.dq == nullptr) return;
  if (block.frames > 0) {
    for_pieces(first_key(extents, block.first), block.first + block.frames, [&](Range piece) MMK_LAMBDA {
      const View<A> keys = widened(k, piece, size, scratch.rows);
      const View<A> values = widened(v, piece, size, scratch.other_rows);
      for (int64_t p = 0; p < panels; ++p) {
        const Seen<A>& seen = scratch.seen[p];
        const Range range = both(piece, seen.all);
        if (whole[p] || range.first >= range.last) continue;
        const int64_t at = p * kPanel<A> * size;
        score(keys, range, scratch.packed + at, size, scratch.tile);
        score(values, range, scratch.other_packed + at, size, scratch.other_tile);
        const A *of_lse = lse + p * kPanel<A>, *of_dots = dots + p * kPanel<A>;
        differentiate(
            scratch.tile, scratch.other_tile, range, seen,
            [&](int64_t, int64_t l) MMK_LAMBDA { return of_lse[l]; },
            [&](int64_t, int64_t l) MMK_LAMBDA { return of_dots[l]; });
        add_rows(scratch.sums + at, size, keys, range, seen, scratch.other_tile);
      }
    });
  }
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    write<T>(args.dq, shape, shape.heads, block, lane, scratch.sums, static_cast<A>(args.scale));
  }
}

template <class T>
MMK_INLINE void key_block(const SegmentAttentionBackward& args, Scratch<acc_t<T>>& scratch, int64_t index) {
  using A = acc_t<T>;
  const SegmentAttentionShape& shape = args.shape;
  const int64_t size = shape.size;
  const Block block = block_at(shape, args.extents, shape.key_heads, index);
  const int32_t* extents = args.extents + block.row * 2 * shape.frames;
  const int64_t sharing = shape.heads / shape.key_heads;
  const int64_t panels = (block.frames + kPanel<A> - 1) / kPanel<A>;
  const bool need_k = args.dk != nullptr, need_v = args.dv != nullptr;
  if (block.frames > 0) {
    const View<T> k = view<T>(args.k, block.row, block.head), v = view<T>(args.v, block.row, block.head);
    see_queries(scratch, block, extents, shape.frames);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = block.first + p * kPanel<A>, at = p * kPanel<A> * size;
      pack_panel(k, first, scratch.seen[p], size, static_cast<A>(args.scale), scratch.packed + at);
      if (need_k) pack_panel(v, first, scratch.seen[p], size, A(1), scratch.other_packed + at);
    }
    std::fill_n(scratch.sums, panels * kPanel<A> * size, A(0));
    std::fill_n(scratch.other_sums, panels * kPanel<A> * size, A(0));
    const int64_t stop = query_stop(extents, shape.frames, block.first + block.frames - 1);
    for (int64_t head = block.head * sharing; head < (block.head + 1) * sharing; ++head) {
      const View<T> q = view<T>(args.q, block.row, head), grad = view<T>(args.grad, block.row, head);
      const int64_t place = (block.row * shape.heads + head) * shape.frames;
      const A *lse = at<A>(args.lse, place), *dots = at<A>(static_cast<const void*>(args.dots), place);
      for_pieces(block.first, stop, [&](Range piece) MMK_LAMBDA {
        const View<A> queries = widened(q, piece, size, scratch.rows);
        const View<A> grads = widened(grad, piece, size, scratch.other_rows);
        for (int64_t p = 0; p < panels; ++p) {
          const Seen<A>& seen = scratch.seen[p];
          const Range range = both(piece, seen.all);
          if (range.first >= range.last) continue;
          const int64_t at = p * kPanel<A> * size;
          score(queries, range, scratch.packed + at, size, scratch.tile);
          if (need_k) score(grads, range, scratch.other_packed + at, size, scratch.other_tile);
          differentiate(
              scratch.tile, scratch.other_tile, range, seen,
              [&](int64_t frame, int64_t) MMK_LAMBDA { return lse[frame]; },
              [&](int64_t frame, int64_t) MMK_LAMBDA { return dots[frame]; });
          if (need_v) add_rows(scratch.other_sums + at, size, grads, range, seen, scratch.tile);
          if (need_k) add_rows(scratch.sums + at, size, queries, range, seen, scratch.other_tile);
        }
      });
    }
  }
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    const A scale = static_cast<A>(args.scale);
    if (need_k) write<T>(args.dk, shape, shape.key_heads, block, lane, scratch.sums, scale);
    if (need_v) write<T>(args.dv, shape, shape.key_heads, block, lane, scratch.other_sums, A(1));
  }
}

}  // namespace

void segment_extents(const int64_t* ends, int64_t segments, int64_t frames, int64_t lookback,
                     int32_t* extents) {
  int32_t *starts = extents, *stops = extents + frames;
  int64_t frame = 0;
  int64_t key = 0;  // the first key whose stop is not known yet
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t stop = std::min(std::max(ends[segment], frame), frames);
    if (stop == frame) continue;
    const int64_t start = std::max<int64_t>(frame - std::min(lookback, frames), 0);
    std::fill(starts + frame, starts + stop, static_cast<int32_t>(start));
    // Keys before `start` are not seen from here on.
    for (; key < start; ++key) stops[key] = static_cast<int32_t>(frame);
    frame = stop;
  }
  for (; key < frame; ++key) stops[key] = static_cast<int32_t>(frame);
  std::fill(starts + frame, starts + frames, static_cast<int32_t>(frames));
  std::fill(stops + frame, stops + frames, 0);
}

int64_t AttentionPlan::index_of(int64_t at) const {
  return std::lower_bound(begin.begin(), begin.end() - 1, at) - begin.begin();
}

AttentionPlan plan_queries(const SegmentAttentionShape& shape, const int32_t* extents) {
  return plan<true>(shape, extents);
}
AttentionPlan plan_keys(const SegmentAttentionShape& shape, const int32_t* extents) {
  return plan<false>(shape, extents);
}

MMK_MULTIARCH void segment_attention_forward(const SegmentAttentionForward& args, int64_t begin,
                                             int64_t end) {
  dispatch(args.shape.dtype, [&](auto element) MMK_LAMBDA {
    using T = decltype(element);
    Scratch<acc_t<T>> scratch(args.shape.size);
    for (int64_t i = begin; i < end; ++i) forward_block<T>(args, scratch, i);
    finish_streaming();
  });
}

MMK_MULTIARCH void segment_attention_backward_queries(const SegmentAttentionBackward& args, int64_t begin,
                                                      int64_t end) {
  dispatch(args.shape.dtype, [&](auto element) MMK_LAMBDA {
    using T = decltype(element);
    Scratch<acc_t<T>> scratch(args.shape.size);
    for (int64_t i = begin; i < end; ++i) query_block<T>(args, scratch, i);
    finish_streaming();
  });
}

MMK_MULTIARCH void segment_attention_backward_keys(const SegmentAttentionBackward& args, int64_t begin,
                                                   int64_t end) {
  dispatch(args.shape.dtype, [&](auto element) MMK_LAMBDA {
    using T = decltype(element);
    Scratch<acc_t<T>> scratch(args.shape.size);
    for (int64_t i = begin; i < end; ++i) key_block<T>(args, scratch, i);
    finish_streaming();
  });
}

}  // namespace mmk::cpu
