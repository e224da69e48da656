// Float32 matrix products on the tiles of the processor (Intel AMX).
//
// Tiles multiply bfloat16, with sums in float32, sixteen times as fast as the vector
// units multiply float32. A float32 has 24 bits and a bfloat16 has 8, so
//
//     x = x0 + x1 + x2,    |x1| <= 2^-8 |x|,    |x2| <= 2^-17 |x|,
//
// exactly, each part being what the parts before it left over, rounded; and
//
//     a b = a0 b0 + (a0 b1 + a1 b0) + (a0 b2 + a1 b1 + a2 b0) + less than 2^-23 |a b|,
//
// so that six products of tiles make one with the range and the rounding of float32.
// (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype
// for higher-precision computations", 2019.)
//
// What is infinite or undefined has no such parts: `product` refuses it. Tiles take
// denormal numbers for 0: numbers and products below 2^-102 keep fewer bits than 24.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Int = int64_t;

// A matrix in memory: number (i, j) is at data[i * down + j * right].
struct Matrix {
  const float* data;
  Int down, right;
  Matrix at(Int i, Int j) const {
    return {data + i * down + j * right, down, right};
  }
};

}  // namespace

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace tiles {

// A tile has 16 lines of 16 pairs. A line of the left side belongs to one row of it, a
// place of the right side to one column. Which numbers make a pair does not matter if
// both sides have it so: here number p of 32 and number p + 16.
constexpr Int LINES = 16, STEP = 32, PARTS = 3;
using Number = uint16_t;                  // a bfloat16
constexpr Int TILE = LINES * STEP;        // numbers
constexpr Int NEXT = STEP * sizeof(Number);  // bytes from line to line
constexpr Int DEPTH = 4 * STEP;           // that is summed in one go
constexpr Int HEIGHT = 512, WIDTH = 512;  // of a block: both sides stay in cache

// Whether the system lets this process use them, in all of its threads.
inline bool available() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}

