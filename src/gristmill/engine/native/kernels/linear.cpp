// Products of packed layers, tile by tile.
#include <omp.h>

#include <limits>

#include "linear.h"

namespace gristmill {
namespace {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12;  // 12 rows x 2 vectors of sums, and the operands, in 32 registers
#else
constexpr int TILE_ROWS = 3;  // two registers to a vector, 16 of them
#endif

long panels_of(const Linear& l) { return (l.out + PANEL - 1) / PANEL; }
long groups_of(const Linear& l) { return (l.in + l.group - 1) / l.group; }

// acc + the sum of products of the two bfloat16 in each lane.
GRISTMILL_INLINE Floats dot2(Floats acc, Words w, Words x) {
#if defined(GRISTMILL_BF16)
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
    acc += (Floats)(w & 0xffff0000) * (Floats)(x & 0xffff0000);
    return acc + (Floats)(w << 16) * (Floats)(x << 16);
#endif
}

// acc + the sum of products of the four bytes in each lane: w without sign, x with.
GRISTMILL_INLINE Ints dot4(Ints acc, Words w, Ints x) {
#if defined(GRISTMILL_VNNI)
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#else
    const Shorts even = (Shorts)(w & 0x00ff00ff) * ((Shorts)(x << 8) >> 8);  // 255 * 127 fits 16 bits
    const Shorts odd = (Shorts)((w >> 8) & 0x00ff00ff) * ((Shorts)x >> 8);
    return acc + ((Ints)even >> 16) + ((Ints)even << 16 >> 16) + ((Ints)odd >> 16) + ((Ints)odd << 16 >> 16);
#endif
}

GRISTMILL_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// 16 signed bytes as float32.
GRISTMILL_INLINE Floats load_int8(const char* from) {
#if defined(GRISTMILL_AVX512)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
    return __builtin_convertvector(load<Bytes>(from), Floats);
#endif
}

GRISTMILL_INLINE Floats load_scales(const Linear& l, const char* from) {
    if (l.scale_type == FLOAT32) return load<Floats>(from);
    return l.scale_type == FLOAT16 ? load_float16((const uint16_t*)from) : load_bfloat16((const uint16_t*)from);
}

// Fetches weights of the next panel while a tile computes: `step` bytes, 64 at most, for each 128 that the tile reads.
struct Ahead {
    const char* at;
    long step;
    GRISTMILL_INLINE void next() {
        __builtin_prefetch(at, 0, 2);
        at += step;
    }
};

// A tile: R rows of x times one panel of weights, left in sums[R][2].
template <int R>
GRISTMILL_INLINE void tile_float32(const Linear& l, const char* w, const Rows& x, const char* xs, Ahead ahead,
                                   Floats (&sums)[R][2]) {
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = Floats{};
    for (long k = 0; k < l.in; k++, w += 128, xs += 4) {
        const Floats w0 = load<Floats>(w), w1 = load<Floats>(w + 64);
        ahead.next();
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const Floats v = splat(load<float>(xs + r * x.stride));
            sums[r][0] += w0 * v;
            sums[r][1] += w1 * v;
        }
    }
}

template <int R>
GRISTMILL_INLINE void tile_bfloat16(const Linear& l, const char* w, const Rows& x, const char* xs, Ahead ahead,
                                    Floats (&sums)[R][2]) {
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = Floats{};
    for (long k = 0; k < l.in; k += 2, w += 128, xs += 4) {
        const Words w0 = load<Words>(w), w1 = load<Words>(w + 64);
        ahead.next();
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const Words v = (Words)splat(load<int32_t>(xs + r * x.stride));
            sums[r][0] = dot2(sums[r][0], w0, v);
            sums[r][1] = dot2(sums[r][1], w1, v);
        }
    }
}

template <int R>
GRISTMILL_INLINE void tile_int8(const Linear& l, const char* w, const Rows& x, const char* xs, const float* scales,
                                const float* row_scales, const int32_t* starts, Ahead ahead, Floats (&sums)[R][2]) {
    Ints acc[R][2];
    for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = splat(starts[r]);
    for (long k = 0; k < l.in; k += 4, w += 128, xs += 4) {
        const Words w0 = load<Words>(w), w1 = load<Words>(w + 64);
        ahead.next();
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const Ints v = splat(load<int32_t>(xs + r * x.stride));
            acc[r][0] = dot4(acc[r][0], w0, v);
            acc[r][1] = dot4(acc[r][1], w1, v);
        }
    }
    const Floats s0 = load<Floats>(scales), s1 = load<Floats>(scales + LANES);
    for (int r = 0; r < R; r++) {
        sums[r][0] = to_floats(acc[r][0]) * row_scales[r] * s0;
        sums[r][1] = to_floats(acc[r][1]) * row_scales[r] * s1;
    }
}

