/* Continue a text of token ids, greedily: example COUNT ID... prints the ids that follow, at most COUNT.
 *
 * The whole interface is tvm-ffi's C ABI (include/tvm/ffi/c_api.h): load the module, wrap memory as tensors, call functions. What to
 * wrap is in model.txt, beside this file. Build and run in this folder:
 *
 *   @BUILD@
 *   ./example 16 504 3575 282 4649 314
 */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tvm/ffi/c_api.h"

#ifdef _WIN32
#include <malloc.h>
#include <windows.h>
#define aligned_alloc(alignment, size) _aligned_malloc(size, alignment)
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#endif

enum { ALIGNMENT = 64, MAX_DIMS = 8, PATH_BYTES = 4096 };

static void fail(const char* format, ...) {
  va_list rest;
  va_start(rest, format);
  fprintf(stderr, "example: ");
  vfprintf(stderr, format, rest);
  fputc('\n', stderr);
  va_end(rest);
  exit(1);
}

/* What tvm-ffi says went wrong in the last call. */
static void check(int status, const char* what) {
  if (status == 0) return;
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  const TVMFFIErrorCell* cell = error ? (const TVMFFIErrorCell*)((char*)error + sizeof(TVMFFIObject)) : NULL;
  fail("%s: %.*s", what, cell ? (int)cell->message.size : 0, cell ? cell->message.data : "");
}

static TVMFFIAny none(void) {
  TVMFFIAny value;
  memset(&value, 0, sizeof(value));
  return value;
}

static TVMFFIAny integer(int64_t number) {
  TVMFFIAny value = none();
  value.type_index = kTVMFFIInt;
  value.v_int64 = number;
  return value;
}

static TVMFFIAny string(const char* text) {
  TVMFFIAny value = none();
  value.type_index = kTVMFFIRawStr;
  value.v_c_str = text;
  return value;
}

static TVMFFIObjectHandle global_function(const char* name) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  check(TVMFFIFunctionGetGlobal(&key, &function), name);
  if (function == NULL) fail("there is no function %s in the runtime", name);
  return function;
}

static TVMFFIAny call(TVMFFIObjectHandle function, TVMFFIAny* arguments, int count, const char* what) {
  TVMFFIAny result = none();
  check(TVMFFIFunctionCall(function, arguments, count, &result), what);
  return result;
}

/* A function of a module by name. */
static TVMFFIObjectHandle method(TVMFFIAny module, const char* name) {
  TVMFFIAny arguments[3] = {module, string(name), integer(0)};
  arguments[2].type_index = kTVMFFIBool; /* do not look into imported modules */
  TVMFFIAny found = call(global_function("ffi.ModuleGetFunction"), arguments, 3, name);
  if (found.type_index != kTVMFFIFunction) fail("the module has no function %s", name);
  return found.v_obj;
}

static void forget(DLManagedTensor* tensor) {
  free(tensor->dl_tensor.shape);
  free(tensor);
}

/* Where the model runs, as DLPack numbers kinds of devices. */
static int device = kDLCPU;

#ifdef COPY_ALWAYS /* even where the device's memory is this program's: for tests */
static int has_own_memory(void) { return 1; }
#else
static int has_own_memory(void) { return device != kDLCPU; }
#endif

/* Call TVM's function of that name, which moves a tensor's bytes: TVMTensorCopyFromBytes or TVMTensorCopyToBytes. */
static void move(const char* name, TVMFFIAny on_device, void* data) {
  const DLTensor* tensor = (const DLTensor*)((char*)on_device.v_obj + sizeof(TVMFFIObject));
  int64_t bytes = tensor->dtype.bits / 8;
  for (int i = 0; i < tensor->ndim; i++) bytes *= tensor->shape[i];
  TVMFFIAny arguments[3] = {on_device, none(), integer(bytes)};
  arguments[1].type_index = kTVMFFIOpaquePtr;
  arguments[1].v_ptr = data;
  if (bytes) call(global_function(name), arguments, 3, name);
}

