// ldmatrix and movmatrix: 8 x 8 matrices of 16-bit elements, from shared memory or transposed
// between lanes.
#include <bit>
#include <cstring>

#include "emulator/block.h"

namespace dalle::emulator {
namespace {

// Bank conflicts of 8 rows of 16 bytes: accesses beyond the first. One access serves 128 bytes,
// each group of four banks once.
template <typename RowOf>
uint64_t bank_conflicts(const RowOf& row_of) {
  int rows_of_banks[8] = {}, most = 0;
  for (int r = 0; r < 8; ++r) {
    int& rows = rows_of_banks[reinterpret_cast<uintptr_t>(row_of(r)) / 16 % 8];
    bool is_new = true;
    for (int before = 0; before < r; ++before) is_new = is_new && row_of(before) != row_of(r);
    rows += is_new;
    most = rows > most ? rows : most;
  }
  return static_cast<uint64_t>(most - 1);
}

}  // namespace

void ldmatrix(uint32_t* words, int count, bool transposed, const void* row, Location location) {
  struct Operands {
    uint32_t* words;
    const unsigned char* row;
    int count;
    bool transposed;
  };
  if (block.running->id % kWarpSize < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
      fail("ldmatrix: a row must be 16-byte aligned", location);
    if (!array_containing(row, 16)) fail("ldmatrix from outside of shared memory", location);
    race_access(row, 16, Access::kRead, "ldmatrix", location);
  }
  Operands operands = {words, static_cast<const unsigned char*>(row), count, transposed};
  const auto finish = [](void* const* arguments, uint32_t lanes) {
    require_warp("ldmatrix", lanes);
    const auto of = [&](int lane) { return static_cast<Operands*>(arguments[lane]); };
    const int matrices = of(0)->count;
    const bool transposed = of(0)->transposed;
    for (int i = 0; i < matrices; ++i) {
      ++counts.ldmatrix;
      counts.conflicts += bank_conflicts([&](int r) { return of(8 * i + r)->row; });
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < matrices; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
          const int at_row = transposed ? 2 * t + j : g, at_column = transposed ? g : 2 * t + j;
          std::memcpy(&pair[j], of(8 * i + at_row)->row + 2 * at_column, 2);
        }
        of(lane)->words[i] = pair[0] | uint32_t{pair[1]} << 16;
      }
    }
  };
  constexpr const char* kNames[] = {"ldmatrix.x1", "ldmatrix.x2", "ldmatrix.x4"};
  constexpr const char* kTransposedNames[] = {"ldmatrix.x1.trans", "ldmatrix.x2.trans",
                                              "ldmatrix.x4.trans"};
  rendezvous((transposed ? kTransposedNames : kNames)[count / 2], kAllLanes, &operands, finish,
             location);
}

uint32_t movmatrix_trans(uint32_t word, Location location) {
  struct Operands {
    uint32_t word, result;
  } operands = {word, 0};
  const auto finish = [](void* const* arguments, uint32_t lanes) {
    require_warp("movmatrix", lanes);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      uint32_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int from = (2 * t + j) * 4 + g / 2;  // row 2t + j, column g
        pair[j] = static_cast<Operands*>(arguments[from])->word >> (g % 2 * 16) & 0xffff;
      }
      static_cast<Operands*>(arguments[lane])->result = pair[0] | pair[1] << 16;
    }
  };
  rendezvous("movmatrix", kAllLanes, &operands, finish, location);
  return operands.result;
}

}  // namespace dalle::emulator