template <int R>
GRISTMILL_INLINE void tile_int8_weights(const Linear& l, const char* w, const Rows& x, const char* xs,
                                        const float* scales, Ahead ahead, Floats (&sums)[R][2]) {
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = Floats{};
    for (long k = 0; k < l.in; k++, w += PANEL, xs += 4) {
        const Floats w0 = load_int8(w), w1 = load_int8(w + LANES);
        if (k % 4 == 0) ahead.next();
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const Floats v = splat(load<float>(xs + r * x.stride));
            sums[r][0] += w0 * v;
            sums[r][1] += w1 * v;
        }
    }
    const Floats s0 = load<Floats>(scales), s1 = load<Floats>(scales + LANES);
    for (int r = 0; r < R; r++) sums[r][0] *= s0, sums[r][1] *= s1;
}

template <int R>
GRISTMILL_INLINE void tile_int4(const Linear& l, const char* w, const Rows& x, const char* xs, const float* row_scales,
                                const int32_t* starts, Ahead ahead, Floats (&sums)[R][2]) {
    const long groups = groups_of(l);
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = Floats{};
    for (long g = 0; g < groups; g++) {
        Ints acc[R][2];
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = splat(starts[r * groups + g]);
        for (int k = 0; k < l.group; k += 8, w += 128, xs += 8) {
            const Words b0 = load<Words>(w), b1 = load<Words>(w + 64);
            const Words low0 = b0 & 0x0f0f0f0f, high0 = (b0 >> 4) & 0x0f0f0f0f;
            const Words low1 = b1 & 0x0f0f0f0f, high1 = (b1 >> 4) & 0x0f0f0f0f;
            ahead.next();
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                const Ints v0 = splat(load<int32_t>(xs + r * x.stride));
                const Ints v1 = splat(load<int32_t>(xs + r * x.stride + 4));
                acc[r][0] = dot4(dot4(acc[r][0], low0, v0), high0, v1);
                acc[r][1] = dot4(dot4(acc[r][1], low1, v0), high1, v1);
            }
        }
        const int vector = l.scale_type == FLOAT32 ? 64 : 32;
        const Floats s0 = load_scales(l, w), s1 = load_scales(l, w + vector);
        w += 2 * vector;
        for (int r = 0; r < R; r++) {
            const float s = row_scales[r * groups + g];
            sums[r][0] += to_floats(acc[r][0]) * s * s0;
            sums[r][1] += to_floats(acc[r][1]) * s * s1;
        }
    }
}

template <int R>
void tile(const Linear& l, long panel, const Rows& x, long row, Ahead ahead, float* y, long ldy, bool accumulate) {
    const char* w = (const char*)l.weights + panel * panel_bytes(l);
    const char* xs = x.values + row * x.stride;
    Floats sums[R][2];
    switch (l.kind) {
        case FLOAT32: tile_float32<R>(l, w, x, xs, ahead, sums); break;
        case BFLOAT16: tile_bfloat16<R>(l, w, x, xs, ahead, sums); break;
        case INT8_WEIGHTS: tile_int8_weights<R>(l, w, x, xs, l.scales + panel * PANEL, ahead, sums); break;
        case INT8:
            tile_int8<R>(l, w, x, xs, l.scales + panel * PANEL, x.scales + row, x.sums + row, ahead, sums);
            break;
        default: {
            const long first = row * groups_of(l);
            tile_int4<R>(l, w, x, xs, x.scales + first, x.sums + first, ahead, sums);
        }
    }
    if (l.bias) {
        const Floats b0 = load<Floats>(l.bias + panel * PANEL), b1 = load<Floats>(l.bias + panel * PANEL + LANES);
        for (int r = 0; r < R; r++) sums[r][0] += b0, sums[r][1] += b1;
    }
    const long count = l.out - panel * PANEL;
    y += row * ldy + panel * PANEL;
    for (int r = 0; r < R; r++, y += ldy) {
        if (count < PANEL) {
            const float* from = (const float*)sums[r];
            for (int c = 0; c < count; c++) y[c] = accumulate ? y[c] + from[c] : from[c];
        } else {
            store(y, accumulate ? load<Floats>(y) + sums[r][0] : sums[r][0]);
            store(y + LANES, accumulate ? load<Floats>(y + LANES) + sums[r][1] : sums[r][1]);
        }
    }
}

