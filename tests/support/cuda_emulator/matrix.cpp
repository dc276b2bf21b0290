// Matrix instructions of GPUs other than NVIDIA's, which TVM's CUDA code calls by the names of llmc/targets/limits.py.
//
// Layouts: AMD's matrix instruction calculator and instruction set references (MI300, "Matrix Arithmetic Instructions"; RDNA3 and
// RDNA4, "WMMA"), Metal Shading Language Specification. Products are those of the values, sums are float64 as in mma.
#include "matrix.h"

#include "state.h"

static float emu_half(uint16_t bits, bool f16) {
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
static void emu_mma_16x16x16(float* d, const int* a, const int* b, bool f16, Place place, Row row) {
  int w = LT / WARP, l = LT % WARP;
  memcpy(wx[w][l], a, WORDS * 4);
  memcpy(wx[w][l] + WORDS, b, WORDS * 4);
  __syncwarp();
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
  __syncwarp();
  memcpy(d, sums, sizeof(sums));
}
// CDNA: four elements of k a lane, the next 16 lanes have the next four; four neighbouring rows a lane.
static void emu_mfma(float* d, const int* a, const int* b, bool f16) {
  emu_mma_16x16x16<2, 4>(
      d, a, b, f16, [](int line, int k) { return LaneElement{line + 16 * (k / 4), k % 4}; },
      [](int lane, int e) { return 4 * (lane / 16) + e; });
}
void mfma_f32_16x16x16_bf16(float* d, const int* a, const int* b) { emu_mfma(d, a, b, false); }
void mfma_f32_16x16x16_f16(float* d, const int* a, const int* b) { emu_mfma(d, a, b, true); }
// RDNA3: all of k in a lane, both halves of a wave alike, of which the instruction may read either; every second row a lane.
static void emu_wmma_w16(float* d, const int* a, const int* b, bool f16) {
  emu_mma_16x16x16<8, 8>(
      d, a, b, f16, [](int line, int k) { return LaneElement{line + 16 * (k % 2), k}; },
      [](int lane, int e) { return 2 * e + lane / 16; });
}
void wmma_f32_16x16x16_bf16_w16(float* d, const int* a, const int* b) { emu_wmma_w16(d, a, b, false); }
void wmma_f32_16x16x16_f16_w16(float* d, const int* a, const int* b) { emu_wmma_w16(d, a, b, true); }
// RDNA4: eight elements of k a lane, the other half of the wave has the next; eight neighbouring rows a lane.
static void emu_wmma_w8(float* d, const int* a, const int* b, bool f16) {
  emu_mma_16x16x16<4, 8>(
      d, a, b, f16, [](int line, int k) { return LaneElement{line + 16 * (k / 8), k % 8}; },
      [](int lane, int e) { return 8 * (lane / 16) + e; });
}
void wmma_f32_16x16x16_bf16_w8(float* d, const int* a, const int* b) { emu_wmma_w8(d, a, b, false); }
void wmma_f32_16x16x16_f16_w8(float* d, const int* a, const int* b) { emu_wmma_w8(d, a, b, true); }