// All eight tiles at full size, as long as it lives.
struct Configuration {
  Configuration() {
    struct Sizes {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    // Not on the stack: g++ knows of the first 8 bytes alone that they are read.
    alignas(64) static constexpr Sizes all;
    _tile_loadconfig(&all);
  }
  ~Configuration() { _tile_release(); }
};

inline Int up(Int number, Int unit) { return (number + unit - 1) / unit * unit; }

inline __mmask16 first(Int n) {
  return static_cast<__mmask16>((1u << std::clamp<Int>(n, 0, 16)) - 1);
}

// Writes the three parts of pairs of numbers to one line of three tiles. Where one is
// infinite, undefined or next to it, so is `undefined` afterwards.
inline void split(__m512 x, __m512 y, Number* to, __m512& undefined) {
  auto bits = [](__m512 v) { return _mm512_castps_si512(v); };
  auto upper = [](__m512i v) {
    return _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  };
  auto write = [&](__m512 u, __m512 v) {
    __m512i pair = _mm512_or_si512(_mm512_srli_epi32(bits(u), 16), upper(bits(v)));
    _mm512_store_si512(to, pair);
    to += TILE;
  };
  auto rounded = [&](__m512 v) {
    __m512i up = _mm512_add_epi32(bits(v), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(upper(up));
  };
  for (Int part = 1; part < PARTS; part++) {
    __m512 u = rounded(x), v = rounded(y);
    write(u, v);
    x = _mm512_sub_ps(x, u);
    y = _mm512_sub_ps(y, v);
  }
  write(x, y);  // no more than 8 bits are left: the upper ones, if not denormal
  undefined = _mm512_add_ps(undefined, _mm512_add_ps(x, y));
}

// Transposes 16 lines of 16 numbers.
inline void transpose(__m512 a[]) {
  __m512 b[LINES];
  for (Int i = 0; i < LINES; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (Int i = 0; i < LINES; i += 4)
    for (Int j = 0; j < 2; j++) {
      __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  // Quarters of lines 4 apart, and then of lines 8 apart.
  for (Int i = 0; i < LINES; i += 8)
    for (Int j = i; j < i + 4; j++) {
      b[j] = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88);
      b[j + 4] = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
    }
  for (Int j = 0; j < 8; j++) {
    a[j] = _mm512_shuffle_f32x4(b[j], b[j + 8], 0x88);
    a[j + 8] = _mm512_shuffle_f32x4(b[j], b[j + 8], 0xdd);
  }
}

// Writes one side to its tiles, [strip][step][part], with 0 for what is missing: a strip
// is 16 lines, rows of the left or columns of the right side, and a step 32 numbers of
// each. Number k of line i is at side.at(i, k).
inline void pack(
    Matrix side, Int lines, Int depth, bool left, Number* to, __m512& undefined) {
  bool in_line = side.right == 1;  // or else lines lie beside each other
  Int strips = up(lines, LINES) / LINES, steps = up(depth, STEP) / STEP;
  for (Int tile = 0; tile < strips * steps; tile++) {
    // In the order of memory.
    Int strip = in_line ? tile / steps : tile % strips;
    Int step = in_line ? tile % steps : tile / strips;
    Matrix part = side.at(strip * LINES, step * STEP);
    Int high = lines - strip * LINES, deep = depth - step * STEP;
    auto line = [&](Int i) {
      if (in_line) {  // the first or the second half of each
        Int half = i / LINES * LINES, which = i % LINES;
        __mmask16 in = which < high ? first(deep - half) : 0;
        return _mm512_maskz_loadu_ps(in, part.at(which, half).data);
      }
      __mmask16 in = i < deep ? first(high) : 0;
      return _mm512_maskz_loadu_ps(in, part.at(0, i).data);
    };
    Number* own = to + (strip * steps + step) * PARTS * TILE;
    if (in_line == left) {
      for (Int i = 0; i < LINES; i++)
        split(line(i), line(i + LINES), own + i * STEP, undefined);
    } else {
      __m512 x[LINES], y[LINES];
      for (Int i = 0; i < LINES; i++) x[i] = line(i);
      transpose(x);
      for (Int i = 0; i < LINES; i++) y[i] = line(i + LINES);
      transpose(y);
      for (Int i = 0; i < LINES; i++) split(x[i], y[i], own + i * STEP, undefined);
    }
  }
}

// Adds the product of one or two strips of the left side and two of the right, or begins
// with it. A product of tiles takes 16 cycles and its sum is there after 52, so it needs
// four sums to be busy all the time; and each tile is used twice when it is loaded.
template <bool TWO>
inline void multiply(
    const Number* left, const Number* right, Int second, Int depth, float* c, Int next,
    bool add) {
  Int row = next * sizeof(float);
  float* below = c + LINES * next;
  // Numbers of tiles have to be written as such: 0 to 3 are sums, 4 and 5 of the left
  // side, 6 and 7 of the right.
  if (add) {
    _tile_loadd(0, c, row);
    _tile_loadd(1, c + LINES, row);
    if constexpr (TWO) {
      _tile_loadd(2, below, row);
      _tile_loadd(3, below + LINES, row);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  auto load_left = [&](Int part) {
    _tile_loadd(4, left + part * TILE, NEXT);
    if constexpr (TWO) _tile_loadd(5, left + second + part * TILE, NEXT);
  };
  auto load_right = [&](Int part) {
    _tile_loadd(6, right + part * TILE, NEXT);
    _tile_loadd(7, right + second + part * TILE, NEXT);
  };
  auto add_products = [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TWO) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  };
  for (Int k = 0; k < depth; k += STEP, left += PARTS * TILE, right += PARTS * TILE) {
    // The six products, so that from one to the next only one side is loaded.
    load_left(1), load_right(1), add_products();
    load_right(0), add_products();
    load_left(2), add_products();
    load_left(0), add_products();
    load_right(1), add_products();
    load_right(2), add_products();
  }
  _tile_stored(0, c, row);
  _tile_stored(1, c + LINES, row);
  if constexpr (TWO) {
    _tile_stored(2, below, row);
    _tile_stored(3, below + LINES, row);
  }
}

// Room for so many numbers, at the beginning of a cache line.
inline Number* room(std::vector<Number>& memory, Int numbers) {
  if (static_cast<Int>(memory.size()) < numbers + STEP) memory.resize(numbers + STEP);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<Number*>((address + 63) / 64 * 64);
}

// c = a @ b, in this thread, the rows of c `next` apart. False, with anything in c, if
// it is not for tiles: a side with neither rows nor columns, or numbers too large.
inline bool product(Int m, Int n, Int depth, Matrix a, Matrix b, float* c, Int next) {
  if ((a.down != 1 && a.right != 1) || (b.down != 1 && b.right != 1)) return false;
  static thread_local std::vector<Number> left_memory, right_memory;
  constexpr Int ROWS = 2 * LINES, COLUMNS = 2 * LINES;  // that are multiplied at once
  alignas(64) float edge[ROWS * COLUMNS];
  Configuration configuration;
  __m512 undefined = _mm512_setzero_ps();
  for (Int i0 = 0; i0 < m; i0 += HEIGHT) {
    Int height = std::min(HEIGHT, m - i0);
    for (Int k = 0; k < depth; k += DEPTH) {
      Int deep = std::min(DEPTH, depth - k), line = PARTS * up(deep, STEP);
      Number* left = room(left_memory, up(height, ROWS) * line);
      pack(a.at(i0, k), height, deep, true, left, undefined);
      for (Int j0 = 0; j0 < n; j0 += WIDTH) {
        Int width = std::min(WIDTH, n - j0);
        Number* right = room(right_memory, up(width, COLUMNS) * line);
        Matrix block = b.at(k, j0);
        block = {block.data, block.right, block.down};
        pack(block, width, deep, false, right, undefined);
        if (_mm512_cmp_ps_mask(undefined, undefined, _CMP_UNORD_Q)) return false;
        for (Int i = 0; i < height; i += ROWS)
          for (Int j = 0; j < width; j += COLUMNS) {
            float* to = c + (i0 + i) * next + j0 + j;
            Int down = std::min(ROWS, height - i);
            Int across = std::min(COLUMNS, width - j);
            // Of a part all is computed, from whatever lies there, and the rest dropped.
            bool whole = down == ROWS && across == COLUMNS;
            if (!whole && k > 0)
              for (Int r = 0; r < down; r++)
                std::copy_n(to + r * next, across, edge + r * COLUMNS);
            (down > LINES ? multiply<true> : multiply<false>)(
                left + i * line, right + j * line, LINES * line, deep,
                whole ? to : edge, whole ? next : COLUMNS, k > 0);
            if (!whole)
              for (Int r = 0; r < down; r++)
                std::copy_n(edge + r * COLUMNS, across, to + r * next);
          }
      }
    }
  }
  return true;
}

}  // namespace tiles

#else  // another processor, or another system

namespace tiles {

inline bool available() { return false; }
inline bool product(Int, Int, Int, Matrix, Matrix, float*, Int) { return false; }

}  // namespace tiles

#endif
