// What the CUDA that TVM generates is compiled against: the language's types and functions, and what the emulator offers kernels.
//
// Every kernel of the tests is a library of its own that is compiled against this header, so it includes next to nothing; the
// emulator itself (emulator.cpp, instructions.cpp, matrix.cpp) is compiled once.
#pragma once
#include <stdint.h>
#include <string.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;

// What of <cmath> CUDA code calls; including it would take longer than to compile a small kernel.
#define EMU_MATH(F) extern "C" float F##f(float) noexcept; extern "C" double F(double) noexcept;
EMU_MATH(exp) EMU_MATH(exp2) EMU_MATH(log) EMU_MATH(log2) EMU_MATH(sqrt) EMU_MATH(tanh) EMU_MATH(erf) EMU_MATH(fabs)
EMU_MATH(floor) EMU_MATH(ceil) EMU_MATH(trunc) EMU_MATH(round) EMU_MATH(rint) EMU_MATH(nearbyint) EMU_MATH(sin) EMU_MATH(cos)
#undef EMU_MATH
extern "C" float powf(float, float) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
extern "C" float fmodf(float, float) noexcept;
extern "C" int abs(int) noexcept;
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define CUDART_INF_F __builtin_inff()
template <class T>
static inline const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}
template <class T>
static inline const T& min(const T& a, const T& b) {
  return b < a ? b : a;
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
static inline float b2f(uint16_t v) { return u2f((uint32_t)v << 16); }
static inline uint16_t f2b(float f) {
  uint32_t u = f2u(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
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

// The thread that runs now.
struct Index {
  int x = 1, y = 1, z = 1;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;
extern size_t dyn_bytes;
int emu_rank();  // of its block in the cluster
int emu_blocks();  // of a cluster
void* emu_shared(size_t alignment, size_t bytes, const char* name);
void emu_barrier(int which, int threads = 0);  // 0: all threads of the block
void emu_barrier_arrive(int which, int threads);
void emu_cluster_sync();
void __syncwarp(uint mask = ~0u);
void __syncthreads();
// Lanes that name another get its `bytes` at `value`.
void emu_shuffle(const void* value, void* result, int bytes, int lane);
int emu_lane();
int emu_warp_size();

static inline unsigned __cvta_generic_to_shared(const void* p) { return (unsigned)(uintptr_t)p; }
template <class T>
static inline T emu_from_lane(T value, int lane) {
  T result;
  emu_shuffle(&value, &result, sizeof(T), lane);
  return result;
}
template <class T>
static inline T __shfl_sync(uint, T v, int lane, int = 32) {
  return emu_from_lane(v, lane);
}
template <class T>
static inline T __shfl_xor_sync(uint, T v, int mask, int = 32) {
  return emu_from_lane(v, emu_lane() ^ mask);
}
template <class T>
static inline T __shfl_down_sync(uint, T v, int delta, int = 32) {
  return emu_from_lane(v, emu_lane() + delta < emu_warp_size() ? emu_lane() + delta : emu_lane());
}
static inline int __any_sync(uint, int predicate) {
  for (int mask = 1; mask < emu_warp_size(); mask *= 2) predicate |= emu_from_lane(predicate, emu_lane() ^ mask);
  return predicate;
}
static inline unsigned __activemask() { return ~0u; }
template <class T>
static inline T atomicAdd(T* p, T v) {
  T old = *p;
  *p = old + v;
  return old;
}
template <class T>
static inline T __ldg(const T* p) {
  return *p;
}
static inline void __threadfence() {}

// Launches `body` for every thread of the grid, block by block (cluster by cluster).
typedef void (*emu_body)(void** arguments);
extern "C" void emu_launch(emu_body body, void** arguments, int gx, int gy, int gz, int bx, int by, int bz, int cluster,
                           size_t dynamic_shared, int warp_size);
