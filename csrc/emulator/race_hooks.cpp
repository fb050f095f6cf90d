// What -fsanitize=thread calls: libtsan is not linked, so the kernels' accesses land here.
#include "emulator/race.h"

using dalle::emulator::record_plain;
#define DALLE_HOOK __attribute__((visibility("hidden")))
#define DALLE_HOOKS(bytes)                                       \
  DALLE_HOOK void __tsan_read##bytes(void* at) {                 \
    record_plain(at, bytes, false, __builtin_return_address(0)); \
  }                                                              \
  DALLE_HOOK void __tsan_write##bytes(void* at) {                \
    record_plain(at, bytes, true, __builtin_return_address(0));  \
  }                                                              \
  DALLE_HOOK void __tsan_unaligned_read##bytes(void* at) {       \
    record_plain(at, bytes, false, __builtin_return_address(0)); \
  }                                                              \
  DALLE_HOOK void __tsan_unaligned_write##bytes(void* at) {      \
    record_plain(at, bytes, true, __builtin_return_address(0));  \
  }
// Atomics of the host code around the kernels, which one thread runs.
#define DALLE_ATOMIC_HOOKS(bits, type)                                                            \
  DALLE_HOOK type __tsan_atomic##bits##_load(const volatile type* at, int) {                      \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                               \
  DALLE_HOOK void __tsan_atomic##bits##_store(volatile type* at, type x, int) {                   \
    __atomic_store_n(at, x, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                               \
  DALLE_HOOK type __tsan_atomic##bits##_exchange(volatile type* at, type x, int) {                \
    return __atomic_exchange_n(at, x, __ATOMIC_SEQ_CST);                                          \
  }                                                                                               \
  DALLE_HOOK type __tsan_atomic##bits##_fetch_add(volatile type* at, type x, int) {               \
    return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);                                           \
  }                                                                                               \
  DALLE_HOOK type __tsan_atomic##bits##_fetch_sub(volatile type* at, type x, int) {               \
    return __atomic_fetch_sub(at, x, __ATOMIC_SEQ_CST);                                           \
  }                                                                                               \
  DALLE_HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile type* at, type* expected, \
                                                               type x, int, int) {                \
    return __atomic_compare_exchange_n(at, expected, x, false, __ATOMIC_SEQ_CST,                  \
                                       __ATOMIC_SEQ_CST);                                         \
  }

extern "C" {
DALLE_HOOKS(1)
DALLE_HOOKS(2)
DALLE_HOOKS(4)
DALLE_HOOKS(8)
DALLE_HOOKS(16)
DALLE_HOOK void __tsan_read_range(void* at, size_t bytes) {
  record_plain(at, bytes, false, __builtin_return_address(0));
}
DALLE_HOOK void __tsan_write_range(void* at, size_t bytes) {
  record_plain(at, bytes, true, __builtin_return_address(0));
}
DALLE_HOOK void __tsan_init() {}
DALLE_HOOK void __tsan_func_entry(void*) {}
DALLE_HOOK void __tsan_func_exit() {}
DALLE_HOOK void __tsan_vptr_update(void**, void*) {}
DALLE_HOOK void __tsan_vptr_read(void**) {}
DALLE_ATOMIC_HOOKS(8, uint8_t)
DALLE_ATOMIC_HOOKS(32, uint32_t)
DALLE_ATOMIC_HOOKS(64, uint64_t)
}
