// What single instructions of PTX do, called by the bodies that instructions.py gives TVM's helpers.
#pragma once
#include "emulator.h"

void emu_mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool f16 = false);
void emu_ldmatrix(uint32_t** d, int num, bool trans, const void* addr);
void emu_stmatrix(const uint32_t* s, int num, bool trans, void* addr);
void emu_prmt(uint32_t& d, uint32_t a, uint32_t b, uint32_t s);
uint32_t emu_lop3(uint32_t a, uint32_t b, uint32_t c, int lut);
uint32_t emu_bf2(uint32_t a, uint32_t b, char op);
void emu_mb_init(const void* p, uint32_t c);
void emu_mb_arrive(const void* p, int c);
void emu_mb_expect(const void* p, uint32_t b);
void emu_mb_tx(uint32_t p, long b);
void emu_mb_wait(const void* p, uint32_t ph);
void emu_tma_load(uint32_t dst, const void* tm_, const int* co, int rank, uint32_t mbar);
void emu_tma_store(const void* tm_, const int* co, int rank, uint32_t src);
uint32_t emu_mapa(uint32_t a, int r);
void emu_wgmma(float** d, int N, const uint32_t* areg, uint64_t ad, uint64_t bd, bool scale_d, int ta, int tb, bool f16);
