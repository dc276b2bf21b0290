// What single instructions do: mma, ldmatrix, mbarrier, TMA and wgmma (PTX ISA 9.0; the fragment layouts are those of its figures).
#include "instructions.h"

#include <stdio.h>
#include <stdlib.h>

#include "state.h"

void emu_mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool f16) {
  int w = LT / 32, l = LT % 32;
  for (int i = 0; i < 4; i++) wx[w][l][i] = a[i];
  wx[w][l][4] = b[0];
  wx[w][l][5] = b[1];
  __syncwarp();
  int g = l / 4, t = l % 4;
  float o[4];
  for (int i = 0; i < 4; i++) {
    int row = g + 8 * (i / 2), col = 2 * t + i % 2;
    double s = c[i];
    for (int k = 0; k < 16; k++) {
      int kl = (k % 8) / 2, hf = k / 8;
      uint32_t av = wx[w][(row % 8) * 4 + kl][hf * 2 + row / 8];
      uint32_t bv = wx[w][col * 4 + kl][4 + hf];
      uint16_t ah = (k & 1) ? av >> 16 : av & 0xffff, bh = (k & 1) ? bv >> 16 : bv & 0xffff;
      float af, bf;
      if (f16) {
        half x, y;
        memcpy(&x, &ah, 2);
        memcpy(&y, &bh, 2);
        af = (float)x;
        bf = (float)y;
      } else {
        af = b2f(ah);
        bf = b2f(bh);
      }
      s += (double)af * bf;
    }
    o[i] = (float)s;
  }
  __syncwarp();
  for (int i = 0; i < 4; i++) d[i] = o[i];
}
void emu_ldmatrix(uint32_t** d, int num, bool trans, const void* addr) {
  int w = LT / 32, l = LT % 32;
  uint64_t p = (uint64_t)addr;
  memcpy(&wx[w][l][0], &p, 8);
  __syncwarp();
  uint32_t o[4];
  for (int i = 0; i < num; i++) {
    uint16_t e[2];
    for (int j = 0; j < 2; j++) {
      int r, c;
      if (!trans) {
        r = l / 4;
        c = (l % 4) * 2 + j;
      } else {
        c = l / 4;
        r = (l % 4) * 2 + j;
      }
      uint64_t q;
      memcpy(&q, &wx[w][i * 8 + r][0], 8);
      memcpy(&e[j], (char*)q + c * 2, 2);
    }
    o[i] = e[0] | ((uint32_t)e[1] << 16);
  }
  __syncwarp();
  for (int i = 0; i < num; i++) *d[i] = o[i];
}
void emu_stmatrix(const uint32_t* s, int num, bool trans, void* addr) {
  int w = LT / 32, l = LT % 32;
  uint64_t p = (uint64_t)addr;
  memcpy(&wx[w][l][0], &p, 8);
  __syncwarp();
  for (int i = 0; i < num; i++) {
    for (int j = 0; j < 2; j++) {
      int r, c;
      if (!trans) {
        r = l / 4;
        c = (l % 4) * 2 + j;
      } else {
        c = l / 4;
        r = (l % 4) * 2 + j;
      }
      uint64_t q;
      memcpy(&q, &wx[w][i * 8 + r][0], 8);
      uint16_t e = (s[i] >> (16 * j)) & 0xffff;
      memcpy((char*)q + c * 2, &e, 2);
    }
  }
  __syncwarp();
}
void emu_prmt(uint32_t& d, uint32_t a, uint32_t b, uint32_t s) {
  uint64_t v = ((uint64_t)b << 32) | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    int q = (s >> (4 * i)) & 7;
    r |= (uint32_t)((v >> (8 * q)) & 0xff) << (8 * i);
  }
  d = r;
}
uint32_t emu_lop3(uint32_t a, uint32_t b, uint32_t c, int lut) {
  uint32_t r = 0;
  for (int i = 0; i < 8; i++)
    if (lut >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
uint32_t emu_bf2(uint32_t a, uint32_t b, char op) {
  float al = b2f(a & 0xffff), ah = b2f(a >> 16), bl = b2f(b & 0xffff), bh = b2f(b >> 16);
  float l = op == '-' ? al - bl : op == '*' ? al * bl : al + bl, h = op == '-' ? ah - bh : op == '*' ? ah * bh : ah + bh;
  return f2b(l) | ((uint32_t)f2b(h) << 16);
}
// mbarriers: their state is kept in a table by address, not in the 64-bit word.
static void mb_check(MB& m) {
  if (m.pend == 0 && m.tx == 0) {
    m.phase ^= 1;
    m.pend = m.count;
    progress = true;
  }
}
void emu_mb_init(const void* p, uint32_t c) {
  MB m;
  m.count = m.pend = c;
  mbs[(uintptr_t)p] = m;
}
void emu_mb_arrive(const void* p, int c) {
  MB& m = mbs.at((uintptr_t)p);
  m.pend -= c;
  if (m.pend < 0) {
    fprintf(stderr, "mbarrier over-arrive tid %d\n", cur);
    abort();
  }
  mb_check(m);
  progress = true;
}
void emu_mb_expect(const void* p, uint32_t b) {
  MB& m = mbs.at((uintptr_t)p);
  m.tx += b;
  m.pend -= 1;
  if (m.pend < 0) {
    fprintf(stderr, "mbarrier over-arrive tid %d\n", cur);
    abort();
  }
  mb_check(m);
  progress = true;
}
void emu_mb_tx(uint32_t p, long b) {
  MB& m = mbs.at((uintptr_t)p);
  m.tx -= b;
  mb_check(m);
  progress = true;
}
void emu_mb_wait(const void* p, uint32_t ph) {
  while (mbs.at((uintptr_t)p).phase == (int)(ph & 1)) emu_yield();
}
static uintptr_t swz128(uintptr_t a) { return a ^ (((a >> 7) & 7) << 4); }
static uintptr_t swz64(uintptr_t a) { return a ^ (((a >> 7) & 3) << 4); }
static uintptr_t swz32(uintptr_t a) { return a ^ (((a >> 7) & 1) << 4); }
static uintptr_t swzn(uintptr_t a, int s) { return s == 3 ? swz128(a) : s == 2 ? swz64(a) : s == 1 ? swz32(a) : a; }
// Calls f(in shared memory, in global memory, whether outside of the tensor) for each element of the box at co.
template <typename F>
static void each_of_box(const CUtensorMap& tm, const int* co, int rank, uint32_t shared, F f) {
  long n = 1;
  for (int i = 0; i < rank; i++) n *= tm.box[i];
  for (long e = 0; e < n; e++) {
    long r = e;
    bool oob = false;
    long off = 0;
    for (int i = 0; i < rank; i++) {
      long c = co[i] + r % tm.box[i];
      r /= tm.box[i];
      if (c < 0 || c >= tm.dim[i]) oob = true;
      off += c * (i == 0 ? tm.esz : tm.stride[i - 1]);
    }
    f((void*)swzn((uintptr_t)shared + e * tm.esz, tm.swz), tm.base + off, oob);
  }
}
void emu_tma_load(uint32_t dst, const void* tm_, const int* co, int rank, uint32_t mbar) {
  const CUtensorMap& tm = *(const CUtensorMap*)tm_;
  long bytes = 0;
  each_of_box(tm, co, rank, dst, [&](void* here, const void* there, bool oob) {
    if (oob)
      memset(here, 0, tm.esz);
    else
      memcpy(here, there, tm.esz);
    bytes += tm.esz;
  });
  emu_mb_tx(mbar, bytes);
}
void emu_tma_store(const void* tm_, const int* co, int rank, uint32_t src) {
  const CUtensorMap& tm = *(const CUtensorMap*)tm_;
  each_of_box(tm, co, rank, src, [&](const void* here, void* there, bool oob) {
    if (!oob) memcpy(there, here, tm.esz);
  });
}
// wgmma, bf16/f16, K-major or MN-major SW128 operands via descriptors
struct Desc {
  uint32_t start;
  int lbo, sbo, swz;
};
static Desc dec(uint64_t d) {
  Desc r;
  r.start = (d & 0x3fff) << 4;
  r.lbo = ((d >> 16) & 0x3fff) << 4;
  r.sbo = ((d >> 32) & 0x3fff) << 4;
  int l = (d >> 62) & 3;
  r.swz = l == 1 ? 3 : l == 2 ? 2 : l == 3 ? 1 : 0;
  return r;
}
#define smem_hi ((uintptr_t)smem_area + (uintptr_t)RK * SMEM_CAP)
uint32_t emu_mapa(uint32_t a, int r) {
  return (uint32_t)((uintptr_t)smem_area + (uintptr_t)r * SMEM_CAP) | (a & (SMEM_CAP - 1));
}
static float dget(const Desc& d, int mn, int k, bool mnmajor, bool f16) {
  uintptr_t off;
  if (!mnmajor) {  // K-major: 8-row groups at SBO; inside, 128 B rows; k in the row (k*2 bytes < 128)
    off = (uintptr_t)(mn / 8) * d.sbo + (mn % 8) * 128 + k * 2;
    if (d.swz != 3) {
      fprintf(stderr, "only SW128\n");
      abort();
    }
  } else {  // MN-major SW128: atom = 64 (mn) x 8 (k): rows are k (128 B of 64 mn elements); next 8 k at SBO; next 64 mn at LBO
    off = (uintptr_t)(mn / 64) * d.lbo + (mn % 64) * 2 + (uintptr_t)(k / 8) * d.sbo + (k % 8) * 128;
  }
  uintptr_t a = smem_hi + d.start + off;
  a = swzn(a, d.swz);
  uint16_t h;
  memcpy(&h, (void*)a, 2);
  if (f16) {
    half x;
    memcpy(&x, &h, 2);
    return (float)x;
  }
  return b2f(h);
}
void emu_wgmma(float** d, int N, const uint32_t* areg, uint64_t ad, uint64_t bd, bool scale_d, int ta, int tb, bool f16) {
  int wg = LT / 128, l = LT % 128;
  if (areg)
    for (int i = 0; i < 4; i++) wgx[wg][l][i] = areg[i];
  barw(wgb[wg], 128);
  Desc A = dec(ad), B = dec(bd);
  int w = l / 32, ln = l % 32, g = ln / 4, t = ln % 4;
  float o[128];
  static float Am[64][16];
  static float Bm[256][16];
  static long stamp = -1;
  static int stampwg = -1;
  int key = wg + 8 * RK;
  {  // each fiber recomputes what it needs; cache per (wg, generation)
    if (stamp != wgb[wg].gen || stampwg != key) {
      stamp = wgb[wg].gen;
      stampwg = key;
      for (int m = 0; m < 64; m++)
        for (int k = 0; k < 16; k++) {
          if (areg) {
            int ww = m / 16, r = m % 16;
            uint32_t v = wgx[wg][ww * 32 + (r % 8) * 4 + (k % 8) / 2][(k / 8) * 2 + r / 8];
            uint16_t h = (k & 1) ? v >> 16 : v & 0xffff;
            if (f16) {
              half x;
              memcpy(&x, &h, 2);
              Am[m][k] = (float)x;
            } else
              Am[m][k] = b2f(h);
          } else
            Am[m][k] = dget(A, m, k, ta, f16);
        }
      for (int n = 0; n < N; n++)
        for (int k = 0; k < 16; k++) Bm[n][k] = dget(B, n, k, tb, f16);
    }
  }
  for (int i = 0; i < N / 2; i++) {
    int m = w * 16 + g + 8 * ((i / 2) & 1);
    int n = (i / 4) * 8 + t * 2 + (i & 1);
    double s = scale_d ? *d[i] : 0.0;
    for (int k = 0; k < 16; k++) s += (double)Am[m][k] * Bm[n][k];
    o[i] = (float)s;
  }
  barw(wgb[wg], 128);
  for (int i = 0; i < N / 2; i++) *d[i] = o[i];
}
