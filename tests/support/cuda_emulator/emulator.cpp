// Runs the CUDA that TVM generates on a CPU: one thread block (or cluster of blocks) at a time, one fiber per thread.
//
// Barriers, warp exchanges, mma, ldmatrix, mbarriers, TMA and wgmma mean what the PTX ISA says they do; sums inside an mma are
// float64. What it cannot see: races between threads that are missing a barrier, memory and proxy ordering, and speed. Shared
// memory lies in the low 4 GiB, so that 32-bit shared addresses are addresses, and starts as NaN.
#include "emulator.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <string>
#include <vector>

#include "state.h"

Index threadIdx, blockIdx, blockDim, gridDim;
size_t dyn_bytes;
int cur, NTH, CLN = 1, WARP = 32;
bool progress;
Bar wgb_[BLOCKS][8];
uint32_t wx_[BLOCKS][32][64][16];
uint32_t wgx_[BLOCKS][8][128][4];
char* smem_area;
std::map<uintptr_t, MB> mbs;

static Bar ctab_[BLOCKS][16], warpb_[BLOCKS][32], clb;
static int first_block;
static size_t smem_off_[BLOCKS];
static std::map<std::string, void*> smem_names_[BLOCKS];

// ---- fibers: entered by makecontext, switched by setjmp, which unlike swapcontext makes no system call ----
struct Fiber {
  jmp_buf place;
  char* stack;
  bool done, begun;
};
static std::vector<Fiber> F;
static jmp_buf scheduler;
static ucontext_t entry_context;
static emu_body g_body;
static void** g_args;
static const size_t STACK = 1 << 20;  // kernels are compiled without optimization: every value has a place

void emu_yield() {
  int me = cur;
  if (!_setjmp(F[me].place)) _longjmp(scheduler, 1);
}
static void enter() {
  g_body(g_args);
  F[cur].done = true;
  progress = true;
  _longjmp(scheduler, 1);
}
static void resume(int i) {
  if (_setjmp(scheduler)) return;
  if (F[i].begun) _longjmp(F[i].place, 1);
  F[i].begun = true;
  ucontext_t fresh = entry_context;
  fresh.uc_stack.ss_sp = F[i].stack;
  fresh.uc_stack.ss_size = STACK;
  fresh.uc_link = nullptr;
  makecontext(&fresh, enter, 0);
  setcontext(&fresh);
}

// ---- barriers ----
void barw(Bar& b, int n) {
  long g = b.gen;
  progress = true;
  if (++b.cnt == n) {
    b.cnt = 0;
    b.gen++;
    return;
  }
  while (b.gen == g) emu_yield();
}
void emu_barrier(int which, int threads) { barw(ctab_[RK][which], threads ? threads : NTH); }
void emu_barrier_arrive(int which, int threads) {
  Bar& b = ctab_[RK][which];
  if (++b.cnt == threads) {
    b.cnt = 0;
    b.gen++;
  }
  progress = true;
}
void emu_cluster_sync() { barw(clb, NTH * CLN); }
void __syncthreads() { barw(ctab_[RK][0], NTH); }
void __syncwarp(uint) { barw(warpb_[RK][LT / WARP], min(WARP, NTH - LT / WARP * WARP)); }

int emu_rank() { return RK; }
int emu_blocks() { return CLN; }
int emu_lane() { return LT % WARP; }
int emu_warp_size() { return WARP; }
void emu_shuffle(const void* value, void* result, int bytes, int lane) {
  memcpy(wx[LT / WARP][LT % WARP], value, bytes);
  __syncwarp();
  memcpy(result, wx[LT / WARP][lane & (WARP - 1)], bytes);
  __syncwarp();
}
void* emu_shared(size_t alignment, size_t bytes, const char* name) {
  void*& place = smem_names_[RK][name];
  if (place) return place;
  if (alignment < 1024) alignment = 1024;
  size_t& used = smem_off_[RK];
  used = (used + alignment - 1) / alignment * alignment;
  place = smem_area + (size_t)RK * SMEM_CAP + used;
  used += bytes;
  if (used > SMEM_CAP) {
    fprintf(stderr, "smem overflow\n");
    abort();
  }
  return place;
}

// ---- launch ----
static void set_current(int fiber) {
  cur = fiber;
  int i = LT;
  blockIdx.x = first_block + RK;
  threadIdx.x = i % blockDim.x;
  threadIdx.y = (i / blockDim.x) % blockDim.y;
  threadIdx.z = i / (blockDim.x * blockDim.y);
}
static void run_cluster() {
  memset(smem_area, 0xFF, CLN * SMEM_CAP);
  for (int r = 0; r < CLN; r++) {
    smem_off_[r] = 0;
    smem_names_[r].clear();
    for (auto& b : ctab_[r]) b = Bar();
    for (auto& b : warpb_[r]) b = Bar();
    for (auto& b : wgb_[r]) b.cnt = 0;  // generations go on: emu_wgmma keeps operands by them
  }
  clb = Bar();
  mbs.clear();
  const int fibers = NTH * CLN;
  while ((int)F.size() < fibers) {  // stacks are kept for the launches to come
    F.emplace_back();
    F.back().stack = (char*)malloc(STACK);
  }
  for (int i = 0; i < fibers; i++) F[i].done = F[i].begun = false;
  int idle = 0;
  for (int left = fibers; left;) {
    progress = false;
    left = 0;
    for (int i = 0; i < fibers; i++)
      if (!F[i].done) {
        set_current(i);
        resume(i);
        left += !F[i].done;
      }
    idle = progress ? 0 : idle + 1;
    if (idle > 4) {
      fprintf(stderr, "DEADLOCK cta %d,%d,%d left %d\n", first_block, blockIdx.y, blockIdx.z, left);
      for (int i = 0; i < fibers; i += 32) fprintf(stderr, " w%d done=%d", i / 32, F[i].done);
      fprintf(stderr, "\n");
      abort();
    }
  }
}
void emu_launch(emu_body body, void** arguments, int gx, int gy, int gz, int bx, int by, int bz, int cluster, size_t dynamic_shared,
                int warp_size) {
  // The low addresses are scarce: a launch gives back what it took.
  const size_t mapped = BLOCKS * SMEM_CAP + (1 << 21);
  void* low = mmap(0, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
  if (low == MAP_FAILED) {
    fprintf(stderr, "emulator: no %zu bytes of memory below 4 GiB for shared memory\n", mapped);
    abort();
  }
  smem_area = (char*)(((uintptr_t)low + (1 << 21) - 1) / (1 << 21) * (1 << 21));
  getcontext(&entry_context);
  dyn_bytes = dynamic_shared;
  CLN = cluster;
  WARP = warp_size;
  g_body = body;
  g_args = arguments;
  gridDim.x = gx, gridDim.y = gy, gridDim.z = gz;
  blockDim.x = bx, blockDim.y = by, blockDim.z = bz;
  NTH = bx * by * bz;
  for (blockIdx.z = 0; blockIdx.z < gz; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < gy; blockIdx.y++)
      for (first_block = 0; first_block < gx; first_block += CLN) run_cluster();
  munmap(low, mapped);
}
