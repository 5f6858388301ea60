// Whether this build may run here: AMX needs the kernel's leave, and is tried in a child process first.
#include "amx.h"
#include "api.h"

#if defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace tokenmill {
namespace {

// ARCH_REQ_XCOMP_PERM for tile data, once a process; threads share it (Linux, x86/xstate.rst).
bool ask_for_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// A product of small integers, exact in any order.
bool tiles_multiply() {
  alignas(64) bf16 x[kStep], weight[kStepElements];
  alignas(64) float sums[kPair];
  auto exact = [](int value) { return bf16{static_cast<uint16_t>(value == 0 ? 0 : value == 1 ? 0x3F80 : 0x4000)}; };
  for (int k = 0; k < kStep; ++k) {
    x[k] = exact(k % 3);
    for (int c = 0; c < kPair; ++c) weight[place_in_step(k, c)] = exact((k + c) % 3);
  }
  configure_tiles(1);
  tile_fence(weight);
  amx_product({x, kStep, kStep}, [&](int64_t) { return weight; }, 1, 1, sums, true, [](int64_t) {});
  _tile_release();
  for (int c = 0; c < kPair; ++c) {
    float expected = 0;
    for (int k = 0; k < kStep; ++k) expected += static_cast<float>((k % 3) * ((k + c) % 3));
    if (sums[c] != expected) return false;
  }
  return true;
}

}  // namespace
}  // namespace tokenmill

// 0 when the instructions work; a virtual machine may announce them and fault. The child touches its stack only.
TM_API int tm_probe() {
  pid_t child = fork();
  if (child < 0) return 1;
  if (child == 0) _exit(tokenmill::ask_for_tiles() && tokenmill::tiles_multiply() ? 0 : 1);
  int status = 0;
  if (waitpid(child, &status, 0) != child || status != 0) return 1;
  return tokenmill::ask_for_tiles() ? 0 : 1;
}

#else

TM_API int tm_probe() { return 0; }

#endif
