// Warp collectives: each lane leaves a pointer to its operands, the last one computes for all.
#include <bit>
#include <cstring>

#include "emulator/block.h"

namespace dalle::emulator {
namespace {

constexpr uint64_t kUndefined = ~uint64_t{0};  // NaN where CUDA leaves a value undefined

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
    const bool participates = lanes >> from & 1;
    x.result = participates ? static_cast<ShuffleOperands*>(arguments[from])->word : kUndefined;
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

}  // namespace

void require_warp(const char* what, uint32_t lanes) {
  if (lanes != kAllLanes) {
    fail(std::string(what) + " needs all 32 lanes, got " + std::to_string(std::popcount(lanes)));
  }
}

uint64_t shuffle(Shuffle kind, uint32_t lanes, uint64_t word, int operand, int width,
                 Location location) {
  if (width < 1 || width > kWarpSize || (width & (width - 1))) {
    fail("a shuffle's width must be a power of two up to 32, got " + std::to_string(width),
         location);
  }
  ShuffleOperands operands = {word, kUndefined, kind, operand, width};
  constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                    "__shfl_xor_sync"};
  rendezvous(kNames[static_cast<int>(kind)], lanes, &operands, &finish_shuffle, location);
  return operands.result;
}

uint32_t ballot(uint32_t lanes, int predicate, Location location) {
  WordOperands operands = {predicate != 0, 0, Reduce::kAdd, false};
  rendezvous("a vote", lanes, &operands, &finish_ballot, location);
  return operands.result;
}

uint32_t reduce(Reduce kind, bool is_signed, uint32_t lanes, uint32_t word, Location location) {
  WordOperands operands = {word, 0, kind, is_signed};
  rendezvous("__reduce_sync", lanes, &operands, &finish_reduce, location);
  return operands.result;
}

}  // namespace dalle::emulator