/* A tensor in the device's memory with the bytes at `data`. */
static TVMFFIAny device_tensor(void* data, DLDataType dtype, int ndim, const int64_t* shape) {
  TVMFFIAny sizes[MAX_DIMS], arguments[4] = {none(), none(), none(), none()};
  for (int i = 0; i < ndim; i++) sizes[i] = integer(shape[i]);
  arguments[0] = call(global_function("ffi.Shape"), sizes, ndim, "a shape");
  arguments[1].type_index = kTVMFFIDataType;
  arguments[1].v_dtype = dtype;
  arguments[2].type_index = kTVMFFIDevice;
  arguments[2].v_device.device_type = (DLDeviceType)device;
  TVMFFIAny value = call(global_function("runtime.TVMTensorAllocWithScope"), arguments, 4, "memory of the device");
  if (arguments[0].type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(arguments[0].v_obj);
  move("runtime.TVMTensorCopyFromBytes", value, data);
  return value;
}

/* A tensor over memory that stays the caller's; in the device's memory if that is another, with a copy of it. */
static TVMFFIAny tensor(void* data, int code, int bits, int ndim, const int64_t* shape) {
  DLDataType dtype = {(uint8_t)code, (uint8_t)bits, 1};
  if (has_own_memory()) return device_tensor(data, dtype, ndim, shape);
  DLManagedTensor* header = calloc(1, sizeof(*header));
  header->dl_tensor.data = data;
  header->dl_tensor.device.device_type = kDLCPU;
  header->dl_tensor.ndim = ndim;
  header->dl_tensor.dtype = dtype;
  header->dl_tensor.shape = malloc(sizeof(int64_t) * (size_t)(ndim ? ndim : 1));
  memcpy(header->dl_tensor.shape, shape, sizeof(int64_t) * (size_t)ndim);
  header->deleter = forget;
  TVMFFIAny value = none();
  TVMFFIObjectHandle handle = NULL;
  check(TVMFFITensorFromDLPack(header, ALIGNMENT, 1, &handle), "wrapping a tensor");
  value.type_index = kTVMFFITensor;
  value.v_obj = handle;
  return value;
}

static TVMFFIAny ints(int32_t* data, int64_t count) { return tensor(data, kDLInt, 32, 1, &count); }

static void* zeros(size_t bytes) {
  size_t rounded = (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
  void* data = aligned_alloc(ALIGNMENT, rounded);
  if (data == NULL) fail("no memory for %zu bytes", bytes);
  return memset(data, 0, rounded);
}

static void release(void* data) {
#ifdef _WIN32
  _aligned_free(data);
#else
  free(data);
#endif
}

/* A file's bytes, mapped where the system can. */
static char* contents(const char* path) {
#ifdef _WIN32
  FILE* file = fopen(path, "rb");
  if (file == NULL) fail("%s cannot be opened", path);
  _fseeki64(file, 0, SEEK_END);
  size_t size = (size_t)_ftelli64(file);
  rewind(file);
  char* data = zeros(size);
  if (fread(data, 1, size, file) != size) fail("%s cannot be read", path);
  fclose(file);
  return data;
#else
  struct stat status;
  int file = open(path, O_RDONLY);
  if (file < 0 || fstat(file, &status) != 0) fail("%s cannot be opened", path);
  void* data = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  if (data == MAP_FAILED) fail("%s cannot be mapped", path);
  close(file);
  return data;
#endif
}

typedef struct {
  int vocab, page, rows, context, stop_count, layers, weights;
  int* stops;
  TVMFFIAny* constant; /* pages of the KV cache, then weights: the last arguments of every call */
  TVMFFIObjectHandle decode, extend;
  int32_t* block_table;
  float* logits;
} Model;

static void read_numbers(FILE* index, int count, ...) {
  va_list places;
  va_start(places, count);
  for (int i = 0; i < count; i++)
    if (fscanf(index, "%*[^-0-9]%d", va_arg(places, int*)) != 1) fail("model.txt is damaged");
  va_end(places);
}

static TVMFFIAny read_weight(FILE* index) {
  static char last[PATH_BYTES];
  static char* mapped;
  int code, bits, ndim;
  int64_t shape[MAX_DIMS], offset;
  char path[PATH_BYTES];
  if (fscanf(index, "%d %d %d", &code, &bits, &ndim) != 3 || ndim > MAX_DIMS) fail("model.txt is damaged");
  for (int i = 0; i < ndim; i++)
    if (fscanf(index, "%lld", (long long*)&shape[i]) != 1) fail("model.txt is damaged");
  if (fscanf(index, "%lld %4095s", (long long*)&offset, path) != 2) fail("model.txt is damaged");
  if (strcmp(path, last) != 0) {
    mapped = contents(path);
    strcpy(last, path);
  }
  return tensor(mapped + offset, code, bits, ndim, shape);
}

/* Linux keeps AMX's tile registers for the threads of a program that asked for them. */
static void ask_for_tiles(void) {
#ifdef SYS_arch_prctl
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0) return;
#endif
  fail("this machine has no AMX, or does not let programs use it: package a variant for x86-64-v4");
}

static void load(Model* model, int positions) {
  FILE* index = fopen("model.txt", "r");
  char library[PATH_BYTES];
  if (index == NULL || fscanf(index, "library %4095s", library) != 1) fail("model.txt is not in this folder, or damaged");
  read_numbers(index, 4, &model->vocab, &model->page, &model->rows, &model->context);
  if (positions > model->context) fail("%d tokens are more than the context of %d", positions, model->context);
  read_numbers(index, 1, &model->stop_count);
  model->stops = calloc((size_t)model->stop_count + 1, sizeof(int));
  for (int i = 0; i < model->stop_count; i++) read_numbers(index, 1, &model->stops[i]);

  int tiles;
  read_numbers(index, 2, &device, &tiles);
  if (tiles) ask_for_tiles();
#ifdef _WIN32 /* nothing here calls it by name, so nothing else loads it */
  if (LoadLibraryA("tvm_runtime.dll") == NULL) fail("tvm_runtime.dll is not found: put model\\runtime on the PATH");
#endif
  const TVMFFIAny pooled = integer(2);
  TVMFFIAny file = string(library), host = integer(kDLCPU), first = integer(0);
  TVMFFIAny devices[6] = {integer(device), first, pooled, host, first, pooled};
  TVMFFIAny module = call(global_function("ffi.ModuleLoadFromFile"), &file, 1, library);
  TVMFFIAny machine = call(method(module, "vm_load_executable"), NULL, 0, library);
  call(method(machine, "vm_initialization"), devices, device == kDLCPU ? 3 : 6, library);
  model->decode = method(machine, "decode");
  model->extend = method(machine, "extend");

  int code, bits, pages = (positions + model->page - 1) / model->page;
  read_numbers(index, 3, &model->layers, &code, &bits);
  int* shapes = calloc((size_t)model->layers * 2, sizeof(int));
  for (int i = 0; i < 2 * model->layers; i++) read_numbers(index, 1, &shapes[i]);
  read_numbers(index, 1, &model->weights);
  model->constant = calloc((size_t)(model->layers + model->weights), sizeof(TVMFFIAny));
  for (int i = 0; i < model->layers; i++) {
    int64_t shape[3] = {pages, shapes[2 * i], shapes[2 * i + 1]};
    size_t bytes = (size_t)(shape[0] * shape[1] * shape[2]) * (size_t)bits / 8;
    char* empty = zeros(bytes);
    model->constant[i] = tensor(empty, code, bits, 3, shape);
    if (has_own_memory()) release(empty);
  }
  for (int i = 0; i < model->weights; i++) model->constant[model->layers + i] = read_weight(index);
  fclose(index);

  model->block_table = zeros(sizeof(int32_t) * (size_t)pages); /* the one sequence has the pages in their order */
  for (int i = 0; i < pages; i++) model->block_table[i] = i;
  model->logits = zeros(sizeof(float) * (size_t)model->vocab);
}

/* Run `count` tokens that stand at `start` and later; the likeliest token after them. */
static int run(Model* model, const int* tokens, int start, int count, int decode) {
  int32_t* ids = zeros(sizeof(int32_t) * (size_t)count);
  int32_t* positions = zeros(sizeof(int32_t) * (size_t)count);
  int32_t q_indptr[2] __attribute__((aligned(64))) = {0, count};
  int32_t length[1] __attribute__((aligned(64))) = {start + count};
  int32_t wanted[1] __attribute__((aligned(64))) = {count - 1};
  for (int i = 0; i < count; i++) {
    ids[i] = tokens[start + i];
    positions[i] = start + i; /* and the slots, with pages in order */
  }
  int64_t out[2] = {1, model->vocab}, table[2] = {1, (start + count + model->page - 1) / model->page};
  TVMFFIAny* arguments = calloc((size_t)(8 + model->layers + model->weights), sizeof(TVMFFIAny));
  int n = 0;
  arguments[n++] = tensor(model->logits, kDLFloat, 32, 2, out);
  arguments[n++] = ints(ids, count);
  arguments[n++] = ints(positions, count);
  arguments[n++] = ints(positions, count);
  arguments[n++] = ints(q_indptr, 2);
  arguments[n++] = ints(length, 1);
  arguments[n++] = tensor(model->block_table, kDLInt, 32, 2, table);
  if (!decode) arguments[n++] = ints(wanted, 1);
  int own = n;
  for (int i = 0; i < model->layers + model->weights; i++) arguments[n++] = model->constant[i];
  TVMFFIAny result = call(decode ? model->decode : model->extend, arguments, n, decode ? "decode" : "extend");
  if (result.type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(result.v_obj);
  if (has_own_memory()) move("runtime.TVMTensorCopyToBytes", arguments[0], model->logits);
  for (int i = 0; i < own; i++) TVMFFIObjectDecRef(arguments[i].v_obj);
  free(arguments);
  release(ids);
  release(positions);
  int best = 0;
  for (int i = 1; i < model->vocab; i++)
    if (model->logits[i] > model->logits[best]) best = i;
  return best;
}

int main(int argc, char** argv) {
  if (argc < 3) fail("usage: example COUNT ID...");
  int limit = atoi(argv[1]), prompt = argc - 2, next = 0;
  if (limit < 1) fail("COUNT must be at least 1, and %s was given", argv[1]);
  int* tokens = calloc((size_t)(prompt + limit), sizeof(int));
  Model model = {0};
  load(&model, prompt + limit);
  for (int i = 0; i < prompt; i++) {
    tokens[i] = atoi(argv[2 + i]);
    if (tokens[i] < 0 || tokens[i] >= model.vocab) fail("token %s is not in the vocabulary of %d", argv[2 + i], model.vocab);
  }
  for (int start = 0; start < prompt; start += model.rows)
    next = run(&model, tokens, start, prompt - start < model.rows ? prompt - start : model.rows, 0);
  for (int made = 0; made < limit; made++) {
    tokens[prompt + made] = next;
    printf(made ? " %d" : "%d", next);
    fflush(stdout);
    for (int i = 0; i < model.stop_count; i++)
      if (next == model.stops[i]) limit = 0;
    if (made + 1 < limit) next = run(&model, tokens, prompt + made, 1, 1);
  }
  printf("\n");
  return 0;
}
