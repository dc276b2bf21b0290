/* Call kernels of a module: kernel_runner LIBRARY REQUESTS RESULTS.
 *
 * REQUESTS holds, for each call, a line "call NAME COUNT", a line "CODE BITS NDIM DIM..." for each of its tensors (DLPack's numbers),
 * and then the tensors' bytes. RESULTS gets the bytes of all tensors after the calls, in order.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tvm/ffi/c_api.h"

enum { MAX_DIMS = 8, MAX_TENSORS = 32, NAME_BYTES = 256, ALIGNMENT = 64 };

static void fail(const char* what, const char* which) {
  fprintf(stderr, "kernel_runner: %s %s\n", what, which);
  exit(1);
}

static void check(int status, const char* what) {
  if (status == 0) return;
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  const TVMFFIErrorCell* cell = (const TVMFFIErrorCell*)((char*)error + sizeof(TVMFFIObject));
  fprintf(stderr, "%.*s\n", (int)cell->message.size, cell->message.data);
  fail("cannot call", what);
}

static TVMFFIAny string(const char* text) {
  TVMFFIAny value;
  memset(&value, 0, sizeof(value));
  value.type_index = kTVMFFIRawStr;
  value.v_c_str = text;
  return value;
}

static TVMFFIAny call(TVMFFIObjectHandle function, const TVMFFIAny* arguments, int count, const char* what) {
  TVMFFIAny result;
  memset(&result, 0, sizeof(result));
  check(TVMFFIFunctionCall(function, (TVMFFIAny*)arguments, count, &result), what);
  return result;
}

static TVMFFIObjectHandle global_function(const char* name) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  check(TVMFFIFunctionGetGlobal(&key, &function), name);
  if (function == NULL) fail("the runtime lacks", name);
  return function;
}

static TVMFFIObjectHandle kernel(TVMFFIAny module, const char* name) {
  TVMFFIAny arguments[3] = {module, string(name), string("")};
  arguments[2].type_index = kTVMFFIBool;
  arguments[2].v_int64 = 0;
  TVMFFIAny found = call(global_function("ffi.ModuleGetFunction"), arguments, 3, name);
  if (found.type_index != kTVMFFIFunction) fail("the module lacks", name);
  return found.v_obj;
}

static size_t bytes_of(const DLTensor* tensor) {
  size_t bytes = tensor->dtype.bits / 8;
  for (int i = 0; i < tensor->ndim; i++) bytes *= (size_t)tensor->shape[i];
  return bytes;
}

int main(int argc, char** argv) {
  if (argc != 4) fail("usage:", "kernel_runner LIBRARY REQUESTS RESULTS");
  TVMFFIAny path = string(argv[1]);
  TVMFFIAny module = call(global_function("ffi.ModuleLoadFromFile"), &path, 1, argv[1]);
  FILE *requests = fopen(argv[2], "rb"), *results = fopen(argv[3], "wb");
  if (requests == NULL || results == NULL) fail("cannot open", argv[2]);
  char name[NAME_BYTES];
  int count;
  while (fscanf(requests, "call %255s %d\n", name, &count) == 2) {
    static DLTensor tensors[MAX_TENSORS];
    static int64_t shapes[MAX_TENSORS][MAX_DIMS];
    TVMFFIAny arguments[MAX_TENSORS];
    if (count > MAX_TENSORS) fail("too many tensors for", name);
    for (int i = 0; i < count; i++) {
      int code, bits, ndim;
      if (fscanf(requests, "%d %d %d", &code, &bits, &ndim) != 3 || ndim > MAX_DIMS) fail("no tensor for", name);
      for (int d = 0; d < ndim; d++)
        if (fscanf(requests, "%lld", (long long*)&shapes[i][d]) != 1) fail("no shape for", name);
      fgetc(requests); /* the end of the line */
      tensors[i] = (DLTensor){.ndim = ndim, .dtype = {(uint8_t)code, (uint8_t)bits, 1}, .shape = shapes[i]};
      tensors[i].device.device_type = kDLCPU;
    }
    for (int i = 0; i < count; i++) {
      size_t bytes = bytes_of(&tensors[i]);
      tensors[i].data = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
      if (fread(tensors[i].data, 1, bytes, requests) != bytes) fail("bytes are missing for", name);
      arguments[i] = string("");
      arguments[i].type_index = kTVMFFIDLTensorPtr;
      arguments[i].v_ptr = &tensors[i];
    }
    call(kernel(module, name), arguments, count, name);
    for (int i = 0; i < count; i++) {
      fwrite(tensors[i].data, 1, bytes_of(&tensors[i]), results);
      free(tensors[i].data);
    }
  }
  if (!feof(requests) || fclose(results) != 0) fail("damaged:", argv[2]);
  return 0;
}
