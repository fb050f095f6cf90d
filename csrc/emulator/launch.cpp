// A launch from its limits to its last block, and how it fails.
#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emulator/block.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace dalle::emulator {

void run_threads();
[[noreturn]] void abandon_threads();

namespace {

sigjmp_buf escape;  // out of a signal handler, into run()

std::string kernel_name(const void* kernel) {
  Dl_info found;
  if (!dladdr(kernel, &found) || !found.dli_sname) return "(no name)";
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(
      abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, &status), &std::free);
  return status == 0 ? name.get() : found.dli_sname;
}

std::string text_of(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

uint64_t seed() {
  const char* wish = std::getenv("DALLE_EMULATOR_SEED");
  return wish ? std::strtoull(wish, nullptr, 10) : 0;
}

std::string message(const std::string& what) {
  std::string text =
      "emulator: kernel " + kernel_name(block.kernel) + ", block " + text_of(blockIdx);
  if (block.running) text += ", thread " + text_of(threadIdx);
  if (seed()) text += ", seed " + std::to_string(seed());
  return text + ": " + what;
}

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

char* stacks = nullptr;
size_t stacks_bytes() { return kMaxThreads * (kStackBytes + page_bytes()); }

// Stacks with a page without access below each, so that an overflow stops there. Memory comes with
// the first use.
void make_threads() {
  if (stacks) return;
  void* memory = mmap(nullptr, stacks_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
  stacks = static_cast<char*>(memory);
  block.threads.resize(kMaxThreads);
  block.warps.resize(kMaxThreads / kLanes);
  char* next = stacks;
  for (Thread& thread : block.threads) {
    mprotect(next, page_bytes(), PROT_NONE);
    thread.stack = next + page_bytes();
    next = thread.stack + kStackBytes;
  }
}

#if !defined(__SANITIZE_ADDRESS__)  // which says more about a bad address
std::string fault_text(const void* at) {
  if (in_stacks(at)) return "stack overflow";
  return in_arena(at) ? "access outside shared memory" : "access to a bad address";
}

void on_fault(int signal_number, siginfo_t* info, void*) {
  if (block.running == nullptr) {  // not a kernel's fault
    signal(signal_number, SIG_DFL);
    return;
  }
  block.failure = message(fault_text(info->si_addr));
  siglongjmp(escape, 1);
}

// Turns SIGSEGV and SIGBUS of a kernel into a failure while it lives.
class FaultHandler {
 public:
  FaultHandler() {
    static char* stack = new char[kBytes];
    stack_t own = {};
    own.ss_sp = stack;
    own.ss_size = kBytes;
    sigaltstack(&own, &stack_before_);
    struct sigaction action = {};
    action.sa_sigaction = &on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv_before_);
    sigaction(SIGBUS, &action, &bus_before_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_before_, nullptr);
    sigaction(SIGBUS, &bus_before_, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  static constexpr size_t kBytes = size_t{64} << 10;
  struct sigaction segv_before_ = {}, bus_before_ = {};
  stack_t stack_before_ = {};
};
#else
// The sanitizers end the process by themselves; before they do, this names the kernel. Each of the
// two has a runtime of its own.
void on_death() {
  if (block.running) std::fprintf(stderr, "%s\n", message("stopped by a sanitizer").c_str());
}

class FaultHandler {
 public:
  FaultHandler() {
    static const bool done = [] {
      for (void* library : {RTLD_DEFAULT, dlopen("libubsan.so.1", RTLD_NOLOAD | RTLD_LAZY)}) {
        void* set = dlsym(library, "__sanitizer_set_death_callback");
        if (set) reinterpret_cast<void (*)(void (*)())>(set)(&on_death);
      }
      return true;
    }();
    (void)done;
  }
};
#endif

void run_block(uint64_t number) {
  blockIdx = {static_cast<unsigned>(number % gridDim.x),
              static_cast<unsigned>(number / gridDim.x % gridDim.y),
              static_cast<unsigned>(number / gridDim.x / gridDim.y)};
  open_arena(block.shared_bytes);
  race_begin_block();
  if (sigsetjmp(escape, 1) == 0) run_threads();
  block.running = nullptr;
  if (block.failure.empty()) check_arena_borders();
  if (!block.failure.empty()) throw std::runtime_error(std::move(block.failure));
}

bool fits(dim3 grid, dim3 threads, size_t shared_bytes) {
  constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535, kMaxBlockZ = 64;
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  return grid.x >= 1 && grid.x <= kMaxGridX && grid.y >= 1 && grid.y <= kMaxGridYZ && grid.z >= 1 &&
         grid.z <= kMaxGridYZ && count >= 1 && count <= kMaxThreads && threads.z <= kMaxBlockZ &&
         shared_bytes <= kMaxShared;
}

}  // namespace

bool in_stacks(const void* at) {
  const char* place = static_cast<const char*>(at);
  return place >= stacks && place < stacks + stacks_bytes();
}

std::string text_of(Place place) {
  const std::string file(place.file_name());
  return " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

void fail(const std::string& what) {
  block.failure = message(what);
  if (block.running == nullptr) throw std::runtime_error(std::move(block.failure));
  abandon_threads();
}

void fail(const std::string& what, Place place) { fail(what + text_of(place)); }

cudaError_t run(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes,
                void (*body)(void*), void* argument) {
  if (!fits(grid, threads, shared_bytes)) return cudaErrorInvalidConfiguration;
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  block.kernel = kernel;
  block.body = body;
  block.argument = argument;
  block.shared_bytes = shared_bytes;
  block.num_threads = static_cast<int>(threads.x * threads.y * threads.z);
  block.num_warps = (block.num_threads + kLanes - 1) / kLanes;
  block.failure.clear();
  block.running = nullptr;
  gridDim = grid;
  blockDim = threads;
  make_threads();
  race_begin_launch();
  const FaultHandler handler;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, wish = seed();
  // Every launch starts from the seed, so that a failure repeats whatever ran before it.
  block.random = wish ? wish * 0x9E3779B97F4A7C15ull | 1 : 0;
  std::vector<uint32_t> order(block.random && blocks <= (uint64_t{1} << 24) ? blocks : 0);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  for (uint64_t i = 0; i < blocks; ++i) run_block(order.empty() ? i : order[i]);
  return cudaSuccess;
}

}  // namespace dalle::emulator