template <int R = TILE_ROWS>
void tile_of(int rows, const Linear& l, long panel, const Rows& x, long row, Ahead ahead, float* y, long ldy,
             bool accumulate) {
    if constexpr (R > 0) {
        if (rows == R) return tile<R>(l, panel, x, row, ahead, y, ldy, accumulate);
        tile_of<R - 1>(rows, l, panel, x, row, ahead, y, ldy, accumulate);
    }
}

}  // namespace

void multiply(const Linear& l, const Rows& x, long rows, float* y, long ldy, bool accumulate, int thread,
              int threads) {
    const long panels = panels_of(l), blocks = (rows + TILE_ROWS - 1) / TILE_ROWS, bytes = panel_bytes(l);
    // Few panels for many threads: the blocks of rows are split too.
    const long parts = panels >= 4 * threads ? 1 : blocks < threads ? blocks : threads;
    const Share items(panels * parts, thread, threads);
    for (long item = items.begin; item < items.end; item++) {
        const long panel = item / parts;
        const char* next = (const char*)l.weights + (panel + 1) * bytes;
        const Share mine(blocks, item % parts, parts);
        for (long block = mine.begin; block < mine.end; block++) {
            const Share row(rows, block, blocks);
            // Each block of rows fetches its part of the next panel; with one block the hardware follows the stream.
            const Ahead ahead = {next + block * (bytes / blocks), blocks == 1 ? 0 : 128 / blocks};
            tile_of(row.end - row.begin, l, panel, x, row.begin, ahead, y, ldy, accumulate);
        }
    }
}

void argmax_rows(const float* logits, long ld, long rows, long vocab, int64_t* index, float* value, int thread,
                 int threads) {
    const Share share(rows, thread, threads);
    for (long row = share.begin; row < share.end; row++) {
        const float* x = logits + row * ld;
        Floats largest = splat(-std::numeric_limits<float>::infinity());
        Ints nan = {};
        long k = 0;
        for (; k + LANES <= vocab; k += LANES) {
            const Floats v = load<Floats>(x + k);
            largest = v > largest ? v : largest;
            nan |= v != v;
        }
        float most = -std::numeric_limits<float>::infinity();
        bool bad = false;
        for (int lane = 0; lane < LANES; lane++) {
            most = largest[lane] > most ? largest[lane] : most;
            bad |= nan[lane] != 0;
        }
        for (; k < vocab; k++) {
            most = x[k] > most ? x[k] : most;
            bad |= x[k] != x[k];
        }
        long at = 0;
        while (!bad && x[at] != most) at++;
        index[row] = bad ? -1 : at;
        value[row] = bad ? std::numeric_limits<float>::quiet_NaN() : most;
    }
}

}  // namespace gristmill

// What Python calls. Each opens a parallel region of its own.
extern "C" {

size_t gristmill_packed_bytes(const gristmill::Linear* linear) { return gristmill::packed_bytes(*linear); }

void gristmill_pack(gristmill::Linear* linear, const void* weight, const float* scales, const float* bias, void* packed,
                    int threads) {
    gristmill::place(*linear, packed);
#pragma omp parallel num_threads(threads)
    gristmill::pack(*linear, weight, scales, bias, packed, omp_get_thread_num(), omp_get_num_threads());
}

void gristmill_place(gristmill::Linear* linear, const void* packed) { gristmill::place(*linear, packed); }

size_t gristmill_rows_bytes(const gristmill::Linear* linear, long rows) { return gristmill::rows_bytes(*linear, rows); }

// y (rows, out) = x (rows, in) W' + bias; `scratch` is aligned to 64 and holds rows_bytes.
void gristmill_linear(const gristmill::Linear* linear, const float* x, long rows, void* scratch, float* y,
                      int threads) {
    const gristmill::Rows prepared = gristmill::rows_at(*linear, scratch, rows);
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        gristmill::prepare_rows(prepared, x, linear->in, rows, thread, team);
#pragma omp barrier
        gristmill::multiply(*linear, prepared, rows, y, linear->out, false, thread, team);
    }
}

void gristmill_argmax_rows(const float* logits, long rows, long vocab, int64_t* index, float* value, int threads) {
#pragma omp parallel num_threads(threads)
    gristmill::argmax_rows(logits, vocab, rows, vocab, index, value, omp_get_thread_num(), omp_get_num_threads());
}

}
