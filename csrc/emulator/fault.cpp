#include "emulator/fault.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "emulator/block.h"

namespace dalle::emulator {

sigjmp_buf escape;

namespace {

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "(no name)";
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), &std::free);
  return status == 0 ? name.get() : info.dli_sname;
}

std::string text_of(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string message(const std::string& what) {
  std::string text =
      "emulator: kernel " + kernel_name(block.kernel) + ", block " + text_of(blockIdx);
  if (block.running) text += ", thread " + text_of(threadIdx);
  if (seed()) text += ", seed " + std::to_string(seed());
  return text + ": " + what;
}

#if !defined(__SANITIZE_ADDRESS__)
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

#else
// The two sanitizers have separate runtimes.
void on_death() {
  if (block.running) std::fprintf(stderr, "%s\n", message("stopped by a sanitizer").c_str());
}
#endif

}  // namespace

#if !defined(__SANITIZE_ADDRESS__)
FaultHandler::FaultHandler() {
  constexpr size_t kBytes = size_t{64} << 10;
  static char* stack = new char[kBytes];
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = kBytes;
  sigaltstack(&alternate, &stack_before_);
  struct sigaction action = {};
  action.sa_sigaction = &on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &segv_before_);
  sigaction(SIGBUS, &action, &bus_before_);
}

FaultHandler::~FaultHandler() {
  sigaction(SIGSEGV, &segv_before_, nullptr);
  sigaction(SIGBUS, &bus_before_, nullptr);
  sigaltstack(&stack_before_, nullptr);
}
#else
FaultHandler::FaultHandler() {
  static const bool done = [] {
    for (void* library : {RTLD_DEFAULT, dlopen("libubsan.so.1", RTLD_NOLOAD | RTLD_LAZY)}) {
      void* set = dlsym(library, "__sanitizer_set_death_callback");
      if (set) reinterpret_cast<void (*)(void (*)())>(set)(&on_death);
    }
    return true;
  }();
  (void)done;
}

FaultHandler::~FaultHandler() = default;
#endif

uint64_t seed() {
  const char* value = std::getenv("DALLE_EMULATOR_SEED");
  return value ? std::strtoull(value, nullptr, 10) : 0;
}

std::string text_of(Location location) {
  const std::string file(location.file_name());
  return " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(location.line());
}

void fail(const std::string& what) {
  block.failure = message(what);
  if (block.running == nullptr) throw std::runtime_error(std::move(block.failure));
  abandon_threads();
}

void fail(const std::string& what, Location location) { fail(what + text_of(location)); }

}  // namespace dalle::emulator
