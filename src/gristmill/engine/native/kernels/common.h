// Vectors of 16 lanes and small helpers that all kernels share.
//
// The vector types are the compiler's own, so every kernel also compiles for a processor without AVX-512, where the
// compiler splits a vector into the registers it has. GRISTMILL_PORTABLE leaves out the instructions that only some
// processors have, to test that path anywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(GRISTMILL_PORTABLE)
#define GRISTMILL_AVX512 1
#if defined(__AVX512VNNI__)
#define GRISTMILL_VNNI 1
#endif
#if defined(__AVX512BF16__)
#define GRISTMILL_BF16 1
#endif
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define GRISTMILL_INLINE inline __attribute__((always_inline))

namespace gristmill {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(64)));

template <class V>
GRISTMILL_INLINE V load(const void* from) {  // any alignment
    V vector;
    std::memcpy(&vector, from, sizeof(V));
    return vector;
}

template <class V>
GRISTMILL_INLINE void store(void* to, V vector) {
    std::memcpy(to, &vector, sizeof(V));
}

// 16 float16 numbers, finite ones, as float32.
GRISTMILL_INLINE Floats load_float16(const uint16_t* from) {
#if defined(GRISTMILL_AVX512)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
    const Words bits = __builtin_convertvector(load<Halves>(from), Words);
    const Floats magnitude = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;  // moves the exponent's bias, zeros included
    return (Floats)((Words)magnitude | (bits & 0x8000) << 16);
#endif
}

// 16 bfloat16 numbers as float32.
GRISTMILL_INLINE Floats load_bfloat16(const uint16_t* from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

GRISTMILL_INLINE Floats splat(float x) { return Floats{} + x; }
GRISTMILL_INLINE Ints splat(int32_t x) { return Ints{} + x; }

// The nearest bfloat16, ties to even; NaN stays NaN.
GRISTMILL_INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 64);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

GRISTMILL_INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Indices [begin, end) of `total` that fall to one of `threads`; sizes differ by one at most.
struct Share {
    long begin, end;
    Share(long total, int thread, int threads) : begin(total * thread / threads), end(total * (thread + 1) / threads) {}
};

GRISTMILL_INLINE long round_up(long x, long multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace gristmill
