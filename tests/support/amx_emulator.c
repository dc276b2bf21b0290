/* AMX's tile instructions on a processor that lacks them: it raises SIGILL at one, and the handler does what the architecture
 * manual says (volume 2, chapter 3 and 4), for the instructions that llmc uses. Each thread has its own tiles.
 *
 * llmc_emulate_amx() starts it. llmc_amx_count(KIND) is how many instructions were executed: 0 products of bytes, 1 of bfloat16,
 * 2 configurations, 3 releases. A tile instruction that the manual forbids ends the program, as it does on hardware.
 */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, BYTES = 64 };
enum { BYTE_PRODUCTS, BF16_PRODUCTS, CONFIGURATIONS, RELEASES, KINDS };

typedef struct {
  int rows, bytes;
  uint8_t data[ROWS][BYTES];
} Tile;

static __thread Tile tiles[TILES];
static __thread int configured;
static long counts[KINDS];

static void count(int kind) { __atomic_fetch_add(&counts[kind], 1, __ATOMIC_RELAXED); }

/* General registers by their number in an instruction. */
static const int NAMES[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

typedef struct {
  int reg, rm, is_register; /* the ModRM byte's */
  uint8_t* address;
  int64_t index; /* the scaled index register: the distance of rows */
  const uint8_t* end;
} Operand;

static int32_t displacement(const uint8_t* at, int bytes) {
  int32_t wide;
  if (bytes == 1) return (int8_t)*at;
  memcpy(&wide, at, 4);
  return wide;
}

/* The operand at a ModRM byte. x and b extend the numbers of index and base. */
static Operand operand(const uint8_t* at, const greg_t* registers, int x, int b) {
  Operand found = {.reg = at[0] >> 3 & 7, .rm = at[0] & 7, .is_register = at[0] >> 6 == 3, .end = at + 1};
  if (found.is_register) return found;
  int mod = at[0] >> 6, base = found.rm, size = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  int has_base = 1;
  if (found.rm == 4) {
    int sib = *found.end++, index = (sib >> 3 & 7) | x;
    base = sib & 7;
    if (index != 4) found.index = registers[NAMES[index]] << (sib >> 6);
    if (base == 5 && mod == 0) has_base = 0, size = 4;
  } else if (found.rm == 5 && mod == 0) {
    found.address = (uint8_t*)found.end + 4 + displacement(found.end, 4); /* relative to the next instruction */
    found.end += 4;
    return found;
  }
  int64_t address = has_base ? registers[NAMES[base | b]] : 0;
  if (size) address += displacement(found.end, size);
  found.end += size;
  found.address = (uint8_t*)address;
  return found;
}

static int configure(const uint8_t* config) {
  if (config[0] != 1 || config[1] != 0) return 0;
  memset(tiles, 0, sizeof(tiles));
  for (int i = 0; i < TILES; i++) {
    tiles[i].bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8;
    tiles[i].rows = config[48 + i];
    if (tiles[i].bytes > BYTES || tiles[i].rows > ROWS || !tiles[i].bytes != !tiles[i].rows) return 0;
  }
  configured = 1;
  count(CONFIGURATIONS);
  return 1;
}

static int move(Tile* tile, Operand memory, int is_store) {
  if (!configured || memory.rm != 4 || !tile->rows) return 0;
  for (int m = 0; m < tile->rows; m++) {
    uint8_t* row = memory.address + m * memory.index;
    if (is_store) {
      memcpy(row, tile->data[m], (size_t)tile->bytes);
    } else {
      memset(tile->data[m], 0, BYTES);
      memcpy(tile->data[m], row, (size_t)tile->bytes);
    }
  }
  return 1;
}

static int fits(const Tile* c, const Tile* a, const Tile* b) {
  int distinct = c != a && c != b && a != b;
  return configured && distinct && c->rows == a->rows && a->bytes == 4 * b->rows && b->bytes == c->bytes && c->rows && b->rows;
}

static int multiply_bytes(Tile* c, const Tile* a, const Tile* b, int a_signed, int b_signed) {
  if (!fits(c, a, b)) return 0;
  count(BYTE_PRODUCTS);
  for (int m = 0; m < c->rows; m++)
    for (int n = 0; n < c->bytes / 4; n++) {
      uint32_t sum;
      memcpy(&sum, &c->data[m][4 * n], 4);
      for (int k = 0; k < a->bytes / 4; k++)
        for (int j = 0; j < 4; j++) {
          uint8_t x = a->data[m][4 * k + j], y = b->data[k][4 * n + j];
          sum += (uint32_t)((a_signed ? (int8_t)x : x) * (b_signed ? (int8_t)y : y));
        }
      memcpy(&c->data[m][4 * n], &sum, 4);
    }
  return 1;
}

static float flushed(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value; }

static float widened(const uint8_t* bf16) {
  uint32_t bits = (uint32_t)bf16[0] << 16 | (uint32_t)bf16[1] << 24;
  float value;
  memcpy(&value, &bits, 4);
  return flushed(value);
}

static int multiply_bf16(Tile* c, const Tile* a, const Tile* b) {
  if (!fits(c, a, b)) return 0;
  count(BF16_PRODUCTS);
  for (int m = 0; m < c->rows; m++)
    for (int n = 0; n < c->bytes / 4; n++) {
      float sums[2] = {0, 0}, total;
      for (int k = 0; k < a->bytes / 4; k++)
        for (int j = 0; j < 2; j++)
          sums[j] = flushed(fmaf(widened(&a->data[m][4 * k + 2 * j]), widened(&b->data[k][4 * n + 2 * j]), sums[j]));
      memcpy(&total, &c->data[m][4 * n], 4);
      total = flushed(flushed(total) + flushed(sums[0] + sums[1]));
      memcpy(&c->data[m][4 * n], &total, 4);
    }
  return 1;
}

/* Do the instruction at `code`; behind it, or NULL if it is none of those that are emulated. */
static const uint8_t* execute(const uint8_t* code, const greg_t* registers) {
  enum { NONE, H66, HF3, HF2 };
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return NULL; /* VEX.128.0F38.W0 */
  int prefix = code[2] & 3, third = ~code[2] >> 3 & 15;
  Operand o = operand(code + 4, registers, code[1] & 0x40 ? 0 : 8, code[1] & 0x20 ? 0 : 8);
  int done = 0;
  switch (code[3]) {
    case 0x49:
      if (prefix == NONE && o.is_register) {
        memset(tiles, 0, sizeof(tiles));
        configured = 0;
        count(RELEASES);
        done = 1;
      } else if (prefix == NONE) {
        done = configure(o.address);
      } else if (prefix == HF2 && o.is_register && configured) {
        memset(tiles[o.reg].data, 0, sizeof(tiles[o.reg].data));
        done = 1;
      }
      break;
    case 0x4b:
      if (!o.is_register && prefix != NONE) done = move(&tiles[o.reg], o, prefix == HF3);
      break;
    case 0x5c:
      if (o.is_register && prefix == HF3 && third < TILES) done = multiply_bf16(&tiles[o.reg], &tiles[o.rm], &tiles[third]);
      break;
    case 0x5e: /* NONE: both unsigned, H66: the second signed, HF3: the first, HF2: both */
      if (o.is_register && third < TILES)
        done = multiply_bytes(&tiles[o.reg], &tiles[o.rm], &tiles[third], prefix >= HF3, prefix == HF2 || prefix == H66);
      break;
  }
  return done ? o.end : NULL;
}

static void on_illegal(int number, siginfo_t* info, void* context) {
  (void)info;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* next = execute((const uint8_t*)registers[REG_RIP], registers);
  if (next == NULL)
    signal(number, SIG_DFL); /* the instruction comes again, and ends the program */
  else
    registers[REG_RIP] = (greg_t)next;
}

void llmc_emulate_amx(void) {
  struct sigaction action;
  memset(&action, 0, sizeof(action));
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, NULL);
}

long llmc_amx_count(int kind) { return counts[kind]; }
