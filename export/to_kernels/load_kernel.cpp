// Run one exported kernel, sub-image attention on packed bf16 q, k, v, with the CUDA driver API, and check a few numbers.
//
// Build:  g++ -std=c++17 -O2 load_kernel.cpp -o load_kernel -ldl        (no CUDA toolkit: the driver is opened at run time)
// Run:    ./load_kernel FILE.ptx ENTRY THREADS SHARED_MEMORY BLOCK_M PEEL TILES TOKENS HEADS HEAD_DIM
//
// FILE is a .ptx or .cubin of a row of kernels.json whose variant is "packed"; ENTRY, THREADS, SHARED_MEMORY and the
// constants BLOCK_M, PEEL and H are in that row. Its grid is (cdiv(TOKENS - PEEL, BLOCK_M) + PEEL) * HEADS * TILES.
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

// The part of cuda.h that this program uses.
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
constexpr int CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;

template <typename... Arguments>
void call(void* driver, const char* name, Arguments... arguments) {
    auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(driver, name));
    if (function == nullptr) throw std::runtime_error(std::string(name) + " is not in libcuda.so.1");
    if (int code = function(arguments...)) throw std::runtime_error(std::string(name) + " failed with " + std::to_string(code));
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bf16(uint16_t half) {
    uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// One channel of one query's attention, in double precision; qkv is [tiles, tokens, 3, heads, head_dim].
double attend(const std::vector<uint16_t>& qkv, int tile, int query, int head, int channel, int tokens, int heads, int dim) {
    auto at = [&](int token, int part, int c) {
        return from_bf16(qkv[(((static_cast<size_t>(tile) * tokens + token) * 3 + part) * heads + head) * dim + c]);
    };
    double total = 0, result = 0;
    for (int key = 0; key < tokens; ++key) {
        double score = 0;
        for (int c = 0; c < dim; ++c) score += static_cast<double>(at(query, 0, c)) * at(key, 1, c);
        double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
        total += weight;
        result += weight * at(key, 2, channel);
    }
    return result / total;
}

int run(char** argument) {
    const std::string file = argument[1], entry = argument[2];
    int number[8];
    for (int i = 0; i < 8; ++i) number[i] = std::atoi(argument[3 + i]);
    auto [threads, shared, block_m, peel, tiles, tokens, heads, dim] = number;

    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (driver == nullptr) throw std::runtime_error("libcuda.so.1 cannot be loaded; this machine has no NVIDIA driver");
    std::ifstream stream(file, std::ios::binary);
    std::vector<char> image{std::istreambuf_iterator<char>(stream), {}};
    if (image.empty()) throw std::runtime_error(file + " cannot be read");
    image.push_back(0);

    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUfunction function;
    call(driver, "cuInit", 0u);
    call(driver, "cuDeviceGet", &device, 0);
    call(driver, "cuDevicePrimaryCtxRetain", &context, device);
    call(driver, "cuCtxSetCurrent", context);
    call(driver, "cuModuleLoadData", &module, static_cast<const void*>(image.data()));
    call(driver, "cuModuleGetFunction", &function, module, entry.c_str());
    call(driver, "cuFuncSetAttribute", function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared);

    const size_t values = static_cast<size_t>(tiles) * tokens * heads * dim;
    std::vector<uint16_t> qkv(3 * values), out(values);
    for (size_t i = 0; i < qkv.size(); ++i) qkv[i] = to_bf16(std::sin(0.37f * static_cast<float>(i % 9973)) * 1.5f);
    CUdeviceptr device_qkv, device_out;
    call(driver, "cuMemAlloc_v2", &device_qkv, 2 * qkv.size());
    call(driver, "cuMemAlloc_v2", &device_out, 2 * out.size());
    call(driver, "cuMemcpyHtoD_v2", device_qkv, static_cast<const void*>(qkv.data()), 2 * qkv.size());

    // The parameters in the order of kernels.json: qkv_ptr, num_tokens, out_ptr.
    void* parameters[] = {&device_qkv, &tokens, &device_out};
    const unsigned programs = ((tokens - peel + block_m - 1) / block_m + peel) * heads * tiles;
    call(driver, "cuLaunchKernel", function, programs, 1u, 1u, static_cast<unsigned>(threads), 1u, 1u,
         static_cast<unsigned>(shared), CUstream{}, static_cast<void**>(parameters), static_cast<void**>(nullptr));
    call(driver, "cuCtxSynchronize");
    call(driver, "cuMemcpyDtoH_v2", static_cast<void*>(out.data()), device_out, 2 * out.size());

    double worst = 0;
    for (int i = 0; i < 64; ++i) {
        int tile = i % tiles, query = (i * 131) % tokens, head = (i * 7) % heads, channel = (i * 29) % dim;
        size_t index = ((static_cast<size_t>(tile) * tokens + query) * heads + head) * dim + channel;
        worst = std::fmax(worst, std::fabs(from_bf16(out[index]) - attend(qkv, tile, query, head, channel, tokens, heads, dim)));
    }
    std::printf("%u programs, largest error %.4f\n", programs, worst);
    return worst < 0.02 ? 0 : 1;  // a NaN fails too
}

int main(int count, char** argument) {
    if (count != 11) {
        std::fprintf(stderr, "usage: %s FILE ENTRY THREADS SHARED_MEMORY BLOCK_M PEEL TILES TOKENS HEADS HEAD_DIM\n", argument[0]);
        return 2;
    }
    try {
        return run(argument);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
