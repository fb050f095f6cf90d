// What a data race says: which memory, which two accesses, on which lines.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "emulator/race.h"

namespace dalle::emulator {
namespace {

std::string memory_of(uintptr_t at) {
  const char* address = reinterpret_cast<const char*>(at);
  if (const SharedArray* array = array_containing(address, 1)) {
    return "byte " + std::to_string(address - array->begin) + " of " + array->name;
  }
  return "global memory";
}

std::string other_of(const Stamp& stamp) {
  if (!is_of_this_block(stamp)) return " of another block";
  const unsigned id = stamp.thread, x = blockDim.x, y = blockDim.y;
  return " of thread (" + std::to_string(id % x) + ", " + std::to_string(id / x % y) + ", " +
         std::to_string(id / x / y) + ")";
}

}  // namespace

std::string line_of(Site site) {
  if (site & kIsLocation) return text_of(std::bit_cast<Location>(site & ~kIsLocation));
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(site), &info) || !info.dli_fname) return "";
  const size_t offset = site - reinterpret_cast<Site>(info.dli_fbase) - 1;
  char command[1024], line[1024] = "";
  std::snprintf(command, sizeof(command), "addr2line -e '%s' %#zx 2>/dev/null", info.dli_fname,
                offset);
  if (FILE* pipe = popen(command, "r")) {
    if (!std::fgets(line, sizeof(line), pipe)) line[0] = '\0';
    pclose(pipe);
  }
  const char* name = std::strrchr(line, '/');
  if (!name || name[1] == '?') return "";
  return " at " + std::string(name + 1, std::strcspn(name + 1, " \n"));
}

void report_race(uintptr_t at, const char* before, const Stamp& stamp, const char* what,
                 Site site) {
  fail("data race on " + memory_of(at) + ": " + what + line_of(site) +
       " is not ordered behind the " + before + other_of(stamp) + line_of(stamp.site));
}

}  // namespace dalle::emulator
