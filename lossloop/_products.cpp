// The operator lossloop::mm: float32 matrix products on tiles (_tiles.h, which stands
// before this), and without them by torch's own small kernels.
//
// torch brings oneDNN's "batch-reduce" kernels for its attention, generated for the
// processor at hand, and exports them. A call costs next to nothing and reads both
// sides row by row. What is left to do here: transpose what does not lie so, cut what
// is large into blocks that stay in cache, and share the blocks among threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

// Declared as in ATen/native/CPUBlas.h and fbgemm/Utils.h, which take ten seconds to
// compile. If another torch has them otherwise, this library cannot be loaded.
namespace at::native::cpublas {
void brgemm(
    int64_t m, int64_t n, int64_t k, int64_t next_a, int64_t next_b, int64_t next_c,
    bool add, const float* a, const float* b, float* c, bool is_vnni);
}
namespace fbgemm {
template <typename T>
void transpose_simd(
    int64_t rows, int64_t columns, const T* from, int64_t next_from, T* to,
    int64_t next_to);
}

namespace {

using torch::stable::Tensor;

constexpr Int SIDE = 128;          // of a block of the result
constexpr Int DEPTH = 512;         // that is summed in one go: 256 KB of each side
constexpr Int HEIGHT = 8 * SIDE;   // of the left side that is transposed at a time
constexpr Int NEAR = 256;          // rows so close together are read in place
constexpr double LEAST = 1 << 20;  // multiplications that are worth a thread
// Between the rows of a copy. What lies a power of 2 apart falls into the same few
// places of the cache, and transposing took three times as long.
constexpr Int GAP = 16;

// A copy of a part of the matrix, row by row.
Matrix packed(Matrix part, Int rows, Int columns, std::vector<float>& memory) {
  Int next = columns + GAP;
  if (static_cast<Int>(memory.size()) < rows * next) memory.resize(rows * next);
  float* to = memory.data();
  if (part.down == 1) {
    fbgemm::transpose_simd<float>(columns, rows, part.data, part.right, to, next);
    return {to, next, 1};
  }
  for (Int i = 0; i < rows; i++)
    if (part.right == 1)
      std::memcpy(to + i * next, part.at(i, 0).data, columns * sizeof(float));
    else
      for (Int j = 0; j < columns; j++) to[i * next + j] = *part.at(i, j).data;
  return {to, next, 1};
}

// c = a @ b, in this thread. The rows of c are `next` apart.
void product(Int m, Int n, Int depth, Matrix a, Matrix b, float* c, Int next) {
  if (tiles::available() && tiles::product(m, n, depth, a, b, c, next)) return;
  static thread_local std::vector<float> left, right;
  for (Int k = 0; k < depth; k += DEPTH) {
    Int deep = std::min(DEPTH, depth - k);
    for (Int i0 = 0; i0 < m; i0 += HEIGHT) {
      Int height = std::min(HEIGHT, m - i0);
      Matrix rows = a.at(i0, k);
      if (rows.right != 1 || rows.down < deep)
        rows = packed(rows, height, deep, left);
      for (Int j = 0; j < n; j += SIDE) {
        Int width = std::min(SIDE, n - j);
        Matrix columns = b.at(k, j);
        if (columns.right != 1 || columns.down > NEAR || columns.down < width)
          columns = packed(columns, deep, width, right);
        // Kernels for float32 set no state of the processor that were to be released.
        for (Int i = 0; i < height; i += SIDE)
          at::native::cpublas::brgemm(
              std::min(SIDE, height - i), width, deep, rows.down, columns.down, next,
              k > 0, rows.at(i, 0).data, columns.data, c + (i0 + i) * next + j, false);
      }
    }
  }
}

// Asks for large pages, before any is touched. malloc maps what is as large as this anew
// each time, and a gradient of 67 MB waited 20 ms for its 16,000 small pages. (What is
// smaller stays mapped: _malloc.py.)
void in_large_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t LEAST_BYTES = 1 << 25, PAGE = 1 << 21;
  auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  begin = (begin + PAGE - 1) / PAGE * PAGE;
  if (bytes >= LEAST_BYTES)
    madvise(reinterpret_cast<void*>(begin), end / PAGE * PAGE - begin, MADV_HUGEPAGE);
#endif
}

// a @ b, of two matrices or of two batches of matrices.
Tensor mm(Tensor a, Tensor b) {
  Int dims = a.dim(), batch = dims == 3 ? a.size(0) : 1;
  STD_TORCH_CHECK(
      (dims == 2 || dims == 3) && b.dim() == dims && (dims == 2 || b.size(0) == batch) &&
          a.size(dims - 1) == b.size(dims - 2) &&
          a.scalar_type() == torch::headeronly::ScalarType::Float &&
          b.scalar_type() == torch::headeronly::ScalarType::Float,
      "lossloop::mm: the sides do not fit, or are not of float32");
  Int m = a.size(dims - 2), depth = a.size(dims - 1), n = b.size(dims - 1);
  Int sizes[] = {batch, m, n}, strides[] = {m * n, n, 1};
  AtenTensorHandle handle;  // by way of the dispatcher it would take longer than the call
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes + 3 - dims, strides + 3 - dims, aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor c(handle);
  if (batch * m * n == 0) return c;
  auto result = static_cast<float*>(c.data_ptr());
  in_large_pages(result, batch * m * n * sizeof(float));
  if (depth == 0) {
    std::memset(result, 0, batch * m * n * sizeof(float));
    return c;
  }
  auto matrix = [&](const Tensor& t) {
    auto data = static_cast<const float*>(t.data_ptr());
    return Matrix{data, t.stride(dims - 2), t.stride(dims - 1)};
  };
  Matrix left = matrix(a), right = matrix(b);
  // The stride of a side of length 1 may be anything, which is no reason to copy.
  if (depth == 1) left.right = 1;
  if (n == 1) right.right = 1;
  Int next_left = dims == 3 ? a.stride(0) : 0, next_right = dims == 3 ? b.stride(0) : 0;

  // Each thread takes some of the matrices, or else rows or columns of each.
  double work = static_cast<double>(batch) * m * n * depth;
  Int threads = std::clamp<Int>(work / LEAST, 1, torch::stable::get_num_threads());
  Int parts = batch >= threads ? 1 : threads;
  bool across = n > m;
  Int size = across ? n : m, unit = 16;
  Int share = (size + parts * unit - 1) / (parts * unit) * unit;
  auto run = [&](Int begin, Int end) {
    for (Int task = begin; task < end; task++) {
      Int which = task / parts, from = task % parts * share;
      Int much = std::min(share, size - from);
      if (much <= 0) continue;
      Matrix l = left, r = right;
      l.data += which * next_left;
      r.data += which * next_right;
      float* to = result + which * m * n;
      if (across)
        product(m, much, depth, l, r.at(0, from), to + from, n);
      else
        product(much, n, depth, l.at(from, 0), r, to + from * n, n);
    }
  };
  Int tasks = batch * parts;
  if (threads == 1)
    run(0, tasks);
  else
    torch::stable::parallel_for(0, tasks, (tasks + threads - 1) / threads, run);
  return c;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lossloop, CPU, library) {
  library.impl("mm", TORCH_BOX(&mm));
}
