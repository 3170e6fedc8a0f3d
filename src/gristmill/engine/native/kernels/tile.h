// Packed tiles of keys and values, and the small matrix product that attention does with them.
#pragma once

#include <algorithm>

#include "elementwise.h"

namespace gristmill {

enum CacheKind : int32_t { CACHE_FLOAT32 = 0, CACHE_BFLOAT16 = 1, CACHE_INT8 = 2 };

// One cell of a packed tile is 32 bits: a float, or two bfloat16 that are multiplied together.
struct FloatTile {
    static constexpr bool coarse = false;
    static constexpr int pair = 1;
    static GRISTMILL_INLINE Floats product(Words a, Words b, Floats sum) { return fused((Floats)a, (Floats)b, sum); }
};
#if defined(GRISTMILL_BF16)
struct PairTile {
    static constexpr bool coarse = true;
    static constexpr int pair = 2;
    static GRISTMILL_INLINE Floats product(Words a, Words b, Floats sum) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
GRISTMILL_INLINE Words pairs_of(Floats low, Floats high) {
    return (Words)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
#endif

// c (rows, 16 * width) = a (rows, steps) b (width, steps, 16), all but c in cells.
template <class T, int rows, int width>
inline void tile_product(const uint32_t* a, long lda, const uint32_t* b, long ldb, long steps, float* c, long ldc) {
    Floats sums[rows][width] = {};
    for (long step = 0; step < steps; step++) {
        Words right[width];
#pragma GCC unroll 4
        for (int v = 0; v < width; v++) right[v] = load<Words>(b + v * ldb + step * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            Words left = Words{} + a[r * lda + step];
#pragma GCC unroll 4
            for (int v = 0; v < width; v++) sums[r][v] = T::product(left, right[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < width; v++) store(c + r * ldc + v * LANES, sums[r][v]);
}

template <class T, int rows>
inline void tile_rows(const uint32_t* a, long lda, const uint32_t* b, long ldb, long steps, float* c, long ldc,
                      long vectors) {
    for (; vectors >= 4; vectors -= 4, b += 4 * ldb, c += 4 * LANES)
        tile_product<T, rows, 4>(a, lda, b, ldb, steps, c, ldc);
    if (vectors == 3) tile_product<T, rows, 3>(a, lda, b, ldb, steps, c, ldc);
    if (vectors == 2) tile_product<T, rows, 2>(a, lda, b, ldb, steps, c, ldc);
    if (vectors == 1) tile_product<T, rows, 1>(a, lda, b, ldb, steps, c, ldc);
}

template <class T>
inline void product(long rows, const uint32_t* a, long lda, const uint32_t* b, long ldb, long steps, float* c, long ldc,
                    long vectors) {
    switch (rows) {
        case 6: return tile_rows<T, 6>(a, lda, b, ldb, steps, c, ldc, vectors);
        case 5: return tile_rows<T, 5>(a, lda, b, ldb, steps, c, ldc, vectors);
        case 4: return tile_rows<T, 4>(a, lda, b, ldb, steps, c, ldc, vectors);
        case 3: return tile_rows<T, 3>(a, lda, b, ldb, steps, c, ldc, vectors);
        case 2: return tile_rows<T, 2>(a, lda, b, ldb, steps, c, ldc, vectors);
        default: return tile_rows<T, 1>(a, lda, b, ldb, steps, c, ldc, vectors);
    }
}

// 16 rows of 16 cells become 16 columns.
GRISTMILL_INLINE void transpose(Words (&x)[LANES]) {
#if defined(GRISTMILL_AVX512)
    __m512i a[LANES], b[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), high = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        __m512i high2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        x[i] = (Words)_mm512_shuffle_i32x4(low, low2, 0x88);
        x[i + 4] = (Words)_mm512_shuffle_i32x4(high, high2, 0x88);
        x[i + 8] = (Words)_mm512_shuffle_i32x4(low, low2, 0xdd);
        x[i + 12] = (Words)_mm512_shuffle_i32x4(high, high2, 0xdd);
    }
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) std::swap(x[i][j], x[j][i]);
#endif
}

// 16 cells from value `from` of a stored head that has `dim` of them; int8 as whole numbers, without its scale.
template <class T, int kind>
GRISTMILL_INLINE Words cells(const char* head, long from, long dim) {
    long count = std::min<long>(dim - from, LANES * T::pair);
#if defined(GRISTMILL_BF16)
    if (T::pair == 2) {
        __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
        if (kind == CACHE_BFLOAT16) return (Words)_mm512_maskz_loadu_epi16(mask, head + 2 * from);
        __m256i bytes = _mm256_maskz_loadu_epi8(mask, head + from);
        __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes));
        __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1));
        return pairs_of((Floats)_mm512_cvtepi32_ps(low), (Floats)_mm512_cvtepi32_ps(high));
    }
#endif
    Floats values{};
    if (kind == CACHE_FLOAT32) return (Words)load_part((const float*)head + from, count);
    for (long i = 0; i < count; i++)
        values[i] = kind == CACHE_BFLOAT16 ? from_bf16(((const uint16_t*)head)[from + i])
                                           : (float)((const int8_t*)head)[from + i];
    return (Words)values;
}

}  // namespace gristmill
