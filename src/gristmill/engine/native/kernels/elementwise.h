// What a decoder layer does to one row between its matrix products: norms, rotations, activations.
//
// All in float32; a row's result depends on that row alone.
#pragma once

#include <cmath>

#include "common.h"

namespace gristmill {

GRISTMILL_INLINE Floats fused(Floats a, Floats b, Floats c) {  // a * b + c
#if defined(GRISTMILL_AVX512)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

GRISTMILL_INLINE Floats largest(Floats a, Floats b) {  // NaN in b stays
#if defined(GRISTMILL_AVX512)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

GRISTMILL_INLINE float sum_of(Floats x) {
#if defined(GRISTMILL_AVX512)
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}

GRISTMILL_INLINE float largest_of(Floats x) {
#if defined(GRISTMILL_AVX512)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = top > x[i] ? top : x[i];
    return top;
#endif
}

// The first `count` of 16 lanes, the others zero; and storing only those.
GRISTMILL_INLINE Floats load_part(const float* from, long count) {
    if (count >= LANES) return load<Floats>(from);
    Floats part{};
    std::memcpy(&part, from, count * sizeof(float));
    return part;
}

GRISTMILL_INLINE void store_part(float* to, Floats x, long count) {
    if (count >= LANES)
        store(to, x);
    else
        std::memcpy(to, &x, count * sizeof(float));
}

GRISTMILL_INLINE void store_bfloat16(uint16_t* to, Floats x, long count) {
#if defined(GRISTMILL_BF16)
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &rounded, count >= LANES ? 2 * LANES : 2 * count);
#else
    for (long i = 0; i < count && i < LANES; i++) to[i] = to_bf16(x[i]);
#endif
}

// 2^x. Relative error 1e-7, and 2^0 is 1; or 8e-5 when `coarse`, which is below the rounding of bfloat16. -inf gives 0,
// NaN stays.
template <bool coarse = false>
GRISTMILL_INLINE Floats exp2_of(Floats x) {
#if defined(GRISTMILL_AVX512)
    x = largest(splat(-200.0f), x);
    Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, 0);
#else
    Floats kept = x;
    x = x < -126.0f ? splat(-126.0f) : x;
    x = x > 127.0f ? splat(127.0f) : x;
    Floats shifted = x + 12582912.0f;  // the whole part is in the low bits of the mantissa
    Floats whole = shifted - 12582912.0f;
#endif
    Floats part = x - whole, power;
    if (coarse) {
        power = fused(splat(0.0551714931f), part, splat(0.242611109f));
        power = fused(power, part, splat(0.693261018f));
        power = fused(power, part, splat(0.999928075f));
    } else {
        power = fused(splat(0.00132647201f), part, splat(0.00967151314f));
        power = fused(power, part, splat(0.0555073377f));
        power = fused(power, part, splat(0.240222421f));
        power = fused(power, part, splat(0.693146978f));
        power = fused(power, part, splat(1.0f));
    }
#if defined(GRISTMILL_AVX512)
    return (Floats)_mm512_scalef_ps((__m512)power, (__m512)whole);
#else
    Ints bits = ((Ints)shifted - 0x4b400000 + 127) << 23;
    Floats result = power * (Floats)bits;
    return kept < -126.0f ? Floats{} : result;
#endif
}

enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2 };
constexpr float LOG2_E = 1.44269504f;

GRISTMILL_INLINE Floats sigmoid_of(Floats x) { return 1.0f / (1.0f + exp2_of(x * -LOG2_E)); }

// Abramowitz and Stegun 7.1.26: absolute error 1.5e-7.
GRISTMILL_INLINE Floats erf_of(Floats x) {
    Floats size = x < 0.0f ? -x : x;
    Floats t = 1.0f / fused(splat(0.3275911f), size, splat(1.0f));
    Floats sum = fused(splat(1.061405429f), t, splat(-1.453152027f));
    sum = fused(sum, t, splat(1.421413741f));
    sum = fused(sum, t, splat(-0.284496736f));
    sum = fused(sum, t, splat(0.254829592f));
    Floats result = 1.0f - sum * t * exp2_of(x * x * -LOG2_E);
    return x < 0.0f ? -result : result;
}

template <int activation>
GRISTMILL_INLINE Floats activate(Floats x) {
    if (activation == SILU) return x * sigmoid_of(x);
    if (activation == GELU) return x * 0.5f * (1.0f + erf_of(x * 0.70710678f));
    return x * sigmoid_of(x * fused(x * x, splat(0.0713548163f), splat(1.59576912f)));
}

// into = act(gate) * up.
template <int activation>
inline void gated_row(const float* gate, const float* up, float* into, long size) {
    for (long i = 0; i < size; i += LANES) {
        long count = size - i;
        store_part(into + i, activate<activation>(load_part(gate + i, count)) * load_part(up + i, count), count);
    }
}

inline void gated(int activation, const float* gate, const float* up, float* into, long size) {
    if (activation == SILU) return gated_row<SILU>(gate, up, into, size);
    if (activation == GELU) return gated_row<GELU>(gate, up, into, size);
    gated_row<GELU_TANH>(gate, up, into, size);
}

// into = x / sqrt(mean(x^2) + eps) * weight; may be x itself. Without a weight it is a copy.
inline void rms_norm(const float* x, const float* weight, float eps, float* into, long size) {
    if (!weight) {
        if (into != x) std::memcpy(into, x, size * sizeof(float));
        return;
    }
    Floats squares[2] = {};
    for (long i = 0, turn = 0; i < size; i += LANES, turn ^= 1) {
        Floats part = load_part(x + i, size - i);
        squares[turn] = fused(part, part, squares[turn]);
    }
    float factor = 1.0f / std::sqrt(sum_of(squares[0] + squares[1]) / (float)size + eps);
    for (long i = 0; i < size; i += LANES) {
        long count = size - i;
        store_part(into + i, load_part(x + i, count) * factor * load_part(weight + i, count), count);
    }
}

// Turn the pairs (i, i + dim / 2) of one head in place. The tables are those of gristmill.model.positions.rope: `dim`
// cosines, and `dim` sines of which the first half carries a minus.
inline void rotate(float* head, const float* cosines, const float* sines, long dim) {
    long half = dim / 2;
    for (long i = 0; i < half; i += LANES) {
        long count = half - i;
        Floats first = load_part(head + i, count), second = load_part(head + half + i, count);
        Floats cosine = load_part(cosines + i, count), sine = load_part(sines + half + i, count);
        store_part(head + i, first * cosine - second * sine, count);
        store_part(head + half + i, fused(first, sine, second * cosine), count);
    }
}

}  // namespace gristmill
