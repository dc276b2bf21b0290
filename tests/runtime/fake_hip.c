/* A libamdhip64 whose GPU is this machine: memory is the C library's, and kernels are those of a library that the CUDA emulator built
 * from the same functions (tests/support/cuda_emulator), which take the arguments of a launch as HIP does.
 *
 * What is put into the stream is done at once, except while a graph is recorded. Memory starts as 0xFF bytes (NaN). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NO_BINARY = 209, NOT_FOUND = 500, MOST_ARGUMENTS = 64 };
typedef void (*Emulated)(void**, int, int, int, int, int, int, int, size_t);

typedef struct {
  Emulated run;
  int arguments;
} Function;

typedef struct Launch {
  Function* function;
  uint64_t values[MOST_ARGUMENTS];
  int shape[6];
  size_t shared;
  struct Launch* next;
} Launch;

static void* kernels;
static const int* counts; /* arguments of each kernel, in the order of `names` */
static const char** names;
static int kernel_count, machine;
static size_t memory_total, memory_used;
static Launch *recorded, **record_end;
long fake_hip_launches, fake_hip_replays;

typedef struct {
  size_t size;
  char pad[256 - sizeof(size_t)];
} Header;

/* `arch`: the machine number that a code object's e_flags must name. */
void fake_hip_setup(const char* library, const char** kernel_names, const int* argument_counts, int count, int arch, size_t memory) {
  kernels = library ? dlopen(library, RTLD_NOW | RTLD_LOCAL) : NULL;
  names = kernel_names;
  counts = argument_counts;
  kernel_count = count;
  machine = arch;
  memory_total = memory;
  memory_used = 0;
  fake_hip_launches = fake_hip_replays = 0;
}

const char* hipGetErrorString(int status) {
  switch (status) {
    case OUT_OF_MEMORY: return "out of memory";
    case NO_DEVICE: return "no ROCm-capable device is detected";
    case NO_BINARY: return "no kernel image is available for execution on the device";
    case NOT_FOUND: return "named symbol not found";
    default: return "invalid argument";
  }
}
int hipGetLastError(void) { return OK; }
int hipSetDevice(int device) { return device == 0 ? OK : NO_DEVICE; }
int hipStreamCreateWithFlags(void** stream, unsigned flags) { return *stream = (void*)0x51, flags == 1 ? OK : INVALID; }
int hipStreamDestroy(void* stream) { return stream ? OK : INVALID; }
int hipStreamSynchronize(void* stream) { return stream ? OK : INVALID; }

int hipMemGetInfo(size_t* available, size_t* total) {
  *available = memory_total - memory_used;
  *total = memory_total;
  return OK;
}

int hipMalloc(void** address, size_t size) {
  if (size > memory_total - memory_used) return OUT_OF_MEMORY;
  Header* block = aligned_alloc(256, (sizeof(Header) + size + 255) / 256 * 256);
  block->size = size;
  memory_used += size;
  memset(block + 1, 0xFF, size);
  *address = block + 1;
  return OK;
}

int hipFree(void* address) {
  Header* block = (Header*)address - 1;
  memory_used -= block->size;
  free(block);
  return OK;
}

int hipHostMalloc(void** address, size_t size, unsigned flags) {
  *address = aligned_alloc(256, (size + 255) / 256 * 256);
  return flags == 0 ? OK : INVALID;
}
int hipHostFree(void* address) { return free(address), OK; }

int hipMemsetAsync(void* address, int value, size_t size, void* stream) {
  memset(address, value, size);
  return stream && !record_end ? OK : INVALID;
}

int hipMemcpyAsync(void* target, const void* source, size_t size, int kind, void* stream) {
  if (record_end || !stream || kind < 1 || kind > 3) return INVALID;
  memmove(target, source, size);
  return OK;
}

int hipEventCreateWithFlags(void** event, unsigned flags) { return *event = malloc(1), flags == 0 || flags == 2 ? OK : INVALID; }
int hipEventDestroy(void* event) { return free(event), OK; }
int hipEventRecord(void* event, void* stream) { return event && stream ? OK : INVALID; }
int hipEventSynchronize(void* event) { return event ? OK : INVALID; }
int hipEventElapsedTime(float* milliseconds, void* start, void* end) { return *milliseconds = 1, start && end ? OK : INVALID; }

int hipModuleLoadData(void** module, const void* image) {
  const unsigned char* elf = image;
  uint32_t flags;
  memcpy(&flags, elf + 48, sizeof(flags));
  if (memcmp(elf, "\177ELF", 4) != 0) return INVALID;
  if ((int)(flags & 0xFF) != machine) return NO_BINARY;
  *module = (void*)image;
  return OK;
}

int hipModuleGetFunction(void** function, void* module, const char* name) {
  char entry[512];
  snprintf(entry, sizeof(entry), "run_%s", name);
  for (int i = 0; module && i < kernel_count; i++) {
    if (strcmp(names[i], name) != 0) continue;
    Function* found = malloc(sizeof(*found));
    found->run = (Emulated)dlsym(kernels, entry);
    found->arguments = counts[i];
    *function = found;
    return found->run ? OK : NOT_FOUND;
  }
  return NOT_FOUND;
}

static void perform(Launch* l) {
  void* places[MOST_ARGUMENTS];
  for (int i = 0; i < l->function->arguments; i++) places[i] = &l->values[i];
  l->function->run(places, l->shape[0], l->shape[1], l->shape[2], l->shape[3], l->shape[4], l->shape[5], 1, l->shared);
}

int hipModuleLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void* stream, void** arguments, void** extra) {
  if (!stream || extra || !gx || !gy || !gz || bx * by * bz > 1024) return INVALID;
  Launch* l = calloc(1, sizeof(*l));
  *l = (Launch){.function = function, .shape = {(int)gx, (int)gy, (int)gz, (int)bx, (int)by, (int)bz}, .shared = shared};
  for (int i = 0; i < function->arguments; i++) memcpy(&l->values[i], arguments[i], sizeof(uint64_t));
  fake_hip_launches++;
  if (record_end) {
    *record_end = l;
    record_end = &l->next;
    return OK;
  }
  perform(l);
  free(l);
  return OK;
}

int hipStreamBeginCapture(void* stream, int mode) {
  recorded = NULL;
  record_end = &recorded;
  return stream && mode == 2 ? OK : INVALID;
}

int hipStreamEndCapture(void* stream, void** graph) {
  record_end = NULL;
  *graph = recorded;
  return stream ? OK : INVALID;
}
int hipGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  return *executable = graph, flags == 0 ? OK : INVALID;
}
int hipGraphDestroy(void* graph) { return graph ? OK : INVALID; }

int hipGraphLaunch(void* executable, void* stream) {
  for (Launch* l = executable; l; l = l->next) perform(l);
  fake_hip_replays++;
  return stream ? OK : INVALID;
}
