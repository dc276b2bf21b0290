// Matrix instructions of GPUs other than NVIDIA's, which TVM's CUDA code calls by the names of llmc/targets/limits.py.
//
// Layouts: AMD's matrix instruction calculator and instruction set references (MI300, "Matrix Arithmetic Instructions"; RDNA3 and
// RDNA4, "WMMA"), Metal Shading Language Specification. Products are those of the values, sums are float64 as in mma.
#pragma once
#include "emulator.h"

static inline float emu_half(uint16_t bits, bool f16) {
  if (!f16) return b2f(bits);
  half h;
  memcpy(&h, &bits, 2);
  return (float)h;
}
struct LaneElement {
  int lane, element;
};
// d[row][column] += a[row] . b[column] over 16 elements. `place(line, k)`: the lane and the element of its operand; `row(lane, e)`: of
// its results, whose column is lane % 16.
template <int WORDS, int SUMS, class Place, class Row>
static inline void emu_mma_16x16x16(float* d, const int* a, const int* b, bool f16, Place place, Row row) {
  int w = LT / EMU_WARP, l = LT % EMU_WARP;
  memcpy(wx[w][l], a, WORDS * 4);
  memcpy(wx[w][l] + WORDS, b, WORDS * 4);
  warp_sync();
  float sums[SUMS];
  for (int e = 0; e < SUMS; e++) {
    double s = d[e];
    for (int k = 0; k < 16; k++) {
      LaneElement p = place(row(l, e), k), q = place(l % 16, k);
      uint16_t x, y;
      memcpy(&x, (char*)wx[w][p.lane] + 2 * p.element, 2);
      memcpy(&y, (char*)(wx[w][q.lane] + WORDS) + 2 * q.element, 2);
      s += (double)emu_half(x, f16) * emu_half(y, f16);
    }
    sums[e] = (float)s;
  }
  warp_sync();
  memcpy(d, sums, sizeof(sums));
}
// CDNA: four elements of k a lane, the next 16 lanes have the next four; four neighbouring rows a lane.
static inline void emu_mfma(float* d, const int* a, const int* b, bool f16) {
  emu_mma_16x16x16<2, 4>(
      d, a, b, f16, [](int line, int k) { return LaneElement{line + 16 * (k / 4), k % 4}; },
      [](int lane, int e) { return 4 * (lane / 16) + e; });
}
static inline void mfma_f32_16x16x16_bf16(float* d, const int* a, const int* b) { emu_mfma(d, a, b, false); }
static inline void mfma_f32_16x16x16_f16(float* d, const int* a, const int* b) { emu_mfma(d, a, b, true); }
// RDNA3: all of k in a lane, both halves of a wave alike, of which the instruction may read either; every second row a lane.
static inline void emu_wmma_w16(float* d, const int* a, const int* b, bool f16) {
  emu_mma_16x16x16<8, 8>(
      d, a, b, f16, [](int line, int k) { return LaneElement{line + 16 * (k % 2), k}; },
      [](int lane, int e) { return 2 * e + lane / 16; });
}
static inline void wmma_f32_16x16x16_bf16_w16(float* d, const int* a, const int* b) { emu_wmma_w16(d, a, b, false); }
static inline void wmma_f32_16x16x16_f16_w16(float* d, const int* a, const int* b) { emu_wmma_w16(d, a, b, true); }
// RDNA4: eight elements of k a lane, the other half of the wave has the next; eight neighbouring rows a lane.
static inline void emu_wmma_w8(float* d, const int* a, const int* b, bool f16) {
  emu_mma_16x16x16<4, 8>(
      d, a, b, f16, [](int line, int k) { return LaneElement{line + 16 * (k / 8), k % 8}; },
      [](int lane, int e) { return 8 * (lane / 16) + e; });
}
static inline void wmma_f32_16x16x16_bf16_w8(float* d, const int* a, const int* b) { emu_wmma_w8(d, a, b, false); }
static inline void wmma_f32_16x16x16_f16_w8(float* d, const int* a, const int* b) { emu_wmma_w8(d, a, b, true); }

// Metal: a matrix of 8 x 8 belongs to the whole warp; here every thread has a copy of it, row by row.
template <class T>
static inline void emu_make_filled_simdgroup_matrix(T* d, int i, float value, int, int) {
  for (int e = 0; e < 64; e++) d[64 * i + e] = (T)value;
}
template <class T>
static inline void emu_simdgroup_load(T* d, int i, const T* from, long stride, int, int, bool turned) {
  for (int r = 0; r < 8; r++)
    for (int c = 0; c < 8; c++) d[64 * i + 8 * r + c] = turned ? from[c * stride + r] : from[r * stride + c];
}
template <class T>
static inline void emu_simdgroup_store(const T* d, int i, T* to, long stride, int, int, bool turned) {
  int l = LT % EMU_WARP;  // two elements a thread
  for (int e = 2 * l; e < 2 * l + 2; e++) to[turned ? e % 8 * stride + e / 8 : e / 8 * stride + e % 8] = d[64 * i + e];
}
template <class D, class A, class B>
static inline void emu_simdgroup_multiply_accumulate(D* d, int i, const A* a, int j, const B* b, int k, const D* c, int l) {
  D out[64];
  for (int r = 0; r < 8; r++)
    for (int q = 0; q < 8; q++) {
      double s = c[64 * l + 8 * r + q];
      for (int e = 0; e < 8; e++) s += (double)(float)a[64 * j + 8 * r + e] * (float)b[64 * k + 8 * e + q];
      out[8 * r + q] = (D)s;
    }
  for (int e = 0; e < 64; e++) d[64 * i + e] = out[e];
}
