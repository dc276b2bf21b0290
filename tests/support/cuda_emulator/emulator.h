// Runs the CUDA that TVM generates on a CPU: one thread block (or cluster of blocks) at a time, one fiber per thread.
//
// Barriers, warp exchanges, mma, ldmatrix, mbarriers, TMA and wgmma mean what the PTX ISA says they do; sums inside an mma are
// float64. What it cannot see: races between threads that are missing a barrier, memory and proxy ordering, and speed. Shared
// memory lies in the low 4 GiB, so that 32-bit shared addresses are addresses, and starts as NaN.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>
using std::max;
using std::min;
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
struct dim3_ {
  int x = 1, y = 1, z = 1;
};
static inline float b2f(uint16_t v) {
  uint32_t u = (uint32_t)v << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t f2b(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  uint32_t r = u + 0x7fff + ((u >> 16) & 1);
  return r >> 16;
}
struct nv_bfloat16 {
  uint16_t v;
  nv_bfloat16() : v(0) {}
  nv_bfloat16(float f) : v(f2b(f)) {}
  explicit nv_bfloat16(double f) : v(f2b((float)f)) {}
  explicit nv_bfloat16(int f) : v(f2b((float)f)) {}
  operator float() const { return b2f(v); }
};
typedef nv_bfloat16 __nv_bfloat16;
typedef _Float16 half;
static inline nv_bfloat16 __float2bfloat16_rn(float f) { return nv_bfloat16(f); }
static inline float __bfloat162float(nv_bfloat16 b) { return (float)b; }
static inline half __float2half_rn(float f) { return (half)f; }
static inline float __half2float(half h) { return (float)h; }

// Vector types move bytes only: TVM computes on their elements one by one.
template <class T, int N>
struct alignas(sizeof(T) * N) vec {
  T x;
};
template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
};
typedef vec<uint32_t, 2> uint2;
typedef vec<uint32_t, 4> uint4;
typedef vec<int, 2> int2;
typedef vec<int, 4> int4;
typedef vec<float, 2> float2;
typedef vec<float, 4> float4;
typedef vec<uint16_t, 2> ushort2;
typedef vec<uchar, 2> uchar2;
typedef vec<uchar, 4> uchar4;
typedef vec<uint16_t, 4> ushort4;
typedef vec<uint64_t, 2> ulonglong2;
typedef vec<int64_t, 2> longlong2;
typedef vec<nv_bfloat16, 2> nv_bfloat162;
typedef vec<half, 2> half2;
typedef vec<half, 4> half4;
typedef vec<nv_bfloat16, 4> nv_bfloat164;
typedef vec<uint16_t, 1> ushort1;
typedef vec<double, 2> double2;
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline longlong2 make_longlong2(int64_t x, int64_t y) { return {x, y}; }
static inline half2 make_half2(half x, half y) { return {x, y}; }
static inline half4 make_half4(half x, half y, half z, half w) { return {x, y, z, w}; }
static inline nv_bfloat162 make_nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
static inline nv_bfloat164 make_nv_bfloat164(nv_bfloat16 x, nv_bfloat16 y, nv_bfloat16 z, nv_bfloat16 w) {
  return {x, y, z, w};
}
#define __global__
#define __device__
#define __host__
#define __forceinline__ static inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
#define CUDART_INF_F INFINITY
// 128 bytes, as the driver's, laid out like TensorMap in dlpack.py.
struct __attribute__((packed, aligned(64))) CUtensorMap {
  char* base;
  int32_t dim[5];
  int64_t stride[5];
  int16_t box[5];
  int8_t rank, esz, swz;
  uint8_t pad[47];
};
static_assert(sizeof(CUtensorMap) == 128, "");
struct Fiber {
  ucontext_t ctx;
  char* stk;
  bool done;
  int tid;
};
static std::vector<Fiber> F;
static ucontext_t mainctx;
static int cur;
static int NTH;
static int CLN = 1;
#define LT (cur % NTH)
#define RK (cur / NTH)
static int blockIdx_base;
static dim3_ gridDim, blockDim, blockIdx;
struct TI {
  int x, y, z;
};
static TI threadIdx_;
#define threadIdx threadIdx_
static size_t dyn_bytes;
static void emu_yield() {
  int me = cur;
  swapcontext(&F[me].ctx, &mainctx);
}
static void setcur(int i0) {
  cur = i0;
  int i = LT;
  blockIdx.x = blockIdx_base + RK;
  threadIdx_.x = i % blockDim.x;
  threadIdx_.y = (i / blockDim.x) % blockDim.y;
  threadIdx_.z = i / (blockDim.x * blockDim.y);
}
struct Bar {
  int cnt = 0;
  long gen = 0;
};
static Bar ctab_[8][16];
static Bar warpb_[8][32];
static Bar wgb_[8][8];
static Bar clb;
#define ctab ctab_[RK]
#define warpb warpb_[RK]
#define wgb wgb_[RK]
static bool progress;
static void barw(Bar& b, int n) {
  long g = b.gen;
  if (++b.cnt == n) {
    b.cnt = 0;
    b.gen++;
    progress = true;
    return;
  }
  progress = true;
  while (b.gen == g) emu_yield();
}
static void bararrive(Bar& b, int n) {
  if (++b.cnt == n) {
    b.cnt = 0;
    b.gen++;
  }
  progress = true;
}
#ifndef EMU_WARP  // threads of a warp: 64 imposes the waves of other GPUs on portable kernels
#define EMU_WARP 32
#endif
static inline void warp_sync() { barw(warpb[LT / EMU_WARP], std::min(EMU_WARP, NTH - LT / EMU_WARP * EMU_WARP)); }
static uint32_t wx_[8][32][EMU_WARP][160];
#define wx wx_[RK]
static uint32_t wgx_[8][8][128][160];
#define wgx wgx_[RK]
// ---- shared memory in the low 4 GiB ----
static char* smem_area;
static size_t smem_off_[8];
static std::map<std::string, void*> smem_names_[8];
static const size_t SMEM_CAP = 1 << 18;
#define smem_off smem_off_[RK]
#define smem_names smem_names_[RK]
static void* emu_shared(size_t al, size_t bytes, const char* name) {
  auto it = smem_names.find(name);
  if (it != smem_names.end()) return it->second;
  if (al < 1024) al = 1024;
  smem_off = (smem_off + al - 1) / al * al;
  void* p = smem_area + (size_t)RK * SMEM_CAP + smem_off;
  smem_off += bytes;
  if (smem_off > SMEM_CAP) {
    fprintf(stderr, "smem overflow\n");
    abort();
  }
  smem_names[name] = p;
  return p;
}
static inline uint32_t f2u(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
static inline float u2f(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
#define __CVTA(p) ((unsigned)(uintptr_t)(p))
static inline unsigned __cvta_generic_to_shared(const void* p) { return (unsigned)(uintptr_t)p; }
template <class T>
static T shfl_any(T v, int src) {
  int w = LT / EMU_WARP, l = LT % EMU_WARP;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "");
  memcpy(&wx[w][l][0], &v, sizeof(T));
  warp_sync();
  T r;
  memcpy(&r, &wx[w][src & (EMU_WARP - 1)][0], sizeof(T));
  warp_sync();
  return r;
}
template <class T>
static T __shfl_sync(uint, T v, int s, int = 32) {
  return shfl_any(v, s);
}
template <class T>
static T __shfl_xor_sync(uint, T v, int m, int = 32) {
  return shfl_any(v, (LT % EMU_WARP) ^ m);
}
template <class T>
static T __shfl_down_sync(uint, T v, int d, int = 32) {
  int l = LT % EMU_WARP;
  return shfl_any(v, l + d < EMU_WARP ? l + d : l);
}
static inline unsigned __activemask() { return ~0u; }
static inline void __syncthreads() { barw(ctab[0], NTH); }
static inline void __syncwarp(uint = ~0u) { warp_sync(); }
template <class T>
static T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
template <class T>
static T __ldg(const T* p) {
  return *p;
}
static inline void __threadfence() {}
#define __expf(x) expf(x)
#define __logf(x) logf(x)
// An mbarrier: arrivals expected and missing, bytes missing, phase.
struct MB {
  int count = 0, pend = 0;
  long tx = 0;
  int phase = 0;
};
static std::map<uintptr_t, MB> mbs;

// ---- launch ----
typedef void (*body_t)(void** args);
static body_t g_body;
static void** g_args;
static void tramp() {
  int me = cur;
  g_body(g_args);
  F[me].done = true;
  progress = true;
  swapcontext(&F[me].ctx, &mainctx);
}
static inline void emu_cluster_sync() { barw(clb, NTH * CLN); }
static void emu_launch(body_t body, void** args, int gx, int gy, int gz, int bx_, int by, int bz, int cluster,
                       size_t dynamic_shared) {
  dyn_bytes = dynamic_shared;
  // Every kernel's library maps its own, and the low addresses are scarce: a launch gives back what it took.
  const size_t mapped = 8 * SMEM_CAP + (1 << 21);
  void* low = mmap(0, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
  if (low == MAP_FAILED) {
    fprintf(stderr, "emulator: no %zu bytes of memory below 4 GiB for shared memory\n", mapped);
    abort();
  }
  smem_area = (char*)(((uintptr_t)low + (1 << 21) - 1) / (1 << 21) * (1 << 21));
  CLN = cluster;
  g_body = body;
  g_args = args;
  gridDim.x = gx;
  gridDim.y = gy;
  gridDim.z = gz;
  blockDim.x = bx_;
  blockDim.y = by;
  blockDim.z = bz;
  NTH = bx_ * by * bz;
  const size_t ST = 256 << 10;
  int NF = NTH * CLN;
  for (int z = 0; z < gz; z++)
    for (int y = 0; y < gy; y++)
      for (int x = 0; x < gx; x += CLN) {
        blockIdx_base = x;
        blockIdx.y = y;
        blockIdx.z = z;
        memset(smem_area, 0xFF, 8 * SMEM_CAP);
        for (int r = 0; r < 8; r++) {
          smem_off_[r] = 0;
          smem_names_[r].clear();
          for (auto& b : ctab_[r]) b = Bar();
          for (auto& b : warpb_[r]) b = Bar();
          for (auto& b : wgb_[r]) b = Bar();
        }
        clb = Bar();
        mbs.clear();
        if ((int)F.size() < NF) {
          size_t o = F.size();
          F.resize(NF);
          for (size_t i = o; i < F.size(); i++) F[i].stk = (char*)malloc(ST);
        }
        for (int i = 0; i < NF; i++) {
          F[i].done = false;
          getcontext(&F[i].ctx);
          F[i].ctx.uc_stack.ss_sp = F[i].stk;
          F[i].ctx.uc_stack.ss_size = ST;
          F[i].ctx.uc_link = 0;
          makecontext(&F[i].ctx, tramp, 0);
        }
        int left = NF;
        int idle = 0;
        while (left) {
          progress = false;
          left = 0;
          for (int i = 0; i < NF; i++)
            if (!F[i].done) {
              setcur(i);
              swapcontext(&mainctx, &F[i].ctx);
              if (!F[i].done) left++;
            }
          if (!progress) {
            if (++idle > 4) {
              fprintf(stderr, "DEADLOCK cta %d,%d,%d left %d\n", x, y, z, left);
              for (int i = 0; i < NF; i += 32) fprintf(stderr, " w%d done=%d", i / 32, F[i].done);
              fprintf(stderr, "\n");
              abort();
            }
          } else
            idle = 0;
        }
      }
  for (auto& f : F) free(f.stk);
  F.clear();
  munmap(low, mapped);
}
