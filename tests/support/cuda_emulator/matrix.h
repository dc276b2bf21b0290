// Matrix instructions of GPUs other than NVIDIA's, which TVM's CUDA code calls by the names of llmc/targets/limits.py.
#pragma once
#include "emulator.h"

void mfma_f32_16x16x16_bf16(float* d, const int* a, const int* b);
void mfma_f32_16x16x16_f16(float* d, const int* a, const int* b);
void wmma_f32_16x16x16_bf16_w16(float* d, const int* a, const int* b);
void wmma_f32_16x16x16_f16_w16(float* d, const int* a, const int* b);
void wmma_f32_16x16x16_bf16_w8(float* d, const int* a, const int* b);
void wmma_f32_16x16x16_f16_w8(float* d, const int* a, const int* b);

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
  int l = emu_lane();  // two elements a thread
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
