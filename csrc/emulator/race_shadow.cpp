// The shadow memory of the race detector: cells in pages that are made at the first access.
#include <array>
#include <memory>
#include <unordered_map>

#include "emulator/race.h"

namespace dalle::emulator {
namespace {

constexpr size_t kPage = 4096, kMaxPages = 2048, kCached = 256;
using Page = std::array<Cell, kPage>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
struct {
  uintptr_t number = 0;
  Page* page = nullptr;
} cached[kCached];

}  // namespace

Cell& cell_of(uintptr_t at) {
  const uintptr_t number = at / kPage;
  auto& entry = cached[number % kCached];
  if (entry.number != number || entry.page == nullptr) {
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    entry = {number, page.get()};
  }
  return (*entry.page)[at % kPage];
}

void limit_cells() {
  if (pages.size() <= kMaxPages) return;
  pages.clear();
  for (auto& entry : cached) entry = {};
}

}  // namespace dalle::emulator
