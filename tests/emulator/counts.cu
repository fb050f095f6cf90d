// What the emulator counts: matrix multiplications, bank conflicts of ldmatrix, copied bytes.
#include "cases.h"

#if !defined(__CUDACC__)
extern "C" const void* dalle_emulator_counts();

namespace counting {

using cases::Buffer;
using cases::expect;
using cases::finish;
using dalle::launch;

struct Counts {
  uint64_t blocks, barriers, mma, ldmatrix, conflicts, copied_bytes;
};

// Rows of 128 bytes, 16-byte columns swizzled by the row or not.
template <bool kSwizzled>
__global__ void multiply_tiles(const uint4* in, float* out) {
  DALLE_SHARED(uint4, tile, [32][8]);
  const int lane = static_cast<int>(threadIdx.x);
  const auto column = [](int row, int c) { return kSwizzled ? c ^ (row % 8) : c; };
  for (int c = 0; c < 8; ++c) {
    dalle::cp_async<16>(&tile[lane][column(lane, c)], in + lane * 8 + c, c < 7 ? 16 : 4);
  }
  dalle::cp_async_commit();
  dalle::cp_async_wait<0>();
  __syncthreads();
  float d[4] = {};
  for (int c = 0; c < 4; ++c) {
    uint32_t a[4], b[2];
    dalle::ldmatrix(a, &tile[lane][column(lane, c)]);
    dalle::ldmatrix_trans(b, &tile[lane][column(lane, c + 4)]);
    dalle::mma_m16n8k16<__half>(d, a, b);
  }
  out[blockIdx.x * 32 + threadIdx.x] = d[0];
}
template <bool kSwizzled>
void run_counts(uint64_t conflicts) {
  Buffer<uint4> in(32 * 8);
  Buffer<float> out(3 * 32);
  finish(launch(multiply_tiles<kSwizzled>, 3, 32, 0, nullptr, in.data(), out.data()));
  const auto& got = *static_cast<const Counts*>(dalle_emulator_counts());
  expect(got.blocks == 3 && got.barriers == 3, "blocks and barriers");
  expect(got.mma == 3 * 4, "multiplications");
  expect(got.ldmatrix == 3 * 4 * (4 + 2), "matrices");
  expect(got.copied_bytes == 3 * 32 * (7 * 16 + 4), "copied bytes");
  expect(got.conflicts == conflicts, "conflicts");
}
CASE(counts_without_swizzle) { run_counts<false>(3 * 4 * (4 + 2) * 7); }
CASE(counts_with_swizzle) { run_counts<true>(0); }

}  // namespace counting
#endif
