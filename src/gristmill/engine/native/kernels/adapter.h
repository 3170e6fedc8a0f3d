// Low-rank adapters: what they add to the outputs of a layer's products, twin of gristmill.model.lora.low_rank.
//
// In float32 whatever the weights are. The order of additions is fixed by the adapter alone: a row's result does not
// depend on the rows beside it, nor on the number of threads.
#pragma once

#include <algorithm>

#include "elementwise.h"

namespace gristmill {

// scale * up (down x), added to outputs [begin, begin + rows) of a product. Python fills it; rank 0: nothing.
struct LowRank {
    const float* down;  // (rank, in)
    const float* up;    // (rank, rows): transposed, with the scale
    int32_t begin, rows, rank, unused;
};

// The matrices of one layer that stand apart in an adapter, and those of them that each product has.
struct AdapterLayer {
    LowRank parts[7];  // queries, keys, values; output; gate, up; down
};
struct Product {
    int first, count;
};
constexpr Product QKV{0, 3}, OUTPUT{3, 1}, GATE_UP{4, 2}, DOWN{6, 1};

// low (rows, ranks) = x (rows, in) down (ranks, in)'.
template <int rows, int ranks>
inline void read_tile(const float* down, const float* x, long in, float* low, long ldl) {
    Floats sums[rows][ranks] = {};
    auto step = [&](long i, auto loaded) {
        Floats right[ranks];
#pragma GCC unroll 8
        for (int r = 0; r < ranks; r++) right[r] = loaded(down + r * in + i);
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++) {
            const Floats left = loaded(x + t * in + i);
#pragma GCC unroll 8
            for (int r = 0; r < ranks; r++) sums[t][r] = fused(left, right[r], sums[t][r]);
        }
    };
    long i = 0;
    for (; i + LANES <= in; i += LANES) step(i, [](const float* from) { return load<Floats>(from); });
    if (i < in) step(i, [count = in - i](const float* from) { return load_part(from, count); });
    for (int t = 0; t < rows; t++)
        for (int r = 0; r < ranks; r++) low[t * ldl + r] = sum_of(sums[t][r]);
}

// What the parts of a product read of inputs x (rows, in), one part after another in each row of low (rows, ldl). Each
// thread reads some ranks of all rows.
inline void read_low(const AdapterLayer& layer, Product product, const float* x, long rows, long in, float* low,
                     long ldl, int thread, int threads) {
    for (int i = product.first; i < product.first + product.count; i++) {
        const LowRank& part = layer.parts[i];
        const Share mine(part.rank, thread, threads);
        for (long t = 0, block; t < rows; t += block) {
            block = rows - t >= 4 ? 4 : 1;
            for (long r = mine.begin, width; r < mine.end; r += width) {
                width = mine.end - r >= 4 ? 4 : 1;
                const float *down = part.down + r * in, *from = x + t * in;
                float* into = low + t * ldl + r;
                if (block == 4)
                    width == 4 ? read_tile<4, 4>(down, from, in, into, ldl) : read_tile<4, 1>(down, from, in, into, ldl);
                else
                    width == 4 ? read_tile<1, 4>(down, from, in, into, ldl) : read_tile<1, 1>(down, from, in, into, ldl);
            }
        }
        low += part.rank;
    }
}

// y (rows, count) += low (rows, rank) up (rank, count), for at most 16 outputs.
template <int rows>
inline void add_tile(const LowRank& part, const float* up, const float* low, long ldl, float* y, long ldy, long count) {
    Floats sums[rows];
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++) sums[t] = load_part(y + t * ldy, count);
    for (long r = 0; r < part.rank; r++) {
        const Floats right = load_part(up + r * part.rows, count);
#pragma GCC unroll 4
        for (int t = 0; t < rows; t++) sums[t] = fused(splat(low[t * ldl + r]), right, sums[t]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < rows; t++) store_part(y + t * ldy, sums[t], count);
}

// And what they add to the product's outputs y (rows, ldy). Each thread adds to some outputs of all rows.
inline void add_low(const AdapterLayer& layer, Product product, const float* low, long ldl, long rows, float* y,
                    long ldy, int thread, int threads) {
    for (int i = product.first; i < product.first + product.count; i++) {
        const LowRank& part = layer.parts[i];
        const Share mine(part.rank ? (part.rows + LANES - 1) / LANES : 0, thread, threads);
        for (long j = mine.begin * LANES; j < mine.end * LANES; j += LANES) {
            const long count = part.rows - j;
            long t = 0;
            for (; t + 4 <= rows; t += 4)
                add_tile<4>(part, part.up + j, low + t * ldl, ldl, y + t * ldy + part.begin + j, ldy, count);
            for (; t < rows; t++)
                add_tile<1>(part, part.up + j, low + t * ldl, ldl, y + t * ldy + part.begin + j, ldy, count);
        }
        low += part.rank;
    }
}

}  // namespace gristmill
