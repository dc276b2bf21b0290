// State of the emulator that its instructions share.
#pragma once
#include <map>

#include "emulator.h"

constexpr int BLOCKS = 8;  // of a cluster, at most
constexpr size_t SMEM_CAP = 1 << 18;

extern int cur, NTH, CLN, WARP;  // the fiber that runs; threads of a block, blocks of a cluster, threads of a warp
#define LT (cur % NTH)
#define RK (cur / NTH)
extern bool progress;  // a thread did something since all were last tried: no deadlock
void emu_yield();

struct Bar {
  int cnt = 0;
  long gen = 0;
};
extern Bar wgb_[BLOCKS][8];
#define wgb wgb_[RK]
void barw(Bar& barrier, int threads);

// Where lanes of a warp, and threads of a warpgroup, see each other's operands.
extern uint32_t wx_[BLOCKS][32][64][16];
#define wx wx_[RK]
extern uint32_t wgx_[BLOCKS][8][128][4];
#define wgx wgx_[RK]

extern char* smem_area;

// An mbarrier: arrivals expected and missing, bytes missing, phase.
struct MB {
  int count = 0, pend = 0;
  long tx = 0;
  int phase = 0;
};
extern std::map<uintptr_t, MB> mbs;
