// Warp collectives: each lane leaves a pointer to its operands, the last one computes for all.
#include <bit>
#include <cstring>

#include "emulator/block.h"

namespace dalle::emulator {
namespace {

constexpr uint64_t kUndefined = ~uint64_t{0};  // NaN where CUDA leaves a value undefined

int running_lane() { return block.running->id % kLanes; }

struct ShuffleOperands {
  uint64_t word, result;
  Shuffle kind;
  int operand, width;
};

// The lane that `lane` reads, itself where the source leaves its segment.
int source_lane(const ShuffleOperands& x, int lane) {
  const int segment = lane & ~(x.width - 1), last = segment + x.width - 1;
  switch (x.kind) {
    case Shuffle::kIndex:
      return segment + (x.operand & (x.width - 1));
    case Shuffle::kUp:
      return lane - x.operand < segment ? lane : lane - x.operand;
    case Shuffle::kDown:
      return lane + x.operand > last ? lane : lane + x.operand;
    case Shuffle::kXor:
      return (lane ^ x.operand) > last ? lane : lane ^ x.operand;
  }
  return lane;
}

void finish_shuffle(void* const* arguments, uint32_t lanes) {
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    auto& x = *static_cast<ShuffleOperands*>(arguments[lane]);
    const int from = source_lane(x, lane);
    const bool takes_part = lanes >> from & 1;
    x.result = takes_part ? static_cast<ShuffleOperands*>(arguments[from])->word : kUndefined;
  }
}

struct WordOperands {
  uint32_t word, result;
  Reduce kind;
  bool is_signed;
};

void finish_ballot(void* const* arguments, uint32_t lanes) {
  uint32_t result = 0;
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    result |= (static_cast<WordOperands*>(arguments[lane])->word ? 1u : 0u) << lane;
  }
  for (uint32_t left = lanes; left; left &= left - 1) {
    static_cast<WordOperands*>(arguments[std::countr_zero(left)])->result = result;
  }
}

uint32_t reduce_pair(const WordOperands& rule, uint32_t a, uint32_t b) {
  const bool less = rule.is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
  switch (rule.kind) {
    case Reduce::kAdd:
      return a + b;
    case Reduce::kMinimum:
      return less ? a : b;
    case Reduce::kMaximum:
      return less ? b : a;
    case Reduce::kAnd:
      return a & b;
    case Reduce::kOr:
      return a | b;
    case Reduce::kXor:
      return a ^ b;
  }
  return a;
}

void finish_reduce(void* const* arguments, uint32_t lanes) {
  const auto& first = *static_cast<WordOperands*>(arguments[std::countr_zero(lanes)]);
  uint32_t total = first.word;
  for (uint32_t left = lanes & (lanes - 1); left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    total = reduce_pair(first, total, static_cast<WordOperands*>(arguments[lane])->word);
  }
  for (uint32_t left = lanes; left; left &= left - 1) {
    static_cast<WordOperands*>(arguments[std::countr_zero(left)])->result = total;
  }
}

// The .sync.aligned instructions are undefined unless all 32 lanes run them.
void require_warp(const char* what, uint32_t lanes) {
  if (lanes != kAllLanes) {
    fail(std::string(what) + " needs all 32 lanes, got " + std::to_string(std::popcount(lanes)));
  }
}

// Turns that 8 rows of 16 bytes cost beyond one: shared memory serves 128 bytes a turn, each of its
// 16-byte columns once.
template <typename RowOf>
uint64_t bank_conflicts(const RowOf& row_of) {
  int rows_in_column[8] = {}, most = 0;
  for (int r = 0; r < 8; ++r) {
    int& rows = rows_in_column[reinterpret_cast<uintptr_t>(row_of(r)) / 16 % 8];
    bool is_new = true;
    for (int before = 0; before < r; ++before) is_new = is_new && row_of(before) != row_of(r);
    rows += is_new;
    most = rows > most ? rows : most;
  }
  return static_cast<uint64_t>(most - 1);
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t lanes, uint64_t word, int operand, int width, Place place) {
  if (width < 1 || width > kLanes || (width & (width - 1))) {
    fail("a shuffle's width must be a power of two up to 32, got " + std::to_string(width), place);
  }
  ShuffleOperands operands = {word, kUndefined, kind, operand, width};
  constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                    "__shfl_xor_sync"};
  meet(kNames[static_cast<int>(kind)], lanes, &operands, &finish_shuffle, place);
  return operands.result;
}

uint32_t ballot(uint32_t lanes, int predicate, Place place) {
  WordOperands operands = {predicate != 0, 0, Reduce::kAdd, false};
  meet("a vote", lanes, &operands, &finish_ballot, place);
  return operands.result;
}

uint32_t reduce(Reduce kind, bool is_signed, uint32_t lanes, uint32_t word, Place place) {
  WordOperands operands = {word, 0, kind, is_signed};
  meet("__reduce_sync", lanes, &operands, &finish_reduce, place);
  return operands.result;
}

void ldmatrix(uint32_t* words, int count, bool transposed, const void* row, Place place) {
  struct Operands {
    uint32_t* words;
    const unsigned char* row;
    int count;
    bool transposed;
  };
  if (running_lane() < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
      fail("ldmatrix: a row must be 16-byte aligned", place);
    if (!array_around(row, 16)) fail("ldmatrix from outside of shared memory", place);
    race_access(row, 16, Access::kRead, "ldmatrix", place);
  }
  Operands operands = {words, static_cast<const unsigned char*>(row), count, transposed};
  const auto finish = [](void* const* arguments, uint32_t lanes) {
    require_warp("ldmatrix", lanes);
    const auto of = [&](int lane) { return static_cast<Operands*>(arguments[lane]); };
    const int matrices = of(0)->count;
    const bool turned = of(0)->transposed;
    for (int i = 0; i < matrices; ++i) {
      ++counts.ldmatrix;
      counts.conflicts += bank_conflicts([&](int r) { return of(8 * i + r)->row; });
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < matrices; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
          const int at_row = turned ? 2 * t + j : g, at_column = turned ? g : 2 * t + j;
          std::memcpy(&pair[j], of(8 * i + at_row)->row + 2 * at_column, 2);
        }
        of(lane)->words[i] = pair[0] | uint32_t{pair[1]} << 16;
      }
    }
  };
  constexpr const char* kNames[] = {"ldmatrix.x1", "ldmatrix.x2", "ldmatrix.x4"};
  constexpr const char* kTurnedNames[] = {"ldmatrix.x1.trans", "ldmatrix.x2.trans",
                                          "ldmatrix.x4.trans"};
  meet((transposed ? kTurnedNames : kNames)[count / 2], kAllLanes, &operands, finish, place);
}

uint32_t movmatrix_trans(uint32_t word, Place place) {
  struct Operands {
    uint32_t word, result;
  } operands = {word, 0};
  const auto finish = [](void* const* arguments, uint32_t lanes) {
    require_warp("movmatrix", lanes);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      uint32_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int from = (2 * t + j) * 4 + g / 2;  // row 2t + j, column g
        pair[j] = static_cast<Operands*>(arguments[from])->word >> (g % 2 * 16) & 0xffff;
      }
      static_cast<Operands*>(arguments[lane])->result = pair[0] | pair[1] << 16;
    }
  };
  meet("movmatrix", kAllLanes, &operands, finish, place);
  return operands.result;
}

}  // namespace dalle::emulator
